"""The cache of the d4rl source: its record, its repair, and who may use it at once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from filelock import FileLock

from iql_torchrl import load_transitions
from iql_torchrl.data.sources import d4rl
from iql_torchrl.data.transitions import fingerprint
from iql_torchrl.errors import DatasetError

NAME = "hopper-medium-v2"
RECORD = "iql_torchrl.json"


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def d4rl_file(log_arrays, write_log):
    def write(seed=0, rows=40, **attributes):
        arrays = log_arrays(rows, seed=seed, terminals=[6, 24], timeouts=[13, 30])
        return write_log(arrays, f"{seed}.hdf5", **attributes)

    return write


def load(root, path=None, name=NAME, **options):
    url = path if path is None or isinstance(path, str) else path.as_uri()
    return load_transitions("d4rl", name=name, root=root, url=url, **options)


def content(folder):
    """Every file below a folder with its bytes, and every folder; locks apart."""
    found = {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}
    return {path: data for path, data in found.items() if path.suffix != ".lock"}


def in_root(root):
    return sorted(path.name for path in root.iterdir())


def record_of(root):
    return json.loads((root / NAME / RECORD).read_text())


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip(file, at=0.5):
    """Change one byte of a file."""
    data = bytearray(file.read_bytes())
    data[int(len(data) * at)] ^= 0x40
    file.write_bytes(data)


# ---- the record


def test_the_record_has_the_size_and_the_sum_of_the_file_and_its_address(d4rl_file, root):
    path = d4rl_file()
    load(root, path)
    record = record_of(root)
    assert record["file"] == {"size": path.stat().st_size, "sha256": sha256(path)}
    assert record["url"] == path.as_uri()
    assert record["keys"] == ["actions", "observations", "rewards", "terminals", "timeouts"]


def test_the_lock_is_the_only_other_thing_in_the_root(d4rl_file, root):
    load(root, d4rl_file())
    load(root, d4rl_file(), rebuild=True)
    assert in_root(root) == [f".{NAME}.lock", NAME]


# ---- repair


@pytest.mark.parametrize(
    "file", ["observation", "action", "next/reward", "info/terminals", "info/timeouts"], ids=lambda file: file
)
def test_a_flipped_byte_is_found_and_a_rebuild_repairs_it(file, d4rl_file, root, assert_transitions_equal):
    expected = load(root, d4rl_file()).clone()
    flip(root / NAME / f"{file}.memmap", 0.25)
    for download in (True, False):
        with pytest.raises(DatasetError, match=rf"{re.escape(str(root / NAME))} .*dataset\.rebuild=true"):
            load(root, d4rl_file(), download=download)
    assert_transitions_equal(load(root, d4rl_file(), rebuild=True), expected)
    assert_transitions_equal(load(root, download=False), expected)


DAMAGES = {
    "nothing": lambda folder: None,
    "no record": lambda folder: (folder / RECORD).unlink(),
    "an empty record": lambda folder: (folder / RECORD).write_text(""),
    "a record of nothing": lambda folder: (folder / RECORD).write_text("null"),
    "no description": lambda folder: (folder / "meta.json").unlink(),
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "a file in its place": lambda folder: (shutil.rmtree(folder), folder.write_text("not a dataset")),
    "gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_rebuild_gives_the_transitions_whatever_was_there(damage, d4rl_file, root, assert_transitions_equal):
    expected = load(root, d4rl_file()).clone()
    DAMAGES[damage](root / NAME)
    assert_transitions_equal(load(root, d4rl_file(), rebuild=True), expected)
    assert_transitions_equal(load(root, download=False), expected)
    assert in_root(root) == [f".{NAME}.lock", NAME]


def test_a_rebuild_with_another_file_is_refused_with_both_sums_and_the_old_cache_stays(
    d4rl_file, root, assert_transitions_equal
):
    first, second = d4rl_file(), d4rl_file(seed=1)
    expected = load(root, first).clone()
    before = content(root)
    with pytest.raises(DatasetError, match=re.escape(str(root / NAME))) as error:
        load(root, second, rebuild=True)
    assert sha256(first) in str(error.value) and sha256(second) in str(error.value)
    assert second.as_uri() in str(error.value)
    assert content(root) == before
    assert_transitions_equal(load(root, download=False), expected)


def test_a_file_with_the_same_rows_and_other_bytes_is_another_file(d4rl_file, root):
    load(root, d4rl_file())
    with pytest.raises(DatasetError, match="another file"):
        load(root, d4rl_file(env_id="Hopper-v2"), rebuild=True)


def test_another_file_is_used_once_the_folder_is_deleted(d4rl_file, root):
    first = fingerprint(load(root, d4rl_file()))
    shutil.rmtree(root / NAME)
    assert fingerprint(load(root, d4rl_file(seed=1))) != first
    assert record_of(root)["file"]["sha256"] == sha256(d4rl_file(seed=1))


def test_a_rebuild_from_another_address_of_the_same_file_is_accepted(d4rl_file, root, tmp_path):
    first = fingerprint(load(root, d4rl_file()))
    mirror = shutil.copy(d4rl_file(), tmp_path / "mirror.hdf5")
    assert fingerprint(load(root, Path(mirror), rebuild=True)) == first
    assert record_of(root)["url"] == Path(mirror).as_uri()


@pytest.mark.parametrize("cached", [False, True])
def test_a_rebuild_without_download_is_refused(cached, d4rl_file, root):
    if cached:
        load(root, d4rl_file())
    before = content(root)
    with pytest.raises(DatasetError, match=r"dataset\.rebuild=true.*dataset\.download=true"):
        load(root, d4rl_file(), rebuild=True, download=False)
    assert content(root) == before


@pytest.mark.parametrize("source", ["no file", "not HDF5", "bad content"])
def test_a_rebuild_that_fails_leaves_the_cache_as_it_was(source, d4rl_file, root, tmp_path, write_log, log_arrays):
    load(root, d4rl_file())
    before = content(root)
    if source == "not HDF5":
        (tmp_path / "source").write_bytes(b"<html>")
    elif source == "bad content":
        write_log({"observations": log_arrays()["observations"]}, "source")
    with pytest.raises(DatasetError, match=re.escape((tmp_path / "source").as_uri())):
        load(root, tmp_path / "source", rebuild=True)
    assert content(root) == before


def test_a_conversion_that_fails_in_torchrl_leaves_the_cache_as_it_was(d4rl_file, root, monkeypatch):
    load(root, d4rl_file())
    before = content(root)

    def fail(*_, **__):
        raise RuntimeError("no conversion")

    with monkeypatch.context() as patched:
        patched.setattr("torchrl.data.datasets.D4RLExperienceReplay", fail)
        with pytest.raises(RuntimeError, match="no conversion"):
            load(root, d4rl_file(), rebuild=True)
    assert content(root) == before


def test_a_last_rename_that_fails_leaves_the_cache_as_it_was(d4rl_file, root, monkeypatch):
    load(root, d4rl_file())
    before = content(root)
    real = os.replace

    def replace(source, target):
        if Path(target) == root / NAME:
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(d4rl.os, "replace", replace)
        with pytest.raises(DatasetError, match="cannot be written"):
            load(root, d4rl_file(), rebuild=True)
    assert content(root) == before


# ---- folders that cannot be written


@contextmanager
def bound_by_permissions(folder, mode):
    """Permission bits bind root as nobody else: as another user, in a folder of that mode."""
    before, user = folder.stat().st_mode, os.geteuid()
    folder.chmod(mode)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(before)


@pytest.fixture
def open_root():
    """A folder that every user can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder / "cache"
    shutil.rmtree(folder)


