"""The d4rl source: files from an address, and the cache that they leave."""

from __future__ import annotations

import copy
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import h5py
import numpy as np
import pytest
from torchrl.data.datasets.d4rl_infos import D4RL_DATASETS

from iql_torchrl import load_transitions
from iql_torchrl.data import download
from iql_torchrl.errors import DatasetError

NAME = "hopper-medium-v2"
INFOS = {"infos/qpos": np.zeros((40, 6)), "infos/action_log_probs": np.zeros(40, np.float32)}
# Strings and nothing else, with a network below them, as in the v2 files.
METADATA = {
    "metadata/algorithm": "SAC",
    "metadata/iteration": "1000000",
    "metadata/policy/nonlinearity": "relu",
    "metadata/policy/output_distribution": "tanh_gaussian",
}


class Site:
    """A web site on the loopback interface that counts its requests."""

    def __init__(self):
        self.requests = []
        self.replies = {}
        self.patience = 0.0  # seconds before it answers, unless it closes earlier
        self.closing = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.requests.append(self.path)
                site.closing.wait(site.patience)
                status, body, headers = site.replies.get(self.path, (404, b"not here", {}))
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    if value is not None:
                        self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def serve(self, body, *, path="/file.hdf5", status=200, **headers):
        self.replies[path] = (status, body, headers)
        return self.address(path)

    def address(self, path):
        return f"http://127.0.0.1:{self.server.server_port}{path}"

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def site():
    site = Site()
    yield site
    site.close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "BACK_OFF", 0.001)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def d4rl_file(log_arrays, write_log):
    """A file as D4RL's: infos, metadata of strings, terminals and timeouts in the middle, an episode cut at the end."""

    def write(arrays=None, name="d4rl.hdf5"):
        arrays = log_arrays(terminals=[6, 24], timeouts=[13, 14, 30]) if arrays is None else arrays
        return write_log({**arrays, **INFOS, **METADATA}, name)

    return write


def load(root, url=None, name=NAME, **options):
    return load_transitions("d4rl", name=name, root=root, url=url, **options)


def datasets(root):
    """What is in a cache, the files of locks apart."""
    return sorted(name for name in os.listdir(root) if not name.endswith(".lock"))


def content(folder):
    """Every file below a folder with its bytes, and every folder."""
    found = {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}
    return {path: bytes for path, bytes in found.items() if path.suffix != ".lock"}


# ---- content


