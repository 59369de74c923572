"""IQLLoss against formulas written out in numpy, and against TorchRL's contract for this loss."""

import copy
import math
import pickle
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchrl.objectives
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import expectile as scipy_expectile
from scipy.stats import norm
from tensordict import NonTensorData, TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import IndependentNormal, ProbabilisticActor
from torchrl.objectives import HardUpdate, LossModule, SoftUpdate, ValueEstimators
from torchrl.objectives.value import TD0Estimator, TD1Estimator, TDLambdaEstimator, ValueEstimatorBase

from iql_torchrl import IQLLoss, build_actor, build_qvalues, build_value

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")

OBSERVATION_DIM, ACTION_DIM, WIDTH = 3, 2, 4
GAMMA = 0.9375  # exact in float32, the precision in which TorchRL's estimators keep it
LOSSES = {"loss_actor": "actor_network", "loss_qvalue": "qvalue_network", "loss_value": "value_network"}
RENAMED = {
    "action": ("agent", "move"),
    "log_prob": ("agent", "log_likelihood"),
    "priority": ("replay", "priority"),
    "state_action_value": ("critic", "q"),
    "value": ("critic", "v"),
    "reward": ("agent", "gain"),
    "done": ("agent", "over"),
    "terminated": ("agent", "dead"),
}


class Head(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.hidden = nn.Linear(inputs, WIDTH)
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, *inputs):
        return self.out(torch.tanh(self.hidden(torch.cat(inputs, -1))))


class RecordingHead(Head):
    def __init__(self, inputs):
        super().__init__(inputs)
        self.calls = []

    def forward(self, *inputs):
        self.calls.append((inputs[0].detach().clone(), torch.is_grad_enabled()))
        return super().forward(*inputs)


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = nn.Linear(OBSERVATION_DIM, ACTION_DIM)
        self.log_std = nn.Parameter(torch.tensor([-0.5, 0.25]))

    def forward(self, observation):
        mean = self.mean(observation)
        return mean, self.log_std.exp().expand_as(mean)


class RewardOnly(ValueEstimatorBase):
    def forward(self, tensordict, **kwargs):
        raise NotImplementedError

    def value_estimate(self, tensordict, target_params=None, next_value=None, **kwargs):
        return tensordict["next", "reward"]


def make_actor(action="action"):
    return ProbabilisticActor(
        TensorDictModule(Policy(), in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        out_keys=[action],
        distribution_class=IndependentNormal,
    ).double()


def make_critic(action="action", out="state_action_value", head=Head):
    return TensorDictModule(
        head(OBSERVATION_DIM + ACTION_DIM), in_keys=["observation", action], out_keys=[out]
    ).double()


def make_value(out="state_value", head=Head):
    return TensorDictModule(head(OBSERVATION_DIM), in_keys=["observation"], out_keys=[out]).double()


def make_loss(num_qvalue_nets=2, *, loss_class=IQLLoss, gamma=GAMMA, head=Head, **options):
    critics = [make_critic(head=head) for _ in range(num_qvalue_nets)]
    options = {"num_qvalue_nets": num_qvalue_nets, **options}
    loss = loss_class(make_actor(), critics, make_value(head=head), **options)
    loss.make_value_estimator(gamma=gamma)
    separate_targets(loss)
    return loss


def separate_targets(loss):
    for name, params in loss.named_children():
        if name.startswith("target_"):
            params.data.apply_(lambda p: p.add_(torch.randn_like(p), alpha=0.5))


def make_batch(*shape, dtype=torch.float64):
    terminated = torch.rand(*shape, 1) < 0.3
    return TensorDict(
        {
            "observation": torch.randn(*shape, OBSERVATION_DIM, dtype=dtype),
            "action": torch.randn(*shape, ACTION_DIM, dtype=dtype),
            "next": {
                "observation": torch.randn(*shape, OBSERVATION_DIM, dtype=dtype),
                "reward": torch.randn(*shape, 1, dtype=dtype),
                "terminated": terminated,
                "done": terminated | (torch.rand(*shape, 1) < 0.3),
            },
        },
        batch_size=shape,
    )


def float32_loss(dropout=None, policy="tanh_mean_normal"):
    """The package's own networks, whose default precision is float32."""
    return IQLLoss(
        build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(4,), dropout=dropout, policy=policy),
        build_qvalues(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(4,)),
        build_value(OBSERVATION_DIM, hidden_dims=(4,)),
    )


def numpy_head(params, *inputs):
    x = np.concatenate(inputs, -1)
    for name in ("hidden", "out"):
        weight, bias = (params["module", name, kind].detach().numpy() for kind in ("weight", "bias"))
        x = x @ weight.T + bias
        x = np.tanh(x) if name == "hidden" else x
    return x[..., 0]


def numpy_critics(params, *inputs):
    return np.stack([numpy_head(one, *inputs) for one in (params.unbind(0) if params.ndim else [params])])


def smooth_l1(error):
    return np.where(np.abs(error) < 1, 0.5 * error**2, np.abs(error) - 0.5)


DISTANCES = {"l2": np.square, "l1": np.abs, "smooth_l1": smooth_l1}


def reference(loss, batch, *, expectile=0.7, temperature=3.0, max_weight=100.0, distance=np.square, target=None):
    """Equations 5, 6 and 7, one array element a transition."""
    observation, action = batch["observation"].numpy(), batch["action"].numpy()
    reward, terminated, next_observation = (
        batch["next", key].numpy() for key in ("reward", "terminated", "observation")
    )
    delayed = dict(loss.named_children()).get("target_value_network_params", loss.value_network_params)
    qvalues = numpy_critics(loss.qvalue_network_params, observation, action)
    target_qvalue = numpy_critics(loss.target_qvalue_network_params, observation, action).min(0)
    value = numpy_head(loss.value_network_params, observation)
    next_value = numpy_head(delayed, next_observation)
    if target is None:
        target = reward[..., 0] + GAMMA * (1 - terminated[..., 0]) * next_value

    difference = target_qvalue - value
    advantage = target_qvalue - numpy_head(delayed, observation)
    weight = np.minimum(np.exp(temperature * advantage), max_weight)
    policy = loss.actor_network_params["module", "0", "module"]
    mean = observation @ policy["mean", "weight"].detach().numpy().T + policy["mean", "bias"].detach().numpy()
    log_prob = norm.logpdf(action, mean, np.exp(policy["log_std"].detach().numpy())).sum(-1)
    return SimpleNamespace(
        loss_value=np.abs(expectile - (difference < 0)) * difference**2,
        loss_qvalue=distance(target - qvalues).sum(0),
        loss_actor=-weight * log_prob,
        td_error=(target - qvalues) ** 2,
        log_prob=log_prob,
        weight=weight,
        advantage=advantage,
        target_qvalue=target_qvalue,
        next_value=next_value,
    )


