"""Options are declared once: on the command line, as arguments of the library, in the files of values."""

from __future__ import annotations

import inspect
import math
from typing import Annotated, Literal

import pytest
from pydantic import Field

from iql_torchrl import IQLLoss, TrainingStep, build_actor
from iql_torchrl.configuration.composing import CONFIGS, compose_values, initialised
from iql_torchrl.configuration.declaring import (
    Options,
    check_arguments,
    declaration,
    declared_names,
    expected_of,
    find_mistakes,
    option,
    read_options,
)
from iql_torchrl.configuration.help import described
from iql_torchrl.configuration.options import AlgorithmOptions, TrainOptions
from iql_torchrl.data.sources import KINDS
from iql_torchrl.errors import ConfigurationError
from iql_torchrl.running.options import InspectOptions, OfflineOptions
from iql_torchrl.running.reference import RECIPES

NAMES_OF_KINDS = [kind.model_fields["source"].default for kind in KINDS]


class Inner(Options):
    width: int = option("of it", ge=1, le=9)


class Example(Options):
    share: float = option("a share", gt=0, le=1)
    rate: float = option("a rate", ge=0, allow_inf_nan=False)
    seed: int = option("a seed", ge=0, lt=2**32)
    kind: Literal["red", "blue", None] = option("a colour")
    flag: bool = option("a flag")
    limit: int | None = option("a limit", ge=1)
    mode: Literal["auto", True, False] = option("a mode")
    text: str = option("a name", expected="a name", example="NAME", min_length=1)
    widths: Annotated[list[int], Field(min_length=1)] = option("widths", expected="a list such as [3,4]")
    inner: Inner


GOOD = {
    "share": 0.5,
    "rate": 1,
    "seed": 0,
    "kind": None,
    "flag": True,
    "limit": None,
    "mode": "auto",
    "text": "x",
    "widths": [1],
    "inner": {"width": 3},
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("share", "a number in (0, 1]"),
        ("rate", "a finite number >= 0"),
        ("seed", "an integer in [0, 2^32)"),
        ("kind", "one of red, blue, null"),
        ("flag", "true or false"),
        ("limit", "null or an integer >= 1"),
        ("mode", "one of auto, true, false"),
        ("text", "a name"),
        ("inner.width", "an integer in [1, 9]"),
    ],
)
def test_what_is_expected_is_told_from_type_and_limits(name, expected):
    assert expected_of(declaration(Example, name)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 0}, "p.share must be a number in (0, 1], got 0."),
        ({"share": math.nan}, "p.share must be a number in (0, 1], got nan."),
        ({"share": True}, "p.share must be a number in (0, 1], got True."),
        ({"share": "0.5"}, "p.share must be a number in (0, 1], got '0.5'."),
        ({"rate": math.inf}, "p.rate must be a finite number >= 0, got inf."),
        ({"seed": 1.0}, "p.seed must be an integer in [0, 2^32), got 1.0."),
        ({"seed": 2**32}, "p.seed must be an integer in [0, 2^32), got 4294967296."),
        ({"kind": "bleu"}, "p.kind must be one of red, blue, null, got 'bleu'; did you mean 'blue'?"),
        ({"kind": "xyz"}, "p.kind must be one of red, blue, null, got 'xyz'."),
        ({"flag": 1}, "p.flag must be true or false, got 1."),
        ({"limit": 0}, "p.limit must be null or an integer >= 1, got 0."),
        ({"text": ""}, "p.text must be a name, got ''."),
        ({"widths": []}, "p.widths must be a list such as [3,4], got []."),
        ({"widths": [1, 2.5]}, "p.widths must be a list such as [3,4], got [1, 2.5]."),
        ({"inner": {"width": 10}}, "p.inner.width must be an integer in [1, 9], got 10."),
        ({"inner": {"widht": 1, "width": 1}}, "unknown option p.inner.widht; did you mean 'p.inner.width'?"),
        ({"shares": 1}, "unknown option p.shares; did you mean 'p.share'?"),
    ],
)
def test_a_value_is_refused_with_its_name_what_was_found_and_what_was_expected(changes, message):
    assert find_mistakes(Example, {**GOOD, **changes}, "p.") == [message]


