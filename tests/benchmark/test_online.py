"""The loops that the online benchmark times do what they are said to do."""

import json

import pytest
from processes import refused, run

from iql_torchrl.benchmark import online
from iql_torchrl.running.stopwatch import Stopwatch


@pytest.mark.slow
def test_every_loop_is_timed_and_only_those_online_act(tmp_path):
    arguments = ["suite=online", "rounds=1", "steps_per_round=4", "warm_up=2", "compile=false", "output=online.json"]
    out = run("benchmark.py", *arguments, cwd=tmp_path)
    found = json.loads((tmp_path / "online.json").read_text())["online"]
    assert len(found) == 5 and all(name in out for name in found)
    for name, row in found.items():
        acts = name != "offline" and "20 updates" not in name  # whose environment stepped before the round
        assert (row["environment"] > 0) == (row["inference"] > 0) == acts, name
        assert row["milliseconds"] >= row["update"] + row["environment"] + row["inference"] > 0
    assert found["CORL's loop"]["times_corl"] == 1 == found["offline"]["update_to_offline"]
    assert "give suite=full" in refused("benchmark.py", "suite=online", "cases=[antmaze]", cwd=tmp_path)


@pytest.mark.slow
def test_corls_loop_adds_a_transition_an_update_to_what_it_draws_from():
    loop = online._Corl(online._prepared(online._composed(1, 1, False)))
    before, observation = loop._size, loop._observation.copy()
    for _ in range(3):
        loop.update(Stopwatch())
    assert loop._size == before + 3
    assert loop._columns[0][before].tolist() == pytest.approx(observation.tolist())
    assert loop._columns[3][before].tolist() == pytest.approx(loop._columns[0][before + 1].tolist())
    loop.close()
