"""DiscreteIQLLoss against formulas written out in numpy, and against TorchRL's loss of that name."""

import copy
import pickle
import shutil
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchrl.objectives
from scipy.special import expit, log_softmax
from scipy.stats import bernoulli
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Binary, Bounded, Categorical, Composite, MultiCategorical, MultiOneHot, OneHot
from torchrl.modules import OneHotCategorical, ProbabilisticActor
from torchrl.objectives import SoftUpdate

from iql_torchrl import (
    DiscreteIQLLoss,
    TrainingStep,
    build_discrete_actor,
    build_discrete_qvalues,
    build_value,
    make_buffer,
)

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")

OBSERVATION_DIM = 3
GAMMA = 0.9375  # exact in float32, the precision in which TorchRL's estimators keep it
NUM_ACTIONS = {"categorical": 4, "one_hot": 4, "mult_one_hot": [2, 3], "binary": 3}
SPECS = {"categorical": Categorical(4), "one_hot": OneHot(4), "mult_one_hot": MultiOneHot([2, 3]), "binary": Binary(3)}
LOSSES = {"loss_actor": "actor_network", "loss_qvalue": "qvalue_network", "loss_value": "value_network"}
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")


@dataclass(frozen=True)
class Layout:
    """How the data hold the actions."""

    space: str
    dtype: torch.dtype = torch.float64
    trailing_one: bool = False  # categorical: [*B, 1]
    base_value: bool = True  # binary: an additional output of the critics


LAYOUTS = {
    "categorical": Layout("categorical", torch.int64),
    "categorical, int32": Layout("categorical", torch.int32),
    "categorical, [*B, 1]": Layout("categorical", torch.int64, trailing_one=True),
    "one_hot, bool": Layout("one_hot", torch.bool),
    "one_hot, int": Layout("one_hot", torch.int64),
    "one_hot, float": Layout("one_hot"),
    "mult_one_hot, bool": Layout("mult_one_hot", torch.bool),
    "mult_one_hot, int": Layout("mult_one_hot", torch.int64),
    "mult_one_hot, float": Layout("mult_one_hot"),
    "binary, bool": Layout("binary", torch.bool),
    "binary, int8": Layout("binary", torch.int8),
    "binary, float, n + 1 outputs": Layout("binary"),
    "binary, float, n outputs": Layout("binary", base_value=False),
}
FLOATS = {
    "categorical": LAYOUTS["categorical"],
    "one_hot": LAYOUTS["one_hot, float"],
    "mult_one_hot": LAYOUTS["mult_one_hot, float"],
    "binary": LAYOUTS["binary, float, n + 1 outputs"],
    "binary, n outputs": LAYOUTS["binary, float, n outputs"],
}


def each(layouts):
    return pytest.mark.parametrize("layout", layouts.values(), ids=list(layouts))


def make_networks(layout, num_qvalue_nets=2):
    numbers, sizes = NUM_ACTIONS[layout.space], {"hidden_dims": (5,), "initialisation": "default"}
    critics_space = layout.space if layout.base_value else "one_hot"
    return (
        build_discrete_actor(OBSERVATION_DIM, numbers, action_space=layout.space, **sizes),
        build_discrete_qvalues(
            OBSERVATION_DIM, numbers, action_space=critics_space, num_qvalue_nets=num_qvalue_nets, **sizes
        ),
        build_value(OBSERVATION_DIM, **sizes),
    )


def make_loss(layout, num_qvalue_nets=2, *, loss_class=DiscreteIQLLoss, **options):
    networks = make_networks(layout, num_qvalue_nets)
    options = {"action_space": layout.space, "num_qvalue_nets": num_qvalue_nets, **options}
    loss = loss_class(*networks, **options).double()
    loss.make_value_estimator(gamma=GAMMA)
    separate_targets(loss)
    return loss


