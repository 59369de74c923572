"""The recipes as a user runs them: real processes, real files."""

import json
import re
import signal
import subprocess

import h5py
import numpy as np
import pytest
import torch
from comparing import rows_without_times
from processes import SMALL, finish, refused, rows, run, start, wait_for_rows

from iql_torchrl import load_policy
from iql_torchrl.data.sources import embedded
from iql_torchrl.reporting.run_folder import EVAL_COLUMNS, METRICS_COLUMNS

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pendulum):
    """A finished run and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    out = run(
        "iql_offline.py",
        *SMALL,
        "dataset=hdf5",
        f"dataset.path={pendulum}",
        "env.name=Pendulum-v1",
        "train.steps=60",
        "checkpoint.keep=2",
        f"run_dir={folder / 'run'}",
        cwd=folder,
    )
    return folder / "run", out


def test_a_run_leaves_the_promised_files(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.yaml", "metrics.csv", "eval.csv", "checkpoints", "curves.png", "summary.json"}
    assert (folder / "curves.png").read_bytes().startswith(PNG)
    found = rows(folder / "eval.csv")
    best = max(found, key=lambda row: float(row["episode_return_mean"]))
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        f"best-step-{int(best['step']):08d}.pt",
        "step-00000040.pt",
        "step-00000060.pt",
    ]


def test_the_csv_files_have_a_row_for_every_interval(finished):
    folder, _ = finished
    metrics, evaluations = rows(folder / "metrics.csv"), rows(folder / "eval.csv")
    assert tuple(metrics[0]) == METRICS_COLUMNS and tuple(evaluations[0]) == EVAL_COLUMNS
    assert [int(row["step"]) for row in metrics] == [10, 20, 30, 40, 50, 60]
    assert [int(row["step"]) for row in evaluations] == [20, 40, 60]
    for key in ("loss_actor", "loss_qvalue", "loss_value", "entropy", "qvalue", "value", "updates_per_second"):
        assert all(np.isfinite(float(row[key])) for row in metrics)
    assert float(metrics[0]["learning_rate"]) > float(metrics[-1]["learning_rate"]) > 0
    assert all(float(row["episode_return_mean"]) < 0 and row["normalized_score"] == "" for row in evaluations)


def test_the_summary_and_the_closing_table_tell_the_same(finished):
    folder, out = finished
    summary = json.loads((folder / "summary.json").read_text())
    last = float(rows(folder / "eval.csv")[-1]["episode_return_mean"])
    assert summary["final_score"] == pytest.approx(last)
    assert summary["score"] == "return" and summary["steps"] == 60 and summary["environment"] == "Pendulum-v1"
    assert {"data", "train", "evaluate"} <= set(summary["seconds_by_stage"])
    assert summary["versions"]["torch"] == torch.__version__
    assert re.search(r"final_score\s+-\d+", out) and "curves.png" in out


def test_a_checkpoints_policy_loads_in_two_lines_and_acts_within_the_bounds(finished):
    policy = load_policy(finished[0] / "checkpoints" / "step-00000060.pt")
    action = policy(np.zeros((7, 3), dtype=np.float64))
    assert action.shape == (7, 1) and (np.abs(action) <= 2).all()
    assert torch.equal(policy(torch.zeros(3)), torch.from_numpy(action[0]))


def test_evaluate_repeats_an_evaluation_of_the_run(finished, tmp_path):
    checkpoint = finished[0] / "checkpoints" / "step-00000060.pt"
    out = run("evaluate.py", f"checkpoint={checkpoint}", "episodes=2", "seed=1000", cwd=tmp_path)
    expected = float(rows(finished[0] / "eval.csv")[-1]["episode_return_mean"])
    assert f"{expected:.1f} +-" in out and "Pendulum-v1" in out
    assert run("evaluate.py", f"checkpoint={finished[0]}", "episodes=2", "seed=1000", cwd=tmp_path) == out
    assert not list(tmp_path.iterdir())


def test_a_run_folder_is_never_overwritten(finished, pendulum, tmp_path):
    before = (finished[0] / "metrics.csv").read_bytes()
    options = (*SMALL, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=null", "train.steps=10")
    message = refused("iql_offline.py", *options, f"run_dir={finished[0]}", cwd=tmp_path)
    assert "holds a run already" in message and "resume=auto" in message
    assert (finished[0] / "metrics.csv").read_bytes() == before


def test_without_a_simulator_held_out_metrics_are_reported(pendulum, tmp_path):
    options = (*SMALL, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=null", "train.steps=40")
    run("iql_offline.py", *options, "run_dir=run", cwd=tmp_path)
    found = rows(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in found if row["validation_log_prob"]] == ["20", "40"]
    assert all(np.isfinite(float(found[-1][f"validation_{key}"])) for key in ("log_prob", "td_error", "advantage_mean"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["final_score"] is None and summary["validation_td_error"] > 0
    assert rows(tmp_path / "run" / "eval.csv") == []
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_equals_an_uninterrupted_one(name, pendulum, tmp_path):
    options = (*SMALL, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=Pendulum-v1", "eval.interval=500")
    options = (*options, "train.steps=1500", "checkpoint.interval=100000", "algorithm.dropout_rate=0.1")
    run("iql_offline.py", *options, "run_dir=straight", cwd=tmp_path)
    process = start("iql_offline.py", *options, "run_dir=stopped", cwd=tmp_path)
    wait_for_rows(tmp_path / "stopped" / "metrics.csv", 5)
    process.send_signal(name)
    code, out, error = finish(process)
    assert code == 128 + name, error
    assert f"{name.name}: saved" in out and "resume=auto" in out
    assert len(list((tmp_path / "stopped" / "checkpoints").glob("step-*.pt"))) == 1
    out = run("iql_offline.py", *options, "run_dir=stopped", "resume=auto", cwd=tmp_path)
    assert "resumed from" in out
    straight, stopped = (newest(tmp_path / folder) for folder in ("straight", "stopped"))
    assert_equal(straight["training"], stopped["training"])
    for file in ("metrics.csv", "eval.csv"):
        assert rows_without_times(tmp_path / "stopped" / file) == rows_without_times(tmp_path / "straight" / file)


def test_in_a_job_of_slurm_sigterm_saves_and_goes_on_and_submitits_signal_is_handed_on(pendulum, tmp_path, monkeypatch):
    options = (*SMALL, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=Pendulum-v1", "eval.interval=500")
    options = (*options, "train.steps=3000", "checkpoint.interval=100000")
    run("iql_offline.py", *options, "run_dir=straight", cwd=tmp_path)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    process, folder = start("iql_offline.py", *options, "run_dir=stopped", cwd=tmp_path), tmp_path / "stopped"
    wait_for_rows(folder / "metrics.csv", 5)
    process.send_signal(signal.SIGTERM)
    wait_for_rows(folder / "metrics.csv", len(rows(folder / "metrics.csv")) + 20)
    process.send_signal(signal.SIGUSR2)
    code, out, error = finish(process)
    assert "SIGTERM: saved" in out and "going on until killed" in out
    assert "SIGUSR2: saved" in out and len(list((folder / "checkpoints").glob("step-*.pt"))) == 2
    assert json.loads((folder / "summary.json").read_text())["interrupted"] == "SIGUSR2"
    assert code == -signal.SIGUSR2, error  # where submitit has not set its handler, which puts the job into the queue
    run("iql_offline.py", *options, "run_dir=stopped", "resume=auto", cwd=tmp_path)
    straight, stopped = (newest(tmp_path / name) for name in ("straight", "stopped"))
    assert_equal(straight["training"], stopped["training"])
    for file in ("metrics.csv", "eval.csv"):
        assert rows_without_times(folder / file) == rows_without_times(tmp_path / "straight" / file)


def test_after_a_kill_auto_resumes_from_the_newest_good_checkpoint(pendulum, tmp_path):
    options = (*SMALL, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=null", "train.steps=1000000")
    process = start("iql_offline.py", *options, "run_dir=run", cwd=tmp_path)
    wait_for_rows(tmp_path / "run" / "metrics.csv", 20)
    process.kill()
    finish(process)
    found = sorted((tmp_path / "run" / "checkpoints").glob("step-*.pt"))
    content = found[-1].read_bytes()
    found[-1].write_bytes(content[: len(content) // 2])
    step = int(found[-2].stem.split("-")[1])
    options = (
        *options[:-1],
        f"train.steps={step + 30}",
        "algorithm.opt_decay_schedule=null",
        "resume_with_changes=true",
    )
    out = run("iql_offline.py", *options, "run_dir=run", "resume=auto", cwd=tmp_path)
    assert f"renamed to {found[-1].name}.damaged" in out and f"at step {step}" in out
    steps = [int(row["step"]) for row in rows(tmp_path / "run" / "metrics.csv")]
    assert steps == list(range(10, step + 31, 10))


def test_behaviour_cloning_ignores_the_advantage(pendulum, tmp_path):
    options = (*SMALL, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=null", "train.steps=20")
    run("iql_offline.py", *options, "algorithm=behaviour_cloning", "run_dir=run", cwd=tmp_path)
    for row in rows(tmp_path / "run" / "metrics.csv"):
        assert float(row["loss_actor"]) == pytest.approx(float(row["entropy"]), rel=1e-5)
        assert float(row["effective_sample_size"]) == pytest.approx(1.0)


def test_the_torchrl_variant_with_normalised_observations_runs(pendulum, tmp_path):
    options = (*SMALL, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=Pendulum-v1", "train.steps=20")
    options = (*options, "algorithm.variant=torchrl", "algorithm.normalise_observations=true")
    run(
        "iql_offline.py",
        *options,
        "algorithm.layer_norm=true",
        "algorithm.delay_value=true",
        "run_dir=run",
        cwd=tmp_path,
    )
    policy = load_policy(tmp_path / "run" / "checkpoints" / "step-00000020.pt")
    assert policy.normaliser is not None and policy.normaliser.mean.shape == (3,)


def test_a_d4rl_dataset_is_fetched_once_and_evaluated_on_its_environment(tmp_path):
    file = tmp_path / "hopper.hdf5"
    file.write_bytes(embedded.PATH.read_bytes())
    options = (*SMALL, "dataset=d4rl", "dataset.name=hopper-medium-replay-v2", f"dataset.url={file.as_uri()}")
    options = (*options, f"dataset.root={tmp_path / 'cache'}", "train.steps=20")
    out = run("iql_offline.py", *options, "run_dir=first", cwd=tmp_path)
    title = "IQL on hopper-medium-replay-v2 (Hopper-v2 data in Hopper-v4)"
    assert f"{title}: 97,777 transitions" in out and "evaluated in Hopper-v4" in out
    file.unlink()
    run("iql_offline.py", *options, "run_dir=second", cwd=tmp_path)
    for folder in ("first", "second"):
        (row,) = rows(tmp_path / folder / "eval.csv")
        expected = 100 * (float(row["episode_return_mean"]) + 20.272305) / (3234.3 + 20.272305)
        assert float(row["normalized_score"]) == pytest.approx(expected)


@pytest.mark.slow
def test_a_run_is_the_same_wherever_its_data_lie(pendulum, tmp_path):
    options = (*SMALL, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=null", "train.steps=20")
    summaries, metrics = [], []
    for storage in ("device", "memory", "memmap"):
        folder = tmp_path / "files"
        places = (f"dataset.storage={storage}", f"dataset.storage_folder={folder}", f"run_dir={storage}")
        run("iql_offline.py", *options, "algorithm.normalise_observations=true", *places, cwd=tmp_path)
        summaries.append(json.loads((tmp_path / storage / "summary.json").read_text()))
        logged = rows(tmp_path / storage / "metrics.csv")
        metrics.append([{key: row[key] for key in row if key != "updates_per_second"} for row in logged])
    assert metrics[0] == metrics[1] == metrics[2] and len(metrics[0]) == 2
    assert len({summary["dataset_fingerprint"] for summary in summaries}) == 1
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_the_storage_benchmark_reports_every_storage(tmp_path):
    options = ("transitions=200000", "hidden_dims=[16,16]", "compile=false", "rounds=2", "steps_per_round=4")
    run("benchmark_storage.py", *options, "warm_up=2", "observation_dim=64", f"folder={tmp_path}", cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark_storage.json"]
    memory, memmap = json.loads((tmp_path / "benchmark_storage.json").read_text())["rows"]
    assert (memory["storage"], memmap["storage"]) == ("memory", "memmap")
    size = 199_800 * (2 * 64 * 4 + 6 * 4 + 4 + 3 + 8) / 1e9
    for row in (memory, memmap):
        assert row["transitions"] == 199_800 and row["data_gigabytes"] == pytest.approx(size)
        assert row["milliseconds_per_sample"] > 0 and row["sampling_share"] > 0
    assert memory["anonymous_gigabytes_while_loading"] > 0.9 * size > 0.5 * size
    assert memmap["anonymous_gigabytes_while_loading"] < 0.7 * size


def nan_in(source, target):
    copy_with(source, target, observations=lambda array: array.__setitem__((17, 1), np.nan))


def copy_with(source, target, **changes):
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        for key in old:
            array = old[key][()]
            if key in changes:
                changes[key](array)
            new[key] = array


def test_bad_data_is_refused_and_leaves_nothing_behind(pendulum, tmp_path):
    nan_in(pendulum, tmp_path / "nan.hdf5")
    copy_with(pendulum, tmp_path / "wide.hdf5", actions=lambda array: array.__imul__(3))
    (tmp_path / "text.hdf5").write_text("not HDF5")
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, expected in (
        ((f"dataset.path={tmp_path}/none.hdf5",), "does not exist"),
        ((f"dataset.path={tmp_path}/text.hdf5",), "cannot be opened as HDF5"),
        ((f"dataset.path={tmp_path}/nan.hdf5",), "observations holds nan in row 17"),
        ((f"dataset.path={tmp_path}/wide.hdf5", "env.name=Pendulum-v1"), "lies outside the action space"),
        ((f"dataset.path={pendulum}", "env.name=Hopper-v5"), "observations of size 11 but the data's have 3"),
        ((f"dataset.path={pendulum}", "env.name=Pendulum-v9"), "unknown environment"),
        ((f"dataset.path={pendulum}", "env.name=null", "algorithm.batch_size=100000"), "algorithm.batch_size"),
        ((f"dataset.path={pendulum}", "env.name=null", "train.device=cuda:9"), "device cuda:9"),
        (("dataset.path=null",), "dataset.path must be"),
        (("dataset.path=123",), "dataset.path must be"),
        ((f"dataset.path={pendulum}", "dataset.storage=disk"), "dataset.storage must be one of"),
        (
            (f"dataset.path={pendulum}", "env.name=Pendulum-v1", "env.kwargs={max_episode_steps:-1}"),
            "env.kwargs must be",
        ),
    ):
        message = refused("iql_offline.py", "dataset=hdf5", *arguments, "run_dir=run", cwd=tmp_path)
        assert expected in message
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_unreachable_host_is_named(tmp_path):
    options = ("dataset=d4rl", "dataset.name=hopper-medium-v2", "dataset.url=http://127.0.0.1:9/hopper.hdf5")
    message = refused("iql_offline.py", *options, f"dataset.root={tmp_path / 'cache'}", "run_dir=run", cwd=tmp_path)
    assert "127.0.0.1:9" in message and "dataset.url=file:///" in message
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".hopper-medium-v2.lock"]


@pytest.mark.slow
def test_a_run_with_lists_among_its_environments_arguments_is_resumed_and_evaluated(tmp_path):
    options = (*SMALL, "env.kwargs={healthy_state_range:[-100.0,100.0],max_episode_steps:20}", "run_dir=run")
    run("iql_offline.py", *options, "train.steps=20", cwd=tmp_path)
    out = run("iql_offline.py", *options, "train.steps=40", "resume=auto", cwd=tmp_path)
    assert "resumed from" in out and not list(tmp_path.rglob("*.damaged"))
    out = run("evaluate.py", "checkpoint=run/checkpoints/step-00000040.pt", "episodes=2", cwd=tmp_path)
    assert float(re.search(r"episode length\s+([\d.]+)", out)[1]) <= 20


def test_bad_checkpoints_are_refused(finished, pendulum, tmp_path):
    good = finished[0] / "checkpoints" / "step-00000060.pt"
    (tmp_path / "half.pt").write_bytes(good.read_bytes()[:5000])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    torch.save({"run": subprocess.Popen}, tmp_path / "code.pt")
    for name, expected in (
        ("none.pt", "is not a file"),
        ("half.pt", "truncated"),
        ("foreign.pt", "no checkpoint of iql_torchrl"),
        ("code.pt", "could execute code"),
    ):
        assert expected in refused("evaluate.py", f"checkpoint={tmp_path / name}", cwd=tmp_path)
    options = (*SMALL, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=Pendulum-v1", f"resume={good}")
    message = refused("iql_offline.py", *options, "algorithm.hidden_dims=[8]", "run_dir=run", cwd=tmp_path)
    assert "hidden_dims is [16, 16] there and [8] here" in message
    message = refused("iql_offline.py", *options, "train.steps=30", "run_dir=run", cwd=tmp_path)
    assert "beyond train.steps=30" in message
    other = (*SMALL, f"resume={good}", "dataset=hdf5", f"dataset.path={tmp_path}/other.hdf5", "env.name=Pendulum-v1")
    copy_with(pendulum, tmp_path / "other.hdf5", rewards=lambda array: array.__iadd__(1))
    assert "trained on other data" in refused("iql_offline.py", *other, "run_dir=run", cwd=tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_multirun_has_a_folder_a_job(pendulum, tmp_path):
    options = (*SMALL, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=null", "train.steps=10")
    run("iql_offline.py", "-m", *options, "train.seed=3,5", "run_dir=sweep", cwd=tmp_path)
    for job, seed in (("0", 3), ("1", 5)):
        assert json.loads((tmp_path / "sweep" / job / "summary.json").read_text())["seed"] == seed


@pytest.mark.slow
def test_other_recipes_take_hydras_multirun_too(tmp_path):
    options = ("hidden_dims=[8,8]", "transitions=300", "steps_per_round=1", "warm_up=1", "compile=false")
    out = run("benchmark.py", "-m", "rounds=1,2", *options, cwd=tmp_path)
    assert out.count("wrote benchmark.json") == 2


@pytest.mark.slow
def test_the_main_job_beats_the_data_within_few_updates(tmp_path):
    out = run("iql_offline.py", "train.steps=300", "eval.interval=150", "eval.episodes=2", "run_dir=run", cwd=tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["compiled"] and summary["environment"] == "Hopper-v5" and summary["transitions"] == 97777
    assert "normalised score" in out and summary["data_score"] == pytest.approx(12.68, abs=0.01)


@pytest.mark.slow
def test_the_benchmark_reports_every_row(tmp_path):
    options = ("rounds=2", "steps_per_round=4", "warm_up=2", "hidden_dims=[16,16]", "transitions=2000", "seeds=2")
    options += ("updates_per_call=2",)
    out = run("benchmark.py", *options, cwd=tmp_path)
    report = json.loads((tmp_path / "benchmark.json").read_text())
    found = {(row["implementation"], row["mode"]) for row in report["rows"]}
    ours = {(f"iql_torchrl, {order}", mode) for order in ("joint", "paper") for mode in ("eager", "compiled")}
    several = {("iql_torchrl, paper, 2 a call", "compiled"), ("iql_torchrl, paper, 2 seeds, 2 a call", "compiled")}
    theirs = {("TorchRL recipe", mode) for mode in ("eager", "compiled")}
    limit = {("matrix products alone", order) for order in ("joint", "paper")}
    assert found == theirs | ours | several | limit
    for row in report["rows"]:
        low, high = row["milliseconds_quartiles"]
        assert 0 < low <= row["milliseconds_median"] <= high
        assert row["updates_per_second"] == pytest.approx(1e3 / row["milliseconds_median"])
        assert (row.get("products") in ("mkl", "onednn")) == row["implementation"].startswith("iql_torchrl")
    assert report["threads"] >= 1 and "TorchRL recipe" in out
    assert report["large_product_flops_per_second"] > 1e8
    assert (tmp_path / "benchmark.png").read_bytes().startswith(PNG)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
def test_the_benchmark_takes_other_precisions(tmp_path, precision):
    options = ("rounds=1", "steps_per_round=1", "warm_up=1", "hidden_dims=[8,8]", "transitions=300", "output=b.json")
    run("benchmark.py", f"precision={precision}", "compile=false", *options, cwd=tmp_path)
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["config"]["precision"] == precision
    assert {row["mode"] for row in report["rows"]} == {"eager", "joint", "paper"}


def newest(folder):
    path = max((folder / "checkpoints").glob("step-*.pt"))
    return torch.load(path, weights_only=True)


def assert_equal(expected, found, where=""):
    assert type(expected) is type(found), where
    if isinstance(expected, dict):
        assert expected.keys() == found.keys(), where
        for key in expected:
            assert_equal(expected[key], found[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            assert_equal(one, other, f"{where}[{index}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(expected, found), where
    else:
        assert expected == found, where
