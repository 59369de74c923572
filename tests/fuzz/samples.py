"""Healthy files of every kind that is read, small enough to be made anew for each damage done to them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import h5py
import numpy as np

# Unlike any other number in the files, so that it can be found and forged.
ROWS = 211
EPISODES = 4
D4RL_NAME = "hopper-medium-v2"
MINARI_NAMES = {form: f"fuzz/{form}-v0" for form in ("hdf5", "arrow", "parquet")}
RLINF = """\
defaults:
  - env/d4rl@env.eval
hydra:
  run:
    dir: .
runner:
  max_steps: 20
  save_interval: -1
  val_check_interval: 10
  eval_episodes: 1
data:
  dataset_type: d4rl
  task_name: hopper-medium-v2
  dataset_path: null
  seed: 3
algorithm:
  loss_type: offline_iql
  hidden_dims: [16, 16]
  tau: 0.01
  expectile: 0.8
  gamma: 0.98
actor:
  seed: 7
  global_batch_size: 16
  optim: {lr: 1.0e-4, adam_beta1: 0.9}
  value_optim: {lr: "${actor.optim.lr}"}
  model:
    iql_config:
      hidden_dims: ${algorithm.hidden_dims}
      log_std_min: -4.0
      log_std_max: 1.0
"""


def arrays() -> dict[str, np.ndarray]:
    """A log of ``EPISODES`` episodes."""
    random = np.random.default_rng(0)
    observations = random.normal(size=(ROWS + 1, 3)).astype(np.float32)
    ends = np.zeros((2, ROWS), bool)
    ends[0, 50] = ends[1, 101] = ends[0, 150] = ends[1, ROWS - 1] = True
    return {
        "observations": observations[:-1],
        "next_observations": observations[1:],
        "actions": random.uniform(-1, 1, size=(ROWS, 2)).astype(np.float32),
        "rewards": random.normal(size=ROWS).astype(np.float32),
        "terminals": ends[0],
        "timeouts": ends[1],
        "episode_ids": np.cumsum(ends.any(0)) - ends.any(0),
    }


def make(folder: Path) -> None:
    """All of them, each in a folder or file of its own."""
    log = arrays()
    with h5py.File(folder / "plain.hdf5", "w") as file:
        for key, value in log.items():
            file[key] = value
        file.attrs["env_id"] = "Pendulum-v1"
    with h5py.File(folder / "packed.hdf5", "w") as file:
        for key, value in log.items():
            rest = value.shape[1:]
            file.create_dataset(key, data=value, compression="gzip", chunks=(50, *rest), maxshape=(None, *rest))
    np.savez(folder / "plain.npz", **log)
    np.savez_compressed(folder / "packed.npz", **log)
    (folder / "arrays").mkdir()
    for key, value in log.items():
        np.save(folder / "arrays" / f"{key}.npy", value)
    _parquet(folder, log)
    _robomimic(folder / "robomimic.hdf5")
    _lerobot(folder / "lerobot", log)
    _ogbench(folder / "ogbench.npz")
    _minari(folder / "minari")
    _d4rl(folder)
    (folder / "rlinf.yaml").write_text(RLINF)
    _checkpoint(folder / "checkpoint.pt")


def _parquet(folder: Path, log: dict[str, np.ndarray]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = {key: pa.array(value.tolist()) for key, value in log.items()}
    pq.write_table(pa.table(lists), folder / "lists.parquet", row_group_size=100)
    numbered = {
        name: pa.array(column)
        for key, value in log.items()
        for name, column in (
            [(key, value)]
            if value.ndim == 1
            else [(f"{key}_{index}", value[:, index]) for index in range(len(value[0]))]
        )
    }
    pq.write_table(pa.table(numbered), folder / "numbered.parquet", compression="none", use_dictionary=False)


def _lerobot(folder: Path, log: dict[str, np.ndarray]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lengths = np.bincount(log["episode_ids"])
    features = {
        "observation.state": log["observations"],
        "action": log["actions"],
        "next.reward": log["rewards"],
        "next.done": log["terminals"] | log["timeouts"],
        "next.success": log["terminals"],
        "episode_index": log["episode_ids"],
        "task_index": np.zeros(ROWS, np.int64),
    }
    for place in ("data/chunk-000", "meta/episodes/chunk-000"):
        (folder / place).mkdir(parents=True)
    frames = {name: pa.array(values.tolist()) for name, values in features.items()}
    pq.write_table(pa.table(frames), folder / "data" / "chunk-000" / "file-000.parquet")
    episodes = {"episode_index": range(EPISODES), "length": lengths.tolist()}
    episodes |= {f"data/{name}_index": [0] * EPISODES for name in ("chunk", "file")}
    listed = pa.table({name: pa.array(list(values)) for name, values in episodes.items()})
    pq.write_table(listed, folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    pq.write_table(pa.table({"task_index": [0], "task": ["push"]}), folder / "meta" / "tasks.parquet")
    content = {
        "codebase_version": "v3.0",
        "total_episodes": EPISODES,
        "total_frames": ROWS,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "features": {
            name: {"dtype": str(values.dtype), "shape": list(values.shape[1:]) or [1]}
            for name, values in features.items()
        },
    }
    (folder / "meta" / "info.json").write_text(json.dumps(content))


def _ogbench(path: Path) -> None:
    """Of pointmaze-medium, whose environment starts at once."""
    random = np.random.default_rng(2)
    vectors = {name: random.normal(size=(ROWS, 2)).astype(np.float32) for name in ("observations", "actions", "qpos")}
    np.savez(path, **vectors, terminals=np.isin(np.arange(ROWS), (100, ROWS - 1)))


def _robomimic(path: Path) -> None:
    random = np.random.default_rng(1)
    with h5py.File(path, "w") as file:
        for number in range(3):
            group = file.create_group(f"data/demo_{number}")
            rows = 30 + number
            for part in ("obs", "next_obs"):
                group[f"{part}/a"] = random.normal(size=(rows, 3))
                group[f"{part}/b"] = random.normal(size=(rows, 2, 2))
            group["actions"], group["rewards"] = random.uniform(-1, 1, size=(rows, 2)), np.zeros(rows)
            group["dones"] = np.arange(rows) == rows - 1
            group.attrs["num_samples"] = rows
        file["data"].attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1})
        file["mask/train"] = np.array([b"demo_0", b"demo_2"])


def _minari(root: Path) -> None:
    import minari
    from gymnasium.spaces import Box, Dict, Discrete
    from minari.data_collector.episode_buffer import EpisodeBuffer

    random = np.random.default_rng(2)
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    space = Dict({"x": Box(-np.inf, np.inf, (3,), np.float32), "k": Discrete(4)})
    for form, name in MINARI_NAMES.items():
        buffers = []
        for rows in (7, 12, 5):
            parts = {"x": random.normal(size=(rows + 1, 3)).astype(np.float32), "k": random.integers(0, 4, rows + 1)}
            flags = np.zeros((2, rows), bool)
            flags[1, -1] = True
            buffers.append(
                EpisodeBuffer(
                    observations=parts,
                    actions=random.uniform(-1, 1, size=(rows, 2)).astype(np.float32),
                    rewards=random.normal(size=rows),
                    terminations=flags[0],
                    truncations=flags[1],
                )
            )
        minari.create_dataset_from_buffers(
            name,
            buffers,
            env="Pendulum-v1",
            observation_space=space,
            action_space=Box(-1, 1, (2,), np.float32),
            data_format=form,
        )
    del os.environ["MINARI_DATASETS_PATH"]


def _d4rl(folder: Path) -> None:
    from iql_torchrl import load_transitions

    with h5py.File(folder / "d4rl.hdf5", "w") as file:
        for key, value in arrays().items():
            if key != "episode_ids":
                file[key] = value
    root = folder / "d4rl"
    load_transitions("d4rl", name=D4RL_NAME, url=(folder / "d4rl.hdf5").as_uri(), root=root)


def _checkpoint(path: Path) -> None:
    import torch
    from torchrl.checkpoint import GlobalRNGState

    from iql_torchrl.training.checkpoints import FORMAT, VERSION

    networks = {f"{index}.weight": torch.randn(16, 16) for index in range(3)}
    moments = {
        "state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.randn(16, 16)}},
        "param_groups": [{"lr": 1e-4}],
    }
    checkpoint = {
        "format": FORMAT,
        "version": VERSION,
        "step": 20,
        "random": GlobalRNGState().state_dict(),
        "training": {"networks": networks, "optimizers": moments},
        "policy": {"state": networks, "kind": "tanh_mean_normal"},
        "architecture": {"hidden_dims": [16, 16], "observation_dim": 3, "action_dim": 2},
        "config": {"train": {"steps": 20, "seed": 0}},
        "dataset_fingerprint": "0" * 64,
        "environment": None,
    }
    torch.save(checkpoint, path)
