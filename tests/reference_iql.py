"""Implicit Q-Learning in plain NumPy float64: an oracle for the torch implementation.

Written from the equations of Kostrikov et al. (2021, arXiv 2110.06169) with hand-written gradients, and on purpose
without an import of the code it checks. Shapes: B transitions, O observation and A action dimensions, C critics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Network = dict[str, Any]  # {"weights": [[out, in], ...], "biases": [[out], ...]}, the actor may add {"log_std": [A]}

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
MINIMUM_STD = 0.1
SOFTPLUS_FLOOR = 0.01
SOFTPLUS_SHIFT = np.log(np.expm1(1.0 - SOFTPLUS_FLOOR))  # so that raw = 0 gives std = 1
TANH_MARGIN = {"tanh_normal_state_independent": 1e-6, "tanh_normal_biased_softplus": 1e-15}


@dataclass(frozen=True)
class Variant:
    """One way of reading the paper: order of the updates, policy, sum or mean over critics, actor schedule."""

    order: Literal["sequential", "joint"]
    policy: str  # a key of COSTS
    qvalue_reduction: Literal["sum", "mean"]
    log_std_bounds: tuple[float, float] | None
    schedule: bool


VARIANTS = {
    "paper": Variant("sequential", "tanh_mean_normal", "sum", (-5.0, 2.0), True),
    "rlinf": Variant("sequential", "tanh_normal_state_independent", "sum", (-5.0, 2.0), True),
    "corl": Variant("joint", "tanh_mean_normal", "mean", (-20.0, 2.0), True),
    "corl_deterministic": Variant("joint", "deterministic", "mean", None, True),
    "torchrl": Variant("joint", "tanh_normal_biased_softplus", "sum", None, False),
}


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers of a training run."""

    discount: float = 0.99
    polyak: float = 0.005
    expectile: float = 0.7
    temperature: float = 3.0
    max_weight: float = 100.0
    actor_lr: float = 3e-4
    value_lr: float = 3e-4
    critic_lr: float = 3e-4
    total_steps: int | None = None
    delay_value: bool = False


def map_parameters(function: Callable[..., Array], *networks: Network) -> Network:
    """Apply `function` to the matching parameters of networks of one structure."""
    mapped: Network = {
        layer: [function(*arrays) for arrays in zip(*(network[layer] for network in networks), strict=True)]
        for layer in ("weights", "biases")
    }
    if "log_std" in networks[0]:
        mapped["log_std"] = function(*(network["log_std"] for network in networks))
    return mapped


def forward(network: Network, inputs: Array) -> tuple[Array, list[Array]]:
    """Multilayer perceptron with ReLU hidden layers: [B, in] -> [B, out], and the input of every layer."""
    layer_inputs = []
    hidden = inputs
    for layer, (weight, bias) in enumerate(zip(network["weights"], network["biases"], strict=True)):
        hidden = hidden if layer == 0 else np.maximum(hidden, 0.0)
        layer_inputs.append(hidden)
        hidden = hidden @ weight.T + bias
    return hidden, layer_inputs


def backward(network: Network, layer_inputs: list[Array], output_gradient: Array) -> Network:
    """Gradient of a scalar with respect to the parameters, from its gradient [B, out] at the output."""
    gradient = map_parameters(np.zeros_like, network)
    for layer in reversed(range(len(layer_inputs))):
        gradient["weights"][layer] = output_gradient.T @ layer_inputs[layer]
        gradient["biases"][layer] = output_gradient.sum(axis=0)
        # A layer's input is its predecessor's ReLU, so a positive input is where that ReLU passed the gradient.
        output_gradient = (output_gradient @ network["weights"][layer]) * (layer_inputs[layer] > 0.0)
    return gradient


def state_value(value: Network, observation: Array) -> Array:
    """V(s): [B, O] -> [B]."""
    return forward(value, observation)[0][:, 0]