def test_a_root_below_a_file_is_named_with_what_to_do(d4rl_file, tmp_path):
    (tmp_path / "taken").write_text("a file")
    root = tmp_path / "taken" / "cache"
    with pytest.raises(DatasetError, match=rf"{re.escape(str(root))} .*dataset\.root"):
        load(root, d4rl_file())


def test_a_root_that_may_not_be_written_is_named_with_what_to_do(d4rl_file, open_root):
    load(open_root, d4rl_file(), "walker2d-medium-v2")
    url = d4rl_file()
    with (
        bound_by_permissions(open_root, 0o555),
        pytest.raises(DatasetError, match=rf"{re.escape(str(open_root))} .*dataset\.root"),
    ):
        load(open_root, url)


@pytest.mark.parametrize("download", [True, False])
def test_a_cached_dataset_loads_without_the_lock_from_a_root_that_may_not_be_written(
    download, d4rl_file, open_root, assert_transitions_equal
):
    expected = load(open_root, d4rl_file()).clone()
    (open_root / f".{NAME}.lock").unlink(missing_ok=True)
    for file in (open_root / NAME).rglob("*"):
        file.chmod(0o555 if file.is_dir() else 0o666)
    with bound_by_permissions(open_root, 0o555):
        found = load(open_root, download=download)
    assert_transitions_equal(found, expected)
    assert in_root(open_root) == [NAME]


