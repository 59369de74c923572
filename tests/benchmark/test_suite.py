"""The suites: which cases and rows there are, what becomes of a row that fails, and wrong options."""

import json
from dataclasses import replace
from typing import get_args

import hydra
import pytest
import torch

from iql_torchrl.benchmark.case import Case, Row
from iql_torchrl.benchmark.chart import draw
from iql_torchrl.benchmark.limit import limit_row
from iql_torchrl.benchmark.machine import machine
from iql_torchrl.benchmark.measuring import measure, table
from iql_torchrl.benchmark.plain_pytorch import plain_row
from iql_torchrl.benchmark.rows import our_row
from iql_torchrl.benchmark.suite import CASES, cases_of, describe, rows_of
from iql_torchrl.configuration.composing import CONFIGS, compose
from iql_torchrl.errors import ConfigurationError
from iql_torchrl.running.options import BenchmarkOptions, CaseName

CPU = torch.device("cpu")
PNG = b"\x89PNG"
SMALL = {"observation_dim": 5, "action_dim": 3, "hidden_dims": (8,), "batch_size": 8, "transitions": 64}


def options_of(*overrides):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("benchmark", list(overrides), BenchmarkOptions)


EXTRACTIONS = ("ddpgbc", "flow", "diffusion")
FAST = ("rounds=2", "steps_per_round=2", "warm_up=1", "transitions=64")


def shrunk(case):
    sizes = SMALL | {"hidden_dims": (8,) * len(case.hidden_dims), "slowness": 1}
    return replace(case, **sizes)


def test_every_case_has_a_name_among_the_options():
    assert get_args(CaseName) == tuple(CASES)
    assert [case.name for case in cases_of(options_of("suite=full"), CPU)] == list(CASES)
    assert list(describe(cases_of(options_of("suite=full", "cases=[discrete]"), CPU))) == ["discrete"]


def test_the_full_suite_measures_every_row_of_every_case(tmp_path):
    options = options_of("suite=full", "compile=false", *FAST)
    cases = [shrunk(case) for case in cases_of(options, CPU)]
    results = measure([(case, rows_of(case, options, str(tmp_path))) for case in cases], options)
    assert [row for row in results if "failed" in row] == []
    found = {}
    for row in results:
        found.setdefault(row["case"], []).append(f"{row['implementation']}, {row['mode']}")
    shipped, limits = "TorchRL as shipped, eager", ["matrix products alone, joint", "matrix products alone, paper"]
    theirs, ours = [shipped, "TorchRL tuned, eager"], "iql_torchrl, paper, eager"
    plain = "plain PyTorch, as CORL writes it, eager"
    assert found == {
        "locomotion": [*theirs, plain, "iql_torchrl, joint, eager", ours, *limits],
        "seeds_4": [shipped, "iql_torchrl, paper, 4 seeds, eager", *limits],
        "seeds_16": [shipped, "iql_torchrl, paper, 16 seeds, eager", *limits],
        "calls_8": [shipped, "iql_torchrl, paper, 8 a call, eager", *limits],
        "antmaze": [*theirs, plain, ours, *limits],
        "discrete": [*theirs, ours, *limits],
        "ogbench_256": [*theirs, plain, ours, *limits],
        "ogbench_1024": [*theirs, plain, ours, *limits],
        **{extraction: [ours, *limits] for extraction in EXTRACTIONS},
    }
    for row in results:
        names = ["milliseconds", "times_limit"]
        names += [] if row["case"] in EXTRACTIONS else ["times_as_fast_as_torchrl"]  # which has none of these
        for name in names:
            low, high = row[f"{name}_quartiles"]
            assert 0 < low <= row[f"{name}_median"] <= high
    for row in results:
        if row["implementation"] == "matrix products alone":
            assert row["times_limit_quartiles"] == [1.0, 1.0] and sum(row["share_of_flops"].values()) > 0.99
    json.dumps(results)
    text = table(results)
    assert all(f"{name}:" in text for name in CASES)
    draw(results, cases, "small", tmp_path / "small.png")
    assert (tmp_path / "small.png").read_bytes().startswith(PNG)


def refuse():
    raise RuntimeError("no compiler today\nand more lines")


class FailsLater:
    """Fails in the measurement, after the first call and the warm-up."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.calls > 4:
            raise RuntimeError("out of luck")


def test_a_row_that_fails_is_listed_with_the_reason_and_stops_no_other(tmp_path):
    options = options_of(*FAST)
    case = Case(name="small", **SMALL)
    rows = [
        Row("TorchRL as shipped", "compiled", "joint", refuse),
        Row("TorchRL tuned", "eager", "joint", FailsLater),
        plain_row(case),
        our_row(case, order="paper", mode="eager"),
        limit_row(case, "paper"),
    ]
    results = measure([(case, rows)], options)
    assert [row.get("failed") for row in results] == [
        "RuntimeError: no compiler today",
        "RuntimeError: out of luck",
        None,
        None,
        None,
    ]
    plain, ours, limit = results[2:]
    assert plain["milliseconds_median"] > 0 and plain["times_limit_median"] is None  # of the joint order there is none
    assert ours["times_limit_median"] > 0 and ours["times_as_fast_as_torchrl_median"] is None
    assert limit["times_limit_median"] == 1.0
    text = table(results)
    assert "failed: RuntimeError: no compiler today" in text and "failed: RuntimeError: out of luck" in text
    draw(results, [case], "failures", tmp_path / "failures.png")
    assert (tmp_path / "failures.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cases=[antmaze]"], "cases must be null with suite=update, got ['antmaze']; give suite=full."),
        (["suite=full", "batch_size=64"], "batch_size must be 256 with suite=full, whose cases have their own, got 64"),
        (["suite=full", "hidden_dims=[8]"], "hidden_dims must be [256, 256] with suite=full"),
        (["suite=full", "seeds=3"], "seeds must be 4 with suite=full"),
        (["suite=all"], "suite must be one of update, full, online, got 'all'"),
        (["suite=full", "cases=[]"], "cases must be a list of locomotion, antmaze"),
        (["suite=full", "cases=[kitchen]"], "cases must be a list of locomotion, antmaze"),
    ],
)
def test_wrong_options_get_one_error(overrides, message):
    with pytest.raises(ConfigurationError) as caught:
        options_of(*overrides)
    assert len(caught.value.mistakes) == 1 and caught.value.mistakes[0].startswith(message)
    assert "\n" not in str(caught.value)


def test_the_machine_is_named():
    found = machine(CPU)
    assert found["processor"] and found["threads"] == torch.get_num_threads() and found["date"].endswith("+00:00")
