"""Composing and checking the recipes' configuration, with errors that name the option."""

from __future__ import annotations

import argparse
import functools
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iql_torchrl import rlinf
from iql_torchrl.errors import ConfigurationError, UserError, first_line
from iql_torchrl.suggestions import nearest

GROUPS = ("dataset", "algorithm", "logger")
_DOMAINS = {
    "antmaze": {"antmaze"},
    "kitchen_adroit": {"kitchen", "pen", "door", "hammer", "relocate"},
}
Result = TypeVar("Result")


def report_errors(function: Callable[..., Result]) -> Callable[..., Result]:
    """Print a user's error as one clear message and exit with status 2, without a traceback."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Result:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapper


def check_command_line(arguments: Sequence[str], config_dir: Path, config_name: str) -> list[str]:
    """Compose once before Hydra does, so that a mistake gets a clear error in place of Hydra's.

    Returns:
        the arguments for Hydra, which does not know that ``rlinf=FILE`` names a dataset, and what its options are.

    Raises:
        ConfigurationError: an option, group or value that does not exist, with the nearest match.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-name", "-cn", default=config_name)
    named, others = parser.parse_known_args(arguments)
    overrides = [argument for argument in others if not argument.startswith("-")]
    known = [path.stem for path in config_dir.glob("*.yaml")]
    if named.config_name.removesuffix(".yaml") not in known:
        raise ConfigurationError(f"unknown --config-name {named.config_name}{nearest(named.config_name, known)}")
    with hydra.initialize_config_dir(str(config_dir), version_base="1.3"):
        config = compose(named.config_name, [_first_of_sweep(override) for override in _parse(overrides)], quiet=True)
    if config.get("rlinf") is None or any(override.key_or_group == "dataset" for override in _parse(overrides)):
        return list(arguments)
    first = list(arguments).index(overrides[0])
    return [*arguments[:first], f"dataset={config.dataset.source}", *arguments[first:]]


def compose(config_name: str, overrides: Sequence[str], *, quiet: bool = False) -> DictConfig:
    """The checked configuration, inside an initialised Hydra.

    Precedence: an override on the command line, then a file of RLinf, then the variant, then the preset. The preset is
    picked from the dataset's name where no ``algorithm=`` is given.

    Raises:
        ConfigurationError: an option that does not exist, or a value out of range.
    """
    parsed = _parse(overrides)
    given = {override.key_or_group for override in parsed}
    imported, ignored = {}, []
    for override in parsed:
        if override.key_or_group == "rlinf" and override.value() is not None:
            imported, ignored = rlinf.read_overrides(str(override.value()))
    for override in parsed:
        if override.key_or_group == "dataset" and imported.pop("dataset", None) != override.value():
            # Another source, which may lack the options of the file's own.
            imported = {key: value for key, value in imported.items() if not key.startswith("dataset.")}
    overrides = [*rlinf.as_overrides(imported), *overrides]
    config = _compose(config_name, overrides)
    if "algorithm" not in config:
        check(config)
        return config
    preset = [] if "algorithm" in given else [f"algorithm={preset_for(_dataset_label(config))}"]
    variant = f"variant/{config.algorithm.variant}"
    loader = GlobalHydra.instance().config_loader()
    known = loader.get_group_options("variant")
    if config.algorithm.variant not in known:
        raise ConfigurationError(
            f"unknown algorithm.variant={config.algorithm.variant}{nearest(config.algorithm.variant, known)}"
        )
    settings = OmegaConf.to_container(hydra.compose(variant).variant)
    assert isinstance(settings, dict)
    settings |= settings.pop("by_dataset", {}).get(_dataset_label(config), {})
    of_variant = [f"algorithm.{key}={'null' if value is None else value}" for key, value in settings.items()]
    config = _compose(config_name, [*preset, *of_variant, *overrides])
    config.algorithm.discount = config.algorithm.gamma = _discount(config.algorithm, given)
    check(config)
    if ignored and not quiet:
        print(f"rlinf={config.rlinf}: keys without meaning here: {', '.join(ignored)}")
    return config


def _discount(algorithm: DictConfig, given: set[str]) -> float:
    """``discount`` and ``gamma`` name the same thing: the one on the command line, else ``gamma`` where it is set."""
    discount, gamma = algorithm.discount, algorithm.gamma
    if {"algorithm.discount", "algorithm.gamma"} <= given and gamma is not None and gamma != discount:
        raise ConfigurationError(
            f"algorithm.discount={discount} and algorithm.gamma={gamma} name the same thing and differ; give one "
            "of them."
        )
    return discount if gamma is None or "algorithm.discount" in given else gamma


def preset_for(dataset: str) -> str:
    """The preset of a dataset's domain: ``antmaze``, ``kitchen_adroit``, else ``locomotion``."""
    words = set(re.split(r"[^a-z0-9]+", dataset.lower()))
    for preset, tasks in _DOMAINS.items():
        if words & tasks:
            return preset
    return "locomotion"


