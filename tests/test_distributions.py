"""The distributions of the package against scipy and enumeration."""

import itertools

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import bernoulli, multinomial
from scipy.stats import entropy as scipy_entropy
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor

from iql_torchrl.distributions import Bits, Deterministic, MultiOneHotCategorical

NUM_ACTIONS = (2, 4, 3)
EVERY_ACTION = [np.concatenate(parts).tolist() for parts in itertools.product(*(np.eye(n) for n in NUM_ACTIONS))]
SHAPES = [(), (4,), (2, 3)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def logits_of(*shape):
    return torch.randn(*shape, sum(NUM_ACTIONS), dtype=torch.float64)


def parts_of(array):
    return np.split(np.asarray(array), np.cumsum(NUM_ACTIONS)[:-1], axis=-1)


def probabilities_of(logits):
    return [np.exp(log_softmax(part, axis=-1)) for part in parts_of(logits)]


# ---------------------------------------------------------------------------------------------- Deterministic


@pytest.mark.parametrize("shape", SHAPES)
def test_the_log_probability_of_a_deterministic_policy_is_minus_the_squared_distance(shape):
    loc, value = torch.randn(2, *shape, 3, dtype=torch.float64)
    distribution = Deterministic(loc)
    assert distribution.batch_shape == shape and distribution.event_shape == (3,)
    expected = -(np.linalg.norm(value.numpy() - loc.numpy(), axis=-1) ** 2)
    np.testing.assert_allclose(distribution.log_prob(value).numpy(), expected, rtol=1e-12)
    assert (distribution.log_prob(loc) == 0).all()


def test_the_log_probability_of_several_values_at_once_broadcasts():
    loc, values = torch.randn(4, 3), torch.randn(5, 4, 3)
    expected = torch.stack([Deterministic(loc).log_prob(value) for value in values])
    torch.testing.assert_close(Deterministic(loc).log_prob(values), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_deterministic_policy_has_one_action_and_no_spread(shape):
    loc = torch.randn(*shape, 3)
    distribution = Deterministic(loc)
    for action in (distribution.mean, distribution.mode, distribution.deterministic_sample, distribution.sample()):
        torch.testing.assert_close(action, loc, rtol=0, atol=0)
    assert distribution.stddev.shape == loc.shape and not distribution.stddev.any()


def test_samples_of_a_deterministic_policy_repeat_the_action_and_rsample_passes_gradient():
    loc = torch.randn(4, 3, requires_grad=True)
    distribution = Deterministic(loc)
    for sample in (distribution.sample((2, 5)), distribution.rsample((2, 5))):
        assert sample.shape == (2, 5, 4, 3) and (sample == loc).all()
    distribution.rsample((2,)).sum().backward()
    assert (loc.grad == 2).all()


def test_a_sample_of_a_deterministic_policy_requires_no_gradient():
    assert not Deterministic(torch.randn(4, 3, requires_grad=True)).sample().requires_grad


def test_the_gradient_of_the_log_probability_is_twice_the_distance():
    loc, value = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, dtype=torch.float64)
    Deterministic(loc).log_prob(value).sum().backward()
    np.testing.assert_allclose(loc.grad.numpy(), 2 * (value - loc.detach()).numpy(), rtol=1e-12)


# ---------------------------------------------------------------------------------------------- MultiOneHotCategorical


@pytest.mark.parametrize("shape", SHAPES)
def test_the_log_probability_of_several_choices_is_the_sum_of_their_multinomial_ones(shape):
    logits = logits_of(*shape)
    distribution = MultiOneHotCategorical(logits, NUM_ACTIONS)
    assert distribution.batch_shape == shape and distribution.event_shape == (sum(NUM_ACTIONS),)
    for action in EVERY_ACTION:
        value = torch.tensor(action, dtype=torch.float64).expand_as(logits)
        pairs = zip(parts_of(value), probabilities_of(logits), strict=True)
        expected = sum(multinomial.logpmf(chosen, 1, p) for chosen, p in pairs)
        np.testing.assert_allclose(distribution.log_prob(value).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_the_probabilities_of_all_actions_add_up_to_one():
    distribution = MultiOneHotCategorical(logits_of(4), NUM_ACTIONS)
    actions = torch.tensor(EVERY_ACTION, dtype=torch.float64).unsqueeze(1).expand(-1, 4, -1)
    np.testing.assert_allclose(distribution.log_prob(actions).exp().sum(0).numpy(), np.ones(4), rtol=1e-12)


def test_the_log_probability_takes_integer_actions_too():
    distribution, action = MultiOneHotCategorical(logits_of(4), NUM_ACTIONS), torch.tensor(EVERY_ACTION[:4])
    torch.testing.assert_close(distribution.log_prob(action.long()), distribution.log_prob(action), rtol=0, atol=0)


def test_the_log_probability_takes_bool_actions_which_torchrls_spec_draws():
    distribution, action = MultiOneHotCategorical(logits_of(4), NUM_ACTIONS), torch.tensor(EVERY_ACTION[:4])
    torch.testing.assert_close(distribution.log_prob(action.bool()), distribution.log_prob(action), rtol=0, atol=0)


@pytest.mark.parametrize("sample_shape", [(), (5,), (2, 5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_samples_have_one_bit_set_in_every_choice(shape, sample_shape):
    sample = MultiOneHotCategorical(logits_of(*shape), NUM_ACTIONS).sample(sample_shape)
    assert sample.shape == (*sample_shape, *shape, sum(NUM_ACTIONS))
    assert set(sample.unique().tolist()) <= {0, 1}
    assert all((part.sum(-1) == 1).all() for part in parts_of(sample))


def test_samples_are_as_frequent_as_their_probabilities_and_independent_of_each_other():
    logits, count = logits_of(2), 20_000
    samples = MultiOneHotCategorical(logits, NUM_ACTIONS).sample((count,)).double().numpy()
    for state in range(2):
        first, _, last = probabilities_of(logits[state])
        # Four standard errors of a frequency of one half.
        tolerance = 4 * 0.5 / count**0.5
        np.testing.assert_allclose(samples[:, state, :2].mean(0), first, atol=tolerance)
        together = samples[:, state, :2].T @ samples[:, state, 6:] / count
        np.testing.assert_allclose(together, np.outer(first, last), atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mode_is_the_likeliest_action(shape):
    distribution = MultiOneHotCategorical(logits_of(*shape), NUM_ACTIONS)
    actions = torch.tensor(EVERY_ACTION, dtype=torch.float64)
    every = torch.stack([distribution.log_prob(action.expand(*shape, -1)) for action in actions])
    assert distribution.mode.double().equal(actions[every.argmax(0)])
    assert distribution.deterministic_sample.equal(distribution.mode)


def test_the_mode_is_one_action_where_several_are_likeliest():
    mode = MultiOneHotCategorical(torch.zeros(4, sum(NUM_ACTIONS)), NUM_ACTIONS).mode
    assert all((part.sum(-1) == 1).all() for part in parts_of(mode))


def test_a_choice_may_have_a_single_option():
    distribution = MultiOneHotCategorical(torch.zeros(4, 3), (1, 2))
    assert distribution.sample().shape == (4, 3)
    action = torch.tensor([1.0, 0.0, 1.0]).expand(4, -1)
    np.testing.assert_allclose(distribution.log_prob(action).exp().numpy(), np.full(4, 0.5), rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_entropy_is_the_sum_of_the_choices_entropies(shape):
    logits = logits_of(*shape)
    expected = sum(scipy_entropy(p, axis=-1) for p in probabilities_of(logits))
    computed = MultiOneHotCategorical(logits, NUM_ACTIONS).entropy().numpy()
    np.testing.assert_allclose(computed, expected, rtol=1e-12)


def test_the_gradient_of_the_log_probability_is_the_action_minus_its_probabilities():
    logits, action = logits_of(4).requires_grad_(), torch.tensor(EVERY_ACTION[-4:], dtype=torch.float64)
    MultiOneHotCategorical(logits, NUM_ACTIONS).log_prob(action).sum().backward()
    expected = action.numpy() - np.concatenate(probabilities_of(logits.detach()), -1)
    np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=1e-10, atol=1e-14)


def test_an_action_of_another_size_is_refused():
    with pytest.raises(RuntimeError):
        MultiOneHotCategorical(logits_of(4), NUM_ACTIONS).log_prob(torch.zeros(4, 8))


# ---------------------------------------------------------------------------------------------- in an actor


@pytest.mark.parametrize(
    ("distribution", "key", "options"),
    [(Deterministic, "loc", {}), (MultiOneHotCategorical, "logits", {"num_actions": NUM_ACTIONS})],
)
def test_an_actor_acts_by_the_mode_where_exploration_is_off(distribution, key, options):
    network = TensorDictModule(nn.Linear(2, sum(NUM_ACTIONS)), in_keys=["observation"], out_keys=[key])
    actor = ProbabilisticActor(
        network, in_keys=[key], out_keys=["action"], distribution_class=distribution, distribution_kwargs=options
    )
    batch = TensorDict({"observation": torch.randn(4, 2)}, [4])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = actor(batch.clone())["action"]
    assert action.equal(actor.get_dist(batch).mode)


# ---------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_log_probability_of_bits_is_that_of_independent_bernoullis(shape, dtype):
    logits = torch.randn(*shape, 3, dtype=torch.float64)
    bits = torch.rand(*shape, 3) < 0.5
    expected = bernoulli.logpmf(bits.numpy(), 1 / (1 + np.exp(-logits.numpy()))).sum(-1)
    np.testing.assert_allclose(Bits(logits).log_prob(bits.to(dtype)).numpy(), expected, rtol=1e-10)


def test_the_log_probability_of_bits_is_finite_with_finite_gradients_at_large_logits():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    log_prob = Bits(logits).log_prob(torch.tensor([[0, 1]]))
    log_prob.sum().backward()
    assert log_prob.item() == -400 and logits.grad.tolist() == [[-1.0, 1.0]]


def test_bits_are_drawn_with_their_probabilities_and_their_mode_is_the_likelier_value():
    torch.manual_seed(0)
    distribution = Bits(torch.tensor([-1.0, 0.0, 2.0]))
    sample = distribution.sample((20_000,))
    assert sample.dtype == torch.int64 and sample.shape == (20_000, 3)
    torch.testing.assert_close(sample.float().mean(0), torch.tensor([-1.0, 0.0, 2.0]).sigmoid(), rtol=0, atol=0.02)
    assert distribution.mode.tolist() == distribution.deterministic_sample.tolist() == [0, 0, 1]


def test_the_entropy_of_bits_is_the_sum_over_the_bits():
    logits = torch.tensor([[-1.0, 0.0, 2.0]], dtype=torch.float64)
    expected = bernoulli.entropy(1 / (1 + np.exp(-logits.numpy()))).sum(-1)
    np.testing.assert_allclose(Bits(logits).entropy().numpy(), expected, rtol=1e-10)