def separate_targets(loss):
    for name, params in loss.named_children():
        if name.startswith("target_"):
            params.data.apply_(lambda p: p.add_(torch.randn_like(p), alpha=0.5))


def random_actions(layout, *shape):
    action = SPECS[layout.space].rand(shape).to(layout.dtype)
    return action.unsqueeze(-1) if layout.trailing_one else action


def make_batch(layout, *shape):
    terminated = torch.rand(*shape, 1) < 0.3
    return TensorDict(
        {
            "observation": torch.randn(*shape, OBSERVATION_DIM, dtype=torch.float64),
            "action": random_actions(layout, *shape),
            "next": {
                "observation": torch.randn(*shape, OBSERVATION_DIM, dtype=torch.float64),
                "reward": torch.randn(*shape, 1, dtype=torch.float64),
                "terminated": terminated,
                "done": terminated | (torch.rand(*shape, 1) < 0.3),
            },
        },
        batch_size=shape,
    )


def numpy_mlp(params, x):
    indices = sorted({key[:-1] for key in params.keys(True, True)}, key=lambda key: int(key[-1]))
    for index in indices:
        weight, bias = (params[(*index, kind)].detach().numpy() for kind in ("weight", "bias"))
        x = x @ weight.T + bias
        x = np.maximum(x, 0) if index != indices[-1] else x
    return x


def parts_of(row):
    """The sub-actions of a mult_one_hot row."""
    return np.split(row, np.cumsum(NUM_ACTIONS["mult_one_hot"])[:-1])


def value_of_action(space, values, action):
    """Q(s, a) of one state by looking it up, without products."""
    if space == "categorical":
        return values[int(action.item())]
    if space == "one_hot":
        return values[list(action).index(1)]
    if space == "mult_one_hot":
        return sum(part[list(chosen).index(1)] for part, chosen in zip(parts_of(values), parts_of(action), strict=True))
    base = values[len(action)] if len(values) > len(action) else 0.0
    return base + sum(value for value, bit in zip(values, action, strict=False) if bit)


def log_prob_of_action(space, logits, action):
    """log pi(a | s) of one state."""
    if space == "binary":
        return bernoulli.logpmf(action.astype(int), expit(logits)).sum()
    if space == "mult_one_hot":
        logits = np.concatenate([log_softmax(part) for part in parts_of(logits)])
    else:
        logits = log_softmax(logits)
    return value_of_action(space, logits, action)


def for_every_state(function, space, outputs, action):
    shape = outputs.shape[:-1]
    rows, actions = outputs.reshape(-1, outputs.shape[-1]), action.reshape(int(np.prod(shape)), -1)
    return np.array([function(space, row, one) for row, one in zip(rows, actions, strict=True)]).reshape(shape)


def reference(
    loss, layout, batch, *, expectile=0.7, temperature=3.0, max_weight=100.0, qvalue_reduction="sum", delayed=False
):
    """Equations 5, 6 and 7 of the paper, one array element a transition."""
    observation, action = batch["observation"].numpy(), batch["action"].numpy()
    reward, terminated, following = (batch["next", key].numpy() for key in ("reward", "terminated", "observation"))

    def qvalues(params):
        critics = params.unbind(0) if params.ndim else [params]
        outputs = [numpy_mlp(critic, observation) for critic in critics]
        return np.stack([for_every_state(value_of_action, layout.space, one, action) for one in outputs])

    bootstrap = loss.target_value_network_params if delayed else loss.value_network_params
    qvalue, target_qvalue = qvalues(loss.qvalue_network_params), qvalues(loss.target_qvalue_network_params).min(0)
    value = numpy_mlp(loss.value_network_params, observation)[..., 0]
    target = reward[..., 0] + GAMMA * np.where(terminated[..., 0], 0, numpy_mlp(bootstrap, following)[..., 0])
    difference, advantage = target_qvalue - value, target_qvalue - numpy_mlp(bootstrap, observation)[..., 0]
    weight = np.minimum(np.exp(temperature * advantage), max_weight)
    logits = numpy_mlp(loss.actor_network_params, observation)
    log_prob = for_every_state(log_prob_of_action, layout.space, logits, action)
    errors = (target - qvalue) ** 2
    return SimpleNamespace(
        loss_value=np.where(difference > 0, expectile, 1 - expectile) * difference**2,
        loss_qvalue=errors.sum(0) if qvalue_reduction == "sum" else errors.mean(0),
        loss_actor=-weight * log_prob,
        errors=errors,
        weight=weight,
        advantage=advantage,
        target_qvalue=target_qvalue,
        log_prob=log_prob,
    )


