"""One run by several processes as a user starts it, with torchrun: real processes, real signals, real files."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from comparing import rows_without_times
from processes import ROOT, SMALL, finish, rows, run, wait_for_rows

from iql_torchrl.training.checkpoints import find_checkpoints

pytestmark = pytest.mark.slow


def torchrun(*arguments, cwd, launcher=("--nproc-per-node", "2")):
    recipe = str(ROOT / "recipes" / "iql_offline.py")
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, recipe, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def errors_of(process, timeout=120):
    """What is said of mistakes, by the job that must have failed."""
    code, out, error = finish(process, timeout)
    assert code == 1, f"{out}\n{error}"
    return [line for line in error.splitlines() if "error: " in line and not line.startswith("E")]


def workers_of(process):
    found = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True, check=True)
    return [int(pid) for pid in found.stdout.split()]


def parameters(path):
    return torch.load(path, weights_only=True)["training"]["loss"]


def numbers(path):
    return [[float(value) for value in row.values() if value] for row in rows_without_times(path)]


@pytest.fixture(scope="module")
def options(pendulum):
    return (*SMALL, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=Pendulum-v1")


@pytest.fixture(scope="module")
def by_one(tmp_path_factory, options):
    """The folder of a run by one process."""
    folder = tmp_path_factory.mktemp("by_one")
    run("iql_offline.py", *options, "train.steps=60", "run_dir=run", cwd=folder)
    return folder / "run"


def assert_same_run(found, expected):
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (found, expected)]
    assert names[0] == names[1]
    for name in ("metrics.csv", "eval.csv"):
        torch.testing.assert_close(numbers(found / name), numbers(expected / name), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        *(parameters(folder / "checkpoints" / "step-00000060.pt") for folder in (found, expected)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_run_by_two_processes_leaves_what_one_leaves(by_one, options, tmp_path):
    code, out, error = finish(torchrun(*options, "train.steps=60", cwd=tmp_path))
    assert code == 0, error
    (folder,) = (tmp_path / "runs").iterdir()
    assert os.listdir(tmp_path) == ["runs"]
    assert_same_run(folder, by_one)
    assert out.count("curves: ") == 1


def test_when_a_process_is_killed_the_job_ends_and_its_last_checkpoint_is_good(options, tmp_path):
    job = torchrun(*options, "train.steps=100000", "run_dir=run", cwd=tmp_path)
    wait_for_rows(tmp_path / "run" / "metrics.csv", 5)
    killed = time.monotonic()
    os.kill(workers_of(job)[-1], signal.SIGKILL)
    (error,) = errors_of(job, timeout=60)
    assert time.monotonic() - killed < 60
    assert "another of the 2 processes of this run has ended" in error
    assert f"resume=auto run_dir={tmp_path / 'run'}" in error
    ((_, newest),) = find_checkpoints("auto", [tmp_path / "run" / "checkpoints"])
    assert newest["step"] >= 40 and newest["step"] % 20 == 0
    assert not list((tmp_path / "run" / "checkpoints").glob("*.damaged"))


def test_a_process_that_falls_silent_with_its_connections_open_ends_the_job_too(options, tmp_path):
    # The first process of one job and the second of another, at once: each takes a minute of waiting.
    folders = [tmp_path / f"run-{place}" for place in range(2)]
    jobs = [torchrun(*options, "train.steps=1000000", f"run_dir={folder}", cwd=tmp_path) for folder in folders]
    for folder in folders:
        wait_for_rows(folder / "metrics.csv", 5)
    stopped = time.monotonic()
    for place, job in enumerate(jobs):
        os.kill(workers_of(job)[place], signal.SIGSTOP)
    with ThreadPoolExecutor() as readers:
        found = list(readers.map(errors_of, jobs))  # torchrun waits for half a minute before it kills what does not end
    assert time.monotonic() - stopped < 90
    for place, (folder, (error,)) in enumerate(zip(folders, found, strict=True)):
        assert f"process {place} of the 2 of this run gives no sign of life for 30 s" in error
        assert "resume=auto" in error
        ((_, newest),) = find_checkpoints("auto", [folder / "checkpoints"])
        assert newest["step"] >= 40


def test_two_processes_go_on_with_the_run_of_one_and_stop_together_when_asked_to(by_one, tmp_path):
    folder = shutil.copytree(by_one, tmp_path / "run")
    more = ("resume_with_changes=true", "train.steps=100000", "train.log_interval=7")
    job = torchrun("resume=auto", "run_dir=run", *more, cwd=tmp_path)
    wait_for_rows(folder / "metrics.csv", 12)
    job.send_signal(signal.SIGTERM)
    code, out, _ = finish(job)
    assert code != 0
    assert out.count("resumed from ") == out.count("at step 60") == 1
    newest = max((folder / "checkpoints").glob("step-*.pt"))
    assert out.count(f"SIGTERM: saved {newest}; continue with resume=auto run_dir={folder}") == 1
    assert '"interrupted": "SIGTERM"' in (folder / "summary.json").read_text()
    steps = [int(row["step"]) for row in rows(folder / "metrics.csv")]
    assert steps == sorted(set(steps))
    assert os.listdir(tmp_path) == ["run"]


def test_a_batch_that_cannot_be_divided_is_one_error_and_leaves_nothing_behind(options, tmp_path):
    (error,) = errors_of(torchrun(*options, "algorithm.batch_size=33", "train.steps=60", cwd=tmp_path))
    assert error.startswith("error: algorithm.batch_size=33 cannot be divided among 2 processes; give a multiple of 2")
    assert os.listdir(tmp_path / "runs") == []
