"""The examples as a user runs them: real processes, from a folder of the user's own."""

import ast
import re
import subprocess
import sys

import gymnasium
import minari
import numpy as np
import pytest
import torch
from problems import write_pendulum
from processes import ROOT, SMALL, finish, rows, run
from recordings import record

from iql_torchrl import load_policy
from iql_torchrl.evaluation.rollouts import Evaluator

EXAMPLES = sorted((ROOT / "recipes" / "examples").glob("*.py"))
NUMBER = r"-?\d+\.\d+"


def run_example(name, *arguments, cwd, environment=None):
    """What it prints; without a compiler in sight it runs eagerly, which a few updates do not pay for."""
    (cwd / "empty").mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "recipes" / "examples" / f"{name}.py"), *map(str, arguments)],
        cwd=cwd,
        env={"PATH": str(cwd / "empty"), "HOME": str(cwd), "OMP_NUM_THREADS": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    code, out, error = finish(process)
    assert code == 0, f"{out}\n{error}"
    (cwd / "empty").rmdir()
    return out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_first_what_it_is_and_how_to_run_it(path):
    text = path.read_text()
    assert len(text.splitlines()) < 80
    first = ast.get_docstring(ast.parse(text)).splitlines()[0]
    assert re.fullmatch(rf".+: `python recipes/examples/{path.name}( \[--[a-z]+ [A-Za-z0-9.]+\])+`\.", first)


def test_there_is_one_example_for_each_kind_of_user():
    assert [path.stem for path in EXAMPLES] == [
        "many_seeds",
        "minari_tutorial",
        "online_gains",
        "onnx_policy",
        "own_log",
        "torchrl_recipe",
    ]


@pytest.mark.slow
def test_torchrls_recipe_trains_with_the_loss_of_this_package(tmp_path):
    out = run_example("torchrl_recipe", "--steps", 200, cwd=tmp_path)
    losses = re.findall(rf"step (\d+): entropy {NUMBER}, loss_actor {NUMBER}, loss_qvalue ({NUMBER}), loss_value", out)
    assert [int(step) for step, _ in losses] == list(range(20, 201, 20))
    assert float(losses[-1][1]) < float(losses[0][1])
    assert re.search(rf"return of the policy: {NUMBER} over 5 episodes\n", out)
    assert "return of the data: 392.5 over 657 episodes\n" in out
    assert list(tmp_path.iterdir()) == []


def test_torchrls_recipe_takes_the_loss_alone_from_here():
    tree = ast.parse((ROOT / "recipes" / "examples" / "torchrl_recipe.py").read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = {alias.name for node in imported if node.module == "iql_torchrl" for alias in node.names}
    assert ours == {"IQLLoss", "load_transitions"}  # and its embedded data


@pytest.fixture(scope="module")
def hand(tmp_path_factory):
    """Random episodes of the hand with a pen, under the name of the tutorial's dataset."""
    import gymnasium_robotics

    gymnasium.register_envs(gymnasium_robotics)
    root = tmp_path_factory.mktemp("minari")
    record("D4RL/pen/human-v2", gymnasium.make("AdroitHandPen-v1", max_episode_steps=100), root, 3)
    return root


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(out of date|is set to None).*")
def test_minaris_tutorial_trains_on_the_dataset_that_is_there(hand, tmp_path):
    # A host that refuses: what is there already must not be asked for.
    nowhere = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "MINARI_REMOTE": "hf://farama-minari",
        "MINARI_DATASETS_PATH": str(hand),
    }
    out = run_example("minari_tutorial", "--steps", 100, "--episodes", 2, cwd=tmp_path, environment=nowhere)
    assert "D4RL/pen/human-v2: 300 transitions, 3 episodes" in out and "evaluated in AdroitHandPen-v1" in out
    evaluations = re.findall(rf"^step (\d+): return ({NUMBER}), score ({NUMBER})$", out, flags=re.MULTILINE)
    assert [int(step) for step, _, _ in evaluations] == list(range(10, 101, 10))
    for _, of_episode, score in evaluations:  # D4RL's references of the pen
        expected = 100 * (float(of_episode) - 96.262799) / (3076.833 - 96.262799)
        assert float(score) == pytest.approx(expected, abs=0.06)
    assert re.search(rf"^return in the recovered environment: {NUMBER} over 2 episodes$", out, flags=re.MULTILINE)
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(out of date|is set to None).*")
def test_minaris_tutorial_evaluates_in_the_same_environment_as_the_run(hand, tmp_path, monkeypatch):
    from iql_torchrl import train

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(hand))
    dataset = minari.load_dataset("D4RL/pen/human-v2", download=True)
    run = train(dataset, steps=10, quiet=True, options={"train.compile": False, "eval.episodes": 1})
    assert (run.options.algorithm.temperature, run.options.algorithm.dropout_rate) == (0.5, 0.1)
    environment = dataset.recover_environment(eval_env=True)
    evaluator = Evaluator(run.data.environment, episodes=1, seed=5)
    expected = evaluator.evaluate(run.policy)
    observation, rewards, over = environment.reset(seed=5)[0], [], False
    while not over:
        observation, reward, terminated, truncated, _ = environment.step(run.policy(observation))
        rewards.append(reward)
        over = terminated or truncated
    assert len(rewards) == expected.lengths[0] == 100
    assert sum(rewards) == pytest.approx(expected.returns[0], rel=1e-4)
    evaluator.close()
    environment.close()