def assert_close(computed, expected, name=""):
    np.testing.assert_allclose(computed.detach().numpy(), expected, rtol=1e-10, atol=1e-12, err_msg=name)


def assert_losses_are(out, expected):
    for name in LOSSES:
        assert_close(out[name], getattr(expected, name).mean(), name)
    assert_close(out["entropy"], -expected.log_prob.mean(), "entropy")


def assert_equal_outputs(first, second, **tolerance):
    assert list(first.keys()) == list(second.keys())
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], **tolerance)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@each(LAYOUTS)
def test_losses_td_error_and_entropy_equal_the_equations_for_every_action_space_and_batch_shape(layout, shape):
    loss, batch = make_loss(layout), make_batch(layout, *shape)
    out, expected = loss(batch), reference(loss, layout, batch)
    assert all(value.shape == () for value in out.values())
    assert_losses_are(out, expected)
    assert_close(batch["td_error"], expected.errors.max(0))
    assert_close(batch["_log_prob"], expected.log_prob)


@pytest.mark.parametrize("name", ["categorical", "categorical, [*B, 1]"])
def test_a_batch_dimension_of_one_is_not_taken_for_the_trailing_one_of_categorical_actions(name):
    layout = LAYOUTS[name]
    loss, batch = make_loss(layout), make_batch(layout, 4, 1)
    assert_losses_are(loss(batch), reference(loss, layout, batch))
    assert batch["td_error"].shape == batch["_log_prob"].shape == (4, 1)


@pytest.mark.parametrize("deactivate_vmap", [False, True])
@pytest.mark.parametrize("num_qvalue_nets", [1, 2, 4])
@each(FLOATS)
def test_any_number_of_critics_vectorised_or_looped_over_gives_the_equations(layout, num_qvalue_nets, deactivate_vmap):
    loss = make_loss(layout, num_qvalue_nets, deactivate_vmap=deactivate_vmap)
    batch = make_batch(layout, 7)
    assert_losses_are(loss(batch), reference(loss, layout, batch))


@pytest.mark.parametrize(
    "options",
    [{"expectile": 0.2}, {"temperature": 0.5}, {"max_weight": 0.9}, {"qvalue_reduction": "mean"}],
    ids=lambda options: next(iter(options)),
)
@each(FLOATS)
def test_options_of_the_continuous_loss_hold_here_too(layout, options):
    loss, batch = make_loss(layout, **options), make_batch(layout, 64)
    expected = reference(loss, layout, batch, **options)
    assert_losses_are(loss(batch), expected)
    if "max_weight" in options:
        assert 0 < (expected.weight == 0.9).mean() < 1


@each(FLOATS)
def test_a_delayed_value_enters_the_target_and_the_advantage(layout):
    loss, batch = make_loss(layout, delay_value=True), make_batch(layout, 7)
    assert_losses_are(loss(batch), reference(loss, layout, batch, delayed=True))


def test_q_of_no_set_bit_is_the_additional_output_and_0_without_it():
    for layout in (FLOATS["binary"], FLOATS["binary, n outputs"]):
        loss, batch = make_loss(layout, 1), make_batch(layout, 4)
        batch["action"].zero_()
        outputs = numpy_mlp(loss.target_qvalue_network_params, batch["observation"].numpy())
        assert_close(loss.target_qvalue(batch), outputs[:, 3] if layout.base_value else np.zeros(4))


