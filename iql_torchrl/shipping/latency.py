"""How long one action takes on one core, by what runs the policy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.shipping.files import Act, module_act
from iql_torchrl.shipping.graph import PolicyGraph
from iql_torchrl.training.compilation import resolve_compile

_ROUNDS, _CALLS, _WARM_UP = 21, 200, 50


class Latency(NamedTuple):
    """Microseconds of a call: median of the rounds and quartiles; and median of its ratio to the first row's."""

    microseconds: float
    quartiles: tuple[float, float]
    ratio: float


def latencies(
    policy: Policy, graph: PolicyGraph, exported: dict[str, Act], observation_dim: int
) -> tuple[dict[str, Latency], str]:
    """Time of one action from one observation, arrays in and out, on one thread, in interleaved rounds.

    Args:
        policy: as ``load_policy`` has it.
        graph: the same as a module, which is timed eager and compiled.
        exported: the same from files.
        observation_dim: size of the observation.

    Returns:
        by name, and why there is no compiled row, empty where there is one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calls: dict[str, Act] = dict(exported)
        compiles, note = resolve_compile("auto", torch.device("cpu"))
        if compiles:
            calls["compiled"] = module_act(torch.compile(graph, fullgraph=True, dynamic=False))
        calls |= {"eager": module_act(graph), "load_policy": lambda found: policy(found)}
        observation = np.random.default_rng(0).normal(size=(1, observation_dim)).astype(np.float32)
        inputs = [observation]
        if policy.chooses and policy.chooser is not None:
            inputs.append(policy.chooser.noise_for(observation, 0)[0].numpy())
        given = {name: inputs[:1] if name == "load_policy" else inputs for name in calls}  # which draws itself
        for name, call in calls.items():
            _seconds(call, given[name], _WARM_UP)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(_ROUNDS):
            for name, call in calls.items():
                times[name].append(_seconds(call, given[name], _CALLS) / _CALLS * 1e6)
    finally:
        torch.set_num_threads(threads)
    first = next(iter(times.values()))
    found = {}
    for name, taken in times.items():
        low, _, high = statistics.quantiles(taken, n=4)
        ratio = statistics.median(one / other for one, other in zip(taken, first, strict=True))
        found[name] = Latency(statistics.median(taken), (low, high), ratio)
    return found, "" if compiles else note


def _seconds(call: Act, inputs: Sequence[np.ndarray], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call(*inputs)
    return time.perf_counter() - start
