"""Sizes that a header declares and the file cannot hold: refused before memory is taken; packed logs that can: read."""

from __future__ import annotations

import io
import json
import os
import resource
import socket
import subprocess
import sys
import zipfile

import h5py
import minari
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from minari.data_collector.episode_buffer import EpisodeBuffer

from iql_torchrl import load_transitions
from iql_torchrl.data.log import Log, refuse_undue_size, stored_size
from iql_torchrl.data.transitions import transitions_from_log
from iql_torchrl.environments.observations import MOST_NUMBERS, UnsupportedSpace, flat_size
from iql_torchrl.errors import DatasetError

COLUMNS = ("observations", "actions", "rewards", "terminals", "timeouts")


def refusal(source, path, *words, **options):
    """The message of the error, for which no more than a little memory was taken."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DatasetError) as error:
        load_transitions(source, **({"path": path} if path is not None else {}), **options)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    for word in words:
        assert word in str(error.value)
    return str(error.value)


# ---- the rule


def test_a_log_may_declare_as_much_as_zeros_can_be_packed_and_no_more():
    refuse_undue_size("log", "it", 2048 * 1000 + 2**26, 1000)
    with pytest.raises(DatasetError, match=r"^log: it would take 69 MB of memory .* but 1,000 bytes are stored"):
        refuse_undue_size("log", "it", 2048 * 1000 + 2**26 + 1, 1000)


def test_holes_of_a_file_are_not_stored(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100_000)
    assert stored_size(path) == 100_000
    os.truncate(path, 2**33)
    assert 100_000 <= stored_size(path) < 200_000


# ---- HDF5


@pytest.mark.parametrize("key", COLUMNS)
@pytest.mark.parametrize(
    ("rows", "chunks"), [(10**12, None), (2**31, (65_536,)), (2**31, None), (10**12, (65_536,))], ids=str
)
def test_rows_of_hdf5_that_were_never_written_are_refused(key, rows, chunks, log_arrays, write_log):
    arrays = log_arrays()
    path = write_log({name: value for name, value in arrays.items() if name != key})
    rest = arrays[key].shape[1:]
    with h5py.File(path, "r+") as file:
        chunks = None if chunks is None else (*chunks, *rest)
        file.create_dataset(key, shape=(rows, *rest), dtype=arrays[key].dtype, chunks=chunks)
    refusal("hdf5", path, f"{path}: {key}, of shape ({rows},", "are stored", "never written")


def test_all_columns_never_written_are_refused_though_their_lengths_agree(log_arrays, write_log):
    path = write_log({})
    with h5py.File(path, "r+") as file:
        for key, value in log_arrays().items():
            file.create_dataset(key, shape=(2**31, *value.shape[1:]), dtype=value.dtype, chunks=True)
    refusal("hdf5", path, str(path), "are stored")


def test_a_chunk_that_is_larger_than_the_file_can_fill_is_refused(log_arrays, write_log):
    path = write_log({key: value for key, value in log_arrays().items() if key != "rewards"})
    with h5py.File(path, "r+") as file:
        file.create_dataset("rewards", shape=(40,), dtype="f4", chunks=(2**29,), maxshape=(None,))
    refusal("hdf5", path, "rewards, of shape (40,)")


@pytest.mark.slow
def test_ten_million_rows_of_packed_flags_are_read(tmp_path):
    """All of it packed a thousandfold but for one column, and one column never written."""
    rows = 10_000_000
    path = tmp_path / "log.hdf5"
    with h5py.File(path, "w") as file:
        options = {"compression": "gzip", "compression_opts": 9, "chunks": (1 << 18,)}
        file.create_dataset("terminals", data=np.zeros(rows, bool), **options)
        file.create_dataset("timeouts", shape=(rows,), dtype=bool, **options)
        file.create_dataset("rewards", data=np.zeros(rows, np.float64), **options)
        file.create_dataset("actions", data=np.zeros(rows, np.int64), **options)
        observations = np.random.default_rng(0).random((1000, 1), np.float32).repeat(rows // 1000, 0)
        file.create_dataset("observations", data=observations, compression="gzip", chunks=(1 << 18, 1))
    assert path.stat().st_size < 2_000_000
    assert len(load_transitions("hdf5", path=path)) == rows - 1


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "timeouts"])
def test_lengths_are_compared_before_a_flag_is_read(key, log_arrays):
    class Unread:
        shape, dtype = (40,), np.dtype(bool)

        def __getitem__(self, rows):
            raise AssertionError("it was read")

    arrays = {**log_arrays(), "terminals": Unread()}
    arrays[key] = arrays[key][:-1]
    with pytest.raises(DatasetError, match=f"^log: {key} has 39 rows but terminals has 40"):
        transitions_from_log(Log("log", arrays))


# ---- robomimic


@pytest.mark.parametrize("name", ["obs/a", "dones", "rewards"])
def test_a_demonstration_that_declares_more_than_the_file_has_is_refused(name, tmp_path):
    path = tmp_path / "demonstrations.hdf5"
    rows = 2**31
    with h5py.File(path, "w") as file:
        for key, width in {"obs/a": 3, "next_obs/a": 3, "actions": 2, "rewards": 0, "dones": 0}.items():
            shape = (rows, width) if width else (rows,)
            file.create_dataset(f"data/demo_0/{key}", shape=shape, dtype="f4", chunks=True)
        file["data/demo_0"].attrs["num_samples"] = rows
    refusal("robomimic", path, str(path), "are stored", observation_keys=["a"])


# ---- NumPy


def npy(array, shape=None):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": array.dtype.str, "fortran_order": False, "shape": shape or array.shape}
    )
    return stream.getvalue() + array.tobytes()


@pytest.mark.parametrize("rows", [41, 2**31, 10**12])
@pytest.mark.parametrize("key", COLUMNS)
def test_an_array_that_is_longer_than_its_member_is_refused(key, rows, log_arrays, tmp_path):
    arrays, path = log_arrays(), tmp_path / "log.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in arrays.items():
            archive.writestr(f"{name}.npy", npy(value, (rows, *value.shape[1:]) if name == key else None))
    refusal("numpy", path, f"{path}: {key} cannot be read", "it declares")


def test_members_that_say_they_are_larger_than_the_file_can_hold_are_refused(log_arrays, tmp_path):
    arrays, path = log_arrays(), tmp_path / "log.npz"
    rows = 2**30
    arrays["rewards"] = np.zeros(rows, bool)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:  # which packs zeros far better than deflate
        for name, value in arrays.items():
            archive.writestr(f"{name}.npy", npy(value[:1000], value.shape))
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\1\2", content.index(b"PK\1\2"))
    while content[place + 46 : place + 57] != b"rewards.npy":
        place = content.index(b"PK\1\2", place + 4)
    content[place + 24 : place + 28] = (rows + 128).to_bytes(4, "little")
    path.write_bytes(content)
    refusal("numpy", path, str(path), "are stored")


def test_an_array_of_holes_is_refused(log_arrays, tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    for name, value in log_arrays().items():
        (folder / f"{name}.npy").write_bytes(npy(value, (2**31, *value.shape[1:])))
        os.truncate(folder / f"{name}.npy", 2**36)
    refusal("numpy", folder, str(folder), "are stored")


# ---- Parquet


@pytest.mark.parametrize("key", ["observations", "rewards"])
def test_a_parquet_list_that_is_longer_than_the_file_can_hold_is_refused(key, log_arrays, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {name: pa.array(value.tolist()) for name, value in log_arrays().items()}
    length = 2**25
    offsets = pa.array([0, *[length] * 40], pa.int32())
    columns[key] = pa.ListArray.from_arrays(offsets, pa.array(np.zeros(length, np.float32)))
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table(columns), path)
    assert path.stat().st_size < 30_000
    refusal("parquet", path, str(path), "are stored")


def test_a_parquet_file_whose_counts_contradict_each_other_is_refused(log_arrays, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "log.parquet"
    columns = {name: pa.array(value.tolist()) for name, value in log_arrays(211).items()}
    pq.write_table(pa.table(columns), path, row_group_size=100)
    content = path.read_bytes()
    announced = b"\xa6\x03"  # 211
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    assert content.count(announced, start) == 1
    path.write_bytes(content[:start] + content[start:].replace(announced, b"\xa8\x03"))
    refusal("parquet", path, f"{path}: it announces 212 rows, its row groups 211")


# ---- Minari


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Record a small dataset; returns its name and the folder of its data."""

    def record(form, space=None):
        random = np.random.default_rng(0)
        space = space or Box(-np.inf, np.inf, (3,), np.float32)
        space.seed(0)
        episodes = [
            EpisodeBuffer(
                observations=np.stack([space.sample() for _ in range(9)]),
                actions=random.uniform(-1, 1, (8, 2)).astype(np.float32),
                rewards=random.normal(size=8),
                terminations=np.zeros(8, bool),
                truncations=np.arange(8) == 7,
            )
            for _ in range(3)
        ]
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
        minari.create_dataset_from_buffers(
            "sizes-v0", episodes, observation_space=space, action_space=Box(-1, 1, (2,), np.float32), data_format=form
        )
        return "sizes-v0", tmp_path / "sizes-v0/data"

    return record


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused_minari(name, data, *words):
    refusal("minari", None, name, str(data.parent), *words, name=name, root=data.parents[1], download=False)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["hdf5", "arrow", "parquet"])
