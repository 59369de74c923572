"""Every family of D4RL's datasets: step limits, environments, references, and stand-ins for their files."""

from __future__ import annotations

import re

import h5py
import numpy as np
import pytest
from torchrl.data.datasets.d4rl_infos import D4RL_DATASETS

from iql_torchrl import load_transitions
from iql_torchrl.data.sources import d4rl
from iql_torchrl.data.sources.d4rl import of_d4rl
from iql_torchrl.environments.scores import normalised_score, reference_returns
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import DatasetError

# max_episode_steps in D4RL's registrations.
LIMITS = {
    "halfcheetah-medium-v2": 1000,
    "hopper-medium-v2": 1000,
    "hopper-random-v0": 1000,
    "walker2d-full-replay-v1": 1000,
    "ant-random-expert-v0": 1000,
    "antmaze-umaze-v0": 700,
    "antmaze-umaze-diverse-v2": 700,
    "antmaze-medium-play-v2": 1000,
    "antmaze-large-diverse-v1": 1000,
    "antmaze-eval-umaze-v0": 700,
    "antmaze-eval-umaze-diverse-v0": 700,
    "antmaze-eval-medium-play-v0": 1000,
    "antmaze-eval-large-play-v0": 1000,
    "maze2d-open-v0": 150,
    "maze2d-open-dense-v0": 150,
    "maze2d-umaze-v1": 300,
    "maze2d-umaze-dense-v1": 300,
    "maze2d-medium-v1": 600,
    "maze2d-medium-dense-v1": 600,
    "maze2d-large-v1": 800,
    "maze2d-large-dense-v1": 800,
    "maze2d-eval-umaze-v1": 300,
    "maze2d-eval-medium-dense-v1": 600,
    "maze2d-eval-large-v1": 800,
    "maze2d-umaze-v0": 150,
    "maze2d-umaze-dense-v0": 150,
    "maze2d-medium-v0": 250,
    "maze2d-medium-dense-v0": 250,
    "maze2d-large-v0": 600,
    "maze2d-large-dense-v0": 600,
    "pen-human-v1": 100,
    "pen-cloned-v0": 100,
    "hammer-expert-v1": 200,
    "door-human-v0": 200,
    "relocate-cloned-v1": 200,
    "pen-human-longhorizon-v0": 200,
    "door-human-longhorizon-v0": 300,
    "relocate-human-longhorizon-v0": 500,
    "hammer-human-longhorizon-v0": 600,
    "kitchen-complete-v0": 280,
    "kitchen-partial-v0": 280,
    "kitchen-mixed-v0": 280,
    "flow-ring-random-v0": 500,
    "flow-ring-controller-v0": 500,
    "flow-merge-random-v0": 750,
    "flow-merge-controller-v0": 750,
    "carla-lane-v0": 250,
    "carla-lane-render-v0": 250,
    "carla-town-v0": 1000,
    "carla-town-full-v0": 1000,
    "carla-town-render-v0": 1000,
    "bullet-halfcheetah-random-v0": 1000,
    "bullet-hopper-medium-v0": 1000,
    "bullet-ant-expert-v0": 1000,
    "bullet-walker2d-medium-replay-v0": 1000,
    "bullet-maze2d-open-v0": 150,
    "bullet-maze2d-umaze-v0": 300,
    "bullet-maze2d-medium-v0": 600,
    "bullet-maze2d-large-v0": 800,
    "minigrid-fourrooms-v0": 50,
    "minigrid-fourrooms-random-v0": 50,
}
# REF_MIN_SCORE and REF_MAX_SCORE in d4rl/infos.py.
REFERENCES = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "antmaze": (0.0, 1.0),
    "kitchen": (0.0, 4.0),
    "pen": (96.262799, 3076.8331017826877),
    "hammer": (-274.856578, 12794.134825156867),
    "door": (-56.512833, 2880.5693087298737),
    "relocate": (-6.425911, 4233.877797728884),
}
# Observation and action size of one dataset a family.
FAMILIES = {
    "halfcheetah-random-v0": (17, 6),
    "hopper-medium-replay-v2": (11, 3),
    "walker2d-medium-v2": (17, 6),
    "ant-medium-v2": (111, 8),
    "antmaze-umaze-v2": (29, 8),
    "antmaze-large-play-v2": (29, 8),
    "maze2d-open-v0": (4, 2),
    "maze2d-umaze-v1": (4, 2),
    "maze2d-large-v0": (4, 2),
    "pen-human-v1": (45, 24),
    "hammer-cloned-v1": (46, 26),
    "door-expert-v1": (39, 28),
    "relocate-human-v1": (39, 30),
    "pen-human-longhorizon-v0": (45, 24),
    "kitchen-mixed-v0": (60, 9),
    "flow-ring-random-v0": (3, 1),
    "flow-merge-controller-v0": (50, 5),
    "carla-lane-v0": (6912, 2),
    "bullet-hopper-medium-v0": (15, 3),
    "bullet-maze2d-umaze-v0": (4, 2),
}
# Their files have no timeouts.
WITHOUT_TIMEOUTS = ("kitchen", "flow", "carla")


