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
    normalise_actions,
    split_episodes,
    transform_rewards,
)
from iql_torchrl.data.actions import action_bounds
from iql_torchrl.errors import ConfigurationError, first_line
from iql_torchrl.evaluation import Spaces, normalised_score, spaces_of
from iql_torchrl.networks import build_actor, build_qvalues, build_value
from iql_torchrl.objectives import IQLLoss


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

    observation_dim, action_dim = transitions["observation"].shape[1], transitions["action"].shape[1]
    if environment is not None:
        spaces = spaces_of(environment, observation_dim=observation_dim, action_dim=action_dim)
    else:
        spaces = Spaces(observation_dim, *action_bounds(transitions))
    low, high = spaces.action_low, spaces.action_high
    if config.dataset.normalised_actions:
        low, high = -torch.ones_like(low), torch.ones_like(high)
    normalise_actions(transitions, low, high, clip=config.algorithm.action_clip)
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


def architecture_of(algorithm: DictConfig, spaces: Spaces) -> dict[str, Any]:
    """The sizes and kinds that two runs must share for a checkpoint of one to fit the other."""
    return {
        "observation_dim": spaces.observation_dim,
        "action_dim": len(spaces.action_low),
        "hidden_dims": list(algorithm.hidden_dims),
        "num_qvalue_nets": algorithm.num_qvalue_nets,
        "delay_value": algorithm.delay_value,
        "dropout": algorithm.dropout_rate,
        "layer_norm": algorithm.layer_norm,
        "policy": algorithm.policy,
        "standard_deviation": algorithm.standard_deviation,
        "log_std_bounds": list(algorithm.log_std_bounds),
        "extra_layer": algorithm.extra_actor_layer,
    }


def actor_arguments(architecture: dict[str, Any]) -> dict[str, Any]:
    """The part of an architecture that ``build_actor`` takes."""
    return {key: value for key, value in architecture.items() if key not in ("num_qvalue_nets", "delay_value")}


def build_loss(algorithm: DictConfig, spaces: Spaces, device: torch.device | str = "cpu") -> IQLLoss:
    """Networks and loss of ``config.algorithm``."""
    architecture = architecture_of(algorithm, spaces)
    critics = {
        "hidden_dims": architecture["hidden_dims"],
        "layer_norm": architecture["layer_norm"],
        "initialisation": algorithm.initialisation,
    }
    observation_dim, action_dim = architecture["observation_dim"], architecture["action_dim"]
    loss = IQLLoss(
        build_actor(**actor_arguments(architecture), initialisation=algorithm.initialisation),
        build_qvalues(observation_dim, action_dim, num_qvalue_nets=algorithm.num_qvalue_nets, **critics),
        build_value(observation_dim, **critics),
        num_qvalue_nets=algorithm.num_qvalue_nets,
        temperature=algorithm.temperature,
        expectile=algorithm.expectile,
        max_weight=algorithm.max_weight,
        delay_value=algorithm.delay_value,
        qvalue_reduction=algorithm.qvalue_reduction,
    )
    loss.make_value_estimator(gamma=algorithm.discount)
    return loss.to(device)


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