@pytest.mark.parametrize("steps", [2**31, 10**12])
def test_an_episode_that_declares_more_steps_than_the_files_hold_is_refused(form, steps, recorded):
    name, data = recorded(form)
    if form == "hdf5":
        with h5py.File(data / "main_data.hdf5", "r+") as file:
            file["episode_1"].attrs["total_steps"] = steps
    else:
        edit(data / "1/metadata.json", total_steps=steps)
    refused_minari(name, data, "steps", "are stored")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_number_of_episodes_that_the_files_cannot_hold_is_refused(recorded):
    name, data = recorded("hdf5")
    edit(data / "metadata.json", total_episodes=10**9)
    refused_minari(name, data, "1,000,000,000 episodes")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_episode_of_rows_never_written_is_refused(recorded):
    name, data = recorded("hdf5")
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        del file["episode_1/observations"]
        file.create_dataset("episode_1/observations", shape=(2**31, 3), dtype="f4", chunks=True)
    refused_minari(name, data, "episode_1/observations, of shape (2147483648, 3)")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_episode_in_another_file_is_refused(recorded):
    name, data = recorded("hdf5")
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        del file["episode_1/observations"]
        file["episode_1/observations"] = h5py.ExternalLink("other.hdf5", "/x")
    refused_minari(name, data, "is a link into another file")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["virtual", "external"])
