"""Robotics suites from recorded episodes to an evaluation: real simulators, real files, real processes."""

import json
import re

import gymnasium
import h5py
import numpy as np
import pytest
from processes import SMALL, rows, run
from recordings import record

KITCHEN = {"tasks_to_complete": ["microwave", "kettle", "light switch", "slide cabinet"]}
MAZES = {"AntMaze_UMaze-v4": {}, "PointMaze_UMaze-v3": {}}
SCORED = {
    "AdroitHandPen-v1": {},
    "AdroitHandDoor-v1": {},
    "AdroitHandHammer-v1": {},
    "AdroitHandRelocate-v1": {},
    "FrankaKitchen-v1": KITCHEN,
}
STEPS = 40


def recorded(name, kwargs, root, episodes=2):
    """Random episodes of an environment, as a Minari dataset in ``root``; returns its name."""
    import gymnasium_robotics

    gymnasium.register_envs(gymnasium_robotics)
    dataset = f"test/{re.split('[-_]', name)[0].lower()}-v0"
    record(dataset, gymnasium.make(name, max_episode_steps=STEPS, **kwargs), root, episodes)
    return dataset


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(out of date|is set to None|share an object).*")
@pytest.mark.parametrize(("name", "kwargs"), [*MAZES.items(), *SCORED.items()], ids=[*MAZES, *SCORED])
def test_recorded_episodes_train_a_policy_that_is_evaluated_where_they_were_recorded(name, kwargs, tmp_path):
    dataset = recorded(name, kwargs, tmp_path / "minari")
    out = run(
        "iql_offline.py",
        *SMALL,
        "dataset=minari",
        f"dataset.name={dataset}",
        f"dataset.root={tmp_path / 'minari'}",
        "dataset.download=false",
        "train.steps=100",
        "eval.interval=50",
        "algorithm.reward_transform=none",  # random episodes of a maze all return 0
        f"run_dir={tmp_path / 'run'}",
        cwd=tmp_path,
    )
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["environment"] == name and summary["steps"] == 100 and summary["transitions"] == 2 * STEPS
    assert f"evaluated in {name}" in out and re.search(rf"environment +{name}\n", out)
    evaluations = rows(folder / "eval.csv")
    assert [row["step"] for row in evaluations] == ["50", "100"]
    assert all(0 <= float(row["success_rate"]) <= 1 for row in evaluations)
    assert summary["final_success_rate"] == float(evaluations[-1]["success_rate"])
    if name in MAZES:
        assert summary["score"] == "return" and "not comparable" in summary["score_note"]
        assert "not comparable" in out
        assert all(row["normalized_score"] == "" for row in evaluations)
    else:
        assert summary["score"] == "normalised score"
        assert all(np.isfinite(float(row["normalized_score"])) for row in evaluations)
        assert summary["final_score"] == pytest.approx(float(evaluations[-1]["normalized_score"]))
        assert summary["data_score"] is not None

    checkpoint = folder / "checkpoints" / "step-00000100.pt"
    out = run("evaluate.py", f"checkpoint={checkpoint}", "episodes=1", cwd=tmp_path)
    assert f"in {name}:" in out and re.search(r"success rate +[01]\.00\n", out)
    assert re.search(rf"episode length +{STEPS}\.0\n", out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "observation_dim", "action_dim", "environment", "score"),
    [
        ("door-human-v1", 39, 28, "AdroitHandDoor-v1", "normalised score"),
        ("antmaze-umaze-v2", 29, 8, "AntMaze_UMaze-v4", "return"),
        ("kitchen-complete-v0", 60, 9, "FrankaKitchen-v1", "normalised score"),
        ("maze2d-umaze-v1", 4, 2, "PointMaze_UMaze-v3", "return"),
    ],
)
def test_a_file_of_d4rl_is_evaluated_in_the_environment_that_its_name_stands_for(
    dataset, observation_dim, action_dim, environment, score, tmp_path
):
    random = np.random.default_rng(0)
    timeouts = np.zeros(300, dtype=bool)
    timeouts[[99, 199, 299]] = True
    with h5py.File(tmp_path / "file.hdf5", "w") as file:
        file["observations"] = random.normal(size=(300, observation_dim)).astype(np.float32)
        file["actions"] = random.uniform(-1, 1, size=(300, action_dim)).astype(np.float32)
        file["rewards"] = random.uniform(size=300).astype(np.float32)
        file["terminals"] = np.zeros(300, dtype=bool)
        file["timeouts"] = timeouts
    out = run(
        "iql_offline.py",
        *SMALL,
        "dataset=d4rl",
        f"dataset.name={dataset}",
        f"dataset.url={(tmp_path / 'file.hdf5').as_uri()}",
        f"dataset.root={tmp_path / 'cache'}",
        "train.steps=100",
        "eval.episodes=1",
        "eval.interval=100",
        "++env.kwargs.max_episode_steps=50",
        f"run_dir={tmp_path / 'run'}",
        cwd=tmp_path,
    )
    told = "with max_episode_steps=50"
    assert f"{dataset} ({told}): 297 transitions, 3 episodes" in out and f"evaluated in {environment}" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["environment"], summary["score"]) == (environment, score)
    (row,) = rows(tmp_path / "run" / "eval.csv")
    assert float(row["success_rate"]) in (0, 1) and (row["normalized_score"] != "") == (score != "return")
    # Kitchen's own rewards are of another kind than the data's.
    assert (summary["data_score"] is None) == dataset.startswith("kitchen")
