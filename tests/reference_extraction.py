"""Numbers of the authors' own code for the policy losses, in float64: `python reference_extraction.py FOLDER`.

FOLDER holds clones of seohongpark/fql (719d044), seohongpark/ogbench (1d41409) and philippe-eecs/IDQL (7582571) under
these names. With jax 0.10.2 and flax 0.12.8 this wrote reference_extraction.json. What is called is theirs; all
parameters, and all that is drawn, are sines, of which the tests make the same networks.
"""

import json
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np

OBSERVATION_DIM, ACTION_DIM, WIDTH, ROWS, SAMPLES = 5, 2, 8, 6, 7
ALPHA, STEPS, EXPECTILE = 0.7, 5, 0.7


def sines(*shape: int, start: float) -> np.ndarray:
    """Numbers between -1 and 1 without a pattern that matters."""
    return np.sin(start + 1.7 * np.arange(np.prod(shape))).reshape(shape)


def layer(inputs: int, outputs: int, start: float) -> tuple[np.ndarray, np.ndarray]:
    """Weight ``[outputs, inputs]`` and bias of a linear layer."""
    return 0.4 * sines(outputs, inputs, start=start), 0.2 * sines(outputs, start=start + 0.5)


def batch() -> dict[str, np.ndarray]:
    return {
        "observations": sines(ROWS, OBSERVATION_DIM, start=0.1),
        "actions": 0.9 * sines(ROWS, ACTION_DIM, start=0.2),
        "actor_goals": np.zeros((ROWS, 0)),
    }


def mlp(*inputs, layers):
    """Linear layers with tanh between them, on numpy's or jax's arrays."""
    jnp = import_module("jax.numpy")
    x = jnp.concatenate(inputs, -1)
    for index, (weight, bias) in enumerate(layers):
        x = x @ weight.T + bias
        x = jnp.tanh(x) if index + 1 < len(layers) else x
    return x


SIZES = {
    "actor": (OBSERVATION_DIM, ACTION_DIM),
    "velocity": (OBSERVATION_DIM + ACTION_DIM + 1, ACTION_DIM),
    "critic": (OBSERVATION_DIM + ACTION_DIM, 1),
    "value": (OBSERVATION_DIM, 1),
}


def layers(kind: str, start: float) -> list[tuple[np.ndarray, np.ndarray]]:
    inputs, outputs = SIZES[kind]
    return [layer(inputs, WIDTH, start), layer(WIDTH, outputs, start + 1)]


CRITIC_STARTS, ACTOR_START, VALUE_START = (2.0, 3.0), 4.0, 5.0
# Of the noise predictor, in the order of its layers.
RESIDUAL = {"width": 16, "blocks": 2}


def residual_layers() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    width = RESIDUAL["width"]
    found = {"condition 0": layer(64, 128, 10.0), "condition 1": layer(128, 128, 11.0)}
    found["first"] = layer(ACTION_DIM + OBSERVATION_DIM + 128, width, 12.0)
    for block in range(RESIDUAL["blocks"]):
        found[f"norm {block}"] = 1 + 0.1 * sines(width, start=13.0 + block), 0.1 * sines(width, start=14.0 + block)
        found[f"wide {block}"] = layer(width, 4 * width, 15.0 + block)
        found[f"narrow {block}"] = layer(4 * width, width, 17.0 + block)
    found["last"] = layer(width, ACTION_DIM, 20.0)
    return found


FREQUENCIES = 0.2 * sines(32, 1, start=21.0)


