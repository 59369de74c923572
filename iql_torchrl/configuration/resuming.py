"""A run that goes on: the configuration in its folder is the base, and what the command line changes is told."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from iql_torchrl.configuration.declaring import Options, as_typed, declaration, is_learnt
from iql_torchrl.errors import ConfigurationError, first_line

FLAG = "resume_with_changes"
# What tells the files of a group apart in a configuration.
_GROUPS = {"dataset": "source", "logger": "kind"}
_OF_THE_COMMAND = {"resume", "run_dir", FLAG}


def configuration_in(folder: Path) -> dict[str, Any] | None:
    """The content of ``config.yaml`` in a run folder, ``None`` where there is none.

    Raises:
        ConfigurationError: a file that is no configuration.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    try:
        found = yaml.safe_load(path.read_text())
        if not isinstance(found, dict) or not isinstance(found.get("dataset"), dict):
            raise ValueError("it holds no options of a run")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(
            f"{path}, with which the run would go on, cannot be read ({first_line(error)}); restore it, or delete it "
            "and give all options on the command line."
        ) from error
    return found


def started_from(path: str, *, needed: bool = True) -> dict[str, Any] | None:
    """Dataset, algorithm and environment of the run whose folder or checkpoint another one starts from.

    Args:
        path: of the folder or file.
        needed: whether it must be in a run folder; networks of other code bases are not, though their own
            ``config.yaml`` may lie beside them.

    Raises:
        ConfigurationError: nothing is there, or no run where one is needed.
    """
    place = Path(path).expanduser()
    there = os.path.lexists(place)
    for folder in (place, *list(place.absolute().parents)[:3]) if there else ():  # checkpoints/seed-0/step-00030000.pt
        try:
            found = configuration_in(folder)
        except ConfigurationError:
            if needed:
                raise
            found = None
        if found is not None:
            return {key: found[key] for key in ("dataset", "algorithm", "env")}
    if there and not needed:
        return None
    what = "has no config.yaml of a run, neither in it nor around it" if there else "does not exist"
    hint = "; for networks of CORL, JAX or TorchRL give dataset=... too" if there else ""
    raise ConfigurationError(f"checkpoint={path} {what}; name a run folder, or a checkpoint in one{hint}.")


def merged(
    base: Mapping[str, Any], composed: Mapping[str, Any], given: Collection[str], of_variant: Collection[str]
) -> dict[str, Any]:
    """The base, with what the command line names taken from what it composes to.

    Args:
        base: of the run folder.
        composed: of the command line by itself.
        given: the options and groups that it names.
        of_variant: the options ``algorithm.*`` that a variant sets.
    """
    values = copy.deepcopy(dict(base))
    _fill(values, composed)
    # A group that is what it was changes nothing.
    names = {name for name in given if name not in _GROUPS or _chosen(base, name) != _chosen(composed, name)}
    if {"algorithm.discount", "algorithm.gamma"} & names:
        names |= {"algorithm.discount", "algorithm.gamma"}
    if "algorithm.variant" in names:
        names |= {f"algorithm.{name}" for name in of_variant}
    for name in names:
        *sections, last = name.split(".")
        source: Any = composed
        target: Any = values
        for section in sections:
            if not isinstance(source.get(section), dict):
                last = section  # an entry of a free mapping, which is taken as a whole
                break
            source, target = source[section], target.setdefault(section, {})
        if last in source:
            target[last] = copy.deepcopy(source[last])
    return values


def changes(options: type[Options], base: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What differs from the base, as text, and the names of those of which what is learnt depends."""
    lines, learnt = [], []
    before, after = dict(_leaves(options, base)), dict(_leaves(options, values))
    for name, value in after.items():
        if name.split(".")[0] in _OF_THE_COMMAND or name not in before or before[name] == value:
            continue
        lines.append(f"{name} {as_typed(before[name])} -> {as_typed(value)}")
        field = declaration(options, name)
        if field is None or is_learnt(field):
            learnt.append(name)
    return lines, learnt


def _chosen(values: Mapping[str, Any], group: str) -> Any:
    return values.get(group, {}).get(_GROUPS[group])


def _leaves(options: type[Options], values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        field = declaration(options, name)
        if isinstance(value, Mapping) and (field is None or not field.description):
            yield from _leaves(options, value, f"{name}.")
        else:
            yield name, value


def _fill(values: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Options that are newer than the base."""
    for key, value in defaults.items():
        if key not in values:
            values[key] = copy.deepcopy(value)
            continue
        both = isinstance(value, Mapping) and isinstance(values[key], dict)
        if both and value.get("source") == values[key].get("source"):  # another source's options are not this one's
            _fill(values[key], value)
