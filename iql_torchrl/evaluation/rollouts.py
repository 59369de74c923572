"""Vectorised evaluation in which every episode runs to its own end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from iql_torchrl.environments.simulators import make_environment
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.evaluation.policy import Policy

_ENVIRONMENTS_AT_ONCE = 32


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns and lengths of complete episodes, ``[episodes]``, and the wall time they took.

    ``successes`` ``[episodes]`` are the episodes in which the environment reported success at some step, or the
    completion of all tasks; ``None`` where it reports nothing of the kind.
    """

    environment: EnvironmentSpec
    returns: np.ndarray
    lengths: np.ndarray
    seconds: float
    successes: np.ndarray | None = None

    @property
    def normalized_score(self) -> float | None:
        """The normalised score of the mean return, or ``None`` where none is comparable."""
        return self.environment.score(float(self.returns.mean()))

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
    """

    def __init__(self, environment: str | EnvironmentSpec, *, episodes: int, seed: int = 0) -> None:
        self.environment = EnvironmentSpec.of(environment) if isinstance(environment, str) else environment
        self.episodes = episodes
        self.seed = seed
        self._environments = [make_environment(self.environment) for _ in range(min(episodes, _ENVIRONMENTS_AT_ONCE))]

    def evaluate(self, policy: Policy, *, seed: int | None = None) -> Evaluation:
        """Run every episode to its own end."""
        start = time.perf_counter()
        seed = self.seed if seed is None else seed
        returns, lengths = np.zeros(self.episodes), np.zeros(self.episodes, dtype=np.int64)
        successes, told = np.zeros(self.episodes, dtype=bool), False
        waiting = iter(range(self.episodes))
        running = []  # (environment, episode, observation)
        for environment in self._environments:
            episode = next(waiting)
            running.append((environment, episode, environment.reset(seed=seed + episode)[0]))
        while running:
            actions = policy(np.stack([observation for _, _, observation in running]))
            still_running = []
            for (environment, episode, _), action in zip(running, actions, strict=True):
                observation, reward, terminated, truncated, info = environment.step(action)
                returns[episode] += float(reward)
                lengths[episode] += 1
                success = _success(info)
                if success is not None:
                    told = True
                    successes[episode] |= success
                if terminated or truncated:
                    following = next(waiting, None)
                    if following is None:
                        continue
                    episode, observation = following, environment.reset(seed=seed + following)[0]
                still_running.append((environment, episode, observation))
            running = still_running
        seconds = time.perf_counter() - start
        return Evaluation(self.environment, returns, lengths, seconds, successes if told else None)

    def close(self) -> None:
        """Release the environments."""
        for environment in self._environments:
            environment.close()


def _success(info: Mapping[str, Any]) -> bool | None:
    """What a step's information says of success, ``None`` for nothing: Adroit and the mazes flag it, Kitchen lists."""
    for key in ("success", "is_success"):
        if key in info:
            return bool(info[key])
    if "tasks_to_complete" in info:
        return set(info["tasks_to_complete"]) <= set(info.get("episode_task_completions", ()))
    return None
