"""Arrays that a program holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from pydantic import InstanceOf

from iql_torchrl.configuration.declaring import option
from iql_torchrl.data.joining import of_layout
from iql_torchrl.data.log import Log
from iql_torchrl.data.sources.source import LogSource
from iql_torchrl.data.storage import Allocate
from iql_torchrl.errors import DatasetError, first_line


class Arrays(LogSource):
    """The columns of a log by their names: ``observations`` ``[N, O]``, ``actions`` ``[N, A]`` or integers ``[N]``, ...

    They are copied, not changed.
    """

    source: Literal["arrays"] = "arrays"
    # Not looked into by pydantic, which would read every array of an archive each time that options are checked.
    arrays: InstanceOf[Mapping[Any, Any]] = option(
        "the columns", expected="a mapping of names to arrays", exclude=True, repr=False
    )

    @property
    def label(self) -> str:
        return "arrays"

    @property
    def title(self) -> str:
        return "the given arrays"

    @contextmanager
    def open(self, allocate: Allocate = np.empty) -> Iterator[Log]:
        """The arrays as columns.

        Raises:
            DatasetError: something that is no array of numbers.
        """
        columns = {}
        for name, values in _flat(self.arrays):
            if not of_layout(name):
                columns[name] = np.empty(0)  # named in errors, never read
                continue
            try:
                columns[name] = np.asarray(values)
            except Exception as error:  # lists of unequal lengths, tensors on a GPU, objects of any library
                raise DatasetError(f"{self.title}: {name} is no array ({first_line(error)}).") from error
        yield self.log_of(columns, self.title)


def _flat(arrays: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Arrays by their full names, those in dicts as ``observations/position``."""
    for name in arrays:
        values = arrays[name]
        if isinstance(values, Mapping):
            yield from _flat(values, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", values
