"""The robomimic source: demonstrations, their order, ends and filter keys, and files that cannot be trained on."""

from __future__ import annotations

import json
import re
import tracemalloc

import h5py
import hydra
import numpy as np
import pytest
from processes import SMALL, refused, rows, run

from iql_torchrl import load_transitions
from iql_torchrl.configuration.composing import CONFIGS, check_command_line, compose, preset_for
from iql_torchrl.data.preparation import prepare_data
from iql_torchrl.data.sources.robomimic import Robomimic
from iql_torchrl.errors import ConfigurationError, DatasetError
from iql_torchrl.running.options import OfflineOptions

KEYS = ["robot0_eef_pos", "object"]
PLACES = ("obs/object", "next_obs/object", "actions", "rewards", "dones")
LIFT = {"env_name": "Lift", "type": 1, "env_version": "1.4.1", "env_kwargs": {"robots": ["Panda"]}}


def demonstration(length=6, *, seed=0, dones=(), **observations):
    """A demonstration's arrays by their place; ``observations`` are shapes of a row, and ``dones`` the rows with one.

    Next observations are not the following rows, so that a test sees which of the two were taken.
    """
    random = np.random.default_rng(seed)
    sizes = {"robot0_eef_pos": (3,), "object": (4,), **observations}
    arrays = {
        "actions": random.uniform(-1, 1, size=(length, 2)),
        "rewards": random.normal(size=length),
        "dones": np.zeros(length, dtype=np.int64),
        "states": random.normal(size=(length, 9)),
    }
    arrays["dones"][list(dones)] = 1
    for group in ("obs", "next_obs"):
        arrays |= {f"{group}/{key}": random.normal(size=(length, *size)) for key, size in sizes.items()}
    return arrays


def several(count=4, **options):
    """Demonstrations of different lengths, every other one with a done in its last row."""
    return {
        f"demo_{number}": demonstration(3 + number, seed=number, dones=[-1] if number % 2 else [], **options)
        for number in range(count)
    }


@pytest.fixture
def write(tmp_path):
    """Write demonstrations by their names, and lists of them by their filter keys."""

    def write(demonstrations, masks=None, name="low_dim.hdf5", env_args=LIFT, **options):
        path = tmp_path / name
        with h5py.File(path, "w") as file:
            data = file.create_group("data")
            for demo, arrays in demonstrations.items():
                group = data.create_group(demo)
                for key, value in arrays.items():
                    group.create_dataset(key, data=value, **options)
                group.attrs["num_samples"] = np.size(arrays.get("dones", ()))
            data.attrs["total"] = sum(group.attrs["num_samples"] for group in data.values())
            data.attrs["env_args"] = json.dumps(env_args)
            for key, names in (masks or {}).items():
                file[f"mask/{key}"] = np.array(names, dtype="S")
        return path

    return write


def loop_over(demonstrations, keys=KEYS):
    """What the transitions must be, one row after the other."""
    picked = {name: [] for name in ("observation", "action", "episode")}
    following = {name: [] for name in ("observation", "reward", "done", "terminated", "truncated")}
    episode = 0
    for arrays in demonstrations:
        length = len(arrays["dones"])
        for row in range(length):
            done, last = bool(arrays["dones"][row]), row == length - 1
            for target, group in ((picked, "obs"), (following, "next_obs")):
                numbers = [number for key in keys for number in np.ravel(arrays[f"{group}/{key}"][row]).tolist()]
                target["observation"].append(numbers)
            picked["action"].append(arrays["actions"][row])
            picked["episode"].append(episode)
            following["reward"].append([arrays["rewards"][row]])
            following["done"].append([done or last])
            following["terminated"].append([done])
            following["truncated"].append([last and not done])
            episode += done or last
    found = {**picked, **{("next", name): values for name, values in following.items()}}
    return {key: np.array(values) for key, values in found.items()}


def load(path, keys=KEYS, **options):
    return load_transitions("robomimic", path=path, observation_keys=list(keys), **options)


def refusal(path, *words, keys=KEYS, **options):
    """The message of the error, which must name the file and hold the words."""
    with pytest.raises(DatasetError) as error:
        load(path, keys, **options)
    message = str(error.value)
    missing = [word for word in (str(path), *words) if word not in message]
    assert not missing, f"{missing} not in {message!r}"
    return message


