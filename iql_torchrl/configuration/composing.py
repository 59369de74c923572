"""Composing a recipe's configuration with Hydra, and all its mistakes at once."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra import version
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iql_torchrl.configuration import resuming, rlinf
from iql_torchrl.configuration.declaring import (
    Options,
    as_typed,
    declaration,
    find_mistakes,
    member_for,
    without_missing,
)
from iql_torchrl.errors import ConfigurationError, UserError, first_line
from iql_torchrl.suggestions import nearest

_PACKAGE = Path(__file__).parents[1]
# In the wheel, or in the clone beside the package.
CONFIGS = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())
_GROUPS = ("dataset", "algorithm", "logger")
_GROUPS_OF_HYDRA = ("hydra/launcher", "hydra/sweeper")
_OF_EXTRA = ("ray", "submitit_local", "submitit_slurm", "optuna")
_SECTIONS = ("train", "eval", "checkpoint")
_DOMAINS = {
    "antmaze": {"antmaze"},
    "kitchen_adroit": {"kitchen", "pen", "door", "hammer", "relocate"},
}


@contextmanager
def initialised() -> Iterator[None]:
    """Hydra over ``configs/``, also inside a program that uses Hydra for itself, which finds it again as it was."""
    hydra_before, base_before = GlobalHydra.instance().hydra, version.getbase()
    name_before = JobRuntime.instance().get("name")
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = hydra_before
        version.VersionBase.instance().version_base = base_before
        JobRuntime.instance().set("name", name_before)


def as_override(name: str, value: Any) -> str:
    """A plain value of an option in the grammar of Hydra's command line.

    Raises:
        TypeError: another value.
    """
    return f"{name}={_spelt(value)}"


def _spelt(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_spelt(one)}" for key, one in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(map(_spelt, value)) + "]"
    if isinstance(value, str):
        without_interpolation = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
        return QuotedString(without_interpolation, Quote.double).with_quotes()
    if value is None or isinstance(value, bool):
        return as_typed(value)
    if isinstance(value, int | float):
        return repr(value)
    raise TypeError(f"{value!r} is no plain value")


def check_command_line(arguments: Sequence[str], config_name: str, options: type[Options]) -> list[str]:
    """Compose once before Hydra does, so that mistakes get clear errors in place of Hydra's.

    Args:
        arguments: of the program.
        config_name: where ``--config-name`` names no other.
        options: what the recipe can be told.

    Returns:
        the arguments for Hydra, which does not know that ``rlinf=FILE`` names a dataset, and what its options are.

    Raises:
        ConfigurationError: options, groups or values that do not exist, with the nearest match, or out of range.
    """
    name, overrides = named_config(arguments, config_name)
    if declaration(options, "checkpoint.start") is not None:
        arguments, overrides = _started_by_path(list(arguments)), _started_by_path(overrides)
    if not {"-m", "--multirun"} & {*arguments}:
        _refuse_several_values(overrides)
    arguments, overrides = _resumed_by_folder(list(arguments), overrides)
    chosen = {_key(override): override for override in _parse(overrides)[0]}
    folder = chosen["run_dir"].value() if "run_dir" in chosen and not chosen["run_dir"].is_sweep_override() else None
    with initialised():
        found = compose(
            name, overrides, options, folder=None if folder is None else Path(str(folder)), quiet=True, sweeps=True
        )
    if hasattr(found, "run_dir"):
        _refuse_unwritable(Path(found.run_dir))
    source = getattr(getattr(found, "dataset", None), "source", None)
    if source is None or "dataset" in chosen or not overrides:
        return arguments
    first = arguments.index(overrides[0])
    return [*arguments[:first], f"dataset={source}", *arguments[first:]]


def _refuse_several_values(overrides: Sequence[str]) -> None:
    for override in _parse(overrides)[0]:
        if override.is_sweep_override():
            raise ConfigurationError(
                f"{override.input_line} gives several values: -m makes a run of each; quote one value with a comma in "
                f"it: '{_key(override)}=\"...\"'."
            )


def _refuse_unwritable(folder: Path) -> None:
    """Refuse a run folder that Hydra, which makes it, would fail to make with a traceback."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ConfigurationError(f"run_dir={folder} cannot be written: {existing} is not a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"run_dir={folder} cannot be written: {existing} is read-only, or may not be written by this user; name "
            "another run_dir."
        )


