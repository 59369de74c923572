"""Finding the checkpoints to be judged, and the data to judge them by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from iql_torchrl.configuration.options import AlgorithmOptions, EnvironmentOptions
from iql_torchrl.data.normalisation import ObservationNormaliser
from iql_torchrl.data.preparation import PreparedData, prepare_data
from iql_torchrl.data.sources.source import Source
from iql_torchrl.environments.simulators import Spaces
from iql_torchrl.errors import CheckpointError, ConfigurationError, first_line
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.objectives import IQLLoss
from iql_torchrl.reporting.report.gathering import Listed, named_paths
from iql_torchrl.running.options import InspectOptions
from iql_torchrl.training.checkpoints import BEST, load_checkpoint, newest_checkpoint
from iql_torchrl.training.construction import architecture_of, build_loss


@dataclass(frozen=True)
class JudgedPolicy:
    """A checkpoint that can be judged: what it is called, and its content with the algorithm of its run."""

    name: str
    path: Path
    run: Path
    content: Mapping[str, Any]
    algorithm: AlgorithmOptions

    @property
    def policy(self) -> Policy:
        """From raw observations to actions in the environment's bounds."""
        return Policy.from_state_dict(self.content["policy"])

    @property
    def choice(self) -> dict[str, Any]:
        """``num_samples`` and ``selection`` of its decisions, where its run had them."""
        of_run = self.content["config"].get("eval", {})
        return {name: of_run[name] for name in ("num_samples", "selection") if name in of_run}

    def normaliser(self, device: torch.device) -> ObservationNormaliser | None:
        """Of its observations."""
        state = self.content["policy"]["normaliser"]
        return None if state is None else ObservationNormaliser(state["mean"].to(device), state["std"].to(device))

    def loss(self, spaces: Spaces, device: torch.device) -> IQLLoss:
        """With its networks.

        Raises:
            CheckpointError: networks of another architecture than its configuration says.
        """
        loss = build_loss(self.algorithm, spaces, device)
        try:
            loss.load_state_dict(self.content["training"]["loss"])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{self.path} does not fit its configuration: {first_line(error)}") from error
        return loss.requires_grad_(False)


def find_policies(entries: Sequence[str], *, best: bool) -> tuple[list[JudgedPolicy], list[Listed]]:
    """The checkpoints that files, run folders and patterns name, each once, those of one architecture.

    Args:
        entries: checkpoint files; run folders, for the newest checkpoint of each of their seeds; folders of run
            folders; and patterns of all of them.
        best: of run folders, the checkpoint of the best evaluation in place of the newest.

    Returns:
        those that can be judged together, and a line on each other one.
    """
    found: list[JudgedPolicy] = []
    listed: list[Listed] = []
    seen: set[Path] = set()
    for path, problem in _files(entries, best):
        if problem is not None:
            listed.append(problem)
        elif path.resolve() not in seen:
            seen.add(path.resolve())
            try:
                found.append(_read(path))
            except CheckpointError as error:
                listed.append(Listed(str(path), "damaged or foreign", str(error)))
            except ValidationError as error:
                first = error.errors()[0]
                what = f"algorithm.{'.'.join(map(str, first['loc']))}: {first['msg']}"
                listed.append(Listed(str(path), "another version", f"its configuration is of another release ({what})"))
    together, first = [], found[0] if found else None
    for one in found:
        difference = "" if first is None else _difference(first, one)
        if difference:
            listed.append(Listed(str(one.path), "another task", difference))
        else:
            together.append(one)
    return together, listed


def source_of(policy: JudgedPolicy) -> Source:
    """The data of a policy's run.

    Raises:
        ConfigurationError: data that a program held.
    """
    config = policy.content["config"]
    try:
        return InspectOptions.model_validate(
            {"dataset": config["dataset"], "env": config["env"], "output": "."}
        ).dataset
    except ValidationError as error:
        raise ConfigurationError(
            f"{policy.path} was trained on data that this program cannot find again ({first_line(error)}); give them "
            "with dataset=..."
        ) from error


