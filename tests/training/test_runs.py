"""Several runs at once against each by itself, several updates a call against one a call, and what both refuse."""

import itertools
import math

import pytest
import torch
from problems import (
    ACTION_DIM,
    OBSERVATION_DIM,
    both_ways,
    random_transitions,
    small_loss,
    stacked_compiled_too,
)
from scipy.stats import chisquare
from torch import nn
from torchrl.modules import ValueOperator

from iql_torchrl import IQLLoss, TrainingStep, build_actor, build_qvalues, build_value, make_buffer

SEEDS = (3, 4, 5)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
LOSSES = {"loss_actor", "loss_qvalue", "loss_value", "entropy"}


def loss_of(seed, dtype=torch.float64, **options):
    loss = small_loss(seed, **options)
    loss.make_value_estimator(gamma=0.97)
    return loss.to(dtype)


def buffer_of(seed, dtype=torch.float64, *, batch_size=32, replacement=True):
    transitions = random_transitions().apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
    return make_buffer(transitions, batch_size=batch_size, replacement=replacement, seed=seed)


def together(seeds=SEEDS, dtype=torch.float64, *, replacement=True, delay_value=False, compile=False, **options):
    losses = [loss_of(seed, dtype, delay_value=delay_value) for seed in seeds]
    buffers = [buffer_of(seed, dtype, replacement=replacement) for seed in seeds]
    return TrainingStep(losses, buffers, total_steps=60, compile=compile, **options)


def alone(seed, dtype=torch.float64, *, replacement=True, delay_value=False, compile=False, **options):
    loss = loss_of(seed, dtype, delay_value=delay_value)
    buffer = buffer_of(seed, dtype, replacement=replacement)
    return TrainingStep(loss, buffer, total_steps=60, compile=compile, **options)


def times(count, step):
    return [step() for _ in range(count)]


def assert_states_equal(expected, found, tolerance=0.0, where="state"):
    """Integers and random states exactly, floating point within a tolerance."""
    if isinstance(expected, dict):
        assert expected.keys() == found.keys(), where
        for key in expected:
            assert_states_equal(expected[key], found[key], tolerance, f"{where}.{key}")
    elif isinstance(expected, torch.Tensor):
        options = {"rtol": tolerance, "atol": tolerance} if expected.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found, expected, **options, msg=lambda message: f"{where}: {message}")
    else:
        assert expected == found, where


@pytest.mark.parametrize(("dtype", "replacement"), [(torch.float32, True), (torch.float64, False)])
@pytest.mark.parametrize("order", ["sequential", "joint"])
@both_ways
def test_runs_together_are_the_runs_alone(stacked, dtype, order, replacement):
    options = {"dtype": dtype, "order": order, "replacement": replacement}
    step, singles = together(stacked=stacked, **options), [alone(seed, **options) for seed in SEEDS]
    for _ in range(25):
        losses, expected = step(), [single() for single in singles]
        assert losses.keys() == LOSSES
        for name, loss in losses.items():
            assert loss.shape == (3,) and loss.dtype == dtype and not loss.requires_grad
            of_singles = torch.stack([one[name] for one in expected])
            torch.testing.assert_close(loss, of_singles, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])
        for run, single in enumerate(singles):
            assert torch.equal(step.batch(run)["observation"], single.batch()["observation"])
    for run, single in enumerate(singles):
        assert_states_equal(single.state_dict(), step.state_dict(run), TOLERANCE[dtype])
    assert step.learning_rates == pytest.approx(singles[0].learning_rates)


