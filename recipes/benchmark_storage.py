"""Load time, memory and sampling time of large data: `python recipes/benchmark_storage.py [transitions=10000000]`."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from pathlib import Path

from iql_torchrl.configuration.command_line import recipe
from iql_torchrl.errors import ConfigurationError
from iql_torchrl.running.options import StorageBenchmarkOptions


@recipe("benchmark_storage", StorageBenchmarkOptions)
def main(options: StorageBenchmarkOptions) -> None:
    """Write a log, measure every storage in a process of its own, print and write the table."""
    from iql_torchrl.atomic import write_text_atomically
    from iql_torchrl.benchmark.storage import storage_row, write_random_log
    from iql_torchrl.reporting.summary import versions

    if not Path("/proc/self/status").exists():
        raise ConfigurationError("this benchmark reads the memory of processes from /proc, which is Linux's.")
    for key, folder in (("folder", options.folder), ("output", str(Path(options.output).parent))):
        if folder is not None and not os.access(folder, os.W_OK):
            value = getattr(options, key)
            raise ConfigurationError(f"{key}={value}: the folder {folder} does not exist, or cannot be written.")
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        log = Path(temporary) / "log.hdf5"
        sizes = {"observation_dim": options.observation_dim, "action_dim": options.action_dim}
        write_random_log(log, options.transitions, **sizes)
        for storage in options.storages:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                results.append(pool.apply(storage_row, (log, storage, Path(temporary), options)))
            print(json.dumps(results[-1], indent=2))
    output = Path(options.output)
    text = json.dumps({"rows": results, "config": options.model_dump(), "versions": versions()}, indent=2) + "\n"
    write_text_atomically(output, text)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
