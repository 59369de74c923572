"""Which sets are made, of which policy, and in which order."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gymnasium.spaces import Box

from iql_torchrl.collecting.behaviour import Behaviour, claim, refuse_without_stable_baselines
from iql_torchrl.collecting.statistics import draw_returns, table
from iql_torchrl.collecting.steps import Act, Player, Steps, checked, joined, uniform
from iql_torchrl.collecting.writing import Place, environment_versions
from iql_torchrl.environments.playing import derived_seed
from iql_torchrl.environments.simulators import make_environment, spaces_of
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import CheckpointError, ConfigurationError, SimulatorError, first_line, writing_to
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.reporting.run_lock import RunLock
from iql_torchrl.reporting.summary import versions
from iql_torchrl.running.interruption import Interruption
from iql_torchrl.running.options import CollectOptions
from iql_torchrl.training.checkpoints import load_checkpoint, newest_checkpoint

# In the order of the table; D4RL's names.
SETS = ("random", "medium-replay", "medium", "medium-expert", "expert")
_TRAINING = ".training"  # which Minari does not take for a dataset
_ROLLOUTS = 3  # purposes of seeds before are the training's
# Not of what is collected: where to, and what is said of it.
_BESIDE = {"output": True, "overwrite": True, "author": True, "code_permalink": True}


class Collection:
    """Makes the sets that the options ask for, each of which is there as a whole or not at all.

    Args:
        options: of the recipe.

    Raises:
        SimulatorError: an environment that is unknown or does not start, or whose actions are no bounded box.
        ConfigurationError: a set of another collection is there; Stable-Baselines3 is missing; the folder cannot be
            written, or is in use; a policy that is none.
    """

    def __init__(self, options: CollectOptions) -> None:
        self.options = options
        self.environment = EnvironmentSpec.of(options.env.name, options.env.kwargs)
        self.low, self.high = _bounds(self.environment)
        self._namespace = options.env.name.rpartition(":")[2]
        self._root = Path(options.output).expanduser().absolute()  # Minari takes no other
        self._of = options.model_dump(exclude={**_BESIDE, "training": {"checkpoint_interval"}})
        self._interruption = Interruption()

    def run(self) -> int:
        """Collect, print and draw; 0, or 128 and the signal that has interrupted it."""
        lock = RunLock(self._root / self._namespace, option="output")
        with lock, self._interruption:
            try:
                if self.options.policy is None:
                    self._train()
                else:
                    self._of_policy(self.options.policy)
            except _Stopped as stopped:
                print(f"interrupted by {stopped.signal.name}: the same command goes on from here", file=sys.stderr)
                return 128 + stopped.signal
        return 0

    # ------------------------------------------------------------------ the five sets

    def _train(self) -> None:
        options, folder = self.options, self._root / self._namespace / _TRAINING
        places = {name: Place(self._root, f"{self._namespace}/{name}-v0") for name in SETS}
        if not options.overwrite:
            for place in places.values():
                place.refuse(self._of)
        done = {name for name, place in places.items() if place.holds(self._of)}
        sets: dict[str, Steps] = {name: places[name].read() for name in SETS if name in done}
        if len(done) < len(SETS):
            refuse_without_stable_baselines()
            with _writing(self._root):
                claim(folder, self._of, overwrite=options.overwrite)
                behaviour = Behaviour(
                    self.environment,
                    options.training,
                    folder,
                    seed=options.seed,
                    sample_actions=options.rollouts.sample_actions,
                )
                behaviour.train(self._look)
            self._make(sets, places, behaviour)
            behaviour.close()
        self._tell({name: sets[name] for name in SETS}, (sets["random"], sets["expert"]), "returns.png")

    def _make(self, sets: dict[str, Steps], places: Mapping[str, Place], behaviour: Behaviour) -> None:
        """Those that are not there yet."""

        def play(name: str, policy: Callable[[], Act]) -> Steps:
            return sets[name] if name in sets else self._roll_out(policy(), name)

        end = behaviour.step
        made = {"random": play("random", lambda: checked(uniform(self.low, self.high), "random", self.low, self.high))}
        made["expert"] = play("expert", lambda: behaviour.policy(end))
        low, high = (float(made[name].returns.mean()) for name in ("random", "expert"))
        medium, mean = behaviour.first_to_reach(low + (high - low) / 3)
        if high <= low:
            print(f"the last policy returns {high:.1f}, uniform actions {low:.1f}: it has learnt nothing so far")
        made["medium"] = play("medium", lambda: behaviour.policy(medium))
        made["medium-replay"] = behaviour.history(medium)
        made["medium-expert"] = joined([made["medium"], made["expert"]])
        what = {
            "random": "uniform actions",
            "medium-replay": f"the training's {medium:,} steps up to the medium policy",
            "medium": f"the policy after {medium:,} steps, evaluated at a return of {mean:.1f}",
            "medium-expert": "the steps of medium, then those of expert",
            "expert": f"the policy after all {end:,} steps",
        }
        for name in SETS:
            if name not in sets:
                metadata = self._metadata("random" if name == "random" else "SAC (Stable-Baselines3)", what[name])
                metadata |= {"ref_min_score": low, "ref_max_score": high}
                metadata |= {"num_episodes_average_score": len(made["expert"].returns), "medium_step": medium}
                metadata["versions"]["stable-baselines3"] = version("stable-baselines3")
                self._look()
                places[name].write(made[name], self.environment, metadata)
                sets[name] = made[name]

    # ------------------------------------------------------------------ a given policy

    def _of_policy(self, policy: str) -> None:
        options = self.options
        place = Place(self._root, f"{self._namespace}/{options.name}-v0")
        if not options.overwrite:
            place.refuse(None)
        steps = self._roll_out(self._loaded(policy), str(options.name))
        metadata = self._metadata(policy, f"rollouts of {policy}")
        if self.environment.reference_returns is not None:
            metadata["ref_min_score"], metadata["ref_max_score"] = self.environment.reference_returns
        place.write(steps, self.environment, metadata)
        self._tell({str(options.name): steps}, None, f"{options.name}.png")

    def _loaded(self, text: str) -> Act:
        """A checkpoint, the newest one of a run folder, or ``module:function``."""
        path = Path(text).expanduser()
        if path.is_dir():
            newest = newest_checkpoint(path)
            if newest is None:
                raise CheckpointError(
                    f"policy={text} has no checkpoints/step-*.pt; name a file, such as one of a seed."
                )
            path = newest
        if not path.exists() and ":" in text:
            return checked(_function(text), f"policy={text}", self.low, self.high)
        checkpoint = load_checkpoint(path)
        policy, sizes = Policy.from_state_dict(checkpoint["policy"]), checkpoint["architecture"]
        spaces_of(self.environment, observation_dim=sizes["observation_dim"], action_dim=sizes.get("action_dim"))

        def act(observations: np.ndarray) -> np.ndarray:
            if not self.options.rollouts.sample_actions:
                return policy(observations)
            return policy.explore(observations, seed=int(torch.randint(2**31, ())))

        return checked(act, f"policy={text}", self.low, self.high)

    # ------------------------------------------------------------------ what both share

    def _roll_out(self, act: Act, name: str) -> Steps:
        options, player = self.options, Player.of_steps(self.environment, self.options.rollouts.steps)
        purpose = _ROLLOUTS + (SETS.index(name) if options.policy is None else len(SETS))
        try:
            return player.roll_out(
                act,
                options.rollouts.steps,
                lambda episode: derived_seed(options.seed, purpose, episode),
                title=name,
                look=self._look,
            )
        finally:
            player.close()

    def _metadata(self, algorithm: str, description: str) -> dict[str, Any]:
        metadata: dict[str, Any] = {
            "algorithm_name": algorithm,
            "description": f"{self.environment.name}: {description}.",
            "requirements": environment_versions(),
            "seed": self.options.seed,
            "versions": versions(),
            "options": self._of,
        }
        if self.options.author is not None:
            metadata["author"] = {self.options.author}
        if self.options.code_permalink is not None:
            metadata["code_permalink"] = self.options.code_permalink
        return metadata

    def _tell(self, sets: Mapping[str, Steps], ends: tuple[Steps, Steps] | None, picture: str) -> None:
        references = self.environment.reference_returns
        if ends is not None:
            references = (float(ends[0].returns.mean()), float(ends[1].returns.mean()))
        if references is not None and references[0] == references[1]:
            references = None
        folder = self._root / self._namespace
        with _writing(self._root):
            draw_returns(sets, self.environment.name, folder / picture)
        names = [f"{self._namespace}/{name}-v0" for name in sets]
        print(f"{table(sets, references)}\nin {self._root}, for dataset.root: {', '.join(names)}; {folder / picture}")

    def _look(self) -> None:
        if self._interruption.signal is not None:
            raise _Stopped(self._interruption.signal)


class _Stopped(Exception):
    def __init__(self, received: signal.Signals) -> None:
        super().__init__()
        self.signal = received


def _writing(root: Path) -> AbstractContextManager[None]:
    then = "What was complete stays; once it can be written, run the same command again."
    return writing_to(f"output={root}", then)


def _bounds(environment: EnvironmentSpec) -> tuple[np.ndarray, np.ndarray]:
    made = make_environment(environment)
    try:
        space = made.action_space
    finally:
        made.close()
    if not isinstance(space, Box) or len(space.shape) != 1 or not space.is_bounded():
        raise SimulatorError(
            f"{environment.name} has action space {space}; data are collected for continuous actions, a flat and "
            "bounded box, alone."
        )
    return space.low, space.high


def _function(text: str) -> Act:
    module, _, name = text.partition(":")
    sys.path.insert(0, os.getcwd())  # as python -m has it
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"policy={text} is no file, and cannot be imported as module:function: {first_line(error)}."
        ) from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise ConfigurationError(f"policy={text} is {type(found).__name__}, not a function of observations [B, O].")
    return cast(Act, found)
