"""A row in a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from iql_torchrl.benchmark.case import Row
from iql_torchrl.benchmark.own_process import in_own_process
from iql_torchrl.benchmark.timing import milliseconds

CPU = torch.device("cpu")


def _sleeping(seconds: float) -> Callable[[], object]:
    return partial(time.sleep, seconds)


def _telling_its_process(path: Path) -> Callable[[], object]:
    return lambda: path.write_text(f"{os.getpid()} {torch.get_num_threads()}")


def _refusing() -> Callable[[], object]:
    raise ValueError("no such layer\nand a second line")


def _failing_when_called() -> Callable[[], object]:
    return lambda: 1 / 0


def _dying() -> Callable[[], object]:
    return lambda: os._exit(3)


def _row(build: Callable[[], Callable[[], object]]) -> Row:
    return in_own_process(Row("theirs", "eager", "joint", build))


def test_the_mean_time_of_its_calls_is_told():
    call = _row(partial(_sleeping, 0.05)).build()
    assert milliseconds(call, 3, CPU) >= 50


def test_it_runs_in_another_process_with_as_many_threads(tmp_path):
    _row(partial(_telling_its_process, tmp_path / "process")).build()()
    process, threads = (tmp_path / "process").read_text().split()
    assert int(process) != os.getpid()
    assert int(threads) == torch.get_num_threads()


def test_why_a_row_cannot_be_built_is_told():
    with pytest.raises(RuntimeError, match=r"^ValueError: no such layer$"):
        _row(_refusing).build()


def test_why_a_call_fails_is_told():
    call = _row(_failing_when_called).build()
    with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"):
        milliseconds(call, 1, CPU)


def test_a_process_that_ends_fails_its_row_and_no_more():
    call = _row(_dying).build()
    with pytest.raises(RuntimeError, match="its process has ended"):
        milliseconds(call, 1, CPU)


def test_the_process_ends_with_its_row(tmp_path):
    call = _row(partial(_telling_its_process, tmp_path / "process")).build()
    call()
    process = int((tmp_path / "process").read_text().split()[0])
    del call
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text().split()[2] == "Z":
                return
            os.kill(process, 0)
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.05)
    pytest.fail("the process still runs")
