"""The report on a dataset as a user asks for it: real processes, every source."""

import json
import os

import gymnasium
import h5py
import numpy as np
import pytest
from processes import refused, run
from recordings import record

PNG = b"\x89PNG\r\n\x1a\n"
pytestmark = pytest.mark.slow


def no_such_number(text):
    raise AssertionError(f"{text} is no JSON")


def read(folder):
    """The report in a folder, after checking that it is JSON and that the picture is one."""
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.png"]
    assert (folder / "report.png").read_bytes().startswith(PNG)
    return json.loads((folder / "report.json").read_text(), parse_constant=no_such_number)


def inspect(tmp_path, *options):
    out = run("inspect_dataset.py", *options, f"output={tmp_path / 'out'}", cwd=tmp_path)
    report = read(tmp_path / "out")
    assert str(tmp_path / "out" / "report.json") in out and str(tmp_path / "out" / "report.png") in out
    for finding in report["findings"]:
        assert finding["meaning"] in out
    assert ("nothing suspicious found" in out) == (not report["findings"])
    return report, out


@pytest.fixture
def arrays(pendulum):
    with h5py.File(pendulum) as file:
        return {key: file[key][:] for key in file}


@pytest.fixture
def faulty(arrays):
    """The log without the flag of its second episode's end, and with a row that is there twice."""
    arrays["timeouts"][399] = False
    for key in ("observations", "actions", "rewards"):
        arrays[key][10] = arrays[key][5]
    arrays["next_observations"][9] = arrays["observations"][10]
    arrays["next_observations"][10] = arrays["observations"][11]
    return arrays


def as_hdf5(arrays, folder):
    with h5py.File(folder / "log.hdf5", "w") as file:
        for key, values in arrays.items():
            file[key] = values
    return ["dataset=hdf5", f"dataset.path={folder / 'log.hdf5'}"]


def as_parquet(arrays, folder):
    import pyarrow as pa
    from pyarrow import parquet

    columns = {key: list(values) if values.ndim == 2 else values for key, values in arrays.items()}
    parquet.write_table(pa.table(columns), folder / "log.parquet", row_group_size=300)
    return ["dataset=parquet", f"dataset.path={folder / 'log.parquet'}"]


def as_npz(arrays, folder):
    np.savez(folder / "log.npz", **arrays)
    return ["dataset=numpy", f"dataset.path={folder / 'log.npz'}"]


@pytest.mark.parametrize("key", ["observations", "actions", "rewards"])
def test_a_log_that_lacks_a_column_is_refused_with_its_name(key, tmp_path):
    columns = {"observations": (20, 3), "actions": (20, 1), "rewards": (20,), "terminals": (20,)}
    np.savez(tmp_path / "log.npz", **{name: np.zeros(shape) for name, shape in columns.items() if name != key})
    options = ("dataset=numpy", f"dataset.path={tmp_path / 'log.npz'}", "env.name=Pendulum-v1")
    assert f"missing {key}" in refused("inspect_dataset.py", *options, cwd=tmp_path)


@pytest.mark.parametrize("write", [as_hdf5, as_parquet, as_npz])
def test_a_file_is_reported_on_with_what_is_wrong_with_it(write, faulty, tmp_path):
    options = write(faulty, tmp_path)
    report, out = inspect(tmp_path, *options, "env.name=Pendulum-v1")
    found = {finding["kind"]: finding for finding in report["findings"]}
    assert found["missing_end"]["rows"] == [399] and found["duplicate_rows"]["count"] == 1
    assert report["rows"] == 800 and report["episodes"]["count"] == 3 and report["environment"] == "Pendulum-v1"
    assert report["actions"]["low"] == [-2] and report["actions"]["high"] == [2]
    assert "normalised_score" not in report
    assert "First rows: 399." in out and "800, of which" in out


