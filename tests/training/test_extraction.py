"""Steps of the policy losses beside IQL's: compiled, several runs at once, resumed, and of one loss at a time."""

import pytest
import torch
from problems import ACTION_DIM, OBSERVATION_DIM, both_ways, random_transitions, stacked_compiled_too

from iql_torchrl import TrainingStep, build_actor, build_qvalues, build_value, make_buffer
from iql_torchrl.networks import build_diffusion_actor, build_flow_actor
from iql_torchrl.objectives import DDPGBCLoss, DiffusionLoss, FlowLoss

EXTRACTIONS = ["ddpgbc", "flow", "diffusion"]
SIZES = {"hidden_dims": (16, 16)}


def loss_of(extraction, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    sizes = (OBSERVATION_DIM, ACTION_DIM)
    if extraction == "ddpgbc":
        kind, actor = DDPGBCLoss, build_actor(*sizes, **SIZES)
    elif extraction == "flow":
        kind, actor = FlowLoss, build_flow_actor(*sizes, **SIZES)
    else:
        kind, actor = DiffusionLoss, build_diffusion_actor(*sizes, hidden_dims=(16,), residual_blocks=1, dropout=0.1)
    return kind(actor, build_qvalues(*sizes, **SIZES), build_value(OBSERVATION_DIM, **SIZES)).to(dtype)


def buffer_of(seed=0, dtype=torch.float32, batch_size=64):
    transitions = random_transitions().apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
    return make_buffer(transitions, batch_size=batch_size, seed=seed)


def step_of(extraction, **options):
    return TrainingStep(loss_of(extraction), buffer_of(), total_steps=400, **{"compile": False, **options})


def policy_losses(step, count):
    return torch.stack([step()["loss_actor"] for _ in range(count)])


@pytest.mark.slow
@pytest.mark.parametrize("extraction", EXTRACTIONS)
def test_the_compiled_update_is_the_eager_one_up_to_what_is_drawn(extraction):
    """A compiler draws in its own way: losses of policies that draw are the same on average."""
    steps = {compile: step_of(extraction, compile=compile) for compile in (False, True)}
    found = {}
    for compile, step in steps.items():
        torch.manual_seed(1)
        losses = [step() for _ in range(300)]
        found[compile] = {name: torch.stack([one[name] for one in losses]) for name in losses[0]}
    assert steps[True].compiled and not steps[True].compile_note
    for name in ("loss_qvalue", "loss_value"):
        torch.testing.assert_close(found[True][name], found[False][name], rtol=1e-3, atol=1e-4)
    eager, compiled = (found[compile]["loss_actor"][200:] for compile in (False, True))
    if extraction == "ddpgbc":
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)
    else:
        error = float((eager.var() / len(eager) + compiled.var() / len(compiled)).sqrt())
        assert float((eager.mean() - compiled.mean()).abs()) < 5 * error
        assert len(compiled.unique()) == len(compiled)  # drawn anew at each update


@pytest.mark.parametrize("order", ["sequential", "joint"])
@both_ways
def test_runs_together_are_the_runs_alone_where_nothing_is_drawn(stacked, order):
    options = {"order": order, "compile": False, "total_steps": 60, "stacked": stacked}
    seeds = (3, 4)
    together = TrainingStep(
        [loss_of("ddpgbc", seed, torch.float64) for seed in seeds],
        [buffer_of(seed, torch.float64) for seed in seeds],
        **options,
    )
    alone = [
        TrainingStep(loss_of("ddpgbc", seed, torch.float64), buffer_of(seed, torch.float64), **options)
        for seed in seeds
    ]
    for _ in range(20):
        losses, expected = together(), [step() for step in alone]
    for run, step in enumerate(alone):
        for name, value in expected[run].items():
            torch.testing.assert_close(losses[name][run], value, rtol=1e-9, atol=1e-9)
        for name, value in step.state_dict()["loss"].items():
            torch.testing.assert_close(together.state_dict(run)["loss"][name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("extraction", ["flow", "diffusion"])
@stacked_compiled_too
def test_each_of_several_runs_draws_noise_of_its_own_and_learns_the_same_of_q(stacked, extraction, compile):
    options = {"compile": compile, "stacked": stacked}
    step = TrainingStep([loss_of(extraction) for _ in range(2)], [buffer_of(3), buffer_of(3)], **options)
    for _ in range(3):
        losses = step()
    assert abs(float(losses["loss_actor"][0] - losses["loss_actor"][1])) > 1e-4
    torch.testing.assert_close(losses["loss_qvalue"][0], losses["loss_qvalue"][1])


@pytest.mark.parametrize("extraction", ["flow", "diffusion"])
@both_ways
def test_a_policy_that_draws_learns_beside_others_as_it_does_alone(stacked, extraction):
    options = {"compile": False, "stacked": stacked}
    together = TrainingStep([loss_of(extraction) for _ in range(2)], [buffer_of(3), buffer_of(4)], **options)
    alone = TrainingStep(loss_of(extraction), buffer_of(3), compile=False)
    torch.manual_seed(0)
    beside, by_itself = policy_losses(together, 400)[300:], policy_losses(alone, 400)[300:]
    error = float((beside[:, 0].var() / 100 + by_itself.var() / 100).sqrt())
    assert abs(float(beside[:, 0].mean() - by_itself.mean())) < 5 * error


@pytest.mark.parametrize("extraction", EXTRACTIONS)
def test_a_step_that_is_stored_goes_on_bit_for_bit(extraction):
    step = step_of(extraction)
    for _ in range(5):
        step()
    state, random = step.state_dict(), torch.get_rng_state()
    expected = [step() for _ in range(5)]
    other = step_of(extraction)
    other()
    other.load_state_dict(state)
    torch.set_rng_state(random)
    for one in expected:
        assert all(torch.equal(value, one[name]) for name, value in other().items())
    for name, value in step.state_dict()["loss"].items():
        assert torch.equal(value, other.state_dict()["loss"][name]), name


def test_the_average_of_a_diffusion_follows_by_a_coefficient_of_its_own():
    step = step_of("diffusion", actor_tau=0.25, tau=0.5)
    before = {name: value.clone() for name, value in step.loss.state_dict().items()}
    step()
    for name, value in step.loss.state_dict().items():
        if name.startswith("target_"):
            tau = 0.25 if "actor" in name else 0.5
            expected = before[name].lerp(step.loss.state_dict()[name.removeprefix("target_")], tau)
            torch.testing.assert_close(value, expected)
    assert any(name.startswith("target_actor") for name in before)


@pytest.mark.parametrize("actor_tau", [0.0, 1.5])
def test_a_coefficient_of_the_average_out_of_range_is_refused(actor_tau):
    with pytest.raises(ValueError, match=r"actor_tau must be a number in \(0, 1\]"):
        step_of("diffusion", actor_tau=actor_tau)
