"""The options of fitted Q evaluation."""

from iql_torchrl.configuration.composing import compose, initialised
from iql_torchrl.configuration.options import FittedQOptions
from iql_torchrl.running.options import JudgeOptions


def test_the_recipe_and_a_program_have_the_same_defaults():
    with initialised():
        options = compose("judge", ["checkpoints=[runs/mine]"], JudgeOptions)
    assert options.fitted_q == FittedQOptions()
    assert options.dataset is None and options.env.name == "auto"
