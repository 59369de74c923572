"""Decisions that are one of several draws, taken by Q."""

import numpy as np
import pytest
import torch
from problems import ACTION_DIM, OBSERVATION_DIM, small_loss
from scipy.stats import chisquare
from torch import nn

from iql_torchrl import IQLLoss, build_actor, build_qvalues, build_value
from iql_torchrl.data.normalisation import ObservationNormaliser
from iql_torchrl.errors import ConfigurationError
from iql_torchrl.evaluation.choosing import Chooser
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.networks import build_diffusion_actor, build_flow_actor
from iql_torchrl.objectives import DiffusionLoss, FlowLoss

LOW, HIGH = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0])
SIZES = {"observation_dim": OBSERVATION_DIM, "action_dim": ACTION_DIM, "hidden_dims": [16, 16]}
ARCHITECTURES = {
    "tanh_mean_normal": {**SIZES, "policy": "tanh_mean_normal"},
    "tanh_normal": {**SIZES, "policy": "tanh_normal", "standard_deviation": "biased_softplus"},
    "normal": {**SIZES, "policy": "normal", "layer_norm": True, "activation": "gelu"},
    "flow": {**SIZES, "extraction": "flow", "flow_steps": 4},
    "diffusion": {**SIZES, "extraction": "diffusion", "residual_blocks": 1, "dropout": 0.5},
}
LOSSES = {"flow": (FlowLoss, build_flow_actor), "diffusion": (DiffusionLoss, build_diffusion_actor)}


def loss_of(kind):
    torch.manual_seed(0)
    loss, build = LOSSES.get(kind, (IQLLoss, build_actor))
    architecture = {key: value for key, value in ARCHITECTURES[kind].items() if key != "extraction"}
    of_critics = {key: architecture[key] for key in ("hidden_dims", "layer_norm", "activation") if key in architecture}
    found = loss(
        build(**architecture),
        build_qvalues(OBSERVATION_DIM, ACTION_DIM, **of_critics),
        build_value(OBSERVATION_DIM, **of_critics),
    )
    for name, params in found.named_children():  # online and target critics that differ
        if name.startswith("target_"):
            params.data.apply_(lambda p: p.add_(torch.randn_like(p), alpha=0.1))
    return found


def normaliser():
    return ObservationNormaliser(torch.arange(5.0), torch.arange(1.0, 6.0))


def policy_of(kind, **choice):
    return Policy.from_loss(loss_of(kind), LOW, HIGH, normaliser(), **choice)


def observations(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, OBSERVATION_DIM)).astype(np.float32)