def test_a_served_file_gives_the_transitions_of_the_rule(
    log_arrays, d4rl_file, site, root, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(terminals=[6, 24], timeouts=[13, 14, 30])
    transitions = load(root, site.serve(d4rl_file(arrays).read_bytes()))
    assert_transitions_equal(transitions, qlearning_dataset(arrays))
    # TorchRL's conversion zeroes these.
    before_timeout = transitions["next", "observation"][
        transitions["observation"][:, 0] == arrays["observations"][12, 0]
    ]
    assert before_timeout.numpy().tolist() == [arrays["observations"][13].tolist()]


@pytest.mark.parametrize("seed", range(6))
def test_a_file_gives_the_same_transitions_through_d4rl_and_through_hdf5(
    seed, log_arrays, d4rl_file, root, assert_transitions_equal
):
    random = np.random.default_rng(seed)
    terminals, timeouts = (np.flatnonzero(random.random(40) < 0.15) for _ in range(2))
    terminals = terminals[terminals < 38]
    path = d4rl_file(log_arrays(seed=seed, terminals=terminals, timeouts=timeouts))
    assert_transitions_equal(load(root, path.as_uri()), load_transitions("hdf5", path=path))


@pytest.mark.parametrize("with_next", [False, True])
def test_a_terminal_on_the_last_row_but_one_is_followed_by_the_last_row(
    with_next, log_arrays, with_next_observations, d4rl_file, root, assert_transitions_equal
):
    arrays = log_arrays(terminals=[38])
    path = d4rl_file(with_next_observations(arrays) if with_next else arrays)
    assert_transitions_equal(load(root, path.as_uri()), load_transitions("hdf5", path=path))


def test_next_observations_in_the_file_change_nothing_by_default(
    log_arrays, with_next_observations, d4rl_file, root, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(terminals=[6, 24], timeouts=[13, 30])
    transitions = load(root, d4rl_file(with_next_observations(arrays)).as_uri())
    assert_transitions_equal(transitions, qlearning_dataset(arrays))


def test_next_observations_that_disagree_with_the_following_rows_change_nothing_by_default(
    log_arrays, d4rl_file, root, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(terminals=[6, 24], timeouts=[13, 30])
    noise = log_arrays(seed=1)["observations"]
    transitions = load(root, d4rl_file({**arrays, "next_observations": noise}).as_uri())
    assert_transitions_equal(transitions, qlearning_dataset(arrays))


@pytest.mark.parametrize("name", ["hopper-medium-v0", "halfcheetah-random-v0", "walker2d-expert-v0", "ant-medium-v0"])
def test_without_timeouts_locomotion_episodes_end_at_their_thousandth_step(
    name, log_arrays, write_log, root, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(3500, terminals=[400, 2399], timeouts=None)
    transitions = load(root, write_log(arrays).as_uri(), name)
    assert len(transitions) == 3500 - 4 and transitions["episode"].unique().numel() == 5
    assert_transitions_equal(transitions, qlearning_dataset(arrays, 1000, count_after_terminal=1))


def test_keep_timeouts_equals_the_hdf5_source_where_the_file_has_next_observations(
    log_arrays, with_next_observations, d4rl_file, root, assert_transitions_equal
):
    path = d4rl_file(with_next_observations(log_arrays(terminals=[6, 24], timeouts=[13, 14, 30])))
    expected = load_transitions("hdf5", path=path, keep_timeouts=True)
    assert_transitions_equal(load(root, path.as_uri(), keep_timeouts=True), expected)


@pytest.mark.parametrize(
    "timeouts", [(), None, [24], range(40)], ids=["none set", "no such array", "at a terminal", "in every row"]
)
def test_keep_timeouts_accepts_next_observations_whatever_the_timeouts(
    timeouts, log_arrays, with_next_observations, d4rl_file, root, assert_transitions_equal
):
    path = d4rl_file(with_next_observations(log_arrays(terminals=[6, 24], timeouts=timeouts)))
    expected = load_transitions("hdf5", path=path, keep_timeouts=True)
    assert_transitions_equal(load(root, path.as_uri(), keep_timeouts=True), expected)


def test_keep_timeouts_without_next_observations_is_refused(d4rl_file, root):
    with pytest.raises(DatasetError, match="next_observations") as error:
        load(root, d4rl_file().as_uri(), keep_timeouts=True)
    assert NAME in str(error.value) and "dataset.keep_timeouts" in str(error.value)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_flags_may_be_stored_as_numbers(
    dtype, log_arrays, d4rl_file, root, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(terminals=[6, 24], timeouts=[13, 30])
    stored = {key: value.astype(dtype) if value.dtype == bool else value for key, value in arrays.items()}
    assert_transitions_equal(load(root, d4rl_file(stored).as_uri()), qlearning_dataset(arrays))


@pytest.mark.parametrize("key", ["rewards", "terminals", "timeouts"])
def test_a_column_of_shape_rows_by_one_reads_like_a_flat_one(
    key, log_arrays, d4rl_file, root, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(terminals=[6, 24], timeouts=[13, 30])
    path = d4rl_file({**arrays, key: arrays[key][:, None]})
    assert_transitions_equal(load(root, path.as_uri()), qlearning_dataset(arrays))


# ---- the cache


def test_the_second_load_reads_the_cache_and_asks_nobody(d4rl_file, site, root, assert_transitions_equal):
    url = site.serve(d4rl_file().read_bytes())
    first = load(root, url)
    assert len(site.requests) == 1
    assert_transitions_equal(load(root, url), first)
    assert_transitions_equal(load(root, url, download=False), first)
    assert len(site.requests) == 1


def test_a_cached_dataset_keeps_its_next_observations(
    log_arrays, with_next_observations, d4rl_file, root, assert_transitions_equal
):
    url = d4rl_file(with_next_observations(log_arrays(terminals=[6], timeouts=[13, 30]))).as_uri()
    first = load(root, url, keep_timeouts=True)
    assert_transitions_equal(load(root, keep_timeouts=True, download=False), first)
    assert len(load(root, download=False)) < len(first)


def test_datasets_of_different_names_do_not_share_a_cache(
    log_arrays, d4rl_file, root, qlearning_dataset, assert_transitions_equal
):
    hopper, walker = log_arrays(seed=1), log_arrays(seed=2)
    load(root, d4rl_file(hopper, "hopper.hdf5").as_uri())
    load(root, d4rl_file(walker, "walker.hdf5").as_uri(), "walker2d-medium-v2")
    assert_transitions_equal(load(root, download=False), qlearning_dataset(hopper))
    assert_transitions_equal(load(root, name="walker2d-medium-v2", download=False), qlearning_dataset(walker))


def test_the_cache_holds_the_dataset_and_no_leftovers(d4rl_file, root):
    load(root, d4rl_file().as_uri())
    assert datasets(root) == [NAME]


INTERRUPTED = """
import os, signal, sys, threading
from pathlib import Path
from iql_torchrl.data import download
from iql_torchrl import load_transitions

root, url = Path(sys.argv[1]), sys.argv[2]

def kill_in_the_middle_of_the_conversion():
    while not any(root.rglob("*.memmap")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill_in_the_middle_of_the_conversion, daemon=True).start()
load_transitions("d4rl", name=sys.argv[3], root=root, url=url)
"""


@pytest.mark.slow
def test_a_conversion_that_was_killed_does_not_count_as_finished(
    log_arrays, write_log, root, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(200_000, observation_dim=30, terminals=range(50, 200_000, 500))
    path = write_log(arrays)
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, root, path.as_uri(), NAME], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert_transitions_equal(load(root, path.as_uri()), qlearning_dataset(arrays))


def test_the_cache_is_in_the_home_folder_by_default(d4rl_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    load(None, d4rl_file().as_uri())
    assert datasets(tmp_path / ".cache/iql_torchrl/d4rl") == [NAME]


def test_the_cache_may_be_given_by_a_relative_path(d4rl_file, tmp_path, monkeypatch, assert_transitions_equal):
    monkeypatch.chdir(tmp_path)
    first = load("here/cache", d4rl_file().as_uri())
    assert datasets(tmp_path / "here/cache") == [NAME]
    assert_transitions_equal(load("here/cache", download=False), first)


def test_the_address_is_that_of_torchrls_table_unless_one_is_given(d4rl_file, site, root, monkeypatch):
    monkeypatch.setitem(D4RL_DATASETS, NAME, site.serve(d4rl_file().read_bytes(), path="/from-the-table.hdf5"))
    load(root)
    assert site.requests == ["/from-the-table.hdf5"]


@pytest.mark.parametrize("directory", [None, "/where/the/user/keeps/them"])
@pytest.mark.parametrize("succeeds", [True, False])
def test_torchrls_table_and_the_environment_are_as_before(succeeds, directory, d4rl_file, root, monkeypatch, tmp_path):
    if directory is None:
        monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    else:
        monkeypatch.setenv("D4RL_DATASET_DIR", directory)
    table, environment = copy.deepcopy(D4RL_DATASETS), dict(os.environ)
    if succeeds:
        load(root, d4rl_file().as_uri())
    else:
        with h5py.File(tmp_path / "scalar.hdf5", "w") as file:  # passes every check before the conversion
            file.update({key: np.float32(0) for key in ("observations", "actions", "rewards", "terminals")})
        with pytest.raises(Exception):  # noqa: B017
            load(root, (tmp_path / "scalar.hdf5").as_uri())
    assert table == D4RL_DATASETS
    assert dict(os.environ) == environment


def test_a_dataset_that_is_not_cached_is_refused_without_download(root):
    with pytest.raises(DatasetError, match=f"{NAME} is not in {re.escape(str(root))}.*dataset.download=true"):
        load(root, download=False)
    assert not root.exists()


@pytest.mark.parametrize("file", ["meta.json", "next/meta.json"])
@pytest.mark.parametrize(
    "damage", [b"", b"{", b"{}", b"null", None], ids=["empty", "cut", "no entries", "null", "gone"]
)
def test_a_cache_with_damaged_descriptions_is_named_with_what_to_do(damage, file, d4rl_file, root):
    load(root, d4rl_file().as_uri())
    if damage is None:
        (root / NAME / file).unlink()
    else:
        (root / NAME / file).write_bytes(damage)
    with pytest.raises(DatasetError, match=f"{re.escape(str(root / NAME))} .*delete"):
        load(root)


def test_an_empty_cache_folder_is_named_with_what_to_do(root):
    (root / NAME).mkdir(parents=True)
    with pytest.raises(DatasetError, match=f"{re.escape(str(root / NAME))} .*delete"):
        load(root)


def changed(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x40]) + content[middle + 1 :]


DAMAGES = {
    "gone": None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "one byte changed": changed,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_of_the_cache_is_damaged_no_wrong_data_come_out_of_it(
    damage, log_arrays, with_next_observations, d4rl_file, root, tmp_path, assert_transitions_equal
):
    path = d4rl_file(with_next_observations(log_arrays(terminals=[6, 24], timeouts=[13, 30])))
    expected = load(root, path.as_uri(), keep_timeouts=True).clone()
    files = [file.relative_to(root) for file in (root / NAME).rglob("*") if file.is_file()]
    named = 0
    for number, file in enumerate(files):
        copied = tmp_path / f"copy-{number}"
        shutil.copytree(root, copied)
        if DAMAGES[damage] is None:
            (copied / file).unlink()
        else:
            (copied / file).write_bytes(DAMAGES[damage]((copied / file).read_bytes()))
        try:
            found = load(copied, download=False, keep_timeouts=True)
        except DatasetError as error:
            named += 1
            assert str(copied / NAME) in str(error) and "delete" in str(error), file
        else:  # a file that holds nothing of the transitions
            assert_transitions_equal(found, expected)
    assert named >= 5


def test_a_file_in_place_of_the_cached_folder_is_named(d4rl_file, root):
    root.mkdir()
    (root / NAME).write_text("not a dataset")
    with pytest.raises(DatasetError, match=re.escape(str(root / NAME))):
        load(root, d4rl_file().as_uri())


def test_a_root_that_cannot_be_a_folder_is_named(d4rl_file, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DatasetError, match=re.escape(str(tmp_path / "taken")) + ".*dataset.root"):
        load(tmp_path / "taken", d4rl_file().as_uri())


# ---- addresses that fail: the cache stays as it was


@pytest.fixture
def refused(site, root, d4rl_file):
    """Load from an address that must fail; earlier datasets, and the possibility of a later success, must survive."""

    def refuse(url, message):
        load(root, d4rl_file().as_uri(), "walker2d-medium-v2")
        before = content(root)
        with pytest.raises(DatasetError, match=message) as error:
            load(root, url, timeout=5.0)
        assert content(root) == before
        load(root, site.serve(d4rl_file().read_bytes(), path="/good.hdf5"))
        assert content(root).keys() > before.keys()
        return str(error.value)

    return refuse


def hints(url):
    """An unreachable address is named with both ways out."""
    return f"{NAME}.*{re.escape(url)}.*dataset.url=.*file:"


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_an_error_status_names_the_address_and_what_to_do(status, site, refused):
    url = site.serve(b"sorry", status=status)
    refused(url, hints(url))


def test_a_refused_connection_names_the_address_and_what_to_do(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/file.hdf5"
    assert "refused" in refused(url, hints(url))


def test_an_answer_later_than_the_timeout_names_the_address_and_what_to_do(d4rl_file, site, root):
    url = site.serve(d4rl_file().read_bytes())
    site.patience = 2.0
    with pytest.raises(DatasetError, match=hints(url)):
        load(root, url, timeout=0.1)
    assert datasets(root) == []


@pytest.mark.parametrize("missing", [1, 1000, 10**9])
def test_a_body_shorter_than_announced_is_a_failed_download(missing, d4rl_file, site, refused):
    body = d4rl_file().read_bytes()
    url = site.serve(body, **{"Content-Length": str(len(body) + missing)})
    assert f"{len(body)} bytes of {len(body) + missing}" in refused(url, hints(url))


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\nonly this",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
    ],
    ids=["nothing", "another protocol", "a cut chunk", "no length"],
)
def test_a_broken_reply_names_the_address_and_what_to_do(reply, refused):
    def answer():
        for _ in range(download.ATTEMPTS):
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/file.hdf5"
        refused(url, hints(url))
        thread.join(5)


@pytest.mark.parametrize(
    "url",
    [
        "mirror.hdf5",
        "/data/hopper.hdf5",
        "gopher://127.0.0.1/x",
        "file:///no/such/file.hdf5",
        "http://127.0.0.1:port/x",
        "http://127.0.0.1:1/two words",
    ],
)
def test_an_address_that_cannot_be_opened_is_named_with_what_to_do(url, refused):
    refused(url, hints(url))


@pytest.mark.parametrize("body", [b"", b"<html>moved</html>", bytes(9000)])
def test_a_body_that_is_not_hdf5_is_named_with_its_address(body, site, refused):
    url = site.serve(body)
    refused(url, f"{re.escape(url)}.*{NAME}.*HDF5")


def test_a_damaged_hdf5_body_is_named_with_its_address(d4rl_file, site, refused):
    body = d4rl_file().read_bytes()
    url = site.serve(body[: len(body) // 2])
    refused(url, f"{re.escape(url)}.*{NAME}")


@pytest.mark.parametrize("length", ["announced", "not announced"])
@pytest.mark.parametrize("size", [2**20, 2**20 + 1, 2**20 + 3000, 2**21 + 5000])
def test_a_complete_body_is_accepted_whatever_its_size(size, length, log_arrays, write_log, site, root):
    body = write_log(log_arrays()).read_bytes()
    body += bytes(size - len(body))  # HDF5 ignores what follows its end
    headers = {} if length == "announced" else {"Content-Length": None}
    assert len(load(root, site.serve(body, **headers))) == 39


# ---- content that cannot be trained on


def spoil(key, value):
    return lambda arrays: {**arrays, key: value(arrays[key])}


def without(key):
    return lambda arrays: {name: value for name, value in arrays.items() if name != key}


def with_entry(row, value):
    def change(array):
        array = array.astype(np.float32)
        array[row] = value
        return array

    return change


BAD_CONTENT = {
    "no rewards": ("rewards", without("rewards")),
    "a group of observations": (
        "observations",
        lambda arrays: {**without("observations")(arrays), "observations/position": arrays["observations"]},
    ),
    "too few observations": ("observations", spoil("observations", lambda array: array[:-3])),
    "too few timeouts": ("timeouts", spoil("timeouts", lambda array: array[:-3])),
    "flat observations": ("observations", spoil("observations", lambda array: array[:, 0])),
    "images": ("observations", spoil("observations", lambda array: array[..., None])),
    "text rewards": ("rewards", spoil("rewards", lambda array: array.astype("S8"))),
    "a string for terminals": ("terminals", spoil("terminals", lambda array: "never")),
    "two flags a row": ("terminals", spoil("terminals", lambda array: np.stack([array, array], 1))),
    "a flag of 2": ("terminals", spoil("terminals", with_entry(20, 2))),
    "a flag that is NaN": ("timeouts", spoil("timeouts", with_entry(20, np.nan))),
    "NaN observations": ("observations", spoil("observations", with_entry(20, np.nan))),
    "NaN actions": ("actions", spoil("actions", with_entry(20, np.nan))),
    "infinite rewards": ("rewards", spoil("rewards", with_entry(20, np.inf))),
    "timeouts everywhere": ("no complete transition", spoil("timeouts", np.ones_like)),
    "a single row": ("no complete transition", lambda arrays: {key: value[:1] for key, value in arrays.items()}),
}


@pytest.mark.parametrize("kind", BAD_CONTENT)
def test_content_that_cannot_be_trained_on_is_refused_like_that_of_any_log(kind, log_arrays, write_log, root):
    what, change = BAD_CONTENT[kind]
    path = write_log(change(log_arrays()))
    with pytest.raises(DatasetError) as error:
        load(root, path.as_uri())
    assert NAME in str(error.value) and what in str(error.value)


@pytest.mark.parametrize("kind", ["NaN observations", "timeouts everywhere", "images"])
def test_content_that_cannot_be_trained_on_does_not_enter_the_cache(kind, log_arrays, write_log, refused):
    what, change = BAD_CONTENT[kind]
    refused(write_log(change(log_arrays()), "bad.hdf5").as_uri(), what)


UNUSABLE = {
    "fewer rows": lambda array: array[:-3],
    "another size": lambda array: array[:, :2],
    "flat": lambda array: array[:, 0],
    "text": lambda array: array.astype("S8"),
    "one string": lambda array: "none",
    "NaN": lambda array: np.full_like(array, np.nan),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_next_observations_that_cannot_be_used_are_ignored_or_named_until_they_are_needed(
    kind, log_arrays, d4rl_file, root, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(terminals=[6, 24], timeouts=[13, 30])
    url = d4rl_file({**arrays, "next_observations": UNUSABLE[kind](arrays["observations"])}).as_uri()
    try:
        assert_transitions_equal(load(root, url), qlearning_dataset(arrays))
    except DatasetError as error:
        assert "next_observations" in str(error)
    with pytest.raises(DatasetError, match="next_observations"):
        load(root, url, keep_timeouts=True)


# ---- names


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("hopper-medum-v2", "hopper-medium-v2"),
        ("halfcheeta-expert-v2", "halfcheetah-expert-v2"),
        ("antmaze-umaze-diverce-v2", "antmaze-umaze-diverse-v2"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(name, meant, root):
    with pytest.raises(DatasetError, match=f"{name}.*did you mean '{meant}'"):
        load(root, name=name)
    assert not root.exists()
