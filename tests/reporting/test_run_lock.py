"""A run folder belongs to one live process: real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from iql_torchrl.errors import ConfigurationError
from iql_torchrl.reporting.run_lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from iql_torchrl.reporting.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of ``tmp_path / "run"`` until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_in_use_is_refused_with_the_process_that_uses_it_until_that_one_ends(holder, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ConfigurationError, match=f"run is in use by process {holder.pid} on "), RunLock(folder):
        pass
    with pytest.raises(ConfigurationError, match=r"still after 0\.3 s"), RunLock(folder, wait=0.3):
        pass
    (folder / "config.yaml").write_text("")
    holder.communicate()
    with RunLock(folder):
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_killed_process_leaves_no_lock_and_who_waits_for_it_gets_the_folder(holder, tmp_path):
    folder = tmp_path / "run"
    killing = threading.Timer(0.5, os.kill, (holder.pid, signal.SIGKILL))
    killing.start()
    with RunLock(folder, wait=60):
        killing.join()
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_folder_in_which_nothing_was_written_is_removed(tmp_path):
    with pytest.raises(KeyError), RunLock(tmp_path / "a" / "run"):
        raise KeyError
    assert list((tmp_path / "a").iterdir()) == []


def test_only_one_of_many_has_it_at_a_time(tmp_path):
    inside, most, had = [], [], []

    def work(_):
        for _ in range(20):
            with RunLock(tmp_path / "run", wait=60):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()
                had.append(1)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))  # which raises what one of them raised
    assert max(most) == 1 and len(had) == 80
    assert not (tmp_path / "run").exists()


def test_a_folder_that_its_holder_removes_while_it_is_made_is_waited_for(tmp_path):
    def work(_):
        for _ in range(3000):
            with RunLock(tmp_path / "run", wait=60):
                pass

    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # seconds: each folder is removed in the midst of others' making it
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))  # which raises the error of one that was refused
    finally:
        sys.setswitchinterval(switch_interval)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["file", "link to nothing", "link to a file"])
def test_what_stands_where_the_folder_should_be_is_named(tmp_path, kind):
    (tmp_path / "file").write_text("")
    path = tmp_path / "run"
    path.write_text("") if kind == "file" else path.symlink_to(tmp_path / ("none" if "nothing" in kind else "file"))
    with pytest.raises(ConfigurationError, match=r"run cannot be written: .*File exists"), RunLock(path, wait=60):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="file/run cannot be written"), RunLock(tmp_path / "file" / "run"):
        pass
