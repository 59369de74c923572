"""The network builders against densities and layers written out in numpy."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from tensordict import TensorDict
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from iql_torchrl import IQLLoss, build_actor, build_qvalues, build_value
from iql_torchrl.networks import NormalParameters

OBSERVATION_DIM, ACTION_DIM = 5, 3
HIDDEN = (16, 8)
BUILDERS = {
    "actor": lambda **options: build_actor(OBSERVATION_DIM, ACTION_DIM, **options),
    "qvalues": lambda **options: build_qvalues(OBSERVATION_DIM, ACTION_DIM, **options)[0],
    "value": lambda **options: build_value(OBSERVATION_DIM, **options),
}
INPUTS = {"actor": OBSERVATION_DIM, "qvalues": OBSERVATION_DIM + ACTION_DIM, "value": OBSERVATION_DIM}
OUTPUTS = {"actor": ACTION_DIM, "qvalues": 1, "value": 1}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def states(*shape, scale=1.0):
    return TensorDict({"observation": scale * torch.randn(*shape, OBSERVATION_DIM, dtype=torch.float64)}, shape)


def linears(network):
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear)]


def numpy_mlp(network, x, layer_norm=False):
    layers = linears(network)
    for layer in layers:
        x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        if layer is not layers[-1]:
            if layer_norm:
                x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            x = np.maximum(x, 0)
    return x


def set_log_std(actor, value):
    parameter = dict(actor.named_parameters())["module.0.module.log_std"]
    parameter.data.copy_(torch.as_tensor(value))


def is_orthogonal_with_gain_root_two(weight):
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    return torch.allclose(gram, 2 * torch.eye(len(gram), dtype=weight.dtype), atol=1e-5)


# ---------------------------------------------------------------------------------------------- shapes and layers


@pytest.mark.parametrize("hidden_dims", [(7,), (16, 8), [4, 5, 6]])
@pytest.mark.parametrize("name", BUILDERS)
def test_hidden_dims_are_the_widths_of_the_layers(name, hidden_dims):
    widths = [INPUTS[name], *hidden_dims, OUTPUTS[name]]
    shapes = [tuple(layer.weight.shape) for layer in linears(BUILDERS[name](hidden_dims=hidden_dims))]
    assert shapes == list(zip(widths[1:], widths[:-1], strict=True))


@pytest.mark.parametrize("name", BUILDERS)
def test_two_hidden_layers_of_256_are_the_default(name):
    assert [layer.out_features for layer in linears(BUILDERS[name]())] == [256, 256, OUTPUTS[name]]


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_networks_read_and_write_torchrls_keys_for_any_batch_shape(shape):
    batch = states(*shape).float()
    build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN)(batch)
    build_qvalues(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN)[0](batch)
    build_value(OBSERVATION_DIM, hidden_dims=HIDDEN)(batch)
    assert batch["action"].shape == (*shape, ACTION_DIM)
    assert batch["state_action_value"].shape == batch["state_value"].shape == (*shape, 1)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_critics_and_values_are_relu_networks(layer_norm):
    batch = states(6)
    batch["action"] = torch.randn(6, ACTION_DIM, dtype=torch.float64)
    options = {"hidden_dims": HIDDEN, "layer_norm": layer_norm}
    critic, value = build_qvalues(OBSERVATION_DIM, ACTION_DIM, **options)[1], build_value(OBSERVATION_DIM, **options)
    critic.double()(batch)
    value.double()(batch)
    observation, action = batch["observation"].numpy(), batch["action"].numpy()
    expected = numpy_mlp(critic, np.concatenate([observation, action], -1), layer_norm)
    np.testing.assert_allclose(batch["state_action_value"].detach().numpy(), expected, rtol=1e-6, atol=1e-7)
    expected = numpy_mlp(value, observation, layer_norm)
    np.testing.assert_allclose(batch["state_value"].detach().numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_qvalue_nets", [1, 2, 4])
def test_critics_start_different_from_each_other(num_qvalue_nets):
    critics = build_qvalues(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN, num_qvalue_nets=num_qvalue_nets)
    weights = [linears(critic)[0].weight for critic in critics]
    assert len(weights) == num_qvalue_nets
    assert not any(one.equal(other) for i, one in enumerate(weights) for other in weights[:i])


# ---------------------------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("name", BUILDERS)
def test_the_default_initialisation_is_orthogonal_with_gain_root_two_and_no_bias(name):
    for layer in linears(BUILDERS[name](hidden_dims=HIDDEN)):
        assert is_orthogonal_with_gain_root_two(layer.weight)
        assert not layer.bias.any()


def test_the_tanh_normal_policy_is_orthogonal_too():
    layers = linears(build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN, policy="tanh_normal"))
    assert layers[-1].out_features == 2 * ACTION_DIM
    assert all(is_orthogonal_with_gain_root_two(layer.weight) for layer in layers)


@pytest.mark.parametrize("num_qvalue_nets", [1, 3])
def test_orthogonal_weights_survive_inside_the_loss(num_qvalue_nets):
    loss = IQLLoss(
        build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN),
        build_qvalues(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN, num_qvalue_nets=num_qvalue_nets),
        build_value(OBSERVATION_DIM, hidden_dims=HIDDEN),
        num_qvalue_nets=num_qvalue_nets,
        delay_value=True,
    )
    weights = {name: tensor for name, tensor in loss.state_dict().items() if name.endswith("weight")}
    assert len(weights) == 15
    for name, weight in weights.items():
        for one in weight if weight.ndim == 3 else [weight]:
            assert is_orthogonal_with_gain_root_two(one), name


@pytest.mark.parametrize("name", BUILDERS)
def test_the_default_initialisation_of_pytorch_can_be_asked_for(name):
    for layer in linears(BUILDERS[name](hidden_dims=(64, 32), initialisation="default")):
        bound = layer.in_features**-0.5
        assert 0.7 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.any()
        assert not is_orthogonal_with_gain_root_two(layer.weight)


# ---------------------------------------------------------------------------------------------- the paper's policy


def test_the_mean_is_squashed_into_the_open_interval_and_the_standard_deviation_starts_at_one():
    actor, batch = build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN).double(), states(50, scale=2.0)
    distribution = actor.get_dist(batch)
    expected = np.tanh(numpy_mlp(actor, batch["observation"].numpy()))
    np.testing.assert_allclose(distribution.mean.detach().numpy(), expected, rtol=1e-9)
    assert 0.9 < distribution.mean.abs().max() < 1
    assert (distribution.stddev == 1).all()


def test_the_standard_deviation_is_the_same_in_every_state_and_one_number_an_action():
    actor = build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN).double()
    set_log_std(actor, [-1.0, 0.0, 0.5])
    stddev = actor.get_dist(states(4, 5, scale=10.0)).stddev.detach().numpy()
    np.testing.assert_allclose(stddev, np.broadcast_to(np.exp([-1.0, 0.0, 0.5]), (4, 5, ACTION_DIM)), rtol=1e-6)


def test_the_log_standard_deviation_is_clipped_to_minus_five_and_two():
    actor = build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN).double()
    set_log_std(actor, [-5.5, 0.1, 2.5])
    stddev = actor.get_dist(states(2)).stddev.detach().numpy()
    np.testing.assert_allclose(stddev, np.exp([[-5.0, 0.1, 2.0]] * 2), rtol=1e-6)


def test_the_bounds_of_the_log_standard_deviation_can_be_chosen():
    network = NormalParameters(nn.Linear(OBSERVATION_DIM, 2), 2, log_std_bounds=(-20.0, 0.5))
    network.log_std.data.copy_(torch.tensor([-10.0, 1.0]))
    _, scale = network(torch.zeros(1, OBSERVATION_DIM))
    torch.testing.assert_close(scale, torch.tensor([[-10.0, 0.5]]).exp())


def test_the_log_probability_is_a_normal_density_around_the_squashed_mean_without_jacobian():
    actor, batch = build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN).double(), states(2, 4)
    set_log_std(actor, [-1.0, 0.0, 0.5])
    action = torch.rand(2, 4, ACTION_DIM, dtype=torch.float64) * 2 - 1
    mean = np.tanh(numpy_mlp(actor, batch["observation"].numpy()))
    expected = norm.logpdf(action.numpy(), mean, np.exp([-1.0, 0.0, 0.5])).sum(-1)
    computed = actor.get_dist(batch).log_prob(action).detach().numpy()
    np.testing.assert_allclose(computed, expected, rtol=1e-6)


def test_every_parameter_of_the_policy_learns_from_the_log_probability():
    actor, batch = build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN), states(8).float()
    actor.get_dist(batch).log_prob(torch.zeros(8, ACTION_DIM)).sum().backward()
    assert all(parameter.grad.any() for parameter in actor.parameters())


@pytest.mark.parametrize("policy", ["tanh_mean_normal", "tanh_normal"])
def test_the_deterministic_action_is_the_squashed_mean(policy):
    actor = build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN, policy=policy).double()
    batch = states(6)
    expected = np.tanh(numpy_mlp(actor, batch["observation"].numpy())[..., :ACTION_DIM])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = actor(batch)["action"].detach().numpy()
    np.testing.assert_allclose(action, expected, rtol=1e-6)


@pytest.mark.parametrize(("policy", "leaves_the_box"), [("tanh_mean_normal", True), ("tanh_normal", False)])
def test_samples_of_the_papers_policy_are_not_squashed_and_those_of_the_other_are(policy, leaves_the_box):
    actor = build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN, policy=policy)
    with set_exploration_type(ExplorationType.RANDOM):
        action = actor(states(200).float())["action"]
    assert bool((action.abs() > 1).any()) is leaves_the_box


def test_the_action_spec_is_the_unit_box():
    space = build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN).spec["action"].space
    assert space.low.tolist() == [-1.0] * ACTION_DIM and space.high.tolist() == [1.0] * ACTION_DIM


# ---------------------------------------------------------------------------------------------- TorchRL's policy


def test_the_tanh_normal_log_probability_has_the_jacobian_of_tanh():
    actor = build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN, policy="tanh_normal").double()
    batch = states(7, scale=0.5)
    mean, raw = np.split(numpy_mlp(actor, batch["observation"].numpy()), 2, axis=-1)
    # A softplus shifted to give 1 at 0 above its own floor of 0.01, then cut at 0.1 from below.
    std = np.maximum(np.log1p(np.exp(raw + np.log(np.expm1(0.99)))) + 0.01, 0.1)
    action = np.random.default_rng(0).uniform(-0.95, 0.95, (7, ACTION_DIM))
    expected = (norm.logpdf(np.arctanh(action), mean, std) - np.log(1 - action**2)).sum(-1)
    computed = actor.get_dist(batch).log_prob(torch.from_numpy(action)).detach().numpy()
    np.testing.assert_allclose(computed, expected, rtol=1e-6)


def test_the_tanh_normal_standard_deviation_depends_on_the_state_and_is_at_least_a_tenth():
    actor = build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN, policy="tanh_normal")
    scale = actor(states(200, scale=10.0).float())["scale"].detach()
    assert scale.min().item() == pytest.approx(0.1)
    assert scale.max() > 2


def test_the_tanh_normal_standard_deviation_is_one_at_zero():
    actor = build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN, policy="tanh_normal")
    linears(actor)[-1].weight.data.zero_()
    torch.testing.assert_close(actor(states(3).float())["scale"], torch.ones(3, ACTION_DIM))


# ---------------------------------------------------------------------------------------------- dropout


def test_dropout_is_active_in_training_and_inactive_in_evaluation():
    actor, batch = build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN, dropout=0.5).double(), states(8)

    def mean():
        return actor.get_dist(batch.clone()).mean.detach()

    actor.train()
    assert not mean().equal(mean())
    actor.eval()
    np.testing.assert_allclose(mean().numpy(), np.tanh(numpy_mlp(actor, batch["observation"].numpy())), rtol=1e-9)


@pytest.mark.parametrize("dropout", [None, 0.0])
def test_no_dropout_means_that_training_is_deterministic(dropout):
    actor, batch = build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN, dropout=dropout).train(), states(8)
    actor.double()
    assert actor.get_dist(batch.clone()).mean.equal(actor.get_dist(batch.clone()).mean)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_dropout_zeroes_and_rescales_the_output_of_every_hidden_layer(layer_norm):
    actor = build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(64, 64), dropout=0.25, layer_norm=layer_norm)
    batch = states(1).float()
    inputs = []
    for layer in linears(actor):
        layer.register_forward_hook(lambda module, args, output: inputs.append(args[0].detach()))
    actor.eval()(batch.clone())
    kept, dropped = inputs[1], []
    for _ in range(20):
        inputs.clear()
        actor.train()(batch.clone())
        assert inputs[0].equal(batch["observation"])
        alive = (inputs[1] != 0) & (kept > 0)
        torch.testing.assert_close(inputs[1][alive], kept[alive] / 0.75)
        dropped.append((inputs[1] == 0)[kept > 0].float().mean().item())
    assert 0.15 < np.mean(dropped) < 0.35


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("hidden_dims", [(), (0,), (4, -1)])
@pytest.mark.parametrize("name", BUILDERS)
def test_bad_hidden_dims_are_refused_by_name(name, hidden_dims):
    with pytest.raises(ValueError, match=r"^hidden_dims must"):
        BUILDERS[name](hidden_dims=hidden_dims)


@pytest.mark.parametrize("name", BUILDERS)
def test_an_unknown_initialisation_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"^initialisation must be one of orthogonal, default, got 'xavier'"):
        BUILDERS[name](initialisation="xavier")


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, float("nan")])
def test_a_dropout_outside_its_range_is_refused_by_name(dropout):
    with pytest.raises(ValueError, match=r"^dropout must be in"):
        build_actor(OBSERVATION_DIM, ACTION_DIM, dropout=dropout)


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^policy must be one of tanh_mean_normal, tanh_normal, got 'gaussian'"):
        build_actor(OBSERVATION_DIM, ACTION_DIM, policy="gaussian")
