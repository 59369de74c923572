"""Minari's downloads, by its own client, from a server on the loopback interface that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

import gymnasium
import pytest
from recordings import record

from iql_torchrl import load_transitions
from iql_torchrl.data.transitions import fingerprint

pytestmark = pytest.mark.slow
NAME = "tests/pendulum-v0"
LOAD = """
import sys
from iql_torchrl.data.transitions import fingerprint
from iql_torchrl import load_transitions
from iql_torchrl.errors import DatasetError

try:
    print(fingerprint(load_transitions("minari", name=sys.argv[1], root=sys.argv[2])))
except DatasetError as error:
    sys.exit(f"DatasetError: {error}")
"""


class Hub:
    """The parts of the hub's interface that Minari's client uses, over a folder of datasets."""

    def __init__(self, folder):
        self.folder = folder
        self.sent = []  # files whose content was asked for
        self.pause = 0.0  # seconds between the kilobytes of the data
        self.status = None  # of every answer, where set
        self.extra = []  # names of further files, which are listed and served
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                try:
                    hub.answer(self)
                except OSError:
                    self.close_connection = True  # the client is gone

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def answer(self, handler):
        parts = urlparse(handler.path).path.strip("/").split("/")
        if self.status is not None:
            return self.reply(handler, b"", self.status)
        if parts == ["api", "datasets"]:
            return self.reply(
                handler, json.dumps([{"id": f"farama-minari/{path.name}"} for path in self.folder.iterdir()])
            )
        if parts[:2] == ["api", "datasets"]:
            base = self.folder / parts[3]
            files = sorted(path for path in base.rglob("*") if path.is_file())
            if "tree" in parts:
                entries = [
                    {
                        "type": "file",
                        "path": str(path.relative_to(base)),
                        "size": path.stat().st_size,
                        "oid": digest(path),
                    }
                    for path in files
                ]
                entries += [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.extra]
                return self.reply(handler, json.dumps(entries))
            names = [{"rfilename": str(path.relative_to(base))} for path in files]
            names += [{"rfilename": name} for name in self.extra]
            return self.reply(handler, json.dumps({"id": "/".join(parts[2:4]), "sha": "a" * 40, "siblings": names}))
        path = self.folder.joinpath(parts[2], *parts[5:])
        if any(handler.path.endswith(name.rpartition("/")[2]) for name in self.extra):
            return self.reply(handler, b"x", **{"ETag": '"x"', "X-Repo-Commit": "a" * 40})
        if not path.is_file():
            return self.reply(handler, b"", 404, **{"X-Error-Code": "EntryNotFound"})
        if handler.command == "GET":
            self.sent.append(path.name)
        pause = self.pause if path.name == "main_data.hdf5" else 0
        self.reply(handler, path.read_bytes(), pause=pause, **{"ETag": f'"{digest(path)}"', "X-Repo-Commit": "a" * 40})

    def reply(self, handler, body, status=200, pause=0.0, **headers):
        body = body.encode() if isinstance(body, str) else body
        handler.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command == "GET":
            for start in range(0, len(body), 1024):
                handler.wfile.write(body[start : start + 1024])
                time.sleep(pause)

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def digest(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with a dataset that Minari recorded."""
    folder = tmp_path_factory.mktemp("recorded")
    record(NAME, gymnasium.make("Pendulum-v1", max_episode_steps=30), folder, episodes=3)
    return folder


@pytest.fixture
def hub(recorded, tmp_path):
    shutil.copytree(recorded, tmp_path / "served")
    listed = {"description": "", "datasets": [NAME], "namespaces": []}
    (tmp_path / "served" / "tests" / "namespace_metadata.json").write_text(json.dumps(listed))
    hub = Hub(tmp_path / "served")
    yield hub
    hub.close()


@pytest.fixture
def start(hub, tmp_path):
    """Start a process that loads the dataset into a folder, downloading it from the hub."""

    def start(root, name=NAME):
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "no_proxy": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", LOAD, name, str(root)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def finish(process):
    out, error = process.communicate(timeout=120)
    return process.returncode, out.strip().splitlines(), error


@pytest.fixture
def expected(recorded):
    return fingerprint(load_transitions("minari", name=NAME, root=recorded, download=False))


def test_a_dataset_is_downloaded_once_and_is_the_recorded_one(hub, start, expected, tmp_path):
    code, out, error = finish(start(tmp_path / "root"))
    assert code == 0 and out[-1] == expected, error
    assert hub.sent.count("main_data.hdf5") == 1
    before = len(hub.sent)
    code, out, error = finish(start(tmp_path / "root"))
    assert code == 0 and out[-1] == expected and len(hub.sent) == before, error
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == [".tests.pendulum-v0.lock", "tests"]


def test_two_processes_share_one_download(hub, start, expected, tmp_path):
    hub.pause = 0.02
    processes = [start(tmp_path / "root") for _ in range(2)]
    for code, out, error in map(finish, processes):
        assert code == 0 and out[-1] == expected, error
    assert hub.sent.count("main_data.hdf5") == 1


def test_a_download_that_was_killed_is_finished_by_the_next_one(hub, start, expected, tmp_path):
    hub.pause = 0.2
    process = start(tmp_path / "root")
    limit = time.monotonic() + 60
    while "main_data.hdf5" not in hub.sent:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    while not (tmp_path / "root" / NAME / "data").exists():  # with the metadata, and no data yet
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert not (tmp_path / "root" / NAME / "data" / "main_data.hdf5").exists()
    hub.pause = 0.0
    code, out, error = finish(start(tmp_path / "root"))
    assert code == 0 and out[-1] == expected, error
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == [".tests.pendulum-v0.lock", "tests"]


@pytest.mark.parametrize("status", [404, 500])
def test_a_hub_that_fails_is_named_with_what_to_do_and_leaves_nothing(status, hub, start, tmp_path):
    hub.status = status
    code, _, error = finish(start(tmp_path / "root"))
    assert code == 1 and f"DatasetError: Minari dataset {NAME} could not be downloaded" in error
    assert "dataset.root=FOLDER" in error and "Traceback" not in error
    assert [path.name for path in (tmp_path / "root").iterdir()] == [".tests.pendulum-v0.lock"]


def test_a_dataset_that_the_hub_does_not_have_is_named(hub, start, tmp_path):
    code, _, error = finish(start(tmp_path / "root", "tests/acrobot-v0"))
    assert code == 1 and "Minari dataset tests/acrobot-v0 could not be downloaded" in error
    assert "tests/acrobot" in error.split("could not be downloaded")[1]


@pytest.mark.parametrize("name", ["pendulum-v0/../../../../escaped.txt", "pendulum-v0/..\\..\\..\\escaped.txt"])
def test_a_hub_cannot_write_outside_the_folder_of_datasets(name, hub, start, tmp_path):
    hub.extra = [name]
    code, _, error = finish(start(tmp_path / "one" / "two" / "root"))
    assert code == 1 and f"DatasetError: Minari dataset {NAME} could not be downloaded" in error
    assert [path for path in tmp_path.rglob("*") if "escaped" in path.name] == []
