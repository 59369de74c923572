"""Networks that other code bases have trained: CORL's, the original JAX code's and TorchRL's.

Only tensors and plain values are read (``torch.load(weights_only=True)``, msgpack), so that no file executes code.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iql_torchrl.atomic import NotAFile, regular_file
from iql_torchrl.errors import CheckpointError, ConfigurationError, first_line
from iql_torchrl.networks import build_actor, build_qvalues, build_value
from iql_torchrl.objectives import IQLLoss
from iql_torchrl.training.checkpoints import FORMAT, read_saved

_JAX_FILES = ("actor", "critic", "value", "target_critic")
_EXPECTED = (
    "CORL's checkpoint_*.pt, the state_dict of TorchRL's IQLLoss in a file of torch.save, or a folder of what the JAX "
    "code's Model.save wrote: actor, critic, value, and target_critic where it is there"
)
# Of what the files do not say.
_POLICIES: dict[str, dict[str, Any]] = {
    "CORL": {"policy": "tanh_mean_normal", "standard_deviation": "state_independent", "log_std_bounds": [-20.0, 2.0]},
    "JAX": {"policy": "tanh_mean_normal", "standard_deviation": "state_independent", "log_std_bounds": [-5.0, 2.0]},
    "TorchRL": {"policy": "tanh_normal", "standard_deviation": "biased_softplus", "log_std_bounds": [-5.0, 2.0]},
}


class Layer(NamedTuple):
    """A linear layer: weight ``[out, in]``, bias ``[out]``."""

    weight: Tensor
    bias: Tensor


Network = Sequence[Layer]


@dataclass(frozen=True)
class ForeignNetworks:
    """Networks of another code base, as they are there.

    >>> foreign = load_foreign("corl/checkpoint_999999.pt")
    >>> loss = foreign.build_loss(temperature=3.0)
    >>> policy = Policy.from_loss(loss, action_low, action_high, normaliser)

    Args:
        path: of the file or folder.
        origin: ``"CORL"``, ``"JAX"`` or ``"TorchRL"``.
        actor: its linear layers.
        log_std: learnt log standard deviation ``[A]``, unclipped; ``None`` where the policy has none of the kind.
        qvalues, targets: the critics and their targets; CORL's file has no targets, and CORL goes on with copies.
        value: V.
        step: updates done, 0 where the file does not tell.
    """

    path: Path
    origin: str
    actor: Network
    log_std: Tensor | None
    qvalues: Sequence[Network]
    targets: Sequence[Network]
    value: Network
    step: int

    @property
    def architecture(self) -> dict[str, Any]:
        """What the files say of the networks, and what their code says of the policy, by the names of our builders."""
        observation_dim = self.actor[0].weight.shape[1]
        found = {
            "observation_dim": observation_dim,
            "action_dim": self.qvalues[0][0].weight.shape[1] - observation_dim,
            "hidden_dims": [len(layer.bias) for layer in self.actor[:-1]],
            "num_qvalue_nets": len(self.qvalues),
            "layer_norm": False,
            "extra_layer": False,
            **_POLICIES[self.origin],
        }
        if self.origin != "TorchRL":  # whose file is of any
            found["activation"] = "relu"
        if self.origin == "CORL" and self.log_std is None:
            found["policy"] = "deterministic"
        return found

    def build_loss(
        self,
        action_low: Tensor | None = None,
        action_high: Tensor | None = None,
        *,
        dropout: float | None = None,
        activation: str = "relu",
        **loss: Any,
    ) -> IQLLoss:
        """An :class:`~iql_torchrl.IQLLoss` of these networks.

        Args:
            action_low, action_high: as for :meth:`state_for`.
            dropout, activation: which the files do not tell.
            **loss: its other arguments, such as ``temperature``.
        """
        sizes: dict[str, Any] = {key: self.architecture[key] for key in ("observation_dim", "hidden_dims")}
        sizes["activation"] = activation
        action_dim, critics = self.architecture["action_dim"], self.architecture["num_qvalue_nets"]
        policy = {key: self.architecture[key] for key in ("policy", "standard_deviation", "log_std_bounds")}
        made = IQLLoss(
            build_actor(action_dim=action_dim, dropout=dropout, **sizes, **policy),
            build_qvalues(action_dim=action_dim, num_qvalue_nets=critics, **sizes),
            build_value(**sizes),
            num_qvalue_nets=critics,
            **loss,
        )
        made.load_state_dict(self.state_for(made, action_low, action_high))
        return made

    def state_for(
        self, loss: IQLLoss, action_low: Tensor | None = None, action_high: Tensor | None = None
    ) -> dict[str, Any]:
        """The ``state_dict`` of a loss with these parameters.

        Args:
            loss: of this :attr:`architecture`, by this package's builders; it stays as it is.
            action_low, action_high: bounds of the data's actions ``[A]``, where these are not [-1, 1]. The critics of
                CORL and TorchRL take actions as they are, ours in [-1, 1]: the first layer is changed by as much.

        Raises:
            CheckpointError: networks of other shapes.
        """
        state = dict(loss.state_dict())
        low, high = (None, None) if self.origin == "JAX" else (action_low, action_high)
        networks = {
            "actor_network_params.": [self.actor],
            "value_network_params.": [self.value],
            "target_value_network_params.": [self.value],
            "qvalue_network_params.": [_of_scaled_actions(one, low, high) for one in self.qvalues],
            "target_qvalue_network_params.": [_of_scaled_actions(one, low, high) for one in self.targets],
        }
        for prefix, several in networks.items():
            names = _layer_names([name for name in state if name.startswith(prefix)])
            if not names:  # a V without targets
                continue
            if len(names) != len(several[0]):
                raise CheckpointError(f"{self.path} has {len(several[0])} layers where {prefix[:-1]} has {len(names)}.")
            for name, layers in zip(names, zip(*several, strict=True), strict=True):
                for kind in Layer._fields:
                    values = [getattr(layer, kind) for layer in layers]
                    stacked = torch.stack(values) if "qvalue" in prefix and len(values) > 1 else values[0]
                    _replace(state, f"{name}.{kind}", stacked, self.path)
        if self.log_std is not None:
            _replace(state, "actor_network_params.module.0.module.log_std", self.log_std, self.path)
        return state


def load_foreign(path: str | Path) -> ForeignNetworks:
    """The networks in a file or folder of CORL, the original JAX code, or TorchRL; it tells by itself which it is.

    Args:
        path: a checkpoint of CORL (``checkpoint_*.pt``); the ``state_dict`` of TorchRL's ``IQLLoss`` in a file of
            ``torch.save``, of networks as in TorchRL's recipe; or a folder with the files of the JAX code's
            ``Model.save``, named ``actor``, ``critic``, ``value`` and, where it is there, ``target_critic``, with any
            suffix.

    Raises:
        CheckpointError: another file, entries that are missing, or networks of other shapes.
        ConfigurationError: msgpack, which JAX's files need, is not installed.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _of_jax(place)
    try:
        regular_file(place)
    except NotAFile as error:
        raise CheckpointError(f"{place} {error}; expected {_EXPECTED}.") from None
    if not zipfile.is_zipfile(place):
        raise CheckpointError(f"{place} is no file of torch.save; expected {_EXPECTED}.")
    content = read_saved(place)
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        raise CheckpointError(f"{place} is a checkpoint of this package; load it with load_policy, or resume=FILE.")
    if isinstance(content, Mapping) and {"actor", "qf", "vf"} <= set(content):
        return _of_corl(place, content)
    if isinstance(content, Mapping) and any(str(name).startswith("actor_network_params.") for name in content):
        return _of_torchrl(place, content)
    keys = ", ".join(map(str, content))[:200] if isinstance(content, Mapping) else type(content).__name__
    raise CheckpointError(f"{place} holds none of the networks that are known ({keys}); expected {_EXPECTED}.")


