"""Stored policies."""

import numpy as np
import pytest
import torch
from problems import ACTION_DIM, OBSERVATION_DIM, small_loss
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from iql_torchrl.data.normalisation import ObservationNormaliser
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.networks import build_actor, build_discrete_actor

ARCHITECTURE = {"observation_dim": OBSERVATION_DIM, "action_dim": ACTION_DIM, "hidden_dims": [16, 16]}
LOW, HIGH = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0])


def normaliser():
    return ObservationNormaliser(torch.arange(5.0), torch.arange(1.0, 6.0))


def test_the_action_is_the_rescaled_mean_of_the_normalised_observation():
    loss = small_loss()
    policy = Policy.from_loss(loss, LOW, HIGH, normaliser())
    observation = torch.randn(7, OBSERVATION_DIM)
    weights = {key[-2:]: leaf.detach() for key, leaf in loss.actor_network_params.items(True, True)}
    x = (observation - torch.arange(5.0)) / torch.arange(1.0, 6.0)
    for layer in ("0", "2"):
        x = (x @ weights[layer, "weight"].T + weights[layer, "bias"]).relu()
    mean = (x @ weights["4", "weight"].T + weights["4", "bias"]).tanh()
    expected = torch.stack([2 * mean[:, 0], 5 * (mean[:, 1] + 1)], -1)
    torch.testing.assert_close(policy(observation), expected)


def test_numpy_gives_numpy_and_single_observations_single_actions():
    policy = Policy.from_loss(small_loss(), LOW, HIGH)
    observations = np.random.default_rng(0).normal(size=(4, OBSERVATION_DIM))
    actions = policy(observations)
    assert isinstance(actions, np.ndarray) and actions.dtype == np.float32 and actions.shape == (4, ACTION_DIM)
    np.testing.assert_allclose(policy(observations[2]), actions[2], rtol=1e-5)


def test_a_policy_follows_the_loss_that_trains_it():
    loss = small_loss()
    policy = Policy.from_loss(loss, LOW, HIGH)
    before = policy(torch.ones(OBSERVATION_DIM))
    for parameter in loss.actor_network_params.parameters():
        parameter.data.mul_(1.5)
    assert not torch.equal(policy(torch.ones(OBSERVATION_DIM)), before)


def test_a_policy_acts_without_dropout_and_leaves_training_mode_alone():
    loss = small_loss(dropout=0.5)
    policy = Policy.from_loss(loss, LOW, HIGH)
    assert torch.equal(policy(torch.ones(OBSERVATION_DIM)), policy(torch.ones(OBSERVATION_DIM)))
    assert loss.actor_network.training


@pytest.mark.parametrize("normalised", [False, True])
def test_a_stored_policy_acts_the_same(tmp_path, normalised):
    policy = Policy.from_loss(small_loss(), LOW, HIGH, normaliser() if normalised else None)
    torch.save(policy.state_dict(ARCHITECTURE), tmp_path / "policy.pt")
    restored = Policy.from_state_dict(torch.load(tmp_path / "policy.pt", weights_only=True))
    observation = torch.randn(3, OBSERVATION_DIM)
    assert torch.equal(policy(observation), restored(observation))


ACTORS = {
    "tanh_mean_normal": (build_actor, ACTION_DIM, {"dropout": 0.5, "layer_norm": True}),
    "tanh_normal": (build_actor, ACTION_DIM, {"standard_deviation": "biased_softplus"}),
    "normal": (build_actor, ACTION_DIM, {"standard_deviation": "state_dependent"}),
    "deterministic": (build_actor, ACTION_DIM, {}),
    "categorical": (build_discrete_actor, 3, {}),
    "one_hot": (build_discrete_actor, 3, {}),
    "mult_one_hot": (build_discrete_actor, [2, 3], {}),
    "binary": (build_discrete_actor, 3, {}),
}


def actor_of(kind):
    build, actions, options = ACTORS[kind]
    kind_of_it = {"policy" if build is build_actor else "action_space": kind}
    torch.manual_seed(0)
    return build(OBSERVATION_DIM, actions, hidden_dims=(16, 16), **kind_of_it, **options)


@pytest.mark.parametrize("shape", [(4,), (8,), (2, 2)])
@pytest.mark.parametrize("kind", ACTORS)
def test_the_action_is_the_one_that_the_actor_writes_into_a_tensordict(kind, shape):
    policy = Policy(actor_of(kind), LOW, HIGH)
    observation = torch.randn(*shape, OBSERVATION_DIM)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        written = policy.actor(TensorDict({"observation": observation}, batch_size=shape))["action"]
    if written.is_floating_point():
        written = (LOW + (written + 1) / 2 * (HIGH - LOW)).clamp(LOW, HIGH)
    action = policy(observation)
    assert torch.equal(action, written) and action.dtype == written.dtype


@pytest.mark.parametrize("kind", ACTORS)
def test_an_observation_has_the_same_action_by_itself_and_in_a_batch_of_any_size(kind):
    policy = Policy(actor_of(kind), LOW, HIGH, normaliser())
    observations = torch.randn(64, OBSERVATION_DIM)
    actions = policy(observations)
    for size in (1, 2, 3, 5, 7, 10, 31, 32):
        assert torch.equal(policy(observations[:size]), actions[:size])
    assert all(torch.equal(policy(row), action) for row, action in zip(observations, actions, strict=True))
    assert torch.equal(policy(observations.reshape(4, 16, -1)), actions.reshape(4, 16, *actions.shape[1:]))
    assert policy(observations[:0]).shape == actions[:0].shape


def test_the_hooks_of_an_actor_see_what_it_reads_and_writes():
    actor = actor_of("tanh_mean_normal")
    policy, seen = Policy(actor, LOW, HIGH), []
    policy(torch.ones(OBSERVATION_DIM))
    handle = actor.register_forward_hook(lambda module, inputs, out: seen.append(set(out.keys())))
    policy(torch.ones(OBSERVATION_DIM))
    handle.remove()
    policy(torch.ones(OBSERVATION_DIM))
    assert seen == [{"observation", "loc", "scale", "action"}]
