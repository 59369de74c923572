"""RLinf's IQL configuration files, as overrides of this project's options.

Two kinds exist: the keys of RLinf's documentation page (``algorithm.batch_size``, ``env.train.env_name``, ...), and
those of the files in its repository (``data.task_name``, ``actor.optim.lr``, ``runner.max_steps``, ...). Both are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iql_torchrl.atomic import NotAFile, regular_file
from iql_torchrl.errors import ConfigurationError, first_line

_ALGORITHM = (
    *("loss_type", "batch_size", "actor_lr", "value_lr", "critic_lr", "hidden_dims", "discount", "tau", "expectile"),
    *("temperature", "gamma", "dropout_rate", "opt_decay_schedule"),
)

# Later entries win: the repository's files leave the documentation's learning rates unused.
_OPTIONS = {
    **{f"algorithm.{key}": f"algorithm.{key}" for key in _ALGORITHM},
    "actor.optim.lr": "algorithm.actor_lr",
    "actor.critic_optim.lr": "algorithm.critic_lr",
    "actor.value_optim.lr": "algorithm.value_lr",
    "actor.global_batch_size": "algorithm.batch_size",
    "actor.model.iql_config.hidden_dims": "algorithm.hidden_dims",
    "actor.model.iql_config.dropout_rate": "algorithm.dropout_rate",
    "data.seed": "train.seed",
    "actor.seed": "train.seed",
    "actor.offline_torch_compile": "train.compile",
    "runner.max_steps": "train.steps",
    "runner.log_interval": "train.log_interval",
    "runner.eval_episodes": "eval.episodes",
    "runner.val_check_interval": "eval.interval",
    "runner.save_interval": "checkpoint.interval",
}
_INTERVALS = {"train.log_interval", "eval.interval", "checkpoint.interval"}
_TASKS = ("data.task_name", "env.train.env_name", "env.eval.env_name", "env.eval.task_name", "env.task_name")
# What a run here always is; another value means another kind of run.
_EXPECTED = {
    "data.dataset_type": "d4rl",
    "env.dataset_type": "d4rl",
    "env.train.env_type": "d4rl",
    "actor.worker_cls": "iql",
    **{f"actor.{optim}.adam_beta1": 0.9 for optim in ("optim", "critic_optim", "value_optim")},
    **{f"actor.{optim}.adam_beta2": 0.999 for optim in ("optim", "critic_optim", "value_optim")},
    **{f"actor.{optim}.adam_eps": 1e-8 for optim in ("optim", "critic_optim", "value_optim")},
}
_POLICY = {f"actor.model.iql_config.{key}" for key in ("state_dependent_std", "log_std_min", "log_std_max")}
_OTHER = {"data.dataset_path"}
# Far beyond RLinf's files, which have a few kilobytes and six levels.
_MOST_BYTES = 1_000_000
_DEEPEST = 50
_LONGEST = 4096
_LONGEST_NUMBER = 100
_MOST_INTERPOLATIONS = 10_000
# What is resolved: ${data.seed} and the like, but no calls, which read the process's environment (${oc.env:NAME}).
_REFERENCE = re.compile(r"\$\{[\w.\[\]-]+\}")
_TEXT = "tag:yaml.org,2002:str"
_PLAIN_TAGS = (
    None,
    "!",
    *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq")),
)


def read_overrides(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Translate a file of RLinf.

    Args:
        path: a YAML file; its ``defaults`` and ``hydra`` sections are dropped.

    Returns:
        this project's options, by name, among them the groups ``dataset`` and ``algorithm.variant=rlinf``; and the
        file's keys that have no meaning here.

    Raises:
        ConfigurationError: the file is missing or no YAML mapping, describes something else than IQL on D4RL's data,
            names no dataset, or has an interpolation that it does not define.
    """
    path = Path(path).expanduser()
    config = _read(path)

    def get(key: str, default: Any = None) -> Any:
        try:
            found = OmegaConf.select(config, key, default=default)
            values = str(_plain(found))
        except (OmegaConfBaseException, RecursionError) as error:
            raise ConfigurationError(f"rlinf={path}: {key} cannot be resolved: {_short(first_line(error))}") from error
        if "${" in values:
            raise ConfigurationError(
                f"rlinf={path}: {key} is {_short(values)}; only references to other keys, ${{section.key}}, are "
                "resolved: write the value out."
            )
        return found

    for key, expected in _EXPECTED.items():
        found = get(key)
        if found is not None and found != expected:
            raise ConfigurationError(
                f"rlinf={path}: {key} is {found}; only {expected} can be imported, because it is fixed here."
            )

    options: dict[str, Any] = {"algorithm.variant": "rlinf"}
    if (file := get("data.dataset_path")) is not None:
        options |= {"dataset": "hdf5", "dataset.path": _plain(file)}
    else:
        task = next((found for key in _TASKS if (found := get(key)) is not None), None)
        if task is None:
            raise ConfigurationError(f"rlinf={path}: none of {', '.join(_TASKS)} names a dataset.")
        options |= {"dataset": "d4rl", "dataset.name": _plain(task)}
    for key, option in _OPTIONS.items():
        if (found := get(key, _ABSENT)) is not _ABSENT:
            options[option] = _plain(found)
    widths = (get("algorithm.hidden_dims"), get("actor.model.iql_config.hidden_dims"))
    if None not in widths and widths[0] != widths[1]:
        raise ConfigurationError(
            f"rlinf={path}: algorithm.hidden_dims is {widths[0]} but actor.model.iql_config.hidden_dims is "
            f"{widths[1]}; all networks have the same hidden layers here."
        )
    for option in _INTERVALS & set(options):
        found = options[option]
        if found is None or (isinstance(found, int | float) and found < 1):  # RLinf's way to say never
            options[option] = options.get("train.steps", 1_000_000)
    options |= _policy_options(get)

    known = {*_OPTIONS, *_TASKS, *_EXPECTED, *_POLICY, *_OTHER}
    return options, [key for key in _leaves(config) if key not in known]


