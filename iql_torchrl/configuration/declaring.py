"""What an option is: its type and range, a description and where it comes from, each said once.

The same declaration refuses a value on the command line and as an argument of the library, prints ``--help``, and is a
row of the tables in the documentation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from iql_torchrl.errors import ConfigurationError, UserError
from iql_torchrl.suggestions import nearest

_CONFIG = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)


class Options(BaseModel):
    """A group of declared options; as an object, their checked values."""

    model_config = _CONFIG


def option(
    about: str,
    *,
    source: str = "",
    expected: str = "",
    example: str = "",
    learnt: bool = True,
    **limits: Any,
) -> Any:
    """Declare an option of an :class:`Options`.

    Args:
        about: a description of one line.
        source: in the paper, or in another code base.
        expected: what a value must be, where type and limits do not say it.
        example: a value for the error that one is needed.
        learnt: whether what is learnt depends on it, so that a run is not resumed with another value unasked.
        **limits: of pydantic's ``Field``: ``gt``, ``ge``, ``lt``, ``le``, ``allow_inf_nan``, ``default``.
    """
    extra: dict[str, Any] = {"source": source, "expected": expected, "example": example, "learnt": learnt}
    return Field(description=about, json_schema_extra=extra, **limits)


def declared_defaults(options: type[Options]) -> dict[str, Any]:
    """The values of the options of a group that a user need not give."""
    return {name: field.default for name, field in options.model_fields.items() if not field.is_required()}


def declared_names(options: type[Options], prefix: str = "") -> list[str]:
    """The full names of all options of a group and of the groups in it, in the order of their declaration."""
    names = []
    for name, field in options.model_fields.items():
        groups = groups_of(field)
        for group in groups:
            names += declared_names(group, f"{prefix}{name}.")
        if not groups:
            names.append(f"{prefix}{name}")
    return list(dict.fromkeys(names))


def declaration(options: type[Options], name: str) -> FieldInfo | None:
    """The declaration behind a full name such as ``algorithm.expectile``, or ``None``."""
    first, _, rest = name.partition(".")
    field = options.model_fields.get(first)
    if field is None or not rest:
        return field
    found = (declaration(group, rest) for group in groups_of(field))
    return next((one for one in found if one is not None), None)


def source_of(field: FieldInfo) -> str:
    """Where an option comes from, in the paper or in another code base; empty where that is not said."""
    return _extra(field)["source"]


def is_learnt(field: FieldInfo) -> bool:
    """Whether what a run learns depends on an option."""
    return _extra(field)["learnt"]


def expected_of(field: FieldInfo, *, python: bool = False) -> str:
    """What a value must be: ``a number in (0, 1]``, ``one of sum, mean``, ``null or an integer >= 1``.

    Args:
        field: the declaration.
        python: spell ``None`` and ``True`` as Python does and not as YAML does.
    """
    text = _extra(field)["expected"]
    if not text:
        return _described(field.annotation, field.metadata, python)
    return text.replace("null", "None") if python else text


def check_arguments(options: type[Options], **values: Any) -> None:
    """Check arguments of the library against the declarations of the options that they are.

    Args:
        options: the group.
        **values: by the names of the options in it.

    Raises:
        ValueError: naming the argument, what it must be and what was found.
    """
    for name, value in values.items():
        check_argument(options, name, value)


def check_argument(options: type[Options], name: str, value: Any, argument: str = "") -> None:
    """Check one argument, which has another name than its option where ``argument`` is given.

    Raises:
        ValueError: as :func:`check_arguments`.
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = list(value)
    try:
        _adapter(options, name).validate_python(value)
    except ValidationError:
        expected = expected_of(options.model_fields[name], python=True)
        found = f"got {value!r}{_meant(options.model_fields[name], value)}"
        raise ValueError(f"{argument or name} must be {expected}, {found}") from None


def read_options(options: type[Options], values: Mapping[str, Any], prefix: str = "") -> Any:
    """Checked values of a group.

    Args:
        options: the group.
        values: plain mappings, lists and scalars.
        prefix: of the options' names in errors.

    Raises:
        ConfigurationError: with all that is wrong.
    """
    mistakes = find_mistakes(options, values, prefix)
    if mistakes:
        raise ConfigurationError(*mistakes)
    return options.model_validate(values)


def without_missing(values: Any) -> Any:
    """Values without those that are ``???``: a user must give them."""
    if isinstance(values, Mapping):
        return {key: without_missing(value) for key, value in values.items() if value != "???"}
    return values


def member_for(options: type[Options], name: str, values: Mapping[str, Any]) -> type[Options] | None:
    """Of the groups that may stand in one place, the one that its first value names."""
    groups = groups_of(options.model_fields[name])
    return next((group for group in groups if values.get(next(iter(group.model_fields))) == group_name(group)), None)


