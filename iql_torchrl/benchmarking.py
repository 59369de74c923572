"""What `recipes/benchmark.py` times: one update, ours and TorchRL's, and the matrix products that it cannot do without.

Every row has the same batch, networks, dimensions, precision and threads. An update is sampling, three losses, Adam
and the target update.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded, LazyMemmapStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import IQLLoss as TorchRLLoss
from torchrl.objectives import SoftUpdate, group_optimizers
from tqdm import tqdm

from iql_torchrl.data import fingerprint, load_transitions, make_buffer, normalise_actions, transform_rewards
from iql_torchrl.data.log import ROWS_AT_A_TIME
from iql_torchrl.networks import build_actor, build_qvalues, build_value
from iql_torchrl.objectives import IQLLoss
from iql_torchrl.training import TrainingStep

# Forward passes of an update: targets, V(s), V(s'), critics, actor; the paper's order has V(s) before and after.
_FORWARDS = {"joint": "qqvvqqa", "sequential": "qqvvvqqa"}
_BACKWARDS = "vqqa"


@dataclass(frozen=True)
class Row:
    """Something to time: a call that does ``updates`` updates, of all runs together."""

    implementation: str
    mode: str
    call: Callable[[], object]
    updates: int = 1


def our_row(
    config: DictConfig, device: torch.device, *, order: str, mode: str, seeds: int = 1, at_once: int = 1
) -> Row:
    """``TrainingStep`` in ``order``; ``mode`` is eager, compiled, or compiled and captured as a CUDA graph."""
    dtype, precision = _dtype(config.precision), config.precision
    transitions = random_transitions(config, dtype).to(device)
    widths = list(config.hidden_dims)
    losses, buffers = [], []
    for seed in range(config.seed, config.seed + seeds):
        torch.manual_seed(seed)
        actor = build_actor(config.observation_dim, config.action_dim, hidden_dims=widths)
        critics = build_qvalues(config.observation_dim, config.action_dim, hidden_dims=widths)
        value = build_value(config.observation_dim, hidden_dims=widths)
        losses.append(IQLLoss(actor, critics, value).to(device, dtype))
        buffers.append(make_buffer(transitions, batch_size=config.batch_size, seed=seed, device=device))
    step = TrainingStep(
        losses if seeds > 1 else losses[0],
        buffers if seeds > 1 else buffers[0],
        total_steps=1_000_000,
        order=order,
        compile=mode != "eager",
        cudagraphs=mode == "CUDA graph",
        updates_per_call=at_once,
        precision="float32" if precision == "float64" else precision,
    )
    name = "iql_torchrl, " + ("paper" if order == "sequential" else order)
    name += f", {seeds} seeds" if seeds > 1 else ""
    name += f", {at_once} a call" if at_once > 1 else ""
    return Row(name, mode, step, seeds * at_once)


def torchrl_row(config: DictConfig, device: torch.device, folder: str, *, compile: bool) -> Row:
    """The update of TorchRL's own offline recipe, with the networks and hyperparameters of the other rows."""
    dtype = _dtype(config.precision)
    torch.manual_seed(config.seed)

    def mlp(inputs: int, outputs: int) -> MLP:
        cells = list(config.hidden_dims)
        return MLP(in_features=inputs, out_features=outputs, num_cells=cells, activation_class=nn.ReLU)

    observation_dim, action_dim = config.observation_dim, config.action_dim
    extractor = NormalParamExtractor(scale_mapping="biased_softplus_1.0", scale_lb=0.1)  # type: ignore[arg-type]
    policy = nn.Sequential(mlp(observation_dim, 2 * action_dim), extractor)
    actor = ProbabilisticActor(
        TensorDictModule(policy, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=Bounded(-1.0, 1.0, (action_dim,)),  # type: ignore[arg-type]
        distribution_class=TanhNormal,
    )
    qvalue = ValueOperator(mlp(observation_dim + action_dim, 1), in_keys=["observation", "action"])
    value = ValueOperator(mlp(observation_dim, 1), in_keys=["observation"])
    loss = TorchRLLoss(actor, qvalue, value, loss_function="l2", temperature=3.0, expectile=0.7).to(device, dtype)
    loss.make_value_estimator(gamma=0.99)
    targets = SoftUpdate(loss, tau=0.005)
    networks = (loss.actor_network_params, loss.value_network_params, loss.qvalue_network_params)
    adams = [torch.optim.Adam(list(params.values(True, True)), lr=3e-4) for params in networks]  # type: ignore[union-attr]
    optimizer = group_optimizers(*adams)
    buffer = TensorDictReplayBuffer(
        storage=LazyMemmapStorage(config.transitions, scratch_dir=folder),
        sampler=SamplerWithoutReplacement(),
        batch_size=config.batch_size,
    )
    buffer.extend(random_transitions(config, dtype).exclude("episode"))
    low_precision = config.precision == "bfloat16"
    autocast = torch.autocast(device.type, torch.bfloat16) if low_precision else nullcontext()

    def update(batch: Any) -> Any:
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            losses = loss(batch)
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
        optimizer.step()
        targets.step()
        return losses.detach()

    chosen = torch.compile(update) if compile else update
    return Row("TorchRL recipe", "compiled" if compile else "eager", lambda: chosen(buffer.sample().to(device)))


def products_row(config: DictConfig, device: torch.device, *, order: str) -> Row:
    """The matrix products of an update and nothing else: no bias, activation, loss, optimizer or sampling.

    A forward pass multiplies once a layer, a backward pass twice but once in the first layer, whose input needs no
    gradient; each is PyTorch's ``mm`` into memory that is there already.
    """
    dtype = torch.bfloat16 if config.precision == "bfloat16" else _dtype(config.precision)
    inputs = {"v": config.observation_dim, "a": config.observation_dim}
    inputs["q"] = config.observation_dim + config.action_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    batch, operations = config.batch_size, []
    shapes = {
        network: [*zip([inputs[network], *config.hidden_dims], [*config.hidden_dims, outputs], strict=True)]
        for network, outputs in (("v", 1), ("q", 1), ("a", config.action_dim))
    }
    for network in _FORWARDS[order]:
        for width, following in shapes[network]:
            operations.append((random(batch, width), random(following, width).T, random(batch, following)))
    for network in _BACKWARDS:
        for layer, (width, following) in enumerate(shapes[network]):
            gradient = random(batch, following)
            operations.append((gradient.T, random(batch, width), random(following, width)))
            if layer > 0:
                operations.append((gradient, random(following, width), random(batch, width)))

    def multiply() -> None:
        for left, right, out in operations:
            torch.mm(left, right, out=out)

    return Row("matrix products alone", "paper" if order == "sequential" else order, multiply)


def large_product_rate(device: torch.device, precision: str, size: int = 2048) -> float:
    """Floating-point operations a second of a ``size`` x ``size`` product, the median of ten."""
    dtype = torch.bfloat16 if precision == "bfloat16" else _dtype(precision)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [milliseconds(lambda: left @ right, 1, device) / 1e3 for _ in range(12)][2:]
    return 2 * size**3 / statistics.median(seconds)


def measure(rows: Sequence[Row], config: DictConfig, device: torch.device) -> list[dict[str, Any]]:
    """Time all rows in interleaved rounds, after the first calls, whose time is apart, and a warm-up."""
    first = []
    for row in tqdm(rows, desc="compile and warm up", unit="row"):
        first.append(milliseconds(row.call, 1, device) / 1e3)
        milliseconds(row.call, -(-config.warm_up // row.updates), device)
    times: list[list[float]] = [[] for _ in rows]
    for _ in tqdm(range(config.rounds), desc="measure", unit="round"):
        for row, values in zip(rows, times, strict=True):
            calls = -(-config.steps_per_round // row.updates)
            values.append(milliseconds(row.call, calls, device) / row.updates)
    results = []
    for row, values, seconds in zip(rows, times, first, strict=True):
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        results.append(
            {
                "implementation": row.implementation,
                "mode": row.mode,
                "milliseconds_median": median,
                "milliseconds_quartiles": [low, high],
                "updates_per_second": 1e3 / median,
                "first_call_seconds": seconds,
            }
        )
    return results


def milliseconds(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Mean time of ``count`` calls."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / count * 1e3


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as aligned lines; ``x TorchRL`` compares updates a second with its eager recipe."""
    baseline = results[0]["milliseconds_median"]
    lines = [
        f"{'':<42} {'mode':<11} {'ms/update':>9} {'quartiles':>15} {'updates/s':>10} {'x TorchRL':>10} {'first s':>8}"
    ]
    for row in results:
        low, high = row["milliseconds_quartiles"]
        lines.append(
            f"{row['implementation']:<42} {row['mode']:<11} {row['milliseconds_median']:>9.3f} "
            f"{f'{low:.3f} - {high:.3f}':>15} {row['updates_per_second']:>10.0f} "
            f"{baseline / row['milliseconds_median']:>10.2f} {row['first_call_seconds']:>8.1f}"
        )
    return "\n".join(lines)


def draw(results: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """A bar chart of updates a second with quartiles, as PNG."""
    import io

    import matplotlib

    from iql_torchrl.atomic import write_atomically

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 0.45 * len(results) + 1.5), layout="constrained")
    names = [f"{row['implementation']}, {row['mode']}" for row in results]
    rates = [row["updates_per_second"] for row in results]
    colours = {"TorchRL recipe": "tab:orange", "matrix products alone": "lightgrey"}
    slow, fast = zip(*(row["milliseconds_quartiles"][::-1] for row in results), strict=True)
    low = [rate - 1e3 / milli for rate, milli in zip(rates, slow, strict=True)]
    high = [1e3 / milli - rate for rate, milli in zip(rates, fast, strict=True)]
    bars = axis.barh(
        names,
        rates,
        xerr=([max(0.0, value) for value in low], [max(0.0, value) for value in high]),
        color=[colours.get(row["implementation"], "tab:blue") for row in results],
    )
    axis.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=6)
    figure.suptitle(title)
    axis.set_xlabel("updates per second (median, quartiles)")
    axis.margins(x=0.12)
    axis.invert_yaxis()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    plt.close(figure)
    write_atomically(path, lambda file: file.write(picture.getvalue()))


def random_transitions(config: DictConfig, dtype: torch.dtype = torch.float32) -> TensorDict:
    """Transitions of random numbers, the same for every row."""
    generator = torch.Generator().manual_seed(config.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    count = config.transitions
    flags = torch.zeros(count, 1, dtype=torch.bool)
    return TensorDict(
        {
            "observation": normal(count, config.observation_dim),
            "action": normal(count, config.action_dim).tanh() * 0.99,
            "episode": torch.zeros(count, dtype=torch.int64),
            "next": {
                "observation": normal(count, config.observation_dim),
                "reward": normal(count, 1),
                "done": flags,
                "terminated": flags.clone(),
                "truncated": flags.clone(),
            },
        },
        batch_size=[count],
    )


def _dtype(precision: str) -> torch.dtype:
    return torch.float64 if precision == "float64" else torch.float32


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def storage_row(path: Path, storage: str, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Load a log into a storage, prepare it as a run does, and time the step and the sampling of a batch by itself.

    For a process of its own: memory is that of the process.
    """
    memory = _PeakMemory()
    before = memory.now()
    start = time.perf_counter()
    transitions = load_transitions("hdf5", path=path, storage=storage, storage_folder=folder)
    loaded = time.perf_counter() - start
    fingerprint(transitions)
    ones = torch.ones(config["action_dim"])
    normalise_actions(transitions, -ones, ones)
    transform_rewards(transitions, "minus_one")
    prepared = time.perf_counter() - start
    load_peak = memory.peak()

    torch.manual_seed(config["seed"])
    sizes, widths = (config["observation_dim"], config["action_dim"]), tuple(config["hidden_dims"])
    loss = IQLLoss(
        build_actor(*sizes, hidden_dims=widths),
        build_qvalues(*sizes, hidden_dims=widths),
        build_value(sizes[0], hidden_dims=widths),
    )
    step = TrainingStep(
        loss, make_buffer(transitions, batch_size=config["batch_size"], seed=0), compile=config["compile"]
    )

    data = step.buffer[:]

    def sample() -> TensorDict:
        return data[step._draw()[0]]

    times: dict[str, list[float]] = {"step": [], "sample": []}
    for call in (step, sample):
        for _ in range(config["warm_up"]):
            call()
    for _ in range(config["rounds"]):
        for name, call in (("step", step), ("sample", sample)):
            start = time.perf_counter()
            for _ in range(config["steps_per_round"]):
                call()
            times[name].append((time.perf_counter() - start) / config["steps_per_round"])
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
