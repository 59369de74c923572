"""robomimic's HDF5 files: a group for each demonstration, observations in named parts."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import h5py
import numpy as np
from pydantic import AfterValidator, Field

from iql_torchrl.configuration.declaring import option
from iql_torchrl.data.log import Column, Log, file_at
from iql_torchrl.data.sources import hdf5
from iql_torchrl.data.sources.source import PathText, Source, different_names
from iql_torchrl.data.storage import Allocate
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import DatasetError
from iql_torchrl.suggestions import nearest

Kind = TypeVar("Kind", h5py.Group, h5py.Dataset)

_DEMONSTRATION = re.compile("demo_([0-9]+)")
_REPAIR = "repair the file, or leave that demonstration out with dataset.filter_key"
_EXTRACT = "write the file with robomimic's dataset_states_to_obs.py"
# What a demonstration must have, and what to do where it has not.
_NEEDED = {
    "actions": _REPAIR,
    "rewards": _EXTRACT,
    "dones": _EXTRACT,
    "obs": _EXTRACT,
    "next_obs": f"{_EXTRACT}, without --exclude-next-obs",
}
# Of an array: a number a row, several, or a part of an observation, which is laid out row by row.
Shape = Literal["[rows]", "[rows, size]", "[rows, ...]"]
# By the number of their kind in the file.
_SIMULATORS = {1: "robosuite's ", 2: "Gym's ", 3: "iGibson's "}


class Robomimic(Source):
    """Demonstrations in the layout of robomimic 0.3, in the order of their numbers, without images.

    Every row has its own next observation: none is dropped. A done is a terminal, which does not bootstrap, wherever
    it is: robomimic's ``done_mode`` 0 and 2 mark every step into a success, so that a demonstration may have several.
    An episode ends at each of them, and the row after it begins another, of one step where that is done as well. The
    last row of a demonstration is truncated where it is not done: the recording was cut there, and it bootstraps on
    its own next observation. ``done_mode`` 1 and 2 mark every last row as done, and then nothing in the file tells
    those that were cut.
    """

    source: Literal["robomimic"] = "robomimic"
    path: PathText = option("of the file", expected="a file", example="FILE")
    observation_keys: Annotated[list[str], Field(min_length=1), AfterValidator(different_names)] = option(
        "parts of the observations, side by side in this order",
        expected="a list of different names such as [robot0_eef_pos,object]",
        example="[robot0_eef_pos,robot0_eef_quat,robot0_gripper_qpos,object]",
    )
    filter_key: str | None = option(
        "demonstrations that the file's mask lists under this name; null: all",
        expected="a name such as train, or null",
        default=None,
    )

    @property
    def label(self) -> str:
        """The name of the file."""
        return Path(self.path).name

    @property
    def preset(self) -> str:
        """Demonstrations by people with sparse rewards, as Adroit's and Kitchen's are."""
        return "kitchen_adroit"

    @property
    def own_next_observations(self) -> bool:
        return True

    def environment(self) -> tuple[EnvironmentSpec | None, str]:
        """None: no environment of robomimic's is Gymnasium's. The reason names the one in the file's ``env_args``.

        Raises:
            DatasetError: the file is missing or not HDF5.
        """
        with _opened(self.path) as (root, _):
            try:
                found = json.loads(root.group("data").attribute("env_args"))
                name = f"{_SIMULATORS.get(found.get('type'), '')}{found['env_name']}"
            except (*hdf5.UNREADABLE, AttributeError):  # no such text, or another one
                return super().environment()
        return None, f"{name}, where it was recorded, is not supported"

    @contextmanager
    def open(self, allocate: Allocate = np.empty) -> Iterator[Log]:
        """The columns, read when they are asked for, from the demonstrations that have the rows.

        Raises:
            DatasetError: the file is missing, not HDF5, damaged or of another layout, or parts of it lie in other
                files; an unknown filter or observation key, images; demonstrations that lack something, or differ in
                their lengths or sizes.
        """
        with _opened(self.path) as (root, file):
            sizes = hdf5.Sizes(Path(file.filename), root.origin)
            demonstrations = [
                _Demonstration.of(group, self.observation_keys, sizes) for group in _chosen(root, self.filter_key)
            ]
            _refuse_other_sizes(demonstrations, root.origin)
            yield Log(root.origin, _columns(demonstrations, file, root.origin), own_next_observations=True)


@contextmanager
def _opened(path: str) -> Iterator[tuple[_Group, h5py.File]]:
    found = file_at(path, "an HDF5")
    with hdf5.open_file(found) as file:
        yield _Group(file, "", str(found)), file


class _Group:
    """A group of the file, whose members are read from this file and from no other.

    Args:
        group: of h5py.
        place: where it is in the file.
        origin: names the file in errors.
    """

    def __init__(self, group: h5py.Group, place: str, origin: str) -> None:
        self._group, self.place, self.origin = group, place, origin
        try:
            self.names = [str(name) for name in group]
        except hdf5.UNREADABLE as error:
            raise hdf5.unreadable(place or "its table of contents", origin, error) from error

    def place_of(self, name: str) -> str:
        return f"{self.place}/{name}" if self.place else name

    def group(self, name: str) -> _Group:
        return _Group(self._member(name, h5py.Group), self.place_of(name), self.origin)

    def array(self, name: str) -> h5py.Dataset:
        return self._member(name, h5py.Dataset)

    def measure(self, parts: Iterable[_Part], sizes: hdf5.Sizes) -> None:
        """Add datasets, anywhere below the group, to what the file declares, and refuse more than it can hold."""
        for part in parts:
            try:
                found = self._group.file[part.place]
                assert isinstance(found, h5py.Dataset)  # as it was when it was described
                sizes.add(found, part.place)
            except hdf5.UNREADABLE as error:
                raise hdf5.unreadable(part.place, self.origin, error) from error
        sizes.check()

    def attribute(self, name: str) -> Any:
        """An attribute, or ``None``."""
        try:
            return self._group.attrs.get(name)
        except hdf5.UNREADABLE as error:
            raise hdf5.unreadable(f"attribute {name} of {self.place}", self.origin, error) from error

    def _member(self, name: str, kind: type[Kind]) -> Kind:
        place = self.place_of(name)
        try:
            found = self._group[name]
            if not isinstance(found, kind) or (isinstance(found, h5py.Dataset) and found.shape is None):
                raise OSError(f"it is no {'group' if kind is h5py.Group else 'array'}")
            inside = found.file.filename == self._group.file.filename
            stored = not isinstance(found, h5py.Dataset) or not (found.external or found.is_virtual)
        except hdf5.UNREADABLE as error:
            raise hdf5.unreadable(place, self.origin, error) from error
        if not inside:
            raise hdf5.elsewhere(place, self.origin, "is a link into another file")
        if not stored:
            raise hdf5.elsewhere(place, self.origin, "is stored in other files")
        return found


def _chosen(root: _Group, filter_key: str | None) -> Iterator[_Group]:
    """The demonstrations that the filter key lists, or all of them, in the order of their numbers."""
    if "data" not in root.names:
        raise DatasetError(
            f"{root.origin}: it has no group data with demo_0, demo_1 and so on, as robomimic's files have; found "
            f"{', '.join(root.names) or 'nothing'}. Choose another source, such as dataset=hdf5, or another file."
        )
    data = root.group("data")
    names = data.names if filter_key is None else _listed(root, filter_key)
    listed = "data" if filter_key is None else f"mask/{filter_key}"
    if not names:
        raise DatasetError(f"{root.origin}: {listed} has no demonstrations; choose another file or dataset.filter_key.")
    numbers: dict[str, int] = {}
    for name in names:
        number = _DEMONSTRATION.fullmatch(name)
        if number is None:
            raise DatasetError(
                f"{root.origin}: {listed} has {name!r}, which is not demo_0, demo_1 and so on; rename it, or choose "
                "demonstrations by dataset.filter_key."
            )
        numbers[name] = int(number[1])
    absent = sorted(set(names) - set(data.names), key=numbers.__getitem__)
    if absent:
        raise DatasetError(
            f"{root.origin}: {listed} names {absent[0]}, which is not in data ({len(absent)} such names); correct that "
            "list, or choose another dataset.filter_key."
        )
    for name in sorted(numbers, key=lambda name: (numbers[name], name)):
        yield data.group(name)


def _listed(root: _Group, filter_key: str) -> list[str]:
    """The names of demonstrations in one of the lists of the group ``mask``."""
    if "mask" not in root.names:
        raise DatasetError(
            f"{root.origin}: dataset.filter_key={filter_key}, but there is no group mask with filter keys; leave "
            "dataset.filter_key out for all demonstrations."
        )
    mask = root.group("mask")
    if filter_key not in mask.names:
        raise DatasetError(f"{root.origin}: unknown dataset.filter_key={filter_key}{nearest(filter_key, mask.names)}")
    place = mask.place_of(filter_key)
    array = mask.array(filter_key)
    try:
        sizes = hdf5.Sizes(Path(array.file.filename), root.origin)
        sizes.add(array, place)
        sizes.check()
        names = np.ravel(array[()]).tolist()
        if not all(isinstance(name, bytes) for name in names):
            raise DatasetError(f"{root.origin}: {place} must list names of demonstrations, got dtype {array.dtype}.")
        return [name.decode() for name in names]
    except DatasetError:
        raise
    except hdf5.UNREADABLE as error:
        raise hdf5.unreadable(place, root.origin, error) from error


@dataclass(frozen=True)
class _Part:
    """A dataset of a demonstration, ``[rows, ...]``: where it is, and what it holds."""

    place: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def width(self) -> int:
        """Numbers a row."""
        return math.prod(self.shape[1:])

    def __str__(self) -> str:
        return f"{self.place} has shape {self.shape} of dtype {self.dtype}"


@dataclass(frozen=True)
class _Demonstration:
    """The datasets behind the columns of one demonstration, those of one column side by side; its flags, ``[rows]``."""

    parts: dict[str, list[_Part]]
    dones: np.ndarray

    @classmethod
    def of(cls, group: _Group, observation_keys: Sequence[str], sizes: hdf5.Sizes) -> _Demonstration:
        """Look at a demonstration, and read its flags.

        Args:
            group: of the demonstration.
            observation_keys: the parts of its observations.
            sizes: of the demonstrations before it, to which it is added.

        Raises:
            DatasetError: something is missing, of another shape or type, of another length than the actions, or larger
                than what is stored.
        """
        for name, remedy in _NEEDED.items():
            if name not in group.names:
                raise DatasetError(f"{group.origin}: {group.place} has no {name}; {remedy}.")
        observations, following = group.group("obs"), group.group("next_obs")
        actions, rewards, dones = (_described(group, name) for name in ("actions", "rewards", "dones"))
        parts = {
            "observations": [_observation(observations, key) for key in observation_keys],
            "next_observations": [_observation(following, key) for key in observation_keys],
            "actions": [_checked(actions, "[rows, size]", group.origin)],
            "rewards": [_checked(rewards, "[rows]", group.origin)],
        }
        _checked(dones, "[rows]", group.origin)
        every = [*(part for column in parts.values() for part in column), dones]
        _refuse_other_lengths(group, actions, every)
        group.measure(every, sizes)
        return cls(parts, _flags(group, dones))


def _described(group: _Group, name: str) -> _Part:
    dataset = group.array(name)
    try:
        return _Part(group.place_of(name), tuple(dataset.shape), dataset.dtype)
    except hdf5.UNREADABLE as error:  # of a type that NumPy does not have
        raise hdf5.unreadable(group.place_of(name), group.origin, error) from error


def _checked(part: _Part, expected: Shape, origin: str) -> _Part:
    """The part, if it holds real numbers and is of that shape."""
    dimensions = len(part.shape)
    fits = dimensions > 0 if expected == "[rows, ...]" else dimensions in (1, 2)
    if not fits or (expected == "[rows]" and part.width != 1):
        raise DatasetError(f"{origin}: {part}; the shape must be {expected}; {_REPAIR}.")
    if part.dtype.kind not in "biuf":
        raise DatasetError(f"{origin}: {part}; it must hold real numbers; {_REPAIR}.")
    return part


def _observation(group: _Group, key: str) -> _Part:
    """One part of the observations, which must be there and no image."""
    if key not in group.names:
        keys = _low_dimensional(group)
        suggestion = nearest(key, keys)
        raise DatasetError(
            f"{group.origin}: {group.place} has no {key!r} of dataset.observation_keys"
            f"{suggestion if suggestion.endswith('?') else '.'} {_choice(keys)}"
        )
    part = _described(group, key)
    if _is_image(part):
        raise DatasetError(
            f"{group.origin}: {part}, as images have, which are not supported: a part of the observations must hold "
            f"numbers other than uint8, in at most two dimensions a row. {_choice(_low_dimensional(group))}"
        )
    return _checked(part, "[rows, ...]", group.origin)


def _choice(keys: Sequence[str]) -> str:
    return (
        f"The low-dimensional keys there are {', '.join(keys) or 'none'}; choose among them, or other demonstrations "
        "with dataset.filter_key."
    )


def _low_dimensional(group: _Group) -> list[str]:
    """The keys of a group of observations that can be chosen."""
    found = []
    for key in sorted(group.names):
        try:
            part = _checked(_described(group, key), "[rows, ...]", group.origin)
        except DatasetError:  # which is said where it is chosen
            continue
        if not _is_image(part):
            found.append(key)
    return found


def _is_image(part: _Part) -> bool:
    return part.dtype == np.uint8 or len(part.shape) > 3


def _refuse_other_lengths(group: _Group, actions: _Part, parts: Iterable[_Part]) -> None:
    """Refuse a demonstration whose datasets have different numbers of rows, or another one than it says."""
    rows = actions.shape[0]
    for part in parts:
        if part.shape[0] != rows:
            raise DatasetError(
                f"{group.origin}: {part.place} has {part.shape[0]} rows but {actions.place} has {rows}; {_REPAIR}."
            )
    said = group.attribute("num_samples")
    if said is not None and np.ravel(said).tolist() != [rows]:
        raise DatasetError(
            f"{group.origin}: {group.place} has {rows} rows but its attribute num_samples is {said}; {_REPAIR}."
        )


def _flags(group: _Group, part: _Part) -> np.ndarray:
    try:
        flags = group.array("dones")[()].reshape(-1)
    except hdf5.UNREADABLE as error:
        raise hdf5.unreadable(part.place, group.origin, error) from error
    odd = np.flatnonzero((flags != 0) & (flags != 1))
    if len(odd):
        raise DatasetError(
            f"{group.origin}: {part.place} must hold 0 and 1 only, got {flags[odd[0]]} in row {odd[0]}; {_REPAIR}."
        )
    return flags.astype(bool)


def _refuse_other_sizes(demonstrations: Sequence[_Demonstration], origin: str) -> None:
    """Refuse parts that have other sizes than the first demonstration's, and next observations than observations."""
    first = demonstrations[0].parts
    expected = {**first, "next_observations": first["observations"]}
    for demonstration in demonstrations:
        for name, parts in demonstration.parts.items():
            for part, other in zip(parts, expected[name], strict=True):
                if part.width != other.width:
                    raise DatasetError(
                        f"{origin}: {part.place} has {part.width} numbers a row but {other.place} has {other.width}; "
                        "choose demonstrations of one kind with dataset.filter_key."
                    )