def _resumed_by_folder(arguments: list[str], overrides: list[str]) -> tuple[list[str], list[str]]:
    """``resume=FOLDER`` is ``resume=auto run_dir=FOLDER``."""
    for override in _parse(overrides)[0]:
        value = override.value() if _key(override) == "resume" and not override.is_sweep_override() else None
        if not isinstance(value, str) or value == "auto" or not Path(value).expanduser().is_dir():
            continue
        folder = Path(value).expanduser()
        for other in _parse(overrides)[0]:
            if _key(other) == "run_dir" and Path(str(other.value())).expanduser().resolve() != folder.resolve():
                raise ConfigurationError(
                    f"resume={value} goes on in that folder, but run_dir={other.value()} is another; give one of them."
                )
        line = override.input_line or ""
        rest = [one for one in overrides if _key(_parse([one])[0][0]) != "run_dir" and one != line]
        rest = [*rest, "resume=auto", f"run_dir={folder}"]
        return [*[one for one in arguments if one not in overrides], *rest], rest
    return arguments, overrides


def _started_by_path(arguments: Sequence[str]) -> list[str]:
    """``checkpoint=PATH`` is ``checkpoint.start=PATH`` where ``checkpoint`` is a section."""
    return [f"checkpoint.start={one[11:]}" if one.startswith("checkpoint=") else one for one in arguments]


def compose(
    config_name: str,
    overrides: Sequence[str],
    options: type[Options],
    *,
    dataset: Any = None,
    folder: Path | None = None,
    quiet: bool = False,
    sweeps: bool = False,
) -> Any:
    """The checked options of a recipe, inside an initialised Hydra.

    Precedence: an override on the command line, then a file of RLinf, then the variant, then the preset. The preset is
    picked from the dataset's name where no ``algorithm=`` is given.

    Args:
        config_name: a file in ``configs/``.
        overrides: ``key=value``.
        options: what the recipe can be told.
        dataset: a source, in place of one that the configuration names.
        folder: of the run: with ``resume=auto``, the configuration in it is the base.
        quiet: do not print what is changed of that, and which keys of RLinf's file have no meaning here.
        sweeps: take the first value of each sweep.

    Returns:
        an object of ``options``.

    Raises:
        ConfigurationError: with all that is wrong.
    """
    base = None
    if declaration(options, "checkpoint.start") is not None:
        overrides = _started_by_path(overrides)
    resumed = {_key(override): override for override in _parse(overrides)[0]}.get("resume")
    if folder is not None and resumed is not None and not resumed.is_sweep_override() and resumed.value() == "auto":
        base = resuming.configuration_in(folder.expanduser())
        foreign = sorted({*(base or {})} - {*options.model_fields})
        if foreign:
            raise ConfigurationError(
                f"the run in {folder} is of another recipe, with options that {config_name} does not have "
                f"({', '.join(foreign)}): go on with that one, or name another run_dir."
            )
    config, ignored = compose_values(config_name, overrides, options, dataset=dataset, base=base, sweeps=sweeps)
    found = options.model_validate(config)
    if base is not None:
        lines, learnt = resuming.changes(options, base, config)
        if learnt and not getattr(found, resuming.FLAG):
            raise ConfigurationError(
                f"resume=auto goes on with the configuration in {folder}, and what is learnt depends on "
                f"{', '.join(learnt)} ({'; '.join(lines)}); leave that out, or give {resuming.FLAG}=true."
            )
        if lines and not quiet:
            print(f"resumed with changes: {'; '.join(lines)}")
    if ignored and not quiet:
        print(f"rlinf={config['rlinf']}: keys without meaning here: {', '.join(ignored)}")
    return found


