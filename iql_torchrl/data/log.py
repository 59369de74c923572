"""A log as every source hands it over: named columns of rows in the order in which they were recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from iql_torchrl.errors import DatasetError

# D4RL's layout, and a number for each episode in logs that have one.
REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("timeouts", "next_observations", "episode_ids")
# So many rows are in memory at a time on their way from a file to the transitions.
ROWS_AT_A_TIME = 1 << 16


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
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DatasetError(f"dataset file {path} {what}; give the path of {kind} file as dataset.path=FILE.")
    return path


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
        owned: the columns were made for the transitions, which may take them over.
    """

    origin: str
    columns: Mapping[str, Column]
    own_next_observations: bool = False
    max_episode_steps: int | None = None
    count_after_terminal: int = 0
    owned: bool = False
