"""Environments that start, that do not, and that do not fit the data."""

from __future__ import annotations

import re

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text

from iql_torchrl.environments.simulators import make_environment, spaces_of
from iql_torchrl.errors import SimulatorError

FLAT = Box(-1, 1, (3,), np.float32)


class Still(gymnasium.Env):
    """Any spaces; never moves."""

    closed = 0

    def __init__(self, observation_space=FLAT, action_space=FLAT):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, True, {}

    def close(self):
        type(self).closed += 1


def test_a_known_environment_starts():
    environment = make_environment("Pendulum-v1")
    observation, _ = environment.reset(seed=0)
    assert environment.observation_space.contains(observation)
    environment.close()


@pytest.mark.parametrize("name", ["HalfCheetah-v4", "Hopper-v5"])
def test_mujoco_environments_start_without_a_warning(name, recwarn):
    make_environment(name).close()
    assert not [str(warning.message) for warning in recwarn if "out of date" in str(warning.message)]


@pytest.mark.parametrize(
    ("name", "meant"),
    [("Hoper-v5", "Hopper-v5"), ("hopper-v5", "Hopper-v5"), ("Pendulum-v9", "Pendulum-v1"), ("x/Ant-v5", "Ant-v5")],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(name, meant):
    with pytest.raises(SimulatorError, match=f"env.name={re.escape(name)}; did you mean '{meant}'"):
        make_environment(name)


def test_an_environment_of_the_user_is_proposed_as_well(register):
    register("WarehouseRobot-v0", Still)
    with pytest.raises(SimulatorError, match="did you mean 'WarehouseRobot-v0'"):
        make_environment("WarehouseRobots-v0")


@pytest.mark.parametrize("name", ["two words", "", "no_such_module:Robot-v0"])
def test_a_name_that_cannot_be_one_is_refused(name):
    with pytest.raises(SimulatorError, match=re.escape(name)):
        make_environment(name)


@pytest.mark.parametrize(
    "error",
    [RuntimeError, OSError, ValueError, TypeError, ImportError, KeyError, AttributeError, AssertionError, IndexError],
)
def test_an_environment_that_does_not_start_is_named_with_its_own_error(error, register):
    def broken():
        raise error("no licence for the arm")

    register("Broken-v0", broken)
    with pytest.raises(SimulatorError, match=r"Broken-v0 does not start: .*no licence for the arm"):
        make_environment("Broken-v0")


def test_an_environment_whose_package_is_missing_is_named_with_the_package(register):
    register("Absent-v0", "no_such_package.robots:Robot")
    with pytest.raises(SimulatorError, match=r"Absent-v0 does not start: .*no_such_package"):
        make_environment("Absent-v0")


def test_the_spaces_are_those_of_the_environment():
    spaces = spaces_of("Pendulum-v1", observation_dim=3, action_dim=1)
    assert spaces.observation_dim == 3
    assert spaces.action_low.dtype == spaces.action_high.dtype == torch.float32
    assert spaces.action_low.tolist() == [-2] and spaces.action_high.tolist() == [2]


def test_each_action_dimension_has_its_own_bounds(register):
    box = Box(np.array([-1, 0, 5]), np.array([2, 0.5, 9]), dtype=np.float64)
    register("Uneven-v0", lambda: Still(action_space=box))
    spaces = spaces_of("Uneven-v0", observation_dim=3, action_dim=3)
    assert spaces.action_low.tolist() == [-1, 0, 5] and spaces.action_high.tolist() == [2, 0.5, 9]


def test_ant_v4_has_the_111_dimensions_of_d4rls_ant():
    assert spaces_of("Ant-v4", observation_dim=111, action_dim=8).observation_dim == 111


def test_observations_of_another_size_than_the_datas_are_refused_with_both_sizes():
    with pytest.raises(SimulatorError, match=r"Pendulum-v1 has observations of size 3 .* data's have 11.*env.name"):
        spaces_of("Pendulum-v1", observation_dim=11, action_dim=1)


def test_actions_of_another_size_than_the_datas_are_refused_with_both_sizes():
    with pytest.raises(SimulatorError, match=r"Pendulum-v1 has actions of size 1 .* data's have 3.*env.name"):
        spaces_of("Pendulum-v1", observation_dim=3, action_dim=3)


def test_a_discrete_action_space_gives_the_number_of_actions():
    spaces = spaces_of("CartPole-v1", observation_dim=4, action_dim=None)
    assert (spaces.observation_dim, spaces.num_actions) == (4, 2)


def test_continuous_actions_for_a_discrete_environment_are_refused_and_the_other_way_round():
    with pytest.raises(SimulatorError, match=r"CartPole-v1 has action space Discrete\(2\).*1 floating-point numbers"):
        spaces_of("CartPole-v1", observation_dim=4, action_dim=1)
    with pytest.raises(SimulatorError, match=r"Pendulum-v1 has action space Box.*one integer a row"):
        spaces_of("Pendulum-v1", observation_dim=3, action_dim=None)


def test_discrete_actions_that_do_not_start_at_0_are_refused(register):
    register("Odd-v0", lambda: Still(action_space=Discrete(3, start=1)))
    with pytest.raises(SimulatorError, match=r"Odd-v0 has action space Discrete\(3, start=1\).*from 0"):
        spaces_of("Odd-v0", observation_dim=3, action_dim=None)


@pytest.mark.parametrize(
    ("kind", "space"),
    [
        ("action", MultiDiscrete([3, 3, 3])),
        ("action", MultiBinary(3)),
        ("action", Box(-1, 1, (3, 1))),
        ("observation", Box(0, 255, (3, 3, 3), np.uint8)),
        ("observation", Text(5)),
        ("observation", Dict(position=FLAT, camera=Box(0, 255, (8, 8, 3), np.uint8))),
    ],
)
def test_spaces_that_cannot_be_one_vector_are_refused_by_name(kind, space, register):
    register("Odd-v0", lambda: Still(**{f"{kind}_space": space}))
    with pytest.raises(SimulatorError, match=f"Odd-v0 has {kind} space {re.escape(str(space))}.*(flat boxes|images)"):
        spaces_of("Odd-v0", observation_dim=3, action_dim=3)


@pytest.mark.parametrize("observation_dim", [3, 4])
def test_the_environment_that_was_started_for_its_spaces_is_closed(observation_dim, register):
    register("Still-v0", Still)
    Still.closed = 0
    if observation_dim == 3:
        spaces_of("Still-v0", observation_dim=3, action_dim=3)
    else:
        with pytest.raises(SimulatorError):
            spaces_of("Still-v0", observation_dim=4, action_dim=3)
    assert Still.closed == 1
