"""Subsets of critics, their mean, and XQL's regression of V, each against its formula."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from problems import ACTION_DIM, OBSERVATION_DIM, random_transitions
from scipy.stats import chisquare
from torch import nn
from torchrl.objectives import SoftUpdate

from iql_torchrl import (
    DiscreteIQLLoss,
    IQLLoss,
    build_actor,
    build_discrete_actor,
    build_discrete_qvalues,
    build_qvalues,
    build_value,
)

SIZES = {"hidden_dims": (8,)}
AGGREGATIONS = {"min": np.min, "mean": np.mean}


def problem(critics=2, *, discrete=False, count=6, **options):
    """A loss in float64, a batch, and what every (target) critic says of its actions, ``[critics, count]``."""
    torch.manual_seed(0)
    batch = random_transitions(count).apply(lambda x: x.double() if x.is_floating_point() else x)
    if discrete:
        batch["action"] = torch.arange(count) % 3
        qvalues = build_discrete_qvalues(OBSERVATION_DIM, 3, num_qvalue_nets=critics, **SIZES)
        actor = build_discrete_actor(OBSERVATION_DIM, 3, **SIZES)
        options["action_space"] = "categorical"
    else:
        qvalues = build_qvalues(OBSERVATION_DIM, ACTION_DIM, num_qvalue_nets=critics, **SIZES)
        actor = build_actor(OBSERVATION_DIM, ACTION_DIM, **SIZES)
    networks = copy.deepcopy([one.double() for one in qvalues])
    value = build_value(OBSERVATION_DIM, **SIZES)
    nn.init.constant_(value.module[-1].bias, -2.0)  # so that Q is below it in some states and above it in others
    loss = (DiscreteIQLLoss if discrete else IQLLoss)(actor, qvalues, value, num_qvalue_nets=critics, **options)
    with torch.no_grad():
        said = [network(batch.clone())["state_action_value"].numpy() for network in networks]
    if discrete:
        said = [np.take_along_axis(one, batch["action"].numpy()[:, None], -1) for one in said]
    return loss.double(), batch, np.concatenate(said, -1).T


def values_of(loss, batch):
    with torch.no_grad(), loss.value_network_params.to_module(loss.value_network, preserve_module_state=False):
        return loss.value_network(batch.clone())["state_value"][..., 0].numpy()


def expectile_loss(difference, expectile=0.7):
    return (np.abs(expectile - (difference < 0)) * difference**2).mean()


def gumbel_loss(difference, temperature=1.0, clip=7.0, largest=None):
    """LINEX by its definition, divided by the largest exponential, which does not count as a function of V."""
    z = np.minimum(difference / temperature, clip)
    largest = max(z.max(), -1.0) if largest is None else largest
    return (np.exp(z) - z - 1) / np.exp(largest)


def subsets(critics, count):
    return list(itertools.combinations(range(critics), count))


def draws(loss, batch, times):
    return np.stack([loss.target_qvalue(batch).numpy() for _ in range(times)])


# ---------------------------------------------------------------------------------------------- critics


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("critics", [1, 2, 5])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_v_and_the_policy_are_taught_by_the_smallest_or_the_mean_of_the_target_critics(aggregation, critics, discrete):
    loss, batch, qvalues = problem(critics, discrete=discrete, qvalue_aggregation=aggregation)
    target, value = AGGREGATIONS[aggregation](qvalues, 0), values_of(loss, batch)
    np.testing.assert_allclose(loss.target_qvalue(batch).numpy(), target, rtol=1e-12)
    out = loss(batch)
    np.testing.assert_allclose(out["loss_value"].item(), expectile_loss(target - value), rtol=1e-12)
    weights = np.minimum(np.exp(3.0 * (target - value)), 100.0)
    expected = -(weights * batch["_log_prob"].numpy()).mean()
    np.testing.assert_allclose(out["loss_actor"].item(), expected, rtol=1e-12)
    assert loss.diagnostics(batch)["qvalue"].item() == pytest.approx(target.mean(), rel=1e-12)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("deactivate_vmap", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_draw_is_of_one_subset_for_the_whole_batch(aggregation, deactivate_vmap, discrete):
    options = {"num_sampled_qvalue_nets": 2, "qvalue_aggregation": aggregation, "deactivate_vmap": deactivate_vmap}
    loss, batch, qvalues = problem(4, discrete=discrete, **options)
    of_pairs = np.stack([AGGREGATIONS[aggregation](qvalues[list(pair)], 0) for pair in subsets(4, 2)])
    distances = np.abs(draws(loss, batch, 40)[:, None] - of_pairs).max(-1).min(1)
    assert distances.max() < 1e-12


@pytest.mark.parametrize(("critics", "count"), [(5, 2), (4, 1), (4, 3)])
def test_every_subset_is_as_likely_as_any_other(critics, count):
    # By their mean, as the smallest of several subsets may be the same.
    loss, batch, qvalues = problem(critics, num_sampled_qvalue_nets=count, qvalue_aggregation="mean")
    of_subsets = np.stack([qvalues[list(subset)].mean(0) for subset in subsets(critics, count)])
    drawn = np.abs(draws(loss, batch, 2000)[:, None] - of_subsets).max(-1).argmin(1)
    assert chisquare(np.bincount(drawn, minlength=len(of_subsets))).pvalue > 1e-3


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_without_a_draw_it_is_the_mean_over_all_subsets(count, aggregation):
    loss, batch, qvalues = problem(5, num_sampled_qvalue_nets=count, qvalue_aggregation=aggregation)
    enumerated = [AGGREGATIONS[aggregation](qvalues[list(subset)], 0) for subset in subsets(5, count)]
    before = torch.get_rng_state()
    np.testing.assert_allclose(loss.target_qvalue(batch, sample=False).numpy(), np.mean(enumerated, 0), rtol=1e-12)
    assert loss.diagnostics(batch)["qvalue"].item() == pytest.approx(np.mean(enumerated), rel=1e-12)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_mean_of_many_draws_is_that_over_all_subsets():
    loss, batch, _ = problem(5, num_sampled_qvalue_nets=2)
    found = draws(loss, batch, 2000)
    error = (found.mean(0) - loss.target_qvalue(batch, sample=False).numpy()) / (found.std(0) / math.sqrt(2000))
    assert np.abs(error).max() < 5


def test_one_draw_serves_v_and_the_policy_of_a_joint_update():
    loss, batch, qvalues = problem(4, num_sampled_qvalue_nets=2)
    value, seen = values_of(loss, batch), set()
    for _ in range(30):
        out = loss(batch)
        targets = {pair: qvalues[list(pair)].min(0) for pair in subsets(4, 2)}
        wanted = {pair: expectile_loss(target - value) for pair, target in targets.items()}
        pair = min(wanted, key=lambda one: abs(wanted[one] - out["loss_value"].item()))
        assert wanted[pair] == pytest.approx(out["loss_value"].item(), rel=1e-12)
        weights = np.minimum(np.exp(3.0 * (targets[pair] - value)), 100.0)
        assert out["loss_actor"].item() == pytest.approx(-(weights * batch["_log_prob"].numpy()).mean(), rel=1e-12)
        seen.add(pair)
    assert len(seen) > 2


def test_every_critic_learns_whichever_are_drawn():
    loss, batch, _ = problem(4, num_sampled_qvalue_nets=1)
    reference, _, _ = problem(4)
    for one in (loss, reference):
        one(batch.clone())["loss_qvalue"].backward()
    gradients = [[leaf.grad for leaf in one.qvalue_network_params.values(True, True)] for one in (loss, reference)]
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found, expected) and bool((found.flatten(1).abs().amax(1) > 0).all())


@pytest.mark.parametrize("options", [{}, {"num_sampled_qvalue_nets": 3}])
def test_where_all_critics_count_nothing_is_drawn(options):
    loss, batch, _ = problem(3, **options)
    before = torch.get_rng_state()
    found = loss(batch)
    assert torch.equal(torch.get_rng_state(), before)
    explicit, batch, _ = problem(3, value_loss="expectile", qvalue_aggregation="min", num_sampled_qvalue_nets=None)
    for name, expected in explicit(batch).items():
        assert torch.equal(found[name], expected), name
    assert loss.state_dict().keys() == explicit.state_dict().keys()


# ---------------------------------------------------------------------------------------------- Gumbel regression


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("clip", [0.1, 7.0, math.inf])
def test_the_gumbel_loss_is_linex_over_its_largest_exponential(clip, temperature, discrete):
    options = {"value_loss": "gumbel", "gumbel_temperature": temperature, "gumbel_clip": clip}
    loss, batch, qvalues = problem(discrete=discrete, **options)
    difference = qvalues.min(0) - values_of(loss, batch)
    expected = gumbel_loss(difference, temperature, clip).mean()
    np.testing.assert_allclose(loss(batch)["loss_value"].item(), expected, rtol=1e-9)
    np.testing.assert_allclose(loss.value_loss(batch)[0].item(), expected, rtol=1e-9)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("shift", [-4.0, 0.0, 9.0])  # all below -1, some above, some clipped
def test_the_gumbel_loss_of_any_shape_equals_its_definition_and_its_gradient_finite_differences(shape, shift):
    torch.manual_seed(0)
    qvalues, value = torch.randn(shape, dtype=torch.float64) + shift, torch.randn(shape, dtype=torch.float64)
    value.requires_grad_()
    loss = IQLLoss.loss_value_gumbel(qvalues - value, 1.5, 7.0)
    difference = (qvalues - value).detach().numpy()
    np.testing.assert_allclose(loss.detach().numpy(), gumbel_loss(difference, 1.5), rtol=1e-11)
    (gradient,) = torch.autograd.grad(loss.sum(), value)
    largest = max(np.minimum(difference / 1.5, 7.0).max(), -1.0)
    ends = [gumbel_loss(difference - move, 1.5, largest=largest) for move in (1e-6, -1e-6)]
    np.testing.assert_allclose(gradient.numpy(), (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0, 1e4])
def test_the_minimiser_of_gumbel_regression_is_the_soft_maximum(temperature):
    qvalues = torch.tensor([-1.0, 0.5, 2.0, 4.0], dtype=torch.float64)

    def slope(value):
        value = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        loss = IQLLoss.loss_value_gumbel(qvalues - value, temperature, math.inf).mean()
        return float(torch.autograd.grad(loss, value)[0])

    low, high = -2.0, 5.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    expected = temperature * (torch.logsumexp(qvalues / temperature, 0) - math.log(4))
    assert low == pytest.approx(float(expected), abs=1e-8)
    if temperature == 1e4:
        assert low == pytest.approx(float(qvalues.mean()), abs=1e-3)
    if temperature == 0.1:
        assert low == pytest.approx(float(qvalues.max()), abs=0.2)


def test_v_of_one_state_learns_the_soft_maximum_of_its_actions():
    """By its network and Adam, from the loss itself: the data's actions in one state have Q of -1, 0 and 2."""

    class Table(nn.Module):
        def forward(self, observation, action):
            return action.sum(-1, keepdim=True)

    torch.manual_seed(0)
    batch = random_transitions(3).apply(lambda x: x.double() if x.is_floating_point() else x)
    batch["observation"] = torch.zeros(3, OBSERVATION_DIM, dtype=torch.float64)
    batch["action"] = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    critic = build_qvalues(OBSERVATION_DIM, ACTION_DIM, num_qvalue_nets=1, **SIZES)[0]
    critic.module = Table()
    networks = build_actor(OBSERVATION_DIM, ACTION_DIM, **SIZES), critic, build_value(OBSERVATION_DIM, **SIZES)
    loss = IQLLoss(*networks, num_qvalue_nets=1, value_loss="gumbel", gumbel_temperature=0.5).double()
    optimizer = torch.optim.Adam(loss.value_network_params.parameters(), lr=0.02)
    for _ in range(1500):
        optimizer.zero_grad()
        loss.value_loss(batch)[0].backward()
        optimizer.step()
    expected = 0.5 * math.log((math.exp(-2) + 1 + math.exp(4)) / 3)
    np.testing.assert_allclose(values_of(loss, batch), expected, atol=1e-3)


