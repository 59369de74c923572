"""Which cases are measured, and which rows each of them has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from iql_torchrl.benchmark.case import Case, Row
from iql_torchrl.benchmark.evaluation import evaluation_rates
from iql_torchrl.benchmark.limit import limit_row
from iql_torchrl.benchmark.own_process import in_own_process
from iql_torchrl.benchmark.plain_pytorch import plain_row
from iql_torchrl.benchmark.rows import our_row
from iql_torchrl.benchmark.torchrl_rows import recipe_row, shipped_row, tuned_row
from iql_torchrl.errors import LONGEST_REASON, first_line
from iql_torchrl.running.options import BenchmarkOptions

_OGBENCH: dict[str, Any] = {"observation_dim": 40, "action_dim": 5, "hidden_dims": (512,) * 4, "layer_norm": True}
# What a case of the full suite has other than the first.
CASES: dict[str, dict[str, Any]] = {
    "locomotion": {},
    "antmaze": {"observation_dim": 29, "action_dim": 8},
    "ogbench_256": {**_OGBENCH, "slowness": 12},
    "ogbench_1024": {**_OGBENCH, "batch_size": 1024, "slowness": 40},
    "discrete": {"discrete": True},
    "calls_8": {"updates_per_call": 8},
    "seeds_4": {"seeds": 4},
    "seeds_16": {"seeds": 16},
    "ddpgbc": {"extraction": "ddpgbc"},
    "flow": {"extraction": "flow"},
    "diffusion": {"extraction": "diffusion", "slowness": 3},
}


def cases_of(options: BenchmarkOptions, device: torch.device) -> list[Case]:
    """The cases of ``options.suite`` that ``options.cases`` chooses."""
    common: dict[str, Any] = {
        "observation_dim": options.observation_dim,
        "action_dim": options.action_dim,
        "hidden_dims": tuple(options.hidden_dims),
        "batch_size": options.batch_size,
        "transitions": options.transitions,
        "stacked_seeds": options.stacked_seeds,
        "precision": options.precision,
        "device": device,
        "seed": options.seed,
    }
    if options.suite == "update":
        return [Case(name="update", **common)]
    chosen = options.cases or list(CASES)
    return [Case(name=name, **(common | own)) for name, own in CASES.items() if name in chosen]


def rows_of(case: Case, options: BenchmarkOptions, folder: str) -> list[Row]:
    """The rows of a case; the first is TorchRL's, which the others are compared with, where TorchRL has that loss.

    Args:
        case: one of :func:`cases_of`.
        options: ``suite`` and ``compile`` say which rows.
        folder: for memory-mapped data.
    """
    modes = ["eager", "compiled"] if options.compile else ["eager"]
    ours = [*modes, "CUDA graph"] if options.compile and case.device.type == "cuda" else modes
    if options.suite == "update":
        rows = [recipe_row(case, f"{folder}/{mode}", mode=mode) for mode in modes]
        rows += [our_row(case, order=order, mode=mode) for order in ("joint", "paper") for mode in ours]
        several = replace(case, updates_per_call=options.updates_per_call)
        rows += [our_row(one, order="paper", mode=ours[-1]) for one in (several, replace(several, seeds=options.seeds))]
    elif case.extraction != "awr":
        rows = [our_row(case, order="paper", mode=mode) for mode in ours]
    elif case.seeds > 1 or case.updates_per_call > 1:
        rows = [in_own_process(shipped_row(case, f"{folder}/{case.name}", mode="eager"))]
        rows += [our_row(case, order="paper", mode=mode) for mode in ours]
    else:
        rows = [in_own_process(shipped_row(case, f"{folder}/{case.name}-{mode}", mode=mode)) for mode in modes]
        rows += [tuned_row(case, mode=mode) for mode in modes]
        rows += [] if case.discrete else [plain_row(case)]
        orders = ("joint", "paper") if case.name == "locomotion" else ("paper",)
        rows += [our_row(case, order=order, mode=mode) for order in orders for mode in ours]
    return rows + [limit_row(case, order) for order in ("joint", "paper")]


def evaluation(environment: str = "Hopper-v5", episodes: int = 10) -> dict[str, Any]:
    """What :func:`iql_torchrl.benchmark.evaluation.evaluation_rates` measures; ``failed`` with the reason."""
    try:
        return evaluation_rates(environment, episodes)
    except Exception as error:  # as of a row: what was measured before is not lost
        return {"failed": f"{type(error).__name__}: {first_line(error, LONGEST_REASON)}"}


def describe(cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
    """The sizes of the cases, for the report."""
    shown = (
        "observation_dim",
        "action_dim",
        "hidden_dims",
        "batch_size",
        "layer_norm",
        "discrete",
        "extraction",
        "seeds",
    )
    return {
        case.name: {key: getattr(case, key) for key in (*shown, "updates_per_call")} | {"stacked_seeds": case.stacked}
        for case in cases
    }