# ---------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", LOSSES)
@each(FLOATS)
def test_each_loss_sends_gradient_to_every_parameter_of_its_own_network_only(layout, name):
    loss = make_loss(layout, delay_value=True)
    loss(make_batch(layout, 64))[name].backward()
    for network in LOSSES.values():
        gradients = [p.grad for p in getattr(loss, f"{network}_params").parameters()]
        if network == LOSSES[name]:
            assert all(gradient is not None and gradient.any() for gradient in gradients)
        else:
            assert gradients and all(gradient is None for gradient in gradients)
    assert all(p.grad is None for key, p in loss.named_buffers() if key.startswith("target_"))


@pytest.mark.parametrize("name", LOSSES)
@each(FLOATS)
def test_gradients_match_finite_differences(layout, name):
    loss, batch = make_loss(layout), make_batch(layout, 4)
    network = f"{LOSSES[name]}_params"
    params = getattr(loss, network)
    keys = list(params.keys(True, True))

    def function(*leaves):
        given = TensorDict(dict(zip(keys, leaves, strict=True)), batch_size=params.batch_size)
        method = getattr(loss, f"{name.removeprefix('loss_')}_loss")
        return method(batch.clone(), parameters={network: given})[0]

    leaves = [params[key].detach().clone().requires_grad_() for key in keys]
    assert torch.autograd.gradcheck(function, leaves)


def test_a_critic_learns_only_about_the_action_that_was_taken():
    layout = LAYOUTS["categorical"]
    loss, batch = make_loss(layout), make_batch(layout, 6)
    batch["action"].fill_(2)
    loss(batch)["loss_qvalue"].backward()
    bias = loss.qvalue_network_params["module", "2", "bias"].grad
    assert (bias[:, 2] != 0).all() and not bias[:, [0, 1, 3]].any()