@pytest.mark.parametrize("aggregation", ["min", "mean"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_draw_with_the_largest_of_the_smaller_qs_or_of_their_mean_is_taken(kind, aggregation):
    loss = loss_of(kind)
    loss.qvalue_aggregation = aggregation
    policy = Policy.from_loss(loss, LOW, HIGH, normaliser(), num_samples=8)
    observation = observations(20)
    noise, _ = policy.chooser.noise_for(observation, 0)
    rows = normaliser()(torch.from_numpy(observation))
    params = (
        loss.qvalue_network_params if kind == "flow" else dict(loss.named_children())["target_qvalue_network_params"]
    )
    with torch.no_grad():
        draws = policy.chooser.draws.generate(rows.unsqueeze(1), noise)
        q = []
        for params_of_one in params.data.unbind(0):
            critic = build_qvalues(
                OBSERVATION_DIM,
                ACTION_DIM,
                hidden_dims=[16, 16],
                layer_norm=kind == "normal",
                activation="gelu" if kind == "normal" else "relu",
            )[0]
            params_of_one.to_module(critic)
            q.append(critic.module(rows.unsqueeze(1).expand(-1, 8, -1), draws).squeeze(-1))
    best = (torch.stack(q).amin(0) if aggregation == "min" else torch.stack(q).mean(0)).argmax(1)
    expected = LOW + (draws[torch.arange(20), best] + 1) / 2 * (HIGH - LOW)
    np.testing.assert_allclose(policy(observation), expected, rtol=1e-5, atol=1e-5)
    assert len(best.unique()) > 2


@pytest.mark.parametrize("kind", ["tanh_mean_normal", "tanh_normal", "normal"])
def test_draws_of_normal_policies_are_distributed_as_their_distribution(kind):
    policy = policy_of(kind, num_samples=20_000)
    observation = observations(1)
    noise, _ = policy.chooser.noise_for(observation, 0)
    with torch.no_grad():
        rows = normaliser()(torch.from_numpy(observation))
        found = policy.chooser.draws.generate(rows.unsqueeze(1), noise)[0]
        mean, scale = policy.chooser.draws.network(rows)
        expected = mean + scale * torch.randn(20_000, ACTION_DIM)
        expected = (expected.tanh() if kind == "tanh_normal" else expected).clamp(-1, 1)
    for quantile in (0.1, 0.5, 0.9):
        torch.testing.assert_close(found.quantile(quantile, 0), expected.quantile(quantile, 0), rtol=0, atol=0.06)


@pytest.mark.parametrize("num_samples", [1, 3, 8, 32])
@pytest.mark.parametrize("kind", ["tanh_mean_normal", "flow", "diffusion"])
def test_an_observation_has_the_same_action_by_itself_and_in_a_batch_of_any_size(kind, num_samples):
    policy = policy_of(kind, num_samples=num_samples)
    observation = observations(16)
    actions = policy(observation)
    assert actions.dtype == np.float32 and actions.shape == (16, ACTION_DIM)
    for size in (1, 2, 5, 9):
        assert np.array_equal(policy(observation[:size]), actions[:size])
    assert all(np.array_equal(policy(row), action) for row, action in zip(observation, actions, strict=True))
    assert np.array_equal(policy(observation.reshape(4, 4, -1)), actions.reshape(4, 4, -1))
    assert policy(observation[:0]).shape == (0, ACTION_DIM)


@pytest.mark.parametrize("selection", ["largest", "expectile", "exponential"])
@pytest.mark.parametrize("kind", ["tanh_mean_normal", "flow", "diffusion"])
def test_a_decision_hangs_on_observation_and_seed_alone_and_moves_no_generator(kind, selection):
    policy, observation = policy_of(kind, num_samples=4, selection=selection), observations(5)
    before, of_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    actions = policy(observation)
    torch.manual_seed(5)
    assert np.array_equal(policy(observation), actions)
    torch.set_rng_state(before)
    policy(observation)
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], of_numpy)
    noise, _ = policy.chooser.noise_for(observation, 0)
    assert len(noise.flatten(1).unique(dim=0)) == 5  # every observation has its own
    assert not torch.equal(policy.chooser.noise_for(observation, 1)[0], noise)


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
def test_what_is_explored_with_a_policy_without_a_distribution_are_its_decisions_of_other_seeds(kind):
    policy, observation = policy_of(kind), observations(5)
    before = torch.get_rng_state()
    assert np.array_equal(policy.explore(observation, 3), policy.explore(observation, 3))
    assert not np.array_equal(policy.explore(observation, 3), policy.explore(observation, 4))
    assert np.array_equal(policy.explore(observation, 0), policy(observation))
    noisy = policy.explore(observation, 3, noise=0.1)
    assert 0 < np.abs(noisy - policy.explore(observation, 3)).max() < 5
    assert torch.equal(torch.get_rng_state(), before)


def test_a_normal_policy_explores_with_one_draw_however_many_a_decision_takes():
    one, several = policy_of("tanh_mean_normal"), policy_of("tanh_mean_normal", num_samples=16)
    assert np.array_equal(one.explore(observations(5), 3), several.explore(observations(5), 3))
    assert not np.array_equal(one(observations(5)), several(observations(5)))


def test_with_one_draw_a_normal_policy_acts_by_its_mean_and_others_by_that_draw():
    plain = policy_of("tanh_mean_normal")
    assert not plain.chooses and plain.chooser.num_samples == 1
    assert not policy_of("tanh_mean_normal", num_samples=1).chooses
    flow = policy_of("flow", num_samples=1)
    assert flow.chooses and policy_of("flow").chooser.num_samples == 32
    assert not np.array_equal(flow(observations(3)), policy_of("flow")(observations(3)))


class Fixed(nn.Module):
    """Q as the first number of an action, or V as one number."""

    def __init__(self, value=None):
        super().__init__()
        self.value = value

    def forward(self, observation, action=None):
        if action is None:
            return torch.full_like(observation[..., :1], self.value)
        return action[..., :1]


class Listed(nn.Module):
    """Draws that are always these."""

    noises, action_dim = 1, 1

    def __init__(self, actions):
        super().__init__()
        self.actions = torch.tensor(actions).unsqueeze(-1)

    def generate(self, observation, noise):
        return self.actions.expand(len(noise), -1, -1)


ADVANTAGES = [-0.5, -0.1, 0.2, 0.4, 0.9]


@pytest.mark.parametrize("selection", ["expectile", "exponential"])
def test_draws_are_taken_as_often_as_their_weights_say(selection):
    options = {"num_samples": 5, "selection": selection, "expectile": 0.8, "temperature": 2.0, "max_weight": 3.0}
    chooser = Chooser(Listed([0.05 + one for one in ADVANTAGES]), [Fixed(), Fixed()], Fixed(0.05), **options)
    rows = observations(20_000)
    taken = chooser(torch.from_numpy(rows), *chooser.noise_for(rows, 0)).flatten() - 0.05
    counts = [int(torch.isclose(taken, torch.tensor(one), atol=1e-6).sum()) for one in ADVANTAGES]
    if selection == "expectile":
        weights = np.array([0.2, 0.2, 0.8, 0.8, 0.8])
    else:
        weights = np.minimum(np.exp(2.0 * np.array(ADVANTAGES)), 3.0)
    assert sum(counts) == 20_000
    assert chisquare(counts, 20_000 * weights / weights.sum()).pvalue > 1e-3