def _of_corl(path: Path, content: Mapping[str, Any]) -> ForeignNetworks:
    for key in ("actor", "qf", "vf"):
        if not isinstance(content[key], Mapping):
            raise CheckpointError(f"{path}: {key} is {type(content[key]).__name__}, not a state_dict.")
    step = content.get("total_it", 0)
    actor = content["actor"]
    qvalues = [_network(path, content["qf"], f"{name}.net.") for name in ("q1", "q2")]
    return _checked(
        path,
        "CORL",
        _network(path, actor, "net.net."),
        actor.get("log_std"),
        qvalues,
        qvalues,
        _network(path, content["vf"], "v.net."),
        step if isinstance(step, int) else 0,
    )


def _of_torchrl(path: Path, content: Mapping[str, Any]) -> ForeignNetworks:
    def critics(prefix: str) -> list[Network]:
        stacked = _network(path, content, prefix, (2, 3))
        if {layer.weight.dim() for layer in stacked} == {2}:
            return [stacked]
        count = min(len(layer.weight) for layer in stacked)
        return [[Layer(layer.weight[index], layer.bias[index]) for layer in stacked] for index in range(count)]

    return _checked(
        path,
        "TorchRL",
        _network(path, content, "actor_network_params."),
        None,
        critics("qvalue_network_params."),
        critics("target_qvalue_network_params."),
        _network(path, content, "value_network_params."),
        0,
    )