def actions_in(out):
    found = dict(re.findall(r"^(action|action of the saved policy): \[([^\]]+)\]$", out, flags=re.MULTILINE))
    action, of_the_saved = (np.array(text.split(), float) for text in found.values())
    np.testing.assert_allclose(action, of_the_saved, rtol=1e-5)
    return action


@pytest.mark.slow
def test_an_own_log_trains_a_policy_without_a_simulator_that_loads_later_and_goes_on(tmp_path):
    out = run_example("own_log", "--steps", 200, "--folder", "mine", cwd=tmp_path)
    assert "no environment" in out
    likelihoods = re.findall(rf"^step (\d+): held-out log-likelihood ({NUMBER})$", out, flags=re.MULTILINE)
    assert [int(step) for step, _ in likelihoods] == [40, 80, 120, 160, 200]
    assert float(likelihoods[-1][1]) > float(likelihoods[0][1])
    action = actions_in(out)
    assert action.shape == (1,) and abs(action[0]) <= 1
    # A mass right of 0 is pushed to the left, and one left of it to the right.
    policy = load_policy(tmp_path / "mine" / "checkpoints" / "step-00000200.pt")
    forces = policy(torch.tensor([[1.5, 0.0], [-1.5, 0.0]]))
    assert forces[0] < 0 < forces[1]

    again = run_example("own_log", "--steps", 200, "--folder", "mine", cwd=tmp_path)
    assert "resumed from" in again and "at step 200" in again
    assert again.splitlines()[-7:-2] == out.splitlines()[-7:-2]
    np.testing.assert_allclose(actions_in(again), action, rtol=1e-5)


@pytest.mark.slow
def test_an_own_log_may_be_a_file(tmp_path):
    generator = np.random.default_rng(1)
    log = {
        "observations": generator.normal(size=(600, 4)),
        "actions": generator.uniform(-3, 3, size=(600, 2)),
        "rewards": generator.normal(size=600),
        "terminals": np.arange(600) % 20 == 19,
    }
    np.savez(tmp_path / "log.npz", **log)
    out = run_example("own_log", "--log", "log.npz", "--steps", 20, "--folder", "mine", cwd=tmp_path)
    assert "30 episodes" in out and actions_in(out).shape == (2,)


@pytest.mark.slow
def test_many_seeds_tell_their_scores_and_the_interval_of_the_mean(tmp_path):
    out = run_example("many_seeds", "--steps", 60, "--episodes", 2, cwd=tmp_path)
    scores = re.findall(rf"^seed (\d): normalised score ({NUMBER})$", out, flags=re.MULTILINE)
    assert [int(seed) for seed, _ in scores] == [0, 1, 2]
    values = [float(score) for _, score in scores]
    mean, low, high = map(
        float, re.search(rf"^mean ({NUMBER}), 95% interval ({NUMBER}) to ({NUMBER})$", out, re.M).groups()
    )
    assert mean == pytest.approx(sum(values) / 3, abs=0.1) and min(values) <= low <= mean <= high <= max(values)
    (best,) = re.findall(r"^seed (\d) acts: tensor\(\[.*\]\)$", out, flags=re.MULTILINE)
    assert values[int(best)] == max(values)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_online_gains_are_drawn_and_told_of_both_phases(tmp_path):
    write_pendulum(tmp_path / "log.hdf5")
    on_log = ["dataset=hdf5", f"dataset.path={tmp_path / 'log.hdf5'}", "env.name=Pendulum-v1"]
    run("iql_offline.py", *SMALL, *on_log, "train.steps=40", "train.num_seeds=2", "run_dir=before", cwd=tmp_path)
    more = ("online.steps=40", "train.num_seeds=2", "env.kwargs={max_episode_steps:15}")
    run("iql_finetune.py", *SMALL, f"checkpoint={tmp_path / 'before'}", *more, "run_dir=after", cwd=tmp_path)
    out = run_example("online_gains", "--runs", "Pendulum:paper=after", "Pendulum:again=after", cwd=tmp_path)
    table = rows(tmp_path / "after" / "eval.csv")
    for step, phase in (("40", "offline"), ("80", "online")):
        returns = [float(row["episode_return_mean"]) for row in table if row["step"] == step]
        assert {row["phase"] for row in table if row["step"] == step} == {phase}
        assert out.count(f"{np.mean(returns):.4g} ({', '.join(f'{one:.3g}' for one in returns)})") == 2
    assert (tmp_path / "online_gains.png").read_bytes().startswith(b"\x89PNG")
