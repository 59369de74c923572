"""Processes that share each batch, against one that has all of it: real ones, which torchrun starts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparing import same
from problems import random_transitions, small_loss
from processes import SMALL

from iql_torchrl import TrainingStep, make_buffer
from iql_torchrl.configuration.command_line import _prepare
from iql_torchrl.configuration.composing import compose, initialised
from iql_torchrl.configuration.launching import launched_count, launched_rank
from iql_torchrl.data.preparation import prepare_data
from iql_torchrl.errors import ConfigurationError, RankError
from iql_torchrl.running.options import OfflineOptions
from iql_torchrl.running.run import Run
from iql_torchrl.training.construction import build_step
from iql_torchrl.training.data_parallel import Ranks, join_ranks

TESTS = Path(__file__).parents[1]
UPDATES = 100
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
CASES = {
    "sequential": {"dtype": torch.float64},
    "joint": {"dtype": torch.float64, "order": "joint"},
    "sequential, float32": {"dtype": torch.float32},
    "joint, float32": {"dtype": torch.float32, "order": "joint"},
    "compiled": {"dtype": torch.float64, "compile": True},
    # Not whichever products are faster: oneDNN's have states of another layout, and these are compared with eager ones.
    "compiled, joint, float32": {"dtype": torch.float32, "order": "joint", "compile": True, "products": "mkl"},
    "three seeds": {"dtype": torch.float64, "seeds": (3, 4, 5)},
    "three seeds, compiled": {"dtype": torch.float64, "seeds": (3, 4, 5), "compile": True},
    "three seeds, stacked": {"dtype": torch.float64, "seeds": (3, 4, 5), "stacked": True},
    "shuffled passes, four updates a call": {"dtype": torch.float64, "replacement": False, "updates_per_call": 4},
}


def build(ranks=None, *, dtype, seeds=(3,), replacement=True, compile=False, **options):
    losses, buffers = [], []
    for seed in seeds:
        transitions = random_transitions().apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
        losses.append(small_loss(seed).to(dtype))
        losses[-1].make_value_estimator(gamma=0.97)
        buffers.append(make_buffer(transitions, batch_size=32, replacement=replacement, seed=seed))
    together = (losses, buffers) if len(seeds) > 1 else (losses[0], buffers[0])
    return TrainingStep(*together, total_steps=UPDATES, compile=compile, ranks=ranks, **options)


def train(step, updates=UPDATES):
    """The losses of every call, the state of every run, and how it was computed."""
    losses = [{name: loss.clone() for name, loss in step().items()} for _ in range(updates // step.updates_per_call)]
    states = [step.state_dict(run) for run in range(len(step.losses))]
    return {"losses": losses, "states": states, "compiled": step.compiled, "note": step.compile_note}


def rows_of_first_update(step):
    seen, update = [], step._update

    def seeing(rows):
        seen.append(rows.clone())
        return update(rows)

    step._update = seeing
    step()
    return seen[0]


def assert_close(expected, found, tolerance, where=""):
    if isinstance(expected, dict):
        assert expected.keys() == found.keys(), where
        for key in expected:
            assert_close(expected[key], found[key], tolerance, f"{where}.{key}")
    elif isinstance(expected, list):
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            assert_close(one, other, tolerance, f"{where}[{number}]")
    elif isinstance(expected, torch.Tensor) and expected.is_floating_point():
        options = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(found, expected, **options, msg=lambda message: f"{where}: {message}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(expected, found), where
    else:
        assert expected == found, where


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """What two processes make of every case, each as it sees it; and of a state that one process has begun with."""
    folder = tmp_path_factory.mktemp("ranks")
    begun = build(dtype=torch.float64)
    train(begun, UPDATES // 2)
    torch.save(begun.state_dict(), folder / "begun.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_with_half_of_each_batch_equal_one_with_the_whole(name, by_two):
    case = CASES[name]
    expected, found = train(build(**{**case, "compile": False})), by_two[0][name]
    assert found["compiled"] == case.get("compile", False) and not found["note"]
    assert_close(expected["losses"], found["losses"], 10 * TOLERANCE[case["dtype"]], "losses")
    assert_close(expected["states"], found["states"], TOLERANCE[case["dtype"]], "state")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_all_processes_have_the_same_parameters_bit_for_bit(name, by_two):
    assert_close(by_two[0][name], by_two[1][name], 0.0)


@pytest.mark.slow
def test_each_process_computes_with_its_half_of_the_rows_that_one_draws(by_two):
    halves = [one["rows"] for one in by_two]
    assert [len(rows) for rows in halves] == [16, 16]
    assert torch.equal(torch.cat(halves), rows_of_first_update(build(dtype=torch.float64)))


@pytest.mark.slow
def test_another_number_of_processes_goes_on_from_a_state(by_two):
    expected = train(build(dtype=torch.float64))["states"]
    assert_close(expected, by_two[0]["begun by one"]["states"], TOLERANCE[torch.float64])
    alone = build(dtype=torch.float64)
    alone.load_state_dict(by_two[0]["half"]["states"][0])
    assert_close(expected, train(alone, UPDATES // 2)["states"], TOLERANCE[torch.float64])


@pytest.mark.slow
def test_the_mistake_of_one_process_is_told_by_the_first_and_stops_the_other(by_two):
    assert [one["of the first"] for one in by_two] == ["ConfigurationError: no such folder", "SystemExit: 2"]
    assert [one["of the second"] for one in by_two] == ["RankError: process 1: no such file", "SystemExit: 2"]
    assert [one["while comparing"] for one in by_two] == ["RankError: process 1: no such file", "SystemExit: 2"]
    difference = "RankError: processes 0 and 1 of this run differ: products is 0 and 1; give one."
    assert [one["different"] for one in by_two] == [difference, "SystemExit: 2"]


@pytest.mark.slow
def test_all_processes_stop_at_the_same_update_when_one_gets_a_signal(by_two):
    assert [one["asked to stop"] for one in by_two] == [(20, 128 + signal.SIGTERM)] * 2


@pytest.mark.slow
def test_all_processes_stop_where_a_checkpoint_would_be_of_a_run_that_has_diverged(by_two):
    assert [one["diverged"] for one in by_two] == [(30, 3)] * 2


@pytest.mark.slow
def test_processes_with_other_options_are_refused_but_for_the_run_folder(by_two):
    difference = "processes 0 and 1 of this run differ: algorithm.expectile is 0.7 and 0.9"
    expected = f"RankError: {difference}; start all of them with the same command line."
    assert [one["other options"] for one in by_two] == [expected, "SystemExit: 2"]


@pytest.mark.slow
def test_processes_draw_other_random_numbers_after_they_were_seeded_apart(by_two):
    torch.manual_seed(0)
    assert torch.equal(by_two[0]["random"], torch.rand(3))
    assert not torch.equal(by_two[0]["random"], by_two[1]["random"])


@pytest.mark.slow
def test_a_seed_beside_others_by_two_processes_has_the_bits_that_it_has_by_itself_with_dropout(by_two):
    for one in by_two:
        assert same(one["beside"], one["by themselves"])


def test_shares_of_a_batch_do_not_overlap_and_are_all_of_it():
    rows = torch.arange(24).reshape(2, 12)
    shares = [Ranks(rank, 3).share(rows) for rank in range(3)]
    assert torch.equal(torch.cat(shares, -1), rows)
    assert all(share.shape == (2, 4) and share.is_contiguous() for share in shares)


@pytest.mark.parametrize(("batch_size", "message"), [(33, "such as 32 or 36"), (3, "such as 4,")])
def test_a_batch_that_cannot_be_divided_is_refused(batch_size, message):
    with pytest.raises(
        ConfigurationError, match=rf"algorithm.batch_size={batch_size} cannot .* 4 processes.*{message}"
    ):
        Ranks(0, 4).share_of(batch_size)


def test_what_several_processes_would_not_make_the_same_of_is_refused(transitions):
    def step(loss, transitions=transitions, seed=0):
        return TrainingStep(loss, make_buffer(transitions, batch_size=32, seed=seed), ranks=Ranks(0, 2), compile=False)

    with pytest.raises(ValueError, match="reduction='sum'"):
        step(small_loss(reduction="sum"))
    weighted = transitions.clone().set("priority_weight", torch.ones(len(transitions)))
    with pytest.raises(ValueError, match="weights or masks"):
        step(small_loss(), weighted)
    with pytest.raises(ValueError, match="value_loss='gumbel', which is divided by the largest exponential"):
        step(small_loss(value_loss="gumbel"))
    with pytest.raises(ValueError, match="random generator"):
        step(small_loss(), seed=None)
    step(small_loss(use_prioritized_weights=False), weighted)


def test_a_run_by_several_processes_with_the_gumbel_loss_is_refused_by_its_option():
    options = options_of(*SMALL, "algorithm.value_loss=gumbel", "env.name=null")
    data = prepare_data(options.dataset, options.algorithm, options.env, torch.device("cpu"))
    with pytest.raises(ConfigurationError, match=r"^algorithm.value_loss=gumbel .* 2 processes .*start one process"):
        build_step(options.algorithm, options.train, data, torch.device("cpu"), ranks=Ranks(0, 2))


def test_a_process_that_torchrun_did_not_start_is_alone_whatever_other_launchers_set(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks = join_ranks(device="cpu")
    assert (ranks.rank, ranks.count, ranks.first) == (0, 1, True)
    assert not torch.distributed.is_initialized()


def test_a_multirun_by_several_processes_is_refused(monkeypatch, capsys):
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        _prepare(["-m", "train.seed=0,1"], "iql_offline", OfflineOptions, sweeps=True)
    expected = "process 1: error: torchrun starts the processes of one run: leave -m out, or start without torchrun."
    assert capsys.readouterr().err.strip() == expected


def test_an_error_of_its_own_is_not_taken_for_a_lost_process():
    with pytest.raises(RuntimeError, match="out of memory") as raised, Ranks(0, 2).watching():
        raise RuntimeError("out of memory")
    assert not isinstance(raised.value, RankError)
    with pytest.raises(RuntimeError, match="gloo"), Ranks().watching():
        raise RuntimeError("gloo")


def outcome(ranks, first, second, comparing=False):
    """What a process gets to know of mistakes of itself and the other."""
    error = (first, second)[ranks.rank]
    try:
        with ranks.together():
            if error is not None:
                raise error
            if comparing:
                ranks.compare("give one", {"products": 0})
    except (ConfigurationError, RankError, SystemExit) as raised:
        return f"{type(raised).__name__}: {raised}"


def options_of(*overrides):
    with initialised():
        return compose("iql_offline", overrides, OfflineOptions)


def run_of(ranks, folder, *overrides):
    intervals = ("train.steps=60", "train.log_interval=60", "eval.interval=60", "checkpoint.interval=30")
    options = options_of(*SMALL, *intervals, "env.name=null", *overrides)
    data = prepare_data(options.dataset, options.algorithm, options.env, ranks.device)
    step = build_step(options.algorithm, options.train, data, ranks.device, ranks=ranks)
    return Run(step, data, options, folder, quiet=True)


def learnt_by(ranks, *overrides):
    """The networks of every seed of a run with dropout."""
    run = run_of(ranks, None, "algorithm.dropout_rate=0.2", *overrides)
    for _ in run.updates():
        pass
    return [run.step.state_dict(seed)["loss"] for seed in range(len(run.seeds))]


def ends_at(ranks, folder, *overrides):
    """The update and the status with which a run ends whose second process gets a signal at its fifth update."""
    run = run_of(ranks, folder, *overrides)
    for losses in run.updates():
        if run.count == 5 and not ranks.first and not overrides:
            os.kill(os.getpid(), signal.SIGTERM)
        run.evaluate_when_due()
        run.log_when_due(losses)
        run.save_when_due()
    run.finish()
    return run.count, run.exit_status


def program(folder):
    try:
        expectile = (0.7, 0.9)[launched_rank()]
        join_ranks(options_of(f"algorithm.expectile={expectile}", f"run_dir=runs/{launched_rank()}"), "cpu")
    except (RankError, SystemExit) as raised:
        refused = f"{type(raised).__name__}: {raised}"
    ranks = Ranks(launched_rank(), launched_count())
    found = {"other options": refused} | {name: train(build(ranks, **case)) for name, case in CASES.items()}
    begun = build(ranks, dtype=torch.float64)
    begun.load_state_dict(torch.load(folder / "begun.pt", weights_only=True))
    found["begun by one"] = train(begun, UPDATES // 2)
    found["half"] = train(build(ranks, dtype=torch.float64), UPDATES // 2)
    found["rows"] = rows_of_first_update(build(ranks, dtype=torch.float64))
    found["asked to stop"] = ends_at(ranks, folder / "asked")
    found["diverged"] = ends_at(ranks, folder / "diverged", "algorithm.critic_lr=1e30", "algorithm.value_lr=1e30")
    found["beside"] = learnt_by(ranks, "train.num_seeds=2")
    found["by themselves"] = learnt_by(ranks) + learnt_by(ranks, "train.seed=1")
    torch.manual_seed(0)
    ranks.seed_apart()
    found["random"] = torch.rand(3)
    found["of the first"] = outcome(ranks, ConfigurationError("no such folder"), None)
    found["of the second"] = outcome(ranks, None, ConfigurationError("no such file"))
    found["while comparing"] = outcome(ranks, None, ConfigurationError("no such file"), comparing=True)
    try:
        ranks.compare("give one", {"products": ranks.rank, "compile": True})
    except (RankError, SystemExit) as raised:
        found["different"] = f"{type(raised).__name__}: {raised}"
    torch.save(found, folder / f"rank-{ranks.rank}.pt")


if __name__ == "__main__":
    program(Path(sys.argv[1]))
