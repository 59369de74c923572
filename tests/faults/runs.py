"""The recipes in forks of this process, and what two run folders have in common."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from comparing import rows_without_times, same
from problems import write_pendulum
from processes import ROOT

matplotlib.use("Agg")

# Loaded before a process is forked off, which then starts at once.
import matplotlib.pyplot

import iql_torchrl.data.preparation
import iql_torchrl.reporting.run_lock
import iql_torchrl.running.online
import iql_torchrl.running.run
import iql_torchrl.training.construction  # noqa: F401

SECONDS = 300
STEPS = 60
OPTIONS = (
    "algorithm.hidden_dims=[16,16]",
    "algorithm.batch_size=32",
    "train.device=cpu",
    "train.products=mkl",
    f"train.steps={STEPS}",
    "train.log_interval=5",
    "eval.episodes=2",
    "eval.interval=20",
    "checkpoint.interval=10",
    "checkpoint.keep=3",
)


class Skipped(Exception):
    """A fault that cannot be injected here, with the reason."""


def data(folder: Path) -> Path:
    """Random episodes of Pendulum-v1 as D4RL's HDF5."""
    path = folder / "pendulum.hdf5"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    return write_pendulum(path)


def options(folder: Path, run: Path, *more: str) -> list[str]:
    """A recipe and its options, that goes on where there is something to go on from.

    With options of the online phase it is ``iql_finetune.py``.
    """
    recipe = "iql_finetune.py" if any(one.startswith("online.") for one in more) else "iql_offline.py"
    chosen = {"env.name": "Pendulum-v1", "train.compile": "false", "run_dir": str(run), "resume": "auto"}
    chosen |= dict(one.split("=", 1) for one in (*OPTIONS, *more))
    named = [recipe, "dataset=hdf5", f"dataset.path={data(folder)}"]
    return [*named, *(f"{key}={value}" for key, value in chosen.items())]


def fork(arguments: Sequence[str], log: Path, before: Callable[[], object] = lambda: None) -> int:
    """Run a recipe in a fork of this process, which has no threads; its number.

    Args:
        arguments: the recipe and its options.
        log: of what it prints.
        before: is called in the new process.
    """
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(out, number)
        before()
        name, *rest = arguments
        sys.argv = [str(ROOT / "recipes" / name), *rest]
        spec = importlib.util.spec_from_file_location(Path(name).stem, sys.argv[0])
        assert spec is not None and spec.loader is not None
        recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(recipe)
        # What a process of the simulators imports: the recipe, as where a user has started it.
        main: Any = sys.modules["__main__"]
        main.__spec__, main.__file__ = None, sys.argv[0]
        recipe.main()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def end_of(process: int) -> int:
    """The status of a fork, negative for a signal."""
    limit = time.monotonic() + SECONDS
    while time.monotonic() < limit:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise AssertionError(f"no end in {SECONDS} s")


def run(arguments: Sequence[str], log: Path) -> None:
    """Run a recipe to its end."""
    status = end_of(fork(arguments, log))
    assert status == 0, f"status {status}: {log.read_text()[-2000:]}"


def started(arguments: Sequence[str], **environment: str) -> tuple[int, str, str]:
    """A recipe as a user starts it: status and what it printed."""
    name, *rest = arguments
    command = [sys.executable, str(ROOT / "recipes" / name), *rest]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=SECONDS)
    return done.returncode, done.stdout, done.stderr


def uninterrupted(folder: Path, name: str, *more: str) -> Path:
    """The run that nothing happens to, made once."""
    path = folder / f"uninterrupted-{name}"
    if not (path / "summary.json").exists():
        shutil.rmtree(path, ignore_errors=True)
        start = time.monotonic()
        run(options(folder, path, *more), folder / f"uninterrupted-{name}.txt")
        (folder / f"uninterrupted-{name}.seconds").write_text(str(time.monotonic() - start))
    return path


def compare(found: Path, expected: Path, *, damaged: int = 0) -> None:
    """Bit for bit in the last checkpoint of every seed and its online steps, each row once, nothing left over.

    Args:
        found: the run that something happened to.
        expected: the one that nothing happened to.
        damaged: how many checkpoints are expected to have been put aside.

    Raises:
        AssertionError: what differs.
    """
    names, wanted = (
        {str(path.relative_to(folder)) for path in folder.rglob("*") if "wandb" not in path.parts}
        for folder in (found, expected)
    )
    aside = {name for name in names if name.endswith(".damaged")}
    assert len(aside) == damaged, f"put aside: {aside}"
    # One killed between its last checkpoint and the removal of the oldest has one more.
    extra = {name for name in names - wanted - aside if not Path(name).name.startswith("step-")}
    assert not extra and not wanted - names, f"left over: {extra}; missing: {wanted - names}"
    for name in ("metrics.csv", "eval.csv"):
        one, other = (rows_without_times(folder / name) for folder in (found, expected))
        assert one == other, f"{name} has other rows: {one} != {other}"
    for path in sorted([*expected.rglob(f"step-{STEPS:08d}.pt"), *expected.rglob("best-step-*.pt")]):
        one, other = (torch.load(where, weights_only=True) for where in (found / path.relative_to(expected), path))
        for part in ("step", "training", "policy", "random", "interval", "interaction"):
            assert same(one.get(part), other.get(part)), f"{path.name}: {part} differs"
    for path in expected.rglob("*.steps"):
        assert (found / path.relative_to(expected)).read_bytes() == path.read_bytes(), f"{path.name}: other steps"
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (found, expected))
    for key in ("steps", "final_score", "best_score", "offline_score", "regret", "interrupted", "diverged"):
        assert one.get(key) == other.get(key), f"summary.json: {key} is {one.get(key)} and not {other.get(key)}"
