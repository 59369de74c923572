"""The minari source: datasets that Minari itself records, in each of its storages, and what is refused of others."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import sys
from collections import OrderedDict
from pathlib import Path

import gymnasium
import gymnasium_robotics
import h5py
import minari
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.storage import remotes
from minari.storage.remotes.cloud_storage import CloudStorage

from iql_torchrl import load_transitions
from iql_torchrl.data.sources.minari import environment_of, of_minari
from iql_torchrl.environments.scores import reference_returns
from iql_torchrl.environments.simulators import make_environment, spaces_of
from iql_torchrl.errors import ConfigurationError, DatasetError, SimulatorError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*out of date.*:DeprecationWarning"),
]
gymnasium.register_envs(gymnasium_robotics)

FORMATS = ["hdf5", "arrow", "parquet"]
VARIABLE = "MINARI_DATASETS_PATH"
VECTOR = Box(-np.inf, np.inf, (3,), np.float32)
ACTION = Box(-1, 1, (2,), np.float32)


@pytest.fixture(autouse=True)
def nothing_outside(monkeypatch, tmp_path):
    """No home folder and no network of the user's."""

    def refuse(self, address, *_):
        raise OSError(f"a test connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for key in (VARIABLE, "MINARI_REMOTE"):
        monkeypatch.delenv(key, raising=False)
    for key, value in {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(key, value)
    for key in ("http_proxy", "https_proxy", "all_proxy", "STORAGE_EMULATOR_HOST"):
        monkeypatch.setenv(key, "http://127.0.0.1:9")


def load(name, root, **options):
    return load_transitions("minari", name=name, root=root, download=False, **options)


# ---- recording


def stacked(elements):
    """A list of elements of a space as the arrays that Minari stores."""
    if isinstance(elements[0], dict):
        return {key: stacked([element[key] for element in elements]) for key in elements[0]}
    if isinstance(elements[0], tuple):
        return tuple(stacked(list(part)) for part in zip(*elements, strict=True))
    return np.stack(elements)


def buffer(observations, actions, rewards, *, terminated=False, truncated=False):
    """An episode, with the flags of its last step."""
    flags = np.zeros((2, len(rewards)), bool)
    flags[:, -1] = terminated, truncated
    return EpisodeBuffer(
        observations=observations, actions=actions, rewards=rewards, terminations=flags[0], truncations=flags[1]
    )


def played(environment, seeds, *, actions=()):
    """Episodes of an environment, with these actions in the first, random ones in the others."""
    environment.action_space.seed(7)
    actions = iter(actions)
    episodes = []
    for seed in seeds:
        observations, taken, rewards, terminated, truncated = [environment.reset(seed=seed)[0]], [], [], False, False
        while not (terminated or truncated):
            taken.append(next(actions, environment.action_space.sample()))
            observation, reward, terminated, truncated, _ = environment.step(taken[-1])
            observations.append(observation)
            rewards.append(float(reward))
        episodes.append(
            buffer(stacked(observations), stacked(taken), rewards, terminated=terminated, truncated=truncated)
        )
    return episodes


def invented(lengths, observation_space=VECTOR, action_space=ACTION, *, seed=0, **flags):
    """Random episodes of spaces; ``flags`` are those of the last step."""
    observation_space.seed(seed)
    action_space.seed(seed)
    random = np.random.default_rng(seed)
    flags = flags or {"truncated": True}
    return [
        buffer(
            stacked([observation_space.sample() for _ in range(length + 1)]),
            stacked([action_space.sample() for _ in range(length)]),
            random.normal(size=length),
            **flags,
        )
        for length in lengths
    ]


def record(root, name, episodes, data_format="hdf5", **options):
    """``minari.create_dataset_from_buffers`` in a folder."""
    if "env" not in options:
        options = {"observation_space": VECTOR, "action_space": ACTION, **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(root))
        minari.create_dataset_from_buffers(name, episodes, data_format=data_format, **options)
    return root


def of_environment(environment, **options):
    return {"episodes": played(environment, **options), "env": environment}


def of_spaces(observation_space=VECTOR, action_space=ACTION, lengths=(4, 6, 3), **flags):
    episodes = invented(lengths, observation_space, action_space, **flags)
    return {"episodes": episodes, "observation_space": observation_space, "action_space": action_space}


def pendulum(seeds=range(12)):
    return of_environment(gymnasium.make("Pendulum-v1", max_episode_steps=7), seeds=seeds)


def cartpole():
    return of_environment(gymnasium.make("CartPole-v1"), seeds=range(4))


def point_maze():
    environment = gymnasium.make("PointMaze_UMaze-v3", max_episode_steps=6, reward_type="dense")
    return of_environment(environment, seeds=range(3))


def kitchen():
    environment = gymnasium.make("FrankaKitchen-v1", max_episode_steps=3, tasks_to_complete=["kettle", "microwave"])
    return of_environment(environment, seeds=range(2))


def frozen_lake():
    environment = gymnasium.make("FrozenLake-v1", is_slippery=False, max_episode_steps=20)
    to_the_goal = map(np.int64, [2, 2, 1, 1, 1, 2])
    return of_environment(environment, seeds=range(3), actions=to_the_goal)


TUPLE = Tuple(
    (
        Box(-1, 1, (2, 2), np.float32),
        Discrete(3, start=2),
        MultiDiscrete([2, 3]),
        MultiBinary(4),
        Box(0, 9, (), np.int64),
    )
)
OUT_OF_ORDER = Dict(OrderedDict(z=Box(-1, 1, (2,)), a=Box(-1, 1, (1,)), M=Dict(OrderedDict(y=VECTOR, b=Discrete(2)))))
WIDE = Box(-1e3, 1e3, (5,), np.float64)

RECORDINGS = {
    "Pendulum": pendulum,
    "CartPole": cartpole,
    "PointMaze": point_maze,
    "Kitchen": kitchen,
    "FrozenLake": frozen_lake,
    "a single episode": lambda: pendulum([3]),
    "episodes of length one": lambda: of_spaces(lengths=(4, 1, 3, 1)),
    "one step in all": lambda: of_spaces(lengths=(1,), terminated=True),
    "no flags": lambda: of_spaces(terminated=False),
    "terminated": lambda: of_spaces(terminated=True),
    "matrices of actions": lambda: of_spaces(action_space=Box(-1, 1, (2, 2), np.float32)),
    "float64": lambda: of_spaces(WIDE, Box(-1, 1, (2,), np.float64)),
    "a tuple": lambda: of_spaces(TUPLE),
    "a dict out of order": lambda: of_spaces(OUT_OF_ORDER),
}


def one_hot(values, start, size):
    return np.stack([[float(value - start == number) for number in range(size)] for value in values])


def rows_of(array):
    return np.stack([np.ravel(element) for element in array])


GOALS = ["bottom burner", "hinge cabinet", "kettle", "light switch", "microwave", "slide cabinet", "top burner"]


def of_kitchen(values):
    # The goals that the environment has, of these.
    parts = [values["achieved_goal"][goal] for goal in GOALS if goal in values["achieved_goal"]]
    parts += [values["desired_goal"][goal] for goal in GOALS if goal in values["desired_goal"]]
    return np.concatenate([*parts, values["observation"]], axis=1)


BY_HAND = {
    "PointMaze": lambda values: np.concatenate(
        [values["achieved_goal"], values["desired_goal"], values["observation"]], axis=1
    ),
    "Kitchen": of_kitchen,
    "FrozenLake": lambda values: one_hot(values, 0, 16),
    "a tuple": lambda values: np.concatenate(
        [
            rows_of(values[0]),
            one_hot(values[1], 2, 3),
            one_hot(values[2][:, 0], 0, 2),
            one_hot(values[2][:, 1], 0, 3),
            values[3],
            rows_of(values[4]),
        ],
        axis=1,
    ),
    "a dict out of order": lambda values: np.concatenate(
        [one_hot(values["M"]["b"], 0, 2), values["M"]["y"], values["a"], values["z"]], axis=1
    ),
}


def by_minari(name, root, flat=lambda values: values):
    """What ``minari.load_dataset`` gives, episode after episode, keyed like the TensorDict."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(root))
        episodes = list(minari.load_dataset(name).iterate_episodes())
    observations = [np.asarray(flat(episode.observations)) for episode in episodes]
    last = [np.arange(len(episode)) == len(episode) - 1 for episode in episodes]
    terminated = np.concatenate([episode.terminations for episode in episodes])[:, None]
    truncated = np.concatenate([episode.truncations for episode in episodes])[:, None]
    truncated |= np.concatenate(last)[:, None] & ~terminated  # an end without a flag
    actions = [np.asarray(episode.actions) for episode in episodes]
    if actions[0].ndim > 1:
        actions = [rows_of(array) for array in actions]
    return {
        "observation": np.concatenate([array[:-1] for array in observations]),
        "action": np.concatenate(actions),
        "episode": np.concatenate([np.full(len(episode), number) for number, episode in enumerate(episodes)]),
        ("next", "observation"): np.concatenate([array[1:] for array in observations]),
        ("next", "reward"): np.concatenate([episode.rewards for episode in episodes])[:, None],
        ("next", "terminated"): terminated,
        ("next", "truncated"): truncated,
        ("next", "done"): terminated | truncated,
    }


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Name and folder of a recording in a storage; each is made once and must not be changed."""
    root = tmp_path_factory.mktemp("recorded")
    contents, names = {}, {}

    def find(kind, data_format="hdf5"):
        key = kind, data_format
        if key not in names:
            contents[kind] = contents[kind] if kind in contents else RECORDINGS[kind]()
            names[key] = f"tests/{kind.lower().replace(' ', '-')}/{data_format}-v0"
            options = dict(contents[kind])
            record(root, names[key], options.pop("episodes"), data_format, **options)
        return names[key], root

    yield find
    for content in contents.values():
        if "env" in content:
            content["env"].close()


@pytest.fixture
def copied(recorded, tmp_path):
    """The same in a folder of the test's own: name, root, and the folder of the dataset's data."""

    def copy(kind, data_format="hdf5"):
        name, source = recorded(kind, data_format)
        shutil.copytree(source / name, tmp_path / "copy" / name)
        return name, tmp_path / "copy", tmp_path / "copy" / name / "data"

    return copy


def edit_metadata(data, **changes):
    """Change entries of ``metadata.json``; ``...`` removes one."""
    metadata = json.loads((data / "metadata.json").read_text())
    for key, value in changes.items():
        if value is ...:
            del metadata[key]
        else:
            metadata[key] = value
    (data / "metadata.json").write_text(json.dumps(metadata))


def refused(name, root, *words, **options):
    """The message of the error that loading must end in; it has the dataset's name and these words."""
    before = dict(os.environ)
    with pytest.raises(DatasetError) as error:
        load(name, root, **options)
    assert dict(os.environ) == before
    for word in (name, *words):
        assert word in str(error.value)
    return str(error.value)


# ---- content


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("kind", RECORDINGS)
def test_transitions_are_what_minari_gives_value_for_value(kind, data_format, recorded, assert_transitions_equal):
    name, root = recorded(kind, data_format)
    transitions = load(name, root)
    expected = by_minari(name, root, BY_HAND.get(kind, lambda values: values))
    assert_transitions_equal(transitions, expected)
    assert transitions["next", "done"].sum() == len(np.unique(expected["episode"]))
    discrete = kind in ("CartPole", "FrozenLake")
    assert str(transitions["action"].dtype) == ("torch.int64" if discrete else "torch.float32")
    for key in ("observation", ("next", "observation"), ("next", "reward")):
        assert str(transitions[key].dtype) == "torch.float32"
    for key in ("observation", "action", ("next", "observation"), *([] if kind == "Kitchen" else [("next", "reward")])):
        assert transitions[key].any(), key


@pytest.mark.parametrize("data_format", FORMATS)
def test_the_step_at_a_truncation_keeps_the_next_observation_that_was_recorded(data_format, recorded):
    content = pendulum()["episodes"]
    name, root = recorded("Pendulum", data_format)
    transitions = load(name, root)
    ends = transitions["next", "truncated"][:, 0]
    assert ends.sum() == 12 and not transitions["next", "terminated"].any()
    found = transitions["next", "observation"][ends].numpy()
    np.testing.assert_array_equal(found, [episode.observations[-1] for episode in content])
    np.testing.assert_array_equal(
        transitions["action"].numpy(), np.concatenate([episode.actions for episode in content])
    )


@pytest.mark.parametrize("data_format", FORMATS)
def test_episodes_that_differ_in_the_flags_of_their_ends_keep_them(data_format, tmp_path, assert_transitions_equal):
    flags = [{"terminated": True}, {"truncated": True}, {"terminated": False}]
    episodes = [invented([3 + i], seed=i, **which)[0] for i, which in enumerate(flags)]
    record(tmp_path, "flags-v0", episodes, data_format)
    transitions = load("flags-v0", tmp_path)
    assert_transitions_equal(transitions, by_minari("flags-v0", tmp_path))
    assert transitions["next", "terminated"].flatten().nonzero().flatten().tolist() == [2]
    assert transitions["next", "truncated"].flatten().nonzero().flatten().tolist() == [6, 11]


@pytest.mark.parametrize("data_format", FORMATS)
def test_a_step_that_is_both_terminated_and_truncated_stays_both(data_format, tmp_path, assert_transitions_equal):
    record(tmp_path, "both-v0", invented([3, 4], terminated=True, truncated=True), data_format)
    assert_transitions_equal(load("both-v0", tmp_path), by_minari("both-v0", tmp_path))


@pytest.mark.parametrize("kind", ["PointMaze", "CartPole", "no flags"])
def test_keep_timeouts_and_a_step_limit_change_nothing_in_a_log_that_is_complete(
    kind, recorded, assert_transitions_equal
):
    name, root = recorded(kind)
    expected = load(name, root)
    assert_transitions_equal(load(name, root, keep_timeouts=True), expected)
    assert_transitions_equal(load(name, root, max_episode_steps=2), expected)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("kind", ["Pendulum", "CartPole", "PointMaze", "FrozenLake"])
def test_transitions_in_mapped_files_equal_those_in_memory(
    kind, data_format, recorded, tmp_path, assert_transitions_equal
):
    name, root = recorded(kind, data_format)
    mapped = load(name, root, storage="memmap", storage_folder=tmp_path / "maps")
    assert_transitions_equal(mapped, load(name, root))
    assert list((tmp_path / "maps").iterdir()) == []


def test_numbers_and_episodes_of_a_dataset_that_was_extended_later_follow_the_first(tmp_path, assert_transitions_equal):
    record(tmp_path, "grown-v0", invented([3, 2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(tmp_path))
        minari.load_dataset("grown-v0").update_dataset_from_buffer(invented([5], seed=1))
    transitions = load("grown-v0", tmp_path)
    assert len(transitions) == 10
    assert_transitions_equal(transitions, by_minari("grown-v0", tmp_path))


def test_what_a_data_collector_records_is_read_back(tmp_path, monkeypatch, assert_transitions_equal):
    def tree_map(function, tree, *others):
        if isinstance(tree, dict):
            return {key: tree_map(function, tree[key], *(other[key] for other in others)) for key in tree}
        return function(tree, *others)

    if importlib.util.find_spec("jax") is None:  # of which the collector uses this function alone
        module = type(sys)("jax.tree_util")
        module.tree_map = tree_map
        parent = type(sys)("jax")
        parent.tree_util = module
        monkeypatch.setitem(sys.modules, "jax", parent)
        monkeypatch.setitem(sys.modules, "jax.tree_util", module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(tmp_path))
        collector = minari.DataCollector(
            gymnasium.make("PointMaze_UMaze-v3", max_episode_steps=5, reward_type="dense"), record_infos=True
        )
        for _ in range(2):
            collector.reset()
            while not collector.step(collector.action_space.sample())[3]:
                pass
        collector.reset()
        collector.step(collector.action_space.sample())  # cut off
        collector.create_dataset("D4RL/pointmaze/collected-v0")
        collector.close()
    transitions = load("D4RL/pointmaze/collected-v0", tmp_path)
    assert len(transitions) == 11
    assert_transitions_equal(transitions, by_minari("D4RL/pointmaze/collected-v0", tmp_path, BY_HAND["PointMaze"]))
    spec = environment_of("D4RL/pointmaze/collected-v0", root=tmp_path, download=False)
    assert spec.kwargs["reward_type"] == "dense" and spec.max_episode_steps == 5


@pytest.mark.parametrize("kind", ["Pendulum", "CartPole", "PointMaze", "Kitchen", "FrozenLake"])
def test_the_environment_of_a_dataset_lays_its_observations_out_as_the_dataset_does(kind, recorded):
    name, root = recorded(kind)
    transitions = load(name, root)
    spec, reason = of_minari(name, environment_of(name, root=root, download=False))
    assert spec is not None and reason == ""
    action_dim = None if transitions["action"].ndim == 1 else transitions["action"].shape[1]
    spaces_of(spec, observation_dim=transitions["observation"].shape[1], action_dim=action_dim)
    environment = make_environment(spec)
    found, _ = environment.reset(seed=0)  # the first episode's
    environment.close()
    expected = transitions["observation"][0].numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-6)


# ---- names


@pytest.mark.parametrize("name", ["mujoco/hopper/medium-v0", "D4RL/pointmaze/umaze-v2", "alone-v3", "a_b/c-d-v10"])
def test_a_name_with_any_number_of_namespaces_is_found_in_the_folder(name, tmp_path, assert_transitions_equal):
    record(tmp_path, name, invented([3, 2]))
    assert_transitions_equal(load(name, tmp_path), by_minari(name, tmp_path))


def test_the_folder_is_minaris_own_where_none_is_given(tmp_path, monkeypatch, assert_transitions_equal):
    record(tmp_path / "elsewhere", "toy/set-v0", invented([3]))
    record(tmp_path / "home/.minari/datasets", "toy/set-v0", invented([4]))
    assert len(load("toy/set-v0", None)) == 4
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    assert len(load("toy/set-v0", None)) == 3
    assert os.environ[VARIABLE] == str(tmp_path / "elsewhere")


@pytest.mark.parametrize("relative", [True, False])
def test_the_folder_may_be_relative_or_begin_with_the_home_folder(relative, tmp_path, monkeypatch):
    record(tmp_path / "home/sets", "toy/set-v0", invented([3]))
    monkeypatch.chdir(tmp_path / "home")
    assert len(load("toy/set-v0", "sets" if relative else "~/sets")) == 3


@pytest.mark.parametrize(
    "name",
    [
        "",
        "hopper",
        "mujoco/hopper/medium",
        "mujoco/hopper/medium-v",
        "mujoco/hopper/medium-vx",
        "/mujoco/hopper/medium-v0",
        "../hopper/medium-v0",
        "mujoco/../../medium-v0",
        "mujoco/hopper/medium-v0/",
        "mujoco/hopper/medium-v0\n",
        "two words-v0",
        "hf://farama-minari/D4RL/door/human-v2",
        None,
        5,
    ],
)
@pytest.mark.parametrize("download", [True, False])
def test_a_malformed_name_is_refused_with_a_well_formed_one(name, download, tmp_path):
    for read in (lambda **options: load_transitions("minari", **options), environment_of):
        with pytest.raises((DatasetError, ConfigurationError)) as error:
            read(name=name, root=tmp_path, download=download)
        assert repr(name) in str(error.value) and "mujoco/hopper/medium-v0" in str(error.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("D4RL/pointmaze/umaze-v1", "D4RL/pointmaze/umaze-v2"), ("mujoco/hoper/medium-v0", "mujoco/hopper/medium-v0")],
)
def test_a_dataset_that_is_not_there_is_named_with_the_folder_and_the_nearest_one_there(name, meant, tmp_path):
    for there in ("D4RL/pointmaze/umaze-v2", "mujoco/hopper/medium-v0"):
        record(tmp_path, there, invented([2]))
    refused(name, tmp_path, f"is not in {tmp_path};", repr(meant), "dataset.download=true", "dataset.root")
    with pytest.raises(DatasetError, match=repr(meant)):
        environment_of(name, root=tmp_path, download=False)


@pytest.mark.parametrize("name", ["alone-v0", "toy/set-v0", "toy/kind/set-v0"])
@pytest.mark.parametrize("there", ["nothing", "no folder", "something else"])
def test_a_folder_without_datasets_is_named_and_nothing_suggested(there, name, tmp_path):
    root = tmp_path / "sets"
    if there != "no folder":
        root.mkdir()
    if there == "something else":
        (root / "notes/data").mkdir(parents=True)
        (root / "file.txt").write_text("text")
    message = refused(name, root, f"is not in {root};", "dataset.download=true")
    assert "known are ;" not in message and "did you mean" not in message


@pytest.mark.parametrize("below", [".", "below"])
def test_a_root_that_cannot_be_a_folder_is_named(below, tmp_path):
    (tmp_path / "taken").write_text("a file")
    refused("toy/set-v0", tmp_path / "taken" / below, str(tmp_path / "taken"), "dataset.root")


# ---- downloads


@pytest.mark.parametrize(
    "remote", [None, "hf://nobody", "gcp://minari-datasets", "ftp://nowhere", "nowhere", ""], ids=str
)
@pytest.mark.parametrize("read", ["load_transitions", "environment_of"])
def test_a_host_that_cannot_be_reached_is_named_with_the_manual_route(read, remote, tmp_path, monkeypatch):
    if remote is not None:
        monkeypatch.setenv("MINARI_REMOTE", remote)
    name = "D4RL/door/human-v2"
    before = dict(os.environ)
    with pytest.raises(DatasetError) as error:
        if read == "environment_of":
            environment_of(name, root=tmp_path)
        else:
            load_transitions("minari", name=name, root=tmp_path)
    assert dict(os.environ) == before
    for word in (name, "could not be downloaded", f"minari download {name}", str(tmp_path / name)):
        assert word in str(error.value)
    assert not (tmp_path / name).exists()


class Host(CloudStorage):
    """Minari's remote storage, in a folder."""

    def __init__(self, folder):
        self.folder, self.downloads, self.fails_after = Path(folder), [], None

    def list_datasets(self, prefix=None):
        found = [path.parent.parent.relative_to(self.folder) for path in self.folder.rglob("data/metadata.json")]
        return [str(path) for path in found if str(path).startswith(prefix or "")]

    def get_dataset_metadata(self, dataset_id):
        return json.loads((self.folder / dataset_id / "data/metadata.json").read_text())

    def download_dataset(self, dataset_id, path):
        self.downloads.append(dataset_id)
        for number, file in enumerate(sorted((self.folder / dataset_id / "data").iterdir(), reverse=True)):
            if number == self.fails_after:
                raise ConnectionResetError("the connection was reset\nby somebody")
            target = Path(path) / dataset_id / "data" / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)

    def list_namespaces(self):
        return ["tests", "tests/cartpole"]

    def download_namespace_metadata(self, namespace, path):
        (Path(path) / namespace).mkdir(parents=True, exist_ok=True)
        (Path(path) / namespace / "namespace_metadata.json").write_text("{}")

    upload_dataset = upload_namespace = None


@pytest.fixture
def host(recorded, monkeypatch):
    name, folder = recorded("CartPole")
    host = Host(folder)
    monkeypatch.setitem(remotes._registry, "folder", lambda: lambda path, token=None: host)
    monkeypatch.setenv("MINARI_REMOTE", "folder://here")
    host.name = name
    return host


def test_a_dataset_is_downloaded_once_into_the_folder(host, tmp_path, assert_transitions_equal):
    for _ in range(2):
        transitions = load_transitions("minari", name=host.name, root=tmp_path)
        assert_transitions_equal(transitions, by_minari(host.name, host.folder))
    assert environment_of(host.name, root=tmp_path).name == "CartPole-v1"
    assert host.downloads == [host.name]
    assert_transitions_equal(load(host.name, tmp_path), transitions)
    assert VARIABLE not in os.environ


def test_nothing_is_downloaded_where_that_is_not_allowed(host, tmp_path):
    refused(host.name, tmp_path, "dataset.download=true")
    assert host.downloads == []


@pytest.mark.parametrize("name", ["tests/cartpole/hdf5-v7", "tests/cartpool/hdf5-v0"])
def test_a_name_that_the_host_does_not_have_is_refused(name, host, tmp_path):
    with pytest.raises(DatasetError, match=f"{name} could not be downloaded"):
        load_transitions("minari", name=name, root=tmp_path)
    assert host.downloads == []


@pytest.mark.parametrize("files", [0, 1])
def test_a_download_that_breaks_off_never_counts_as_finished(files, host, tmp_path, assert_transitions_equal):
    host.fails_after = files
    with pytest.raises(DatasetError, match=f"{host.name} could not be downloaded .*the connection was reset\\)"):
        load_transitions("minari", name=host.name, root=tmp_path)
    host.fails_after = None
    try:
        transitions = load_transitions("minari", name=host.name, root=tmp_path)
    except DatasetError as error:
        assert str(tmp_path / host.name) in str(error) and "delete that folder" in str(error)
    else:
        assert_transitions_equal(transitions, by_minari(host.name, host.folder))


# ---- the environment variable


@pytest.mark.parametrize(
    ("root", "before"),
    [("given", None), ("given", ""), ("given", "/where/the/user/keeps/them"), ("not given", "the recordings")],
)
@pytest.mark.parametrize("succeeds", [True, False])
def test_the_environment_is_as_before(succeeds, root, before, recorded, monkeypatch, tmp_path):
    name, folder = recorded("CartPole")
    if before == "the recordings":
        before = str(folder)
    if before is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, before)
    environment = dict(os.environ)
    options = {"root": folder if root == "given" else None, "download": False}
    if succeeds:
        load_transitions("minari", name=name, **options)
        environment_of(name, **options)
    else:
        for wanted in ("not/there-v0", "malformed"):
            with pytest.raises(DatasetError):
                load_transitions("minari", name=wanted, **options)
            with pytest.raises(DatasetError):
                environment_of(wanted, **options)
        record(tmp_path, "nan-v0", [nan_episode()])
        with pytest.raises(DatasetError):
            load("nan-v0", tmp_path)
    assert dict(os.environ) == environment


