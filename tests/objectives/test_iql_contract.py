"""IQLLoss among TorchRL's other parts: trainer, n-step batches, importance weights, masks, keys and refusals."""

import copy
import math
import pickle
import re

import numpy as np
import pytest
import torch
import torchrl.objectives
from problems import ACTION_DIM, OBSERVATION_DIM, random_transitions, small_loss
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, MultiStep, TensorDictReplayBuffer
from torchrl.envs.libs.gym import GymEnv
from torchrl.objectives import SoftUpdate, ValueEstimators
from torchrl.objectives.value import GAE, MultiAgentGAE, VTrace
from torchrl.trainers.algorithms.iql import IQLTrainer

from iql_torchrl import IQLLoss, build_actor, build_qvalues, build_value

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")

LOSSES = ("loss_actor", "loss_qvalue", "loss_value")
MOVING = ("actor_network", "value_network", "qvalue_network", "target_value_network", "target_qvalue_network")
COUNT = 7
KEYWORDS = {
    "action": "action",
    "observation": "observation",
    "next_observation": ("next", "observation"),
    "next_reward": ("next", "reward"),
    "next_done": ("next", "done"),
    "next_terminated": ("next", "terminated"),
}


def double_loss(*, gamma=0.9, **options):
    if options.get("reduction") == "none":
        options.setdefault("scalar_output_mode", "exclude")
    loss = small_loss(**options).double()
    loss.make_value_estimator(gamma=gamma)
    for name, params in loss.named_children():
        if name.startswith("target_"):
            generator = torch.Generator().manual_seed(1)
            params.data.apply_(lambda p: p + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))  # noqa: B023
    return loss


def double_batch(count=COUNT, seed=0):
    return random_transitions(count, seed).apply(lambda x: x.double() if x.is_floating_point() else x)


def elements(batch, **options):
    """The loss of every transition by itself, as arrays; its reference is in test_iql.py."""
    loss = double_loss(reduction="none", **options)
    batch = batch.clone()
    out = {name: value.detach().numpy() for name, value in loss(batch).items()}
    return {**out, "entropy": -batch["_log_prob"].numpy()}


@pytest.fixture
def batch():
    return double_batch()


# ---------------------------------------------------------------------------------------------- trainer


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchrls_trainer_trains_the_loss_on_a_real_environment():
    torch.manual_seed(0)
    environment = GymEnv("Pendulum-v1")
    actor = build_actor(3, 1, hidden_dims=(16,))
    loss = IQLLoss(actor, build_qvalues(3, 1, hidden_dims=(16,)), build_value(3, hidden_dims=(16,)), delay_value=True)
    before = {name: p.detach().clone() for name, p in [*loss.named_parameters(), *loss.named_buffers()]}
    trainer = IQLTrainer(
        collector=Collector(environment, actor, frames_per_batch=32, total_frames=96),
        total_frames=96,
        frame_skip=1,
        optim_steps_per_batch=3,
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=1e-2),
        progress_bar=False,
        replay_buffer=TensorDictReplayBuffer(storage=LazyTensorStorage(200), batch_size=16),
        target_net_updater=SoftUpdate(loss, tau=0.1),
        enable_logging=False,
    )
    losses = []
    trainer.register_op("post_loss", lambda out: losses.append(out.detach().clone()) or out)
    trainer.train()
    after = {name: p.detach() for name, p in [*loss.named_parameters(), *loss.named_buffers()]}
    assert len(losses) == 9
    moved = {name for name, value in before.items() if not value.equal(after[name])}
    expected = {name for name in before if "_network_params." in name}
    assert moved == expected
    assert {name.split(".")[0] for name in moved} == {f"{name}_params" for name in MOVING}
    assert all(after[name].isfinite().all() for name in expected)


# ---------------------------------------------------------------------------------------------- n-step batches


