"""Load time, memory and sampling time of large data."""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from tensordict import TensorDict
from tqdm import tqdm

from iql_torchrl.data.actions import normalise_actions
from iql_torchrl.data.buffer import make_buffer
from iql_torchrl.data.loading import load_transitions
from iql_torchrl.data.log import ROWS_AT_A_TIME
from iql_torchrl.data.rewards import transform_rewards
from iql_torchrl.data.transitions import fingerprint
from iql_torchrl.networks import build_actor, build_qvalues, build_value
from iql_torchrl.objectives import IQLLoss
from iql_torchrl.running.options import StorageBenchmarkOptions
from iql_torchrl.training.step import TrainingStep


def write_random_log(path: Path, rows: int, *, observation_dim: int, action_dim: int) -> None:
    """An HDF5 log of random numbers in D4RL's layout, in episodes of up to 1000 rows, written in pieces."""
    episode = max(2, min(1000, rows // 4))
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file, tqdm(total=rows, unit="row", unit_scale=True, desc="write the log") as bar:
        columns = {
            "observations": file.create_dataset("observations", (rows, observation_dim), np.float32),
            "actions": file.create_dataset("actions", (rows, action_dim), np.float32),
            "rewards": file.create_dataset("rewards", (rows,), np.float32),
        }
        for start in range(0, rows, ROWS_AT_A_TIME):
            count = min(ROWS_AT_A_TIME, rows - start)
            for column in columns.values():
                shape = (count, *column.shape[1:])
                column[start : start + count] = random.uniform(-1, 1, shape).astype(np.float32)
            bar.update(count)
        file["terminals"] = np.zeros(rows, dtype=bool)
        file["timeouts"] = np.arange(rows) % episode == episode - 1


def storage_row(path: Path, storage: str, folder: Path, options: StorageBenchmarkOptions) -> dict[str, Any]:
    """Load a log into a storage, prepare it as a run does, and time the step and the sampling of a batch by itself.

    For a process of its own: memory is that of the process.
    """
    memory = _PeakMemory()
    before = memory.now()
    start = time.perf_counter()
    transitions = load_transitions("hdf5", path=path, storage=storage, storage_folder=folder)
    loaded = time.perf_counter() - start
    fingerprint(transitions)
    ones = torch.ones(options.action_dim)
    normalise_actions(transitions, -ones, ones)
    transform_rewards(transitions, "minus_one")
    prepared = time.perf_counter() - start
    load_peak = memory.peak()

    torch.manual_seed(options.seed)
    sizes, widths = (options.observation_dim, options.action_dim), tuple(options.hidden_dims)
    loss = IQLLoss(
        build_actor(*sizes, hidden_dims=widths),
        build_qvalues(*sizes, hidden_dims=widths),
        build_value(sizes[0], hidden_dims=widths),
    )
    step = TrainingStep(loss, make_buffer(transitions, batch_size=options.batch_size, seed=0), compile=options.compile)

    data = step.buffer[:]

    def sample() -> TensorDict:
        return data[step._draw()[0]]

    times: dict[str, list[float]] = {"step": [], "sample": []}
    for call in (step, sample):
        for _ in range(options.warm_up):
            call()
    for _ in range(options.rounds):
        for name, call in (("step", step), ("sample", sample)):
            start = time.perf_counter()
            for _ in range(options.steps_per_round):
                call()
            times[name].append((time.perf_counter() - start) / options.steps_per_round)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return {
        "storage": storage,
        "transitions": len(transitions),
        "load_seconds": loaded,
        "prepare_seconds": prepared - loaded,
        "data_gigabytes": transitions.bytes() / 1e9,
        "anonymous_gigabytes_while_loading": (load_peak[0] - before[0]) / 1e9,
        "file_gigabytes_while_loading": (load_peak[1] - before[1]) / 1e9,
        "anonymous_gigabytes_while_training": (memory.peak()[0] - before[0]) / 1e9,
        "milliseconds_per_step": 1e3 * seconds["step"],
        "milliseconds_per_sample": 1e3 * seconds["sample"],
        "sampling_share": seconds["sample"] / seconds["step"],
    }


class _PeakMemory:
    """Highest resident memory since the last look: anonymous, which must stay, and of files, which may be dropped."""

    def __init__(self) -> None:
        self._highest = self.now()
        threading.Thread(target=self._watch, daemon=True).start()

    def now(self) -> tuple[int, int]:
        status = Path("/proc/self/status").read_text()
        anonymous, files, shared = (
            int(status.split(f"{key}:")[1].split()[0]) * 1024 for key in ("RssAnon", "RssFile", "RssShmem")
        )
        return anonymous, files + shared

    def peak(self) -> tuple[int, int]:
        highest, self._highest = self._highest, self.now()
        return highest

    def _watch(self) -> None:
        while True:
            self._highest = (max(self._highest[0], self.now()[0]), max(self._highest[1], self.now()[1]))
            time.sleep(0.005)
