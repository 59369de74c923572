"""Composition, precedence and checks of the configuration."""

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra

from iql_torchrl.configuration.composing import check_command_line, compose, initialised, preset_for
from iql_torchrl.errors import ConfigurationError
from iql_torchrl.running.options import OfflineOptions


def configuration(*overrides):
    with initialised():
        return compose("iql_offline", list(overrides), OfflineOptions)


def test_the_defaults_are_the_papers():
    algorithm = configuration("dataset=hdf5", "dataset.path=x").algorithm
    assert (algorithm.expectile, algorithm.temperature, algorithm.discount, algorithm.tau) == (0.7, 3.0, 0.99, 0.005)
    assert algorithm.actor_lr == algorithm.value_lr == algorithm.critic_lr == 3e-4
    assert algorithm.batch_size == 256 and algorithm.hidden_dims == [256, 256]
    assert algorithm.opt_decay_schedule == "cosine" and algorithm.update_order == "sequential"


@pytest.mark.parametrize(
    ("dataset", "preset"),
    [
        ("halfcheetah-medium-v2", "locomotion"),
        ("antmaze-umaze-v2", "antmaze"),
        ("kitchen-partial-v0", "kitchen_adroit"),
        ("pen-human-v1", "kitchen_adroit"),
        ("pendulum.hdf5", "locomotion"),
        ("D4RL/door/human-v2", "kitchen_adroit"),
        ("mujoco/hopper/medium-v0", "locomotion"),
    ],
)
def test_the_preset_is_picked_from_the_datasets_name(dataset, preset):
    assert preset_for(dataset) == preset


def test_a_picked_preset_sets_its_domains_hyperparameters():
    algorithm = configuration("dataset=d4rl", "dataset.name=antmaze-umaze-v2").algorithm
    assert (algorithm.expectile, algorithm.temperature, algorithm.reward_transform) == (0.9, 10.0, "minus_one")


def test_a_given_algorithm_wins_over_the_datasets_name():
    algorithm = configuration("dataset=d4rl", "dataset.name=antmaze-umaze-v2", "algorithm=locomotion").algorithm
    assert algorithm.expectile == 0.7


def test_the_command_line_wins_over_the_variant_and_the_variant_over_the_preset():
    algorithm = configuration("algorithm.variant=torchrl", "algorithm.policy=tanh_mean_normal").algorithm
    assert algorithm.policy == "tanh_mean_normal"
    assert algorithm.update_order == "joint"
    assert algorithm.opt_decay_schedule is None
    assert algorithm.replacement is False


def test_every_preset_and_variant_declares_the_same_keys():
    expected = configuration("algorithm=locomotion").algorithm.model_fields_set
    for preset in ("antmaze", "kitchen_adroit", "behaviour_cloning"):
        for variant in ("paper", "torchrl"):
            overrides = (f"algorithm={preset}", f"algorithm.variant={variant}")
            assert configuration(*overrides).algorithm.model_fields_set == expected


def test_gamma_is_accepted_for_discount():
    assert configuration("algorithm.gamma=0.9").algorithm.discount == 0.9
    assert configuration("algorithm.gamma=0.9", "algorithm.discount=0.9").algorithm.discount == 0.9


