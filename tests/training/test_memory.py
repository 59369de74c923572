"""Memory on its way from one update to the next."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Updates whose temporary tensors are some MB, and how many pages each of them asked the system for.
UPDATES = """
import resource, torch
from iql_torchrl import IQLLoss, TrainingStep, build_actor, build_qvalues, build_value, make_buffer
from iql_torchrl.benchmark.case import Case

torch.set_num_threads(1)
wide = {"hidden_dims": (768, 768, 768)}
loss = IQLLoss(build_actor(17, 6, **wide), build_qvalues(17, 6, **wide), build_value(17, **wide))
buffer = make_buffer(Case(name="wide", transitions=1000).random_transitions(), batch_size=16, seed=0)
step = TrainingStep(loss, buffer, compile=False)
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


def pages_an_update(**environment: str) -> float:
    found = subprocess.run(
        [sys.executable, "-c", UPDATES], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return float(found.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_an_update_finds_the_memory_of_the_one_before():
    assert pages_an_update() < 100


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_what_the_environment_says_of_freed_memory_holds():
    assert pages_an_update(MALLOC_TRIM_THRESHOLD_="1", MALLOC_MMAP_THRESHOLD_="1000000") > 1000
