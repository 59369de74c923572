"""Networks, losses and training step of a run's options."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torchrl.data import RandomSampler

from iql_torchrl.configuration.options import AlgorithmOptions, NetworkName, TrainOptions
from iql_torchrl.data.buffer import make_buffer
from iql_torchrl.data.preparation import PreparedData
from iql_torchrl.environments.simulators import Spaces
from iql_torchrl.errors import ConfigurationError
from iql_torchrl.networks import build_discrete_qvalues, build_policy, build_qvalues, build_value
from iql_torchrl.objectives import DDPGBCLoss, DiffusionLoss, DiscreteIQLLoss, FlowLoss, IQLLoss
from iql_torchrl.training.checkpoints import was_stacked
from iql_torchrl.training.data_parallel import Ranks
from iql_torchrl.training.products import why_not
from iql_torchrl.training.step import TrainingStep

_OPTIONS_OF_THE_LOSS = (
    *("num_qvalue_nets", "num_sampled_qvalue_nets", "qvalue_aggregation", "qvalue_reduction", "delay_value"),
    *("value_loss", "gumbel_temperature", "gumbel_clip", "expectile", "temperature", "max_weight"),
)
# By extraction.
LOSSES: dict[str, type[IQLLoss]] = {"awr": IQLLoss, "ddpgbc": DDPGBCLoss, "flow": FlowLoss, "diffusion": DiffusionLoss}
# Options that a loss has besides those of IQLLoss.
_OF_ITS_OWN = {"ddpgbc": ("behaviour_cloning_coefficient",)}
# Whose policy has no distribution, and the options of its network.
_GENERATIVE = {
    "flow": ("flow_steps",),
    "diffusion": ("diffusion_steps", "noise_schedule", "residual_blocks"),
}


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def architecture_of(algorithm: AlgorithmOptions, spaces: Spaces) -> dict[str, Any]:
    """The sizes and kinds that two runs must share for a checkpoint of one to fit the other."""
    shared: dict[str, Any] = {
        "observation_dim": spaces.observation_dim,
        "hidden_dims": list(algorithm.hidden_dims),
        "num_qvalue_nets": algorithm.num_qvalue_nets,
        "delay_value": algorithm.delay_value,
        "dropout": algorithm.dropout_rate,
        "layer_norm": _layer_norm_of(algorithm),
    }
    if algorithm.activation != "relu":  # which checkpoints of the releases that had no other do not name
        shared["activation"] = algorithm.activation
    if algorithm.extraction != "awr":  # nor the extraction, where there was no other
        shared["extraction"] = algorithm.extraction
    if spaces.num_actions is not None:
        return {**shared, "num_actions": spaces.num_actions}
    shared["action_dim"] = len(spaces.action_low)
    if (of_its_own := _GENERATIVE.get(algorithm.extraction)) is not None:
        return shared | {key: getattr(algorithm, key) for key in of_its_own}
    return {
        **shared,
        "policy": algorithm.policy,
        "standard_deviation": algorithm.standard_deviation,
        "log_std_bounds": list(algorithm.log_std_bounds),
        "extra_layer": algorithm.extra_actor_layer,
    }


def actor_arguments(architecture: dict[str, Any]) -> dict[str, Any]:
    """The part of an architecture that :func:`iql_torchrl.networks.build_policy` takes."""
    found = {key: value for key, value in architecture.items() if key not in ("num_qvalue_nets", "delay_value")}
    return {**found, "layer_norm": _has_layer_norm(architecture, "actor")}


def _layer_norm_of(algorithm: AlgorithmOptions) -> bool | list[str]:
    """All networks are ``True`` and none ``False``, as in checkpoints of when there was nothing else."""
    names, chosen = get_args(NetworkName), algorithm.layer_norm
    found = [name for name in names if (chosen if isinstance(chosen, bool) else name in chosen)]
    return found if 0 < len(found) < len(names) else bool(found)


def _has_layer_norm(architecture: Mapping[str, Any], network: NetworkName) -> bool:
    chosen = architecture["layer_norm"]
    return chosen if isinstance(chosen, bool) else network in chosen


def build_loss(algorithm: AlgorithmOptions, spaces: Spaces, device: torch.device | str = "cpu") -> IQLLoss:
    """Networks and loss of an algorithm; a categorical policy and ``DiscreteIQLLoss`` for discrete actions.

    Raises:
        ConfigurationError: discrete actions with another extraction than ``awr``.
    """
    if spaces.num_actions is not None and algorithm.extraction != "awr":
        raise ConfigurationError(
            f"algorithm.extraction={algorithm.extraction} is for continuous actions, and these are "
            f"{spaces.num_actions} discrete ones; leave it at awr."
        )
    architecture = architecture_of(algorithm, spaces)
    options: dict[str, Any] = {"activation": algorithm.activation, "initialisation": algorithm.initialisation}
    shared: dict[str, Any] = {key: architecture[key] for key in ("observation_dim", "hidden_dims")} | options
    several = shared | {
        "layer_norm": _has_layer_norm(architecture, "critic"),
        "num_qvalue_nets": algorithm.num_qvalue_nets,
    }
    of_loss: dict[str, Any] = {key: getattr(algorithm, key) for key in _OPTIONS_OF_THE_LOSS}
    # Drawn in this order, on which a seed's initial weights depend.
    policy: Any = build_policy(actor_arguments(architecture), **options)
    if spaces.num_actions is None:
        qvalues = build_qvalues(action_dim=len(spaces.action_low), **several)
    else:
        qvalues = build_discrete_qvalues(num_actions=spaces.num_actions, **several)
    value = build_value(layer_norm=_has_layer_norm(architecture, "value"), **shared)
    if spaces.num_actions is None:
        of_loss |= {key: getattr(algorithm, key) for key in _OF_ITS_OWN.get(algorithm.extraction, ())}
        loss = LOSSES[algorithm.extraction](policy, qvalues, value, **of_loss)
    else:
        loss = DiscreteIQLLoss(policy, qvalues, value, action_space="categorical", **of_loss)
    loss.make_value_estimator(gamma=algorithm.discount)
    return loss.to(device)


def build_step(
    algorithm: AlgorithmOptions,
    train: TrainOptions,
    data: PreparedData,
    device: torch.device,
    resumed: Sequence[tuple[Path, Mapping[str, Any]] | None] | None = None,
    ranks: Ranks | None = None,
    *,
    samplers: Sequence[RandomSampler] | None = None,
    schedule_steps: int | None = None,
) -> TrainingStep:
    """The training step of a run's options: of one run, or of one a seed, each as it would be by itself.

    Args:
        algorithm, train, data, device: of the run.
        resumed: of :func:`iql_torchrl.training.checkpoints.find_checkpoints`: with ``train.products=auto`` their
            products are chosen again, and on a CPU with ``train.stacked_seeds=auto`` whether seeds are stacked, so that
            the run goes on bit for bit.
        ranks: the processes that train together.
        samplers: one a seed, in place of what ``algorithm.replacement`` asks for.
        schedule_steps: length of the policy's schedule, where it is not that of the run.

    Raises:
        ConfigurationError: an option of the step that does not suit the data, the device or the number of processes.
        RankError: processes that differ in their data or in how they compute.
    """
    ranks = ranks or Ranks()
    ranks.share_of(algorithm.batch_size)
    if ranks.count > 1 and algorithm.value_loss == "gumbel":
        raise ConfigurationError(
            "algorithm.value_loss=gumbel is divided by the largest exponential of a whole batch, of which each of "
            f"{ranks.count} processes sees a share; start one process, or give algorithm.value_loss=expectile."
        )
    training = data.training  # which all seeds share
    losses, buffers, random_states = [], [], []
    for index, seed in enumerate(train.seeds):
        seed_everything(seed)
        options: dict[str, Any] = {"batch_size": algorithm.batch_size, "replacement": algorithm.replacement}
        options["sampler"] = samplers[index] if samplers else None
        buffers.append(make_buffer(training, **options, seed=seed, device=training.device or "cpu"))
        losses.append(build_loss(algorithm, data.spaces, device))
        random_states.append(torch.get_rng_state())
    alone = len(losses) == 1
    try:
        step = TrainingStep(
            losses[0] if alone else losses,
            buffers[0] if alone else buffers,
            total_steps=(schedule_steps or train.steps or None) if algorithm.opt_decay_schedule else None,
            periodic=algorithm.opt_decay_schedule == "periodic_cosine",
            actor_lr=algorithm.actor_lr,
            value_lr=algorithm.value_lr,
            critic_lr=algorithm.critic_lr,
            tau=algorithm.tau,
            actor_tau=algorithm.actor_tau,
            order=algorithm.update_order,
            compile=train.compile,
            updates_per_call=train.updates_per_call,
            cudagraphs=train.cudagraphs,
            precision=train.precision,
            products=_products_of(train.products, resumed, device),
            stacked=_stacked_of(train.stacked_seeds, resumed, device),
            random_states=random_states,
            ranks=ranks,
        )
    except ValueError as error:
        raise ConfigurationError(f"train.{error}") from error
    # Products decide how parameters lie in memory; what is compiled and what is not adds up in other places.
    found = {"dataset_fingerprint": data.fingerprint, "train.products": step.products, "train.compile": step.compiled}
    ranks.compare("give all of them the same data, products and compiler", found)
    return step


def _products_of(
    choice: str, resumed: Sequence[tuple[Path, Mapping[str, Any]] | None] | None, device: torch.device
) -> str:
    saved = [found[1].get("products", "mkl") for found in resumed or () if found is not None]
    if choice != "auto" or not saved:
        return choice
    return "mkl" if saved[0] != "mkl" and why_not(device, torch.float32, saved[0]) else saved[0]


def _stacked_of(
    choice: bool | str, resumed: Sequence[tuple[Path, Mapping[str, Any]] | None] | None, device: torch.device
) -> bool | str:
    saved = [found[1] for found in resumed or () if found is not None]
    return was_stacked(saved[0]) if choice == "auto" and saved and device.type == "cpu" else choice
