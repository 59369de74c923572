"""TorchRL's rows: its own losses, with the networks and hyperparameters of the other rows.

Each is its joint update: one backward of the three losses, Adam, and the Polyak update of the target critics. Where its
recipe for discrete actions copies the targets once in a while instead, that for continuous ones is followed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import (
    Bounded,
    Categorical,
    LazyMemmapStorage,
    LazyTensorStorage,
    SamplerWithoutReplacement,
    TensorDictReplayBuffer,
)
from torchrl.envs import DoubleToFloat
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import DiscreteIQLLoss, IQLLoss, SoftUpdate, group_optimizers

from iql_torchrl.benchmark.case import Case, Row

_GROUPS = ("actor", "value", "qvalue")
# Storages announce themselves across the progress bar.
logging.getLogger("torchrl").setLevel(logging.WARNING)


def recipe_row(case: Case, folder: str, *, mode: str) -> Row:
    """The update of TorchRL's offline recipe, on batches of its storage and sampler that are drawn as it asks."""
    return Row("TorchRL recipe", mode, "joint", lambda: _recipe(case, folder, compiled=mode != "eager"))


def shipped_row(case: Case, folder: str, *, mode: str) -> Row:
    """That recipe with all of its data path: four batches ahead in threads, and compiled as its option does.

    Its dataset has more columns than the random numbers here, which it would draw as well. For discrete actions the
    only recipe is one that trains online: three batches ahead, with replacement.
    """
    build = partial(_recipe, case, folder, compiled=mode != "eager", shipped=True)
    return Row("TorchRL as shipped", mode, "joint", build)


def tuned_row(case: Case, *, mode: str) -> Row:
    """What a careful user makes of TorchRL's loss.

    Data in memory and no thread, which cost more than the drawing that they hide; one fused Adam; losses and backward
    compiled. The fused Adam is a single kernel that the compiler does not trace, so it stands beside.
    """

    def build() -> Callable[[], object]:
        loss = build_loss(case)
        parameters = [leaf for name in _GROUPS for leaf in _parameters(loss, name)]
        adam = torch.optim.Adam(parameters, lr=3e-4, fused=True)
        targets = SoftUpdate(loss, tau=0.005)
        storage = LazyTensorStorage(case.transitions, device=case.device)
        buffer = TensorDictReplayBuffer(storage=storage, batch_size=case.batch_size)
        buffer.extend(case.random_transitions().exclude("episode"))

        def backward(batch: Any) -> Any:
            return _backward(loss, batch, _autocast(case))

        chosen = backward if mode == "eager" else torch.compile(backward)

        def update() -> Any:
            adam.zero_grad(set_to_none=True)
            losses = chosen(buffer.sample())
            adam.step()
            targets.step()
            return losses

        return Update(loss, update)

    return Row("TorchRL tuned", mode, "joint", build)


class Update:
    """An update that is called without arguments, and the loss whose parameters it changes."""

    def __init__(self, loss: IQLLoss, update: Callable[[], object]) -> None:
        self.loss = loss
        self._update = update

    def __call__(self) -> object:
        return self._update()


def _recipe(case: Case, folder: str, *, compiled: bool, shipped: bool = False) -> Update:
    loss = build_loss(case, shipped=shipped)
    adams = [torch.optim.Adam(_parameters(loss, name), lr=3e-4) for name in _GROUPS]
    optimizer = group_optimizers(*adams)
    targets = SoftUpdate(loss, tau=0.005)
    ahead = (3 if case.discrete else 4) if shipped else None
    online = shipped and case.discrete
    buffer = TensorDictReplayBuffer(
        storage=LazyMemmapStorage(case.transitions, scratch_dir=folder),
        sampler=None if online else SamplerWithoutReplacement(drop_last=shipped),
        batch_size=case.batch_size,
        prefetch=ahead,
    )
    buffer.extend(case.random_transitions().exclude("episode"))
    if shipped and not online and case.precision != "float64":
        buffer.append_transform(DoubleToFloat())

    def update(batch: Any) -> Any:
        optimizer.zero_grad(set_to_none=True)
        losses = _backward(loss, batch, _autocast(case))
        optimizer.step()
        targets.step()
        return losses

    chosen = torch.compile(update, mode="reduce-overhead" if shipped else None) if compiled else update

    def call() -> Any:
        batch = buffer.sample().to(case.device)
        if shipped:
            torch.compiler.cudagraph_mark_step_begin()
        return chosen(batch)

    return Update(loss, call)


def build_loss(case: Case, *, shipped: bool = False) -> IQLLoss:
    """TorchRL's ``IQLLoss``, or its ``DiscreteIQLLoss`` of integer actions, with the networks of its recipes.

    With ``shipped`` the bounds of actions are tensors, as those of a recipe's environment are.
    """
    torch.manual_seed(case.seed)
    observation_dim, action_dim = case.observation_dim, case.action_dim

    def mlp(inputs: int, outputs: int) -> MLP:
        norm = [{"normalized_shape": width} for width in case.hidden_dims]
        return MLP(
            in_features=inputs,
            out_features=outputs,
            num_cells=list(case.hidden_dims),
            activation_class=nn.ReLU,
            norm_class=nn.LayerNorm if case.layer_norm else None,
            norm_kwargs=norm if case.layer_norm else None,
        )

    options: dict[str, Any] = {"loss_function": "l2", "temperature": 3.0, "expectile": 0.7}
    value = ValueOperator(mlp(observation_dim, 1), in_keys=["observation"])
    if case.discrete:
        actor = ProbabilisticActor(
            TensorDictModule(mlp(observation_dim, action_dim), in_keys=["observation"], out_keys=["logits"]),
            in_keys=["logits"],
            spec=Categorical(action_dim),
            distribution_class=torch.distributions.Categorical,
        )
        network = mlp(observation_dim, action_dim)
        qvalue = TensorDictModule(network, in_keys=["observation"], out_keys=["state_action_value"])
        loss = DiscreteIQLLoss(actor, qvalue, value, action_space="categorical", **options)
    else:
        extractor = NormalParamExtractor(scale_mapping="biased_softplus_1.0", scale_lb=0.1)  # type: ignore[arg-type]
        policy = nn.Sequential(mlp(observation_dim, 2 * action_dim), extractor)
        high = torch.ones(action_dim, device=case.device, dtype=case.dtype)
        actor = ProbabilisticActor(
            TensorDictModule(policy, in_keys=["observation"], out_keys=["loc", "scale"]),
            in_keys=["loc", "scale"],
            spec=Bounded(-1.0, 1.0, (action_dim,)),  # type: ignore[arg-type]
            distribution_class=TanhNormal,
            distribution_kwargs={"low": -high, "high": high, "tanh_loc": False} if shipped else {},
        )
        qvalue = ValueOperator(mlp(observation_dim + action_dim, 1), in_keys=["observation", "action"])
        loss = IQLLoss(actor, qvalue, value, **options)
    loss = loss.to(case.device, case.dtype)
    loss.make_value_estimator(gamma=0.99)
    return loss


def _parameters(loss: IQLLoss, name: str) -> list[Tensor]:
    return list(getattr(loss, f"{name}_network_params").values(True, True))


def _backward(loss: IQLLoss, batch: Any, autocast: AbstractContextManager[Any]) -> Any:
    with autocast:
        losses = loss(batch)
    (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
    return losses.detach()


def _autocast(case: Case) -> AbstractContextManager[Any]:
    return torch.autocast(case.device.type, torch.bfloat16) if case.precision == "bfloat16" else nullcontext()