def replace(path, place, create):
    """Put something else in the place of one of the third demonstration's arrays."""
    with h5py.File(path, "r+") as file:
        group, _, key = f"data/demo_2/{place}".rpartition("/")
        value = file[group][key][()]
        del file[group][key]
        create(file[group], key, value)


def spoil_block(path, place):
    with h5py.File(path) as file:
        block = file[place].id.get_chunk_info(0)
    with open(path, "r+b") as raw:
        raw.seek(block.byte_offset)
        raw.write(b"\xff" * block.size)


# ---- rows, their order and their ends


@pytest.mark.parametrize("seed", range(4))
def test_every_row_becomes_a_transition_with_its_own_next_observation(seed, write, assert_transitions_equal):
    random = np.random.default_rng(seed)
    demonstrations = {}
    for number in range(6):
        length = int(random.integers(1, 9))
        flagged = np.flatnonzero(random.random(length) < 0.3)
        demonstrations[f"demo_{number}"] = demonstration(length, seed=10 * seed + number, dones=flagged)
    assert_transitions_equal(load(write(demonstrations)), loop_over(demonstrations.values()))


def test_demonstrations_come_in_the_order_of_their_numbers(write, assert_transitions_equal):
    demonstrations = several(13)
    transitions = load(write(demonstrations))
    assert_transitions_equal(transitions, loop_over(demonstrations[f"demo_{number}"] for number in range(13)))
    assert transitions["episode"].unique().tolist() == list(range(13))


def test_numbers_may_have_gaps(write, assert_transitions_equal):
    names = ["demo_100", "demo_7", "demo_20"]
    demonstrations = dict(zip(names, several(3).values(), strict=True))
    ordered = [demonstrations[name] for name in ("demo_7", "demo_20", "demo_100")]
    assert_transitions_equal(load(write(demonstrations)), loop_over(ordered))


