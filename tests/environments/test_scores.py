"""D4RL's normalised score."""

from __future__ import annotations

import numpy as np
import pytest

from iql_torchrl.environments.scores import normalised_score, reference_returns
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.evaluation.rollouts import Evaluation

# d4rl/infos.py
REFERENCES = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "antmaze": (0.0, 1.0),
    "kitchen": (0.0, 4.0),
    "pen": (96.262799, 3076.833),
    "hammer": (-274.856578, 12794.134825),
    "door": (-56.512833, 2880.569309),
    "relocate": (-6.425911, 4233.877797),
}
NAMES = [
    ("halfcheetah-medium-v2", "halfcheetah"),
    ("hopper-medium-replay-v0", "hopper"),
    ("walker2d-medium-expert-v2", "walker2d"),
    ("ant-random-v2", "ant"),
    ("antmaze-umaze-diverse-v2", "antmaze"),
    ("kitchen-partial-v0", "kitchen"),
    ("pen-human-v1", "pen"),
    ("hammer-cloned-v1", "hammer"),
    ("door-expert-v1", "door"),
    ("relocate-human-v0", "relocate"),
    ("HalfCheetah-v4", "halfcheetah"),
    ("HalfCheetah-v5", "halfcheetah"),
    ("Hopper-v4", "hopper"),
    ("Hopper-v5", "hopper"),
    ("Walker2d-v4", "walker2d"),
    ("Walker2d-v5", "walker2d"),
    ("Ant-v4", "ant"),
    ("AdroitHandPen-v1", "pen"),
    ("AdroitHandDoor-v1", "door"),
    ("AdroitHandHammer-v1", "hammer"),
    ("AdroitHandRelocate-v1", "relocate"),
]


@pytest.mark.parametrize(("name", "task"), NAMES)
def test_datasets_and_environments_of_a_task_have_d4rls_reference_returns(name, task):
    assert reference_returns(name) == pytest.approx(REFERENCES[task], rel=0, abs=0)


@pytest.mark.parametrize(("name", "task"), NAMES)
def test_the_score_is_0_for_the_random_policy_and_100_for_the_expert(name, task):
    random, expert = REFERENCES[task]
    assert normalised_score(name, random) == pytest.approx(0, abs=1e-9)
    assert normalised_score(name, expert) == pytest.approx(100)
    assert normalised_score(name, random + 0.25 * (expert - random)) == pytest.approx(25)
    assert normalised_score(name, expert + (expert - random)) == pytest.approx(200)


def test_a_known_return_has_its_published_score():
    # 100 * (1000 + 20.272305) / (3234.3 + 20.272305)
    assert normalised_score("Hopper-v5", 1000.0) == pytest.approx(31.348890, abs=1e-6)
    assert normalised_score("halfcheetah-medium-v2", 5000.0) == pytest.approx(42.530027, abs=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "Pendulum-v1",
        "Humanoid-v5",
        "HopperBulletEnv-v0",
        "bullet-hopper-medium-v0",
        "AntMaze_UMaze-v5",
        "FrankaKitchen-v1",
        "PointMaze_UMaze-v3",
        "dm_control/hopper-hop-v0",
        "my-own-task",
        "",
    ],
)
def test_a_task_that_is_not_d4rls_has_no_score(name):
    assert reference_returns(name) is None
    assert normalised_score(name, 1000.0) is None


def test_an_evaluation_scores_its_mean_return():
    def evaluation(environment):
        return Evaluation(
            EnvironmentSpec.of(environment), np.array([0.0, 1000.0, 2000.0]), np.array([10, 20, 30]), seconds=1.5
        )

    assert evaluation("Hopper-v5").normalized_score == pytest.approx(31.348890, abs=1e-6)
    assert evaluation("Pendulum-v1").normalized_score is None
    assert evaluation("Hopper-v5").row() == {
        "episode_return_mean": 1000.0,
        "episode_return_std": pytest.approx(816.496581),
        "normalized_score": pytest.approx(31.348890, abs=1e-6),
        "episodes": 3,
        "seconds": 1.5,
        "success_rate": None,
    }