# ---- the environment of a dataset


@pytest.mark.parametrize("data_format", FORMATS)
def test_the_environment_has_the_id_arguments_and_step_limit_of_the_recording(data_format, recorded):
    name, root = recorded("PointMaze", data_format)
    found = environment_of(name, root=root, download=False)
    assert (found.name, found.max_episode_steps, found.references) == ("PointMaze_UMaze-v3", 6, None)
    assert found.kwargs["reward_type"] == "dense"
    name, root = recorded("Kitchen", data_format)
    found = environment_of(name, root=root, download=False)
    assert (found.name, found.max_episode_steps) == ("FrankaKitchen-v1", 3)
    assert found.kwargs == {"tasks_to_complete": ["kettle", "microwave"]}


def test_an_environment_for_evaluation_is_preferred(tmp_path):
    evaluated = gymnasium.make("Pendulum-v1", max_episode_steps=9, g=3.0)
    episodes = played(gymnasium.make("Pendulum-v1", max_episode_steps=4), [0])
    record(tmp_path, "toy/set-v0", episodes, env="Pendulum-v1", eval_env=evaluated)
    found = environment_of("toy/set-v0", root=tmp_path, download=False)
    assert (found.name, found.max_episode_steps, found.kwargs) == ("Pendulum-v1", 9, {"g": 3.0})
    environment = make_environment(of_minari("toy/set-v0", found)[0])
    assert environment.spec.max_episode_steps == 9 and environment.unwrapped.g == 3.0