def test_a_done_in_the_middle_ends_an_episode_and_no_row_is_lost(write):
    path = write({"demo_0": demonstration(6, dones=[2]), "demo_1": demonstration(2, seed=1, dones=[1])})
    transitions = load(path)
    following = transitions["next"]
    assert following["terminated"][:, 0].tolist() == [False, False, True, False, False, False, False, True]
    assert following["truncated"][:, 0].tolist() == [False, False, False, False, False, True, False, False]
    assert transitions["episode"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_successes_in_consecutive_steps_are_episodes_of_one_step(write, assert_transitions_equal):
    arrays = demonstration(7, dones=[3, 4, 5, 6])
    transitions = load(write({"demo_0": arrays}))
    assert_transitions_equal(transitions, loop_over([arrays]))
    assert transitions["episode"].tolist() == [0, 0, 0, 0, 1, 2, 3]
    assert not transitions["next", "truncated"].any()


def test_a_last_row_that_is_not_done_is_truncated_and_keeps_its_next_observation(write):
    arrays = demonstration(5)
    following = load(write({"demo_0": arrays}))["next"]
    assert following["truncated"][:, 0].tolist() == [False] * 4 + [True]
    assert not following["terminated"].any()
    expected = np.concatenate([arrays["next_obs/robot0_eef_pos"][-1], arrays["next_obs/object"][-1]])
    np.testing.assert_array_equal(following["observation"][-1].numpy(), expected.astype(np.float32))


def test_a_demonstration_without_rows_adds_none(write, assert_transitions_equal):
    demonstrations = several(3)
    empty = {key: value[:0] for key, value in demonstrations["demo_1"].items()}
    others = [demonstrations["demo_0"], demonstrations["demo_2"]]
    assert_transitions_equal(load(write({**demonstrations, "demo_1": empty})), loop_over(others))


# ---- observations


def test_observations_are_laid_out_in_the_order_of_the_keys(write, assert_transitions_equal):
    demonstrations = several()
    path = write(demonstrations)
    for keys in (["robot0_eef_pos", "object"], ["object", "robot0_eef_pos"], ["object"]):
        assert_transitions_equal(load(path, keys), loop_over(demonstrations.values(), keys))


def test_parts_of_one_number_and_of_a_matrix_a_row_are_laid_out_flat(write, assert_transitions_equal):
    demonstrations = several(gripper=(), pose=(2, 3))
    keys = ["pose", "gripper", "object"]
    transitions = load(write(demonstrations), keys)
    assert transitions["observation"].shape[1] == 6 + 1 + 4
    assert_transitions_equal(transitions, loop_over(demonstrations.values(), keys))


@pytest.mark.parametrize("kind", [bool, np.int16, np.float16, np.float32])
def test_parts_of_any_type_of_number_stand_side_by_side(kind, write, assert_transitions_equal):
    demonstrations = several()
    for arrays in demonstrations.values():
        for group in ("obs", "next_obs"):
            arrays[f"{group}/object"] = (10 * arrays[f"{group}/object"]).astype(kind)
    path = write(demonstrations)
    for keys in (KEYS, ["object"]):
        assert_transitions_equal(load(path, keys), loop_over(demonstrations.values(), keys))


def test_rewards_and_dones_may_be_columns_and_of_any_type(write, assert_transitions_equal):
    demonstrations = several()
    expected = loop_over(demonstrations.values())
    for arrays in demonstrations.values():
        arrays["rewards"], arrays["dones"] = arrays["rewards"][:, None], arrays["dones"][:, None].astype(bool)
    assert_transitions_equal(load(write(demonstrations)), expected)


def test_images_and_other_entries_that_are_not_asked_for_are_ignored(write, assert_transitions_equal):
    demonstrations = several()
    expected = loop_over(demonstrations.values())
    for arrays in demonstrations.values():
        images = np.zeros((len(arrays["dones"]), 8, 8, 3), dtype=np.uint8)
        arrays |= {"obs/agentview_image": images, "next_obs/agentview_image": images[:1], "datagen_info/x": images}
    assert_transitions_equal(load(write(demonstrations)), expected)


# ---- filter keys


@pytest.mark.parametrize("kind", ["fixed", "variable"])
def test_a_filter_key_chooses_its_demonstrations_in_the_order_of_their_numbers(kind, write, assert_transitions_equal):
    demonstrations = several(12)
    path = write(demonstrations, {"train": ["demo_10", "demo_2", "demo_2", "demo_9"], "20_percent": ["demo_0"]})
    if kind == "variable":
        with h5py.File(path, "r+") as file:
            names = file["mask/train"][()].astype(object)
            del file["mask/train"]
            file.create_dataset("mask/train", data=names, dtype=h5py.string_dtype())
    chosen = [demonstrations[name] for name in ("demo_2", "demo_9", "demo_10")]
    assert_transitions_equal(load(path, filter_key="train"), loop_over(chosen))
    assert_transitions_equal(load(path, filter_key="20_percent"), loop_over([demonstrations["demo_0"]]))
    assert_transitions_equal(load(path, filter_key=None), loop_over(demonstrations.values()))


def test_a_filter_key_leaves_out_a_demonstration_that_is_spoilt(write, assert_transitions_equal):
    demonstrations = several()
    spoilt = {key: value for key, value in demonstrations["demo_1"].items() if key != "rewards"}
    path = write({**demonstrations, "demo_1": spoilt, "notes": {}}, {"good": ["demo_0", "demo_2"]})
    refusal(path, "notes")
    expected = loop_over([demonstrations["demo_0"], demonstrations["demo_2"]])
    assert_transitions_equal(load(path, filter_key="good"), expected)


# ---- large files


@pytest.mark.parametrize("at_a_time", [1, 7, 12, 1000])
def test_pieces_may_begin_and_end_anywhere_in_a_demonstration(at_a_time, write, monkeypatch, assert_transitions_equal):
    demonstrations = several(9)
    monkeypatch.setattr("iql_torchrl.data.log.ROWS_AT_A_TIME", at_a_time)
    assert_transitions_equal(load(write(demonstrations)), loop_over(demonstrations.values()))


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_more_rows_than_one_read_give_the_same_transitions(compression, write, assert_transitions_equal):
    lengths = [65_535, 1, 1, 4_463]
    demonstrations = {
        f"demo_{number}": demonstration(length, seed=number, dones=range(500, length, 901))
        for number, length in enumerate(lengths)
    }
    transitions = load(write(demonstrations, compression=compression))
    assert len(transitions) == 70_000
    assert_transitions_equal(transitions, loop_over(demonstrations.values()))


def test_mapped_files_hold_what_memory_does(write, tmp_path, assert_transitions_equal):
    path = write(several())
    mapped = load(path, storage="memmap", storage_folder=tmp_path / "mapped")
    assert_transitions_equal(mapped, load(path))


def test_opening_a_file_and_reading_a_few_rows_leaves_the_rest_of_it_on_disk(write):
    demonstrations = {f"demo_{number}": demonstration(2000, seed=number, object=(50,)) for number in range(20)}
    path = write(demonstrations)
    tracemalloc.start()
    try:
        with Robomimic(path=str(path), observation_keys=KEYS).open() as log:
            assert log.columns["observations"].shape == (40_000, 53)
            found = log.columns["observations"][1990:2010]
            peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.shape == (20, 53)
    assert peak < path.stat().st_size / 20


def test_only_the_demonstrations_that_have_the_rows_are_read(write):
    path = write(several(), compression="gzip")
    spoil_block(path, "data/demo_3/obs/object")
    with Robomimic(path=str(path), observation_keys=KEYS).open() as log:
        assert len(log.columns["observations"][0:12]) == 12
        with pytest.raises(DatasetError, match=re.escape(f"{path}: data/demo_3/obs/object cannot be read")):
            log.columns["observations"][0:13]


# ---- the environment and names


@pytest.mark.parametrize(
    ("env_args", "reason"),
    [
        (LIFT, "robosuite's Lift, where it was recorded, is not supported"),
        ({"env_name": "Hopper-v2", "type": 2}, "Gym's Hopper-v2, where"),
        ({"env_name": "PickPlaceCan"}, "PickPlaceCan, where"),
        ({"env_name": "PickPlaceCan", "type": [1]}, "name none"),
        ({"type": 1}, "name none"),
        ([1, 2], "name none"),
        (3, "name none"),
        (None, "name none"),
    ],
)
def test_no_environment_is_started_and_the_reason_names_it(env_args, reason, write):
    spec, found = Robomimic(path=str(write(several(), env_args=env_args)), observation_keys=KEYS).environment()
    assert spec is None and reason in found


@pytest.mark.parametrize("stored", [None, "", "{", 5, np.arange(3), h5py.Empty("S1"), b"\xff\xfe", "[" * 50_000])
def test_a_file_that_does_not_tell_its_environment_is_read_all_the_same(stored, write, assert_transitions_equal):
    demonstrations = several()
    path = write(demonstrations)
    with h5py.File(path, "r+") as file:
        del file["data"].attrs["env_args"]
        if stored is not None:
            file["data"].attrs["env_args"] = stored
    spec, reason = Robomimic(path=str(path), observation_keys=KEYS).environment()
    assert spec is None and "env.name=ID" in reason
    assert_transitions_equal(load(path), loop_over(demonstrations.values()))


def test_the_environment_of_a_file_of_another_layout_is_unknown(tmp_path):
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["observations"] = np.zeros((4, 2))
    assert Robomimic(path=str(tmp_path / "other.hdf5"), observation_keys=KEYS).environment()[0] is None


def test_the_name_of_the_file_picks_the_preset():
    source = Robomimic(path="kitchen/robomimic/door_ph.hdf5", observation_keys=KEYS)
    assert source.label == source.title == "door_ph.hdf5"
    assert preset_for(source.label) == "kitchen_adroit"
    assert preset_for(Robomimic(path="kitchen/low_dim.hdf5", observation_keys=KEYS).label) == "locomotion"


def test_a_path_may_begin_with_the_home_folder(write, tmp_path, monkeypatch):
    write(several())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load("~/low_dim.hdf5")) == 3 + 4 + 5 + 6