def assert_losses_are(out, expected):
    for name in LOSSES:
        np.testing.assert_allclose(out[name].detach().numpy(), getattr(expected, name).mean(), rtol=1e-10, err_msg=name)
    np.testing.assert_allclose(out["entropy"].numpy(), -expected.log_prob.mean(), rtol=1e-10)


def assert_equal_outputs(first, second, **tolerance):
    assert list(first.keys()) == list(second.keys())
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], **tolerance)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def batch():
    return make_batch(7)


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("delay_value", [False, True])
@pytest.mark.parametrize("loss_function", ["l2", "l1", "smooth_l1"])
def test_the_three_losses_equal_the_equations_of_the_paper(batch, loss_function, delay_value):
    loss = make_loss(loss_function=loss_function, delay_value=delay_value)
    assert_losses_are(loss(batch), reference(loss, batch, distance=DISTANCES[loss_function]))


def test_defaults_are_those_of_the_paper(batch):
    loss = make_loss()
    explicit = make_loss(loss_function="l2", temperature=3.0, expectile=0.7, max_weight=100.0, delay_value=False)
    explicit.load_state_dict(loss.state_dict())
    assert_equal_outputs(loss(batch), explicit(batch), rtol=0, atol=0)


@pytest.mark.parametrize("num_qvalue_nets", [1, 2, 4])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_every_batch_shape_and_number_of_critics_gives_the_equations_of_the_paper(shape, num_qvalue_nets):
    loss, batch = make_loss(num_qvalue_nets), make_batch(*shape)
    out = loss(batch)
    assert all(value.shape == () for value in out.values())
    assert_losses_are(out, reference(loss, batch))
    assert batch["td_error"].shape == batch["_log_prob"].shape == shape


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=st.lists(st.integers(1, 3), max_size=3),
    num_qvalue_nets=st.integers(1, 3),
    expectile=st.floats(0.01, 1.0),
    temperature=st.floats(0.0, 20.0),
    max_weight=st.floats(0.1, 200.0),
)
def test_losses_equal_the_equations_over_the_legal_hyperparameters(
    shape, num_qvalue_nets, expectile, temperature, max_weight
):
    constants = {"expectile": expectile, "temperature": temperature, "max_weight": max_weight}
    loss, batch = make_loss(num_qvalue_nets, **constants), make_batch(*shape)
    assert_losses_are(loss(batch), reference(loss, batch, **constants))


def test_truncated_transitions_bootstrap_and_terminated_ones_do_not(batch):
    loss = make_loss(reduction="none", scalar_output_mode="exclude")
    batch = batch[:3]
    batch["next", "terminated"] = torch.tensor([[False], [False], [True]])
    batch["next", "done"] = torch.tensor([[False], [True], [True]])
    elsewhere = batch.clone()
    elsewhere["next", "observation"] += 1.0
    first, second = loss(batch)["loss_qvalue"], loss(elsewhere)["loss_qvalue"]
    np.testing.assert_allclose(first.detach().numpy(), reference(loss, batch).loss_qvalue, rtol=1e-10)
    assert (first != second).tolist() == [True, True, False]


def test_the_smallest_target_critic_is_the_regression_target_and_the_online_ones_are_not(batch):
    loss = make_loss()
    before, expected = loss.target_qvalue(batch), reference(loss, batch).target_qvalue
    loss.qvalue_network_params.data.apply_(lambda p: p.add_(1.0))
    torch.testing.assert_close(loss.target_qvalue(batch), before, rtol=0, atol=0)
    np.testing.assert_allclose(before.numpy(), expected, rtol=1e-10)
    assert not before.requires_grad


def test_delayed_value_enters_the_target_and_the_advantage_but_not_the_regression(batch):
    loss = make_loss(delay_value=True)
    before = loss(batch.clone())
    loss.target_value_network_params.data.apply_(lambda p: p.add_(0.5))
    after = loss(batch.clone())
    assert after["loss_value"] == before["loss_value"]
    assert after["loss_qvalue"] != before["loss_qvalue"]
    assert after["loss_actor"] != before["loss_actor"]
    assert_losses_are(after, reference(loss, batch))


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.7, 0.9, 0.99])
def test_the_minimiser_of_the_value_loss_is_the_expectile_of_the_sample(tau):
    loss, batch = make_loss(1, expectile=tau), make_batch(50)
    batch["observation"] = torch.ones(50, OBSERVATION_DIM, dtype=torch.float64)
    sample = loss.target_qvalue(batch).numpy()
    bias = loss.value_network_params["module", "out", "bias"]
    constant = numpy_head(loss.value_network_params, np.ones((1, OBSERVATION_DIM))).item() - bias.item()

    def loss_at(value):
        bias.data.fill_(value - constant)
        bias.grad = None
        result = loss.value_loss(batch)[0]
        result.backward()
        return result.item()

    minimiser = scipy_expectile(sample, alpha=tau)
    least = loss_at(minimiser)
    assert abs(bias.grad.item()) < 1e-9
    assert loss_at(minimiser - 0.01) > least
    assert loss_at(minimiser + 0.01) > least


def test_expectile_one_regresses_from_above_only(batch):
    loss = make_loss(expectile=1.0, reduction="none", scalar_output_mode="exclude")
    target = loss.target_qvalue(batch)
    value = torch.from_numpy(numpy_head(loss.value_network_params, batch["observation"].numpy()))
    expected = (target - value).clamp(min=0).square()
    assert (expected == 0).any() and (expected > 0).any()
    torch.testing.assert_close(loss(batch)["loss_value"], expected)


def test_temperature_zero_is_behaviour_cloning(batch):
    loss = make_loss(temperature=0.0)
    expected = -reference(loss, batch).log_prob.mean()
    np.testing.assert_allclose(loss(batch)["loss_actor"].item(), expected, rtol=1e-12)


def test_temperature_multiplies_the_advantage(batch):
    advantage = reference(loss := make_loss(reduction="none", scalar_output_mode="exclude"), batch).advantage
    weights = []
    for loss.temperature in (1.0, 2.0):
        out = loss(batch)
        weights.append((out["loss_actor"] / -batch["_log_prob"]).detach().numpy())
    np.testing.assert_allclose(weights, [np.exp(advantage), np.exp(2 * advantage)], rtol=1e-9)


