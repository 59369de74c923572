"""Sweeps on real clusters on this machine, which lose nodes and jobs: ``python -m cluster ray``, ``... slurm``."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.ray_cluster import RayCluster, can_make_namespaces
from cluster.runs import command, differences, faults_of_table, jobs, under_way
from cluster.slurm_cluster import PACKAGES, SlurmCluster, missing_programs

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SECONDS = 1800  # for a sweep

# Slurm lets a run that it puts into the queue again go on for some seconds before it kills it.
STEPS = {"ray": 10_000, "slurm": 40_000}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cluster", choices=("ray", "slurm"))
    parser.add_argument("--steps", type=int, help="updates of a run: long enough to be disturbed in its middle")
    parser.add_argument("--folder", type=Path, help="where the sweeps are written, and kept")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="sweeps-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"the sweeps are in {folder}", flush=True)
    wrong = (on_ray if options.cluster == "ray" else on_slurm)(
        folder.absolute(), options.steps or STEPS[options.cluster]
    )
    print("\n".join(f"WRONG: {what}" for what in wrong) or "all results are equal, bit for bit")
    if not wrong and options.folder is None:
        shutil.rmtree(folder)
    return bool(wrong)


def on_ray(folder: Path, steps: int) -> list[str]:
    """12 runs one by one, on one and on two workers, and on two of which one is killed and one cut off."""
    grid = ("train.seed=range(6)", "algorithm.expectile=0.7,0.9")
    seconds = {"one by one": _one_by_one(folder / "straight", *grid, steps=steps)}
    wrong = faults_of_table(folder / "straight", 12)
    for name, workers, trouble in (
        ("1 worker", 1, None),
        ("2 workers", 2, None),
        ("2 workers, one killed, one cut off", 2, _lose_nodes),
    ):
        found = folder / name.replace(", ", "-").replace(" ", "-")
        with RayCluster(workers) as cluster:
            address = f"hydra.launcher.ray.init.address={cluster.address}"
            start = time.monotonic()
            with _started(found, cluster.start, *grid, "hydra/launcher=ray", address, steps=steps) as sweep:
                if trouble is not None:
                    wrong += trouble(cluster, found, sweep)
                status = sweep.wait(SECONDS)
            seconds[name] = time.monotonic() - start
        wrong += _judged(name, folder / "straight", found, 12, status)
        print(f"{name}: {seconds[name]:.0f} s", flush=True)
    print("\nwall time of 12 runs, s:")
    for name, one in seconds.items():
        print(f"  {name}: {one:.0f}")
    return wrong


def on_slurm(folder: Path, steps: int) -> list[str]:
    """6 runs; one is put into the queue again, two are pre-empted by an urgent job."""
    if not _installed():
        return ["Slurm is not there"]
    _one_by_one(folder / "straight", "train.seed=range(6)", steps=steps)
    wrong, found = faults_of_table(folder / "straight", 6), folder / "slurm"
    launcher = ("hydra/launcher=submitit_slurm", "hydra.launcher.partition=runs", "hydra.launcher.cpus_per_task=1")
    with SlurmCluster() as slurm:

        def start(line: list[str], **options: Any) -> subprocess.Popen[str]:
            return subprocess.Popen(line, env={**slurm.environment, "OMP_NUM_THREADS": "1"}, text=True, **options)

        begun = time.monotonic()
        with _started(found, start, "train.seed=range(6)", *launcher, steps=steps) as sweep:
            wrong += _disturb(slurm, found, sweep)
            status = sweep.wait(SECONDS)
        print(f"6 runs on 2 CPUs of Slurm: {time.monotonic() - begun:.0f} s", flush=True)
    return wrong + _judged("slurm", folder / "straight", found, 6, status)


def _one_by_one(folder: Path, *options: str, steps: int) -> float:
    start = time.monotonic()
    with _log(folder).open("w") as log:
        line = command(folder, *options, steps=steps)
        subprocess.run(line, env=ENVIRONMENT, stdout=log, stderr=log, check=True, timeout=SECONDS)
    print(f"one by one: {time.monotonic() - start:.0f} s", flush=True)
    return time.monotonic() - start


@contextmanager
def _started(
    folder: Path, start: Callable[..., subprocess.Popen[str]], *options: str, steps: int
) -> Iterator[subprocess.Popen[str]]:
    with _log(folder).open("w") as log:
        sweep = start(command(folder, *options, steps=steps), stdout=log, stderr=log)
        try:
            yield sweep
        finally:
            sweep.kill()
            sweep.wait()


def _judged(name: str, straight: Path, found: Path, count: int, status: int) -> list[str]:
    wrong = [] if status == 0 else [f"the sweep ended with status {status}; see {_log(found)}"]
    wrong += faults_of_table(found, count) + differences(straight, found, count)
    return [f"{name}: {what}" for what in wrong]


def _lose_nodes(cluster: RayCluster, folder: Path, sweep: subprocess.Popen[str]) -> list[str]:
    """Kill the first worker in the middle of a run, bring it back, and cut the second off in the middle of another."""
    wrong = []
    killed = _wait_for_job(folder, lambda: cluster.processes(0), sweep)
    ended = cluster.kill(0)
    print(f"job {killed}: its node killed ({len(ended)} processes)", flush=True)
    cluster.restart(0)
    # When none is left to begin, so that another node takes a job that the one that is cut off still runs.
    cut = _wait_for_job(folder, lambda: cluster.processes(1) if len(jobs(folder)) == 12 else {}, sweep)
    process = jobs(folder)[cut]["process"]
    if not can_make_namespaces():
        return [*wrong, "no node was cut off: that needs root, network namespaces and the program ip"]
    cluster.cut_off(1)
    start = time.monotonic()
    while process in cluster.processes(1):
        if time.monotonic() - start > 120:
            wrong.append(f"job {cut} still runs on the node that was cut off")
            break
        time.sleep(0.2)
    print(f"job {cut}: its node cut off; it ended {time.monotonic() - start:.0f} s later", flush=True)
    sweep.wait(SECONDS)
    if jobs(folder)[cut]["process"] == process:
        wrong.append(f"job {cut}, whose node was cut off, was not taken over by another node")
    output = _log(folder).read_text()
    if _not_resumed({cut}, folder, output):  # which needs longer runs, or a faster end of the node
        print(f"job {cut} had ended on the node that was cut off, and was found finished by the other")
    return wrong + _not_resumed({killed}, folder, output)


def _disturb(slurm: SlurmCluster, folder: Path, sweep: subprocess.Popen[str]) -> list[str]:
    """Put one job into the queue again by hand; then have an urgent job take both CPUs."""
    running = [None, None]
    running[0] = _wait_for_job(folder, lambda: _processes(folder), sweep)
    array = next(job for job in slurm.jobs() if "_" in job).partition("_")[0]
    slurm.call("scontrol", "requeue", f"{array}_{running[0]}")
    print(f"job {running[0]}: put into the queue again", flush=True)
    running[1] = _wait_for_job(folder, lambda: _processes(folder) - {jobs(folder)[running[0]]["process"]}, sweep)
    slurm.call("sbatch", "--partition=urgent", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 5")
    print(f"job {running[1]}, and what ran beside it: pre-empted", flush=True)
    while sweep.poll() is None:  # Slurm waits for two minutes before it starts again what was put into the queue again
        for job, state in slurm.jobs().items():
            if state == "PENDING":
                slurm.start_now(job)
        time.sleep(1)
    output = "".join(path.read_text() for path in (folder / ".submitit").glob("*/*_log.out"))
    wrong = _not_resumed(set(running), folder, output)
    return wrong + [
        f"no run said that it saved at {name}" for name in ("SIGTERM", "SIGUSR2") if f"{name}: saved" not in output
    ]


def _not_resumed(numbers: set[int], folder: Path, output: str) -> list[str]:
    return [
        f"job {number}, which was disturbed, did not go on from a checkpoint"
        for number in sorted(numbers)
        if f"resumed from {folder / str(number)}{os.sep}" not in output
    ]


def _log(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.log"


def _processes(folder: Path) -> set[int]:
    return {job["process"] for job in jobs(folder).values()}


def _wait_for_job(folder: Path, processes: Callable[[], Any], sweep: subprocess.Popen[str]) -> int:
    while (number := under_way(folder, processes())) is None:
        if sweep.poll() is not None:
            raise RuntimeError(f"the sweep ended with status {sweep.returncode} before it was disturbed")
        time.sleep(0.1)
    return number


def _installed() -> bool:
    """Whether Slurm is there, after it was installed where that can be done."""
    if missing_programs() and os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"installing {PACKAGES}", flush=True)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for line in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES.split()]):
            subprocess.run(["apt-get", "--quiet", "--quiet", *line], env=environment)
    if missing := missing_programs():
        print(f"{', '.join(missing)} not found: as root, apt-get install {PACKAGES}")
    return not missing


if __name__ == "__main__":
    sys.exit(main())
