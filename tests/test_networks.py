"""The network builders against densities and layers written out in numpy."""

import numpy as np
import pytest
import torch
from scipy.special import erf, expit, log_softmax
from scipy.stats import bernoulli, norm
from tensordict import TensorDict
from torch import nn
from torchrl.data import Binary, Categorical, MultiOneHot, OneHot
from torchrl.envs.utils import ExplorationType, set_exploration_type

from iql_torchrl import IQLLoss, build_actor, build_discrete_actor, build_discrete_qvalues, build_qvalues, build_value

OBSERVATION_DIM, ACTION_DIM = 5, 3
HIDDEN = (16, 8)
BUILDERS = {
    "actor": lambda **options: build_actor(OBSERVATION_DIM, ACTION_DIM, **options),
    "qvalues": lambda **options: build_qvalues(OBSERVATION_DIM, ACTION_DIM, **options)[0],
    "value": lambda **options: build_value(OBSERVATION_DIM, **options),
}
INPUTS = {"actor": OBSERVATION_DIM, "qvalues": OBSERVATION_DIM + ACTION_DIM, "value": OBSERVATION_DIM}
OUTPUTS = {"actor": ACTION_DIM, "qvalues": 1, "value": 1}
POLICIES = ["tanh_mean_normal", "tanh_normal", "normal", "deterministic"]
NORMAL_POLICIES = POLICIES[:3]
STANDARD_DEVIATIONS = ["state_independent", "state_dependent", "biased_softplus", "constant"]
TORCHRL = {"policy": "tanh_normal", "standard_deviation": "biased_softplus"}
NUM_ACTIONS = {"categorical": 4, "one_hot": 4, "mult_one_hot": [2, 3], "binary": 3}
OUTPUTS_OF_SPACE = {"categorical": 4, "one_hot": 4, "mult_one_hot": 5, "binary": 3}
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "gelu": lambda x: x * (1 + erf(x / 2**0.5)) / 2,
    "silu": lambda x: x * expit(x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
}
SPECS = {
    "categorical": Categorical(4),
    "one_hot": OneHot(4, dtype=torch.int64),
    "mult_one_hot": MultiOneHot([2, 3], dtype=torch.int64),
    "binary": Binary(3, dtype=torch.int64),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def states(*shape, scale=1.0):
    return TensorDict({"observation": scale * torch.randn(*shape, OBSERVATION_DIM, dtype=torch.float64)}, shape)


def linears(network):
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear)]


def numpy_mlp(network, x, layer_norm=False, activation="relu"):
    layers = linears(network)
    for layer in layers:
        x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        if layer is not layers[-1]:
            if layer_norm:
                x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            x = ACTIVATIONS[activation](x)
    return x


def small_actor(**options):
    return build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=HIDDEN, **options).double()


def outputs_of(actor, batch):
    """What the layers give, before any squashing."""
    return numpy_mlp(actor, batch["observation"].numpy())


def set_log_std(actor, value):
    parameter = dict(actor.named_parameters())["module.0.module.log_std"]
    parameter.data.copy_(torch.tensor(value, dtype=torch.float64))


def random_actions(*shape):
    return torch.rand(*shape, ACTION_DIM, dtype=torch.float64) * 1.9 - 0.95


def biased_softplus(x):
    """A softplus shifted to give 1 at 0 above its own floor of 0.01, then cut at 0.1 from below."""
    return np.maximum(np.log1p(np.exp(x + np.log(np.expm1(0.99)))) + 0.01, 0.1)


def act(actor, batch, exploration=ExplorationType.DETERMINISTIC):
    with set_exploration_type(exploration):
        return actor(batch.clone())["action"].detach()


def assert_close(computed, expected, rtol=1e-10):
    np.testing.assert_allclose(computed.detach().numpy(), expected, rtol=rtol, atol=1e-12)


def is_orthogonal(weight, gain=2**0.5):
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    return torch.allclose(gram / gain**2, torch.eye(len(gram), dtype=weight.dtype), atol=1e-5)


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
    assert_close(batch["state_action_value"], expected)
    assert_close(batch["state_value"], numpy_mlp(value, observation, layer_norm))


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
        assert is_orthogonal(layer.weight)
        assert not layer.bias.any()