def _columns(demonstrations: Sequence[_Demonstration], file: h5py.File, origin: str) -> dict[str, Column]:
    """The columns of a log: the demonstrations one after the other."""
    terminals = np.concatenate([one.dones for one in demonstrations])
    lengths = [len(one.dones) for one in demonstrations]
    last = np.cumsum(lengths)[np.array(lengths) > 0] - 1
    timeouts = np.zeros_like(terminals)
    timeouts[last] = ~terminals[last]
    columns: dict[str, Column] = {"terminals": terminals, "timeouts": timeouts}
    for name in demonstrations[0].parts:
        columns[name] = _Rows([one.parts[name] for one in demonstrations], lengths, file, origin)
    return columns


class _Rows:
    """A column ``[rows, size]`` over all demonstrations, of which the rows that are asked for are read.

    Args:
        parts: of every demonstration, the datasets that lie side by side.
        lengths: rows of every demonstration.
        file: stays open as long as this is used.
        origin: names the file in errors.
    """

    def __init__(self, parts: Sequence[list[_Part]], lengths: Sequence[int], file: h5py.File, origin: str) -> None:
        self._parts, self._origin = parts, origin
        self._file: Any = file
        self._starts = np.cumsum([0, *lengths]).tolist()
        self.shape: tuple[int, ...] = (self._starts[-1], sum(part.width for part in parts[0]))
        dtypes = {part.dtype for one in parts for part in one}
        self.dtype: np.dtype = functools.reduce(np.promote_types, dtypes, np.dtype(np.int8))  # flags are numbers too

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        found = np.empty((max(0, stop - start), self.shape[1]), self.dtype)
        demonstration = int(np.searchsorted(self._starts, start, side="right")) - 1
        while demonstration < len(self._parts) and self._starts[demonstration] < stop:
            begin, end = self._starts[demonstration : demonstration + 2]
            low, high = max(start, begin), min(stop, end)
            place = 0
            for part in self._parts[demonstration]:
                found[low - start : high - start, place : place + part.width] = self._read(
                    part, low - begin, high - begin
                )
                place += part.width
            demonstration += 1
        return found

    def _read(self, part: _Part, start: int, stop: int) -> np.ndarray:
        """Some rows of a dataset, which is opened for them alone: an open one keeps a part of its rows in memory."""
        try:
            found = self._file[part.place][start:stop].reshape(stop - start, part.width)
        except hdf5.UNREADABLE as error:
            raise hdf5.unreadable(part.place, self._origin, error) from error
        bad = np.argwhere(~np.isfinite(found)) if found.dtype.kind == "f" else []
        if len(bad):
            raise DatasetError(
                f"{self._origin}: {part.place} holds {found[tuple(bad[0])]} in row {start + bad[0][0]}; {_REPAIR}."
            )
        return found
