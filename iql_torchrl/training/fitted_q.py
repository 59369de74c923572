"""Q of policies that stay as they are, by fitted Q evaluation: many policies and resamples at once, in one update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from iql_torchrl.errors import LONGEST_REASON, first_line
from iql_torchrl.networks import build_discrete_qvalues, build_qvalues
from iql_torchrl.training.adam import ADAM_STATE, adam_in_graph, fused_adam, new_adam_state
from iql_torchrl.training.compilation import compile_update, resolve_compile
from iql_torchrl.training.parameters import FlatParameters
from iql_torchrl.training.products import resolve_products
from iql_torchrl.training.recording import record


class FittedQ:
    """Regression of Q(s, a) towards r + discount * (1 - terminated) * target Q(s', pi(s')) (Le et al. 2019, eq. 3).

    The policies never change, so that their actions in all next observations are computed once, and an update has
    nothing in it but critics: one for each policy and member, in one batched product a layer. Members draw from rows of
    their own (resamples of the data, for an interval), and start from networks of their own; policies meet the same
    batches and the same first networks, so that what differs between them is the policies.

    Args:
        transitions: ``observation`` ``[N, O]``, ``action`` ``[N, A]`` or discrete ``[N]``, ``("next", "observation")``,
            ``("next", "reward")`` and ``("next", "terminated")`` ``[N, 1]``.
        next_actions: of each policy in each next observation, ``[policies, N, A]`` or ``[policies, N]``, as the
            transitions have actions.
        rows: of each member, those that it draws from, uniformly and with replacement.

    Keyword Args:
        discount: of future rewards.
        bounds: smallest and largest value that there can be, to which target Q is clipped: where the data say nothing
            of a policy's actions, critics would chase their own errors without end.
        num_actions: of discrete ones.
        hidden_dims, layer_norm: of the critics.
        batch_size: of an update, of each critic.
        learning_rate, tau: of Adam, and of the target critics' Polyak average.
        compile: ``True``, ``False`` or ``"auto"``, as of :class:`~iql_torchrl.TrainingStep`.
        products: as there.
        seed: of the first networks and the draws; the process's generator stays as it was.
    """

    def __init__(
        self,
        transitions: TensorDict,
        next_actions: Tensor,
        rows: Sequence[Tensor],
        *,
        discount: float,
        bounds: tuple[float, float] = (-math.inf, math.inf),
        num_actions: int | None = None,
        hidden_dims: Sequence[int] = (256, 256),
        layer_norm: bool = False,
        batch_size: int = 256,
        learning_rate: float = 3e-4,
        tau: float = 0.02,
        compile: bool | str = "auto",
        products: str = "auto",
        seed: int = 0,
    ) -> None:
        self.discount, self.tau, self._seed = discount, tau, seed
        self._bounds = bounds
        self._discrete = num_actions is not None
        self._data: dict[Any, Tensor] = {
            key: transitions.get(key)
            for key in ("observation", "action", *(("next", name) for name in ("observation", "reward", "terminated")))
        }
        self._next_actions = next_actions.clone()
        device, dtype = next_actions.device, self._data["observation"].dtype
        self._shape = (len(next_actions), len(rows), batch_size)

        self._rows = torch.cat(list(rows)).to(device)
        lengths = torch.tensor([len(one) for one in rows], device=device)
        self._lengths, self._offsets = lengths[:, None], (lengths.cumsum(0) - lengths)[:, None]

        observation_dim = self._data["observation"].shape[1]
        sizes: dict[str, Any] = {"num_qvalue_nets": len(rows), "hidden_dims": hidden_dims, "layer_norm": layer_norm}
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            if num_actions is None:
                critics = build_qvalues(observation_dim, self._data["action"].shape[1], **sizes)
            else:
                critics = build_discrete_qvalues(observation_dim, num_actions, **sizes)
        networks: list[Any] = [critic.to(device, dtype).module for critic in critics]
        self._network = networks[0]

        self.compiled, self.compile_note = resolve_compile(compile, device)
        count = self._shape[0] * self._shape[1]
        weights = [weight for weight in self._network.parameters() if weight.ndim == 2]
        layers = [(batch_size, count, weight.shape[1], weight.shape[0]) for weight in weights]
        self.products, _ = resolve_products(products, device, dtype, layers, fused=self.compiled)
        parameters = [TensorDict.from_module(network) for network in networks]
        self._layout = FlatParameters(parameters, stacked=True, transposed=self.products == "onednn")
        self._first = self._layout.flat.detach().clone()
        flat = self._first.repeat(self._shape[0], 1).requires_grad_()
        self._state = {"qvalue": flat, "target": flat.detach().clone(), **new_adam_state(flat, learning_rate)}
        self._adam = adam_in_graph if self.compiled else fused_adam
        self._generator = torch.Generator(device).manual_seed(seed)
        self._one_update: Callable[[Tensor], dict[str, Tensor]] | None = None

    def __call__(self) -> Tensor:
        """One update of every critic.

        Returns:
            the mean squared TD errors, ``[policies, members]``.
        """
        _, members, batch_size = self._shape
        drawn = torch.rand(
            members, batch_size, generator=self._generator, device=self._rows.device, dtype=torch.float64
        )
        index = self._rows[self._offsets + (drawn * self._lengths).long()]
        if self._one_update is None:
            self._one_update = self._record(index)
        return self._one_update(index)["loss"].reshape(self._shape[:2])

    def restart(self, next_actions: Tensor) -> None:
        """Begin anew for as many other policies, with what is compiled already.

        Args:
            next_actions: as when it was built.
        """
        self._next_actions.copy_(next_actions)
        with torch.no_grad():
            self._state["qvalue"].copy_(self._first.repeat(self._shape[0], 1))
            self._state["target"].copy_(self._state["qvalue"])
            for name in ("exp_avg", "exp_avg_sq", "step"):
                self._state[name].zero_()
        self._generator.manual_seed(self._seed)

    @torch.no_grad()
    def values(self, observation: Tensor, actions: Tensor) -> Tensor:
        """Q of each policy's critics.

        Args:
            observation: ``[n, O]``.
            actions: of each policy there, ``[policies, n, A]`` or ``[policies, n]``.

        Returns:
            ``[policies, members, n]``.
        """
        policies, members, _ = self._shape
        of_each = actions.repeat_interleave(members, 0)
        q = torch.vmap(self._qvalue, in_dims=(0, None, 0))(self._state["qvalue"].detach(), observation, of_each)
        return q.reshape(policies, members, -1)

    def _record(self, index: Tensor) -> Callable[[Tensor], dict[str, Tensor]]:
        slots = [(self._state, name) for name in self._state]
        if self.compiled:
            try:
                return compile_update(self._update, index, slots, self.products)
            except Exception as error:  # whatever a compiler says
                self.compiled, self._adam = False, fused_adam
                self.compile_note = f"the update does not compile; running eagerly: {first_line(error, LONGEST_REASON)}"
        return record(self._update, index, slots, self.products)

    def _update(self, index: Tensor) -> dict[str, Tensor]:
        policies, members, _ = self._shape
        batch = {key: column[index] for key, column in self._data.items()}
        flat, target = self._state["qvalue"], self._state["target"]

        def of_all(tensor: Tensor) -> Tensor:  # [members, B, ...] -> [policies * members, B, ...]
            return tensor.expand(policies, *tensor.shape).reshape(policies * members, *tensor.shape[1:])

        next_action = self._next_actions[:, index].flatten(0, 1)
        with torch.no_grad():
            following = torch.vmap(self._qvalue)(target, of_all(batch["next", "observation"]), next_action)
            following = following.clamp(*self._bounds)
            following = torch.where(of_all(batch["next", "terminated"])[..., 0], 0.0, following)
            wanted = of_all(batch["next", "reward"])[..., 0] + self.discount * following
        found = torch.vmap(self._qvalue)(flat, of_all(batch["observation"]), of_all(batch["action"]))
        loss = (found - wanted).square().mean(-1)
        (gradient,) = torch.autograd.grad(loss.sum(), [flat])
        self._adam(flat, gradient, {key: self._state[key] for key in ADAM_STATE})
        with torch.no_grad():
            target.lerp_(flat.detach(), self.tau)
        return {"loss": loss.detach()}

    def _qvalue(self, flat: Tensor, observation: Tensor, action: Tensor) -> Tensor:
        """Of one critic: ``[n]``."""
        with self._layout.unpack(flat).to_module(self._network, preserve_module_state=False):
            if self._discrete:
                return self._network(observation).gather(-1, action[..., None])[..., 0]
            return self._network(observation, action)[..., 0]
