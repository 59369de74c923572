"""What the runs of a sweep need of the machines that they are placed on: that they are there, and threads."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf

from iql_torchrl.errors import ConfigurationError, first_line

_SECONDS = 5.0  # to wait for an address
_OBJECT_STORE = 78643200  # bytes, the least that Ray takes: runs exchange files, not objects


def check_cluster(hydra: DictConfig) -> None:
    """Refuse a sweep that its launcher could not run, or would wait for in vain; a Ray cluster is connected to.

    Args:
        hydra: Hydra's own configuration.

    Raises:
        ConfigurationError: no cluster at the address, none whose nodes have what a run asks for, no Slurm.
    """
    launcher = str(hydra.launcher.get("_target_", ""))
    if launcher.endswith(".RayLauncher"):
        _connect_to_ray(hydra.launcher.ray)
    elif launcher.endswith(".SlurmLauncher") and shutil.which("sbatch") is None:
        raise ConfigurationError(
            "hydra/launcher=submitit_slurm needs Slurm's sbatch, which this machine has not; start the sweep on one "
            "that has, or take hydra/launcher=submitit_local."
        )


def divide_threads(hydra: DictConfig, jobs: int) -> None:
    """Give a run of a sweep its share of the processor, before PyTorch counts the cores.

    Ray does so for itself, from what a run asks for; the launcher that runs one after the other has nothing to divide.

    Args:
        hydra: Hydra's own configuration.
        jobs: of the sweep.
    """
    launcher = str(hydra.launcher.get("_target_", ""))
    if launcher.endswith(".SlurmLauncher"):
        threads = int(os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    elif launcher.endswith(".LocalLauncher"):
        cores = os.cpu_count() or 1
        at_once = min(jobs, hydra.sweeper.get("max_batch_size") or hydra.sweeper.get("n_jobs") or jobs)
        threads = max(1, cores // max(at_once, 1))
    else:
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _connect_to_ray(settings: DictConfig) -> None:
    ray = _ray()
    start: Any = OmegaConf.to_container(settings.init, resolve=True)
    address = start.get("address")
    if address is None:
        start = {"object_store_memory": _OBJECT_STORE, "include_dashboard": False} | start
    else:
        start.pop("object_store_memory", None)  # which an existing cluster refuses
        _answer(address)
    try:
        ray.init(**start)
    except Exception as error:  # whatever Ray says; there is nothing to go on with
        raise ConfigurationError(
            f"hydra.launcher.ray.init.address={address}: no Ray cluster can be used there ({first_line(error)}); start "
            "one with ray start --head, or leave the address out for one on this machine."
        ) from error
    _check_resources(OmegaConf.to_container(settings.remote, resolve=True))


def _ray() -> Any:
    """Ray, which is an extra of this package."""
    return importlib.import_module("ray")


def _answer(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto", which Ray looks up
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS).close()
    except OSError as error:
        raise ConfigurationError(
            f"hydra.launcher.ray.init.address={address}: nothing answers there ({error}); start a cluster with ray "
            "start --head, or leave the address out for one on this machine."
        ) from error


def _check_resources(asked: Any) -> None:
    ray = _ray()
    needed = {"CPU": asked.get("num_cpus", 1), "GPU": asked.get("num_gpus", 0), "memory": asked.get("memory", 0)}
    needed = {name: float(amount) for name, amount in (needed | asked.get("resources", {})).items() if amount}
    nodes = {node["NodeManagerAddress"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    if any(all(has.get(name, 0) >= amount for name, amount in needed.items()) for has in nodes.values()):
        return

    def listed(resources: Any) -> str:
        return ", ".join(f"{name} {resources.get(name, 0):g}" for name in needed)

    of_nodes = "; ".join(f"{address}: {listed(has)}" for address, has in nodes.items())
    raise ConfigurationError(
        f"no node of the Ray cluster has what a run asks for by hydra.launcher.ray.remote ({listed(needed)}). Nodes: "
        f"{of_nodes}. Free now in all: {listed(ray.available_resources())}."
    )