def minimum_qvalue(critics: list[Network], observation: Array, action: Array) -> Array:
    """min_i Q_i(s, a): [B, O], [B, A] -> [B]."""
    pairs = np.concatenate([observation, action], axis=1)
    return np.min([forward(critic, pairs)[0][:, 0] for critic in critics], axis=0)


def value_loss(value: Network, observation: Array, qvalue: Array, expectile: float) -> tuple[float, Network]:
    """Eq. 5, mean |tau - 1(u < 0)| u^2 with u = qvalue [B] - V(s), and its gradient."""
    output, layer_inputs = forward(value, observation)
    difference = qvalue - output[:, 0]
    asymmetry = np.abs(expectile - (difference < 0.0))
    output_gradient = -2.0 * asymmetry * difference / len(difference)
    return float(np.mean(asymmetry * difference**2)), backward(value, layer_inputs, output_gradient[:, None])


def qvalue_loss(
    critics: list[Network], observation: Array, action: Array, target: Array, reduction: str
) -> tuple[float, list[Network]]:
    """Eq. 6, mean (y - Q_i(s, a))^2 with the target y [B], summed or averaged over critics, and its gradients."""
    scale = {"sum": 1.0, "mean": 1.0 / len(critics)}[reduction]
    pairs = np.concatenate([observation, action], axis=1)
    loss, gradients = 0.0, []
    for critic in critics:
        output, layer_inputs = forward(critic, pairs)
        error = output[:, 0] - target
        loss += scale * float(np.mean(error**2))
        gradients.append(backward(critic, layer_inputs, scale * 2.0 * error[:, None] / len(error)))
    return loss, gradients


# A policy's cost is -log pi(a|s), or the squared error of the deterministic policy. Each function below maps the
# output of the actor's trunk to the cost [B], its gradient at the output, and its gradient at log_std [B, A].
Cost = tuple[Array, Array, Array]


def normal_cost(sample: Array, mean: Array, log_std: Array) -> Cost:
    """-log N(sample; mean, exp(log_std)) summed over [A], with gradients at mean and log_std, both [B, A]."""
    standardized = (sample - mean) / np.exp(log_std)
    cost = 0.5 * standardized**2 + log_std + 0.5 * np.log(2.0 * np.pi)
    return cost.sum(axis=1), -standardized / np.exp(log_std), 1.0 - standardized**2


def clipped_log_std(actor: Network, variant: Variant) -> tuple[Array, Array]:
    """The state-independent log_std [A] inside its bounds, and the derivative [A] of the clip."""
    assert variant.log_std_bounds is not None
    low, high = variant.log_std_bounds
    log_std = actor["log_std"]
    return np.clip(log_std, low, high), ((log_std >= low) & (log_std <= high)).astype(np.float64)


def inverse_tanh(action: Array, margin: float) -> tuple[Array, Array]:
    """u = atanh(a) [B, A] and log |da/du| = sum_j log(1 - a_j^2) [B], with a kept `margin` away from +-1."""
    # Both terms read the clamped action: at a = +-1 the Jacobian alone would already be infinite.
    clamped = np.clip(action, -1.0 + margin, 1.0 - margin)
    return np.arctanh(clamped), np.log1p(-(clamped**2)).sum(axis=1)


def tanh_mean_normal_cost(actor: Network, variant: Variant, output: Array, action: Array) -> Cost:
    """a ~ N(tanh(output), exp(clip(log_std)))."""
    mean = np.tanh(output)
    log_std, clip_derivative = clipped_log_std(actor, variant)
    cost, mean_gradient, log_std_gradient = normal_cost(action, mean, log_std)
    return cost, mean_gradient * (1.0 - mean**2), log_std_gradient * clip_derivative


def tanh_normal_state_independent_cost(actor: Network, variant: Variant, output: Array, action: Array) -> Cost:
    """a = tanh(u), u ~ N(output, exp(clip(log_std)))."""
    unsquashed, log_jacobian = inverse_tanh(action, TANH_MARGIN[variant.policy])
    log_std, clip_derivative = clipped_log_std(actor, variant)
    cost, mean_gradient, log_std_gradient = normal_cost(unsquashed, output, log_std)
    return cost + log_jacobian, mean_gradient, log_std_gradient * clip_derivative


