"""From a configuration to the objects of a run: what the recipes and a library user build alike."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch import Tensor

from iql_torchrl.data import (
    ObservationNormaliser,
    embedded,
    episode_returns,
    fingerprint,
    hdf5,
    load_transitions,
    make_buffer,
    minari,
    normalise_actions,
    open_log,
    split_episodes,
    transform_rewards,
)
from iql_torchrl.data.actions import action_bounds
from iql_torchrl.data.storage import allocator
from iql_torchrl.data.transitions import has_discrete_actions
from iql_torchrl.errors import ConfigurationError, DatasetError, SimulatorError, first_line
from iql_torchrl.evaluation import EnvironmentSpec, Spaces, spaces_of
from iql_torchrl.evaluation.environments import step_limit
from iql_torchrl.evaluation.specification import of_d4rl, of_minari, registered_id
from iql_torchrl.networks import build_actor, build_discrete_actor, build_discrete_qvalues, build_qvalues, build_value
from iql_torchrl.objectives import DiscreteIQLLoss, IQLLoss
from iql_torchrl.training import TrainingStep


@dataclass(frozen=True)
class PreparedData:
    """Transitions ready for training, and what evaluation needs to know of them."""

    name: str
    training: TensorDict
    validation: TensorDict | None
    environment: EnvironmentSpec | None
    spaces: Spaces
    normaliser: ObservationNormaliser | None
    returns: np.ndarray
    fingerprint: str

    note: str

    @property
    def score_label(self) -> str:
        """Name of the score that :meth:`score` gives."""
        return "return" if self.environment is None or self.environment.references is None else "normalised score"

    def score(self, episode_return: float) -> float:
        """The normalised score where there is one, else the return itself."""
        score = self.environment.score(episode_return) if self.environment else None
        return episode_return if score is None else score

    @property
    def data_score(self) -> float | None:
        """Mean score of the data's episodes; ``None`` where their returns are of another kind than the evaluation's."""
        if self.environment is not None and not self.environment.scores_data:
            return None
        return self.score(float(self.returns.mean()))

    def title_line(self) -> str:
        """One line on the data, for the terminal."""
        mean = "" if self.data_score is None else f", mean {self.score_label} {self.data_score:.1f}"
        where = "no environment" if self.environment is None else self.environment.name
        size = f"{len(self.training):,} transitions, {len(self.returns):,} episodes"
        return f"{self.name}: {size}{mean}; evaluated in {where}"


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
        if device.type == "cuda":
            torch.cuda.set_device(device)  # whose streams copies, graphs and events are then on
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"device {name} is not available on this machine: {first_line(error)}") from error
    return device


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def environment_of(config: DictConfig) -> tuple[EnvironmentSpec | None, str]:
    """The environment of ``env.name``, for ``auto`` the one that the dataset comes from, and a note on its scores.

    The note says why there is no environment, where the dataset's name tells.
    """
    dataset = config.dataset
    if config.env.name is None:
        return None, ""
    if config.env.name != "auto":
        spec, reason = EnvironmentSpec.of(config.env.name), ""
        of_data, _ = of_d4rl(dataset.name) if dataset.source == "d4rl" else (None, "")
        if of_data is not None and of_data.family == spec.family:
            spec = replace(spec, layout=of_data.layout)  # another version or maze of the data's environment
    elif dataset.source == "d4rl":
        spec, reason = of_d4rl(dataset.name)
    elif dataset.source == "minari":
        recorded = minari.environment_of(dataset.name, root=dataset.root, download=dataset.download)
        spec, reason = of_minari(dataset.name, recorded)
    else:
        found = None
        if dataset.source == "embedded":
            found = embedded.environment_of()
        elif dataset.source == "hdf5":
            found = hdf5.environment_of(dataset.path)
            found = found and registered_id(found, dataset.path)
        spec, reason = (EnvironmentSpec.of(found), "") if found else (None, "the data name none; set env.name=ID")
    if spec is None:
        return None, f"no environment: {reason}"
    spec = spec.with_kwargs(environment_kwargs(config))
    return spec, f"normalised score {spec.note}" if spec.note else ""


def environment_kwargs(config: DictConfig) -> dict[str, Any]:
    """``env.kwargs`` as plain values."""
    kwargs: Any = OmegaConf.to_container(config.env.kwargs, resolve=True) if config.env.kwargs is not None else {}
    return kwargs


def prepare_data(config: DictConfig) -> PreparedData:
    """Load, check, transform and split the dataset of a configuration.

    Raises:
        DatasetError, SimulatorError, ConfigurationError: as the parts do.
    """
    environment, note = environment_of(config)
    options = {key: value for key, value in config.dataset.items() if key not in _NOT_OF_A_SOURCE}
    if "max_episode_steps" in options and options["max_episode_steps"] is None and environment is not None:
        options["max_episode_steps"] = step_limit(environment)
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
    training, validation = transitions, None
    if fraction:
        allocate = allocator(config.dataset.storage, config.dataset.storage_folder)
        training, validation = split_episodes(transitions, fraction, allocate=allocate)
    del transitions
    normaliser = None
    if config.algorithm.normalise_observations:
        normaliser = ObservationNormaliser.fit(training)
        for part in (training, validation):
            if part is not None:
                normaliser.apply_(part)
    if config.dataset.storage == "device":
        training = training.to(resolve_device(config.train.device))
    return PreparedData(_title(config), training, validation, environment, spaces, normaliser, returns, digest, note)


def inspect_dataset(config: DictConfig) -> dict[str, Any]:
    """The report of :func:`iql_torchrl.reporting.dataset_report.describe_log` on a configuration's dataset.

    Action bounds and step limit are those of the environment, where it starts.

    Raises:
        DatasetError: the dataset cannot be trained on; all else is in the report.
    """
    from iql_torchrl.reporting.dataset_report import describe_log

    environment, note = environment_of(config)
    options: dict[str, Any] = {
        str(key): value for key, value in config.dataset.items() if key not in (*_NOT_OF_A_SOURCE, *_OF_STORAGE)
    }
    limit = options.pop("max_episode_steps", None)
    if limit is None and environment is not None:
        limit = step_limit(environment)
    bounds = None
    with open_log(**options) as log:
        if log.max_episode_steps is not None:
            limit = None  # D4RL's own count
        complete = {"observations", "actions"} <= set(log.columns)  # else describing the log says what is missing
        if environment is not None and complete and not has_discrete_actions(log):
            sizes = [log.columns[key].shape[-1] for key in ("observations", "actions")]
            try:
                spaces = spaces_of(environment, observation_dim=sizes[0], action_dim=sizes[1])
                bounds = (spaces.action_low.numpy(), spaces.action_high.numpy())
            except SimulatorError as error:
                environment, note = None, str(error)
        if config.dataset.normalised_actions and bounds is not None:
            bounds = (-np.ones_like(bounds[0]), np.ones_like(bounds[1]))
        kept = options.get("keep_timeouts", False)
        report = describe_log(log, bounds=bounds, keep_timeouts=kept, max_episode_steps=limit)
    report["environment"] = None if environment is None else environment.name
    report["note"] = note or None
    if environment is not None and environment.scores_data and environment.references is not None:
        report["normalised_score"] = {
            name: environment.score(report["returns"][name]) for name in ("minimum", "mean", "median", "maximum")
        }
    return report


def _spaces(environment: EnvironmentSpec | None, transitions: TensorDict) -> Spaces:
    observation_dim, action = transitions["observation"].shape[1], transitions["action"]
    discrete = action.ndim == 1
    if environment is None:
        if discrete:
            return Spaces.discrete(observation_dim, int(action.max()) + 1)
        return Spaces(observation_dim, *action_bounds(transitions))
    spaces = spaces_of(environment, observation_dim=observation_dim, action_dim=None if discrete else action.shape[1])
    if spaces.num_actions is not None and action.max() >= spaces.num_actions:
        raise DatasetError(
            f"action {int(action.max())} in transition {int(action.argmax())} is none of {environment.name}'s actions, "
            f"0 to {spaces.num_actions - 1}; name the environment that the data come from."
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
    training = data.training  # which all seeds share
    losses, buffers = [], []
    for seed in seeds_of(config):
        seed_everything(seed)
        options = {"batch_size": algorithm.batch_size, "replacement": algorithm.replacement}
        buffers.append(make_buffer(training, **options, seed=seed, device=training.device or "cpu"))
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


_OF_STORAGE = ("storage", "storage_folder")
_NOT_OF_A_SOURCE = ("validation_fraction", "normalised_actions")


def _title(config: DictConfig) -> str:
    """Such as ``IQL on hopper-medium-v2``."""
    dataset = config.dataset
    name = dataset.get("name") or Path(str(dataset.get("path", "the embedded Hopper-v5 replay"))).name
    kind = "Behaviour cloning" if config.algorithm.temperature == 0 else "IQL"
    return f"{kind} on {name}"
