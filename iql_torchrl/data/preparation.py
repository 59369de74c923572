"""A source prepared for training: loaded, checked, rescaled, transformed and split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.utils import NestedKey
from torch import Tensor

from iql_torchrl.configuration.options import AlgorithmOptions, EnvironmentOptions
from iql_torchrl.data.actions import action_bounds, normalise_actions
from iql_torchrl.data.buffer import split_episodes
from iql_torchrl.data.comparability import (
    Remark,
    own_environment,
    published_name,
    remarks_on,
    scored_beside,
    with_marks,
)
from iql_torchrl.data.normalisation import ObservationNormaliser
from iql_torchrl.data.outliers import Outliers, far_from_references, outliers_of, sentence, sentence_on_returns
from iql_torchrl.data.rewards import transform_rewards
from iql_torchrl.data.sources.source import Source
from iql_torchrl.data.storage import allocator
from iql_torchrl.data.transitions import (
    as_array,
    episode_lengths,
    episode_returns,
    episode_starts,
    fingerprint,
    transitions_from_log,
)
from iql_torchrl.environments.simulators import Spaces, spaces_of, step_limit
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import ConfigurationError, DatasetError

# Of so many dimensions the bounds are named.
_NAMED = 4


@dataclass(frozen=True)
class PreparedData:
    """Transitions ready for training, and what evaluation needs to know of them.

    ``returns`` and ``lengths`` are those of all episodes, held-out ones included, over their transitions.
    ``warnings`` are a sentence each: why scores do not compare, what is suspicious in the data, and what was taken for
    lack of better knowledge. ``remarks`` are the first of these, with their marks. ``published_name`` is D4RL's name of
    the data, where scores published on it stand beside these.
    """

    name: str
    training: TensorDict
    validation: TensorDict | None
    environment: EnvironmentSpec | None
    spaces: Spaces
    normaliser: ObservationNormaliser | None
    returns: np.ndarray
    lengths: np.ndarray
    fingerprint: str
    note: str
    warnings: tuple[str, ...] = ()
    reward_transform: tuple[float, float] = (1.0, 0.0)
    action_clip: float = 0.0
    remarks: tuple[Remark, ...] = ()
    published_name: str | None = None

    def transformed(
        self, observation: Tensor, action: Tensor, reward: Tensor, next_observation: Tensor
    ) -> dict[NestedKey, Tensor]:
        """Further transitions made what the dataset's were made for training; the dataset's statistics stay.

        Args:
            observation, next_observation: ``[N, O]``, as the environment gives them.
            action: ``[N, A]``, in the environment's bounds.
            reward: ``[N, 1]``, as the environment gives it.
        """
        scale, shift = self.reward_transform
        # A dict, and no TensorDict: this is done for every step of an environment.
        found: dict[NestedKey, Tensor] = {
            "observation": observation.clone(),
            "action": action.clone(),
            ("next", "observation"): next_observation.clone(),
            ("next", "reward"): reward * scale + shift,
        }
        normalise_actions(found, self.spaces.action_low, self.spaces.action_high, clip=self.action_clip)
        if self.normaliser is not None:
            self.normaliser.apply_(found)
        return found

    @property
    def title(self) -> str:
        """Name of the data, and why scores on them do not compare."""
        return with_marks(self.name, self.remarks)

    @property
    def score_label(self) -> str:
        """Name of the score of an evaluation."""
        environment = self.environment
        return "return" if environment is None or environment.references is None else environment.score_label

    def score(self, episode_return: float) -> float:
        """The normalised score of the data's returns where there is one, else the return itself."""
        score = self.environment.score(episode_return) if self.environment else None
        return episode_return if score is None else score

    @property
    def data_score(self) -> float | None:
        """Mean score of the data's episodes; ``None`` where their returns are of another kind than the evaluation's."""
        if self.environment is not None and not self.environment.scores_data:
            return None
        return self.score(float(self.returns.mean()))

    def description(self) -> str:
        """One line on the data, for the terminal."""
        mean = "" if self.data_score is None else f", mean {self.score_label} {self.data_score:.1f}"
        where = "no environment" if self.environment is None else self.environment.name
        size = f"{len(self.training):,} transitions, {len(self.returns):,} episodes"
        return f"{self.title}: {size}{mean}; evaluated in {where}"


def environment_of(source: Source, chosen: EnvironmentOptions) -> tuple[EnvironmentSpec | None, str]:
    """The environment of the evaluation, and a note on its scores, or why there is none.

    Args:
        source: of the data, which tells its own for ``auto``.
        chosen: the options ``env``.

    Raises:
        ConfigurationError: bounds of the actions beside an environment, which has its own.
    """
    if chosen.name is None:
        return None, ""
    if chosen.name == "auto":
        spec, reason = source.environment()
        if spec is None:
            return None, f"no environment: {reason}"
    else:
        spec = scored_beside(own_environment(source), source.environment_named(chosen.name))
    if source.action_low is not None:
        raise ConfigurationError(
            "dataset.action_low and dataset.action_high are for data without a simulator: the bounds here are those of "
            f"{spec.name}. Leave them out, or set env.name=null."
        )
    spec = spec.with_kwargs(chosen.kwargs or {})
    return spec, f"{spec.score_label} {spec.note}" if spec.note else ""


