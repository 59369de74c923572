"""Several seeds at once as a user trains them: real processes, real files."""

import json
import shutil
import signal

import pytest
import torch
from comparing import rows_without_times
from processes import SMALL, finish, refused, rows, run, start, wait_for_rows

from iql_torchrl import load_policy
from iql_torchrl.errors import CheckpointError
from iql_torchrl.reporting.statistics import score_statistics
from iql_torchrl.training.checkpoints import checkpoint_folders, find_checkpoints

pytestmark = pytest.mark.slow

SEEDS = (5, 6, 7)


def options_of(pendulum, *more, seed=SEEDS[0]):
    data = ("dataset=hdf5", f"dataset.path={pendulum}", "env.name=Pendulum-v1")
    return (*SMALL, *data, "algorithm.dropout_rate=0.1", f"train.seed={seed}", *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pendulum):
    """The folder of a finished run of three seeds, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    options = options_of(pendulum, "train.num_seeds=3", "train.steps=60", "run_dir=run")
    return folder / "run", run("iql_offline.py", *options, cwd=folder)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy to go on from."""
    return shutil.copytree(finished[0], tmp_path / "run")


def training(path):
    return torch.load(path, weights_only=True)["training"]


def without_times(path, seed=None):
    return [row for row in rows_without_times(path) if seed is None or int(row["seed"]) == seed]


def assert_equal(expected, found, where=""):
    if isinstance(expected, dict):
        assert expected.keys() == found.keys(), where
        for key in expected:
            assert_equal(expected[key], found[key], f"{where}.{key}")
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=lambda message: f"{where}: {message}")
    else:
        assert expected == found, where


def test_every_seed_has_its_rows_and_its_checkpoints(finished):
    folder, _ = finished
    metrics, evaluations = rows(folder / "metrics.csv"), rows(folder / "eval.csv")
    for found, steps in ((metrics, range(10, 61, 10)), (evaluations, range(20, 61, 20))):
        assert [(int(row["step"]), int(row["seed"])) for row in found] == [
            (step, seed) for step in steps for seed in SEEDS
        ]
    for key in ("loss_actor", "loss_qvalue", "loss_value", "entropy", "qvalue", "value", "log_prob"):
        assert len({row[key] for row in metrics[:3]}) == 3, key
    checkpoints = folder / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"seed-{seed}" for seed in SEEDS]
    for seed in SEEDS:
        best, *names = sorted(path.name for path in (checkpoints / f"seed-{seed}").iterdir())
        assert best.startswith("best-step-") and names == ["step-00000020.pt", "step-00000040.pt", "step-00000060.pt"]


def test_every_seeds_policy_loads_and_acts_in_its_own_way(finished):
    observations = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    checkpoints = finished[0] / "checkpoints"
    actions = [load_policy(checkpoints / f"seed-{seed}" / "step-00000060.pt")(observations) for seed in SEEDS]
    assert all(action.shape == (20, 1) and bool((action.abs() <= 2).all()) for action in actions)
    assert not torch.allclose(actions[0], actions[1]) and not torch.allclose(actions[1], actions[2])


def test_evaluate_repeats_every_seeds_last_evaluation(finished, tmp_path):
    for row in rows(finished[0] / "eval.csv")[-3:]:
        seed = int(row["seed"])
        checkpoint = finished[0] / "checkpoints" / f"seed-{seed}" / "step-00000060.pt"
        options = (f"checkpoint={checkpoint}", "episodes=2", f"seed={1000 * (seed + 1)}")
        out = run("evaluate.py", *options, cwd=tmp_path)
        assert f"{float(row['episode_return_mean']):.1f} +-" in out


def test_every_seed_is_the_run_of_it_alone(finished, pendulum, tmp_path):
    options = options_of(pendulum, "train.steps=60", "run_dir=alone", seed=",".join(str(seed) for seed in SEEDS))
    run("iql_offline.py", "-m", *options, cwd=tmp_path)
    for job, seed in enumerate(SEEDS):
        alone = tmp_path / "alone" / str(job)
        for file in ("metrics.csv", "eval.csv"):
            expected, found = without_times(alone / file), without_times(finished[0] / file, seed)
            assert len(found) == len(expected) > 0
            for one, other in zip(expected, found, strict=True):
                assert one == other
        paths = alone / "checkpoints", finished[0] / "checkpoints" / f"seed-{seed}"
        expected, found = (torch.load(path / "step-00000060.pt", weights_only=True) for path in paths)
        assert_equal(expected["training"], found["training"])
        assert_equal(expected["random"]["torch_cpu"], found["random"]["torch_cpu"])


