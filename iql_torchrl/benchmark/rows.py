"""What is timed: one update, ours and TorchRL's, and the matrix products that it cannot do without.

Every row has the same batch, networks, dimensions, precision and threads. An update is sampling, three losses, Adam
and the target update.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded, LazyMemmapStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import IQLLoss as TorchRLLoss
from torchrl.objectives import SoftUpdate, group_optimizers

from iql_torchrl.data.buffer import make_buffer
from iql_torchrl.networks import build_actor, build_qvalues, build_value
from iql_torchrl.objectives import IQLLoss
from iql_torchrl.running.options import BenchmarkOptions
from iql_torchrl.training.step import TrainingStep

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
    options: BenchmarkOptions, device: torch.device, *, order: str, mode: str, seeds: int = 1, at_once: int = 1
) -> Row:
    """``TrainingStep`` in ``order``; ``mode`` is eager, compiled, or compiled and captured as a CUDA graph."""
    dtype, precision = dtype_of(options.precision), options.precision
    transitions = random_transitions(options, dtype).to(device)
    widths = list(options.hidden_dims)
    losses, buffers = [], []
    for seed in range(options.seed, options.seed + seeds):
        torch.manual_seed(seed)
        actor = build_actor(options.observation_dim, options.action_dim, hidden_dims=widths)
        critics = build_qvalues(options.observation_dim, options.action_dim, hidden_dims=widths)
        value = build_value(options.observation_dim, hidden_dims=widths)
        losses.append(IQLLoss(actor, critics, value).to(device, dtype))
        buffers.append(make_buffer(transitions, batch_size=options.batch_size, seed=seed, device=device))
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


def torchrl_row(options: BenchmarkOptions, device: torch.device, folder: str, *, compile: bool) -> Row:
    """The update of TorchRL's own offline recipe, with the networks and hyperparameters of the other rows."""
    dtype = dtype_of(options.precision)
    torch.manual_seed(options.seed)

    def mlp(inputs: int, outputs: int) -> MLP:
        cells = list(options.hidden_dims)
        return MLP(in_features=inputs, out_features=outputs, num_cells=cells, activation_class=nn.ReLU)

    observation_dim, action_dim = options.observation_dim, options.action_dim
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
        storage=LazyMemmapStorage(options.transitions, scratch_dir=folder),
        sampler=SamplerWithoutReplacement(),
        batch_size=options.batch_size,
    )
    buffer.extend(random_transitions(options, dtype).exclude("episode"))
    low_precision = options.precision == "bfloat16"
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


def products_row(options: BenchmarkOptions, device: torch.device, *, order: str) -> Row:
    """The matrix products of an update and nothing else: no bias, activation, loss, optimizer or sampling.

    A forward pass multiplies once a layer, a backward pass twice but once in the first layer, whose input needs no
    gradient; each is PyTorch's ``mm`` into memory that is there already.
    """
    dtype = torch.bfloat16 if options.precision == "bfloat16" else dtype_of(options.precision)
    inputs = {"v": options.observation_dim, "a": options.observation_dim}
    inputs["q"] = options.observation_dim + options.action_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    batch, operations = options.batch_size, []
    shapes = {
        network: [*zip([inputs[network], *options.hidden_dims], [*options.hidden_dims, outputs], strict=True)]
        for network, outputs in (("v", 1), ("q", 1), ("a", options.action_dim))
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


def random_transitions(options: BenchmarkOptions, dtype: torch.dtype = torch.float32) -> TensorDict:
    """Transitions of random numbers, the same for every row."""
    generator = torch.Generator().manual_seed(options.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    count = options.transitions
    flags = torch.zeros(count, 1, dtype=torch.bool)
    return TensorDict(
        {
            "observation": normal(count, options.observation_dim),
            "action": normal(count, options.action_dim).tanh() * 0.99,
            "episode": torch.zeros(count, dtype=torch.int64),
            "next": {
                "observation": normal(count, options.observation_dim),
                "reward": normal(count, 1),
                "done": flags,
                "terminated": flags.clone(),
                "truncated": flags.clone(),
            },
        },
        batch_size=[count],
    )


def dtype_of(precision: str) -> torch.dtype:
    """Of parameters and data."""
    return torch.float64 if precision == "float64" else torch.float32
