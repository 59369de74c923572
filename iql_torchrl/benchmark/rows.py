"""Our rows: the training step as a run builds it, in one order and mode."""

from __future__ import annotations

from typing import Any

import torch

from iql_torchrl.benchmark.case import Case, Row
from iql_torchrl.data.buffer import make_buffer
from iql_torchrl.networks import build_discrete_actor, build_discrete_qvalues, build_policy, build_qvalues, build_value
from iql_torchrl.objectives import DiscreteIQLLoss, IQLLoss
from iql_torchrl.training.construction import LOSSES
from iql_torchrl.training.step import TrainingStep


def our_row(case: Case, *, order: str, mode: str) -> Row:
    """``TrainingStep`` in ``order``, ``"joint"`` or ``"paper"``.

    ``mode`` is eager, compiled, or compiled and captured as a CUDA graph.
    """
    name = f"iql_torchrl, {order}"
    name += f", {case.seeds} seeds" if case.seeds > 1 else ""
    name += f", {case.updates_per_call} a call" if case.updates_per_call > 1 else ""
    return Row(name, mode, order, lambda: _step(case, order, mode), case.seeds * case.updates_per_call)


def _step(case: Case, order: str, mode: str) -> TrainingStep:
    transitions = case.random_transitions().to(case.device)
    losses, buffers = [], []
    for seed in range(case.seed, case.seed + case.seeds):
        torch.manual_seed(seed)
        losses.append(_loss(case).to(case.device, case.dtype))
        buffers.append(make_buffer(transitions, batch_size=case.batch_size, seed=seed, device=case.device))
    return TrainingStep(
        losses if case.seeds > 1 else losses[0],
        buffers if case.seeds > 1 else buffers[0],
        total_steps=1_000_000,
        order="sequential" if order == "paper" else order,
        compile=mode != "eager",
        cudagraphs=mode == "CUDA graph",
        updates_per_call=case.updates_per_call,
        stacked=case.stacked_seeds,
        precision="float32" if case.precision == "float64" else case.precision,
    )


def _loss(case: Case) -> IQLLoss:
    sizes: dict[str, Any] = {"observation_dim": case.observation_dim, "hidden_dims": case.hidden_dims}
    sizes |= {"layer_norm": case.layer_norm}
    value = build_value(**sizes)
    if case.discrete:
        sizes["num_actions"] = case.action_dim
        actor, qvalues = build_discrete_actor(**sizes), build_discrete_qvalues(**sizes)
        return DiscreteIQLLoss(actor, qvalues, value, action_space="categorical")
    sizes["action_dim"] = case.action_dim
    actor: Any = build_policy({**sizes, "extraction": case.extraction})
    return LOSSES[case.extraction](actor, build_qvalues(**sizes), value)
