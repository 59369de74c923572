"""A path in place of a source's name, and actions rescaled on the way."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from iql_torchrl import load_transitions
from iql_torchrl.data.sources.arrays import Arrays
from iql_torchrl.errors import ConfigurationError, DatasetError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def arrays(log_arrays):
    """Actions in [-5, 5]."""
    arrays = log_arrays(60, terminals=[20], timeouts=[40])
    arrays["actions"] *= 5
    arrays["actions"][:2] = [[-5, 5], [4, 0]]
    return arrays


def written(arrays, folder, name):
    path = folder / name
    if path.suffix in (".npz", ".NPZ"):
        with path.open("wb") as file:
            np.savez(file, **arrays)
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({key: list(value) for key, value in arrays.items()}), path)
    elif path.suffix:
        import h5py

        with h5py.File(path, "w") as file:
            for key, value in arrays.items():
                file[key] = value
    else:
        path.mkdir()
        for key, value in arrays.items():
            np.save(path / f"{key}.npy", value)
    return path


# ---- paths


@pytest.mark.parametrize("as_path", [str, lambda path: path], ids=["text", "path"])
@pytest.mark.parametrize("name", ["log.hdf5", "log.h5", "log.HDF5", "log.parquet", "log.npz", "log.NPZ", "log", "a.b"])
def test_a_path_stands_for_the_source_of_its_kind(
    name, as_path, log_arrays, tmp_path, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(60, terminals=[20], timeouts=[40])
    if name == "a.b":  # a folder with a dot in its name
        path = written(arrays, tmp_path, "log").rename(tmp_path / name)
    else:
        path = written(arrays, tmp_path, name)
    assert_transitions_equal(load_transitions(as_path(path)), qlearning_dataset(arrays))


def test_a_path_takes_the_options_of_its_source(log_arrays, with_next_observations, tmp_path):
    path = written(with_next_observations(log_arrays(30, timeouts=[9])), tmp_path, "log.npz")
    assert len(load_transitions(path, keep_timeouts=True)) == 30 and len(load_transitions(path)) == 28


def test_a_path_may_be_relative_or_begin_with_the_home_folder(log_arrays, tmp_path, monkeypatch):
    written(log_arrays(), tmp_path, "log.npz")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert len(load_transitions("log.npz")) == len(load_transitions("~/log.npz")) == 39


def test_the_name_of_a_source_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "embedded").mkdir()
    monkeypatch.chdir(tmp_path)
    assert len(load_transitions("embedded")) == 97_777


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("log.csv", r"log.csv is no \.hdf5, \.h5, \.parquet, \.npz file by its name.*embedded, d4rl.*path="),
        ("absent.hdf5", "absent.hdf5 does not exist"),
        ("absent.npz", "absent.npz does not exist"),
        ("empty", "empty is a folder without .npy files"),
        ("hdf6", "unknown dataset source 'hdf6'; did you mean 'hdf5'"),
        ("some/where", "unknown dataset source 'some/where'"),
    ],
)
def test_what_is_neither_a_source_nor_a_log_is_refused(source, words, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=words):
        load_transitions(source)


def test_two_paths_are_refused(log_arrays, tmp_path):
    path = written(log_arrays(), tmp_path, "log.npz")
    with pytest.raises(ConfigurationError, match=r"dataset.path=other.npz is given beside the path .*log.npz"):
        load_transitions(path, path="other.npz")


# ---- actions


@pytest.mark.parametrize(
    "bounds",
    [(-5, 5), (-5.0, [5, 5]), ([-5, -5], np.float32([5, 5])), ((-5, -5), np.float64(5))],
    ids=["numbers", "mixed", "array", "tuple"],
)
def test_actions_are_rescaled_from_the_given_bounds_and_clipped(bounds, arrays, tmp_path):
    path = written(arrays, tmp_path, "log.npz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_transitions(path, action_low=bounds[0], action_high=bounds[1])["action"].numpy()
    kept = np.delete(arrays["actions"], [40, 59], axis=0)
    np.testing.assert_allclose(found, (kept / 5).clip(-1 + 1e-5, 1 - 1e-5), atol=1e-6)
    assert np.abs(found).max() == np.float32(1 - 1e-5)


def test_bounds_are_taken_one_a_dimension(arrays):
    source = Arrays(arrays=arrays)
    found = load_transitions(source, action_low=[-10, -5], action_high=[5, 20])["action"].numpy()
    expected = np.float64([[2 * 5 / 15 - 1, 2 * 10 / 25 - 1], [2 * 14 / 15 - 1, 2 * 5 / 25 - 1]])
    np.testing.assert_allclose(found[:2], expected, atol=1e-6)
    assert source.action_low is None


def test_the_bounds_of_a_sources_options_count_unless_others_are_given(arrays):
    source = Arrays(arrays=arrays, action_low=-5, action_high=5)
    assert load_transitions(source)["action"][1, 0].item() == pytest.approx(0.8)
    assert load_transitions(source, action_low=-8, action_high=8)["action"][1, 0].item() == pytest.approx(0.5)


def test_actions_outside_the_unit_box_get_a_warning_that_says_what_to_do(arrays, tmp_path):
    path = written(arrays, tmp_path, "log.npz")
    expected = (
        r"log.npz: \d+ transitions have actions outside \[-1, 1\], the first one -5 in transition 0, dimension 0;"
    )
    with pytest.warns(UserWarning, match=expected) as found:
        transitions = load_transitions(path)
    assert "action_low and action_high" in str(found[0].message) and found[0].filename == __file__
    assert transitions["action"][0].tolist() == [-5, 5]


@pytest.mark.parametrize("largest", [1.0, 1 + 1e-6])
def test_actions_in_the_unit_box_get_no_warning_and_stay_as_they_are(largest, log_arrays):
    arrays = log_arrays()
    arrays["actions"][3] = [largest, -largest]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transitions = load_transitions(Arrays(arrays=arrays))
    np.testing.assert_array_equal(transitions["action"].numpy(), arrays["actions"][:-1])


def test_discrete_actions_get_no_warning_and_have_no_bounds(log_arrays):
    arrays = log_arrays() | {"actions": np.arange(40) % 7}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_transitions(Arrays(arrays=arrays))
    with pytest.raises(ConfigurationError, match="are for continuous actions; the data's are discrete"):
        load_transitions(Arrays(arrays=arrays), action_low=0, action_high=6)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"action_low": -5}, "dataset.action_low is of no use alone; give dataset.action_high too"),
        ({"action_high": [5, 5]}, "dataset.action_high is of no use alone; give dataset.action_low too"),
        ({"action_low": 5, "action_high": -5}, "dataset.action_low must be below dataset.action_high, got 5 and -5."),
        ({"action_low": [0, 1], "action_high": 1}, "must be below dataset.action_high, got 1 and 1 in dimension 1."),
        ({"action_low": [0, 0], "action_high": [1]}, "dataset.action_low has 2 numbers but dataset.action_high has 1"),
        (
            {"action_low": [-5] * 3, "action_high": 5},
            "dataset.action_low has 3 numbers but the data's actions have 2 d",
        ),
        ({"action_low": -5, "action_high": [5]}, "dataset.action_high has 1 number but the data's actions have 2 dim"),
        ({"action_low": -np.inf, "action_high": 5}, "dataset.action_low must be null, a finite number, or a list of"),
        ({"action_low": [], "action_high": 5}, "dataset.action_low must be null, a finite number, or a list of"),
        ({"action_low": "a", "action_high": 5}, "dataset.action_low must be null, a finite number, or a list of"),
        ({"action_low": [True, 0], "action_high": 5}, "dataset.action_low must be null, a finite number, or a list"),
    ],
)
def test_bounds_that_make_no_sense_are_refused_by_name(bounds, words, arrays, tmp_path):
    for source in (Arrays(arrays=arrays), written(arrays, tmp_path, "log.npz")):
        with pytest.raises(ConfigurationError) as error:
            load_transitions(source, **bounds)
        assert words in str(error.value)


def test_an_action_outside_the_given_bounds_is_refused_with_its_place(arrays):
    with pytest.raises(
        DatasetError, match=r"action -5 in transition 0, dimension 0, lies outside.*\[-4.5, 4.5\]"
    ) as error:
        load_transitions(Arrays(arrays=arrays), action_low=-4.5, action_high=4.5)
    assert "dataset.action_low" in str(error.value)
