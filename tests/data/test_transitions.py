"""The rule that turns a log into transitions, and the logs that it refuses."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from iql_torchrl import load_transitions
from iql_torchrl.data.checks import check_log, has_next_observations
from iql_torchrl.data.log import Log
from iql_torchrl.data.sources.arrays import Arrays
from iql_torchrl.data.sources.hdf5 import HDF5
from iql_torchrl.data.transitions import episode_returns, fingerprint, transitions_from_log
from iql_torchrl.errors import DatasetError


def load(path, **options):
    return load_transitions("hdf5", path=path, **options)


def open_log(path):
    return HDF5(path=path, keep_timeouts=True).open()


def random_ends(seed, rows, share):
    random = np.random.default_rng(1000 + seed)
    return np.flatnonzero(random.random(rows) < share), np.flatnonzero(random.random(rows) < share)


# ---- the rule


@pytest.mark.parametrize("seed", range(8))
def test_transitions_of_a_log_with_timeouts_equal_the_rule_value_for_value(
    seed, log_arrays, write_log, qlearning_dataset, assert_transitions_equal
):
    terminals, timeouts = random_ends(seed, 200, 0.02 + 0.05 * seed)
    arrays = log_arrays(200, seed=seed, terminals=terminals, timeouts=timeouts)
    assert_transitions_equal(load(write_log(arrays)), qlearning_dataset(arrays))


@pytest.mark.parametrize("max_episode_steps", [1000, 200, 199, 50, 7, 2])
def test_transitions_of_a_log_without_timeouts_are_cut_at_the_step_limit(
    max_episode_steps, log_arrays, write_log, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(200, terminals=[0, 3, 30, 31, 38, 88, 141, 199], timeouts=None)
    transitions = load(write_log(arrays), max_episode_steps=max_episode_steps)
    assert_transitions_equal(transitions, qlearning_dataset(arrays, max_episode_steps))


def test_an_episode_that_terminates_at_the_step_limit_counts_as_cut_there(
    log_arrays, write_log, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(20, terminals=[4, 9], timeouts=None)
    transitions = load(write_log(arrays), max_episode_steps=5)
    assert len(transitions) == 16 and not transitions["next", "terminated"].any()
    assert_transitions_equal(transitions, qlearning_dataset(arrays, 5))


def test_without_timeouts_and_step_limit_only_the_last_row_is_dropped(log_arrays, write_log):
    arrays = log_arrays(30, terminals=[9, 19], timeouts=None)
    transitions = load(write_log(arrays))
    assert len(transitions) == 29
    assert transitions["next", "terminated"][:, 0].nonzero()[:, 0].tolist() == [9, 19]
    assert not transitions["next", "truncated"].any()


def test_the_files_timeouts_win_over_a_step_limit(log_arrays, write_log, qlearning_dataset, assert_transitions_equal):
    arrays = log_arrays(40, timeouts=[13])
    assert_transitions_equal(load(write_log(arrays), max_episode_steps=5), qlearning_dataset(arrays))


def test_a_row_that_is_both_terminal_and_timeout_is_dropped(log_arrays, write_log):
    arrays = log_arrays(10, terminals=[4], timeouts=[4])
    transitions = load(write_log(arrays))
    assert transitions["observation"].numpy().tolist() == arrays["observations"][[0, 1, 2, 3, 5, 6, 7, 8]].tolist()
    assert transitions["episode"].unique(return_counts=True)[1].tolist() == [4, 4]
    assert not transitions["next", "done"].any()


def test_the_row_before_a_timeout_bootstraps_on_the_observation_at_the_timeout(log_arrays, write_log):
    arrays = log_arrays(10, timeouts=[4])
    transitions = load(write_log(arrays))
    assert transitions["next", "observation"][3].tolist() == arrays["observations"][4].tolist()
    assert not transitions["next", "done"][3]


def test_the_last_row_is_only_the_next_observation_of_the_one_before(log_arrays, write_log):
    arrays = log_arrays(10)
    transitions = load(write_log(arrays))
    assert len(transitions) == 9
    assert transitions["next", "observation"][-1].tolist() == arrays["observations"][-1].tolist()


def test_a_terminal_row_stays_and_ends_its_episode(log_arrays, write_log):
    transitions = load(write_log(log_arrays(10, terminals=[4])))
    assert transitions["next", "terminated"][:, 0].tolist() == [False] * 4 + [True] + [False] * 4
    assert transitions["next", "done"].equal(transitions["next", "terminated"])
    assert transitions["episode"].unique(return_counts=True)[1].tolist() == [5, 4]


def test_the_files_next_observations_are_not_read_by_default(
    log_arrays, write_log, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(20, terminals=[5], timeouts=[11])
    with_noise = {**arrays, "next_observations": np.full((20, 3), np.nan)}
    assert_transitions_equal(load(write_log(with_noise)), qlearning_dataset(arrays))


def test_rows_of_an_episode_share_a_number_that_grows_from_episode_to_episode(log_arrays, write_log):
    transitions = load(write_log(log_arrays(30, terminals=[4, 20], timeouts=[11])))
    episode = transitions["episode"]
    assert episode.dtype == torch.int64 and episode.shape == (28,)
    assert episode.unique(return_counts=True)[1].tolist() == [5, 6, 9, 8]
    assert bool((episode.diff() >= 0).all())


def test_transitions_have_the_documented_keys_shapes_and_types(log_arrays, write_log):
    transitions = load(write_log(log_arrays(12, terminals=[5])))
    assert transitions.batch_size == (11,)
    found = {key: (tuple(value.shape), value.dtype) for key, value in transitions.items(True, True)}
    assert found == {
        "observation": ((11, 3), torch.float32),
        "action": ((11, 2), torch.float32),
        "episode": ((11,), torch.int64),
        ("next", "observation"): ((11, 3), torch.float32),
        ("next", "reward"): ((11, 1), torch.float32),
        ("next", "done"): ((11, 1), torch.bool),
        ("next", "terminated"): ((11, 1), torch.bool),
        ("next", "truncated"): ((11, 1), torch.bool),
    }


# ---- keep_timeouts


def test_keep_timeouts_keeps_every_row_with_the_files_next_observation(log_arrays, with_next_observations, write_log):
    arrays = with_next_observations(log_arrays(20, terminals=[5, 11], timeouts=[11, 16]))
    transitions = load(write_log(arrays), keep_timeouts=True)
    assert len(transitions) == 20
    assert transitions["observation"].numpy().tolist() == arrays["observations"].tolist()
    assert transitions["next", "observation"].numpy().tolist() == arrays["next_observations"].tolist()
    assert transitions["action"].numpy().tolist() == arrays["actions"].tolist()
    assert transitions["next", "reward"][:, 0].numpy().tolist() == arrays["rewards"].tolist()
    assert transitions["next", "terminated"][:, 0].nonzero()[:, 0].tolist() == [5, 11]
    assert transitions["next", "truncated"][:, 0].nonzero()[:, 0].tolist() == [11, 16]
    assert transitions["next", "done"][:, 0].nonzero()[:, 0].tolist() == [5, 11, 16]
    assert transitions["episode"].unique(return_counts=True)[1].tolist() == [6, 6, 5, 3]


def test_keep_timeouts_marks_the_step_limit_where_the_file_has_no_timeouts(
    log_arrays, with_next_observations, write_log
):
    arrays = with_next_observations(log_arrays(20, terminals=[5], timeouts=None))
    transitions = load(write_log(arrays), keep_timeouts=True, max_episode_steps=8)
    assert transitions["next", "truncated"][:, 0].nonzero()[:, 0].tolist() == [13]


def test_keep_timeouts_makes_a_transition_of_a_single_row(log_arrays, with_next_observations, write_log):
    arrays = with_next_observations(log_arrays(1))
    transitions = load(write_log(arrays), keep_timeouts=True)
    assert transitions["next", "observation"].tolist() == arrays["next_observations"].tolist()


def test_keep_timeouts_without_next_observations_is_refused(log_arrays, write_log):
    path = write_log(log_arrays())
    with pytest.raises(DatasetError, match=re.escape(str(path))) as error:
        load(path, keep_timeouts=True)
    assert "next_observations" in str(error.value) and "dataset.keep_timeouts" in str(error.value)


def test_next_observations_of_another_size_are_refused(log_arrays, write_log):
    path = write_log({**log_arrays(20), "next_observations": np.zeros((20, 4), np.float32)})
    with pytest.raises(DatasetError, match=r"next_observations has shape \(20, 4\), observations \(20, 3\)"):
        load(path, keep_timeouts=True)


# ---- accepted kinds of numbers


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int64", "float32", "float64"])
def test_flags_may_be_stored_as_any_kind_of_number(
    dtype, log_arrays, write_log, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(60, terminals=[7, 40], timeouts=[21])
    stored = {key: value.astype(dtype) if value.dtype == bool else value for key, value in arrays.items()}
    assert_transitions_equal(load(write_log(stored)), qlearning_dataset(arrays))


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
def test_values_of_another_type_become_float32(dtype, log_arrays, write_log):
    arrays = log_arrays()
    arrays |= {key: (100 * arrays[key]).astype(dtype) for key in ("observations", "actions", "rewards")}
    transitions = load(write_log(arrays))
    for key, name in (("observation", "observations"), ("action", "actions")):
        assert transitions[key].dtype == torch.float32
        assert transitions[key].numpy().tolist() == arrays[name][:-1].astype(np.float32).tolist()
    assert transitions["next", "reward"][:, 0].numpy().tolist() == arrays["rewards"][:-1].astype(np.float32).tolist()


@pytest.mark.parametrize("key", ["rewards", "terminals", "timeouts"])
def test_a_column_of_shape_rows_by_one_reads_like_a_flat_one(
    key, log_arrays, write_log, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(60, terminals=[7, 40], timeouts=[21])
    transitions = load(write_log({**arrays, key: arrays[key][:, None]}))
    assert_transitions_equal(transitions, qlearning_dataset(arrays))


# ---- refusals: the file, the key and what was found


@pytest.mark.parametrize("missing", ["observations", "actions", "rewards", "terminals"])
def test_a_missing_array_is_named_with_those_found(missing, log_arrays, write_log):
    arrays = log_arrays()
    del arrays[missing]
    path = write_log(arrays)
    with pytest.raises(DatasetError, match=re.escape(f"{path}: missing {missing}")) as error:
        load(path)
    assert all(key in str(error.value) for key in arrays)


def test_a_group_in_place_of_an_array_counts_as_missing(log_arrays, write_log):
    arrays = log_arrays()
    arrays["actions/arm"] = arrays.pop("actions")  # a group of observations holds their parts
    with pytest.raises(DatasetError, match="missing actions"):
        load(write_log(arrays))


WRONG_SHAPES = {
    "observations": [(40,), (40, 3, 1), (40, 0)],
    "actions": [(40,), (40, 2, 2), (40, 0)],
    "rewards": [(40, 2), (40, 1, 1), ()],
    "terminals": [(40, 2), (40, 1, 1), ()],
    "timeouts": [(40, 2), (40, 1, 1), ()],
}


@pytest.mark.parametrize(("key", "shape"), [(key, shape) for key, shapes in WRONG_SHAPES.items() for shape in shapes])
def test_an_array_of_a_wrong_shape_is_named_with_its_shape(key, shape, log_arrays, write_log):
    path = write_log({**log_arrays(), key: np.zeros(shape, np.float32)})
    with pytest.raises(DatasetError, match=re.escape(f"{path}: {key} ")) as error:
        load(path)
    assert str(shape) in str(error.value)


WRONG_TYPES = {
    "byte strings": lambda shape: np.full(shape, b"0.5"),
    "text": lambda shape: np.full(shape, "0.5", dtype=object),
    "complex numbers": lambda shape: np.zeros(shape, np.complex64),
    "records": lambda shape: np.zeros(shape, dtype=[("x", "f4")]),
}


@pytest.mark.parametrize("kind", WRONG_TYPES)
@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals", "timeouts"])
def test_an_array_that_does_not_hold_real_numbers_is_named_with_its_type(key, kind, log_arrays, write_log):
    arrays = log_arrays()
    path = write_log({**arrays, key: WRONG_TYPES[kind](arrays[key].shape)})
    with pytest.raises(DatasetError, match=re.escape(f"{path}: {key} ")) as error:
        load(path)
    assert "dtype" in str(error.value)


@pytest.mark.parametrize("shape", [(40,), (40, 1), (40, 2)])
@pytest.mark.parametrize("kind", ["byte strings", "names", "objects"])
def test_actions_given_by_their_names_are_refused_with_how_to_encode_them(kind, shape, log_arrays):
    names = {"byte strings": b"left", "names": "left", "objects": "left"}[kind]
    arrays = log_arrays() | {"actions": np.full(shape, names, dtype=object if kind == "objects" else None)}
    with pytest.raises(DatasetError, match=r"actions must .*dtype .*np\.unique\(actions, return_inverse=True\)"):
        load_transitions(Arrays(arrays=arrays))
    encoded = np.unique(np.array(arrays["actions"], str), return_inverse=True)[1].reshape(40, -1)[:, 0]
    assert load_transitions(Arrays(arrays=arrays | {"actions": encoded}))["action"].dtype == torch.int64


def test_other_columns_of_text_are_not_told_to_be_encoded(log_arrays):
    for key in ("observations", "rewards"):
        with pytest.raises(DatasetError) as error:
            load_transitions(Arrays(arrays=log_arrays() | {key: np.full((40, 1), "left")}))
        assert "np.unique" not in str(error.value)


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals", "timeouts"])
def test_a_single_string_in_place_of_an_array_is_refused(key, log_arrays, write_log):
    path = write_log({**log_arrays(), key: "see the other file"})
    with pytest.raises(DatasetError, match=re.escape(f"{path}: {key} ")):
        load(path)


@pytest.mark.parametrize("rows", [39, 41, 1, 0])
@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "timeouts"])
def test_an_array_of_another_length_is_named_with_both_lengths(key, rows, log_arrays, write_log):
    path = write_log({**log_arrays(40), key: log_arrays(rows)[key]})
    with pytest.raises(DatasetError, match=re.escape(f"{path}: {key} has {rows} rows but terminals has 40")):
        load(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 17, 39])
@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "next_observations"])
def test_a_value_that_is_not_finite_is_named_with_its_row(
    key, row, value, log_arrays, with_next_observations, write_log
):
    arrays = with_next_observations(log_arrays(40, terminals=[9], timeouts=[20]))
    arrays[key][row] = value
    path = write_log(arrays)
    with pytest.raises(DatasetError, match=re.escape(f"{path}: {key} holds {value} in row {row} ")):
        load(path, keep_timeouts=key == "next_observations")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("entries", [np.s_[1], np.s_[:]], ids=["one entry", "all entries"])
def test_a_next_observation_of_a_terminal_row_need_not_be_a_number(
    entries, value, log_arrays, with_next_observations, write_log
):
    arrays = with_next_observations(log_arrays(40, terminals=[9, 15, 30], timeouts=[20, 30]))
    expected = arrays["next_observations"].copy()
    for row in (9, 30):
        arrays["next_observations"][row][entries] = value
        expected[row] = arrays["observations"][row]
    path = write_log(arrays)
    transitions = load(path, keep_timeouts=True)
    np.testing.assert_array_equal(transitions["next", "observation"].numpy(), expected)
    assert transitions["next", "terminated"][[9, 30], 0].all()
    with open_log(path) as log:
        check_log(log)


@pytest.mark.parametrize("row", [8, 10, 20])
def test_a_next_observation_that_counts_must_be_a_number_whatever_the_terminal_rows_hold(
    row, log_arrays, with_next_observations, write_log
):
    arrays = with_next_observations(log_arrays(40, terminals=[9], timeouts=[20]))
    arrays["next_observations"][[9, row]] = np.nan
    path = write_log(arrays)
    expected = re.escape(f"{path}: next_observations holds nan in row {row} (3 such entries in all)")
    with pytest.raises(DatasetError, match=expected):
        load(path, keep_timeouts=True)
    with open_log(path) as log, pytest.raises(DatasetError, match=expected):
        check_log(log)


def test_a_log_whose_terminal_rows_alone_have_no_next_observation_can_be_kept_whole(
    log_arrays, with_next_observations, write_log
):
    arrays = with_next_observations(log_arrays(40, terminals=[9]))
    arrays["next_observations"][9] = np.nan
    with open_log(write_log(arrays)) as log:
        assert has_next_observations(log)
    arrays["next_observations"][10] = np.nan
    with open_log(write_log(arrays, "other.hdf5")) as log:
        assert not has_next_observations(log)


def test_columns_that_may_be_taken_over_are_repaired_in_place(log_arrays, with_next_observations):
    arrays = with_next_observations(log_arrays(40, terminals=[9]))
    arrays["next_observations"][9] = np.nan
    log = Log("a log", arrays, own_next_observations=True, owned=True)
    transitions = transitions_from_log(log)
    assert transitions["next", "observation"].numpy().base is not None
    assert transitions["next", "observation"][9].tolist() == arrays["observations"][9].tolist()


def test_opposite_infinities_do_not_cancel_out(log_arrays, write_log):
    arrays = log_arrays()
    arrays["rewards"][3], arrays["rewards"][30] = np.inf, -np.inf
    with pytest.raises(DatasetError, match=r"rewards holds inf in row 3 \(2 such entries"):
        load(write_log(arrays))


def test_a_float64_beyond_float32_is_refused_and_not_turned_into_infinity(log_arrays, write_log):
    arrays = log_arrays()
    arrays["rewards"] = arrays["rewards"].astype(np.float64)
    arrays["rewards"][6] = 1e300
    with pytest.raises(DatasetError, match=r"rewards .* row 6"):
        load(write_log(arrays))


def test_the_largest_finite_values_are_accepted(log_arrays, write_log):
    arrays = log_arrays()
    arrays["observations"][:] = np.finfo(np.float32).max
    assert load(write_log(arrays))["observation"].isfinite().all()


@pytest.mark.parametrize(("dtype", "value"), [("float32", 0.5), ("float32", np.nan), ("int8", -1), ("uint8", 2)])
@pytest.mark.parametrize("key", ["terminals", "timeouts"])
def test_a_flag_other_than_zero_and_one_is_named_with_its_row(key, dtype, value, log_arrays, write_log):
    arrays = log_arrays()
    arrays[key] = arrays[key].astype(dtype)
    arrays[key][23] = value
    path = write_log(arrays)
    with pytest.raises(DatasetError, match=re.escape(f"{path}: {key} must hold 0 and 1 only, got {value} in row 23")):
        load(path)


def test_a_log_without_a_complete_transition_is_refused(log_arrays, write_log):
    for arrays in (log_arrays(1), log_arrays(5, timeouts=range(5)), log_arrays(3, timeouts=[0, 1])):
        path = write_log(arrays)
        rows = len(arrays["rewards"])
        with pytest.raises(DatasetError, match=re.escape(f"{path}: no complete transition in {rows} rows")):
            load(path)


@pytest.mark.parametrize(("value", "dtype"), [(2**40, np.int64), (2**63 + 5, np.uint64), (-3, np.int8)])
def test_labels_in_place_of_numbered_actions_are_refused(value, dtype, log_arrays, write_log):
    actions = np.zeros(40, dtype)
    actions[7] = value
    with pytest.raises(DatasetError, match=rf"discrete actions must be integers from 0.*got {value} in row 7"):
        load(write_log({**log_arrays(), "actions": actions}))


def test_a_log_without_rows_is_refused(log_arrays, write_log):
    path = write_log(log_arrays(0))
    with pytest.raises(DatasetError, match=re.escape(f"{path}: it has no rows")):
        load(path)


@pytest.mark.parametrize("max_episode_steps", [0, -1])
def test_a_step_limit_below_one_is_refused(max_episode_steps, log_arrays, write_log):
    path = write_log(log_arrays(timeouts=None))
    with pytest.raises(ValueError, match="max_episode_steps"):
        load(path, max_episode_steps=max_episode_steps)


@pytest.mark.parametrize(("source", "meant"), [("hdf", "hdf5"), ("d4lr", "d4rl"), ("embeded", "embedded")])
def test_an_unknown_source_is_refused_with_the_nearest_known_one(source, meant):
    with pytest.raises(DatasetError, match=f"{source}.*did you mean '{meant}'"):
        load_transitions(source)


# ---- summaries


def test_episode_returns_are_the_sums_of_the_rewards_of_each_episode(log_arrays, write_log):
    arrays = log_arrays(60, terminals=[7, 8, 40], timeouts=[21])
    sums, running = [], 0.0
    for row in range(59):
        if not arrays["timeouts"][row]:
            running += float(arrays["rewards"][row])
        if arrays["terminals"][row] or arrays["timeouts"][row]:
            sums, running = [*sums, running], 0.0
    np.testing.assert_allclose(episode_returns(load(write_log(arrays))), [*sums, running], rtol=1e-12)


def test_equal_content_has_equal_fingerprints_whatever_the_file(log_arrays, write_log):
    arrays = log_arrays(terminals=[5])
    wider = {key: value.astype(np.float64) for key, value in arrays.items()}
    assert fingerprint(load(write_log(arrays))) == fingerprint(load(write_log(wider, "wider.hdf5")))


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals"])
def test_one_changed_value_changes_the_fingerprint(key, log_arrays, write_log):
    arrays = log_arrays(terminals=[5])
    before = fingerprint(load(write_log(arrays)))
    arrays[key][17] = 1
    assert fingerprint(load(write_log(arrays))) != before
