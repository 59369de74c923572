"""Our rows: the training step as a run builds it, in one order and mode."""

from __future__ import annotations

import torch

from iql_torchrl.benchmark.case import Case, Row
from iql_torchrl.data.buffer import make_buffer
from iql_torchrl.networks import build_actor, build_discrete_actor, build_discrete_qvalues, build_qvalues, build_value
from iql_torchrl.objectives import DiscreteIQLLoss, IQLLoss
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
        precision="float32" if case.precision == "float64" else case.precision,
    )


def _loss(case: Case) -> IQLLoss:
    hidden_dims, layer_norm = case.hidden_dims, case.layer_norm
    value = build_value(case.observation_dim, hidden_dims=hidden_dims, layer_norm=layer_norm)
    actor_of = build_discrete_actor if case.discrete else build_actor
    qvalues_of = build_discrete_qvalues if case.discrete else build_qvalues
    actor = actor_of(case.observation_dim, case.action_dim, hidden_dims=hidden_dims, layer_norm=layer_norm)
    qvalues = qvalues_of(case.observation_dim, case.action_dim, hidden_dims=hidden_dims, layer_norm=layer_norm)
    if case.discrete:
        return DiscreteIQLLoss(actor, qvalues, value, action_space="categorical")
    return IQLLoss(actor, qvalues, value)
