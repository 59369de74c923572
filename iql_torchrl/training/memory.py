"""Memory on its way from one update to the next."""

from __future__ import annotations

import ctypes
import os

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory(most: int = 256 * 2**20) -> None:
    """Let the process keep up to ``most`` bytes that it has freed.

    An update frees all of its temporary tensors, some MB of them for wide networks. glibc gives them back to the system
    and asks for them again at the next update, page by page, which can take a fifth of its time. Nothing happens with
    another C library, or where the environment says how glibc is to do it.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    if change is None or any(name in os.environ for name in _SETTINGS):
        return
    # The largest that glibc takes: beyond it a tensor is memory of its own, and given back.
    change(_MMAP_THRESHOLD, 32 * 2**20)
    change(_TRIM_THRESHOLD, most)
