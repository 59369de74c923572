"""The loop of a run: rows, means, divergence of one seed or all, interruption."""

from __future__ import annotations

import json
import math

import pytest
import torch
from comparing import same
from problems import random_transitions
from processes import rows

from iql_torchrl.configuration.composing import compose, initialised
from iql_torchrl.data.preparation import prepare_data
from iql_torchrl.data.sources.replay_buffer import ReplayBufferContent
from iql_torchrl.errors import CheckpointError, DivergenceError
from iql_torchrl.running import run as running
from iql_torchrl.running.options import OfflineOptions
from iql_torchrl.running.run import Run
from iql_torchrl.training.checkpoints import checkpoint_folders, find_checkpoints
from iql_torchrl.training.construction import build_step

SMALL = ["algorithm.hidden_dims=[16,16]", "algorithm.batch_size=32", "train.compile=false", "env.name=null"]
INTERVALS = ["train.log_interval=5", "eval.interval=100", "checkpoint.interval=10"]


def run_of(folder, *overrides, steps=40, resume=False, quiet=True):
    source = ReplayBufferContent(buffer=random_transitions(), validation_fraction=0)
    chosen = [*SMALL, *INTERVALS, f"train.steps={steps}", f"resume={'auto' if resume else 'null'}", *overrides]
    with initialised():
        options = compose("iql_offline", ["~dataset", *chosen], OfflineOptions, dataset=source)
    resumed = None
    if folder is not None:
        resumed = find_checkpoints(options.resume, checkpoint_folders(folder, options.train.seeds))
    data = prepare_data(source, options.algorithm, options.env)
    step = build_step(options.algorithm, options.train, data, torch.device("cpu"), resumed)
    return Run(step, data, options, folder, resumed=resumed, quiet=quiet)


def drive(run, after=lambda run: None):
    for losses in run.updates():
        run.evaluate_when_due()
        run.log_when_due(losses)
        run.save_when_due()
        after(run)
    return run.finish()


def spoil(parameters, value):
    """One number in one of the tensors."""
    leaf = next(iter(parameters.values(True, True))).data
    leaf[(0,) * leaf.ndim] = value


def poison(run, index, at):
    """After ``at`` updates, a parameter of the critics of one seed is NaN."""

    def now(run):
        if run.count == at:
            spoil(run.step.losses[index].qvalue_network_params, math.nan)

    return now


def steps_of(folder):
    return sorted(int(path.stem.split("-")[1]) for path in folder.glob("step-*.pt"))


def test_a_row_has_the_means_of_the_losses_since_the_last_one(tmp_path):
    run = run_of(tmp_path / "run", steps=12)
    seen = []
    for losses in run.updates():
        seen.append({key: float(value) for key, value in losses.items()})
        run.log_when_due(losses)
    found = rows(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in found] == ["5", "10", "12"]
    for row, (first, last) in zip(found, ((0, 5), (5, 10), (10, 12)), strict=True):
        for key in ("loss_actor", "loss_qvalue", "loss_value", "entropy"):
            expected = sum(one[key] for one in seen[first:last]) / (last - first)
            assert float(row[f"{key}_mean"]) == pytest.approx(expected, rel=1e-6)
            assert float(row[key]) == seen[last - 1][key]


def test_the_means_go_on_where_a_run_is_resumed_inside_an_interval(tmp_path):
    options = ("checkpoint.interval=3",)
    drive(run_of(tmp_path / "straight", *options, steps=10))
    stopped = run_of(tmp_path / "stopped", *options, steps=10)
    for losses in stopped.updates():
        stopped.log_when_due(losses)
        stopped.save_when_due()
        if stopped.count == 8:
            break
    drive(run_of(tmp_path / "stopped", *options, steps=10, resume=True))
    straight, found = (rows(tmp_path / name / "metrics.csv") for name in ("straight", "stopped"))
    for row in (*straight, *found):
        row.pop("updates_per_second")
    assert found == straight