# ---------------------------------------------------------------------------------------------- the action space


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("one_hot", "one_hot"),
        ("one-hot", "one_hot"),
        ("categorical", "categorical"),
        ("mult_one_hot", "mult_one_hot"),
        ("mult-one-hot", "mult_one_hot"),
        ("binary", "binary"),
        *[(spec, kind) for kind, spec in SPECS.items()],
        *[(Composite(action=spec), kind) for kind, spec in SPECS.items()],
        (Composite(agent=Composite(action=Categorical(4))), "categorical"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_action_space_is_a_name_or_a_spec_or_a_composite_that_holds_the_action(given, kind):
    layout = FLOATS[kind]
    loss, batch = make_loss(layout, action_space=given), make_batch(layout, 5)
    assert loss.action_space == kind
    assert_losses_are(loss(batch), reference(loss, layout, batch))


def test_without_an_action_space_one_hot_is_assumed_with_a_warning_at_the_callers_line():
    layout = FLOATS["one_hot"]
    with pytest.warns(UserWarning, match="one-hot actions are assumed") as caught:
        loss = DiscreteIQLLoss(*make_networks(layout)).double()
    assert [warning.filename for warning in caught] == [__file__]
    loss.make_value_estimator(gamma=GAMMA)
    batch = make_batch(layout, 5)
    assert_losses_are(loss(batch), reference(loss, layout, batch))


def test_a_given_action_space_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_loss(FLOATS["one_hot"])


@pytest.mark.parametrize(
    "action_space",
    ["discrete", "multi_categorical", MultiCategorical([2, 3]), Bounded(-1, 1, (2,)), Composite(x=OneHot(4)), 4, ["a"]],
    ids=lambda value: str(value) if isinstance(value, str | int) else type(value).__name__,
)
def test_another_action_space_is_refused_by_name(action_space):
    with pytest.raises(ValueError, match=r"^action_space must be one of 'categorical', 'one_hot', 'mult_one_hot'"):
        make_loss(FLOATS["one_hot"], action_space=action_space)


@pytest.mark.parametrize(
    ("space", "shape"),
    [
        ("categorical", (7, 2)),
        ("categorical", (7, 1, 1)),
        ("categorical", (6,)),
        ("one_hot", (7,)),
        ("one_hot", (7, 3)),
        ("one_hot", (1, 4)),
        ("mult_one_hot", (7, 2)),
        ("binary", (7, 2)),
        ("binary", (7, 5)),
    ],
)
def test_actions_that_do_not_fit_the_critics_are_refused_with_the_names_of_both(space, shape):
    layout = FLOATS[space]
    loss, batch = make_loss(layout), make_batch(layout, 7)
    batch = TensorDict({**batch, "action": torch.zeros(shape, dtype=layout.dtype)})
    with pytest.raises(RuntimeError, match=r"'action' has shape .*'state_action_value' has shape .*do not belong"):
        loss(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floating_point_numbers_are_refused_as_categorical_actions(dtype):
    loss, batch = make_loss(LAYOUTS["categorical"]), make_batch(LAYOUTS["categorical"], 7)
    batch["action"] = batch["action"].to(dtype)
    with pytest.raises(RuntimeError, match=r"categorical actions must be integers, but 'action' holds torch\.float"):
        loss(batch)


def test_arguments_that_torchrl_retired_are_refused_and_so_are_values_out_of_range():
    with pytest.raises(TypeError, match="make_value_estimator"):
        make_loss(FLOATS["one_hot"], gamma=0.9)
    with pytest.raises(ValueError, match=r"^expectile must be"):
        make_loss(FLOATS["one_hot"], expectile=0.0)


# ---------------------------------------------------------------------------------------------- TorchRL's contract


@each(FLOATS)
def test_keyword_arguments_give_the_four_outputs_in_order(layout):
    loss, batch = make_loss(layout), make_batch(layout, 5)
    expected = loss(batch.clone())
    assert list(expected.keys()) == ["loss_actor", "loss_qvalue", "loss_value", "entropy"]
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


@pytest.mark.parametrize("num_qvalue_nets", [1, 2])
@pytest.mark.parametrize("space", ["one_hot", "categorical"])
def test_state_dicts_load_both_ways_and_outputs_equal_torchrls_at_its_hyperparameters(space, num_qvalue_nets):
    layout = FLOATS[space]
    options = {"loss_function": "smooth_l1", "temperature": 1.0, "expectile": 0.5}
    ours = make_loss(layout, num_qvalue_nets, **options)
    theirs = make_loss(layout, num_qvalue_nets, loss_class=torchrl.objectives.DiscreteIQLLoss)
    again = make_loss(layout, num_qvalue_nets, **options)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    batch = make_batch(layout, 7)
    for source, sink in ((ours, theirs), (theirs, again)):
        sink.load_state_dict(source.state_dict())
        one, other = batch.clone(), batch.clone()
        assert_equal_outputs(sink(one), source(other))
        for key in ("td_error", "_log_prob"):
            torch.testing.assert_close(one[key], other[key])


def test_a_renamed_action_is_read_and_named_in_errors():
    layout, key = LAYOUTS["categorical"], ("agent", "move")
    loss, batch = make_loss(layout), make_batch(layout, 7)
    expected = loss(batch.clone())
    loss.set_keys(action=key)
    batch.rename_key_("action", key)
    assert_equal_outputs(loss(batch.clone()), expected, rtol=0, atol=0)
    batch[key] = batch[key].double()
    with pytest.raises(RuntimeError, match=r"\('agent', 'move'\) holds torch\.float64"):
        loss(batch)


@pytest.mark.parametrize("round_trip", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
@each(FLOATS)
def test_copies_give_equal_losses_and_share_nothing(layout, round_trip):
    loss, batch = make_loss(layout), make_batch(layout, 5)
    expected = loss(batch.clone())
    other = round_trip(loss)
    assert other.action_space == layout.space
    assert_equal_outputs(other(batch.clone()), expected, rtol=0, atol=0)
    for tensor in [*other.parameters(), *other.buffers()]:
        tensor.data.zero_()
    assert_equal_outputs(loss(batch), expected, rtol=0, atol=0)


@each(FLOATS)
def test_transitions_that_a_collector_masks_do_not_count(layout):
    loss, batch = make_loss(layout), make_batch(layout, 7)
    expected = reference(loss, layout, batch)
    valid = torch.tensor([True, False, True, True, False, True, True])
    batch["collector", "mask"] = valid
    out = loss(batch)
    for name in LOSSES:
        assert_close(out[name], getattr(expected, name)[valid.numpy()].mean(), name)
    assert_close(out["entropy"], -expected.log_prob[valid.numpy()].mean())


@each(FLOATS)
def test_diagnostics_are_those_of_the_continuous_loss_without_a_standard_deviation(layout):
    loss, batch = make_loss(layout, max_weight=0.9), make_batch(layout, 7)
    expected = reference(loss, layout, batch, max_weight=0.9)
    weight = expected.weight
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
        "td_error": expected.errors.mean(),
    }
    out = loss.diagnostics(batch)
    assert set(out.keys()) == set(formulas)
    for name, value in formulas.items():
        assert_close(out[name], value, name)


# ---------------------------------------------------------------------------------------------- what it learns

# State 0: action 0 stays, reward 0; action 1 leads to state 1, reward 1.
# State 1: action 0 ends with reward 2; action 1 leads to state 0, reward 0. The discount is 1/2.
# The data hold every pair once, so the expectile of a state is V = expectile * best + (1 - expectile) * worst, and
# with Q = r + V(s') / 2 that is two linear equations, whose solutions by hand are these.
TABLES = {
    0.5: {"value": [12 / 11, 14 / 11], "qvalue": [[6 / 11, 18 / 11], [2, 6 / 11]]},
    0.75: {"value": [84 / 53, 90 / 53], "qvalue": [[42 / 53, 98 / 53], [2, 42 / 53]]},
}


def tabular_batch(space):
    state, action = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    terminated = torch.tensor([[False], [False], [True], [False]])
    one_hot = torch.eye(2, dtype=torch.float64)
    return TensorDict(
        {
            "observation": one_hot[state],
            "action": one_hot[action] if space == "one_hot" else action,
            "next": {
                "observation": one_hot[torch.tensor([0, 1, 0, 0])],
                "reward": torch.tensor([[0.0], [1.0], [2.0], [0.0]], dtype=torch.float64),
                "terminated": terminated,
                "done": terminated.clone(),
            },
        },
        batch_size=[4],
    )


def tabular_loss(space, expectile):
    """Linear functions of the one-hot state: a table each."""
    logits = TensorDictModule(nn.Linear(2, 2, bias=False), in_keys=["observation"], out_keys=["logits"])
    distribution = {"one_hot": OneHotCategorical, "categorical": torch.distributions.Categorical}[space]
    actor = ProbabilisticActor(logits, in_keys=["logits"], out_keys=["action"], distribution_class=distribution)
    critics, value = (
        TensorDictModule(nn.Linear(2, outputs, bias=False), in_keys=["observation"], out_keys=[key])
        for outputs, key in ((2, "state_action_value"), (1, "state_value"))
    )
    loss = DiscreteIQLLoss(actor, critics, value, action_space=space, expectile=expectile, temperature=1.0)
    return loss.double().make_value_estimator(gamma=0.5)


@pytest.mark.parametrize(("space", "expectile"), [("one_hot", 0.5), ("categorical", 0.75)])
def test_training_on_a_problem_of_two_states_and_two_actions_finds_its_solution(space, expectile):
    loss, batch = tabular_loss(space, expectile), tabular_batch(space)
    updater = SoftUpdate(loss, tau=0.5)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    for _ in range(300):
        out = loss(batch)
        optimizer.zero_grad()
        (out["loss_actor"] + out["loss_qvalue"] + out["loss_value"]).backward()
        optimizer.step()
        updater.step()
    solution = TABLES[expectile]
    qvalues = np.array(solution["qvalue"])
    np.testing.assert_allclose(loss.value_network_params["module", "weight"][0].detach(), solution["value"], atol=1e-6)
    for critic in loss.qvalue_network_params["module", "weight"].detach():
        np.testing.assert_allclose(critic.T, qvalues, atol=1e-6)
    # The data choose evenly, so the policy's odds are the exponential of the difference of the advantages.
    logits = loss.actor_network_params["module", "0", "module", "weight"].detach().numpy().T
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], qvalues[:, 1] - qvalues[:, 0], atol=1e-6)