def test_behaviour_cloning_is_temperature_zero():
    assert configuration("algorithm=behaviour_cloning").algorithm.temperature == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.step=3"], "unknown option train.step; did you mean 'train.steps'"),
        (["algorithm.expectil=0.9"], "did you mean 'algorithm.expectile'"),
        (["dataset=d4r"], "unknown dataset=d4r; did you mean 'd4rl'"),
        (["algorithm=locomotio"], "unknown algorithm=locomotio; did you mean 'locomotion'"),
        (["logger=wandbb"], "unknown logger=wandbb; did you mean 'wandb'"),
        (["algorithm.variant=papr"], "algorithm.variant=papr; did you mean 'paper'"),
        (["dataset=hdf5"], "dataset.path is needed; give dataset.path=FILE"),
        (["algorithm.expectile=1.5"], r"algorithm.expectile must be a number in \(0, 1\], got 1.5"),
        (["algorithm.expectile=0"], "algorithm.expectile"),
        (["algorithm.discount=1.01"], "algorithm.discount"),
        (["algorithm.temperature=-1"], "algorithm.temperature"),
        (["algorithm.tau=0"], "algorithm.tau"),
        (["algorithm.batch_size=0"], "algorithm.batch_size must be an integer >= 1, got 0"),
        (["algorithm.batch_size=true"], "algorithm.batch_size must be an integer >= 1, got True"),
        (["algorithm.batch_size=many"], "algorithm.batch_size must be an integer >= 1, got 'many'"),
        (["algorithm.hidden_dims=[]"], "algorithm.hidden_dims"),
        (["algorithm.dropout_rate=1"], "algorithm.dropout_rate"),
        (
            ["algorithm.num_sampled_qvalue_nets=3"],
            "algorithm.num_sampled_qvalue_nets must be at most algorithm.num_qvalue_nets=2, got 3; raise that",
        ),
        (
            ["algorithm.num_sampled_qvalue_nets=0"],
            "algorithm.num_sampled_qvalue_nets must be null or an integer >= 1, got 0",
        ),
        (["algorithm.qvalue_aggregation=max"], "algorithm.qvalue_aggregation must be one of min, mean, got 'max'"),
        (["algorithm.value_loss=gumble"], "algorithm.value_loss must be one of expectile, gumbel, got 'gumble'"),
        (["algorithm.gumbel_temperature=0"], "algorithm.gumbel_temperature must be a finite number > 0, got 0"),
        (["algorithm.gumbel_clip=-1"], "algorithm.gumbel_clip must be a number > 0, got -1"),
        (
            ["algorithm.layer_norm=[value,policy]"],
            r"algorithm.layer_norm must be true, false, or a list of actor, value and critic such as \[value,critic\], "
            r"got \['value', 'policy'\]",
        ),
        (["algorithm.layer_norm=critic"], "algorithm.layer_norm must be true, false, or a list .*, got 'critic'"),
        (["algorithm.reward_transform=log"], "algorithm.reward_transform must be one of none"),
        (
            ["algorithm.opt_decay_schedule=linear"],
            "algorithm.opt_decay_schedule must be one of cosine, periodic_cosine, null",
        ),
        (["train.compile=perhaps"], "train.compile must be one of auto, true, false"),
        (["train.steps=1.5"], "train.steps"),
        (["train.seed=-1"], "train.seed"),
        (["eval.episodes=0"], "eval.episodes"),
        (["algorithm.gamma=0.9", "algorithm.discount=0.8"], "name the same thing and differ"),
        (["justaword"], "key=value"),
        (["train.seed=1,2"], "train.seed=1,2 gives several values: -m makes a run of each"),
        (["run_dir=a, b"], "run_dir=a, b gives several values.* quote one value with a comma in it: 'run_dir=\"...\"'"),
    ],
)
def test_a_mistake_is_named_before_anything_starts(overrides, message):
    with pytest.raises(ConfigurationError, match=message):
        check_command_line(overrides, "iql_offline", OfflineOptions)


def test_a_sweep_is_checked_by_its_first_values():
    check_command_line(["-m", "train.seed=range(3)", "algorithm.expectile=0.7,0.9"], "iql_offline", OfflineOptions)
    with pytest.raises(ConfigurationError, match="unknown option"):
        check_command_line(["-m", "train.sead=1,2"], "iql_offline", OfflineOptions)


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (
            ["train.step=3", "algorithm.expectile=2", "logger=tensorbord", "dataset=hdf5", "word"],
            [
                "key=value",
                "unknown logger=tensorbord; did you mean 'tensorboard'?",
                "unknown option train.step; did you mean 'train.steps'?",
                "option dataset.path is needed; give dataset.path=FILE.",
                "algorithm.expectile must be a number in (0, 1], got 2.",
            ],
        ),
        # The options of a source that is not known are not known either.
        (["dataset=hdff5", "dataset.path=x", "eval.episodes=0"], ["unknown dataset=hdff5", "eval.episodes must be"]),
        (["rlinf=nowhere.yaml", "train.steps=0"], ["nowhere.yaml is not a file", "train.steps must be"]),
    ],
)
def test_all_mistakes_of_a_command_line_are_named_at_once(overrides, messages):
    with pytest.raises(ConfigurationError) as error:
        check_command_line(overrides, "iql_offline", OfflineOptions)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{len(messages)} mistakes:" and len(lines) == len(messages) + 1
    for message in messages:
        assert sum(message in line for line in lines) == 1, message


def test_options_that_span_several_are_checked():
    for overrides, message in (
        (["train.updates_per_call=7"], "train.steps must be a multiple of train.updates_per_call=7, got 30000"),
        (["train.seed=4294967295", "train.num_seeds=2"], r"train.seed \+ train.num_seeds must not exceed 2\^32"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            check_command_line(overrides, "iql_offline", OfflineOptions)


def test_an_option_that_is_added_must_be_declared_too():
    with pytest.raises(
        ConfigurationError, match=r"unknown option algorithm\.expectil; did you mean 'algorithm\.expectile'"
    ):
        check_command_line(["+algorithm.expectil=0.9"], "iql_offline", OfflineOptions)
    check_command_line(["+env.kwargs.g=3.0", "env.name=Pendulum-v1"], "iql_offline", OfflineOptions)


def test_a_program_that_uses_hydra_finds_its_own_again(tmp_path):
    (tmp_path / "mine.yaml").write_text("a: 1")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.2"):
        with initialised():
            assert compose("iql_offline", [], OfflineOptions).train.steps == 30000
        assert hydra.compose("mine").a == 1
    assert not GlobalHydra.instance().is_initialized()


def test_a_source_may_know_the_preset_that_suits_it():
    options = ("dataset=robomimic", "dataset.path=low_dim.hdf5", "dataset.observation_keys=[object]")
    assert configuration(*options).algorithm.dropout_rate == 0.1
    assert configuration(*options, "algorithm=locomotion").algorithm.dropout_rate is None
