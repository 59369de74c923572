"""Gymnasium environments for evaluation, and their agreement with the data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import gymnasium
import torch
from gymnasium.spaces import Box
from torch import Tensor

from iql_torchrl.errors import SimulatorError
from iql_torchrl.suggestions import nearest


@dataclass(frozen=True)
class Spaces:
    """Sizes and bounds of an environment's flat observations and actions."""

    observation_dim: int
    action_low: Tensor
    action_high: Tensor


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


def spaces_of(name: str, *, observation_dim: int, action_dim: int) -> Spaces:
    """Start the environment once and compare its spaces with the data's.

    Args:
        name: Gymnasium id.
        observation_dim: size of the data's observations.
        action_dim: size of the data's actions.

    Raises:
        SimulatorError: spaces that are no flat boxes, or of other sizes than the data's.
    """
    environment = make_environment(name)
    try:
        observation_space, action_space = environment.observation_space, environment.action_space
    finally:
        environment.close()
    for kind, space in (("observation", observation_space), ("action", action_space)):
        if not isinstance(space, Box) or len(space.shape) != 1:
            raise SimulatorError(f"{name} has {kind} space {space}; only flat boxes are supported.")
    assert isinstance(observation_space, Box) and isinstance(action_space, Box)
    for kind, found, expected in (
        ("observations", observation_space.shape[0], observation_dim),
        ("actions", action_space.shape[0], action_dim),
    ):
        if found != expected:
            raise SimulatorError(
                f"{name} has {kind} of size {found} but the data's have {expected}: it is not the environment that "
                "the data come from. Set env.name to that one, or env.name=null to train without."
            )
    return Spaces(
        observation_dim, torch.from_numpy(action_space.low).float(), torch.from_numpy(action_space.high).float()
    )
