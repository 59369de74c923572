"""The training step: sampling, the three losses, Adam and the target update, as one call."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import RandomSampler, ReplayBuffer
from torchrl.objectives import SoftUpdate

from iql_torchrl.configuration.declaring import check_argument, check_arguments
from iql_torchrl.configuration.options import AlgorithmOptions, TrainOptions
from iql_torchrl.errors import LONGEST_REASON, first_line
from iql_torchrl.objectives import IQLLoss
from iql_torchrl.training.adam import ADAM_STATE, adam_in_graph, fused_adam, new_adam_state
from iql_torchrl.training.buffers import check_buffers, refuse_undivided
from iql_torchrl.training.capture import CapturedFunction, resolve_cudagraphs
from iql_torchrl.training.compilation import compile_update, resolve_compile
from iql_torchrl.training.data_parallel import Ranks
from iql_torchrl.training.devices import resolve_stacked
from iql_torchrl.training.memory import keep_freed_memory
from iql_torchrl.training.parameters import FlatParameters, refuse_different_architectures, refuse_shared_parameters
from iql_torchrl.training.products import resolve_products
from iql_torchrl.training.recording import ONE_THREAD, Slot, record
from iql_torchrl.training.staging import Staging

_GROUPS = ("value", "actor", "qvalue")
Flats = Mapping[str, Tensor]


class TrainingStep:
    """One IQL update per call: draw a batch, three losses, three Adam updates, the target update.

    >>> step = TrainingStep(IQLLoss(actor, qvalues, value), buffer, total_steps=1_000_000)
    >>> for _ in range(1_000_000):
    ...     losses = step()

    Each network's parameters are moved into one flat tensor, of which the loss's own become views: Adam and the
    target update are then one operation a network instead of one a layer, and a compiled step has a handful of inputs.

    Args:
        loss: its parameters are trained in place. Networks must not share parameters. A list of losses with networks
            of one architecture trains independent runs, each as it would be trained by itself; the first one's
            hyperparameters hold for all.
        buffer: a TorchRL replay buffer of transitions with a tensor storage, a ``batch_size``, and a ``RandomSampler``
            or ``SamplerWithoutReplacement``; a list of as many over the same data, with a random generator each, for a
            list of losses. Its content is taken when the step is built, transforms applied.

    Keyword Args:
        total_steps: length of the actor's cosine schedule; ``None`` keeps its learning rate constant.
        periodic: beyond ``total_steps`` the cosine goes on, up again, as PyTorch's ``CosineAnnealingLR``.
        actor_lr, value_lr, critic_lr: Adam learning rates.
        tau: Polyak coefficient of the target update, handed to TorchRL's ``SoftUpdate``.
        actor_tau: that of the policy's, where the loss has one.
        order: ``"sequential"`` is the paper's: V first, then actor and critics with the new V, then the targets.
            ``"joint"`` is TorchRL's: all losses at the old parameters.
        compile: ``True``, ``False``, or ``"auto"``: compile where a C++ compiler (CPU) or Triton (GPU) is found.
        updates_per_call: how many updates a call does, each on a batch of its own.
        cudagraphs: ``True``, ``False``, or ``"auto"``: on a GPU, launch all updates of a call as one CUDA graph.
        precision: ``"float32"``; ``"tf32"``, which lets products of the process use TensorFloat-32; or ``"bfloat16"``,
            which evaluates networks under autocast. Parameters and Adam stay as they are.
        products: float32 matrix products: ``"mkl"``, PyTorch's own; ``"onednn"``, on a CPU; ``"tensor_cores"``, on a
            GPU; or ``"auto"``, whichever a short measurement finds faster on this machine's CPU, and a GPU's tensor
            cores where the update is compiled. They differ in rounding.
        stacked: of a list of losses, ``True`` computes all runs in one kernel, which fills a GPU that one run does not,
            and saves a CPU the time between the kernels of small networks; ``False`` computes one run after another, on
            a CPU each with the bits that it has by itself; ``"auto"`` stacks on a GPU.
        random_states: of a list of losses on a CPU, not stacked, the states of torch's generator,
            ``torch.get_rng_state()``, from which each run draws dropout, subsets of critics and noise: with those that
            it would have by itself, it draws the same. ``None``, and stacked runs: all draw from the generator of the
            process.
        ranks: of :func:`iql_torchrl.training.data_parallel.join_ranks`: the processes among which each batch is
            divided, whose mean gradient all of them follow. Build the step in all of them from the same seeds.

    What Python decides in the networks or the loss (training mode, the value estimator's kind and discount) is decided
    at the first call; the loss's buffers, ``temperature`` and so on, may change at any time. Several processes draw
    dropout, and subsets of critics, each for its share of a batch.

    Raises:
        ValueError: a learning rate or tau out of range, an unknown order or precision, networks that share parameters
            or differ between runs, a buffer without ``batch_size``, with a batch larger than its content, or with
            another sampler, CUDA graphs asked for on another device, products that it does not have, random states
            that are not one a run.
    """

    def __init__(
        self,
        loss: IQLLoss | Sequence[IQLLoss],
        buffer: ReplayBuffer | Sequence[ReplayBuffer],
        *,
        total_steps: int | None = None,
        periodic: bool = False,
        actor_lr: float = 3e-4,
        value_lr: float = 3e-4,
        critic_lr: float = 3e-4,
        tau: float = 0.005,
        actor_tau: float = 0.001,
        order: str = "sequential",
        compile: bool | str = "auto",
        updates_per_call: int = 1,
        cudagraphs: bool | str = "auto",
        precision: str = "float32",
        products: str = "auto",
        stacked: bool | str = "auto",
        random_states: Sequence[Tensor] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        check_arguments(AlgorithmOptions, actor_lr=actor_lr, value_lr=value_lr, critic_lr=critic_lr)
        check_arguments(AlgorithmOptions, tau=tau, actor_tau=actor_tau)
        check_argument(AlgorithmOptions, "update_order", order, "order")
        check_argument(TrainOptions, "stacked_seeds", stacked, "stacked")
        check_arguments(
            TrainOptions,
            updates_per_call=updates_per_call,
            compile=compile,
            cudagraphs=cudagraphs,
            precision=precision,
            products=products,
        )
        if total_steps is not None:
            check_argument(TrainOptions, "steps", total_steps, "total_steps")
        self._several = isinstance(loss, Sequence)
        self.losses = list(loss) if isinstance(loss, Sequence) else [loss]
        self.buffers = list(buffer) if isinstance(buffer, Sequence) else [buffer]
        if not self.losses or len({id(one) for one in self.losses}) < len(self.losses):
            raise ValueError("loss must be one IQLLoss, or a list of at least one with no loss in it twice.")
        check_buffers(self.buffers, len(self.losses))
        self.ranks = ranks or Ranks()
        self._share = self.ranks.share_of(self.buffers[0].batch_size or 1)
        if self.ranks.count > 1:
            refuse_undivided(self.losses[0], self.buffers)
        self.loss, self.buffer = self.losses[0], self.buffers[0]
        self.order = order
        self.taus = {"value": tau, "actor": actor_tau, "qvalue": tau}
        self.total_steps = total_steps
        self.periodic = periodic
        self.updates_per_call = updates_per_call
        self.precision = precision
        # Registers itself with the loss and makes the targets equal to their sources; its update is done on the flat
        # tensors below, in one operation instead of one a layer.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found an eps value < 0.5")
            for one in self.losses:
                SoftUpdate(one, tau=tau)

        device = next(self.loss.parameters()).device
        self.stacked = self._several and resolve_stacked(stacked, device)
        self.random_states = self._own_random_states(random_states)
        # Those that are still computed, where they are not stacked; of the others the losses are NaN.
        self.going_on: Sequence[int] = range(len(self.losses))
        if device.type == "cpu":
            keep_freed_memory()
        self.compiled, self.compile_note = resolve_compile(compile, device)
        self._base_lr = {"value": value_lr, "actor": actor_lr, "qvalue": critic_lr}
        self.products, self.products_note = self._resolve_products(products)
        layouts = self._flatten()
        self._layouts = layouts[0]
        # Every tensor that an update changes: of all runs in one, or of each.
        self._states = [self._new_state(one) for one in layouts]
        self._state = self._states[0]  # of the update under way
        # Built by its first use and brought to the device by it, neither of which a recorded or compiled update may do.
        for one in self.losses:
            one.value_estimator.to(device)

        data = self.buffer[:]
        # Batches of data that lie elsewhere are copied to the device, where the update finds them.
        self._staging = Staging.where_needed(data, device)
        self._data = data
        self._index: Tensor | None = None
        if precision == "tf32":
            torch.set_float32_matmul_precision("high")
        self.captured = resolve_cudagraphs(cudagraphs, device)
        self._adam = adam_in_graph if self.compiled else fused_adam
        self._update_at: list[Callable[[Tensor], dict[str, Tensor]]] = []
        self._update_draws = True
        self._call_at: list[Callable[[Tensor], dict[str, Tensor]]] = []
        for place in range(len(self._states)):
            call = partial(self._updates, place)
            self._call_at.append(CapturedFunction(call, lambda: self.compiled) if self.captured else call)

    def __call__(self) -> dict[str, Tensor]:
        """Do ``updates_per_call`` updates.

        Returns:
            ``loss_actor``, ``loss_qvalue``, ``loss_value`` and ``entropy`` of the last update, detached, on the
            training device (reading one as a float synchronises with the device): scalars, or ``[runs]``.
        """
        index = self._draw()
        if self._staging is not None:
            self._data, index = self._staging(index)
        self._index = index[-1]
        rows = self.ranks.share(index)
        if self.stacked or not self._several:
            return self._call_at[0](rows)
        losses = {}
        for run in self.going_on:
            with self.random_state(run) if self._update_draws else nullcontext():
                losses[run] = self._call_at[run](rows[:, run])
        one = losses[self.going_on[0]]
        for run in set(range(len(self.losses))) - losses.keys():
            losses[run] = {name: torch.full_like(loss, math.nan) for name, loss in one.items()}
        return {name: torch.stack([losses[run][name] for run in range(len(self.losses))]) for name in one}

    @contextmanager
    def random_state(self, run: int = 0) -> Iterator[None]:
        """Within, torch's generator of the CPU is where the run's draws have come to, besides those of its batches.

        Where runs have no states of their own (``random_states``), it is the process's as it stands. What a checkpoint
        remembers of the generator, and puts back, is remembered and put back within. One thread at a time is there.
        """
        if self.random_states is None:
            yield
            return
        generator = torch.default_generator
        with ONE_THREAD:
            outside = generator.get_state()
            generator.set_state(self.random_states[run])
            try:
                yield
            finally:
                self.random_states[run] = generator.get_state()
                generator.set_state(outside)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self._states[0]["count"].device

    @property
    def count(self) -> int:
        """Updates done so far."""
        return int(self._furthest["count"].item())

    @property
    def learning_rates(self) -> dict[str, float]:
        """The learning rates of the latest update, by network."""
        state = self._furthest
        return {name: float(state[f"{name}.lr"]) for name in _GROUPS}

    def not_finite(self, run: int = 0) -> list[str]:
        """The networks and targets of a run that hold NaN or infinity. Synchronises with the device."""
        return [name for name in self._layouts if not bool(torch.isfinite(self._of_run(name, run)).all())]

    def batch(self, run: int = 0) -> TensorDictBase:
        """The whole batch of a run's latest update: for diagnostics, without touching the sampler."""
        if self._index is None:
            raise RuntimeError("no update has been done yet; call the step first.")
        return self._data[self._index[run] if self._several else self._index]

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        """Everything that a run's next update depends on, besides the data and torch's :meth:`random_state`.

        The same whether the run is trained by itself or beside others.
        """
        generator = self.buffers[run].storage._rng
        tensors = self.losses[run].state_dict().items()
        return {
            "loss": {name: value.clone() for name, value in tensors if torch.is_tensor(value)},
            "optimizers": {
                name: {key: self._of_run(f"{name}.{key}", run).clone() for key in ADAM_STATE} for name in _GROUPS
            },
            "count": self._of_run("count", run).clone(),
            "sampler": self.buffers[run].sampler.state_dict(),
            "generator": None if generator is None else generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any], run: int = 0) -> None:
        """Restore :meth:`state_dict` of a run, in place: a compiled or captured step stays valid.

        The count of updates is common to all runs; restore states of one count.
        """
        generator = self.buffers[run].storage._rng
        saved = state["generator"]
        if saved is not None and generator is not None and saved.shape != generator.get_state().shape:
            raise ValueError(
                "its batches were drawn on another device: resume with the same dataset.storage and device"
            )
        self.losses[run].load_state_dict(state["loss"])
        self._set_count(int(state["count"]))
        for name in _GROUPS:
            for key in ADAM_STATE:
                self._of_run(f"{name}.{key}", run).copy_(state["optimizers"][name][key])
        self.buffers[run].sampler.load_state_dict(state["sampler"])
        if saved is not None and generator is not None:
            generator.set_state(saved.cpu())

    def start_from(self, state: Mapping[str, Any], run: int = 0, count: int | None = None) -> None:
        """Take networks and Adam's moments from :meth:`state_dict` of another run.

        Learning rates and the draws of batches stay this step's own.

        Args:
            state: of which ``optimizers`` may be missing: the moments are then as they were.
            run: which of the step's runs goes on from it.
            count: updates that are behind; ``None``: as many as there.
        """
        self.losses[run].load_state_dict(state["loss"])
        self._set_count(int(state["count"]) if count is None else count)
        for name, moments in state.get("optimizers", {}).items():
            for key in (key for key in ADAM_STATE if key != "lr"):
                self._of_run(f"{name}.{key}", run).copy_(moments[key])

    # ------------------------------------------------------------------ how an update is run

    def _draw(self) -> Tensor:
        """The rows of the next batches, ``[updates, B]``, or ``[updates, runs, B]`` of several."""

        def rows(buffer: ReplayBuffer, batches: int = 1) -> Tensor:
            size = buffer.batch_size or 1
            index, _ = buffer.sampler.sample(buffer.storage, size * batches)
            return torch.as_tensor(index, device=self.device if self._staging is None else None).reshape(batches, size)

        def of_updates(buffer: ReplayBuffer) -> Tensor:
            if type(buffer.sampler) is RandomSampler:  # whose draws are independent: all at once are as one by one
                return rows(buffer, self.updates_per_call)
            return torch.cat([rows(buffer) for _ in range(self.updates_per_call)])

        if not self._several:
            return of_updates(self.buffer)
        drawn = []
        for run, buffer in enumerate(self.buffers):
            with self.random_state(run) if buffer.storage._rng is None else nullcontext():
                drawn.append(of_updates(buffer))
        return torch.stack(drawn, 1)

    def _updates(self, place: int, index: Tensor) -> dict[str, Tensor]:
        """An update for each row of ``index``, of the runs whose state is at ``place``."""
        losses: dict[str, Tensor] = {}
        self._state = self._states[place]
        for rows in index:
            if not self._update_at:
                self._update_at = self._record(rows)
            losses = self._update_at[place](rows)
        return losses

    def _record(self, rows: Tensor) -> list[Callable[[Tensor], dict[str, Tensor]]]:
        """The update at each state, compiled or recorded at one; as it stands where a tensor's content decides."""
        common: list[Slot] = []
        for module in (self.loss, self.loss.value_estimator):
            common += [(module._buffers, name) for name, buffer in module._buffers.items() if buffer is not None]
        slots = [*((self._state, name) for name in self._state), *common]
        tensors = [[*state.values(), *(mapping[key] for mapping, key in common)] for state in self._states]
        if self.compiled:
            compiled, reason = None, "in another process"
            try:
                compiled = compile_update(self._update, rows, slots, self.products)
            except Exception as error:
                reason = first_line(error, LONGEST_REASON)
            failures = self.ranks.largest(compiled is None)  # all of them compile, or none
            if compiled is not None and not failures:
                self._update_draws = compiled.draws
                return [compiled.at(one) for one in tensors]
            self.compiled, self._adam = False, fused_adam
            self.compile_note = f"the update does not compile; running eagerly: {reason}"
        try:
            recording = record(self._update, rows, slots, self.products)
        except Exception as error:
            self.compile_note = f"the update cannot be recorded and runs as it is, slower: {str(error).splitlines()[0]}"
            return [self._update] * len(self._states)
        self._update_draws = recording.draws
        return [recording.at(one) for one in tensors]

    # ------------------------------------------------------------------ one update, as the compiler sees it

    def _update(self, rows: Tensor) -> dict[str, Tensor]:
        batch = self._data[rows]
        self._set_actor_learning_rate()
        losses = self._sequential_update(batch) if self.order == "sequential" else self._joint_update(batch)
        with torch.no_grad():
            for name in _GROUPS:
                target = self._state.get(f"target_{name}")
                if target is not None:
                    target.lerp_(self._state[name].detach(), self.taus[name])
            self._state["count"].add_(1)
        return {name: loss.detach() for name, loss in losses.items()}

    def _sequential_update(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """The paper's order: V, then the policy and Q with the new V."""
        loss_value, target_qvalue = self._over_runs(self._value_objective, batch)
        self._descend(loss_value, "value")
        loss_actor, loss_qvalue, entropy = self._over_runs(self._policy_and_qvalue_objective, batch, target_qvalue)
        losses = {"loss_actor": loss_actor, "loss_qvalue": loss_qvalue, "loss_value": loss_value, "entropy": entropy}
        return self._descend(loss_actor + loss_qvalue, "actor", "qvalue", losses=losses)

    def _joint_update(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """TorchRL's order: every loss at the old parameters, one backward."""
        loss_actor, loss_qvalue, loss_value, entropy = self._over_runs(self._joint_objective, batch)
        losses = {"loss_actor": loss_actor, "loss_qvalue": loss_qvalue, "loss_value": loss_value, "entropy": entropy}
        return self._descend(loss_actor + loss_qvalue + loss_value, *_GROUPS, losses=losses)

    def _value_objective(self, flats: Flats, batch: TensorDictBase) -> tuple[Tensor, Tensor]:
        parameters = self._parameters(flats)
        target_qvalue = self.loss.target_qvalue(batch, parameters=parameters)
        loss_value, _ = self.loss.value_loss(batch, target_qvalue=target_qvalue, parameters=parameters)
        return loss_value, target_qvalue

    def _policy_and_qvalue_objective(
        self, flats: Flats, batch: TensorDictBase, target_qvalue: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        parameters = self._parameters(flats)
        loss_actor, _ = self.loss.actor_loss(batch, target_qvalue=target_qvalue, parameters=parameters)
        loss_qvalue, _ = self.loss.qvalue_loss(batch, parameters=parameters)
        return loss_actor, loss_qvalue, self.loss.entropy(batch)

    def _joint_objective(self, flats: Flats, batch: TensorDictBase) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        losses = self.loss(batch, parameters=self._parameters(flats))
        return losses["loss_actor"], losses["loss_qvalue"], losses["loss_value"], losses["entropy"]

    def _over_runs(self, objective: Callable[..., Any], *arguments: Any) -> Any:
        """An objective of one run at its flat parameters, or of stacked ones at once."""
        flats = {name: self._state[name] for name in self._layouts}
        with self._autocast():
            if self.stacked:
                return torch.vmap(objective, randomness="different")(flats, *arguments)
            return objective(flats, *arguments)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def _parameters(self, flats: Flats) -> dict[str, TensorDictBase]:
        return {f"{name}_network_params": self._layouts[name].unpack(flat) for name, flat in flats.items()}

    def _descend(self, loss: Tensor, *names: str, losses: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """One Adam update of the named networks, by the mean gradient of all ranks. Returns the mean of ``losses``."""
        flats = [self._state[name] for name in names]
        losses = losses or {}
        means = self.ranks.average([*torch.autograd.grad(loss.sum(), flats), *losses.values()])
        for name, gradient in zip(names, means, strict=False):
            state = {key: self._state[f"{name}.{key}"] for key in ADAM_STATE}
            self._adam(self._state[name], gradient, state)
        return dict(zip(losses, means[len(names) :], strict=True))

    def _set_actor_learning_rate(self) -> None:
        """Cosine to 0 over ``total_steps``, in closed form: stepping a factor on a float32 tensor drifts."""
        if self.total_steps is None:
            return
        progress = self._state["count"].double() / self.total_steps
        if not self.periodic:
            progress = progress.clamp(max=1.0)
        rate = self._base_lr["actor"] * 0.5 * (1 + torch.cos(math.pi * progress))
        self._state["actor.lr"].copy_(rate)

    # ------------------------------------------------------------------ how it is built

    def _own_random_states(self, random_states: Sequence[Tensor] | None) -> list[Tensor] | None:
        if random_states is None:
            return None
        if len(random_states) != len(self.losses):
            raise ValueError(f"{len(self.losses)} losses need as many random states; got {len(random_states)}.")
        return None if self.stacked or not self._several else list(random_states)

    def _flatten(self) -> list[dict[str, FlatParameters]]:
        """The networks' parameters and their targets' as flat tensors, by name: of all runs, or of each."""
        children: list[dict[str, Any]] = [dict(loss.named_children()) for loss in self.losses]
        refuse_different_architectures(children)
        refuse_shared_parameters(self.loss, [children[0][f"{name}_network_params"] for name in _GROUPS])
        names = [f"{prefix}{name}" for prefix in ("", "target_") for name in _GROUPS]
        return [
            {
                name: FlatParameters(
                    [child[f"{name}_network_params"] for child in together],
                    stacked=self.stacked,
                    transposed=self.products == "onednn",
                )
                for name in names
                if f"{name}_network_params" in children[0]
            }
            for together in ([children] if self.stacked else [[child] for child in children])
        ]

    def _new_state(self, layouts: Mapping[str, FlatParameters]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {name: layout.flat for name, layout in layouts.items()}
        for name in _GROUPS:
            adam = new_adam_state(state[name], self._base_lr[name])
            state |= {f"{name}.{key}": value for key, value in adam.items()}
        # An integer: a compiled graph loses in-place changes of a float64 scalar on the CPU, and float32 ends at 2^24.
        state["count"] = torch.zeros((), dtype=torch.int64, device=state["value"].device)
        return state

    def _resolve_products(self, choice: str) -> tuple[str, str]:
        if self.precision != "float32":
            if choice not in ("auto", "mkl"):
                raise ValueError(f"products must be auto or mkl with precision={self.precision}, got {choice!r}.")
            return "mkl", ""
        children: dict[str, Any] = dict(self.loss.named_children())
        groups = [children[f"{name}_network_params"] for name in _GROUPS]
        together = len(self.losses) if self.stacked else 1
        layers = {
            (self._share, together * math.prod(leaf.shape[:-2]), leaf.shape[-1], leaf.shape[-2])
            for group in groups
            for leaf in group.values(True, True)
            if leaf.ndim == len(group.batch_size) + 2  # a weight, and not the biases of several critics
        }
        first = next(iter(groups[0].values(True, True)))
        return resolve_products(choice, first.device, first.dtype, sorted(layers), fused=self.compiled)

    def _of_run(self, name: str, run: int) -> Tensor:
        """The part of a state tensor that is a run's; stacked ones have counts and learning rates in common."""
        if not self.stacked:
            return self._states[run][name]
        tensor = self._state[name]
        return tensor[run] if name in self._layouts or name.endswith(("exp_avg", "exp_avg_sq")) else tensor

    @property
    def _furthest(self) -> dict[str, Tensor]:
        """The state of a run that goes on, or has to the last."""
        return max(self._states, key=lambda state: int(state["count"]))

    def _set_count(self, count: int) -> None:
        for state in self._states:
            state["count"].fill_(count)