def _policy_options(get: Any) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if get("actor.model.iql_config.state_dependent_std"):
        options["algorithm.standard_deviation"] = "state_dependent"
    bounds = (get("actor.model.iql_config.log_std_min"), get("actor.model.iql_config.log_std_max"))
    if None not in bounds:
        options["algorithm.log_std_bounds"] = [_plain(bound) for bound in bounds]
    return options


def _plain(found: Any) -> Any:
    return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found


_ABSENT = object()


def _read(path: Path) -> DictConfig:
    try:
        size = regular_file(path).stat().st_size
    except NotAFile as error:
        what = "is not a file" if str(error) == "does not exist" else str(error)
        raise ConfigurationError(f"rlinf={path} {what}; give the path of a configuration file of RLinf.") from None
    if size > _MOST_BYTES:
        raise ConfigurationError(
            f"rlinf={path} has {size:,} bytes, more than the {_MOST_BYTES:,} that are read; give the path of a "
            "configuration file of RLinf."
        )
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_BYTES).decode()
        _refuse_all_but_plain(text)
        config = OmegaConf.create(text)
    except _NotPlain as error:
        raise ConfigurationError(f"rlinf={path}: {error}.") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"rlinf={path} cannot be read as YAML: {_short(first_line(error))}") from error
    if not isinstance(config, DictConfig):
        raise ConfigurationError(f"rlinf={path} holds a list, not a mapping of options.")
    for section in ("defaults", "hydra"):
        config.pop(section, None)
    _refuse_endless_interpolations(config, path)
    read: Any = OmegaConf.create(_with_calls_as_text(OmegaConf.to_container(config)))
    return read


class _NotPlain(ValueError):
    """YAML that is more than mappings, lists and values written out; the message says what is where."""


def _refuse_all_but_plain(text: str) -> None:
    """Refuse what YAML may hold and no configuration file of RLinf does, and what takes long or much to build.

    Raises:
        _NotPlain: aliases, tags, keys that are no text, deep nesting, values beyond any sense.
        yaml.YAMLError: text that is no YAML.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = f"line {event.start_mark.line + 1}" if event.start_mark else "its end"
        if isinstance(event, yaml.AliasEvent):
            raise _NotPlain(f"{line} refers to another place with *{_short(event.anchor)}; write the value out")
        tagged = isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent)
        if tagged and event.tag not in _PLAIN_TAGS:
            raise _NotPlain(f"{line} has the tag {_short(event.tag)}; only plain values are read: leave it out")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > _LONGEST:
            raise _NotPlain(f"{line} has a value of {len(event.value):,} characters, more than {_LONGEST:,}")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise _NotPlain(f"{line} is nested deeper than {_DEEPEST} levels, more than any option")
    waiting = [yaml.compose(text, Loader=yaml.SafeLoader)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.tag != _TEXT:
                    raise _NotPlain(
                        f"line {key.start_mark.line + 1} has a key that is no text, "
                        f"{_short(str(key.value)) if isinstance(key, yaml.ScalarNode) else 'but a collection'}; keys "
                        "are the names of options: put it in quotes, or leave it out"
                    )
                waiting.append(value)
        elif node is not None and node.tag != _TEXT and len(node.value) > _LONGEST_NUMBER:
            raise _NotPlain(
                f"line {node.start_mark.line + 1} has a number of {len(node.value):,} characters, more than "
                f"{_LONGEST_NUMBER}"
            )


def _refuse_endless_interpolations(config: DictConfig, path: Path) -> None:
    """Refuse values that refer to several others each, which may refer to several: their number multiplies."""
    product, waiting = 1, [OmegaConf.to_container(config)]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict | list):
            waiting += found.values() if isinstance(found, dict) else found
        elif isinstance(found, str):
            product *= max(1, found.count("${"))
        if product > _MOST_INTERPOLATIONS:
            raise ConfigurationError(
                f"rlinf={path}: its interpolations, ${{...}}, may multiply to more than {_MOST_INTERPOLATIONS:,} "
                "values; write some of them out."
            )


def _with_calls_as_text(found: Any) -> Any:
    """The same, with interpolations that are more than references escaped, so that OmegaConf takes them for text."""
    if isinstance(found, dict):
        return {key: _with_calls_as_text(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_with_calls_as_text(value) for value in found]
    if isinstance(found, str) and "${" in _REFERENCE.sub("", found):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", found)
    return found


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _leaves(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            yield from _leaves(node, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
