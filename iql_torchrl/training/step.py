"""The training step: sampling, the three losses, Adam and the target update, as one call."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from torch import Tensor, nn
from torchrl.data import RandomSampler, ReplayBuffer, SamplerWithoutReplacement
from torchrl.objectives import SoftUpdate

from iql_torchrl.objectives import IQLLoss

ORDERS = ("sequential", "joint")
_GROUPS = ("value", "actor", "qvalue")


class TrainingStep:
    """One IQL update per call: draw a batch, three losses, three Adam updates, the target update.

    >>> step = TrainingStep(IQLLoss(actor, qvalues, value), buffer, total_steps=1_000_000)
    >>> for _ in range(1_000_000):
    ...     losses = step()

    Each network's parameters are moved into one flat tensor, of which the loss's own become views: Adam and the
    target update are then one operation a network instead of one a layer, and a compiled step has a handful of inputs.

    Args:
        loss: its parameters are trained in place. Networks must not share parameters.
        buffer: a TorchRL replay buffer of transitions with a tensor storage, a ``batch_size``, and a ``RandomSampler``
            or ``SamplerWithoutReplacement``. Its content is taken when the step is built, transforms applied.

    Keyword Args:
        total_steps: length of the actor's cosine schedule; ``None`` keeps its learning rate constant.
        actor_lr, value_lr, critic_lr: Adam learning rates.
        tau: Polyak coefficient of the target update, handed to TorchRL's ``SoftUpdate``.
        order: ``"sequential"`` is the paper's: V first, then actor and critics with the new V, then the targets.
            ``"joint"`` is TorchRL's: all losses at the old parameters.
        compile: ``True``, ``False``, or ``"auto"``: compile where a C++ compiler (CPU) or Triton (GPU) is found.

    Raises:
        ValueError: a learning rate or tau out of range, an unknown order, networks that share parameters, a buffer
            without ``batch_size``, with a batch larger than its content, or with another sampler.
    """

    def __init__(
        self,
        loss: IQLLoss,
        buffer: ReplayBuffer,
        *,
        total_steps: int | None = None,
        actor_lr: float = 3e-4,
        value_lr: float = 3e-4,
        critic_lr: float = 3e-4,
        tau: float = 0.005,
        order: str = "sequential",
        compile: bool | str = "auto",
    ) -> None:
        for name, rate in (("actor_lr", actor_lr), ("value_lr", value_lr), ("critic_lr", critic_lr)):
            if not 0 <= rate < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {rate}.")
        if not 0 < tau <= 1:
            raise ValueError(f"tau must be in (0, 1], got {tau}.")
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}.")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}.")
        if buffer.batch_size is None:
            raise ValueError("the replay buffer has no batch_size; give it one when building it.")
        if len(buffer) < buffer.batch_size:
            raise ValueError(f"batch_size is {buffer.batch_size} but the buffer holds only {len(buffer)} transitions.")
        _refuse_unsuited_sampler(buffer)
        self.loss = loss
        self.buffer = buffer
        self.order = order
        self.tau = tau
        self.total_steps = total_steps
        # Registers itself with the loss and makes the targets equal to their sources; its update is done on the flat
        # tensors below, in one operation instead of one a layer.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found an eps value < 0.5")
            SoftUpdate(loss, tau=tau)

        self._trained = {name: _FlatParameters(getattr(loss, f"{name}_network_params")) for name in _GROUPS}
        self._targets = {
            name: _FlatParameters(target)
            for name in _GROUPS
            if (target := loss._modules.get(f"target_{name}_network_params")) is not None
        }
        _refuse_shared_parameters(loss, self._trained)
        self._base_lr = {"value": value_lr, "actor": actor_lr, "qvalue": critic_lr}
        device = self._trained["value"].flat.device
        # An integer: a compiled graph loses in-place changes of a float64 scalar on the CPU, and float32 ends at 2^24.
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self.optimizers = {name: self._make_adam(name) for name in _GROUPS}
        loss.value_estimator  # built by its first use, which must not be inside the compiled function

        self._data = buffer[:]
        self._batch_size = buffer.batch_size
        self._index: Tensor | None = None
        self._traced = False
        self.compiled, self.compile_note = _resolve_compile(compile, device)
        self._update_function = self._compile() if self.compiled else self._update

    def __call__(self) -> dict[str, Tensor]:
        """Do one update.

        Returns:
            ``loss_actor``, ``loss_qvalue``, ``loss_value`` and ``entropy``, detached scalars on the training device
            (reading one as a float synchronises with the device).
        """
        index, _ = self.buffer.sampler.sample(self.buffer.storage, self._batch_size)
        self._index = torch.as_tensor(index, device=self._count.device)
        if self._traced:
            return self._update_function(self._index)
        with warnings.catch_warnings(), torch._dynamo.config.patch(trace_autograd_ops=True):
            # tensordict reads an option that PyTorch has retired.
            warnings.filterwarnings("ignore", message=".*inline_inbuilt_nn_modules.*", category=FutureWarning)
            losses = self._update_function(self._index)
        self._traced = True
        return losses

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self._count.device

    @property
    def count(self) -> int:
        """Updates done so far."""
        return int(self._count.item())

    @property
    def learning_rates(self) -> dict[str, float]:
        """The learning rates of the latest update, by network."""
        return {name: float(optimizer.param_groups[0]["lr"]) for name, optimizer in self.optimizers.items()}

    def batch(self) -> TensorDictBase:
        """The batch of the latest update: for diagnostics, without touching the sampler."""
        if self._index is None:
            raise RuntimeError("no update has been done yet; call the step first.")
        return self._data[self._index]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on, besides the data and the process-wide random state."""
        generator = self.buffer.storage._rng
        return {
            "loss": {name: value.clone() for name, value in self.loss.state_dict().items() if torch.is_tensor(value)},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "count": self._count.clone(),
            "sampler": self.buffer.sampler.state_dict(),
            "generator": None if generator is None else generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, in place: a compiled step stays valid."""
        self.loss.load_state_dict(state["loss"])
        self._count.copy_(state["count"])
        for name, optimizer in self.optimizers.items():
            saved, mine = state["optimizers"][name], optimizer.state[self._trained[name].flat]
            for key, value in saved["state"][0].items():
                mine[key].copy_(value)
            optimizer.param_groups[0]["lr"].copy_(saved["param_groups"][0]["lr"])
        self.buffer.sampler.load_state_dict(state["sampler"])
        generator = self.buffer.storage._rng
        if state["generator"] is not None and generator is not None:
            generator.set_state(state["generator"].cpu())

    def _compile(self) -> Callable[[Tensor], dict[str, Tensor]]:
        # Nothing that the traced function reads changes after the constructor except the content of tensors, so
        # checking some hundred guards on every call, a twentieth of a step, would find nothing. Without guards, though,
        # compiled code is told apart by its code object alone: each step needs one of its own.
        update = TrainingStep._update
        function = types.FunctionType(update.__code__.replace(), update.__globals__, update.__name__)
        compiled = torch.compile(
            function,
            fullgraph=True,
            options={
                "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
                "cpp_wrapper": self.device.type == "cpu",  # some hundred calls into Python a step less
            },
        )
        return functools.partial(compiled, self)

    # ------------------------------------------------------------------ one update, as the compiler sees it

    def _update(self, index: Tensor) -> dict[str, Tensor]:
        batch = self._data[index]
        self._set_actor_learning_rate()
        losses = self._sequential_update(batch) if self.order == "sequential" else self._joint_update(batch)
        with torch.no_grad():
            for name, target in self._targets.items():
                target.flat.lerp_(self._trained[name].flat, self.tau)
            self._count.add_(1)
        return losses

    def _sequential_update(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """The paper's order: V, then the policy and Q with the new V."""
        parameters = self._parameters()
        target_qvalue = self.loss.target_qvalue(batch, parameters=parameters)
        loss_value, _ = self.loss.value_loss(batch, target_qvalue=target_qvalue, parameters=parameters)
        self._descend(loss_value, "value")
        parameters = self._parameters()
        loss_actor, _ = self.loss.actor_loss(batch, target_qvalue=target_qvalue, parameters=parameters)
        loss_qvalue, _ = self.loss.qvalue_loss(batch, parameters=parameters)
        self._descend(loss_actor + loss_qvalue, "actor", "qvalue")
        return self._report(batch, loss_actor, loss_qvalue, loss_value)

    def _joint_update(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """TorchRL's order: every loss at the old parameters, one backward."""
        losses = self.loss(batch, parameters=self._parameters())
        self._descend(losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"], *_GROUPS)
        return self._report(batch, losses["loss_actor"], losses["loss_qvalue"], losses["loss_value"])

    def _report(self, batch: TensorDictBase, loss_actor: Tensor, loss_qvalue: Tensor, loss_value: Tensor):
        return {
            "loss_actor": loss_actor.detach(),
            "loss_qvalue": loss_qvalue.detach(),
            "loss_value": loss_value.detach(),
            "entropy": -batch.get(self.loss.tensor_keys.log_prob).mean(),
        }

    def _parameters(self) -> dict[str, TensorDictBase]:
        groups = {f"{name}_network_params": flat for name, flat in self._trained.items()}
        groups |= {f"target_{name}_network_params": flat for name, flat in self._targets.items()}
        return {name: flat.as_tensordict() for name, flat in groups.items()}

    def _descend(self, loss: Tensor, *names: str) -> None:
        """One Adam update of the named networks."""
        flats = [self._trained[name].flat for name in names]
        for name, flat, gradient in zip(names, flats, torch.autograd.grad(loss, flats), strict=True):
            optimizer = self.optimizers[name]
            if torch.compiler.is_compiling():
                _adam_in_graph(flat, gradient, optimizer.state[flat], optimizer.param_groups[0])
            else:
                flat.grad = gradient
                optimizer.step()

    def _set_actor_learning_rate(self) -> None:
        """Cosine to 0 over ``total_steps``, in closed form: stepping a factor on a float32 tensor drifts."""
        if self.total_steps is None:
            return
        progress = (self._count.double() / self.total_steps).clamp(max=1.0)
        rate = self._base_lr["actor"] * 0.5 * (1 + torch.cos(math.pi * progress))
        self.optimizers["actor"].param_groups[0]["lr"].copy_(rate)

    def _make_adam(self, name: str) -> torch.optim.Adam:
        flat = self._trained[name].flat
        # A tensor: a float that changes would make the compiled step recompile. One of float64 has a dimension, without
        # which a compiled graph loses its changes; one of float32 has none, as fused Adam wants it on a GPU.
        double = flat.dtype == torch.float64
        rate = torch.full((1,) if double else (), self._base_lr[name], dtype=flat.dtype if double else torch.float32)
        rate = rate.to(flat.device)
        optimizer = torch.optim.Adam([flat], lr=rate, fused=True)
        # Created here and not at the first step, so that the compiled function meets the same tensors every time.
        optimizer.state[flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=flat.device),
            "exp_avg": torch.zeros_like(flat, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
        }
        return optimizer


class _FlatParameters:
    """The parameters of one network moved into one flat tensor, of which they become views."""

    def __init__(self, params: TensorDictBase | nn.Module) -> None:
        assert isinstance(params, TensorDictParams)
        self._batch_size = params.batch_size
        leaves = [(key if isinstance(key, tuple) else (key,), leaf) for key, leaf in params.items(True, True)]
        self._layout = [(key, leaf.shape) for key, leaf in leaves]
        trained = any(leaf.requires_grad for _, leaf in leaves)
        self.flat = torch.cat([_as_stored(leaf.detach()).reshape(-1) for _, leaf in leaves]).requires_grad_(trained)
        for (_, leaf), view in zip(leaves, self._views(self.flat.detach()), strict=True):
            leaf.data = view

    def as_tensordict(self) -> TensorDictBase:
        """Views of the flat tensor, through which gradients reach it, in the structure of the network."""
        out = TensorDict({}, batch_size=self._batch_size)
        for (key, _), view in zip(self._layout, self._views(self.flat), strict=True):
            out.set(key, view)  # pyright: ignore[reportArgumentType]
        return out

    def _views(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split([shape.numel() for _, shape in self._layout])
        return [
            _as_stored(piece.view(_as_stored(torch.empty(shape, device="meta")).shape))
            for piece, (_, shape) in zip(pieces, self._layout, strict=True)
        ]


def _as_stored(weight: Tensor) -> Tensor:
    """Stacked critic weights ``[N, out, in]`` are stored transposed, as batched products return their gradients."""
    return weight.transpose(-1, -2) if weight.ndim == 3 else weight


@torch.no_grad()
def _adam_in_graph(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """``torch.optim.Adam``'s update, on its own state, in operations that a graph can hold (fused=True is none)."""
    beta1, beta2 = group["betas"]
    step = state["step"].add_(1).double()
    # Stacked, because only then does the compiler compute them once: it would repeat the powers, and the cosine of the
    # learning rate, for every few parameters.
    scalars = torch.stack([group["lr"].reshape(()) / (1 - beta1**step), (1 - beta2**step).rsqrt()])
    step_size, correction = scalars.to(parameter.dtype).unbind()
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    parameter.sub_(step_size * state["exp_avg"] / (state["exp_avg_sq"].sqrt() * correction + group["eps"]))


def _refuse_shared_parameters(loss: IQLLoss, trained: Mapping[str, _FlatParameters]) -> None:
    expected = sum(flat.flat.numel() for flat in trained.values())
    found = sum(parameter.numel() for parameter in loss.parameters())
    if expected != found:
        raise ValueError(
            f"the networks share parameters ({expected} in the three networks, {found} distinct in the loss); "
            "TrainingStep needs separate ones: train a shared encoder with your own loop around IQLLoss."
        )


def _refuse_unsuited_sampler(buffer: ReplayBuffer) -> None:
    sampler, batch_size = buffer.sampler, buffer.batch_size or 1
    if not isinstance(sampler, RandomSampler | SamplerWithoutReplacement):
        raise ValueError(
            f"TrainingStep draws transitions uniformly; use a {type(sampler).__name__} with IQLLoss in your own loop."
        )
    if isinstance(sampler, SamplerWithoutReplacement) and not sampler.drop_last and len(buffer) % batch_size:
        raise ValueError(
            f"the last batch of a pass over {len(buffer)} transitions would be smaller than {batch_size}; build "
            "the SamplerWithoutReplacement with drop_last=True."
        )


def _resolve_compile(compile: bool | str, device: torch.device) -> tuple[bool, str]:
    """Whether to compile, and why not where ``"auto"`` decided against it."""
    if compile == "auto":
        if device.type == "cpu":
            names = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
            if not any(shutil.which(name) for name in names):
                return False, f"no C++ compiler found (looked for {', '.join(names)}); running eagerly"
        elif importlib.util.find_spec("triton") is None:
            return False, "Triton is not installed, without which nothing compiles for a GPU; running eagerly"
        return True, ""
    if not isinstance(compile, bool):
        raise ValueError(f"compile must be true, false or 'auto', got {compile!r}.")
    return compile, ""
