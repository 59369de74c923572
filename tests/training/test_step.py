"""The training step: order, schedule, state, options; its numbers are tested in test_variants.py."""

import copy
import math
import warnings

import pytest
import torch
from problems import ACTION_DIM, OBSERVATION_DIM, random_transitions, small_loss
from torch import nn
from torchrl.data import (
    SamplerWithoutReplacement,
    SliceSampler,
    TensorDictReplayBuffer,
    TensorStorage,
)

from iql_torchrl import TrainingStep, make_buffer

COMPILED = [False, pytest.param(True, marks=pytest.mark.slow)]


def test_the_two_orders_differ():
    results = []
    for order in ("sequential", "joint"):
        loss = small_loss()
        step = TrainingStep(loss, make_buffer(random_transitions(), batch_size=32, seed=0), order=order, compile=False)
        for _ in range(3):
            step()
        results.append(loss.qvalue_network_params.flatten_keys().to_tensordict())
    assert not torch.equal(results[0]["module.4.weight"], results[1]["module.4.weight"])


@pytest.mark.parametrize("compile", COMPILED)
def test_the_actors_rate_follows_the_cosine_in_closed_form(buffer, compile):
    step = TrainingStep(small_loss(), buffer, total_steps=7, actor_lr=0.1, compile=compile)
    for count in range(9):
        step()
        progress = min(count / 7, 1.0)
        assert step.learning_rates["actor"] == pytest.approx(0.05 * (1 + math.cos(math.pi * progress)), abs=1e-8)
        assert step.learning_rates["value"] == pytest.approx(3e-4)
        assert step.count == count + 1


def test_without_total_steps_the_rate_is_constant(buffer):
    step = TrainingStep(small_loss(), buffer, compile=False)
    step()
    step()
    assert step.learning_rates == pytest.approx({"value": 3e-4, "actor": 3e-4, "qvalue": 3e-4})


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_sampled_qvalue_nets": 1, "value_loss": "gumbel"}], ids=["", "sampled"])
@pytest.mark.parametrize("compile", COMPILED)
def test_saving_and_resuming_equals_an_uninterrupted_run_bit_for_bit(compile, options, replacement):
    def build(seed):
        buffer = make_buffer(random_transitions(), batch_size=32, seed=seed, replacement=replacement)
        loss = small_loss(seed, dropout=0.2, **options)
        return TrainingStep(loss, buffer, total_steps=40, compile=compile)

    def weights(step):
        return {name: value.clone() for name, value in step.loss.state_dict().items()}

    straight = build(0)
    torch.manual_seed(11)
    for _ in range(20):
        straight()
    state, random_state = copy.deepcopy(straight.state_dict()), torch.get_rng_state()
    for _ in range(20):
        straight()

    resumed = build(1)
    resumed()  # anything that it did before must not matter
    resumed.load_state_dict(state)
    torch.set_rng_state(random_state)
    assert resumed.count == 20
    for _ in range(20):
        resumed()
    expected, found = weights(straight), weights(resumed)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


@pytest.mark.slow
def test_a_compiled_run_compiles_once_without_graph_breaks_over_5000_updates(buffer):
    counters = torch._dynamo.utils.counters
    counters.clear()
    step = TrainingStep(small_loss(), buffer, total_steps=10_000, compile=True)
    step()
    after_one = {name: dict(values) for name, values in counters.items()}
    for _ in range(4999):
        losses = step()
    compiled = after_one["inductor"]
    assert compiled.get("fxgraph_cache_miss", 0) + compiled.get("fxgraph_cache_hit", 0) == 1
    assert not counters["graph_break"] and not step.compile_note
    assert {name: dict(values) for name, values in counters.items() if values} == after_one
    assert step.count == 5000 and all(torch.isfinite(loss) for loss in losses.values())
    expected = 1.5e-4 * (1 + math.cos(math.pi * 4999 / 10_000))
    assert step.learning_rates["actor"] == pytest.approx(expected, rel=1e-5)


def test_an_update_that_does_not_compile_runs_eagerly_and_says_so(buffer):
    def parameters(compile):
        step = TrainingStep(small_loss(), copy.deepcopy(buffer), compile=compile, products="mkl")
        broken = {"cpp.cxx": ("/bin/false",), "force_disable_caches": True}
        with torch._inductor.config.patch(broken):
            step()
        step()
        return step, step.loss.state_dict()

    (step, found), (_, expected) = parameters(True), parameters(False)
    assert not step.compiled and "the update does not compile; running eagerly: " in step.compile_note
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("compile", COMPILED)
def test_a_scheduled_temperature_takes_effect_at_the_next_update(buffer, compile):
    loss = small_loss(temperature=5.0)
    step = TrainingStep(loss, buffer, compile=compile)
    step()
    loss.temperature = 0.0
    reported = step()
    # With every weight 1, the policy's loss is the negative log-likelihood, as is the entropy reported.
    torch.testing.assert_close(reported["loss_actor"], reported["entropy"])