def test_a_cache_whose_files_may_not_be_written_is_not_called_damaged(d4rl_file, open_root):
    load(open_root, d4rl_file())
    for file in (open_root / NAME).rglob("*"):
        file.chmod(0o555 if file.is_dir() else 0o444)
    with (
        bound_by_permissions(open_root, 0o555),
        pytest.raises(DatasetError, match=rf"{re.escape(str(open_root / NAME))} must be writable.*dataset\.root"),
    ):
        load(open_root, download=False)


def test_a_cached_dataset_loads_while_another_process_has_the_lock(d4rl_file, root, assert_transitions_equal):
    expected = load(root, d4rl_file()).clone()
    with FileLock(root / f".{NAME}.lock"):
        assert_transitions_equal(load(root), expected)


def test_a_load_does_not_change_the_cache(d4rl_file, root):
    load(root, d4rl_file())
    before = content(root)
    transitions = load(root)
    transitions["observation"].zero_()
    transitions["next", "reward"].zero_()
    assert content(root) == before
    assert load(root)["observation"].any()


# ---- several processes

LOAD = """
import sys
from iql_torchrl.data.transitions import fingerprint
from iql_torchrl import load_transitions

print("ready", flush=True)
sys.stdin.readline()
print("fingerprint", fingerprint(load_transitions("d4rl", name=sys.argv[3], root=sys.argv[1], url=sys.argv[2])))
"""
KILLED = """
import os, signal, sys
from torchrl.data import datasets
from iql_torchrl.data.sources import d4rl
from iql_torchrl import load_transitions

root, url, name, where, rebuild = sys.argv[1:]

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

if where == "moved":  # the file has arrived, nothing is converted
    d4rl._prepare = lambda *_: kill()
elif where == "converted":  # all but the record is there
    real = datasets.D4RLExperienceReplay
    datasets.D4RLExperienceReplay = lambda *arguments, **options: (real(*arguments, **options), kill())
else:  # all is there, under another name
    replace = os.replace
    d4rl.os.replace = lambda source, target: kill() if str(target) == f"{root}/{name}" else replace(source, target)
load_transitions("d4rl", name=name, root=root, url=url, rebuild=rebuild == "rebuild")
"""


def start(script, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def slow_site():
    """Serves one body, slowly; the requests it got."""
    requests, body = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body[0])))
            self.end_headers()
            half = len(body[0]) // 2
            self.wfile.write(body[0][:half])
            time.sleep(2)
            self.wfile.write(body[0][half:])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def serve(data):
        body[:] = [data]
        return f"http://127.0.0.1:{server.server_port}/file.hdf5", requests

    yield serve
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.slow
def test_processes_that_fill_one_cache_at_once_share_one_download(d4rl_file, root, slow_site):
    url, requests = slow_site(d4rl_file().read_bytes())
    processes = [start(LOAD, root, url, NAME) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    found = [re.search(r"^fingerprint (\w+)$", out, re.MULTILINE)[1] for out, _ in outputs]
    assert requests == ["/file.hdf5"]
    assert found == [fingerprint(load(root, download=False))] * 2
    notes = [f"another process is fetching {NAME}; waiting for it" in out + error for out, error in outputs]
    assert sorted(notes) == [False, True]
    assert in_root(root) == [f".{NAME}.lock", NAME]


@pytest.mark.slow
@pytest.mark.parametrize("rebuild", ["", "rebuild"], ids=["first", "rebuild"])
@pytest.mark.parametrize("where", ["moved", "converted", "named"])
def test_a_process_killed_in_the_conversion_leaves_a_cache_that_the_next_load_fills(
    where, rebuild, d4rl_file, root, log_arrays, qlearning_dataset, assert_transitions_equal
):
    path = d4rl_file()
    expected = qlearning_dataset(log_arrays(terminals=[6, 24], timeouts=[13, 30]))
    load(root, path, "walker2d-medium-v2")
    if rebuild:
        load(root, path)
    process = start(KILLED, root, path.as_uri(), NAME, where, rebuild)
    _, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, error
    assert [file.name for file in root.glob(f".{NAME}-*")], "the killed process left nothing"
    if rebuild:
        if where != "named":
            assert_transitions_equal(load(root, download=False), expected)
        load(root, path, rebuild=True)
    assert_transitions_equal(load(root, path), expected)
    assert list(root.glob(f".{NAME}-*")) == []
    assert_transitions_equal(load(root, name="walker2d-medium-v2", download=False), expected)


def test_what_a_killed_process_left_of_another_dataset_is_not_touched(d4rl_file, root):
    stale = root / ".hopper-medium-v1-abc"
    stale.mkdir(parents=True)
    (root / f".{NAME}-abc" / "deep").mkdir(parents=True)
    load(root, d4rl_file())
    assert in_root(root) == [stale.name, f".{NAME}.lock", NAME]
