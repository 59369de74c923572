"""Logs in D4RL's HDF5 layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import h5py
import numpy as np

from iql_torchrl.data.joining import PARTED, of_layout
from iql_torchrl.data.log import Column, Log, file_at, refuse_undue_size, stored_size
from iql_torchrl.data.sources.source import FileSource
from iql_torchrl.data.storage import Allocate
from iql_torchrl.environments.specification import EnvironmentSpec, registered_id
from iql_torchrl.errors import DatasetError, first_line

# What h5py raises for damage, links that lead nowhere, and types that NumPy does not have.
UNREADABLE = (OSError, RuntimeError, KeyError, TypeError, ValueError)
# Groups in groups: a file may link them into a circle.
_DEEPEST = 8


class HDF5(FileSource):
    """A file in D4RL's HDF5 layout; its attribute ``env_id`` may name the environment."""

    source: Literal["hdf5"] = "hdf5"

    def environment(self) -> tuple[EnvironmentSpec | None, str]:
        """Of the attribute ``env_id``.

        Raises:
            DatasetError: the file cannot be read, or the attribute is no text.
            SimulatorError: it names a module to import.
        """
        found = environment_of(self.path)
        return (EnvironmentSpec.of(registered_id(found, self.path)), "") if found else super().environment()

    @contextmanager
    def open(self, allocate: Allocate = np.empty) -> Iterator[Log]:
        """The columns, read when they are asked for.

        Raises:
            DatasetError: as :func:`open_columns`.
        """
        with open_columns(self.path) as (columns, origin):
            yield self.log_of(columns, origin)


@contextmanager
def open_columns(path: str | Path, *, origin: str | None = None) -> Iterator[tuple[dict[str, Column], str]]:
    """The columns of a file in D4RL's layout, and its name in errors.

    Args:
        path: the file.
        origin: names the file in errors; its path where not given.

    Raises:
        DatasetError: the file is missing, not HDF5 or damaged, or a column of the layout lies in another file.
    """
    path = file_at(path, "an HDF5")
    origin = origin or str(path)
    with open_file(path) as file:
        try:
            names = [str(name) for name in file]
            names += [part for name in names if name in PARTED for part in _parts_in(file, name)]
            sizes = Sizes(path, origin)
            columns = {name: _column(file, name, origin, sizes) for name in names if not _is_group(file, name)}
            sizes.check()
        except DatasetError:
            raise
        except UNREADABLE as error:
            raise DatasetError(f"{origin}: its table of contents is damaged ({first_line(error)}).") from error
        yield columns, origin


def environment_of(path: str | Path) -> str | None:
    """The Gymnasium id in the file's ``env_id`` attribute, if it has one."""
    path = file_at(path, "an HDF5")
    with open_file(path) as file:
        try:
            env_id = file.attrs.get("env_id")
            env_id = env_id.decode() if isinstance(env_id, bytes) else env_id
        except UNREADABLE as error:
            raise unreadable("its attribute env_id", str(path), error) from error
    if env_id is not None and not isinstance(env_id, str):
        raise DatasetError(f"{path}: its attribute env_id is {env_id!r}, not a Gymnasium id; set env.name=ID.")
    return env_id


class Sizes:
    """What the datasets of a file declare together, and what is stored for them: chunks never written are nothing."""

    def __init__(self, path: Path, origin: str) -> None:
        self._file, self._origin = stored_size(path), origin
        self._declared = self._stored = self._largest = 0
        self._place = ""

    def add(self, dataset: h5py.Dataset, place: str) -> None:
        """Count a dataset, of which at least a whole chunk is in memory when a row is read."""
        item = dataset.id.get_type().get_size()
        size = item * max(math.prod(dataset.shape), math.prod(dataset.chunks or ()))
        self._declared += size
        # A forged table may name the same bytes many times.
        self._stored = min(self._file, self._stored + dataset.id.get_storage_size())
        if size > self._largest:
            self._largest, self._place = size, f"{place}, of shape {tuple(dataset.shape)},"

    def check(self) -> None:
        """Compare the two.

        Raises:
            DatasetError: as :func:`iql_torchrl.data.log.refuse_undue_size`, naming the largest dataset.
        """
        refuse_undue_size(self._origin, self._place, self._declared, self._stored)


class _Dataset:
    """A column that names the file where it cannot be read."""

    def __init__(self, dataset: h5py.Dataset, name: str, origin: str) -> None:
        self._dataset, self._name, self._origin = dataset, name, origin
        self.shape: tuple[int, ...] = tuple(dataset.shape)
        self.dtype = dataset.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        try:
            return self._dataset[rows]
        except UNREADABLE as error:
            raise unreadable(self._name, self._origin, error) from error


def _column(file: h5py.File, name: str, origin: str, sizes: Sizes) -> Column:
    if not of_layout(name):
        return np.empty(0)  # never read
    if isinstance(file.get(name, getlink=True), h5py.ExternalLink):
        raise elsewhere(name, origin, "is a link into another file")
    try:
        dataset = file[name]
        if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
            raise OSError("it is no array")
        if dataset.file.filename != file.filename:  # by a link to a link
            raise elsewhere(name, origin, "is a link into another file")
        if dataset.external or dataset.is_virtual:
            raise elsewhere(name, origin, "is stored in other files")
        sizes.add(dataset, name)
        return _Dataset(dataset, name, origin)
    except DatasetError:
        raise
    except UNREADABLE as error:
        raise unreadable(name, origin, error) from error


def unreadable(name: str, origin: str, error: Exception) -> DatasetError:
    """The error of an entry that h5py cannot read."""
    return DatasetError(
        f"{origin}: {name} cannot be read ({first_line(error)}); the file is damaged, or a link in it leads nowhere."
    )


def elsewhere(name: str, origin: str, what: str) -> DatasetError:
    """The error of an entry whose content lies in another file."""
    return DatasetError(
        f"{origin}: {name} {what}, which is not followed: a dataset could read any file of yours. Copy the data into "
        "one file, with h5repack or h5py."
    )


def _parts_in(file: h5py.File, name: str) -> Iterator[str]:
    """The datasets below a group, by their full names.

    Raises:
        DatasetError: groups that are nested too deep.
    """
    if not _is_group(file, name):
        return
    if name.count("/") > _DEEPEST:
        raise DatasetError(
            f"{file.filename}: groups are nested deeper than {_DEEPEST} in {name.split('/')[0]}, or link to "
            "themselves; write the parts of observations as datasets below it."
        )
    group = file[name]
    assert isinstance(group, h5py.Group)
    for part in group:
        full = f"{name}/{part}"
        if _is_group(file, full):
            yield from _parts_in(file, full)
        else:
            yield full


def _is_group(file: h5py.File, name: str) -> bool:
    if isinstance(file.get(name, getlink=True), h5py.ExternalLink):
        return False
    try:
        return isinstance(file[name], h5py.Group)
    except UNREADABLE:
        return False  # opening it will say what is wrong, if it is needed at all


def open_file(path: Path) -> h5py.File:
    """An HDF5 file for reading.

    Raises:
        DatasetError: it is none, or damaged.
    """
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(f"dataset file {path} cannot be opened as HDF5: {first_line(error)}.") from error