def compose_values(
    config_name: str,
    overrides: Sequence[str],
    options: type[Options],
    *,
    dataset: Any = None,
    base: dict[str, Any] | None = None,
    sweeps: bool = False,
    needed: bool = True,
) -> tuple[dict[str, Any], list[str]]:
    """The plain values behind :func:`compose`, and the keys of RLinf's file that have no meaning here.

    Args:
        config_name, overrides, options, dataset, sweeps: as for :func:`compose`.
        base: values that hold where the overrides name nothing else.
        needed: whether values that a user must give have to be there.

    Raises:
        ConfigurationError: with all that is wrong.
    """
    parsed, mistakes = _parse(overrides)
    of_base: list[str] = []
    start = None if base is not None else _start(parsed)
    if start is not None:
        base = resuming.started_from(start, needed="dataset" not in {_key(override) for override in parsed})
    if base is not None:
        chosen = {_key(override) for override in parsed}
        if base["dataset"].get("source") not in group_options("dataset") and "dataset" not in chosen:
            raise ConfigurationError(
                "that run was trained on data that a program held; go on with it there: train(..., resume=True)."
            )
        groups = {"dataset": base["dataset"].get("source"), "logger": (base.get("logger") or {}).get("kind")}
        of_base = [f"{group}={name}" for group, name in groups.items() if name and group not in chosen]
        parsed = [*_parse(of_base)[0], *parsed]
    lines = [_first_of_sweep(override) if sweeps else override.input_line or "" for override in parsed]
    lines, parsed, unknown = _without_unknown(config_name, lines, parsed)
    mistakes += unknown
    given = {_key(override) for override in parsed}
    try:
        imported, ignored = _of_rlinf(parsed)
    except ConfigurationError as error:
        imported, ignored = {}, []
        mistakes += error.mistakes
    try:
        lines = [*(as_override(name, value) for name, value in imported.items()), *lines]
        config = _compose(config_name, lines)
        if "algorithm" in config:
            source = _source(config, options) if dataset is None else dataset
            config = _with_preset_and_variant(config_name, config, lines, given, source)
    except ConfigurationError as error:
        raise ConfigurationError(*mistakes, *error.mistakes) from error
    try:
        values: Any = without_missing(OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigurationError(*mistakes, _unresolved(config, error)) from error
    if base is not None:
        named = {*given, *imported} - {one.partition("=")[0] for one in of_base}
        if start is not None or "online.protocol" in named:
            named |= {line.partition("=")[0] for line in _of_protocol(config)}
        values = resuming.merged(base, values, named, _settings_of(values["algorithm"]["variant"]))
    if dataset is not None:
        values["dataset"] = dataset
    # A dataset's and a preset's files set steps and episodes too, which only recipes that train have.
    values = {key: value for key, value in values.items() if key in options.model_fields or key not in _SECTIONS}
    found = find_mistakes(options, values)
    mistakes += found if needed else [one for one in found if " is needed; give " not in one]
    if mistakes:
        raise ConfigurationError(*mistakes)
    return values, ignored


def preset_for(dataset: str) -> str:
    """The preset of a dataset's domain: ``antmaze``, ``kitchen_adroit``, else ``locomotion``."""
    words = set(re.split(r"[^a-z0-9]+", dataset.lower()))
    for preset, tasks in _DOMAINS.items():
        if words & tasks:
            return preset
    return "locomotion"


def group_options(group: str) -> list[str]:
    """The files of a group in ``configs/`` that can be chosen, inside an initialised Hydra."""
    found = GlobalHydra.instance().config_loader().get_group_options(group)
    return [option for option in found if not option.startswith("_")]


def named_config(arguments: Sequence[str], config_name: str) -> tuple[str, list[str]]:
    """The configuration that ``--config-name`` chooses, and the overrides among the arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-name", "-cn", default=config_name)
    named, others = parser.parse_known_args(arguments)
    known = [path.stem for path in CONFIGS.glob("*.yaml")]
    if named.config_name.removesuffix(".yaml") not in known:
        raise ConfigurationError(f"unknown --config-name {named.config_name}{nearest(named.config_name, known)}")
    return named.config_name, [argument for argument in others if not argument.startswith("-")]


def _with_preset_and_variant(
    config_name: str, config: DictConfig, lines: Sequence[str], given: set[str], source: Any
) -> DictConfig:
    label = "" if source is None else source.label
    preset = preset_for(label) if source is None or source.preset is None else source.preset
    chosen = [] if "algorithm" in given else [f"algorithm={preset}"]
    variant = config.algorithm.variant
    known = group_options("variant")
    if variant not in known:
        raise ConfigurationError(f"unknown algorithm.variant={variant}{nearest(variant, known)}")
    settings = _settings_of(variant)
    settings |= settings.pop("by_dataset", {}).get(label, {})
    of_task = _of_task([*chosen, *lines], label)
    of_variant = [f"algorithm.{key}={'null' if value is None else value}" for key, value in settings.items()]
    config = _compose(config_name, [*chosen, *of_task, *of_variant, *_of_protocol(config), *lines])
    config.algorithm.discount = config.algorithm.gamma = _discount(config.algorithm, given)
    return config


def _of_task(lines: Sequence[str], dataset: str) -> list[str]:
    """What the chosen preset leaves to the task, the longest beginning of the dataset's name, as overrides."""
    presets = [line.partition("=")[2] for line in lines if line.startswith("algorithm=")]
    by_task: Any = OmegaConf.to_container(hydra.compose("algorithm/_by_task").algorithm)
    tasks = by_task.get(presets[-1], {}) if presets else {}
    task = max((task for task in tasks if dataset.startswith(f"{task}-")), key=len, default=None)
    return [as_override(f"algorithm.{key}", value) for key, value in tasks.get(task, {}).items()]


def _settings_of(variant: str) -> dict[str, Any]:
    """The options ``algorithm.*`` that a variant sets."""
    settings: Any = OmegaConf.to_container(hydra.compose(f"variant/{variant}").variant)
    return settings


def _of_protocol(config: DictConfig) -> list[str]:
    """The options that a protocol of the online phase sets, as overrides."""
    if "online" not in config:
        return []
    protocol, known = config.online.protocol, group_options("protocol")
    if protocol not in known:
        raise ConfigurationError(f"unknown online.protocol={protocol}{nearest(protocol, known)}")
    found: Any = OmegaConf.to_container(hydra.compose(f"protocol/{protocol}").protocol)
    return [as_override(f"{section}.{key}", value) for section, one in found.items() for key, value in one.items()]


def _start(parsed: Iterable[Override]) -> str | None:
    """What ``checkpoint.start`` names."""
    given = [one for one in parsed if _key(one) == "checkpoint.start" and not one.is_sweep_override()]
    return str(given[-1].value()) if given and given[-1].value() is not None else None


def _source(config: DictConfig, options: type[Options]) -> Any:
    """The dataset as an object; ``None`` where its options are wrong, which is said later."""
    try:
        values: Any = without_missing(OmegaConf.to_container(config.dataset, resolve=True))
        kind = member_for(options, "dataset", values)
        return None if kind is None else kind.model_validate(values)
    except (OmegaConfBaseException, ValueError):
        return None


def _discount(algorithm: DictConfig, given: set[str]) -> float:
    """``discount`` and ``gamma`` name the same thing: the one on the command line, else ``gamma`` where it is set."""
    discount, gamma = algorithm.discount, algorithm.gamma
    if {"algorithm.discount", "algorithm.gamma"} <= given and gamma is not None and gamma != discount:
        raise ConfigurationError(
            f"algorithm.discount={discount} and algorithm.gamma={gamma} name the same thing and differ; give one "
            "of them."
        )
    return discount if gamma is None or "algorithm.discount" in given else gamma


def _of_rlinf(parsed: Iterable[Override]) -> tuple[dict[str, Any], list[str]]:
    """The options of the file that ``rlinf=`` names, and its keys without meaning here."""
    imported, ignored = {}, []
    for override in parsed:
        if _key(override) == "rlinf" and override.value() is not None:
            imported, ignored = rlinf.read_overrides(str(override.value()))
    for override in parsed:
        if _key(override) == "dataset" and imported.pop("dataset", None) != override.value():
            # Another source, which may lack the options of the file's own.
            imported = {key: value for key, value in imported.items() if not key.startswith("dataset.")}
    return imported, ignored


def _compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    try:
        return hydra.compose(config_name, list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(first_line(error)) from error


def _parse(overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    """The overrides, and what is wrong with those that cannot be parsed."""
    parsed, mistakes = [], []
    for override in overrides:
        try:
            parsed += OverridesParser.create().parse_overrides([override])
        except HydraException as error:
            mistakes.append(f"an option must have the form key=value; {first_line(error)}")
    return parsed, mistakes


def _key(override: Override) -> str:
    return override.key_or_group


def _first_of_sweep(override: Override) -> str:
    if not override.is_sweep_override():
        return override.input_line or ""
    value = override.value()
    first = value.start if isinstance(value, IntervalSweep) else next(iter(override.sweep_string_iterator()))
    return f"{override.key_or_group}={first}"


def _without_unknown(
    config_name: str, lines: Sequence[str], parsed: Sequence[Override]
) -> tuple[list[str], list[Override], list[str]]:
    """The overrides whose option or group exists, and messages for the others, with the nearest match."""
    mistakes, rest, chosen, wrong_groups = [], [], [], []
    for line, override in zip(lines, parsed, strict=True):
        key, value = _key(override), line.partition("=")[2].strip("'\"")
        if (key in _GROUPS or key in _GROUPS_OF_HYDRA) and not override.is_delete():
            known = group_options(key)
            if known and value not in known:
                missing = value in _OF_EXTRA
                hint = "; install what it needs: pip install 'iql_torchrl[sweep]'" if missing else nearest(value, known)
                mistakes.append(f"unknown {key}={value}{hint}")
                wrong_groups.append(key)
                continue
            chosen.append(line)
        rest.append((line, override))
    from_rlinf = [] if any(line.startswith("dataset=") for line in chosen) else _dataset_of_rlinf(parsed)
    known_keys = _leaf_keys(_compose(config_name, [*from_rlinf, *chosen]))
    kept = []
    for line, override in rest:
        key = _key(override)
        if key.split(".")[0] in wrong_groups:
            continue  # what it may have is not known
        free = line in chosen or key.startswith("hydra") or override.is_add() or override.is_delete()
        if free or _is_known(key, known_keys):
            kept.append((line, override))
        else:
            mistakes.append(f"unknown option {key}{nearest(key, known_keys)}")
    return [line for line, _ in kept], [override for _, override in kept], mistakes


def _dataset_of_rlinf(parsed: Sequence[Override]) -> list[str]:
    try:
        found = _of_rlinf(parsed)[0]
    except UserError:
        return []  # which is said later
    return [f"dataset={found['dataset']}"] if "dataset" in found else []


def _is_known(key: str, known: set[str]) -> bool:
    """A leaf, a section as a whole, or an entry of a free mapping."""
    return key in known or any(one.startswith(f"{key}.") or key.startswith(f"{one}.") for one in known)


def _leaf_keys(config: DictConfig, prefix: str = "") -> set[str]:
    keys = set()
    for key in config:
        name = f"{prefix}{key}"
        node = None if OmegaConf.is_missing(config, key) else config._get_node(key)
        section = isinstance(node, DictConfig) and not node._is_none()
        keys |= _leaf_keys(node, f"{name}.") if section else {name}  # type: ignore[arg-type]
    return keys


def _unresolved(config: DictConfig, error: OmegaConfBaseException) -> str:
    return f"{getattr(error, 'full_key', None) or 'the configuration'}: {first_line(error)}"