def prepare_data(
    source: Source,
    algorithm: AlgorithmOptions,
    chosen: EnvironmentOptions,
    device: torch.device | str = "cpu",
) -> PreparedData:
    """Load, check, transform and split a dataset.

    Args:
        source: of the data, with the options of its preparation.
        algorithm: whose transforms are done.
        chosen: the options ``env``.
        device: where the training data go with ``dataset.storage=device``.

    Raises:
        DatasetError, SimulatorError, ConfigurationError: as the parts do.
    """
    environment, note = environment_of(source, chosen)
    limit = None if environment is None else step_limit(environment)
    allocate = allocator(source.storage, source.storage_folder)
    with source.open(allocate) as log:
        transitions = transitions_from_log(log, max_episode_steps=limit, allocate=allocate)
    digest = fingerprint(transitions)
    returns, lengths = episode_returns(transitions), episode_lengths(transitions)

    spaces = _spaces(environment, source, transitions)
    outlying = _outliers(transitions)
    remarks = remarks_on(source, environment, float(returns.mean()))
    warnings = [remark.sentence for remark in remarks]
    warnings += [sentence(kind, found, len(transitions), "transition") for kind, found in outlying.items()]
    warnings += _far_returns(environment, transitions, returns)
    told = source.action_low is not None or source.normalised_actions
    if environment is None and spaces.num_actions is None and not told:
        warnings.append(_taken_bounds(spaces, outlying.get("action")))
    if spaces.num_actions is None:
        low, high = spaces.action_low, spaces.action_high
        if source.normalised_actions:
            low, high = -torch.ones_like(low), torch.ones_like(high)
        normalise_actions(transitions, low, high, clip=algorithm.action_clip)
    elif source.normalised_actions:
        raise ConfigurationError("dataset.normalised_actions=true is for continuous actions; the data's are discrete.")
    scale_and_shift = transform_rewards(transitions, algorithm.reward_transform)

    fraction = source.validation_fraction
    if fraction is None:
        fraction = 0.1 if environment is None else 0.0
    training, validation = transitions, None
    if fraction:
        training, validation = split_episodes(transitions, fraction, allocate=allocate)
    del transitions
    normaliser = None
    if algorithm.normalise_observations:
        normaliser = ObservationNormaliser.fit(training)
        for part in (training, validation):
            if part is not None:
                normaliser.apply_(part)
    if source.storage == "device":
        training = training.to(device)
    name = f"{'Behaviour cloning' if algorithm.temperature == 0 else 'IQL'} on {source.title}"
    return PreparedData(
        name,
        training,
        validation,
        environment,
        spaces,
        normaliser,
        returns,
        lengths,
        digest,
        note,
        tuple(warnings),
        scale_and_shift,
        algorithm.action_clip,
        tuple(remarks),
        published_name(source, environment),
    )


def _spaces(environment: EnvironmentSpec | None, source: Source, transitions: TensorDict) -> Spaces:
    observation_dim, action = transitions["observation"].shape[1], transitions["action"]
    discrete = action.ndim == 1
    if environment is None:
        if discrete:
            if source.action_low is not None:
                raise ConfigurationError(
                    "dataset.action_low and dataset.action_high are for continuous actions; the data's are discrete."
                )
            return Spaces.discrete(observation_dim, int(action.max()) + 1)
        given = source.action_bounds(action.shape[1])
        if given is not None:
            return Spaces(observation_dim, torch.from_numpy(given[0]), torch.from_numpy(given[1]))
        return Spaces(observation_dim, *action_bounds(transitions))
    spaces = spaces_of(environment, observation_dim=observation_dim, action_dim=None if discrete else action.shape[1])
    if spaces.num_actions is not None and action.max() >= spaces.num_actions:
        raise DatasetError(
            f"action {int(action.max())} in transition {int(action.argmax())} is none of {environment.name}'s actions, "
            f"0 to {spaces.num_actions - 1}; name the environment that the data come from."
        )
    return spaces


def _outliers(transitions: TensorDict) -> dict[str, list[Outliers]]:
    """What :func:`outliers_of` finds in rewards, observations and continuous actions, by their kind."""
    keys: dict[str, NestedKey] = {"reward": ("next", "reward"), "observation": "observation", "action": "action"}
    columns = {kind: as_array(transitions, key) for kind, key in keys.items()}
    # Actions of one dimension are discrete.
    found = {kind: outliers_of(kind, column) for kind, column in columns.items() if column.ndim > 1}
    return {kind: outliers for kind, outliers in found.items() if outliers}


def _far_returns(environment: EnvironmentSpec | None, transitions: TensorDict, returns: np.ndarray) -> Iterator[str]:
    if environment is None or not environment.scores_data:
        return
    far = far_from_references(returns, environment.score)
    if len(far):
        start = int(episode_starts(transitions)[far[0]])
        yield sentence_on_returns(far, returns, environment.score, start, "transition")


def _taken_bounds(spaces: Spaces, outlying: Sequence[Outliers] | None) -> str:
    """What was taken for the bounds of the actions, where nothing tells them; ``outlying`` are among the actions."""
    low, high = spaces.action_low.tolist(), spaces.action_high.tolist()
    options = "dataset.action_low and dataset.action_high"
    if all(bound == -1 for bound in low) and all(bound == 1 for bound in high):
        return f"action bounds, which no simulator tells: [-1, 1], where the data's actions lie; else set {options}"
    named = ", ".join(f"[{one:.4g}, {other:.4g}]" for one, other in list(zip(low, high, strict=True))[:_NAMED])
    stretched = ""
    if outlying:
        first = min(outlying, key=lambda one: one.rows[0])
        stretched = f" ({first.values[0]:g} in transition {first.rows[0]}, dimension {first.dimension}, is an outlier)"
    return (
        f"action bounds, which no simulator tells: each dimension's range in the data, {named}"
        f"{', ...' if len(low) > _NAMED else ''}{stretched}; set {options}"
    )