def test_the_expectile_is_without_meaning_in_gumbel_regression():
    found = [problem(value_loss="gumbel", expectile=expectile) for expectile in (0.5, 0.9)]
    first, second = (loss(batch)["loss_value"] for loss, batch, _ in found)
    assert torch.equal(first, second)


@pytest.mark.parametrize("clip", [7.0, math.inf])
def test_the_gumbel_loss_overflows_nowhere(clip):
    value = torch.tensor([1e4, -1e4, 3.0, 0.0], requires_grad=True)
    loss = IQLLoss.loss_value_gumbel(-value, 0.5, clip)
    (gradient,) = torch.autograd.grad(loss.sum(), value)
    assert bool(torch.isfinite(loss).all() and torch.isfinite(gradient).all())


def test_masked_transitions_do_not_count_for_the_largest_exponential():
    loss, batch, qvalues = problem(value_loss="gumbel", gumbel_temperature=0.3, gumbel_clip=math.inf)
    loss.loss_mask_key = "valid"
    difference = qvalues.min(0) - values_of(loss, batch)
    valid = difference < np.sort(difference)[-2]  # the two largest are left out
    assert difference.max() / 0.3 > max(difference[valid].max() / 0.3, -1.0) + 0.1
    batch["valid"] = torch.tensor(valid)
    expected = gumbel_loss(difference[valid], 0.3, math.inf).mean()
    np.testing.assert_allclose(loss(batch)["loss_value"].item(), expected, rtol=1e-10)


