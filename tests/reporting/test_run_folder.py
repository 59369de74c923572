"""The files of a run, and what survives a crash."""

import csv
import errno
import json
import math
import resource
import signal
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from iql_torchrl.errors import ConfigurationError, RunError
from iql_torchrl.reporting.curves import curves, draw_curves
from iql_torchrl.reporting.run_folder import RunFolder
from iql_torchrl.running.stopwatch import Stopwatch


def steps(path):
    with open(path, newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def filled(path, count=5):
    run = RunFolder(path)
    for step in range(1, count + 1):
        run.log_metrics({"step": step, "seed": 0, "loss_value": 0.5 * step})
        run.log_evaluation({"step": step, "seed": 0, "episode_return_mean": 1.0, "normalized_score": None})
    return run


def test_rows_come_back_as_numbers_without_empty_cells(tmp_path):
    run = filled(tmp_path / "run", 2)
    assert run.metrics() == [{"step": 1, "seed": 0, "loss_value": 0.5}, {"step": 2, "seed": 0, "loss_value": 1.0}]
    assert run.evaluations()[0] == {"step": 1, "seed": 0, "episode_return_mean": 1.0}


def test_resuming_drops_the_rows_that_are_written_again(tmp_path):
    filled(tmp_path / "run")
    RunFolder(tmp_path / "run", resume_step=3)
    assert steps(tmp_path / "run" / "metrics.csv") == steps(tmp_path / "run" / "eval.csv") == [1, 2, 3]


def test_resuming_repairs_a_row_that_a_crash_left_unfinished(tmp_path):
    filled(tmp_path / "run")
    with open(tmp_path / "run" / "metrics.csv", "a") as file:
        file.write("6,0,0.2")
    run = RunFolder(tmp_path / "run", resume_step=6)
    run.log_metrics({"step": 6, "seed": 0})
    assert steps(tmp_path / "run" / "metrics.csv") == [1, 2, 3, 4, 5, 6]


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(tmp_path):
    filled(tmp_path / "run")
    with pytest.raises(ConfigurationError, match="holds a run already"):
        RunFolder(tmp_path / "run")
    assert steps(tmp_path / "run" / "metrics.csv") == [1, 2, 3, 4, 5]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"run_dir=.*file/run cannot be written"):
        RunFolder(tmp_path / "file" / "run")


def test_config_and_summary_are_written_whole_and_leave_no_temporary_files(tmp_path):
    run = filled(tmp_path / "run")
    run.write_config(OmegaConf.create({"a": {"b": 1}, "c": "${a.b}"}))
    run.write_summary({"final_score": 1.5})
    assert OmegaConf.load(tmp_path / "run" / "config.yaml") == {"a": {"b": 1}, "c": 1}
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"final_score": 1.5}
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"checkpoints", "metrics.csv", "eval.csv", "config.yaml", "summary.json"}


@pytest.mark.parametrize("count", [0, 5])
def test_curves_are_drawn_from_the_files_alone(tmp_path, count):
    run = filled(tmp_path / "run", count)
    path = draw_curves(run, title="a run", data_score=2.0)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(("has_likelihood", "unit"), [(True, "nats"), (False, "minus its squared error")])
def test_without_evaluations_the_fit_to_the_data_is_drawn_in_its_unit(tmp_path, has_likelihood, unit):
    run = RunFolder(tmp_path / "run")
    run.log_metrics({"step": 1, "seed": 0, "log_prob": -1.0})
    assert curves(run, title="a run", has_likelihood=has_likelihood).axes[0].get_ylabel() == unit


def test_the_stopwatch_adds_up_a_stage():
    clock = Stopwatch()
    for _ in range(2):
        with clock("stage"):
            pass
    assert list(clock.seconds) == ["stage"] and clock.seconds["stage"] >= 0


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, 0.0, 1e-300])
def test_curves_are_drawn_of_numbers_that_are_none_or_beyond_all_scales(value, tmp_path):
    run = filled(tmp_path / "run", 3)
    run.log_metrics(
        {"step": 4, "seed": 0, "loss_value": value, "loss_qvalue": value, "loss_actor": value, "value": value}
    )
    run.log_evaluation({"step": 4, "seed": 0, "episode_return_mean": value})
    assert draw_curves(run, title="a run").read_bytes().startswith(b"\x89PNG")


def test_a_summary_has_null_where_a_number_is_none(tmp_path):
    run = filled(tmp_path / "run", 1)
    run.write_summary({"a": math.nan, "b": [1.0, math.inf], "c": {"d": -math.inf}, "e": 2})
    text = (tmp_path / "run" / "summary.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found == {"a": None, "b": [1.0, None], "c": {"d": None}, "e": 2}


def test_what_a_killed_run_left_half_written_is_removed_by_the_next_one(tmp_path):
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    folders = (tmp_path / "run", tmp_path / "run" / "checkpoints", tmp_path / "run" / "checkpoints" / "seed-1")
    for folder in folders:
        folder.mkdir(exist_ok=True)
        (folder / f".step-00000010.pt.{finished.pid}.tmp").write_bytes(b"half")
        (folder / "mine.tmp").write_bytes(b"the user's")
    RunFolder(tmp_path / "run", resume_step=5)
    for folder in folders:
        assert not list(folder.glob(".*.tmp")) and (folder / "mine.tmp").exists()


def test_a_row_for_which_there_is_no_room_leaves_no_half_and_is_said_in_one_line(tmp_path):
    run = filled(tmp_path / "run", 2)
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, limits[1]))
    try:
        with pytest.raises(RunError, match=r"run cannot be written any more: .*resume=auto run_dir="):
            run.log_metrics({"step": 3, "seed": 0, "loss_value": 1.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before


def test_what_torch_makes_of_a_full_disk_is_said_as_such_and_its_other_errors_stay(tmp_path):
    run = filled(tmp_path / "run", 1)

    def save():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64") from None

    with pytest.raises(RunError, match="No space left on device"), run.writing():
        save()
    with pytest.raises(RuntimeError, match="shape"), run.writing():
        raise RuntimeError("shape")
