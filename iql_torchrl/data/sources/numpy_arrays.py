"""Logs as NumPy arrays: an .npz file, or a folder of .npy files that are mapped and not loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from iql_torchrl.atomic import NotAFile, regular_file
from iql_torchrl.data.joining import PARTED, of_layout
from iql_torchrl.data.log import Column, Log, refuse_undue_size, stored_size
from iql_torchrl.data.sources.source import FileSource
from iql_torchrl.data.storage import Allocate
from iql_torchrl.errors import LONGEST_REASON, DatasetError, first_line


class NumpyArrays(FileSource):
    """``log.npz``, or a folder with ``observations.npy`` and so on, which suits logs larger than memory."""

    source: Literal["numpy"] = "numpy"

    @contextmanager
    def open(self, allocate: Allocate = np.empty) -> Iterator[Log]:
        """The arrays ``observations`` ``[N, O]``, ``actions`` ``[N, A]``, ``rewards``, ``terminals`` and the others.

        Raises:
            DatasetError: nothing there, no such arrays, a damaged file, or Python objects, which are never unpickled.
        """
        path = Path(self.path).expanduser()
        if path.is_dir():
            found = [*path.glob("*.npy"), *(file for whole in PARTED for file in path.glob(f"{whole}/**/*.npy"))]
            files = {file.relative_to(path).with_suffix("").as_posix(): file for file in sorted(found)}
            columns = {
                name: _load(file, name, path) if of_layout(name) else np.empty(0) for name, file in files.items()
            }
            mapped = [name for name in columns if of_layout(name)]
            declared = sum(columns[name].nbytes for name in mapped)
            # A file shorter than its array is not mapped; but one may consist of holes.
            refuse_undue_size(str(path), "its arrays", declared, stored_size(*(files[name] for name in mapped)))
            yield self.log_of(columns, str(path))
            return
        try:
            regular_file(path)
        except NotAFile as error:
            raise DatasetError(
                f"dataset {path} {error}; give an .npz file, or a folder of .npy files, as dataset.path=PATH."
            ) from None
        with open_archive(path, of_layout) as archive:
            columns = {name: _member(archive, name, path) if of_layout(name) else np.empty(0) for name in archive.files}
            yield self.log_of(columns, str(path))


def open_archive(path: Path, wanted: Callable[[str], bool]) -> np.lib.npyio.NpzFile:
    """An .npz file, whose wanted arrays take no more memory than what is stored of them can hold.

    Args:
        path: of a regular file.
        wanted: whether the array of a name is to be read.

    Raises:
        DatasetError: a file that is none, or damaged, or declares too much.
    """
    archive = _load(path, "", path)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DatasetError(
            f"dataset file {path} is a single array; give an .npz file, or the folder of {path.name}, as "
            "dataset.path=PATH."
        )
    try:
        _refuse_undue_members(archive, [name for name in archive.files if wanted(name)], path)
    except DatasetError:
        archive.close()
        raise
    return archive


def _load(file: Path, name: str, path: Path) -> Any:
    try:
        found = np.load(regular_file(file), mmap_mode="r", allow_pickle=False)
        if name and not isinstance(found, np.ndarray):
            raise ValueError("it is an archive, not an array")
        return found
    except Exception as error:  # NumPy evaluates headers: damaged ones fail in many ways
        raise _unreadable(path, name, error) from error


def _refuse_undue_members(archive: np.lib.npyio.NpzFile, names: Iterable[str], path: Path) -> None:
    """Refuse arrays larger than their members, and members larger than the file can hold, before one is unpacked."""
    unpacked = 0
    for name in names:
        try:
            assert archive.zip is not None  # before it is closed
            members = archive.zip.NameToInfo
            member = members[name] if name in members else members[f"{name}.npy"]  # NumPy leaves the ending out
            with archive.zip.open(member) as file:
                declared = _declared_size(file)
            if declared > member.file_size:
                raise ValueError(f"it declares {declared:,} bytes and has {member.file_size:,}")
        except Exception as error:  # as above, and the archive's own
            raise _unreadable(path, name, error) from error
        unpacked += member.file_size
    refuse_undue_size(str(path), "its arrays", unpacked, stored_size(path))


def _declared_size(file: IO[bytes]) -> int:
    """Bytes of an array and its description, by the latter; none for what is no array, which reading it will say."""
    if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
        return 0
    version = tuple(file.read(2))
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    return file.tell() + math.prod(shape) * dtype.itemsize


def _member(archive: np.lib.npyio.NpzFile, name: str, path: Path) -> Column:
    try:
        found = archive[name]
        if not isinstance(found, np.ndarray):
            raise ValueError("it is not an array")
        return found
    except Exception as error:  # as above
        raise _unreadable(path, name, error) from error


def _unreadable(path: Path, name: str, error: Exception) -> DatasetError:
    what = f"{name} cannot be read" if name else "cannot be opened as a NumPy file"
    reason = first_line(error, LONGEST_REASON)  # NumPy repeats whole headers
    if "allow_pickle" in reason or "Python objects" in reason:
        reason = "it is none, or holds Python objects, which are never unpickled; store arrays of numbers"
    return DatasetError(f"{path}: {what} ({reason}).")
