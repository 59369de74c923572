"""The OGBench source: rewards and masks of single tasks, files and downloads, and data that cannot be trained on."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import socket
import sys
import threading

import numpy as np
import pytest
from processes import SMALL, refused, rows, run

from iql_torchrl import load_transitions
from iql_torchrl.configuration.composing import compose, initialised
from iql_torchrl.configuration.options import AlgorithmOptions, EnvironmentOptions
from iql_torchrl.data.preparation import prepare_data
from iql_torchrl.data.sources.ogbench import OGBench
from iql_torchrl.errors import DatasetError, SimulatorError
from iql_torchrl.running.options import OfflineOptions

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("ogbench") is None, reason="needs ogbench: pip install 'iql_torchrl[ogbench]'"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered.*", "ignore:.*DISPLAY.*")
CUBE = "cube-single-play-singletask-v0"
# Numbers of an observation, an action, positions and buttons.
SIZES = {
    "cube-single-play": (28, 5, 21, 0),
    "scene-play": (40, 5, 25, 2),
    "puzzle-3x3-noisy": (55, 5, 23, 9),
    "pointmaze-medium-navigate": (2, 2, 2, 0),
    "antmaze-large-explore": (29, 8, 15, 0),
    "antsoccer-arena-stitch": (42, 8, 22, 0),
}
EPISODES = (40, 25, 60)


def arrays(data, *, seed=0, episodes=EPISODES):
    """Random arrays in the layout of the package's files: the last row of an episode is an observation alone."""
    observations, actions, positions, buttons = SIZES[data]
    random, count = np.random.default_rng(seed), sum(episodes)
    found = {
        "observations": random.normal(size=(count, observations)).astype(np.float32),
        "actions": random.uniform(-1, 1, size=(count, actions)).astype(np.float32),
        "terminals": np.isin(np.arange(count), np.cumsum(episodes) - 1),
        "qpos": random.normal(size=(count, positions)).astype(np.float32),
        "qvel": random.normal(size=(count, positions)).astype(np.float32),
    }
    if buttons:
        found["button_states"] = random.integers(0, 2, size=(count, buttons))
    return found


def write(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **found)
    return path


@pytest.fixture
def cube(tmp_path):
    """A file of cube-single's, in rows 3, 4 and 63 of which the cube is where the default task wants it."""

    def make(**changes):
        found = arrays("cube-single-play")
        found["qpos"][[3, 4, 63], 14:17] = goal()
        return write(tmp_path / "cube-single-play-v0.npz", {**found, **changes})

    return make


@functools.cache
def goal():
    import gymnasium
    import ogbench  # noqa: F401

    environment = gymnasium.make("cube-single-v0")
    wanted = environment.unwrapped.task_infos[1]["goal_xyzs"][0]
    environment.close()
    return wanted


# ---- what becomes of a file


@needs_package
@pytest.mark.parametrize("data", SIZES)
@pytest.mark.parametrize("task", ["", "-task3"])
def test_the_transitions_are_those_of_the_package(data, task, tmp_path):
    import ogbench

    found = arrays(data)
    for name in (f"{data}-v0", f"{data}-v0-val"):
        path = write(tmp_path / f"{name}.npz", found)
    path, name = tmp_path / f"{data}-v0.npz", f"{data}-singletask{task}-v0"
    environment, expected, _ = ogbench.make_env_and_datasets(name, dataset_path=str(path))
    environment.close()
    transitions = load_transitions("ogbench", name=name, path=path)
    places = {"observations": "observation", "actions": "action", "next_observations": ("next", "observation")}
    for key, place in places.items():
        np.testing.assert_array_equal(transitions[place].numpy(), expected[key])
    np.testing.assert_array_equal(transitions["next", "reward"][:, 0].numpy(), expected["rewards"])
    np.testing.assert_array_equal(1.0 - transitions["next", "terminated"][:, 0].float().numpy(), expected["masks"])
    np.testing.assert_array_equal(transitions["next", "truncated"][:, 0].numpy(), expected["terminals"] == 1)


