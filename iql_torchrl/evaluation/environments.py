"""Gymnasium environments for evaluation, and their agreement with the data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import gymnasium
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from iql_torchrl.errors import SimulatorError
from iql_torchrl.suggestions import nearest


@dataclass(frozen=True)
class Spaces:
    """Size of an environment's flat observations, and its actions: bounds ``[A]``, or how many discrete ones."""

    observation_dim: int
    action_low: Tensor
    action_high: Tensor
    num_actions: int | None = None

    @classmethod
    def discrete(cls, observation_dim: int, num_actions: int) -> Spaces:
        """The actions 0 to ``num_actions`` - 1."""
        return cls(observation_dim, torch.empty(0), torch.empty(0), num_actions)


def make_environment(name: str) -> gymnasium.Env:
    """``gymnasium.make``, with errors that say what to do.

    Raises:
        SimulatorError: an unknown name (with the nearest known one), or an environment that does not start.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date.*", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message=".*out of date.*", category=UserWarning)
            return gymnasium.make(name, **({"use_contact_forces": True} if name == "Ant-v4" else {}))
    except gymnasium.error.UnregisteredEnv as error:
        raise SimulatorError(f"unknown environment env.name={name}{nearest(name, gymnasium.registry)}") from error
    except Exception as error:  # whatever a third-party environment raises, it does not start
        raise SimulatorError(f"environment {name} does not start: {error}") from error


def spaces_of(name: str, *, observation_dim: int, action_dim: int | None) -> Spaces:
    """Start the environment once and compare its spaces with the data's.

    Args:
        name: Gymnasium id.
        observation_dim: size of the data's observations.
        action_dim: size of the data's actions; ``None`` for discrete ones.

    Raises:
        SimulatorError: observations that are no flat box, actions that are neither that nor discrete from 0, or other
            sizes or kinds than the data's.
    """
    environment = make_environment(name)
    try:
        observation_space, action_space = environment.observation_space, environment.action_space
    finally:
        environment.close()
    if not isinstance(observation_space, Box) or len(observation_space.shape) != 1:
        raise SimulatorError(f"{name} has observation space {observation_space}; only flat boxes are supported.")
    if observation_space.shape[0] != observation_dim:
        raise _other_environment(name, "observations", observation_space.shape[0], observation_dim)
    if isinstance(action_space, Discrete):
        if action_space.start != 0:
            raise SimulatorError(f"{name} has action space {action_space}; only discrete actions from 0 are supported.")
        if action_dim is not None:
            raise SimulatorError(
                f"{name} has action space {action_space} but the data's actions are {action_dim} floating-point "
                "numbers a row; store one integer a row, or set env.name to the environment that the data come from."
            )
        return Spaces.discrete(observation_dim, int(action_space.n))
    if not isinstance(action_space, Box) or len(action_space.shape) != 1:
        raise SimulatorError(f"{name} has action space {action_space}; only flat boxes and Discrete are supported.")
    if action_dim is None:
        raise SimulatorError(
            f"{name} has action space {action_space} but the data's actions are one integer a row, which stand for "
            "discrete ones; store floating-point numbers, or set env.name to the environment that the data come from."
        )
    if action_space.shape[0] != action_dim:
        raise _other_environment(name, "actions", action_space.shape[0], action_dim)
    return Spaces(
        observation_dim, torch.from_numpy(action_space.low).float(), torch.from_numpy(action_space.high).float()
    )


def _other_environment(name: str, kind: str, found: int, expected: int) -> SimulatorError:
    return SimulatorError(
        f"{name} has {kind} of size {found} but the data's have {expected}: it is not the environment that the data "
        "come from. Set env.name to that one, or env.name=null to train without."
    )
