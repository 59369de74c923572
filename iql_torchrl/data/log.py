"""A log as every source hands it over: named columns of rows in the order in which they were recorded."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from iql_torchrl.atomic import NotAFile, regular_file
from iql_torchrl.errors import DatasetError

# D4RL's layout, and a number for each episode in logs that have one.
REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("timeouts", "next_observations", "episode_ids")
# So many rows are in memory at a time on their way from a file to the transitions.
ROWS_AT_A_TIME = 1 << 16
# A log that declares more than the one times its stored bytes and the other together is refused.
MOST_FROM_A_BYTE = 2048
_SMALL = 1 << 26
_LONGEST_TEXT = 50_000_000
# Of a file with more of them, the size that it says it has is taken.
_MOST_HOLES = 10_000


class Column(Protocol):
    """What a NumPy array and an HDF5 dataset have in common: rows are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


def pieces(column: Column) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of a column, so many at a time, each piece with the number of its first row."""
    for start in range(0, column.shape[0], ROWS_AT_A_TIME):
        yield start, column[start : start + ROWS_AT_A_TIME]


def file_at(path: str | Path, kind: str) -> Path:
    """The path of a file that exists, the home folder written out.

    Raises:
        DatasetError: naming what is there instead, and the kind of file that is wanted.
    """
    path = Path(path).expanduser()
    try:
        return regular_file(path)
    except NotAFile as error:
        raise DatasetError(f"dataset file {path} {error}; give the path of {kind} file as dataset.path=FILE.") from None


def stored_size(*paths: Path) -> int:
    """Bytes that files really have: holes, which take no room on the disk and read as zeros, do not count.

    Raises:
        OSError: one cannot be opened.
    """
    return sum(_bytes_of(path) for path in paths)


def _bytes_of(path: Path) -> int:
    with open(regular_file(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        found, place = 0, 0
        for _ in range(_MOST_HOLES):
            try:
                start = os.lseek(file.fileno(), place, os.SEEK_DATA)
                place = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            except OSError as error:
                # Past the last data, which is how a hole at the end shows; or a file system that cannot tell.
                return found if error.errno == errno.ENXIO else size
            found += place - start
        return size


def description_at(path: Path) -> Path:
    """The path of a file that describes others, to be read at once.

    Raises:
        NotAFile: it is none.
        ValueError: it is larger than any description.
    """
    size = regular_file(path).stat().st_size
    if size > _LONGEST_TEXT:
        raise ValueError(f"{path.name} in it has {size:,} bytes, more than the {_LONGEST_TEXT:,} of any description")
    return path


def refuse_undue_size(origin: str, what: str, declared: int, stored: int) -> None:
    """Refuse a size that a header declares and that the bytes behind it cannot hold, before memory is taken for it.

    So many times what is stored is more than any real log is compressed: deflate, of HDF5 and .npz, reaches 1,032 on
    zeros alone. What is stored counts for a whole log, because flags alone may be packed better still, or be chunks
    that were never written. A log of a few megabytes may be anything.

    Raises:
        DatasetError: naming both sizes.
    """
    if declared > MOST_FROM_A_BYTE * stored + _SMALL:
        raise DatasetError(
            f"{origin}: {what} would take {_as_text(declared)} of memory by its description, but {_as_text(stored)} "
            f"are stored, of which at most {MOST_FROM_A_BYTE:,} times as much can come; the file is damaged, or parts "
            "of it were never written. Write it again."
        )


def _as_text(size: int) -> str:
    return f"{size:,} bytes" if size < 10**6 else f"{size / 10**6:,.0f} MB"


@dataclass(frozen=True)
class Log:
    """Columns of equal length, and what else the rule that makes transitions of them needs to know.

    Args:
        origin: names the log in errors.
        columns: by name; others than ``REQUIRED`` and ``OPTIONAL`` are ignored.
        own_next_observations: every row's next observation is in ``next_observations``, so that none needs to be
            dropped.
        max_episode_steps: where episodes were cut, of a log that does not say; ``None`` leaves it to the environment.
        count_after_terminal: what the count of an episode's steps starts at after a terminal row: 1 in D4RL's files.
        terminals_inside: an episode goes on after a terminal row, and ends at timeouts alone: the recording went on
            where the task was solved.
        owned: the columns were made for the transitions, which may take them over.
    """

    origin: str
    columns: Mapping[str, Column]
    own_next_observations: bool = False
    max_episode_steps: int | None = None
    count_after_terminal: int = 0
    terminals_inside: bool = False
    owned: bool = False