def task(name):
    return name.split("-")[0]


def load(root, path, name, **options):
    return load_transitions("d4rl", name=name, root=root, url=path.as_uri(), **options)


# ---- tables


@pytest.mark.parametrize("name", sorted(D4RL_DATASETS))
def test_every_dataset_of_the_table_has_a_step_limit_and_an_environment_or_a_reason(name):
    limit = d4rl.step_limit(name)
    assert limit is None or (isinstance(limit, int) and limit > 0)
    spec, reason = of_d4rl(name)
    assert (spec is None) == bool(reason)
    if spec is not None:
        assert isinstance(spec, EnvironmentSpec) and spec.name
        # Gymnasium's own limit, 1000, is that of D4RL's locomotion.
        assert spec.kwargs.get("max_episode_steps", 1000) == limit
        assert spec.references is not None or spec.note
        assert spec.references in (None, reference_returns(name))


@pytest.mark.parametrize("name", LIMITS)
def test_the_step_limit_is_that_of_d4rls_environment(name):
    assert name in D4RL_DATASETS
    assert d4rl.step_limit(name) == LIMITS[name]


@pytest.mark.parametrize("name", sorted(D4RL_DATASETS))
def test_every_dataset_of_a_family_has_the_limit_of_the_listed_one_nearest_to_it(name):
    layout = re.compile(r"open|umaze|medium|large|longhorizon|ring|merge|lane|town|fourrooms")
    of_mazes = "maze" in name

    def kind(other):
        words = tuple(layout.findall(other)) if of_mazes or task(other) not in ("hopper", "bullet") else ()
        version = other[-2:] if other.startswith("maze2d") else ""
        bullet = re.match(r"bullet-(\w+)", other)
        return task(other), bullet and bullet[1], words if of_mazes or not bullet else (), version

    alike = {LIMITS[other] for other in LIMITS if kind(other) == kind(name)}
    if alike:
        assert alike == {d4rl.step_limit(name)}


@pytest.mark.parametrize("name", ["something-else-v0", "", "Hopper-v2", "hopperish-v0"])
def test_a_name_of_no_family_has_no_step_limit(name):
    assert d4rl.step_limit(name) is None


@pytest.mark.parametrize("name", sorted(name for name in D4RL_DATASETS if task(name) in REFERENCES))
def test_the_reference_returns_are_d4rls_for_every_dataset_of_a_task(name):
    low, high = REFERENCES[task(name)]
    assert reference_returns(name) == pytest.approx((low, high), abs=2e-4)
    assert normalised_score(name, low) == pytest.approx(0, abs=1e-5)
    assert normalised_score(name, high) == pytest.approx(100, abs=1e-5)
    assert normalised_score(name, (low + high) / 2) == pytest.approx(50, abs=1e-5)


@pytest.mark.parametrize("name", sorted(name for name in D4RL_DATASETS if task(name) not in REFERENCES))
def test_other_datasets_have_no_reference_returns(name):
    assert reference_returns(name) is None and normalised_score(name, 1.0) is None


