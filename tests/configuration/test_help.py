"""`--help` of every recipe: each option with its description, default and range."""

import pytest
from processes import run

from iql_torchrl.configuration.declaring import declared_names
from iql_torchrl.running.reference import RECIPES

# Of programs, of one logger, and of RLinf's files alone.
ELSEWHERE = {
    "dataset.arrays",
    "dataset.buffer",
    "dataset.dataset",
    "logger.mode",
    "logger.project",
    "env.dataset_type",
    "env.train.env_type",
    "env.train.env_name",
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_option_is_listed_and_nothing_is_written(name, tmp_path):
    out = run(f"{name}.py", "--help", cwd=tmp_path)
    listed = {line.split("=")[0].split(" ")[0] for line in out.splitlines() if not line.startswith(" ")}
    expected = set(declared_names(RECIPES[name])) - ELSEWHERE - {"dataset.source", "actor.worker_cls"}
    assert expected <= listed
    assert not list(tmp_path.iterdir())


def test_an_option_has_its_description_default_range_and_source(tmp_path):
    lines = run("iql_offline.py", "--help", cwd=tmp_path).splitlines()
    place = lines.index("algorithm.expectile=0.7  (a number in (0, 1])")
    assert "xpectile of V's regression" in lines[place + 1] and lines[place + 1].endswith("[paper, equation 5]")
    assert any(line.startswith("  algorithm=") and "behaviour_cloning" in line for line in lines)
    assert any(line.startswith("  dataset=") and "d4rl|" in line for line in lines)


def test_help_follows_the_options_that_are_given(tmp_path):
    options = ("dataset=d4rl", "dataset.name=antmaze-umaze-v2", "train.seed=7")
    lines = [line.split("  (")[0] for line in run("iql_offline.py", *options, "--help", cwd=tmp_path).splitlines()]
    for line in ("algorithm.expectile=0.9", "eval.episodes=100", "train.seed=7", "dataset.name=antmaze-umaze-v2"):
        assert line in lines


def test_the_options_of_a_logger_are_listed_with_it(tmp_path):
    assert "logger.mode=offline  (" in run("iql_offline.py", "logger=wandb", "--help", cwd=tmp_path)
