"""Judging checkpoints by the data alone, as a user does."""

import csv
import json
import shutil
from dataclasses import replace

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from problems import write_pendulum
from processes import SMALL, refused, run

from iql_torchrl import load_policy, load_transitions, train
from iql_torchrl.configuration.composing import compose, initialised
from iql_torchrl.errors import ConfigurationError
from iql_torchrl.evaluation.off_policy import discounted_returns
from iql_torchrl.evaluation.rollouts import Evaluator
from iql_torchrl.judging.judgement import CLONED, judge_checkpoints
from iql_torchrl.judging.writing import as_text, write_judgement
from iql_torchrl.running.options import JudgeOptions
from iql_torchrl.training.checkpoints import list_checkpoints

pytestmark = pytest.mark.slow

FAST = ("fitted_q.steps=20", "fitted_q.hidden_dims=[16]", "fitted_q.compile=false", "fitted_q.resamples=2")
LEARNING = {"algorithm.hidden_dims": [16, 16], "algorithm.batch_size": 32, "train.compile": False}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return write_pendulum(tmp_path_factory.mktemp("log") / "pendulum.hdf5")


@pytest.fixture(scope="module")
def runs(log, tmp_path_factory):
    """A run of two seeds with a simulator, and one of behaviour cloning without, by the recipe."""
    folder = tmp_path_factory.mktemp("runs")
    options = (*SMALL, "dataset=hdf5", f"dataset.path={log}", "train.steps=40", "checkpoint.interval=20")
    run(
        "iql_offline.py", *options, "env.name=Pendulum-v1", "train.num_seeds=2", f"run_dir={folder / 'two'}", cwd=folder
    )
    clone = ("env.name=null", "algorithm=behaviour_cloning", "algorithm.normalise_observations=true")
    run("iql_offline.py", *options, *clone, f"run_dir={folder / 'clone'}", cwd=folder)
    return folder


def judged(*arguments, behaviour_cloning_steps=0):
    with initialised():
        lines = [*FAST, f"behaviour_cloning_steps={behaviour_cloning_steps}", *arguments]
        return judge_checkpoints(compose("judge", lines, JudgeOptions))


def test_every_seed_and_file_is_judged_by_what_data_say_and_by_the_simulator(runs, log):
    found = judged(f"checkpoints=[{runs}]", "env.name=Pendulum-v1", "episodes=2", behaviour_cloning_steps=10)
    assert sorted(row["policy"] for row in found.rows) == [
        CLONED,
        "clone step 40",
        "two seed-0 step 40",
        "two seed-1 step 40",
    ]
    values = [row["fitted_q"] for row in found.rows]
    assert values == sorted(values, reverse=True)
    assert all(row["fitted_q_low"] < row["fitted_q"] < row["fitted_q_high"] for row in found.rows)
    assert found.discount == 0.99 and not found.listed
    assert set(found.findings) == {str(runs / "two"), str(runs / "clone")}  # the doctor has looked at the runs

    # What the simulator says is that of a loop over its steps.
    row = next(row for row in found.rows if row["policy"] == "two seed-1 step 40")
    policy = load_policy(row["path"])
    evaluation = Evaluator("Pendulum-v1", episodes=2).evaluate(policy)
    assert row["true_return"] == pytest.approx(evaluation.returns.mean())
    assert row["true_value"] != row["true_return"]
    rewards, made = [], gymnasium.make("Pendulum-v1")
    observation, over = made.reset(seed=0)[0], False
    while not over:
        observation, reward, terminated, truncated, _ = made.step(policy(observation))
        rewards.append(reward)
        over = terminated or truncated
    expected = sum(reward * 0.9**step for step, reward in enumerate(rewards))
    discounted = Evaluator("Pendulum-v1", episodes=1, discount=0.9).evaluate(policy).discounted
    assert discounted[0] == pytest.approx(expected)
    assert set(found.agreement["value"]) >= {"fitted_q", "log_prob"}
    assert found.agreement["value"]["fitted_q"]["policies"] == 4
    # The clone's critics are not asked: they have hardly been trained.
    assert next(row for row in found.rows if row["policy"] == CLONED)["critic"] is None
    assert found.agreement["value"]["critic"]["policies"] == 3


