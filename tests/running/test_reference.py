"""The tables of options in `configs/README.md`: as the declarations are now."""

import pytest
import yaml

from iql_torchrl.configuration.composing import CONFIGS
from iql_torchrl.configuration.declaring import declared_names
from iql_torchrl.data.sources import KINDS
from iql_torchrl.running.reference import BEGIN, END, README, RECIPES, tables, with_tables


def test_the_tables_are_those_of_the_declarations():
    text = README.read_text()
    assert with_tables(text) == text, "stale: run `make docs`"


def test_every_option_of_every_recipe_has_a_row():
    rows = {line.split("`")[1] for line in tables().splitlines() if line.startswith("| `")}
    for name, options in RECIPES.items():
        # Which the choice of a group sets, or a program gives.
        given = {"dataset.source", "dataset.arrays", "dataset.dataset", "dataset.buffer"}
        assert set(declared_names(options)) - given <= rows, name


def test_every_recipe_has_its_options_in_the_tables():
    found = {path.stem for path in (CONFIGS.parent / "recipes").glob("*.py")}
    assert found == set(RECIPES)


def test_a_default_has_no_date_in_it():
    assert "`runs/DATE_TIME`" in tables()


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}"])
def test_a_text_without_its_two_markers_is_refused(text):
    with pytest.raises(ValueError, match="each once"):
        with_tables(text)


@pytest.mark.parametrize("source", KINDS, ids=lambda source: source.model_fields["source"].default)
def test_the_file_of_a_source_has_the_defaults_that_are_declared(source):
    name = source.model_fields["source"].default
    content = yaml.safe_load((CONFIGS / "dataset" / f"{name}.yaml").read_text())
    found = yaml.safe_load((CONFIGS / "dataset" / "_base.yaml").read_text())
    found |= {key: value for key, value in content.get("dataset", content).items() if key != "defaults"}
    needed = {key for key, value in found.items() if value == "???"}
    assert needed == {key for key, field in source.model_fields.items() if field.is_required()}
    assert {key: value for key, value in found.items() if key not in needed} == {
        key: field.default for key, field in source.model_fields.items() if key not in needed
    }
