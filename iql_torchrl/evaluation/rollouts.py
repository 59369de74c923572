"""Vectorised evaluation in which every episode runs to its own end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from iql_torchrl.environments.playing import SimulatorLost, SimulatorProcess, Simulators
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import SimulatorError
from iql_torchrl.evaluation.policy import Policy

_ENVIRONMENTS_AT_ONCE = 32


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns and lengths of complete episodes, ``[episodes]``, and the wall time they took.

    ``successes`` ``[episodes]`` are the episodes in which the environment reported success at some step, or the
    completion of all tasks; ``None`` where it reports nothing of the kind. ``discounted`` ``[episodes]`` are the
    discounted returns, where the evaluator has a discount.
    """

    environment: EnvironmentSpec
    returns: np.ndarray
    lengths: np.ndarray
    seconds: float
    successes: np.ndarray | None = None
    discounted: np.ndarray | None = None

    @property
    def normalized_score(self) -> float | None:
        """The normalised score of the mean return, or of the share of successes where the environment is scored by
        that; ``None`` where none is comparable.
        """
        scored = {"return": self.returns, "success": self.successes}[self.environment.scored_by]
        return None if scored is None else self.environment.score(float(scored.mean()))

    @property
    def score(self) -> float:
        """The normalised score, or the mean return where there is none."""
        return float(self.returns.mean()) if self.normalized_score is None else self.normalized_score

    @property
    def success_rate(self) -> float | None:
        """Share of the episodes that succeeded."""
        return None if self.successes is None else float(self.successes.mean())

    def row(self) -> dict[str, Any]:
        """The columns of ``eval.csv`` besides step and seed."""
        return {
            "episode_return_mean": float(self.returns.mean()),
            "episode_return_std": float(self.returns.std()),
            "normalized_score": self.normalized_score,
            "episodes": len(self.returns),
            "seconds": self.seconds,
            "success_rate": self.success_rate,
        }


class Evaluator:
    """Runs a policy for a fixed set of seeded episodes; one batched policy call serves all running episodes.

    Gymnasium's environments are stepped here directly: TorchRL's batched ``rollout`` stops all episodes with the first
    one, which understates returns, and its ``Evaluator`` collects a number of trajectories and has no seed for each,
    so two policies would not meet the same starts. On a CPU, the returns of a :class:`Policy` are bit for bit those of
    a loop that plays one episode after the other, however many are played at once.

    Args:
        environment: Gymnasium id, or with its arguments and layout.
        episodes: how many; episode i is reset with ``seed + i``, so two policies meet the same starts.
        seed: of the first episode, unless :meth:`evaluate` is given another.
        timeout: seconds within which simulators must answer, in a process of their own: one that dies or hangs is
            restarted once an evaluation. ``None`` runs them in this process, faster by what goes between two.
        say: is told of a restart, in one line.
        discount: of the discounted returns; ``None``: there are none.
    """

    def __init__(
        self,
        environment: str | EnvironmentSpec,
        *,
        episodes: int,
        seed: int = 0,
        timeout: float | None = None,
        say: Callable[[str], object] = print,
        discount: float | None = None,
    ) -> None:
        self.discount = discount
        self.environment = EnvironmentSpec.of(environment) if isinstance(environment, str) else environment
        self.episodes = episodes
        self.seed = seed
        self._at_once = min(episodes, _ENVIRONMENTS_AT_ONCE)
        self._say = say
        self._simulators = (
            Simulators(self.environment, self._at_once)
            if timeout is None
            else SimulatorProcess(self.environment, self._at_once, timeout)
        )

    def evaluate(self, policy: Policy, *, seed: int | None = None) -> Evaluation:
        """Run every episode to its own end.

        Raises:
            SimulatorError: with a ``timeout``, a simulator that failed, or died or hung twice.
        """
        start = time.perf_counter()
        seed = self.seed if seed is None else seed
        try:
            return self._play(policy, seed, start)
        except SimulatorLost as lost:
            self._say(f"{lost}: restarted, and the evaluation begun again")
        self._simulators.restart()
        try:
            return self._play(policy, seed, start)
        except SimulatorLost as lost:
            raise SimulatorError(f"{lost}, once more after it had been restarted.") from lost

    def _play(self, policy: Policy, seed: int, start: float) -> Evaluation:
        returns, lengths = np.zeros(self.episodes), np.zeros(self.episodes, dtype=np.int64)
        successes, told = np.zeros(self.episodes, dtype=bool), False
        discounted, discount = np.zeros(self.episodes), self.discount
        waiting = iter(range(self.episodes))
        running = []  # (index of the simulator, episode, observation)
        for index in range(self._at_once):
            episode = next(waiting)
            running.append((index, episode, self._simulators.reset(index, seed + episode)))
        while running:
            actions = policy(np.stack([observation for _, _, observation in running]))
            steps = self._simulators.step([index for index, _, _ in running], actions)
            still_running = []
            for (index, episode, _), (observation, reward, over, success, _) in zip(running, steps, strict=True):
                returns[episode] += reward
                if discount is not None:
                    discounted[episode] += reward * discount ** lengths[episode]
                lengths[episode] += 1
                if success is not None:
                    told = True
                    successes[episode] |= success
                if over:
                    following = next(waiting, None)
                    if following is None:
                        continue
                    episode, observation = following, self._simulators.reset(index, seed + following)
                still_running.append((index, episode, observation))
            running = still_running
        seconds = time.perf_counter() - start
        return Evaluation(
            self.environment,
            returns,
            lengths,
            seconds,
            successes if told else None,
            None if discount is None else discounted,
        )

    def close(self) -> None:
        """Release the environments."""
        self._simulators.close()
