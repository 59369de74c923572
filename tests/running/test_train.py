"""Training in plain Python through its public surface: real environments, real buffers, the recipe beside it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from pathlib import Path
from types import MappingProxyType

import gymnasium
import h5py
import hydra
import minari
import numpy as np
import pytest
import torch
import yaml
from comparing import rows_without_times
from hydra.core.global_hydra import GlobalHydra
from processes import SMALL, finish, start, wait_for_rows
from recordings import record
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    MultiStep,
    PrioritizedSampler,
    ReplayBuffer,
    SamplerWithoutReplacement,
    SliceSampler,
    TensorDictReplayBuffer,
)
from torchrl.envs import GymEnv, RewardScaling, SerialEnv

from iql_torchrl import load_policy, load_transitions, train
from iql_torchrl.data.sources import HDF5, Arrays, Embedded, MinariObject, ReplayBufferContent
from iql_torchrl.errors import CheckpointError, ConfigurationError, DatasetError, SimulatorError, UserError
from iql_torchrl.evaluation.rollouts import Evaluator
from iql_torchrl.training import construction

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(is set to None|env_spec is not serializable|split_trajs=True produces).*"),
    pytest.mark.filterwarnings("ignore:.*have actions outside.*"),  # of Pendulum, which no run takes as they are
]
# Stated once for the recipe and for the function: the same names and values.
OPTIONS = {name: yaml.safe_load(value) for name, value in (one.split("=", 1) for one in SMALL)}
STEPS, SEED = 40, 3
CHECKPOINT = f"checkpoints/step-{STEPS:08d}.pt"


@pytest.fixture(autouse=True)
def one_thread():
    """As the recipe's processes have it: sums are then of one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(data, *, environment=None, steps=STEPS, quiet=True, options=None, **more):
    more = {"seed": SEED, **more}
    return train(
        data, environment=environment, steps=steps, quiet=quiet, options={**OPTIONS, **(options or {})}, **more
    )