def test_an_environment_without_a_step_limit_has_none(tmp_path):
    spec = EnvSpec("Pendulum-v1", entry_point="gymnasium.envs.classic_control.pendulum:PendulumEnv")
    record(tmp_path, "toy/set-v0", invented([2], VECTOR, Box(-2, 2, (1,))), env=spec)
    found = environment_of("toy/set-v0", root=tmp_path, download=False)
    assert found.max_episode_steps is None
    spec, _ = of_minari("toy/set-v0", found)
    assert "max_episode_steps" not in spec.kwargs


def test_a_dataset_that_names_no_environment_has_none_and_says_so(recorded):
    name, root = recorded("float64")
    assert environment_of(name, root=root, download=False) is None
    spec, reason = of_minari(name, None)
    assert spec is None and name in reason


def with_environment(root, environment_id, kwargs=None, **options):
    """A dataset whose metadata name an environment, and what ``of_minari`` makes of it."""
    spec = gymnasium.spec(environment_id)
    spec.kwargs.update(kwargs or {})
    name = "some/name-v0"
    record(root, name, invented([2]), env=spec, observation_space=VECTOR, action_space=ACTION, **options)
    return of_minari(name, environment_of(name, root=root, download=False))


def test_references_in_the_metadata_come_before_d4rls(tmp_path):
    spec, reason = with_environment(tmp_path, "Hopper-v5", ref_min_score=-5.0, ref_max_score=20.0)
    assert (spec.references, reason) == ((-5.0, 20.0), "")
    assert "metadata" in spec.note
    assert spec.score(-5.0) == 0 and spec.score(20.0) == 100


