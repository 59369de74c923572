"""The command line of a sweep."""

import os

import pytest

from iql_torchrl.configuration import sweeping
from iql_torchrl.configuration.sweeping import of_sweep


def test_a_single_run_keeps_its_arguments():
    assert of_sweep(["run_dir=here", "train.num_seeds=4"]) == ["run_dir=here", "train.num_seeds=4"]


def test_the_folder_of_a_sweep_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert of_sweep(["-m", "run_dir=here"]) == ["-m", f"run_dir='{tmp_path / 'here'}'"]
    assert of_sweep(["-m"])[1].startswith(f"run_dir='{tmp_path}/runs/20")


def test_a_folder_that_is_swept_or_interpolated_stays():
    assert of_sweep(["-m", "run_dir=a,b"]) == ["-m", "run_dir=a,b"]
    assert of_sweep(["-m", "run_dir=runs/${train.seed}"]) == ["-m", "run_dir=runs/${train.seed}"]


def test_what_ray_is_told_needs_no_plus():
    assert "++hydra.launcher.ray.remote.num_cpus=2" in of_sweep(["-m", "hydra.launcher.ray.remote.num_cpus=2"])


def test_processes_of_this_machine_start_no_more_runs_at_once_than_it_has_cores():
    assert f"hydra.sweeper.max_batch_size={os.cpu_count()}" in of_sweep(["-m", "hydra/launcher=submitit_local"])
    given = ["-m", "hydra/launcher=submitit_local", "hydra.sweeper.max_batch_size=7"]
    assert [one for one in of_sweep(given) if "batch_size" in one] == ["hydra.sweeper.max_batch_size=7"]


@pytest.mark.parametrize(
    ("gpus", "given", "expected"),
    [
        ("0,1,2,3", ["train.num_seeds=32"], {"train.seed=range(0,32,8)", "train.num_seeds=8"}),
        ("0,1", ["train.num_seeds=6", "train.seed=10"], {"train.seed=range(10,16,3)", "train.num_seeds=3"}),
        ("0,1,2", ["train.num_seeds=10"], {"train.seed=range(0,10,2)", "train.num_seeds=2"}),
        ("0,1,2,3", ["train.num_seeds=2"], {"train.seed=range(0,2,1)", "train.num_seeds=1"}),
        ("0", ["train.num_seeds=32"], {"train.num_seeds=32"}),
        ("", ["train.num_seeds=32"], {"train.num_seeds=32"}),
        ("0,1", ["train.num_seeds=4", "train.seed=range(2)"], {"train.num_seeds=4", "train.seed=range(2)"}),
    ],
)
def test_seeds_are_spread_over_the_gpus_that_are_seen(monkeypatch, gpus, given, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    found = of_sweep(["-m", "hydra/launcher=ray", *given])
    assert {one for one in found if one.startswith("train.")} == expected
    spread = any(one.startswith("train.seed=range") and one not in given for one in found)
    assert ("++hydra.launcher.ray.remote.num_gpus=1" in found) == spread


def test_gpus_are_counted_as_the_driver_lists_them(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: one (UUID: GPU-1)'\necho 'GPU 1: other (UUID: GPU-2)'\n")
    program.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert sweeping.visible_gpus() == 2
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert sweeping.visible_gpus() == 0