def test_good_values_are_refused_by_nothing():
    assert find_mistakes(Example, GOOD) == []
    assert read_options(Example, GOOD).inner.width == 3


def test_an_option_that_is_not_given_is_asked_for_with_an_example():
    values = {name: value for name, value in GOOD.items() if name not in ("text", "share")}
    assert find_mistakes(Example, values) == [
        "option share is needed; give share=VALUE.",
        "option text is needed; give text=NAME.",
    ]


def test_all_mistakes_come_in_one_error():
    with pytest.raises(ConfigurationError) as error:
        read_options(Example, {**GOOD, "share": 2, "limit": -1, "kindd": "red"})
    lines = str(error.value).splitlines()
    assert lines[0] == "3 mistakes:" and len(lines) == 4
    assert any("share must be" in line for line in lines) and any("kindd" in line for line in lines)


def test_an_argument_is_refused_in_pythons_spelling():
    with pytest.raises(ValueError, match=r"^limit must be None or an integer >= 1, got 0\.$"):
        check_arguments(Example, limit=0)
    with pytest.raises(ValueError, match=r"^mode must be one of auto, True, False, got 'atuo'; did you mean 'auto'\?$"):
        check_arguments(Example, mode="atuo")
    check_arguments(Example, limit=None, share=1, widths=(1, 2))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_option_is_described(recipe):
    for name in declared_names(RECIPES[recipe]):
        if name != "dataset.source" and not name.endswith((".arrays", ".buffer", ".dataset")):
            field = declaration(RECIPES[recipe], name)
            assert field.description and expected_of(field), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_key_of_a_configuration_is_declared_and_every_option_is_a_key(recipe):
    with initialised():
        values, _ = compose_values(recipe, [], RECIPES[recipe], needed=False)
    found = {one.name for one in described(RECIPES[recipe], values)}

    def leaves(values, prefix=""):
        for key, value in values.items():
            section = isinstance(value, dict) and declaration(RECIPES[recipe], f"{prefix}{key}").description is None
            yield from leaves(value, f"{prefix}{key}.") if section else [f"{prefix}{key}"]

    assert set(leaves(values)) - {"dataset.source"} <= found


@pytest.mark.parametrize("source", NAMES_OF_KINDS)
def test_a_source_has_the_same_defaults_in_its_file_and_in_python(source):
    kind = KINDS[NAMES_OF_KINDS.index(source)]
    with initialised():
        values, _ = compose_values("inspect_dataset", [f"dataset={source}"], InspectOptions, needed=False)
    declared = {name: field.default for name, field in kind.model_fields.items() if not field.is_required()}
    assert values["dataset"] == declared
    assert (CONFIGS / "dataset" / f"{source}.yaml").exists()


@pytest.mark.parametrize(
    ("function", "options", "names"),
    [
        (
            IQLLoss,
            AlgorithmOptions,
            {
                *("temperature", "expectile", "max_weight", "delay_value", "num_qvalue_nets", "qvalue_reduction"),
                *("num_sampled_qvalue_nets", "qvalue_aggregation", "value_loss", "gumbel_temperature", "gumbel_clip"),
            },
        ),
        (
            build_actor,
            AlgorithmOptions,
            {"hidden_dims", "layer_norm", "activation", "policy", "standard_deviation", "initialisation"},
        ),
        (TrainingStep, AlgorithmOptions, {"actor_lr", "value_lr", "critic_lr", "tau"}),
        (TrainingStep, TrainOptions, {"compile", "updates_per_call", "cudagraphs", "precision", "products"}),
    ],
)
def test_arguments_of_the_library_have_the_defaults_of_the_recipe(function, options, names):
    with initialised():
        values, _ = compose_values("iql_offline", [], OfflineOptions)
    section = values["algorithm" if options is AlgorithmOptions else "train"]
    for name in names:
        default = inspect.signature(function).parameters[name].default
        assert (list(default) if isinstance(default, tuple) else default) == section[name], name