# ---- options


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ([], "dataset.observation_keys is needed; give dataset.observation_keys=[robot0_eef_pos,"),
        (["dataset.observation_keys=[]"], "dataset.observation_keys must be a list of different names"),
        (["dataset.observation_keys=object"], "dataset.observation_keys must be a list of different names"),
        (["dataset.observation_keys=[a,b,a]"], "dataset.observation_keys must be a list of different names"),
        (["dataset.observation_keys=[a]", "dataset.filter_key=20"], "dataset.filter_key must be a name"),
        (["dataset.observation_key=[a]"], "did you mean 'dataset.observation_keys'"),
    ],
)
def test_a_mistaken_option_is_named_before_anything_starts(option, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        check_command_line(["dataset=robomimic", "dataset.path=x", *option], "iql_offline", OfflineOptions)


def test_a_path_is_needed():
    with pytest.raises(ConfigurationError, match=re.escape("dataset.path is needed; give dataset.path=FILE")):
        check_command_line(["dataset=robomimic", "dataset.observation_keys=[a]"], "iql_offline", OfflineOptions)


# ---- files that are missing, damaged or of another layout


def test_a_missing_file_is_named(tmp_path):
    refusal(tmp_path / "gone.hdf5", "does not exist")


@pytest.mark.parametrize("content", [b"", b"observations,actions\n", bytes(5000)])
def test_a_file_that_is_not_hdf5_is_named(content, tmp_path):
    (tmp_path / "log.hdf5").write_bytes(content)
    refusal(tmp_path / "log.hdf5", "HDF5")
    with pytest.raises(DatasetError, match="HDF5"):
        Robomimic(path=str(tmp_path / "log.hdf5"), observation_keys=KEYS).environment()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_named(share, write):
    path = write(several())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refusal(path)


def test_a_file_with_damaged_headers_is_named(write):
    path = write(several())
    whole = path.read_bytes()
    for marker in (b"SNOD", b"TREE", b"rewards\0", b"demo_2\0"):
        content = whole.replace(marker, b"\xc9" * len(marker))
        assert content != whole, marker
        path.write_bytes(content)
        refusal(path)


@pytest.mark.parametrize("place", PLACES)
def test_a_damaged_block_is_named_with_its_place(place, write):
    path = write(several(), compression="gzip")
    spoil_block(path, f"data/demo_2/{place}")
    refusal(path, f"data/demo_2/{place} cannot be read")


def test_a_file_of_another_layout_is_named_with_what_it_has(tmp_path):
    path = tmp_path / "other.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"], file["actions"] = np.zeros((4, 2)), np.zeros((4, 1))
    refusal(path, "no group data", "actions, observations", "dataset=hdf5")