def check(config: DictConfig) -> None:
    """Refuse values that make no sense.

    Raises:
        ConfigurationError: naming the key, the value found and what was expected.
    """
    try:
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        example = {
            "dataset.path": "dataset.path=FILE",
            "dataset.name": "dataset.name=halfcheetah-medium-v2",
            "checkpoint": "checkpoint=FILE",
        }
        raise ConfigurationError(f"option {key} is needed; give {example.get(key or '', f'{key}=VALUE')}.") from error
    for key, (kinds, condition, expected) in _CHECKS.items():
        name, _, leaf = key.rpartition(".")
        section = OmegaConf.select(config, name) if name else config
        if not isinstance(section, DictConfig) or leaf not in section:
            continue  # not an option of this recipe
        value = section[leaf]
        if isinstance(value, ListConfig):
            value = list(value)
        # bool is an int to Python, but batch_size=true is a mistake
        wrong_kind = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if wrong_kind or not condition(value):
            raise ConfigurationError(f"{key} must be {expected}, got {value!r}.")
    if "seed" in config.get("train", {}):  # a dataset may set the steps of recipes that train
        if config.train.seed + config.train.num_seeds > 2**32:
            raise ConfigurationError("train.seed + train.num_seeds must not exceed 2^32.")
        at_once = config.train.updates_per_call
        for key in ("train.steps", "train.log_interval", "eval.interval", "checkpoint.interval"):
            value = OmegaConf.select(config, key)
            if value % at_once:
                raise ConfigurationError(f"{key} must be a multiple of train.updates_per_call={at_once}, got {value}.")


_NONE = type(None)
_NUMBER = (int, float)
_COUNT = ((int,), lambda value: value >= 1, "an integer >= 1")
_RATE = (_NUMBER, lambda value: 0 <= value < math.inf, "a finite number >= 0")
_SEED = ((int,), lambda value: 0 <= value < 2**32, "an integer in [0, 2^32)")
_FLAG = ((bool,), lambda value: True, "true or false")


_WIDTHS = (
    (list,),
    lambda value: bool(value) and all(isinstance(width, int) and width >= 1 for width in value),
    "a list of positive widths such as [256,256]",
)


def _one_of(*options: Any) -> tuple[tuple[type, ...], Callable[[Any], bool], str]:
    kinds = tuple({type(option) for option in options})
    return kinds, lambda value: value in options, "one of " + ", ".join(_as_typed(option) for option in options)


def _as_typed(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, str(value))


