"""The update of fitted Q evaluation, against its equations in float64."""

import copy

import pytest
import torch
from tensordict import TensorDict

from iql_torchrl.networks import build_discrete_qvalues, build_qvalues
from iql_torchrl.training.fitted_q import FittedQ

N, OBSERVATION, ACTION, BATCH = 300, 4, 2, 16
ROWS = [torch.arange(N), torch.arange(50, 90)]


def transitions(discrete=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return TensorDict(
        {
            "observation": normal(N, OBSERVATION),
            "action": torch.randint(3, (N,), generator=generator) if discrete else normal(N, ACTION).tanh(),
            "next": {
                "observation": normal(N, OBSERVATION),
                "reward": normal(N, 1),
                "terminated": torch.rand(N, 1, generator=generator) < 0.3,
            },
        },
        [N],
    )


def next_actions(policies=2, discrete=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    if discrete:
        return torch.randint(3, (policies, N), generator=generator)
    return torch.randn(policies, N, ACTION, generator=generator, dtype=dtype).tanh()


def critics(data, actions, discrete=False, **options):
    chosen = {"discount": 0.9, "hidden_dims": (8, 8), "batch_size": BATCH, "compile": False, "seed": 3, **options}
    return FittedQ(data, actions, ROWS, num_actions=3 if discrete else None, **chosen)


@pytest.mark.parametrize("discrete", [False, True])
def test_an_update_is_adam_on_the_squared_error_to_reward_and_discounted_target_q(discrete):
    data, actions = transitions(discrete), next_actions(discrete=discrete)
    found = critics(data, actions, discrete, learning_rate=0.01, tau=0.1)
    losses = [found() for _ in range(5)]

    # The same by PyTorch's autograd and Adam, one critic after the other, on the same draws.
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {"num_qvalue_nets": 2, "hidden_dims": (8, 8)}
        built = (
            build_discrete_qvalues(OBSERVATION, 3, **sizes) if discrete else build_qvalues(OBSERVATION, ACTION, **sizes)
        )
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.rand(2, BATCH, generator=generator, dtype=torch.float64) for _ in range(5)]

    def q(network, observation, action):
        if discrete:
            return network(observation)[torch.arange(len(action)), action]
        return network(torch.cat([observation, action], -1))[:, 0]

    values = found.values(data["observation"][:7], actions[:, :7])
    for policy in range(2):
        for member in range(2):
            network = copy.deepcopy(built[member].module).double()
            target = copy.deepcopy(network)
            adam = torch.optim.Adam(network.parameters(), lr=0.01)
            for step in range(5):
                rows = ROWS[member][(drawn[step][member] * len(ROWS[member])).long()]
                batch = data[rows]
                with torch.no_grad():
                    following = q(target, batch["next", "observation"], actions[policy][rows])
                    alive = ~batch["next", "terminated"][:, 0]
                    wanted = batch["next", "reward"][:, 0] + 0.9 * alive * following
                loss = ((q(network, batch["observation"], batch["action"]) - wanted) ** 2).mean()
                # Adam divides by the gradient's size: rounding of gradients near its epsilon is no rounding any more.
                torch.testing.assert_close(losses[step][policy, member], loss.detach(), rtol=1e-6, atol=0)
                adam.zero_grad()
                loss.backward()
                adam.step()
                with torch.no_grad():
                    for mine, others in zip(target.parameters(), network.parameters(), strict=True):
                        mine.mul_(0.9).add_(0.1 * others)
            expected = q(network, data["observation"][:7], actions[policy][:7]).detach()
            torch.testing.assert_close(values[policy, member], expected, rtol=1e-6, atol=1e-7)


def test_policies_that_act_alike_have_the_same_critics_and_resamples_others():
    actions = next_actions(1).expand(3, N, ACTION).contiguous()
    found = critics(transitions(), actions)
    for _ in range(10):
        found()
    one, same, also = found.values(transitions()["observation"], actions)
    assert torch.equal(one, same) and torch.equal(one, also)
    assert not torch.allclose(one[0], one[1])


def test_other_policies_begin_anew_with_what_was_built():
    data, first, second = transitions(), next_actions(2), next_actions(2).flip(0)
    found, fresh = critics(data, first), critics(data, second)
    for _ in range(5):
        found()
    found.restart(second)
    for _ in range(5):
        assert torch.equal(found(), fresh())
    where = data["observation"], second
    assert torch.equal(found.values(*where), fresh.values(*where))


def test_the_generator_of_the_process_stays_as_it_was():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    critics(transitions(), next_actions())()
    assert torch.equal(torch.rand(3), expected)


def test_target_values_are_clipped_to_what_there_can_be():
    data, actions = transitions(), next_actions()
    clipped, myopic = critics(data, actions, bounds=(0.0, 0.0)), critics(data, actions, discount=0.0)
    free = critics(data, actions)
    for _ in range(5):
        found = clipped()
        torch.testing.assert_close(found, myopic(), rtol=1e-12, atol=0)
        assert not torch.allclose(found, free())


@pytest.mark.slow
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("products", ["mkl", "auto"])
def test_compiled_updates_are_the_eager_ones_within_rounding(discrete, products):
    data = transitions(discrete, torch.float32)
    actions = next_actions(discrete=discrete, dtype=torch.float32)
    eager, compiled = (critics(data, actions, discrete, compile=one, products=products) for one in (False, True))
    for _ in range(20):
        torch.testing.assert_close(compiled(), eager(), rtol=1e-3, atol=1e-5)
    assert compiled.compiled, compiled.compile_note
    where = data["observation"], actions
    torch.testing.assert_close(compiled.values(*where), eager.values(*where), rtol=1e-3, atol=1e-4)