def env_of(policy: JudgedPolicy, chosen: EnvironmentOptions) -> EnvironmentOptions:
    """The environment of a policy's run, where ``chosen`` names no other."""
    if chosen.name != "auto":
        return chosen
    found = EnvironmentOptions.model_validate(policy.content["config"]["env"])
    return found.model_copy(update={"kwargs": chosen.kwargs}) if chosen.kwargs else found


def data_of(first: JudgedPolicy, dataset: Source, env: EnvironmentOptions) -> PreparedData:
    """The data that judge, with rewards and observations as they were recorded.

    Args:
        first: one of the policies.
        dataset, env: the data, and the environment.

    Raises:
        ConfigurationError: data that do not fit the policies.
        DatasetError, SimulatorError: as of :func:`iql_torchrl.data.preparation.prepare_data`.
    """
    changes: dict[str, Any] = {"validation_fraction": 0.0}
    if env.name is None and "num_actions" not in first.content["architecture"]:
        # Without a simulator, the bounds are those that the policy has learnt.
        bounds = {f"action_{end}": first.content["policy"][f"action_{end}"].tolist() for end in ("low", "high")}
        changes |= {} if dataset.normalised_actions else bounds
    neutral = {"reward_transform": "none", "normalise_observations": False, "action_clip": 0.0}
    data = prepare_data(dataset.model_copy(update=changes), first.algorithm.model_copy(update=neutral), env)
    expected = {key: first.content["architecture"].get(key) for key in ("observation_dim", "action_dim", "num_actions")}
    there = architecture_of(first.algorithm, data.spaces)
    different = [
        f"{key} {there.get(key)} and not {value}" for key, value in expected.items() if there.get(key) != value
    ]
    if different:
        raise ConfigurationError(
            f"the data do not fit the policies: {', '.join(different)}; give dataset=... of theirs."
        )
    return data


def is_data_of(policy: JudgedPolicy, data: PreparedData) -> bool:
    """Whether a policy was trained on these data."""
    return policy.content["dataset_fingerprint"] == data.fingerprint


def _files(entries: Sequence[str], best: bool) -> Iterator[tuple[Path, Listed | None]]:
    for path, problem in named_paths(entries):
        if problem is not None or not path.is_dir():
            yield path, problem
            continue
        folders = sorted(one for one in path.rglob("checkpoints") if one.is_dir())
        places = [place for folder in folders for place in (sorted(folder.glob("seed-*")) or [folder])]
        if not places:
            yield path, Listed(str(path), "foreign", "holds no checkpoints of a run")
        for place in places:
            newest = newest_checkpoint(place, best=best)
            if newest is None:
                yield place, Listed(str(place), "partial", f"no {BEST}*.pt" if best else "no checkpoint yet")
            else:
                yield newest, None


def _read(path: Path) -> JudgedPolicy:
    content = load_checkpoint(path)
    config = content["config"]
    algorithm = AlgorithmOptions.model_validate(config["algorithm"])
    place = path.absolute().parent
    seed = place.name if place.name.startswith("seed-") else ""
    run = next((one.parent for one in (place, *place.parents) if one.name == "checkpoints"), place)
    parts = [run.name, seed, f"step {content['step']:,}", "best" if path.name.startswith(BEST) else ""]
    return JudgedPolicy(" ".join(filter(None, parts)), path, run, content, algorithm)


def _difference(first: JudgedPolicy, other: JudgedPolicy) -> str:
    """Why two policies are not of one task."""
    for key in ("observation_dim", "action_dim", "num_actions"):
        one, another = (which.content["architecture"].get(key) for which in (first, other))
        if one != another:
            return f"{key} is {another} here and {one} of {first.path}; judge the policies of one task together"
    return ""
