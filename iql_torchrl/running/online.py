"""Step and environments of a run that goes on online."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from iql_torchrl.configuration.launching import launched_count
from iql_torchrl.data.online import Draws, OnlineSampler, with_room
from iql_torchrl.data.preparation import PreparedData
from iql_torchrl.data.storage import allocator
from iql_torchrl.errors import CheckpointError, ConfigurationError
from iql_torchrl.running.interaction import Interaction
from iql_torchrl.running.options import FinetuneOptions
from iql_torchrl.running.stopwatch import Stopwatch
from iql_torchrl.training.checkpoints import (
    load_finite,
    newest_checkpoint,
    refuse_other_architecture,
)
from iql_torchrl.training.construction import architecture_of, build_step
from iql_torchrl.training.step import TrainingStep


def build_online(
    options: FinetuneOptions,
    data: PreparedData,
    device: torch.device,
    folder: Path | None,
    resumed: Sequence[tuple[Path, Mapping[str, Any]] | None] | None,
    clock: Stopwatch,
) -> tuple[TrainingStep, PreparedData, Interaction]:
    """The training step over the data with room for the online transitions behind them, and the environments.

    Args:
        options, data, device, folder, clock: of the run.
        resumed: of :func:`iql_torchrl.training.checkpoints.find_checkpoints`, of this run itself.

    Returns:
        the step, started from ``checkpoint.start`` where nothing is resumed; the data, now a part of its storage; and
        the environments.

    Raises:
        ConfigurationError: no environment, discrete actions, several processes, no memory for the transitions.
        CheckpointError: one to start from that cannot be read, or is of other networks.
        SimulatorError: the environment does not start.
    """
    _refuse_unsuited(options, data)
    seeds, online = options.train.seeds, options.online
    starts = None if options.checkpoint.start is None else [_load(options.checkpoint.start, seed) for seed in seeds]
    begins = options.train.steps if starts is None else _common_step(starts)
    offline, room = len(data.training), online.steps
    draws = Draws(online.offline_fraction, online.anneal_to)
    samplers = [OnlineSampler(offline, offline + index * room, room, draws) for index in range(len(seeds))]
    storage = options.dataset.storage
    allocate = allocator("memory" if storage == "device" else storage, options.dataset.storage_folder)
    enlarged = with_room(data.training.cpu(), len(seeds) * room, allocate)
    if storage == "device":
        enlarged = enlarged.to(device)
    data = replace(data, training=enlarged[:offline])
    step = build_step(
        options.algorithm,
        options.train,
        replace(data, training=enlarged),
        device,
        resumed,
        samplers=samplers,
        schedule_steps=begins or None,
    )
    if starts is not None and not resumed:
        for index, (path, checkpoint) in enumerate(starts):
            refuse_other_architecture(path, checkpoint, architecture_of(options.algorithm, data.spaces))
            step.start_from(checkpoint["training"], index)
    interaction = Interaction(step, data, online, folder, seeds=seeds, begins=begins, clock=clock, say=tqdm.write)
    return step, data, interaction


def _refuse_unsuited(options: FinetuneOptions, data: PreparedData) -> None:
    if launched_count() > 1:
        raise ConfigurationError("iql_finetune.py runs in one process: start it without torchrun.")
    if data.environment is None:
        raise ConfigurationError(
            "the online phase needs an environment, and there is none: name the one that the data come from with "
            f"env.name=ID{'' if not data.note else f' ({data.note})'}."
        )
    if data.spaces.num_actions is not None:
        raise ConfigurationError(
            f"{data.environment.name} has discrete actions, for which there is no online phase; train offline with "
            "iql_offline.py."
        )
    if options.online.offline_fraction == 0 and not options.online.warmup_steps:
        raise ConfigurationError(
            "online.warmup_steps must be at least 1 with online.offline_fraction=0: the first batches would come from "
            "one transition."
        )


def _load(start: str, seed: int) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a seed starts from: its own in a run of several, else the run's or the file."""
    path = Path(start).expanduser()
    if path.is_dir():
        newest = newest_checkpoint(path, seed)
        if newest is None:
            several = sorted(one.name for one in path.rglob("seed-*") if one.is_dir())
            hint = f"; it has {', '.join(several)}: set train.seed to one of them" if several else ""
            raise CheckpointError(f"checkpoint={start} has no checkpoint of seed {seed}{hint}.")
        path = newest
    return path, load_finite(path)


def _common_step(starts: Sequence[tuple[Path, Mapping[str, Any]]]) -> int:
    steps = {checkpoint["step"] for _, checkpoint in starts}
    if len(steps) > 1:
        raise CheckpointError(
            f"the seeds' checkpoints are of different steps, {', '.join(map(str, sorted(steps)))}; start from files of "
            "one step, seed by seed."
        )
    return steps.pop()