def find_mistakes(options: type[Options], values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What is wrong with values, a message each: option, value found, what was expected."""
    try:
        options.model_validate(values)
    except ValidationError as error:
        messages = [_message(options, values, prefix, dict(one)) for one in error.errors(include_url=False)]
        return list(dict.fromkeys(messages))
    return []


def _message(options: type[Options], values: Mapping[str, Any], prefix: str, error: dict[str, Any]) -> str:
    names, value, group = [], values, options
    field: FieldInfo | None = None
    for part in error["loc"]:
        if not isinstance(value, Mapping) or (field is not None and not groups_of(field)):
            break
        if field is not None and part not in value and _is_group_name(field, part):
            group = next(one for one in groups_of(field) if group_name(one) == part)
            continue  # the member of a union, which is no part of the option's name
        if field is not None and len(groups := groups_of(field)) == 1:
            group = groups[0]
        names.append(str(part))
        field = group.model_fields.get(str(part))
        value = value.get(str(part), _ABSENT)
    key = f"{prefix}{'.'.join(names)}"
    if error["type"] == "extra_forbidden" and field is None:
        return f"unknown option {key}{nearest(key, (prefix + name for name in declared_names(options)))}"
    needed = value is _ABSENT
    if error["type"] == "value_error" and not needed and isinstance(error["ctx"].get("error"), UserError):
        return str(error["ctx"]["error"])
    if field is None:
        return f"{key or 'the configuration'}: {error['msg']}"
    if needed:
        return f"option {key} is needed; give {key}={_extra(field)['example'] or 'VALUE'}."
    if isinstance(value, Mapping) and groups_of(field):
        return f"{key}: {error['msg']}"
    return f"{key} must be {expected_of(field)}, got {value!r}{_meant(field, value)}"


_ABSENT: Any = object()
_UNDECLARED = {"source": "", "expected": "", "example": "", "learnt": True}


def group_name(group: type[Options]) -> str:
    """What tells a group from the others that may stand in its place: the only value of its first option."""
    first = next(iter(group.model_fields.values()), None)
    values = get_args(first.annotation) if first is not None and get_origin(first.annotation) is Literal else ()
    return str(values[0]) if len(values) == 1 else ""


def _is_group_name(field: FieldInfo, part: Any) -> bool:
    return part in [group_name(group) for group in groups_of(field)]


def groups_of(field: FieldInfo) -> list[type[Options]]:
    """The groups of options that a field may hold: none for a value, several for a union of them."""
    return _groups_in(field.annotation)


def _choices(field: FieldInfo) -> tuple[Any, ...]:
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def _meant(field: FieldInfo, value: Any) -> str:
    """The end of an error: the nearest of several choices, where one is near."""
    near = nearest(value, [one for one in _choices(field) if isinstance(one, str)]) if isinstance(value, str) else "."
    return near if near.startswith("; did you mean") else "."


def _groups_in(annotation: Any) -> list[type[Options]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Options) else []
    return [group for part in get_args(annotation) for group in _groups_in(part)]


def _extra(field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra
    return extra if isinstance(extra, dict) and "expected" in extra else dict(_UNDECLARED)


@functools.cache
def _adapter(options: type[Options], name: str) -> TypeAdapter[Any]:
    field = options.model_fields[name]
    annotation: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return TypeAdapter(annotation, config=ConfigDict(strict=True, arbitrary_types_allowed=True))


def _described(annotation: Any, metadata: Sequence[Any], python: bool) -> str:
    spell: Callable[[Any], str] = str if python else as_typed
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _described(inner, [*metadata, *more], python)
    if origin is Literal:
        return "one of " + ", ".join(spell(value) for value in get_args(annotation))
    parts = get_args(annotation)
    if NoneType in parts:
        (inner,) = (part for part in parts if part is not NoneType)
        return f"{spell(None)} or {_described(inner, metadata, python)}"
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        return _number(annotation, metadata)
    if annotation is str:
        return "a text"
    raise TypeError(f"declare what is expected of {annotation}")


def _number(kind: type, metadata: Sequence[Any]) -> str:
    limits: dict[str, Any] = {}
    for one in metadata:
        for name in ("gt", "ge", "lt", "le", "allow_inf_nan"):
            if getattr(one, name, None) is not None:
                limits[name] = getattr(one, name)
    text = "an integer" if kind is int else "a number" if limits.get("allow_inf_nan", True) else "a finite number"
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    if low is not None and high is not None:
        opening, closing = "[" if "ge" in limits else "(", "]" if "le" in limits else ")"
        return f"{text} in {opening}{_short(low)}, {_short(high)}{closing}"
    if low is not None:
        return f"{text} {'>=' if 'ge' in limits else '>'} {_short(low)}"
    if high is not None:
        return f"{text} {'<=' if 'le' in limits else '<'} {_short(high)}"
    return text


def _short(value: float) -> str:
    power = math.log2(value) if value > 0 else 0.0
    return f"2^{power:.0f}" if value >= 2**20 and power.is_integer() else f"{value:g}"


def as_typed(value: Any) -> str:
    """A value as one types it on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(as_typed, value))}]"
    return {None: "null", True: "true", False: "false"}[value] if isinstance(value, bool | None) else str(value)
