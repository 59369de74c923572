"""Whole runs with the policy losses beside IQL's: kept, resumed, gone on online with, judged; and what is refused."""

import re

import numpy as np
import pytest
import torch
from problems import write_pendulum
from processes import SMALL, refused, rows, run

from iql_torchrl import load_policy, load_transitions, train
from iql_torchrl.configuration.composing import compose, initialised
from iql_torchrl.data.sources import HDF5
from iql_torchrl.errors import CheckpointError, ConfigurationError
from iql_torchrl.evaluation.rollouts import Evaluator
from iql_torchrl.judging.judgement import CLONED, judge_checkpoints
from iql_torchrl.judging.writing import as_text, write_judgement
from iql_torchrl.running.options import JudgeOptions
from iql_torchrl.training.checkpoints import load_checkpoint

EXTRACTIONS = ["ddpgbc", "flow", "diffusion"]
OPTIONS = {
    "train.compile": False,
    "train.device": "cpu",
    "train.products": "mkl",
    "train.log_interval": 10,
    "eval.interval": 20,
    "eval.episodes": 1,
    "checkpoint.interval": 20,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return HDF5(path=str(write_pendulum(tmp_path_factory.mktemp("log") / "log.hdf5")))


def trained(source, extraction, folder=None, *, environment="Pendulum-v1", resume=False, **options):
    return train(
        source,
        environment=environment,
        steps=40,
        folder=folder,
        resume=resume,
        quiet=True,
        options=OPTIONS | {name.replace("__", "."): value for name, value in options.items()},
        extraction=extraction,
        hidden_dims=[16, 16],
        batch_size=32,
        dropout_rate=0.1,
        residual_blocks=1,
    )


def parameters(found):
    return {name: value.clone() for name, value in found.step.state_dict()["loss"].items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("extraction", EXTRACTIONS)
def test_a_run_that_goes_on_has_the_bits_of_one_that_was_not_interrupted(extraction, source, tmp_path):
    expected = trained(source, extraction, tmp_path / "run")
    (tmp_path / "run/checkpoints/step-00000040.pt").unlink()
    found = trained(source, extraction, tmp_path / "run", resume=True)
    assert same(parameters(found), parameters(expected))
    assert rows(tmp_path / "run/eval.csv")[-1]["step"] == "40"


@pytest.mark.slow
@pytest.mark.parametrize("extraction", ["flow", "diffusion"])
def test_what_goes_on_around_the_updates_changes_no_bit(extraction, source):
    expected = parameters(trained(source, extraction))
    for changes in (
        {"train__log_interval": 1, "eval__interval": 5, "eval__num_samples": 3},
        {"train__updates_per_call": 5},
    ):
        assert same(parameters(trained(source, extraction, **changes)), expected)
    assert not same(parameters(trained(source, extraction, train__seed=1)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("extraction", ["awr", *EXTRACTIONS])
def test_a_runs_policy_is_loaded_with_as_many_draws_as_asked_for(extraction, source, tmp_path):
    found = trained(source, extraction, tmp_path / "run")
    observation = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    policy = load_policy(tmp_path / "run")
    assert np.array_equal(policy(observation), found.policy(observation))
    assert policy.chooses == (extraction in ("flow", "diffusion"))
    several = load_policy(tmp_path / "run", num_samples=4, selection="expectile")
    assert several.chooses and several.chooser.noise_shape[0] == 4
    of_run = found.step.losses[0]
    assert several.chooser.expectile == pytest.approx(float(of_run.expectile))
    assert not np.array_equal(several(observation), policy(observation))


@pytest.mark.slow
def test_evaluations_of_the_same_seeds_return_the_same_and_of_other_numbers_of_draws_another(source):
    found = trained(source, "flow", eval__num_samples=2)
    evaluator = Evaluator("Pendulum-v1", episodes=3, seed=5)
    first, second = (evaluator.evaluate(found.policy).returns for _ in range(2))
    assert np.array_equal(first, second)
    found.policy.chooser.num_samples = 3
    assert not np.array_equal(evaluator.evaluate(found.policy).returns, first)
    evaluator.close()


@pytest.mark.slow
@pytest.mark.parametrize("extraction", EXTRACTIONS)
def test_a_run_goes_on_online_and_its_policies_are_judged(extraction, source, tmp_path):
    options = [*SMALL, "dataset=hdf5", f"dataset.path={source.path}", "env.name=Pendulum-v1", "train.steps=20"]
    kind = [f"algorithm.extraction={extraction}", "algorithm.residual_blocks=1", "eval.num_samples=2"]
    run("iql_offline.py", *options, *kind, "run_dir=offline", cwd=tmp_path)
    online = ["checkpoint=offline", "online.steps=20", "algorithm.residual_blocks=1", "run_dir=online"]
    run("iql_finetune.py", *SMALL, *online, cwd=tmp_path)
    assert rows(tmp_path / "online/eval.csv")[-1]["phase"] == "online"
    run("evaluate.py", "checkpoint=online", "num_samples=3", "episodes=1", cwd=tmp_path)
    fast = ["fitted_q.steps=10", "fitted_q.hidden_dims=[16]", "fitted_q.compile=false", "fitted_q.resamples=0"]
    with initialised():
        lines = [*fast, f"checkpoints=[{tmp_path}/offline]", "behaviour_cloning_steps=5", "env.name=null"]
        found = judge_checkpoints(compose("judge", lines, JudgeOptions))
    assert len(found.rows) == 2 and all(np.isfinite(row["fitted_q"]) for row in found.rows)
    assert all(0 < row["action_distance"] < 2 for row in found.rows)
    policy = load_policy(tmp_path / "offline")
    transitions = load_transitions(source, action_low=-2, action_high=2)
    difference = policy(transitions["observation"].numpy()) / float(policy.action_high) - transitions["action"].numpy()
    (distance,) = (row["action_distance"] for row in found.rows if row["policy"] != CLONED)
    assert distance == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-4)
    (likelihood,) = (row["log_prob"] for row in found.rows if row["policy"] != CLONED)
    assert (likelihood is None) == (extraction != "ddpgbc")
    assert len(write_judgement(found, tmp_path)) == 3 and as_text(found)


@pytest.mark.slow
def test_what_is_no_likelihood_is_not_told_as_one(source, tmp_path):
    options = ["dataset=hdf5", f"dataset.path={source.path}", "env.name=null", "train.steps=20"]
    judged = ["eval.offline=true", "eval.offline_steps=10"]
    out = run("iql_offline.py", *SMALL, *options, *judged, "algorithm.extraction=flow", cwd=tmp_path)
    (line,) = [line for line in out.splitlines() if "by the data alone" in line]
    assert re.search(r"\), distance from the data's actions \d", line)


# ---------------------------------------------------------------------- what is refused


def discrete_log():
    random = np.random.default_rng(0)
    observations = random.standard_normal((200, 3)).astype(np.float32)
    return {"observations": observations, "actions": random.integers(0, 2, 200), "rewards": observations[:, 0]} | {
        "terminals": np.arange(200) % 40 == 39
    }


@pytest.mark.parametrize("extraction", EXTRACTIONS)
def test_discrete_actions_are_refused(extraction):
    with pytest.raises(ConfigurationError, match=rf"^algorithm.extraction={extraction} is for continuous.*2 discrete"):
        trained(discrete_log(), extraction, environment=None)


def test_several_draws_of_discrete_actions_are_refused():
    with pytest.raises(ConfigurationError, match=r"^num_samples=4 needs a stochastic policy of continuous actions"):
        trained(discrete_log(), "awr", environment=None, eval__num_samples=4)


@pytest.mark.parametrize("extraction", ["awr", "ddpgbc"])
def test_several_draws_of_a_deterministic_policy_are_refused(extraction, source):
    options = {"algorithm__policy": "deterministic", "eval__num_samples": 4}
    with pytest.raises(ConfigurationError, match=r"^num_samples=4 needs a stochastic policy.*no randomness"):
        trained(source, extraction, environment=None, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eval__num_samples": 0}, "eval.num_samples must be null or an integer >= 1, got 0"),
        ({"eval__selection": "best"}, "eval.selection must be one of largest, expectile, exponential, got 'best'"),
        ({"algorithm__flow_steps": 0}, "algorithm.flow_steps must be an integer >= 1, got 0"),
        ({"algorithm__extraction": "flaw"}, "algorithm.extraction must be one of awr, ddpgbc, flow, diffusion, got"),
        ({"algorithm__noise_schedule": "vq"}, "algorithm.noise_schedule must be one of vp, cosine, linear, got 'vq'"),
        ({"algorithm__actor_tau": 0}, r"algorithm.actor_tau must be a number in \(0, 1\], got 0"),
        (
            {"algorithm__diffusion_steps": 1001},
            r"algorithm.diffusion_steps must be an integer in \[1, 1000\], got 1001",
        ),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, words, source):
    with pytest.raises(ConfigurationError, match=words):
        trained(source, "awr", environment=None, **options)


@pytest.mark.slow
@pytest.mark.parametrize("other", ["ddpgbc", "flow", "diffusion"])
def test_a_checkpoint_of_another_extraction_is_refused(other, source, tmp_path):
    trained(source, "awr", tmp_path / "run", environment=None)
    with pytest.raises(ConfigurationError, match=rf"algorithm.extraction awr -> {other}"):
        trained(source, other, tmp_path / "run", environment=None, resume=True)
    with pytest.raises(CheckpointError, match=rf"is of algorithm.extraction=awr, and this run is of {other}; set"):
        trained(source, other, environment=None, checkpoint__start=str(tmp_path / "run"))
    trained(source, other, tmp_path / "other", environment=None)
    assert load_checkpoint(tmp_path / "other/checkpoints/step-00000040.pt")["architecture"]["extraction"] == other
    with pytest.raises(CheckpointError, match=rf"is of algorithm.extraction={other}, and this run is of awr; set"):
        trained(source, "awr", environment=None, checkpoint__start=str(tmp_path / "other"))


@pytest.mark.slow
def test_a_recipe_refuses_in_one_line(source, tmp_path):
    options = [*SMALL, "dataset=hdf5", f"dataset.path={source.path}", "env.name=null", "train.steps=10"]
    line = refused("iql_offline.py", *options, "eval.num_samples=-1", cwd=tmp_path)
    assert "eval.num_samples must be null or an integer >= 1, got -1" in line
    run("iql_offline.py", *options, "run_dir=run", cwd=tmp_path)
    assert "num_samples must be" in refused("evaluate.py", "checkpoint=run", "num_samples=0", cwd=tmp_path)
