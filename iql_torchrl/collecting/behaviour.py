"""A behaviour policy that Stable-Baselines3's SAC trains, and all that it did on the way."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from tqdm import tqdm

from iql_torchrl.atomic import remove_leftovers, write_atomically, write_text_atomically
from iql_torchrl.collecting.steps import Act, Player, Steps, checked
from iql_torchrl.environments.playing import derived_seed
from iql_torchrl.environments.simulators import make_environment
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import CheckpointError, ConfigurationError, SimulatorError, first_line
from iql_torchrl.running.options import BehaviourOptions

# Steps between two looks at signals, and between two seeds of all generators: a training that goes on from a multiple
# of them draws what it would have drawn, without the state of any generator.
_STEPS_AT_ONCE = 100
_EPISODES, _DRAWS, _EVALUATIONS = range(3)


class Behaviour:
    """Trains a policy by SAC, and goes on from where another process stopped.

    In its folder are ``options.json``; ``history.steps``, every transition in its order, which is Stable-Baselines3's
    replay buffer too; ``checkpoint.pt``; and ``policy-STEP.pt`` of every evaluation. None is a pickle of
    Stable-Baselines3, which would execute what it holds: tensors and plain values are all that is read. A training
    that was killed ends with the same numbers as one that was not, where the environment repeats an episode from its
    seed and its actions; where it does not, the episode that had begun ends as truncated.

    Args:
        environment: to train in.
        options: of the training.
        folder: of its files.
        seed: of everything.
        sample_actions: whether evaluations draw from the policy.

    Raises:
        ConfigurationError: Stable-Baselines3 is not installed.
        CheckpointError: files that cannot be read.
        SimulatorError: the environment does not start.
    """

    def __init__(
        self, environment: EnvironmentSpec, options: BehaviourOptions, folder: Path, *, seed: int, sample_actions: bool
    ) -> None:
        refuse_without_stable_baselines()
        sac: Any = importlib.import_module("stable_baselines3").SAC
        logger: Any = importlib.import_module("stable_baselines3.common.logger").Logger
        self._environment, self._options, self._folder, self._seed = environment, options, folder, seed
        self._sample = sample_actions
        self._episodes = _SeededEpisodes(make_environment(environment), seed)
        self._model = sac(
            "MlpPolicy",
            self._episodes,
            learning_rate=options.learning_rate,
            gamma=options.discount,
            batch_size=options.batch_size,
            buffer_size=options.steps,
            learning_starts=options.warm_up,
            policy_kwargs={"net_arch": list(options.hidden_dims)},
            seed=derived_seed(seed),
            device="cpu",
        )
        self._model.set_logger(logger(None, []))  # each call of learn would make a folder for one of its own
        self.evaluations: list[tuple[int, float]] = []  # step, mean return
        self._kept = 0
        remove_leftovers(folder)
        self._restore()

    @property
    def step(self) -> int:
        """Steps so far."""
        return self._model.num_timesteps

    def train(self, look: Callable[[], object]) -> None:
        """Train to the end; a checkpoint is written there, when one is due, and when ``look`` raises an exception.

        Args:
            look: called every 100 steps.
        """
        options = self._options
        if self.step >= options.steps:
            return
        player = Player(self._environment, options.evaluation_episodes)
        bar = tqdm(total=options.steps, initial=self.step, unit="step", desc="training", smoothing=0.05)
        try:
            while self.step < options.steps:
                try:
                    look()
                except BaseException:
                    if self.step > self._kept:
                        self._save()
                    raise
                self._advance()
                bar.update(self.step - bar.n)
                if self.step % options.evaluation_interval == 0 or self.step == options.steps:
                    self.evaluations.append((self.step, self._evaluate(player)))
                    bar.set_postfix_str(f"return {self.evaluations[-1][1]:.1f}")
                if self.step - self._kept >= options.checkpoint_interval or self.step == options.steps:
                    self._save()
        finally:
            bar.close()
            player.close()

    def history(self, steps: int) -> Steps:
        """The first transitions of the training; the last episode is cut there, as truncated."""
        rows = self._rows(0, steps)
        over, timeouts = rows["over"] == 1, rows["timeout"] == 1
        cut = not over[-1]
        timeouts[-1] |= cut
        actions = np.asarray(self._model.policy.unscale_action(rows["action"]), dtype=np.float32)
        terminals = over & ~timeouts
        return Steps(
            rows["observation"],
            actions,
            rows["reward"].astype(np.float64),
            rows["next_observation"],
            terminals,
            timeouts,
            cut,
        )

    def policy(self, step: int) -> Act:
        """The policy at an evaluation; it takes the place of the one that is trained.

        Raises:
            CheckpointError: its file cannot be read.
        """
        self._model.policy.actor.load_state_dict(_load(self._snapshot(step))["actor"])
        return self._act()

    def first_to_reach(self, target: float) -> tuple[int, float]:
        """Step and mean return of the first evaluation with at least that one, or of the best where none has it."""
        best = max(self.evaluations, key=lambda one: one[1])
        return next((one for one in self.evaluations if one[1] >= target), best)

    def close(self) -> None:
        """Release the environment."""
        self._model.env.close()

    # ------------------------------------------------------------------ training

    def _advance(self) -> None:
        options, model = self._options, self._model
        ends = [self.step - self.step % every + every for every in (_STEPS_AT_ONCE, options.evaluation_interval)]
        count = min(*ends, options.steps) - self.step
        model.set_random_seed(derived_seed(self._seed, _DRAWS, self.step))
        start = self.step
        model.learn(count, reset_num_timesteps=False, log_interval=None)
        rows = self._rows(start, self.step)
        odd = ~np.isfinite(rows["reward"]) | ~np.isfinite(rows["next_observation"]).all(axis=1)
        if odd.any():
            raise SimulatorError(
                f"{self._environment.name} returned an observation or a reward that is not finite in step "
                f"{start + int(np.flatnonzero(odd)[0])} of the training; its checkpoint of step {self._kept} stays."
            )

    def _evaluate(self, player: Player) -> float:
        seeds = [derived_seed(self._seed, _EVALUATIONS, one) for one in range(self._options.evaluation_episodes)]
        act, found = self._act(), []
        for start in range(0, len(seeds), player.at_once):
            found += player.episodes(act, seeds[start : start + player.at_once])
        actor = {"actor": self._model.policy.actor.state_dict()}
        write_atomically(self._snapshot(self.step), lambda file: torch.save(actor, file))
        return float(np.mean([one.returns[0] for one in found]))

    def _act(self) -> Act:
        policy, space = self._model.policy, self._model.action_space
        policy.set_training_mode(False)

        def act(observations: np.ndarray) -> np.ndarray:
            return policy.predict(observations, deterministic=not self._sample)[0]

        return checked(act, "the policy that SAC trains", space.low, space.high)

    def _snapshot(self, step: int) -> Path:
        return self._folder / f"policy-{step:08d}.pt"

    # ------------------------------------------------------------------ files

    def _rows(self, start: int, stop: int) -> np.ndarray:
        """Transitions of the replay buffer as rows."""
        buffer = self._model.replay_buffer
        rows = np.zeros(stop - start, dtype=self._row_type)
        for name, column in _columns(buffer).items():
            rows[name] = column[start:stop, 0]
        return rows

    @property
    def _row_type(self) -> np.dtype:
        buffer = self._model.replay_buffer
        return np.dtype([(name, column.dtype, column.shape[2:]) for name, column in _columns(buffer).items()])

    def _save(self) -> None:
        """Append the transitions since the last checkpoint, have them on the disk, and write the checkpoint."""
        with open(self._folder / "history.steps", "ab") as file:
            file.truncate(self._kept * self._row_type.itemsize)
            file.write(self._rows(self._kept, self.step).tobytes())
            file.flush()
            os.fsync(file.fileno())
        model = self._model
        state = {
            "step": self.step,
            "parameters": model.get_parameters(),
            "log_ent_coef": model.log_ent_coef,
            "evaluations": self.evaluations,
        }
        write_atomically(self._folder / "checkpoint.pt", lambda file: torch.save(state, file))
        self._kept = self.step

    def _restore(self) -> None:
        path, model = self._folder / "checkpoint.pt", self._model
        if not path.exists():
            return
        state = _load(path)
        step = state["step"]
        size = step * self._row_type.itemsize
        with open(self._folder / "history.steps", "rb") as file:
            content = file.read(size)
        if len(content) < size:
            raise CheckpointError(
                f"{path} counts on {step} steps, of which {self._folder / 'history.steps'} has "
                f"{len(content) // self._row_type.itemsize}; delete {self._folder} to begin anew."
            )
        model.set_parameters(state["parameters"], exact_match=True, device="cpu")
        with torch.no_grad():
            model.log_ent_coef.copy_(state["log_ent_coef"])
        rows = np.frombuffer(content, dtype=self._row_type)
        buffer = model.replay_buffer
        for name, column in _columns(buffer).items():
            column[:step, 0] = rows[name]
        buffer.pos, buffer.full = step % buffer.buffer_size, step >= buffer.buffer_size
        model.num_timesteps = model._num_timesteps_at_start = self._kept = step
        self.evaluations = [(int(one), float(mean)) for one, mean in state["evaluations"]]
        self._bring_back(rows)

    def _bring_back(self, rows: np.ndarray) -> None:
        """The environment to where the transitions have left it."""
        ends = np.flatnonzero(rows["over"])
        begun = rows[ends[-1] + 1 if len(ends) else 0 :]
        self._episodes.begin(len(ends), np.asarray(self._model.policy.unscale_action(begun["action"]), np.float32))
        found = self._model.env.reset()
        if len(begun) and not np.array_equal(found[0], begun["next_observation"][-1]):
            tqdm.write(f"{self._environment.name} does not repeat an episode: the one that had begun ends as truncated")
            buffer = self._model.replay_buffer
            buffer.dones[len(rows) - 1] = buffer.timeouts[len(rows) - 1] = 1
            with open(self._folder / "history.steps", "r+b") as file:
                file.seek((len(rows) - 1) * self._row_type.itemsize)
                file.write(self._rows(len(rows) - 1, len(rows)).tobytes())
            found = self._model.env.reset()
        self._model._last_obs = found


def refuse_without_stable_baselines() -> None:
    """Raise a ConfigurationError where Stable-Baselines3 is not installed."""
    if importlib.util.find_spec("stable_baselines3") is None:
        raise ConfigurationError(
            "training a behaviour policy needs Stable-Baselines3: pip install 'iql_torchrl[collect]'; or roll out a "
            "policy that there is, with policy=CHECKPOINT or policy=module:function, and name=NAME."
        )


def claim(folder: Path, options: Mapping[str, Any], *, overwrite: bool) -> None:
    """Take the folder of a training: a new one, or one of the same options.

    Args:
        folder: made where it does not exist.
        options: as plain values.
        overwrite: begin anew where there is a training of others.

    Raises:
        ConfigurationError: there is one of others, and ``overwrite`` is not set.
    """
    path = folder / "options.json"
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError:
            before = {}
        if before == options:
            return
        if not overwrite:
            names = sorted(key for key in {*before, *options} if before.get(key) != options.get(key))
            raise ConfigurationError(
                f"{folder} holds a training with other options ({', '.join(names)}), which is left as it is: give the "
                "same options to go on with it, name another output, or set overwrite=true."
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(options, indent=2) + "\n")


def _columns(buffer: Any) -> dict[str, np.ndarray]:
    """The arrays of Stable-Baselines3's replay buffer ``[size, 1, ...]`` by the names that they have in a row."""
    return {
        "observation": buffer.observations,
        "action": buffer.actions,
        "reward": buffer.rewards,
        "next_observation": buffer.next_observations,
        "over": buffer.dones,
        "timeout": buffer.timeouts,
    }


def _load(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}; delete {path.parent} to begin anew.") from (
            error
        )


class _SeededEpisodes(gymnasium.Wrapper):
    """Each episode has a seed of its own, so that it can be brought back."""

    def __init__(self, environment: gymnasium.Env, seed: int) -> None:
        super().__init__(environment)
        self._seed = seed
        self.begin(0, ())

    def begin(self, episode: int, actions: Any) -> None:
        """With the next reset, begin an episode of that number, and take these actions in it."""
        self._episode, self._actions = episode, actions

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The observation after the reset, or after the actions of :meth:`begin`; ``seed`` is not used."""
        found = self.env.reset(seed=derived_seed(self._seed, _EPISODES, self._episode), options=options)
        for action in self._actions:
            observation, _, _, _, information = self.env.step(action)
            found = (observation, information)
        self.begin(self._episode + 1, ())
        return found
