"""The declared options for a reader: ``--help``, and rows of the tables in the documentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from iql_torchrl.configuration.composing import CONFIGS, compose_values, group_options, initialised, named_config
from iql_torchrl.configuration.declaring import (
    Options,
    as_typed,
    declared_defaults,
    expected_of,
    group_name,
    groups_of,
    member_for,
    source_of,
)

# The default of an option that must be given.
NEEDED = "(needed)"


@dataclass(frozen=True)
class Described:
    """An option as a reader sees it."""

    name: str
    default: str
    expected: str
    about: str
    source: str


def described(options: type[Options], values: Mapping[str, Any], prefix: str = "") -> Iterator[Described]:
    """The options that a composed configuration has, or that a user must give.

    Args:
        options: the declarations.
        values: the configuration.
        prefix: of the names.
    """
    for name, field in options.model_fields.items():
        value = values.get(name, NEEDED)
        groups = groups_of(field)
        if groups and isinstance(value, Mapping):
            group = groups[0] if len(groups) == 1 else member_for(options, name, value)
            if group is not None:
                yield from described(group, value, f"{prefix}{name}.")
        elif field.description and (name in values or field.is_required()):
            yield _described(f"{prefix}{name}", field, value)


def help_text(config_name: str, options: type[Options], arguments: Sequence[str]) -> str:
    """Every option with default, range and description, for the groups that the arguments choose and all sources.

    Raises:
        ConfigurationError: mistakes among the arguments.
    """
    name, overrides = named_config(arguments, config_name)
    with initialised():
        values, _ = compose_values(name, overrides, options, sweeps=True, needed=False)
        groups = {
            group: group_options(group) for group in ("dataset", "algorithm", "logger") if group in options.model_fields
        }
        found = list(described(options, values))
    known = {one.name for one in found}
    of_sources: dict[str, list[Described]] = {}
    for source in groups_of(options.model_fields["dataset"]) if "dataset" in groups else []:
        if group_name(source) not in groups["dataset"]:
            continue  # for programs alone
        # As declared; a test holds the files of configs/dataset to the same.
        more = described(source, declared_defaults(source), "dataset.")
        of_sources[group_name(source)] = [one for one in more if one.name not in known]
    lines = [*_first_comment(name), "Options are given as key=value; of several, -m runs one after the other."]
    lines += [f"  {group}={'|'.join(names)}" for group, names in groups.items()]
    lines += ["", *_entries(found)]
    for source, rest in of_sources.items():
        if rest:
            lines += ["", f"With dataset={source} also:", *_entries(rest)]
    return "\n".join(lines)


def _described(name: str, field: FieldInfo, value: Any) -> Described:
    default = value if value is NEEDED else as_typed(value)
    return Described(name, default, expected_of(field), field.description or "", source_of(field))


def _entries(found: Sequence[Described]) -> Iterator[str]:
    for one in found:
        value = f"={one.default}" if one.default is not NEEDED else f" {NEEDED}"
        yield f"{one.name}{value}  ({one.expected})"
        source = f" [{one.source}]" if one.source else ""
        yield f"    {one.about[0].upper()}{one.about[1:]}.{source}"


def _first_comment(config_name: str) -> list[str]:
    path = Path(CONFIGS) / f"{config_name.removesuffix('.yaml')}.yaml"
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("# "))
    return lines