def n_step_batch(gamma, n_steps):
    """Two trajectories of three and four steps, neither of them terminated, before and after MultiStep."""
    raw = double_batch()
    ends = torch.tensor([False, False, True, False, False, False, True]).unsqueeze(-1)
    raw["next"].update({"done": ends, "truncated": ends.clone(), "terminated": torch.zeros_like(ends)})
    return raw, MultiStep(gamma=gamma, n_steps=n_steps)(raw.unsqueeze(0).clone()).squeeze(0)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_n_step_batches_are_discounted_by_the_steps_to_their_next_observation(n_steps, flat):
    gamma = 0.8
    raw, batch = n_step_batch(gamma, n_steps)
    loss = double_loss(gamma=gamma)
    with loss.value_network_params.to_module(loss.value_network), torch.no_grad():
        next_value = loss.value_network(raw["next"].clone())["state_value"].squeeze(-1).numpy()
    reward, last = raw["next", "reward"].squeeze(-1).numpy(), [2, 2, 2, 6, 6, 6, 6]
    target, steps = np.zeros(COUNT), []
    for t in range(COUNT):
        until = min(t + n_steps - 1, last[t])
        steps.append(until - t + 1)
        target[t] = sum(gamma ** (k - t) * reward[k] for k in range(t, until + 1))
        target[t] += gamma ** steps[-1] * next_value[until]
    assert batch["steps_to_next_obs"].tolist() == steps
    _, metadata = loss.qvalue_loss(batch if flat else batch.unsqueeze(0))
    # The first critic's prediction by itself tells the target from the squared error.
    with loss.qvalue_network_params[0].to_module(loss.qvalue_network), torch.no_grad():
        prediction = loss.qvalue_network(raw.clone())["state_action_value"].squeeze(-1).numpy()
    np.testing.assert_allclose(metadata["td_error"][0].reshape(-1).numpy(), (target - prediction) ** 2, rtol=1e-9)


# ---------------------------------------------------------------------------------------------- importance weights


