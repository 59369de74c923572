"""How much a Parquet file says that it holds, read from its footer.

pyarrow ends the process on some damaged footers when it is asked for the counts of a column.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The end of a file: the length of the footer, and these bytes.
_MAGIC = b"PAR1"
_END = 4 + len(_MAGIC)
# Of a value in memory, by the number of its type; other types are texts and the like.
_BYTES = {0: 1, 1: 4, 2: 8, 4: 4, 5: 8}


@dataclass(frozen=True)
class Counts:
    """What a footer says.

    Args:
        rows: of the file.
        rows_of_groups: of each row group.
        sizes: bytes that the values of a column take in memory, by the name that it has in a table; at least one value
            a row.
    """

    rows: int
    rows_of_groups: list[int]
    sizes: dict[str, int]


def counts_of(path: Path) -> Counts:
    """The counts in a file's footer.

    Raises:
        ValueError, KeyError, TypeError, ...: the footer is damaged.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END))
        end = file.read()
        length = int.from_bytes(end[:4], "little")
        if end[4:] != _MAGIC or length > size - _END:
            raise ValueError("its footer is damaged")
        file.seek(size - _END - length)
        footer = _Compact(file.read(length)).struct()
    rows, groups = footer[3], footer[4]
    sizes: dict[str, int] = {}
    for group in groups:
        for chunk in group[1]:
            column = chunk[3]
            name, values = column[3][0].decode(), column[5]
            if values < 0:
                raise ValueError(f"it announces {values} values of {name}")
            sizes[name] = sizes.get(name, 0) + max(group[3], values) * _BYTES.get(column[1], 16)
    return Counts(rows, [group[3] for group in groups], sizes)


class _Compact:
    """Thrift's compact protocol, in which a footer is written: structures are fields by their numbers."""

    def __init__(self, content: bytes) -> None:
        self._content, self._place = content, 0

    def struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 15, inside=False)
        return fields

    def _value(self, kind: int, *, inside: bool) -> Any:
        if kind in (1, 2):  # a field's kind says which of the two it is, an element is a byte
            return self._byte() == 1 if inside else kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._natural())
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._natural()
            return [self._value(head & 15, inside=True) for _ in range(count)]
        if kind == 11:
            count = self._natural()
            kinds = self._byte() if count else 0
            return [(self._value(kinds >> 4, inside=True), self._value(kinds & 15, inside=True)) for _ in range(count)]
        if kind == 12:
            return self.struct()
        if kind == 13:
            return self._bytes(16)
        raise ValueError(f"its footer is damaged: a value of kind {kind}")

    def _byte(self) -> int:
        self._place += 1
        return self._content[self._place - 1]

    def _bytes(self, count: int) -> bytes:
        start, self._place = self._place, self._place + count
        if self._place > len(self._content):
            raise ValueError("its footer is damaged: it ends early")
        return self._content[start : self._place]

    def _natural(self) -> int:
        found, shift = 0, 0
        while True:
            byte = self._byte()
            found |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return found
            if shift > 63:
                raise ValueError("its footer is damaged: a number of more than 64 bits")

    def _integer(self) -> int:
        found = self._natural()
        return found >> 1 ^ -(found & 1)
