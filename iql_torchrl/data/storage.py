"""Where transitions lie: in memory, or in files that the system pages in and out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import DTypeLike

from iql_torchrl.errors import ConfigurationError, DatasetError
from iql_torchrl.suggestions import nearest

Storage = Literal["memory", "memmap", "device"]
DEFAULT_FOLDER = Path("~/.cache/iql_torchrl/memmap")
_BLOCK = 1 << 24
# An uninitialised array of a shape and dtype.
Allocate = Callable[[tuple[int, ...], DTypeLike], np.ndarray]


def allocator(storage: str, folder: str | Path | None = None) -> Allocate:
    """How arrays of transitions are allocated.

    Args:
        storage: ``"memory"``; ``"memmap"``, files that are mapped into memory and have no name: they are gone when the
            process is, however it ends; ``"device"``, which is memory until the replay buffer moves it.
        folder: for the files, default ``~/.cache/iql_torchrl/memmap``.

    Raises:
        ConfigurationError: an unknown storage.
    """
    known = get_args(Storage)
    if storage not in known:
        raise ConfigurationError(f"dataset.storage={storage}{nearest(storage, known)}")
    if storage != "memmap":
        return np.empty
    path = Path(folder if folder is not None else DEFAULT_FOLDER).expanduser().absolute()
    return lambda shape, dtype: _mapped(shape, np.dtype(dtype), path)


def _mapped(shape: tuple[int, ...], dtype: np.dtype, folder: Path) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            if size == 0:  # which cannot be mapped
                return np.empty(shape, dtype)
            # Reserved now: writing to a map on a full disk would kill the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                for start in range(0, size, _BLOCK):
                    file.write(bytes(min(_BLOCK, size - start)))
                file.flush()
            return np.memmap(file, dtype=dtype, mode="r+", shape=shape)
    except OSError as error:
        raise DatasetError(
            f"dataset.storage=memmap cannot write {size / 1e9:.2f} GB to {folder} ({error}); name a folder with room "
            "as dataset.storage_folder=FOLDER."
        ) from error