@pytest.mark.parametrize("trailing", [False, True], ids=["[*B]", "[*B, 1]"])
@pytest.mark.parametrize("shape", [(COUNT,), (2, 3)], ids=str)
@pytest.mark.parametrize("use_prioritized_weights", ["auto", True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_loss_is_weighed_by_the_importance_weights(reduction, use_prioritized_weights, shape, trailing):
    batch = double_batch(math.prod(shape)).reshape(shape)
    expected = elements(batch)
    weight = torch.linspace(0.1, 1.7, batch.numel(), dtype=torch.float64).reshape(shape)
    batch["priority_weight"] = weight.unsqueeze(-1) if trailing else weight
    out = double_loss(reduction=reduction, use_prioritized_weights=use_prioritized_weights)(batch)
    weight = weight.numpy()
    for name in LOSSES:
        weighed = expected[name] * weight
        wanted = {"mean": weighed.sum() / weight.sum(), "sum": weighed.sum(), "none": weighed}[reduction]
        np.testing.assert_allclose(out[name].detach().numpy(), wanted, rtol=1e-10, err_msg=name)
    if reduction != "none":
        np.testing.assert_allclose(out["entropy"].item(), expected["entropy"].mean(), rtol=1e-10)


def test_importance_weights_leave_td_errors_and_diagnostics_alone(batch):
    loss, weighed = double_loss(), batch.clone()
    weighed["priority_weight"] = torch.rand(COUNT)
    loss(batch)
    loss(weighed)
    assert weighed["td_error"].equal(batch["td_error"])
    assert (loss.diagnostics(weighed) == loss.diagnostics(batch)).all()


def test_importance_weights_are_ignored_where_that_was_asked_for(batch):
    expected = double_loss()(batch.clone())
    batch["priority_weight"] = torch.rand(COUNT, dtype=torch.float64)
    out = double_loss(use_prioritized_weights=False)(batch)
    assert all(out[name].equal(expected[name]) for name in LOSSES)


def test_importance_weights_that_are_demanded_and_missing_are_named(batch):
    with pytest.raises(KeyError, match=r"use_prioritized_weights=True but the input has no 'priority_weight'"):
        double_loss(use_prioritized_weights=True)(batch)
    renamed = double_loss(use_prioritized_weights=True)
    renamed.set_keys(priority_weight="importance")
    batch["priority_weight"] = torch.ones(COUNT)
    with pytest.raises(KeyError, match="'importance'"):
        renamed(batch)


@pytest.mark.parametrize("use_prioritized_weights", ["auto", True])
@pytest.mark.parametrize("key", ["importance", ("replay", "importance")])
def test_importance_weights_can_be_renamed(batch, key, use_prioritized_weights):
    expected, weight = elements(batch), torch.linspace(0.1, 1.7, COUNT, dtype=torch.float64)
    loss = double_loss(use_prioritized_weights=use_prioritized_weights)
    loss.set_keys(priority_weight=key)
    batch[key] = weight
    batch["priority_weight"] = torch.ones(COUNT)
    out = loss(batch)
    for name in LOSSES:
        wanted = np.average(expected[name], weights=weight.numpy())
        assert out[name].item() == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("shape", [(), (COUNT + 1,), (COUNT, 3)], ids=["one", "[B + 1]", "[B, 3]"])
def test_importance_weights_of_another_number_are_refused_by_name(batch, shape):
    batch.batch_size = []
    batch["priority_weight"] = torch.ones(shape)
    with pytest.raises((RuntimeError, ValueError), match="priority_weight"):
        double_loss()(batch)


def test_weights_of_zero_make_transitions_count_for_nothing(batch):
    expected = elements(batch)
    batch["priority_weight"] = torch.tensor([1.0, 0, 1, 1, 0, 0, 1])
    out, kept = double_loss()(batch), [0, 2, 3, 6]
    for name in LOSSES:
        assert out[name].item() == pytest.approx(expected[name][kept].mean(), rel=1e-10)


# ---------------------------------------------------------------------------------------------- priorities


def test_td_errors_serve_as_the_priorities_of_a_sampler(batch):
    loss, priority = double_loss(use_prioritized_weights=True), torch.ones(COUNT, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for _ in range(3):
        drawn = torch.multinomial(priority, 4, generator=generator)
        sample = batch[drawn].clone()
        sample["priority_weight"] = 1 / (COUNT * priority[drawn] / priority.sum())
        out = loss(sample)
        optimizer.zero_grad()
        sum(out[name] for name in LOSSES).backward()
        optimizer.step()
        assert sample["td_error"].shape == (4,) and (sample["td_error"] > 0).all()
        priority[drawn] = sample["td_error"]
    assert (priority != 1).any()


# ---------------------------------------------------------------------------------------------- masks


VALID = torch.tensor([True, False, True, True, False, True, True])


def masked(batch, key, *, poisoned):
    """Each network meets a NaN at an invalid place, where ``poisoned``."""
    batch = batch.clone()
    if poisoned:
        batch["observation"][~VALID] = math.nan
        batch["action"][~VALID] = math.nan
        batch["next"].update({"reward": batch["next", "reward"].masked_fill(~VALID.unsqueeze(-1), math.nan)})
        batch["next", "observation"][~VALID] = math.nan
    batch[key] = VALID.unsqueeze(-1)
    return batch


@pytest.mark.parametrize("poisoned", [False, True], ids=["finite", "nan"])
@pytest.mark.parametrize("key", [("collector", "mask"), "shifted_valid", ("my", "mask")], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_and_entropy_count_valid_transitions_only(batch, reduction, key, poisoned):
    loss, expected, kept = double_loss(reduction=reduction), elements(batch), VALID.numpy()
    if key == ("my", "mask"):
        loss.loss_mask_key = key
    out = loss(masked(batch, key, poisoned=poisoned))
    for name in LOSSES:
        only = np.where(kept, expected[name], 0)
        wanted = {"mean": only.sum() / kept.sum(), "sum": only.sum(), "none": only}[reduction]
        np.testing.assert_allclose(out[name].detach().numpy(), wanted, rtol=1e-10, err_msg=name)
    if reduction != "none":
        assert out["entropy"].item() == pytest.approx(expected["entropy"][kept].mean(), rel=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_diagnostics_count_valid_transitions_only_under_every_reduction(batch, reduction):
    loss = double_loss(reduction=reduction)
    expected = double_loss().diagnostics(batch[VALID])
    out = loss.diagnostics(masked(batch, ("collector", "mask"), poisoned=True))
    assert set(out.keys()) == set(expected.keys())
    for name, value in expected.items():
        torch.testing.assert_close(out[name], value, rtol=1e-10, atol=0)


def parameter_gradients(loss, batch):
    loss.zero_grad()
    out = loss(batch)
    sum(out[name] for name in LOSSES).backward()
    return {name: p.grad for name, p in loss.named_parameters()}


def test_invalid_transitions_give_no_gradient(batch):
    expected = parameter_gradients(double_loss(), batch[VALID].clone())
    found = parameter_gradients(double_loss(), masked(batch, ("collector", "mask"), poisoned=False))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_masks_and_importance_weights_go_together(batch):
    expected, weight, kept = elements(batch), torch.linspace(0.1, 1.7, COUNT, dtype=torch.float64), VALID.numpy()
    batch = masked(batch, ("collector", "mask"), poisoned=True)
    batch["priority_weight"] = torch.where(VALID, weight, 0.5)
    out = double_loss()(batch)
    for name in LOSSES:
        wanted = np.average(expected[name][kept], weights=weight.numpy()[kept])
        assert out[name].item() == pytest.approx(wanted, rel=1e-10)


def test_a_batch_without_a_valid_transition_has_losses_of_zero(batch):
    batch["collector", "mask"] = torch.zeros(COUNT, 1, dtype=torch.bool)
    assert all(value == 0 for value in double_loss()(batch).values())


def test_masks_can_be_turned_off(batch):
    expected = double_loss()(batch.clone())
    loss = double_loss()
    loss.loss_mask_key = None
    out = loss(masked(batch, ("collector", "mask"), poisoned=False))
    assert all(out[name].equal(expected[name]) for name in LOSSES)


# ---------------------------------------------------------------------------------------------- calls and keys


def by_keyword(loss, batch, **others):
    return loss(**{name: batch[key] for name, key in KEYWORDS.items()}, **others)


OUTPUTS = {
    None: ["loss_actor", "loss_qvalue", "loss_value", "entropy"],
    "exclude": ["loss_actor", "loss_qvalue", "loss_value"],
}


def of_output_mode(mode):
    return double_loss() if mode is None else double_loss(reduction="none", scalar_output_mode=mode)


@pytest.mark.parametrize("mode", OUTPUTS)
def test_keyword_calls_give_the_tensors_of_out_keys_in_order(batch, mode):
    loss = of_output_mode(mode)
    expected, out = loss(batch.clone()), by_keyword(loss, batch)
    assert list(loss.out_keys) == OUTPUTS[mode] and type(out) is tuple and len(out) == len(OUTPUTS[mode])
    for name, value in zip(OUTPUTS[mode], out, strict=True):
        assert isinstance(value, torch.Tensor) and value.equal(expected[name])
    assert "td_error" not in batch


@pytest.mark.parametrize("mode", OUTPUTS)
def test_selected_out_keys_can_be_reset(batch, mode):
    loss = of_output_mode(mode)
    for selected in (["loss_value"], ["loss_qvalue", "loss_actor"]):
        loss.select_out_keys(*selected)
        assert set(loss.out_keys) == set(loss(batch.clone()).keys()) == set(selected)
        loss.reset_out_keys()
        assert list(loss.out_keys) == list(loss(batch.clone()).keys()) == OUTPUTS[mode]
    assert len(by_keyword(loss, batch)) == len(OUTPUTS[mode])


@pytest.mark.parametrize("num_qvalue_nets", [1, 2])
def test_only_the_three_losses_are_named_as_losses(batch, num_qvalue_nets):
    loss = IQLLoss(
        build_actor(OBSERVATION_DIM, ACTION_DIM),
        build_qvalues(OBSERVATION_DIM, ACTION_DIM)[:num_qvalue_nets],
        build_value(OBSERVATION_DIM),
        num_qvalue_nets=num_qvalue_nets,
    )
    out = loss(random_transitions(COUNT))
    assert {name for name in out.keys() if name.startswith("loss")} == set(LOSSES)  # noqa: SIM118
    assert not any(name.startswith("loss") for name in loss.diagnostics(random_transitions(COUNT)).keys())  # noqa: SIM118


# ---------------------------------------------------------------------------------------------- value estimators


ON_POLICY_KINDS = [ValueEstimators.GAE, ValueEstimators.MAGAE, ValueEstimators.VTrace]


def on_policy_instance(kind, loss):
    options = {"gamma": 0.9, "value_network": loss.value_network}
    if kind is VTrace:
        return VTrace(actor_network=loss.actor_network, **options)
    return kind(lmbda=0.9, **options)


@pytest.mark.parametrize("given_as", ["class", "instance"])
@pytest.mark.parametrize("kind", [GAE, MultiAgentGAE, VTrace])
def test_on_policy_estimators_are_refused_as_classes_and_instances_and_leave_the_old_one(kind, given_as):
    loss = small_loss()
    loss.make_value_estimator(gamma=0.5)
    before = loss.value_estimator
    estimator = kind if given_as == "class" else on_policy_instance(kind, loss)
    with pytest.raises(NotImplementedError, match=f"{kind.__name__} is an on-policy estimator.*TD0, TD1, TDLambda"):
        loss.make_value_estimator(estimator)
    assert loss.value_estimator is before


@pytest.mark.parametrize("kind", ON_POLICY_KINDS, ids=lambda kind: kind.name)
def test_on_policy_estimators_refused_as_kinds_leave_the_old_one(kind):
    loss = small_loss()
    loss.make_value_estimator(gamma=0.5)
    before = loss.value_estimator
    with pytest.raises(NotImplementedError, match=r"IQLLoss.*TD0.*TD1.*TDLambda"):
        loss.make_value_estimator(kind)
    assert loss.value_estimator is before and loss.value_type == ValueEstimators.TD0


# ---------------------------------------------------------------------------------------------- state


def one_critic_loss(**options):
    critic = build_qvalues(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(8,))[0]
    actor, value = build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(8,)), build_value(OBSERVATION_DIM)
    loss = IQLLoss(actor, critic, value, num_qvalue_nets=1, **options)
    loss.target_qvalue_network_params.data.apply_(lambda p: p.add_(0.1))
    return loss


def legacy(state_dict):
    """Earlier releases of TorchRL gave a single critic a leading dimension of 1, and its targets too."""
    return {
        name: value.unsqueeze(0) if "qvalue_network_params." in name else value for name, value in state_dict.items()
    }


@pytest.mark.parametrize("module", [lambda loss: loss, lambda loss: nn.ModuleDict({"agent": nn.ModuleList([loss])})])
@pytest.mark.parametrize("delay_value", [False, True])
def test_states_of_a_single_critic_from_earlier_releases_load_at_any_depth(module, delay_value):
    torch.manual_seed(0)
    source, destination = one_critic_loss(delay_value=delay_value), one_critic_loss(delay_value=delay_value)
    state = legacy(module(source).state_dict())
    stacked = [name for name, value in state.items() if "qvalue_network_params." in name and value.shape[0] == 1]
    assert {"target_" in name for name in stacked} == {True, False}
    given = dict(state)
    result = module(destination).load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    for name, value in source.state_dict().items():
        assert destination.state_dict()[name].equal(value), name
    assert all(state[name] is given[name] for name in given)  # the caller's own dict is as it was


def test_a_state_of_another_shape_is_still_refused():
    loss = one_critic_loss()
    state = {n: v.unsqueeze(0).repeat(2, *[1] * v.ndim) if "qvalue" in n else v for n, v in loss.state_dict().items()}
    with pytest.raises((RuntimeError, ValueError)):
        one_critic_loss().load_state_dict(state)


@pytest.mark.parametrize("num_qvalue_nets", [1, 2])
@pytest.mark.parametrize("delay_value", [False, True])
def test_parameters_and_buffers_are_each_there_once(delay_value, num_qvalue_nets):
    loss = one_critic_loss(delay_value=delay_value) if num_qvalue_nets == 1 else double_loss(delay_value=delay_value)
    parameters, buffers = list(loss.named_parameters()), list(loss.named_buffers())
    for tensors in (parameters, buffers):
        assert len({name for name, _ in tensors}) == len(tensors)
    storage = [tensor.data_ptr() for _, tensor in [*parameters, *buffers]]
    assert len(set(storage)) == len(storage)
    assert all(p.requires_grad and p.is_leaf for _, p in parameters)
    assert {name.split(".")[0] for name, _ in parameters} == {
        "actor_network_params",
        "value_network_params",
        "qvalue_network_params",
    }


def test_a_change_of_precision_and_back_leaves_a_working_loss():
    loss, batch = small_loss(delay_value=True), random_transitions(COUNT)
    expected = loss(batch.clone())
    in_double = loss.double()(double_batch())
    assert {value.dtype for value in in_double.values()} == {torch.float64}
    out = loss.float()(batch)
    for name, value in expected.items():
        assert out[name].dtype == torch.float32
        torch.testing.assert_close(out[name], value)
        torch.testing.assert_close(in_double[name].float(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("round_trip", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies_keep_their_options_keys_mask_and_selected_outputs(batch, round_trip):
    loss = double_loss(qvalue_reduction="mean", use_prioritized_weights=True)
    loss.set_keys(priority_weight="importance")
    loss.loss_mask_key = "valid"
    loss.select_out_keys("loss_value", "loss_qvalue")
    batch["importance"], batch["valid"] = torch.rand(COUNT, dtype=torch.float64), VALID.unsqueeze(-1)
    expected, out = loss(batch.clone()), round_trip(loss)(batch)
    assert set(out.keys()) == {"loss_value", "loss_qvalue"}
    assert all(out[name].equal(value) for name, value in expected.items())


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("loss_function", ["l2", "smooth_l1"])
def test_the_mean_over_the_critics_is_their_sum_divided_by_their_number(batch, loss_function):
    other = batch.clone()
    summed = double_loss(loss_function=loss_function)(batch)
    averaged = double_loss(loss_function=loss_function, qvalue_reduction="mean")(other)
    torch.testing.assert_close(averaged["loss_qvalue"], summed["loss_qvalue"] / 2, rtol=1e-12, atol=0)
    assert all(averaged[name].equal(summed[name]) for name in ("loss_actor", "loss_value", "entropy"))
    assert other["td_error"].equal(batch["td_error"])


def dropout_loss(**options):
    """Two critics of equal weights that differ by their dropout only, and a V that has none."""
    torch.manual_seed(0)
    critics = build_qvalues(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(32,))
    for critic in critics:
        critic.module.insert(1, nn.Dropout(0.5))
    loss = IQLLoss(
        build_actor(OBSERVATION_DIM, ACTION_DIM), critics, build_value(OBSERVATION_DIM), reduction="none",
        scalar_output_mode="exclude", **options,
    )  # fmt: skip
    loss.qvalue_network_params.data.apply_(lambda p: p.copy_(p[:1].expand_as(p)))
    return loss


@pytest.mark.parametrize(
    ("deactivate_vmap", "randomness", "equal"),
    [(False, "different", False), (False, "same", True), (True, "different", False)],
)
def test_dropout_of_the_critics_follows_the_randomness_asked_for(deactivate_vmap, randomness, equal):
    loss = dropout_loss(deactivate_vmap=deactivate_vmap)
    loss.set_vmap_randomness(randomness)
    first, second = loss.qvalue_loss(random_transitions(COUNT))[1]["td_error"]
    assert first.equal(second) == equal


def test_dropout_is_refused_where_randomness_is_an_error():
    loss = dropout_loss()
    loss.set_vmap_randomness("error")
    with pytest.raises(RuntimeError, match="random"):
        loss(random_transitions(COUNT))


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("action", r"qvalue_network reads 'action'.*it has 'observation'"),
        ("observation", r"qvalue_network reads 'observation'.*it has 'action'"),
        (("next", "observation"), r"value_network reads 'observation'.*under 'next'; it has 'reward'"),
        (("next", "reward"), r"no entry \('next', 'reward'\), the reward; it has 'observation'"),
        (("next", "done"), r"no entry \('next', 'done'\), the end of an episode; it has 'observation'"),
        ("next", r"no entry \('next', 'reward'\), the reward; it has 'observation'"),
    ],
    ids=str,
)
def test_a_missing_input_is_named_with_what_was_found(batch, key, message):
    del batch[key]
    with pytest.raises(KeyError, match=message):
        double_loss()(batch)


@pytest.mark.parametrize("name", ["value_loss", "actor_loss", "qvalue_loss", "diagnostics"])
@pytest.mark.parametrize("key", ["action", "observation"])
def test_every_method_names_a_missing_input(batch, name, key):
    del batch[key]
    with pytest.raises(KeyError, match=f"reads '{key}', which the input does not have"):
        getattr(double_loss(), name)(batch)


@pytest.mark.parametrize("shape", [(COUNT,), (COUNT, 3), (COUNT, COUNT)], ids=["[B]", "[B, 3]", "[B, B]"])
@pytest.mark.parametrize("key", ["reward", "terminated"])
def test_a_reward_or_flag_of_another_shape_is_refused(batch, key, shape):
    batch["next", key] = torch.ones(shape).to(batch["next", key].dtype)
    with pytest.raises(RuntimeError, match="shape"):
        double_loss()(batch)


@pytest.mark.parametrize("key", ["reward", "terminated", "done"])
def test_a_reward_or_flag_of_another_shape_is_refused_by_name_with_both_shapes(batch, key):
    batch["next", key] = torch.ones(COUNT, 3).to(batch["next", key].dtype)
    with pytest.raises(RuntimeError) as error:
        double_loss()(batch)
    assert key in str(error.value) and "(7, 3)" in str(error.value)


def head(in_keys, out_key, width):
    inputs = OBSERVATION_DIM + (ACTION_DIM if "action" in in_keys else 0)

    class Head(nn.Linear):
        def forward(self, *entries):
            return super().forward(torch.cat(entries, -1))

    return TensorDictModule(Head(inputs, width), in_keys=in_keys, out_keys=[out_key])


def loss_of_widths(value_width=1, qvalue_width=1, **options):
    critics = [head(["observation", "action"], "state_action_value", qvalue_width) for _ in "12"]
    value = head(["observation"], "state_value", value_width)
    return IQLLoss(build_actor(OBSERVATION_DIM, ACTION_DIM), critics, value, **options)


@pytest.mark.parametrize("width", [3, COUNT])
def test_a_value_that_does_not_end_in_one_number_is_refused_by_name_with_both_shapes(width):
    message = rf"'state_value' has shape \(7, {width}\) but the critics' 'state_action_value' has shape \(7,\)"
    loss = loss_of_widths(value_width=width)
    for function in (loss, loss.value_loss):
        with pytest.raises(RuntimeError, match=message):
            function(random_transitions(COUNT))


@pytest.mark.parametrize("width", [3, COUNT])
def test_a_critic_that_does_not_end_in_one_number_is_refused_by_name_with_both_shapes(width):
    loss = loss_of_widths(qvalue_width=width)
    message = rf"'state_value' has shape \(7,\) but the critics' 'state_action_value' has shape \(7, {width}\)"
    with pytest.raises(RuntimeError, match=message):
        loss(random_transitions(COUNT))
    message = rf"target r \+ gamma \* V\(s'\) has shape \(7,\).*'state_action_value' has shape \(7, {width}\)"
    with pytest.raises(RuntimeError, match=message):
        loss.qvalue_loss(random_transitions(COUNT))


@pytest.mark.parametrize(
    "widths",
    [
        {"value_width": 3},
        {"qvalue_width": 3},
    ],
    ids=str,
)
def test_the_actor_loss_by_itself_names_a_network_of_another_width(widths):
    with pytest.raises(RuntimeError, match=r"state_(action_)?value.*\(7, 3\)"):
        loss_of_widths(**widths).actor_loss(random_transitions(COUNT))


def test_a_log_prob_that_is_not_summed_over_the_action_is_refused_by_name_with_both_shapes():
    loss, batch = loss_of_widths(qvalue_width=3, value_width=3), random_transitions(COUNT)
    message = r"log-probability of 'action' has shape \(7,\).*'state_action_value' has shape \(7, 3\)"
    with pytest.raises(RuntimeError, match=message):
        loss.actor_loss(batch)


@pytest.mark.parametrize(
    ("name", "key", "written"),
    [("value", "v", "'state_value'"), ("state_action_value", ("critic", "q"), "'state_action_value'")],
)
def test_a_network_that_writes_another_key_is_refused_by_name(batch, name, key, written):
    loss = small_loss().double()
    loss.set_keys(**{name: key})
    message = rf"the loss reads {re.escape(repr(key))} but the network writes {written}.*set_keys\({name}="
    with pytest.raises(KeyError, match=message):
        loss(batch)


def networks():
    return build_actor(OBSERVATION_DIM, ACTION_DIM), build_qvalues(OBSERVATION_DIM, ACTION_DIM)[0]


def test_an_actor_without_a_distribution_is_refused_by_name():
    actor = TensorDictModule(nn.Linear(OBSERVATION_DIM, ACTION_DIM), in_keys=["observation"], out_keys=["action"])
    with pytest.raises(TypeError, match=r"actor_network must be a ProbabilisticActor .*got TensorDictModule"):
        IQLLoss(actor, networks()[1], build_value(OBSERVATION_DIM))


def test_an_empty_list_of_critics_is_refused_with_the_number_that_is_needed():
    with pytest.raises(ValueError, match=r"qvalue_network is an empty list; num_qvalue_nets=2"):
        IQLLoss(networks()[0], [], build_value(OBSERVATION_DIM))


@pytest.mark.parametrize("number", [0, -1, 1.5])
def test_a_number_of_critics_that_is_no_count_is_refused_before_the_list_is_looked_at(number):
    for critics in (networks()[1], []):
        with pytest.raises(ValueError, match=f"num_qvalue_nets must be an integer >= 1, got {number}"):
            IQLLoss(networks()[0], critics, build_value(OBSERVATION_DIM), num_qvalue_nets=number)


@pytest.mark.parametrize(
    ("name", "value", "options"),
    [
        ("qvalue_reduction", "product", "sum, mean"),
        ("qvalue_reduction", None, "sum, mean"),
        ("use_prioritized_weights", "always", "True, False, 'auto'"),
        ("use_prioritized_weights", None, "True, False, 'auto'"),
    ],
)
def test_an_unknown_option_is_refused_with_those_there_are(name, value, options):
    with pytest.raises(ValueError, match=rf"{name} must be one of {options}, got {value!r}\."):
        small_loss(**{name: value})


def test_options_that_torchrls_other_losses_have_keep_their_names():
    theirs = torchrl.objectives.SACLoss.__init__.__kwdefaults__
    assert "use_prioritized_weights" in theirs and theirs["use_prioritized_weights"] == "auto"
    assert IQLLoss.__init__.__kwdefaults__["use_prioritized_weights"] == theirs["use_prioritized_weights"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("expectile", 1.5),
        ("expectile", math.nan),
        ("max_weight", 0.0),
    ],
)
def test_a_scheduled_value_out_of_range_is_refused_and_the_old_one_stays(name, value):
    loss = double_loss()
    before = float(getattr(loss, name))
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {value}"):
        setattr(loss, name, value)
    assert float(getattr(loss, name)) == before


def test_a_value_network_with_inputs_of_its_own_can_be_called_by_keywords(batch):
    loss = IQLLoss(*networks(), head(["state"], "state_value", 1)).double()
    batch["state"], batch["next", "state"] = batch["observation"], batch["next", "observation"]
    entries = {key if isinstance(key, str) else "_".join(key): batch[key] for key in loss.in_keys}
    assert "next_state" in entries
    assert [value.item() for value in loss(**entries)] == [value.item() for value in loss(batch).values()]


def test_importance_weights_can_be_given_by_keyword(batch):
    loss = double_loss(use_prioritized_weights=True)
    batch["priority_weight"] = torch.linspace(0.1, 1.7, COUNT, dtype=torch.float64)
    entries = {key if isinstance(key, str) else "_".join(key): batch[key] for key in loss.in_keys}
    assert [value.item() for value in loss(**entries)] == [value.item() for value in loss(batch).values()]
