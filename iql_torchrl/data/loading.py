"""A dataset's transitions, by the name of its source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tensordict import TensorDict

from iql_torchrl.configuration.declaring import check_argument, read_options
from iql_torchrl.data.sources import KINDS
from iql_torchrl.data.sources.source import LogSource, Source
from iql_torchrl.data.storage import allocator
from iql_torchrl.data.transitions import transitions_from_log
from iql_torchrl.errors import ConfigurationError, DatasetError
from iql_torchrl.suggestions import nearest


def load_transitions(
    source: str | Source,
    *,
    keep_timeouts: bool = False,
    max_episode_steps: int | None = None,
    storage: str = "memory",
    storage_folder: str | Path | None = None,
    **options: Any,
) -> TensorDict:
    """The transitions of a dataset, checked, by the rule of D4RL's ``qlearning_dataset``.

    Args:
        source: an object of ``iql_torchrl.data.sources``, or the name of one: ``"embedded"`` (no options), ``"hdf5"``,
            ``"parquet"``, ``"numpy"``, ``"robomimic"``, ``"d4rl"`` or ``"minari"`` (whose transitions are all kept).
        keep_timeouts: keep the rows at timeouts, with the log's own ``next_observations``.
        max_episode_steps: where an episode was cut, for a log with neither timeouts nor episode ids.
        storage: ``"memory"``, or ``"memmap"`` for files that are mapped into memory and gone with the process.
        storage_folder: for those files, default ``~/.cache/iql_torchrl/memmap``.
        **options: of the named source: ``path=``, ``name=``, ``root=`` and so on.

    Returns:
        a TensorDict of batch shape ``[N]``: ``observation`` ``[N, O]`` and ``action`` ``[N, A]`` (float32; ``[N]``,
        int64, where they are discrete), ``episode`` ``[N]`` (int64), and under ``"next"`` ``observation`` ``[N, O]``,
        ``reward`` ``[N, 1]`` (float32), ``done``, ``terminated`` and ``truncated`` ``[N, 1]`` (bool).

    Raises:
        DatasetError: an unknown source, or whatever is wrong with the data.
        ConfigurationError: an option that the source does not have, or with a value out of range.
    """
    if isinstance(source, str):
        source = source_named(source, keep_timeouts=keep_timeouts, **options)
    try:
        check_argument(LogSource, "max_episode_steps", max_episode_steps)
    except ValueError as error:
        raise ConfigurationError(f"dataset.{error}") from error
    allocate = allocator(storage, storage_folder)
    with source.open(allocate) as log:
        if max_episode_steps is not None:
            log = replace(log, max_episode_steps=max_episode_steps, count_after_terminal=0)
        return transitions_from_log(log, allocate=allocate)


def source_named(kind: str, /, **options: Any) -> Source:
    """A source by the name of its kind; ``keep_timeouts`` means nothing to one whose rows are all kept.

    Raises:
        DatasetError: an unknown kind.
        ConfigurationError: an option that it does not have, or with a value out of range.
    """
    kinds = {one.model_fields["source"].default: one for one in KINDS}
    if kind not in kinds:
        raise DatasetError(f"unknown dataset source {kind!r}{nearest(kind, kinds)}")
    chosen = kinds[kind]
    if "keep_timeouts" not in chosen.model_fields:
        options.pop("keep_timeouts", None)
    return read_options(chosen, {"source": kind, **options}, "dataset.")