def test_a_clean_log_has_nothing_suspicious(pendulum, tmp_path):
    report, out = inspect(tmp_path, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=Pendulum-v1")
    assert report["findings"] == [] and "nothing suspicious found" in out
    with h5py.File(pendulum) as file:
        returns = file["rewards"][:].reshape(4, 200).astype(np.float64).sum(1)
    assert report["returns"]["mean"] == pytest.approx(returns.mean())
    assert report["lengths"]["minimum"] == report["lengths"]["maximum"] == 200


def test_the_embedded_dataset_is_reported_on_with_its_normalised_score(tmp_path):
    report, out = inspect(tmp_path)
    assert report["environment"] == "Hopper-v5" and report["actions"]["bounds_from"] == "the environment's"
    assert report["transitions"] == 97_777
    for name in ("minimum", "mean", "median", "maximum"):
        expected = 100 * (report["returns"][name] + 20.272305) / (3234.3 + 20.272305)
        assert report["normalised_score"][name] == pytest.approx(expected)
    assert "Hopper-v5" in out and "normalised score" in out


def door_arrays():
    """600 rows of the sizes of Adroit's door, without timeouts."""
    random = np.random.default_rng(0)
    return {
        "observations": random.normal(size=(600, 39)).astype(np.float32),
        "actions": random.uniform(-1, 1, size=(600, 28)).astype(np.float32),
        "rewards": random.uniform(size=600).astype(np.float32),
        "terminals": np.zeros(600, bool),
    }


def test_a_file_of_d4rl_is_reported_on_with_its_environments_bounds_and_its_note(tmp_path):
    arrays = door_arrays()
    arrays["actions"][7, 3] = 1.5
    as_hdf5(arrays, tmp_path)
    address, root = (tmp_path / "log.hdf5").as_uri(), tmp_path / "cache"
    report, out = inspect(
        tmp_path, "dataset=d4rl", "dataset.name=door-human-v1", f"dataset.url={address}", f"dataset.root={root}"
    )
    assert report["environment"] == "AdroitHandDoor-v1" and "AdroitHandDoor-v1" in out
    assert "up to a point above D4RL's" in report["note"] and report["note"] in out
    # Without timeouts, D4RL's own limit of 200 steps cuts the episodes.
    assert report["episodes"] == {"count": 3, "terminated": 0, "truncated": 3, "unfinished": 0}
    assert [finding["kind"] for finding in report["findings"]] == ["actions_outside_bounds"]
    assert report["actions"]["rows_outside_bounds"] == 1


def test_a_minari_dataset_is_reported_on_in_the_environment_that_it_names(tmp_path):
    environment = gymnasium.make("Pendulum-v1", max_episode_steps=30)
    buffers = record("test/pendulum-v0", environment, tmp_path / "minari", episodes=3)
    returns = [sum(buffer.rewards) for buffer in buffers]
    options = ("dataset=minari", "dataset.name=test/pendulum-v0", f"dataset.root={tmp_path / 'minari'}")
    report, _ = inspect(tmp_path, *options, "dataset.download=false")
    assert report["environment"] == "Pendulum-v1" and report["findings"] == []
    assert report["rows"] == report["transitions"] == 90 and report["lengths"]["maximum"] == 30
    assert report["returns"]["mean"] == pytest.approx(np.mean(returns), rel=1e-5)


def test_without_an_environment_the_datas_own_range_counts(pendulum, tmp_path):
    report, out = inspect(tmp_path, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=null")
    assert report["environment"] is None and report["actions"]["bounds_from"] == "each dimension's own range"
    assert "each dimension's own range" in out


def test_sentinels_are_found_and_the_options_bounds_count(arrays, tmp_path):
    arrays["rewards"][123] = -1e30
    arrays["actions"][45, 0] = 500
    options = as_hdf5(arrays, tmp_path)
    bounds = ("dataset.action_low=-2", "dataset.action_high=[2]")
    report, out = inspect(tmp_path, *options, "env.name=null", *bounds)
    found = {finding["kind"]: finding for finding in report["findings"]}
    assert set(found) == {"outlying_reward", "outlying_action", "actions_outside_bounds"}
    assert found["outlying_reward"]["rows"] == [123] and found["outlying_action"]["rows"] == [45]
    assert "outlying reward: -1e+30 in row 123, where" in out and report["actions"]["high"] == [2]
    assert "those of dataset.action_low and dataset.action_high" in out


def test_an_environment_that_does_not_fit_is_noted_in_the_report(pendulum, tmp_path):
    report, out = inspect(tmp_path, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=Hopper-v5")
    assert "observations of size 11" in report["note"] and report["note"] in out
    assert report["actions"]["bounds_from"] == "each dimension's own range"


@pytest.mark.parametrize(
    "option", ["env.kwargs={max_episode_steps:100}", "+env.kwargs.max_episode_steps=100"], ids=["mapping", "key"]
)
def test_arguments_of_the_environment_are_given_as_the_configuration_shows(option, arrays, tmp_path):
    del arrays["timeouts"]
    report, _ = inspect(tmp_path, *as_hdf5(arrays, tmp_path), "env.name=Pendulum-v1", option)
    assert report["episodes"]["count"] == 8 and report["lengths"]["maximum"] == 100


ROBOTS = """
import gymnasium
import numpy as np
from gymnasium.spaces import Box


class Robot(gymnasium.Env):
    observation_space = Box(-8, 8, (3,), np.float32)

    def __init__(self, limit):
        self.action_space = Box(-limit, limit, (1,), np.float32)


gymnasium.register("Unbounded-v0", entry_point=Robot, kwargs={"limit": np.inf})
gymnasium.register("Limited-v0", entry_point=Robot, kwargs={"limit": 2}, max_episode_steps=100)
"""


@pytest.fixture
def robots(tmp_path, monkeypatch):
    """A module of the user's with environments of its own, which Gymnasium imports for ``robots:ID``."""
    (tmp_path / "robots.py").write_text(ROBOTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_the_report_is_json_where_the_environments_actions_are_unbounded(robots, pendulum, tmp_path):
    inspect(tmp_path, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=robots:Unbounded-v0")


def test_the_step_limit_of_an_environment_in_a_module_cuts_the_episodes(robots, arrays, tmp_path):
    del arrays["timeouts"]
    report, _ = inspect(tmp_path, *as_hdf5(arrays, tmp_path), "env.name=robots:Limited-v0")
    assert report["actions"]["high"] == [2]
    assert report["episodes"]["count"] == 8 and report["lengths"]["maximum"] == 100


def test_the_step_limit_of_a_robotics_environment_cuts_the_episodes(tmp_path):
    arrays = door_arrays()
    report, _ = inspect(tmp_path, *as_hdf5(arrays, tmp_path), "env.name=AdroitHandDoor-v1")
    assert report["episodes"]["count"] == 3 and report["lengths"]["maximum"] == 200


# ---- refusals


def test_a_second_report_replaces_the_first(pendulum, tmp_path):
    options = ("dataset=hdf5", f"dataset.path={pendulum}", "env.name=null")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("old")
    report, _ = inspect(tmp_path, *options)
    assert report["rows"] == 800


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["dataset=hdf5", "dataset.path=absent.hdf5"], "dataset file absent.hdf5 does not exist"),
        (["dataset=numpy", "dataset.path=absent.npz"], "dataset absent.npz does not exist"),
        (["dataset=hdf5"], "option dataset.path is needed"),
        (["dataset=hdf4", "dataset.path=x"], "unknown dataset=hdf4; did you mean 'hdf5'"),
        (["ouput=there"], "unknown option ouput; did you mean 'output'"),
        (["dataset=hdf5", "dataset.path=x", "dataset.keep_timeout=true"], "did you mean 'dataset.keep_timeouts'"),
        (["output=''"], "output must be"),
    ],
    ids=["no-file", "no-npz", "no-path", "source", "option", "option-of-the-source", "empty-output"],
)
def test_a_mistake_is_refused_with_one_line(options, expected, tmp_path):
    assert expected in refused("inspect_dataset.py", *options, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_data_that_cannot_be_trained_on_are_refused_with_the_row(arrays, tmp_path):
    arrays["rewards"][123] = np.nan
    options = as_hdf5(arrays, tmp_path)
    message = refused("inspect_dataset.py", *options, "env.name=null", f"output={tmp_path / 'out'}", cwd=tmp_path)
    assert "rewards" in message and "123" in message
    assert not (tmp_path / "out").exists()


def test_an_output_below_a_file_is_refused(pendulum, tmp_path):
    (tmp_path / "file").write_text("")
    options = ("dataset=hdf5", f"dataset.path={pendulum}", "env.name=null", f"output={tmp_path / 'file' / 'out'}")
    message = refused("inspect_dataset.py", *options, cwd=tmp_path)
    assert "cannot be written" in message and str(tmp_path / "file" / "out") in message


@pytest.mark.parametrize("name", ["report.json", "report.png"])
def test_an_output_that_is_taken_by_a_folder_is_refused(name, pendulum, tmp_path):
    (tmp_path / "out" / name).mkdir(parents=True)
    options = ("dataset=hdf5", f"dataset.path={pendulum}", "env.name=null", f"output={tmp_path / 'out'}")
    assert "cannot be written" in refused("inspect_dataset.py", *options, cwd=tmp_path)


def test_an_output_folder_without_the_right_to_write_is_refused(pendulum, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):  # root may write anywhere but here
        folder = "/proc"
    options = ("dataset=hdf5", f"dataset.path={pendulum}", "env.name=null", f"output={folder}")
    assert "cannot be written" in refused("inspect_dataset.py", *options, cwd=tmp_path)
