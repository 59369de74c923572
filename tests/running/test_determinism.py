"""What changes no bit of a run on one machine's CPU, as the section "Determinism" of the package's README claims."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from iql_torchrl import train

OPTIONS = {
    "train.compile": False,
    "train.device": "cpu",
    "train.products": "mkl",
    "train.log_interval": 10,
    "eval.interval": 20,
    "eval.episodes": 1,
    "checkpoint.interval": 20,
}


def log():
    random = np.random.default_rng(0)
    observations = random.standard_normal((400, 3)).astype(np.float32)
    actions = random.uniform(-1.9, 1.9, (400, 1)).astype(np.float32)
    return {"observations": observations, "actions": actions, "rewards": observations[:, 0]} | {
        "terminals": np.arange(400) % 40 == 39
    }


def trained(folder=None, *, seed=0, **options):
    """Dropout and subsets of critics draw from the process's generator, which all else must leave alone."""
    return train(
        log(),
        environment="Pendulum-v1",
        steps=40,
        seed=seed,
        folder=folder,
        quiet=True,
        options=OPTIONS | {name.replace("__", "."): value for name, value in options.items()},
        hidden_dims=[16, 16],
        batch_size=32,
        dropout_rate=0.1,
        num_qvalue_nets=3,
        num_sampled_qvalue_nets=2,
    )


def parameters(run, index=0):
    return {name: value.clone() for name, value in run.step.state_dict(index)["loss"].items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def expected():
    return parameters(trained())


def test_a_seed_has_the_same_bits_again_and_another_has_others(expected):
    torch.manual_seed(99)  # a run seeds the generators itself
    np.random.seed(99)
    assert same(parameters(trained()), expected)
    assert not same(parameters(trained(seed=1)), expected)


CHANGES = {
    "the logger": {"logger": "tensorboard"},
    "a row every update": {"train__log_interval": 1},
    "a row at the end": {"train__log_interval": 40},
    "evaluations every fifth update": {"eval__interval": 5, "eval__episodes": 2},
    "checkpoints every fifth update": {"checkpoint__interval": 5, "checkpoint__keep": 1},
    "several updates a call": {"train__updates_per_call": 5},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_goes_on_around_the_updates_changes_no_bit(change, expected, tmp_path):
    assert same(parameters(trained(tmp_path / "run", **CHANGES[change])), expected)


def test_a_run_without_a_folder_has_the_bits_of_one_with_it(expected, tmp_path):
    assert same(parameters(trained(tmp_path / "run")), expected)


def test_a_seed_beside_others_in_its_process_has_the_bits_that_it_has_alone(expected):
    beside = trained(train__num_seeds=3)
    for seed, alone in enumerate((expected, *(parameters(trained(seed=seed)) for seed in (1, 2)))):
        assert same(parameters(beside, seed), alone)


@pytest.mark.parametrize("change", CHANGES)
def test_what_goes_on_around_the_updates_changes_no_bit_of_a_seed_beside_others(change, expected, tmp_path):
    assert same(parameters(trained(tmp_path / "run", train__num_seeds=2, **CHANGES[change])), expected)


def test_a_stacked_seed_is_within_rounding_of_itself_alone_and_has_the_same_bits_again():
    without_draws = {"algorithm__dropout_rate": None, "algorithm__num_sampled_qvalue_nets": None}
    stacked = {"train__num_seeds": 2, "train__stacked_seeds": True}
    beside, again = (trained(**stacked, **without_draws) for _ in range(2))
    for seed in (0, 1):
        assert same(parameters(again, seed), parameters(beside, seed))
        for name, value in parameters(trained(seed=seed, **without_draws)).items():
            torch.testing.assert_close(parameters(beside, seed)[name], value, rtol=1e-4, atol=1e-5)


PROGRAM = """
import sys
import torch
sys.path[:0] = sys.argv[3:]
from running.test_determinism import parameters, trained
torch.save(parameters(trained(seed=int(sys.argv[2]))), sys.argv[1])
"""


def test_runs_in_processes_beside_one_another_have_the_bits_of_each_alone(expected, tmp_path):
    command, paths = [sys.executable, "-c", PROGRAM], [path for path in sys.path if path]
    processes = [subprocess.Popen([*command, tmp_path / str(seed), str(seed), *paths]) for seed in (0, 1)]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    for seed, alone in enumerate((expected, parameters(trained(seed=1)))):
        assert same(torch.load(tmp_path / str(seed), weights_only=True), alone)
