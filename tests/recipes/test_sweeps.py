"""Sweeps as a user runs them: real processes, real launchers."""

import csv
import importlib.util
import json
import os
import signal

import pytest
import torch
from comparing import rows_without_times, same
from processes import SMALL, finish, refused, run, start, wait_for_rows

from iql_torchrl.reporting.statistics import score_statistics

pytestmark = pytest.mark.slow
RUN = "iql_offline.py"


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


@pytest.fixture
def options(pendulum):
    return (*SMALL, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=Pendulum-v1", "train.steps=40")


def table(folder):
    found = json.loads((folder / "sweep.json").read_text())
    with open(folder / "sweep.csv", newline="") as file:
        of_csv = list(csv.DictReader(file))
    assert [(row["job"], row["status"]) for row in of_csv] == [
        (str(job["job"]), job["status"]) for job in found["jobs"]
    ]
    return found["jobs"], of_csv


def groups(folder):
    return json.loads((folder / "sweep.json").read_text())["groups"]


def parameters(folder):
    checkpoint = torch.load(folder / "checkpoints" / "step-00000040.pt", weights_only=True)
    return checkpoint["training"]["loss"]


def assert_same(one, other):
    assert same(parameters(one), parameters(other))
    for name in ("metrics.csv", "eval.csv"):
        assert rows_without_times(one / name) == rows_without_times(other / name)


def test_a_sweep_has_a_table_of_its_runs_and_goes_on_after_a_failure(options, tmp_path):
    process = start(RUN, "-m", *options, "algorithm.expectile=0.7,1.5,0.9", "run_dir=sweep", cwd=tmp_path)
    code, out, error = finish(process)
    assert code == 1 and "Traceback" not in error
    assert "sweep of 3 runs: 2 finished, 1 failed" in out
    jobs, of_csv = table(tmp_path / "sweep")
    assert [job["status"] for job in jobs] == ["finished", "failed", "finished"]
    assert "algorithm.expectile must be a number in (0, 1], got 1.5" in jobs[1]["reason"]
    assert [row["algorithm.expectile"] for row in of_csv] == ["0.7", "1.5", "0.9"] and "train.steps" not in of_csv[0]
    for number in (0, 2):
        summary = json.loads((tmp_path / "sweep" / str(number) / "summary.json").read_text())
        assert jobs[number]["objective"] == summary["final_score"] == summary["objective"]
        assert jobs[number]["steps"] == 40 and jobs[number]["objective_is"] == "final_score"


def test_runs_that_differ_in_their_seed_alone_have_one_line_with_the_statistics_of_all_their_seeds(options, tmp_path):
    swept = ("train.seed=1,4", "train.num_seeds=2", "algorithm.expectile=0.7,1.5")
    process = start(RUN, "-m", *options, *swept, "run_dir=sweep", cwd=tmp_path)
    code, out, error = finish(process)
    assert code == 1 and "Traceback" not in error
    whole, failed = groups(tmp_path / "sweep")
    assert whole["options"] == {"algorithm.expectile": "0.7"} and whole["jobs"] == [0, 2]
    assert whole["seeds"] == [1, 2, 4, 5] and whole["counts"] == {"finished": 2}
    summaries = [json.loads((tmp_path / "sweep" / str(job) / "summary.json").read_text()) for job in (0, 2)]
    scores = [score for summary in summaries for score in summary["final_scores"].values()]
    assert whole["scores"] == scores and len(scores) == 4
    assert {key: whole[key] for key in score_statistics(scores)} == score_statistics(scores)
    assert failed["options"] == {"algorithm.expectile": "1.5"} and failed["jobs"] == [1, 3]
    assert failed["scores"] == [] and failed["counts"] == {"failed": 2} and "mean" not in failed
    lines = [line.split() for line in out.splitlines()]
    assert [line[:4] for line in lines if line[:1] == ["train.seed=4"]] == [
        ["train.seed=4", "algorithm.expectile=0.7", "finished", f"{summaries[1]['objective']:,.1f}"],
        ["train.seed=4", "algorithm.expectile=1.5", "failed", "-"],
    ]
    (line,) = (line for line in lines if line[:2] == ["algorithm.expectile=0.7", "4"])
    expected = [whole["mean"], whole["standard_deviation"], whole["interquartile_mean"]]
    assert line[2:5] == [f"{value:,.1f}" for value in expected]
    assert ["algorithm.expectile=1.5", "0", "-", "-", "-", "2", "failed"] in lines
    assert "A 95% interval over four seeds is not one" in out


def test_a_sweep_that_was_broken_off_goes_on_where_it_was(options, tmp_path):
    longer = (*options, "train.seed=range(3)", "train.log_interval=1", "run_dir=sweep")
    run(RUN, "-m", *(one.replace("run_dir=sweep", "run_dir=alone") for one in longer), cwd=tmp_path)
    process = start(RUN, "-m", *longer, cwd=tmp_path)
    assert wait_for_rows(tmp_path / "sweep" / "1" / "metrics.csv", 25) is None
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    jobs, _ = table(tmp_path / "sweep")
    assert [job["status"] for job in jobs] == ["finished", "running", "missing"]
    before = (tmp_path / "sweep" / "0" / "summary.json").stat().st_mtime_ns
    out = run(RUN, "-m", *longer, cwd=tmp_path)
    assert "resumed from" in out and "sweep of 3 runs: 3 finished" in out
    assert (tmp_path / "sweep" / "0" / "summary.json").stat().st_mtime_ns == before
    for number in range(3):
        assert_same(tmp_path / "sweep" / str(number), tmp_path / "alone" / str(number))


def test_an_interrupted_sweep_stops_and_lists_what_is_missing(options, tmp_path):
    longer = (*options, "train.seed=range(3)", "train.steps=100000", "run_dir=sweep")
    process = start(RUN, "-m", *longer, cwd=tmp_path)
    wait_for_rows(tmp_path / "sweep" / "0" / "metrics.csv", 2)
    process.send_signal(signal.SIGTERM)
    code, out, _ = finish(process)
    assert code == 143 and "sweep of 3 runs: 1 interrupted, 2 missing" in out
    assert "goes on with those that are not finished" in out
    assert [job["status"] for job in table(tmp_path / "sweep")[0]] == ["interrupted", "missing", "missing"]


def test_another_sweep_in_the_folder_repeats_nothing_and_says_what_differs(options, tmp_path):
    run(RUN, "-m", *options, "train.seed=1,2", "run_dir=sweep", cwd=tmp_path)
    process = start(RUN, "-m", *options, "train.seed=1,3", "run_dir=sweep", cwd=tmp_path)
    code, _, error = finish(process)
    assert code == 1 and "train.seed 2 -> 3" in error
    assert [job["status"] for job in table(tmp_path / "sweep")[0]] == ["finished", "failed"]
    summary = json.loads((tmp_path / "sweep" / "1" / "summary.json").read_text())
    assert summary["seed"] == 2


def test_without_a_simulator_the_objective_is_the_held_out_error(options, tmp_path):
    run(RUN, "-m", *options, "env.name=null", "train.seed=1,2", "run_dir=sweep", cwd=tmp_path)
    for job in table(tmp_path / "sweep")[0]:
        summary = json.loads((tmp_path / "sweep" / str(job["job"]) / "summary.json").read_text())
        assert job["objective"] == -summary["validation_td_error"] < 0
        assert job["objective_is"] == "-validation_td_error"
    (group,) = groups(tmp_path / "sweep")
    assert group["options"] == {} and group["seeds"] == [1, 2]
    assert group["scores"] == [job["objective"] for job in table(tmp_path / "sweep")[0]]


def test_mistakes_of_launcher_and_sweep_are_one_clear_error(options, tmp_path):
    assert "unknown hydra/launcher=rey" in refused(RUN, "-m", *options, "hydra/launcher=rey", cwd=tmp_path)
    message = refused(RUN, "-m", *options, "algorithm.expectile=interval(0.6,0.9)", "run_dir=sweep", cwd=tmp_path)
    assert "does not support sweep type" in message
    if importlib.util.find_spec("ray") is None:
        message = refused(RUN, "-m", *options, "hydra/launcher=ray", cwd=tmp_path)
        assert "pip install 'iql_torchrl[sweep]'" in message


@needs("ray")
def test_a_cluster_that_is_not_there_or_too_small_is_refused_at_once(options, tmp_path):
    ray = (*options, "-m", "hydra/launcher=ray", "run_dir=sweep")
    message = refused(RUN, *ray, "hydra.launcher.ray.init.address=127.0.0.1:9", cwd=tmp_path)
    assert "hydra.launcher.ray.init.address=127.0.0.1:9: nothing answers there" in message
    message = refused(RUN, *ray, "hydra.launcher.ray.remote.num_gpus=9", cwd=tmp_path)
    assert "(CPU 1, GPU 9)" in message and "Free now in all: CPU" in message


@needs("ray")
def test_runs_on_ray_end_as_those_one_after_the_other(options, tmp_path):
    run(RUN, "-m", *options, "train.seed=1,2", "run_dir=alone", cwd=tmp_path)
    out = run(RUN, "-m", *options, "train.seed=1,2", "hydra/launcher=ray", "run_dir=ray", cwd=tmp_path)
    assert "sweep of 2 runs: 2 finished" in out
    for number in range(2):
        assert_same(tmp_path / "ray" / str(number), tmp_path / "alone" / str(number))


@needs("submitit")
def test_processes_of_this_machine_divide_its_threads(options, tmp_path):
    run(RUN, "-m", *options, "train.seed=1,2", "run_dir=alone", cwd=tmp_path)
    local = ("hydra/launcher=submitit_local", "run_dir=local")
    run(RUN, "-m", *options, "train.seed=1,2", *local, cwd=tmp_path)
    for number in range(2):
        assert_same(tmp_path / "local" / str(number), tmp_path / "alone" / str(number))


@needs("optuna")
def test_a_search_repeats_no_finished_trial(options, tmp_path):
    search = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1", "run_dir=search")
    search += ("hydra.sweeper.direction=maximize", "hydra.sweeper.sampler.seed=1")
    search += ("algorithm.expectile=interval(0.6,0.9)", "algorithm.temperature=choice(1,3)")
    run(RUN, "-m", *options, *search, cwd=tmp_path)
    jobs, _ = table(tmp_path / "search")
    assert [job["status"] for job in jobs] == ["finished", "finished"]
    times = [(tmp_path / "search" / str(number) / "summary.json").stat().st_mtime_ns for number in (0, 1)]
    out = run(RUN, "-m", *options, *search, cwd=tmp_path)
    assert "sweep of 2 runs: 2 finished" in out
    assert times == [(tmp_path / "search" / str(number) / "summary.json").stat().st_mtime_ns for number in (0, 1)]
