"""What happens to a run that diverges, is interrupted, or goes on: as a user sees it."""

import json
import signal

import pytest
from processes import SMALL, finish, refused, rows, run, start, wait_for_rows

PNG = b"\x89PNG"


@pytest.fixture
def options(pendulum):
    return (*SMALL, "dataset=hdf5", f"dataset.path={pendulum}", "env.name=null", "train.steps=60")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["algorithm.critic_lr=1e10"], ["loss_qvalue is nan", "algorithm.critic_lr (now 1e+10)"]),
        (["algorithm.actor_lr=1e30"], ["loss_actor is nan", "algorithm.actor_lr (now 1e+30)"]),
        (
            ["algorithm.value_lr=1e25", "train.num_seeds=2"],
            ["seed 0 diverged", "seed 1 diverged", "algorithm.value_lr"],
        ),
    ],
)
def test_a_run_that_diverges_ends_with_status_3_and_says_what_to_try(options, changes, words, tmp_path):
    code, out, error = finish(start("iql_offline.py", *options, *changes, "run_dir=run", cwd=tmp_path))
    assert code == 3 and "Traceback" not in error, error
    for word in (*words, "Batch and state are in"):
        assert word in out, word
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert summary["diverged"] and summary["steps"] < 60
    assert not list((tmp_path / "run" / "checkpoints").rglob("step-*.pt"))
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(PNG)


@pytest.mark.slow
@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_has_curves_and_a_summary_that_say_so(options, name, tmp_path):
    process = start("iql_offline.py", *options, "train.steps=100000", "run_dir=run", cwd=tmp_path)
    wait_for_rows(tmp_path / "run" / "metrics.csv", 3)
    process.send_signal(name)
    code, _, error = finish(process)
    assert code == 128 + name, error
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["interrupted"] == name.name and summary["steps"] < 100000
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_a_run_goes_on_with_the_command_that_it_printed(options, tmp_path):
    process = start(
        "iql_offline.py",
        *options,
        "train.steps=100000",
        "algorithm.opt_decay_schedule=null",
        "run_dir=run",
        cwd=tmp_path,
    )
    wait_for_rows(tmp_path / "run" / "metrics.csv", 3)
    process.send_signal(signal.SIGTERM)
    _, out, _ = finish(process)
    (line,) = (line for line in out.splitlines() if "continue with" in line)
    command = line.split("continue with ")[1].split()
    step = int(rows(tmp_path / "run" / "metrics.csv")[-1]["step"])
    out = run("iql_offline.py", *command, f"train.steps={step + 40}", cwd=tmp_path)
    assert f"resumed with changes: train.steps 100000 -> {step + 40}" in out and "pendulum.hdf5" in out
    assert int(rows(tmp_path / "run" / "metrics.csv")[-1]["step"]) == step + 40
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["interrupted"] is None
    message = refused("iql_offline.py", *command, "algorithm.expectile=0.9", cwd=tmp_path)
    assert "algorithm.expectile 0.7 -> 0.9" in message and "resume_with_changes=true" in message
    out = run(
        "iql_offline.py",
        f"resume={tmp_path / 'run'}",
        f"train.steps={step + 60}",
        "algorithm.expectile=0.9",
        "resume_with_changes=true",
        cwd=tmp_path,
    )
    assert "algorithm.expectile 0.7 -> 0.9" in out
    assert int(rows(tmp_path / "run" / "metrics.csv")[-1]["step"]) == step + 60


@pytest.mark.slow
def test_other_data_are_refused_unless_asked_for(options, pendulum, tmp_path):
    run("iql_offline.py", *options, "run_dir=run", cwd=tmp_path)
    other = tmp_path / "other.hdf5"
    other.write_bytes(pendulum.read_bytes())
    changed = (f"dataset.path={other}", "dataset.keep_timeouts=true", "run_dir=run", "train.steps=80")
    assert "resume_with_changes=true" in refused("iql_offline.py", *changed, "resume=auto", cwd=tmp_path)
    run("iql_offline.py", *changed, "resume=auto", "resume_with_changes=true", cwd=tmp_path)
    assert int(rows(tmp_path / "run" / "metrics.csv")[-1]["step"]) == 80


@pytest.mark.slow
def test_compiling_is_said_and_the_bar_starts_after_it(options, tmp_path):
    compiled = [option for option in options if option != "train.compile=false"]
    process = start("iql_offline.py", *compiled, "train.compile=true", "run_dir=run", cwd=tmp_path)
    code, out, error = finish(process)
    assert code == 0, error
    assert "compiling the training step" in out
    first = next(part for part in error.split("\r") if "/60" in part)
    assert "| 1/60 [00:00<" in first, first