def test_a_run_that_diverges_stops_at_the_next_row_and_keeps_its_last_good_checkpoint(tmp_path):
    run = run_of(tmp_path / "run")
    summary = drive(run, poison(run, 0, at=22))
    assert run.count == 25 and run.exit_status == 3
    assert steps_of(tmp_path / "run" / "checkpoints") == [10, 20]
    (saved,) = (tmp_path / "run" / "checkpoints").glob("diverged-step-*.pt")
    content = torch.load(saved, weights_only=True)
    assert content["step"] == 25 and content["batch"]["observation"].shape == (32, 5)
    assert math.isnan(content["losses"]["loss_qvalue"]) and "loss" in content["training"]
    (one,) = summary["diverged"]
    assert (one["seed"], one["step"]) == (0, 25)
    for words in ("loss_qvalue is nan", "qvalue", "step-00000020.pt", saved.name, "inspect_dataset"):
        assert words in one["what"], words
    assert rows(tmp_path / "run" / "metrics.csv")[-1]["step"] == "25"
    with pytest.raises(DivergenceError, match="seed 0 diverged by step 25"):
        run.raise_if_diverged()
    text = (tmp_path / "run" / "summary.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (tmp_path / "run" / "curves.png").exists()


def test_a_checkpoint_is_not_written_of_numbers_that_are_none(tmp_path):
    run = run_of(tmp_path / "run", "train.log_interval=1000")
    drive(run, poison(run, 0, at=12))
    assert steps_of(tmp_path / "run" / "checkpoints") == [10] and run.count == 20


def test_parameters_that_are_no_numbers_are_seen_though_the_losses_are_finite(tmp_path):
    run = run_of(tmp_path / "run")
    for losses in run.updates():
        if run.count == 20:
            spoil(run.step.losses[0].target_qvalue_network_params, math.inf)
        run.log_when_due(losses)
    (one,) = run.diverged
    assert (run.count, one.step, dict(one.losses), one.networks) == (20, 20, {}, ("target_qvalue",))


def test_the_others_go_on_bit_for_bit_where_one_of_several_seeds_diverges(tmp_path):
    run = run_of(tmp_path / "run", "train.num_seeds=3")
    summary = drive(run, poison(run, 1, at=22))
    assert run.count == 40 and run.exit_status == 3
    assert [one["seed"] for one in summary["diverged"]] == [1]
    folders = [tmp_path / "run" / "checkpoints" / f"seed-{seed}" for seed in range(3)]
    assert [steps_of(folder)[-1] for folder in folders] == [40, 20, 40]
    healthy = run_of(tmp_path / "healthy", "train.num_seeds=3")
    drive(healthy)
    for seed in (0, 2):
        name = f"checkpoints/seed-{seed}/step-00000040.pt"
        found, expected = (torch.load(tmp_path / one / name, weights_only=True) for one in ("run", "healthy"))
        for key, value in expected["training"]["loss"].items():
            assert torch.equal(found["training"]["loss"][key], value), key
    found = rows(tmp_path / "run" / "metrics.csv")
    assert [row["seed"] for row in found if row["step"] == "40"] == ["0", "2"]
    run.raise_if_diverged()  # two are left


def test_where_the_first_seed_diverges_counts_and_learning_rates_are_of_those_that_go_on(tmp_path):
    summary = drive(run_of(tmp_path / "run", "train.num_seeds=2"))
    run = run_of(tmp_path / "diverged", "train.num_seeds=2")
    assert drive(run, poison(run, 0, at=22))["steps"] == summary["steps"] == run.step.count == 40
    rates = [
        [(row["step"], row["learning_rate"]) for row in rows(tmp_path / name / "metrics.csv") if row["seed"] == "1"]
        for name in ("run", "diverged")
    ]
    assert rates[0] == rates[1] and len(rates[0]) == 8
    run = run_of(None, "train.num_seeds=2")
    first, second = poison(run, 0, at=7), poison(run, 1, at=22)
    assert drive(run, lambda run: (first(run), second(run)))["steps"] == 25
    assert [one.step for one in run.diverged] == [10, 25] and run.exit_status == 3


def test_a_seed_that_has_diverged_costs_no_further_updates():
    run = run_of(None, "train.num_seeds=3")
    kept = {}

    def keep(run):
        if run.count == 30:
            kept.update(run.step.state_dict(1)["loss"])

    poisoned = poison(run, 1, at=22)
    drive(run, lambda run: (poisoned(run), keep(run)))
    for name, value in run.step.state_dict(1)["loss"].items():
        assert torch.equal(value.nan_to_num(), kept[name].nan_to_num()), name


DROPOUT = ("train.num_seeds=2", "algorithm.dropout_rate=0.2")


def stacked_until_20(folder, *, of_an_earlier_version=False):
    run = run_of(folder, *DROPOUT, "train.stacked_seeds=true")
    for _ in run.updates():
        run.save_when_due()
        if run.count == 20:
            break
    for path in folder.glob("checkpoints/seed-*/*.pt") if of_an_earlier_version else ():
        content = torch.load(path, weights_only=True)
        del content["stacked"]
        torch.save(content, path)


@pytest.mark.parametrize("of_an_earlier_version", [False, True])
def test_stacked_seeds_stay_so_when_they_go_on_and_have_the_same_bits(tmp_path, of_an_earlier_version, capsys):
    stacked_until_20(tmp_path / "run", of_an_earlier_version=of_an_earlier_version)
    resumed = run_of(tmp_path / "run", *DROPOUT, resume=True, quiet=False)
    assert resumed.step.stacked and "not bit for bit" not in capsys.readouterr().out
    assert drive(resumed)["stacked_seeds"]
    straight = run_of(None, *DROPOUT, "train.stacked_seeds=true")
    drive(straight)
    for index in range(2):
        assert same(straight.step.state_dict(index)["loss"], resumed.step.state_dict(index)["loss"])


def test_stacked_seeds_that_go_on_one_after_another_draw_each_something_else_and_it_is_said(tmp_path, capsys):
    stacked_until_20(tmp_path / "run")
    resumed = run_of(tmp_path / "run", *DROPOUT, "train.stacked_seeds=false", resume=True, quiet=False)
    said = capsys.readouterr().out
    assert said.count("were stacked, and are computed one after another now: the run goes on with other rounding") == 1
    assert not torch.equal(*resumed.step.random_states)
    assert not drive(resumed)["stacked_seeds"]
    again = run_of(tmp_path / "run", *DROPOUT, "train.stacked_seeds=true", steps=60, resume=True, quiet=False)
    said = capsys.readouterr().out
    assert said.count("were computed one after another, and are stacked now") == 1
    assert drive(again)["steps"] == 60


def test_a_resumed_run_leaves_the_seed_that_has_diverged_where_it_was(tmp_path):
    run = run_of(tmp_path / "run", "train.num_seeds=3", steps=40)
    poisoned = poison(run, 1, at=12)
    for losses in run.updates():
        run.log_when_due(losses)
        run.save_when_due()
        poisoned(run)
        if run.count == 30:
            break
    resumed = run_of(tmp_path / "run", "train.num_seeds=3", steps=40, resume=True)
    assert resumed.count == 30
    drive(resumed)
    folders = [tmp_path / "run" / "checkpoints" / f"seed-{seed}" for seed in range(3)]
    assert [steps_of(folder)[-1] for folder in folders] == [40, 10, 40]
    straight = run_of(tmp_path / "straight", "train.num_seeds=3", steps=40)
    drive(straight)
    name = "checkpoints/seed-2/step-00000040.pt"
    found, expected = (torch.load(tmp_path / one / name, weights_only=True) for one in ("run", "straight"))
    for key, value in expected["training"]["loss"].items():
        assert torch.equal(found["training"]["loss"][key], value), key


def test_a_checkpoint_that_an_earlier_release_wrote_of_a_diverged_run_is_not_taken_for_a_good_one(tmp_path):
    drive(run_of(tmp_path / "run"))
    newest = tmp_path / "run" / "checkpoints" / "step-00000040.pt"
    content = torch.load(newest, weights_only=True)
    next(iter(content["training"]["loss"].values())).view(-1)[0] = math.nan
    torch.save(content, newest)
    resumed = run_of(tmp_path / "run", resume=True)
    assert resumed.count == 30
    assert newest.with_name(f"{newest.name}.damaged").exists()
    with pytest.raises(CheckpointError, match="had diverged"):
        find_checkpoints(str(newest.with_name(f"{newest.name}.damaged")), [newest.parent])


def test_values_beyond_what_the_rewards_allow_are_told_once_and_stand_in_the_summary(tmp_path):
    run = run_of(None, "algorithm.critic_lr=1e3", steps=20)
    summary = drive(run)
    *_, warning = summary["warnings"]  # the first is on the action bounds
    assert "where rewards and discount allow" in warning and "algorithm.critic_lr" in warning
    assert not any("explode" in one for one in drive(run_of(None, steps=20))["warnings"])


def test_several_seeds_of_which_one_checkpoint_stays_lose_none_where_a_run_ends_between_two_of_them(
    tmp_path, monkeypatch
):
    options = ("train.num_seeds=2", "checkpoint.keep=1")
    run, save = run_of(tmp_path / "run", *options), running.save_checkpoint

    def killed(folder, step, content, **options):
        if step == 20 and folder.name == "seed-1":
            raise KeyboardInterrupt
        return save(folder, step, content, **options)

    monkeypatch.setattr(running, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        drive(run)
    monkeypatch.undo()
    assert run_of(tmp_path / "run", *options, resume=True).count == 10


def test_a_run_that_ended_while_it_made_the_folders_of_its_seeds_begins_again(tmp_path):
    (tmp_path / "run" / "checkpoints" / "seed-0").mkdir(parents=True)
    assert run_of(tmp_path / "run", "train.num_seeds=3", resume=True).count == 0
    (tmp_path / "run" / "checkpoints" / "seed-1" / "step-00000010.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds seed-0, seed-1, seed-2; continue it"):
        checkpoint_folders(tmp_path / "run", range(2))


def test_without_a_folder_rows_are_kept_in_memory_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_of(None, steps=10)
    drive(run)
    assert [row["step"] for row in run.records.metrics()] == [5, 10]
    assert not list(tmp_path.iterdir())
