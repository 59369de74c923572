"""What is done to runs, each kind with how many cases it has; a case says what it did, or raises what it found."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from faults.runs import Skipped, compare, end_of, fork, options, run, started, uninterrupted
from processes import rows

SEEDS = {"one seed": (), "three seeds": ("train.num_seeds=3",)}
# Of 60 updates too, in episodes of which several end.
_ONLINE = ("train.steps=20", "online.steps=40", "env.kwargs={max_episode_steps:15}")
ONLINE = {
    "online": _ONLINE,
    "online with two seeds in two environments each": (*_ONLINE, "train.num_seeds=2", "online.num_envs=2"),
}


def kill(folder: Path, case: int, seed: int) -> str:
    """SIGKILL at a moment of a stage, once or twice, and then on to the end."""
    return _kill(folder, f"kill-{case}", case, seed, SEEDS, OFFLINE_STAGES)


def kill_online(folder: Path, case: int, seed: int) -> str:
    """The same of runs with both phases."""
    return _kill(folder, f"kill-online-{case}", case, seed, ONLINE, ONLINE_STAGES)


def _kill(
    folder: Path, label: str, case: int, seed: int, runs: dict[str, tuple[str, ...]], stages: dict[str, Callable]
) -> str:
    draw = random.Random(f"{seed} {case}")
    stage = list(stages)[case % len(stages)]
    name = draw.choice(list(runs))
    more = runs[name] if stage != "compilation" else (*runs[name], "train.compile=true")
    expected = uninterrupted(folder, f"{name} compiled" if stage == "compilation" else name, *more)
    path, log = fresh(folder, label)
    times, wanted = 0, draw.choice((1, 1, 2))
    for _ in range(20):
        status = stages[stage](options(folder, path, *more), log, path, expected, draw)
        if status == 0:  # done before the moment came
            if times:
                break
            path, log = fresh(folder, label)
            continue
        assert status == -signal.SIGKILL, f"status {status}: {log.read_text()[-2000:]}"
        times += 1
        if times == wanted:
            break
    assert times, "the moment did not come"
    run(options(folder, path, *more), log)
    compare(path, expected)
    gone(path, log)
    return f"killed {times} times in {stage}, {name}"


def at_a_time(arguments, log, path, expected, draw) -> int:
    """After a random time, anywhere."""
    seconds = float(expected.with_name(f"{expected.name}.seconds").read_text())
    process = fork(arguments, log)
    time.sleep(draw.uniform(0, seconds))
    return killed(process)


def at_a_compilation(arguments, log, path, expected, draw) -> int:
    """Between the line that says that it compiles and the first row."""
    process = fork(arguments, log)
    while "compiling the training step" not in (log.read_text() if log.exists() else ""):
        time.sleep(0.01)
        if os.waitpid(process, os.WNOHANG)[0]:
            raise AssertionError(f"it ended: {log.read_text()[-2000:]}")
    time.sleep(draw.uniform(0, 2))
    return killed(process)


def at_a_file(arguments, log, path, expected, draw) -> int:
    """When some file of the run is opened, renamed or removed, from the first to the last."""
    number = draw.randrange(50)

    def before() -> None:
        left = [number]

        def hook(event: str, details: tuple) -> None:
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate") and str(path) in str(details[0]):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return end_of(fork(arguments, log, before))


def at_the_beginning(arguments, log, path, expected, draw) -> int:
    """Before the first update."""
    seconds = draw.uniform(0, 1)
    process = fork(arguments, log)
    limit = time.monotonic() + 60
    while not path.exists() and time.monotonic() < limit:
        time.sleep(0.002)
    time.sleep(seconds / 4)
    return killed(process)


def at_a_checkpoint(arguments, log, path, expected, draw) -> int:
    """After some byte of a checkpoint."""
    size = max(one.stat().st_size for one in expected.rglob("step-*.pt"))
    number, place = draw.randrange(6), draw.randrange(size)

    def before() -> None:
        import torch

        save, left = torch.save, [number]

        def cut(content, file) -> None:
            left[0] -= 1
            save(content, file if left[0] >= 0 else Cut(file, place))

        torch.save = cut

    return end_of(fork(arguments, log, before))


def at_a_row(arguments, log, path, expected, draw) -> int:
    """With half a row written."""
    number, share = draw.randrange(10), draw.random()

    def before() -> None:
        from iql_torchrl.reporting import run_folder

        append, left = run_folder._append, [number]

        def cut(file, columns, row) -> None:
            left[0] -= 1
            before = file.read_bytes()
            append(file, columns, row)
            if left[0] < 0:
                after = file.read_bytes()
                os.truncate(file, len(before) + 1 + int(share * (len(after) - len(before) - 1)))
                os.kill(os.getpid(), signal.SIGKILL)

        run_folder._append = cut

    return end_of(fork(arguments, log, before))


def at_a_step_of_the_simulator(arguments, log, path, expected, draw) -> int:
    """In an evaluation."""
    number = draw.randrange(600)

    def before() -> None:
        from iql_torchrl.environments.playing import Simulators

        Simulators.step = killing_after(number, Simulators.step)

    return end_of(fork(arguments, log, before))


def at_an_update(arguments, log, path, expected, draw) -> int:
    """Between two updates."""
    number = draw.randrange(60)

    def before() -> None:
        from iql_torchrl.training.step import TrainingStep

        TrainingStep.__call__ = killing_after(number, TrainingStep.__call__)

    return end_of(fork(arguments, log, before))


def at_an_online_step(arguments, log, path, expected, draw) -> int:
    """While the environments do a step, or with a part of it written."""
    number, share = draw.randrange(30), draw.choice((None, draw.random()))

    def before() -> None:
        from iql_torchrl.running.interaction import Interaction, _Record

        if share is None:
            Interaction._receive = killing_after(number, Interaction._receive)
            return
        append, left = _Record.append, [number]

        def cut(record, rows) -> None:
            left[0] -= 1
            if left[0] < 0:
                content = rows.tobytes()
                record._file.write(content[: int(share * len(content))])
                record._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            append(record, rows)

        _Record.append = cut

    return end_of(fork(arguments, log, before))


def killing_after(calls: int, method: Callable) -> Callable:
    """The method, which kills its process in place of the call after so many."""
    left = [calls]

    def cut(*arguments):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*arguments)

    return cut


# In an order in which the first few are of different kinds.
OFFLINE_STAGES: dict[str, Callable] = {
    "checkpoint writes": at_a_checkpoint,
    "log writes": at_a_row,
    "evaluation": at_a_step_of_the_simulator,
    "any file": at_a_file,
    "any time": at_a_time,
    "updates": at_an_update,
    "start-up": at_the_beginning,
    "compilation": at_a_compilation,
}
ONLINE_STAGES: dict[str, Callable] = {"online steps": at_an_online_step, **OFFLINE_STAGES}


class Cut:
    """A file that takes so many bytes, after which the process is killed."""

    def __init__(self, file, size: int) -> None:
        self.file, self.left = file, size

    def write(self, content) -> int:
        content = memoryview(content)
        self.file.write(content[: self.left])
        self.left -= len(content)
        if self.left <= 0:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return len(content)

    def flush(self) -> None:
        self.file.flush()


def killed(process: int) -> int:
    """The status of a process after SIGKILL, 0 where it had ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    return end_of(process)


