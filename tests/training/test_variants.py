"""Every variant, as its config composes it, against 200 updates of the NumPy reference."""

from pathlib import Path

import hydra
import numpy as np
import pytest
import reference_iql
import torch
from problems import ACTION_DIM, OBSERVATION_DIM, random_transitions

from iql_torchrl import TrainingStep, experiment, make_buffer
from iql_torchrl.configuration import compose
from iql_torchrl.evaluation import Spaces

CONFIGS = Path(__file__).parents[2] / "configs"
COMPILED = [pytest.param(False, id="eager"), pytest.param(True, id="compiled", marks=pytest.mark.slow)]
DTYPES = [torch.float64, torch.float32]
UPDATES = 200
SPACES = Spaces(OBSERVATION_DIM, -torch.ones(ACTION_DIM), torch.ones(ACTION_DIM))
VARIANTS = {
    "paper": ("paper", []),
    "rlinf": ("rlinf", []),
    "corl": ("corl", []),
    "corl_deterministic": ("corl", ["algorithm.policy=deterministic"]),
    "torchrl": ("torchrl", []),
}


def algorithm_of(variant, *overrides):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        overrides = [f"algorithm.variant={variant}", "algorithm.hidden_dims=[24,16]", *overrides]
        return compose("iql_offline", [*overrides, "algorithm.batch_size=64"]).algorithm


def step_of(algorithm, dtype, *, compile, seed=0):
    torch.manual_seed(seed)
    transitions = random_transitions().apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
    return TrainingStep(
        experiment.build_loss(algorithm, SPACES).to(dtype),
        make_buffer(transitions, batch_size=algorithm.batch_size, replacement=algorithm.replacement, seed=seed),
        total_steps=UPDATES if algorithm.opt_decay_schedule == "cosine" else None,
        actor_lr=algorithm.actor_lr,
        value_lr=algorithm.value_lr,
        critic_lr=algorithm.critic_lr,
        tau=algorithm.tau,
        order=algorithm.update_order,
        compile=compile,
    )


def numpy_network(params):
    leaves = {key: leaf.detach().double().numpy().copy() for key, leaf in params.items(True, True)}
    layers = sorted({key[:-1] for key in leaves if key[-1] == "weight"}, key=lambda key: int(key[-1]))
    network = {
        "weights": [leaves[*layer, "weight"] for layer in layers],
        "biases": [leaves[*layer, "bias"] for layer in layers],
    }
    log_std = [leaf for key, leaf in leaves.items() if key[-1] == "log_std"]
    return network | ({"log_std": log_std[0]} if log_std else {})


def numpy_networks(loss):
    params = dict(loss.named_children())
    networks = {
        "actor": numpy_network(params["actor_network_params"]),
        "value": numpy_network(params["value_network_params"]),
        "qvalue": [numpy_network(one) for one in params["qvalue_network_params"].unbind(0)],
        "target_qvalue": [numpy_network(one) for one in params["target_qvalue_network_params"].unbind(0)],
    }
    if "target_value_network_params" in params:
        networks["target_value"] = numpy_network(params["target_value_network_params"])
    return networks


def numpy_batch(batch):
    entries = {
        "observation": batch["observation"],
        "action": batch["action"],
        "reward": batch["next", "reward"][:, 0],
        "next_observation": batch["next", "observation"],
        "terminated": batch["next", "terminated"][:, 0],
    }
    return {key: entry.double().numpy() for key, entry in entries.items()}


def tensors(networks):
    for network in [networks["actor"], networks["value"], *networks["qvalue"], *networks["target_qvalue"]]:
        yield from (*network["weights"], *network["biases"])
        if "log_std" in network:
            yield network["log_std"]


def deviation(variant, dtype, *, compile, delay_value=False):
    """Largest ratio |ours - reference| / |reference| over the tensors, and the losses of both."""
    config, overrides = VARIANTS[variant]
    algorithm = algorithm_of(config, f"algorithm.delay_value={str(delay_value).lower()}", *overrides)
    step = step_of(algorithm, dtype, compile=compile)
    networks = numpy_networks(step.loss)
    batches, losses = [], []
    for _ in range(UPDATES):
        losses.append({key: float(value) for key, value in step().items()})
        batches.append(numpy_batch(step.batch()))
    hyperparameters = reference_iql.Hyperparameters(total_steps=UPDATES, delay_value=delay_value)
    expected, expected_losses = reference_iql.train(reference_iql.VARIANTS[variant], networks, batches, hyperparameters)
    pairs = list(zip(tensors(numpy_networks(step.loss)), tensors(expected), strict=True))
    assert all(np.any(start != end) for start, end in zip(tensors(networks), tensors(expected), strict=True))
    ratio = max(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) for ours, theirs in pairs)
    return ratio, losses, expected_losses


@pytest.mark.parametrize("compile", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_200_updates_equal_the_numpy_reference(variant, dtype, compile):
    ratio, losses, expected = deviation(variant, dtype, compile=compile)
    tolerance = 1e-8 if dtype == torch.float64 else 1e-3
    assert ratio < tolerance
    for ours, theirs in zip(losses, expected, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("compile", COMPILED)
def test_200_updates_with_a_delayed_value_equal_the_numpy_reference(compile):
    ratio, *_ = deviation("paper", torch.float64, compile=compile, delay_value=True)
    assert ratio < 1e-8
