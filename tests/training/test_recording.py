"""The recorded eager update against the update as it stands, and recordings of small functions against those."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ACTION_DIM, OBSERVATION_DIM, random_transitions
from torch import nn
from torchrl.modules import ValueOperator

from iql_torchrl import (
    DiscreteIQLLoss,
    IQLLoss,
    TrainingStep,
    build_actor,
    build_discrete_actor,
    build_discrete_qvalues,
    build_qvalues,
    build_value,
    make_buffer,
)
from iql_torchrl.networks import build_diffusion_actor, build_flow_actor
from iql_torchrl.objectives import DDPGBCLoss, DiffusionLoss, FlowLoss
from iql_torchrl.training.recording import record

UPDATES = 20
SIZES = {"hidden_dims": (16, 16)}


def continuous_loss(num_qvalue_nets=2, *, layer_norm=False, dropout=None, policy="tanh_mean_normal", **options):
    sizes = {**SIZES, "layer_norm": layer_norm}
    return IQLLoss(
        build_actor(OBSERVATION_DIM, ACTION_DIM, dropout=dropout, policy=policy, **sizes),
        build_qvalues(OBSERVATION_DIM, ACTION_DIM, num_qvalue_nets=num_qvalue_nets, **sizes),
        build_value(OBSERVATION_DIM, **sizes),
        num_qvalue_nets=num_qvalue_nets,
        **options,
    )


def discrete_loss():
    return DiscreteIQLLoss(
        build_discrete_actor(OBSERVATION_DIM, 3, **SIZES),
        build_discrete_qvalues(OBSERVATION_DIM, 3, **SIZES),
        build_value(OBSERVATION_DIM, **SIZES),
        action_space="categorical",
    )


def extracted(kind):
    """A loss with another policy loss, and its policy."""
    sizes = (OBSERVATION_DIM, ACTION_DIM)
    critics = build_qvalues(*sizes, **SIZES), build_value(OBSERVATION_DIM, **SIZES)
    if kind == "ddpgbc":
        return DDPGBCLoss(build_actor(*sizes, **SIZES), *critics)
    if kind == "flow":
        return FlowLoss(build_flow_actor(*sizes, **SIZES), *critics)
    return DiffusionLoss(build_diffusion_actor(*sizes, hidden_dims=(16,), residual_blocks=1, dropout=0.1), *critics)


CASES = {
    "sequential": (continuous_loss, {}, torch.float32),
    "joint": (continuous_loss, {"order": "joint"}, torch.float32),
    "delayed value": (lambda: continuous_loss(delay_value=True), {}, torch.float32),
    "delayed value, joint": (lambda: continuous_loss(delay_value=True), {"order": "joint"}, torch.float32),
    "dropout": (lambda: continuous_loss(dropout=0.2), {}, torch.float32),
    "dropout, joint": (lambda: continuous_loss(dropout=0.2), {"order": "joint"}, torch.float32),
    "layer norm": (lambda: continuous_loss(layer_norm=True), {}, torch.float32),
    "squashed samples": (lambda: continuous_loss(policy="tanh_normal"), {}, torch.float32),
    "discrete actions": (discrete_loss, {}, torch.float32),
    "discrete actions, joint": (discrete_loss, {"order": "joint"}, torch.float32),
    "one critic": (lambda: continuous_loss(1), {}, torch.float32),
    "four critics": (lambda: continuous_loss(4), {}, torch.float32),
    "two of four critics": (lambda: continuous_loss(4, num_sampled_qvalue_nets=2), {}, torch.float32),
    "two of four critics, joint": (
        lambda: continuous_loss(4, num_sampled_qvalue_nets=2, dropout=0.2),
        {"order": "joint"},
        torch.float32,
    ),
    "mean of the critics": (lambda: continuous_loss(qvalue_aggregation="mean"), {}, torch.float32),
    "Gumbel regression": (lambda: continuous_loss(value_loss="gumbel"), {}, torch.float32),
    "Gumbel regression, joint": (lambda: continuous_loss(value_loss="gumbel"), {"order": "joint"}, torch.float32),
    "float64": (continuous_loss, {}, torch.float64),
    "schedule": (continuous_loss, {"total_steps": 10}, torch.float32),
    "several updates a call": (continuous_loss, {"updates_per_call": 3}, torch.float32),
    "bfloat16": (continuous_loss, {"precision": "bfloat16"}, torch.float32),
    "ddpgbc": (lambda: extracted("ddpgbc"), {}, torch.float32),
    "ddpgbc, joint": (lambda: extracted("ddpgbc"), {"order": "joint"}, torch.float32),
    "flow": (lambda: extracted("flow"), {}, torch.float32),
    "flow, joint": (lambda: extracted("flow"), {"order": "joint"}, torch.float32),
    "flow, float64": (lambda: extracted("flow"), {}, torch.float64),
    "diffusion": (lambda: extracted("diffusion"), {}, torch.float32),
    "diffusion, joint": (lambda: extracted("diffusion"), {"order": "joint"}, torch.float32),
}


def step_of(case):
    make_loss, options, dtype = CASES[case]
    torch.manual_seed(0)
    transitions = random_transitions().apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
    if make_loss is discrete_loss:
        transitions["action"] = torch.arange(len(transitions)) % 3
    return TrainingStep(
        make_loss().to(dtype), make_buffer(transitions, batch_size=32, seed=0), compile=False, **options
    )


def plain_step(case, monkeypatch):
    """A step that has found that it cannot be recorded, one update done."""

    def refuse(*_):
        raise RuntimeError("not today")

    step = step_of(case)
    with monkeypatch.context() as patch:
        patch.setattr("iql_torchrl.training.step.record", refuse)
        torch.manual_seed(7)
        first = step()
    assert "cannot be recorded" in step.compile_note and "not today" in step.compile_note
    return step, first


def recorded_step(case):
    step = step_of(case)
    torch.manual_seed(7)
    return step, step()


def leaves(state, prefix=""):
    for key, value in state.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def assert_same(expected, found):
    expected, found = dict(leaves(expected)), dict(leaves(found))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        same = torch.equal(value, found[name]) if torch.is_tensor(value) else value == found[name]
        assert same, name


@pytest.mark.parametrize("case", CASES)
def test_the_recorded_update_equals_the_plain_one_bit_for_bit(case, monkeypatch):
    plain, first = plain_step(case, monkeypatch)
    expected = [first, *({name: loss.clone() for name, loss in plain().items()} for _ in range(UPDATES - 1))]
    recorded, first = recorded_step(case)
    found = [first, *(recorded() for _ in range(UPDATES - 1))]  # not cloned: a later update must leave them alone
    assert recorded.compile_note == ""
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)
    assert_same(plain.state_dict(), recorded.state_dict())
    assert_same(expected[0], found[0])
    assert not torch.equal(found[0]["loss_value"], found[-1]["loss_value"])
    assert not any(loss.requires_grad for loss in found[-1].values())


@pytest.mark.parametrize("case", ["dropout", "delayed value, joint", "flow", "diffusion"])
def test_recording_changes_neither_the_state_nor_the_global_random_state(case, monkeypatch):
    step = step_of(case)
    seen = []

    def watched(*arguments):
        before, random_before = step.state_dict(), torch.get_rng_state()
        recording = record(*arguments)
        assert_same(before, step.state_dict())
        assert torch.equal(random_before, torch.get_rng_state())
        seen.append(recording)
        return recording

    monkeypatch.setattr("iql_torchrl.training.step.record", watched)
    parameters = list(step.loss.parameters())
    for _ in range(3):
        step()
    assert len(seen) == 1  # recorded once, at the first update
    assert all(one is other for one, other in zip(parameters, step.loss.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize("name, value", [("temperature", 0.5), ("expectile", 0.95), ("max_weight", 1.05)])
def test_a_hyperparameter_assigned_later_takes_effect_at_the_next_update(name, value, monkeypatch):
    plain, _ = plain_step("joint", monkeypatch)
    (recorded, _), (unchanged, _) = recorded_step("joint"), recorded_step("joint")
    for step in (plain, recorded):
        step()
        setattr(step.loss, name, value)
    unchanged()
    losses = [{key: loss.clone() for key, loss in step().items()} for step in (plain, recorded, unchanged)]
    assert_same(losses[0], losses[1])
    affected = "loss_value" if name == "expectile" else "loss_actor"
    assert not torch.equal(losses[1][affected], losses[2][affected])
    for step in (plain, recorded):
        for _ in range(3):
            step()
    assert_same(plain.state_dict(), recorded.state_dict())


@pytest.mark.parametrize("case", ["sequential", "float64", "schedule"])
def test_a_state_loaded_after_the_recording_is_where_it_goes_on(case):
    step, _ = recorded_step(case)
    for _ in range(4):
        step()
    state = step.state_dict()
    expected = [step() for _ in range(6)]
    end = step.state_dict()
    step.load_state_dict(state)
    assert step.count == 5 * step.updates_per_call
    for losses in expected:
        assert_same(losses, step())
    assert_same(end, step.state_dict())


def test_a_network_that_decides_by_a_tensors_content_runs_unrecorded():
    class Deciding(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(OBSERVATION_DIM, 1)

        def forward(self, observation):
            return self.linear(observation) * (1.0 if observation.mean() > 0 else -1.0)

    torch.manual_seed(0)
    value = ValueOperator(Deciding(), in_keys=["observation"])
    actor = build_actor(OBSERVATION_DIM, ACTION_DIM, **SIZES)
    loss = IQLLoss(actor, build_qvalues(OBSERVATION_DIM, ACTION_DIM, **SIZES), value)
    buffer = make_buffer(random_transitions(), batch_size=32, seed=0)
    step = TrainingStep(loss, buffer, order="joint", compile=False)
    assert step.compile_note == ""
    signs = set()
    for count in range(8):
        before = {name: params.data.clone() for name, params in loss.named_children() if name.endswith("_params")}
        reported = step()
        batch = step.batch()
        signs.add(bool(batch["observation"].mean() > 0))
        expected = loss(batch, parameters=before)
        for name, found in reported.items():
            torch.testing.assert_close(found, expected[name].detach())
        assert step.count == count + 1
    assert signs == {True, False}
    assert "cannot be recorded" in step.compile_note and "\n" not in step.compile_note


# ------------------------------------------------------------------------------------------ recordings of any function


def fresh_slots():
    generator = torch.Generator().manual_seed(3)
    return {
        "a": torch.randn(3, 3, generator=generator).requires_grad_(),
        "b": torch.randn(3, 3, generator=generator),
        "scalar": torch.tensor(2.0),
    }


def arguments(count=4):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(3, 3, generator=generator) for _ in range(count)]


def assert_recording_equals(function, inputs=None):
    """Several calls of the recording and of the function itself, on slots of their own, bit for bit."""
    inputs = arguments() if inputs is None else inputs
    expected_slots, slots = fresh_slots(), fresh_slots()
    tensors = dict(slots)
    recording = record(lambda x: function(slots, x), inputs[0], [(slots, name) for name in slots])
    for name, tensor in fresh_slots().items():
        assert slots[name] is tensors[name] and torch.equal(tensor, tensors[name])
    for x in inputs:
        given = x.clone()
        expected, found = function(expected_slots, x.clone()), recording(given)
        assert expected.keys() == found.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name].detach(), rtol=0, atol=0, equal_nan=True)
        for name in slots:
            torch.testing.assert_close(slots[name], expected_slots[name], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(given, x)


def accumulates(slots, x):
    with torch.no_grad():
        slots["b"].add_(x).mul_(0.5)
        slots["scalar"].add_(1)
    return {"sum": slots["b"].sum() * slots["scalar"]}


def changes_a_part(slots, x):
    first, others = slots["b"].split([1, 2])
    others.view(-1)[:2].mul_(3)
    first.copy_(x[:1])
    return {"first": first * 2, "transposed": slots["b"].t() @ x}


def reads_before_and_after_a_change(slots, x):
    before, view = slots["b"].clone(), slots["b"].view(-1)
    slots["b"].add_(x)
    return {"before": before, "difference": slots["b"] - before, "view": view + 0.0}


def chains_activations(slots, x):
    hidden = torch.relu(x @ slots["b"])
    return {"out": torch.tanh(torch.relu(torch.relu(hidden @ slots["b"]) + hidden) + x)}


def reads_an_input_twice(slots, x):
    hidden = x * 2 - 1
    return {"out": torch.relu(hidden) + torch.tanh(hidden) + hidden}


def returns_a_temporary(slots, x):
    hidden, total = x * 2, x + slots["b"]
    return {"hidden": hidden, "rectified": torch.relu(hidden), "total": total, "more": total + x}


def returns_a_view_of_a_temporary(slots, x):
    hidden = x * 2
    return {"view": hidden.view(-1)[:4], "rectified": torch.relu(hidden), "sum": hidden.t() + x}


def rectifies_a_view(slots, x):
    hidden = x * 2
    return {"rectified": torch.relu(hidden.view(-1)), "hidden": hidden}


def adds_to_itself(slots, x):
    hidden = x * 2
    doubled = hidden + hidden
    return {"out": doubled + doubled}


def broadcasts(slots, x):
    row = x[0] * 2
    return {"out": row + (x * 3), "other": (x * 3) + row, "outer": row + row.unsqueeze(1) * 1.5}


def changes_dtype(slots, x):
    return {"out": (x * 2).double() + (x * 3), "other": (x * 3) + (x * 2).double()}


def descends(slots, x):
    hidden = torch.relu(torch.relu(x @ slots["a"]) @ slots["a"] + slots["a"])
    loss = (hidden - slots["b"]).pow(2).mean() * slots["scalar"]
    (gradient,) = torch.autograd.grad(loss, slots["a"])
    with torch.no_grad():
        slots["a"].sub_(0.1 * gradient)
        slots["b"].lerp_(slots["a"], 0.25)
    return {"loss": loss, "gradient": gradient}


def adds_a_multiple_of_a_temporary(slots, x):
    return {"out": torch.add(slots["b"], x * 2, alpha=3)}


def changes_a_product_with_one(slots, x):
    product = x * 1
    product.add_(1)
    return {"product": product, "unchanged": x + 0.0}


def changes_a_detached_slot(slots, x):
    slots["a"].detach().add_(x)
    return {"out": slots["a"] * 2}


def returns_what_it_was_given(slots, x):
    return {"argument": x, "slot": slots["b"], "changed": slots["b"].add_(x)}


def takes_a_minimum(slots, x):
    values, index = (x * 2).min(0)
    return {"values": torch.relu(values), "index": index, "again": values + 1}


FUNCTIONS = (
    accumulates,
    changes_a_part,
    reads_before_and_after_a_change,
    chains_activations,
    reads_an_input_twice,
    returns_a_temporary,
    returns_a_view_of_a_temporary,
    rectifies_a_view,
    adds_to_itself,
    broadcasts,
    changes_dtype,
    descends,
    adds_a_multiple_of_a_temporary,
    changes_a_product_with_one,
    changes_a_detached_slot,
    returns_what_it_was_given,
    takes_a_minimum,
)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_recording_equals_its_function_call_after_call(function):
    assert_recording_equals(function)


OPERATIONS = {
    "relu": lambda one, other: torch.relu(one),
    "tanh": lambda one, other: torch.tanh(one),
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "mm": torch.mm,
    "scale": lambda one, other: one * 0.5,
    "transpose": lambda one, other: one.t(),
    "reshape": lambda one, other: one.t().reshape(3, 3),
    "detach": lambda one, other: one.detach(),
    "lesser": torch.minimum,
}
programs = st.lists(
    st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(before=programs, after=programs, returned=st.sets(st.integers(0, 30), max_size=4))
def test_recordings_of_random_programs_equal_them(before, after, returned):
    """Random graphs, in which results are read more than once, a gradient, changes in place, and a graph after them."""

    def function(slots, x):
        values = [x, slots["a"], slots["b"]]

        def run(program):
            for name, one, other in program:
                values.append(OPERATIONS[name](values[one % len(values)], values[other % len(values)]))

        run(before)
        loss = values[-1].sum() + slots["a"].pow(2).sum()
        (gradient,) = torch.autograd.grad(loss, slots["a"])
        with torch.no_grad():
            slots["a"].sub_(0.1 * torch.tanh(gradient))
            slots["b"].lerp_(x, 0.25)
            run(after)
        out = {str(index): values[index % len(values)] for index in returned}
        return {"loss": loss, "last": values[-1], **out}

    assert_recording_equals(function, arguments(3))


def test_a_recording_draws_the_random_numbers_that_its_function_draws():
    def function(slots, x):
        return {"dropped": nn.functional.dropout(x, 0.5), "noise": torch.randn_like(x)}

    x = torch.ones(50, 2)
    torch.manual_seed(5)
    recording = record(lambda x: function({}, x), x, [])
    found = [recording(x) for _ in range(3)]
    torch.manual_seed(5)
    for one, other in zip([function({}, x) for _ in range(3)], found, strict=True):
        assert_same(one, other)
    for one, other in itertools.combinations(found, 2):
        assert not torch.equal(one["dropped"], other["dropped"])


def test_a_recording_needs_no_gradient_and_gives_none():
    slots = fresh_slots()
    recording = record(lambda x: descends(slots, x), arguments()[0], [(slots, name) for name in slots])
    assert not any(value.requires_grad for value in recording(arguments()[1]).values())
    assert slots["a"].requires_grad and slots["a"].grad is None


@pytest.mark.parametrize("fails", [True, False])
def test_the_slots_hold_their_own_tensors_again_whether_or_not_recording_fails(fails):
    slots = fresh_slots()
    tensors = dict(slots)

    def function(x):
        slots["b"].add_(1)
        if fails:
            raise ArithmeticError("half way")
        return {"out": slots["b"] + x}

    try:
        record(function, arguments()[0], [(slots, name) for name in slots])
    except ArithmeticError:
        assert fails
    else:
        assert not fails
    for name, tensor in fresh_slots().items():
        assert slots[name] is tensors[name] and torch.equal(slots[name], tensor)
    assert slots["a"].requires_grad and slots["a"].is_leaf


def test_a_decision_by_a_tensors_content_cannot_be_recorded():
    def function(x):
        return {"out": x * 2 if x.sum() > 0 else x}

    with pytest.raises(RuntimeError):
        record(function, arguments()[0], [])