@pytest.mark.parametrize("family", ["flow", "carla", "bullet", "minigrid"])
def test_families_without_a_simulator_are_refused_with_its_name(family):
    for name in (name for name in D4RL_DATASETS if task(name) == family):
        spec, reason = of_d4rl(name)
        assert spec is None and "not supported" in reason and family in reason.lower().replace("py", "")


# ---- a stand-in file a family


def rows_with_terminals(log_arrays, name, seed, *, timeouts):
    """Long enough that the limit is reached from the start, after a terminal, and after a limit."""
    limit = d4rl.step_limit(name)
    sizes = dict(zip(("observation_dim", "action_dim"), FAMILIES[name], strict=True))
    first = limit + limit // 3
    rows = first + 2 * limit + 20 if sizes["observation_dim"] < 1000 else first + limit + 5
    random = np.random.default_rng(seed)
    terminals = sorted({first, *random.integers(0, first, 3).tolist(), rows - 2})
    flags = None
    if timeouts:
        flags = sorted(set(random.integers(0, rows - 3, 6).tolist()) - set(terminals))
    return log_arrays(rows, seed=seed, terminals=terminals, timeouts=flags, **sizes)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_the_family_without_timeouts_is_cut_at_the_limit_as_by_d4rls_counter(
    name, seed, log_arrays, write_log, tmp_path, qlearning_dataset, assert_transitions_equal
):
    arrays = rows_with_terminals(log_arrays, name, seed, timeouts=False)
    transitions = load(tmp_path / "cache", write_log(arrays), name)
    expected = qlearning_dataset(arrays, LIMITS.get(name, d4rl.step_limit(name)), count_after_terminal=1)
    assert len(expected["action"]) < len(arrays["actions"]) - 1, "the limit was not reached"
    assert_transitions_equal(transitions, expected)
    assert (transitions["observation"].shape[1], transitions["action"].shape[1]) == FAMILIES[name]


@pytest.mark.parametrize("name", [name for name in FAMILIES if task(name) not in WITHOUT_TIMEOUTS])
def test_a_file_of_the_family_with_timeouts_is_cut_there_alone(
    name, log_arrays, write_log, tmp_path, qlearning_dataset, assert_transitions_equal
):
    arrays = rows_with_terminals(log_arrays, name, 2, timeouts=True)
    transitions = load(tmp_path / "cache", write_log(arrays), name)
    assert_transitions_equal(transitions, qlearning_dataset(arrays))


