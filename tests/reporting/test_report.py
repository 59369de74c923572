"""The report over real runs: what is gathered, how runs are named, what the numbers and the page say."""

import csv
import json
import re
import shutil

import h5py
import numpy as np
import pytest

from iql_torchrl import train
from iql_torchrl.data.sources import HDF5
from iql_torchrl.data.sources.d4rl import D4RL
from iql_torchrl.errors import ConfigurationError
from iql_torchrl.reporting.report.comparison import compare, published
from iql_torchrl.reporting.report.gathering import gather
from iql_torchrl.reporting.report.writing import summary_lines, write_report

OPTIONS = {
    "train.compile": False,
    "train.products": "mkl",
    "train.log_interval": 10,
    "eval.interval": 10,
    "eval.episodes": 1,
    "algorithm.hidden_dims": [8],
    "algorithm.batch_size": 16,
}
DATASETS = {"hopper-medium-v2": (11, 3), "walker2d-medium-v2": (17, 6)}
PNG = b"\x89PNG\r\n\x1a\n"


def write_log(path, sizes, seed=0):
    random, rows = np.random.default_rng(seed), 200
    with h5py.File(path, "w") as file:
        file["observations"] = random.normal(size=(rows, sizes[0])).astype(np.float32)
        file["actions"] = random.uniform(-0.9, 0.9, size=(rows, sizes[1])).astype(np.float32)
        file["rewards"] = random.uniform(size=rows).astype(np.float32)
        file["terminals"] = np.arange(rows) % 37 == 36
        file["timeouts"] = np.zeros(rows, bool)
    return path


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Real runs on two of D4RL's datasets, of IQL at two expectiles and behaviour cloning, two seeds each."""
    root = tmp_path_factory.mktemp("made")
    for name, sizes in DATASETS.items():
        log = write_log(root / f"{name}.hdf5", sizes)
        for folder, options in {
            "iql": {},
            "iql-0.9": {"algorithm.expectile": 0.9},
            "bc": {"algorithm": "behaviour_cloning"},
        }.items():
            source = D4RL(name=name, url=log.as_uri(), root=str(root / "cache"))
            options = OPTIONS | options | {"train.num_seeds": 2}
            train(source, steps=20, folder=root / "runs" / f"{name}-{folder}", quiet=True, options=options)
    return root / "runs"


@pytest.fixture
def runs(made, tmp_path):
    return shutil.copytree(made, tmp_path / "runs")


def change(folder, name="summary.json", **values):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | values))


def listed_of(*entries):
    found, listed = gather([str(entry) for entry in entries])
    return found, {one.path.rsplit("/", 1)[-1]: (one.status, one.reason) for one in listed}


# ---------------------------------------------------------------------- gathering


@pytest.mark.slow
def test_folders_patterns_and_folders_of_runs_name_each_run_once(runs):
    for entries in (
        [runs],
        [runs.parent],
        [f"{runs}/*"],
        [f"{runs}/hopper*", f"{runs}/walker*"],
        [runs, runs / "hopper-medium-v2-iql", f"{runs}/*"],
    ):
        found, listed = listed_of(*entries)
        assert sorted(run.path.name for run in found) == sorted(path.name for path in runs.iterdir()) and listed == {}
        assert all(len(run.scores) == 2 for run in found)


@pytest.mark.slow
def test_what_is_no_finished_run_is_listed_with_the_reason(runs):
    (one, two, three, four, five, six) = sorted(runs.iterdir())
    (one / "summary.json").unlink()
    change(two, interrupted="SIGTERM", steps=10)
    change(three, diverged=[{"seed": 1, "step": 15, "what": "seed 1 diverged by step 15: loss_value is nan."}])
    change(four, versions={"iql_torchrl": "0.0.9"})
    (five / "summary.json").write_text("{")
    change(six, final_score=None, final_scores=None, best_score=None)
    foreign = runs / "notes"
    foreign.mkdir()
    (foreign / "a.txt").write_text("")
    found, listed = listed_of(runs, runs / "absent", f"{runs}/zzz*", runs / "notes" / "a.txt")
    assert [run.path.name for run in found] == [three.name, four.name, six.name]
    assert [list(run.scores) for run in found] == [[0], [0, 1], []]
    assert listed[one.name][0] == "unfinished" and "last row at step 20" in listed[one.name][1]
    assert "normalised score" in listed[one.name][1]
    assert listed[two.name] == ("interrupted", listed[two.name][1])
    assert "SIGTERM at step 10 of 20, last normalised" in listed[two.name][1]
    assert listed[three.name] == ("diverged", "seed 1 diverged by step 15: loss_value is nan.")
    assert listed[four.name][0] == "another version" and "0.0.9" in listed[four.name][1]
    assert listed[five.name][0] == "damaged" and "summary.json is damaged" in listed[five.name][1]
    assert listed[six.name][0] == "no score"
    assert listed["notes"] == ("foreign", "holds no run: no config.yaml, metrics.csv or sweep.json")
    assert listed["a.txt"] == ("foreign", "is no folder")
    assert listed["absent"] == ("missing", "does not exist") and listed["zzz*"] == ("missing", "matches nothing")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "status"),
    [
        (lambda folder: (folder / "config.yaml").unlink(), "partial"),
        (lambda folder: (folder / "metrics.csv").unlink(), "partial"),
        (lambda folder: (folder / "eval.csv").write_text("x\n1\n"), "damaged"),
        (lambda folder: (folder / "config.yaml").write_text("{"), "damaged"),
        (lambda folder: (folder / "summary.json").write_text("{}"), "partial"),
        (lambda folder: (folder / "summary.json").write_text("[]"), "damaged"),
        (lambda folder: change(folder, final_scores={"0": "high"}), "damaged"),
        (lambda folder: change(folder, remarks=["close"]), "damaged"),
        (lambda folder: change(folder, score_references=[1.0]), "damaged"),
    ],
)
def test_a_damaged_or_partial_folder_is_listed_and_nothing_else_is_lost(spoil, status, runs):
    spoil(runs / "hopper-medium-v2-iql")
    found, listed = listed_of(runs)
    assert len(found) == 5 and listed["hopper-medium-v2-iql"][0] == status
    assert "\n" not in listed["hopper-medium-v2-iql"][1]