def played(name, episodes, seed=0):
    """Random episodes of an environment as a log with all columns."""
    environment = gymnasium.make(name)
    environment.action_space.seed(seed)
    rows = {key: [] for key in ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")}
    for episode in range(episodes):
        observation, _ = environment.reset(seed=seed + episode)
        over = False
        while not over:
            action = environment.action_space.sample()
            following, reward, terminated, truncated, _ = environment.step(action)
            row = (observation, action, reward, following, terminated, truncated)
            for values, value in zip(rows.values(), row, strict=True):
                values.append(value)
            observation, over = following, terminated or truncated
    environment.close()
    return {key: np.array(values) for key, values in rows.items()}


@pytest.fixture(scope="module")
def pendulum():
    """Actions in [-2, 2], episodes that are all cut off."""
    return played("Pendulum-v1", 4)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder of Minari's with one dataset of each kind of action, and one with the name of a hand's."""
    root = tmp_path_factory.mktemp("minari")
    record("test/pendulum-v0", gymnasium.make("Pendulum-v1"), root, 5)
    record("test/cartpole-v0", gymnasium.make("CartPole-v1"), root, 8)
    record("test/pen-v0", gymnasium.make("Pendulum-v1"), root, 2)
    scaled = gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), np.float32(-1), np.float32(1))
    record("test/scaled-v0", scaled, root, 4)
    return root


@pytest.fixture
def minaris(recorded, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(recorded))
    return lambda name: minari.load_dataset(f"test/{name}-v0")


def collected(name, frames=900, **options):
    """What a collector gathers in two environments at once, one step of each in turn."""
    torch.manual_seed(0)
    environments = SerialEnv(2, lambda: GymEnv(name))
    environments.set_seed(0)
    collector = Collector(environments, None, frames_per_batch=300, total_frames=frames, **options)
    batches = [batch.clone() for batch in collector]
    collector.shutdown()
    return batches


@pytest.fixture(scope="module")
def interleaved():
    return torch.cat([batch.transpose(0, 1).reshape(-1) for batch in collected("Pendulum-v1")])


@pytest.fixture(scope="module")
def discrete():
    return torch.cat([batch.transpose(0, 1).reshape(-1) for batch in collected("CartPole-v1", frames=600)])


def buffer_of(transitions, storage=LazyTensorStorage, **options):
    buffer = TensorDictReplayBuffer(storage=storage(len(transitions)), batch_size=8, **options)
    buffer.extend(transitions)
    return buffer


def by_trajectory(transitions):
    """The columns of a log, one trajectory after the other; a trajectory that just stops was cut off."""
    ids = transitions["collector", "traj_ids"]
    columns = {key: [] for key in ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")}
    for number in ids.unique():
        of_one = transitions[ids == number]
        terminals, timeouts = of_one["next", "terminated"][:, 0], of_one["next", "truncated"][:, 0].clone()
        timeouts[-1] = not terminals[-1]
        action = of_one["action"] if of_one["action"].is_floating_point() else of_one["action"].argmax(-1)
        parts = (of_one["observation"], action, of_one["next", "reward"], of_one["next", "observation"])
        for values, value in zip(columns.values(), (*parts, terminals, timeouts), strict=True):
            values.append(value.numpy())
    return {key: np.concatenate(values) for key, values in columns.items()}


@pytest.fixture(scope="module")
def recipe_runs(tmp_path_factory, pendulum, recorded, interleaved, discrete):
    """Run folders of ``recipes/iql_offline.py``, by the kind of data that :func:`train` is given for the same."""
    folder = tmp_path_factory.mktemp("recipe")
    logs = {"arrays": pendulum, "replay buffer": by_trajectory(interleaved), "discrete": by_trajectory(discrete)}
    processes = {}
    for name, log in logs.items():
        np.savez(folder / f"{name}.npz", **log)
        environment = "CartPole-v1" if name == "discrete" else "Pendulum-v1"
        options = ["dataset=numpy", f"dataset.path='{folder / name}.npz'", f"env.name={environment}"]
        options += [] if name == "arrays" else ["dataset.keep_timeouts=true"]
        processes[name] = options
    processes["minari"] = ["dataset=minari", "dataset.name=test/pendulum-v0", f"dataset.root={recorded}"]
    common = (*SMALL, f"train.steps={STEPS}", f"train.seed={SEED}")
    started = [
        start("iql_offline.py", *common, *options, f"run_dir='{folder / name}'", cwd=folder)
        for name, options in processes.items()
    ]
    for process in started:
        code, out, error = finish(process)
        assert code == 0, f"{out}\n{error}"
    return {name: folder / name for name in processes}


def assert_equal(expected, found, where=""):
    """Bit for bit."""
    if isinstance(expected, dict):
        assert expected.keys() == found.keys(), where
        for key in expected:
            assert_equal(expected[key], found[key], f"{where}.{key}")
    elif isinstance(expected, torch.Tensor):
        assert expected.dtype == found.dtype and torch.equal(expected, found), where
    else:
        assert expected == found, where


def assert_same_run(expected, found):
    """Two run folders: parameters, optimizers, generators, data, metrics and evaluations."""
    checkpoints = [torch.load(folder / CHECKPOINT, weights_only=True) for folder in (expected, found)]
    for key in ("training", "policy", "architecture", "dataset_fingerprint", "environment"):
        assert_equal(checkpoints[0][key], checkpoints[1][key], key)
    for file in ("metrics.csv", "eval.csv"):
        assert len(rows_without_times(expected / file)) >= STEPS // 20
        assert rows_without_times(expected / file) == rows_without_times(found / file)


def assert_same_parameters(expected, found):
    for one, other in zip(expected.step.losses, found.step.losses, strict=True):
        assert_equal(dict(one.state_dict()), dict(other.state_dict()))


# The recipe and the function


@pytest.mark.slow
def test_arrays_train_what_the_recipe_trains_from_their_file(recipe_runs, pendulum, tmp_path):
    trained(pendulum, environment="Pendulum-v1", folder=tmp_path / "run")
    assert_same_run(recipe_runs["arrays"], tmp_path / "run")


@pytest.mark.slow
def test_a_minari_dataset_trains_what_the_recipe_trains_by_its_name(recipe_runs, minaris, tmp_path):
    trained(minaris("pendulum"), environment="auto", folder=tmp_path / "run")
    assert_same_run(recipe_runs["minari"], tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "environment"),
    [("replay buffer", "Pendulum-v1"), ("discrete", "CartPole-v1")],
    ids=["continuous", "discrete"],
)
def test_a_buffer_that_a_collector_filled_trains_what_the_recipe_trains_from_its_trajectories(
    kind, environment, recipe_runs, interleaved, discrete, tmp_path
):
    buffer = buffer_of(discrete if kind == "discrete" else interleaved)
    trained(buffer, environment=environment, folder=tmp_path / "run")
    assert_same_run(recipe_runs[kind], tmp_path / "run")


def test_the_transitions_of_this_package_train_as_the_source_that_they_are_from():
    options = {"eval.episodes": 1, "train.log_interval": 20}
    source = trained(Embedded(), environment="auto", options=options)
    assert source.data.environment.name == "Hopper-v5"
    transitions = trained(load_transitions("embedded"), environment="Hopper-v5", options=options)
    assert source.data.fingerprint == transitions.data.fingerprint
    assert source.data.data_score == pytest.approx(transitions.data.data_score)
    assert_same_parameters(source, transitions)


# What is accepted


@pytest.fixture(scope="module")
def from_arrays(pendulum):
    return trained(pendulum)


def tensors(log, _):
    return {key: torch.from_numpy(values) for key, values in log.items()}


def lists(log, _):
    return {key: values.tolist() for key, values in log.items()}


def archive(log, folder):
    np.savez(folder / "log.npz", **log)
    return np.load(folder / "log.npz")


def mapped(log, folder):
    for key, values in log.items():
        np.save(folder / f"{key}.npy", values)
    return {key: np.load(folder / f"{key}.npy", mmap_mode="r") for key in log}


def hdf5(log, folder):
    with h5py.File(folder / "log.hdf5", "w") as file:
        for key, values in log.items():
            file[key] = values
    return h5py.File(folder / "log.hdf5")


def hdf5_source(log, folder):
    hdf5(log, folder).close()
    return HDF5(path=folder / "log.hdf5")


def with_other_columns(log, _):
    return OrderedDict(log, infos=[{"anything": object()}], trajectory="morning")


@pytest.mark.parametrize(
    "given",
    [tensors, lists, archive, mapped, hdf5, with_other_columns, lambda log, _: MappingProxyType(log)],
    ids=["tensors", "lists", "npz archive", "mapped files", "HDF5 file", "other columns", "any mapping"],
)
def test_columns_may_be_held_in_any_way(given, pendulum, tmp_path):
    data = given(pendulum, tmp_path)
    found = load_transitions(Arrays(arrays=data))
    assert (found == load_transitions(Arrays(arrays=pendulum))).all()
    if isinstance(data, h5py.File):
        assert data.keys() == pendulum.keys()  # and is still open
        data.close()


@pytest.mark.parametrize("given", [tensors, archive, hdf5_source], ids=["tensors", "npz archive", "HDF5 source"])
def test_a_run_on_columns_held_in_another_way_is_the_same(given, from_arrays, pendulum, tmp_path):
    run = trained(given(pendulum, tmp_path))
    assert run.data.fingerprint == from_arrays.data.fingerprint
    assert_same_parameters(from_arrays, run)


@pytest.fixture(scope="module")
def from_transitions(interleaved):
    return trained(interleaved)


def prioritised(transitions):
    try:
        sampler = PrioritizedSampler(len(transitions), alpha=0.7, beta=0.5)
    except RuntimeError as error:  # TorchRL's extension is not built for this torch
        pytest.skip(str(error))
    return buffer_of(transitions, sampler=sampler)


def plain(transitions):
    buffer = ReplayBuffer(storage=ListStorage(len(transitions)))
    buffer.extend(transitions)
    return buffer


def one_by_one(transitions):
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(transitions)), batch_size=8)
    for transition in transitions.unbind(0):
        buffer.add(transition)
    return buffer


@pytest.mark.parametrize(
    "given",
    [
        buffer_of,
        lambda transitions: buffer_of(transitions, LazyMemmapStorage),
        lambda transitions: buffer_of(transitions, ListStorage),
        plain,
        one_by_one,
        lambda transitions: buffer_of(transitions, prefetch=2),
        lambda transitions: buffer_of(transitions, sampler=SamplerWithoutReplacement()),
        lambda transitions: buffer_of(transitions, sampler=SliceSampler(slice_len=4)),
        prioritised,
        lambda transitions: TensorDict.lazy_stack(list(transitions.unbind(0))),
        lambda transitions: transitions.double(),
        lambda transitions: transitions.exclude(("next", "truncated")),
        lambda transitions: transitions.exclude("done", "terminated", "truncated"),
    ],
    ids=[
        "tensors",
        "memory-mapped",
        "list",
        "plain buffer",
        "added one by one",
        "prefetching",
        "without replacement",
        "slices",
        "prioritised",
        "lazy stack",
        "float64",
        "done and terminated alone",
        "no root flags",
    ],
)
def test_transitions_may_be_stored_and_sampled_in_any_way(given, interleaved):
    found = load_transitions(ReplayBufferContent(buffer=given(interleaved)))
    assert (found == load_transitions(ReplayBufferContent(buffer=interleaved))).all()


def test_a_run_on_a_buffer_is_the_run_on_its_transitions(from_transitions, interleaved):
    assert_same_parameters(from_transitions, trained(buffer_of(interleaved, LazyMemmapStorage)))


def test_interleaved_environments_are_brought_together_by_the_numbers_of_their_trajectories(interleaved):
    run = trained(buffer_of(interleaved), options={"dataset.validation_fraction": 0.0})
    ids = interleaved["collector", "traj_ids"]
    assert (ids[1:] != ids[:-1]).all()  # as they were stored
    expected = by_trajectory(interleaved)
    np.testing.assert_array_equal(run.data.training["observation"].numpy(), expected["observations"])
    np.testing.assert_array_equal(run.data.training["next", "observation"].numpy(), expected["next_observations"])
    returns = [interleaved["next", "reward"][ids == number].sum().item() for number in ids.unique()]
    np.testing.assert_allclose(run.data.returns, returns, rtol=1e-5)
    # An episode that the collector was still in is cut off, and one that ended is not cut twice.
    assert run.data.training["next", "done"].sum() == len(returns)


def test_batches_of_several_dimensions_are_as_many_transitions():
    batch = collected("Pendulum-v1", frames=300)[0]
    assert batch.shape == (2, 150)
    rows = load_transitions(ReplayBufferContent(buffer=batch.reshape(-1)))
    for data in (batch, buffer_of(batch), buffer_of(batch, lambda size: LazyTensorStorage(300, ndim=2))):
        assert (load_transitions(ReplayBufferContent(buffer=data)) == rows).all()


@pytest.mark.parametrize("encoding", ["one-hot", "integers", "a column of integers"])
def test_discrete_actions_may_be_one_hot_or_integers(encoding, discrete):
    data = discrete.clone()
    if encoding != "one-hot":
        data["action"] = discrete["action"].argmax(-1, keepdim=encoding == "a column of integers")
    run = trained(data, environment="CartPole-v1")
    ids = discrete["collector", "traj_ids"]
    expected = torch.cat([discrete["action"][ids == number].argmax(-1) for number in ids.unique()])
    assert torch.equal(run.data.training["action"], expected)
    assert run.policy(discrete["observation"][:7]).dtype == torch.int64


def test_padding_of_split_trajectories_is_left_out():
    batches = collected("Pendulum-v1", split_trajs=True)
    padded = torch.cat([batch.reshape(-1) for batch in batches])
    kept = padded[padded["collector", "mask"]]
    assert len(kept) < len(padded)
    found = load_transitions(ReplayBufferContent(buffer=buffer_of(padded)))
    assert (found == load_transitions(ReplayBufferContent(buffer=kept))).all()


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage, ListStorage])
def test_the_transforms_of_a_buffer_are_applied_and_its_storage_stays_as_it_is(storage, interleaved):
    untouched = load_transitions(ReplayBufferContent(buffer=interleaved))
    for size in (len(interleaved), 2 * len(interleaved)):  # a storage that is full gives itself away for all its rows
        buffer = buffer_of(interleaved, lambda _, size=size: storage(size))
        buffer.append_transform(RewardScaling(loc=0.0, scale=0.5, in_keys=[("next", "reward")]))
        found = load_transitions(ReplayBufferContent(buffer=buffer))
        torch.testing.assert_close(found["next", "reward"], untouched["next", "reward"] / 2)
        stored = buffer.storage[:]
        stored = torch.stack(stored) if isinstance(stored, list) else stored
        assert torch.equal(stored["next", "reward"], interleaved["next", "reward"])


def test_a_filtered_minari_dataset_trains_on_the_episodes_that_are_left(minaris):
    dataset = minaris("pendulum")
    options = {"dataset.validation_fraction": 0.0}
    even = dataset.filter_episodes(lambda episode: episode.id % 2 == 0)
    run = trained(even, options=options)
    expected = [episode for episode in dataset.iterate_episodes() if episode.id in (0, 2, 4)]
    observations = np.concatenate([episode.observations[:-1] for episode in expected])
    np.testing.assert_array_equal(run.data.training["observation"].numpy(), observations)
    returns = [episode.rewards.sum() for episode in expected]
    np.testing.assert_allclose(run.data.returns, returns, rtol=1e-5)

    first, rest = minari.split_dataset(dataset, sizes=[2, 3], seed=0)
    whole, *parts = (load_transitions(MinariObject(dataset=one)) for one in (dataset, first, rest))
    assert [len(part) for part in parts] == [400, 600] and len(whole) == 1000
    rewards = torch.cat([part["next", "reward"] for part in parts])
    assert torch.equal(rewards.flatten().sort().values, whole["next", "reward"].flatten().sort().values)


def test_a_minari_dataset_brings_its_environment_and_the_kind_of_its_actions(minaris):
    run = trained(minaris("cartpole"), environment="auto")
    assert run.data.environment.name == "CartPole-v1" and run.data.spaces.num_actions == 2
    assert run.summary["environment"] == "CartPole-v1" and run.summary["final_score"] >= 8
    with pytest.raises(SimulatorError, match="Pendulum-v1"):
        trained(minaris("cartpole"), environment="Pendulum-v1")


def test_what_is_given_is_not_modified(pendulum, interleaved, minaris):
    log = {key: values.copy() for key, values in pendulum.items()}
    for values in log.values():
        values.flags.writeable = False
    options = {"environment": "Pendulum-v1", "preset": "locomotion", "normalise_observations": True, "steps": 20}
    trained(log, **options)
    for key, values in pendulum.items():
        np.testing.assert_array_equal(log[key], values)

    storage = interleaved.clone()
    buffer = buffer_of(storage)
    buffer.set_rng(torch.Generator().manual_seed(0))
    for data in (storage, buffer):
        trained(data, **options)
        content = buffer[:].exclude("index") if data is buffer else storage
        assert set(content.keys(True, True)) == set(interleaved.keys(True, True))
        assert (content == interleaved).all()
    fresh = torch.Generator().manual_seed(0)
    assert torch.equal(buffer.sample()["index"], torch.randint(len(interleaved), (8,), generator=fresh))

    dataset = minaris("pendulum")
    before = [episode.observations.copy() for episode in dataset.iterate_episodes()]
    trained(dataset, **options)
    after = [episode.observations for episode in dataset.iterate_episodes()]
    np.testing.assert_array_equal(np.stack(before), np.stack(after))


# What a run tells and writes


def test_a_run_tells_its_policy_its_records_and_its_summary(pendulum):
    run = trained(pendulum, environment="Pendulum-v1")
    assert [row["step"] for row in run.records.metrics()] == [10, 20, 30, 40]
    evaluations = run.records.evaluations()
    assert [(row["step"], row["seed"], row["episodes"]) for row in evaluations] == [(20, SEED, 2), (40, SEED, 2)]
    assert run.summary["final_score"] == evaluations[-1]["episode_return_mean"]
    assert run.summary["steps"] == run.step.count == STEPS and run.summary["environment"] == "Pendulum-v1"
    assert run.summary["transitions"] == len(run.data.training) == len(pendulum["rewards"]) - 4
    action = run.policy(pendulum["observations"][0])
    assert action.shape == (1,) and action.dtype == np.float32 and abs(action[0]) <= 2
    evaluator = Evaluator("Pendulum-v1", episodes=2, seed=1000 * (SEED + 1))
    assert evaluator.evaluate(run.policy).returns.mean() == evaluations[-1]["episode_return_mean"]
    evaluator.close()


def test_without_an_environment_a_tenth_of_the_episodes_is_held_out(pendulum, from_arrays):
    assert from_arrays.data.environment is None and from_arrays.records.evaluations() == []
    assert len(from_arrays.data.validation) == 199 and len(from_arrays.data.training) == 3 * 199
    held_out = [row for row in from_arrays.records.metrics() if "validation_log_prob" in row]
    assert [row["step"] for row in held_out] == [20, 40]
    assert from_arrays.summary["validation_log_prob"] == held_out[-1]["validation_log_prob"]
    assert from_arrays.summary["final_score"] is None
    # Arrays name no environment, so that "auto" is to train without.
    assert_same_parameters(from_arrays, trained(pendulum, environment="auto"))


def test_a_folder_gets_the_files_of_a_run_and_its_policy_loads(pendulum, tmp_path):
    folder = tmp_path / 'läufe "1" ${home} = [a]\\'
    run = trained(pendulum, environment="Pendulum-v1", folder=folder)
    files = {"config.yaml", "metrics.csv", "eval.csv", "checkpoints", "curves.png", "summary.json"}
    assert {path.name for path in folder.iterdir()} == files
    assert json.loads((folder / "summary.json").read_text()) == run.summary
    assert run.records.evaluations()[-1]["step"] == STEPS  # of eval.csv
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["train"]["steps"] == STEPS and config["dataset"]["source"] == "arrays"
    assert config["run_dir"].replace("\\$", "$") == str(folder)
    observations = torch.from_numpy(pendulum["observations"][:9])
    torch.testing.assert_close(load_policy(folder / CHECKPOINT)(observations), run.policy(observations))
    before = (folder / "metrics.csv").read_bytes()
    with pytest.raises(ConfigurationError, match="holds a run already"):
        trained(pendulum, environment="Pendulum-v1", folder=folder)
    assert (folder / "metrics.csv").read_bytes() == before


def test_without_a_folder_nothing_is_written(pendulum, interleaved, tmp_path, monkeypatch):
    for name in ("work", "temporary", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert tempfile.gettempdir() == str(tmp_path / "temporary")
    for data in (pendulum, interleaved):
        trained(data, environment="Pendulum-v1", quiet=False, options={"logger": "tensorboard"})
    assert [path for path in tmp_path.rglob("*") if path.name not in ("work", "temporary", "home")] == []


def test_quiet_prints_nothing_and_otherwise_the_run_says_what_it_does(pendulum, minaris, tmp_path, capfd):
    trained(pendulum, environment="Pendulum-v1", folder=tmp_path / "run")
    trained(pendulum, environment="Pendulum-v1", folder=tmp_path / "run", resume=True)
    trained(minaris("pendulum"), environment="auto", steps=10)
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")
    trained(pendulum, environment="Pendulum-v1", quiet=False)
    told = capfd.readouterr()
    assert "796 transitions, 4 episodes" in told.out and "final_score" in told.out and "40/40" in told.err


def test_several_seeds_are_each_what_it_is_alone(pendulum):
    run = trained(pendulum, environment="Pendulum-v1", options={"train.num_seeds": 2})
    assert run.seeds == range(SEED, SEED + 2) and list(run.summary["final_scores"]) == [SEED, SEED + 1]
    low, high = run.summary["mean_interval"]
    assert low <= run.summary["mean"] <= high
    observations = pendulum["observations"][:50]
    for seed, policy in zip(run.seeds, run.policies, strict=True):
        alone = trained(pendulum, environment="Pendulum-v1", seed=seed)
        np.testing.assert_allclose(policy(observations), alone.policy(observations), rtol=1e-4, atol=1e-5)


# Going on


DRAWING = {  # from the global generator
    "masks of dropout": {"dropout_rate": 0.1},
    "subsets of critics": {
        "num_qvalue_nets": 4,
        "num_sampled_qvalue_nets": 2,
        "value_loss": "gumbel",
        "layer_norm": ["critic", "value"],
    },
}


@pytest.mark.parametrize("drawing", DRAWING)
def test_a_resumed_run_is_bit_for_bit_the_one_that_was_not_stopped(drawing, pendulum, tmp_path, capsys):
    options = {"environment": "Pendulum-v1", **DRAWING[drawing]}
    trained(pendulum, folder=tmp_path / "straight", **options)
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    (tmp_path / "stopped" / CHECKPOINT).unlink()
    torch.manual_seed(99)
    run = trained(pendulum, folder=tmp_path / "stopped", resume=True, quiet=False, **options)
    assert "step-00000020.pt at step 20" in capsys.readouterr().out and run.step.count == STEPS
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    np.testing.assert_array_equal(load_policy(tmp_path / "stopped")(np.ones(3)), run.policy(np.ones(3)))


def test_resume_starts_where_there_is_nothing_and_ends_at_once_where_all_is_done(pendulum, tmp_path):
    first = trained(pendulum, folder=tmp_path / "run", resume=True)
    again = trained(pendulum, folder=tmp_path / "run", resume=True)
    assert_same_parameters(first, again)
    assert len(again.records.metrics()) == STEPS // 10
    with pytest.raises(CheckpointError, match="other data"):
        trained({**pendulum, "rewards": -pendulum["rewards"]}, folder=tmp_path / "run", resume=True)
    with pytest.raises(ConfigurationError, match="give folder=FOLDER"):
        trained(pendulum, resume=True)


def test_a_checkpoint_file_is_gone_on_from_with_and_without_a_folder(pendulum, tmp_path):
    straight = trained(pendulum, folder=tmp_path / "straight")
    half = tmp_path / "straight" / "checkpoints" / "step-00000020.pt"
    for folder in (None, tmp_path / "other"):
        run = trained(pendulum, folder=folder, options={"resume": half})
        assert_same_parameters(straight, run)
        assert [row["step"] for row in run.records.metrics()] == [30, 40]
    with pytest.raises(CheckpointError, match="is of one seed"):
        trained(pendulum, options={"resume": half, "train.num_seeds": 2})


# Options


def test_the_preset_is_the_named_one_or_that_of_the_datasets_name(pendulum, minaris):
    def chosen(data, **options):
        return trained(data, steps=20, **options).options.algorithm

    assert chosen(pendulum).reward_transform == "return_range"
    of_its_name = chosen(minaris("pen"))
    assert (of_its_name.temperature, of_its_name.dropout_rate) == (0.5, 0.1)
    assert chosen(minaris("pen"), preset="locomotion").temperature == 3
    antmaze = chosen(pendulum, preset="antmaze", expectile=0.6, variant="corl")
    assert (antmaze.expectile, antmaze.temperature, antmaze.reward_transform) == (0.6, 10, "minus_one")
    assert antmaze.update_order == "joint"
    assert chosen(pendulum, preset="behaviour_cloning").temperature == 0


def test_options_are_taken_by_their_names_and_win_over_the_arguments(pendulum):
    options = {
        "train.steps": 20,
        "train": {"log_interval": 5},
        "algorithm.expectile": 0.8,
        "env.kwargs": {"max_episode_steps": 30},
        "dataset.keep_timeouts": True,
        "dataset.validation_fraction": 0.25,
    }
    run = trained(pendulum, environment="Pendulum-v1", seed=5, expectile=0.6, temperature=1.5, options=options)
    assert run.step.count == 20 and len(run.records.metrics()) == 4 and list(run.seeds) == [5]
    assert (run.options.algorithm.expectile, run.options.algorithm.temperature) == (0.8, 1.5)
    assert run.data.environment.kwargs == {"max_episode_steps": 30}
    assert (len(run.data.training), len(run.data.validation)) == (600, 200)


def test_the_data_of_every_kind_take_the_options_of_their_preparation(pendulum, interleaved, minaris, tmp_path):
    options = {
        "dataset.validation_fraction": 0.5,
        "dataset.normalised_actions": True,
        "dataset.storage": "memmap",
        "dataset.storage_folder": tmp_path / "mapped",
    }
    source = Arrays(arrays={**pendulum, "actions": pendulum["actions"] / 2}, keep_timeouts=True)
    buffer = buffer_of(interleaved.clone().set("action", interleaved["action"] / 2))
    for data, size in ((source, 400), (buffer, 450), (minaris("scaled"), 400)):
        run = trained(data, environment="Pendulum-v1", steps=20, options=options)
        assert len(run.data.validation) == pytest.approx(size, abs=150) and len(run.data.training) > 0
        assert run.options.dataset.normalised_actions and run.options.dataset.storage == "memmap"
    assert not source.normalised_actions and source.keep_timeouts  # the object that was given is as it was


def test_values_may_be_numpys_tensors_and_tuples(pendulum, from_arrays):
    run = trained(
        pendulum,
        steps=np.int64(STEPS),
        seed=np.array(SEED),
        hidden_dims=(16, 16),
        batch_size=torch.tensor(32),
        expectile=np.float64(0.7),
        max_weight=float("inf"),
        log_std_bounds=np.array([-5.0, 2.0]),
        options={"algorithm.hidden_dims": np.array([16, 16])},
    )
    assert run.options.algorithm.max_weight == float("inf") and run.options.algorithm.hidden_dims == [16, 16]
    assert run.data.fingerprint == from_arrays.data.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1.0}, "unknown argument temprature; did you mean 'temperature'?"),
        ({"step": 10}, "unknown argument step; did you mean 'steps'?"),
        ({"num_seeds": 3}, "unknown argument num_seeds; did you mean 'train.num_seeds'?"),
        ({"options": {"train.num_seed": 3}}, "unknown option train.num_seed; did you mean 'train.num_seeds'?"),
        ({"options": {"seed": 3}}, "unknown option seed; did you mean 'train.seed'?"),
        ({"options": {"dataset.keep_timeout": 3}}, "unknown option dataset.keep_timeout; did you mean 'dataset.keep_t"),
        ({"options": {"dataset": "minari"}}, "the data are the first argument"),
        ({"preset": "locomotoin"}, "unknown algorithm=locomotoin; did you mean 'locomotion'?"),
        ({"variant": "crl"}, "unknown algorithm.variant=crl; did you mean 'corl'?"),
        ({"steps": 4.0}, "train.steps must be an integer >= 1, got 4.0."),
        ({"seed": None}, "train.seed must be an integer in [0, 2^32), got None."),
        ({"seed": -1}, "train.seed must be an integer in [0, 2^32), got -1."),
        ({"expectile": 1.5}, "algorithm.expectile must be a number in (0, 1], got 1.5."),
        ({"expectile": "0.7"}, "algorithm.expectile must be a number in (0, 1], got '0.7'."),
        ({"temperature": float("inf")}, "algorithm.temperature must be a finite number >= 0, got inf."),
        ({"folder": ""}, "run_dir must be a folder, got ''."),
        ({"gamma": 0.9, "discount": 0.8}, "name the same thing and differ"),
        ({"batch_size": 10**6}, "algorithm.batch_size must be between 1 and the number of transitions"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_option_that_does_not_exist_or_makes_no_sense_is_refused_and_nothing_written(
    options, message, pendulum, tmp_path
):
    options = {"folder": tmp_path / "run", **options}
    with pytest.raises(ConfigurationError) as caught:
        train(pendulum, environment=None, quiet=True, **{"steps": 10, **options})
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_object_that_is_no_option_is_refused_by_its_name(pendulum):
    environment = gymnasium.make("Pendulum-v1")
    with pytest.raises(ConfigurationError, match=r"env\.name must be a Gymnasium id, auto or null, got <TimeLimit"):
        trained(pendulum, environment=environment)
    environment.close()
    with pytest.raises(ConfigurationError, match=r"train must be a plain value, got <object"):
        trained(pendulum, options={"train": object()})


def test_all_mistakes_are_said_at_once(pendulum):
    with pytest.raises(ConfigurationError) as caught:
        trained(
            pendulum,
            environment=object(),
            steps=0,
            temprature=1.0,
            expectile=2.0,
            options={"train.num_seed": 3, "dataset.keep_timeout": True, "eval.episodes": -1},
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == "7 mistakes:" and all(line.startswith("  - ") for line in lines[1:])
    for name in ("env.name", "train.steps", "temprature", "expectile", "num_seed", "keep_timeout", "eval.episodes"):
        assert sum(name in line.split(";")[0] for line in lines[1:]) == 1, name


# What is refused


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("log.hdf5", r"cannot train on str; give arrays by name.*HDF5\(path=FILE\)"),
        (Path("log.npz"), r"cannot train on PosixPath.*HDF5\(path=FILE\)"),
        (None, "cannot train on NoneType"),
        ([1, 2], "cannot train on list"),
        (np.zeros(3), "cannot train on ndarray"),
        ({}, "missing observations, actions, rewards, terminals; found nothing"),
        ({1: [2]}, "missing observations.*found 1"),
    ],
    ids=["text", "path", "None", "list", "one array", "empty mapping", "numbered columns"],
)
def test_what_is_no_data_is_refused(data, message):
    with pytest.raises(DatasetError, match=message):
        trained(data)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("rewards", lambda log: log["rewards"][:-1], "rewards has 799 rows but terminals has 800"),
        ("observations", lambda log: np.zeros((800, 8, 8)), "observations must have shape .rows, size."),
        ("observations", lambda log: [[1, 2], [3]], "the given arrays: observations is no array"),
        ("actions", lambda log: log["actions"].astype(str), "actions must hold real numbers, got dtype <U"),
        ("actions", lambda log: torch.zeros(800, 1, requires_grad=True), "actions is no array .*requires grad"),
        ("terminals", lambda log: log["rewards"], "terminals must hold 0 and 1 only"),
        ("rewards", lambda log: np.where(np.arange(800) == 7, np.nan, 0), "rewards holds nan in row 7"),
    ],
    ids=["length", "images", "ragged", "text", "requires grad", "flags", "not a number"],
)
def test_columns_that_cannot_be_trained_on_are_refused_by_name(column, values, message, pendulum):
    with pytest.raises(DatasetError, match=message):
        trained({**pendulum, column: values(pendulum)})


@pytest.mark.parametrize("key", ["observation", "action", ("next", "observation"), ("next", "reward")])
def test_a_buffer_that_lacks_an_entry_is_refused_by_its_name(key, interleaved):
    with pytest.raises(DatasetError) as caught:
        trained(buffer_of(interleaved.exclude(key)))
    assert f"the given replay buffer: missing {key!r}; found" in str(caught.value)


def test_a_buffer_without_any_flag_of_an_end_is_refused(interleaved):
    flags = [("next", name) for name in ("done", "terminated", "truncated")]
    with pytest.raises(DatasetError, match=r"the given transitions: missing \('next', 'done'\)"):
        trained(interleaved.exclude(*flags))


def test_empty_data_are_refused(interleaved, pendulum, minaris):
    empty = TensorDictReplayBuffer(storage=LazyTensorStorage(10), batch_size=8)
    with pytest.raises(DatasetError, match="the given replay buffer: it has no rows"):
        trained(empty)
    with pytest.raises(DatasetError, match="the given transitions: it has no rows"):
        trained(interleaved[:0])
    with pytest.raises(DatasetError, match="it has no rows"):
        trained({key: values[:0] for key, values in pendulum.items()})
    with pytest.raises(DatasetError, match=r"test/pendulum-v0: it has no rows"):
        trained(minaris("pendulum").filter_episodes(lambda episode: False))


def test_a_buffer_that_cannot_be_read_is_refused(interleaved):
    buffer = buffer_of(interleaved)
    buffer.append_transform(RewardScaling(loc=0.0, scale=0.5, in_keys=["no such entry"]))
    with pytest.raises(DatasetError, match=r"the given replay buffer cannot be read .*no such entry"):
        trained(buffer)


def test_rewards_of_several_steps_are_refused(interleaved):
    several = MultiStep(gamma=0.99, n_steps=3)(interleaved.reshape(2, -1)).reshape(-1)
    with pytest.raises(DatasetError, match="rewards are of several steps"):
        trained(several)
    one = several.clone()
    one["steps_to_next_obs"].fill_(1)
    assert len(load_transitions(ReplayBufferContent(buffer=one))) == len(one)


def test_the_zeros_that_torchrls_own_datasets_hold_are_refused(interleaved):
    # MinariExperienceReplay returns zeros, D4RLExperienceReplay zeros where an episode was cut.
    zeros = interleaved.clone()
    for key in ("observation", "action", ("next", "observation"), ("next", "reward")):
        zeros[key].zero_()
    with pytest.raises(DatasetError, match=r"all observations are zero.*minari\.load_dataset"):
        trained(buffer_of(zeros))
    cut = interleaved.clone()
    timeouts = cut["next", "truncated"][:, 0]
    assert timeouts.any()
    cut["next", "observation"][timeouts] = 0
    with pytest.raises(DatasetError, match=f"at all {timeouts.sum()} timeouts the next observation is zero"):
        trained(buffer_of(cut))
    assert len(load_transitions(ReplayBufferContent(buffer=cut[~timeouts]))) == len(cut) - timeouts.sum()


def test_every_refusal_is_a_user_error(pendulum):
    for options in ({"environment": "Pendulm-v1"}, {"environment": "CartPole-v1"}, {"steps": 0}):
        with pytest.raises(UserError):
            trained(pendulum, **options)


# Inside other programs


@pytest.fixture
def their_configs(tmp_path):
    (tmp_path / "theirs.yaml").write_text("learning_rate: 0.5\n")
    return tmp_path


def test_a_program_that_uses_hydra_for_itself_finds_it_as_it_was(their_configs, pendulum):
    with hydra.initialize_config_dir(str(their_configs), version_base="1.2"):
        before = GlobalHydra.instance().hydra
        trained(pendulum)
        with pytest.raises(ConfigurationError):
            trained(pendulum, steps=0)
        assert GlobalHydra.instance().hydra is before and hydra.version.getbase().minor == 2
        assert hydra.compose("theirs", ["learning_rate=0.25"]).learning_rate == 0.25
    assert not GlobalHydra.instance().is_initialized()
    trained(pendulum)
    assert not GlobalHydra.instance().is_initialized()
    with hydra.initialize_config_dir(str(their_configs), version_base=None):
        assert hydra.compose("theirs").learning_rate == 0.5


def test_it_trains_in_other_threads_several_at_once(pendulum, from_arrays, monkeypatch):
    seed_everything = construction.seed_everything

    def seed_slowly(seed):  # so that another thread would draw its weights, or record its update, in between
        seed_everything(seed)
        time.sleep(1)

    monkeypatch.setattr(construction, "seed_everything", seed_slowly)
    before = signal.getsignal(signal.SIGINT)
    runs = {}
    # One of them of several seeds with dropout, each of which has the generator where it would be by itself.
    several = {"steps": 20 * STEPS, "options": {"train.num_seeds": 2}, "dropout_rate": 0.1}
    threads = [threading.Thread(target=lambda: runs.update(several=trained(pendulum, **several)))]
    threads += [threading.Thread(target=lambda i=i: runs.update({i: trained(pendulum)})) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 4
    assert_same_parameters(trained(pendulum, **several), runs.pop("several"))
    for run in runs.values():
        assert_same_parameters(from_arrays, run)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_programs_handlers_of_signals_are_put_back(pendulum):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    trained(pendulum)
    with contextlib.suppress(DatasetError):
        trained({})
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


PROGRAM = """
import numpy as np, torch
from iql_torchrl import train

torch.set_num_threads(1)
log = dict(np.load("log.npz"))
try:
    train(log, environment="Pendulum-v1", steps={steps}, seed={seed}, folder="stopped", options={options!r})
finally:
    print("cleaned up")
"""


@pytest.mark.slow
def test_control_c_saves_a_checkpoint_and_ends_the_program_with_keyboard_interrupt(pendulum, tmp_path):
    options = {**OPTIONS, "checkpoint.interval": 100_000, "eval.interval": 400}
    np.savez(tmp_path / "log.npz", **pendulum)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(steps=800, seed=SEED, options=options)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    wait_for_rows(stopped / "metrics.csv", 5)
    process.send_signal(signal.SIGINT)
    code, out, error = finish(process)
    (saved,) = (stopped / "checkpoints").glob("step-*.pt")
    assert saved.name < "step-00000800.pt"
    assert f"SIGINT: saved stopped/checkpoints/{saved.name}" in out and "cleaned up\n" in out
    # CPython forgets that it was interrupted where anything evaluates a string on the way out, and PyTorch does as it
    # prints its times of compilation with tabulate, where that is installed: the status is then that of any exception.
    assert code in (-signal.SIGINT, 1) and error.rstrip().endswith("KeyboardInterrupt"), error

    # And it goes on as if it had not been stopped.
    def finished(folder, **more):
        return trained(pendulum, environment="Pendulum-v1", steps=800, folder=folder, options=options, **more)

    assert_same_parameters(finished(straight), finished(stopped, resume=True))
    for file in ("metrics.csv", "eval.csv"):
        assert rows_without_times(stopped / file) == rows_without_times(straight / file)