def test_references_in_the_metadata_serve_where_d4rl_has_none(tmp_path):
    spec, _ = with_environment(tmp_path, "PointMaze_UMaze-v3", ref_min_score=1.0, ref_max_score=3.0)
    assert spec.references == (1.0, 3.0) and "not comparable" not in spec.note


@pytest.mark.parametrize("environment_id", ["Hopper-v5", "HalfCheetah-v4", "Walker2d-v5", "Ant-v5", "AdroitHandPen-v1"])
def test_without_references_in_the_metadata_d4rls_are_taken(environment_id, tmp_path):
    spec, _ = with_environment(tmp_path, environment_id)
    assert spec.name == environment_id
    assert spec.references == reference_returns(environment_id) and None not in (spec.references, spec.score(1.0))


@pytest.mark.parametrize("environment_id", ["AntMaze_UMaze-v4", "AntMaze_Large_Diverse_GR-v4", "PointMaze_Medium-v3"])
def test_mazes_have_no_references_and_a_note_that_says_why(environment_id, tmp_path):
    spec, reason = with_environment(tmp_path, environment_id)
    assert spec.references is None and spec.score(1.0) is None and reason == ""
    assert "not comparable" in spec.note


def test_an_environment_that_d4rl_does_not_have_has_no_references(tmp_path):
    spec, _ = with_environment(tmp_path, "Pendulum-v1")
    assert (spec.references, spec.note) == (None, "")