@pytest.mark.parametrize("delay_value", [False, True])
def test_targets_move_by_tau_towards_their_sources(buffer, delay_value):
    loss = small_loss(delay_value=delay_value)
    step = TrainingStep(loss, buffer, tau=0.25, compile=False)
    before = loss.target_qvalue_network_params.data.clone()
    step()
    expected = before * 0.75 + loss.qvalue_network_params.data * 0.25
    for key, target in loss.target_qvalue_network_params.data.items(True, True):
        torch.testing.assert_close(target, expected[key])
    has_own_target = "target_value_network_params" in dict(loss.named_children())
    assert has_own_target == delay_value
    if delay_value:
        difference = loss.target_value_network_params.data - loss.value_network_params.data
        assert any(bool(leaf.abs().max() > 0) for leaf in difference.values(True, True))


def test_the_loss_sees_its_parameters_move_and_no_warning_asks_for_an_updater(buffer):
    loss = small_loss()
    step = TrainingStep(loss, buffer, compile=False)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    step()
    moved = [name for name, value in loss.state_dict().items() if not torch.equal(value, before.get(name, value))]
    assert len(moved) == sum(
        1 for name in before if "network_params" in name and name.split(".")[-1] in ("weight", "bias", "log_std")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(step.batch())


def test_building_the_step_keeps_the_initial_weights(buffer):
    loss = small_loss()
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    TrainingStep(loss, buffer, compile=False)
    after = loss.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_the_reported_losses_are_those_of_the_loss_module(buffer):
    loss = small_loss()
    step = TrainingStep(loss, buffer, order="joint", compile=False)
    reference = copy.deepcopy(loss)
    reported = step()
    expected = reference(step.batch())
    for key in ("loss_actor", "loss_qvalue", "loss_value", "entropy"):
        torch.testing.assert_close(reported[key], expected[key].detach())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"tau": 0.0}, "tau"),
        ({"tau": 1.5}, "tau"),
        ({"actor_lr": -1.0}, "actor_lr"),
        ({"critic_lr": math.inf}, "critic_lr"),
        ({"order": "backwards"}, "order"),
        ({"total_steps": 0}, "total_steps"),
        ({"compile": "maybe"}, "compile"),
    ],
)
def test_options_out_of_range_are_refused_by_name(buffer, options, name):
    with pytest.raises(ValueError, match=name):
        TrainingStep(small_loss(), buffer, **options)


def test_samplers_that_need_more_than_uniform_draws_are_refused(transitions):
    storage = TensorStorage(transitions)
    slices = TensorDictReplayBuffer(
        storage=storage, sampler=SliceSampler(num_slices=4, traj_key="episode"), batch_size=32
    )
    with pytest.raises(ValueError, match="SliceSampler"):
        TrainingStep(small_loss(), slices, compile=False)
    ragged = TensorDictReplayBuffer(storage=storage, sampler=SamplerWithoutReplacement(), batch_size=32)
    with pytest.raises(ValueError, match="drop_last=True"):
        TrainingStep(small_loss(), ragged, compile=False)


def test_networks_that_share_parameters_are_refused(buffer):
    from tensordict.nn import TensorDictModule

    from iql_torchrl import IQLLoss, build_actor, build_qvalues

    trunk = nn.Linear(OBSERVATION_DIM, OBSERVATION_DIM)
    actor = build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(8,))
    actor.module[0].module.trunk = nn.Sequential(trunk, actor.module[0].module.trunk)
    value = TensorDictModule(
        nn.Sequential(trunk, nn.Linear(OBSERVATION_DIM, 1)), in_keys=["observation"], out_keys=["state_value"]
    )
    loss = IQLLoss(actor, build_qvalues(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(8,)), value)
    with pytest.raises(ValueError, match="share parameters"):
        TrainingStep(loss, buffer, compile=False)


def test_auto_falls_back_to_eager_where_no_compiler_is_found(buffer, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    step = TrainingStep(small_loss(), buffer, compile="auto")
    assert not step.compiled
    assert "no C++ compiler" in step.compile_note
    step()