def test_the_summary_tells_the_scores_of_all_seeds_and_their_statistics(finished):
    folder, out = finished
    summary = json.loads((folder / "summary.json").read_text())
    last = {row["seed"]: float(row["episode_return_mean"]) for row in rows(folder / "eval.csv")[-3:]}
    assert summary["final_scores"] == pytest.approx(last)
    assert summary["final_score"] == pytest.approx(summary["mean"]) == pytest.approx(sum(last.values()) / 3)
    for name, value in score_statistics(list(last.values())).items():
        assert summary[name] == (value if isinstance(value, str) else pytest.approx(value))
    assert summary["seed"] == 5 and summary["num_seeds"] == 3 and summary["steps"] == 60
    by_step = {}
    for row in rows(folder / "eval.csv"):
        by_step.setdefault(int(row["step"]), []).append(float(row["episode_return_mean"]))
    best = max(by_step, key=lambda step: sum(by_step[step]))
    assert summary["best_step"] == best and summary["best_score"] == pytest.approx(sum(by_step[best]) / 3)
    own = {str(seed): [row for row in rows(folder / "eval.csv") if row["seed"] == str(seed)] for seed in SEEDS}
    for seed, of_seed in own.items():
        highest = max(of_seed, key=lambda row: float(row["episode_return_mean"]))
        assert summary["best_scores"][seed] == pytest.approx(float(highest["episode_return_mean"]))
        assert summary["best_steps"][seed] == int(highest["step"])
        shown = [seed, *(f"{summary[key][seed]:,.1f}" for key in ("final_scores", "best_scores")), highest["step"]]
        assert shown in [line.split() for line in out.splitlines()]
    assert "interquartile mean" in out and "A 95% interval over three seeds is not one" in out


def test_several_updates_a_call_write_the_same_numbers(finished, pendulum, tmp_path):
    options = options_of(pendulum, "train.num_seeds=3", "train.steps=60", "train.updates_per_call=5", "run_dir=run")
    run("iql_offline.py", *options, cwd=tmp_path)
    for file in ("metrics.csv", "eval.csv"):
        # But for the means, which are over the losses that the calls return.
        found, expected = (without_times(folder / file) for folder in (tmp_path / "run", finished[0]))
        for row in (*found, *expected):
            for key in [key for key in row if key.endswith("_mean") and key.startswith(("loss", "entropy"))]:
                del row[key]
        assert found == expected
    for seed in SEEDS:
        file = f"checkpoints/seed-{seed}/step-00000060.pt"
        assert_equal(training(finished[0] / file), training(tmp_path / "run" / file))


def test_steps_that_are_no_multiple_of_the_updates_of_a_call_are_refused(pendulum, tmp_path):
    options = options_of(pendulum, "train.steps=62", "train.updates_per_call=5", "run_dir=run")
    message = refused("iql_offline.py", *options, cwd=tmp_path)
    assert "train.steps must be a multiple of train.updates_per_call=5, got 62" in message
    assert not list(tmp_path.iterdir())


def test_a_signal_saves_every_seed_and_the_resumed_run_equals_an_uninterrupted_one(pendulum, tmp_path):
    more = ("train.num_seeds=3", "train.steps=1000", "train.updates_per_call=2", "checkpoint.interval=100000")
    options = options_of(pendulum, *more, "eval.interval=500")
    run("iql_offline.py", *options, "run_dir=straight", cwd=tmp_path)
    process = start("iql_offline.py", *options, "run_dir=stopped", cwd=tmp_path)
    wait_for_rows(tmp_path / "stopped" / "metrics.csv", 9)
    process.send_signal(signal.SIGTERM)
    code, out, error = finish(process)
    assert code == 128 + signal.SIGTERM, error
    assert "SIGTERM: saved" in out and "resume=auto" in out
    saved = [sorted((tmp_path / "stopped" / "checkpoints" / f"seed-{seed}").glob("step-*.pt")) for seed in SEEDS]
    assert [len(paths) for paths in saved] == [1, 1, 1]
    assert saved[0][0].name == saved[1][0].name == saved[2][0].name < "step-00001000.pt"
    out = run("iql_offline.py", *options, "run_dir=stopped", "resume=auto", cwd=tmp_path)
    assert out.count("resumed from") == 3
    for file in ("metrics.csv", "eval.csv"):
        assert without_times(tmp_path / "stopped" / file) == without_times(tmp_path / "straight" / file)
    for seed in SEEDS:
        file = f"checkpoints/seed-{seed}/step-00001000.pt"
        assert_equal(training(tmp_path / "straight" / file), training(tmp_path / "stopped" / file))


