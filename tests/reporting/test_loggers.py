"""What wandb and TensorBoard have of a run, read back from the files that they write."""

import json
import math
import re
import shutil
import time

import pytest
import wandb_files
from problems import write_pendulum
from processes import SMALL, rows, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from iql_torchrl.configuration.options import LoggerOptions
from iql_torchrl.reporting.loggers import make_logger

pytestmark = pytest.mark.slow

NOISE = {"step", "seed", "phase"}
# Columns that are times differ from one reading of the clock to the next, and are compared all the same: it is one row.
FIRST = {"train": "metrics.csv", "eval": "eval.csv"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run by its logger and number of seeds, each made once."""
    folder = tmp_path_factory.mktemp("logged")
    log = write_pendulum(folder / "pendulum.hdf5")

    def of(kind, *more):
        path = folder / re.sub(r"\W", "-", "-".join((kind, *more)))
        if not path.exists():
            options = (*SMALL, "dataset=hdf5", f"dataset.path={log}", "env.name=Pendulum-v1", "train.steps=40", *more)
            run("iql_offline.py", *options, f"logger={kind}", f"run_dir={path}", cwd=folder)
        return path

    return of


def logged(folder, seed=None):
    """What a logger is to have: by name, the steps and numbers of the CSV files."""
    found = {}
    for kind, file in FIRST.items():
        for row in rows(folder / file):
            if seed is not None and int(row["seed"]) != seed:
                continue
            prefix = kind if seed is None else f"seed-{seed}/{kind}"
            for key, value in row.items():
                if value != "" and key not in NOISE:
                    found.setdefault(f"{prefix}/{key}", []).append((int(row["step"]), float(value)))
    return found


def same(found, expected, rel):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in values], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in values], rel=rel), name


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def wandb_file(folder):
    (found,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    return found


def events_of(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def hyperparameters(events):
    content = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    found = content.session_start_info.hparams
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in found.items()}


# ---------------------------------------------------------------------- TensorBoard


def test_tensorboard_has_every_number_of_the_rows_and_neither_seed_nor_step(trained):
    folder = trained("tensorboard")
    events = events_of(folder)
    tags = [tag for tag in events.Tags()["scalars"] if "/" in tag]
    assert not {tag.rpartition("/")[2] for tag in events.Tags()["scalars"]} & NOISE
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    same(found, logged(folder), rel=1e-6)


def test_tensorboard_has_the_final_score_and_the_options_beside_it_in_the_run_of_the_rows(trained):
    folder = trained("tensorboard")
    events, summary = events_of(folder), summary_of(folder)
    for key in ("final_score", "best_score", "steps_per_second"):
        (event,) = events.Scalars(key)
        assert event.step == 40 and event.value == pytest.approx(summary[key], rel=1e-6)
    options = hyperparameters(events)
    assert options["algorithm.expectile"] == pytest.approx(0.7) and options["algorithm.hidden_dims"] == "[16,16]"
    assert options["train.compile"] == "false" and options["env.name"] == "Pendulum-v1" and options["resume"] == "null"
    content = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/experiment"])
    assert "final_score" in {metric.name.tag for metric in content.experiment.metric_infos}
    assert [path for path in (folder / "tensorboard").iterdir() if path.is_dir()] == []


def test_without_a_simulator_tensorboard_has_what_is_held_out_as_metric(trained):
    folder = trained("tensorboard", "env.name=null")
    events, summary = events_of(folder), summary_of(folder)
    assert "final_score" not in events.Tags()["scalars"]
    assert events.Scalars("validation_td_error")[0].value == pytest.approx(summary["validation_td_error"], rel=1e-6)


# ---------------------------------------------------------------------- wandb


def test_wandb_has_every_number_of_the_rows_at_its_update_and_neither_seed_nor_step(trained):
    for seeds in ((None,), (0, 1)):
        folder = trained("wandb", *(["train.num_seeds=2"] if len(seeds) > 1 else []))
        found = {}
        for row in wandb_files.history(wandb_file(folder)):
            for name, value in row.items():
                if not name.startswith(("_", "curves.")):
                    found.setdefault(name, []).append((row["_step"], value))
        assert not {name.rpartition("/")[2] for name in found} & NOISE
        same(found, {name: values for seed in seeds for name, values in logged(folder, seed).items()}, rel=1e-12)


def test_wandb_has_the_configuration_the_summary_and_the_picture(trained):
    folder = trained("wandb", "train.num_seeds=2")
    file, summary = wandb_file(folder), summary_of(folder)
    found, config = wandb_files.summary(file), wandb_files.config(file)
    assert config["algorithm"]["expectile"] == 0.7 and config["train"]["num_seeds"] == 2
    for key in ("final_score", "best_score", "steps_per_second", "standard_deviation", "interval_note", "environment"):
        assert found[key] == summary[key], key
    assert found["final_scores/1"] == summary["final_scores"]["1"]
    assert [found["mean_interval/low"], found["mean_interval/high"]] == summary["mean_interval"]
    assert found["seconds_by_stage/train"] > 0 and found["findings"] == "none"
    picture = file.parent / "files" / found["curves.path"]
    assert picture.read_bytes() == (folder / "curves.png").read_bytes()


def test_wandb_has_the_names_of_the_findings(trained):
    folder = trained("wandb", "algorithm.discount=0.5")  # a horizon of two in episodes of two hundred
    names = [finding["name"] for finding in summary_of(folder)["findings"]]
    assert names and wandb_files.summary(wandb_file(folder))["findings"] == ", ".join(names)


# ---------------------------------------------------------------------- failures


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_logger_that_fails_at_the_end_is_one_line_and_stops_nothing(kind, tmp_path):
    lines = []
    logger = make_logger(LoggerOptions(kind=kind), tmp_path, {"train": {"seed": 0}}, lines.append)
    logger.log_metrics({"train/loss": 1.0}, step=1)
    if kind == "tensorboard":
        wait_for(lambda: "train/loss" in events_of(tmp_path).Tags()["scalars"])
        shutil.rmtree(tmp_path / "tensorboard")
        (tmp_path / "tensorboard").write_text("")
    summary = {"steps": 2, "final_score": math.nan, "findings": []}
    logger.log_outcome({"train": {"seed": 0}}, summary, tmp_path / "absent.png")
    name = {"tensorboard": "TensorboardLogger", "wandb": "WandbLogger"}[kind]
    (line,) = lines
    assert line.startswith(f"warning: {name} failed (") and line.endswith("the run goes on without it")
    assert "\n" not in line
    logger.log_metrics({"train/loss": 2.0}, step=2)
    logger.close()
    assert lines == [line]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_rows_that_tensorboard_could_not_write_are_told_when_it_is_closed(tmp_path):
    lines = []
    logger = make_logger(LoggerOptions(kind="tensorboard"), tmp_path, {}, lines.append)
    wait_for(lambda: any(path.stat().st_size for path in (tmp_path / "tensorboard").iterdir()))
    shutil.rmtree(tmp_path / "tensorboard")
    logger.log_metrics({"train/loss": 1.0}, step=1)
    logger.close()
    (line,) = lines
    assert line.startswith("warning: TensorboardLogger failed (") and "No such file" in line


def wait_for(condition, timeout=20):
    limit = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)
