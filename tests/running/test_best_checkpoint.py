"""Which checkpoint is the best one, and that it is there whatever came after it."""

import os
import shutil

import h5py
import numpy as np
import pytest
from comparing import same
from problems import write_pendulum

from iql_torchrl import load_policy, train
from iql_torchrl.errors import CheckpointError
from iql_torchrl.evaluation.rollouts import Evaluator
from iql_torchrl.training.checkpoints import list_checkpoints, load_checkpoint, step_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = write_pendulum(tmp_path_factory.mktemp("log") / "pendulum.hdf5")
    with h5py.File(path) as file:
        return {key: file[key][()] for key in ("observations", "actions", "rewards", "terminals", "timeouts")}


def trained(log, folder, environment="Pendulum-v1", steps=80, resume=False, **options):
    chosen = {
        "algorithm.hidden_dims": [16, 16],
        "algorithm.batch_size": 32,
        "algorithm.actor_lr": 0.03,  # so that policies differ, and not each is better than the one before
        "algorithm.opt_decay_schedule": None,  # which depends on the last step
        "train.compile": False,
        "train.device": "cpu",
        "train.log_interval": 10,
        "eval.interval": 10,
        "eval.episodes": 2,
        "checkpoint.interval": 40,
        "checkpoint.keep": 1,
        **options,
    }
    data = {"environment": environment, "steps": steps, "folder": folder, "resume": resume, "quiet": True}
    return train(log, **data, options=chosen)


def steps_of(folder, best):
    return [step_of(path) for path in list_checkpoints(folder / "checkpoints", best=best)]


def test_the_checkpoint_of_the_best_evaluation_is_kept_beside_the_last(log, tmp_path):
    run = trained(log, tmp_path)
    returns = {int(row["step"]): row["episode_return_mean"] for row in run.records.evaluations()}
    best = max(returns, key=returns.get)
    assert best not in (40, 80), "this test shows little: choose another seed"
    assert steps_of(tmp_path, best=True) == [best] and steps_of(tmp_path, best=False) == [80]
    assert run.summary["best_step"] == best

    # It is the policy that was evaluated.
    policy = load_policy(tmp_path, best=True)
    evaluation = Evaluator(run.data.environment, episodes=2).evaluate(policy, seed=1000)
    assert float(evaluation.returns.mean()) == returns[best]
    evaluation = Evaluator(run.data.environment, episodes=2).evaluate(load_policy(tmp_path), seed=1000)
    assert float(evaluation.returns.mean()) == returns[80]
    with pytest.raises(CheckpointError, match=r"is not a run folder, of which best=true takes the best one"):
        load_policy(tmp_path / "checkpoints" / "step-00000080.pt", best=True)


def test_without_a_simulator_it_is_the_best_on_held_out_transitions(log, tmp_path):
    run = trained(log, tmp_path / "iql", None, **{"dataset.validation_fraction": 0.25})
    errors = {int(row["step"]): row["validation_td_error"] for row in run.records.metrics()}
    assert steps_of(tmp_path / "iql", best=True) == [min(errors, key=errors.get)]

    run = trained(log, tmp_path / "cloning", None, **{"dataset.validation_fraction": 0.25, "algorithm.temperature": 0})
    likelihoods = {int(row["step"]): row["validation_log_prob"] for row in run.records.metrics()}
    assert steps_of(tmp_path / "cloning", best=True) == [max(likelihoods, key=likelihoods.get)]

    trained(log, tmp_path / "nothing", None, **{"dataset.validation_fraction": 0})
    assert steps_of(tmp_path / "nothing", best=True) == []
    with pytest.raises(CheckpointError, match=r"without best-step-\*.pt; nothing was evaluated in that run"):
        load_policy(tmp_path / "nothing", best=True)


def test_a_run_that_goes_on_from_before_its_best_evaluation_ends_with_the_same_files(log, tmp_path):
    trained(log, tmp_path / "whole")
    expected = sorted(os.listdir(tmp_path / "whole" / "checkpoints"))
    (best,) = steps_of(tmp_path / "whole", best=True)
    trained(log, tmp_path / "begun", steps=best - 10, **{"checkpoint.interval": best - 10})
    shutil.copytree(tmp_path / "begun", tmp_path / "resumed")
    # As if a better one had come after the checkpoint that the run goes on from.
    stale = tmp_path / "resumed" / "checkpoints" / f"best-step-{best + 10:08d}.pt"
    shutil.copy(tmp_path / "resumed" / "checkpoints" / f"step-{best - 10:08d}.pt", stale)
    trained(log, tmp_path / "resumed", resume=True)
    assert sorted(os.listdir(tmp_path / "resumed" / "checkpoints")) == expected
    name = f"checkpoints/best-step-{best:08d}.pt"
    one, other = (load_checkpoint(tmp_path / run / name) for run in ("whole", "resumed"))
    assert same(one["training"], other["training"]) and same(one["random"], other["random"])


def test_as_long_as_a_run_may_go_on_from_before_the_best_the_one_before_is_kept(log, tmp_path):
    run = trained(log, tmp_path, steps=70, **{"checkpoint.interval": 1000})
    returns = [row["episode_return_mean"] for row in run.records.evaluations()]
    bests = [10 * (place + 1) for place, one in enumerate(returns) if one == max(returns[: place + 1])]
    assert len(bests) > 1, "this test shows little: choose another seed"
    assert steps_of(tmp_path, best=True) == [max(bests)]  # after the last update


def test_each_of_several_seeds_has_its_own(log, tmp_path):
    run = trained(log, tmp_path, **{"train.num_seeds": 2})
    for seed in (0, 1):
        returns = {row["step"]: row["episode_return_mean"] for row in run.records.evaluations() if row["seed"] == seed}
        best = max(returns, key=returns.get)
        found = list_checkpoints(tmp_path / "checkpoints" / f"seed-{seed}", best=True)
        assert [step_of(path) for path in found] == [best]
    assert np.isfinite(run.summary["best_score"])
