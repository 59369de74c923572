"""Why scores do not compare as they stand: data of another set's name, of another environment or version of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

from iql_torchrl.data.sources.source import Namesake, Source
from iql_torchrl.environments.scores import normalised_score, reference_returns
from iql_torchrl.environments.simulators import step_limit
from iql_torchrl.environments.specification import EnvironmentSpec, task_of
from iql_torchrl.errors import UserError

_Told = TypeVar("_Told")

# What a version of Gymnasium's environments changed in dynamics, rewards and observations, by their documentation.
_BINDINGS = "version 4 simulates by MuJoCo's own bindings in place of mujoco-py"
_HEALTHY = "version 5 no longer pays the healthy reward in a step that ends unhealthy"
_CHANGES = {
    "Hopper": {4: _BINDINGS, 5: _HEALTHY},
    "HalfCheetah": {4: _BINDINGS},
    "Walker2d": {4: _BINDINGS, 5: f"{_HEALTHY} and has the same friction at both feet"},
    "Ant": {4: _BINDINGS, 5: f"{_HEALTHY}, always subtracts the contact cost, and observes fewer contact forces"},
}
# In which version 5 has other dynamics, or pays otherwise in every step.
_OTHER_IN_V5 = ("Walker2d", "Ant")
# Arguments of gymnasium.make that change neither dynamics nor rewards, or on which D4RL's references say nothing.
_HARMLESS = re.compile("^render|camera|^(width|height)$|^(include|exclude)_|^use_contact_forces$")


@dataclass(frozen=True)
class Remark:
    """One reason: ``mark`` for a title, ``sentence`` with the figures."""

    mark: str
    sentence: str


def with_marks(name: str, remarks: Sequence[Remark]) -> str:
    """A title that says which scores these are."""
    return f"{name} ({'; '.join(remark.mark for remark in remarks)})" if remarks else name


def remarks_on(source: Source, environment: EnvironmentSpec | None, mean_return: float) -> list[Remark]:
    """What keeps scores on a dataset from being compared with others of its name or of its environment.

    Args:
        source: of the data.
        environment: of the evaluation.
        mean_return: of the data's episodes.
    """
    recorded, found = _told(source.recorded_in), []
    if source.namesake is not None:
        found.append(_of_namesake(source.title, source.namesake, recorded, environment, mean_return))
    if environment is None:
        return found
    if recorded is not None and (changes := changes_between(recorded, environment.name)):
        sentence = (
            f"{source.title} holds data of {recorded} and is evaluated in {environment.name}: {changes}. "
            f"{_returns(mean_return, source.d4rl_name)}"
        )
        found.append(Remark(f"{recorded} data in {environment.name}", sentence))
    if changed := _changed_arguments(source, environment):
        found.append(_of_arguments(environment, changed))
    return found


def published_name(source: Source, environment: EnvironmentSpec | None) -> str | None:
    """D4RL's name of the data, where they are evaluated as D4RL's data of that name are without further options."""
    if source.d4rl_name is None or environment is None:
        return None
    own = own_environment(source)
    same = own is not None and own.name == environment.name and not _changed_arguments(source, environment)
    return source.d4rl_name if same else None


def own_environment(source: Source) -> EnvironmentSpec | None:
    """The environment that the data come from, where they tell one that can be had."""
    found = _told(source.environment)
    return None if found is None else found[0]


def _told(ask: Callable[[], _Told]) -> _Told | None:
    """What a source tells; nothing where that is damaged or refused, which does not matter to who names another."""
    try:
        return ask()
    except UserError:
        return None


def scored_beside(own: EnvironmentSpec | None, chosen: EnvironmentSpec) -> EnvironmentSpec:
    """A chosen environment; without a normalised score where it is another task than the data's own."""
    if own is None or task_of(own.name) == task_of(chosen.name):
        return chosen
    note = f"not comparable: the data are of {own.name}, which is another task than {chosen.name}"
    if chosen.references is None and chosen.note:  # which says why no score of its own is
        note = chosen.note
    return replace(chosen, references=None, scores_data=False, note=note)


