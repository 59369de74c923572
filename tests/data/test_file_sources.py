"""The hdf5, parquet and numpy sources: one log in every layout, episode ids, and files that cannot be read."""

from __future__ import annotations

import io
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from iql_torchrl import load_transitions
from iql_torchrl.errors import DatasetError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

VECTORS = ("observations", "actions", "next_observations")
COLUMNS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations", "episode_ids")


# ---- layouts


def as_hdf5(arrays, folder):
    with h5py.File(folder / "log.hdf5", "w") as file:
        for key, value in arrays.items():
            file[key] = value
    return folder / "log.hdf5"


def list_column(array):
    offsets = pa.array(np.arange(len(array) + 1, dtype=np.int32) * array.shape[1])
    return pa.ListArray.from_arrays(offsets, pa.array(array.reshape(-1)))


def large_list_column(array):
    offsets = pa.array(np.arange(len(array) + 1, dtype=np.int64) * array.shape[1])
    return pa.LargeListArray.from_arrays(offsets, pa.array(array.reshape(-1)))


def fixed_list_column(array):
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


def table(arrays, vector=list_column):
    """The arrays as columns; ``vector=None`` is a column a number, the last one first."""
    columns = {}
    for key, value in arrays.items():
        if not isinstance(value, np.ndarray):
            columns[key] = value
        elif value.ndim == 1:
            columns[key] = pa.array(value)
        elif vector is None:
            columns |= {f"{key}_{index}": pa.array(value[:, index]) for index in reversed(range(value.shape[1]))}
        else:
            columns[key] = vector(value)
    return pa.table(columns)


def as_parquet(arrays, folder, vector=list_column, rows=17):
    pq.write_table(table(arrays, vector), folder / "log.parquet", row_group_size=rows)
    return folder / "log.parquet"


def as_npz(arrays, folder):
    np.savez(folder / "log.npz", **arrays)
    return folder / "log.npz"


def as_compressed_npz(arrays, folder):
    np.savez_compressed(folder / "log.npz", **arrays)
    return folder / "log.npz"


def as_npy_files(arrays, folder):
    (folder / "log").mkdir(exist_ok=True)
    for key, value in arrays.items():
        np.save(folder / "log" / f"{key}.npy", value)
    return folder / "log"


LAYOUTS = {
    "hdf5": ("hdf5", as_hdf5),
    "parquet lists": ("parquet", as_parquet),
    "parquet large lists": ("parquet", lambda arrays, folder: as_parquet(arrays, folder, large_list_column)),
    "parquet fixed-size lists": ("parquet", lambda arrays, folder: as_parquet(arrays, folder, fixed_list_column)),
    "parquet numbered columns": ("parquet", lambda arrays, folder: as_parquet(arrays, folder, None)),
    "parquet in one group": ("parquet", lambda arrays, folder: as_parquet(arrays, folder, rows=None)),
    "npz": ("numpy", as_npz),
    "compressed npz": ("numpy", as_compressed_npz),
    "npy files": ("numpy", as_npy_files),
}
FORMATS = {"hdf5": as_hdf5, "parquet": as_parquet, "npz": as_npz, "npy files": as_npy_files}
SOURCE_OF = {"hdf5": "hdf5", "parquet": "parquet", "npz": "numpy", "npy files": "numpy"}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_format = pytest.mark.parametrize("form", FORMATS)


def load(layout, arrays, folder, **options):
    source, write = LAYOUTS[layout]
    return load_transitions(source, path=write(arrays, folder), **options)


def refusal(source, path, *words, **options):
    """The message of the error, which must name the path and hold the words."""
    with pytest.raises(DatasetError) as error:
        load_transitions(source, path=path, **options)
    message = str(error.value)
    missing = [word for word in (str(path), *words) if word not in message]
    assert not missing, f"{missing} not in {message!r}"
    return message


# ---- the same log in every layout


@every_layout
@pytest.mark.parametrize("seed", range(3))
def test_every_layout_of_a_log_gives_the_transitions_of_the_rule(
    seed, layout, log_arrays, tmp_path, qlearning_dataset, assert_transitions_equal
):
    random = np.random.default_rng(seed)
    terminals, timeouts = (np.flatnonzero(random.random(120) < 0.07) for _ in range(2))
    arrays = log_arrays(120, seed=seed, terminals=terminals, timeouts=timeouts)
    assert_transitions_equal(load(layout, arrays, tmp_path), qlearning_dataset(arrays))


@every_layout
def test_a_log_of_more_rows_than_one_read_gives_the_transitions_of_the_rule(
    layout, log_arrays, tmp_path, monkeypatch, qlearning_dataset, assert_transitions_equal
):
    ends = {"terminals": range(500, 70_000, 901), "timeouts": [65_534, 65_535, 65_536, *range(99, 60_000, 1000)]}
    arrays = log_arrays(70_000, **ends)
    source, write = LAYOUTS[layout]
    if layout.startswith("parquet") and layout != "parquet in one group":
        vector = {"parquet lists": list_column, "parquet fixed-size lists": fixed_list_column}.get(layout)
        vector = large_list_column if layout == "parquet large lists" else vector
        path = as_parquet(arrays, tmp_path, vector, rows=9_999)
    else:
        path = write(arrays, tmp_path)
    assert_transitions_equal(load_transitions(source, path=path), qlearning_dataset(arrays))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_layout
