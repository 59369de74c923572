"""Networks of CORL, the original JAX code and TorchRL act and value as they do there."""

import itertools
import os
import re

import numpy as np
import pytest
import torch
import torchrl.objectives
from problems import random_transitions
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from tensordict.nn.distributions import NormalParamExtractor
from torch import nn
from torchrl.data import Bounded
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator

from iql_torchrl.data.normalisation import ObservationNormaliser
from iql_torchrl.errors import CheckpointError, ConfigurationError
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.training import foreign
from iql_torchrl.training.foreign import load_foreign

msgpack = pytest.importorskip("msgpack", reason="needs the extra msgpack")

OBSERVATIONS, ACTIONS, WIDTH = 5, 2, 16
DTYPES = [torch.float32, torch.float64]
# Not symmetric: what CORL and TorchRL's critics read is another number than ours.
LOW, HIGH = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def observations(count=50, dtype=torch.float32):
    return 3 * torch.randn(count, OBSERVATIONS, dtype=dtype)


def own_action(loss, observation):
    """The deterministic action in [-1, 1] of a loss's policy, in its own precision."""
    actor = loss.get_stateful_net("actor_network").eval()
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return actor(TensorDict({"observation": observation}, batch_size=len(observation)))["action"]


def own_values(loss, observation, action):
    """Smallest target Q, smallest Q, and V."""
    batch = TensorDict({"observation": observation, "action": action}, batch_size=len(observation))
    with torch.no_grad():
        target, value = loss.target_qvalue(batch), batch.clone()
        with loss.value_network_params.to_module(loss.value_network):
            value = loss.value_network(value)["state_value"]
        loss.target_qvalue_network_params.data.copy_(loss.qvalue_network_params.data)
        return target, loss.target_qvalue(batch), value.squeeze(-1)


# ------------------------------------------------------------------------------------------------------------- CORL


class CorlMlp(nn.Module):
    def __init__(self, *widths, dropout=None, tanh=False):
        super().__init__()
        layers = []
        for into, out in itertools.pairwise(widths[:-1]):
            layers += [nn.Linear(into, out), nn.ReLU(), *([] if dropout is None else [nn.Dropout(dropout)])]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]), *([nn.Tanh()] if tanh else []))

    def forward(self, x):
        return self.net(x)


class CorlActor(nn.Module):
    def __init__(self, *, deterministic=False):
        super().__init__()
        self.net = CorlMlp(OBSERVATIONS, WIDTH, WIDTH, ACTIONS, tanh=True, dropout=0.1 if deterministic else None)
        if not deterministic:
            self.log_std = nn.Parameter(torch.randn(ACTIONS))


class CorlQ(nn.Module):
    def __init__(self):
        super().__init__()
        self.q1, self.q2 = (
            CorlMlp(OBSERVATIONS + ACTIONS, WIDTH, WIDTH, 1),
            CorlMlp(OBSERVATIONS + ACTIONS, WIDTH, WIDTH, 1),
        )

    def forward(self, observation, action):
        x = torch.cat([observation, action], 1)
        return torch.min(self.q1(x), self.q2(x)).squeeze(-1)


class CorlV(nn.Module):
    def __init__(self):
        super().__init__()
        self.v = CorlMlp(OBSERVATIONS, WIDTH, WIDTH, 1)