@pytest.mark.parametrize("policy", NORMAL_POLICIES)
def test_torchrls_standard_deviation_shares_one_orthogonal_layer_with_the_mean(policy):
    layers = linears(small_actor(policy=policy, standard_deviation="biased_softplus"))
    assert layers[-1].out_features == 2 * ACTION_DIM
    assert all(is_orthogonal(layer.weight) and not layer.bias.any() for layer in layers)


@pytest.mark.parametrize("policy", NORMAL_POLICIES)
def test_a_state_dependent_standard_deviation_starts_from_an_orthogonal_half_layer_with_gain_a_thousandth(policy):
    *hidden, last = linears(small_actor(policy=policy, standard_deviation="state_dependent"))
    mean, log_std = last.weight.split(ACTION_DIM)
    assert is_orthogonal(mean) and is_orthogonal(log_std, gain=1e-3)
    assert all(is_orthogonal(layer.weight) for layer in hidden)
    assert not last.bias.any()


def test_a_state_dependent_standard_deviation_has_pytorchs_initialisation_where_that_is_asked_for():
    options = {"standard_deviation": "state_dependent", "initialisation": "default"}
    last = linears(build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(64,), **options))[-1]
    bound = last.in_features**-0.5
    for half in last.weight.split(ACTION_DIM):
        assert 0.7 * bound < half.abs().max() <= bound
    assert last.bias.all()


@pytest.mark.parametrize("space", NUM_ACTIONS)
def test_discrete_networks_are_orthogonal_by_default_and_pytorchs_where_asked_for(space):
    for options, orthogonal in (({}, True), ({"initialisation": "default"}, False)):
        options = {"action_space": space, "hidden_dims": HIDDEN, **options}
        actor = build_discrete_actor(OBSERVATION_DIM, NUM_ACTIONS[space], **options)
        critics = build_discrete_qvalues(OBSERVATION_DIM, NUM_ACTIONS[space], **options)
        layers = [layer for network in (actor, *critics) for layer in linears(network)]
        assert len(layers) == 9
        assert {is_orthogonal(layer.weight) and not layer.bias.any().item() for layer in layers} == {orthogonal}


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
            assert is_orthogonal(one), name


@pytest.mark.parametrize("name", BUILDERS)
def test_the_default_initialisation_of_pytorch_can_be_asked_for(name):
    for layer in linears(BUILDERS[name](hidden_dims=(64, 32), initialisation="default")):
        bound = layer.in_features**-0.5
        assert 0.7 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.any()
        assert not is_orthogonal(layer.weight)


# ---------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_network_has_the_activation_that_is_asked_for(activation, layer_norm):
    batch = states(6)
    batch["action"] = random_actions(6)
    options = {"hidden_dims": HIDDEN, "activation": activation, "layer_norm": layer_norm}
    states_alone = batch["observation"].numpy()
    both = np.concatenate([states_alone, batch["action"].numpy()], -1)
    networks = {
        "logits": (build_discrete_actor(OBSERVATION_DIM, 4, **options), states_alone),
        "state_value": (build_value(OBSERVATION_DIM, **options), states_alone),
        "state_action_value": (build_qvalues(OBSERVATION_DIM, ACTION_DIM, **options)[1], both),
    }
    for key, (network, inputs) in networks.items():
        found = network.double()(batch.clone())[key]
        assert_close(found, numpy_mlp(network, inputs, layer_norm, activation))
    critic = build_discrete_qvalues(OBSERVATION_DIM, 4, **options)[1].double()
    expected = numpy_mlp(critic, states_alone, layer_norm, activation)
    assert_close(critic(batch.clone())["state_action_value"], expected)
    for policy in POLICIES:
        actor = build_actor(OBSERVATION_DIM, ACTION_DIM, policy=policy, extra_layer=True, **options).double()
        mean = numpy_mlp(actor, states_alone, layer_norm, activation)
        assert_close(act(actor, batch), mean if policy == "normal" else np.tanh(mean))