@needs_package
def test_a_step_that_solves_the_task_pays_and_does_not_bootstrap_and_the_episode_goes_on(cube):
    transitions = load_transitions("ogbench", name=CUBE, path=cube())
    solved = [3, 4, 62]  # the last one is the end of an episode too
    assert transitions["next", "terminated"][:, 0].nonzero()[:, 0].tolist() == solved
    expected = np.full(122, -1.0)
    expected[solved] = 0
    np.testing.assert_array_equal(transitions["next", "reward"][:, 0].numpy(), expected)
    assert transitions["next", "truncated"][:, 0].nonzero()[:, 0].tolist() == [38, 62, 121]
    assert np.bincount(transitions["episode"].numpy()).tolist() == [39, 24, 59]


@needs_package
def test_a_task_by_its_number_is_the_default_one_or_another(cube):
    path = cube()
    default, second, third = (
        load_transitions("ogbench", name=f"cube-single-play-singletask{task}-v0", path=path)["next", "reward"]
        for task in ("", "-task2", "-task3")
    )
    assert default.equal(second) and not default.equal(third) and int((third == 0).sum()) == 0


@needs_package
def test_the_data_are_evaluated_in_their_task_and_have_no_score_of_their_own(cube):
    source = OGBench(name="cube-single-play-singletask-task4-v0", path=cube())
    spec, reason = source.environment()
    assert spec.name == source.recorded_in() == "cube-single-singletask-task4-v0" and reason == ""
    assert spec.scored_by == "success" and spec.score(0.25) == 25.0 and spec.reference_returns is None
    with initialised():
        options = compose("iql_offline", [], OfflineOptions, dataset=source)
    data = prepare_data(source, options.algorithm, options.env)
    assert data.score_label == "success in percent" and data.data_score is None and data.remarks == ()
    assert len(data.returns) == len(EPISODES) and data.note.startswith("success in percent of the episodes")


@needs_package
def test_an_inspection_counts_the_recorded_episodes(cube):
    from iql_torchrl.reporting.dataset_report import inspect_dataset

    path = cube(terminals=np.arange(125) % 25 == 24)
    found = inspect_dataset(OGBench(name=CUBE, path=path), EnvironmentOptions(name="auto", kwargs=None))
    assert found["episodes"] == {"count": 5, "terminated": 0, "truncated": 5, "unfinished": 0}
    assert found["returns"]["maximum"] == -22 and found["environment"] == "cube-single-singletask-v0"
    assert not {"odd_timeout", "missing_end"} & {one["kind"] for one in found["findings"]}


@needs_package
def test_an_end_that_was_recorded_is_not_suspected_where_it_solves_the_task(tmp_path):
    from iql_torchrl.reporting.dataset_report import inspect_dataset

    found = arrays("cube-single-play", episodes=(25, 25, 25))
    found["qpos"][23, 14:17] = goal()  # the last transition of the first episode
    path = write(tmp_path / "data.npz", found)
    report = inspect_dataset(OGBench(name=CUBE, path=path), EnvironmentOptions(name="auto", kwargs=None))
    assert report["episodes"] == {"count": 3, "terminated": 1, "truncated": 2, "unfinished": 0}
    assert "terminal_at_limit" not in {one["kind"] for one in report["findings"]}


# ---- where the file is


@needs_package
def test_a_file_in_the_packages_folder_is_found_by_its_name_and_nothing_is_fetched(cube, tmp_path, monkeypatch):
    import ogbench

    monkeypatch.setattr(ogbench.utils, "DATASET_URL", "http://127.0.0.1:9")
    path = cube()
    by_root = load_transitions("ogbench", name=CUBE, root=tmp_path)
    assert (by_root == load_transitions("ogbench", name=CUBE, path=path)).all()
    assert sorted(one.name for one in tmp_path.iterdir()) == [path.name]


@needs_package
def test_without_a_download_a_missing_file_is_named(tmp_path):
    refusal(CUBE, str(tmp_path / "cube-single-play-v0.npz"), "dataset.download=true", root=tmp_path, download=False)
    refusal(CUBE, "does not exist", ".npz", path=tmp_path / "absent.npz")