def test_each_figure_is_that_of_the_checkpoint_in_the_units_of_the_rewards(runs, log):
    found = judged(f"checkpoints=[{runs / 'clone'}]")
    (row,) = found.rows
    with h5py.File(log) as file:
        content = {key: file[key][()] for key in file}
    # By the saved policy alone: distance in units of [-1, 1], and where Pendulum's actions are in [-2, 2].
    policy = load_policy(runs / "clone")
    rows = ~(content["timeouts"] | content["terminals"])
    rows[-1] = False
    low, high = policy.action_low.numpy(), policy.action_high.numpy()
    difference = (policy(content["observations"][rows]) - content["actions"][rows]) * 2 / (high - low)
    assert row["action_distance"] == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-4)
    assert row["held_out"]  # a tenth of the episodes was kept from the run, which had no simulator
    # The likelihood on those is the one that the run wrote.
    with open(runs / "clone" / "metrics.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert row["log_prob"] == pytest.approx(float(last["validation_log_prob"]), rel=1e-4)
    scale = 1000 / np.ptp(returns_of(content))
    assert row["td_error"] == pytest.approx(float(last["validation_td_error"]) / scale**2, rel=1e-3)


def returns_of(content):
    """Over the transitions that D4RL's rule keeps: all rows of an episode but that at its timeout."""
    ends = np.flatnonzero(content["timeouts"])
    starts = [0, *(ends[:-1] + 1)]
    return [content["rewards"][start:end].sum() for start, end in zip(starts, ends, strict=True)]


def test_a_run_that_is_asked_to_judges_itself_at_its_end(log, tmp_path):
    with h5py.File(log) as file:
        content = {key: file[key][()] for key in file}
    options = {
        **LEARNING,
        "train.num_seeds": 2,
        "eval.offline": True,
        "eval.offline_steps": 20,
        "eval.interval": 10,
        "train.log_interval": 10,
    }
    of_run = train(content, environment=None, steps=10, folder=tmp_path / "run", quiet=True, options=options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["judged"]) == {"0", "1"}
    one = summary["judged"]["0"]
    assert one["fitted_q_low"] < one["fitted_q"] < one["fitted_q_high"] and one["held_out"]
    rows = [row for row in of_run.records.metrics() if row["seed"] == 0]
    assert one["log_prob"] == pytest.approx(rows[-1]["validation_log_prob"], rel=1e-4)


def test_critics_of_which_each_update_draws_some_are_judged_without_a_draw(log, tmp_path):
    with h5py.File(log) as file:
        content = {key: file[key][()] for key in file}
    options = {**LEARNING, "algorithm.num_qvalue_nets": 4, "algorithm.num_sampled_qvalue_nets": 1}
    train(content, environment=None, steps=10, folder=tmp_path / "run", quiet=True, options=options)
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        found.append(judged(f"checkpoints=[{tmp_path / 'run'}]", "dataset=hdf5", f"dataset.path={log}").rows[0])
    assert found[0]["critic"] == found[1]["critic"]


def test_checkpoints_of_before_the_options_of_values_are_judged_as_ever(runs, tmp_path):
    path = list_checkpoints(runs / "two" / "checkpoints" / "seed-0")[-1]
    old = torch.load(path, weights_only=True)
    for name in ("num_sampled_qvalue_nets", "qvalue_aggregation", "value_loss", "gumbel_temperature", "gumbel_clip"):
        del old["config"]["algorithm"][name]
    torch.save(old, tmp_path / "old.pt")
    (before,), (after,) = (judged(f"checkpoints=[{one}]").rows for one in (path, tmp_path / "old.pt"))
    assert before["critic"] == after["critic"] and before["td_error"] == after["td_error"]


def test_what_cannot_be_judged_is_listed_with_the_reason(runs, log, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(runs / "two", mixed / "two")
    (file,) = list_checkpoints(mixed / "two" / "checkpoints" / "seed-1")[-1:]
    file.write_bytes(file.read_bytes()[:5000])
    (mixed / "empty").mkdir()
    (mixed / "unborn" / "checkpoints").mkdir(parents=True)
    foreign = tmp_path / "foreign.pt"
    torch.save({"something": torch.zeros(3)}, foreign)
    old = torch.load(list_checkpoints(mixed / "two" / "checkpoints" / "seed-0")[0], weights_only=True)
    old["config"]["algorithm"]["no_such_option"] = 1
    torch.save(old, tmp_path / "old.pt")
    other = tmp_path / "other"
    width = {"observations": np.random.randn(60, 5), "actions": np.random.rand(60, 1), "rewards": np.random.randn(60)}
    width |= {"terminals": np.zeros(60), "timeouts": np.arange(60) % 20 == 19}
    train(width, environment=None, steps=10, folder=other, quiet=True, options=LEARNING)

    names = [mixed, tmp_path / "empty*", tmp_path / "old.pt", foreign, other, mixed / "empty", "/nowhere"]
    found = judged(f"checkpoints=[{','.join(map(str, names))}]")
    assert [row["policy"] for row in found.rows] == ["two seed-0 step 40"]
    reasons = {one.path.removeprefix(str(tmp_path)): (one.status, one.reason) for one in found.listed}
    assert reasons[f"/mixed/two/checkpoints/seed-1/{file.name}"][0] == "damaged or foreign"
    assert reasons["/mixed/unborn/checkpoints"] == ("partial", "no checkpoint yet")
    assert reasons["/mixed/empty"] == ("foreign", "holds no checkpoints of a run")
    assert reasons["/nowhere"] == ("missing", "does not exist")
    assert reasons["/empty*"] == ("missing", "matches nothing")
    assert "is no checkpoint of iql_torchrl" in reasons["/foreign.pt"][1]
    assert reasons["/old.pt"][0] == "another version" and "no_such_option" in reasons["/old.pt"][1]
    task = reasons[f"/other/checkpoints/{list_checkpoints(other / 'checkpoints')[-1].name}"]
    assert task[0] == "another task" and "observation_dim is 5 here and 3" in task[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoints=[/nowhere]"], "names no policy that can be judged: /nowhere: missing, does not exist"),
        (["checkpoints=[RUNS/clone]", "episodes=3"], "episodes=3 needs an environment"),
        (["checkpoints=[RUNS/clone]", "dataset=embedded", "env.name=auto"], "observation_dim 11 and not 3"),
    ],
)
def test_what_cannot_be_done_is_one_clear_error(runs, arguments, message):
    with pytest.raises(ConfigurationError, match=message.replace("[", r"\[")):
        judged(*[one.replace("RUNS", str(runs)) for one in arguments])


def test_policies_of_data_that_a_program_held_need_them_as_a_file(log, tmp_path):
    with h5py.File(log) as file:
        content = {key: file[key][()] for key in file}
    train(content, environment=None, steps=10, folder=tmp_path / "held", quiet=True, options=LEARNING)
    with pytest.raises(ConfigurationError, match="give them with dataset="):
        judged(f"checkpoints=[{tmp_path / 'held'}]")
    found = judged(f"checkpoints=[{tmp_path / 'held'}]", "dataset=hdf5", f"dataset.path={log}", "env.name=null")
    assert len(found.rows) == 1 and not any("other data" in note for note in found.notes)


def test_other_data_are_held_out_from_the_policies_and_not_from_what_clones_them(runs, log, tmp_path):
    with h5py.File(log) as file, h5py.File(tmp_path / "half.hdf5", "w") as half:
        for key in file:
            half[key] = file[key][:400]
    data = ("dataset=hdf5", f"dataset.path={tmp_path / 'half.hdf5'}", "env.name=null")
    found = judged(f"checkpoints=[{runs / 'two'}]", *data, behaviour_cloning_steps=5)
    assert {row["policy"]: row["held_out"] for row in found.rows} == {
        CLONED: False,
        "two seed-0 step 40": True,
        "two seed-1 step 40": True,
    }
    assert all(row["critic"] is None for row in found.rows)  # their rewards' scale is that of the other data
    assert any("2 of 2 policies were trained on other data" in note for note in found.notes)


def test_the_files_hold_what_the_terminal_says(runs, tmp_path):
    found = judged(f"checkpoints=[{runs / 'two'}]", behaviour_cloning_steps=5)
    paths = write_judgement(found, tmp_path)
    assert [path.name for path in paths] == ["judge.json", "judge.csv", "judge.png"]
    content = json.loads(paths[0].read_text())
    assert [row["policy"] for row in content["rows"]] == [row["policy"] for row in found.rows]
    assert content["data_value"] == pytest.approx(found.data_value) and content["versions"]["torch"]
    with open(paths[1], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["fitted_q"]) for row in rows] == pytest.approx([row["fitted_q"] for row in found.rows])
    with Image.open(paths[2]) as picture:
        assert picture.width > 800 and picture.height > 200
    write_judgement(replace(found, data_value=float("nan")), tmp_path)
    assert json.loads(paths[0].read_text(), parse_constant=pytest.fail)["data_value"] is None
    text = as_text(found)
    assert all(row["policy"] in text for row in found.rows) and "nothing of them was held out" in text