@pytest.mark.parametrize("name", BUILDERS)
def test_relu_is_the_default_activation(name):
    torch.manual_seed(3)
    default = BUILDERS[name]()
    torch.manual_seed(3)
    chosen = BUILDERS[name](activation="relu")
    assert str(default) == str(chosen) and any(isinstance(layer, nn.ReLU) for layer in default.modules())
    for one, other in zip(default.parameters(), chosen.parameters(), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_another_activation_leaves_the_initial_weights_as_they_are(activation):
    for name, build in BUILDERS.items():
        torch.manual_seed(3)
        expected = [parameter.clone() for parameter in build(hidden_dims=HIDDEN).parameters()]
        torch.manual_seed(3)
        found = list(build(hidden_dims=HIDDEN, activation=activation).parameters())
        assert all(one.equal(other) for one, other in zip(expected, found, strict=True)), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dropout_stands_behind_every_activation_but_the_extra_layers_and_the_squashing(activation):
    actor = small_actor(dropout=0.5, activation=activation, extra_layer=True, policy="deterministic", layer_norm=True)
    kinds = [type(layer).__name__ for layer in actor.modules() if type(layer).__module__.startswith("torch.nn.")]
    kinds = [kind for kind in kinds if kind not in ("Sequential", "ModuleList")]
    kind = {"relu": "ReLU", "tanh": "Tanh", "gelu": "GELU", "silu": "SiLU", "elu": "ELU"}[activation]
    hidden = ["Linear", "LayerNorm", kind]
    assert kinds == [*hidden, "Dropout", *hidden, "Dropout", *hidden, "Linear", "Tanh"]


# ---------------------------------------------------------------------------------------------- policies

MEANS = {"tanh_mean_normal": np.tanh, "tanh_normal": lambda mean: mean, "normal": lambda mean: mean}
SCALES = {
    "state_independent": lambda raw: np.broadcast_to(np.exp([-1.0, 0.0, 0.5]), raw.shape),
    "state_dependent": lambda raw: np.exp(np.clip(raw, -5.0, 2.0)),
    "biased_softplus": biased_softplus,
    "constant": np.ones_like,
}


def random_actor(policy, standard_deviation, **options):
    """Weights of PyTorch's initialisation, with which the standard deviation depends on the state visibly."""
    actor = small_actor(policy=policy, standard_deviation=standard_deviation, initialisation="default", **options)
    if standard_deviation == "state_independent":
        set_log_std(actor, [-1.0, 0.0, 0.5])
    return actor


def mean_and_scale(actor, policy, standard_deviation, batch):
    out = outputs_of(actor, batch)
    return MEANS[policy](out[..., :ACTION_DIM]), SCALES[standard_deviation](out[..., -ACTION_DIM:])


@pytest.mark.parametrize("standard_deviation", STANDARD_DEVIATIONS)
@pytest.mark.parametrize("policy", NORMAL_POLICIES)
def test_the_log_probability_is_a_normal_density_with_a_jacobian_where_the_sample_is_squashed(
    policy, standard_deviation
):
    actor, batch, action = random_actor(policy, standard_deviation), states(2, 4, scale=4.0), random_actions(2, 4)
    mean, scale = mean_and_scale(actor, policy, standard_deviation, batch)
    expected = norm.logpdf(action.numpy(), mean, scale)
    if policy == "tanh_normal":
        expected = norm.logpdf(np.arctanh(action.numpy()), mean, scale) - np.log(1 - action.numpy() ** 2)
    log_prob = actor.get_dist(batch).log_prob(action)
    assert log_prob.shape == (2, 4)
    assert_close(log_prob, expected.sum(-1))


@pytest.mark.parametrize("standard_deviation", STANDARD_DEVIATIONS)
@pytest.mark.parametrize("policy", NORMAL_POLICIES)
def test_the_deterministic_action_is_the_mean_squashed_unless_the_policy_is_a_plain_normal(policy, standard_deviation):
    actor, batch = random_actor(policy, standard_deviation), states(6)
    mean = outputs_of(actor, batch)[..., :ACTION_DIM]
    assert_close(act(actor, batch), mean if policy == "normal" else np.tanh(mean))


@pytest.mark.parametrize("standard_deviation", STANDARD_DEVIATIONS)
@pytest.mark.parametrize("policy", NORMAL_POLICIES)
def test_every_parameter_of_the_policy_learns_from_the_log_probability(policy, standard_deviation):
    actor = random_actor(policy, standard_deviation)
    actor.get_dist(states(32)).log_prob(random_actions(32)).sum().backward()
    gradients = [parameter.grad for parameter in actor.parameters()]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("standard_deviation", STANDARD_DEVIATIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_actions_on_the_bounds_have_a_finite_log_probability_and_finite_gradients(policy, standard_deviation, dtype):
    actor = small_actor(policy=policy, standard_deviation=standard_deviation).to(dtype)
    batch = states(4, scale=3.0).to(dtype)
    action = torch.tensor([[1, -1, 1], [-1, -1, -1], [1, 1, 1], [1, 0, -1]], dtype=dtype)
    log_prob = actor.get_dist(batch).log_prob(action)
    assert log_prob.dtype == dtype and log_prob.isfinite().all()
    log_prob.sum().backward()
    gradients = [parameter.grad for parameter in actor.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(("dtype", "nearest", "rtol"), [(torch.float32, 1e-6, 1e-2), (torch.float64, 1e-15, 1e-2)])
def test_on_the_bounds_the_squashed_density_is_that_of_the_nearest_action_that_it_documents(dtype, nearest, rtol):
    actor = small_actor(policy="tanh_normal").to(dtype)
    batch = states(4, scale=0.3)
    mean = outputs_of(actor.to(torch.float64), batch)
    # 1 - x and 1 - x^2 of x = 1 - nearest, in which no digits cancel.
    unsquashed = 0.5 * (np.log(2 - nearest) - np.log(nearest))
    expected = (norm.logpdf(unsquashed, mean, 1.0) - np.log(nearest * (2 - nearest))).sum(-1)
    computed = actor.to(dtype).get_dist(batch.to(dtype)).log_prob(torch.ones(4, ACTION_DIM, dtype=dtype))
    np.testing.assert_allclose(computed.detach().numpy(), expected, rtol=rtol)


@pytest.mark.parametrize(
    ("policy", "leaves_the_box"),
    [("tanh_mean_normal", True), ("tanh_normal", False), ("normal", True), ("deterministic", False)],
)
def test_only_squashed_samples_stay_in_the_box(policy, leaves_the_box):
    action = act(small_actor(policy=policy), states(200), ExplorationType.RANDOM)
    assert bool((action.abs() > 1).any()) is leaves_the_box


@pytest.mark.parametrize("policy", POLICIES)
def test_the_action_spec_is_the_unit_box(policy):
    space = small_actor(policy=policy).spec["action"].space
    assert space.low.tolist() == [-1.0] * ACTION_DIM and space.high.tolist() == [1.0] * ACTION_DIM


# ---------------------------------------------------------------------------------------------- the paper's policy


def test_the_default_policy_is_a_normal_around_a_squashed_mean_with_standard_deviation_one():
    actor, batch = small_actor(), states(50, scale=2.0)
    distribution = actor.get_dist(batch)
    assert_close(distribution.mean, np.tanh(outputs_of(actor, batch)))
    assert 0.9 < distribution.mean.abs().max() < 1
    assert (distribution.stddev == 1).all()


# ---------------------------------------------------------------------------------------------- standard deviations


@pytest.mark.parametrize("policy", NORMAL_POLICIES)
def test_a_state_independent_standard_deviation_is_the_same_in_every_state_and_one_number_an_action(policy):
    actor = random_actor(policy, "state_independent")
    scale = actor(states(4, 5, scale=10.0))["scale"]
    assert_close(scale, np.broadcast_to(np.exp([-1.0, 0.0, 0.5]), (4, 5, ACTION_DIM)))
    assert linears(actor)[-1].out_features == ACTION_DIM


def test_a_state_independent_log_standard_deviation_is_clipped_to_minus_five_and_two():
    actor = small_actor()
    set_log_std(actor, [-5.5, 0.1, 2.5])
    assert_close(actor.get_dist(states(2)).stddev, np.exp([[-5.0, 0.1, 2.0]] * 2))


@pytest.mark.parametrize("log_std_bounds", [(-20.0, 0.5), [-1, 1]])
@pytest.mark.parametrize("standard_deviation", STANDARD_DEVIATIONS[:2])
@pytest.mark.parametrize("policy", NORMAL_POLICIES)
def test_the_bounds_of_the_log_standard_deviation_can_be_chosen(policy, standard_deviation, log_std_bounds):
    actor = small_actor(policy=policy, standard_deviation=standard_deviation, log_std_bounds=log_std_bounds)
    raw = [-10.0, 0.2, 1.5]
    if standard_deviation == "state_independent":
        set_log_std(actor, raw)
    else:
        last = linears(actor)[-1]
        last.weight.data.zero_()
        last.bias.data[ACTION_DIM:] = torch.tensor(raw, dtype=torch.float64)
    assert_close(actor(states(2))["scale"], np.exp([np.clip(raw, *log_std_bounds)] * 2))


def test_a_state_dependent_log_standard_deviation_is_clipped_and_learns_nothing_beyond_its_bounds():
    actor = small_actor(standard_deviation="state_dependent")
    bias = linears(actor)[-1].bias
    bias.data[ACTION_DIM:] = torch.tensor([-6.0, 0.0, 3.0], dtype=torch.float64)
    batch = states(50)
    scale = actor(batch.clone())["scale"]
    assert_close(scale[:, [0, 2]], np.exp([[-5.0, 2.0]] * 50))
    assert (scale[:, 1].std() > 0) and (scale[:, 1] - 1).abs().max() < 0.1
    actor.get_dist(batch).log_prob(random_actions(50)).sum().backward()
    assert (bias.grad[ACTION_DIM:] != 0).tolist() == [False, True, False]


def test_torchrls_standard_deviation_depends_on_the_state_and_is_at_least_a_tenth():
    scale = small_actor(**TORCHRL)(states(200, scale=10.0))["scale"].detach()
    assert scale.min().item() == pytest.approx(0.1, rel=1e-12)
    assert scale.max() > 2


def test_torchrls_standard_deviation_is_one_at_zero():
    actor = small_actor(**TORCHRL)
    linears(actor)[-1].weight.data.zero_()
    assert_close(actor(states(3))["scale"], np.ones((3, ACTION_DIM)), rtol=1e-14)


# ---------------------------------------------------------------------------------------------- deterministic policy


def test_the_deterministic_policy_acts_by_the_tanh_of_its_network_whether_exploring_or_not():
    actor, batch = small_actor(policy="deterministic"), states(2, 6)
    for exploration in (ExplorationType.DETERMINISTIC, ExplorationType.MODE, ExplorationType.RANDOM):
        assert_close(act(actor, batch, exploration), np.tanh(outputs_of(actor, batch)))


def test_the_log_probability_of_the_deterministic_policy_is_minus_the_squared_error():
    actor, batch, action = small_actor(policy="deterministic"), states(2, 6), random_actions(2, 6)
    error = action.numpy() - np.tanh(outputs_of(actor, batch))
    assert_close(actor.get_dist(batch).log_prob(action), -(error**2).sum(-1))


@pytest.mark.parametrize("standard_deviation", STANDARD_DEVIATIONS)
def test_the_deterministic_policy_has_no_standard_deviation_to_learn(standard_deviation):
    actor = small_actor(policy="deterministic", standard_deviation=standard_deviation)
    assert [layer.out_features for layer in linears(actor)] == [*HIDDEN, ACTION_DIM]
    assert len(list(actor.parameters())) == 2 * len(linears(actor))


# ---------------------------------------------------------------------------------------------- extra layer


@pytest.mark.parametrize("policy", POLICIES)
def test_an_extra_layer_has_the_last_width(policy):
    assert [layer.out_features for layer in linears(small_actor(policy=policy, extra_layer=True))] == [16, 8, 8, 3]


def test_the_extra_layer_is_a_hidden_one_like_the_others():
    for layer_norm in (False, True):
        actor, batch = small_actor(extra_layer=True, layer_norm=layer_norm), states(6)
        expected = np.tanh(numpy_mlp(actor, batch["observation"].numpy(), layer_norm))
        assert_close(actor.get_dist(batch).mean, expected)
    assert all(is_orthogonal(layer.weight) for layer in linears(actor))


def test_the_extra_layer_has_no_dropout_behind_it():
    actor = build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(64, 64), dropout=0.5, extra_layer=True).train()
    # With positive weights every unit is alive unless it is dropped.
    for parameter in actor.parameters():
        parameter.data.abs_().add_(0.01)
    inputs = []
    for layer in linears(actor):
        layer.register_forward_hook(lambda module, args, output: inputs.append(args[0].detach()))
    actor(TensorDict({"observation": torch.ones(20, OBSERVATION_DIM)}, [20]))
    assert [bool((x == 0).any()) for x in inputs] == [False, True, True, False]


# ---------------------------------------------------------------------------------------------- dropout


def test_dropout_is_active_in_training_and_inactive_in_evaluation():
    actor, batch = small_actor(dropout=0.5), states(8)

    def mean():
        return actor.get_dist(batch.clone()).mean.detach()

    actor.train()
    assert not mean().equal(mean())
    actor.eval()
    assert_close(mean(), np.tanh(outputs_of(actor, batch)))


@pytest.mark.parametrize("dropout", [None, 0.0])
def test_no_dropout_means_that_training_is_deterministic(dropout):
    actor, batch = small_actor(dropout=dropout).train(), states(8)
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


# ---------------------------------------------------------------------------------------------- discrete actions


def discrete_actor(space, **options):
    options = {"action_space": space, "hidden_dims": HIDDEN, **options}
    return build_discrete_actor(OBSERVATION_DIM, NUM_ACTIONS[space], **options).double()


def discrete_log_prob(space, logits, action):
    """log pi(a | s) of one state."""
    if space == "categorical":
        return log_softmax(logits)[action]
    if space == "one_hot":
        return log_softmax(logits)[list(action).index(1)]
    if space == "binary":
        return bernoulli.logpmf(action, expit(logits)).sum()
    parts = zip(np.split(logits, [2]), np.split(action, [2]), strict=True)
    return sum(discrete_log_prob("one_hot", logits_of_part, chosen) for logits_of_part, chosen in parts)


def likeliest(space, logits):
    if space == "categorical":
        return logits.argmax(-1)
    if space == "binary":
        return logits > 0
    parts = [logits] if space == "one_hot" else np.split(logits, [2], -1)
    return np.concatenate([np.eye(part.shape[-1])[part.argmax(-1)] for part in parts], -1)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("space", NUM_ACTIONS)
def test_discrete_networks_read_and_write_torchrls_keys_for_any_batch_shape(space, shape):
    options = {"action_space": space, "hidden_dims": HIDDEN, "num_qvalue_nets": 3}
    batch, critics = states(*shape), build_discrete_qvalues(OBSERVATION_DIM, NUM_ACTIONS[space], **options)
    discrete_actor(space)(batch)
    assert len(critics) == 3
    assert batch["action"].shape == SPECS[space].expand(*shape, *SPECS[space].shape).shape
    assert batch["logits"].shape == (*shape, OUTPUTS_OF_SPACE[space])
    for critic in critics:
        critic.double()(batch)
        assert batch["state_action_value"].shape == (*shape, OUTPUTS_OF_SPACE[space] + (space == "binary"))
        assert_close(batch["state_action_value"], numpy_mlp(critic, batch["observation"].numpy()))


@pytest.mark.parametrize("space", NUM_ACTIONS)
def test_the_discrete_log_probability_is_that_of_the_logits(space):
    actor, batch = discrete_actor(space), states(12)
    action = SPECS[space].rand((12,)).to(torch.int64 if space == "categorical" else torch.float64)
    pairs = zip(outputs_of(actor, batch), action.numpy(), strict=True)
    expected = [discrete_log_prob(space, logits, one) for logits, one in pairs]
    assert_close(actor.get_dist(batch).log_prob(action), expected)


@pytest.mark.parametrize("space", NUM_ACTIONS)
def test_the_deterministic_discrete_action_is_the_likeliest(space):
    actor, batch = discrete_actor(space), states(30)
    action = act(actor, batch).numpy()
    expected = likeliest(space, outputs_of(actor, batch))
    assert (action == expected).all()
    assert len(np.unique(action, axis=0)) > 1


@pytest.mark.parametrize("space", NUM_ACTIONS)
def test_sampled_discrete_actions_are_of_the_space_and_differ(space):
    actor, batch = discrete_actor(space), states(1).expand(100)
    action = act(actor, batch, ExplorationType.RANDOM)
    assert SPECS[space].is_in(action)
    assert len(action.unique(dim=0)) > 1


@pytest.mark.parametrize("space", NUM_ACTIONS)
def test_the_spec_of_a_discrete_actor_is_that_of_its_space(space):
    assert discrete_actor(space).spec["action"] == SPECS[space]


@pytest.mark.parametrize("exploration", [ExplorationType.DETERMINISTIC, ExplorationType.MODE, ExplorationType.RANDOM])
@pytest.mark.parametrize("space", NUM_ACTIONS)
def test_discrete_actions_are_in_the_actors_own_spec(space, exploration):
    actor = discrete_actor(space)
    assert actor.spec["action"].is_in(act(actor, states(4), exploration))


@pytest.mark.parametrize("space", NUM_ACTIONS)
def test_actions_that_the_spec_draws_have_a_log_probability(space):
    actor = discrete_actor(space)
    assert actor.get_dist(states(4)).log_prob(actor.spec["action"].rand((4,))).isfinite().all()


@pytest.mark.parametrize("space", ["one_hot", "mult_one_hot"])
def test_a_deterministic_discrete_action_is_a_single_one_where_the_logits_are_equal(space):
    actor = discrete_actor(space)
    batch = TensorDict({"observation": torch.zeros(3, OBSERVATION_DIM, dtype=torch.float64)}, [3])
    assert SPECS[space].is_in(act(actor, batch).to(SPECS[space].dtype))


def test_dropout_and_layer_norm_of_a_discrete_actor_are_those_of_the_others():
    actor, batch = discrete_actor("categorical", dropout=0.5, layer_norm=True), states(8)
    assert not actor.train()(batch.clone())["logits"].equal(actor(batch.clone())["logits"])
    expected = numpy_mlp(actor, batch["observation"].numpy(), layer_norm=True)
    assert_close(actor.eval()(batch)["logits"], expected)


# ---------------------------------------------------------------------------------------------- refusals

DISCRETE_BUILDERS = {"discrete_actor": build_discrete_actor, "discrete_qvalues": build_discrete_qvalues}
ALL_BUILDERS = BUILDERS | {
    name: lambda builder=builder, **options: builder(OBSERVATION_DIM, 4, **options)
    for name, builder in DISCRETE_BUILDERS.items()
}
OF_SIZES = {
    "actor": build_actor,
    "qvalues": build_qvalues,
    "value": lambda observation_dim, _: build_value(observation_dim),
    **DISCRETE_BUILDERS,
}


@pytest.mark.parametrize("hidden_dims", [(), (0,), (4, -1), 5, None, (4.5,), "ab", (True,)])
@pytest.mark.parametrize("name", ALL_BUILDERS)
def test_bad_hidden_dims_are_refused_by_name(name, hidden_dims):
    with pytest.raises(ValueError, match=r"^hidden_dims must"):
        ALL_BUILDERS[name](hidden_dims=hidden_dims)


@pytest.mark.parametrize("name", ALL_BUILDERS)
def test_an_unknown_initialisation_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"^initialisation must be one of orthogonal, default, got 'xavier'"):
        ALL_BUILDERS[name](initialisation="xavier")


@pytest.mark.parametrize("name", ALL_BUILDERS)
def test_an_unknown_activation_is_refused_by_name(name):
    expected = r"^activation must be one of relu, tanh, gelu, silu, elu, got 'rellu'; did you mean 'relu'"
    with pytest.raises(ValueError, match=expected):
        ALL_BUILDERS[name](activation="rellu")


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize("name", ["actor", "discrete_actor"])
def test_a_dropout_outside_its_range_is_refused_by_name(name, dropout):
    with pytest.raises(ValueError, match=r"^dropout must be None or a number in"):
        ALL_BUILDERS[name](dropout=dropout)


def test_an_unknown_policy_is_refused_by_name():
    expected = r"^policy must be one of tanh_mean_normal, tanh_normal, normal, deterministic, got 'gaussian'"
    with pytest.raises(ValueError, match=expected):
        small_actor(policy="gaussian")


@pytest.mark.parametrize("policy", POLICIES)
def test_an_unknown_standard_deviation_is_refused_by_name(policy):
    known = "state_independent, state_dependent, biased_softplus, constant"
    expected = rf"^standard_deviation must be one of {known}, got 'fixed'"
    with pytest.raises(ValueError, match=expected):
        small_actor(policy=policy, standard_deviation="fixed")


@pytest.mark.parametrize(
    "log_std_bounds", [(2.0, -5.0), (0.0, 0.0), (1.0,), (), (1.0, 2.0, 3.0), (float("nan"), 1.0), 5, "ab"]
)
def test_bad_bounds_of_the_log_standard_deviation_are_refused_by_name(log_std_bounds):
    with pytest.raises(ValueError, match=r"^log_std_bounds must be two ordered numbers"):
        small_actor(log_std_bounds=log_std_bounds)


@pytest.mark.parametrize("num_qvalue_nets", [0, -1, 1.5, True])
@pytest.mark.parametrize("name", ["qvalues", "discrete_qvalues"])
def test_a_bad_number_of_critics_is_refused_by_name(name, num_qvalue_nets):
    with pytest.raises(ValueError, match=r"^num_qvalue_nets must be an integer >= 1, got "):
        ALL_BUILDERS[name](num_qvalue_nets=num_qvalue_nets)


@pytest.mark.parametrize("size", [0, -1, 2.5, "three"])
@pytest.mark.parametrize("name", ["actor", "value", "discrete_actor", "discrete_qvalues", "qvalues"])
def test_a_bad_size_of_the_observation_is_refused_by_name(name, size):
    with pytest.raises(ValueError, match=rf"^observation_dim must be an integer >= 1, got {size!r}"):
        OF_SIZES[name](size, 3)


@pytest.mark.parametrize("size", [0, -1, 2.5, "three"])
@pytest.mark.parametrize("name", ["actor", "qvalues"])
def test_a_bad_size_of_the_action_is_refused_by_name(name, size):
    with pytest.raises(ValueError, match=rf"^action_dim must be an integer >= 1, got {size!r}"):
        OF_SIZES[name](OBSERVATION_DIM, size)


@pytest.mark.parametrize(
    ("space", "num_actions", "expected"),
    [
        ("categorical", [2, 3], "an integer >= 1 for action_space='categorical'"),
        ("one_hot", [4], "an integer >= 1 for action_space='one_hot'"),
        ("binary", (3,), "an integer >= 1 for action_space='binary'"),
        ("mult_one_hot", 5, "a list of integers >= 1 for action_space='mult_one_hot'"),
        ("mult_one_hot", [], ""),
        ("mult_one_hot", [2, 0], "a list of integers >= 1"),
        ("mult_one_hot", [2, 2.5], "a list of integers >= 1"),
        ("categorical", 0, "an integer >= 1"),
        ("one_hot", -1, "an integer >= 1"),
        ("binary", 2.5, "an integer >= 1"),
    ],
)
@pytest.mark.parametrize("name", DISCRETE_BUILDERS)
def test_a_number_of_actions_that_does_not_fit_the_space_is_refused_by_name(name, space, num_actions, expected):
    with pytest.raises(ValueError, match=f"^num_actions must be {expected}"):
        DISCRETE_BUILDERS[name](OBSERVATION_DIM, num_actions, action_space=space)


@pytest.mark.parametrize("name", DISCRETE_BUILDERS)
def test_an_unknown_action_space_is_refused_by_name(name):
    expected = r"^action_space must be one of categorical, one_hot, mult_one_hot, binary, got 'discrete'"
    with pytest.raises(ValueError, match=expected):
        DISCRETE_BUILDERS[name](OBSERVATION_DIM, 4, action_space="discrete")
