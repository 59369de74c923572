"""A small share of ``make cluster`` and ``make slurm``, which need more time, or root."""

import os
import signal
import subprocess
import time

import pytest
from cluster.runs import command, differences, faults_of_table, jobs, under_way

pytestmark = pytest.mark.slow
STEPS, SECONDS = 2500, 300
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Two runs, one after the other."""
    folder = tmp_path_factory.mktemp("sweeps") / "straight"
    subprocess.run(command(folder, "train.seed=1,2", steps=STEPS), env=ENVIRONMENT, check=True, timeout=SECONDS)
    return folder


def waited_for(sweep, folder, processes):
    while (number := under_way(folder, processes())) is None:
        assert sweep.poll() is None, "the sweep ended before it was disturbed"
        time.sleep(0.02)
    return number


def test_the_run_of_a_killed_worker_of_ray_ends_elsewhere_with_the_same_results(straight, tmp_path):
    pytest.importorskip("ray")
    from cluster.ray_cluster import RayCluster

    folder, log = tmp_path / "ray", tmp_path / "log"
    with RayCluster(workers=2) as cluster, log.open("w") as output:
        options = ("train.seed=1,2", "hydra/launcher=ray", f"hydra.launcher.ray.init.address={cluster.address}")
        sweep = cluster.start(command(folder, *options, steps=STEPS), stdout=output, stderr=output)
        killed = waited_for(sweep, folder, lambda: cluster.processes(0))
        cluster.kill(0)
        assert sweep.wait(SECONDS) == 0, log.read_text()[-5000:]
    assert f"resumed from {folder / str(killed)}{os.sep}" in log.read_text()
    assert faults_of_table(folder, 2) == []
    assert differences(straight, folder, 2) == []


def test_a_job_of_submitit_saves_at_its_signal_and_is_started_again(straight, tmp_path):
    pytest.importorskip("submitit")
    folder, log = tmp_path / "local", tmp_path / "log"
    with log.open("w") as output:
        line = command(folder, "train.seed=1,2", "hydra/launcher=submitit_local", steps=STEPS)
        sweep = subprocess.Popen(line, env=ENVIRONMENT, stdout=output, stderr=output)
        number = waited_for(sweep, folder, lambda: {job["process"] for job in jobs(folder).values()})
        os.kill(jobs(folder)[number]["process"], signal.SIGUSR2)
        assert sweep.wait(SECONDS) == 0, log.read_text()[-5000:]
    said = "".join(path.read_text() for path in (folder / ".submitit").glob("*/*.out"))
    assert f"SIGUSR2: saved {folder / str(number)}{os.sep}" in said
    assert f"resumed from {folder / str(number)}{os.sep}" in said
    assert faults_of_table(folder, 2) == []
    assert differences(straight, folder, 2) == []