def step_over(layout, *, compile):
    """A step over a buffer of 200 transitions, its initial weights and its data always the same."""
    torch.manual_seed(0)
    buffer = make_buffer(make_batch(layout, 200), batch_size=16, seed=0)
    return TrainingStep(make_loss(layout), buffer, actor_lr=1e-2, value_lr=2e-2, critic_lr=3e-2, compile=compile)


def hand_written_update(loss, batch, optimizers, tau=0.005):
    """The paper's order: V first, then actor and critics with the new V, then the targets."""
    out = {}
    for name, optimizer in optimizers.items():
        value, _ = getattr(loss, f"{name}_loss")(batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        out[f"loss_{name}"] = value.detach()
    with torch.no_grad():
        loss.target_qvalue_network_params.data.apply_(
            lambda target, online: target.lerp_(online, tau), loss.qvalue_network_params.data
        )
    return out


@each(FLOATS)
def test_twenty_training_steps_equal_a_loop_written_by_hand(layout):
    step = step_over(layout, compile=False)
    loss = copy.deepcopy(step.loss)
    rates = {"value": 2e-2, "actor": 1e-2, "qvalue": 3e-2}
    optimizers = {
        name: torch.optim.Adam(list(getattr(loss, f"{name}_network_params").parameters()), lr=rate)
        for name, rate in rates.items()
    }
    for _ in range(20):
        losses = step()
        for name, value in hand_written_update(loss, step.batch().clone(), optimizers).items():
            torch.testing.assert_close(losses[name], value, rtol=1e-8, atol=1e-10)
    for ours, theirs in zip(step.loss.state_dict().values(), loss.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------------------------------------- compiled


@pytest.mark.slow
@needs_compiler
def test_compiled_without_graph_breaks_it_equals_eager():
    layout = LAYOUTS["categorical"]
    loss, batch = make_loss(layout), make_batch(layout, 7)
    SoftUpdate(loss, tau=0.005)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True)
    results = []
    for function in (loss, compiled):
        data = batch.clone()
        loss.zero_grad()
        out = function(data)
        sum(out[name] for name in LOSSES).backward()
        results.append((out, data, [p.grad.clone() for p in loss.parameters()]))
    (expected, expected_data, expected_gradients), (out, data, gradients) = results
    assert_equal_outputs(out, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    torch.testing.assert_close(data["td_error"], expected_data["td_error"])


@pytest.mark.slow
@needs_compiler
@each({name: FLOATS[name] for name in ("categorical", "mult_one_hot", "binary")})
def test_twenty_compiled_training_steps_equal_eager_ones(layout):
    eager, compiled = step_over(layout, compile=False), step_over(layout, compile=True)
    assert compiled.compiled and not eager.compiled
    for _ in range(20):
        expected, losses = eager(), compiled()
        assert expected.keys() == losses.keys()
        for name, value in expected.items():
            torch.testing.assert_close(losses[name], value, rtol=1e-8, atol=1e-10)
    for ours, theirs in zip(compiled.loss.state_dict().values(), eager.loss.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
