"""The hdf5 source: files that are missing, foreign or damaged, and large ones."""

from __future__ import annotations

import re
import subprocess
import sys

import h5py
import numpy as np
import pytest

from iql_torchrl import load_transitions
from iql_torchrl.data.sources import hdf5
from iql_torchrl.errors import DatasetError


def test_a_path_may_be_a_string_or_begin_with_the_home_folder(
    log_arrays, write_log, tmp_path, monkeypatch, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(terminals=[5])
    write_log(arrays, "my.hdf5")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_transitions_equal(load_transitions("hdf5", path="~/my.hdf5"), qlearning_dataset(arrays))


def test_entries_that_training_does_not_need_are_ignored(
    log_arrays, write_log, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(terminals=[5], timeouts=[12])
    more = {"infos/qpos": np.full((40, 6), np.nan), "metadata/algorithm": "SAC", "notes": np.array([b"a", b"b"])}
    assert_transitions_equal(load_transitions("hdf5", path=write_log({**arrays, **more})), qlearning_dataset(arrays))


@pytest.mark.parametrize("compression", ["gzip", "lzf"])
def test_compressed_files_are_read(compression, log_arrays, tmp_path, qlearning_dataset, assert_transitions_equal):
    arrays = log_arrays(terminals=[5])
    with h5py.File(tmp_path / "log.hdf5", "w") as file:
        for key, value in arrays.items():
            file.create_dataset(key, data=value, compression=compression)
    assert_transitions_equal(load_transitions("hdf5", path=tmp_path / "log.hdf5"), qlearning_dataset(arrays))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DatasetError, match=re.escape(f"{tmp_path / 'gone.hdf5'} does not exist")):
        load_transitions("hdf5", path=tmp_path / "gone.hdf5")


def test_a_folder_in_place_of_a_file_is_named_as_one(tmp_path):
    with pytest.raises(DatasetError, match=re.escape(f"{tmp_path} is a folder")):
        load_transitions("hdf5", path=tmp_path)


@pytest.mark.parametrize("content", [b"", b"observations,actions\n0.1,0.2\n", bytes(5000)])
def test_a_file_that_is_not_hdf5_is_named(content, tmp_path):
    path = tmp_path / "log.hdf5"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=re.escape(str(path)) + ".* HDF5"):
        load_transitions("hdf5", path=path)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_named(share, log_arrays, write_log):
    path = write_log(log_arrays(2000))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DatasetError, match=re.escape(str(path))):
        load_transitions("hdf5", path=path)


def test_a_file_with_a_damaged_block_is_named_with_the_array(log_arrays, tmp_path):
    path = tmp_path / "log.hdf5"
    with h5py.File(path, "w") as file:
        for key, value in log_arrays(2000).items():
            file.create_dataset(key, data=value, compression="gzip")
        block = file["actions"].id.get_chunk_info(0)
    with open(path, "r+b") as raw:
        raw.seek(block.byte_offset)
        raw.write(b"\xff" * block.size)
    with pytest.raises(DatasetError, match=re.escape(f"{path}: actions ")):
        load_transitions("hdf5", path=path)


def test_a_file_with_damaged_headers_is_named(log_arrays, write_log):
    path = write_log(log_arrays(2000))
    whole = path.read_bytes()
    spoilt = {marker: whole.replace(marker, b"\xc9" * len(marker)) for marker in (b"SNOD", b"TREE", b"rewards\0")}
    for marker, content in spoilt.items():
        assert content != whole, marker
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=re.escape(str(path))):
            load_transitions("hdf5", path=path)


@pytest.mark.parametrize("link", [h5py.SoftLink("/gone"), h5py.ExternalLink("gone.hdf5", "/rewards")])
def test_a_link_that_leads_nowhere_is_named(link, log_arrays, write_log):
    path = write_log({**log_arrays(), "rewards": link})
    with pytest.raises(DatasetError, match=re.escape(str(path)) + ".*rewards"):
        load_transitions("hdf5", path=path)


def test_an_empty_dataset_without_a_shape_is_refused(log_arrays, write_log):
    path = write_log({**log_arrays(), "rewards": h5py.Empty("f4")})
    with pytest.raises(DatasetError, match=re.escape(f"{path}: rewards ")):
        load_transitions("hdf5", path=path)


@pytest.mark.parametrize("stored", [5, np.arange(3), np.bytes_(b"\xff\xfe")])
def test_an_environment_that_is_no_text_is_named_with_the_file(stored, log_arrays, write_log):
    path = write_log(log_arrays(), env_id=stored)
    with pytest.raises(DatasetError, match=re.escape(str(path)) + ".*env_id"):
        hdf5.environment_of(path)


@pytest.mark.parametrize("stored", ["Hopper-v5", np.bytes_(b"Hopper-v5")])
def test_the_environment_is_read_from_the_files_attribute(stored, log_arrays, write_log):
    assert hdf5.environment_of(write_log(log_arrays(), env_id=stored)) == "Hopper-v5"


def test_a_file_without_the_attribute_names_no_environment(log_arrays, write_log):
    assert hdf5.environment_of(write_log(log_arrays())) is None


MEASURE = """
import resource, sys, time
from pathlib import Path
from iql_torchrl import load_transitions

def peak():
    status = Path("/proc/self/status")
    if status.exists():  # a child's ru_maxrss starts at what its parent held
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def now():
    pages = Path("/proc/self/statm")
    return resource.getpagesize() * int(pages.read_text().split()[1]) if pages.exists() else peak()

before, start = now(), time.perf_counter()
transitions = load_transitions("hdf5", path=sys.argv[1])
print(len(transitions), peak() - before, time.perf_counter() - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("timeouts", [range(999, 1_000_000, 1000), None], ids=["timeouts", "no timeouts"])
def test_a_million_transitions_load_in_less_than_three_times_their_memory(timeouts, log_arrays, write_log):
    arrays = log_arrays(
        1_000_000, observation_dim=17, action_dim=6, terminals=range(500, 1_000_000, 777), timeouts=timeouts
    )
    path = write_log(arrays)
    size, rows = sum(value.nbytes for value in arrays.values()), 1_000_000 - (1 if timeouts is None else 1000)
    del arrays
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    length, used, seconds = done.stdout.split()
    print(f"{float(seconds):.2f} s, {int(used) / 1e6:.0f} MB at the peak for {size / 1e6:.0f} MB of arrays")
    assert int(length) == rows
    assert int(used) < 3 * size