def tanh_normal_biased_softplus_cost(actor: Network, variant: Variant, output: Array, action: Array) -> Cost:
    """a = tanh(u), u ~ N(location, max(softplus(raw + log(e^0.99 - 1)) + 0.01, 0.1)); output [B, 2A]: both raw."""
    unsquashed, log_jacobian = inverse_tanh(action, TANH_MARGIN[variant.policy])
    location, raw = np.split(output, 2, axis=1)
    softplus = np.logaddexp(0.0, raw + SOFTPLUS_SHIFT) + SOFTPLUS_FLOOR
    std = np.maximum(softplus, MINIMUM_STD)
    cost, location_gradient, log_std_gradient = normal_cost(unsquashed, location, np.log(std))
    sigmoid = np.exp(-np.logaddexp(0.0, -(raw + SOFTPLUS_SHIFT)))
    raw_gradient = log_std_gradient / std * sigmoid * (softplus > MINIMUM_STD)
    gradient = np.concatenate([location_gradient, raw_gradient], axis=1)
    return cost + log_jacobian, gradient, np.zeros_like(action)


def deterministic_cost(actor: Network, variant: Variant, output: Array, action: Array) -> Cost:
    """sum_j (tanh(output)_j - a_j)^2."""
    mean = np.tanh(output)
    error = mean - action
    return np.sum(error**2, axis=1), 2.0 * error * (1.0 - mean**2), np.zeros_like(action)


COSTS = {
    "tanh_mean_normal": tanh_mean_normal_cost,
    "tanh_normal_state_independent": tanh_normal_state_independent_cost,
    "tanh_normal_biased_softplus": tanh_normal_biased_softplus_cost,
    "deterministic": deterministic_cost,
}


def advantage_weight(advantage: Array, temperature: float, max_weight: float) -> Array:
    """min(exp(temperature * advantage), max_weight): [B] -> [B]."""
    with np.errstate(over="ignore"):
        return np.minimum(np.exp(temperature * advantage), max_weight)


def actor_loss(
    actor: Network, variant: Variant, observation: Array, action: Array, weight: Array
) -> tuple[float, Network]:
    """Eq. 7, mean w * cost(s, a) with the weights w [B] held fixed, and its gradient."""
    output, layer_inputs = forward(actor, observation)
    cost, output_gradient, log_std_gradient = COSTS[variant.policy](actor, variant, output, action)
    weight_per_sample = weight[:, None] / len(weight)
    gradient = backward(actor, layer_inputs, weight_per_sample * output_gradient)
    if "log_std" in actor:
        gradient["log_std"] = np.sum(weight_per_sample * log_std_gradient, axis=0)
    return float(np.mean(weight * cost)), gradient


class Adam:
    """Kingma & Ba (2015), algorithm 1, for one network."""

    def __init__(self, network: Network) -> None:
        self.count = 0
        self.first_moment = map_parameters(np.zeros_like, network)
        self.second_moment = map_parameters(np.zeros_like, network)

    def step(self, network: Network, gradient: Network, learning_rate: float) -> Network:
        """The network one step further down the gradient."""
        self.count += 1
        self.first_moment = map_parameters(lambda m, g: BETA1 * m + (1 - BETA1) * g, self.first_moment, gradient)
        self.second_moment = map_parameters(lambda v, g: BETA2 * v + (1 - BETA2) * g**2, self.second_moment, gradient)
        rate = learning_rate / (1 - BETA1**self.count)
        correction = 1 - BETA2**self.count

        def moved(parameter: Array, first: Array, second: Array) -> Array:
            return parameter - rate * first / (np.sqrt(second / correction) + EPSILON)

        return map_parameters(moved, network, self.first_moment, self.second_moment)


