"""The policy losses beside IQL's: against their authors' code, against their equations, and what they leave alone."""

import copy
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import ACTION_DIM, OBSERVATION_DIM, random_transitions
from reference_extraction import (
    ACTOR_START,
    ALPHA,
    CRITIC_STARTS,
    FREQUENCIES,
    RESIDUAL,
    ROWS,
    SAMPLES,
    STEPS,
    VALUE_START,
    WIDTH,
    batch,
    layers,
    residual_layers,
    sines,
)
from tensordict import TensorDict
from torch import nn

from iql_torchrl import IQLLoss, build_actor, build_qvalues, build_value
from iql_torchrl.evaluation.choosing import Chooser
from iql_torchrl.networks import build_diffusion_actor, build_flow_actor
from iql_torchrl.networks.generative import DiffusionActor, FlowActor, ResidualBlock
from iql_torchrl.objectives import DDPGBCLoss, DiffusionLoss, FlowLoss

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")

NUMBERS = json.loads(Path(__file__).parents[1].joinpath("reference_extraction.json").read_text())
PLAIN = {"hidden_dims": (WIDTH,), "activation": "tanh"}
NORMAL = {"policy": "normal", "standard_deviation": "constant"}


@torch.no_grad()
def filled(module, values):
    """A module whose linear layers and norms are these weights and biases, in their order."""
    found = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.LayerNorm)]
    for layer, (weight, bias) in zip(found, values, strict=True):
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    return module


def critics_and_value():
    critics = [one.double() for one in build_qvalues(OBSERVATION_DIM, ACTION_DIM, **PLAIN)]
    for critic, start in zip(critics, CRITIC_STARTS, strict=True):
        filled(critic, layers("critic", start))
    return critics, filled(build_value(OBSERVATION_DIM, **PLAIN).double(), layers("value", VALUE_START))


def reference_loss(extraction):
    critics, value = critics_and_value()
    sizes = (OBSERVATION_DIM, ACTION_DIM)
    if extraction == "ddpgbc":
        actor = filled(build_actor(*sizes, **PLAIN, **NORMAL).double(), layers("actor", ACTOR_START))
        return DDPGBCLoss(actor, critics, value, behaviour_cloning_coefficient=ALPHA)
    if extraction == "flow":
        return FlowLoss(
            filled(build_flow_actor(*sizes, **PLAIN).double(), layers("velocity", ACTOR_START)), critics, value
        )
    options = {"hidden_dims": (RESIDUAL["width"],), "residual_blocks": RESIDUAL["blocks"]}
    actor = build_diffusion_actor(*sizes, **options, diffusion_steps=STEPS).double()
    actor.network.condition[0].kernel.data.copy_(torch.from_numpy(FREQUENCIES))
    return DiffusionLoss(filled(actor, residual_layers().values()), critics, value)


def reference_batch():
    found = {"observation": "observations", "action": "actions"}
    return TensorDict({ours: torch.from_numpy(batch()[theirs]) for ours, theirs in found.items()}, [ROWS])


def gradients(loss, value):
    params = dict(loss.actor_network_params.named_parameters())
    found = torch.autograd.grad(value, list(params.values()))
    return dict(zip(params, found, strict=True))


def close(found, expected, tolerance=1e-12):
    found = torch.as_tensor(found).detach()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------- against their authors' code


def test_ddpgbc_is_ogbenchs():
    loss = reference_loss("ddpgbc")
    value, _ = loss.actor_loss(reference_batch())
    close(value, NUMBERS["ddpgbc"]["loss"])
    for found, expected in zip(gradients(loss, value).values(), NUMBERS["ddpgbc"]["gradient"], strict=True):
        close(found, expected)


def test_the_flow_is_that_of_ifql():
    loss = reference_loss("flow")
    noise, time = sines(ROWS, ACTION_DIM, start=30.0), 0.5 + 0.5 * sines(ROWS, 1, start=31.0)
    value = loss.error(reference_batch(), torch.from_numpy(noise), torch.from_numpy(time)).mean()
    close(value, NUMBERS["flow"]["loss"])
    for found, expected in zip(gradients(loss, value).values(), NUMBERS["flow"]["gradient"], strict=True):
        close(found, expected)