def corl(path, *, deterministic=False, change=lambda content: None):
    """CORL's networks after an update, and the file of its ``torch.save(trainer.state_dict(), ...)``."""
    actor, qf, vf = CorlActor(deterministic=deterministic).eval(), CorlQ(), CorlV()
    content = {"total_it": 1234}
    for name, module in (("actor", actor), ("q", qf), ("v", vf)):
        optimizer = torch.optim.Adam(module.parameters(), lr=3e-4)
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        content["actor" if name == "actor" else f"{name}f"] = module.state_dict()
        content[f"{name}_optimizer"] = optimizer.state_dict()
        if name == "actor":
            content["actor_lr_schedule"] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10).state_dict()
    change(content)
    torch.save(content, path)
    return actor, qf, vf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_corls_networks_act_and_value_as_in_corl(deterministic, dtype, tmp_path):
    torch.set_default_dtype(dtype)
    actor, qf, vf = corl(tmp_path / "checkpoint_9.pt", deterministic=deterministic)
    found = load_foreign(tmp_path / "checkpoint_9.pt")
    assert (found.origin, found.step) == ("CORL", 1234)
    assert found.architecture["policy"] == ("deterministic" if deterministic else "tanh_mean_normal")
    loss = found.build_loss(dropout=0.1 if deterministic else None, temperature=3.0)
    observation, action = observations(dtype=dtype), torch.rand(50, ACTIONS, dtype=dtype) * 2 - 1
    tolerance = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 1e-14}
    with torch.no_grad():
        torch.testing.assert_close(own_action(loss, observation), actor.net(observation), **tolerance)
        target, smallest, value = own_values(loss, observation, action)
        torch.testing.assert_close(target, qf(observation, action), **tolerance)
        torch.testing.assert_close(smallest, qf(observation, action), **tolerance)
        torch.testing.assert_close(value, vf.v(observation).squeeze(-1), **tolerance)
    if not deterministic:
        scale = loss.get_stateful_net("actor_network").get_dist(TensorDict({"observation": observation}, [50])).stddev
        torch.testing.assert_close(scale, actor.log_std.clamp(-20, 2).exp().expand(50, ACTIONS), **tolerance)


def test_corls_policy_acts_in_an_environment_as_corls_does(tmp_path):
    actor, _, _ = corl(tmp_path / "checkpoint_9.pt")
    mean, std, largest = torch.randn(OBSERVATIONS), torch.rand(OBSERVATIONS) + 0.1, 2.0
    loss = load_foreign(tmp_path / "checkpoint_9.pt").build_loss()
    policy = Policy.from_loss(
        loss, -largest * torch.ones(ACTIONS), largest * torch.ones(ACTIONS), ObservationNormaliser(mean, std)
    )
    raw = observations()
    with torch.no_grad():
        expected = torch.clamp(largest * actor.net((raw - mean) / std), -largest, largest)
    torch.testing.assert_close(policy(raw), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_critics_of_raw_actions_read_actions_in_the_unit_box(dtype, tmp_path):
    torch.set_default_dtype(dtype)
    _, qf, _ = corl(tmp_path / "checkpoint_9.pt")
    loss = load_foreign(tmp_path / "checkpoint_9.pt").build_loss(LOW, HIGH)
    observation, scaled = observations(dtype=dtype), torch.rand(50, ACTIONS, dtype=dtype) * 2 - 1
    raw = LOW + (scaled + 1) / 2 * (HIGH - LOW)
    target, smallest, _ = own_values(loss, observation, scaled)
    for found in (target, smallest):
        torch.testing.assert_close(found, qf(observation, raw), rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-14)


# ---------------------------------------------------------------------------------------------------------- TorchRL


def torchrl_loss(critics=2, low=-1.0, high=1.0, **options):
    """The loss and networks of TorchRL's recipe, in float32 or the default precision."""
    low, high = low * torch.ones(ACTIONS), high * torch.ones(ACTIONS)
    network = nn.Sequential(
        MLP(in_features=OBSERVATIONS, num_cells=[WIDTH, WIDTH], out_features=2 * ACTIONS, activation_class=nn.ReLU),
        NormalParamExtractor(scale_mapping="biased_softplus_1.0", scale_lb=0.1),
    )
    actor = ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=Bounded(low, high, (ACTIONS,), dtype=torch.get_default_dtype()),
        distribution_class=TanhNormal,
        distribution_kwargs={"low": low, "high": high, "tanh_loc": False},
    )

    def network_of(inputs):
        return MLP(in_features=inputs, num_cells=[WIDTH, WIDTH], out_features=1, activation_class=nn.ReLU)

    qvalue = ValueOperator(network_of(OBSERVATIONS + ACTIONS), in_keys=["observation", "action"])
    value = ValueOperator(network_of(OBSERVATIONS), in_keys=["observation"])
    loss = torchrl.objectives.IQLLoss(actor, qvalue, value, num_qvalue_nets=critics, **options)
    loss.make_value_estimator(gamma=0.99)
    loss.target_qvalue_network_params.data.apply_(lambda one: one.add_(0.1))
    return loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("critics", [1, 2, 3])
