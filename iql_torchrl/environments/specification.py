"""An environment for evaluation: how it is made, how its observations are laid out, whether scores are comparable."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from iql_torchrl.environments.scores import normalised_score, reference_returns
from iql_torchrl.errors import SimulatorError

_ANTMAZE_NOTE = (
    "not comparable: gymnasium-robotics' AntMaze has another gear, time step, maze origin and goals than D4RL's; the "
    "return is that of this environment"
)
_MAZE2D_NOTE = (
    "not comparable: gymnasium-robotics' PointMaze has another origin, other goals and starts than D4RL's Maze2D; the "
    "return is that of this environment"
)
_HAND_NOTE = (
    "up to a point above D4RL's: gymnasium-robotics' -v1 environment rewards the distance from hand to object, which "
    "D4RL's punishes"
)
_KITCHEN_NOTE = "of the tasks completed, of four"
_KITCHEN_DATA_NOTE = (
    "the data's own rewards count in every step the tasks that are done, so that their returns are of another kind"
)
# OGBench's environments, by the first word of their ids.
OGBENCH = re.compile("(visual-)?(pointmaze|antmaze|humanoidmaze|antsoccer|cube|scene|puzzle|powderworld)-[a-z0-9-]*v0")
_OGBENCH_NOTE = "of the episodes, by the environment's own flag, as OGBench counts them"
# The score's name, by what it is of.
_LABELS = {"return": "normalised score", "success": "success in percent"}


@dataclass(frozen=True)
class EnvironmentSpec:
    """An environment as it is made for evaluation.

    Args:
        name: Gymnasium id.
        kwargs: of ``gymnasium.make``.
        layout: of the observations: ``"flat"`` lays out all parts by their names; ``"goal_first"`` is achieved goal
            and observation of a dict, ``"observation"`` the observation alone; ``"d4rl_kitchen"`` is D4RL's of Kitchen.
        references: random and expert return, the 0 and 100 of the normalised score; ``None`` where none is comparable.
        note: why not, or how far.
        scores_data: whether the data's returns and the environment's are of one kind.
        scored_by: what the references are of: the return, or the share of the episodes that succeed.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    layout: str = "flat"
    references: tuple[float, float] | None = None
    note: str = ""
    scores_data: bool = True
    scored_by: Literal["return", "success"] = "return"

    @classmethod
    def of(cls, name: str, kwargs: Mapping[str, Any] | None = None) -> EnvironmentSpec:
        """Of a Gymnasium id, with D4RL's references where the environment is D4RL's, or nearly so.

        OGBench's are scored by their success, in percent.
        """
        if OGBENCH.fullmatch(name):
            return cls(
                name,
                dict(kwargs or {}),
                references=(0.0, 1.0),
                note=_OGBENCH_NOTE,
                scores_data=False,
                scored_by="success",
            )
        options = {"use_contact_forces": True} if name == "Ant-v4" else {}  # D4RL's 111 dimensions
        references, note = reference_returns(name), ""
        if re.match("AdroitHand(Door|Hammer|Relocate)-v1", name):
            note = _HAND_NOTE
        elif re.match("AntMaze_", name):
            note = _ANTMAZE_NOTE
        elif re.match("PointMaze_", name):
            note = _MAZE2D_NOTE
        spec = cls(name, {**options, **(kwargs or {})}, references=references, note=note)
        return score_of_kitchen(spec) if name.startswith("FrankaKitchen") else spec

    @classmethod
    def from_state(cls, state: str | Mapping[str, Any]) -> EnvironmentSpec:
        """Of a checkpoint: ``dataclasses.asdict``, or a Gymnasium id alone.

        Raises:
            SimulatorError: an id that names a module to import.
        """
        spec = cls.of(state) if isinstance(state, str) else cls(**state)
        return replace(spec, name=registered_id(spec.name, "the checkpoint"))

    def with_kwargs(self, kwargs: Mapping[str, Any]) -> EnvironmentSpec:
        """The same with other arguments of ``gymnasium.make``."""
        if not kwargs:
            return self
        spec = replace(self, kwargs={**self.kwargs, **kwargs})
        return score_of_kitchen(spec) if self.name.startswith("FrankaKitchen") else spec

    @property
    def family(self) -> str:
        """What versions and mazes of one environment share: ``AntMaze`` of ``AntMaze_UMaze-v4``."""
        return re.split("[-_]", self.name)[0]

    @property
    def score_label(self) -> str:
        """Name of what :meth:`score` gives."""
        return _LABELS[self.scored_by]

    @property
    def reference_returns(self) -> tuple[float, float] | None:
        """The references where they are returns."""
        return self.references if self.scored_by == "return" else None

    def score(self, mean: float) -> float | None:
        """100 * (mean - random) / (expert - random), or ``None`` where no score is comparable.

        Args:
            mean: over the episodes, of what ``scored_by`` says: undiscounted returns, or successes, 1 or 0.
        """
        return None if self.references is None else normalised_score(self.references, mean)


def task_of(name: str) -> str:
    """A Gymnasium id without its module and version: ``Hopper`` of ``Hopper-v4``."""
    return re.sub(r"-v\d+$", "", name.rpartition(":")[2])


def registered_id(name: str, origin: str) -> str:
    """An environment's id that comes from a file, which must not make this process import what it names.

    Raises:
        SimulatorError: ``module:id``.
    """
    if ":" in name:
        raise SimulatorError(
            f"{origin} names the environment {name}, whose first part is a module to import, which is not done for a "
            "file; set env.name=ID, or env.name=null to train without."
        )
    return name


def score_of_kitchen(spec: EnvironmentSpec) -> EnvironmentSpec:
    """D4RL's score where an episode's return is the number of tasks completed, of four."""
    tasks = spec.kwargs.get("tasks_to_complete", ())
    if len(tasks) == 4 and spec.kwargs.get("remove_task_when_completed", True):
        note = _KITCHEN_NOTE if spec.scores_data else f"{_KITCHEN_NOTE}; {_KITCHEN_DATA_NOTE}"
        return replace(spec, references=reference_returns("kitchen-complete-v0"), note=note)
    note = "not comparable: D4RL's is of four tasks, each of which pays once"
    return replace(spec, references=None, note=note)
