"""Dataset source -> transitions -> replay buffer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from tensordict import TensorDict

from iql_torchrl.data import d4rl, embedded, hdf5, minari, numpy_arrays, parquet
from iql_torchrl.data.actions import normalise_actions
from iql_torchrl.data.buffer import make_buffer, split_episodes
from iql_torchrl.data.log import Log
from iql_torchrl.data.observations import ObservationNormaliser
from iql_torchrl.data.rewards import transform_rewards
from iql_torchrl.data.storage import Allocate, allocator
from iql_torchrl.data.transitions import episode_returns, fingerprint, transitions_from_log
from iql_torchrl.errors import DatasetError
from iql_torchrl.suggestions import nearest

__all__ = [
    "ObservationNormaliser",
    "episode_returns",
    "fingerprint",
    "load_transitions",
    "make_buffer",
    "normalise_actions",
    "open_log",
    "split_episodes",
    "transform_rewards",
]

SOURCES = {
    "embedded": embedded.open_log,
    "hdf5": hdf5.open_log,
    "parquet": parquet.open_log,
    "numpy": numpy_arrays.open_log,
    "d4rl": d4rl.open_log,
    "minari": minari.open_log,
}


def load_transitions(
    source: str,
    *,
    keep_timeouts: bool = False,
    max_episode_steps: int | None = None,
    storage: str = "memory",
    storage_folder: str | Path | None = None,
    **options: Any,
) -> TensorDict:
    """The transitions of a dataset, checked, by the rule of D4RL's ``qlearning_dataset``.

    Args:
        source: ``"embedded"`` (no options), ``"hdf5"`` (:func:`iql_torchrl.data.hdf5.open_log`), ``"parquet"``
            (:func:`iql_torchrl.data.parquet.open_log`), ``"numpy"`` (:func:`iql_torchrl.data.numpy_arrays.open_log`),
            ``"d4rl"`` (:func:`iql_torchrl.data.d4rl.open_log`) or ``"minari"``
            (:func:`iql_torchrl.data.minari.open_log`, whose transitions are all kept).
        keep_timeouts: keep the rows at timeouts, with the log's own ``next_observations``.
        max_episode_steps: where an episode was cut, for a log with neither timeouts nor episode ids.
        storage: ``"memory"``, or ``"memmap"`` for files that are mapped into memory and gone with the process.
        storage_folder: for those files, default ``~/.cache/iql_torchrl/memmap``.
        **options: of the source.

    Returns:
        a TensorDict of batch shape ``[N]``: ``observation`` ``[N, O]`` and ``action`` ``[N, A]`` (float32; ``[N]``,
        int64, where they are discrete), ``episode`` ``[N]`` (int64), and under ``"next"`` ``observation`` ``[N, O]``,
        ``reward`` ``[N, 1]`` (float32), ``done``, ``terminated`` and ``truncated`` ``[N, 1]`` (bool).

    Raises:
        DatasetError: an unknown source, or whatever is wrong with the data.
    """
    allocate = allocator(storage, storage_folder)
    with open_log(source, keep_timeouts=keep_timeouts, allocate=allocate, **options) as log:
        return transitions_from_log(
            log, keep_timeouts=keep_timeouts, max_episode_steps=max_episode_steps, allocate=allocate
        )


def open_log(
    source: str, *, keep_timeouts: bool = False, allocate: Allocate = np.empty, **options: Any
) -> AbstractContextManager[Log]:
    """The rows of a dataset, before the rule that makes transitions of them.

    Args:
        source, keep_timeouts, options: as for :func:`load_transitions`.
        allocate: where a source that reads everything at once puts it.

    Raises:
        DatasetError: an unknown source, or a dataset that cannot be opened.
    """
    if source not in SOURCES:
        raise DatasetError(f"unknown dataset source {source!r}{nearest(source, SOURCES)}")
    if source == "minari":  # whose episodes are read once, straight to where they stay
        options["allocate"] = allocate
    if source == "d4rl":  # which does without next_observations where nobody needs them
        options["keep_timeouts"] = keep_timeouts
    return SOURCES[source](**options)