def test_the_diffusion_is_that_of_idql():
    loss = reference_loss("diffusion")
    time = (torch.arange(ROWS) % STEPS).unsqueeze(-1)
    value = loss.error(reference_batch(), torch.from_numpy(sines(ROWS, ACTION_DIM, start=30.0)), time).mean()
    expected = NUMBERS["diffusion"]
    close(value, expected["loss"])
    found = {name.removesuffix(".bias"): gradient for name, gradient in gradients(loss, value).items()}
    close(found["network.trunk.0"], expected["gradient"]["first"])
    close(found["network.trunk.1.layers.3"], expected["gradient"]["narrow 0"])
    close(found["network.condition.0.kernel"], expected["gradient"]["frequencies"])


@pytest.mark.parametrize("kind", NUMBERS["schedules"])
def test_the_schedules_of_noise_are_those_of_idql(kind):
    actor = build_diffusion_actor(OBSERVATION_DIM, ACTION_DIM, noise_schedule=kind, diffusion_steps=STEPS)
    # Theirs adds up in float32 in the linear one.
    close(
        torch.tensor(actor.betas, dtype=torch.float64), NUMBERS["schedules"][kind], 1e-9 if kind == "linear" else 1e-12
    )


def chooser_of(extraction, num_samples=SAMPLES, selection="largest"):
    loss = reference_loss(extraction)
    return Chooser.of_loss(loss, loss.acting_network(), num_samples, selection)


def noise_of(chooser, rows):
    """Theirs, the same at each of the steps."""
    noise = torch.from_numpy(sines(SAMPLES, ACTION_DIM, start=30.0))
    return noise[None, :, None].expand(rows, *chooser.noise_shape)


def test_a_flows_decisions_are_those_of_ifql():
    chooser, observation = chooser_of("flow"), reference_batch()["observation"]
    close(chooser(observation, noise_of(chooser, ROWS)), NUMBERS["flow decisions"])


def test_a_diffusions_draws_and_decisions_are_those_of_idql():
    chooser, observation = chooser_of("diffusion"), reference_batch()["observation"][:1]
    draws = chooser.draws.generate(observation.unsqueeze(1), noise_of(chooser, 1))
    close(draws[0], NUMBERS["diffusion draws"])
    close(chooser(observation, noise_of(chooser, 1))[0], NUMBERS["diffusion decision"])


def test_the_chances_of_draws_by_the_expectile_are_those_of_idql():
    chooser, observation = chooser_of("diffusion", selection="expectile"), reference_batch()["observation"][:1]
    draws = torch.tensor(NUMBERS["diffusion draws"], dtype=torch.float64)
    rows = observation.expand(SAMPLES, -1)
    qvalue = torch.stack([critic(rows, draws) for critic in chooser.critics]).amin(0).squeeze(-1)
    close(chooser.log_weight(qvalue - chooser.value(observation).squeeze(-1)).softmax(-1), NUMBERS["expectile chances"])


# ---------------------------------------------------------------------- against their equations


def loss_of(extraction, **options):
    torch.manual_seed(0)
    sizes = {"hidden_dims": (16, 16)}
    critics = build_qvalues(OBSERVATION_DIM, ACTION_DIM, **sizes), build_value(OBSERVATION_DIM, **sizes)
    if extraction == "ddpgbc":
        return DDPGBCLoss(build_actor(OBSERVATION_DIM, ACTION_DIM, **sizes), *critics, **options)
    if extraction == "flow":
        return FlowLoss(build_flow_actor(OBSERVATION_DIM, ACTION_DIM, **sizes), *critics, **options)
    actor = build_diffusion_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(16,), residual_blocks=2, dropout=0.1)
    return DiffusionLoss(actor, *critics, **options)


EXTRACTIONS = ["ddpgbc", "flow", "diffusion"]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("policy", ["tanh_mean_normal", "normal", "tanh_normal", "deterministic"])
def test_ddpgbc_is_its_equation_for_every_policy(policy, weighted):
    torch.manual_seed(1)
    actor = build_actor(OBSERVATION_DIM, ACTION_DIM, policy=policy, **PLAIN).double()
    critics, value = critics_and_value()
    loss = DDPGBCLoss(actor, critics, value, behaviour_cloning_coefficient=0.4)
    transitions = random_transitions(64).apply(lambda x: x.double() if x.is_floating_point() else x)
    weights = torch.rand(64, dtype=torch.float64)
    if weighted:
        transitions["priority_weight"] = weights
    found, _ = loss.actor_loss(transitions)

    observation, action = transitions["observation"].numpy(), transitions["action"].numpy()
    mlp = actor.module[0].module[0] if policy == "deterministic" else actor.module[0].module.trunk
    (w0, b0), (w1, b1) = ((one.weight.detach().numpy(), one.bias.detach().numpy()) for one in (mlp[0], mlp[2]))
    mean = np.tanh(observation @ w0.T + b0) @ w1.T + b1
    squashed = mean if policy == "normal" else np.tanh(mean)
    taken = np.clip(squashed, -1, 1)

    def critic(start):
        (w0, b0), (w1, b1) = layers("critic", start)
        return (np.tanh(np.concatenate([observation, taken], -1) @ w0.T + b0) @ w1.T + b1)[:, 0]

    q = np.minimum(*map(critic, CRITIC_STARTS))
    if policy == "deterministic":
        log_prob = -((action - squashed) ** 2).sum(-1)
    elif policy == "tanh_normal":
        before = np.arctanh(action)
        log_prob = (-((before - mean) ** 2) / 2 - math.log(2 * math.pi) / 2 - np.log(1 - action**2)).sum(-1)
    else:
        log_prob = (-((action - squashed) ** 2) / 2 - math.log(2 * math.pi) / 2).sum(-1)
    each = weights.numpy() / weights.numpy().sum() if weighted else np.full(64, 1 / 64)
    expected = (each * (-q / (np.abs(q).mean() + 1e-6) - 0.4 * log_prob)).sum()
    close(found, expected, 1e-10)


