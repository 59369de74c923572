"""OGBench's environments: starts that a seed decides, tasks in turn, and a score by success."""

from __future__ import annotations

import importlib.util
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box

from iql_torchrl.environments.simulators import make_environment, step_limit
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import SimulatorError
from iql_torchrl.evaluation.rollouts import Evaluator

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("ogbench") is None, reason="needs ogbench: pip install 'iql_torchrl[ogbench]'"
)
MAZES = ("pointmaze-medium-singletask-v0", "antmaze-medium-singletask-task2-v0", "antsoccer-arena-singletask-v0")
MANIPULATION = ("cube-single-singletask-v0", "scene-singletask-task1-v0", "puzzle-3x3-singletask-v0")


class Solved(gymnasium.Env):
    """Three steps at -1 each; solved, at the second one alone, where the seed is a multiple of four."""

    observation_space = Box(-1, 1, (2,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)
    num_tasks = 5

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.steps = seed, 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        solved = self.seed % 4 == 0 and self.steps == 2
        return np.zeros(2, np.float32), -1.0, False, self.steps == 3, {"success": solved}


@pytest.fixture
def solved():
    gymnasium.register("cube-solved-singletask-v0", entry_point=Solved)
    yield "cube-solved-singletask-v0"
    gymnasium.registry.pop("cube-solved-singletask-v0")


def test_the_score_is_the_share_of_episodes_that_succeed_in_percent(solved):
    evaluator = Evaluator(solved, episodes=10)
    evaluation = evaluator.evaluate(lambda observations: np.zeros((len(observations), 1), np.float32))
    evaluator.close()
    assert evaluation.successes.tolist() == [True, False, False, False, True, False, False, False, True, False]
    assert evaluation.normalized_score == evaluation.score == pytest.approx(30.0)
    row = evaluation.row()
    assert (row["success_rate"], row["episode_return_mean"]) == (pytest.approx(0.3), -3.0)


def test_an_environment_that_tells_no_success_has_no_such_score(solved, monkeypatch):
    monkeypatch.setattr(Solved, "step", lambda self, action: (np.zeros(2, np.float32), -1.0, True, False, {}))
    evaluator = Evaluator(solved, episodes=2)
    evaluation = evaluator.evaluate(lambda observations: np.zeros((len(observations), 1), np.float32))
    evaluator.close()
    assert evaluation.normalized_score is None and evaluation.score == -1.0


def test_ids_of_ogbench_are_scored_by_success_and_others_are_not():
    for name in (*MAZES, *MANIPULATION, "cube-double-v0", "humanoidmaze-giant-v0"):
        spec = EnvironmentSpec.of(name)
        assert (spec.scored_by, spec.references, spec.scores_data) == ("success", (0.0, 1.0), False)
        assert spec.score_label == "success in percent" and spec.reference_returns is None
    for name in ("AntMaze_UMaze-v4", "Hopper-v5", "FrankaKitchen-v1"):
        assert EnvironmentSpec.of(name).scored_by == "return"
    assert EnvironmentSpec.of("Hopper-v5").score_label == "normalised score"


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ogbench", None)
    monkeypatch.delitem(gymnasium.registry, "cube-single-singletask-v0", raising=False)
    with pytest.raises(SimulatorError, match=r"needs ogbench: pip install 'iql_torchrl\[ogbench\]'"):
        make_environment("cube-single-singletask-v0")


@needs_package
@pytest.mark.parametrize("name", (*MAZES, *MANIPULATION))
def test_a_seed_decides_the_whole_start_and_leaves_other_random_numbers_alone(name, recwarn):
    episodes = []
    for warm in (False, True):
        environment = make_environment(name)
        if warm:
            environment.reset(seed=7)
        state = np.random.get_state()[1].copy()
        observations = [environment.reset(seed=5)[0]]
        assert (np.random.get_state()[1] == state).all()
        random = np.random.default_rng(0)
        for _ in range(20):
            action = random.uniform(-1, 1, environment.action_space.shape).astype(np.float32)
            observations.append(environment.step(action)[0])
        other = environment.reset(seed=6)[0]
        assert not np.array_equal(other, observations[0])
        episodes.append(np.array(observations))
        environment.close()
    np.testing.assert_array_equal(*episodes)
    assert not [one for one in recwarn if "precision lowered" in str(one.message) or "DISPLAY" in str(one.message)]


@needs_package
def test_without_a_single_task_episodes_are_of_the_five_tasks_in_turn():
    environment = make_environment("pointmaze-medium-v0")
    tasks = []
    for seed in range(1000, 1010):
        environment.reset(seed=seed)
        tasks.append(environment.unwrapped.cur_task_id)
    environment.reset(seed=3, options={"task_id": 2})
    assert environment.unwrapped.cur_task_id == 2
    environment.close()
    assert tasks == [1, 2, 3, 4, 5] * 2


@needs_package
def test_a_single_task_stays_what_it_is_and_has_the_packages_step_limit():
    environment = make_environment("cube-single-singletask-task3-v0")
    for seed in range(3):
        environment.reset(seed=seed)
        assert environment.unwrapped.cur_task_id == 3
    environment.close()
    assert step_limit(EnvironmentSpec.of("cube-single-singletask-task3-v0")) == 200


@needs_package
def test_an_unknown_one_is_refused_with_the_nearest():
    with pytest.raises(SimulatorError, match="did you mean 'cube-single-singletask-v0'"):
        make_environment("cube-singel-singletask-v0")