@needs_package
def test_the_package_fetches_what_is_not_there_and_a_later_run_does_not(cube, tmp_path, monkeypatch, capsys):
    import ogbench

    path = cube()
    write(tmp_path / "cube-single-play-v0-val.npz", arrays("cube-single-play"))
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(ogbench.utils, "DATASET_URL", f"http://127.0.0.1:{server.server_port}")
        root = tmp_path / "root" / "data"
        fetched = load_transitions("ogbench", name=CUBE, root=root)
        server.shutdown()
    assert (root / path.name).read_bytes() == path.read_bytes() and not list(root.glob("*.tmp"))
    assert (load_transitions("ogbench", name=CUBE, root=root) == fetched).all()
    assert capsys.readouterr().out == "" and socket.getdefaulttimeout() is None


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@needs_package
def test_a_host_that_cannot_be_reached_is_one_error_that_says_what_to_do(tmp_path, monkeypatch):
    import ogbench

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(ogbench.utils, "DATASET_URL", address)
    refusal(CUBE, address, "could not be downloaded", f"into {tmp_path}", "dataset.path=FILE", root=tmp_path)
    (tmp_path / "file").touch()
    refusal(CUBE, "could not be downloaded", root=tmp_path / "file")


# ---- what cannot be trained on


def refusal(name, *parts, **options):
    with pytest.raises(DatasetError) as error:
        load_transitions("ogbench", name=name, **options)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_names_with_images_are_refused():
    refusal(f"visual-{CUBE}", f"visual-{CUBE} has images", "not supported", f"name {CUBE}")
    refusal("powderworld-easy-play-v0", "powderworld-easy-play-v0 has images")


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ogbench", None)
    refusal(CUBE, "needs the ogbench package", "pip install 'iql_torchrl[ogbench]'", "Python 3.11 or 3.12")


@needs_package
@pytest.mark.parametrize("name", ["cube-single-play-v0", "cube-single-play-oraclerep-v0"])
def test_data_for_policies_with_goals_have_no_masks(name):
    refusal(name, name, "neither rewards nor masks", CUBE, "cube-single-play-singletask-task1-v0")