@pytest.mark.parametrize("name", ["kitchen-complete-v0", "flow-ring-random-v0", "minigrid-fourrooms-v0"])
def test_a_terminal_at_the_limit_counts_as_cut_and_the_counter_starts_anew(
    name, log_arrays, write_log, tmp_path, qlearning_dataset, assert_transitions_equal
):
    limit = LIMITS[name]
    arrays = log_arrays(3 * limit + 7, terminals=[limit - 1, 2 * limit - 2], timeouts=None)
    transitions = load(tmp_path / "cache", write_log(arrays), name)
    assert_transitions_equal(transitions, qlearning_dataset(arrays, limit, count_after_terminal=1))


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_a_step_limit_that_is_given_goes_before_the_familys_and_counts_from_zero(
    steps, log_arrays, write_log, tmp_path, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(150, terminals=[*range(20, 150, 33)], timeouts=None)
    if steps == 1:
        with pytest.raises(DatasetError, match="no complete transition"):
            load(tmp_path / "cache", write_log(arrays), "kitchen-complete-v0", max_episode_steps=1)
    else:
        transitions = load(tmp_path / "cache", write_log(arrays), "kitchen-complete-v0", max_episode_steps=steps)
        assert_transitions_equal(transitions, qlearning_dataset(arrays, steps))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("name", ["minigrid-fourrooms-v0", "minigrid-fourrooms-random-v0"])
def test_minigrids_observations_are_refused_as_images(name, dtype, log_arrays, write_log, tmp_path):
    arrays = log_arrays(timeouts=None)
    arrays["observations"] = np.zeros((40, 7, 7, 3), dtype)
    with pytest.raises(DatasetError, match=r"observations .*images") as error:
        load(tmp_path / "cache", write_log(arrays), name)
    assert name in str(error.value) and "(40, 7, 7, 3)" in str(error.value)
    assert not (tmp_path / "cache" / name).exists()


def test_discrete_actions_of_minigrid_are_refused_or_those_of_the_file(log_arrays, write_log, tmp_path):
    arrays = {**log_arrays(timeouts=None), "actions": np.arange(40) % 7}
    try:
        transitions = load(tmp_path / "cache", write_log(arrays), "minigrid-fourrooms-v0")
    except DatasetError as error:
        assert "actions" in str(error)
    else:
        assert transitions["action"].flatten().tolist() == arrays["actions"][:-1].tolist()


# ---- what else is in the files

ROWS = 60
EXTRAS = {
    "strings": {"metadata/algorithm": "SAC", "metadata/iteration": "1000000"},
    "bytes": {"metadata/algorithm": np.bytes_(b"SAC")},
    "strings and arrays": {"metadata/algorithm": "SAC", "metadata/scores": np.arange(5.0)},
    "an array of strings": {"metadata/names": np.array([b"a", b"bc"])},
    "nested weights": {
        "metadata/policy/nonlinearity": "relu",
        "metadata/policy/fc0/weight": np.ones((32, 3), np.float32),
        "metadata/policy/fc0/bias": np.ones(32, np.float32),
        "metadata/policy/last_fc/weight": np.ones((2, 32), np.float32),
    },
    "scalars": {"metadata/iteration": 7, "metadata/gamma": 0.99, "metadata/dense": True},
    "scalars at the top": {"iteration": 7, "name": "hopper", "gamma": 0.99},
    "an empty array": {"metadata/nothing": np.zeros(0)},
    "no value": {"metadata/nothing": h5py.Empty("f")},
    "infos": {
        "infos/qpos": np.zeros((ROWS, 6)),
        "infos/qvel": np.zeros((ROWS, 6), np.float32),
        "infos/goal": np.zeros((ROWS, 2)),
        "infos/action_log_probs": np.zeros(ROWS, np.float32),
    },
    "infos named like the flags": {"infos/terminals": np.ones(ROWS, bool), "infos/timeouts": np.ones(ROWS, bool)},
    "infos of another length": {"infos/qpos": np.zeros((ROWS - 7, 6))},
    "infos of strings": {"infos/env": "hopper"},
    "more columns": {"goals": np.zeros((ROWS, 2)), "values": np.zeros(ROWS)},
    "columns of another length": {"starts": np.zeros((3, 11))},
    "NaN in what is not read": {"infos/qpos": np.full((ROWS, 6), np.nan), "values": np.full(ROWS, np.nan)},
}


@pytest.mark.parametrize("timeouts", [[13, 30], None], ids=["timeouts", "no timeouts"])
@pytest.mark.parametrize("kind", EXTRAS)
def test_what_else_is_in_a_file_changes_nothing(
    kind, timeouts, log_arrays, write_log, tmp_path, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(ROWS, terminals=[6, 24, 50], timeouts=timeouts)
    path = write_log({**arrays, **EXTRAS[kind]}, env_id="Hopper-v2", scores=np.arange(3))
    expected = qlearning_dataset(arrays, 1000, count_after_terminal=1)
    assert_transitions_equal(load(tmp_path / "cache", path, "hopper-medium-v2"), expected)
    assert_transitions_equal(load(tmp_path / "cache", path, "hopper-medium-v2", download=False), expected)


def test_empty_groups_in_a_file_change_nothing(
    log_arrays, write_log, tmp_path, qlearning_dataset, assert_transitions_equal
):
    arrays = log_arrays(terminals=[6, 24], timeouts=[13, 30])
    path = write_log(arrays)
    with h5py.File(path, "a") as file:
        file.create_group("metadata")
        file.create_group("infos/empty")
        file["infos/empty"].attrs["note"] = "nothing"
    assert_transitions_equal(load(tmp_path / "cache", path, "hopper-medium-v2"), qlearning_dataset(arrays))
