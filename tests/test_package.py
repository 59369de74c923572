"""The wheel, away from the clone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import iql_torchrl
from iql_torchrl import IQLLoss, build_actor, build_qvalues, build_value, load_transitions
print(iql_torchrl.__file__)
loss = IQLLoss(build_actor(11, 3), build_qvalues(11, 3), build_value(11))
print(sorted(loss(load_transitions("embedded")[:10]).keys()))
"""


@pytest.mark.slow
def test_the_wheel_works_outside_the_clone_and_carries_the_dataset(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 6 * 2**20
    with zipfile.ZipFile(wheel) as archive:
        assert {name.split("/")[0].split("-")[0] for name in archive.namelist()} == {"iql_torchrl"}
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert str(tmp_path / "site") in found.stdout
    assert "['entropy', 'loss_actor', 'loss_qvalue', 'loss_value']" in found.stdout