def test_torchrls_loss_goes_on_as_it_was(critics, dtype, tmp_path):
    torch.set_default_dtype(dtype)
    theirs = torchrl_loss(critics, loss_function="l2", temperature=3.0, expectile=0.7)
    torch.save(theirs.state_dict(), tmp_path / "loss.pt")
    found = load_foreign(tmp_path / "loss.pt")
    assert found.origin == "TorchRL" and found.architecture["num_qvalue_nets"] == critics
    ours = found.build_loss(temperature=3.0)
    ours.make_value_estimator(gamma=0.99)
    batch = random_transitions(64).to(dtype)
    for key in ("done", "terminated", "truncated"):
        batch["next", key] = batch["next", key].bool()
    expected, got = theirs(batch.clone()), ours(batch.clone())
    for name in ("loss_actor", "loss_qvalue", "loss_value"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)
    observation = observations(dtype=dtype)
    torch.testing.assert_close(
        own_action(ours, observation),
        own_action(theirs, observation),
        rtol=0,
        atol=1e-6 if dtype == torch.float32 else 1e-14,
    )


def test_torchrls_policy_of_other_bounds_acts_in_them(tmp_path):
    theirs = torchrl_loss(low=-3.0, high=5.0)
    torch.save(theirs.state_dict(), tmp_path / "loss.pt")
    low, high = -3.0 * torch.ones(ACTIONS), 5.0 * torch.ones(ACTIONS)
    ours = load_foreign(tmp_path / "loss.pt").build_loss(low, high)
    observation = observations()
    found = Policy.from_loss(ours, low, high)(observation)
    torch.testing.assert_close(found, own_action(theirs, observation), rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- JAX


def packed(tree):
    """What flax.serialization.to_bytes makes of nested dicts of arrays."""

    def array(found):
        return msgpack.ExtType(1, msgpack.packb((found.shape, found.dtype.name, found.tobytes()), use_bin_type=True))

    return msgpack.packb(tree, default=array, use_bin_type=True)


def dense(generator, *widths, dtype=np.float32):
    return {
        f"Dense_{index}": {"kernel": generator.normal(size=pair).astype(dtype), "bias": np.full(pair[1], 0.1, dtype)}
        for index, pair in enumerate(itertools.pairwise(widths))
    }


def jax(folder, *, dtype=np.float32, files=("actor", "critic", "value", "target_critic"), change=lambda trees: None):
    """Trees of the JAX code's networks, and the files of its ``Model.save``."""
    generator = np.random.default_rng(0)

    def critic():
        return {
            f"Critic_{index}": {"MLP_0": dense(generator, OBSERVATIONS + ACTIONS, WIDTH, WIDTH, 1, dtype=dtype)}
            for index in (0, 1)
        }

    body = dense(generator, OBSERVATIONS, WIDTH, WIDTH, ACTIONS, dtype=dtype)
    log_stds = np.array([-7, 0.5], dtype)
    trees = {
        "actor": {"MLP_0": {key: body[key] for key in ("Dense_0", "Dense_1")}, "Dense_0": body["Dense_2"]},
        "critic": critic(),
        "value": {"MLP_0": dense(generator, OBSERVATIONS, WIDTH, WIDTH, 1, dtype=dtype)},
        "target_critic": critic(),
    }
    trees["actor"]["log_stds"] = log_stds
    change(trees)
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes(packed(trees[name]))
    return trees


def of_dense(layers, x):
    *hidden, last = layers.values()
    for layer in hidden:
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    return x @ last["kernel"] + last["bias"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_jaxs_networks_act_and_value_as_in_jax(dtype, tmp_path):
    torch.set_default_dtype(dtype)
    trees = jax(tmp_path / "saved", dtype=np.float32 if dtype == torch.float32 else np.float64)
    found = load_foreign(tmp_path / "saved")
    assert (found.origin, found.step, found.log_std.tolist()) == ("JAX", 0, [-7, 0.5])
    loss = found.build_loss(LOW, HIGH)  # whose critics read actions in [-1, 1] there too
    observation, action = observations(dtype=dtype), torch.rand(50, ACTIONS, dtype=dtype) * 2 - 1
    actor = {**trees["actor"]["MLP_0"], "last": trees["actor"]["Dense_0"]}
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    expected = np.clip(np.tanh(of_dense(actor, observation.numpy())), -1, 1)
    np.testing.assert_allclose(own_action(loss, observation).numpy(), expected, **tolerance)
    scale = loss.get_stateful_net("actor_network").get_dist(TensorDict({"observation": observation}, [50])).stddev
    np.testing.assert_allclose(scale[0].detach().numpy(), np.exp([-5, 0.5]), rtol=1e-6)
    both = np.concatenate([observation.numpy(), action.numpy()], 1)

    def smallest(tree):
        return np.minimum(*(of_dense(one["MLP_0"], both) for one in tree.values()))[:, 0]

    target, qvalue, value = own_values(loss, observation, action)
    np.testing.assert_allclose(target.numpy(), smallest(trees["target_critic"]), **tolerance)
    np.testing.assert_allclose(qvalue.numpy(), smallest(trees["critic"]), **tolerance)
    np.testing.assert_allclose(value.numpy(), of_dense(trees["value"]["MLP_0"], observation.numpy())[:, 0], **tolerance)


def test_without_target_critics_the_critics_are_taken_and_suffixes_do_not_matter(tmp_path):
    jax(tmp_path / "saved", files=("actor", "critic", "value"))
    (tmp_path / "saved" / "actor").rename(tmp_path / "saved" / "actor.msgpack")
    found = load_foreign(tmp_path / "saved")
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(*found.qvalues, strict=True)) is False
    for critic, target in zip(found.qvalues, found.targets, strict=True):
        assert all(torch.equal(one.weight, other.weight) for one, other in zip(critic, target, strict=True))


# ------------------------------------------------------------------------------------------------------------ errors


def refusal(path):
    with pytest.raises(CheckpointError) as error:
        load_foreign(path)
    (line,) = str(error.value).splitlines()
    assert str(path) in line
    return line


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda content: content["actor"].clear(), "lacks net.net.*.weight"),
        (lambda content: content.update(qf=3), "qf is int, not a state_dict"),
        (lambda content: content["qf"].pop("q2.net.2.bias"), "q2.net.2 has no weight and bias"),
        (lambda content: content["vf"].update({"v.net.2.weight": torch.zeros(3, 3)}), "v.net.2 is no linear layer"),
        (lambda content: content["vf"].update({"v.net.4.weight": torch.zeros(1, 9)}), "value has layers of shapes"),
        (lambda content: content["actor"].update({"log_std": torch.zeros(5)}), "has not shape [2]"),
        (lambda content: content["vf"]["v.net.0.bias"].fill_(torch.nan), "value holds NaN or infinity"),
        (lambda content: content.pop("vf"), "holds none of the networks that are known (total_it, actor"),
    ],
)
def test_what_is_wrong_in_a_file_of_corl_is_told(change, expected, tmp_path):
    corl(tmp_path / "checkpoint_9.pt", change=change)
    assert expected in refusal(tmp_path / "checkpoint_9.pt")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda trees: trees["actor"].pop("log_stds"), "actor has no log_stds"),
        (lambda trees: trees["actor"].pop("Dense_0"), "lacks actor/Dense_0"),
        (lambda trees: trees["critic"].pop("Critic_1"), "lacks Critic_1/MLP_0/Dense_0"),
        (lambda trees: trees["value"]["MLP_0"]["Dense_1"].pop("bias"), "lacks MLP_0/Dense_1/kernel or bias"),
        (lambda trees: trees["value"]["MLP_0"].update(Dense_1=4), "lacks MLP_0/Dense_1/kernel or bias"),
        (lambda trees: trees["value"]["MLP_0"]["Dense_0"].update(kernel="x"), "Dense_0/kernel is str, not an array"),
        (lambda trees: trees.update(actor=trees["value"]), "actor has no log_stds"),
        (lambda trees: trees.update(value=trees["critic"]), "lacks MLP_0/Dense_0"),
        (lambda trees: trees["value"]["MLP_0"].pop("Dense_1"), "value has layers of shapes"),
        (lambda trees: trees["actor"].update(log_stds=np.array(["a"])), "an array of str32 holds no parameters"),
    ],
)
def test_what_is_wrong_in_files_of_jax_is_told(change, expected, tmp_path):
    jax(tmp_path / "saved", change=change)
    with pytest.raises(CheckpointError, match=re.escape(expected)) as error:
        load_foreign(tmp_path / "saved")
    assert len(str(error.value).splitlines()) == 1