@pytest.mark.parametrize(
    ("tasks", "references"),
    [
        (["microwave", "kettle", "light switch", "slide cabinet"], (0.0, 4.0)),
        (["microwave", "kettle"], None),
        (None, None),
    ],
)
def test_kitchen_is_scored_by_its_tasks_where_they_are_four(tasks, references, tmp_path):
    kwargs = {} if tasks is None else {"tasks_to_complete": tasks}
    spec, _ = with_environment(tmp_path, "FrankaKitchen-v1", kwargs)
    assert spec.references == references


@pytest.mark.parametrize("key", ["ref_min_score", "ref_max_score"])
def test_one_reference_alone_is_none(key, tmp_path):
    with_environment(tmp_path, "Hopper-v5", ref_min_score=-5.0, ref_max_score=20.0)
    edit_metadata(tmp_path / "some/name-v0/data", **{key: ...})
    found = environment_of("some/name-v0", root=tmp_path, download=False)
    assert found.references is None
    assert of_minari("some/name-v0", found)[0].references == reference_returns("hopper-medium-v2")


@pytest.mark.parametrize("value", ["low", [], {}])
def test_references_that_are_no_numbers_are_named_with_the_folder_they_are_in(value, tmp_path):
    with_environment(tmp_path, "Hopper-v5", ref_min_score=-5.0, ref_max_score=20.0)
    edit_metadata(tmp_path / "some/name-v0/data", ref_min_score=value)
    with pytest.raises(DatasetError) as error:
        environment_of("some/name-v0", root=tmp_path, download=False)
    # creates it), and says to delete the dataset there.
    assert str(tmp_path / "some/name-v0") in str(error.value)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("references", [(3.0, 3.0), (float("nan"), 1.0), (0.0, float("inf"))], ids=str)
def test_references_that_make_no_scale_are_none_or_refused(references, tmp_path):
    with_environment(tmp_path, "Hopper-v5", ref_min_score=references[0], ref_max_score=references[1])
    try:
        found = environment_of("some/name-v0", root=tmp_path, download=False)
    except DatasetError as error:
        assert "some/name-v0" in str(error)
    else:
        score = of_minari("some/name-v0", found)[0].score(1.0)
        assert score is None or (np.isfinite(score) and score != 0)


@pytest.mark.parametrize("key", ["env_spec", "eval_env_spec"])
@pytest.mark.parametrize("value", ["{", "[]", "null", "{}", '{"id": 5}', '{"id": "a b"}', 5, ["x"], {"id": "Ant-v4"}])
def test_an_environment_that_cannot_be_read_is_named_with_the_dataset(value, key, copied):
    name, root, data = copied("Pendulum")
    edit_metadata(data, **{key: value})
    with pytest.raises(DatasetError) as error:
        environment_of(name, root=root, download=False)
    assert name in str(error.value) and str(root / name) in str(error.value)


