"""Five sets by training: what is in them, who reads them, and what becomes of them after a kill."""

import json
import shutil
import signal
import time

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import PendulumEnv
from processes import finish, start

from iql_torchrl import load_transitions
from iql_torchrl.collecting import behaviour, writing
from iql_torchrl.collecting.collection import SETS, Collection
from iql_torchrl.configuration.composing import compose, initialised
from iql_torchrl.data.sources.minari import environment_of
from iql_torchrl.environments.playing import derived_seed
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import CheckpointError, ConfigurationError, RunError
from iql_torchrl.running.options import CollectOptions

pytest.importorskip("stable_baselines3", reason="needs the extra collect")

ENVIRONMENT = "InvertedPendulum-v5"
TINY = (
    f"env.name={ENVIRONMENT}",
    "training.steps=650",
    "training.warm_up=100",
    "training.batch_size=32",
    "training.hidden_dims=[16,16]",
    "training.evaluation_interval=150",
    "training.evaluation_episodes=2",
    "training.checkpoint_interval=100",
    "rollouts.steps=120",
    "seed=3",
)


def collection(output, *overrides):
    with initialised():
        return Collection(compose("collect_dataset", [*TINY, f"output={output}", *overrides], CollectOptions))


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collected")
    assert collection(folder).run() == 0
    return folder


@pytest.fixture
def copy(collected, tmp_path):
    return shutil.copytree(collected, tmp_path / "copy")


def contents(folder):
    """The columns of every set."""
    found = {}
    for name in SETS:
        with h5py.File(folder / ENVIRONMENT / f"{name}-v0" / "d4rl.hdf5") as file:
            found[name] = {key: file[key][()] for key in file if key != "metadata"}
    return found


def assert_same(left, right):
    assert left.keys() == right.keys() == set(SETS)
    for name in SETS:
        for key, column in left[name].items():
            np.testing.assert_array_equal(column, right[name][key], err_msg=f"{name}, {key}")


def metadata_of(folder, name):
    return json.loads((folder / ENVIRONMENT / f"{name}-v0" / "data" / "metadata.json").read_text())


def test_minari_and_both_sources_read_the_same_steps_of_every_set(collected, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(collected))
    assert set(minari.list_local_datasets()) == {f"{ENVIRONMENT}/{name}-v0" for name in SETS}
    for name, columns in contents(collected).items():
        dataset = minari.load_dataset(f"{ENVIRONMENT}/{name}-v0")
        episodes = list(dataset.iterate_episodes())
        for key, ours in (("actions", "actions"), ("rewards", "rewards"), ("terminations", "terminals")):
            np.testing.assert_array_equal(np.concatenate([getattr(one, key) for one in episodes]), columns[ours])
        np.testing.assert_array_equal(np.concatenate([one.truncations for one in episodes]), columns["timeouts"])
        np.testing.assert_array_equal(
            np.concatenate([one.observations[1:] for one in episodes]), columns["next_observations"]
        )
        np.testing.assert_array_equal(
            np.concatenate([one.observations[:-1] for one in episodes]), columns["observations"]
        )
        assert all(one.terminations[-1] or one.truncations[-1] for one in episodes)
        bounds = {"action_low": -3.0, "action_high": 3.0}
        place = {"name": f"{ENVIRONMENT}/{name}-v0", "root": str(collected), "download": False}
        by_minari = load_transitions("minari", **place, **bounds)
        path = str(collected / ENVIRONMENT / f"{name}-v0" / "d4rl.hdf5")
        by_hdf5 = load_transitions("hdf5", path=path, keep_timeouts=True, **bounds)
        for key in by_minari.keys(True, True):
            np.testing.assert_array_equal(by_hdf5[key], by_minari[key], err_msg=f"{name}, {key}")
        np.testing.assert_array_equal(by_minari["observation"], columns["observations"].astype(np.float32))


def test_the_medium_replay_set_is_what_training_did_step_by_step(collected):
    columns, step = contents(collected)["medium-replay"], metadata_of(collected, "medium-replay")["medium_step"]
    assert len(columns["rewards"]) == step
    environment, episode, over = gymnasium.make(ENVIRONMENT), -1, True
    for row in range(step):
        if over:
            episode += 1
            observation, _ = environment.reset(seed=derived_seed(3, 0, episode))
        np.testing.assert_array_equal(columns["observations"][row], observation)
        observation, reward, terminated, truncated, _ = environment.step(columns["actions"][row])
        np.testing.assert_array_equal(columns["next_observations"][row], observation)
        assert columns["rewards"][row] == np.float32(reward)
        over = terminated or truncated
        assert columns["terminals"][row] == terminated
        assert columns["timeouts"][row] == (truncated and not terminated) or row == step - 1
    assert columns["terminals"][-1] or columns["timeouts"][-1]
    assert episode > 3


def test_the_metadata_tell_references_environment_and_how_the_set_was_made(collected):
    sets = contents(collected)
    for name in SETS:
        found = metadata_of(collected, name)
        for key, of in (("ref_min_score", "random"), ("ref_max_score", "expert")):
            ends = np.flatnonzero(sets[of]["terminals"] | sets[of]["timeouts"])
            assert found[key] == pytest.approx(sets[of]["rewards"].sum() / len(ends))
        assert found["seed"] == 3 and found["options"]["training"]["steps"] == 650
        assert "stable-baselines3" in found["versions"]
        recorded = environment_of(f"{ENVIRONMENT}/{name}-v0", root=str(collected), download=False)
        assert recorded.name == ENVIRONMENT and recorded.max_episode_steps == 1000
        assert recorded.references == (found["ref_min_score"], found["ref_max_score"])


