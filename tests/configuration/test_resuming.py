"""A run that goes on has the configuration of its folder, and what is changed of it is told."""

from __future__ import annotations

import pytest
import yaml

from iql_torchrl.configuration.composing import check_command_line, compose, initialised
from iql_torchrl.errors import ConfigurationError
from iql_torchrl.running.options import OfflineOptions

OF_A_LOG = ["dataset=hdf5", "dataset.path=log.hdf5", "env.name=null", "algorithm.expectile=0.8", "train.steps=50"]


@pytest.fixture
def folder(tmp_path):
    """A run folder with the configuration of a run on a log."""

    def make(*overrides):
        with initialised():
            options = compose("iql_offline", [*OF_A_LOG, *overrides], OfflineOptions)
        path = tmp_path / "run"
        path.mkdir(exist_ok=True)
        (path / "config.yaml").write_text(yaml.safe_dump(options.model_dump(exclude_unset=True)))
        return path

    return make


def resumed(path, *overrides):
    with initialised():
        return compose("iql_offline", ["resume=auto", f"run_dir={path}", *overrides], OfflineOptions, folder=path)


def test_nothing_but_the_folder_needs_to_be_named(folder, capsys):
    options = resumed(folder("logger=tensorboard", "env.kwargs={max_episode_steps:7}"))
    assert (options.dataset.source, options.dataset.path, options.env.name) == ("hdf5", "log.hdf5", None)
    assert (options.algorithm.expectile, options.train.steps, options.logger.kind) == (0.8, 50, "tensorboard")
    assert options.env.kwargs == {"max_episode_steps": 7}
    assert options.resume == "auto"
    assert capsys.readouterr().out == ""


def test_options_on_which_nothing_learnt_depends_may_change_and_are_told(folder, capsys):
    options = resumed(folder(), "train.steps=80", "eval.episodes=3", "checkpoint.keep=9")
    assert (options.train.steps, options.eval.episodes, options.algorithm.expectile) == (80, 3, 0.8)
    out = capsys.readouterr().out
    assert out.startswith("resumed with changes: ")
    for line in ("train.steps 50 -> 80", "eval.episodes 10 -> 3", "checkpoint.keep 3 -> 9"):
        assert line in out


def test_an_option_may_be_named_again_with_the_value_that_it_has(folder, capsys):
    resumed(folder(), *OF_A_LOG)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["algorithm.expectile=0.9"], "algorithm.expectile"),
        (["dataset.path=other.hdf5"], "dataset.path"),
        (["dataset=embedded"], "dataset.source"),
        (["algorithm.variant=corl"], "algorithm.update_order"),
        (["algorithm.gamma=0.9"], "algorithm.discount"),
        (["algorithm=antmaze"], "algorithm.temperature"),
        (["train.seed=3"], "train.seed"),
        (["env.name=Pendulum-v1"], "env.name"),
        (["dataset.normalised_actions=true"], "dataset.normalised_actions"),
    ],
)
def test_options_on_which_what_is_learnt_depends_need_a_word(folder, overrides, name, capsys):
    path = folder()
    with pytest.raises(ConfigurationError) as error:
        resumed(path, *overrides)
    assert name in str(error.value) and "resume_with_changes=true" in str(error.value)
    resumed(path, *overrides, "resume_with_changes=true")
    assert name in capsys.readouterr().out


def test_a_variant_brings_its_options_along_and_leaves_the_others_as_they_were(folder):
    options = resumed(folder(), "algorithm.variant=corl", "resume_with_changes=true").algorithm
    assert (options.update_order, options.normalise_observations, options.expectile) == ("joint", True, 0.8)


def test_options_that_are_newer_than_the_run_have_their_defaults(folder):
    path = folder()
    saved = yaml.safe_load((path / "config.yaml").read_text())
    del saved["resume_with_changes"], saved["algorithm"]["layer_norm"], saved["dataset"]["storage"]
    (path / "config.yaml").write_text(yaml.safe_dump(saved))
    options = resumed(path)
    assert (options.algorithm.layer_norm, options.dataset.storage) == (False, "device")


def test_a_folder_without_a_configuration_starts_from_the_command_line(tmp_path):
    assert resumed(tmp_path).dataset.source == "embedded"


@pytest.mark.parametrize("content", ["[1, 2", "- 1", "a: 1", "\x00", ""])
def test_a_damaged_configuration_is_named(folder, content):
    path = folder()
    (path / "config.yaml").write_text(content)
    with pytest.raises(ConfigurationError, match=r"config\.yaml, with which the run would go on, cannot be read"):
        resumed(path)


def test_values_in_the_folder_that_make_no_sense_are_refused_by_name(folder):
    path = folder()
    saved = yaml.safe_load((path / "config.yaml").read_text())
    saved["algorithm"]["expectile"] = 3
    (path / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ConfigurationError, match=r"algorithm\.expectile must be a number in \(0, 1\], got 3"):
        resumed(path)


def test_a_run_folder_may_be_named_in_place_of_auto(folder, tmp_path):
    path = folder()
    arguments = check_command_line([f"resume={path}", "train.steps=60"], "iql_offline", OfflineOptions)
    assert {"resume=auto", f"run_dir={path}", "train.steps=60", "dataset=hdf5"} == set(arguments)
    assert check_command_line([f"resume={path}", f"run_dir={path}"], "iql_offline", OfflineOptions)
    with pytest.raises(ConfigurationError, match="give one of them"):
        check_command_line([f"resume={path}", f"run_dir={tmp_path / 'other'}"], "iql_offline", OfflineOptions)


def test_hydra_is_told_the_source_of_the_folder(folder):
    path = folder()
    arguments = check_command_line(
        ["resume=auto", f"run_dir={path}", "dataset.keep_timeouts=false"], "iql_offline", OfflineOptions
    )
    assert arguments[0] == "dataset=hdf5"


def test_a_run_on_data_that_a_program_held_is_resumed_there(folder):
    path = folder()
    saved = yaml.safe_load((path / "config.yaml").read_text())
    saved["dataset"] = {"source": "arrays"}
    (path / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ConfigurationError, match=r"train\(\.\.\., resume=True\)"):
        resumed(path)


def test_a_group_that_is_named_again_keeps_its_options(folder):
    options = resumed(folder("logger=wandb", "logger.project=mine"), "dataset=hdf5", "logger=wandb")
    assert (options.dataset.path, options.logger.project) == ("log.hdf5", "mine")
