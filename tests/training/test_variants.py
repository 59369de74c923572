"""Every variant, as its config composes it, against 200 updates of the NumPy reference."""

import h5py
import hydra
import numpy as np
import pytest
import reference_iql
import torch
from problems import ACTION_DIM, OBSERVATION_DIM, random_transitions
from torch import nn

from iql_torchrl import TrainingStep, build_actor, build_discrete_actor, make_buffer
from iql_torchrl.configuration.composing import CONFIGS, compose
from iql_torchrl.data.preparation import prepare_data
from iql_torchrl.environments.simulators import Spaces
from iql_torchrl.running.options import OfflineOptions
from iql_torchrl.training.construction import actor_arguments, architecture_of, build_loss

COMPILED = [pytest.param(False, id="eager"), pytest.param(True, id="compiled", marks=pytest.mark.slow)]
DTYPES = [torch.float64, torch.float32]
UPDATES = 200
SPACES = Spaces(OBSERVATION_DIM, -torch.ones(ACTION_DIM), torch.ones(ACTION_DIM))
# None of them a default, and no two alike, so that one that goes astray is seen.
HYPERPARAMETERS = {
    "discount": 0.97,
    "expectile": 0.8,
    "temperature": 2.0,
    "max_weight": 5.0,
    "actor_lr": 1e-3,
    "value_lr": 5e-4,
    "critic_lr": 2e-3,
}
VARIANTS = {
    "paper": ("paper", []),
    "rlinf": ("rlinf", []),
    "corl": ("corl", []),
    "corl_deterministic": ("corl", ["algorithm.policy=deterministic"]),
    "torchrl": ("torchrl", []),
}


def algorithm_of(variant, *overrides):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        overrides = [f"algorithm.variant={variant}", "algorithm.hidden_dims=[24,16]", *overrides]
        return compose("iql_offline", [*overrides, "algorithm.batch_size=64"], OfflineOptions).algorithm


def step_of(algorithm, dtype, *, compile, seed=0):
    torch.manual_seed(seed)
    transitions = random_transitions().apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
    return TrainingStep(
        build_loss(algorithm, SPACES).to(dtype),
        make_buffer(transitions, batch_size=algorithm.batch_size, replacement=algorithm.replacement, seed=seed),
        total_steps=UPDATES if algorithm.opt_decay_schedule == "cosine" else None,
        actor_lr=algorithm.actor_lr,
        value_lr=algorithm.value_lr,
        critic_lr=algorithm.critic_lr,
        tau=algorithm.tau,
        order=algorithm.update_order,
        compile=compile,
    )


def numpy_network(params):
    leaves = {key: leaf.detach().double().numpy().copy() for key, leaf in params.items(True, True)}
    layers = sorted({key[:-1] for key in leaves if key[-1] == "weight"}, key=lambda key: int(key[-1]))
    network = {
        "weights": [leaves[*layer, "weight"] for layer in layers],
        "biases": [leaves[*layer, "bias"] for layer in layers],
    }
    log_std = [leaf for key, leaf in leaves.items() if key[-1] == "log_std"]
    return network | ({"log_std": log_std[0]} if log_std else {})


def numpy_networks(loss):
    params = dict(loss.named_children())
    networks = {
        "actor": numpy_network(params["actor_network_params"]),
        "value": numpy_network(params["value_network_params"]),
        "qvalue": [numpy_network(one) for one in params["qvalue_network_params"].unbind(0)],
        "target_qvalue": [numpy_network(one) for one in params["target_qvalue_network_params"].unbind(0)],
    }
    if "target_value_network_params" in params:
        networks["target_value"] = numpy_network(params["target_value_network_params"])
    return networks


def numpy_batch(batch):
    entries = {
        "observation": batch["observation"],
        "action": batch["action"],
        "reward": batch["next", "reward"][:, 0],
        "next_observation": batch["next", "observation"],
        "terminated": batch["next", "terminated"][:, 0],
    }
    return {key: entry.double().numpy() for key, entry in entries.items()}