def test_other_files_and_folders_are_refused_with_what_is_expected(tmp_path):
    jax(tmp_path / "half", files=("actor", "value"))
    jax(tmp_path / "twice")
    (tmp_path / "twice" / "actor.old").write_bytes(b"")
    jax(tmp_path / "damaged")
    whole = packed(dense(np.random.default_rng(0), OBSERVATIONS, WIDTH, 1))
    for cut in (0, 100, len(whole) - 1):
        (tmp_path / "damaged" / "value").write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"is no file of the JAX code's Model\.save, or damaged"):
            load_foreign(tmp_path / "damaged")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    torch.save({"format": "iql_torchrl checkpoint"}, tmp_path / "ours.pt")
    torch.save({"run": os.system}, tmp_path / "code.pt")
    for name, expected in (
        ("half", "has no file critic (actor, value is there)"),
        ("twice", "has actor, actor.old: leave one of them there"),
        ("empty", "has no file actor (nothing is there)"),
        ("none.pt", "does not exist; expected CORL's checkpoint_*.pt"),
        ("text.pt", "is no file of torch.save"),
        ("list.pt", "holds none of the networks that are known (list)"),
        ("foreign.pt", "holds none of the networks that are known (weights)"),
        ("ours.pt", "is a checkpoint of this package"),
        ("code.pt", "could execute code"),
    ):
        assert expected in refusal(tmp_path / name), name


