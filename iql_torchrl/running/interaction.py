"""The online phase: the policies act, and what follows is trained on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iql_torchrl.atomic import write_atomically
from iql_torchrl.data.preparation import PreparedData
from iql_torchrl.environments.playing import SimulatorProcess, derived_seed
from iql_torchrl.errors import CheckpointError, DivergenceError, SimulatorError
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.reporting.run_folder import OFFLINE, ONLINE
from iql_torchrl.running.options import OnlineOptions
from iql_torchrl.running.stopwatch import Stopwatch
from iql_torchrl.training.step import TrainingStep

# Failures of the simulators, without a whole episode between them, after which the run ends.
_FAILURES_IN_A_ROW = 3


class OfflineOnly:
    """What a run that stays with its dataset does ahead of its updates: nothing.

    Args:
        updates: of the run.
    """

    begins: int | None = None

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def due(self, count: int) -> bool:
        """Whether anything comes before the update after ``count``."""
        return False

    def phase(self, count: int) -> str | None:
        """Of an evaluation after so many updates, for ``eval.csv``: there is no other, and nothing to tell apart."""
        return None

    def advance(self, count: int, policies: Sequence[Policy], going_on: Sequence[int]) -> None:
        """What comes before the next update."""

    def row(self, index: int) -> dict[str, float | None]:
        """Further columns of ``metrics.csv``."""
        return {}

    def summary(self) -> dict[str, Any]:
        """For ``summary.json``."""
        return {}

    def state_dict(self, index: int) -> dict[str, Any]:
        """Further content of a seed's checkpoint."""
        return {}

    def restore(self, found: Sequence[tuple[Path, Mapping[str, Any]] | None]) -> None:
        """Go on from the checkpoints of the seeds."""

    def close(self) -> None:
        """Release what was started."""


