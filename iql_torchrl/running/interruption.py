"""Stopping between two updates when asked to."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


class Interruption:
    """While active, SIGINT and SIGTERM set :attr:`signal` instead of stopping the process; a second one stops it.

    In a job of submitit its own signal does too, which is to be handed on by :func:`hand_on`. In one of Slurm, SIGTERM
    only asks to save: it comes when the job is pre-empted, put into the queue again or cancelled, and is followed by
    SIGKILL. A pre-empted job that ends before that has failed for Slurm, and does not come back.

    In another thread than the main one, which alone may handle signals, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._to_save: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        of_main_thread = threading.current_thread() is threading.main_thread()
        for number in {signal.SIGINT, signal.SIGTERM, _of_submitit() or signal.SIGTERM} if of_main_thread else ():
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def look(self) -> signal.Signals | None:
        """The signal for which a checkpoint is to be saved now; that in :attr:`signal` is to end the run too."""
        to_save, self._to_save = self._to_save, None
        return self.signal or to_save

    def _handle(self, number: int, _: FrameType | None) -> None:
        received = signal.Signals(number)
        if received == signal.SIGTERM != _of_submitit() and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            self._to_save = received
            return
        self.signal = received
        for previous_number, handler in self._previous.items():
            signal.signal(previous_number, handler)  # type: ignore[arg-type]


def hand_on(received: signal.Signals | None) -> None:
    """Hand submitit's own signal on to it, once all is saved: it puts the job into the queue again and exits.

    Args:
        received: that ended the run.

    Raises:
        SystemExit: by submitit.
    """
    if received is not None and received == _of_submitit():
        signal.raise_signal(received)


def _of_submitit() -> signal.Signals | None:
    """The signal by which submitit, where it runs this process, asks a job to save: SIGUSR2, or what it was told."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    return signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]
