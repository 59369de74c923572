"""The NumPy reference against finite differences, closed forms and SciPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import reference_iql as reference
from reference_iql import VARIANTS, Hyperparameters, train
from scipy import integrate, stats

O, A, B = 4, 2, 7  # noqa: E741

each_variant = pytest.mark.parametrize("name", VARIANTS)


def make_network(rng: np.random.Generator, sizes: list[int], scale: float = 1.0) -> reference.Network:
    shapes = list(zip(sizes[1:], sizes[:-1], strict=True))
    return {
        "weights": [scale * rng.normal(size=shape) / np.sqrt(shape[1]) for shape in shapes],
        "biases": [scale * rng.normal(size=shape[0]) for shape in shapes],
    }


def make_actor(rng: np.random.Generator, variant: reference.Variant, hidden: tuple[int, ...] = (5, 6)):
    wide = variant.policy == "tanh_normal_biased_softplus"
    actor = make_network(rng, [O, *hidden, 2 * A if wide else A])
    if variant.log_std_bounds is not None:
        actor["log_std"] = rng.normal(size=A)
    return actor


def make_networks(rng: np.random.Generator, variant: reference.Variant) -> dict:
    def critics() -> list[reference.Network]:
        return [make_network(rng, [O + A, 5, 6, 1]) for _ in range(2)]

    return {
        "actor": make_actor(rng, variant),
        "value": make_network(rng, [O, 5, 6, 1]),
        "qvalue": critics(),
        "target_qvalue": critics(),
        "target_value": make_network(rng, [O, 5, 6, 1]),
    }


def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "observation": rng.normal(size=(B, O)),
        "action": rng.uniform(-0.95, 0.95, size=(B, A)),
        "reward": rng.normal(size=B),
        "next_observation": rng.normal(size=(B, O)),
        "terminated": rng.uniform(size=B) < 0.3,
    }


def parameters(network: reference.Network) -> list[np.ndarray]:
    return [*network["weights"], *network["biases"], *([network["log_std"]] if "log_std" in network else [])]


def assert_same(left: reference.Network, right: reference.Network) -> None:
    for one, other in zip(parameters(left), parameters(right), strict=True):
        np.testing.assert_array_equal(one, other)


def differ(left: reference.Network, right: reference.Network) -> bool:
    pairs = zip(parameters(left), parameters(right), strict=True)
    return any(not np.array_equal(one, other) for one, other in pairs)


def assert_gradient(loss: Callable[[], float], network: reference.Network, gradient: reference.Network) -> None:
    """Compare every entry with a central difference; `loss` reads the network that is shifted in place."""
    step = 1e-6
    for parameter, analytic in zip(parameters(network), parameters(gradient), strict=True):
        numeric = np.empty_like(parameter)
        for index in np.ndindex(parameter.shape):
            kept = parameter[index]
            parameter[index] = kept + step
            above = loss()
            parameter[index] = kept - step
            numeric[index] = (above - loss()) / (2 * step)
            parameter[index] = kept
        np.testing.assert_allclose(analytic, numeric, rtol=1e-6, atol=2e-7)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_value_gradient(seed: int, expectile: float) -> None:
    rng = np.random.default_rng(seed)
    value, batch, qvalue = make_network(rng, [O, 5, 6, 1]), make_batch(rng), rng.normal(size=B)
    _, gradient = reference.value_loss(value, batch["observation"], qvalue, expectile)
    assert_gradient(lambda: reference.value_loss(value, batch["observation"], qvalue, expectile)[0], value, gradient)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_qvalue_gradient(seed: int, reduction: str) -> None:
    rng = np.random.default_rng(seed)
    critics = [make_network(rng, [O + A, 5, 6, 1]) for _ in range(3)]
    batch = make_batch(rng)
    arguments = (batch["observation"], batch["action"], batch["reward"], reduction)
    _, gradients = reference.qvalue_loss(critics, *arguments)
    for critic, gradient in zip(critics, gradients, strict=True):
        assert_gradient(lambda: reference.qvalue_loss(critics, *arguments)[0], critic, gradient)


@pytest.mark.parametrize("seed", range(3))
@each_variant
def test_actor_gradient(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    actor, batch, weight = make_actor(rng, VARIANTS[name]), make_batch(rng), rng.uniform(0, 3, size=B)
    arguments = (VARIANTS[name], batch["observation"], batch["action"], weight)
    _, gradient = reference.actor_loss(actor, *arguments)
    assert_gradient(lambda: reference.actor_loss(actor, *arguments)[0], actor, gradient)


@pytest.mark.parametrize("name", ["paper", "rlinf", "corl"])
def test_clip_passes_the_gradient_up_to_and_including_its_bounds(name: str) -> None:
    rng = np.random.default_rng(0)
    variant, batch = VARIANTS[name], make_batch(rng)
    low, high = variant.log_std_bounds
    actor = make_actor(rng, variant)
    for log_std, passes in (([low, high], True), ([low - 0.1, high + 0.1], False)):
        actor["log_std"] = np.array(log_std)
        arguments = (variant, batch["observation"], batch["action"], np.ones(B))
        gradient = reference.actor_loss(actor, *arguments)[1]
        assert np.all((gradient["log_std"] != 0) == passes)
        assert np.any(gradient["weights"][0])


def test_softplus_has_no_gradient_below_the_smallest_std() -> None:
    rng = np.random.default_rng(0)
    variant, batch = VARIANTS["torchrl"], make_batch(rng)
    actor = make_actor(rng, variant)
    actor["biases"][-1][A:] = [-20.0, 1.0]  # the first action's std is at its minimum, the second's is not
    arguments = (variant, batch["observation"], batch["action"], np.ones(B))
    gradient = reference.actor_loss(actor, *arguments)[1]
    assert gradient["biases"][-1][A] == 0 and gradient["biases"][-1][A + 1] != 0
    # The loss is thousands of times larger than at std 1 and the differences as much less exact, so scale it.
    arguments = (*arguments[:-1], np.full(B, 1e-3))
    gradient = reference.actor_loss(actor, *arguments)[1]
    assert_gradient(lambda: reference.actor_loss(actor, *arguments)[0], actor, gradient)


def test_relu_gradient_at_zero_is_zero() -> None:
    network = {"weights": [np.ones((1, 1)), np.ones((1, 1))], "biases": [np.zeros(1), np.zeros(1)]}
    _, layer_inputs = reference.forward(network, np.zeros((1, 1)))
    gradient = reference.backward(network, layer_inputs, np.ones((1, 1)))
    assert gradient["biases"][0] == 0 and gradient["biases"][1] == 1


# ---------------------------------------------------------------- densities and weights


@pytest.mark.parametrize("name", ["paper", "rlinf", "corl", "torchrl"])
def test_cost_is_a_log_density(name: str) -> None:
    """The density integrates to one over the actions; the tanh-mean one has the whole line for its support."""
    variant = VARIANTS[name]
    actor = {"log_std": np.array([-0.4])}
    output = np.array([[0.3, -0.5]]) if name == "torchrl" else np.array([[0.3]])

    def density(action: float) -> float:
        return float(np.exp(-reference.COSTS[variant.policy](actor, variant, output, np.array([[action]]))[0][0]))

    bound = 12.0 if variant.policy == "tanh_mean_normal" else 1.0
    assert integrate.quad(density, -bound, bound)[0] == pytest.approx(1.0, abs=1e-5)


def test_tanh_mean_normal_is_scipys_normal() -> None:
    rng = np.random.default_rng(0)
    output, action, log_std = rng.normal(size=(B, A)), rng.uniform(-1, 1, size=(B, A)), np.array([0.3, 5.0])
    cost, _, _ = reference.tanh_mean_normal_cost({"log_std": log_std}, VARIANTS["paper"], output, action)
    expected = -stats.norm(np.tanh(output), np.exp([0.3, 2.0])).logpdf(action).sum(axis=1)
    np.testing.assert_allclose(cost, expected, rtol=1e-12)


def test_tanh_normal_is_scipys_normal_with_the_jacobian() -> None:
    rng = np.random.default_rng(0)
    output, unsquashed = rng.normal(size=(B, 2 * A)), rng.normal(size=(B, A))
    std = np.maximum(np.log1p(np.exp(output[:, A:] + np.log(np.expm1(0.99)))) + 0.01, 0.1)
    expected = -(stats.norm(output[:, :A], std).logpdf(unsquashed) + 2 * np.log(np.cosh(unsquashed))).sum(axis=1)
    cost, _, _ = reference.tanh_normal_biased_softplus_cost({}, VARIANTS["torchrl"], output, np.tanh(unsquashed))
    np.testing.assert_allclose(cost, expected, rtol=1e-10)


def test_raw_zero_is_unit_std() -> None:
    cost, _, _ = reference.tanh_normal_biased_softplus_cost(
        {}, VARIANTS["torchrl"], np.zeros((1, 2)), np.array([[np.tanh(0.7)]])
    )
    expected = -stats.norm(0, 1).logpdf(0.7) + np.log(1 - np.tanh(0.7) ** 2)
    assert cost[0] == pytest.approx(expected, rel=1e-12)


def test_softplus_std_is_at_least_a_tenth() -> None:
    output, action = np.array([[0.3, -20.0]]), np.array([[np.tanh(0.4)]])
    cost, _, _ = reference.tanh_normal_biased_softplus_cost({}, VARIANTS["torchrl"], output, action)
    expected = -stats.norm(0.3, 0.1).logpdf(0.4) + np.log(1 - np.tanh(0.4) ** 2)
    assert cost[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("name", "margin"), [("rlinf", 1e-6), ("torchrl", 1e-15)])
def test_actions_are_clamped_before_the_inverse_tanh(name: str, margin: float) -> None:
    unsquashed, log_jacobian = reference.inverse_tanh(np.array([[-1.0]]), reference.TANH_MARGIN[VARIANTS[name].policy])
    assert unsquashed.item() == pytest.approx(-np.arctanh(1 - margin), rel=1e-12)
    assert log_jacobian.item() == pytest.approx(np.log(2 * margin), rel=1e-2)


@pytest.mark.parametrize("name", ["rlinf", "torchrl"])
def test_actions_on_the_boundary_are_finite(name: str) -> None:
    rng = np.random.default_rng(0)
    actor, batch = make_actor(rng, VARIANTS[name]), make_batch(rng)
    batch["action"] = np.sign(batch["action"])
    loss, gradient = reference.actor_loss(actor, VARIANTS[name], batch["observation"], batch["action"], np.ones(B))
    assert np.isfinite(loss) and all(np.isfinite(array).all() for array in parameters(gradient))


def test_advantage_weight_is_clipped_from_above_only() -> None:
    weight = reference.advantage_weight(np.array([-1.0, 0.0, 1.0, 2.0, 1e6]), 3.0, 100.0)
    np.testing.assert_allclose(weight, [np.exp(-3.0), 1.0, np.exp(3.0), 100.0, 100.0])


# ---------------------------------------------------------------- updates


def test_first_adam_step_moves_by_the_learning_rate() -> None:
    rng = np.random.default_rng(0)
    network, gradient = make_network(rng, [3, 4, 1]), make_network(rng, [3, 4, 1])
    moved = reference.Adam(network).step(network, gradient, 0.1)
    for before, after, slope in zip(*map(parameters, (network, moved, gradient)), strict=True):
        np.testing.assert_allclose(before - after, 0.1 * slope / (np.abs(slope) + 1e-8), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(before - after, 0.1 * np.sign(slope), rtol=1e-5)


def test_adam_steps_are_weighted_means_of_the_gradients() -> None:
    """After n steps the moments are the normalized exponential averages of g and g^2."""
    gradients = np.random.default_rng(0).normal(size=5)
    network = {"weights": [np.zeros((1, 1))], "biases": [np.zeros(1)]}
    adam, position = reference.Adam(network), 0.0
    for count in range(1, 6):
        gradient = {"weights": [np.full((1, 1), gradients[count - 1])], "biases": [np.zeros(1)]}
        network = adam.step(network, gradient, 0.1)
        past = gradients[:count]
        first = np.average(past, weights=0.9 ** np.arange(count)[::-1])
        second = np.average(past**2, weights=0.999 ** np.arange(count)[::-1])
        position -= 0.1 * first / (np.sqrt(second) + 1e-8)
        assert network["weights"][0].item() == pytest.approx(position, rel=1e-11)
        assert network["biases"][0].item() == 0.0


def test_polyak_closed_form() -> None:
    """With online critics at rest, n updates leave (1 - polyak)^n of the distance."""
    rng = np.random.default_rng(0)
    networks = make_networks(rng, VARIANTS["paper"])
    hyperparameters = Hyperparameters(polyak=0.1, critic_lr=0.0, value_lr=0.0, delay_value=True)
    trained, _ = train(VARIANTS["paper"], networks, [make_batch(rng) for _ in range(5)], hyperparameters)
    pairs = [
        *zip(networks["target_qvalue"], networks["qvalue"], trained["target_qvalue"], strict=True),
        (networks["target_value"], networks["value"], trained["target_value"]),
    ]
    for target, online, after in pairs:
        for old, new, moved in zip(*map(parameters, (target, online, after)), strict=True):
            np.testing.assert_allclose(moved, new + 0.9**5 * (old - new), rtol=1e-12, atol=1e-14)


@each_variant
def test_polyak_reads_the_critics_after_their_update(name: str) -> None:
    rng = np.random.default_rng(0)
    networks = make_networks(rng, VARIANTS[name])
    trained, _ = train(VARIANTS[name], networks, [make_batch(rng)], Hyperparameters(polyak=1.0, delay_value=True))
    assert_same(trained["target_value"], trained["value"])
    for target, online, before in zip(trained["target_qvalue"], trained["qvalue"], networks["qvalue"], strict=True):
        assert_same(target, online)
        assert differ(online, before)


def test_actor_learning_rate() -> None:
    hyperparameters = Hyperparameters(actor_lr=2.0, total_steps=10)
    rates = [reference.actor_learning_rate(VARIANTS["paper"], hyperparameters, update) for update in (0, 5, 10)]
    np.testing.assert_allclose(rates, [2.0, 1.0, 0.0], atol=1e-15)
    assert reference.actor_learning_rate(VARIANTS["torchrl"], hyperparameters, 5) == 2.0
    assert reference.actor_learning_rate(VARIANTS["paper"], Hyperparameters(actor_lr=2.0), 5) == 2.0


@pytest.mark.parametrize("delay_value", [False, True])
@each_variant
def test_one_step_composes_the_losses(name: str, delay_value: bool) -> None:
    """The first step moves each network by its Adam step on the loss written out from the equations."""
    rng = np.random.default_rng(1)
    variant, hyperparameters = VARIANTS[name], Hyperparameters(value_lr=0.1, delay_value=delay_value)
    networks, batch = make_networks(rng, variant), make_batch(rng)
    trained, losses = train(variant, networks, [batch], hyperparameters)

    pairs = np.hstack([batch["observation"], batch["action"]])
    first, second = (reference.forward(critic, pairs)[0][:, 0] for critic in networks["target_qvalue"])
    qvalue = np.where(first < second, first, second)
    residual = qvalue - reference.forward(networks["value"], batch["observation"])[0][:, 0]
    expected_value = np.mean(np.where(residual < 0, 0.3, 0.7) * residual**2)

    reader = trained["value"] if variant.order == "sequential" else networks["value"]
    reader = networks["target_value"] if delay_value else reader
    advantage = qvalue - reference.forward(reader, batch["observation"])[0][:, 0]
    weight = np.clip(np.exp(3.0 * advantage), 0, 100)
    expected_actor, gradient = reference.actor_loss(
        networks["actor"], variant, batch["observation"], batch["action"], weight
    )

    target = batch["reward"].copy()
    bootstraps = ~batch["terminated"]
    target[bootstraps] += 0.99 * reference.forward(reader, batch["next_observation"])[0][bootstraps, 0]
    errors = [np.mean((target - reference.forward(critic, pairs)[0][:, 0]) ** 2) for critic in networks["qvalue"]]
    expected_qvalue = sum(errors) if variant.qvalue_reduction == "sum" else sum(errors) / 2

    assert losses[0]["loss_value"] == pytest.approx(expected_value, rel=1e-12)
    assert losses[0]["loss_actor"] == pytest.approx(expected_actor, rel=1e-12)
    assert losses[0]["loss_qvalue"] == pytest.approx(expected_qvalue, rel=1e-12)
    for before, after, slope in zip(*map(parameters, (networks["actor"], trained["actor"], gradient)), strict=True):
        np.testing.assert_allclose(before - after, 3e-4 * slope / (np.abs(slope) + 1e-8), rtol=1e-9, atol=1e-15)


# ---------------------------------------------------------------- orders


@each_variant
def test_only_the_sequential_order_reads_the_new_value(name: str) -> None:
    """Within one step, the step size of V reaches the actor and the critics in the sequential order alone."""
    rng = np.random.default_rng(0)
    networks, batch = make_networks(rng, VARIANTS[name]), make_batch(rng)

    def one_step(value_lr: float, delay_value: bool) -> tuple[dict, dict[str, float]]:
        hyperparameters = Hyperparameters(value_lr=value_lr, delay_value=delay_value)
        trained, losses = train(VARIANTS[name], networks, [batch], hyperparameters)
        return trained, losses[0]

    _, slow = one_step(0.0, False)
    _, fast = one_step(0.1, False)
    sequential = VARIANTS[name].order == "sequential"
    assert (slow["loss_actor"] != fast["loss_actor"]) == sequential
    assert (slow["loss_qvalue"] != fast["loss_qvalue"]) == sequential
    assert slow["loss_value"] == fast["loss_value"]

    slow_networks, slow = one_step(0.0, True)
    fast_networks, fast = one_step(0.1, True)
    assert slow == fast  # the target V is the old one in either order
    assert_same(slow_networks["actor"], fast_networks["actor"])
    assert differ(slow_networks["value"], fast_networks["value"])


@pytest.mark.parametrize("delay_value", [False, True])
def test_orders_end_in_different_networks_unless_the_value_is_delayed(delay_value: bool) -> None:
    rng = np.random.default_rng(0)
    sequential = VARIANTS["paper"]
    joint = reference.Variant("joint", sequential.policy, "sum", sequential.log_std_bounds, True)
    networks, batches = make_networks(rng, sequential), [make_batch(rng) for _ in range(5)]
    hyperparameters = Hyperparameters(delay_value=delay_value)
    one, _ = train(sequential, networks, batches, hyperparameters)
    other, _ = train(joint, networks, batches, hyperparameters)
    assert differ(one["actor"], other["actor"]) != delay_value
    assert differ(one["qvalue"][0], other["qvalue"][0]) != delay_value


# ---------------------------------------------------------------- train


@each_variant
def test_train_leaves_its_inputs_alone_and_keeps_the_structure(name: str) -> None:
    rng = np.random.default_rng(0)
    networks, batches = make_networks(rng, VARIANTS[name]), [make_batch(rng) for _ in range(3)]
    kept = reference.copy_networks(networks)
    trained, losses = train(VARIANTS[name], networks, iter(batches), Hyperparameters(total_steps=3))
    assert trained.keys() == networks.keys() and len(losses) == 3
    assert losses[0].keys() == {"loss_value", "loss_qvalue", "loss_actor"}
    for member in ("actor", "value", "target_value"):
        assert_same(networks[member], kept[member])
        assert differ(trained[member], networks[member]) == (member != "target_value")
    for member in ("qvalue", "target_qvalue"):
        for before, copy, after in zip(networks[member], kept[member], trained[member], strict=True):
            assert_same(before, copy)
            assert differ(after, before)


def test_train_accepts_single_precision_and_float_terminations() -> None:
    rng = np.random.default_rng(0)
    networks, batch = make_networks(rng, VARIANTS["paper"]), make_batch(rng)
    single = {key: array.astype(np.float32) for key, array in batch.items()}
    double = {key: array.astype(np.float64) for key, array in single.items()}
    one, _ = train(VARIANTS["paper"], networks, [single], Hyperparameters())
    other, _ = train(VARIANTS["paper"], networks, [double], Hyperparameters())
    assert_same(one["actor"], other["actor"])
    assert one["actor"]["log_std"].dtype == np.float64


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_value_converges_to_the_expectile(expectile: float) -> None:
    """One state, and target critics that read the action back: V(s) is the expectile of the actions."""
    rng = np.random.default_rng(0)
    sample = rng.uniform(-1, 1, size=(50, 1))
    critic = {"weights": [np.array([[0.0, 1.0]])], "biases": [np.zeros(1)]}
    linear = {"weights": [np.zeros((1, 1))], "biases": [np.zeros(1)]}
    networks = {"actor": linear, "value": linear, "qvalue": [critic], "target_qvalue": [critic]}
    batch = {
        "observation": np.zeros((50, 1)),
        "action": sample,
        "reward": np.zeros(50),
        "next_observation": np.zeros((50, 1)),
        "terminated": np.ones(50),
    }
    hyperparameters = Hyperparameters(expectile=expectile, actor_lr=0.0, critic_lr=0.0, value_lr=1e-2)
    trained, _ = train(VARIANTS["corl_deterministic"], networks, [batch] * 1500, hyperparameters)
    assert trained["value"]["biases"][0][0] == pytest.approx(stats.expectile(sample[:, 0], expectile), abs=1e-8)