def tensors(networks):
    for network in [networks["actor"], networks["value"], *networks["qvalue"], *networks["target_qvalue"]]:
        yield from (*network["weights"], *network["biases"])
        if "log_std" in network:
            yield network["log_std"]


def deviation(variant, dtype, *, compile, delay_value=False):
    """Largest ratio |ours - reference| / |reference| over the tensors, and the losses of both."""
    config, overrides = VARIANTS[variant]
    options = [f"algorithm.{name}={value}" for name, value in HYPERPARAMETERS.items()]
    options += ["algorithm.tau=0.02", f"algorithm.delay_value={str(delay_value).lower()}"]
    algorithm = algorithm_of(config, *options, *overrides)
    step = step_of(algorithm, dtype, compile=compile)
    networks = numpy_networks(step.loss)
    batches, losses = [], []
    for _ in range(UPDATES):
        losses.append({key: float(value) for key, value in step().items()})
        batches.append(numpy_batch(step.batch()))
    given = {name: getattr(algorithm, name) for name in HYPERPARAMETERS}
    hyperparameters = reference_iql.Hyperparameters(
        **given, polyak=algorithm.tau, total_steps=UPDATES, delay_value=delay_value
    )
    expected, expected_losses = reference_iql.train(reference_iql.VARIANTS[variant], networks, batches, hyperparameters)
    pairs = list(zip(tensors(numpy_networks(step.loss)), tensors(expected), strict=True))
    assert all(np.any(start != end) for start, end in zip(tensors(networks), tensors(expected), strict=True))
    ratio = max(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) for ours, theirs in pairs)
    return ratio, losses, expected_losses


@pytest.mark.parametrize("compile", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_200_updates_equal_the_numpy_reference(variant, dtype, compile):
    ratio, losses, expected = deviation(variant, dtype, compile=compile)
    tolerance = 1e-8 if dtype == torch.float64 else 1e-3
    assert ratio < tolerance
    for ours, theirs in zip(losses, expected, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("compile", COMPILED)
def test_200_updates_with_a_delayed_value_equal_the_numpy_reference(compile):
    ratio, *_ = deviation("paper", torch.float64, compile=compile, delay_value=True)
    assert ratio < 1e-8


# ---------------------------------------------------------------------------------------------- columns of the table


def weights_of(loss, network):
    return [leaf for key, leaf in getattr(loss, f"{network}_network_params").items(True, True) if key[-1] == "weight"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_initial_weights_are_orthogonal_in_the_papers_variant_only(variant):
    loss = build_loss(algorithm_of(VARIANTS[variant][0]), SPACES)
    for network in ("actor", "value"):
        for weight in weights_of(loss, network):
            small = weight if weight.shape[0] <= weight.shape[1] else weight.T
            gram = small @ small.T
            assert torch.allclose(gram, 2 * torch.eye(len(gram)), atol=1e-5) is (variant == "paper")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_actor_has_one_more_layer_in_rlinfs_variant_only(variant):
    loss = build_loss(algorithm_of(VARIANTS[variant][0]), SPACES)
    widths = sorted(weight.shape[0] for weight in weights_of(loss, "actor"))
    outputs = 2 * ACTION_DIM if variant == "torchrl" else ACTION_DIM
    assert widths == sorted([24, 16, *([16] if variant == "rlinf" else []), outputs])
    assert len(weights_of(loss, "value")) == 3


@pytest.mark.parametrize(
    ("variant", "normalised", "largest"),
    [("paper", False, 1 - 1e-5), ("rlinf", False, 1 - 1e-5), ("corl", True, 1), ("torchrl", False, 1)],
)
def test_observations_and_actions_reach_the_networks_as_the_variant_has_them(tmp_path, variant, normalised, largest):
    random = np.random.default_rng(0)
    observations = random.normal(3.0, 2.0, size=(60, 4)).astype(np.float32)
    with h5py.File(tmp_path / "log.hdf5", "w") as file:
        file["observations"] = observations
        file["actions"] = random.choice([-1.0, 0.5, 1.0], size=(60, 2)).astype(np.float32)
        file["rewards"] = random.normal(size=60).astype(np.float32)
        file["terminals"], file["timeouts"] = np.zeros(60, bool), np.arange(60) % 20 == 19
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        options = (f"dataset.path={tmp_path / 'log.hdf5'}", "env.name=null", "dataset.validation_fraction=0")
        config = compose("iql_offline", ["dataset=hdf5", *options, f"algorithm.variant={variant}"], OfflineOptions)
    data = prepare_data(config.dataset, config.algorithm, config.env)
    kept = observations[np.arange(60) % 20 != 19]
    expected = (kept - kept.mean(0)) / (kept.std(0) + 1e-3) if normalised else kept
    np.testing.assert_allclose(data.training["observation"].numpy(), expected, rtol=1e-4, atol=1e-5)
    assert (data.normaliser is not None) is normalised
    assert data.training["action"].abs().max().item() == pytest.approx(largest, abs=1e-7)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("hopper-medium-v2", "deterministic"),
        ("hopper-medium-replay-v2", "deterministic"),
        ("hopper-expert-v2", "tanh_mean_normal"),
    ],
)
def test_corls_policy_is_deterministic_on_its_two_hopper_datasets(name, policy):
    assert algorithm_of("corl", "dataset=d4rl", f"dataset.name={name}").policy == policy
    assert algorithm_of("paper", "dataset=d4rl", f"dataset.name={name}").policy == "tanh_mean_normal"
    chosen = algorithm_of("corl", "dataset=d4rl", f"dataset.name={name}", "algorithm.policy=normal")
    assert chosen.policy == "normal"


def test_torchrls_variant_draws_without_replacement_and_the_others_with():
    assert [algorithm_of(name).replacement for name in ("paper", "rlinf", "corl", "torchrl")] == [
        True,
        True,
        True,
        False,
    ]


# ---------------------------------------------------------------------------------------------- activations

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU, "elu": nn.ELU}
SPACES_OF_ACTIONS = {"continuous": SPACES, "discrete": Spaces.discrete(OBSERVATION_DIM, 3)}