@pytest.mark.parametrize("order", ["sequential", "joint"])
@both_ways
def test_runs_with_delayed_values_together_are_the_runs_alone(stacked, order):
    step = together(delay_value=True, order=order, stacked=stacked)
    times(25, step)
    for run, seed in enumerate(SEEDS):
        single = alone(seed, delay_value=True, order=order)
        times(25, single)
        assert_states_equal(single.state_dict(), step.state_dict(run), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_runs_compiled_together_are_the_runs_alone(order):
    step = together(order=order, replacement=False, compile=True, stacked=True)
    singles = [alone(seed, order=order, replacement=False) for seed in SEEDS]
    for _ in range(25):
        losses, expected = step(), [single() for single in singles]
        for name, loss in losses.items():
            of_singles = torch.stack([one[name] for one in expected])
            torch.testing.assert_close(loss, of_singles, rtol=1e-8, atol=1e-8)
    for run, single in enumerate(singles):
        assert_states_equal(single.state_dict(), step.state_dict(run), 1e-9)


@both_ways
def test_a_list_of_one_is_the_run_alone_with_losses_of_shape_1(stacked):
    step, single = together((3,), stacked=stacked), alone(3)
    for _ in range(5):
        losses, expected = step(), single()
        for name, loss in losses.items():
            torch.testing.assert_close(loss, expected[name].reshape(1), rtol=1e-10, atol=1e-10)
    assert_states_equal(single.state_dict(), step.state_dict(), 1e-10)


@both_ways
def test_runs_of_different_seeds_differ_and_those_of_one_seed_do_not(stacked):
    step = together((3, 4, 3), stacked=stacked)
    losses = times(10, step)[-1]
    for name, loss in losses.items():
        assert loss[0] != loss[1], name
        torch.testing.assert_close(loss[0], loss[2], rtol=1e-12, atol=1e-12)
    assert_states_equal(step.state_dict(0), step.state_dict(2), 1e-12)
    for first, second in zip(step.losses[0].parameters(), step.losses[1].parameters(), strict=True):
        assert not torch.equal(first, second)


@both_ways
def test_each_run_drops_units_of_its_own(stacked):
    options = {"compile": False, "stacked": stacked}
    steps = [
        TrainingStep([loss_of(3, dropout=dropout) for _ in range(2)], [buffer_of(3), buffer_of(3)], **options)
        for dropout in (None, 0.5)
    ]
    equal, different = (step()["loss_actor"] for step in steps)
    torch.testing.assert_close(equal[0], equal[1])
    assert abs(float(different[0] - different[1])) > 1e-6


@pytest.mark.parametrize(
    ("runs", "stacked", "compile"),
    [
        *((1, False, False), (2, False, False), (2, True, False)),
        *(pytest.param(runs, True, True, marks=pytest.mark.slow) for runs in (1, 2)),
    ],
)
@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_each_update_of_each_run_draws_critics_of_its_own_every_subset_as_often(order, runs, stacked, compile):
    """By losses of constant networks on one batch: there are as many as pairs of four critics."""
    losses = [small_loss(3, critics=4, num_sampled_qvalue_nets=2, qvalue_aggregation="mean") for _ in range(runs)]
    buffers = [buffer_of(3, torch.float32, batch_size=500, replacement=False) for _ in range(runs)]
    rates = {"actor_lr": 0.0, "value_lr": 0.0, "critic_lr": 0.0}
    torch.manual_seed(5)
    torch._dynamo.utils.counters.clear()
    step = TrainingStep(
        losses if runs > 1 else losses[0],
        buffers if runs > 1 else buffers[0],
        compile=compile,
        stacked=stacked,
        order=order,
        **rates,
    )
    found = torch.stack([step()["loss_value"].reshape(runs) for _ in range(400)])
    assert step.compiled == compile and step.compile_note == ""
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    if compile:
        assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"] == 1

    with torch.no_grad():
        loss, batch = losses[0], random_transitions()
        qvalues = loss._qvalues(batch, loss.target_qvalue_network_params)
        pairs = [qvalues[list(pair)].mean(0) for pair in itertools.combinations(range(4), 2)]
        expected = torch.stack([loss.value_loss(batch, target_qvalue=target)[0] for target in pairs])
    distances, drawn = (found[..., None] - expected).abs().min(-1)
    assert distances.max() < 1e-5
    for run in range(runs):
        assert chisquare(torch.bincount(drawn[:, run], minlength=6)).pvalue > 1e-3
    if runs == 2:  # and neither knows of the other
        both = torch.bincount(6 * drawn[:, 0] + drawn[:, 1], minlength=36)
        assert chisquare(both).pvalue > 1e-3


VALUE_OPTIONS = {
    "mean": {"qvalue_aggregation": "mean"},
    "Gumbel": {"value_loss": "gumbel", "gumbel_temperature": 0.5},
    "all of the critics": {"critics": 3, "num_sampled_qvalue_nets": 3},
}


@pytest.mark.parametrize("options", VALUE_OPTIONS)
@stacked_compiled_too
def test_runs_taught_otherwise_together_are_the_runs_alone(stacked, options, compile):
    def step_of(*seeds, compile=compile):
        losses, buffers = [loss_of(seed, **VALUE_OPTIONS[options]) for seed in seeds], [buffer_of(s) for s in seeds]
        return TrainingStep(
            losses if len(seeds) > 1 else losses[0],
            buffers if len(seeds) > 1 else buffers[0],
            compile=compile,
            stacked=stacked,
        )

    step, singles = step_of(3, 4), [step_of(seed, compile=False) for seed in (3, 4)]
    for _ in range(20):
        losses, expected = step(), [single() for single in singles]
        for name, loss in losses.items():
            of_singles = torch.stack([one[name] for one in expected])
            torch.testing.assert_close(loss, of_singles, rtol=1e-8, atol=1e-8)
    assert step.compiled == compile and step.compile_note == ""
    for run, single in enumerate(singles):
        assert_states_equal(single.state_dict(), step.state_dict(run), 1e-9)


@pytest.mark.parametrize("replacement", [True, False])
@both_ways
def test_a_run_alone_goes_on_beside_others_as_if_never_interrupted(stacked, replacement):
    single = alone(4, replacement=replacement)
    times(20, single)
    state = single.state_dict()
    losses = times(20, single)
    step = together((8, 9, 10), replacement=replacement, stacked=stacked)
    times(20, step)
    others = [step.state_dict(run) for run in (0, 2)]
    step.load_state_dict(state, 1)
    for run, other in zip((0, 2), others, strict=True):
        assert_states_equal(other, step.state_dict(run))  # left as they were
    found = times(20, step)
    for one, other in zip(losses, found, strict=True):
        for name in LOSSES:
            torch.testing.assert_close(other[name][1], one[name], rtol=1e-9, atol=1e-9)
    assert_states_equal(single.state_dict(), step.state_dict(1), 1e-10)
    assert step.count == 40


@pytest.mark.parametrize("replacement", [True, False])
@both_ways
def test_a_run_beside_others_goes_on_alone_as_if_never_interrupted(stacked, replacement):
    step = together(replacement=replacement, stacked=stacked)
    times(20, step)
    states = [step.state_dict(run) for run in range(3)]
    times(20, step)
    for run, state in enumerate(states):
        single = alone(11, replacement=replacement)
        times(3, single)  # anything that it did before must not matter
        single.load_state_dict(state)
        times(20, single)
        assert_states_equal(step.state_dict(run), single.state_dict(), 1e-10)


@pytest.mark.parametrize(("dtype", "replacement"), [(torch.float32, True), (torch.float64, False)])
@both_ways
def test_restored_runs_go_on_bit_for_bit(stacked, dtype, replacement):
    step = together(dtype=dtype, replacement=replacement, stacked=stacked)
    times(20, step)
    states = [step.state_dict(run) for run in range(3)]
    times(20, step)
    restored = together((7, 8, 9), dtype=dtype, replacement=replacement, stacked=stacked)
    for run, state in enumerate(states):
        restored.load_state_dict(state, run)
    times(20, restored)
    for run in range(3):
        assert_states_equal(step.state_dict(run), restored.state_dict(run))


@pytest.mark.parametrize("replacement", [True, False])
@both_ways
def test_a_state_is_a_copy_that_later_updates_leave_alone(stacked, replacement):
    step, same = (together(replacement=replacement, stacked=stacked) for _ in range(2))
    times(10, step), times(10, same)
    states = [step.state_dict(run) for run in range(3)]
    times(10, step)
    for run, state in enumerate(states):
        assert_states_equal(same.state_dict(run), state)


def test_losses_without_a_value_estimator_of_their_own_have_the_default_one_in_every_runs_state():
    step = TrainingStep([small_loss(seed) for seed in SEEDS], [buffer_of(seed) for seed in SEEDS], compile=False)
    single = TrainingStep(small_loss(4), buffer_of(4), compile=False)
    keys = single.state_dict()["loss"].keys()
    assert [step.state_dict(run)["loss"].keys() for run in range(3)] == [keys] * 3
    step.load_state_dict(single.state_dict(), 1)


@both_ways
def test_a_hyperparameter_of_the_first_loss_holds_for_all_runs(stacked):
    step = together(stacked=stacked)
    step()
    step.loss.temperature = 0.0
    losses = step()
    # With every weight 1, the policy's loss is the negative log-likelihood, as is the entropy reported.
    torch.testing.assert_close(losses["loss_actor"], losses["entropy"])


@both_ways
def test_each_losss_own_parameters_are_those_that_train(stacked):
    step = together(stacked=stacked)
    before = [[parameter.detach().clone() for parameter in loss.parameters()] for loss in step.losses]
    times(2, step)
    for loss, old in zip(step.losses, before, strict=True):
        assert all(not torch.equal(one, other) for one, other in zip(loss.parameters(), old, strict=True))
    losses = together(order="joint", stacked=stacked)
    reported = losses()
    fresh = together(order="joint", stacked=stacked)
    for run, loss in enumerate(fresh.losses):
        expected = loss(losses.batch(run))
        for name, value in reported.items():
            torch.testing.assert_close(value[run], expected[name].detach())


# ------------------------------------------------------------------------------------------ several updates a call

SEVERAL = [
    pytest.param(alone, 3, {}, id="one run"),
    pytest.param(together, SEEDS, {"stacked": False}, id="three runs, one after another"),
    pytest.param(together, SEEDS, {"stacked": True}, id="three runs, stacked"),
]


def assert_four_a_call_equal_four_calls(build, seeds, **options):
    at_once, one_by_one = build(seeds, updates_per_call=4, **options), build(seeds, **options)
    runs = len(at_once.losses)
    for call in range(1, 6):
        found, expected = at_once(), times(4, one_by_one)[-1]
        assert at_once.count == one_by_one.count == 4 * call
        assert found.keys() == expected.keys() == LOSSES
        for name, loss in found.items():
            assert torch.equal(loss, expected[name]), name
        for run in range(runs):
            batch, last = at_once.batch(run), one_by_one.batch(run)
            assert batch.batch_size == (32,)
            for key, value in last.items(True, True):
                assert torch.equal(batch[key], value)
    for run in range(runs):
        assert_states_equal(one_by_one.state_dict(run), at_once.state_dict(run))
    assert at_once.learning_rates == one_by_one.learning_rates


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize(("build", "seeds", "options"), SEVERAL)
def test_four_updates_a_call_equal_four_calls_bit_for_bit(build, seeds, options, replacement):
    assert_four_a_call_equal_four_calls(build, seeds, replacement=replacement, **options)


@pytest.mark.slow
def test_four_compiled_updates_a_call_equal_four_calls_bit_for_bit():
    assert_four_a_call_equal_four_calls(together, SEEDS, stacked=True)
    assert_four_a_call_equal_four_calls(together, SEEDS, compile=True, dtype=torch.float32, stacked=True)


@pytest.mark.slow
def test_two_compiled_steps_of_different_sizes_train_side_by_side():
    def build(width, batch_size, compile):
        torch.manual_seed(0)
        sizes = {"hidden_dims": (width, width)}
        loss = IQLLoss(
            build_actor(OBSERVATION_DIM, ACTION_DIM, **sizes),
            build_qvalues(OBSERVATION_DIM, ACTION_DIM, **sizes),
            build_value(OBSERVATION_DIM, **sizes),
        )
        return TrainingStep(loss.double(), buffer_of(width, batch_size=batch_size), total_steps=60, compile=compile)

    sizes = ((16, 32), (24, 48))
    compiled, eager = ([build(*size, compile) for size in sizes] for compile in (True, False))
    for _ in range(20):
        for step in (*compiled, *eager):
            step()
    for one, other in zip(eager, compiled, strict=True):
        assert_states_equal(one.state_dict(), other.state_dict(), 1e-9)


# ------------------------------------------------------------------------------------------ precision


@both_ways
def test_bfloat16_trains_close_to_float32_and_keeps_parameters_in_float32(stacked):
    options = {"dtype": torch.float32, "stacked": stacked}
    steps = {name: together(precision=name, **options) for name in ("float32", "bfloat16")}
    for _ in range(8):
        expected, found = (steps[name]() for name in ("float32", "bfloat16"))
        for name in LOSSES:
            assert torch.isfinite(found[name]).all() and not torch.equal(found[name], expected[name])
            torch.testing.assert_close(found[name].float(), expected[name], rtol=0.05, atol=0.02)
    for run, loss in enumerate(steps["bfloat16"].losses):
        assert all(parameter.dtype == torch.float32 for parameter in loss.parameters())
        optimizers = steps["bfloat16"].state_dict(run)["optimizers"]
        assert all(value.dtype == torch.float32 for state in optimizers.values() for value in state.values())
    for one, other in zip(steps["float32"].loss.parameters(), steps["bfloat16"].loss.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=0.05, atol=0.01)


# ------------------------------------------------------------------------------------------ what is refused


def test_runs_of_different_architectures_are_refused_naming_the_difference():
    deeper = IQLLoss(
        build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(16, 16)),
        build_qvalues(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(16, 16)),
        build_value(OBSERVATION_DIM, hidden_dims=(24, 16)),
    )
    with pytest.raises(ValueError, match=r"loss 1 has other networks than loss 0: \S*value_network_params"):
        TrainingStep([loss_of(0, torch.float32), deeper], [buffer_of(0), buffer_of(1)])
    with pytest.raises(ValueError, match=r"loss 1 has other networks than loss 0: target_value_network_params"):
        TrainingStep([loss_of(0), loss_of(1, delay_value=True)], [buffer_of(0), buffer_of(1)])


