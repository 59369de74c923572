"""Adam on flat tensors, in the two forms that are fast: one kernel, and operations that a compiled graph fuses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._inductor.inductor_prims import fma
from torch.optim.adam import adam

ADAM_STATE = ("exp_avg", "exp_avg_sq", "step", "lr")
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


def new_adam_state(flat: Tensor, learning_rate: float) -> dict[str, Tensor]:
    """Moments, count and learning rate for a flat tensor of parameters, ``[P]`` or ``[runs, P]``."""
    # A tensor: a float that changes would make the compiled step recompile. One of float64 has a dimension, without
    # which a compiled graph loses its changes; one of float32 has none, as fused Adam wants it on a GPU.
    double = flat.dtype == torch.float64 and flat.device.type == "cpu"
    shape, dtype = ((1,), flat.dtype) if double else ((), torch.float32)
    return {
        "exp_avg": torch.zeros_like(flat, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
        "step": torch.zeros((), dtype=torch.float32, device=flat.device),
        "lr": torch.full(shape, learning_rate, dtype=dtype, device=flat.device),
    }


@torch.no_grad()
def fused_adam(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
    """``torch.optim.Adam``'s update in place, in one kernel."""
    adam(
        *([parameter], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]]),
        fused=True,
        amsgrad=False,
        beta1=_BETAS[0],
        beta2=_BETAS[1],
        lr=state["lr"],
        weight_decay=0.0,
        eps=_EPSILON,
        maximize=False,
    )


@torch.no_grad()
def adam_in_graph(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
    """The same update in operations that a compiled graph can hold and fuse with what is around them."""
    beta1, beta2 = _BETAS
    step = state["step"].add_(1).double()
    # Stacked, because only then does the compiler compute them once: it would repeat the powers, and the cosine of the
    # learning rate, for every few parameters.
    scalars = torch.stack([state["lr"].reshape(()) / (1 - beta1**step), (1 - beta2**step).rsqrt()])
    step_size, correction = scalars.to(parameter.dtype).unbind()
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    second = state["exp_avg_sq"]
    second.copy_(fma(gradient * gradient, 1 - beta2, second * beta2))
    parameter.sub_(step_size * state["exp_avg"] / (second.sqrt() * correction + _EPSILON))
