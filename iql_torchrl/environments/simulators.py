"""Gymnasium environments for evaluation, and their agreement with the data."""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, Space
from gymnasium.wrappers import TransformObservation
from torch import Tensor

from iql_torchrl.environments.observations import UnsupportedSpace, flat_size, flatten
from iql_torchrl.environments.specification import OGBENCH, EnvironmentSpec
from iql_torchrl.errors import SimulatorError
from iql_torchrl.suggestions import nearest


class _Suite(NamedTuple):
    """Environments of a package that registers them when it is imported."""

    names: re.Pattern[str]
    package: str
    extra: str

    @property
    def module(self) -> str:
        return self.package.replace("-", "_")


_SUITES = (
    _Suite(
        re.compile("(AntMaze_|PointMaze_|AdroitHand|FrankaKitchen|Fetch|HandReach|HandManipulate).*"),
        "gymnasium-robotics",
        "robotics",
    ),
    _Suite(OGBENCH, "ogbench", "ogbench"),
)
# Columns of gymnasium-robotics' 59 observations of Kitchen that D4RL has: joints of the robot, then of the objects.
_KITCHEN_POSITIONS = np.r_[0:9, 18:39]
# Where the goal of each task stands among D4RL's 30 goal entries: the index of its joints.
_KITCHEN_GOALS = {
    "bottom burner": slice(11, 13),
    "top burner": slice(15, 17),
    "light switch": slice(17, 19),
    "slide cabinet": slice(19, 20),
    "hinge cabinet": slice(20, 22),
    "microwave": slice(22, 23),
    "kettle": slice(23, 30),
}


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


def make_environment(environment: str | EnvironmentSpec) -> gymnasium.Env:
    """``gymnasium.make``, with observations as one vector, and errors that say what to do.

    Raises:
        SimulatorError: an unknown name (with the nearest known one), an environment that does not start, or
            observations that cannot be laid out as a vector.
    """
    spec = EnvironmentSpec.of(environment) if isinstance(environment, str) else environment
    name = spec.name
    _register_suite(name)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date.*", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message=".*out of date.*", category=UserWarning)
            if OGBENCH.fullmatch(name):
                warnings.simplefilter("ignore")  # of a viewer without a display, and of bounds in float64
                made = _OfOGBench(gymnasium.make(name, **spec.kwargs))
            else:
                made = gymnasium.make(name, **spec.kwargs)
    except gymnasium.error.UnregisteredEnv as error:
        raise SimulatorError(f"unknown environment env.name={name}{nearest(name, gymnasium.registry)}") from error
    except Exception as error:  # whatever a third-party environment raises, it does not start
        raise SimulatorError(f"environment {name} does not start: {error}") from error
    try:
        return _as_vectors(made, spec)
    except SimulatorError:
        made.close()
        raise


def spaces_of(environment: str | EnvironmentSpec, *, observation_dim: int, action_dim: int | None) -> Spaces:
    """Start the environment once and compare its spaces with the data's.

    Args:
        environment: Gymnasium id, or with its arguments and layout.
        observation_dim: size of the data's observations.
        action_dim: size of the data's actions; ``None`` for discrete ones.

    Raises:
        SimulatorError: observations that cannot be laid out as a vector, actions that are neither a flat box nor
            discrete from 0, or other sizes or kinds than the data's.
    """
    name = environment if isinstance(environment, str) else environment.name
    made = make_environment(environment)
    try:
        observation_space, action_space = made.observation_space, made.action_space
    finally:
        made.close()
    assert isinstance(observation_space, Box)
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


def step_limit(spec: EnvironmentSpec) -> int | None:
    """Steps after which an environment cuts an episode; ``None`` for no limit, and for an unknown environment."""
    if "max_episode_steps" in spec.kwargs:
        return spec.kwargs["max_episode_steps"]
    _register_suite(spec.name)
    module, _, name = spec.name.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return gymnasium.spec(name).max_episode_steps
    except (gymnasium.error.Error, ImportError, ValueError):
        return None  # which making it will explain


def _register_suite(name: str) -> None:
    if name in gymnasium.registry:
        return
    for suite in _SUITES:
        if not suite.names.fullmatch(name):
            continue
        if importlib.util.find_spec(suite.module) is None:
            raise SimulatorError(
                f"environment {name} needs {suite.package}: pip install 'iql_torchrl[{suite.extra}]', or set "
                "env.name=null to train without."
            )
        gymnasium.register_envs(importlib.import_module(suite.module))


class _OfOGBench(gymnasium.Wrapper):
    """A seed decides all of a reset, and its spaces are made once.

    OGBench's mazes draw starts and goals from NumPy's global generator. Without a single task, the seed chooses among
    the tasks in turn, so that an evaluation has as many episodes of each.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self._inner: Any = env.unwrapped

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bounds in float64, which are made for each random action
            if seed is None:
                return super().reset(options=options)
            before = np.random.get_state()
            np.random.seed(seed)
            try:
                return super().reset(seed=seed, options=options or {"task_id": seed % self._inner.num_tasks + 1})
            finally:
                np.random.set_state(before)


def _as_vectors(environment: gymnasium.Env, spec: EnvironmentSpec) -> gymnasium.Env:
    space = environment.observation_space
    if spec.layout == "flat" and isinstance(space, Box) and len(space.shape) == 1:
        return environment
    try:
        size, layout = _LAYOUTS[spec.layout](space)
    except UnsupportedSpace as error:
        raise SimulatorError(
            f"{spec.name} has observation space {space}: {error}; images, text, sequences and graphs are not "
            "supported. Set env.name=null to train without the environment."
        ) from error
    return TransformObservation(environment, layout, Box(-np.inf, np.inf, (size,), np.float32))


_Layout = tuple[int, Callable[[Any], np.ndarray]]


def _flat(space: Space) -> _Layout:
    return flat_size(space), lambda observation: flatten(space, _batch_of_one(observation), 1)[0].astype(np.float32)


def _goal_first(space: Space) -> _Layout:
    return _parts(space, ("achieved_goal", "observation"))


def _observation(space: Space) -> _Layout:
    return _parts(space, ("observation",))


def _parts(space: Space, keys: tuple[str, ...]) -> _Layout:
    assert isinstance(space, Dict)
    size = sum(flat_size(space[key], key) for key in keys)
    return size, lambda observation: np.concatenate([observation[key] for key in keys], dtype=np.float32)


def _d4rl_kitchen(space: Space) -> _Layout:
    """Joint positions of robot and objects, and the goals of the tasks in place of their joints, zero elsewhere."""

    def layout(observation: Any) -> np.ndarray:
        goal = np.zeros(30)
        for task, target in observation["desired_goal"].items():
            goal[_KITCHEN_GOALS[task]] = target
        return np.concatenate([observation["observation"][_KITCHEN_POSITIONS], goal], dtype=np.float32)

    return 60, layout


_LAYOUTS: dict[str, Callable[[Space], _Layout]] = {
    "flat": _flat,
    "goal_first": _goal_first,
    "observation": _observation,
    "d4rl_kitchen": _d4rl_kitchen,
}


def _batch_of_one(observation: Any) -> Any:
    if isinstance(observation, dict):
        return {key: _batch_of_one(value) for key, value in observation.items()}
    if isinstance(observation, tuple):
        return tuple(map(_batch_of_one, observation))
    return np.asarray(observation)[None]


def _other_environment(name: str, kind: str, found: int, expected: int) -> SimulatorError:
    return SimulatorError(
        f"{name} has {kind} of size {found} but the data's have {expected}: it is not the environment that the data "
        "come from. Set env.name to that one, or env.name=null to train without."
    )