def main(folder: Path) -> dict[str, object]:
    jax = import_module("jax")
    jax.config.update("jax_enable_x64", True)
    jnp = import_module("jax.numpy")
    for name in ("gym", "distrax", "ml_collections", "utils", "utils.encoders", "utils.flax_utils", "utils.networks"):
        sys.modules[name] = MagicMock()
    jax.random.normal = lambda key, shape, *_: jnp.asarray(sines(*shape, start=30.0))
    jax.random.uniform = lambda key, shape, *_: jnp.asarray(0.5 + 0.5 * sines(*shape, start=31.0))
    jax.random.randint = lambda *_: jnp.arange(ROWS) % STEPS
    key = jax.random.PRNGKey(0)

    def with_gradient(loss, parameters):
        value, gradient = jax.value_and_grad(loss)(parameters)
        return {"loss": float(value), "gradient": [leaf.tolist() for pair in gradient for leaf in pair]}

    gciql = loaded(folder / "ogbench/impls/agents/gciql.py").GCIQLAgent
    ifql = loaded(folder / "fql/agents/ifql.py").IFQLAgent
    config = {"actor_loss": "ddpgbc", "discrete": False, "const_std": True, "alpha": ALPHA}
    ddpgbc = SimpleNamespace(network=networks_named(lambda s, goals, params: unit_normal(s, params)), config=config)
    parameters = layers("velocity", ACTOR_START)
    velocity = networks_named(lambda *inputs, params=None: mlp(*inputs, layers=params or parameters))
    config = {"num_samples": SAMPLES, "action_dim": ACTION_DIM, "flow_steps": 10, "encoder": None}
    flow = SimpleNamespace(network=velocity, config=config)
    decide = ifql.sample_actions.__wrapped__
    return {
        "ddpgbc": with_gradient(lambda p: gciql.actor_loss(ddpgbc, batch(), p, key)[0], layers("actor", ACTOR_START)),
        "flow": with_gradient(lambda p: ifql.actor_loss(flow, batch(), p, key)[0], parameters),
        "flow decisions": [decide(flow, row, key).tolist() for row in batch()["observations"]],
        **of_idql(folder / "IDQL/jaxrl5", key),
    }


def networks_named(actor):
    """What their agents ask for a network by its name."""

    def select(name):
        def call(*inputs, params=None, actions=None, **_):
            if name != "critic":
                return actor(*inputs) if params is None else actor(*inputs, params=params)
            return qvalues(inputs[0], inputs[-1] if actions is None else actions)

        return call

    return SimpleNamespace(select=select)


def qvalues(observations, actions):
    jnp = import_module("jax.numpy")
    critics = [layers("critic", start) for start in CRITIC_STARTS]
    return jnp.stack([mlp(observations, actions, layers=one)[..., 0] for one in critics])


def unit_normal(observations, params):
    jnp = import_module("jax.numpy")
    mean = mlp(observations, layers=params)
    return SimpleNamespace(
        mode=lambda: mean,
        log_prob=lambda x: (-0.5 * (x - mean) ** 2 - 0.5 * jnp.log(2 * jnp.pi)).sum(-1),
        scale_diag=jnp.ones_like(mean),
    )