def test_data_that_are_no_group_are_named(tmp_path):
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["data"] = np.zeros((4, 2))
    refusal(tmp_path / "other.hdf5", "data cannot be read", "no group")


def test_a_file_without_demonstrations_is_named(write):
    refusal(write({}), "data has no demonstrations")


@pytest.mark.parametrize("name", ["notes", "demo_", "demo_1_again", "demo_-1", "demo_1.5"])
def test_a_demonstration_of_another_name_is_named(name, write):
    refusal(write({**several(), name: demonstration()}), repr(name), "demo_0", "dataset.filter_key")


def test_demonstrations_without_any_rows_are_named(write):
    empty = {key: value[:0] for key, value in demonstration().items()}
    refusal(write({"demo_0": empty}), "no rows")


# ---- filter keys that lead nowhere


def test_an_unknown_filter_key_is_named_with_the_nearest(write):
    path = write(several(), {"train": ["demo_0"], "valid": ["demo_1"]})
    refusal(path, "dataset.filter_key=trian", "did you mean 'train'", filter_key="trian")
    refusal(path, "dataset.filter_key=x", "known are train, valid", filter_key="x")
    for odd in ("", ".", "..", "/", "/mask/train", "train/"):
        refusal(path, f"dataset.filter_key={odd}", filter_key=odd)


def test_a_filter_key_of_a_file_that_has_none_is_named(write):
    refusal(write(several()), "dataset.filter_key=train", "no group mask", filter_key="train")


def test_a_filter_key_that_names_a_demonstration_that_is_not_there_is_named(write):
    path = write(several(), {"train": ["demo_0", "demo_71", "demo_8"]})
    refusal(path, "mask/train names demo_8", "2 such names", filter_key="train")


def test_a_filter_key_without_demonstrations_is_named(write):
    refusal(write(several(), {"valid": []}), "mask/valid has no demonstrations", filter_key="valid")


@pytest.mark.parametrize("values", [np.arange(3), np.ones(3, bool)])
def test_a_filter_key_that_lists_no_names_is_named(values, write):
    path = write(several())
    with h5py.File(path, "r+") as file:
        file["mask/train"] = values
    refusal(path, "mask/train must list names", str(values.dtype), filter_key="train")


def test_a_filter_key_that_lists_no_text_is_named(write):
    path = write(several())
    with h5py.File(path, "r+") as file:
        file["mask/train"] = np.array([b"\xff\xfe"])
    refusal(path, "mask/train cannot be read", filter_key="train")