class Interaction:
    """Environments that the policies of a run act in, always just ahead of the updates.

    Before an update, so many environment steps are done that ``online.updates_per_step`` updates follow each. The steps
    of several environments of a seed are done together. With more than one, they are done beside the updates, in
    another process: what they lead to is trained on after the next updates, one step of all environments later.

    Every step is appended to ``online/seed-<seed>.steps`` of the run folder. A run that goes on takes the steps there
    as they are, those after its checkpoint too, so that nothing of a finished episode is lost; then it brings the
    environments back to where they were, with the seeds and actions of their unfinished episodes.

    Gymnasium's environments are stepped here directly, and not by TorchRL's ``Collector``: that has no seed for each
    episode, and cannot go on with one that was begun by another process.

    Args:
        step: with an :class:`OnlineSampler` a seed.
        data: that it was built on; its environment is acted in.
        options: of the online phase.
        folder: of the run; ``None`` keeps nothing.
        seeds: of the run.
        begins: updates before the online phase.
        clock: measures the environments and the policies' inference.
        say: is told of what goes wrong, in one line.

    Raises:
        SimulatorError: the environment does not start.
    """

    def __init__(
        self,
        step: TrainingStep,
        data: PreparedData,
        options: OnlineOptions,
        folder: Path | None,
        *,
        seeds: Sequence[int],
        begins: int,
        clock: Stopwatch,
        say: Callable[[str], object] = print,
    ) -> None:
        assert data.environment is not None
        self.begins = begins
        self._data, self._options, self._seeds, self._clock, self._say = data, options, seeds, clock, say
        self._score = data.environment.score
        self._count = options.num_envs  # environments of a seed
        self._storages: list[Any] = [buffer.storage for buffer in step.buffers]
        self._samplers: list[Any] = [buffer.sampler for buffer in step.buffers]
        spaces = data.spaces
        self._row = _row_type(spaces.observation_dim, len(spaces.action_low))
        self._simulators = SimulatorProcess(data.environment, len(seeds) * self._count, options.timeout)
        self._records = [_Record(folder, seed, self._row, self._count) for seed in seeds]
        self._steps = 0  # of every environment
        self._observations = np.zeros((len(seeds), self._count, spaces.observation_dim), dtype=np.float32)
        self._episodes = np.zeros((len(seeds), self._count), dtype=np.int64)
        self._returns, self._successes = np.zeros_like(self._episodes, dtype=float), np.zeros_like(self._episodes)
        self._pending: np.ndarray | None = None
        self._sent, self._ready = False, False
        self._going_on: set[int] = set()
        self._lost: SimulatorError | None = None
        self._failures, self._in_a_row = 0, 0
        # Of the training episodes that have ended: returns since the last row, and how far below the best each was.
        self._ended: list[list[float]] = [[] for _ in seeds]
        self._regrets: list[list[float]] = [[] for _ in seeds]

    @property
    def environment_steps(self) -> int:
        """Of each seed, in all its environments."""
        return self._steps * self._count

    @property
    def updates(self) -> int:
        """Of the whole run, offline ones included."""
        return self.begins + updates_online(self._options)

    def due(self, count: int) -> bool:
        """Whether any step comes before the update after ``count``."""
        done = count - self.begins
        steps = self._warmup + done // (self._options.updates_per_step * self._count) + 1
        return done >= 0 and self._steps < min(steps, self._all)

    def phase(self, count: int) -> str:
        """Of an evaluation after so many updates, for ``eval.csv``."""
        return ONLINE if count > self.begins else OFFLINE

    def advance(self, count: int, policies: Sequence[Policy], going_on: Sequence[int]) -> None:
        """Do the steps that come before the update after ``count``.

        Args:
            count: of updates so far.
            policies: of all seeds.
            going_on: indices of the seeds whose policies act; the steps of the others are not kept.

        Raises:
            DivergenceError: a policy's action is NaN or infinite.
            SimulatorError: simulators that fail again and again.
        """
        self._going_on = set(going_on)
        while self.due(count):
            self._step(policies)

    def row(self, index: int) -> dict[str, float | None]:
        """Columns of ``metrics.csv``: steps, the mean return of the training episodes since the last row, regret.

        Regret is the mean, over the training episodes up to here, of 1 - success, as CORL has it, or where the
        environment tells of no success of 1 - normalised score / 100.
        """
        ended, self._ended[index] = self._ended[index], []
        return {
            "environment_steps": self.environment_steps,
            "training_return": fmean(ended) if ended else None,
            "regret": self.regret(index),
            "environment_seconds": self._clock.seconds.get("environment", 0.0),
            "inference_seconds": self._clock.seconds.get("inference", 0.0),
        }

    def regret(self, index: int) -> float | None:
        """See :meth:`row`; ``None`` before an episode has ended, and where nothing tells what is best."""
        return fmean(self._regrets[index]) if self._regrets[index] else None

    def summary(self) -> dict[str, Any]:
        """For ``summary.json``."""
        regrets = [regret for index in range(len(self._seeds)) if (regret := self.regret(index)) is not None]
        return {
            "offline_updates": self.begins,
            "environment_steps": self.environment_steps,
            "regret": fmean(regrets) if regrets else None,
            "simulator_failures": self._failures or None,
        }

    def state_dict(self, index: int) -> dict[str, Any]:
        """Further content of a seed's checkpoint; its steps are in the file, which is on the disk then."""
        self._records[index].sync()
        pending = None if self._pending is None else torch.from_numpy(self._pending[index].copy())
        return {"interaction": {"steps": self._steps, "pending": pending, "ended": list(self._ended[index])}}

    def restore(self, found: Sequence[tuple[Path, Mapping[str, Any]] | None]) -> None:
        """Go on from the checkpoints of the seeds; one that has diverged has an older one, or none.

        Raises:
            CheckpointError: one of a run without an online phase; steps that a checkpoint counts on are not there.
        """
        states: dict[int, Mapping[str, Any]] = {}
        for index, (path, checkpoint) in ((index, one) for index, one in enumerate(found) if one is not None):
            if "interaction" not in checkpoint:
                raise CheckpointError(
                    f"{path} is of a run without an online phase: begin one with checkpoint={path}, and not resume."
                )
            states[index], record = checkpoint["interaction"], self._records[index]
            if len(record) < states[index]["steps"]:
                raise CheckpointError(
                    f"checkpoint {path} counts on {states[index]['steps']} steps of the environments, of which "
                    f"{record.path} has {len(record)}; restore that file, or start anew in another run_dir."
                )
        steps = max((state["steps"] for state in states.values()), default=0)
        for sampler in self._samplers:
            sampler.added = 0
        if steps:
            self._take(np.stack([record.rows(0, steps) for record in self._records]))
        for index, state in states.items():
            self._ended[index] = list(state["ended"])  # since the last row
            if state["pending"] is not None and state["steps"] == steps:
                if self._pending is None:
                    self._pending = np.zeros((len(self._seeds), *state["pending"].shape), dtype=np.float32)
                self._pending[index] = state["pending"].numpy()

    def close(self) -> None:
        """End the simulators."""
        self._simulators.close()

    # ------------------------------------------------------------------ one step of every environment

    @property
    def _warmup(self) -> int:
        return self._options.warmup_steps // self._count

    @property
    def _all(self) -> int:
        return self._options.steps // self._count

    def _step(self, policies: Sequence[Policy]) -> None:
        live = self._steps == min(map(len, self._records))
        if live:
            self._send(policies)
            rows = self._receive()
        else:
            rows, self._pending = np.stack([one.rows(self._steps, self._steps + 1) for one in self._records]), None
        with self._clock("environment"):
            if live:
                for record, row in zip(self._records, rows, strict=True):
                    record.append(row)
            self._take(rows)
            if live:
                for index, environment in np.argwhere(_over(rows[:, 0])):
                    self._reset(index, environment)
        if self._count > 1 and self._steps < self._all and self._steps == min(map(len, self._records)):
            self._send(policies)

    def _send(self, policies: Sequence[Policy]) -> None:
        """Have the environments begin a step with actions of the policies, or with those that a checkpoint has."""
        if self._sent:
            return
        if not self._ready:
            with self._clock("environment"):
                self._bring_back()
        if self._pending is None:
            with self._clock("inference"):
                self._pending = np.stack([self._choose(index, policy) for index, policy in enumerate(policies)])
        with self._clock("environment"):
            actions = self._pending.reshape(-1, self._pending.shape[-1])
            try:
                self._simulators.send(range(len(actions)), actions)
            except SimulatorError as error:
                self._lost = error
        self._sent = True

    def _choose(self, index: int, policy: Policy) -> np.ndarray:
        options = self._options
        if index not in self._going_on:
            return np.zeros((self._count, len(policy.action_low)), dtype=np.float32)
        seed = derived_seed(self._seeds[index], self._steps)
        actions = policy.explore(
            self._observations[index], seed, sample=options.sample_actions, noise=options.exploration_noise
        )
        if not np.isfinite(actions).all():
            raise DivergenceError(
                f"the policy of seed {self._seeds[index]} gives {actions[~np.isfinite(actions)][0]} for an action "
                f"after {self.environment_steps} steps: it has diverged. Start from another checkpoint, or with lower "
                "learning rates."
            )
        return actions

    def _receive(self) -> np.ndarray:
        """What follows the pending actions, ``[seeds, 1, environments]``; not ``kept`` where nothing does."""
        assert self._pending is not None
        rows = np.zeros((len(self._seeds), 1, self._count), dtype=self._row)
        rows["observation"][:, 0], rows["action"][:, 0] = self._observations, self._pending
        rows["episode"][:, 0], rows["success"] = self._episodes, -1
        lost, self._lost, self._sent, self._pending = self._lost, None, False, None
        try:
            with self._clock("environment"):
                if lost is not None:
                    raise lost
                found = self._simulators.receive()
        except SimulatorError as error:
            self._fail(str(error))
            self._simulators.restart()
            return rows
        broken = []
        for place, (row, step) in enumerate(zip(rows.reshape(-1), found, strict=True)):
            row["next_observation"], row["reward"] = step.observation, step.reward
            row["terminated"], row["over"] = step.terminated, step.over
            row["success"] = -1 if step.success is None else step.success
            row["kept"] = np.isfinite(row["next_observation"]).all() and np.isfinite(row["reward"])
            if not row["kept"]:
                broken.append(row)
            row["kept"] &= place // self._count in self._going_on
        if broken:
            what = "an observation" if np.isfinite(broken[0]["reward"]) else "a reward"
            self._fail(f"the simulator of {self._environment} returned {what} that is NaN or infinite")
        return rows

    @property
    def _environment(self) -> str:
        assert self._data.environment is not None
        return self._data.environment.name

    def _fail(self, what: str) -> None:
        self._failures += 1
        self._in_a_row += 1
        what = what.rstrip(".")
        if self._in_a_row >= _FAILURES_IN_A_ROW:
            raise SimulatorError(f"{what}: failed {self._in_a_row} times without an episode that ended between them.")
        self._say(f"{what}: the transition is left out, and the episode begun anew")

    def _take(self, rows: np.ndarray) -> None:
        """Put steps ``[seeds, steps, environments]`` into the storages and count their episodes."""
        for index, (storage, sampler) in enumerate(zip(self._storages, self._samplers, strict=True)):
            kept = rows[index][rows[index]["kept"]]
            if len(kept):
                place = slice(sampler.start + sampler.added, sampler.start + sampler.added + len(kept))
                for key, value in self._transitions(kept).items():
                    storage._storage.get(key)[place] = value
                sampler.added += len(kept)
        for step in range(rows.shape[1]):
            self._account(rows[:, step])
        self._steps += rows.shape[1]

    def _transitions(self, kept: np.ndarray) -> dict[Any, Tensor]:
        def tensor(name: str) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(kept[name]))

        reward = tensor("reward").unsqueeze(-1)
        found = self._data.transformed(tensor("observation"), tensor("action"), reward, tensor("next_observation"))
        over, terminated = tensor("over").unsqueeze(-1), tensor("terminated").unsqueeze(-1)
        return found | {
            ("next", "done"): over,
            ("next", "terminated"): terminated,
            ("next", "truncated"): over & ~terminated,
        }

    def _account(self, rows: np.ndarray) -> None:
        self._returns += np.where(rows["kept"], rows["reward"], 0)
        self._successes = np.maximum(self._successes, rows["success"])
        told, over = rows["success"] >= 0, _over(rows)
        for index, environment in np.argwhere(over):
            if rows["kept"][index, environment]:
                episode_return = float(self._returns[index, environment])
                score = self._score(episode_return)
                self._ended[index].append(episode_return)
                self._in_a_row = 0
                if told[index, environment]:
                    self._regrets[index].append(1.0 - float(self._successes[index, environment]))
                elif score is not None:
                    self._regrets[index].append(1.0 - score / 100)
            self._returns[index, environment] = self._successes[index, environment] = 0
        self._episodes = rows["episode"] + over.astype(np.int64)
        self._observations = rows["next_observation"].copy()

    # ------------------------------------------------------------------ episodes

    def _reset(self, index: int, environment: int) -> None:
        place = index * self._count + environment
        seed = derived_seed(self._seeds[index], environment, int(self._episodes[index, environment]))
        try:
            self._observations[index, environment] = self._simulators.reset(place, seed)
        except SimulatorError as error:
            self._fail(str(error))
            self._simulators.restart()
            for one in np.ndindex(*self._episodes.shape):
                self._begin_anew(*one)

    def _begin_anew(self, index: int, environment: int) -> None:
        self._episodes[index, environment] += 1
        self._returns[index, environment] = self._successes[index, environment] = 0
        self._reset(index, environment)

    def _bring_back(self) -> None:
        """Every environment to where the steps so far have left it."""
        for index, record in enumerate(self._records):
            record.cut(self._steps)  # those that not all seeds had written
            rows = record.rows(0, self._steps)
            for environment in range(self._count):
                episode, expected = self._episodes[index, environment], self._observations[index, environment].copy()
                self._reset(index, environment)
                begun = rows[rows["episode"][:, environment] == episode, environment]
                for row in begun:
                    self._simulators.send([index * self._count + environment], row["action"][None])
                    self._observations[index, environment] = self._simulators.receive()[0].observation
                if len(begun) and not np.array_equal(expected, self._observations[index, environment]):
                    self._say(f"{self._environment} does not repeat an episode: one that had begun is begun anew")
                    self._begin_anew(index, environment)
        self._ready = True


