"""Observations in several columns, of every source of logs."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from iql_torchrl import load_transitions
from iql_torchrl.data.log import ROWS_AT_A_TIME
from iql_torchrl.data.sources.arrays import Arrays
from iql_torchrl.errors import DatasetError

FORMS = ("hdf5", "npz", "folder", "parquet", "arrays")


def parts_of(rows=40, seed=0):
    """Parts of shapes [N], [N, k] and [N, a, b], not listed in the order of their names."""
    random = np.random.default_rng(seed)
    return {
        "velocity": random.normal(size=(rows, 2)).astype(np.float32),
        "arm/grid": random.integers(0, 5, size=(rows, 2, 3)),
        "height": random.normal(size=rows),
    }


def joined(parts):
    """Alphabetical, row by row."""
    rows = len(parts["height"])
    return np.concatenate([parts[name].reshape(rows, -1) for name in sorted(parts)], axis=1).astype(np.float32)


def log_of(rows=40, *, following=False, **changes):
    random = np.random.default_rng(1)
    log = {f"observations/{name}": value for name, value in parts_of(rows).items()}
    if following:
        log |= {f"next_observations/{name}": value for name, value in parts_of(rows, 5).items()}
    log |= {
        "actions": random.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "rewards": random.normal(size=rows).astype(np.float32),
        "terminals": np.arange(rows) == rows - 1,
        "timeouts": np.arange(rows) == rows // 2,
    }
    return {name: value for name, value in {**log, **changes}.items() if value is not None}


def load(form, log, tmp_path, **options):
    if form == "arrays":
        return load_transitions(Arrays(arrays=log, **options))
    path = tmp_path / {"hdf5": "log.hdf5", "npz": "log.npz", "folder": "log", "parquet": "log.parquet"}[form]
    if form == "hdf5":
        with h5py.File(path, "w") as file:
            for name, value in log.items():
                file[name] = value
    elif form == "npz":
        np.savez(path, **log)
    elif form == "folder":
        for name, value in log.items():
            target = path / f"{name}.npy"
            target.parent.mkdir(parents=True, exist_ok=True)
            np.save(target, value)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = {
            name: value if value.ndim == 1 else value.reshape(len(value), -1).tolist() for name, value in log.items()
        }
        parquet.write_table(pyarrow.table(columns), path)
    source = {"npz": "numpy", "folder": "numpy"}.get(form, form)
    return load_transitions(source, path=path, **options)


@pytest.mark.parametrize("form", FORMS)
def test_parts_are_laid_out_in_the_order_of_their_names(form, tmp_path):
    transitions = load(form, log_of(), tmp_path)
    expected = joined(parts_of())
    kept = np.array([row for row in range(39) if row != 20])
    np.testing.assert_array_equal(transitions["observation"].numpy(), expected[kept])
    np.testing.assert_array_equal(transitions["next", "observation"].numpy(), expected[kept + 1])


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_the_next_observations_are_read_alike(form, tmp_path):
    transitions = load(form, log_of(following=True), tmp_path, keep_timeouts=True)
    np.testing.assert_array_equal(transitions["observation"].numpy(), joined(parts_of()))
    np.testing.assert_array_equal(transitions["next", "observation"].numpy(), joined(parts_of(seed=5)))


def test_a_program_may_hold_the_parts_as_a_dict(tmp_path):
    log = log_of()
    nested = {"observations": {"velocity": log["observations/velocity"], "height": log["observations/height"]}}
    nested["observations"]["arm"] = {"grid": log["observations/arm/grid"]}
    nested |= {name: value for name, value in log.items() if "/" not in name}
    assert (load("arrays", nested, tmp_path) == load("arrays", log, tmp_path)).all()


def test_large_logs_are_joined_piece_by_piece(tmp_path):
    rows = ROWS_AT_A_TIME + 100
    transitions = load("hdf5", log_of(rows), tmp_path, storage="memmap", storage_folder=tmp_path / "maps")
    np.testing.assert_array_equal(transitions["observation"][-50:].numpy(), joined(parts_of(rows))[-51:-1])


@pytest.mark.parametrize("form", ["hdf5", "npz", "arrays"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"observations/camera": np.zeros((40, 8, 8, 3), np.uint8)},
            ["observations/camera", "image", "leave that part"],
        ),
        ({"observations/camera": np.zeros((40, 8, 8), np.uint8)}, ["observations/camera", "image"]),
        ({"observations/velocity": np.zeros((39, 2), np.float32)}, ["observations/velocity has 39 rows", "has 40"]),
        ({"next_observations/other": np.zeros(40)}, ["other parts", "other"]),
    ],
)
def test_parts_that_cannot_be_joined_are_refused_by_name(form, changes, words, tmp_path):
    with pytest.raises(DatasetError) as error:
        load(form, log_of(**changes), tmp_path)
    for word in words:
        assert word in str(error.value), word


def test_parts_beside_the_whole_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="has both observations and observations/arm/grid"):
        load("npz", log_of(observations=np.zeros((40, 3), np.float32)), tmp_path)


def test_a_group_that_holds_itself_ends(tmp_path):
    path = tmp_path / "log.hdf5"
    with h5py.File(path, "w") as file:
        for name, value in log_of().items():
            file[name] = value
        file["observations/self"] = file["observations"]
    with pytest.raises(DatasetError):
        load_transitions("hdf5", path=path)


def test_a_part_in_another_file_is_not_followed(tmp_path):
    path, other = tmp_path / "log.hdf5", tmp_path / "other.hdf5"
    with h5py.File(other, "w") as file:
        file["secret"] = np.zeros(40)
    with h5py.File(path, "w") as file:
        for name, value in log_of().items():
            file[name] = value
        file["observations/secret"] = h5py.ExternalLink(str(other), "secret")
    with pytest.raises(DatasetError, match="observations/secret is a link into another file"):
        load_transitions("hdf5", path=path)