# ---- observation keys that lead nowhere


def test_an_unknown_observation_key_is_named_with_the_nearest_and_the_others(write):
    path = write(several(agentview_image=(8, 8, 3)))
    message = refusal(
        path,
        "data/demo_0/obs has no 'objct'",
        "did you mean 'object'?",
        "object, robot0_eef_pos;",
        keys=["robot0_eef_pos", "objct"],
    )
    assert "agentview_image" not in message
    refusal(path, "has no 'x'", "object, robot0_eef_pos;", keys=["x"])


@pytest.mark.parametrize("group", ["obs", "next_obs"])
def test_an_observation_key_that_one_demonstration_lacks_is_named_with_it(group, write):
    demonstrations = several()
    del demonstrations["demo_2"][f"{group}/object"]
    refusal(write(demonstrations), f"data/demo_2/{group} has no 'object'", "dataset.filter_key")


@pytest.mark.parametrize(
    ("shape", "kind", "found"),
    [
        ((84, 84, 3), np.uint8, "(3, 84, 84, 3) of dtype uint8"),
        ((84, 84), np.uint8, "(3, 84, 84) of dtype uint8"),
        ((5,), np.uint8, "(3, 5) of dtype uint8"),
        ((84, 84, 1), np.float32, "(3, 84, 84, 1) of dtype float32"),
    ],
)
def test_images_are_refused_by_name(shape, kind, found, write):
    demonstrations = several(agentview_image=shape)
    for arrays in demonstrations.values():
        for group in ("obs", "next_obs"):
            arrays[f"{group}/agentview_image"] = arrays[f"{group}/agentview_image"].astype(kind)
    refusal(
        write(demonstrations),
        "data/demo_0/obs/agentview_image",
        found,
        "images",
        "object, robot0_eef_pos;",
        keys=["object", "agentview_image"],
    )


# ---- demonstrations that are not whole


@pytest.mark.parametrize(
    ("lacking", "remedy"),
    [
        ("actions", "dataset.filter_key"),
        ("rewards", "dataset_states_to_obs.py"),
        ("dones", "dataset_states_to_obs.py"),
        ("obs", "dataset_states_to_obs.py"),
        ("next_obs", "without --exclude-next-obs"),
    ],
)
def test_what_a_demonstration_lacks_is_named_with_it(lacking, remedy, write):
    demonstrations = several()
    arrays = demonstrations["demo_2"]
    demonstrations["demo_2"] = {key: value for key, value in arrays.items() if key.split("/")[0] != lacking}
    refusal(write(demonstrations), f"data/demo_2 has no {lacking}", remedy)


@pytest.mark.parametrize("place", ["obs/object", "next_obs/object", "rewards", "dones"])
def test_a_demonstration_of_parts_of_different_lengths_is_named(place, write):
    demonstrations = several()
    demonstrations["demo_2"][place] = demonstrations["demo_2"][place][:-1]
    refusal(write(demonstrations), f"data/demo_2/{place} has 4 rows but data/demo_2/actions has 5")


def test_a_demonstration_that_says_another_length_is_named(write):
    path = write(several())
    with h5py.File(path, "r+") as file:
        file["data/demo_2"].attrs["num_samples"] = 4
    refusal(path, "data/demo_2 has 5 rows", "num_samples is 4")


def test_a_demonstration_need_not_say_its_length(write):
    path = write(several())
    with h5py.File(path, "r+") as file:
        del file["data/demo_2"].attrs["num_samples"]
    assert len(load(path)) == 3 + 4 + 5 + 6


@pytest.mark.parametrize(("place", "width"), [("obs/object", 4), ("next_obs/object", 4), ("actions", 2)])
def test_a_size_that_differs_between_demonstrations_is_named(place, width, write):
    demonstrations = several()
    found = demonstrations["demo_2"][place]
    demonstrations["demo_2"][place] = np.concatenate([found, found[:, :1]], axis=1)
    other = place.replace("next_", "")
    refusal(write(demonstrations), f"data/demo_2/{place} has {width + 1} numbers", f"data/demo_0/{other} has {width}")