def updates_online(options: OnlineOptions) -> int:
    """How many updates the steps of an online phase are followed by."""
    return (options.steps - options.warmup_steps) * options.updates_per_step


def _over(rows: np.ndarray) -> np.ndarray:
    return rows["over"] | ~rows["kept"]


def _row_type(observation_dim: int, action_dim: int) -> np.dtype:
    return np.dtype(
        [
            ("observation", "<f4", (observation_dim,)),
            ("action", "<f4", (action_dim,)),
            ("reward", "<f4"),
            ("next_observation", "<f4", (observation_dim,)),
            ("terminated", "?"),
            ("over", "?"),
            ("success", "i1"),
            ("kept", "?"),
            ("episode", "<u4"),
        ]
    )


class _Record:
    """The steps of a seed's environments in a file, one after the other: a head of one line, then rows of one size.

    What a kill leaves unfinished at its end is no step, and is written over.
    """

    def __init__(self, folder: Path | None, seed: int, row: np.dtype, environments: int) -> None:
        self._row, self._environments = row, environments
        self._held: list[np.ndarray] = []
        self.path = None if folder is None else folder / "online" / f"seed-{seed}.steps"
        self._length = 0
        if self.path is None:
            return
        head = json.dumps({"environments": environments, "row": str(row.descr)}).encode() + b"\n"
        self._offset, self._size = len(head), row.itemsize * environments
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, lambda file: file.write(head))
        self._file = open(self.path, "r+b")  # noqa: SIM115
        if self._file.read(self._offset) != head:
            raise CheckpointError(f"{self.path} holds steps of other environments; name another run_dir.")
        self._length = (self.path.stat().st_size - self._offset) // self._size
        self.cut(self._length)

    def __len__(self) -> int:
        return self._length

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Steps ``[stop - start, environments]``."""
        if self.path is None:
            return np.stack(self._held[start:stop]) if stop > start else np.empty((0, self._environments), self._row)
        self._file.flush()
        with open(self.path, "rb") as file:
            file.seek(self._offset + start * self._size)
            content = file.read((stop - start) * self._size)
        return np.frombuffer(content, dtype=self._row).reshape(-1, self._environments)

    def append(self, rows: np.ndarray) -> None:
        """A step ``[1, environments]``; with the end of an episode all before it are the system's to keep."""
        if self.path is None:
            self._held.append(rows[0].copy())
        else:
            self._file.write(rows.tobytes())
            if _over(rows).any():
                self._file.flush()
        self._length += 1

    def cut(self, length: int) -> None:
        """Drop the steps from ``length`` on."""
        if self.path is not None:
            self._file.flush()
            self._file.truncate(self._offset + length * self._size)
            self._file.seek(0, 2)
        del self._held[length:]
        self._length = length

    def sync(self) -> None:
        """Have all steps on the disk."""
        if self.path is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