def test_a_damaged_file_of_one_seed_takes_all_back_to_the_step_before(finished, copied, pendulum, tmp_path):
    damaged = copied / "checkpoints" / "seed-6" / "step-00000060.pt"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    options = options_of(pendulum, "train.num_seeds=3", "train.steps=60", f"run_dir={copied}", "resume=auto")
    out = run("iql_offline.py", *options, cwd=tmp_path)
    assert out.count("step-00000040.pt at step 40") == 3
    assert "step-00000060.pt.damaged" in out and "truncated" in out
    for file in ("metrics.csv", "eval.csv"):
        assert without_times(copied / file) == without_times(finished[0] / file)
    for seed in SEEDS:
        file = f"checkpoints/seed-{seed}/step-00000060.pt"
        assert_equal(training(finished[0] / file), training(copied / file))


def test_a_step_that_a_crash_saved_for_some_seeds_only_is_not_resumed(copied):
    (copied / "checkpoints" / "seed-7" / "step-00000060.pt").unlink()
    folders = checkpoint_folders(copied, SEEDS)
    found = find_checkpoints("auto", folders)
    assert [path for path, _ in found] == [folder / "step-00000040.pt" for folder in folders]
    assert [checkpoint["step"] for _, checkpoint in found] == [40, 40, 40]


def test_where_no_step_can_be_read_for_all_seeds_that_is_said(copied):
    for path in (copied / "checkpoints" / "seed-7").iterdir():
        path.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="can be read"):
        find_checkpoints("auto", checkpoint_folders(copied, SEEDS))


def test_another_number_of_seeds_is_refused_on_resuming(copied, pendulum, tmp_path):
    before = (copied / "metrics.csv").read_bytes()
    options = options_of(pendulum, "train.num_seeds=2", "train.steps=60", f"run_dir={copied}", "resume=auto")
    message = refused("iql_offline.py", *options, cwd=tmp_path)
    assert "train.num_seeds 3 -> 2" in message and "resume_with_changes=true" in message
    message = refused("iql_offline.py", *options, "resume_with_changes=true", cwd=tmp_path)
    assert "holds seed-5, seed-6, seed-7" in message and "train.num_seeds" in message
    assert (copied / "metrics.csv").read_bytes() == before
    for seeds in ((5,), (5, 6), (5, 6, 7, 8), (6, 7, 8)):
        with pytest.raises(CheckpointError, match=r"holds seed-5, seed-6, seed-7; continue it with the train\.seed"):
            checkpoint_folders(copied, seeds)
    alone = tmp_path / "alone" / "checkpoints"
    alone.mkdir(parents=True)
    shutil.copy(copied / "checkpoints" / "seed-5" / "step-00000060.pt", alone)
    with pytest.raises(CheckpointError, match="holds a run of one seed"):
        checkpoint_folders(alone.parent, SEEDS)
    assert checkpoint_folders(alone.parent, (5,)) == [alone]


def test_a_file_cannot_be_resumed_for_several_seeds(copied):
    file = str(copied / "checkpoints" / "seed-5" / "step-00000060.pt")
    with pytest.raises(CheckpointError, match="several are continued with resume=auto"):
        find_checkpoints(file, checkpoint_folders(copied, SEEDS))


def test_a_checkpoint_of_one_of_several_seeds_is_continued_by_itself(finished, pendulum, tmp_path):
    file = finished[0] / "checkpoints" / "seed-6" / "step-00000040.pt"
    options = options_of(pendulum, "train.steps=60", f"resume={file}", "run_dir=run", seed=6)
    out = run("iql_offline.py", *options, cwd=tmp_path)
    assert "at step 40" in out
    paths = finished[0] / "checkpoints" / "seed-6", tmp_path / "run" / "checkpoints"
    expected, found = (torch.load(path / "step-00000060.pt", weights_only=True) for path in paths)
    assert_equal(expected["training"], found["training"])
    assert_equal(expected["random"]["torch_cpu"], found["random"]["torch_cpu"])