@pytest.mark.parametrize("actions", SPACES_OF_ACTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_of_the_options_is_every_networks(activation, actions):
    loss = build_loss(algorithm_of("paper", f"algorithm.activation={activation}"), SPACES_OF_ACTIONS[actions])
    for name in ("actor", "value", "qvalue"):
        network = getattr(loss, f"{name}_network")
        kinds = [type(layer) for layer in network.modules() if isinstance(layer, tuple(ACTIVATIONS.values()))]
        assert kinds == 2 * [ACTIVATIONS[activation]], name


@pytest.mark.parametrize("actions", SPACES_OF_ACTIONS)
def test_an_architecture_names_its_activation_where_it_is_another_than_in_old_checkpoints(actions):
    spaces = SPACES_OF_ACTIONS[actions]
    assert "activation" not in architecture_of(algorithm_of("paper"), spaces)
    architecture = architecture_of(algorithm_of("paper", "algorithm.activation=elu"), spaces)
    build = build_actor if actions == "continuous" else build_discrete_actor
    assert architecture["activation"] == "elu" and "ELU" in str(build(**actor_arguments(architecture)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_update_with_another_activation_is_recorded_and_equals_the_plain_one(activation, monkeypatch):
    algorithm = algorithm_of("paper", f"algorithm.activation={activation}", "algorithm.dropout_rate=0.1")

    def updated():
        step = step_of(algorithm, torch.float32, compile=False)
        torch.manual_seed(7)
        return step, {key: loss.clone() for key, loss in step().items()}

    recorded, found = updated()
    assert recorded.compile_note == ""

    def refuse(*_):
        raise RuntimeError("not today")

    monkeypatch.setattr("iql_torchrl.training.step.record", refuse)
    plain, expected = updated()
    assert "not today" in plain.compile_note
    assert all(expected[key].equal(found[key]) for key in expected)
    parameters = zip(plain.loss.parameters(), recorded.loss.parameters(), strict=True)
    assert all(one.equal(other) for one, other in parameters)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_compiled_update_with_another_activation_is_that_of_the_eager_one(activation):
    algorithm = algorithm_of("paper", f"algorithm.activation={activation}")
    eager, compiled = (step_of(algorithm, torch.float64, compile=compile) for compile in (False, True))
    for _ in range(3):
        expected, found = eager(), compiled()
        for key, loss in expected.items():
            torch.testing.assert_close(found[key], loss, rtol=1e-9, atol=1e-9)
    assert compiled.compiled and compiled.compile_note == ""
    for one, other in zip(eager.loss.parameters(), compiled.loss.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------- value options


LAYER_NORMS = {
    "true": {"actor", "value", "qvalue"},
    "false": set(),
    "[]": set(),
    "[critic,value]": {"value", "qvalue"},
    "[critic,value,actor]": {"actor", "value", "qvalue"},
    "[critic]": {"qvalue"},
    "[value]": {"value"},
    "[actor]": {"actor"},
}


@pytest.mark.parametrize("actions", SPACES_OF_ACTIONS)
@pytest.mark.parametrize("chosen", LAYER_NORMS)
def test_networks_that_are_named_have_layer_norm_and_the_weights_that_they_have_without(chosen, actions):
    algorithm, spaces = algorithm_of("paper", f"algorithm.layer_norm={chosen}"), SPACES_OF_ACTIONS[actions]

    def built(algorithm):
        torch.manual_seed(3)
        return build_loss(algorithm, spaces)

    loss, without = built(algorithm), built(algorithm_of("paper"))
    for name in ("actor", "value", "qvalue"):
        network = getattr(loss, f"{name}_network")
        norms = [layer for layer in network.modules() if isinstance(layer, nn.LayerNorm)]
        assert len(norms) == 2 * (name in LAYER_NORMS[chosen]), name
        dimensions = 3 if name == "qvalue" else 2  # of a weight, and of nothing else
        matrices = [
            [leaf for leaf in getattr(one, f"{name}_network_params").values(True, True) if leaf.ndim == dimensions]
            for one in (loss, without)
        ]
        assert len(matrices[0]) == 3 and all(map(torch.equal, *matrices)), name


@pytest.mark.parametrize("actions", SPACES_OF_ACTIONS)
def test_an_architecture_names_layer_norm_as_in_old_checkpoints_where_all_networks_have_it_or_none(actions):
    spaces = SPACES_OF_ACTIONS[actions]
    named = {"true": True, "[actor,value,critic]": True, "false": False, "[]": False}
    named |= {"[critic,value]": ["value", "critic"], "[value,critic]": ["value", "critic"]}
    build = build_actor if actions == "continuous" else build_discrete_actor
    for chosen, expected in named.items():
        architecture = architecture_of(algorithm_of("paper", f"algorithm.layer_norm={chosen}"), spaces)
        assert architecture["layer_norm"] == expected
        assert ("LayerNorm" in str(build(**actor_arguments(architecture)))) == (expected is True)


TAUGHT_BY = {
    "mean": ["algorithm.qvalue_aggregation=mean"],
    "all of four critics": ["algorithm.num_qvalue_nets=4", "algorithm.num_sampled_qvalue_nets=4"],
    "Gumbel regression": ["algorithm.value_loss=gumbel", "algorithm.gumbel_temperature=0.5"],
    "layer norm of V and critics": ["algorithm.layer_norm=[value,critic]"],
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "corl"])
@pytest.mark.parametrize("options", TAUGHT_BY)
def test_a_compiled_update_taught_otherwise_is_that_of_the_eager_one(options, variant):
    algorithm = algorithm_of(variant, *TAUGHT_BY[options])
    eager, compiled = (step_of(algorithm, torch.float64, compile=compile) for compile in (False, True))
    for _ in range(20):
        expected, found = eager(), compiled()
        for key, loss in expected.items():
            torch.testing.assert_close(found[key], loss, rtol=1e-9, atol=1e-9)
    assert compiled.compiled and compiled.compile_note == ""
    for one, other in zip(eager.loss.parameters(), compiled.loss.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