def test_the_recipe_judges_and_refuses(runs, tmp_path):
    out = run(
        "judge.py", f"checkpoints=[{runs / 'clone'}]", *FAST, "behaviour_cloning_steps=0", "output=out", cwd=tmp_path
    )
    assert "fitted Q (95% interval)" in out and "clone step 40" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["judge.csv", "judge.json", "judge.png"]
    (tmp_path / "file").write_text("")
    error = refused("judge.py", f"checkpoints=[{runs / 'clone'}]", "output=file", cwd=tmp_path)
    assert "output=file cannot be written" in error
    assert "checkpoints is needed" in refused("judge.py", cwd=tmp_path)


def test_the_datas_own_value_is_that_of_its_episodes(runs, log):
    found = judged(f"checkpoints=[{runs / 'clone'}]", "discount=0.5")
    with h5py.File(log) as file:
        content = {key: file[key][()] for key in file}
    assert found.discount == 0.5 and any("discount 0.5" in note for note in found.notes)
    first = content["rewards"][:199]
    expected = sum(reward * 0.5**step for step, reward in enumerate(first))
    values = discounted_returns(load_transitions(log), 0.5)
    assert values[0] == pytest.approx(expected, rel=1e-5)
    assert found.data_value == pytest.approx(values.mean(), rel=1e-5)