def test_the_medium_policy_is_the_first_at_a_third_of_the_way_from_random_to_expert(collected):
    found = metadata_of(collected, "medium")
    target = found["ref_min_score"] + (found["ref_max_score"] - found["ref_min_score"]) / 3
    checkpoint = torch.load(collected / ENVIRONMENT / ".training" / "checkpoint.pt", weights_only=True)
    steps, means = zip(*checkpoint["evaluations"], strict=True)
    assert steps == (150, 300, 450, 600, 650)
    reached = [step for step, mean in checkpoint["evaluations"] if mean >= target]
    assert found["medium_step"] == (reached[0] if reached else steps[int(np.argmax(means))])


def test_medium_expert_is_the_medium_set_and_then_the_expert_one(collected):
    sets = contents(collected)
    for key in ("observations", "rewards"):
        both = np.concatenate([sets["medium"][key], sets["expert"][key]])
        np.testing.assert_array_equal(sets["medium-expert"][key], both)


def test_a_finished_collection_is_told_again_and_left_as_it_is(copy, capsys):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.hdf5")}
    shutil.rmtree(copy / ENVIRONMENT / ".training")
    assert collection(copy).run() == 0
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*.hdf5")} == before
    assert "medium-replay" in capsys.readouterr().out


def test_a_set_that_is_gone_is_made_again_as_it_was(copy, collected):
    shutil.rmtree(copy / ENVIRONMENT / "medium-v0")
    assert collection(copy).run() == 0
    assert_same(contents(copy), contents(collected))


@pytest.mark.slow
def test_a_collection_that_is_stopped_and_killed_ends_with_the_same_sets(collected, tmp_path):
    checkpoint = tmp_path / ENVIRONMENT / ".training" / "checkpoint.pt"
    for kind, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = start("collect_dataset.py", *TINY, f"output={tmp_path}", cwd=tmp_path)
        limit = time.monotonic() + 120
        while not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before) and time.monotonic() < limit:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.send_signal(kind)
        code, _, error = finish(process)
        assert code == status, error
    assert not list(tmp_path.glob(f"{ENVIRONMENT}/*-v0"))
    with open(checkpoint.with_name("history.steps"), "ab") as file:
        file.write(b"half a row")
    code, _, error = finish(start("collect_dataset.py", *TINY, f"output={tmp_path}", cwd=tmp_path))
    assert code == 0, error
    assert_same(contents(tmp_path), contents(collected))
    assert "Traceback" not in error and (tmp_path / ENVIRONMENT / "returns.png").exists()


class Restless(PendulumEnv):
    """A pendulum that no seed brings back."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=None, options=options)


def test_an_environment_that_does_not_repeat_its_episodes_loses_no_step(tmp_path, register, capsys):
    name = register("Restless-v0", Restless, max_episode_steps=200)
    with initialised():
        options = compose("collect_dataset", [*TINY, f"env.name={name}", f"output={tmp_path}"], CollectOptions)

    def started():
        return behaviour.Behaviour(EnvironmentSpec.of(name), options.training, tmp_path, seed=0, sample_actions=True)

    class Stop(Exception):
        pass

    first = started()

    def stop():
        if first.step >= 300:
            raise Stop

    with pytest.raises(Stop):
        first.train(stop)
    before = first.history(300)
    second = started()
    assert second.step == 300
    assert "does not repeat an episode" in capsys.readouterr().out
    second.train(lambda: None)
    after = started().history(650)
    np.testing.assert_array_equal(after.observations[:300], before.observations)
    assert np.flatnonzero(after.timeouts).tolist() == [199, 299, 499, 649]
    assert not after.terminals.any()


def test_a_set_that_cannot_be_written_is_not_there_and_the_same_command_goes_on(copy, collected, monkeypatch):
    for name in ("medium", "expert"):
        shutil.rmtree(copy / ENVIRONMENT / f"{name}-v0")

    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(RunError, match=r"No space left.*same command"):
        patched.setattr(writing, "write_d4rl", full)
        collection(copy).run()
    assert sorted(path.name for path in (copy / ENVIRONMENT).glob("*-v0")) == [
        f"{name}-v0" for name in ("medium-expert", "medium-replay", "random")
    ]
    assert collection(copy).run() == 0
    assert_same(contents(copy), contents(collected))


def test_sets_of_other_options_are_left_as_they_are_unless_told(copy):
    before = contents(copy)
    with pytest.raises(ConfigurationError, match=r"random-v0 is in .* already.*overwrite=true"):
        collection(copy, "seed=4").run()
    shutil.rmtree(copy / ENVIRONMENT / "random-v0")
    for name in SETS[1:]:
        (copy / ENVIRONMENT / f"{name}-v0").rename(copy / f"{name}-v0")
    with pytest.raises(ConfigurationError, match=r"with other options \(seed\).*overwrite=true"):
        collection(copy, "seed=4").run()
    for name in SETS[1:]:
        (copy / f"{name}-v0").rename(copy / ENVIRONMENT / f"{name}-v0")
    assert collection(copy, "seed=4", "overwrite=true").run() == 0
    assert metadata_of(copy, "expert")["seed"] == 4
    assert (
        len(contents(copy)["random"]["rewards"]) != len(before["random"]["rewards"])
        or (contents(copy)["random"]["observations"] != before["random"]["observations"]).any()
    )
    assert not list(copy.glob("**/.*before")) and not list(copy.glob("**/.*unfinished"))


def test_a_checkpoint_that_would_execute_code_is_refused(copy):
    shutil.rmtree(copy / ENVIRONMENT / "random-v0")
    (copy / ENVIRONMENT / ".training" / "checkpoint.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt cannot be read"):
        collection(copy).run()


def test_a_missing_stable_baselines_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(behaviour.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'iql_torchrl\[collect\]'"):
        collection(tmp_path).run()
    assert not list(tmp_path.glob("*"))
