"""Load time, memory and sampling time of large data: `python recipes/benchmark_storage.py [transitions=10000000]`."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from iql_torchrl.configuration import check_command_line, report_errors
from iql_torchrl.errors import ConfigurationError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NAME = "benchmark_storage"


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=NAME)
@report_errors
def main(config: DictConfig) -> None:
    """Write a log, measure every storage in a process of its own, print and write the table."""
    from iql_torchrl import benchmarking
    from iql_torchrl.atomic import write_atomically
    from iql_torchrl.reporting import versions

    if not Path("/proc/self/status").exists():
        raise ConfigurationError("this benchmark reads the memory of processes from /proc, which is Linux's.")
    for key, folder in (("folder", config.folder), ("output", Path(config.output).parent)):
        if folder is not None and not os.access(folder, os.W_OK):
            raise ConfigurationError(f"{key}={config[key]}: the folder {folder} does not exist, or cannot be written.")
    options = OmegaConf.to_container(config, resolve=True)
    results = []
    with tempfile.TemporaryDirectory(dir=config.folder) as temporary:
        log = Path(temporary) / "log.hdf5"
        sizes = {"observation_dim": config.observation_dim, "action_dim": config.action_dim}
        benchmarking.write_random_log(log, config.transitions, **sizes)
        for storage in config.storages:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                results.append(pool.apply(benchmarking.storage_row, (log, storage, Path(temporary), options)))
            print(json.dumps(results[-1], indent=2))
    output = Path(config.output)
    text = json.dumps({"rows": results, "config": options, "versions": versions()}, indent=2) + "\n"
    write_atomically(output, lambda file: file.write(text.encode()))
    print(f"wrote {output}")


if __name__ == "__main__":
    report_errors(check_command_line)(sys.argv[1:], CONFIGS, NAME)
    main()
