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
from iql_torchrl.errors import ConfigurationError
from iql_torchrl.running.interaction import Interaction
from iql_torchrl.running.options import FinetuneOptions
from iql_torchrl.running.starting import common_step, load_starts, start_from
from iql_torchrl.running.stopwatch import Stopwatch
from iql_torchrl.training.construction import build_step
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
    starts = load_starts(options)
    begins = options.train.steps if starts is None else common_step(starts)
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
        start_from(step, starts, options, data, begins)
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
