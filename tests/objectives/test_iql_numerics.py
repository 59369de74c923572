"""IQLLoss in numbers: examples by hand, closed forms, finite differences, both precisions and extreme inputs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.modules import IndependentNormal, ProbabilisticActor
from torchrl.objectives import SoftUpdate, ValueEstimators

from iql_torchrl import IQLLoss, TrainingStep

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")

LOSSES = ("loss_actor", "loss_qvalue", "loss_value")
NETWORKS = {"loss_actor": "actor_network", "loss_qvalue": "qvalue_network", "loss_value": "value_network"}
DEFAULT_KEYS = {
    "action": "action",
    "reward": "reward",
    "done": "done",
    "terminated": "terminated",
    "value": "state_value",
    "state_action_value": "state_action_value",
    "log_prob": "_log_prob",
    "priority": "td_error",
}
NESTED_KEYS = {
    "action": ("agents", "move"),
    "reward": ("agents", "gain"),
    "done": ("flags", "over"),
    "terminated": ("flags", "dead"),
    "value": ("heads", "v"),
    "state_action_value": ("heads", "q"),
    "log_prob": ("heads", "log_likelihood"),
    "priority": ("replay", "priority"),
}


class Affine(nn.Module):
    def __init__(self, inputs, outputs=1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(outputs, dtype=torch.float64))

    def forward(self, *inputs):
        return torch.cat(inputs, -1) @ self.weight.T + self.bias


class GaussianPolicy(nn.Module):
    def __init__(self, observation_dim, action_dim):
        super().__init__()
        self.mean = Affine(observation_dim, action_dim)
        self.log_std = nn.Parameter(torch.zeros(action_dim, dtype=torch.float64))

    def forward(self, observation):
        mean = self.mean(observation)
        return mean, self.log_std.exp().expand_as(mean)


def affine_loss(observation_dim=2, action_dim=2, num_qvalue_nets=2, *, gamma=0.99, keys=DEFAULT_KEYS, **options):
    def module(network, in_keys, out_keys):
        return TensorDictModule(network, in_keys=in_keys, out_keys=out_keys)

    actor = ProbabilisticActor(
        module(GaussianPolicy(observation_dim, action_dim), ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        out_keys=[keys["action"]],
        distribution_class=IndependentNormal,
    )
    critics = [
        module(Affine(observation_dim + action_dim), ["observation", keys["action"]], [keys["state_action_value"]])
        for _ in range(num_qvalue_nets)
    ]
    value = module(Affine(observation_dim), ["observation"], [keys["value"]])
    loss = IQLLoss(actor, critics, value, num_qvalue_nets=num_qvalue_nets, **options)
    if keys is not DEFAULT_KEYS:
        loss.set_keys(**keys)
    loss.make_value_estimator(gamma=gamma)
    for name, params in loss.named_children():
        if name.startswith("target_"):
            params.data.apply_(lambda p: p.add_(torch.randn_like(p), alpha=0.5))
    return loss


def affine_batch(*shape, observation_dim=2, action_dim=2, keys=DEFAULT_KEYS, dtype=torch.float64):
    terminated = torch.rand(*shape, 1) < 0.3
    batch = TensorDict({"observation": torch.randn(*shape, observation_dim, dtype=dtype)}, batch_size=shape)
    batch["next", "observation"] = torch.randn(*shape, observation_dim, dtype=dtype)
    batch[keys["action"]] = torch.randn(*shape, action_dim, dtype=dtype)
    for name, entry in (
        ("reward", torch.randn(*shape, 1, dtype=dtype)),
        ("terminated", terminated),
        ("done", terminated | (torch.rand(*shape, 1) < 0.3)),
    ):
        batch[("next", keys[name])] = entry
    return batch


def affine(params, *inputs):
    """Of one network, or of a stack of them in front: ``[number, *B]`` or ``[*B]``, in float64."""
    weight, bias = (params["module", kind].detach().double().numpy() for kind in ("weight", "bias"))
    x = np.concatenate(inputs, -1)
    if weight.ndim == 3:
        return np.stack([x @ w[0] + b for w, b in zip(weight, bias[:, 0], strict=True)])
    return x @ weight[0] + bias[0]


def elementwise(loss, batch, *, gamma, expectile, temperature, max_weight=100.0, target=None, keys=DEFAULT_KEYS):
    """Equations 5, 6 and 7 for affine networks, one array element a transition, in float64."""

    def entry(key):
        return batch[key].double().numpy()

    children = dict(loss.named_children())
    delayed = children.get("target_value_network_params", loss.value_network_params)
    observation, action = entry("observation"), entry(keys["action"])
    qvalues = affine(loss.qvalue_network_params, observation, action).reshape(-1, *batch.shape)
    target_qvalues = affine(loss.target_qvalue_network_params, observation, action).reshape(-1, *batch.shape)
    smallest = target_qvalues.min(0)
    if target is None:
        reward, terminated = (entry(("next", keys[name]))[..., 0] for name in ("reward", "terminated"))
        target = reward + gamma * (1 - terminated) * affine(delayed, entry(("next", "observation")))
    difference = smallest - affine(loss.value_network_params, observation)
    weight = np.minimum(np.exp(temperature * (smallest - affine(delayed, observation))), max_weight)
    policy = loss.actor_network_params["module", "0", "module"].detach().double()
    mean = observation @ policy["mean", "weight"].numpy().T + policy["mean", "bias"].numpy()
    log_prob = norm.logpdf(action, mean, np.exp(policy["log_std"].numpy())).sum(-1)
    return {
        "loss_actor": -weight * log_prob,
        "loss_qvalue": ((target - qvalues) ** 2).sum(0),
        "loss_value": np.where(difference > 0, expectile, 1 - expectile) * difference**2,
        "entropy": -log_prob,
        "td_error": ((target - qvalues) ** 2).max(0),
    }


def set_values(params, weight, bias=0.0):
    weight = torch.tensor(weight, dtype=torch.float64)
    params["module", "weight"].data.copy_(weight.reshape(params["module", "weight"].shape))
    params["module", "bias"].data.fill_(bias)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------- by hand


def delayed_example():
    """One state dimension, one action dimension, gamma 0.5, tau 0.75, temperature ln 2 and these networks."""
    options = {"expectile": 0.75, "temperature": math.log(2), "delay_value": True}
    loss = affine_loss(1, 1, gamma=0.5, **options)
    set_values(loss.qvalue_network_params, [[1.0, 1.0], [2.0, 1.0]])  # Q1 = s + a, Q2 = 2s + a
    set_values(loss.target_qvalue_network_params, [[1.0, 0.5], [1.0, 1.0]])  # target Q1 = s + a/2, Q2 = s + a
    set_values(loss.value_network_params, [0.5])  # V = s/2
    set_values(loss.target_value_network_params, [1.0])  # target V = s
    policy = loss.actor_network_params["module", "0", "module"]  # mean s, standard deviation 1
    policy["mean", "weight"].data.fill_(1.0)
    policy["mean", "bias"].data.zero_()
    return loss


def transitions_by_hand():
    return TensorDict(
        {
            "observation": [[1.0], [2.0]],
            "action": [[2.0], [-2.0]],
            "next": {
                "observation": [[3.0], [1.0]],
                "reward": [[1.0], [-1.0]],
                "done": [[False], [True]],
                "terminated": [[False], [True]],
            },
        },
        batch_size=[2],
    ).apply(lambda x: x.double() if x.is_floating_point() else x)


def test_delayed_value_gives_the_losses_worked_out_by_hand_for_one_transition():
    batch = transitions_by_hand()[:1].clone()  # s = 1, a = 2, r = 1, s' = 3
    out = delayed_example()(batch)
    # u = min(1 + 1, 1 + 2) - 1/2 = 1.5 > 0, so L_V = 0.75 * 1.5^2
    assert out["loss_value"].item() == pytest.approx(1.6875, rel=1e-14)
    # y = 1 + 0.5 * 3 = 2.5, Q = 3 and 4, so L_Q = 0.5^2 + 1.5^2
    assert out["loss_qvalue"].item() == pytest.approx(2.5, rel=1e-14)
    # A = 2 - 1, weight 2^1, log pi = -(2 - 1)^2 / 2 - ln(2 pi) / 2 = -1.4189385332046727
    assert out["loss_actor"].item() == pytest.approx(2.8378770664093453, rel=1e-14)
    assert out["entropy"].item() == pytest.approx(1.4189385332046727, rel=1e-14)
    assert batch["td_error"].tolist() == [2.25]


def test_delayed_value_gives_the_losses_worked_out_by_hand_for_two_transitions():
    batch = transitions_by_hand()  # the second: s = 2, a = -2, r = -1, terminated
    out = delayed_example()(batch)
    # second: u = min(2 - 1, 2 - 2) - 1 = -1 < 0, so 0.25 * 1; mean of 1.6875 and 0.25
    assert out["loss_value"].item() == pytest.approx(0.96875, rel=1e-14)
    # second: y = -1, Q = 0 and 2, so 1 + 9; mean of 2.5 and 10
    assert out["loss_qvalue"].item() == pytest.approx(6.25, rel=1e-14)
    # second: A = 0 - 2, weight 2^-2, log pi = -16 / 2 - ln(2 pi) / 2 = -8.918938533204672;
    # mean of 2.8378770664093453 and 2.229734633301168
    assert out["loss_actor"].item() == pytest.approx(2.5338058498552567, rel=1e-14)
    assert batch["td_error"].tolist() == [2.25, 9.0]


def test_without_delay_the_same_example_uses_the_online_value_throughout():
    loss, delayed = affine_loss(1, 1, gamma=0.5, expectile=0.75, temperature=math.log(2)), delayed_example()
    loss.load_state_dict({k: v for k, v in delayed.state_dict().items() if not k.startswith("target_value")})
    out = loss(transitions_by_hand()[:1].clone())
    assert out["loss_value"].item() == pytest.approx(1.6875, rel=1e-14)
    # y = 1 + 0.5 * 1.5 = 1.75, so 1.25^2 + 2.25^2
    assert out["loss_qvalue"].item() == pytest.approx(6.625, rel=1e-14)
    # A = 2 - 0.5, weight 2^1.5
    assert out["loss_actor"].item() == pytest.approx(2**1.5 * 1.4189385332046727, rel=1e-14)


# ---------------------------------------------------------------------------------------------- gradients


def as_function_of(loss, name, batch):
    """The loss as a function of its own network's leaves, and those leaves."""
    network = f"{NETWORKS[name]}_params"
    params = getattr(loss, network)
    keys = list(params.keys(True, True))

    def function(*leaves):
        given = TensorDict(dict(zip(keys, leaves, strict=True)), batch_size=params.batch_size)
        return getattr(loss, name.removeprefix("loss_") + "_loss")(batch.clone(), parameters={network: given})[0]

    return function, [params[key].detach().clone().requires_grad_() for key in keys]