def test_the_policys_gradient_does_not_reach_the_critics():
    loss = loss_of("ddpgbc")
    value, _ = loss.actor_loss(random_transitions(32))
    value.backward()
    assert all(parameter.grad is None for parameter in loss.qvalue_network_params.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.actor_network_params.parameters())


def test_a_policy_climbs_q_to_actions_that_no_transition_has():
    class Peak(nn.Module):
        """Q whose maximum is at 0.6 in both dimensions, where no data are."""

        def __init__(self):
            super().__init__()
            self.height = nn.Parameter(torch.tensor(2.0))

        def forward(self, observation, action):
            return self.height - (action - 0.6).pow(2).sum(-1, keepdim=True)

    found = {}
    for coefficient in (0.0, 1.0, 1e4):
        torch.manual_seed(0)
        critics = build_qvalues(OBSERVATION_DIM, ACTION_DIM, **PLAIN)
        for critic in critics:
            critic.module = Peak()
        actor = build_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(32,), **NORMAL)
        loss = DDPGBCLoss(
            actor, critics, build_value(OBSERVATION_DIM, **PLAIN), behaviour_cloning_coefficient=coefficient
        )
        transitions = random_transitions(256)
        transitions["action"] = torch.full((256, ACTION_DIM), -0.5)
        optimizer = torch.optim.Adam(loss.actor_network_params.parameters(), lr=1e-2)
        for _ in range(500):
            optimizer.zero_grad()
            loss.actor_loss(transitions)[0].backward()
            optimizer.step()
        policy = loss.acting_network()
        with torch.no_grad():
            found[coefficient] = float(policy(transitions.select("observation"))["loc"].mean())
    assert found[0.0] == pytest.approx(0.6, abs=0.02)
    assert found[1e4] == pytest.approx(-0.5, abs=0.02)
    assert -0.45 < found[1.0] < 0.55


class ToOnePoint(nn.Module):
    """What a network would have learnt of data whose every action is this one."""

    def __init__(self, point, betas=None):
        super().__init__()
        self.point, self.betas = point, betas

    def forward(self, observation, noisy_action, time):
        if self.betas is None:
            return (self.point - noisy_action) / (1 - time)
        kept = (1 - torch.tensor(self.betas, dtype=torch.float64)).cumprod(0)[time.long()]
        return (noisy_action - kept.sqrt() * self.point) / (1 - kept).sqrt()


