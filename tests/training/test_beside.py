"""Runs beside others in one step on a CPU, one after another: each has the very bits that it has by itself."""

import pytest
import torch
from comparing import same
from problems import random_transitions
from training.test_recording import CASES as SMALL
from training.test_recording import continuous_loss, discrete_loss, extracted

from iql_torchrl import TrainingStep, make_buffer
from iql_torchrl.training.products import why_not

SEEDS = (3, 4, 5)
LARGE = {  # whose sums are made in two steps where they are compiled
    "layer norm, 320 rows": (lambda: continuous_loss(layer_norm=True), {"batch_size": 320}, torch.float32),
    "layer norm, 320 rows, joint": (
        lambda: continuous_loss(4, layer_norm=True, dropout=0.1, num_sampled_qvalue_nets=2),
        {"batch_size": 320, "order": "joint"},
        torch.float32,
    ),
}
CASES = {**SMALL, **LARGE, "passes": (lambda: extracted("flow"), {"replacement": False}, torch.float32)}
COMPILED = {
    "mkl": ("two of four critics, joint", "discrete actions", "bfloat16", "flow"),
    "onednn": ("dropout, joint", "several updates a call", "diffusion", "layer norm, 320 rows"),
}
MKL = [pytest.param(name, "mkl", False, id=name) for name in CASES]
ONEDNN = [pytest.param("dropout", "onednn", False, id="dropout, onednn")]
BY_COMPILER = [
    pytest.param(name, products, True, id=f"{name}, compiled, {products}", marks=pytest.mark.slow)
    for products, names in COMPILED.items()
    for name in names
]


def parts_of(case, seed, own_generator=True):
    """Loss, buffer and what torch's generator has come to, as a run of this seed by itself has them."""
    make_loss, options, dtype = CASES[case]
    transitions = random_transitions().apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
    if make_loss is discrete_loss:
        transitions["action"] = torch.arange(len(transitions)) % 3
    torch.manual_seed(seed)
    of_buffer = {"batch_size": options.get("batch_size", 32), "replacement": options.get("replacement", True)}
    buffer = make_buffer(transitions, **of_buffer, seed=seed if own_generator else None)
    return make_loss().to(dtype), buffer, torch.get_rng_state()


def options_of(case, **more):
    options = {key: value for key, value in CASES[case][1].items() if key not in ("batch_size", "replacement")}
    return {"total_steps": 60, **options, **more}


def together(case, seeds=SEEDS, own_generator=True, **more):
    losses, buffers, states = zip(*(parts_of(case, seed, own_generator) for seed in seeds), strict=True)
    return TrainingStep(losses, buffers, random_states=states, **options_of(case, **more))


def alone(case, seed, own_generator=True, **more):
    """A step, and torch's generator at what it draws from."""
    loss, buffer, _ = parts_of(case, seed, own_generator)
    return TrainingStep(loss, buffer, **options_of(case, **more))


def everything(step, run=0):
    state = step.state_dict(run)
    with step.random_state(run):
        return {**state, "random": torch.get_rng_state()}


def assert_beside_is_alone(case, calls=10, **more):
    step = together(case, **more)
    found = [step() for _ in range(calls)]
    assert not step.compile_note and step.compiled == more["compile"]
    for run, seed in enumerate(SEEDS):
        single = alone(case, seed, **more)
        for losses in found:
            expected = single()
            assert same(expected, {name: loss[run] for name, loss in losses.items()})
        assert same(everything(single), everything(step, run))
        assert same(single.batch().to_dict(), step.batch(run).to_dict())


@pytest.mark.parametrize(("case", "products", "compile"), [*MKL, *ONEDNN, *BY_COMPILER])
def test_a_run_beside_others_has_the_bits_that_it_has_alone(case, products, compile):
    reason = why_not(torch.device("cpu"), torch.float32, products)
    if reason:
        pytest.skip(reason)
    assert_beside_is_alone(case, products=products, compile=compile)


def test_stacked_it_draws_something_else_which_this_file_would_tell():
    step, single = together("dropout", compile=False, stacked=True), alone("dropout", 3, compile=False)
    for _ in range(10):
        step(), single()
    assert not same(single.state_dict(), step.state_dict(0))


def test_an_update_that_cannot_be_recorded_has_the_bits_that_it_has_alone(monkeypatch):
    def refuse(*_):
        raise RuntimeError("not today")

    monkeypatch.setattr("iql_torchrl.training.step.record", refuse)
    step = together("dropout", compile=False)
    found = [step() for _ in range(5)]
    assert "cannot be recorded" in step.compile_note
    for run, seed in enumerate(SEEDS):
        single = alone("dropout", seed, compile=False)
        for losses in found:
            assert same(single(), {name: loss[run] for name, loss in losses.items()})
        assert same(everything(single), everything(step, run))


def test_buffers_without_generators_draw_the_rows_that_they_draw_alone():
    step = together("several updates a call", own_generator=False, compile=False)
    for _ in range(4):
        step()
    for run, seed in enumerate(SEEDS):
        single = alone("several updates a call", seed, own_generator=False, compile=False)
        for _ in range(4):
            single()
        assert same(everything(single), everything(step, run))


def test_runs_that_do_not_go_on_are_left_as_they_are_and_change_no_bit_of_the_others():
    step = together("dropout", compile=False)
    step()
    before = everything(step, 1)
    step.going_on = (0, 2)
    losses = step()
    after = everything(step, 1)
    for name in ("loss", "optimizers", "count", "random"):
        assert same(before[name], after[name])
    assert all(bool(loss[1].isnan()) and bool(loss[[0, 2]].isfinite().all()) for loss in losses.values())
    for run in (0, 2):
        single = alone("dropout", SEEDS[run], compile=False)
        single(), single()
        assert same(everything(single), everything(step, run))


def test_where_nothing_is_drawn_the_generator_of_the_process_is_not_touched(monkeypatch):
    step = together("sequential", compile=False)
    step()
    monkeypatch.setattr(TrainingStep, "random_state", None)
    step()
    with pytest.raises(TypeError):
        together("dropout", compile=False)()


def test_the_generator_of_the_process_stays_where_it_is():
    step = together("dropout", compile=False)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    step()
    with pytest.raises(KeyError), step.random_state(1):
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_without_random_states_all_draw_from_the_generator_of_the_process():
    losses, buffers, _ = zip(*(parts_of("dropout", seed) for seed in SEEDS), strict=True)
    step = TrainingStep(losses, buffers, compile=False)
    before = torch.get_rng_state()
    step()
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("case", ["dropout", "passes"])
def test_a_run_goes_on_alone_and_beside_others_bit_for_bit(case):
    step = together(case, compile=False)
    for _ in range(5):
        step()
    states = [everything(step, run) for run in range(3)]
    for _ in range(5):
        step()
    expected = [everything(step, run) for run in range(3)]
    single, again = alone(case, 11, compile=False), together(case, (7, 8, 9), compile=False)
    for run, state in enumerate(states):
        for other, place in ((single, 0), (again, run)):
            other.load_state_dict(state, place)
            with other.random_state(place):
                torch.set_rng_state(state["random"])
        for _ in range(5):
            single()
        assert same(expected[run], everything(single))
    for _ in range(5):
        again()
    for run in range(3):
        assert same(expected[run], everything(again, run))
