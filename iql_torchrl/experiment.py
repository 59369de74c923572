"""From a configuration to the objects of a run: what the recipes and a library user build alike."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor

from iql_torchrl.data import (
    ObservationNormaliser,
    d4rl,
    episode_returns,
    fingerprint,
    hdf5,
    load_transitions,
    make_buffer,
    normalise_actions,
    split_episodes,
    transform_rewards,
)
from iql_torchrl.data.actions import action_bounds
from iql_torchrl.errors import ConfigurationError, DatasetError, first_line
from iql_torchrl.evaluation import Spaces, normalised_score, spaces_of
from iql_torchrl.networks import build_actor, build_discrete_actor, build_discrete_qvalues, build_qvalues, build_value
from iql_torchrl.objectives import DiscreteIQLLoss, IQLLoss
from iql_torchrl.training import TrainingStep


@dataclass(frozen=True)
class PreparedData:
    """Transitions ready for training, and what evaluation needs to know of them."""

    name: str
    training: TensorDict
    validation: TensorDict | None
    environment: str | None
    spaces: Spaces
    normaliser: ObservationNormaliser | None
    returns: np.ndarray
    fingerprint: str

    @property
    def score_label(self) -> str:
        """Name of the score that :meth:`score` gives."""
        return "return" if self.score(0.0) == 0.0 else "normalised score"

    def score(self, episode_return: float) -> float:
        """D4RL's normalised score where there is one, else the return itself."""
        score = normalised_score(self.environment, episode_return) if self.environment else None
        return episode_return if score is None else score


def resolve_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        ConfigurationError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"device {name} is not available on this machine: {first_line(error)}") from error
    return device


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def environment_of(config: DictConfig) -> str | None:
    """``env.name``, or for ``auto`` the environment that the dataset comes from, where it tells."""
    if config.env.name != "auto":
        return config.env.name
    dataset = config.dataset
    if dataset.source == "d4rl":
        return d4rl.environment_of(dataset.name)
    return hdf5.environment_of(_path_of(config))


def prepare_data(config: DictConfig) -> PreparedData:
    """Load, check, transform and split the dataset of a configuration.

    Raises:
        DatasetError, SimulatorError, ConfigurationError: as the parts do.
    """
    environment = environment_of(config)
    options = {key: value for key, value in config.dataset.items() if key not in _NOT_OF_A_SOURCE}
    if "max_episode_steps" in options and options["max_episode_steps"] is None and environment in gymnasium.registry:
        options["max_episode_steps"] = gymnasium.registry[environment].max_episode_steps
    transitions = load_transitions(**options)
    digest = fingerprint(transitions)
    returns = episode_returns(transitions)

    spaces = _spaces(environment, transitions)
    if spaces.num_actions is None:
        low, high = spaces.action_low, spaces.action_high
        if config.dataset.normalised_actions:
            low, high = -torch.ones_like(low), torch.ones_like(high)
        normalise_actions(transitions, low, high, clip=config.algorithm.action_clip)
    elif config.dataset.normalised_actions:
        raise ConfigurationError("dataset.normalised_actions=true is for continuous actions; the data's are discrete.")
    transform_rewards(transitions, config.algorithm.reward_transform)

    fraction = config.dataset.validation_fraction
    if fraction is None:
        fraction = 0.1 if environment is None else 0.0
    training, validation = split_episodes(transitions, fraction) if fraction else (transitions, None)
    normaliser = None
    if config.algorithm.normalise_observations:
        normaliser = ObservationNormaliser.fit(training)
        for part in (training, validation):
            if part is not None:
                normaliser.apply_(part)
    return PreparedData(_title(config), training, validation, environment, spaces, normaliser, returns, digest)


def _spaces(environment: str | None, transitions: TensorDict) -> Spaces:
    observation_dim, action = transitions["observation"].shape[1], transitions["action"]
    discrete = action.ndim == 1
    if environment is None:
        if discrete:
            return Spaces.discrete(observation_dim, int(action.max()) + 1)
        return Spaces(observation_dim, *action_bounds(transitions))
    spaces = spaces_of(environment, observation_dim=observation_dim, action_dim=None if discrete else action.shape[1])
    if spaces.num_actions is not None and action.max() >= spaces.num_actions:
        raise DatasetError(
            f"action {int(action.max())} in transition {int(action.argmax())} is none of {environment}'s actions, 0 to "
            f"{spaces.num_actions - 1}; name the environment that the data come from."
        )
    return spaces