def _of_jax(folder: Path) -> ForeignNetworks:
    found: dict[str, Any] = {}
    for name in _JAX_FILES:
        files = [one for one in sorted(folder.iterdir()) if one.stem == name and one.is_file()]
        if len(files) > 1:
            raise CheckpointError(f"{folder} has {', '.join(one.name for one in files)}: leave one of them there.")
        if files:
            found[name] = _read_msgpack(files[0])
        elif name != "target_critic":
            there = ", ".join(sorted(one.name for one in folder.iterdir())[:5]) or "nothing"
            raise CheckpointError(f"{folder} has no file {name} ({there} is there); expected {_EXPECTED}.")
    actor, critic = found["actor"], found["critic"]
    if not isinstance(actor, Mapping) or "log_stds" not in actor:
        raise CheckpointError(
            f"{folder}: actor has no log_stds; expected the policy of the code's own learner, whose standard deviation "
            "does not depend on the state."
        )

    def critics(tree: Any) -> list[Network]:
        return [_dense(folder, tree, (name, "MLP_0")) for name in ("Critic_0", "Critic_1")]

    return _checked(
        folder,
        "JAX",
        [*_dense(folder, actor, ("MLP_0",)), *_dense(folder, actor, ())],
        _tensor(folder, "log_stds", actor["log_stds"]),
        critics(critic),
        critics(found.get("target_critic", critic)),
        _dense(folder, found["value"], ("MLP_0",)),
        0,
    )


def _read_msgpack(path: Path) -> Any:
    """A tree of arrays as flax.serialization writes it."""
    if importlib.util.find_spec("msgpack") is None:
        raise ConfigurationError(f"{path} needs msgpack: pip install 'iql_torchrl[msgpack]'.")
    msgpack: Any = importlib.import_module("msgpack")

    def array(code: int, data: bytes) -> Any:
        if code != 1:  # complex numbers and scalars have others
            raise ValueError(f"an entry of kind {code} is no array")
        shape, dtype, content = msgpack.unpackb(data)
        if dtype not in ("float16", "float32", "float64"):
            raise ValueError(f"an array of {dtype} holds no parameters")
        return np.frombuffer(content, dtype).reshape(shape)

    try:
        return msgpack.unpackb(path.read_bytes(), ext_hook=array)
    except Exception as error:  # msgpack's own, and of what is in it
        raise CheckpointError(
            f"{path} is no file of the JAX code's Model.save, or damaged: {first_line(error)}"
        ) from error


def _dense(path: Path, tree: Any, place: Sequence[str]) -> Network:
    for name in place:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    names = [name for name in (tree if isinstance(tree, Mapping) else ()) if re.fullmatch(r"Dense_\d+", str(name))]
    where = "/".join(place) or "actor"
    if not names:
        raise CheckpointError(f"{path} lacks {where}/Dense_0; expected {_EXPECTED}.")
    layers = []
    for name in sorted(names, key=_natural):
        dense = tree[name] if isinstance(tree[name], Mapping) else {}
        if not {"kernel", "bias"} <= set(dense):
            raise CheckpointError(f"{path} lacks {where}/{name}/kernel or bias.")
        kernel, bias = (_tensor(path, f"{where}/{name}/{kind}", dense[kind]) for kind in ("kernel", "bias"))
        layers.append(Layer(kernel.T, bias))
    return layers