@pytest.mark.parametrize(
    ("place", "shape", "expected"),
    [
        ("actions", (5, 2, 2), "[rows, size]"),
        ("actions", (), "[rows, size]"),
        ("rewards", (5, 2), "[rows]"),
        ("rewards", (5, 1, 1), "[rows]"),
        ("dones", (5, 2), "[rows]"),
        ("obs/object", (), "[rows, ...]"),
    ],
)
def test_a_part_of_another_shape_is_named(place, shape, expected, write):
    demonstrations = several()
    demonstrations["demo_2"][place] = np.zeros(shape)
    refusal(write(demonstrations), f"data/demo_2/{place} has shape {shape}", f"must be {expected}")


@pytest.mark.parametrize("kind", [h5py.vlen_dtype(np.float32), h5py.string_dtype(), np.dtype("V4"), np.dtype("c8")])
@pytest.mark.parametrize("place", PLACES)
def test_a_part_that_holds_no_numbers_is_named(place, kind, write):
    path = write(several())
    replace(path, place, lambda group, key, value: group.create_dataset(key, shape=value.shape, dtype=kind))
    refusal(path, f"data/demo_2/{place}", "must hold real numbers")


@pytest.mark.parametrize("place", PLACES)
def test_a_part_of_a_type_that_numpy_does_not_have_is_named(place, write):
    path = write(several())

    def decimal(group, key, value):
        h5py.h5d.create(group.id, key.encode(), h5py.h5t.UNIX_D32LE, h5py.h5s.create_simple(value.shape))

    replace(path, place, decimal)
    refusal(path, f"data/demo_2/{place}")
    refusal(path, "data/demo_0/obs has no 'objct'", keys=["objct"])


