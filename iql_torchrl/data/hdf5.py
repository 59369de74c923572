"""Logs in D4RL's HDF5 layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from tensordict import TensorDict

from iql_torchrl.data.transitions import ReadArray, transitions_from_arrays
from iql_torchrl.errors import DatasetError, first_line


def load(path: str | Path, *, keep_timeouts: bool = False, max_episode_steps: int | None = None) -> TensorDict:
    """Transitions of a file with ``observations`` ``[N, O]``, ``actions`` ``[N, A]``, ``rewards`` and ``terminals``.

    Discrete actions are one integer a row, ``[N]`` or ``[N, 1]``. ``timeouts`` and ``next_observations`` are
    optional; other entries are ignored.

    Args:
        path: the file.
        keep_timeouts: keep the rows at timeouts, with the file's ``next_observations``.
        max_episode_steps: where an episode was cut, for a file without ``timeouts``.

    Returns:
        the TensorDict described in :func:`iql_torchrl.data.load_transitions`.

    Raises:
        DatasetError: the file is missing or not HDF5, or its content cannot be trained on.
    """
    with open_log(path) as (read, keys):
        return transitions_from_arrays(
            read,
            keys,
            origin=str(Path(path).expanduser()),
            keep_timeouts=keep_timeouts,
            max_episode_steps=max_episode_steps,
        )


def environment_of(path: str | Path) -> str | None:
    """The Gymnasium id in the file's ``env_id`` attribute, if it has one."""
    with _open(Path(path).expanduser()) as file:
        env_id = file.attrs.get("env_id")
    return env_id.decode() if isinstance(env_id, bytes) else env_id


@contextmanager
def open_log(path: str | Path, origin: str | None = None) -> Iterator[tuple[ReadArray, set[str]]]:
    """A function that reads an array of the file by its key, and the keys that it has.

    Args:
        path: the file.
        origin: names the file in errors; its path where not given.

    Raises:
        DatasetError: the file is missing, not HDF5, or damaged.
    """
    path = Path(path).expanduser()
    origin = origin or str(path)
    with _open(path) as file:

        def read(key: str) -> np.ndarray:
            try:
                node = file[key]
                return np.asarray(node[()] if isinstance(node, h5py.Dataset) and node.shape is not None else None)
            except (OSError, RuntimeError, KeyError) as error:
                raise DatasetError(
                    f"{origin}: {key} cannot be read ({first_line(error)}); the file is damaged, or a link in it "
                    "leads nowhere."
                ) from error

        try:
            groups = {str(key) for key in file if _is_group(file, str(key))}
            keys = {str(key) for key in file} - groups
        except (OSError, RuntimeError, KeyError) as error:
            raise DatasetError(f"{origin}: its table of contents is damaged ({first_line(error)}).") from error
        yield read, keys


def _is_group(file: h5py.File, key: str) -> bool:
    try:
        return isinstance(file[key], h5py.Group)
    except (OSError, RuntimeError, KeyError):
        return False  # reading it will say what is wrong, if it is needed at all


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DatasetError(f"dataset file {path} {what}; give the path of an HDF5 file as dataset.path=FILE.")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(f"dataset file {path} cannot be opened as HDF5: {error}.") from error