@pytest.mark.slow
def test_the_jobs_of_a_sweep_are_all_there_or_listed(runs, tmp_path):
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    for number, name in enumerate(("hopper-medium-v2-iql", "hopper-medium-v2-iql-0.9")):
        shutil.copytree(runs / name, sweep / str(number))
    shutil.copytree(runs / "hopper-medium-v2-bc", sweep / "10")
    jobs = [{"job": number, "status": "finished", "overrides": []} for number in (0, 1)]
    jobs += [{"job": 2, "status": "failed", "overrides": ["train.seed=2"], "reason": "error: no room"}]
    jobs += [{"job": 3, "status": "missing", "overrides": ["train.seed=3"], "reason": None}]
    (sweep / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    (sweep / "1" / "summary.json").unlink()
    (sweep / "1" / "job.json").write_text(json.dumps({"status": "failed", "reason": "RunError: disk full"}))
    found, listed = listed_of(sweep)
    assert [run.path.name for run in found] == ["0", "10"]
    assert listed["1"][0] == "failed" and listed["1"][1].startswith("RunError: disk full (no summary.json")
    assert listed["2"] == ("failed", "error: no room (train.seed=2)")
    assert listed["3"] == ("missing", "no run is there (train.seed=3)")
    (sweep / "sweep.json").write_text("{")
    found, listed = listed_of(sweep)
    assert [run.path.name for run in found] == ["0", "10"] and listed["sweep.json"][0] == "damaged"


# ---------------------------------------------------------------------- the table


@pytest.mark.slow
def test_runs_are_named_by_the_options_in_which_they_differ(runs):
    comparison = compare(gather([str(runs)])[0])
    assert comparison.names == ["IQL expectile=0.7", "IQL expectile=0.9", "behaviour cloning"]
    assert list(comparison.tasks) == list(DATASETS) and comparison.common == list(DATASETS)
    assert {task.environment for task in comparison.tasks.values()} == {"Hopper-v4", "Walker2d-v4"}
    shutil.rmtree(runs / "hopper-medium-v2-iql-0.9")
    shutil.rmtree(runs / "walker2d-medium-v2-iql-0.9")
    assert compare(gather([str(runs)])[0]).names == ["IQL", "behaviour cloning"]


@pytest.mark.slow
def test_what_each_task_has_of_its_own_is_no_difference(runs):
    for folder in runs.glob("walker*"):
        text = (folder / "config.yaml").read_text().replace("temperature: 3.0", "temperature: 10.0")
        (folder / "config.yaml").write_text(text.replace("discount: 0.99", "discount: 0.9"))
    assert len(compare(gather([str(runs)])[0]).names) == 3


@pytest.mark.slow
def test_data_of_one_name_and_other_content_are_other_tasks_and_raw_returns_stay_apart(runs):
    change(runs / "hopper-medium-v2-bc", dataset_fingerprint="f00d" * 16)
    change(runs / "walker2d-medium-v2-bc", score="return", environment="Walker2d-v5")
    comparison = compare(gather([str(runs)])[0])
    assert "hopper-medium-v2 (f00df0)" in comparison.tasks and "walker2d-medium-v2 in Walker2d-v5" in comparison.tasks
    assert len(comparison.tasks) == 4
    assert not comparison.tasks["walker2d-medium-v2 in Walker2d-v5"].normalised
    assert comparison.over("behaviour cloning") == ["hopper-medium-v2 (f00df0)"] and comparison.common == []


@pytest.mark.slow
def test_a_cell_has_every_seed_of_every_run_and_says_which_are_there_twice(runs):
    shutil.copytree(runs / "hopper-medium-v2-iql", runs / "again")
    comparison = compare(gather([str(runs)])[0])
    assert len(comparison.scores("hopper-medium-v2", "IQL expectile=0.7")) == 4
    (note,) = (note for note in comparison.notes if "more than once" in note)
    assert note.endswith(": hopper-medium-v2, IQL expectile=0.7: seed 0, 1.")


def test_published_scores_have_a_source_each():
    found = published()
    assert {one["code"] for one in found["scores"]} == set(found["sources"]) == {"paper", "CORL", "JAX-CORL"}
    assert len({(one["name"], one["code"]) for one in found["scores"]}) == len(found["scores"])
    by_name = {(one["name"], one["code"]): (one["score"], one["std"]) for one in found["scores"]}
    assert by_name["door-human-v1", "CORL"] == (3.26, 1.83)
    assert by_name["hopper-medium-v2", "paper"] == (66.3, None)
    assert all(set(one) == {"what", "where"} for one in found["sources"].values())


# ---------------------------------------------------------------------- what does not compare


def notes_on(folder, *words):
    return [note for note in compare(gather([str(folder)])[0]).notes if all(word in note for word in words)]


@pytest.mark.slow
def test_what_keeps_scores_from_being_compared_stands_once_a_dataset(runs, tmp_path):
    comparison, listed = write_report([str(runs)], tmp_path / "out")
    (note,) = notes_on(runs, "hopper-medium-v2", "D4RL")
    assert note.startswith("hopper-medium-v2 holds data of Hopper-v2 and is evaluated in Hopper-v4: version 4")
    assert len(comparison.notes) == 2
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count("of Hopper-v2 and is evaluated in Hopper-v4") == 1
    assert "Hopper-v4; Hopper-v2 data in Hopper-v4" in text
    lines = summary_lines(comparison, listed)
    assert "hopper-medium-v2, normalised score (Hopper-v2 data in Hopper-v4)\n" in lines and f"  ! {note}" in lines


@pytest.mark.slow
def test_published_scores_stand_beside_d4rls_data_alone_and_not_what_is_called_like_it(runs, tmp_path):
    shutil.rmtree(runs)
    log = write_log(tmp_path / "hopper-medium-v2.hdf5", DATASETS["hopper-medium-v2"])
    train(HDF5(path=str(log)), environment="Hopper-v4", steps=20, folder=runs / "own", quiet=True, options=OPTIONS)
    source = D4RL(name="hopper-medium-v2", url=log.as_uri(), root=str(tmp_path / "cache"))
    train(source, environment="Hopper-v5", steps=20, folder=runs / "later", quiet=True, options=OPTIONS)
    comparison, _ = write_report([str(runs)], tmp_path / "out")
    assert {task.name for task in comparison.tasks.values()} == {"hopper-medium-v2"}
    text = (tmp_path / "out" / "report.html").read_text()
    assert "(published)" not in text and "66.3" not in text
    assert "CORL" not in (tmp_path / "out" / "table.csv").read_text()
    train(source, steps=20, folder=runs / "d4rl", quiet=True, options=OPTIONS)
    write_report([str(runs)], tmp_path / "out")
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        beside = {row["environment"] for row in csv.DictReader(file) if row["source"] == "CORL"}
    assert beside == {"Hopper-v4"} and "CORL (published)" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_tasks_mixed_in_one_table_are_told(runs):
    assert notes_on(runs, "several") == notes_on(runs, "Returns among") == []
    change(runs / "walker2d-medium-v2-bc", environment="Walker2d-v5")
    (note,) = notes_on(runs, "in several versions or settings")
    assert "Walker2d-v4 (walker2d-medium-v2 in Walker2d-v4), Walker2d-v5 (walker2d-medium-v2 in Walker2d-v5)" in note
    assert note.startswith("Walker2d in several") and note.endswith("; scores do not compare.")
    change(runs / "walker2d-medium-v2-bc", environment="Walker2d-v5", score_references=[0.0, 5000.0])
    (note,) = notes_on(runs, "on several scales")
    assert "1.6 to 4,592.3 (walker2d-medium-v2 in Walker2d-v4), 0.0 to 5,000.0" in note
    change(runs / "hopper-medium-v2-bc", score="return", environment="Swimmer-v5", score_references=None)
    (note,) = notes_on(runs, "Returns among normalised scores")
    assert note.endswith(": hopper-medium-v2 in Swimmer-v5.")


@pytest.mark.slow
def test_an_environment_with_other_arguments_is_another_task(runs):
    folder = runs / "hopper-medium-v2-bc"
    text = (folder / "config.yaml").read_text()
    assert "  kwargs: null\n" in text
    (folder / "config.yaml").write_text(text.replace("  kwargs: null\n", "  kwargs:\n    max_episode_steps: 50\n"))
    comparison = compare(gather([str(runs)])[0])
    assert "hopper-medium-v2 in Hopper-v4 {max_episode_steps:50}" in comparison.tasks
    assert notes_on(runs, "Hopper in several versions or settings", "scores do not compare")


@pytest.mark.slow
def test_runs_of_before_have_no_remarks_and_no_published_scores(runs):
    for folder in runs.iterdir():
        content = json.loads((folder / "summary.json").read_text())
        for key in ("remarks", "score_references", "published_name"):
            del content[key]
        (folder / "summary.json").write_text(json.dumps(content))
    comparison = compare(gather([str(runs)])[0])
    assert comparison.notes == [] and {task.published for task in comparison.tasks.values()} == {None}


# ---------------------------------------------------------------------- files


@pytest.mark.slow
def test_the_report_is_a_page_pictures_and_a_table(runs, tmp_path):
    (runs / "hopper-medium-v2-bc" / "summary.json").unlink()
    comparison, listed = write_report([str(runs)], tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    curves = {f"curves-{name}.png" for name in DATASETS}
    assert names == {"report.html", "table.csv", "intervals.png", "profiles.png", "improvement.png"} | curves
    for name in names - {"report.html", "table.csv"}:
        assert (tmp_path / "out" / name).read_bytes().startswith(PNG)
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ours = [row for row in rows if row["source"] == "runs"]
    assert len(ours) == 5 and all(row["runs"] == "2" and row["std"] for row in ours)
    summary = json.loads((runs / "walker2d-medium-v2-iql" / "summary.json").read_text())
    (row,) = (row for row in ours if row["options"] == "IQL expectile=0.7" and row["dataset"].startswith("walker"))
    assert float(row["mean"]) == pytest.approx(summary["final_score"])
    assert float(row["interval_low"]) == pytest.approx(summary["interquartile_mean_interval"][0])
    assert {(row["source"], row["mean"]) for row in rows if row["dataset"] == "hopper-medium-v2"} >= {
        ("paper", "66.3"),
        ("CORL", "67.53"),
        ("JAX-CORL", "56.78"),
    }
    text = (tmp_path / "out" / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|https://arxiv\.org)""", text)
    assert (
        "A 95% interval over two seeds is not one" in text
        and "Some tasks here have no more seeds" in text
        and "66.3" in text
    )
    lines = summary_lines(comparison, listed)
    assert "hopper-medium-v2, normalised score" in lines and "! " + str(runs / "hopper-medium-v2-bc") in lines


@pytest.mark.slow
def test_names_from_configurations_are_text_and_no_html(runs, tmp_path):
    for folder in runs.iterdir():
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("name: hopper-medium-v2", "name: <script>alert(1)</script>"))
    write_report([str(runs)], tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in text and "<script>alert" not in text


@pytest.mark.slow
def test_without_normalised_scores_nothing_is_averaged_over_tasks(runs, tmp_path):
    for folder in runs.iterdir():
        change(folder, score="return")
    write_report([str(runs)], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {f"curves-{name}.png" for name in DATASETS}
    text = (tmp_path / "out" / "report.html").read_text()
    assert "returns of different tasks are not averaged" in text and "published" not in text


@pytest.mark.slow
def test_where_no_run_has_a_score_there_is_one_error_that_says_what_was_found(runs, tmp_path):
    for folder in runs.iterdir():
        change(folder, final_score=None, final_scores=None)
    with pytest.raises(ConfigurationError, match="no finished run with a score") as error:
        write_report([str(runs), str(tmp_path / "absent")], tmp_path / "out")
    assert "no score, was evaluated in no environment" in str(error.value) and "and 2 more" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_three_hundred_runs_make_one_report(runs, tmp_path):
    several = tmp_path / "several"
    for number in range(300):
        source = sorted(runs.iterdir())[number % 6]
        folder = shutil.copytree(source, several / str(number), ignore=shutil.ignore_patterns("checkpoints"))
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("actor_lr: 0.0003", f"actor_lr: {1e-4 * (1 + number // 60)}"))
        content = json.loads((folder / "summary.json").read_text())
        change(folder, final_scores={str(number // 6): content["final_score"] + number % 7})
    comparison, listed = write_report([str(several)], tmp_path / "out")
    assert sum(len(one) for one in comparison.cells.values()) == 300 and listed == []
    assert len(comparison.names) == 15 and len(list((tmp_path / "out").glob("*.png"))) == 5
    assert (tmp_path / "out" / "report.html").stat().st_size < 3e6