def test_weights_are_clipped_at_max_weight(batch):
    loss = make_loss(max_weight=0.9)
    expected = reference(loss, batch, max_weight=0.9)
    assert 0 < (expected.weight == 0.9).mean() < 1
    assert_losses_are(loss(batch), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_overflow_are_clipped_and_give_finite_gradients(batch, dtype):
    loss, batch = make_loss(temperature=100.0).to(dtype), make_batch(7, dtype=dtype)
    loss.target_qvalue_network_params["module", "out", "bias"].data.add_(1e4)
    out = loss(batch)
    torch.testing.assert_close(out["loss_actor"], -100 * batch["_log_prob"].mean())
    out["loss_actor"].backward()
    gradients = [p.grad for p in loss.actor_network_params.parameters()]
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients)


def test_hopeless_actions_have_weight_zero(batch):
    loss = make_loss(temperature=100.0)
    loss.target_qvalue_network_params["module", "out", "bias"].data.sub_(1e4)
    assert loss(batch)["loss_actor"] == 0


@pytest.mark.parametrize("num_qvalue_nets", [1, 2, 4])
def test_outputs_equal_those_of_torchrl_at_the_same_hyperparameters(batch, num_qvalue_nets):
    ours = make_loss(num_qvalue_nets, loss_function="smooth_l1", temperature=1.0, expectile=0.5)
    theirs = make_loss(num_qvalue_nets, loss_class=torchrl.objectives.IQLLoss)
    theirs.load_state_dict(ours.state_dict())
    other_batch = batch.clone()
    assert_equal_outputs(ours(batch), theirs(other_batch))
    for key in ("td_error", "_log_prob"):
        torch.testing.assert_close(batch[key], other_batch[key])


# ---------------------------------------------------------------------------------------------- gradients


def reached(params):
    return {name for name, tree in params.items() if any(p.grad is not None for p in tree.values(True, True))}


