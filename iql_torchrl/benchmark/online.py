"""The online loop beside the offline one, and beside the loop of CORL's fine-tuning."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from iql_torchrl.benchmark.case import Case
from iql_torchrl.benchmark.plain_pytorch import PlainIQL
from iql_torchrl.configuration.composing import compose, initialised
from iql_torchrl.data.preparation import PreparedData, prepare_data
from iql_torchrl.environments.simulators import make_environment
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.running.online import build_online
from iql_torchrl.running.options import FinetuneOptions, UpdateOptions
from iql_torchrl.running.stopwatch import Stopwatch

# Environments of a seed, and updates for each of their steps.
_OURS = ((1, 1), (4, 1), (1, 20))


def online_rates(options: UpdateOptions) -> dict[str, Any]:
    """Time the loops on the embedded dataset and in its environment, in turn, in this process.

    All have the networks and the batch of the paper. CORL's loop is written from its description: the policy's Normal
    is drawn from, the environment is stepped once, the transition goes into preallocated tensors, and one eager update
    follows. Ours draws, steps and records as a run does, in the order of the ``paper`` protocol; without a file, and
    without evaluations.

    Args:
        options: ``rounds`` in which the loops take turns, ``steps_per_round`` updates of each, after ``warm_up``.

    Returns:
        by loop ``milliseconds``, what an update takes with all that goes with it; ``update``, ``environment`` and
        ``inference``, what each part of that takes; medians over the rounds. ``update_to_offline`` is the update's time
        over that of the offline loop, ``times_corl`` CORL's over ours, both round by round.
    """
    compile = options.compile
    loops: dict[str, _Loop] = {"offline": _Ours(1, 1, compile, offline=True)}
    for environments, at_once in _OURS:
        loops[f"online, {environments} environments, {at_once} updates a step"] = _Ours(environments, at_once, compile)
    loops["CORL's loop"] = _Corl(_prepared(_composed(1, 1, compile)))
    times: dict[str, list[dict[str, float]]] = {name: [] for name in loops}
    try:
        for loop in loops.values():
            loop(options.warm_up)
        for _ in tqdm(range(options.rounds), unit="round"):
            for name, loop in loops.items():
                times[name].append(loop(options.steps_per_round))
    finally:
        for loop in loops.values():
            loop.close()

    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    found: dict[str, Any] = {}
    for name, rows in times.items():
        found[name] = {key: median([row[key] for row in rows]) for key in rows[0]}
        pairs = list(zip(rows, times["offline"], times["CORL's loop"], strict=True))
        found[name]["update_to_offline"] = median([row["update"] / offline["update"] for row, offline, _ in pairs])
        found[name]["times_corl"] = median([corl["milliseconds"] / row["milliseconds"] for row, _, corl in pairs])
    return found


def online_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """:func:`online_rates` as aligned lines."""
    columns = ("milliseconds", "update", "environment", "inference", "update_to_offline", "times_corl")
    lines = [f"{'':<42}" + "".join(f"{name:>18}" for name in columns)]
    for name, row in found.items():
        lines.append(f"{name:<42}" + "".join(f"{row[key]:>18.3f}" for key in columns))
    return "\n".join(lines)


class _Loop:
    """``call(updates)`` goes on by so many, and tells the milliseconds of one and of its parts."""

    def __call__(self, updates: int) -> dict[str, float]:
        clock, start = Stopwatch(), time.perf_counter()
        for _ in range(updates):
            self.update(clock)
        seconds = time.perf_counter() - start
        parts = {key: clock.seconds.get(key, 0.0) for key in ("update", "environment", "inference")}
        return {key: value / updates * 1e3 for key, value in {"milliseconds": seconds, **parts}.items()}

    def update(self, clock: Stopwatch) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Release the environments."""


def _composed(environments: int, at_once: int, compile: bool) -> FinetuneOptions:
    overrides = [
        f"online.num_envs={environments}",
        f"online.updates_per_step={at_once}",
        "online.steps=200000",
        "train.steps=0",
    ]
    overrides += [f"train.compile={str(compile).lower()}", "train.device=cpu"]
    with initialised():
        return compose("iql_finetune", overrides, FinetuneOptions)


def _prepared(options: FinetuneOptions) -> PreparedData:
    return prepare_data(options.dataset, options.algorithm, options.env)


class _Ours(_Loop):
    def __init__(self, environments: int, at_once: int, compile: bool, offline: bool = False) -> None:
        options = _composed(environments, at_once, compile)
        self._clock = Stopwatch()
        device, folder = torch.device("cpu"), None
        built = build_online(options, _prepared(options), device, folder, None, self._clock)
        self._step, data, self._interaction = built
        spaces = data.spaces
        bounds = (spaces.action_low, spaces.action_high)
        self._policies = [Policy.from_loss(loss, *bounds, data.normaliser) for loss in self._step.losses]
        self._offline = offline
        self._count = 0

    def update(self, clock: Stopwatch) -> None:
        if not self._offline:
            self._clock.seconds = clock.seconds
            self._interaction.advance(self._count, self._policies, [0])
        with clock("update"):
            self._step()
        self._count += 1

    def close(self) -> None:
        self._interaction.close()


class _Corl(_Loop):
    def __init__(self, data: PreparedData) -> None:
        assert data.environment is not None
        transitions = data.training
        self._size = len(transitions)
        case = Case(
            name="online",
            observation_dim=data.spaces.observation_dim,
            action_dim=len(data.spaces.action_low),
            transitions=1,
        )
        self._algorithm = PlainIQL(case)
        keys: list[Any] = ["observation", "action", ("next", "reward"), ("next", "observation"), ("next", "terminated")]
        columns = (transitions.get(key).float() for key in keys)
        self._columns = [torch.cat([column, torch.zeros(200_000, column.shape[1])]) for column in columns]
        self._environment = make_environment(data.environment)
        self._observation, _ = self._environment.reset(seed=0)
        self._scale = data.reward_transform[0]
        self._random = np.random.default_rng(0)

    def update(self, clock: Stopwatch) -> None:
        with clock("inference"), torch.no_grad():
            observation = torch.tensor(self._observation.reshape(1, -1), dtype=torch.float32)
            action = self._algorithm.actor(observation).sample().clamp(-1, 1).numpy().flatten()
        with clock("environment"):
            following, reward, terminated, truncated, _ = self._environment.step(action)
            row = (self._observation, action, [float(reward) * self._scale], following, [float(terminated)])
            for column, value in zip(self._columns, row, strict=True):
                column[self._size] = torch.as_tensor(np.asarray(value, dtype=np.float32))
            self._size += 1
            self._observation = following
            if terminated or truncated:
                self._observation, _ = self._environment.reset()
        with clock("update"):
            rows = self._random.integers(0, self._size, size=256)
            observation, action_, reward_, following_, terminated_ = (column[rows] for column in self._columns)
            self._algorithm.update(observation, action_, reward_, following_, terminated_)

    def close(self) -> None:
        self._environment.close()
