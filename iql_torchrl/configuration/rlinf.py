"""RLinf's IQL configuration files, as overrides of this project's options.

Two kinds exist: the keys of RLinf's documentation page (``algorithm.batch_size``, ``env.train.env_name``, ...), and
those of the files in its repository (``data.task_name``, ``actor.optim.lr``, ``runner.max_steps``, ...). Both are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

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
            return OmegaConf.select(config, key, default=default)
        except OmegaConfBaseException as error:
            raise ConfigurationError(f"rlinf={path}: {key} cannot be resolved: {first_line(error)}") from error

    for key, expected in _EXPECTED.items():
        found = get(key)
        if found is not None and found != expected:
            raise ConfigurationError(
                f"rlinf={path}: {key} is {found}; only {expected} can be imported, because it is fixed here."
            )

    options: dict[str, Any] = {"algorithm.variant": "rlinf"}
    if get("data.dataset_path") is not None:
        options |= {"dataset": "hdf5", "dataset.path": get("data.dataset_path")}
    else:
        task = next((found for key in _TASKS if (found := get(key)) is not None), None)
        if task is None:
            raise ConfigurationError(f"rlinf={path}: none of {', '.join(_TASKS)} names a dataset.")
        options |= {"dataset": "d4rl", "dataset.name": task}
    for key, option in _OPTIONS.items():
        if (found := get(key, _ABSENT)) is not _ABSENT:
            options[option] = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
    widths = (get("algorithm.hidden_dims"), get("actor.model.iql_config.hidden_dims"))
    if None not in widths and widths[0] != widths[1]:
        raise ConfigurationError(
            f"rlinf={path}: algorithm.hidden_dims is {widths[0]} but actor.model.iql_config.hidden_dims is "
            f"{widths[1]}; all networks have the same hidden layers here."
        )
    for option in _INTERVALS & set(options):
        if options[option] is None or options[option] < 1:  # RLinf's way to say never
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
        options["algorithm.log_std_bounds"] = list(bounds)
    return options


_ABSENT = object()


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        raise ConfigurationError(f"rlinf={path} is not a file; give the path of a configuration file of RLinf.")
    try:
        config = OmegaConf.create(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigurationError(f"rlinf={path} cannot be read as YAML: {first_line(error)}") from error
    if not isinstance(config, DictConfig):
        raise ConfigurationError(f"rlinf={path} holds a list, not a mapping of options.")
    for section in ("defaults", "hydra"):
        config.pop(section, None)
    return config


def _leaves(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            yield from _leaves(node, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
