"""Stopping between two updates when asked to."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interruption:
    """While active, SIGINT and SIGTERM set :attr:`signal` instead of stopping the process; a second one stops it.

    In another thread than the main one, which alone may handle signals, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        of_main_thread = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM) if of_main_thread else ():
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for previous_number, handler in self._previous.items():
            signal.signal(previous_number, handler)  # type: ignore[arg-type]
