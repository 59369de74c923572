"""A row in a process of its own, for one whose threads would slow the others."""

from __future__ import annotations

import multiprocessing
import weakref
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection

import torch

from iql_torchrl.benchmark.case import Row
from iql_torchrl.benchmark.timing import milliseconds
from iql_torchrl.errors import LONGEST_REASON, first_line


def in_own_process(row: Row) -> Row:
    """The row, built and called in a process of its own.

    Where more threads use OpenMP than there are cores, it stops to wait actively between one parallel region and the
    next, in all of the process: threads that prepare batches ahead make every row 1.6 times as slow.

    Args:
        row: ``build`` can be pickled.
    """
    return replace(row, build=lambda: OwnProcess(row.build))


class OwnProcess:
    """A call that is built and timed in a process of its own, which ends with this object.

    Args:
        build: makes the call; can be pickled.

    Raises:
        RuntimeError: the call cannot be built; here or later, with the other process's reason.
    """

    def __init__(self, build: Callable[[], Callable[[], object]]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would have OpenMP's threads in name only
        self._connection, theirs = context.Pipe()
        settings = torch.get_num_threads(), torch.get_float32_matmul_precision()
        process = context.Process(target=_serve, args=(theirs, build, *settings), daemon=True)
        process.start()
        theirs.close()
        weakref.finalize(self, process.kill)
        self._receive()

    def __call__(self) -> None:
        """One call."""
        self.milliseconds(1, torch.device("cpu"))

    def milliseconds(self, count: int, device: torch.device) -> float:
        """Mean time of ``count`` calls, by that process's clock."""
        self._connection.send((count, device))
        return self._receive()

    def _receive(self) -> float:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise RuntimeError("its process has ended") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


def _serve(
    connection: Connection, build: Callable[[], Callable[[], object]], threads: int, matmul_precision: str
) -> None:
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(matmul_precision)
    try:
        call = build()
        connection.send(0.0)
        while True:
            count, device = connection.recv()
            connection.send(milliseconds(call, count, device))
    except EOFError:
        return
    except Exception as error:  # told to the other side, where it fails the row
        connection.send(f"{type(error).__name__}: {first_line(error, LONGEST_REASON)}")