# ---- code that metadata name is not run


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported, another when its environment is made."""
    folder, number = tmp_path / "trap", id(tmp_path)
    folder.mkdir()
    module = f"iql_trap_{number}"
    (folder / f"{module}.py").write_text(
        "import pathlib, gymnasium\n"
        f"pathlib.Path({str(folder / 'sprung')!r}).write_text('imported')\n"
        "gymnasium.register('Trap-v0', entry_point=lambda: gymnasium.make('Pendulum-v1'))\n"
        "def make(*args, **kwargs):\n    return gymnasium.make('Pendulum-v1')\n"
    )
    monkeypatch.syspath_prepend(folder)
    yield module, folder / "sprung"
    sys.modules.pop(module, None)
    gymnasium.registry.pop("Trap-v0", None)


def spec_with_trap(environment_id, module):
    spec = json.loads(gymnasium.spec("Pendulum-v1").to_json())
    wrapper = {"name": "Trap", "entry_point": f"{module}:make", "kwargs": {}}
    return json.dumps(
        spec
        | {
            "id": environment_id,
            "entry_point": f"{module}:make",
            "vector_entry_point": f"{module}:make",
            "additional_wrappers": [wrapper],
        }
    )


def test_the_trap_is_sprung_by_minari_itself(trap, copied):
    module, sprung = trap
    name, root, data = copied("Pendulum")
    edit_metadata(data, env_spec=spec_with_trap("Trap-v0", module), observation_space=...)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(root))
        minari.load_dataset(name)
    assert sprung.exists()


@pytest.mark.parametrize("key", ["env_spec", "eval_env_spec"])
@pytest.mark.parametrize("environment_id", ["Pendulum-v1", "NotRegistered-v0", "module:Trap-v0"])
def test_code_that_the_metadata_name_is_never_run(environment_id, key, trap, copied):
    module, sprung = trap
    name, root, data = copied("Pendulum")
    environment_id = environment_id.replace("module", module)
    edit_metadata(data, **{key: spec_with_trap(environment_id, module)})
    load(name, root)
    found = environment_of(name, root=root, download=False)
    assert not sprung.exists()
    try:
        spec, _ = of_minari(name, found)
        made = make_environment(spec)
    except SimulatorError as error:
        made = None
        assert environment_id in str(error)
    assert not sprung.exists()
    assert (made is not None) == (environment_id == "Pendulum-v1")
    assert made is None or type(made.unwrapped).__module__.startswith("gymnasium.")


@pytest.mark.parametrize("read", ["load_transitions", "environment_of"])
@pytest.mark.parametrize("change", [..., None, "", {}, 5, "null", "{}"], ids=str)
@pytest.mark.parametrize("key", ["observation_space", "action_space"])
def test_no_code_is_run_to_find_a_space_that_the_metadata_lack(key, change, read, trap, copied):
    module, sprung = trap
    name, root, data = copied("Pendulum")
    edit_metadata(data, env_spec=spec_with_trap("Trap-v0", module), **{key: change})
    with pytest.raises(DatasetError, match=name):
        if read == "environment_of":
            environment_of(name, root=root, download=False)
        else:
            load(name, root)
    assert not sprung.exists()


# ---- what cannot be trained on


@pytest.mark.parametrize("version", ["1.0.0", "0.3.1", "0.6.0", "", None, 5, ["0.5.4"]], ids=str)
@pytest.mark.parametrize("data_format", FORMATS)
def test_a_dataset_of_another_version_of_minari_is_refused(data_format, version, copied):
    name, root, data = copied("CartPole", data_format)
    edit_metadata(data, minari_version=version)
    message = refused(name, root)
    if version in ("1.0.0", "0.3.1", "0.6.0"):
        assert f"Minari {version}" in message and minari.__version__ in message and "Install" in message
    with pytest.raises(DatasetError, match=name):
        environment_of(name, root=root, download=False)


CAMERA = Box(0, 255, (8, 8, 3), np.uint8)
LARGE_CAMERA = Box(0, 255, (32, 40, 3), np.uint8)
TEXT = Text(5, min_length=5, charset="abc")
UNSUPPORTED_OBSERVATIONS = {
    "an image": (CAMERA, ["observation is an image"]),
    "an image stored as JPEG": (LARGE_CAMERA, ["observation is an image"]),
    "an image in a dict": (Dict(camera=CAMERA, joints=VECTOR), ["observation/camera is an image"]),
    "an image two levels down": (
        Dict(robot=Dict(eye=CAMERA, joints=VECTOR), z=VECTOR),
        ["observation/robot/eye is an image"],
    ),
    "an image in a tuple": (Tuple((VECTOR, CAMERA)), ["observation/1 is an image"]),
    "a grey image": (Box(0, 255, (8, 8), np.uint8), ["observation is an image"]),
    "text": (TEXT, ["observation is Text"]),
    "text in a dict": (Dict(joints=VECTOR, mission=TEXT), ["observation/mission is Text"]),
}


def as_lists(values):
    """Texts as the lists that Minari takes."""
    if isinstance(values, dict):
        return {key: as_lists(value) for key, value in values.items()}
    return [str(value) for value in values] if values is not None and values.dtype.kind == "U" else values


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("kind", UNSUPPORTED_OBSERVATIONS)
def test_observations_that_are_no_vectors_are_refused_and_their_part_named(kind, data_format, tmp_path):
    space, words = UNSUPPORTED_OBSERVATIONS[kind]
    episodes = invented([3, 2], space)
    if "text" in kind:
        episodes = [
            buffer(as_lists(episode.observations), episode.actions, episode.rewards, truncated=True)
            for episode in episodes
        ]
    record(tmp_path, "toy/set-v0", episodes, data_format, observation_space=space)
    refused("toy/set-v0", tmp_path, *words)


UNSUPPORTED_ACTIONS = {
    "MultiDiscrete": MultiDiscrete([3, 2]),
    "MultiBinary": MultiBinary(3),
    "Dict": Dict(left=ACTION, right=ACTION),
    "Tuple": Tuple((ACTION, Discrete(2))),
    "start=1": Discrete(3, start=1),
}


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("kind", UNSUPPORTED_ACTIONS)
def test_actions_that_are_neither_a_box_nor_discrete_from_0_are_refused_and_named(kind, data_format, tmp_path):
    space = UNSUPPORTED_ACTIONS[kind]
    record(tmp_path, "toy/set-v0", invented([3, 2], action_space=space), data_format, action_space=space)
    refused("toy/set-v0", tmp_path, "action space", kind)


def nan_episode(row=2, value=np.nan, key="observations"):
    episode = invented([5])[0]
    getattr(episode, key)[row] = value
    return episode


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize(
    ("key", "row", "value", "words"),
    [
        ("observations", 2, np.nan, "observations holds nan in row 7"),
        ("observations", 5, np.inf, "next_observations holds inf in row 9"),
        ("actions", 4, np.nan, "actions holds nan in row 9"),
        ("rewards", 0, -np.inf, "rewards holds -inf in row 5"),
    ],
)
def test_an_entry_that_is_not_finite_is_named_with_its_row(key, row, value, words, data_format, tmp_path):
    record(tmp_path, "toy/set-v0", [invented([5])[0], nan_episode(row, value, key)], data_format)
    refused("toy/set-v0", tmp_path, words)
    refused("toy/set-v0", tmp_path, words, storage="memmap", storage_folder=tmp_path / "maps")


@pytest.mark.parametrize("key", ["observations", "actions"])
def test_a_number_beyond_float32_is_refused_and_its_row_named(key, tmp_path):
    spaces = {"observation_space": WIDE, "action_space": Box(-1, 1, (2,), np.float64)}
    episodes = invented([4], *spaces.values())
    getattr(episodes[0], key)[1] = 1e300
    record(tmp_path, "toy/set-v0", episodes, **spaces)
    refused("toy/set-v0", tmp_path, f"{key} holds inf in row 1")


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("flag", ["terminations", "truncations"])
def test_an_episode_that_goes_on_after_its_end_is_named(flag, data_format, tmp_path):
    episodes = invented([4, 5])
    getattr(episodes[1], flag)[2] = True
    record(tmp_path, "toy/set-v0", episodes, data_format)
    refused("toy/set-v0", tmp_path, "episode 1 goes on", "step 2 of 5")


@pytest.mark.parametrize("data_format", FORMATS)
def test_a_dataset_without_episodes_is_refused(data_format, tmp_path):
    record(tmp_path, "toy/set-v0", [], data_format)
    refused("toy/set-v0", tmp_path)


@pytest.mark.parametrize(("start", "outside"), [(0, -1), (0, 3), (0, 7), (2, 1), (2, -1), (2, 5)])
def test_a_discrete_observation_outside_of_its_space_is_refused(start, outside, tmp_path):
    space = Discrete(3, start=start)
    episodes = invented([4], space)
    episodes[0].observations[2] = outside
    record(tmp_path, "toy/set-v0", episodes, observation_space=space)
    refused("toy/set-v0", tmp_path)


@pytest.mark.parametrize("outside", [-1, 3])
def test_a_discrete_action_outside_of_its_space_is_refused(outside, tmp_path):
    episodes = invented([4], action_space=Discrete(3))
    episodes[0].actions[2] = outside
    record(tmp_path, "toy/set-v0", episodes, action_space=Discrete(3))
    refused("toy/set-v0", tmp_path)


# ---- damage


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"not JSON", b"null", b"[]", b"5", b"{}", b"\xff\xfe\x00", b"[" * 200_000],
    ids=["gone", "empty", "cut", "text", "null", "a list", "a number", "no entries", "bytes", "very deep"],
)
def test_metadata_that_are_gone_or_no_metadata_are_named_with_the_folder(content, data_format, copied):
    name, root, data = copied("CartPole", data_format)
    if content is None:
        (data / "metadata.json").unlink()
    else:
        (data / "metadata.json").write_bytes(content)
    refused(name, root, str(root / name), "delete")
    with pytest.raises(DatasetError, match=name):
        environment_of(name, root=root, download=False)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize(
    "changes",
    [
        {"total_episodes": ...},
        {"total_episodes": "three"},
        {"total_episodes": 5},
        {"total_episodes": 10**13},
        {"total_steps": ...},
        {"dataset_id": ...},
        {"data_format": ...},
        {"data_format": "zarr"},
        {"observation_space": '{"type": "Sphere"}'},
        {"observation_space": "text"},
        {"action_space": '{"type": "Box"}'},
    ],
    ids=str,
)
def test_metadata_that_do_not_describe_the_data_are_refused(changes, data_format, copied):
    name, root, data = copied("CartPole", data_format)
    edit_metadata(data, **changes)
    refused(name, root, str(root / name))


def box(shape):
    low = np.full(shape, -1.0)
    return json.dumps({"type": "Box", "dtype": "float32", "shape": shape, "low": low.tolist(), "high": (-low).tolist()})


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("recorded_size", [1, 2, 3, 6])
@pytest.mark.parametrize("key", ["observation_space", "action_space"])
def test_data_of_another_shape_than_the_metadata_say_are_refused(key, recorded_size, data_format, tmp_path):
    space = Box(-1, 1, (recorded_size,), np.float32)
    record(tmp_path, "toy/set-v0", invented([3, 2], **{key: space}), data_format, **{key: space})
    edit_metadata(tmp_path / "toy/set-v0/data", **{key: box([4])})
    refused("toy/set-v0", tmp_path)


def in_hdf5(change):
    def damage(data):
        with h5py.File(data / "main_data.hdf5", "a") as file:
            change(file)

    return damage


def replaced(path, value):
    def change(file):
        found = file[path][()]
        del file[path]
        file[path] = value(found)

    return in_hdf5(change)


def resized(data, change):
    content = (data / "main_data.hdf5").read_bytes()
    (data / "main_data.hdf5").write_bytes(change(content))


DAMAGES = {
    "gone": lambda data: (data / "main_data.hdf5").unlink(),
    "empty": lambda data: resized(data, lambda content: b""),
    "a tenth of it": lambda data: resized(data, lambda content: content[: len(content) // 10]),
    "half of it": lambda data: resized(data, lambda content: content[: len(content) // 2]),
    "one byte less": lambda data: resized(data, lambda content: content[:-1]),
    "zeros": lambda data: resized(data, lambda content: bytes(len(content))),
    "another file": lambda data: resized(data, lambda content: b"<html>moved</html>" * 100),
    "all trees of chunks": lambda data: resized(data, lambda content: content.replace(b"TREE", b"EERT")),
    "a deleted episode": in_hdf5(lambda file: file.pop("episode_1")),
    "a deleted first episode": in_hdf5(lambda file: file.pop("episode_0")),
    "no rewards": in_hdf5(lambda file: file.pop("episode_1/rewards")),
    "no observations": in_hdf5(lambda file: file.pop("episode_1/observations")),
    "no length": in_hdf5(lambda file: file["episode_1"].attrs.pop("total_steps")),
    "a longer length": in_hdf5(lambda file: file["episode_1"].attrs.modify("total_steps", 200)),
    "a shorter length": in_hdf5(lambda file: file["episode_1"].attrs.modify("total_steps", 2)),
    "a negative length": in_hdf5(lambda file: file["episode_1"].attrs.modify("total_steps", -2)),
    "fewer observations": replaced("episode_1/observations", lambda found: found[:-1]),
    "twice the observations": replaced("episode_1/observations", lambda found: np.repeat(found, 2, axis=0)),
    "fewer actions": replaced("episode_1/actions", lambda found: found[:-1]),
    "one action": replaced("episode_1/actions", lambda found: found[:1]),
    "no actions": replaced("episode_1/actions", lambda found: found[:0]),
    "fewer flags": replaced("episode_1/terminations", lambda found: found[:-1]),
    "text for rewards": replaced("episode_1/rewards", lambda found: np.full(len(found), b"many")),
    "a number for rewards": replaced("episode_1/rewards", lambda found: 1.0),
    "a group for observations": in_hdf5(
        lambda file: (file.pop("episode_1/observations"), file.create_group("episode_1/observations"))
    ),
    "fractions for actions": replaced("episode_1/actions", lambda found: found + 0.5),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_hdf5_file_is_named_with_its_dataset(damage, copied):
    name, root, data = copied("CartPole")
    DAMAGES[damage](data)
    refused(name, root)


@pytest.mark.parametrize("damage", ["a longer length", "a shorter length", "fewer flags"])
def test_an_episode_of_another_length_than_its_metadata_say_is_named(damage, copied):
    name, root, data = copied("CartPole")
    DAMAGES[damage](data)
    refused(name, root, "episode 1 has", "steps by its metadata but")


def test_a_damaged_file_whose_metadata_have_a_malformed_id_is_still_named(copied):
    name, root, data = copied("CartPole")
    edit_metadata(data, dataset_id="no id")
    DAMAGES["half of it"](data)
    refused(name, root, str(root / name))


def test_bytes_of_a_chunk_that_turn_into_nan_are_named_with_their_row(copied):
    name, root, data = copied("CartPole")
    with h5py.File(data / "main_data.hdf5") as file:
        chunk = file["episode_0/observations"].id.get_chunk_info(0)
        first_row = file["episode_0/observations"][0].tobytes()
    content = bytearray((data / "main_data.hdf5").read_bytes())
    assert content[chunk.byte_offset :][: len(first_row)] == first_row
    content[chunk.byte_offset + 32 : chunk.byte_offset + 40] = b"\xff" * 8
    (data / "main_data.hdf5").write_bytes(content)
    refused(name, root, "observations holds nan in row 2")


@pytest.mark.parametrize("part", range(8))
def test_whatever_bytes_of_an_hdf5_file_are_flipped_no_other_error_comes_out(part, recorded, tmp_path):
    source, folder = recorded("a single episode")
    shutil.copytree(folder / source, tmp_path / source)
    file = tmp_path / source / "data/main_data.hdf5"
    content = file.read_bytes()
    interesting = [place for place in range(0, len(content), 16) if any(content[place : place + 16])]
    outcomes = set()
    for place in interesting[part::8]:
        changed = bytearray(content)
        changed[place : place + 16] = bytes(byte ^ 0xA5 for byte in content[place : place + 16])
        file.write_bytes(changed)
        try:
            outcomes.add(tuple(load(source, tmp_path).shape))
        except DatasetError as error:
            assert source in str(error)
            outcomes.add("refused")
    assert outcomes == {"refused", (7,)}


@pytest.mark.parametrize("key", ["total_steps", "total_episodes"])
@pytest.mark.parametrize("data_format", FORMATS)
def test_metadata_that_count_other_steps_or_episodes_than_are_there_are_refused(data_format, key, copied):
    name, root, data = copied("CartPole", data_format)
    count = json.loads((data / "metadata.json").read_text())[key]
    edit_metadata(data, **{key: count + 1 if key == "total_steps" else count - 1})
    refused(name, root)


ARROW_DAMAGES = {
    "a missing episode": lambda data: shutil.rmtree(data / "1"),
    "an episode without data": lambda data: [file.unlink() for file in (data / "1").glob("part-*")],
    "empty data": lambda data: [file.write_bytes(b"") for file in (data / "1").glob("part-*")],
    "half of the data": lambda data: [
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]) for file in (data / "1").glob("part-*")
    ],
    "zeros": lambda data: [file.write_bytes(bytes(file.stat().st_size)) for file in (data / "1").glob("part-*")],
    "no description": lambda data: (data / "1/metadata.json").unlink(),
    "an empty description": lambda data: (data / "1/metadata.json").write_text("{}"),
    "a cut description": lambda data: (data / "1/metadata.json").write_text("{"),
    "a longer length": lambda data: (data / "1/metadata.json").write_text('{"id": 1, "total_steps": 500}'),
    "a shorter length": lambda data: (data / "1/metadata.json").write_text('{"id": 1, "total_steps": 2}'),
    "a length in words": lambda data: (data / "1/metadata.json").write_text('{"id": 1, "total_steps": "many"}'),
    "the data twice": lambda data: [
        shutil.copy(file, file.with_name(file.name.replace("part-0", "part-1"))) for file in (data / "1").glob("part-*")
    ],
    "data of another dataset": lambda data: [
        shutil.copy(data.parents[2] / "other" / data.parts[-2] / "data/0" / file.name, file)
        for file in (data / "1").glob("part-*")
    ],
}


@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
@pytest.mark.parametrize("damage", ARROW_DAMAGES)
def test_a_damaged_arrow_or_parquet_folder_is_named_with_its_dataset(damage, data_format, copied, recorded):
    name, root, data = copied("CartPole", data_format)
    other, folder = recorded("Pendulum", data_format)
    shutil.copytree(folder / other, data.parents[2] / "other" / data.parts[-2])
    ARROW_DAMAGES[damage](data)
    refused(name, root)


@pytest.mark.parametrize("where", ["the dataset", "its data"])
def test_a_file_in_place_of_a_folder_is_named(where, tmp_path):
    place = tmp_path / "toy/set-v0" / ("" if where == "the dataset" else "data")
    place.parent.mkdir(parents=True)
    place.write_text("a file")
    refused("toy/set-v0", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("steps", [32_767, 32_768, 100_000, 131_071, 131_072, 131_073, 300_000])
def test_an_episode_longer_than_minaris_reader_takes_is_refused_and_never_misread(steps, data_format, tmp_path):
    random = np.random.default_rng(0)

    def episode(length):
        observations = random.normal(size=(length + 1, 3)).astype(np.float32)
        actions = random.uniform(-1, 1, size=(length, 2)).astype(np.float32)
        return buffer(observations, actions, random.normal(size=length), truncated=True)

    episodes = [episode(5), episode(steps), episode(3)]
    record(tmp_path, "toy/set-v0", episodes, data_format)
    try:
        transitions = load("toy/set-v0", tmp_path)
    except DatasetError as error:
        assert data_format != "hdf5" and steps > 32_767
        assert f"toy/set-v0: episode 1 has {steps} steps" in str(error)
        # message says 131,072 of an episode that is shorter.
        assert "131,072" not in str(error) or steps >= 131_072
    else:
        expected = {
            "observation": [part.observations[:-1] for part in episodes],
            "action": [part.actions for part in episodes],
            ("next", "observation"): [part.observations[1:] for part in episodes],
            ("next", "reward"): [np.asarray(part.rewards, np.float32)[:, None] for part in episodes],
        }
        for key, parts in expected.items():
            np.testing.assert_array_equal(transitions[key].numpy(), np.concatenate(parts))