def test_values_stored_in_either_precision_become_float32(
    layout, dtype, log_arrays, tmp_path, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(60, terminals=[7, 40], timeouts=[21])
    for key in ("observations", "actions", "rewards"):
        arrays[key] = np.random.default_rng(5).normal(size=arrays[key].shape).astype(dtype)
    transitions = load(layout, arrays, tmp_path)
    assert str(transitions["observation"].dtype) == str(transitions["next", "reward"].dtype) == "torch.float32"
    assert_transitions_equal(transitions, qlearning_dataset(arrays))


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
@every_layout
def test_one_integer_a_row_is_a_discrete_action(
    layout, dtype, log_arrays, tmp_path, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(60, terminals=[7, 40], timeouts=[21])
    arrays["actions"] = np.random.default_rng(5).integers(0, 4, size=60).astype(dtype)
    transitions = load(layout, arrays, tmp_path)
    assert str(transitions["action"].dtype) == "torch.int64" and transitions["action"].shape == (57 + 1,)
    assert_transitions_equal(transitions, qlearning_dataset(arrays))


@every_layout
def test_keep_timeouts_keeps_every_row_with_its_own_next_observation(
    layout, log_arrays, with_next_observations, tmp_path
):
    arrays = with_next_observations(log_arrays(40, terminals=[5, 11], timeouts=[11, 30]))
    transitions = load(layout, arrays, tmp_path, keep_timeouts=True)
    assert transitions["observation"].numpy().tolist() == arrays["observations"].tolist()
    assert transitions["next", "observation"].numpy().tolist() == arrays["next_observations"].tolist()
    assert transitions["action"].numpy().tolist() == arrays["actions"].tolist()
    assert transitions["next", "reward"][:, 0].numpy().tolist() == arrays["rewards"].tolist()
    assert transitions["next", "terminated"][:, 0].nonzero()[:, 0].tolist() == [5, 11]
    assert transitions["next", "truncated"][:, 0].nonzero()[:, 0].tolist() == [11, 30]


@pytest.mark.parametrize("max_episode_steps", [7, 50, 1000])
@every_layout
def test_a_log_without_timeouts_is_cut_at_the_step_limit(
    layout, max_episode_steps, log_arrays, tmp_path, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(120, terminals=[3, 31, 88], timeouts=None)
    transitions = load(layout, arrays, tmp_path, max_episode_steps=max_episode_steps)
    assert_transitions_equal(transitions, qlearning_dataset(arrays, max_episode_steps))


@every_layout
def test_columns_that_training_does_not_need_are_ignored(
    layout, log_arrays, tmp_path, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(terminals=[5], timeouts=[12])
    more = {"qpos": np.full(40, np.nan), "note": np.full(40, "a") if layout != "hdf5" else np.full(40, b"a")}
    assert_transitions_equal(load(layout, {**more, **arrays}, tmp_path), qlearning_dataset(arrays))


@every_format
def test_a_path_may_begin_with_the_home_folder(
    form, log_arrays, tmp_path, monkeypatch, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(terminals=[5])
    path = FORMATS[form](arrays, tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    transitions = load_transitions(SOURCE_OF[form], path=f"~/{path.name}")
    assert_transitions_equal(transitions, qlearning_dataset(arrays))


def test_numbered_columns_are_ordered_by_number_and_not_by_name(log_arrays, tmp_path):
    arrays = log_arrays(30, observation_dim=23)
    transitions = load("parquet numbered columns", arrays, tmp_path)
    assert transitions["observation"].numpy().tolist() == arrays["observations"][:-1].tolist()


def test_row_groups_may_be_empty(log_arrays, tmp_path, qlearning_dataset, assert_transitions_equal):
    arrays = log_arrays(40, terminals=[9], timeouts=[20])
    whole, path = table(arrays), tmp_path / "log.parquet"
    with pq.ParquetWriter(path, whole.schema) as writer:
        for piece in (whole.slice(0, 10), whole.slice(0, 0), whole.slice(10), whole.slice(0, 0)):
            writer.write_table(piece)
    assert_transitions_equal(load_transitions("parquet", path=path), qlearning_dataset(arrays))


def test_the_first_row_group_may_be_empty(log_arrays, tmp_path, qlearning_dataset, assert_transitions_equal):
    arrays = log_arrays(40, terminals=[9], timeouts=[20])
    whole, path = table(arrays), tmp_path / "log.parquet"
    with pq.ParquetWriter(path, whole.schema) as writer:
        writer.write_table(whole.slice(0, 0))
        writer.write_table(whole)
    assert_transitions_equal(load_transitions("parquet", path=path), qlearning_dataset(arrays))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", ">f8"])
def test_npy_files_may_have_any_byte_and_index_order(
    dtype, order, log_arrays, tmp_path, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(40, terminals=[9], timeouts=[20])
    stored = {key: np.asarray(value, dtype, order) for key, value in arrays.items()}
    transitions = load_transitions("numpy", path=as_npy_files(stored, tmp_path))
    assert_transitions_equal(transitions, qlearning_dataset(arrays))


# ---- episode ids


def ids_of(ends, labels=None):
    numbers = np.cumsum(ends) - ends
    return numbers if labels is None else np.asarray(labels)[numbers]


def with_ids(arrays, labels=None):
    """The same log, its timeouts replaced by episode ids."""
    ids = ids_of(arrays["terminals"] | arrays["timeouts"], labels)
    return {**{key: value for key, value in arrays.items() if key != "timeouts"}, "episode_ids": ids}


@pytest.mark.parametrize("seed", range(3))
@every_layout
def test_ends_found_by_a_change_of_id_equal_those_by_flags(
    seed, layout, log_arrays, tmp_path, qlearning_dataset, assert_transitions_equal
):
    random = np.random.default_rng(seed)
    terminals = np.flatnonzero(random.random(120) < 0.07)
    timeouts = np.setdiff1d(np.flatnonzero(random.random(120) < 0.07), terminals)
    arrays = log_arrays(120, seed=seed, terminals=terminals, timeouts=timeouts)
    assert_transitions_equal(load(layout, with_ids(arrays), tmp_path), qlearning_dataset(arrays))


@pytest.mark.parametrize("kind", ["growing", "falling", "shuffled", "negative", "huge", "uint8", "one column"])
@every_format
def test_ids_need_not_be_consecutive_numbers(
    kind, form, log_arrays, tmp_path, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(60, terminals=[3, 20], timeouts=[9, 10, 41])
    labels = {
        "growing": [3, 7, 8, 100, 1000, 1001],
        "falling": [5, 4, 3, 2, 1, 0],
        "shuffled": [4, 0, 17, 2, 9, 1],
        "negative": [-1, -9, 3, 0, -2, 1],
        "huge": [2**62, -(2**62), 2**63 - 1, -(2**63), 0, 1],
        "uint8": np.array([255, 0, 254, 1, 128, 127], np.uint8),
        "one column": [4, 0, 17, 2, 9, 1],
    }[kind]
    stored = with_ids(arrays, labels)
    if kind == "one column":
        stored["episode_ids"] = stored["episode_ids"][:, None]
    path = FORMATS[form](stored, tmp_path)
    assert_transitions_equal(load_transitions(SOURCE_OF[form], path=path), qlearning_dataset(arrays))


@every_format
def test_ids_and_flags_together_give_the_ends_of_both(
    form, log_arrays, tmp_path, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(60, terminals=[3, 20], timeouts=[9, 20, 41])
    stored = {**arrays, "episode_ids": ids_of(arrays["terminals"] | arrays["timeouts"])}
    stored["timeouts"] = np.zeros(60, dtype=bool)
    stored["timeouts"][[20]] = True  # the rest is for the ids to tell
    path = FORMATS[form](stored, tmp_path)
    assert_transitions_equal(load_transitions(SOURCE_OF[form], path=path), qlearning_dataset(arrays))


def test_ids_win_over_a_step_limit(log_arrays, write_log, qlearning_dataset, assert_transitions_equal):
    arrays = log_arrays(60, terminals=[3], timeouts=[30])
    transitions = load_transitions("hdf5", path=write_log(with_ids(arrays)), max_episode_steps=5)
    assert_transitions_equal(transitions, qlearning_dataset(arrays))


@every_format
def test_keep_timeouts_marks_the_last_row_of_every_id_that_is_not_terminal(
    form, log_arrays, with_next_observations, tmp_path
):
    arrays = with_next_observations(log_arrays(40, terminals=[9], timeouts=[20]))
    path = FORMATS[form](with_ids(arrays), tmp_path)
    transitions = load_transitions(SOURCE_OF[form], path=path, keep_timeouts=True)
    assert transitions["next", "terminated"][:, 0].nonzero()[:, 0].tolist() == [9]
    assert transitions["next", "truncated"][:, 0].nonzero()[:, 0].tolist() == [20, 39]
    assert transitions["next", "done"][:, 0].nonzero()[:, 0].tolist() == [9, 20, 39]
    assert transitions["next", "observation"].numpy().tolist() == arrays["next_observations"].tolist()
    assert transitions["episode"].unique(return_counts=True)[1].tolist() == [10, 11, 19]


@every_format
def test_episodes_of_one_terminal_row_are_transitions_of_their_own(form, log_arrays, tmp_path):
    arrays = log_arrays(12, terminals=range(12), timeouts=None)
    path = FORMATS[form]({**arrays, "episode_ids": np.arange(12)}, tmp_path)
    transitions = load_transitions(SOURCE_OF[form], path=path)
    assert transitions["observation"].numpy().tolist() == arrays["observations"][:-1].tolist()
    assert transitions["next", "terminated"].all() and not transitions["next", "truncated"].any()
    assert len(transitions["episode"].unique()) == 11


@every_format
def test_episodes_of_one_row_none_of_them_terminal_leave_no_complete_transition(form, log_arrays, tmp_path):
    path = FORMATS[form]({**log_arrays(12, timeouts=None), "episode_ids": np.arange(12)}, tmp_path)
    refusal(SOURCE_OF[form], path, "no complete transition in 12 rows")


@every_format
def test_episodes_of_one_row_are_all_kept_with_keep_timeouts(form, log_arrays, with_next_observations, tmp_path):
    arrays = with_next_observations(log_arrays(12, timeouts=None))
    path = FORMATS[form]({**arrays, "episode_ids": np.arange(12)}, tmp_path)
    transitions = load_transitions(SOURCE_OF[form], path=path, keep_timeouts=True)
    assert transitions["next", "observation"].numpy().tolist() == arrays["next_observations"].tolist()
    assert transitions["next", "truncated"].all() and not transitions["next", "terminated"].any()
    assert transitions["episode"].unique(return_counts=True)[1].tolist() == [1] * 12


@every_format
def test_scattered_rows_of_an_id_are_named_with_both_places(form, log_arrays, tmp_path):
    ids = np.repeat([70, 31, 70, 5], 10)
    path = FORMATS[form]({**log_arrays(40, timeouts=None), "episode_ids": ids}, tmp_path)
    refusal(SOURCE_OF[form], path, "episode 70 in episode_ids", "begin in row 0 and again in row 20")


@every_format
def test_scattered_rows_in_the_middle_and_at_the_end_are_named(form, log_arrays, tmp_path):
    ids = np.array([9] * 10 + [4] * 5 + [8] * 24 + [4])
    path = FORMATS[form]({**log_arrays(40, timeouts=None), "episode_ids": ids}, tmp_path)
    refusal(SOURCE_OF[form], path, "episode 4 in episode_ids", "begin in row 10 and again in row 39")


@pytest.mark.parametrize("flag", ["terminals", "timeouts"])
@every_format
def test_an_end_flag_in_the_middle_of_an_id_is_named_with_its_row(form, flag, log_arrays, tmp_path):
    arrays = log_arrays(40, **{flag: [5, 9, 25]})
    path = FORMATS[form]({**arrays, "episode_ids": np.repeat([3, 12, 11, 10], 10)}, tmp_path)
    refusal(SOURCE_OF[form], path, "flags in row 5, but row 6", "same number, 3, in episode_ids (2 such rows)")


@pytest.mark.parametrize("kind", ["float", "bool", "two columns"])
@every_format
def test_ids_that_are_not_one_integer_a_row_are_refused(form, kind, log_arrays, tmp_path):
    ids = {"float": np.arange(40.0), "bool": np.zeros(40, bool), "two columns": np.zeros((40, 2), np.int64)}[kind]
    path = FORMATS[form]({**log_arrays(40, timeouts=None), "episode_ids": ids}, tmp_path)
    refusal(SOURCE_OF[form], path, "episode_ids must be one integer a row", str(ids.dtype), str(ids.shape))


@pytest.mark.parametrize("form", ["hdf5", "npz", "npy files"])
def test_a_single_id_for_all_rows_is_refused(form, log_arrays, tmp_path):
    path = FORMATS[form]({**log_arrays(40, timeouts=None), "episode_ids": np.int64(3)}, tmp_path)
    refusal(SOURCE_OF[form], path, "episode_ids must be one integer a row")


@pytest.mark.parametrize("rows", [0, 1, 39, 41])
@pytest.mark.parametrize("form", ["hdf5", "npz", "npy files"])
def test_ids_of_another_length_are_named_with_both_lengths(form, rows, log_arrays, tmp_path):
    path = FORMATS[form]({**log_arrays(40, timeouts=None), "episode_ids": np.arange(rows)}, tmp_path)
    refusal(SOURCE_OF[form], path, f"episode_ids has {rows} rows but terminals has 40")


# ---- every source: what cannot be read


@pytest.mark.parametrize("source", ["hdf5", "parquet", "numpy"])
def test_a_path_where_nothing_is_is_named(source, tmp_path):
    refusal(source, tmp_path / "gone", "does not exist", "dataset.path=")


@pytest.mark.parametrize("source", ["hdf5", "parquet"])
def test_a_folder_in_place_of_a_file_is_named_as_one(source, tmp_path):
    refusal(source, tmp_path, "is a folder")


def test_a_folder_without_npy_files_has_no_columns(tmp_path):
    refusal("numpy", tmp_path, "missing observations, actions, rewards, terminals", "found nothing")


def test_a_single_npy_file_in_place_of_their_folder_is_refused(log_arrays, tmp_path):
    folder = as_npy_files(log_arrays(), tmp_path)
    refusal("numpy", folder / "rewards.npy", "is a single array", "folder of rewards.npy")


def test_a_folder_in_place_of_a_npy_file_is_named_with_the_column(log_arrays, tmp_path):
    folder = as_npy_files(log_arrays(), tmp_path)
    (folder / "rewards.npy").unlink()
    (folder / "rewards.npy").mkdir()
    refusal("numpy", folder, "rewards cannot be read")


CONTENTS = [b"", b"observations,actions\n0.1,0.2\n", bytes(5000), b"PAR1", b"PK\3\4" + bytes(100), b"\x93NUMPY"]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(("source", "kind"), [("hdf5", "HDF5"), ("parquet", "Parquet"), ("numpy", "NumPy")])
def test_a_file_of_another_kind_is_named(source, kind, content, tmp_path):
    (tmp_path / "log").write_bytes(content)
    refusal(source, tmp_path / "log", kind)


@pytest.mark.parametrize("source", ["hdf5", "parquet", "numpy"])
@pytest.mark.parametrize("form", ["hdf5", "parquet", "npz"])
def test_the_file_of_one_source_is_refused_by_another(form, source, log_arrays, tmp_path):
    if SOURCE_OF[form] != source:
        refusal(source, FORMATS[form](log_arrays(), tmp_path))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("form", ["parquet", "npz"])
def test_a_truncated_file_is_named(form, share, log_arrays, tmp_path):
    path = FORMATS[form](log_arrays(2000), tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refusal(SOURCE_OF[form], path)


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.1, 0.5, 0.999])
def test_a_truncated_npy_file_is_named_with_its_column(share, log_arrays, tmp_path):
    folder = as_npy_files(log_arrays(2000), tmp_path)
    whole = (folder / "observations.npy").read_bytes()
    (folder / "observations.npy").write_bytes(whole[: int(share * len(whole))])
    refusal("numpy", folder, "observations cannot be read")


def test_a_damaged_page_of_a_parquet_file_is_named_with_its_column(log_arrays, tmp_path):
    path = as_parquet(log_arrays(2000), tmp_path, rows=500)
    place = pq.ParquetFile(path).metadata.row_group(2).column(0)
    assert place.path_in_schema.startswith("observations")
    with open(path, "r+b") as file:
        file.seek(place.dictionary_page_offset or place.data_page_offset)
        file.write(b"\xff" * place.total_compressed_size)
    refusal("parquet", path, "observations cannot be read", "damaged")


@pytest.mark.parametrize("form", [as_npz, as_compressed_npz])
def test_a_damaged_member_of_an_npz_file_is_named(form, log_arrays, tmp_path):
    path = form(log_arrays(2000), tmp_path)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("actions.npy")
    with open(path, "r+b") as file:
        file.seek(member.header_offset + 200 + member.compress_size // 2)
        file.write(b"\xff" * 50)
    refusal("numpy", path, "actions cannot be read")


@every_format
@pytest.mark.parametrize("missing", ["observations", "actions", "rewards", "terminals"])
def test_a_missing_column_is_named_with_those_found(missing, form, log_arrays, tmp_path):
    arrays = log_arrays()
    del arrays[missing]
    path = FORMATS[form]({**arrays, "note": np.zeros(40)}, tmp_path)
    refusal(SOURCE_OF[form], path, f"missing {missing}", *arrays, "note")


@every_format
def test_keep_timeouts_without_next_observations_is_refused(form, log_arrays, tmp_path):
    path = FORMATS[form](log_arrays(), tmp_path)
    refusal(SOURCE_OF[form], path, "next_observations", "dataset.keep_timeouts", keep_timeouts=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "next_observations"])
@every_format
def test_a_value_that_is_not_finite_is_named_with_its_row(
    form, key, value, log_arrays, with_next_observations, tmp_path
):
    arrays = with_next_observations(log_arrays(40, terminals=[9], timeouts=[20]))
    arrays[key][23] = value
    path = FORMATS[form](arrays, tmp_path)
    refusal(SOURCE_OF[form], path, f"{key} holds {value} in row 23 ", keep_timeouts=key == "next_observations")


@pytest.mark.parametrize("row", [65_535, 65_536, 69_999])
@every_format
def test_a_value_that_is_not_finite_is_named_with_its_row_beyond_one_read(form, row, log_arrays, tmp_path):
    arrays = log_arrays(70_000)
    arrays["rewards"][row] = np.nan
    path = FORMATS[form](arrays, tmp_path) if form != "parquet" else as_parquet(arrays, tmp_path, rows=30_000)
    refusal(SOURCE_OF[form], path, f"rewards holds nan in row {row} ")


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals", "timeouts", "episode_ids"])
@every_format
def test_a_column_of_strings_is_named(form, key, log_arrays, tmp_path):
    arrays = {**log_arrays(), "episode_ids": np.zeros(40, np.int64)}
    words = np.full(arrays[key].shape, "0.5")
    if form == "parquet":
        column = words.tolist()
        path = as_parquet({**arrays, key: pa.array(column)}, tmp_path)
    else:
        path = FORMATS[form]({**arrays, key: words.astype(bytes)}, tmp_path)
    refusal(SOURCE_OF[form], path, f"{key} must", "dtype")


# ---- Parquet


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals", "timeouts", "episode_ids"])
@pytest.mark.parametrize("row", [0, 25, 39])
def test_a_parquet_column_with_missing_values_is_named_with_their_number(key, row, log_arrays, tmp_path):
    arrays = {**log_arrays(), "episode_ids": np.zeros(40, np.int64)}
    values = arrays[key].tolist()
    values[row] = None
    refusal("parquet", as_parquet({**arrays, key: pa.array(values)}, tmp_path), f"{key} has 1 missing values")


@pytest.mark.parametrize("vector", [list_column, large_list_column, fixed_list_column])
def test_missing_numbers_inside_lists_are_refused(vector, log_arrays, tmp_path):
    arrays = log_arrays()
    values = arrays["observations"].tolist()
    values[3][1] = values[5][2] = None
    column = pa.array(values, type=vector(arrays["observations"]).type)
    path = as_parquet({**arrays, "observations": column}, tmp_path)
    refusal("parquet", path, "observations has 2 missing values")


def test_missing_values_in_a_numbered_column_are_refused(log_arrays, tmp_path):
    arrays = log_arrays()
    whole = table(arrays, None)
    values = whole["observations_1"].to_pylist()
    values[30] = None
    whole = whole.set_column(whole.schema.get_field_index("observations_1"), "observations_1", pa.array(values))
    pq.write_table(whole, tmp_path / "log.parquet")
    refusal("parquet", tmp_path / "log.parquet", "observations has 1 missing values")


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals"])
@pytest.mark.parametrize("row", [0, 5, 39])
def test_lists_of_different_lengths_are_refused(key, row, log_arrays, tmp_path):
    arrays = log_arrays()
    values = arrays[key].reshape(40, -1).tolist()
    values[row] = [*values[row], values[row][0]]
    path = as_parquet({**arrays, key: pa.array(values)}, tmp_path)
    width = len(values[1])
    if row == 0 and width == 1:  # by the first row, all are lists
        refusal("parquet", path, f"{key} must ", "shape (40, 2)")
        return
    message = refusal("parquet", path, f"{key} has lists of ")
    assert re.search(rf"of {width} and of {width + 1} |of {width + 1} and of {width} ", message)


def test_lists_whose_lengths_differ_between_row_groups_are_refused(log_arrays, tmp_path):
    arrays = log_arrays()
    values = [row[:2] if index >= 20 else row for index, row in enumerate(arrays["observations"].tolist())]
    path = as_parquet({**arrays, "observations": pa.array(values)}, tmp_path, rows=20)
    refusal("parquet", path, "observations has lists of 3 and of 2 numbers")


@pytest.mark.parametrize("gone", [0, 1, 5])
def test_a_missing_numbered_column_is_named(gone, log_arrays, tmp_path):
    whole = table(log_arrays(observation_dim=12), None).drop_columns([f"observations_{gone}"])
    pq.write_table(whole, tmp_path / "log.parquet")
    refusal("parquet", tmp_path / "log.parquet", f"observations_{gone} is missing", "observations_11")


@pytest.mark.parametrize("key", ["observations", "actions"])
def test_a_column_of_lists_beside_numbered_columns_is_refused(key, log_arrays, tmp_path):
    arrays = log_arrays()
    path = as_parquet({**arrays, f"{key}_0": np.zeros(40)}, tmp_path)
    refusal("parquet", path, f"both {key} and {key}_0")


def test_numbered_columns_of_strings_are_refused(log_arrays, tmp_path):
    whole = table(log_arrays(), None)
    whole = whole.set_column(whole.schema.get_field_index("actions_1"), "actions_1", pa.array(["0.5"] * 40))
    pq.write_table(whole, tmp_path / "log.parquet")
    refusal("parquet", tmp_path / "log.parquet", "actions must hold real numbers")


@pytest.mark.parametrize("widths", [(2, 2), (2, 3), (2, None)])
def test_numbered_columns_of_lists_are_refused(widths, log_arrays, tmp_path):
    arrays = log_arrays()
    del arrays["observations"]
    parts = [pa.array([[0.5] * width] * 40 if width else [0.5] * 40) for width in widths]
    path = as_parquet({**arrays, "observations_0": parts[0], "observations_1": parts[1]}, tmp_path)
    refusal("parquet", path, "observations")


@pytest.mark.parametrize("key", ["observations", "rewards", "terminals"])
def test_two_columns_of_one_name_are_refused(key, log_arrays, tmp_path):
    whole = table(log_arrays())
    pq.write_table(whole.append_column(key, whole[key]), tmp_path / "log.parquet")
    refusal("parquet", tmp_path / "log.parquet", key)


def test_two_numbered_columns_of_one_number_are_refused(log_arrays, tmp_path):
    path = as_parquet({**table_of_numbers(log_arrays()), "observations_00": np.zeros(40)}, tmp_path)
    refusal("parquet", path, "observations_0")


def table_of_numbers(arrays):
    whole = table(arrays, None)
    return {name: whole[name].to_numpy() for name in whole.column_names}


NOT_NUMBERS = {
    "lists of lists": lambda: pa.array([[[0.5], [0.5]]] * 40),
    "lists of strings": lambda: pa.array([["a", "b"]] * 40),
    "records": lambda: pa.array([{"x": 0.5}] * 40),
    "bytes": lambda: pa.array([b"0.5"] * 40),
    "words": lambda: pa.array(["a", "b"] * 20).dictionary_encode(),
    "dates": lambda: pa.array(np.zeros(40, "datetime64[ms]")),
    "nothing": lambda: pa.nulls(40),
    "empty lists": lambda: pa.array([[]] * 40, type=pa.list_(pa.float32())),
}


@pytest.mark.parametrize("kind", NOT_NUMBERS)
@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals", "episode_ids"])
def test_a_parquet_column_of_another_type_is_named(key, kind, log_arrays, tmp_path):
    path = as_parquet({**log_arrays(), key: NOT_NUMBERS[kind]()}, tmp_path)
    refusal("parquet", path, f"{path}: {key} ")


# ---- NumPy


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("key", ["observations", "rewards", "terminals", "episode_ids"])
@pytest.mark.parametrize("form", ["npz", "npy files"])
def test_python_objects_are_refused_and_never_unpickled(form, key, log_arrays, tmp_path):
    objects, sprung = np.full(40, None, dtype=object), tmp_path / "sprung"
    objects[7] = Trap(sprung)
    path = FORMATS[form]({**log_arrays(), key: objects}, tmp_path)
    refusal("numpy", path, f"{key} cannot be read", "Python objects")
    assert not sprung.exists()
    np.load(path / f"{key}.npy" if form == "npy files" else path, allow_pickle=True)[
        ... if form == "npy files" else key
    ]
    assert sprung.exists()  # the trap works


@pytest.mark.parametrize("form", ["npz", "npy files"])
def test_python_objects_that_training_does_not_need_are_not_unpickled_either(
    form, log_arrays, tmp_path, qlearning_dataset, assert_transitions_equal
):
    arrays, sprung = log_arrays(terminals=[5]), tmp_path / "sprung"
    path = FORMATS[form]({**arrays, "infos": np.array([Trap(sprung)], dtype=object)}, tmp_path)
    assert_transitions_equal(load_transitions("numpy", path=path), qlearning_dataset(arrays))
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["log.npz", "log.npy", "log.pkl"])
def test_a_pickle_in_place_of_the_file_is_refused_and_not_loaded(name, tmp_path):
    sprung = tmp_path / "sprung"
    (tmp_path / name).write_bytes(pickle.dumps(Trap(sprung)))
    refusal("numpy", tmp_path / name, "cannot be opened as a NumPy file")
    assert not sprung.exists()


def test_a_pickle_in_place_of_a_npy_file_is_refused_and_not_loaded(log_arrays, tmp_path):
    folder, sprung = as_npy_files(log_arrays(), tmp_path), tmp_path / "sprung"
    (folder / "actions.npy").write_bytes(pickle.dumps(Trap(sprung)))
    refusal("numpy", folder, "actions cannot be read")
    assert not sprung.exists()


def spoilt_header(array, header):
    """An .npy file whose description of the array reads otherwise."""
    stream = io.BytesIO()
    np.save(stream, array)
    content = stream.getvalue()
    return content[:10] + header.encode().ljust(len(content[:128]) - 11)[:117] + b"\n" + content[128:]


HEADERS = {
    "not closed": "{'descr': '<f4', 'fortran_order': False, 'shape': (40,",
    "other keys": "{'kind': '<f4'}",
    "not a dictionary": "40",
    "unknown type": "{'descr': 'nonsense', 'fortran_order': False, 'shape': (40,), }",
    "negative shape": "{'descr': '<f4', 'fortran_order': False, 'shape': (-40,), }",
    "more than there is": "{'descr': '<f4', 'fortran_order': False, 'shape': (4000,), }",
    "more than any memory": "{'descr': '<f4', 'fortran_order': False, 'shape': (9000000000000000,), }",
    "beyond 64 bits": "{'descr': '<f4', 'fortran_order': False, 'shape': (90000000000000000000000,), }",
}


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("form", ["npz", "npy files"])
def test_an_array_with_a_damaged_description_is_named(form, kind, log_arrays, tmp_path):
    arrays = log_arrays()
    rewards = arrays.pop("rewards")
    path, content = FORMATS[form](arrays, tmp_path), spoilt_header(rewards, HEADERS[kind])
    if form == "npz":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("rewards.npy", content)
    else:
        (path / "rewards.npy").write_bytes(content)
    refusal("numpy", path, "rewards ")


def test_a_member_of_an_npz_file_that_is_no_array_is_named(log_arrays, tmp_path):
    arrays = log_arrays()
    del arrays["rewards"]
    path = as_npz(arrays, tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("rewards.npy", b"0.5, 0.25")
    refusal("numpy", path, "rewards cannot be read")


def test_an_npz_file_in_place_of_a_npy_file_is_named_with_the_column(log_arrays, tmp_path):
    folder = as_npy_files(log_arrays(), tmp_path)
    shutil.copy(as_npz(log_arrays(), tmp_path), folder / "rewards.npy")
    refusal("numpy", folder, "rewards cannot be read")


@pytest.mark.parametrize("what", ["encrypted", "compressed in an unknown way"])
def test_an_npz_file_that_zip_cannot_unpack_is_named(what, log_arrays, tmp_path):
    path = as_npz(log_arrays(), tmp_path)
    content = bytearray(path.read_bytes())
    for marker, flags, method in ((b"PK\1\2", 8, 10), (b"PK\3\4", 6, 8)):
        for match in re.finditer(re.escape(marker), bytes(content)):
            if what == "encrypted":
                content[match.start() + flags] |= 1
            else:
                content[match.start() + method] = 99
    path.write_bytes(content)
    refusal("numpy", path, "cannot be read")


# ---- HDF5


def without(arrays, key):
    return {name: value for name, value in arrays.items() if name != key}


@pytest.fixture
def full_arrays(log_arrays, with_next_observations):
    return {**with_next_observations(log_arrays()), "episode_ids": np.zeros(40, np.int64)}


@pytest.mark.parametrize("key", COLUMNS)
def test_a_link_into_another_file_is_refused(key, full_arrays, write_log, tmp_path):
    write_log(full_arrays, "other.hdf5")
    path = write_log({**full_arrays, key: h5py.ExternalLink("other.hdf5", f"/{key}")})
    refusal("hdf5", path, f"{key} is a link into another file")


@pytest.mark.parametrize("place", ["array", "folder"])
@pytest.mark.parametrize("key", COLUMNS)
def test_a_soft_link_that_leads_into_another_file_is_refused(key, place, full_arrays, write_log):
    write_log(full_arrays, "other.hdf5")
    links = {
        "array": {"elsewhere": h5py.ExternalLink("other.hdf5", f"/{key}"), key: h5py.SoftLink("/elsewhere")},
        "folder": {"elsewhere": h5py.ExternalLink("other.hdf5", "/"), key: h5py.SoftLink(f"/elsewhere/{key}")},
    }[place]
    refusal("hdf5", write_log({**without(full_arrays, key), **links}), key)


def test_a_soft_link_within_the_file_is_followed(log_arrays, write_log, qlearning_dataset, assert_transitions_equal):
    arrays = log_arrays(terminals=[5], timeouts=[12])
    links = {"kept/rewards": arrays["rewards"], "rewards": h5py.SoftLink("/kept/rewards")}
    path = write_log({**without(arrays, "rewards"), **links})
    assert_transitions_equal(load_transitions("hdf5", path=path), qlearning_dataset(arrays))


@pytest.mark.parametrize("key", COLUMNS)
def test_a_dataset_whose_numbers_lie_in_another_file_is_refused(key, full_arrays, write_log, tmp_path):
    path = write_log(without(full_arrays, key))
    value = full_arrays[key]
    value.tofile(tmp_path / "secret.bin")
    with h5py.File(path, "r+") as file:
        outside = [(str(tmp_path / "secret.bin"), 0, value.nbytes)]
        file.create_dataset(key, shape=value.shape, dtype=value.dtype, external=outside)
        assert file[key][()].tolist() == value.tolist()
    refusal("hdf5", path, f"{key} is stored in other files")


@pytest.mark.parametrize("key", COLUMNS)
def test_a_virtual_dataset_is_refused(key, full_arrays, write_log):
    other = write_log(full_arrays, "other.hdf5")
    value = full_arrays[key]
    layout = h5py.VirtualLayout(shape=value.shape, dtype=value.dtype)
    layout[...] = h5py.VirtualSource(other, key, shape=value.shape)
    path = write_log(without(full_arrays, key))
    with h5py.File(path, "r+") as file:
        file.create_virtual_dataset(key, layout)
        assert file[key][()].tolist() == value.tolist()
    refusal("hdf5", path, f"{key} is stored in other files")


@pytest.mark.parametrize(
    "kind", [h5py.vlen_dtype(np.float32), h5py.string_dtype(), h5py.ref_dtype, np.dtype("V4")], ids=str
)
@pytest.mark.parametrize("key", COLUMNS)
def test_a_dataset_of_objects_is_named(key, kind, full_arrays, write_log):
    path = write_log(without(full_arrays, key))
    with h5py.File(path, "r+") as file:
        file.create_dataset(key, shape=full_arrays[key].shape, dtype=kind)
    keep = key == "next_observations"
    options = {"keep_timeouts": keep}
    refusal("hdf5", path, f"{key} must", "dtype", **options)


@pytest.mark.parametrize("key", COLUMNS)
def test_a_dataset_of_a_type_that_numpy_does_not_have_is_named(key, full_arrays, write_log):
    path = write_log(without(full_arrays, key))
    with h5py.File(path, "r+") as file:
        space = h5py.h5s.create_simple(full_arrays[key].shape)
        h5py.h5d.create(file.id, key.encode(), h5py.h5t.UNIX_D32LE, space)
    refusal("hdf5", path, key, keep_timeouts=key == "next_observations")


def test_a_type_in_place_of_an_array_is_named(log_arrays, write_log):
    refusal("hdf5", write_log({**log_arrays(), "rewards": np.dtype("f4")}), "rewards")
