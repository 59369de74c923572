"""The clock of all measurements."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class Timed(Protocol):
    """A call that measures itself."""

    def milliseconds(self, count: int, device: torch.device) -> float:
        """Mean time of ``count`` calls."""
        ...


def milliseconds(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Mean time of ``count`` calls.

    A :class:`Timed` call is asked.
    """
    if isinstance(call, Timed):
        return call.milliseconds(count, device)
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / count * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