@pytest.mark.parametrize("extraction", ["flow", "diffusion"])
def test_the_perfect_network_has_no_error_and_ends_at_the_datas_action(extraction):
    loss, point = loss_of(extraction), torch.tensor([0.3, -0.8], dtype=torch.float64)
    transitions = random_transitions(64).double()
    transitions["action"] = point.expand(64, -1)
    noise, time = loss.draw(transitions["action"])
    if extraction == "flow":
        actor = FlowActor(ToOnePoint(point), ACTION_DIM, 10)
    else:
        actor = DiffusionActor(ToOnePoint(point, loss.actor_network.betas), ACTION_DIM, loss.actor_network.betas)
    loss.actor_network = actor
    loss._predict = lambda tensordict, noisy, time, _: actor.predict(tensordict["observation"], noisy, time)
    assert loss.error(transitions, noise, time).abs().max() < 1e-20
    actions = actor.generate(transitions["observation"], torch.randn(64, actor.noises, ACTION_DIM).double())
    torch.testing.assert_close(actions, transitions["action"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("extraction", ["flow", "diffusion"])
def test_noise_and_times_are_drawn_from_where_the_equation_has_them(extraction):
    noise, time = loss_of(extraction).draw(torch.zeros(100_000, ACTION_DIM))
    assert float(noise.mean()) == pytest.approx(0, abs=0.02) and float(noise.std()) == pytest.approx(1, abs=0.02)
    if extraction == "flow":
        assert 0 <= float(time.min()) < 0.001 and 0.999 < float(time.max()) <= 1
        assert float(time.mean()) == pytest.approx(0.5, abs=0.01)
    else:
        np.testing.assert_allclose(time.flatten().bincount() / 100_000, np.full(5, 0.2), atol=0.01)
    assert abs(np.corrcoef(noise[:, 0], time[:, 0])[0, 1]) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("extraction", ["flow", "diffusion"])
def test_draws_are_distributed_as_the_datas_actions(extraction):
    """Two modes, of which a Normal would make one between them."""
    loss = loss_of(extraction)
    if extraction == "diffusion":
        actor = build_diffusion_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(64,), residual_blocks=1)
        loss = DiffusionLoss(actor, *critics_and_value())
    optimizer = torch.optim.Adam(loss.actor_network_params.parameters(), lr=3e-3)
    for _ in range(1500):
        transitions = random_transitions(256, seed=int(torch.randint(10_000, ())))
        side = (torch.rand(256, 1) < 0.3).float() * 2 - 1
        transitions["action"] = (0.6 * side + 0.05 * torch.randn(256, ACTION_DIM)).clamp(-1, 1)
        optimizer.zero_grad()
        loss.actor_loss(transitions)[0].backward()
        optimizer.step()
    actor = loss.get_stateful_net("actor_network").eval()
    with torch.no_grad():
        actions = actor(TensorDict({"observation": torch.randn(2000, OBSERVATION_DIM)}, [2000]))["action"]
    same_side = (actions[:, 0] > 0) == (actions[:, 1] > 0)
    assert float(same_side.float().mean()) > 0.95
    assert float((actions[:, 0] > 0).float().mean()) == pytest.approx(0.3, abs=0.08)
    assert float(actions.abs().mean()) == pytest.approx(0.6, abs=0.15)  # five clipped steps end nearer to 0


# ---------------------------------------------------------------------- what they share with IQL's


@pytest.mark.parametrize("extraction", EXTRACTIONS)
def test_q_and_v_are_iqls(extraction):
    loss, transitions = loss_of(extraction), random_transitions(32)
    torch.manual_seed(0)
    sizes = {"hidden_dims": (16, 16)}
    plain = IQLLoss(
        build_actor(OBSERVATION_DIM, ACTION_DIM, **sizes),
        build_qvalues(OBSERVATION_DIM, ACTION_DIM, **sizes),
        build_value(OBSERVATION_DIM, **sizes),
    )
    for name in ("qvalue_network_params", "target_qvalue_network_params", "value_network_params"):
        getattr(plain, name).data.copy_(getattr(loss, name).data)
    found, expected = loss(transitions.clone()), plain(transitions.clone())
    assert list(found.keys()) == ["loss_actor", "loss_qvalue", "loss_value", "entropy"]
    for name in ("loss_qvalue", "loss_value"):
        assert torch.equal(found[name], expected[name])
    assert not torch.equal(found["loss_actor"], expected["loss_actor"])


@pytest.mark.parametrize("extraction", EXTRACTIONS)
def test_a_loss_is_stored_copied_and_pickled(extraction):
    loss, transitions = loss_of(extraction), random_transitions(32)
    other = loss_of(extraction)
    for parameter in other.parameters():
        parameter.data.add_(1)
    other.load_state_dict(loss.state_dict())
    for one in (other, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.manual_seed(3)
        expected = loss(transitions.clone())
        torch.manual_seed(3)
        for name, value in one(transitions.clone()).items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("extraction", EXTRACTIONS)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_transitions_have_any_batch_shape(extraction, shape):
    transitions = random_transitions(max(math.prod(shape), 1))[: math.prod(shape)].reshape(shape or (1,))
    transitions = transitions if shape else transitions[0]
    losses = loss_of(extraction)(transitions)
    assert all(value.shape == () and bool(torch.isfinite(value)) for value in losses.values())
    assert transitions["_log_prob"].shape == shape
    each = loss_of(extraction, reduction="none", scalar_output_mode="exclude")(transitions)
    assert each["loss_actor"].shape == shape


@pytest.mark.parametrize("extraction", ["flow", "diffusion"])
def test_the_entropy_of_a_policy_without_a_density_is_its_error(extraction):
    losses = loss_of(extraction)(random_transitions(32))
    assert torch.equal(losses["entropy"], losses["loss_actor"].detach())


@pytest.mark.parametrize("extraction", EXTRACTIONS)
def test_diagnostics_say_the_same_twice_and_leave_the_generator_alone(extraction):
    loss, transitions = loss_of(extraction), random_transitions(32)
    before = torch.get_rng_state()
    first, second = loss.diagnostics(transitions), loss.diagnostics(transitions)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert ("policy_std" in set(first.keys())) == (extraction == "ddpgbc")


def test_the_average_of_a_diffusion_acts_and_not_the_network_that_is_trained():
    loss = loss_of("diffusion")
    transitions = random_transitions(4)

    def act(network):
        torch.manual_seed(0)
        with torch.no_grad():
            return network.eval()(transitions.select("observation"))["action"]

    assert torch.equal(act(loss.acting_network()), act(loss.get_stateful_net("actor_network")))
    for parameter in loss.actor_network_params.parameters():
        parameter.data.mul_(1.5)
    assert not torch.equal(act(loss.acting_network()), act(loss.get_stateful_net("actor_network")))


@pytest.mark.parametrize("kind", [FlowLoss, DiffusionLoss])
def test_a_policy_with_a_distribution_is_refused_where_a_generative_one_is_needed(kind):
    actor = build_actor(OBSERVATION_DIM, ACTION_DIM)
    with pytest.raises(TypeError, match=r"GenerativeActor.*build_flow_actor.*got ProbabilisticActor"):
        kind(actor, *critics_and_value())


def test_a_generative_policy_is_refused_where_a_distribution_is_needed():
    with pytest.raises(TypeError, match="get_dist"):
        DDPGBCLoss(build_flow_actor(OBSERVATION_DIM, ACTION_DIM), *critics_and_value())


@pytest.mark.parametrize("coefficient", [-0.1, math.inf, "1"])
def test_a_coefficient_of_behaviour_cloning_out_of_range_is_refused_by_name(coefficient):
    with pytest.raises(ValueError, match="behaviour_cloning_coefficient must be a finite number >= 0"):
        loss_of("ddpgbc", behaviour_cloning_coefficient=coefficient)


@pytest.mark.parametrize(
    ("build", "options", "name"),
    [
        (build_flow_actor, {"flow_steps": 0}, "flow_steps"),
        (build_flow_actor, {"activation": "sine"}, "activation"),
        (build_diffusion_actor, {"diffusion_steps": 0}, "diffusion_steps"),
        (build_diffusion_actor, {"residual_blocks": 0}, "residual_blocks"),
        (build_diffusion_actor, {"noise_schedule": "quadratic"}, "noise_schedule"),
        (build_diffusion_actor, {"dropout": 1.0}, "dropout"),
        (build_diffusion_actor, {"hidden_dims": []}, "hidden_dims"),
    ],
)
def test_options_of_generative_policies_out_of_range_are_refused_by_name(build, options, name):
    with pytest.raises(ValueError, match=name):
        build(OBSERVATION_DIM, ACTION_DIM, **options)


def test_the_residual_network_starts_as_idqls_does_from_a_seed_alone():
    def built():
        torch.manual_seed(0)
        return build_diffusion_actor(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(256,)).state_dict()

    first, second = built(), built()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    uniform, normal = first["network.condition.1.weight"], first["network.trunk.1.layers.1.weight"]
    assert float(uniform.abs().max()) == pytest.approx(math.sqrt(6 / (64 + 128)), rel=0.01)
    assert float(uniform.std()) == pytest.approx(math.sqrt(2 / (64 + 128)), rel=0.02)
    assert float(normal.std()) == pytest.approx(1 / math.sqrt(256), rel=0.01)
    assert float(normal.abs().max()) == pytest.approx(2 / 0.8796 / math.sqrt(256), rel=0.01)
    assert float(first["network.condition.0.kernel"].std()) == pytest.approx(0.2, rel=0.4)
    assert not any(value.any() for name, value in first.items() if name.endswith("bias"))


def test_the_residual_network_drops_units_before_each_block_alone():
    network = build_diffusion_actor(OBSERVATION_DIM, ACTION_DIM, dropout=0.3).network
    blocks = [module for module in network.modules() if isinstance(module, ResidualBlock)]
    assert len(blocks) == 3 and all(isinstance(block.layers[0], nn.Dropout) for block in blocks)
    assert sum(isinstance(module, nn.Dropout) for module in network.modules()) == 3