@pytest.mark.parametrize("delay_value", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_sends_gradient_to_every_parameter_of_its_own_network_only(batch, name, delay_value):
    loss = make_loss(delay_value=delay_value)
    params = {network: getattr(loss, f"{network}_params") for network in LOSSES.values()}
    for function in (loss, lambda data: {name: getattr(loss, f"{name.removeprefix('loss_')}_loss")(data)[0]}):
        loss.zero_grad()
        function(batch)[name].backward()
        assert reached(params) == {LOSSES[name]}
        assert all(p.grad.any() for p in params[LOSSES[name]].parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_given_parameters_get_gradient_from_their_own_loss_only(batch, name):
    loss = make_loss(delay_value=True)
    given = {
        key: params.data.apply(lambda p: p.clone().requires_grad_())
        for key, params in loss.named_children()
        if key.endswith("_params")
    }
    loss(batch, parameters=given)[name].backward()
    assert reached(given) == {f"{LOSSES[name]}_params"}
    assert all(p.grad is None for p in loss.parameters())


def test_targets_are_buffers_without_gradient(batch):
    loss = make_loss(delay_value=True)
    sum(loss(batch)[name] for name in LOSSES).backward()
    targets = [p for name, p in loss.named_buffers() if name.startswith("target_")]
    assert len(targets) == 8
    assert all(not p.requires_grad and p.grad is None for p in targets)
    assert not any(name.startswith("target_") for name, _ in loss.named_parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_match_finite_differences(batch, name):
    loss = make_loss()
    params = getattr(loss, f"{LOSSES[name]}_params")
    keys = list(params.keys(True, True))

    def function(*leaves):
        given = TensorDict(dict(zip(keys, leaves, strict=True)), batch_size=params.batch_size)
        method = getattr(loss, f"{name.removeprefix('loss_')}_loss")
        return method(batch.clone(), parameters={f"{LOSSES[name]}_params": given})[0]

    leaves = [params[key].detach().clone().requires_grad_() for key in keys]
    assert torch.autograd.gradcheck(function, leaves)


def test_given_parameters_replace_the_modules_own_everywhere(batch):
    loss, other = make_loss(delay_value=True), make_loss(delay_value=True)
    names = [name for name, _ in loss.named_children() if name.endswith("_params")]
    assert len(names) == 5
    given = {name: getattr(other, name) for name in names}
    assert_equal_outputs(loss(batch, parameters=given), other(batch), rtol=0, atol=0)
    assert_equal_outputs(loss.diagnostics(batch, parameters=given), other.diagnostics(batch), rtol=0, atol=0)


def test_a_given_value_is_also_the_bootstrap_where_no_target_value_exists(batch):
    loss, other = make_loss(), make_loss()
    out = loss.qvalue_loss(batch, parameters={"value_network_params": other.value_network_params})[0]
    loss.value_network_params.data.update_(other.value_network_params.data)
    torch.testing.assert_close(out, loss.qvalue_loss(batch)[0], rtol=0, atol=0)


@pytest.mark.parametrize("delay_value", [False, True])
def test_the_joint_forward_equals_the_three_losses_called_one_by_one(batch, delay_value):
    loss = make_loss(delay_value=delay_value)
    out = loss(batch)
    target_qvalue = loss.target_qvalue(batch)
    for target in ({}, {"target_qvalue": target_qvalue}):
        torch.testing.assert_close(loss.value_loss(batch, **target)[0], out["loss_value"], rtol=0, atol=0)
        torch.testing.assert_close(loss.actor_loss(batch, **target)[0], out["loss_actor"], rtol=0, atol=0)
    loss_qvalue, metadata = loss.qvalue_loss(batch)
    torch.testing.assert_close(loss_qvalue, out["loss_qvalue"], rtol=0, atol=0)
    assert loss.value_loss(batch)[1] == loss.actor_loss(batch)[1] == {}
    assert list(metadata) == ["td_error"]
    np.testing.assert_allclose(metadata["td_error"].numpy(), reference(loss, batch).td_error, rtol=1e-10)
    assert not metadata["td_error"].requires_grad


def test_the_losses_called_after_an_update_of_v_see_the_new_v(batch):
    loss = make_loss()
    loss.value_network_params.data.apply_(lambda p: p.add_(0.3))
    expected = reference(loss, batch)
    np.testing.assert_allclose(loss.actor_loss(batch)[0].item(), expected.loss_actor.mean(), rtol=1e-10)
    np.testing.assert_allclose(loss.qvalue_loss(batch)[0].item(), expected.loss_qvalue.mean(), rtol=1e-10)


# ---------------------------------------------------------------------------------------------- work done


@pytest.mark.parametrize(("deactivate_vmap", "passes"), [(True, 2), (False, 1)])
def test_forward_passes_each_critic_once_as_target_without_gradient_and_once_online(batch, deactivate_vmap, passes):
    loss = make_loss(2, deactivate_vmap=deactivate_vmap, head=RecordingHead)
    loss(batch)
    assert sorted(grad for _, grad in loss.qvalue_network.module.calls) == [False] * passes + [True] * passes


@pytest.mark.parametrize("delay_value", [False, True])
def test_forward_passes_v_once_on_s_with_gradient_and_the_rest_without(batch, delay_value):
    loss = make_loss(2, delay_value=delay_value, head=RecordingHead)
    calls = loss.value_network.module.calls
    loss(batch)
    on_s = [grad for observation, grad in calls if observation.equal(batch["observation"])]
    on_next = [grad for observation, grad in calls if observation.equal(batch["next", "observation"])]
    assert sorted(on_s) == ([False, True] if delay_value else [True])
    assert on_next == [False]
    assert len(calls) == len(on_s) + len(on_next)


def test_a_given_target_qvalue_is_not_computed_again(batch):
    loss = make_loss(2, head=RecordingHead)
    critics, value = loss.qvalue_network.module, loss.value_network.module
    target_qvalue = loss.target_qvalue(batch)
    critics.calls.clear()
    loss.value_loss(batch, target_qvalue=target_qvalue)
    loss.actor_loss(batch, target_qvalue=target_qvalue, state_value=torch.zeros_like(target_qvalue))
    assert critics.calls == []
    assert len(value.calls) == 1


# ---------------------------------------------------------------------------------------------- outputs and inputs


def test_it_is_a_loss_module_of_its_own_and_no_subclass_of_torchrls():
    assert IQLLoss.__bases__ == (LossModule,)


def test_outputs_are_exactly_the_four_in_order(batch):
    loss = make_loss()
    names = ["loss_actor", "loss_qvalue", "loss_value", "entropy"]
    assert list(loss(batch).keys()) == list(loss.out_keys) == names
    assert not loss(batch)["entropy"].requires_grad


def test_keyword_arguments_give_the_losses_as_a_tuple(batch):
    loss = make_loss()
    expected = loss(batch.clone())
    out = loss(
        observation=batch["observation"],
        action=batch["action"],
        next_observation=batch["next", "observation"],
        next_reward=batch["next", "reward"],
        next_done=batch["next", "done"],
        next_terminated=batch["next", "terminated"],
    )
    assert isinstance(out, tuple)
    torch.testing.assert_close(out, tuple(expected.values()), rtol=0, atol=0)


def test_selected_out_keys_are_the_only_outputs_and_other_losses_keep_theirs(batch):
    loss = make_loss()
    expected = loss(batch.clone())
    loss.select_out_keys("loss_actor", "loss_value")
    assert_equal_outputs(loss(batch.clone()), expected.select("loss_actor", "loss_value"), rtol=0, atol=0)
    out = loss(**{key: value for key, value in batch.flatten_keys("_").items() if key in keyword_names(loss)})
    torch.testing.assert_close(out, (expected["loss_actor"], expected["loss_value"]), rtol=0, atol=0)
    assert len(make_loss().out_keys) == 4


def keyword_names(loss):
    return {key if isinstance(key, str) else "_".join(key) for key in loss.in_keys}


def test_in_keys_are_those_of_torchrl_without_repetition():
    ours, theirs = make_loss(), make_loss(loss_class=torchrl.objectives.IQLLoss)
    assert len(ours.in_keys) == len(set(ours.in_keys))
    assert set(ours.in_keys) == set(theirs.in_keys)


def test_td_error_is_the_largest_squared_error_over_the_critics(batch):
    loss = make_loss(4, loss_function="l1")
    loss(batch)
    np.testing.assert_allclose(batch["td_error"].numpy(), reference(loss, batch).td_error.max(0), rtol=1e-10)
    assert not batch["td_error"].requires_grad


def test_log_prob_is_written_without_gradient(batch):
    loss = make_loss()
    loss.actor_loss(batch)
    np.testing.assert_allclose(batch["_log_prob"].numpy(), reference(loss, batch).log_prob, rtol=1e-10)
    assert not batch["_log_prob"].requires_grad


def test_the_input_gains_td_error_and_log_prob_and_is_otherwise_untouched(batch):
    loss = make_loss(delay_value=True)
    before = batch.clone()
    loss(batch)
    assert set(batch.keys(True, True)) - set(before.keys(True, True)) == {"td_error", "_log_prob"}
    assert (batch.exclude("td_error", "_log_prob") == before).all()


def test_value_and_qvalue_losses_leave_the_input_untouched(batch):
    loss, before = make_loss(), batch.clone()
    loss.value_loss(batch)
    loss.qvalue_loss(batch)
    assert set(batch.keys(True, True)) == set(before.keys(True, True))
    assert (batch == before).all()


def test_stale_network_outputs_in_the_input_are_neither_read_nor_overwritten(batch):
    loss = make_loss()
    expected = loss(batch.clone())
    stale = {key: torch.full((7, 1), 1e6).double() for key in ("state_value", "state_action_value", "loc", "scale")}
    batch.update(stale)
    batch["next"].update(stale)
    assert_equal_outputs(loss(batch), expected, rtol=0, atol=0)
    assert all((batch[key] == 1e6).all() and (batch["next", key] == 1e6).all() for key in stale)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_summarise_the_elementwise_losses(batch, reduction):
    loss = make_loss(reduction=reduction)
    out, expected = loss(batch), reference(loss, batch)
    for name in LOSSES:
        np.testing.assert_allclose(out[name].item(), getattr(getattr(expected, name), reduction)(), rtol=1e-10)
    np.testing.assert_allclose(out["entropy"].item(), -expected.log_prob.mean(), rtol=1e-10)


@pytest.mark.parametrize("shape", [(7,), (2, 3)])
def test_reduction_none_keeps_the_elements(shape):
    loss, batch = make_loss(reduction="none", scalar_output_mode="exclude"), make_batch(*shape)
    out, expected = loss(batch), reference(loss, batch)
    assert list(out.keys()) == list(LOSSES)
    assert out.batch_size == shape
    for name in LOSSES:
        np.testing.assert_allclose(out[name].detach().numpy(), getattr(expected, name), rtol=1e-10)


def test_reduction_none_can_keep_the_entropy_as_non_tensor_data(batch):
    loss = make_loss(reduction="none", scalar_output_mode="non_tensor")
    out = loss(batch)
    assert isinstance(out.get("entropy"), NonTensorData)
    np.testing.assert_allclose(float(out["entropy"]), -reference(loss, batch).log_prob.mean(), rtol=1e-10)


def test_reduction_none_warns_that_the_entropy_is_left_out(batch):
    with pytest.warns(UserWarning, match="scalar_output_mode"):
        loss = make_loss(reduction="none")
    assert "entropy" not in loss(batch)


def test_reduction_defaults_to_the_mean_where_none_is_given(batch):
    assert make_loss(reduction=None).reduction == "mean"


def test_masked_transitions_do_not_count(batch):
    loss = make_loss()
    expected = reference(loss, batch)
    valid = torch.tensor([True, False, True, True, False, True, True])
    batch["valid"] = valid.unsqueeze(-1)
    loss.loss_mask_key = "valid"
    out = loss(batch)
    for name in LOSSES:
        np.testing.assert_allclose(out[name].item(), getattr(expected, name)[valid.numpy()].mean(), rtol=1e-10)


# ---------------------------------------------------------------------------------------------- keys


def test_the_eight_keys_have_torchrls_names_and_defaults_and_the_weights_those_of_its_other_losses():
    theirs = vars(make_loss(loss_class=torchrl.objectives.IQLLoss).tensor_keys)
    assert vars(make_loss().tensor_keys) == {
        **theirs,
        "priority_weight": torchrl.objectives.SACLoss.default_keys().priority_weight,
    }


@pytest.mark.parametrize("estimator_first", [True, False])
def test_all_eight_keys_can_be_renamed_to_nested_ones(estimator_first):
    plain = make_loss()
    plain.make_value_estimator(ValueEstimators.TDLambda, gamma=GAMMA, lmbda=0.5)
    critics = [make_critic(RENAMED["action"], RENAMED["state_action_value"]) for _ in range(2)]
    renamed = IQLLoss(make_actor(RENAMED["action"]), critics, make_value(RENAMED["value"]))
    renamed.set_keys(**({"value": RENAMED["value"]} if estimator_first else RENAMED))
    renamed.make_value_estimator(ValueEstimators.TDLambda, gamma=GAMMA, lmbda=0.5)
    if estimator_first:
        renamed.set_keys(**RENAMED)
    renamed.load_state_dict(plain.state_dict())

    batch = make_batch(2, 5)
    renamed_batch = batch.clone()
    renamed_batch.rename_key_("action", RENAMED["action"])
    for name in ("reward", "done", "terminated"):
        renamed_batch.rename_key_(("next", name), ("next", *RENAMED[name]))
    assert_equal_outputs(renamed(renamed_batch), plain(batch), rtol=0, atol=0)
    assert_equal_outputs(renamed.diagnostics(renamed_batch), plain.diagnostics(batch), rtol=0, atol=0)
    for name, key in (("log_prob", "_log_prob"), ("priority", "td_error")):
        torch.testing.assert_close(renamed_batch[RENAMED[name]], batch[key], rtol=0, atol=0)
        assert key not in renamed_batch
    assert set(renamed.in_keys) == {
        "observation",
        ("next", "observation"),
        RENAMED["action"],
        *(("next", RENAMED[name]) for name in ("reward", "done", "terminated")),
    }


def test_every_renamed_input_is_read(batch):
    loss = make_loss()
    loss.make_value_estimator(ValueEstimators.TDLambda, gamma=GAMMA)
    for key in ("reward", "done", "terminated"):
        renamed = copy.deepcopy(loss)
        renamed.set_keys(**{key: "other"})
        moved = batch.clone()
        moved["next", "other"] = moved["next", key].clone()
        moved["next", key] = torch.ones_like(moved["next", key])
        assert_equal_outputs(renamed(moved.clone()), loss(batch.clone()), rtol=0, atol=0)
        assert loss(moved)["loss_qvalue"] != loss(batch.clone())["loss_qvalue"]


def test_v_may_read_what_the_policy_does_not(batch):
    loss = make_loss()
    value = make_value()
    value.in_keys = ["state"]
    other = IQLLoss(make_actor(), [make_critic(), make_critic()], value)
    other.make_value_estimator(gamma=GAMMA)
    other.load_state_dict(loss.state_dict())
    expected = loss(batch.clone())
    for tensordict in (batch, batch["next"]):
        tensordict["state"] = tensordict["observation"].clone()
    assert_equal_outputs(other(batch), expected, rtol=0, atol=0)


def test_an_unknown_key_is_refused():
    with pytest.raises(ValueError, match="advantage"):
        make_loss().set_keys(advantage="other")


def test_a_log_prob_that_does_not_match_q_is_refused_by_name():
    loss = make_loss()
    batch = make_batch(7)
    batch["action"] = torch.randn(7, 1, ACTION_DIM, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="log-probability of 'action'"):
        loss.actor_loss(batch, target_qvalue=torch.zeros(7), state_value=torch.zeros(7))


# ---------------------------------------------------------------------------------------------- value estimators


def lambda_return(batch, next_value, lmbda):
    """The backward recursion along the last batch dimension, cut where an episode ends."""
    reward, terminated, done = (batch["next", key].numpy()[..., 0] for key in ("reward", "terminated", "done"))
    target, following = np.zeros_like(reward), next_value[..., -1]
    for t in reversed(range(reward.shape[-1])):
        onward = np.where(done[..., t], next_value[..., t], (1 - lmbda) * next_value[..., t] + lmbda * following)
        following = target[..., t] = reward[..., t] + GAMMA * (1 - terminated[..., t]) * onward
    return target


ESTIMATORS = {
    "TD0": (ValueEstimators.TD0, TD0Estimator, {}, 0.0),
    "TD1": (ValueEstimators.TD1, TD1Estimator, {}, 1.0),
    "TDLambda": (ValueEstimators.TDLambda, TDLambdaEstimator, {"lmbda": 0.5}, 0.5),
}


@pytest.mark.parametrize("delay_value", [False, True])
@pytest.mark.parametrize("given_as", ["kind", "name", "class", "instance"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_each_estimator_gives_its_own_regression_target(name, given_as, delay_value):
    kind, estimator_class, options, lmbda = ESTIMATORS[name]
    loss, batch = make_loss(delay_value=delay_value), make_batch(2, 6)
    options = {"gamma": GAMMA, **options}
    if given_as in ("kind", "name"):
        out = loss.make_value_estimator(kind if given_as == "kind" else name.lower(), **options)
        assert loss.value_type == kind
    elif given_as == "class":
        out = loss.make_value_estimator(estimator_class, value_network=loss.value_network, **options)
    else:
        out = loss.make_value_estimator(estimator_class(value_network=loss.value_network, **options))
    assert out is loss
    target = lambda_return(batch, reference(loss, batch).next_value, lmbda)
    assert_losses_are(loss(batch), reference(loss, batch, target=target))


def test_an_estimator_class_of_the_users_own_is_asked_for_the_target(batch):
    loss = make_loss().make_value_estimator(RewardOnly(value_network=None))
    assert_losses_are(loss(batch), reference(loss, batch, target=batch["next", "reward"].numpy()[..., 0]))


def test_the_default_estimator_is_td0_with_discount_099(batch):
    loss = IQLLoss(make_actor(), [make_critic(), make_critic()], make_value())
    out = loss(batch)
    assert loss.value_type == ValueEstimators.TD0
    reward, terminated = (batch["next", key].numpy()[..., 0] for key in ("reward", "terminated"))
    target = reward + 0.99 * (1 - terminated) * reference(loss, batch).next_value
    expected = reference(loss, batch, target=target).loss_qvalue.mean()
    np.testing.assert_allclose(out["loss_qvalue"].item(), expected, rtol=1e-6)


def test_an_estimator_that_standardises_rewards_leaves_those_of_the_input(batch):
    loss = make_loss()
    plain = loss(batch.clone())["loss_qvalue"]
    loss.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA, average_rewards=True)
    before = batch["next", "reward"].clone()
    first, second = loss(batch)["loss_qvalue"], loss(batch)["loss_qvalue"]
    assert first == second != plain
    assert batch["next", "reward"].equal(before)


@pytest.mark.parametrize("kind", [ValueEstimators.GAE, ValueEstimators.MAGAE, ValueEstimators.VTrace, "gae"])
def test_on_policy_estimators_are_refused(kind):
    with pytest.raises(NotImplementedError, match=r"GAE|VTrace"):
        make_loss().make_value_estimator(kind)


# ---------------------------------------------------------------------------------------------- construction


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("expectile", value) for value in (0.0, -0.1, 1.1, math.nan)],
        *[("temperature", value) for value in (-1.0, math.inf, math.nan)],
        *[("max_weight", value) for value in (0.0, -1.0, math.nan)],
        *[("num_qvalue_nets", value) for value in (0, -1)],
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        IQLLoss(make_actor(), make_critic(), make_value(), **{name: value})


def test_removed_arguments_are_refused_as_torchrl_does():
    networks = make_actor(), make_critic(), make_value()
    with pytest.raises(TypeError, match="make_value_estimator"):
        IQLLoss(*networks, gamma=0.9)
    with pytest.raises(RuntimeError, match="set_keys"):
        IQLLoss(*networks, priority_key="td_error")


@pytest.mark.parametrize(("length", "num_qvalue_nets"), [(3, 2), (1, 2), (2, 1)])
def test_a_list_of_critics_of_another_length_is_refused(length, num_qvalue_nets):
    critics = [make_critic() for _ in range(length)]
    with pytest.raises(ValueError, match=f"list of {length} networks but num_qvalue_nets is {num_qvalue_nets}"):
        IQLLoss(make_actor(), critics, make_value(), num_qvalue_nets=num_qvalue_nets)


@pytest.mark.parametrize("collection", [list, tuple])
def test_a_list_of_critics_keeps_the_weights_of_each_and_targets_start_equal(collection):
    critics = collection(make_critic() for _ in range(3))
    weights = torch.stack([critic.module.hidden.weight.detach().clone() for critic in critics])
    loss = IQLLoss(make_actor(), critics, make_value(), num_qvalue_nets=3)
    for params in (loss.qvalue_network_params, loss.target_qvalue_network_params):
        assert params.batch_size == (3,)
        torch.testing.assert_close(params["module", "hidden", "weight"].data, weights, rtol=0, atol=0)


def test_a_single_network_is_copied_into_critics_that_differ():
    loss = IQLLoss(make_actor(), make_critic(), make_value(), num_qvalue_nets=3)
    weights = loss.qvalue_network_params["module", "hidden", "weight"]
    assert weights.shape == (3, WIDTH, OBSERVATION_DIM + ACTION_DIM)
    assert not any(weights[i].equal(weights[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert weights.equal(loss.target_qvalue_network_params["module", "hidden", "weight"])


def test_one_critic_given_alone_keeps_its_weights_and_has_no_extra_dimension():
    critic = make_critic()
    weight = critic.module.hidden.weight.detach().clone()
    loss = IQLLoss(make_actor(), critic, make_value(), num_qvalue_nets=1)
    assert loss.qvalue_network_params.batch_size == ()
    torch.testing.assert_close(loss.qvalue_network_params["module", "hidden", "weight"].data, weight, rtol=0, atol=0)


def test_the_attributes_that_others_read_are_there():
    loss = make_loss(delay_value=True)
    assert loss.delay_qvalue is True and loss.delay_value is True
    assert make_loss().delay_value is False
    for name in ("actor_network_params", "value_network_params", "qvalue_network_params"):
        assert name in dict(loss.named_children())
    difference = torch.tensor([-2.0, 0.0, 3.0])
    torch.testing.assert_close(IQLLoss.loss_value_diff(difference, 0.9), torch.tensor([0.4, 0.0, 8.1]))


@pytest.mark.parametrize("num_qvalue_nets", [1, 2])
def test_shared_encoders_learn_from_the_first_network_only_with_separate_losses(batch, num_qvalue_nets):
    def gradients(separate_losses):
        encoder, actor, value = nn.Linear(OBSERVATION_DIM, OBSERVATION_DIM).double(), make_actor(), make_value()
        critic = make_critic()
        actor.module[0].module = nn.Sequential(encoder, actor.module[0].module)
        value.module = nn.Sequential(encoder, value.module)
        loss = IQLLoss(actor, critic, value, num_qvalue_nets=num_qvalue_nets, separate_losses=separate_losses)
        out = {}
        for name in ("loss_actor", "loss_value"):
            encoder.weight.grad = None
            loss(batch.clone())[name].backward()
            out[name] = encoder.weight.grad is not None and bool(encoder.weight.grad.any())
        return out

    assert gradients(separate_losses=False) == {"loss_actor": True, "loss_value": True}
    assert gradients(separate_losses=True) == {"loss_actor": True, "loss_value": False}


def test_a_critic_that_shares_the_encoder_of_v_leaves_it_to_v_with_separate_losses(batch):
    encoder, critic, value = nn.Linear(OBSERVATION_DIM, OBSERVATION_DIM).double(), make_critic(), make_value()

    class Encoded(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.encoder, self.head = encoder, head

        def forward(self, observation, *rest):
            return self.head(self.encoder(observation), *rest)

    critic.module, value.module = Encoded(critic.module), Encoded(value.module)
    loss = IQLLoss(make_actor(), critic, value, num_qvalue_nets=1, separate_losses=True)
    loss(batch)["loss_qvalue"].backward()
    assert encoder.weight.grad is None
    assert critic.module.head.out.weight.grad.any()
    loss(batch)["loss_value"].backward()
    assert encoder.weight.grad.any()


# ---------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("with_estimator", [True, False])
@pytest.mark.parametrize("num_qvalue_nets", [1, 2])
def test_state_dict_names_equal_torchrls_and_load_both_ways(batch, num_qvalue_nets, with_estimator):
    ours, theirs, again = (
        loss_class(
            make_actor(),
            [make_critic() for _ in range(num_qvalue_nets)],
            make_value(),
            num_qvalue_nets=num_qvalue_nets,
            **options,
        )
        for loss_class, options in (
            (IQLLoss, {}),
            (torchrl.objectives.IQLLoss, {"loss_function": "l2", "temperature": 3.0, "expectile": 0.7}),
            (IQLLoss, {}),
        )
    )
    if with_estimator:
        for loss in (ours, theirs, again):
            loss.make_value_estimator(gamma=GAMMA)
    separate_targets(theirs)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    ours.load_state_dict(theirs.state_dict())
    again.load_state_dict(ours.state_dict())
    expected = theirs(batch.clone())
    assert_equal_outputs(ours(batch.clone()), expected)
    assert_equal_outputs(again(batch.clone()), expected)
    separate_targets(theirs)
    theirs.load_state_dict(ours.state_dict())
    assert_equal_outputs(theirs(batch), expected)


@pytest.mark.parametrize("round_trip", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
@pytest.mark.parametrize("delay_value", [False, True])
def test_copies_give_equal_losses_and_share_nothing(batch, round_trip, delay_value):
    loss = make_loss(delay_value=delay_value, temperature=2.0)
    expected = loss(batch.clone())
    other = round_trip(loss)
    assert_equal_outputs(other(batch.clone()), expected, rtol=0, atol=0)
    for tensor in [*other.parameters(), *other.buffers()]:
        tensor.data.zero_()
    assert_equal_outputs(loss(batch.clone()), expected, rtol=0, atol=0)


def test_a_loss_that_was_never_called_can_be_pickled_with_its_renamed_keys():
    loss = float32_loss()
    loss.set_keys(reward=("agent", "reward"))
    other = pickle.loads(pickle.dumps(loss))
    assert other.tensor_keys.reward == ("agent", "reward")
    assert ("next", ("agent", "reward")) in other.in_keys


def test_soft_update_moves_every_target_by_tau():
    loss = make_loss(delay_value=True)
    updater = SoftUpdate(loss, tau=0.1)
    names = ("qvalue_network_params", "value_network_params")
    before = {name: getattr(loss, f"target_{name}").data.clone() for name in names}
    for name in names:
        assert (before[name] == getattr(loss, name).data).all()
        getattr(loss, name).data.apply_(lambda p: p.add_(1.0))
    updater.step()
    for name in names:
        for key, target in getattr(loss, f"target_{name}").items(True, True):
            torch.testing.assert_close(target, before[name][key] + 0.1)


def test_hard_update_copies_at_its_interval():
    loss = make_loss()
    updater = HardUpdate(loss, value_network_update_interval=1)
    loss.qvalue_network_params.data.apply_(lambda p: p.add_(1.0))
    updater.step()
    assert not (loss.target_qvalue_network_params.data == loss.qvalue_network_params.data).any()
    updater.step()
    assert (loss.target_qvalue_network_params.data == loss.qvalue_network_params.data).all()


def test_a_loss_without_target_updater_warns_and_one_with_it_does_not(batch):
    loss = make_loss()
    with pytest.warns(UserWarning, match="No target network updater"):
        loss(batch)
    SoftUpdate(loss, tau=0.005)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(batch)


@pytest.mark.parametrize("num_qvalue_nets", [1, 2])
def test_reset_redraws_every_layer_with_its_own_fan_in_and_makes_targets_equal(num_qvalue_nets):
    loss = make_loss(num_qvalue_nets, delay_value=True)
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    loss.reset_parameters_recursive()
    for name, parameter in loss.named_parameters():
        if "log_std" not in name:
            assert (parameter != before[name]).all(), name
        if name.endswith("weight"):
            bound = parameter.shape[-1] ** -0.5
            assert 0.6 * bound < parameter.abs().max() <= bound
    if num_qvalue_nets > 1:
        first, second = loss.qvalue_network_params["module", "hidden", "weight"]
        assert (first != second).all()
    for name in ("qvalue_network_params", "value_network_params"):
        assert (getattr(loss, f"target_{name}").data == getattr(loss, name).data).all()


def test_reset_keeps_the_parameters_trainable_and_in_place():
    loss = make_loss()
    before = list(loss.parameters())
    loss.reset_parameters_recursive()
    assert all(new is old and new.requires_grad for new, old in zip(loss.parameters(), before, strict=True))


def test_reset_forgets_a_learnt_standard_deviation():
    loss = float32_loss()
    log_std = loss.actor_network_params["module", "0", "module", "log_std"]
    log_std.data.fill_(1.0)
    loss.reset_parameters_recursive()
    assert (log_std == 0).all()


# ---------------------------------------------------------------------------------------------- schedules and precision


@pytest.mark.parametrize(("name", "value"), [("temperature", 5.0), ("expectile", 0.9), ("max_weight", 0.8)])
def test_a_constant_assigned_later_takes_effect_and_stays_a_buffer(batch, name, value):
    loss = make_loss()
    before = loss(batch.clone())
    setattr(loss, name, value)
    out = loss(batch.clone())
    assert any(out[key] != before[key] for key in LOSSES)
    assert_losses_are(out, reference(loss, batch, **{name: value}))
    assert name in dict(loss.named_buffers()) and name not in loss.state_dict()


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (3,),
        (2, 3),
    ],
)
def test_a_float32_loss_stays_float32(shape):
    loss, batch = float32_loss(), make_batch(*shape, dtype=torch.float32)
    out = loss(batch)
    assert {value.dtype for value in out.values()} == {torch.float32}
    assert batch["td_error"].dtype == batch["_log_prob"].dtype == torch.float32
    double = copy.deepcopy(loss).double()(make_double(batch))
    for name, value in out.items():
        torch.testing.assert_close(value.double(), double[name], rtol=1e-4, atol=1e-5)


def make_double(batch):
    return batch.apply(lambda x: x.double() if x.is_floating_point() else x)


def test_double_precision_keeps_its_precision():
    loss = float32_loss().double()
    assert {p.dtype for p in loss.parameters()} == {torch.float64}
    out = loss(make_batch(3))
    assert {value.dtype for value in out.values()} == {torch.float64}


@pytest.mark.parametrize("num_qvalue_nets", [1, 2, 4])
def test_looping_over_the_critics_equals_vectorising(batch, num_qvalue_nets):
    vectorised = make_loss(num_qvalue_nets)
    looping = make_loss(num_qvalue_nets, deactivate_vmap=True)
    looping.load_state_dict(vectorised.state_dict())
    assert_equal_outputs(looping(batch), vectorised(batch))
    for name in LOSSES:
        looping(batch)[name].backward()
        vectorised(batch)[name].backward()
    for one, other in zip(looping.parameters(), vectorised.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


# ---------------------------------------------------------------------------------------------- diagnostics


@pytest.mark.parametrize("delay_value", [False, True])
def test_diagnostics_equal_their_formulas(batch, delay_value):
    loss = make_loss(delay_value=delay_value, max_weight=0.9)
    expected = reference(loss, batch, max_weight=0.9)
    weight = expected.weight
    assert 0 < (weight == 0.9).mean() < 1
    formulas = {
        "advantage_mean": expected.advantage.mean(),
        "advantage_std": expected.advantage.std(),
        "clipped_fraction": (weight == 0.9).mean(),
        "effective_sample_size": weight.sum() ** 2 / (weight**2).sum() / weight.size,
        "qvalue": expected.target_qvalue.mean(),
        "qvalue_std": expected.target_qvalue.std(),
        "positive_advantages": (expected.advantage > 0).mean(),
        "value": (expected.target_qvalue - expected.advantage).mean(),
        "log_prob": expected.log_prob.mean(),
        "policy_std": np.exp([-0.5, 0.25]).mean(),
        "td_error": expected.td_error.mean(),
    }
    out = loss.diagnostics(batch)
    assert set(out.keys()) == set(formulas)
    for name, value in formulas.items():
        np.testing.assert_allclose(out[name].item(), value, rtol=1e-7, err_msg=name)
        assert not out[name].requires_grad


def test_diagnostics_change_neither_the_input_nor_the_random_state_nor_the_losses():
    loss, batch = float32_loss(dropout=0.5), make_batch(7, dtype=torch.float32)
    before, state = batch.clone(), torch.get_rng_state()
    expected = loss(batch.clone())
    torch.set_rng_state(state)
    first, second = loss.diagnostics(batch), loss.diagnostics(batch)
    assert_equal_outputs(first, second, rtol=0, atol=0)
    assert set(batch.keys(True, True)) == set(before.keys(True, True)) and (batch == before).all()
    assert torch.get_rng_state().equal(state)
    assert all(module.training for module in loss.actor_network.modules())
    assert_equal_outputs(loss(batch), expected, rtol=0, atol=0)


def test_diagnostics_are_without_dropout_in_critics_too():
    critics = build_qvalues(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(8,))
    for critic in critics:
        critic.module.insert(1, nn.Dropout(0.5))
    loss = IQLLoss(build_actor(OBSERVATION_DIM, ACTION_DIM), critics, build_value(OBSERVATION_DIM))
    batch = make_batch(7, dtype=torch.float32)
    assert_equal_outputs(loss.diagnostics(batch), loss.diagnostics(batch), rtol=0, atol=0)


def test_diagnostics_report_the_standard_deviation_before_squashing():
    loss, batch = float32_loss(policy="tanh_normal"), make_batch(7, dtype=torch.float32)
    batch["action"].clamp_(-0.9, 0.9)
    expected = loss.actor_network.module[0](batch.clone())["scale"].mean()
    torch.testing.assert_close(loss.diagnostics(batch)["policy_std"], expected.detach())


# ---------------------------------------------------------------------------------------------- compiled


def gradients(loss, function, data):
    loss.zero_grad()
    out = function(data)
    sum(out[name] for name in LOSSES).backward()
    return out, [p.grad.clone() for p in loss.parameters()]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.parametrize("delay_value", [False, True])
def test_compiled_without_graph_breaks_it_equals_eager_and_schedules_do_not_recompile(delay_value):
    loss, batch = make_loss(delay_value=delay_value), make_batch(7)
    SoftUpdate(loss, tau=0.005)
    loss(batch.clone())
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True)
    gradients(loss, compiled, batch)
    with torch.compiler.set_stance("fail_on_recompile"):
        for loss.temperature in (3.0, 1.0, 0.25):
            data = make_batch(7)
            eager_data = data.clone()
            out, computed = gradients(loss, compiled, data)
            expected_out, expected = gradients(loss, loss, eager_data)
            assert_equal_outputs(out, expected_out)
            torch.testing.assert_close(computed, expected)
            torch.testing.assert_close(data["td_error"], eager_data["td_error"])


@pytest.mark.slow
def test_a_loss_that_was_never_called_compiles_once():
    loss = make_loss()
    SoftUpdate(loss, tau=0.005)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    compiled(make_batch(7))
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(make_batch(7))


@pytest.mark.parametrize("name", ["loss_function", "reduction", "scalar_output_mode"])
def test_an_unknown_option_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'huber'"):
        make_loss(**{name: "huber"})


def test_a_fraction_of_a_critic_is_refused():
    networks = build_actor(OBSERVATION_DIM, ACTION_DIM), build_qvalues(OBSERVATION_DIM, ACTION_DIM)[0]
    with pytest.raises(ValueError, match=r"num_qvalue_nets must be an integer >= 1, got 1\.5"):
        IQLLoss(*networks, build_value(OBSERVATION_DIM), num_qvalue_nets=1.5)
