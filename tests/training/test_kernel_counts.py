"""How many kernels an update is, against a recorded file: a number, unlike a time, that a noisy machine cannot change.

Where a change is meant to change them: `python tests/training/test_kernel_counts.py` writes the file anew.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode

from iql_torchrl import IQLLoss, TrainingStep, build_actor, build_qvalues, build_value, make_buffer
from iql_torchrl.benchmark.case import Case
from iql_torchrl.training.products import why_not

RECORDED = Path(__file__).with_name("kernel_counts.json")
CASES = [f"{order}, {choice}" for order in ("sequential", "joint") for choice in ("mkl", "onednn")]
CASES += ["sequential, onednn, layer norm"]


class Kernels(TorchDispatchMode):
    """Counts what PyTorch is asked for; a product by oneDNN is none of these."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += not function.is_view
        return function(*arguments, **(keywords or {}))


def step_of(case, *, compile):
    order, choice, *norm = case.split(", ")
    torch.manual_seed(0)
    options = {"layer_norm": bool(norm)}
    loss = IQLLoss(build_actor(17, 6, **options), build_qvalues(17, 6, **options), build_value(17, **options))
    buffer = make_buffer(Case(name="counted", transitions=1000).random_transitions(), batch_size=256, seed=0)
    return TrainingStep(loss, buffer, total_steps=1000, order=order, compile=compile, products=choice)


CPU = torch.device("cpu")


def counts(case):
    """Of a compiled update: kernels that the compiler wrote, and calls of others; of a recorded one: all calls."""
    step = step_of(case, compile=False)
    step()
    with Kernels() as kernels:
        step()
    found = Counter(recorded=kernels.count)
    metrics.reset()
    torch._dynamo.utils.counters.clear()
    step = step_of(case, compile=True)
    with torch._inductor.config.patch(force_disable_caches=True):  # which count otherwise
        step()
    assert step.compiled and not step.compile_note
    return dict(found) | {
        "compiled": metrics.generated_kernel_count,
        "compiled, external": torch._dynamo.utils.counters["inductor"]["extern_calls"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_update_takes_no_more_kernels_than_recorded(case):
    if "onednn" in case and (reason := why_not(CPU, torch.float32)):
        pytest.skip(reason)
    recorded, found = json.loads(RECORDED.read_text())[case], counts(case)
    grown = {name: (recorded[name], count) for name, count in found.items() if count > recorded[name]}
    assert not grown, f"more kernels than recorded, (recorded, found): {grown}; if meant: python {Path(__file__).name}"


if __name__ == "__main__":
    RECORDED.write_text(json.dumps({case: counts(case) for case in CASES}, indent=2) + "\n")