@pytest.mark.parametrize("expectile", [1.0, 0.5])
def test_at_an_expectile_of_one_only_what_is_better_than_v_is_taken(expectile):
    options = {"num_samples": 5, "selection": "expectile", "expectile": expectile}
    chooser = Chooser(Listed(ADVANTAGES), [Fixed()], Fixed(0.0), **options)
    rows = observations(200)
    taken = chooser(torch.from_numpy(rows), *chooser.noise_for(rows, 0))
    assert bool((taken > 0).all()) == (expectile == 1.0)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_stored_policy_takes_the_same_draws_and_others_where_asked(kind, tmp_path):
    policy = policy_of(kind, num_samples=8, selection="exponential")
    torch.save(policy.state_dict(ARCHITECTURES[kind]), tmp_path / "policy.pt")
    state = torch.load(tmp_path / "policy.pt", weights_only=True)
    observation = observations(6)
    assert np.array_equal(Policy.from_state_dict(state)(observation), policy(observation))
    other = Policy.from_state_dict(state, num_samples=2, selection="largest")
    assert (other.chooser.num_samples, other.chooser.selection) == (2, "largest")
    assert np.array_equal(other(observation), policy_of(kind, num_samples=2)(observation))


def test_a_stored_policy_keeps_the_layer_norm_of_each_network_and_the_mean_of_the_critics(tmp_path):
    loss = IQLLoss(
        build_actor(**SIZES),
        build_qvalues(OBSERVATION_DIM, ACTION_DIM, hidden_dims=[16, 16], layer_norm=True),
        build_value(OBSERVATION_DIM, hidden_dims=[16, 16]),
        qvalue_aggregation="mean",
    )
    policy = Policy.from_loss(loss, LOW, HIGH, num_samples=8, selection="exponential")
    torch.save(policy.state_dict(SIZES), tmp_path / "policy.pt")
    restored = Policy.from_state_dict(torch.load(tmp_path / "policy.pt", weights_only=True))
    assert restored.chooser.qvalue_aggregation == "mean"
    assert np.array_equal(restored(observations(6)), policy(observations(6)))


def test_the_critics_follow_the_training():
    loss = loss_of("flow")
    policy, observation = Policy.from_loss(loss, LOW, HIGH), observations(8)
    before = policy(observation)
    loss.qvalue_network_params.data.apply_(lambda p: p.neg_())
    assert not np.array_equal(policy(observation), before)


def test_dropout_does_not_act():
    policy, observation = policy_of("diffusion"), observations(3)
    assert not any(module.training for module in policy.chooser.modules())
    assert np.array_equal(policy(observation), policy(observation))


@pytest.mark.parametrize("policy", ["deterministic"])
def test_several_draws_of_a_policy_without_randomness_are_refused(policy):
    torch.manual_seed(0)
    loss = IQLLoss(
        build_actor(OBSERVATION_DIM, ACTION_DIM, policy=policy, hidden_dims=(16,)),
        build_qvalues(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(16,)),
        build_value(OBSERVATION_DIM, hidden_dims=(16,)),
    )
    with pytest.raises(
        ConfigurationError, match=r"num_samples=4 needs a stochastic policy.*no randomness; leave it out"
    ):
        Policy.from_loss(loss, LOW, HIGH, num_samples=4)
    state = Policy.from_loss(loss, LOW, HIGH).state_dict({**SIZES, "hidden_dims": [16], "policy": policy})
    with pytest.raises(ConfigurationError, match=r"num_samples=4 needs a stochastic policy"):
        Policy.from_state_dict(state, num_samples=4)
    assert not Policy.from_state_dict(state, num_samples=1).chooses


def test_several_draws_of_a_checkpoint_without_critics_are_refused():
    state = Policy.from_loss(small_loss(), LOW, HIGH).state_dict(SIZES)
    del state["chooser"]
    assert not Policy.from_state_dict(state).chooses
    with pytest.raises(ConfigurationError, match=r"num_samples=4 needs critics, without which this checkpoint"):
        Policy.from_state_dict(state, num_samples=4)


@pytest.mark.parametrize(
    ("choice", "words"),
    [({"num_samples": 0}, "num_samples must be"), ({"selection": "smallest"}, "selection must be one of largest")],
)
def test_choices_out_of_range_are_refused_by_name(choice, words):
    with pytest.raises(ValueError, match=words):
        policy_of("flow", **choice)