def fresh(folder: Path, name: str) -> tuple[Path, Path]:
    """A run folder that is not there yet, and its log."""
    path, log = folder / name, folder / f"{name}.txt"
    shutil.rmtree(path, ignore_errors=True)
    log.unlink(missing_ok=True)
    return path, log


def gone(path: Path, log: Path) -> None:
    """Removed, since nothing went wrong."""
    shutil.rmtree(path)
    log.unlink(missing_ok=True)


# ---- disks


@contextlib.contextmanager
def mounted(path: Path, size: int) -> Iterator[None]:
    """A disk of its own, of so many bytes.

    Raises:
        Skipped: without the right to mount one.
    """
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise Skipped("there is no mount") from None
    if done.returncode:
        raise Skipped(f"a disk is mounted by root alone: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def one_error(text: str, *words: str) -> str:
    """The one line that begins with error, in a text without a traceback."""
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in text, text[-3000:]
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"
    return lines[0]


def fill(folder: Path, case: int, seed: int) -> str:
    """A disk that fills up, somewhere between the first file of a run and the last; then there is room."""
    name = list(SEEDS)[case % 2]
    expected = uninterrupted(folder, name, *SEEDS[name])
    # Sizes in whole pages, as the disk counts them.
    needed = sum(-(-path.stat().st_size // 4096) * 4096 for path in expected.rglob("*") if path.is_file())
    disk, log = fresh(folder, f"fill-{case}")
    with mounted(disk, 2 * needed + (1 << 20)):
        path, ballast = disk / "run", disk / "ballast"
        free = int(needed * (case + random.Random(f"{seed} {case}").random()) / INJECTIONS["disk full"][1])
        total = shutil.disk_usage(disk).free
        ballast.write_bytes(bytes(total - free // 4096 * 4096))
        status = end_of(fork(options(folder, path, *SEEDS[name]), log))
        assert status in (2, 4), f"status {status}: {log.read_text()[-3000:]}"
        line = one_error(log.read_text(), "No space left on device", str(path))
        for table in path.glob("*.csv"):
            content = table.read_bytes()
            assert not content or content.endswith(b"\n"), f"half a row in {table.name}"
        ballast.unlink()
        run(options(folder, path, *SEEDS[name]), log)
        compare(path, expected)
    gone(disk, log)
    return f"{free:,} bytes free of {needed:,}, status {status}: {line.replace(str(folder), '...')[:90]}"


def forbid(folder: Path, case: int, seed: int) -> str:
    """A disk that may only be read: a new run, one that exists, and one that is resumed."""
    what = ("a new folder", "an empty folder", "a run to resume")[case]
    expected = uninterrupted(folder, "one seed")
    disk, log = fresh(folder, f"forbid-{case}")
    with mounted(disk, 64 << 20):
        path = disk / "run"
        if what == "an empty folder":
            path.mkdir()
        if what == "a run to resume":
            shutil.copytree(expected, path)
            (path / "summary.json").unlink()
        before = {str(one): one.stat().st_mtime_ns for one in disk.rglob("*")}
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        status = end_of(fork(options(folder, path), log))
        assert status == 2, f"status {status}: {log.read_text()[-3000:]}"
        one_error(log.read_text(), f"run_dir={path} cannot be written")
        assert before == {str(one): one.stat().st_mtime_ns for one in disk.rglob("*")}
    gone(disk, log)
    return f"read-only, {what}: status {status}"


# ---- checkpoints


def cut(folder: Path, case: int, seed: int) -> str:
    """The newest checkpoint cut anywhere, and in every fifth case the one before too."""
    draw = random.Random(f"{seed} {case}")
    expected = uninterrupted(folder, "one seed")
    path, log = fresh(folder, f"cut-{case}")
    shutil.copytree(expected, path)
    newest = sorted((path / "checkpoints").glob("step-*.pt"))[::-1][: 2 if case % 5 == 4 else 1]
    places = []
    for one in newest:
        places.append(draw.randrange(one.stat().st_size))
        os.truncate(one, places[-1])
    run(options(folder, path), log)
    text = log.read_text()
    for one in newest:
        assert text.count(f"skipped, and renamed to {one.name}.damaged") == 1, text[-3000:]
    assert f"resumed from {path / 'checkpoints'}" in text
    compare(path, expected, damaged=len(newest))
    gone(path, log)
    return f"cut at byte {', '.join(map(str, places))}"


# ---- servers and simulators


class _Wandb(BaseHTTPRequestHandler):
    """As much of wandb's server as its client needs to begin a run."""

    _BUCKET = (
        '{"data": {"upsertBucket": {"inserted": true, "bucket": {"id": "x", "name": "r", "displayName": "r", '
        '"description": "", "config": "{}", "sweepName": null, "historyLineCount": 0, "project": {"id": "p", "name": '
        '"iql_torchrl", "entity": {"id": "e", "name": "me"}}}}, "viewer": {"id": "v", "entity": "me", "flags": "{}"}}}'
    )

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.seen.append(self.path)  # type: ignore[attr-defined]
        content = (self._BUCKET if "graphql" in self.path else "{}").encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


def lose_server(folder: Path, case: int, seed: int) -> str:
    """A server that goes away when the first rows are there, or that was never there."""
    expected = uninterrupted(folder, "one seed")
    path, log = fresh(folder, f"server-{case}")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Wandb)
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def leave() -> None:
        server.shutdown()
        server.server_close()

    if case == 0:
        leave()
    else:

        def wait() -> None:
            limit = time.monotonic() + 120
            while time.monotonic() < limit and not ((path / "metrics.csv").exists() and rows(path / "metrics.csv")):
                time.sleep(0.02)
            leave()

        threading.Thread(target=wait, daemon=True).start()
    start = time.monotonic()
    status, out, error = started(
        [*options(folder, path, "logger.mode=online"), "logger=wandb"],
        WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}",
        WANDB_API_KEY="a" * 40,
        WANDB_INIT_TIMEOUT="10",
        WANDB_FINISH_TIMEOUT="10",
    )
    assert status == 0, f"status {status}: {out[-2000:]}{error[-2000:]}"
    (line,) = (line for line in out.splitlines() if line.startswith("warning: wandb"))
    assert "Traceback" not in error, error[-3000:]
    assert case == 0 or server.seen, "wandb never called"  # type: ignore[attr-defined]
    compare(path, expected)
    assert list(path.rglob("*.wandb")), "wandb kept nothing to upload"
    gone(path, log)
    return f"{('never there', 'gone in the middle')[case]}, {time.monotonic() - start:.0f} s in all: {line[:80]}"


# How a simulator fails, how often, and whether that is survived.
SIMULATORS = (("exit", 1), ("kill", 1), ("hang", 1), ("exit", 2), ("hang", 2), ("raise", 1))


def fail_simulator(folder: Path, case: int, seed: int) -> str:
    """A simulator that dies or hangs in an evaluation, once or again and again."""
    how, times = SIMULATORS[case]
    path, log = fresh(folder, f"simulator-{case}")
    expected = uninterrupted(folder, "one seed")
    left = folder / f"simulator-{case}.left"
    left.write_text(str(times))
    more = ["env.name=faults.simulators:Failing-v0", f"env.kwargs={{how:{how},left:{left}}}", "eval.timeout=5"]
    tests = Path(__file__).parents[1]
    status, out, error = started(options(folder, path, *more), PYTHONPATH=f"{tests}:{os.environ.get('PYTHONPATH', '')}")
    told = [line for line in out.replace("\r", "\n").splitlines() if "the evaluation begun again" in line]
    if times == 1 and how != "raise":
        assert status == 0 and "Traceback" not in error, f"status {status}: {out[-2000:]}{error[-2000:]}"
    else:
        assert status == 4, f"status {status}: {out[-2000:]}{error[-2000:]}"
        one_error(error, "The newest checkpoint is", "step-00000010.pt", "resume=auto")
        run(options(folder, path, *more), log)  # in this process the environment is known by now
    assert len(told) == (0 if how == "raise" else 1), out[-2000:]
    compare(path, expected)
    gone(path, log)
    left.unlink()
    return f"{how} {times} times: status {status}; {(told or [''])[0][:90]}"


INJECTIONS: dict[str, tuple[Callable[[Path, int, int], str], int]] = {
    "kills": (kill, 30),
    "kills online": (kill_online, 30),
    "disk full": (fill, 8),
    "read-only folder": (forbid, 3),
    "checkpoint cut": (cut, 50),
    "wandb server lost": (lose_server, 2),
    "simulator lost": (fail_simulator, len(SIMULATORS)),
}