@pytest.mark.parametrize(
    "options",
    [
        {"delay_value": True},
        {"delay_value": True, "num_qvalue_nets": 1, "deactivate_vmap": True},
        {"loss_function": "smooth_l1", "qvalue_reduction": "mean", "reduction": "sum"},
        {"reduction": "none", "scalar_output_mode": "exclude", "max_weight": 0.9},
    ],
    ids=["delayed", "one critic", "smooth sum", "elements"],
)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_match_finite_differences_under_every_kind_of_option(name, options):
    function, leaves = as_function_of(affine_loss(**options), name, affine_batch(5))
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_weighted_and_masked_losses_match_finite_differences(name):
    batch = affine_batch(5)
    batch["priority_weight"] = torch.rand(5, dtype=torch.float64)
    batch["collector", "mask"] = torch.tensor([[True], [True], [False], [True], [False]])
    function, leaves = as_function_of(affine_loss(delay_value=True), name, batch)
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("delay_value", [False, True])
def test_the_weight_of_the_policy_depends_on_critics_and_v_but_passes_no_gradient_to_them(delay_value):
    loss, batch = affine_loss(delay_value=delay_value), affine_batch(5)
    value = "target_value_network_params" if delay_value else "value_network_params"
    for name in ("target_qvalue_network_params", value):
        given = getattr(loss, name).data.clone().apply_(lambda p: p.requires_grad_())
        out = loss.actor_loss(batch, parameters={name: given})[0]
        leaves = list(given.values(True, True))
        assert torch.autograd.grad(out, leaves, allow_unused=True) == (None,) * len(leaves)
        moved = given.detach().apply(lambda p: p + 0.01)
        assert (loss.actor_loss(batch, parameters={name: moved})[0] - out).abs() > 1e-4


