"""Steps of whole episodes, and the policies that make them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from iql_torchrl.environments.playing import Simulators
from iql_torchrl.environments.simulators import step_limit
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import ConfigurationError, SimulatorError

# Observations [B, O] to actions [B, A]; draws come from torch's generator, which is seeded before every block.
Act = Callable[[np.ndarray], np.ndarray]

_EPISODES_AT_ONCE = 16
_LENGTH_WITHOUT_LIMIT = 1000


@dataclass(frozen=True)
class Steps:
    """Steps in their order, of one episode after the other.

    Args:
        observations, next_observations: ``[N, O]``, of the environment's type.
        actions: ``[N, A]`` float32, in the environment's bounds.
        rewards: ``[N]`` float64.
        terminals, timeouts: ``[N]`` bool; the last row is one or the other.
        cut: whether the last episode was cut by the recording and not by the environment.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: np.ndarray
    terminals: np.ndarray
    timeouts: np.ndarray
    cut: bool = False

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def episodes(self) -> list[slice]:
        """The rows of every episode, a cut one included."""
        ends = np.flatnonzero(self.terminals | self.timeouts) + 1
        return [slice(start, end) for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]

    @property
    def returns(self) -> np.ndarray:
        """Undiscounted returns ``[episodes]``, without a cut one unless it is the only one."""
        found = np.array([self.rewards[rows].sum() for rows in self.episodes])
        return found[:-1] if self.cut and len(found) > 1 else found


def joined(parts: Iterable[Steps]) -> Steps:
    """One after the other."""
    parts = list(parts)
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    return Steps(*(np.concatenate([getattr(part, name) for part in parts]) for name in names), cut=parts[-1].cut)


class Player:
    """Plays seeded episodes of one environment, several at once, each to its own end.

    Args:
        environment: to play in.
        episodes: how many are wanted; no more than 16 are played at once.

    Raises:
        SimulatorError: the environment does not start.
    """

    def __init__(self, environment: EnvironmentSpec, episodes: int) -> None:
        self.environment = environment
        self.at_once = min(episodes, _EPISODES_AT_ONCE)
        self._simulators = Simulators(environment, self.at_once)

    @classmethod
    def of_steps(cls, environment: EnvironmentSpec, steps: int) -> Player:
        """For so many steps, of which a long episode may have many."""
        return cls(environment, -(-steps // (step_limit(environment) or _LENGTH_WITHOUT_LIMIT)))

    def episodes(self, act: Act, seeds: Sequence[int]) -> list[Steps]:
        """An episode for each seed, at most ``at_once``.

        Raises:
            SimulatorError: the environment returns numbers that are not finite.
        """
        torch.manual_seed(seeds[0])
        observations = [self._simulators.reset(index, seed) for index, seed in enumerate(seeds)]
        rows: list[list[tuple]] = [[] for _ in seeds]
        running = list(range(len(seeds)))
        while running:
            actions = act(np.stack([observations[index] for index in running]))
            still_running = []
            for index, action, step in zip(running, actions, self._simulators.step(running, actions), strict=True):
                following = np.array(step.observation)
                rows[index].append(
                    (observations[index], action, step.reward, following, step.terminated, not step.terminated)
                )
                observations[index] = following
                if not step.over:
                    still_running.append(index)
            running = still_running
        return [self._as_steps(one) for one in rows]

    def roll_out(
        self, act: Act, steps: int, seeds: Callable[[int], int], *, title: str, look: Callable[[], object]
    ) -> Steps:
        """Episodes, in the order of their seeds, until they have so many steps; the last one is whole.

        Args:
            act: the policy.
            steps: to reach.
            seeds: of an episode, by its number.
            title: of the progress bar.
            look: called between two blocks of episodes.
        """
        found: list[Steps] = []
        with tqdm(total=steps, unit="step", desc=title) as bar:
            played = 0
            while sum(map(len, found)) < steps:
                look()
                block = self.episodes(act, [seeds(played + index) for index in range(self.at_once)])
                played += self.at_once
                for one in block:
                    if sum(map(len, found)) < steps:
                        found.append(one)
                bar.update(min(sum(map(len, found)), steps) - bar.n)
        return joined(found)

    def close(self) -> None:
        """Release the environments."""
        self._simulators.close()

    def _as_steps(self, rows: list[tuple]) -> Steps:
        observations, actions, rewards, following, terminals, timeouts = map(np.array, zip(*rows, strict=True))
        timeouts[:-1] = False
        if not np.isfinite(following).all() or not np.isfinite(rewards).all():
            raise SimulatorError(f"{self.environment.name} returned an observation or a reward that is not finite.")
        return Steps(observations, actions.astype(np.float32), rewards, following, terminals, timeouts)


def checked(act: Act, name: str, low: np.ndarray, high: np.ndarray) -> Act:
    """A policy whose actions are looked at, and clipped to the environment's bounds ``[A]``."""

    def checked_act(observations: np.ndarray) -> np.ndarray:
        actions = np.asarray(act(observations))
        expected = (len(observations), len(low))
        if actions.shape != expected or actions.dtype.kind not in "fiu":
            raise ConfigurationError(
                f"{name} gives actions of shape {actions.shape} and type {actions.dtype} for observations of shape "
                f"{observations.shape}; it must give real numbers of shape {expected}, a row for each observation."
            )
        actions = actions.astype(np.float32)
        if not np.isfinite(actions).all():
            raise ConfigurationError(f"{name} gives an action that is NaN or infinite: {_first_odd(actions)}.")
        return np.clip(actions, low, high)

    return checked_act


def _first_odd(actions: np.ndarray) -> list[float]:
    return actions[~np.isfinite(actions).all(axis=1)][0].tolist()


def uniform(low: np.ndarray, high: np.ndarray) -> Act:
    """Actions drawn uniformly between bounds ``[A]``."""
    below, width = torch.from_numpy(low).float(), torch.from_numpy(high - low).float()

    def act(observations: np.ndarray) -> np.ndarray:
        return (below + width * torch.rand(len(observations), len(low))).numpy()

    return act
