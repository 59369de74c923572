"""The loss with TorchRL's prioritised replay, whose C++ extension is compiled where the published one does not load.

TorchRL's wheel is built for one release of torch alone; its C++ sources are in it, and compile for the one that is
installed, which takes about a minute.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = """
import importlib.util, pathlib, sys
from torch.utils.cpp_extension import load
package = pathlib.Path(importlib.util.find_spec("torchrl").origin).parent
load(
    "_torchrl",
    [str(path) for path in sorted((package / "csrc").glob("*.cpp"))],
    extra_cflags=["-O1", "-DNDEBUG"],  # as setuptools builds it: assertions would end the process
    extra_include_paths=[str(package.parent)],
    build_directory=sys.argv[1],
    is_python_module=False,
)
"""
PROGRAM = """
import importlib.util, pathlib, sys
import torch

built = pathlib.Path(sys.argv[1]) / "_torchrl.so"
if built.exists():  # in place of the published one, without a change to the installation
    spec = importlib.util.spec_from_file_location("torchrl._torchrl", built)
    sys.modules["torchrl._torchrl"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer

from problems import random_transitions, small_loss

ALPHA, BETA, EPS = 0.7, 0.5, 1e-8
torch.manual_seed(0)
buffer = TensorDictPrioritizedReplayBuffer(
    alpha=ALPHA, beta=BETA, eps=EPS, storage=LazyTensorStorage(64), batch_size=16, priority_key="td_error"
)
buffer.extend(random_transitions(64).exclude("episode"))
loss, plain = small_loss(), small_loss(use_prioritized_weights=False)

first = buffer.sample()
assert torch.equal(first["priority_weight"], torch.ones(16)), "all alike before any error is known"
loss(first)
assert first["td_error"].shape == (16,)
buffer.update_tensordict_priority(first)
stored = torch.tensor([buffer.sampler._sum_tree[int(index)] for index in first["index"]])
torch.testing.assert_close(stored, (first["td_error"] + EPS) ** ALPHA)

batch = buffer.sample()
weights = batch["priority_weight"]
assert weights.unique().numel() > 1
weighted, unweighted = loss(batch.clone()), plain(batch.clone())
assert not torch.isclose(weighted["loss_value"], unweighted["loss_value"])
# The weighted mean of the elements, which reduction="none" gives.
elements = small_loss(reduction="none", scalar_output_mode="exclude", use_prioritized_weights=False)(batch.clone())
for name in ("loss_actor", "loss_qvalue", "loss_value"):
    torch.testing.assert_close(weighted[name], (weights * elements[name]).sum() / weights.sum())

counts = torch.zeros(64)
for _ in range(2000):
    counts += torch.bincount(buffer.sample()["index"], minlength=64)
priorities = torch.tensor([buffer.sampler._sum_tree[index] for index in range(64)])
assert (counts / counts.sum() - priorities / priorities.sum()).abs().max() < 0.01
print("prioritised replay works")
"""


def loads():
    code = "from torchrl.data import PrioritizedSampler; PrioritizedSampler(8, 0.7, 0.5)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.slow
def test_td_errors_become_priorities_and_priorities_weigh_the_losses(tmp_path):
    if not loads():
        if not all(map(shutil.which, ("g++", "ninja"))):
            pytest.skip("TorchRL's extension is of another torch, and g++ and ninja are needed to compile it")
        subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "prioritised replay works" in found.stdout, found.stderr