def changes_between(name: str, other: str) -> str:
    """What differs between two environments, by their Gymnasium ids, and what that means; empty where nothing does."""
    task, versions = task_of(name), sorted(_version(one) for one in (name, other))
    if task != task_of(other):
        return "another task, so that neither its returns nor a normalised score compare with the data's"
    if task not in _CHANGES:
        return "" if versions[0] == versions[1] else "versions may differ in dynamics, rewards and observations"
    changes = {version: one for version, one in _CHANGES[task].items() if versions[0] < version <= versions[1]}
    if not changes:
        return ""
    meaning = "scores do not compare" if 5 in changes and task in _OTHER_IN_V5 else "scores are close, not the same"
    return f"{'; '.join(changes.values())}; {meaning}"


def _version(name: str) -> int:
    found = re.search(r"-v(\d+)$", name)
    return int(found[1]) if found else 0


def _of_namesake(
    title: str, namesake: Namesake, recorded: str | None, environment: EnvironmentSpec | None, mean_return: float
) -> Remark:
    mark = f"{namesake.owner}'s, not D4RL's {namesake.name}"
    where = f"recorded in {recorded or 'an environment that it does not name'}"
    by = ""
    if environment is not None:
        where += f" and evaluated in {environment.name}"
        references = environment.references
        if references is not None and references != reference_returns(namesake.name):
            by = f" Normalised scores are by the set's own references, {references[0]:,.1f} and {references[1]:,.1f}."
    sentence = (
        f"{title} is {mark}: {where}, D4RL's recorded in {namesake.recorded_in}. "
        f"{_returns(mean_return, namesake.name)} Scores do not compare with those published on D4RL's.{by}"
    )
    return Remark(mark, sentence)


def _returns(mean_return: float, d4rl_name: str | None) -> str:
    """The data's mean return, and beside it that of D4RL's set, as far as it is known."""
    known = None if d4rl_name is None else _d4rl_returns().get(d4rl_name)
    if known is None or d4rl_name is None:
        return f"Its episodes return {mean_return:,.1f} on average."
    ours, theirs = (normalised_score(d4rl_name, one) for one in (mean_return, known))
    return (
        f"Its episodes return {mean_return:,.1f} on average, those of D4RL's {d4rl_name} {known:,.1f} ({ours:.1f} and "
        f"{theirs:.1f} as D4RL's normalised scores)."
    )


@cache
def _d4rl_returns() -> dict[str, float]:
    content = json.loads((files("iql_torchrl.data") / "d4rl_returns.json").read_text())
    return {one["name"]: one["mean_return"] for one in content["sets"]}


def _changed_arguments(source: Source, environment: EnvironmentSpec) -> dict[str, Any]:
    """Arguments that make an environment another one than its references, or its data, are of."""
    own = own_environment(source)
    of_data = own is not None and own.name == environment.name
    if environment.references is None and not of_data:
        return {}  # nothing that it is to be compared with
    plain = EnvironmentSpec.of(environment.name)
    by_d4rl = task_of(environment.name) in _CHANGES and environment.references == plain.references
    expected = own if own is not None and of_data and not by_d4rl else plain
    changed = {
        key: value
        for key, value in environment.kwargs.items()
        if key != "max_episode_steps" and not _HARMLESS.search(key) and expected.kwargs.get(key) != value
    }
    limit = step_limit(environment)
    return changed | ({} if limit == step_limit(expected) else {"max_episode_steps": limit})


def _of_arguments(environment: EnvironmentSpec, changed: Mapping[str, Any]) -> Remark:
    short = [f"{key}={value}" if isinstance(value, int | float) else f"another {key}" for key, value in changed.items()]
    of = "data" if environment.references is None else "data and of the references of the normalised score"
    sentence = (
        f"{environment.name} is evaluated with {', '.join(f'{key}={value}' for key, value in changed.items())}, other "
        f"than the environment of the {of}: scores do not compare with others in {environment.name}."
    )
    return Remark(f"with {', '.join(short)}", sentence)