def _tensor(path: Path, name: str, found: Any) -> Tensor:
    if not isinstance(found, np.ndarray):
        raise CheckpointError(f"{path}: {name} is {type(found).__name__}, not an array.")
    return torch.from_numpy(found.copy())


def _network(path: Path, state: Mapping[str, Any], prefix: str, dimensions: Sequence[int] = (2,)) -> Network:
    """The linear layers below a prefix, in their order."""
    stems = _layer_names([str(name) for name in state if str(name).startswith(prefix)])
    if not stems:
        raise CheckpointError(f"{path} lacks {prefix}*.weight; expected {_EXPECTED}.")
    layers = []
    for stem in stems:
        layer = Layer(state[f"{stem}.weight"], state.get(f"{stem}.bias"))  # pyright: ignore[reportArgumentType]
        if not all(isinstance(one, Tensor) and one.is_floating_point() for one in layer):
            raise CheckpointError(f"{path}: {stem} has no weight and bias of floating-point numbers.")
        if layer.weight.dim() not in dimensions or layer.bias.shape != layer.weight.shape[:-1]:
            raise CheckpointError(
                f"{path}: {stem} is no linear layer: weight {list(layer.weight.shape)}, bias {list(layer.bias.shape)}."
            )
        layers.append(layer)
    return layers


def _layer_names(names: Sequence[str]) -> list[str]:
    return sorted((name.removesuffix(".weight") for name in names if name.endswith(".weight")), key=_natural)


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _checked(
    path: Path,
    origin: str,
    actor: Network,
    log_std: Tensor | None,
    qvalues: Sequence[Network],
    targets: Sequence[Network],
    value: Network,
    step: int,
) -> ForeignNetworks:
    """Networks that fit together.

    Raises:
        CheckpointError: they do not.
    """
    observation_dim = actor[0].weight.shape[1]
    action_dim = len(actor[-1].bias) // (2 if origin == "TorchRL" else 1)
    widths = [len(layer.bias) for layer in actor[:-1]]
    expected = {"actor": (actor, observation_dim, len(actor[-1].bias)), "value": (value, observation_dim, 1)}
    expected |= {f"critic {index}": (one, observation_dim + action_dim, 1) for index, one in enumerate(qvalues)}
    expected |= {f"target critic {index}": (one, observation_dim + action_dim, 1) for index, one in enumerate(targets)}
    for name, (layers, first, last) in expected.items():
        sizes = [first, *widths, last]
        found = [list(layer.weight.shape) for layer in layers]
        if found != [[out, into] for into, out in itertools.pairwise(sizes)]:
            raise CheckpointError(
                f"{path}: {name} has layers of shapes {found}; expected, as of the actor, {sizes} one after the other: "
                "all networks must have the same hidden layers."
            )
        if not all(bool(torch.isfinite(one).all()) for layer in layers for one in layer):
            raise CheckpointError(f"{path}: {name} holds NaN or infinity: that run had diverged.")
    if log_std is not None and (not isinstance(log_std, Tensor) or log_std.shape != (action_dim,)):
        raise CheckpointError(f"{path}: the log standard deviation has not shape [{action_dim}].")
    return ForeignNetworks(path, origin, actor, log_std, qvalues, targets, value, step)


def _of_scaled_actions(critic: Network, low: Tensor | None, high: Tensor | None) -> Network:
    """A critic of raw actions as one of actions in [-1, 1]: raw = middle + half * scaled, in its first layer."""
    if low is None or high is None:
        return critic
    first, *others = critic
    middle, half = (high + low) / 2, (high - low) / 2
    observation_dim = first.weight.shape[1] - len(low)
    of_observations, of_actions = first.weight.split([observation_dim, len(low)], 1)
    weight = torch.cat([of_observations, of_actions * half], 1)
    return [Layer(weight, first.bias + of_actions @ middle.to(of_actions)), *others]


def _replace(state: dict[str, Any], name: str, value: Tensor, path: Path) -> None:
    there = state.get(name)
    if there is None or there.shape != value.shape:
        shape = None if there is None else list(there.shape)
        raise CheckpointError(f"{path}: {name} has shape {list(value.shape)} there and {shape} here.")
    state[name] = value.to(there)