@pytest.mark.parametrize("buffers", [0, 1, 3])
def test_another_number_of_buffers_than_losses_is_refused(buffers):
    with pytest.raises(ValueError, match=f"2 losses need as many buffers, one each; got {buffers}"):
        TrainingStep([loss_of(0), loss_of(1)], [buffer_of(seed) for seed in range(buffers)])


def test_buffers_of_different_batch_sizes_or_lengths_are_refused():
    losses = [loss_of(0), loss_of(1)]
    with pytest.raises(ValueError, match="the same batch_size"):
        TrainingStep(losses, [buffer_of(0), buffer_of(1, batch_size=16)])
    with pytest.raises(ValueError, match="the same data"):
        TrainingStep(losses, [buffer_of(0), make_buffer(random_transitions(400), batch_size=32, seed=1)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"updates_per_call": 0}, "updates_per_call must be an integer >= 1, got 0"),
        ({"precision": "int8"}, "precision must be one of float32, tf32, bfloat16, got 'int8'"),
        ({"cudagraphs": True}, "cudagraphs=true needs a GPU, but the networks are on cpu"),
        ({"cudagraphs": "sometimes"}, "cudagraphs must be one of auto, True, False, got 'sometimes'"),
        ({"stacked": "sometimes"}, "stacked must be one of auto, True, False, got 'sometimes'"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingStep(loss_of(0), buffer_of(0), compile=False, **options)


def test_another_number_of_random_states_than_losses_is_refused():
    with pytest.raises(ValueError, match="3 losses need as many random states; got 1"):
        together(random_states=[torch.get_rng_state()])


def test_networks_with_buffers_are_refused():
    network = nn.Sequential(nn.Linear(OBSERVATION_DIM, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    loss = IQLLoss(
        build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(16,)),
        build_qvalues(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(16,)),
        ValueOperator(network, in_keys=["observation"]),
    )
    with pytest.raises(ValueError, match="have buffers"):
        TrainingStep(loss, buffer_of(0), compile=False)


def test_a_batch_is_asked_for_too_early():
    with pytest.raises(RuntimeError, match="no update has been done yet"):
        together().batch()


@pytest.mark.parametrize("updates_per_call", [1, 4])
def test_the_schedule_of_several_runs_is_the_cosine_in_closed_form(updates_per_call):
    step = together(updates_per_call=updates_per_call, actor_lr=0.01)
    for call in range(1, 4):
        step()
        progress = (call * updates_per_call - 1) / 60  # of the call's last update
        expected = 0.005 * (1 + math.cos(math.pi * progress))
        assert step.learning_rates["actor"] == pytest.approx(expected, rel=1e-9)