def _is_step_limit(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


_CHECKS: dict[str, tuple[tuple[type, ...], Callable[[Any], bool], str]] = {
    "algorithm.loss_type": _one_of("offline_iql"),
    "algorithm.batch_size": _COUNT,
    "algorithm.actor_lr": _RATE,
    "algorithm.value_lr": _RATE,
    "algorithm.critic_lr": _RATE,
    "algorithm.hidden_dims": _WIDTHS,
    "algorithm.discount": (_NUMBER, lambda value: 0 <= value <= 1, "a number in [0, 1]"),
    "algorithm.tau": (_NUMBER, lambda value: 0 < value <= 1, "a number in (0, 1]"),
    "algorithm.expectile": (_NUMBER, lambda value: 0 < value <= 1, "a number in (0, 1]"),
    "algorithm.temperature": _RATE,
    "algorithm.max_weight": (_NUMBER, lambda value: value > 0, "a number > 0"),
    "algorithm.delay_value": _FLAG,
    "algorithm.num_qvalue_nets": _COUNT,
    "algorithm.dropout_rate": ((*_NUMBER, _NONE), lambda value: value is None or 0 <= value < 1, "null or in [0, 1)"),
    "algorithm.layer_norm": _FLAG,
    "algorithm.opt_decay_schedule": _one_of("cosine", None),
    "algorithm.reward_transform": _one_of("none", "return_range", "minus_one"),
    "algorithm.normalise_observations": _FLAG,
    "algorithm.update_order": _one_of("sequential", "joint"),
    "algorithm.qvalue_reduction": _one_of("sum", "mean"),
    "algorithm.policy": _one_of("tanh_mean_normal", "tanh_normal", "normal", "deterministic"),
    "algorithm.standard_deviation": _one_of("state_independent", "state_dependent", "biased_softplus"),
    "algorithm.log_std_bounds": (
        (list,),
        lambda value: len(value) == 2 and all(isinstance(bound, _NUMBER) for bound in value) and value[0] < value[1],
        "two ordered numbers such as [-5,2]",
    ),
    "algorithm.extra_actor_layer": _FLAG,
    "algorithm.initialisation": _one_of("orthogonal", "default"),
    "algorithm.action_clip": (_NUMBER, lambda value: 0 <= value < 1, "a number in [0, 1)"),
    "algorithm.replacement": _FLAG,
    "dataset.validation_fraction": (
        (*_NUMBER, _NONE),
        lambda value: value is None or 0 <= value < 1,
        "null or a number in [0, 1)",
    ),
    "dataset.normalised_actions": _FLAG,
    "dataset.path": ((str,), bool, "a file or folder"),
    "dataset.name": ((str,), bool, "the name of a dataset"),
    "dataset.root": ((str, _NONE), lambda value: value != "", "a folder, or null"),
    "dataset.url": ((str, _NONE), lambda value: value != "", "an address (http, https or file), or null"),
    "dataset.keep_timeouts": _FLAG,
    "dataset.download": _FLAG,
    "dataset.rebuild": _FLAG,
    "dataset.max_episode_steps": (
        (int, _NONE),
        lambda value: value is None or value >= 1,
        "null or an integer >= 1",
    ),
    "dataset.storage": _one_of("memory", "memmap", "device"),
    "dataset.storage_folder": ((str, _NONE), lambda value: True, "a folder, or null"),
    "env.kwargs": (
        (DictConfig, _NONE),
        lambda value: _is_step_limit((value or {}).get("max_episode_steps")),
        "a mapping such as {max_episode_steps:500}, that one an integer >= 1",
    ),
    "env.name": ((str, _NONE), lambda value: True, "a Gymnasium id, auto or null"),
    "train.steps": _COUNT,
    "train.seed": _SEED,
    "train.device": ((str,), lambda value: True, "auto, cpu or cuda"),
    "train.compile": _one_of("auto", True, False),
    "train.num_seeds": _COUNT,
    "train.cudagraphs": _one_of("auto", True, False),
    "train.updates_per_call": _COUNT,
    "train.precision": _one_of("float32", "tf32", "bfloat16"),
    "train.log_interval": _COUNT,
    "eval.interval": _COUNT,
    "eval.episodes": _COUNT,
    "checkpoint.interval": _COUNT,
    "checkpoint.keep": _COUNT,
    "logger.kind": _one_of("csv", "wandb", "tensorboard"),
    "output": ((str,), bool, "the name of a file or folder"),
    "episodes": _COUNT,
    "seed": _SEED,
    "batch_size": _COUNT,
    "hidden_dims": _WIDTHS,
    "observation_dim": _COUNT,
    "action_dim": _COUNT,
    "transitions": _COUNT,
    "seeds": _COUNT,
    "updates_per_call": _COUNT,
    "compile": _FLAG,
    "precision": _one_of("float32", "tf32", "bfloat16", "float64"),
    "storages": (
        (list,),
        lambda value: bool(value) and set(value) <= {"memory", "memmap"},
        "a list of memory and memmap",
    ),
    "folder": ((str, _NONE), lambda value: True, "a folder, or null"),
    "rounds": _COUNT,
    "steps_per_round": _COUNT,
    "warm_up": _COUNT,
    "rlinf": ((str, _NONE), lambda value: True, "a configuration file of RLinf, or null"),
    "env.dataset_type": _one_of("d4rl"),
    "env.train.env_type": _one_of("d4rl"),
    "actor.worker_cls": _one_of("iql"),
    "resume": ((str, _NONE), lambda value: True, "a checkpoint file, auto or null"),
}


def _dataset_label(config: DictConfig) -> str:
    """What names the task: all of a dataset's name (``D4RL/door/human-v2``), the last part of a path."""
    dataset = config.dataset
    if "name" in dataset and not OmegaConf.is_missing(dataset, "name"):
        return str(dataset.name)
    if "path" in dataset and not OmegaConf.is_missing(dataset, "path"):
        return Path(str(dataset.path)).name
    return dataset.source


def _compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    try:
        return hydra.compose(config_name, list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise _explained(config_name, overrides, error) from error


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigurationError(f"an option must have the form key=value; {first_line(error)}") from error


def _first_of_sweep(override: Override) -> str:
    if not override.is_sweep_override():
        return override.input_line or ""
    return f"{override.key_or_group}={next(iter(override.sweep_string_iterator()))}"


def _explained(config_name: str, overrides: Sequence[str], error: Exception) -> ConfigurationError:
    """Which override Hydra stumbled over, and what was probably meant."""
    loader = GlobalHydra.instance().config_loader()
    for override in _parse(overrides):
        key = override.key_or_group
        if key in GROUPS:
            known = [option for option in loader.get_group_options(key) if not option.startswith("_")]
            if override.value() not in known:
                return ConfigurationError(f"unknown {key}={override.value()}{nearest(str(override.value()), known)}")
    selected = [line for line in overrides if line.split("=")[0] in GROUPS]
    known_keys = _leaf_keys(hydra.compose(config_name, selected))
    for override in _parse(overrides):
        key = override.key_or_group
        if key not in known_keys and key not in GROUPS and not key.startswith("hydra"):
            return ConfigurationError(f"unknown option {key}{nearest(key, known_keys)}")
    return ConfigurationError(first_line(error))


def _leaf_keys(config: DictConfig, prefix: str = "") -> set[str]:
    keys = set()
    for key in config:
        name = f"{prefix}{key}"
        node = None if OmegaConf.is_missing(config, key) else config._get_node(key)
        keys |= _leaf_keys(node, f"{name}.") if isinstance(node, DictConfig) else {name}
    return keys