def polyak_update(target: Network, online: Network, polyak: float) -> Network:
    """target <- (1 - polyak) target + polyak online."""
    return map_parameters(lambda old, new: (1.0 - polyak) * old + polyak * new, target, online)


def actor_learning_rate(variant: Variant, hyperparameters: Hyperparameters, update: int) -> float:
    """Cosine decay from actor_lr at update 0 to zero at total_steps, or the constant."""
    if not variant.schedule or hyperparameters.total_steps is None:
        return hyperparameters.actor_lr
    return hyperparameters.actor_lr * 0.5 * (1.0 + np.cos(np.pi * update / hyperparameters.total_steps))


def train_step(
    variant: Variant, networks: dict, optimizers: dict, batch: dict[str, Array], hp: Hyperparameters, update: int
) -> tuple[dict, dict[str, float]]:
    """One update of every network on one batch, and the losses its gradients were taken of."""
    observation, action = batch["observation"], batch["action"]
    qvalue = minimum_qvalue(networks["target_qvalue"], observation, action)

    loss_value, gradient = value_loss(networks["value"], observation, qvalue, hp.expectile)
    value = optimizers["value"].step(networks["value"], gradient, hp.value_lr)
    baseline = {"sequential": value, "joint": networks["value"]}[variant.order]
    baseline = networks["target_value"] if hp.delay_value else baseline

    weight = advantage_weight(qvalue - state_value(baseline, observation), hp.temperature, hp.max_weight)
    loss_actor, gradient = actor_loss(networks["actor"], variant, observation, action, weight)
    actor = optimizers["actor"].step(networks["actor"], gradient, actor_learning_rate(variant, hp, update))

    next_value = state_value(baseline, batch["next_observation"])
    target = batch["reward"] + hp.discount * (1.0 - batch["terminated"]) * next_value
    loss_qvalue, gradients = qvalue_loss(networks["qvalue"], observation, action, target, variant.qvalue_reduction)
    critics = [
        optimizer.step(critic, gradient, hp.critic_lr)
        for optimizer, critic, gradient in zip(optimizers["qvalue"], networks["qvalue"], gradients, strict=True)
    ]

    updated = {**networks, "actor": actor, "value": value, "qvalue": critics}
    updated["target_qvalue"] = [
        polyak_update(old, new, hp.polyak) for old, new in zip(networks["target_qvalue"], critics, strict=True)
    ]
    if hp.delay_value:
        updated["target_value"] = polyak_update(networks["target_value"], value, hp.polyak)
    return updated, {"loss_value": loss_value, "loss_qvalue": loss_qvalue, "loss_actor": loss_actor}


def copy_networks(networks: dict) -> dict:
    """The networks as float64 arrays of their own."""

    def copied(network: Network) -> Network:
        return map_parameters(lambda parameter: np.array(parameter, dtype=np.float64), network)

    return {
        name: [copied(each) for each in member] if isinstance(member, list) else copied(member)
        for name, member in networks.items()
    }


def train(
    variant: Variant, networks: dict, batches: Iterable[dict[str, np.ndarray]], hyperparameters: Hyperparameters
) -> tuple[dict, list[dict[str, float]]]:
    """Train on the batches in turn.

    `networks` holds "actor", "value", lists of C "qvalue" and "target_qvalue", and "target_value" where delay_value
    is set; it is left as it was. A batch holds observation [B, O], action [B, A], reward [B], next_observation
    [B, O] and terminated [B]. Returns the trained networks in the same structure and the losses of every update.
    """
    networks = copy_networks(networks)
    optimizers: dict[str, Any] = {name: Adam(networks[name]) for name in ("actor", "value")}
    optimizers["qvalue"] = [Adam(critic) for critic in networks["qvalue"]]
    losses = []
    for update, batch in enumerate(batches):
        batch = {name: np.asarray(array, dtype=np.float64) for name, array in batch.items()}
        networks, loss = train_step(variant, networks, optimizers, batch, hyperparameters, update)
        losses.append(loss)
    return networks, losses