def test_the_regression_target_depends_on_v_but_passes_no_gradient_to_it():
    loss, batch = affine_loss(), affine_batch(5)
    given = loss.value_network_params.data.clone().apply_(lambda p: p.requires_grad_())
    out = loss.qvalue_loss(batch, parameters={"value_network_params": given})[0]
    leaves = list(given.values(True, True))
    assert torch.autograd.grad(out, leaves, allow_unused=True) == (None,) * len(leaves)
    moved = given.detach().apply(lambda p: p + 0.01)
    assert (loss.qvalue_loss(batch, parameters={"value_network_params": moved})[0] - out).abs() > 1e-4


# ---------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [1e4, -1e4])
def test_losses_and_gradients_stay_finite_at_extreme_rewards_and_advantages(dtype, advantage):
    loss, batch = affine_loss(temperature=100.0, delay_value=True).to(dtype), affine_batch(6, dtype=dtype)
    batch["next", "reward"].mul_(1e6)
    loss.target_qvalue_network_params["module", "bias"].data.add_(advantage)
    out = loss(batch)
    sum(out[name] for name in LOSSES).backward()
    assert all(value.isfinite() for value in out.values())
    assert batch["td_error"].isfinite().all()
    assert all(p.grad.isfinite().all() for p in loss.parameters())
    weight = 100.0 if advantage > 0 else 0.0
    torch.testing.assert_close(out["loss_actor"], -weight * batch["_log_prob"].mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_weight", [1e-3, 0.1, 100.0])
def test_a_weight_above_the_clip_is_exactly_the_clip_in_that_precision(dtype, max_weight):
    options = {"reduction": "none", "scalar_output_mode": "exclude"}
    loss, batch = affine_loss(max_weight=max_weight, **options).to(dtype), affine_batch(6, dtype=dtype)
    loss.target_qvalue_network_params["module", "bias"].data.add_(1e4)
    weight = torch.tensor(max_weight, dtype=dtype)
    assert loss(batch)["loss_actor"].equal(-weight * batch["_log_prob"])


@pytest.mark.parametrize(
    ("dtype", "advantage"),
    [
        (torch.float64, -20.0),
        (torch.float32, -20.0),  # where the squares of the weights underflow
    ],
)
def test_the_effective_sample_size_does_not_depend_on_a_constant_in_the_advantage(dtype, advantage):
    loss, batch = affine_loss().to(dtype), affine_batch(6, dtype=dtype)
    loss.max_weight = math.inf
    before = loss.diagnostics(batch)["effective_sample_size"]
    loss.target_qvalue_network_params["module", "bias"].data.add_(advantage)
    after = loss.diagnostics(batch)["effective_sample_size"]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=0)


