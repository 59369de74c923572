"""Transitions in mapped files: the same numbers as in memory, in files without a name, within the memory there is."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from iql_torchrl import load_transitions, make_buffer
from iql_torchrl.data.actions import normalise_actions
from iql_torchrl.data.buffer import split_episodes
from iql_torchrl.data.normalisation import ObservationNormaliser
from iql_torchrl.data.rewards import transform_rewards
from iql_torchrl.data.storage import allocator
from iql_torchrl.data.transitions import fingerprint
from iql_torchrl.errors import ConfigurationError, DatasetError

NAME = "hopper-medium-v2"


@pytest.fixture
def storage_folder(tmp_path):
    return tmp_path / "mapped"


@pytest.fixture
def arrays(log_arrays, with_next_observations):
    """400 rows, of which episodes end in many ways, with next observations of their own."""
    return with_next_observations(log_arrays(400, terminals=range(30, 400, 47), timeouts=range(60, 400, 61)))


@pytest.fixture
def dataset_of(arrays, write_log, tmp_path):
    """The options that load the arrays from a source, and the files that lie there."""

    def options(source):
        if source == "embedded":
            return {"source": "embedded"}
        if source == "hdf5":
            return {"source": "hdf5", "path": write_log(arrays)}
        if source == "d4rl":
            url = write_log(arrays, "d4rl.hdf5").as_uri()
            return {"source": "d4rl", "name": NAME, "root": tmp_path / "cache", "url": url}
        if source == "parquet":
            pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            columns = {key: pa.array(value.tolist()) for key, value in arrays.items()}
            pq.write_table(pa.table(columns), tmp_path / "log.parquet", row_group_size=150)
            return {"source": "parquet", "path": tmp_path / "log.parquet"}
        if source == "npz":
            np.savez(tmp_path / "log.npz", **arrays)
            return {"source": "numpy", "path": tmp_path / "log.npz"}
        assert source == "npy files"
        (tmp_path / "log").mkdir()
        for key, value in arrays.items():
            np.save(tmp_path / "log" / f"{key}.npy", value)
        return {"source": "numpy", "path": tmp_path / "log"}

    return options


def assert_equal(found, expected):
    assert found.batch_size == expected.batch_size
    entries = dict(expected.items(True, True))
    assert dict(found.items(True, True)).keys() == entries.keys()
    for key, value in entries.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def mapped_to_files(transitions, folder):
    """The entries of transitions that lie in maps of files below a folder."""
    maps = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *_, name = line.split(maxsplit=5)
        if str(folder) in name:
            maps.append([int(end, 16) for end in place.split("-")])
    return {
        key
        for key, value in transitions.items(True, True)
        if any(start <= value.data_ptr() < stop for start, stop in maps)
    }


def content_of(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


SOURCES = ["hdf5", "parquet", "npz", "npy files", "d4rl", "embedded"]
needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps are listed by Linux alone")


# ---- the same numbers


@pytest.mark.parametrize("keep_timeouts", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_mapped_transitions_equal_those_in_memory_value_for_value(
    source, keep_timeouts, dataset_of, storage_folder, request
):
    if source == "embedded" and keep_timeouts:
        pytest.skip("the embedded file has no next observations")
    options = {**dataset_of(source), "keep_timeouts": keep_timeouts}
    mapped = load_transitions(**options, storage="memmap", storage_folder=storage_folder)
    assert_equal(mapped, load_transitions(**options))


@pytest.mark.parametrize("source", ["hdf5", "parquet", "npz", "npy files"])
def test_mapped_transitions_with_discrete_actions_equal_those_in_memory(source, arrays, dataset_of, storage_folder):
    arrays["actions"] = np.random.default_rng(0).integers(0, 5, size=400)
    options = dataset_of(source)
    mapped = load_transitions(**options, storage="memmap", storage_folder=storage_folder)
    assert mapped["action"].dtype == torch.int64
    assert_equal(mapped, load_transitions(**options))


def test_storage_on_the_device_is_memory_until_the_buffer_moves_it(dataset_of):
    options = dataset_of("hdf5")
    assert_equal(load_transitions(**options, storage="device"), load_transitions(**options))


@needs_proc
@pytest.mark.parametrize("keep_timeouts", [False, True])
@pytest.mark.parametrize("source", ["hdf5", "parquet", "npy files", "d4rl"])
def test_whatever_grows_with_the_size_of_a_row_lies_in_mapped_files(source, keep_timeouts, dataset_of, storage_folder):
    options = {**dataset_of(source), "keep_timeouts": keep_timeouts}
    mapped = load_transitions(**options, storage="memmap", storage_folder=storage_folder)
    entries = {"observation", "action", ("next", "observation"), ("next", "reward")}
    assert entries <= mapped_to_files(mapped, storage_folder)
    assert not mapped_to_files(load_transitions(**options), storage_folder)


# ---- files without a name


@pytest.mark.parametrize("source", SOURCES)
def test_no_file_has_a_name_in_the_storage_folder(source, dataset_of, storage_folder):
    transitions = load_transitions(**dataset_of(source), storage="memmap", storage_folder=storage_folder)
    assert list(storage_folder.iterdir()) == []
    transform_rewards(transitions, "minus_one")
    parts = split_episodes(transitions, 0.3, allocate=allocator("memmap", storage_folder))
    assert list(storage_folder.iterdir()) == []
    del transitions, parts
    assert list(storage_folder.iterdir()) == []


def test_the_storage_folder_is_made_with_its_parents_and_may_begin_with_the_home_folder(
    dataset_of, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load_transitions(**dataset_of("hdf5"), storage="memmap", storage_folder="~/deep/mapped")
    assert (tmp_path / "home/deep/mapped").is_dir()


def test_without_a_folder_the_files_lie_in_the_users_cache(dataset_of, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load_transitions(**dataset_of("hdf5"), storage="memmap")
    assert (tmp_path / "home/.cache/iql_torchrl/memmap").is_dir()


def test_storage_in_memory_makes_no_folder(dataset_of, storage_folder):
    load_transitions(**dataset_of("hdf5"), storage_folder=storage_folder)
    assert not storage_folder.exists()


@pytest.mark.parametrize("source", ["hdf5", "npy files"])
def test_two_loads_share_no_numbers(source, dataset_of, storage_folder):
    options = {**dataset_of(source), "storage": "memmap", "storage_folder": storage_folder}
    first, second = load_transitions(**options), load_transitions(**options)
    before = fingerprint(second)
    first["observation"].zero_()
    first["next", "reward"].zero_()
    assert fingerprint(second) == before == fingerprint(load_transitions(**options))


# ---- transforms in place


@pytest.mark.parametrize("keep_timeouts", [False, True])
@pytest.mark.parametrize("storage", ["memory", "memmap"])
@pytest.mark.parametrize("source", ["hdf5", "parquet", "npz", "npy files", "d4rl"])
def test_transforms_change_the_transitions_and_leave_the_files_as_they_are(
    source, storage, keep_timeouts, arrays, dataset_of, storage_folder, tmp_path
):
    options = {**dataset_of(source), "keep_timeouts": keep_timeouts}
    plain = load_transitions(**options)
    files = content_of(tmp_path)
    assert files
    transitions = load_transitions(**options, storage=storage, storage_folder=storage_folder)

    normalise_actions(transitions, torch.tensor([-2.0, -2.0]), torch.tensor([2.0, 4.0]))
    _, shift = transform_rewards(transitions, "minus_one")
    normaliser = ObservationNormaliser.fit(transitions)
    normaliser.apply_(transitions)

    expected = torch.stack([plain["action"][:, 0] / 2, (plain["action"][:, 1] - 1) / 3], 1)
    torch.testing.assert_close(transitions["action"], expected)
    assert torch.equal(transitions["next", "reward"], plain["next", "reward"] + shift)
    for key in ("observation", ("next", "observation")):
        assert torch.equal(transitions[key], normaliser(plain[key]))
    torch.testing.assert_close(transitions["observation"].mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    assert content_of(tmp_path) == files
    assert_equal(load_transitions(**options), plain)


def test_rewards_scaled_by_the_range_of_returns_are_the_same_in_mapped_files(dataset_of, storage_folder):
    options = dataset_of("hdf5")
    plain, mapped = (
        load_transitions(**options, storage=storage, storage_folder=storage_folder) for storage in ("memory", "memmap")
    )
    assert transform_rewards(plain, "return_range") == transform_rewards(mapped, "return_range")
    assert_equal(mapped, plain)


# ---- splits and buffers


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_a_split_into_mapped_files_equals_one_in_memory(fraction, dataset_of, storage_folder):
    options = dataset_of("hdf5")
    mapped = load_transitions(**options, storage="memmap", storage_folder=storage_folder)
    plain = split_episodes(load_transitions(**options), fraction, seed=3)
    split = split_episodes(mapped, fraction, seed=3, allocate=allocator("memmap", storage_folder))
    for found, expected in zip(split, plain, strict=True):
        assert_equal(found, expected)
    assert sum(map(len, split)) == len(mapped)
    if Path("/proc/self/maps").exists():
        assert all(mapped_to_files(part, storage_folder) == set(part.keys(True, True)) for part in split)


def test_a_split_of_more_rows_than_one_piece_equals_one_in_memory(log_arrays, write_log, storage_folder):
    path = write_log(log_arrays(150_000, terminals=range(70, 150_000, 71)))
    plain = split_episodes(load_transitions("hdf5", path=path), 0.5)
    mapped = load_transitions("hdf5", path=path, storage="memmap", storage_folder=storage_folder)
    split = split_episodes(mapped, 0.5, allocate=allocator("memmap", storage_folder))
    for found, expected in zip(split, plain, strict=True):
        assert len(found) > 1 << 16
        assert_equal(found, expected)


@pytest.mark.parametrize("replacement", [False, True])
def test_a_buffer_over_mapped_transitions_draws_the_rows_that_one_in_memory_does(
    replacement, dataset_of, storage_folder
):
    options = dataset_of("hdf5")
    plain, mapped = (
        load_transitions(**options, storage=storage, storage_folder=storage_folder) for storage in ("memory", "memmap")
    )
    buffers = [make_buffer(one, batch_size=32, seed=5, replacement=replacement) for one in (plain, mapped)]
    for _ in range(20):
        expected, found = (buffer.sample() for buffer in buffers)
        index = found["index"]
        assert torch.equal(index, expected["index"])
        for key in ("observation", "action", ("next", "observation"), ("next", "reward"), ("next", "terminated")):
            assert torch.equal(found[key], plain[key][index]), key


@needs_proc
def test_a_buffer_does_not_copy_mapped_transitions(dataset_of, storage_folder):
    mapped = load_transitions(**dataset_of("hdf5"), storage="memmap", storage_folder=storage_folder)
    inside = make_buffer(mapped, batch_size=32, seed=0)[:]
    assert {"observation", ("next", "observation")} <= mapped_to_files(inside, storage_folder)
    assert inside["observation"].data_ptr() == mapped["observation"].data_ptr()


# ---- refusals


@pytest.mark.parametrize(("storage", "meant"), [("memap", "memmap"), ("mem", "memory"), ("devise", "device")])
def test_an_unknown_storage_is_refused_with_the_nearest_known_one(storage, meant, dataset_of):
    with pytest.raises(ConfigurationError, match=rf"dataset.storage={storage}\b.*did you mean '{meant}'"):
        load_transitions(**dataset_of("hdf5"), storage=storage)


def test_a_storage_like_none_that_is_known_is_refused_with_all_of_them(dataset_of):
    with pytest.raises(ConfigurationError, match=r"storage=tape.*device, memmap, memory"):
        load_transitions(**dataset_of("hdf5"), storage="tape")


def test_a_storage_folder_below_a_file_is_refused_by_name(dataset_of, tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "mapped"
    with pytest.raises(DatasetError, match=re.escape(f"to {folder} (")) as error:
        load_transitions(**dataset_of("hdf5"), storage="memmap", storage_folder=folder)
    assert "dataset.storage_folder=" in str(error.value)


def test_a_file_in_place_of_the_storage_folder_is_refused_by_name(dataset_of, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match=re.escape(f"to {tmp_path / 'file'} (")):
        load_transitions(**dataset_of("hdf5"), storage="memmap", storage_folder=tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_storage_folder_without_permission_is_refused_by_name(dataset_of, storage_folder):
    storage_folder.mkdir(mode=0o500)
    with pytest.raises(DatasetError, match=re.escape(f"to {storage_folder} (")):
        load_transitions(**dataset_of("hdf5"), storage="memmap", storage_folder=storage_folder)


LIMITED = """
import resource, sys
from iql_torchrl import load_transitions
from iql_torchrl.errors import DatasetError

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    load_transitions("hdf5", path=sys.argv[1], storage="memmap", storage_folder=sys.argv[2])
except DatasetError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_storage_folder_without_room_is_refused_by_name_and_with_the_room_needed(
    log_arrays, write_log, storage_folder
):
    path = write_log(log_arrays(100_000, observation_dim=5))
    done = subprocess.run([sys.executable, "-c", LIMITED, path, storage_folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0.00 GB" in done.stdout and f"to {storage_folder} (" in done.stdout
    assert "dataset.storage_folder=" in done.stdout
    assert list(storage_folder.iterdir()) == []


# ---- memory


MEASURE = """
import sys, threading, time
from pathlib import Path
from iql_torchrl import load_transitions

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

load_transitions("hdf5", path=sys.argv[2])  # whatever the first load brings into memory, once
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
transitions = load_transitions("hdf5", path=sys.argv[1], storage=sys.argv[3], storage_folder=sys.argv[4])
done.set()
watcher.join()
peak = max(peak, anonymous())
print(len(transitions), peak - before, float(transitions["next", "observation"][-1].sum()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is told by Linux alone")
def test_a_log_larger_than_the_memory_it_may_take_loads_into_mapped_files(
    log_arrays, write_log, tmp_path, storage_folder
):
    rows, width, path = 1_500_000, 40, tmp_path / "large.hdf5"
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for key, shape in {"observations": (rows, width), "actions": (rows, 4), "rewards": (rows,)}.items():
            dataset = file.create_dataset(key, shape, np.float32)
            for start in range(0, rows, 100_000):
                dataset[start : start + 100_000] = random.random((100_000, *shape[1:]), np.float32)
        file["terminals"] = np.arange(rows) % 1000 == 999
        expected = float(torch.from_numpy(file["observations"][rows - 1]).sum())
    size, used = path.stat().st_size, {}
    small = write_log(log_arrays(), "small.hdf5")
    for storage in ("memmap", "memory"):
        command = [sys.executable, "-c", MEASURE, path, small, storage, storage_folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        length, peak, total = done.stdout.split()
        assert int(length) == rows - 1 and float(total) == pytest.approx(expected)
        used[storage] = int(peak)
    print(f"{ {storage: f'{peak / 1e6:.0f} MB' for storage, peak in used.items()} } for {size / 1e6:.0f} MB")
    assert used["memmap"] < size / 3
    assert used["memory"] > size / 3