def test_an_episode_that_is_put_together_of_others_is_refused(kind, recorded):
    """A virtual dataset of itself ends the process that reads it."""
    name, data = recorded("hdf5")
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        place = "episode_1/observations"
        shape = file[place].shape
        del file[place]
        if kind == "virtual":
            layout = h5py.VirtualLayout(shape=shape, dtype="f4")
            layout[...] = h5py.VirtualSource(".", place, shape=shape)
            file.create_virtual_dataset(place, layout)
        else:
            file.create_dataset(place, shape=shape, dtype="f4", external=[("other.bin", 0, 4000)])
    refused_minari(name, data, f"{place} is stored in other files")


def nested(depth):
    space = {"type": "Discrete", "dtype": "int64", "start": 0, "n": 2}
    for _ in range(depth):
        space = {"type": "Dict", "subspaces": {"a": space}}
    return space


HUGE = {
    "discrete": ({"type": "Discrete", "dtype": "int64", "start": 0, "n": 10**12}, "1,000,000,000,000 numbers"),
    "several": ({"type": "MultiDiscrete", "dtype": "int64", "nvec": [10**12], "start": [0]}, "numbers as a vector"),
    "binary": ({"type": "MultiBinary", "n": 10**12}, "1,000,000,000,000 numbers"),
    "box": ({"type": "Box", "dtype": "float32", "shape": [10**12], "low": 0, "high": 1}, "without its bounds"),
    "deep": (nested(51), "nests deeper than 50 levels"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", HUGE)
def test_a_space_beyond_any_size_is_refused(kind, recorded):
    name, data = recorded("hdf5")
    space, words = HUGE[kind]
    edit(data / "metadata.json", observation_space=json.dumps(space))
    message = ""
    with pytest.raises(DatasetError) as error:
        load_transitions("minari", name=name, root=data.parents[1], download=False)
    message = str(error.value)
    assert name in message and words in message


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_discrete_space_that_would_fill_memory_as_vectors_is_refused(recorded):
    name, data = recorded("hdf5", Discrete(5))
    edit(
        data / "metadata.json",
        observation_space=json.dumps({**json.loads('{"type": "Discrete"}'), "start": 0, "n": 10**6}),
    )
    for number in range(3):
        with h5py.File(data / "main_data.hdf5", "r+") as file:
            file[f"episode_{number}"].attrs["total_steps"] = 1000
    refused_minari(name, data, "3,000 steps", "are stored")


def test_a_space_of_a_million_numbers_has_a_size_and_a_larger_one_has_none():
    assert flat_size(Discrete(MOST_NUMBERS)) == MOST_NUMBERS
    with pytest.raises(UnsupportedSpace, match="observation has 1,000,001 numbers"):
        flat_size(Dict({"a": Discrete(MOST_NUMBERS), "b": Discrete(1)}))


# ---- something else than a file


def place(kind, path):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as end:
            folder = os.getcwd()
            os.chdir(path.parent)
            end.bind(path.name)
            os.chdir(folder)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("source", ["hdf5", "parquet", "numpy", "robomimic"])
def test_something_else_than_a_file_is_refused_without_being_opened(source, kind, tmp_path):
    place(kind, tmp_path / "log")
    options = {"observation_keys": ["a"]} if source == "robomimic" else {}
    refusal(source, tmp_path / "log", str(tmp_path / "log"), kind, "not a file", "dataset.path=", **options)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_a_npy_file_that_is_none_is_refused_without_being_opened(kind, tmp_path):
    place(kind, tmp_path / "rewards.npy")
    refusal("numpy", tmp_path, "rewards cannot be read", kind, "not a file")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("file", ["metadata.json", "main_data.hdf5"])
def test_a_file_of_minari_that_is_none_is_refused_without_being_opened(file, kind, recorded):
    name, data = recorded("hdf5")
    (data / file).unlink()
    place(kind, data / file)
    refused_minari(name, data, kind, "not a file")


# ---- D4RL's cache


@pytest.fixture
def cached(write_log, log_arrays, tmp_path):
    path = write_log(log_arrays(terminals=[9]))
    load_transitions("d4rl", name="hopper-medium-v2", url=path.as_uri(), root=tmp_path / "cache")
    return tmp_path / "cache" / "hopper-medium-v2"


@pytest.mark.parametrize("rows", [41, 2**31, 10**12])
def test_a_mapped_file_is_not_lengthened_to_what_its_description_says(rows, cached):
    content = json.loads((cached / "meta.json").read_text())
    content["observation"]["shape"][0] = rows
    (cached / "meta.json").write_text(json.dumps(content))
    size = (cached / "observation.memmap").stat().st_size
    refusal("d4rl", None, "is damaged", "observation.memmap", name="hopper-medium-v2", root=cached.parent)
    assert (cached / "observation.memmap").stat().st_size == size


def test_a_pickle_in_the_cache_is_refused(cached):
    (cached / "other.pickle").write_bytes(b"")
    refusal("d4rl", None, "is never unpickled", name="hopper-medium-v2", root=cached.parent)


@pytest.mark.parametrize("file", ["meta.json", "observation.memmap", "iql_torchrl.json"])
def test_a_pipe_in_the_cache_is_refused_without_being_opened(file, cached):
    (cached / file).unlink()
    os.mkfifo(cached / file)
    refusal("d4rl", None, "is a named pipe", name="hopper-medium-v2", root=cached.parent)


def test_the_address_of_a_pipe_is_refused_without_being_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    url = (tmp_path / "pipe").as_uri()
    refusal("d4rl", None, url, "is a named pipe", name="hopper-medium-v2", url=url, root=tmp_path / "cache")


@pytest.mark.slow
def test_loading_in_a_process_of_little_memory_is_refused_and_not_ended(tmp_path):
    """What is refused takes no memory, by the limit of the system."""
    path = tmp_path / "log.hdf5"
    with h5py.File(path, "w") as file:
        for key in ("observations", "actions"):
            file.create_dataset(key, shape=(2**31, 2), dtype="f4", chunks=True)
        for key in ("rewards", "terminals"):
            file.create_dataset(key, shape=(2**31,), dtype="f4", chunks=True)
    code = (
        "import resource, sys\nfrom iql_torchrl import load_transitions\nfrom iql_torchrl.errors import DatasetError\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "most = pages * resource.getpagesize() + 2**28\nresource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        "try:\n    load_transitions('hdf5', path=sys.argv[1])\nexcept DatasetError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120)
    assert "are stored" in done.stdout, done.stderr
