"""Logs as Parquet tables: a row a step."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from iql_torchrl.data.joining import of_layout
from iql_torchrl.data.log import (
    ROWS_AT_A_TIME,
    Column,
    Log,
    file_at,
    refuse_undue_size,
    stored_size,
)
from iql_torchrl.data.sources.parquet_counts import counts_of
from iql_torchrl.data.sources.source import FileSource
from iql_torchrl.data.storage import Allocate
from iql_torchrl.errors import DatasetError, first_line

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

_VECTORS = ("observations", "actions", "next_observations")
_NUMBERED = re.compile(rf"({'|'.join(_VECTORS)})_(\d+)")


class Parquet(FileSource):
    """A Parquet file, of which a piece is read at a time.

    ``rewards``, ``terminals``, ``timeouts`` and ``episode_ids`` are columns of numbers. ``observations``, ``actions``
    and ``next_observations`` are each a column of lists of one length, or columns of numbers ``observations_0``,
    ``observations_1``, and so on; discrete actions are a column ``actions`` of integers.
    """

    source: Literal["parquet"] = "parquet"

    @contextmanager
    def open(self, allocate: Allocate = np.empty) -> Iterator[Log]:
        """The columns.

        Raises:
            DatasetError: the file is missing or not Parquet, numbered columns are incomplete, lists differ in length,
                or values are missing.
        """
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise DatasetError("dataset=parquet needs pyarrow: pip install 'iql_torchrl[arrow]'.") from error
        path = file_at(self.path, "a Parquet")
        try:
            file = ParquetFile(path, memory_map=True)  # a fourth of the memory, twice as fast
        except Exception as error:  # Arrow's own, and what does not fit together on the way from it
            raise DatasetError(f"dataset file {path} cannot be opened as Parquet: {first_line(error)}") from error
        with file:
            try:
                columns = _columns(file, path)
            except DatasetError:
                raise
            except Exception as error:  # as above
                raise DatasetError(f"{path}: its description is damaged ({first_line(error)}).") from error
            yield self.log_of(columns, str(path))


def _columns(file: ParquetFile, path: Path) -> dict[str, Column]:
    origin = str(path)
    names = list(file.schema_arrow.names)
    for name, count in Counter(names).items():
        if count > 1:
            raise DatasetError(f"{origin}: has {count} columns of the name {name}; keep one of them.")
    parts = {name: [name] for name in names if of_layout(name)}
    numbered: dict[str, dict[int, str]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            of_vector, index = numbered.setdefault(match[1], {}), int(match[2])
            if index in of_vector:
                raise DatasetError(f"{origin}: {of_vector[index]} and {name} have the same number; keep one of them.")
            of_vector[index] = name
    for vector, found in numbered.items():
        if vector in parts:
            raise DatasetError(f"{origin}: has both {vector} and {vector}_{min(found)}; keep one of the two kinds.")
        missing = next(index for index in range(len(found) + 1) if index not in found)
        if missing < len(found):
            raise DatasetError(f"{origin}: {vector}_{missing} is missing; found {', '.join(sorted(found.values()))}.")
        parts[vector] = [found[index] for index in range(len(found))]
    refuse_undue_file(path, origin, {field for fields in parts.values() for field in fields})
    unread = {name: np.empty(0) for name in names if not _NUMBERED.fullmatch(name)}  # named in errors, never read
    columns = {name: ParquetColumn(file, name, fields, origin) for name, fields in parts.items()}
    # By the first row, which may be a longer list than the others.
    declared = sum(math.prod(column.shape) * column.dtype.itemsize for column in columns.values())
    refuse_undue_size(origin, "rows as the first one", declared, stored_size(path))
    return {**unread, **columns}


def refuse_undue_file(path: Path, origin: str, fields: Collection[str] | None = None) -> None:
    """Refuse counts of rows and values that contradict each other, or that the file's bytes cannot hold.

    Args:
        path: of the file.
        origin: names the file in errors.
        fields: columns of the table that are to be read; all where not given.

    Raises:
        DatasetError: naming what they contradict.
        ValueError, KeyError, TypeError, ...: the file describes itself in no sense.
    """
    counts = counts_of(path)
    if sum(counts.rows_of_groups) != counts.rows or min(counts.rows_of_groups, default=0) < 0:
        raise DatasetError(
            f"{origin}: it announces {counts.rows} rows, its row groups {sum(counts.rows_of_groups)}; it is damaged. "
            "Write it again."
        )
    declared = sum(size for name, size in counts.sizes.items() if fields is None or name in fields)
    refuse_undue_size(origin, "its columns", declared, stored_size(path))


class ParquetColumn:
    """A column, or several numbered ones side by side. Reads go forward, a piece at a time, and begin again."""

    def __init__(self, file: ParquetFile, name: str, fields: list[str], origin: str) -> None:
        self._file, self._name, self._fields, self._origin = file, name, fields, origin
        self._pieces: Iterator[np.ndarray] = iter(())
        self._start, self._piece = 0, np.empty(0)
        first = next(self._read(1), np.empty(0))
        self.shape: tuple[int, ...] = (file.metadata.num_rows, *first.shape[1:])
        self.dtype = first.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        found = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        if start < self._start or not len(self._piece):
            self._pieces, self._start, self._piece = self._read(ROWS_AT_A_TIME), 0, np.empty(0)
        row = start
        while row < stop:
            end = self._start + len(self._piece)
            if row >= end:
                self._start, self._piece = end, self._next()
                continue
            count = min(stop, end) - row
            found[row - start : row - start + count] = self._piece[row - self._start :][:count]
            row += count
        if stop == self.shape[0]:
            self._pieces, self._start, self._piece = iter(()), 0, np.empty(0)
        return found

    def _next(self) -> np.ndarray:
        piece = next(self._pieces, None)
        if piece is None:
            raise self._refused(f"has fewer rows than the {self.shape[0]} that the file announces; it is damaged")
        if piece.shape[1:] != self.shape[1:]:
            raise self._refused(f"has lists of {piece.shape[1]} and of {self.shape[1]} numbers")
        return piece

    def _read(self, rows: int) -> Iterator[np.ndarray]:
        """The column's rows in pieces of so many, those without any left out."""
        try:
            for batch in self._file.iter_batches(rows, columns=self._fields, use_threads=False):
                if len(batch):
                    yield self._side_by_side([self._as_numpy(batch.column(field)) for field in self._fields])
        except DatasetError:
            raise
        except Exception as error:  # Arrow's own, and what does not fit together on the way from it
            raise self._refused(f"cannot be read ({first_line(error)}); the file is damaged") from error

    def _side_by_side(self, arrays: list[np.ndarray]) -> np.ndarray:
        if self._fields == [self._name]:
            return arrays[0]
        if any(array.ndim != 1 for array in arrays):
            raise self._refused("is numbered columns, of which each must hold one number a row")
        return np.stack(arrays, axis=1)

    def _as_numpy(self, array: pa.Array) -> np.ndarray:
        import pyarrow as pa
        import pyarrow.compute as pc

        if array.null_count:
            raise self._refused(f"has {array.null_count} missing values; remove or fill those rows")
        if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
            if not pa.types.is_fixed_size_list(array.type):
                return array.to_numpy(zero_copy_only=False)
            width = array.type.list_size
        else:
            lengths = pc.call_function("list_value_length", [array]).unique().to_pylist() or [0]
            if len(lengths) > 1:
                raise self._refused(f"has lists of {lengths[0]} and of {lengths[1]} numbers")
            width = lengths[0]
        values = array.flatten()
        if values.null_count:
            raise self._refused(f"has {values.null_count} missing values; remove or fill those rows")
        return values.to_numpy(zero_copy_only=False).reshape(len(array), width)

    def _refused(self, what: str) -> DatasetError:
        return DatasetError(f"{self._origin}: {self._name} {what}.")
