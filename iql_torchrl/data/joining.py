"""Observations that a log has in several columns, as one: laid out as observations with parts are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from iql_torchrl.data.log import OPTIONAL, REQUIRED, Column
from iql_torchrl.errors import DatasetError

PARTED = ("observations", "next_observations")


def is_part(name: str) -> bool:
    """Whether a column such as ``observations/position`` is a part of another."""
    return name.split("/")[0] in PARTED and "/" in name


def of_layout(name: str) -> bool:
    """Whether a column is one of a log's, or a part of one."""
    return name in (*REQUIRED, *OPTIONAL) or is_part(name)


def join_parts(columns: Mapping[str, Column], origin: str) -> dict[str, Column]:
    """Columns of which ``observations/...`` and ``next_observations/...`` have become one each.

    The parts come in the alphabetical order of their names, arrays row by row, as those of a dict do; numbers stay
    numbers, since a log does not say which are discrete.

    Raises:
        DatasetError: parts beside a column of the whole name, images, lengths or parts that do not belong together.
    """
    joined = {name: column for name, column in columns.items() if not is_part(name)}
    names = {
        whole: sorted(name for name in columns if is_part(name) and name.split("/")[0] == whole) for whole in PARTED
    }
    for whole, parts in names.items():
        if not parts:
            continue
        if whole in joined:
            raise DatasetError(f"{origin}: has both {whole} and {parts[0]}; keep one of the two kinds.")
        for name in parts:
            shape, dtype = columns[name].shape, columns[name].dtype
            if len(shape) > 3 or (len(shape) == 3 and dtype == np.uint8):
                raise DatasetError(
                    f"{origin}: {name} has shape {tuple(shape)} of dtype {dtype}, which is an image or more; images "
                    "are not supported: leave that part out."
                )
            if not shape or dtype.kind not in "biuf":
                raise DatasetError(
                    f"{origin}: {name} must hold numbers, a row a step; got shape {tuple(shape)} of dtype {dtype}."
                )
            if shape[0] != columns[parts[0]].shape[0]:
                raise DatasetError(
                    f"{origin}: {name} has {shape[0]} rows but {parts[0]} has {columns[parts[0]].shape[0]}; all must "
                    "be equal."
                )
        joined[whole] = _Joined([columns[name] for name in parts])
    if all(names.values()):
        own, following = ({name.split("/", 1)[1] for name in names[whole]} for whole in PARTED)
        if own != following:
            raise DatasetError(
                f"{origin}: observations and next_observations have other parts: {', '.join(sorted(own ^ following))} "
                "is in one of them alone."
            )
    return joined


class _Joined:
    """Parts side by side, ``[rows, size]``."""

    def __init__(self, parts: list[Column]) -> None:
        self._parts = parts
        size = sum(int(np.prod(part.shape[1:])) for part in parts)
        self.shape: tuple[int, ...] = (parts[0].shape[0], size)
        self.dtype = np.result_type(*(part.dtype for part in parts), np.float32)

    def __getitem__(self, rows: slice) -> np.ndarray:
        found = [part[rows] for part in self._parts]
        return np.concatenate([one.reshape(len(one), -1) for one in found], axis=1, dtype=self.dtype)