def of_idql(folder: Path, key) -> dict[str, object]:
    jax, jnp = import_module("jax"), import_module("jax.numpy")
    networks = SimpleNamespace(Ensemble=None, StateActionValue=None, StateValue=None)
    for name in ("diffusion", "resnet", "mlp"):
        module = loaded(folder / "networks" / f"{name}.py")
        vars(networks).update({name: value for name, value in vars(module).items() if not name.startswith("__")})
    for name in ("jaxrl5", "jaxrl5.agents", "jaxrl5.data", "jaxrl5.data.dataset"):
        sys.modules[name] = MagicMock()
    sys.modules |= {"jaxrl5.networks": networks, "jaxrl5.agents.agent": SimpleNamespace(Agent=object)}
    module = loaded(folder / "agents/ddpm_iql/ddpm_iql_learner.py")
    learner = module.DDPMIQLLearner
    model = networks.DDPM(
        time_preprocess_cls=partial(networks.FourierFeatures, output_size=64, learnable=True),
        cond_encoder_cls=partial(networks.MLP, hidden_dims=(128, 128), activations=module.mish, activate_final=False),
        reverse_encoder_cls=partial(
            networks.MLPResNet,
            use_layer_norm=True,
            num_blocks=RESIDUAL["blocks"],
            hidden_dim=RESIDUAL["width"],
            out_dim=ACTION_DIM,
            activations=module.mish,
        ),
    )
    betas = jnp.asarray(networks.vp_beta_schedule(STEPS))
    alpha_hats = jnp.cumprod(1 - betas)
    params = jax.tree_util.tree_map(jnp.asarray, of_flax())

    def apply(variables, *inputs, training=False, rngs=None):
        return model.apply(variables, *inputs, training=training)

    agent = SimpleNamespace(rng=key, T=STEPS, act_dim=ACTION_DIM, alpha_hats=alpha_hats, replace=lambda **_: None)
    agent.score_model = SimpleNamespace(params=params, apply_fn=apply)
    taken = {}
    original = jax.grad
    jax.grad = lambda function, **options: taken.update(loss=function) or original(function, **options)
    learner.actor_loss_no_grad(agent, batch())
    jax.grad = original
    loss, gradient = jax.value_and_grad(lambda p: taken["loss"](p)[0])(params)

    observations = jnp.repeat(batch()["observations"][:1], SAMPLES, 0)
    given = (observations, 1 - betas, alpha_hats, betas, 1.0, 0, True)
    draws, _ = networks.ddpm_sampler.__wrapped__(apply, params, STEPS, key, ACTION_DIM, *given)
    chances = []
    jax.random.choice = lambda key, count, p: chances.append(p) or 0
    everything = {"N": SAMPLES, "T": STEPS, "act_dim": ACTION_DIM, "alphas": 1 - betas, "alpha_hats": alpha_hats}
    everything |= {"betas": betas, "ddpm_temperature": 1.0, "M": 0, "clip_sampler": True, "rng": key}
    everything |= {"critic_objective": "expectile", "critic_hyperparam": EXPECTILE, "replace": lambda **_: None}
    everything["score_model"] = everything["target_score_model"] = agent.score_model
    critic, value = layers("critic", 0.0), layers("value", VALUE_START)
    of_value = lambda variables, s: mlp(s, layers=value)[..., 0]  # noqa: E731
    everything["target_critic"] = SimpleNamespace(params=critic, apply_fn=lambda variables, s, a: qvalues(s, a))
    everything["value"] = SimpleNamespace(params=value, apply_fn=of_value)
    learner.sample_implicit_policy(SimpleNamespace(**everything), batch()["observations"][0])
    best, _ = learner.eval_actions(SimpleNamespace(**everything), batch()["observations"][0])
    trunk = gradient["MLPResNet_0"]
    return {
        "schedules": {
            "vp": betas.tolist(),
            "cosine": networks.cosine_beta_schedule(STEPS).tolist(),
            "linear": networks.linear_beta_schedule(STEPS).tolist(),
        },
        "diffusion": {
            "loss": float(loss),
            "gradient": {
                "first": trunk["Dense_0"]["bias"].tolist(),
                "narrow 0": trunk["MLPResNetBlock_0"]["Dense_1"]["bias"].tolist(),
                "frequencies": gradient["FourierFeatures_0"]["kernel"].tolist(),
            },
        },
        "diffusion draws": draws.tolist(),
        "diffusion decision": best.tolist(),
        "expectile chances": chances[0].tolist(),
    }


def of_flax() -> dict[str, dict]:
    """The noise predictor's parameters as Flax names them."""
    named = {name: {"kernel": weight.T, "bias": bias} for name, (weight, bias) in residual_layers().items()}
    trunk = {"Dense_0": named["first"], "Dense_1": named["last"]}
    for block in range(RESIDUAL["blocks"]):
        norm = named[f"norm {block}"]
        trunk[f"MLPResNetBlock_{block}"] = {
            "LayerNorm_0": {"scale": norm["kernel"], "bias": norm["bias"]},
            "Dense_0": named[f"wide {block}"],
            "Dense_1": named[f"narrow {block}"],
        }
    return {
        "FourierFeatures_0": {"kernel": FREQUENCIES},
        "MLP_0": {"Dense_0": named["condition 0"], "Dense_1": named["condition 1"]},
        "MLPResNet_0": trunk,
    }


def loaded(path: Path):
    spec = import_module("importlib.util").spec_from_file_location(path.stem, path)
    module = import_module("importlib.util").module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    numbers = main(Path(sys.argv[1]))
    Path(__file__).with_suffix(".json").write_text(json.dumps(numbers) + "\n")