def test_importance_weights_weigh_the_gumbel_loss():
    loss, batch, qvalues = problem(value_loss="gumbel")
    batch["priority_weight"] = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
    elements = gumbel_loss(qvalues.min(0) - values_of(loss, batch))
    expected = np.average(elements, weights=batch["priority_weight"].numpy())
    np.testing.assert_allclose(loss(batch)["loss_value"].item(), expected, rtol=1e-10)


def test_temperature_and_clip_of_the_gumbel_loss_can_be_scheduled():
    loss, batch, qvalues = problem(value_loss="gumbel")
    difference = qvalues.min(0) - values_of(loss, batch)
    loss.gumbel_temperature, loss.gumbel_clip = 0.3, 1.5
    expected = gumbel_loss(difference, 0.3, 1.5).mean()
    np.testing.assert_allclose(loss(batch)["loss_value"].item(), expected, rtol=1e-10)
    with pytest.raises(ValueError, match=r"^gumbel_temperature must be a finite number > 0, got 0"):
        loss.gumbel_temperature = 0


# ---------------------------------------------------------------------------------------------- compiled, refused


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"num_sampled_qvalue_nets": 2}, {"value_loss": "gumbel"}, {"qvalue_aggregation": "mean"}],
    ids=lambda options: next(iter(options)),
)
def test_a_loss_with_each_option_compiles_once_without_graph_breaks(options):
    loss, batch, _ = problem(4, **options)
    SoftUpdate(loss, tau=0.005)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")  # which draws as eager code does
    found = []
    for run in (loss, compiled):
        torch.manual_seed(3)
        outs = [run(batch.clone())]
        with torch.compiler.set_stance("fail_on_recompile"):
            outs += [run(batch.clone()) for _ in range(8)]
        found.append(torch.stack([torch.stack(list(out.values())) for out in outs]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)
    if "num_sampled_qvalue_nets" in options:
        assert len(found[1][:, 2].unique()) > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sampled_qvalue_nets": 3}, "num_sampled_qvalue_nets must be None or at most num_qvalue_nets=2, got 3."),
        ({"num_sampled_qvalue_nets": 0}, "num_sampled_qvalue_nets must be None or an integer >= 1, got 0."),
        ({"num_sampled_qvalue_nets": 1.5}, "num_sampled_qvalue_nets must be None or an integer >= 1, got 1.5."),
        ({"qvalue_aggregation": "max"}, "qvalue_aggregation must be one of min, mean, got 'max'; did you mean 'mean'?"),
        ({"value_loss": "gumble"}, "value_loss must be one of expectile, gumbel, got 'gumble'; did you mean 'gumbel'?"),
        ({"gumbel_temperature": 0.0}, "gumbel_temperature must be a finite number > 0, got 0.0."),
        ({"gumbel_temperature": -1.0}, "gumbel_temperature must be a finite number > 0, got -1.0."),
        ({"gumbel_temperature": math.inf}, "gumbel_temperature must be a finite number > 0, got inf."),
        ({"gumbel_clip": 0.0}, "gumbel_clip must be a number > 0, got 0.0."),
        ({"gumbel_clip": math.nan}, "gumbel_clip must be a number > 0, got nan."),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, message):
    with pytest.raises(ValueError) as raised:
        problem(**options)
    assert str(raised.value) == message