@pytest.mark.parametrize("place", ["obs/object", "next_obs/object", "actions", "rewards"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_named_with_its_row(place, value, write):
    demonstrations = several()
    demonstrations["demo_2"][place][3] = value
    refusal(write(demonstrations), f"data/demo_2/{place} holds {value} in row 3")


@pytest.mark.parametrize("value", [2, 0.5, np.nan, -1])
def test_a_done_that_is_no_flag_is_named_with_its_row(value, write):
    demonstrations = several()
    demonstrations["demo_2"]["dones"] = np.array([0, 0, 0, value, 0], dtype=float)
    refusal(write(demonstrations), f"data/demo_2/dones must hold 0 and 1 only, got {float(value)} in row 3")


# ---- links and parts that lie elsewhere


@pytest.mark.parametrize("place", ["data", "data/demo_2", "data/demo_2/obs", "mask", "mask/train"])
def test_a_link_into_another_file_is_refused(place, write):
    masks = {"train": ["demo_0", "demo_2"]}
    write(several(), masks, name="other.hdf5")
    path = write(several(), masks)
    with h5py.File(path, "r+") as file:
        del file[place]
        file[place] = h5py.ExternalLink("other.hdf5", f"/{place}")
    refusal(path, f"{place} is a link into another file", filter_key="train")


@pytest.mark.parametrize("place", PLACES)
def test_an_array_that_is_a_link_into_another_file_is_refused(place, write):
    write(several(), name="other.hdf5")
    path = write(several())
    outside = h5py.ExternalLink("other.hdf5", f"/data/demo_2/{place}")
    replace(path, place, lambda group, key, value: group.__setitem__(key, outside))
    refusal(path, f"data/demo_2/{place} is a link into another file")


@pytest.mark.parametrize("place", PLACES)
def test_a_soft_link_that_leads_into_another_file_is_refused(place, write):
    write(several(), name="other.hdf5")
    path = write(several())

    def link(group, key, value):
        group.file["elsewhere"] = h5py.ExternalLink("other.hdf5", "/data")
        group[key] = h5py.SoftLink(f"/elsewhere/demo_2/{place}")

    replace(path, place, link)
    refusal(path, f"data/demo_2/{place} is a link into another file")


@pytest.mark.parametrize("place", PLACES)
def test_a_soft_link_within_the_file_is_followed(place, write, assert_transitions_equal):
    demonstrations = several()
    path = write(demonstrations)

    def link(group, key, value):
        group.file["kept"] = value
        group[key] = h5py.SoftLink("/kept")

    replace(path, place, link)
    assert_transitions_equal(load(path), loop_over(demonstrations.values()))


@pytest.mark.parametrize("link", [h5py.SoftLink("/gone"), h5py.ExternalLink("gone.hdf5", "/x")])
@pytest.mark.parametrize("place", PLACES)
def test_a_link_that_leads_nowhere_is_named(place, link, write):
    path = write(several())
    replace(path, place, lambda group, key, value: group.__setitem__(key, link))
    refusal(path, f"data/demo_2/{place}")


@pytest.mark.parametrize("place", PLACES)
def test_an_array_whose_numbers_lie_in_another_file_is_refused(place, write, tmp_path):
    path = write(several())

    def outside(group, key, value):
        value.tofile(tmp_path / "secret.bin")
        place = [(str(tmp_path / "secret.bin"), 0, value.nbytes)]
        group.create_dataset(key, shape=value.shape, dtype=value.dtype, external=place)
        assert group[key][()].tolist() == value.tolist()

    replace(path, place, outside)
    refusal(path, f"data/demo_2/{place} is stored in other files")


@pytest.mark.parametrize("place", PLACES)
def test_a_virtual_array_is_refused(place, write):
    other = write(several(), name="other.hdf5")
    path = write(several())

    def virtual(group, key, value):
        layout = h5py.VirtualLayout(shape=value.shape, dtype=value.dtype)
        layout[...] = h5py.VirtualSource(other, f"data/demo_2/{place}", shape=value.shape)
        group.create_virtual_dataset(key, layout)
        assert group[key][()].tolist() == value.tolist()

    replace(path, place, virtual)
    refusal(path, f"data/demo_2/{place} is stored in other files")


@pytest.mark.parametrize("place", PLACES)
def test_a_group_or_nothing_in_the_place_of_an_array_is_named(place, write):
    path = write(several())
    replace(path, place, lambda group, key, value: group.create_group(key))
    refusal(path, f"data/demo_2/{place} cannot be read", "no array")
    with h5py.File(path, "r+") as file:
        del file[f"data/demo_2/{place}"]
        file[f"data/demo_2/{place}"] = h5py.Empty("f4")
    refusal(path, f"data/demo_2/{place} cannot be read", "no array")


# ---- as a user runs it


@pytest.fixture
def successes(write):
    """Ten demonstrations with a reward of 1 at success, in every other one of which the recording goes on after it."""
    demonstrations = {}
    for number in range(10):
        arrays = demonstration(20 + number, seed=number, dones=[-4, -1] if number % 2 else [])
        arrays["rewards"] = arrays["dones"].astype(float)
        demonstrations[f"demo_{number}"] = arrays
    return write(demonstrations, {"train": [f"demo_{number}" for number in range(6)]})


def test_without_a_simulator_a_tenth_of_the_episodes_is_held_out(successes):
    overrides = ["dataset=robomimic", f"dataset.path={successes}", f"dataset.observation_keys=[{','.join(KEYS)}]"]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        options = compose("iql_offline", overrides, OfflineOptions)
    data = prepare_data(options.dataset, options.algorithm, options.env)
    assert data.environment is None and "robosuite's Lift" in data.note
    assert data.validation is not None and len(data.validation["episode"].unique()) == round(0.1 * 15)


@pytest.mark.slow
def test_a_policy_is_trained_on_demonstrations_and_the_dataset_inspected(successes, tmp_path):
    options = ["dataset=robomimic", f"dataset.path={successes}", "dataset.filter_key=train"]
    options.append(f"dataset.observation_keys=[{','.join(KEYS)}]")
    out = run("iql_offline.py", *options, *SMALL, "train.steps=40", f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert "robosuite's Lift" in out
    last = rows(tmp_path / "run" / "metrics.csv")[-1]
    assert int(last["step"]) == 40 and np.isfinite(float(last["loss_qvalue"]))
    out = run("inspect_dataset.py", *options, f"output={tmp_path / 'report'}", cwd=tmp_path)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["rows"] == report["transitions"] == sum(range(20, 26))
    assert report["episodes"] == {"count": 9, "terminated": 6, "truncated": 3, "unfinished": 0}
    assert "robosuite's Lift" in out


@pytest.mark.slow
def test_a_mistake_is_one_line_on_the_command_line(successes, tmp_path):
    options = ("dataset=robomimic", f"dataset.path={successes}", "dataset.observation_keys=[objct]")
    message = refused("iql_offline.py", *options, *SMALL, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert "did you mean 'object'" in message
    assert not (tmp_path / "run").exists()