def architecture_of(algorithm: DictConfig, spaces: Spaces) -> dict[str, Any]:
    """The sizes and kinds that two runs must share for a checkpoint of one to fit the other."""
    shared = {
        "observation_dim": spaces.observation_dim,
        "hidden_dims": list(algorithm.hidden_dims),
        "num_qvalue_nets": algorithm.num_qvalue_nets,
        "delay_value": algorithm.delay_value,
        "dropout": algorithm.dropout_rate,
        "layer_norm": algorithm.layer_norm,
    }
    if spaces.num_actions is not None:
        return {**shared, "num_actions": spaces.num_actions}
    return {
        **shared,
        "action_dim": len(spaces.action_low),
        "policy": algorithm.policy,
        "standard_deviation": algorithm.standard_deviation,
        "log_std_bounds": list(algorithm.log_std_bounds),
        "extra_layer": algorithm.extra_actor_layer,
    }


def actor_arguments(architecture: dict[str, Any]) -> dict[str, Any]:
    """The part of an architecture that ``build_actor`` takes, or ``build_discrete_actor``."""
    return {key: value for key, value in architecture.items() if key not in ("num_qvalue_nets", "delay_value")}


def build_loss(algorithm: DictConfig, spaces: Spaces, device: torch.device | str = "cpu") -> IQLLoss:
    """Networks and loss of ``config.algorithm``; a categorical policy and ``DiscreteIQLLoss`` for discrete actions."""
    actor = actor_arguments(architecture_of(algorithm, spaces)) | {"initialisation": algorithm.initialisation}
    critics = {key: actor[key] for key in ("observation_dim", "hidden_dims", "layer_norm", "initialisation")}
    options = {
        key: algorithm[key]
        for key in ("num_qvalue_nets", "temperature", "expectile", "max_weight", "delay_value", "qvalue_reduction")
    }
    several = critics | {"num_qvalue_nets": algorithm.num_qvalue_nets}
    # Drawn in this order, on which a seed's initial weights depend.
    if spaces.num_actions is None:
        policy, qvalues = build_actor(**actor), build_qvalues(action_dim=len(spaces.action_low), **several)
        loss = IQLLoss(policy, qvalues, build_value(**critics), **options)
    else:
        policy, qvalues = (
            build_discrete_actor(**actor),
            build_discrete_qvalues(num_actions=spaces.num_actions, **several),
        )
        loss = DiscreteIQLLoss(policy, qvalues, build_value(**critics), action_space="categorical", **options)
    loss.make_value_estimator(gamma=algorithm.discount)
    return loss.to(device)


def seeds_of(config: DictConfig) -> range:
    """``train.num_seeds`` seeds from ``train.seed`` on."""
    return range(config.train.seed, config.train.seed + config.train.num_seeds)


def build_step(config: DictConfig, data: PreparedData, device: torch.device) -> TrainingStep:
    """The training step of a configuration: of one run, or of one a seed, each as it would be by itself."""
    algorithm, train = config.algorithm, config.train
    training = data.training.to(device)  # once, for all seeds
    losses, buffers = [], []
    for seed in seeds_of(config):
        seed_everything(seed)
        options = {"batch_size": algorithm.batch_size, "replacement": algorithm.replacement}
        buffers.append(make_buffer(training, **options, seed=seed, device=device))
        losses.append(build_loss(algorithm, data.spaces, device))
    alone = len(losses) == 1
    try:
        return TrainingStep(
            losses[0] if alone else losses,
            buffers[0] if alone else buffers,
            total_steps=train.steps if algorithm.opt_decay_schedule == "cosine" else None,
            actor_lr=algorithm.actor_lr,
            value_lr=algorithm.value_lr,
            critic_lr=algorithm.critic_lr,
            tau=algorithm.tau,
            order=algorithm.update_order,
            compile=train.compile,
            updates_per_call=train.updates_per_call,
            cudagraphs=train.cudagraphs,
            precision=train.precision,
        )
    except ValueError as error:
        raise ConfigurationError(f"train.{error}") from error


@torch.no_grad()
def held_out_metrics(loss: IQLLoss, validation: TensorDict) -> dict[str, float]:
    """Log-likelihood, TD error and advantage on transitions that training never sees, averaged over all of them."""
    sums: dict[str, Tensor] = {}
    device = next(loss.parameters()).device
    for batch in validation.exclude("episode").split(4096):
        found = loss.diagnostics(batch.to(device))
        for key in ("log_prob", "td_error", "advantage_mean"):
            sums[key] = sums.get(key, torch.zeros((), device=device)) + found[key] * len(batch)
    return {f"validation_{key}": float(value) / len(validation) for key, value in sums.items()}


_NOT_OF_A_SOURCE = ("validation_fraction", "normalised_actions")


def _title(config: DictConfig) -> str:
    """Such as ``IQL on hopper-medium-v2``."""
    dataset = config.dataset
    name = dataset.get("name") or Path(str(dataset.get("path", "the embedded Hopper-v5 replay"))).name
    kind = "Behaviour cloning" if config.algorithm.temperature == 0 else "IQL"
    return f"{kind} on {name}"


def _path_of(config: DictConfig) -> Path:
    from iql_torchrl.data import embedded

    return embedded.PATH if config.dataset.source == "embedded" else Path(config.dataset.path)