@needs_package
@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("cube-singel-play-singletask-v0", CUBE),
        ("cube-single-singletask-v0", CUBE),
        ("cube-single-play-singletask-task6-v0", "cube-single-play-singletask-task"),
        ("antmaze-large-navigate-singletask", "antmaze-large-navigate-singletask-v0"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(name, near):
    refusal(name, f"unknown OGBench dataset {name!r}", f"did you mean '{near}")


@needs_package
@pytest.mark.parametrize(
    ("data", "missing", "reason"),
    [
        ("cube-single-play", "qpos", "rewards and masks of a task are computed from qpos"),
        ("scene-play", "button_states", "rewards and masks of a task are computed from qpos and button_states"),
        ("cube-single-play", "terminals", "found observations, actions, qpos, qvel"),
    ],
)
def test_data_whose_masks_cannot_be_told_are_refused(data, missing, reason, tmp_path):
    found = arrays(data)
    del found[missing]
    path = write(tmp_path / "data.npz", found)
    refusal(f"{data}-singletask-v0", str(path), f"missing {missing};", reason, path=path)


@needs_package
def test_the_file_of_another_environment_is_refused(tmp_path):
    path = write(tmp_path / "data.npz", arrays("scene-play"))
    refusal(CUBE, "qpos has 25 numbers a row but cube-single-singletask-v0 has 21", "cube-single-play-v0", path=path)
    found = arrays("cube-single-play") | {"observations": np.zeros((sum(EPISODES), 30), np.float32)}
    source = OGBench(name=CUBE, path=write(path, found))
    with initialised():
        options = compose("iql_offline", [], OfflineOptions, dataset=source)
    with pytest.raises(SimulatorError, match="observations of size 28 but the data's have 30"):
        prepare_data(source, options.algorithm, options.env)


@needs_package
def test_damaged_files_are_refused(cube):
    path = cube()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refusal(CUBE, str(path), path=path)
    path.write_bytes(b"not an archive")
    refusal(CUBE, str(path), "cannot be opened as a NumPy file", path=path)
    refusal(CUBE, "it is damaged", path=cube(actions=np.zeros((7, 5), np.float32)))
    refusal(CUBE, "does not mark the last row", path=cube(terminals=np.zeros(sum(EPISODES), bool)))
    refusal(CUBE, "qpos cannot be read", path=cube(qpos=np.array([{}] * sum(EPISODES))))
    bad = arrays("cube-single-play")["observations"]
    bad[5, 2] = np.nan
    refusal(CUBE, "observations holds nan in row 5", path=cube(observations=bad))


# ---- presets


@pytest.mark.parametrize(
    ("name", "preset", "temperature", "discount"),
    [
        (CUBE, "ogbench_manipulation", 1.0, 0.99),
        ("cube-double-noisy-singletask-task5-v0", "ogbench_manipulation", 0.3, 0.99),
        ("puzzle-4x4-play-singletask-v0", "ogbench_manipulation", 10.0, 0.99),
        ("antmaze-large-navigate-singletask-v0", "ogbench_locomotion", 10.0, 0.99),
        ("antmaze-giant-navigate-singletask-task1-v0", "ogbench_locomotion", 10.0, 0.995),
        ("humanoidmaze-medium-stitch-singletask-v0", "ogbench_locomotion", 10.0, 0.995),
    ],
)
def test_the_preset_and_what_it_leaves_to_the_task_are_picked_from_the_name(name, preset, temperature, discount):
    picked, named = (configuration(f"dataset.name={name}", *also) for also in ((), (f"algorithm={preset}",)))
    assert picked.algorithm == named.algorithm and picked.eval == named.eval
    algorithm = picked.algorithm
    assert (algorithm.temperature, algorithm.discount, algorithm.gamma) == (temperature, discount, discount)
    assert algorithm.hidden_dims == [512] * 4 and algorithm.batch_size == 256 and algorithm.expectile == 0.9
    assert algorithm.actor_lr == algorithm.value_lr == algorithm.critic_lr == 3e-4
    assert picked.eval.episodes == 50 and algorithm.reward_transform == "none"


def test_what_a_task_asks_for_is_of_its_preset_alone_and_loses_to_the_command_line():
    assert configuration(f"dataset.name={CUBE}", "algorithm=locomotion").algorithm.temperature == 3.0
    assert configuration(f"dataset.name={CUBE}", "algorithm.temperature=2").algorithm.temperature == 2.0
    giant = "dataset.name=antmaze-giant-stitch-singletask-v0"
    assert configuration(giant, "algorithm.gamma=0.9").algorithm.discount == 0.9


def test_every_option_that_depends_on_the_task_is_one():
    import yaml

    from iql_torchrl.configuration.composing import CONFIGS

    for tasks in yaml.safe_load((CONFIGS / "algorithm" / "_by_task.yaml").read_text()).values():
        assert {key for task in tasks.values() for key in task} <= {*AlgorithmOptions.model_fields}


def configuration(*overrides):
    with initialised():
        return compose("iql_offline", ["dataset=ogbench", *overrides], OfflineOptions)


# ---- as a user does


@needs_package
@pytest.mark.slow
def test_a_run_is_scored_by_its_success(cube, tmp_path):
    options = ("dataset=ogbench", f"dataset.name={CUBE}", f"dataset.path={cube()}")
    tiny = [*SMALL, "train.steps=20", "eval.interval=20", f"run_dir={tmp_path / 'run'}"]
    out = run("iql_offline.py", *options, *tiny, cwd=tmp_path)
    assert "success in percent of the episodes" in out and "DISPLAY" not in out and "WARN" not in out
    (row,) = rows(tmp_path / "run" / "eval.csv")
    assert float(row["normalized_score"]) == 100 * float(row["success_rate"]) and float(row["episode_return_mean"]) < 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["score"], summary["final_score"]) == ("success in percent", float(row["normalized_score"]))
    out = run("evaluate.py", f"checkpoint={tmp_path / 'run'}", "episodes=1", cwd=tmp_path)
    assert "cube-single-singletask-v0" in out and "success in percent" in out
    out = run("report.py", f"runs=[{tmp_path / 'run'}]", f"output={tmp_path / 'page'}", cwd=tmp_path)
    assert f"{CUBE}, success in percent" in out
    assert "unknown OGBench" in refused("iql_offline.py", "dataset=ogbench", "dataset.name=cub-v0", cwd=tmp_path)
