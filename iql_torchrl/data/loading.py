"""A dataset's transitions, by the name of its source."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from iql_torchrl.configuration.declaring import check_argument, read_options
from iql_torchrl.data.actions import first_outside, normalise_actions
from iql_torchrl.data.sources import KINDS
from iql_torchrl.data.sources.source import LogSource, Source
from iql_torchrl.data.storage import allocator
from iql_torchrl.data.transitions import transitions_from_log
from iql_torchrl.errors import ConfigurationError, DatasetError
from iql_torchrl.suggestions import nearest

# Of a path in place of a source's name.
_SUFFIXES = {".hdf5": "hdf5", ".h5": "hdf5", ".parquet": "parquet", ".npz": "numpy"}


def load_transitions(
    source: str | Path | Source,
    *,
    action_low: float | Sequence[float] | None = None,
    action_high: float | Sequence[float] | None = None,
    keep_timeouts: bool = False,
    max_episode_steps: int | None = None,
    storage: str = "memory",
    storage_folder: str | Path | None = None,
    **options: Any,
) -> TensorDict:
    """The transitions of a dataset, checked, by the rule of D4RL's ``qlearning_dataset``.

    Args:
        source: an object of ``iql_torchrl.data.sources``; the name of one: ``"embedded"`` (no options), ``"hdf5"``,
            ``"parquet"``, ``"numpy"``, ``"robomimic"``, ``"lerobot"``, ``"d4rl"``, ``"ogbench"`` or ``"minari"`` (whose
            transitions are all kept); or the path of a log: a file .hdf5, .h5, .parquet or .npz, or a folder of .npy
            files.
        action_low, action_high: bounds of the action space, a number or one a dimension: the actions are rescaled from
            these to [-1, 1], which the policies and critics of this package take them to be in, and clipped to +-(1 -
            1e-5), as the original code does. Without them the actions stay as they are; continuous ones outside
            [-1, 1] get a ``UserWarning``.
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
    given = {"action_low": _plain(action_low), "action_high": _plain(action_high)}
    given = {name: bound for name, bound in given.items() if bound is not None}
    if not isinstance(source, Source):
        kind, path = _kind_and_path(source, options)
        chosen = source_named(kind, keep_timeouts=keep_timeouts, **path, **options, **given)
    else:
        chosen = read_options(type(source), {**dict(source), **given}, "dataset.") if given else source
    try:
        check_argument(LogSource, "max_episode_steps", max_episode_steps)
    except ValueError as error:
        raise ConfigurationError(f"dataset.{error}") from error
    allocate = allocator(storage, storage_folder)
    with chosen.open(allocate) as log:
        if max_episode_steps is not None:
            log = replace(log, max_episode_steps=max_episode_steps, count_after_terminal=0)
        transitions = transitions_from_log(log, allocate=allocate)
    _rescale_actions(transitions, chosen)
    return transitions


def _kind_and_path(source: str | Path, options: Mapping[str, Any]) -> tuple[str, dict[str, Path]]:
    """The name of a source, and the path that was given in its place, as its option."""
    kinds, path = _kinds(), Path(source).expanduser()
    if isinstance(source, str) and (source in kinds or not (path.suffix or path.exists())):
        return source, {}
    if "path" in options:
        raise ConfigurationError(f"dataset.path={options['path']} is given beside the path {source}; give one of them.")
    if path.is_dir() and any(path.glob("*.npy")):
        return "numpy", {"path": path}
    if path.suffix.lower() in _SUFFIXES and not path.is_dir():
        return _SUFFIXES[path.suffix.lower()], {"path": path}
    what = "is a folder without .npy files" if path.is_dir() else f"is no {', '.join(_SUFFIXES)} file by its name"
    raise DatasetError(
        f"dataset {source} {what}, nor the name of a source ({', '.join(kinds)}); where it is a log in one of these "
        "layouts, give the source's name, and the path as path=."
    )


def _rescale_actions(transitions: TensorDict, source: Source) -> None:
    """From the bounds that the source's options give to [-1, 1]; where they give none, warn of actions outside that."""
    action = transitions["action"]
    if action.ndim == 1:
        if source.action_low is not None:
            raise ConfigurationError(
                "dataset.action_low and dataset.action_high are for continuous actions; the data's are discrete."
            )
        return
    bounds = source.action_bounds(action.shape[1])
    if bounds is not None:
        if not source.normalised_actions:
            normalise_actions(transitions, torch.from_numpy(bounds[0]), torch.from_numpy(bounds[1]))
        return
    if outside := first_outside(action):
        row, column, count = outside
        warnings.warn(
            f"{source.title}: {count:,} transitions have actions outside [-1, 1], the first one "
            f"{float(action[row, column]):g} in transition {row}, dimension {column}; policies and critics here take "
            "them to be inside. Give action_low and action_high, the bounds of the action space, to rescale them.",
            stacklevel=3,
        )


def _plain(bound: Any) -> Any:
    """Arrays, tensors and tuples as the lists and numbers that an option may be."""
    if hasattr(bound, "tolist"):
        return bound.tolist()
    return list(bound) if isinstance(bound, tuple) else bound


def _kinds() -> dict[str, type[Source]]:
    return {one.model_fields["source"].default: one for one in KINDS}


def source_named(kind: str, /, **options: Any) -> Source:
    """A source by the name of its kind; ``keep_timeouts`` means nothing to one whose rows are all kept.

    Raises:
        DatasetError: an unknown kind.
        ConfigurationError: an option that it does not have, or with a value out of range.
    """
    kinds = _kinds()
    if kind not in kinds:
        raise DatasetError(f"unknown dataset source {kind!r}{nearest(kind, kinds)}")
    chosen = kinds[kind]
    if "keep_timeouts" not in chosen.model_fields:
        options.pop("keep_timeouts", None)
    return read_options(chosen, {"source": kind, **options}, "dataset.")
