"""A recipe as a program: its command line checked and explained before anything starts."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from tqdm import tqdm

from iql_torchrl.configuration.composing import CONFIGS, check_command_line, compose
from iql_torchrl.configuration.declaring import Options
from iql_torchrl.configuration.help import help_text
from iql_torchrl.configuration.launching import launched_count, launched_rank
from iql_torchrl.configuration.sweeping import of_sweep
from iql_torchrl.errors import ConfigurationError, UserError

Result = TypeVar("Result")


def recipe(
    name: str, options: type[Options], job_of_sweep: Callable[..., Any] | None = None
) -> Callable[[Callable[[Any], Any]], Callable[[], Any]]:
    """Decorate the function of a recipe, which gets the checked options and is called without arguments.

    Mistakes on the command line are reported all at once, ``--help`` answers before anything is imported, and errors
    that a user can cause are printed without a traceback, with status 2. Sweeps, launchers and Hydra's own flags are
    Hydra's.

    Args:
        name: of the recipe's file in ``configs/``.
        options: what it can be told.
        job_of_sweep: what a run of a multirun does, of the function and what composes its options (``resume=auto``);
            nothing else where not given.
    """

    def decorate(function: Callable[[Any], Any]) -> Callable[[], Any]:
        @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)
        @report_errors
        def run(config: Any) -> Any:
            hydra_config, first = HydraConfig.get(), launched_rank() == 0
            overrides, config_name = list(hydra_config.overrides.task), hydra_config.job.config_name or name
            folder = output_folder() if first else Path(config.get("run_dir") or ".")
            job = job_of_sweep if in_sweep() else None
            if job and not any(one.startswith("resume=") for one in overrides):
                overrides.append("resume=auto")
            composed = functools.partial(compose, config_name, overrides, options, folder=folder, quiet=not first)
            return job(function, composed) if job else function(composed())

        @functools.wraps(function)
        def main() -> Any:
            # Importing and compiling make hundreds of thousands of objects that stay, which Python would go through
            # ten times for garbage: a sixth of the time to the first update of a program that has compiled before.
            gc.set_threshold(20_000, 10, 10)
            sys.argv[1:] = _prepare(sys.argv[1:], name, options, sweeps=job_of_sweep is not None)
            if launched_rank():  # the folder of the run is the first one's
                sys.argv.append("hydra.run.dir=.")
            return run()

        return main

    return decorate


def output_folder() -> Path:
    """The folder that Hydra has made for this job: ``run_dir``, or the job's folder in it."""
    return Path(HydraConfig.get().runtime.output_dir)


def in_sweep() -> bool:
    """Whether this job is one of a multirun."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def report_errors(function: Callable[..., Result]) -> Callable[..., Result]:
    """Print a user's error as one clear message and exit with its status, without a traceback."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Result:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            rank = launched_rank()
            line = f"error: {error}" if rank == 0 else f"process {rank}: error: {error}"
            tqdm.write(line, file=sys.stderr)  # on a line of its own, beside a bar
            raise SystemExit(error.status) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapper


@report_errors
def _prepare(arguments: Sequence[str], name: str, options: type[Options], *, sweeps: bool) -> list[str]:
    if "--help" in arguments or "-h" in arguments:
        print(help_text(name, options, [argument for argument in arguments if argument not in ("--help", "-h")]))
        raise SystemExit(0)
    if {"-m", "--multirun"} & set(arguments) and launched_count() > 1:
        raise ConfigurationError("torchrun starts the processes of one run: leave -m out, or start without torchrun.")
    return check_command_line(of_sweep(arguments) if sweeps else arguments, name, options)
