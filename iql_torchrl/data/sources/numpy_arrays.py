"""Logs as NumPy arrays: an .npz file, or a folder of .npy files that are mapped and not loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from iql_torchrl.data.log import OPTIONAL, REQUIRED, Column, Log
from iql_torchrl.data.sources.source import FileSource
from iql_torchrl.data.storage import Allocate
from iql_torchrl.errors import DatasetError, first_line


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
        known = (*REQUIRED, *OPTIONAL)
        if path.is_dir():
            files = {file.stem: file for file in sorted(path.glob("*.npy"))}
            columns = {name: _load(file, name, path) if name in known else np.empty(0) for name, file in files.items()}
            yield self.log_of(columns, str(path))
            return
        if not path.is_file():
            raise DatasetError(
                f"dataset {path} does not exist; give an .npz file, or a folder of .npy files, as dataset.path=PATH."
            )
        archive = _load(path, "", path)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DatasetError(
                f"dataset file {path} is a single array; give an .npz file, or the folder of {path.name}, as "
                "dataset.path=PATH."
            )
        with archive:
            columns = {name: _member(archive, name, path) if name in known else np.empty(0) for name in archive.files}
            yield self.log_of(columns, str(path))


def _load(file: Path, name: str, path: Path) -> Any:
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
        if name and not isinstance(found, np.ndarray):
            raise ValueError("it is an archive, not an array")
        return found
    except Exception as error:  # NumPy evaluates headers: damaged ones fail in many ways
        raise _unreadable(path, name, error) from error


def _member(archive: np.lib.npyio.NpzFile, name: str, path: Path) -> Column:
    try:
        found = archive[name]
        if not isinstance(found, np.ndarray):
            raise ValueError("it is not an array")
        return found
    except Exception as error:  # as above, and the archive's own
        raise _unreadable(path, name, error) from error


def _unreadable(path: Path, name: str, error: Exception) -> DatasetError:
    what = f"{name} cannot be read" if name else "cannot be opened as a NumPy file"
    reason = first_line(error)
    if "allow_pickle" in reason or "Python objects" in reason:
        reason = "it is none, or holds Python objects, which are never unpickled; store arrays of numbers"
    return DatasetError(f"{path}: {what} ({reason}).")
