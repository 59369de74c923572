"""Sets of a policy that is given: a checkpoint of ours, or a function; and what is refused."""

import json
import sys
import types

import numpy as np
import pytest
from problems import write_pendulum

from iql_torchrl import load_policy, load_transitions, train
from iql_torchrl.collecting.collection import Collection
from iql_torchrl.collecting.statistics import table
from iql_torchrl.configuration.composing import compose, initialised
from iql_torchrl.data.sources import HDF5
from iql_torchrl.errors import ConfigurationError, SimulatorError, UserError
from iql_torchrl.running.options import CollectOptions


def collection(output, *overrides, environment="Pendulum-v1"):
    lines = [f"env.name={environment}", f"output={output}", "rollouts.steps=300", *overrides]
    with initialised():
        return Collection(compose("collect_dataset", lines, CollectOptions))


@pytest.fixture
def module(monkeypatch):
    """A module of policies, by its name."""
    found = types.ModuleType("policies_of_a_user")
    found.pull = lambda observations: -2.5 * observations[:, 2:]
    found.nan = lambda observations: np.full((len(observations), 1), np.nan)
    found.flat = lambda observations: np.zeros(len(observations))
    found.words = lambda observations: np.array([["left"]] * len(observations))
    found.number = 3
    monkeypatch.setitem(sys.modules, found.__name__, found)
    return found.__name__


def transitions_of(folder, name):
    return load_transitions("minari", name=name, root=str(folder), download=False, action_low=-2.0, action_high=2.0)


def test_a_function_acts_within_the_bounds_and_its_episodes_are_whole(tmp_path, module, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert collection(".", f"policy={module}:pull", "name=pull").run() == 0
    found = transitions_of(tmp_path, "Pendulum-v1/pull-v0")
    assert len(found) == 400  # two episodes of 200 steps
    expected = (-2.5 * found["observation"][:, 2:]).clamp(-2, 2)
    np.testing.assert_allclose(2 * found["action"], expected, atol=1e-4)
    assert found["next", "truncated"].nonzero()[:, 0].tolist() == [199, 399]
    assert not found["next", "terminated"].any()
    assert "| pull | 400 | 2 |" in capsys.readouterr().out
    assert (tmp_path / "Pendulum-v1" / "pull.png").exists()


def test_a_checkpoint_or_its_run_is_rolled_out(tmp_path):
    write_pendulum(tmp_path / "log.hdf5")
    options = {"train.compile": False, "algorithm.hidden_dims": [16, 16]}
    train(
        HDF5(path=str(tmp_path / "log.hdf5")),
        environment="Pendulum-v1",
        steps=20,
        folder=tmp_path / "run",
        options=options,
    )
    (path,) = (tmp_path / "run" / "checkpoints").glob("step-*.pt")
    mean = "rollouts.sample_actions=false"
    assert collection(tmp_path, f"policy={path}", "name=mean", mean).run() == 0
    found = transitions_of(tmp_path, "Pendulum-v1/mean-v0")
    np.testing.assert_allclose(2 * found["action"], load_policy(path)(found["observation"].numpy()), atol=1e-4)
    assert collection(tmp_path, f"policy={tmp_path / 'run'}", "name=drawn").run() == 0
    drawn = transitions_of(tmp_path, "Pendulum-v1/drawn-v0")
    assert (drawn["observation"][0] == found["observation"][0]).all()
    assert (drawn["action"] != found["action"]).any()
    with pytest.raises(SimulatorError, match="Hopper-v5 has observations of size 11"):
        collection(tmp_path, f"policy={path}", "name=other", environment="Hopper-v5").run()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nan", "NaN or infinite"),
        ("flat", r"shape \(2,\).*must give real numbers of shape \(2, 1\)"),
        ("words", "real numbers"),
        ("number", "is int, not a function"),
        ("absent", "cannot be imported"),
    ],
)
def test_a_policy_that_is_none_is_refused_and_nothing_is_written(tmp_path, module, function, message):
    with pytest.raises(ConfigurationError, match=message):
        collection(tmp_path, f"policy={module}:{function}", "name=set").run()
    assert not list(tmp_path.glob("**/*-v0"))


def test_a_set_that_is_there_is_left_as_it_is_unless_told(tmp_path, module):
    given = (f"policy={module}:pull", "name=set")
    assert collection(tmp_path, *given).run() == 0
    path = tmp_path / "Pendulum-v1" / "set-v0" / "data" / "metadata.json"
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=r"Pendulum-v1/set-v0 is in .* already.*overwrite=true"):
        collection(tmp_path, *given).run()
    assert path.read_bytes() == before
    assert collection(tmp_path, *given, "seed=1", "overwrite=true").run() == 0
    assert json.loads(path.read_text())["seed"] == 1


@pytest.mark.parametrize(
    ("environment", "overrides", "message"),
    [
        ("CartPole-v1", (), r"Discrete\(2\).*continuous actions"),
        ("Pendulum-v11", (), "unknown environment.*Pendulum-v1"),
        ("Pendulum-v1", ("policy=m:f",), "name must be"),
        ("Pendulum-v1", ("policy=m:f", "name=a/b"), "name must be"),
        ("Pendulum-v1", ("name=set",), "give policy"),
    ],
)
def test_what_cannot_be_collected_is_refused_with_one_clear_error(tmp_path, environment, overrides, message):
    with pytest.raises(UserError, match=message):
        collection(tmp_path / "new", *overrides, environment=environment)
    assert not (tmp_path / "new").exists()


def test_a_policy_that_needs_no_training_needs_no_stable_baselines(tmp_path, module, monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    assert collection(tmp_path, f"policy={module}:pull", "name=set").run() == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path, module):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"output=.*file.* cannot be written"):
        collection(tmp_path / "file", f"policy={module}:pull", "name=set").run()


def test_the_table_leaves_a_cut_episode_out_of_the_returns():
    from iql_torchrl.collecting.steps import Steps

    ends = np.array([False, True, False, True])
    zeros = np.zeros((4, 1))
    steps = Steps(zeros, zeros, np.array([1.0, 2.0, 3.0, 4.0]), zeros, ends & False, ends, cut=True)
    assert "| set | 4 | 2 | 3.0 | 0.0 | 3.0 | 3.0 | 30.0 | 2 | 0% |" in table({"set": steps}, (0.0, 10.0))
