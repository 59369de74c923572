"""Networks that a run starts from: those of another run, or of another code base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iql_torchrl.data.preparation import PreparedData
from iql_torchrl.errors import CheckpointError
from iql_torchrl.running.options import RunOptions
from iql_torchrl.training.checkpoints import (
    FORMAT,
    load_finite,
    newest_checkpoint,
    read_saved,
    refuse_other_architecture,
)
from iql_torchrl.training.construction import architecture_of
from iql_torchrl.training.foreign import ForeignNetworks, load_foreign
from iql_torchrl.training.step import TrainingStep

Start = tuple[Path, Mapping[str, Any]] | ForeignNetworks


def load_starts(options: RunOptions) -> list[Start] | None:
    """What ``checkpoint.start`` names, one a seed: its own in a run of several, else the run's or the file.

    Raises:
        CheckpointError: it cannot be read, or has nothing for a seed.
    """
    start = options.checkpoint.start
    return None if start is None else [_load(start, seed) for seed in options.train.seeds]


def common_step(starts: Sequence[Start]) -> int:
    """The updates that are behind all of them.

    Raises:
        CheckpointError: they differ.
    """
    steps = {start.step if isinstance(start, ForeignNetworks) else start[1]["step"] for start in starts}
    if len(steps) > 1:
        raise CheckpointError(
            f"the seeds' checkpoints are of different steps, {', '.join(map(str, sorted(steps)))}; start from files of "
            "one step, seed by seed."
        )
    return steps.pop()


def start_from(
    step: TrainingStep, starts: Sequence[Start], options: RunOptions, data: PreparedData, count: int
) -> None:
    """Give each seed its networks: of a run with Adam's moments, of another code base without.

    Args:
        step: of the run.
        starts: of :func:`load_starts`.
        options, data: of the run.
        count: updates that are behind.

    Raises:
        CheckpointError: networks of another architecture.
    """
    architecture = architecture_of(options.algorithm, data.spaces)
    for index, start in enumerate(starts):
        if isinstance(start, ForeignNetworks):
            known = {key: architecture[key] for key in start.architecture if key in architecture}
            known |= {"extraction": architecture.get("extraction", "awr")}
            refuse_other_architecture(start.path, {"architecture": start.architecture}, known)
            scaled = options.dataset.normalised_actions
            bounds = () if scaled else (data.spaces.action_low, data.spaces.action_high)
            step.start_from({"loss": start.state_for(step.losses[index], *bounds)}, index, count)
        else:
            path, checkpoint = start
            refuse_other_architecture(path, checkpoint, architecture)
            step.start_from(checkpoint["training"], index, count)


def _load(start: str, seed: int) -> Start:
    path = Path(start).expanduser()
    if path.is_dir():
        newest = newest_checkpoint(path, seed)
        if newest is None and any(one.stem == "actor" for one in path.iterdir()):
            return load_foreign(path)
        if newest is None:
            several = sorted(one.name for one in path.rglob("seed-*") if one.is_dir())
            hint = f"; it has {', '.join(several)}: set train.seed to one of them" if several else ""
            raise CheckpointError(f"checkpoint={start} has no checkpoint of seed {seed}{hint}.")
        path = newest
    found = read_saved(path) if path.is_file() else None
    if isinstance(found, Mapping) and found.get("format") != FORMAT:
        return load_foreign(path)
    return path, load_finite(path)
