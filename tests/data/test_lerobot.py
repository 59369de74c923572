"""The LeRobot source: frames, their ends and rewards, several files, and datasets that cannot be trained on."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import SMALL, refused, rows, run

from iql_torchrl import load_transitions
from iql_torchrl.configuration.composing import compose, initialised
from iql_torchrl.data.sources.lerobot import LeRobot
from iql_torchrl.errors import ConfigurationError, DatasetError
from iql_torchrl.running.options import OfflineOptions

LENGTHS = (4, 3, 5, 1)
TASKS = ("push the block", "open the drawer")


def frames(lengths=LENGTHS, *, seed=0, **others):
    """The features of all frames, one after the other; the last frame of every other episode succeeds."""
    random = np.random.default_rng(seed)
    count, last = sum(lengths), np.cumsum(lengths) - 1
    found = {
        "observation.state": random.normal(size=(count, 3)).astype(np.float32),
        "observation.environment_state": random.normal(size=(count, 2)).astype(np.float32),
        "action": random.uniform(-1, 1, size=(count, 2)).astype(np.float32),
        "next.reward": random.normal(size=count).astype(np.float32),
        "next.done": np.isin(np.arange(count), last),
        "next.success": np.isin(np.arange(count), last[::2]),
        "timestamp": np.arange(count, dtype=np.float32) / 10,
        "frame_index": np.concatenate([np.arange(length) for length in lengths]),
        "episode_index": np.repeat(np.arange(len(lengths)), lengths),
        "index": np.arange(count),
        "task_index": np.repeat(np.arange(len(lengths)) % len(TASKS), lengths),
    }
    return {name: values for name, values in {**found, **others}.items() if values is not None}


@pytest.fixture
def write(tmp_path):
    """Write a dataset as LeRobot 3 does: so many episodes in each file, so many files in each chunk."""

    def write(
        features, lengths=LENGTHS, *, episodes_of_files=(2, 1, 1), files_in_chunk=2, info=(), listed=(), types=()
    ):
        folder = tmp_path / "pushing"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
        starts, places = np.cumsum([0, *lengths]), []
        first = 0
        for number, count in enumerate(episodes_of_files):
            place = divmod(number, files_in_chunk)
            path = folder / "data" / f"chunk-{place[0]:03d}" / f"file-{place[1]:03d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            part = slice(starts[first], starts[first + count])
            pq.write_table(pa.table({name: as_arrow(values[part]) for name, values in features.items()}), path)
            first += count
            places += [place] * count
        episodes = {
            "episode_index": list(range(len(lengths))),
            "tasks": [[TASKS[number % len(TASKS)]] for number in range(len(lengths))],
            "length": list(lengths),
            "data/chunk_index": [chunk for chunk, _ in places],
            "data/file_index": [file for _, file in places],
            "dataset_from_index": starts[:-1].tolist(),
            "dataset_to_index": starts[1:].tolist(),
            "stats/action/mean": [[0.0, 0.0]] * len(lengths),
            **dict(listed),
        }
        pq.write_table(pa.table(episodes), folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
        tasks = {"task_index": list(range(len(TASKS))), "__index_level_0__": list(TASKS)}
        pq.write_table(pa.table(tasks), folder / "meta" / "tasks.parquet")
        described = {
            name: {"dtype": str(values.dtype), "shape": list(values.shape[1:]) or [1], "names": None}
            for name, values in features.items()
        }
        content = {
            "codebase_version": "v3.0",
            "robot_type": "so100",
            "total_episodes": len(lengths),
            "total_frames": int(starts[-1]),
            "total_tasks": len(TASKS),
            "chunks_size": 1000,
            "fps": 10,
            "splits": {"train": f"0:{len(lengths)}"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": None,
            "features": {**described, **dict(types)},
            **dict(info),
        }
        content = {key: value for key, value in content.items() if value != "absent"}
        (folder / "meta" / "info.json").write_text(json.dumps(content))
        return folder

    return write


def as_arrow(values):
    return (
        pa.array(values.tolist(), pa.list_(pa.from_numpy_dtype(values.dtype))) if values.ndim > 1 else pa.array(values)
    )


def loop_over(found, lengths=LENGTHS, *, keys=("observation.state",), terminal=None, reward=None, tasks=None):
    """What the transitions must be, one frame after the other."""
    observation = np.concatenate([found[key] for key in keys], axis=1)
    terminal = found["next.done"] & found["next.success"] if terminal is None else terminal
    reward = found["next.reward"] if reward is None else reward
    picked = {name: [] for name in ("observation", "action", "reward", "next", "terminated", "truncated")}
    row = 0
    for episode, length in enumerate(lengths):
        for step in range(length):
            last = step == length - 1
            if (tasks is None or episode % len(TASKS) in tasks) and (terminal[row] or not last):
                picked["observation"].append(observation[row])
                picked["action"].append(found["action"][row])
                picked["reward"].append([reward[row]])
                picked["next"].append(observation[row if terminal[row] else row + 1])
                picked["terminated"].append([terminal[row]])
                cut = step == length - 2 and not terminal[row + 1] and not terminal[row]
                picked["truncated"].append([cut])
            row += 1
    return {name: np.array(values) for name, values in picked.items()}


def assert_same(transitions, expected):
    places = {"reward": ("next", "reward"), "next": ("next", "observation")}
    places |= {name: ("next", name) for name in ("terminated", "truncated")}
    for name, values in expected.items():
        np.testing.assert_array_equal(transitions[places.get(name, name)].numpy(), values, name)
    done = expected["terminated"] | expected["truncated"]
    np.testing.assert_array_equal(transitions["next", "done"].numpy(), done)
    np.testing.assert_array_equal(transitions["episode"].numpy(), (np.cumsum(done) - done[:, 0]))


# ---- what becomes of the frames


@pytest.mark.parametrize("files", [(4,), (2, 1, 1), (1, 1, 1, 1), (1, 3)])
def test_the_transitions_are_those_of_a_loop_over_the_frames_however_they_are_divided_among_files(write, files):
    found = frames()
    folder = write(found, episodes_of_files=files)
    assert_same(load_transitions("lerobot", path=folder), loop_over(found))


def test_features_are_side_by_side_in_the_order_in_which_they_are_named(write):
    found, keys = frames(), ("observation.environment_state", "observation.state")
    assert_same(
        load_transitions("lerobot", path=write(found), observation_keys=list(keys)), loop_over(found, keys=keys)
    )


def test_episodes_may_be_listed_in_any_order(write):
    found = frames()
    places = {"data/chunk_index": [0, 0, 0, 1], "data/file_index": [0, 0, 1, 0]}
    listed = {"episode_index": [0, 1, 2, 3], "length": list(LENGTHS), **places}
    folder = write(found, listed={name: values[::-1] for name, values in listed.items()})
    assert_same(load_transitions("lerobot", path=folder), loop_over(found))


def test_a_done_is_terminal_where_the_dataset_does_not_tell_success(write):
    found = frames(**{"next.success": None})
    assert_same(load_transitions("lerobot", path=write(found)), loop_over(found, terminal=found["next.done"]))


def test_a_success_at_the_last_frame_is_terminal_where_the_dataset_does_not_tell_what_is_done(write):
    found = frames()
    success = found["next.success"].copy()
    success[1] = True  # and goes on
    expected = loop_over(found | {"next.success": success})
    found |= {"next.success": success, "next.done": None}
    assert_same(load_transitions("lerobot", path=write(frames(**found))), expected)


def test_where_no_flag_tells_anything_every_episode_was_cut(write):
    found = frames(**{"next.success": None, "next.done": None})
    expected = loop_over(found, terminal=np.zeros(sum(LENGTHS), dtype=bool))
    assert_same(load_transitions("lerobot", path=write(found)), expected)


def test_without_rewards_a_success_pays_one(write):
    found = frames(**{"next.reward": None})
    expected = loop_over(found, reward=found["next.success"].astype(np.float32))
    assert_same(load_transitions("lerobot", path=write(found)), expected)


def test_the_episodes_of_one_task_are_read_where_it_is_named(write):
    found = frames()
    folder = write(found)
    for number, task in enumerate(TASKS):
        assert_same(load_transitions("lerobot", path=folder, task=task), loop_over(found, tasks=(number,)))
    with pytest.raises(
        DatasetError, match=r"tasks.parquet: unknown dataset.task='open a drawer'; did you mean 'open the"
    ):
        load_transitions("lerobot", path=folder, task="open a drawer")


def test_numbers_in_lists_of_one_and_of_other_precision_are_read_too(write):
    found = frames()
    expected = loop_over(found)
    found["next.reward"], found["next.done"] = (
        found["next.reward"][:, None].astype(np.float64),
        found["next.done"][:, None],
    )
    assert_same(load_transitions("lerobot", path=write(found)), expected)


def test_integer_actions_are_discrete(write):
    found = frames(action=np.arange(sum(LENGTHS)) % 3)
    transitions = load_transitions("lerobot", path=write(found))
    np.testing.assert_array_equal(transitions["action"].numpy(), loop_over(found)["action"])


def test_a_dataset_of_more_rows_than_are_read_at_a_time_is_the_same(write):
    lengths = (30_000, 40_001, 5)
    found = frames(lengths)
    assert_same(
        load_transitions("lerobot", path=write(found, lengths, episodes_of_files=(2, 1))), loop_over(found, lengths)
    )


def test_the_preset_is_that_of_demonstrations_and_the_run_has_no_environment(write):
    source = LeRobot(path=write(frames()))
    assert source.environment() == (None, "the data name none; set env.name=ID") and source.label == "pushing"
    with initialised():
        options = compose("iql_offline", ["dataset=lerobot", f"dataset.path={source.path}"], OfflineOptions)
    assert options.algorithm.temperature == 0.5 and options.dataset == source


# ---- what cannot be trained on


def refusal(path, *parts, **options):
    with pytest.raises(DatasetError) as error:
        load_transitions("lerobot", path=path, **options)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def test_a_folder_that_is_none_of_lerobots_is_refused(tmp_path):
    refusal(tmp_path / "absent", "is no folder", "dataset.path=FOLDER")
    refusal(tmp_path, "has no meta/info.json", "dataset.path=FOLDER")


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v1.6"])
def test_an_earlier_version_is_named_with_what_converts_it(write, version):
    folder = write(frames(), info={"codebase_version": version})
    refusal(folder, "info.json", f"version {version}, not 3", "convert_dataset_v21_to_v30")


def test_a_later_version_is_refused(write):
    refusal(write(frames(), info={"codebase_version": "v4.0"}), "version v4.0, not 3; only version 3 is read")


@pytest.mark.parametrize("missing", ["codebase_version", "features", "total_episodes", "total_frames"])
def test_a_description_that_lacks_something_is_damaged(write, missing):
    refusal(write(frames(), info={missing: "absent"}), "info.json", "damaged", missing)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"codebase_version": "v3.0", "features": [1]}'])
def test_a_description_that_is_none_is_damaged(write, text):
    folder = write(frames())
    (folder / "meta" / "info.json").write_text(text)
    refusal(folder, "info.json", "damaged")


@pytest.mark.parametrize(
    "data_path",
    ["../{chunk_index}.parquet", "/tmp/{file_index}.parquet", "{chunk_index.__class__}", "data/{key}", "{", "a\nb"],
)
def test_a_data_path_that_leads_elsewhere_is_refused(write, data_path):
    refusal(write(frames(), info={"data_path": data_path}), "info.json", "data_path is", "data/chunk-")


@pytest.mark.parametrize("dtype", ["image", "video"])
def test_images_are_refused_by_name(write, dtype):
    picture = {"observation.images.top": {"dtype": dtype, "shape": [96, 96, 3], "names": None}}
    folder = write(frames(), types=picture)
    message = refusal(folder, "observation.images.top", dtype, observation_keys=["observation.images.top"])
    assert "images are not supported" in message and "observation.state" in message


def test_a_feature_that_is_not_there_is_named_with_those_that_are(write):
    keys = ["observation.sate"]
    message = refusal(write(frames()), "observation.sate", "did you mean 'observation.state'?", observation_keys=keys)
    assert "observation.environment_state" in message


def test_a_feature_that_is_no_vector_is_refused(write):
    refusal(write(frames()), "episode_index", "int64", "must be a vector", observation_keys=["episode_index"])


def test_a_dataset_without_actions_is_refused(write):
    refusal(write(frames(action=None)), "info.json", "there is no feature 'action'")


def test_a_dataset_without_rewards_says_what_is_missing_and_what_to_do(write):
    folder = write(frames(**{"next.reward": None, "next.success": None}))
    refusal(folder, "neither next.reward nor next.success", "add one of the two")


def test_a_key_that_is_named_twice_is_refused(write):
    with pytest.raises(ConfigurationError, match="list of different names"):
        load_transitions("lerobot", path=write(frames()), observation_keys=["observation.state"] * 2)


def test_a_file_that_is_missing_is_named(write):
    folder = write(frames())
    (folder / "data" / "chunk-000" / "file-001.parquet").unlink()
    refusal(folder, "chunk-000/file-001.parquet", "does not exist", "fetch the dataset again")


@pytest.mark.parametrize(
    "place", ["data/chunk-001/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet"]
)
def test_a_file_that_is_cut_is_named(write, place):
    folder = write(frames())
    content = (folder / place).read_bytes()
    (folder / place).write_bytes(content[: len(content) // 2])
    refusal(folder, place, "damaged", task=TASKS[0])


def test_a_dataset_without_a_list_of_episodes_is_refused(write):
    folder = write(frames())
    shutil.rmtree(folder / "meta" / "episodes")
    refusal(folder, "no Parquet file in meta/episodes")


@pytest.mark.parametrize(
    ("listed", "part"),
    [
        ({"length": [4, 3, 5, 2]}, "meta/info.json has 13 frames, and the lengths in meta/episodes sum to 14"),
        ({"length": [4, 3, 6, 0]}, "sum to 13"),
        ({"length": [3, 4, 5, 1]}, "frame 3 has episode_index 0"),
        ({"length": [5, 3, 4, 1]}, "file-000.parquet: it has 7 rows, but its episodes by meta/episodes 8"),
        ({"length": [4.0, 3.0, 5.0, 1.0]}, "length must be one integer a row"),
        ({"episode_index": [0, 1, 2, 2]}, "has 4 episodes, and meta/episodes lists 4, which must be those from 0 on"),
        ({"data/file_index": [0, 0, 7, 0]}, "file-007.parquet does not exist"),
        ({"length": [4, None, 5, 1]}, "length has 1 missing values"),
    ],
)
def test_episodes_that_do_not_fit_the_frames_are_refused(write, listed, part):
    refusal(write(frames(), listed=listed), part)


@pytest.mark.parametrize("count", [5, 2**60, -1])
def test_another_number_of_episodes_than_are_listed_is_refused(write, count):
    refusal(write(frames(), info={"total_episodes": count}), f"has {count} episodes, and meta/episodes lists 4")


def test_frames_that_lack_a_feature_or_have_another_size_are_refused(write):
    found = frames()
    vector = {"dtype": "float32", "shape": [3], "names": None}
    folder = write({**found, "action": found["action"][:, :1]}, types={"action": vector})
    refusal(folder, "action has shape [1] a row but [3] in meta/info.json")
    folder = write(found, types={"observation.more": vector})
    refusal(folder, "there is no column observation.more", observation_keys=["observation.more"])


def test_flags_and_numbers_that_are_none_are_refused(write):
    found = frames()
    done = found["next.done"].astype(np.int64)
    done[2] = 2
    refusal(write({**found, "next.done": done}), "next.done must hold 0 and 1 only, got 2 in frame 2")
    found["next.reward"][1] = np.nan
    refusal(write(found), "rewards holds nan in row 1")


# ---- as a user does


@pytest.mark.slow
def test_a_run_and_an_inspection_of_it(write, tmp_path):
    lengths = (30,) * 8
    folder = write(frames(lengths), lengths, episodes_of_files=(5, 3))
    options = ("dataset=lerobot", f"dataset.path={folder}")
    out = run("iql_offline.py", *options, *SMALL, "train.steps=20", f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert "pushing" in out and int(rows(tmp_path / "run" / "metrics.csv")[-1]["step"]) == 20
    out = run("inspect_dataset.py", *options, f"output={tmp_path / 'report'}", cwd=tmp_path)
    assert "236" in out and "8: 4 terminated, 4 truncated" in out
    (folder / "meta" / "info.json").unlink()
    assert "has no meta/info.json" in refused("iql_offline.py", *options, cwd=tmp_path)