def test_an_infinite_max_weight_clips_nothing():
    loss, batch = affine_loss(max_weight=math.inf), affine_batch(6)
    loss.target_qvalue_network_params["module", "bias"].data.add_(5.0)
    expected = elementwise(loss, batch, gamma=0.99, expectile=0.7, temperature=3.0, max_weight=math.inf)
    assert expected["loss_actor"].max() > 1e4
    assert loss(batch)["loss_actor"].item() == pytest.approx(expected["loss_actor"].mean(), rel=1e-12)


@pytest.mark.parametrize("expectile", [1e-6, 0.999999, 1.0])
def test_expectiles_at_the_ends_of_their_range_equal_the_equations(expectile):
    loss, batch = affine_loss(expectile=expectile), affine_batch(6)
    expected = elementwise(loss, batch, gamma=0.99, expectile=expectile, temperature=3.0)
    assert loss(batch)["loss_value"].item() == pytest.approx(expected["loss_value"].mean(), rel=1e-12)


# ---------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("expectile", [0.2, 0.5, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_v_learns_the_expectile_of_two_outcomes_weighted_by_their_shares(expectile, share):
    # The tau-expectile of an outcome 1 of probability p and 0 otherwise: p tau / (p tau + (1 - p) (1 - tau)).
    loss = affine_loss(1, 1, expectile=expectile)
    set_values(loss.target_qvalue_network_params, [[0.0, 1.0], [0.0, 1.0]])  # the smallest target Q is the action
    set_values(loss.value_network_params, [0.0])
    batch = affine_batch(2, observation_dim=1, action_dim=1)
    batch["action"] = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    batch["priority_weight"] = torch.tensor([share, 1 - share], dtype=torch.float64)
    bias = loss.value_network_params["module", "bias"]
    optimizer = torch.optim.LBFGS([bias], max_iter=50, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        out = loss.value_loss(batch)[0]
        out.backward()
        return out

    optimizer.step(closure)
    expected = share * expectile / (share * expectile + (1 - share) * (1 - expectile))
    assert bias.item() == pytest.approx(expected, abs=1e-6)


# A chain of two states with two actions each, all four in the data: the first state leads to the second with reward 0
# or 1, the second to the end with reward 1 or 3; gamma is 0.5. Every V is the expectile of two equally frequent numbers
# low and high, which is low + tau (high - low).
CHAIN_REWARDS = ((0.0, 1.0), (1.0, 3.0))


def chain_solution(expectile):
    second = 1 + 2 * expectile
    return {"Q": [[0.5 * second, 1 + 0.5 * second], [1.0, 3.0]], "V": [0.5 * second + expectile, second]}


def chain_batch(dtype=torch.float64):
    one_hot = torch.eye(2, dtype=dtype)
    ended = torch.tensor([[False], [False], [True], [True]])
    return TensorDict(
        {
            "observation": one_hot[[0, 0, 1, 1]],
            "action": one_hot[[0, 1, 0, 1]],
            "next": {
                "observation": one_hot[[1, 1, 1, 1]],
                "reward": torch.tensor(CHAIN_REWARDS, dtype=dtype).reshape(4, 1),
                "done": ended,
                "terminated": ended.clone(),
            },
        },
        batch_size=[4],
    )


class Table(nn.Module):
    """A number for every pair of a one-hot state and a one-hot action."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, dtype=torch.float64))

    def forward(self, observation, action):
        return ((observation @ self.weight) * action).sum(-1, keepdim=True)


def chain_loss(expectile, **options):
    actor = ProbabilisticActor(
        TensorDictModule(GaussianPolicy(2, 2), in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
    )
    critics = [
        TensorDictModule(Table(), in_keys=["observation", "action"], out_keys=["state_action_value"]) for _ in "12"
    ]
    value = TensorDictModule(nn.Linear(2, 1, bias=False).double(), in_keys=["observation"], out_keys=["state_value"])
    loss = IQLLoss(actor, critics, value, expectile=expectile, **options)
    loss.make_value_estimator(gamma=0.5)
    return loss


def learnt_tables(loss):
    return {
        "Q": loss.qvalue_network_params["module", "weight"].detach().numpy(),
        "V": loss.value_network_params["module", "weight"].detach().numpy()[0],
    }


@pytest.mark.parametrize("delay_value", [False, True])
@pytest.mark.parametrize("expectile", [0.5, 0.9, 0.999])
def test_training_reaches_the_q_and_v_of_a_chain_known_by_hand(expectile, delay_value):
    loss, batch = chain_loss(expectile, delay_value=delay_value), chain_batch()
    updater = SoftUpdate(loss, tau=0.5)
    optimizer = torch.optim.SGD(
        [*loss.value_network_params.parameters(), *loss.qvalue_network_params.parameters()], lr=1.0
    )
    for _ in range(120):
        out = loss(batch)
        optimizer.zero_grad()
        (out["loss_value"] + out["loss_qvalue"]).backward()
        optimizer.step()
        updater.step()
    solution, learnt = chain_solution(expectile), learnt_tables(loss)
    np.testing.assert_allclose(learnt["V"], solution["V"], atol=1e-6)
    for critic in learnt["Q"]:
        np.testing.assert_allclose(critic, solution["Q"], atol=1e-6)
    if expectile == 0.999:  # the best return that the data reach: 1 + 0.5 * 3 and 3
        np.testing.assert_allclose(learnt["V"], [2.5, 3.0], atol=3e-3)


@pytest.mark.slow
def test_the_training_step_reaches_the_q_and_v_of_a_chain_known_by_hand():
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(4), sampler=SamplerWithoutReplacement(), batch_size=4)
    buffer.extend(chain_batch())
    loss = chain_loss(0.9)
    step = TrainingStep(loss, buffer, value_lr=0.03, critic_lr=0.03, tau=0.2, compile=False)
    for _ in range(1000):
        step()
    solution, learnt = chain_solution(0.9), learnt_tables(loss)
    np.testing.assert_allclose(learnt["V"], solution["V"], atol=1e-4)
    for critic in learnt["Q"]:
        np.testing.assert_allclose(critic, solution["Q"], atol=1e-4)


@pytest.mark.parametrize("max_weight", [100.0, 1.0])
def test_the_policy_with_the_least_loss_has_the_mean_of_the_actions_by_weight(max_weight):
    loss, batch = chain_loss(0.9, max_weight=max_weight), chain_batch()
    solution = chain_solution(0.9)
    for params in (loss.qvalue_network_params, loss.target_qvalue_network_params):
        params["module", "weight"].data.copy_(torch.tensor(solution["Q"], dtype=torch.float64))
    loss.value_network_params["module", "weight"].data.copy_(torch.tensor(solution["V"], dtype=torch.float64))
    mean = loss.actor_network_params["module", "0", "module", "mean"]
    advantage = np.array(solution["Q"]) - np.array(solution["V"])[:, None]
    weight = np.minimum(np.exp(3.0 * advantage), max_weight)
    # A row a state; the actions are one-hot, so that their weighted mean is the share of each.
    optimum = weight / weight.sum(1, keepdims=True)
    mean["bias"].data.zero_()
    mean["weight"].data.copy_(torch.from_numpy(optimum.T))
    gradient = torch.autograd.grad(loss.actor_loss(batch)[0], [mean["weight"], mean["bias"]])
    assert all(g.abs().max() < 1e-12 for g in gradient)
    mean["weight"].data[0, 0] += 0.1
    assert torch.autograd.grad(loss.actor_loss(batch)[0], mean["weight"])[0].abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------- precision


def lambda_return(batch, next_value, gamma, lmbda):
    """The backward recursion over time, the last batch dimension."""
    reward, terminated, done = (batch["next", key].double().numpy()[..., 0] for key in ("reward", "terminated", "done"))
    target, following = np.zeros_like(reward), next_value[..., -1]
    for t in reversed(range(reward.shape[-1])):
        mixed = (1 - lmbda) * next_value[..., t] + lmbda * following
        onward = np.where(done[..., t], next_value[..., t], mixed)
        following = target[..., t] = reward[..., t] + gamma * (1 - terminated[..., t]) * onward
    return target


ESTIMATORS = {
    ValueEstimators.TD0: ({}, 0.0),
    ValueEstimators.TD1: ({}, 1.0),
    ValueEstimators.TDLambda: ({"lmbda": 0.95}, 0.95),
}


@pytest.mark.parametrize("delay_value", [False, True])
@pytest.mark.parametrize("kind", ESTIMATORS, ids=lambda kind: kind.name)
def test_double_precision_is_exact_where_gamma_and_lambda_have_no_short_binary_fraction(kind, delay_value):
    options, lmbda = ESTIMATORS[kind]
    loss, batch = affine_loss(expectile=0.7, temperature=0.3, delay_value=delay_value), affine_batch(2, 6)
    loss.make_value_estimator(kind, gamma=0.99, **options)
    params = loss.target_value_network_params if delay_value else loss.value_network_params
    target = lambda_return(batch, affine(params, batch["next", "observation"].numpy()), 0.99, lmbda)
    expected = elementwise(loss, batch, gamma=None, expectile=0.7, temperature=0.3, target=target)
    out = loss(batch)
    for name in (*LOSSES, "entropy"):
        np.testing.assert_allclose(out[name].item(), expected[name].mean(), rtol=1e-12, err_msg=name)
    np.testing.assert_allclose(batch["td_error"].numpy(), expected["td_error"], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("delay_value", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 5)], ids=str)
@pytest.mark.parametrize("kind", ESTIMATORS, ids=lambda kind: kind.name)
def test_float32_in_gives_float32_out_with_every_estimator(kind, shape, delay_value):
    options, lmbda = ESTIMATORS[kind]
    loss, batch = affine_loss(delay_value=delay_value).float(), affine_batch(*shape, dtype=torch.float32)
    loss.make_value_estimator(kind, gamma=0.99, **options)
    out = loss(batch)
    sum(out[name] for name in LOSSES).backward()
    loss_qvalue, metadata = loss.qvalue_loss(batch)
    tensors = [*out.values(), batch["td_error"], batch["_log_prob"], loss_qvalue, metadata["td_error"]]
    tensors += [*loss.diagnostics(batch).values(), *(p.grad for p in loss.parameters())]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    params = loss.target_value_network_params if delay_value else loss.value_network_params
    target = lambda_return(batch, affine(params, batch["next", "observation"].double().numpy()), 0.99, lmbda)
    expected = elementwise(loss, batch, gamma=None, expectile=0.7, temperature=3.0, target=target)
    for name in LOSSES:
        np.testing.assert_allclose(out[name].item(), expected[name].mean(), rtol=1e-4)


@pytest.mark.parametrize("delay_value", [False, True])
def test_autocast_to_bfloat16_stays_close_to_float32_and_leaves_gradients_in_float32(delay_value):
    loss, batch = affine_loss(delay_value=delay_value, temperature=0.5).float(), affine_batch(64, dtype=torch.float32)
    expected = loss(batch.clone())
    with torch.autocast("cpu", torch.bfloat16):
        out = loss(batch)
    sum(out[name] for name in LOSSES).backward()
    for name, value in expected.items():
        assert out[name].isfinite()
        torch.testing.assert_close(out[name].float(), value, rtol=0.05, atol=0.02)
    assert {p.grad.dtype for p in loss.parameters()} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in loss.parameters())
    assert (out["loss_qvalue"].float() != expected["loss_qvalue"]).item()  # the test must have tested something


# ---------------------------------------------------------------------------------------------- properties


PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-10}


@PROPERTY
@given(
    shape=st.lists(st.integers(1, 3), max_size=3),
    nested=st.booleans(),
    num_qvalue_nets=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    gamma=st.floats(0.0, 1.0),
    expectile=st.floats(0.01, 1.0),
    temperature=st.floats(0.0, 5.0),
    delay_value=st.booleans(),
)
def test_losses_equal_the_equations_for_any_shape_names_critics_and_precision(
    shape, nested, num_qvalue_nets, dtype, gamma, expectile, temperature, delay_value
):
    keys = NESTED_KEYS if nested else DEFAULT_KEYS
    constants = {"expectile": expectile, "temperature": temperature}
    loss = affine_loss(
        num_qvalue_nets=num_qvalue_nets, gamma=gamma, keys=keys, delay_value=delay_value, **constants
    ).to(dtype)
    batch = affine_batch(*shape, keys=keys, dtype=dtype)
    expected = elementwise(loss, batch, gamma=gamma, keys=keys, **constants)
    out = loss(batch)
    for name in (*LOSSES, "entropy"):
        assert out[name].dtype == dtype
        np.testing.assert_allclose(out[name].item(), expected[name].mean(), rtol=TOLERANCE[dtype], atol=1e-4)
        if dtype == torch.float64:
            np.testing.assert_allclose(out[name].item(), expected[name].mean(), rtol=1e-10)
    np.testing.assert_allclose(batch[keys["priority"]].numpy(), expected["td_error"], rtol=1e-3, atol=1e-4)
    assert batch[keys["log_prob"]].shape == torch.Size(shape)


@PROPERTY
@given(count=st.integers(2, 9), seed=st.integers(0, 1000), delay_value=st.booleans())
def test_the_order_of_the_transitions_does_not_matter(count, seed, delay_value):
    torch.manual_seed(seed)
    loss, batch = affine_loss(delay_value=delay_value), affine_batch(count)
    order = torch.randperm(count)
    shuffled = batch[order].clone()
    first, second = loss(batch), loss(shuffled)
    for name in (*LOSSES, "entropy"):
        torch.testing.assert_close(first[name], second[name], rtol=1e-12, atol=0)
    torch.testing.assert_close(batch["td_error"][order], shuffled["td_error"], rtol=1e-12, atol=0)


@PROPERTY
@given(counts=st.tuples(st.integers(1, 6), st.integers(1, 6)), seed=st.integers(0, 1000))
def test_two_batches_together_give_the_mean_of_each_by_its_size(counts, seed):
    torch.manual_seed(seed)
    loss = affine_loss()
    parts = [affine_batch(count) for count in counts]
    whole = loss(torch.cat(parts))
    separate = [loss(part) for part in parts]
    for name in (*LOSSES, "entropy"):
        expected = sum(count * out[name].item() for count, out in zip(counts, separate, strict=True)) / sum(counts)
        assert whole[name].item() == pytest.approx(expected, rel=1e-11)


@PROPERTY
@given(scale=st.floats(0.1, 10.0), seed=st.integers(0, 1000))
def test_rewards_in_other_units_square_the_value_losses_and_need_the_inverse_temperature_divided(scale, seed):
    torch.manual_seed(seed)
    loss, batch = affine_loss(temperature=2.0, delay_value=True), affine_batch(5)
    before = loss(batch)
    rescaled = batch.clone()
    rescaled["next", "reward"].mul_(scale)
    for name, params in loss.named_children():
        if name.endswith("_params") and name != "actor_network_params":
            params.data.apply_(lambda p: p.mul_(scale))
    loss.temperature = 2.0 / scale
    after = loss(rescaled)
    for name, power in (("loss_actor", 0), ("loss_qvalue", 2), ("loss_value", 2), ("entropy", 0)):
        torch.testing.assert_close(after[name], before[name] * scale**power, rtol=1e-9, atol=0)
