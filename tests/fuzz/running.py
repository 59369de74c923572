"""Cases, each in a process of its own with a limit of memory and of time: what came of them."""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import io
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fuzz import samples
from fuzz.targets import TARGETS

from iql_torchrl.errors import UserError

SECONDS = 60
# Beyond what the process has when it begins.
MEMORY = 2 << 30
# That a case may write: a copy, in a cache.
LONGEST_FILE = 1 << 28
LONGEST_MESSAGE = 4000


@dataclass(frozen=True)
class Outcome:
    """Of one case.

    Args:
        case: number of the case.
        target: what was read.
        kind: ``ok``, ``clear`` (one error that names the file), or ``other``.
        text: the error, the signal or the traceback.
        seconds: that it took.
    """

    case: int
    target: str
    kind: str
    text: str
    seconds: float


def run(cases: range, seed: int, folder: Path) -> Iterator[Outcome]:
    """Run cases; ``folder`` is emptied first, and keeps the files of those that are neither ok nor clear."""
    shutil.rmtree(folder, ignore_errors=True)
    healthy = folder / "healthy"
    healthy.mkdir(parents=True)
    # In a process of its own, so that no thread of any library is there when others are forked off.
    error = _in_a_process(lambda: samples.make(healthy), limited=False)
    if error is not None:
        raise RuntimeError(f"the samples cannot be made: {error}")
    for name, target in TARGETS.items():
        error = _in_a_process(lambda target=target: target.read(_copied(healthy, folder / "whole", target.sample)))
        if error is not None:
            raise RuntimeError(f"the healthy sample of {name} is not read: {error}")
    for case in cases:
        yield _run_case(case, seed, folder, healthy)
    shutil.rmtree(healthy)


def _copied(healthy: Path, folder: Path, sample: str) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (shutil.copytree if (healthy / sample).is_dir() else shutil.copy)(healthy / sample, folder / sample)
    return folder / sample


def _run_case(case: int, seed: int, folder: Path, healthy: Path) -> Outcome:
    name = list(TARGETS)[case % len(TARGETS)]
    target = TARGETS[name]
    place = folder / f"case-{case}"
    place.mkdir()
    path = place / target.sample
    start = time.perf_counter()

    def damaged() -> None:
        os.environ["HOME"] = str(place)
        target.prepare(healthy, place, random.Random(f"{seed} {case}"))

    error = _in_a_process(damaged, limited=False)
    if error is not None:
        return Outcome(case, name, "other", f"the damage itself failed: {error}", 0)
    try:
        error = _in_a_process(lambda: target.read(path))
    except _Refused as refused:
        kind, text = "clear", str(refused)
        names = [word for word in (str(path), *target.names) if word in text]
        if not names or "\n" in text or len(text) > LONGEST_MESSAGE:
            kind = "other"
    else:
        kind, text = ("ok", "") if error is None else ("other", error)
    if kind != "other":
        shutil.rmtree(place)
    return Outcome(case, name, kind, text, time.perf_counter() - start)


class _Refused(Exception):
    """The one clear error that reading a file ended in."""


def _in_a_process(function, *, limited: bool = True) -> str | None:
    """Call a function in a fork of this process.

    Returns:
        what went wrong, or ``None``.

    Raises:
        _Refused: the function raised a ``UserError``.
    """
    receiving, sending = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(receiving)
        _call_and_exit(function, sending, limited)
    os.close(sending)
    with open(receiving, "rb") as file:
        answer = file.read().decode(errors="replace")
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"no end in {SECONDS} s" if number == signal.SIGALRM else f"signal {signal.Signals(number).name}"
    kind, _, text = answer.partition(" ")
    if kind == "refused":
        raise _Refused(text)
    return None if kind == "ok" else text or f"status {os.WEXITSTATUS(status)} without an answer"


def _call_and_exit(function, sending: int, limited: bool) -> None:
    silent = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(silent, number)
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LONGEST_FILE, LONGEST_FILE))
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
        if pages:
            most = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            function()
        answer = "ok "
    except UserError as error:
        answer = f"refused {error}"
    except BaseException as error:
        answer = f"other {type(error).__name__}: {str(error)[:300]}\n{''.join(traceback.format_exc()[-3000:])}"
    with contextlib.suppress(OSError):
        os.write(sending, answer.encode(errors="replace")[:60_000])
    os._exit(0)


def summary(outcomes: list[Outcome]) -> str:
    """Counts by target and outcome."""
    lines = [f"{'':20}{'ok':>7}{'clear':>7}{'other':>7}"]
    for target in [*TARGETS, "all"]:
        found = collections.Counter(one.kind for one in outcomes if target in ("all", one.target))
        lines.append(f"{target:20}" + "".join(f"{found[kind]:7}" for kind in ("ok", "clear", "other")))
    return "\n".join(lines)