def test_a_pickle_that_would_execute_code_is_never_loaded(tmp_path):
    class Call:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    corl(tmp_path / "checkpoint_9.pt", change=lambda content: content.update(actor_lr_schedule=Call()))
    assert "could execute code" in refusal(tmp_path / "checkpoint_9.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("kind", ["corl", "jax"])
def test_a_damaged_file_ends_in_networks_or_in_one_clear_error(kind, tmp_path):
    generator, ended = np.random.default_rng(0), []
    if kind == "corl":
        corl(tmp_path / "checkpoint_9.pt")
    else:
        jax(tmp_path / "saved")
    path = tmp_path / ("checkpoint_9.pt" if kind == "corl" else "saved")
    file = path if kind == "corl" else path / "actor"
    whole = file.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        begin = int(generator.integers(len(whole))) if generator.random() < 0.5 else int(generator.integers(400))
        damaged[begin : begin + int(generator.integers(1, 5))] = generator.bytes(int(generator.integers(0, 5)))
        file.write_bytes(damaged)
        try:
            ended.append(load_foreign(path).architecture["action_dim"])
        except CheckpointError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000
            ended.append("refused")
    assert ended.count("refused") > 20 and ended.count(ACTIONS) > 5, ended


def test_a_loss_of_another_architecture_is_refused(tmp_path):
    corl(tmp_path / "checkpoint_9.pt")
    jax(tmp_path / "saved")
    found = load_foreign(tmp_path / "saved")
    torch.save(torchrl_loss(3).state_dict(), tmp_path / "three.pt")
    with pytest.raises(CheckpointError, match=r"saved: actor_network_params.* has shape \[2, 16\] there and \[4, 16\]"):
        found.state_for(load_foreign(tmp_path / "three.pt").build_loss())


def test_without_msgpack_the_error_says_what_to_install(tmp_path, monkeypatch):
    jax(tmp_path / "saved")
    monkeypatch.setattr(foreign.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'iql_torchrl\[msgpack\]'"):
        load_foreign(tmp_path / "saved")
