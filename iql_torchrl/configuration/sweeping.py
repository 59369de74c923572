"""The command line of a sweep, made to hold wherever its runs are placed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

_CLUSTERS = ("ray", "submitit_local", "submitit_slurm")


def of_sweep(arguments: Sequence[str]) -> list[str]:
    """The arguments of a multirun, in which

    - ``run_dir`` is absolute, as a run may be placed where the working directory is another;
    - no more runs of ``hydra/launcher=submitit_local`` start at once than this machine has cores;
    - what Ray is to be told needs no ``+`` before it, which Hydra asks for;
    - the seeds of ``train.num_seeds`` are spread over the GPUs that this machine shows, with a launcher that has
      several runs at once: a run a GPU, its seeds trained together.

    Those of a single run stay as they are.
    """
    found = list(arguments)
    if not {"-m", "--multirun"} & {*found}:
        return found
    found = ["-m", *[one for one in found if one not in ("-m", "--multirun")]]  # which Hydra wants before or after all
    found = [f"++{one}" if one.startswith("hydra.launcher.ray.") else one for one in found]
    folder = _value(found, "run_dir") or datetime.now().strftime("runs/%Y-%m-%d_%H-%M-%S")
    if "${" not in folder and not _is_sweep(folder):
        absolute = Path(folder.strip("'\"")).expanduser().absolute()
        found = [*[one for one in found if not one.startswith("run_dir=")], f"run_dir='{absolute}'"]
    launcher = _value(found, "hydra/launcher")
    if launcher == "submitit_local" and not any(one.startswith("hydra.sweeper.") for one in found):
        found.append(f"hydra.sweeper.max_batch_size={os.cpu_count() or 1}")
    return _spread_over_gpus(found, visible_gpus()) if launcher in _CLUSTERS else found


def visible_gpus() -> int:
    """How many NVIDIA GPUs a process of this machine sees, without starting one."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([one for one in chosen.split(",") if one.strip()])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def _spread_over_gpus(arguments: list[str], gpus: int) -> list[str]:
    count, first = _value(arguments, "train.num_seeds") or "1", _value(arguments, "train.seed") or "0"
    if gpus < 2 or not (count.isdigit() and first.isdigit()) or int(count) < 2:
        return arguments
    seeds = int(count)
    runs = next(runs for runs in range(1, seeds + 1) if seeds % runs == 0 and (runs >= gpus or runs == seeds))
    share = seeds // runs
    found = [one for one in arguments if not one.startswith(("train.num_seeds=", "train.seed="))]
    found += [f"train.seed=range({first},{int(first) + seeds},{share})", f"train.num_seeds={share}"]
    asked = any(one.startswith("++hydra.launcher.ray.remote.num_gpus=") for one in found)
    ray = _value(found, "hydra/launcher") == "ray"
    return [*found, "++hydra.launcher.ray.remote.num_gpus=1"] if ray and not asked else found


def _value(arguments: Sequence[str], name: str) -> str | None:
    given = [one.partition("=")[2] for one in arguments if one.startswith(f"{name}=")]
    return given[-1] if given else None


def _is_sweep(value: str) -> bool:
    return "," in value or value.startswith(("range(", "choice(", "glob("))
