"""A run: what goes on around the updates of a training step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from iql_torchrl.configuration.options import FittedQOptions
from iql_torchrl.data.preparation import PreparedData
from iql_torchrl.errors import DivergenceError, RunError, SimulatorError
from iql_torchrl.evaluation.held_out import held_out_metrics
from iql_torchrl.evaluation.judging import judge_losses
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.evaluation.rollouts import Evaluator
from iql_torchrl.reporting.curves import draw_curves
from iql_torchrl.reporting.data_facts import data_facts
from iql_torchrl.reporting.doctor import as_text, diagnose
from iql_torchrl.reporting.loggers import GuardedLogger, make_logger
from iql_torchrl.reporting.run_folder import Records, RunFolder
from iql_torchrl.reporting.summary import closing_table, summarise
from iql_torchrl.running.divergence import Divergence, as_plain, explosion, largest_reward
from iql_torchrl.running.interaction import Interaction, OfflineOnly
from iql_torchrl.running.interruption import Interruption, hand_on
from iql_torchrl.running.options import RunOptions
from iql_torchrl.running.stopwatch import Stopwatch
from iql_torchrl.training.checkpoints import (
    checkpoint_folders,
    list_checkpoints,
    remove_old_checkpoints,
    remove_surpassed,
    restore,
    save_checkpoint,
    save_diverged,
    sharing,
    was_stacked,
)
from iql_torchrl.training.construction import actor_arguments, architecture_of
from iql_torchrl.training.data_parallel import seed_apart
from iql_torchrl.training.step import TrainingStep

# After which several processes ask each other whether one of them should stop.
_CALLS_BETWEEN_LOOKS = 20


class Run:
    """A training step with its evaluations, rows, checkpoints, progress and interruption.

    >>> run = Run(step, data, options, folder)
    >>> for losses in run.updates():
    ...     run.evaluate_when_due()
    ...     run.log_when_due(losses)
    ...     run.save_when_due()
    >>> run.finish()

    Args:
        step: of one seed or several.
        data: that it was built on.
        options: when things are due, and what a checkpoint remembers of the run.
        folder: the run folder; ``None`` keeps rows in memory and saves nothing. Of several ranks the first alone has
            it, evaluates and prints; the others go through the same updates.
        resumed: of :func:`iql_torchrl.training.checkpoints.find_checkpoints`; put back into the step.
        clock: that has measured what came before.
        quiet: print nothing and show no bar.
        interaction: of the policies with their environments, which goes on ahead of the updates.

    Raises:
        CheckpointError: a checkpoint of another architecture, other data, or a later step.
        ConfigurationError: a folder that holds another run, or cannot be written.
        SimulatorError: an environment that does not start.
        RunError: from the methods: the folder cannot be written any more, or the simulator failed.
    """

    def __init__(
        self,
        step: TrainingStep,
        data: PreparedData,
        options: RunOptions,
        folder: Path | None = None,
        *,
        resumed: Sequence[tuple[Path, Mapping[str, Any]] | None] | None = None,
        clock: Stopwatch | None = None,
        quiet: bool = False,
        interaction: Interaction | OfflineOnly | None = None,
    ) -> None:
        self.step = step
        self.data = data
        self.options = options
        self.seeds = options.train.seeds
        self.clock = clock or Stopwatch()
        ranks = step.ranks
        self.quiet = quiet or not ranks.first
        self._resuming = "start again" if folder is None else f"start again with resume=auto run_dir={folder}"
        self.summary: dict[str, Any] = {}
        self.interrupted: Signals | None = None
        self.diverged: list[Divergence] = []
        self._config = options.model_dump(exclude_unset=True)
        self._architecture = architecture_of(options.algorithm, data.spaces)
        bounds = (data.spaces.action_low, data.spaces.action_high)
        self._choice: Any = options.eval.model_dump(include={"num_samples", "selection"})
        self.policies = [Policy.from_loss(loss, *bounds, data.normaliser, **self._choice) for loss in step.losses]
        # Sums of the losses over the calls since the last row, on the device.
        self._sums: Tensor | None = None
        self._calls = 0
        self._going_on = list(range(len(self.seeds)))
        self._interaction = interaction or OfflineOnly(options.train.steps)
        self.steps = self._interaction.updates
        self._new = not resumed
        self._restore(resumed or [])
        step.going_on = self._going_on  # the list itself, from which seeds that diverge are taken
        for index in range(len(step.random_states)) if step.random_states else [0]:
            with step.random_state(index):
                ranks.seed_apart()
        self.count = self._checked_count = step.count

        self.records = Records()
        self._checkpoints: list[Path] = []
        self._logger: GuardedLogger | None = None
        if folder is not None and ranks.first:
            self.records = RunFolder(folder, resume_step=step.count if options.resume == "auto" else None)
            self.records.write_config(self._config)
            self._checkpoints = checkpoint_folders(folder, self.seeds)
            for one in self._checkpoints:  # all before the first checkpoint, so that it tells which seeds they are
                with self._writing():
                    one.mkdir(exist_ok=True)
                    remove_surpassed(one, step.count)
            self._logger = make_logger(options.logger, folder, self._config, self._say)
        self._evaluator = None
        if data.environment is not None and ranks.first:
            self._evaluator = Evaluator(
                data.environment, episodes=options.eval.episodes, timeout=options.eval.timeout, say=self._say
            )
        self._say(data.description() + ("" if folder is None else f"; writing to {folder}"))
        self._compile_note = step.compile_note
        for line in filter(None, (data.note, *data.warnings, self._compile_note, step.products_note)):
            self._say(line)

        # Looking options up takes longer than the rest of the loop.
        self._log_every, self._evaluate_every = options.train.log_interval, options.eval.interval
        self._save_every = options.checkpoint.interval
        self._largest_reward = largest_reward(data.training)
        self.warnings = list(data.warnings)
        self._exploded: set[int] = set()
        self._losses: Mapping[str, Tensor] = {}
        self._best = {index: self._best_until_now(seed) for index, seed in enumerate(self.seeds)}
        self._improved: set[int] = set()
        self._held_out: dict[int, dict[str, float]] = {}
        self._logged_count, self._logged_seconds = self.count, 0.0
        self._bar: tqdm | None = None
        self._saving: Signals | None = None
        self._stopping = False

    @property
    def policy(self) -> Policy:
        """The policy of the first seed; it follows the training."""
        return self.policies[0]

    @property
    def last(self) -> bool:
        """Whether all updates are done."""
        return self.count >= self.steps

    @property
    def exit_status(self) -> int:
        """Of the process: 0, 128 + the signal after an interruption, 3 where a seed diverged."""
        return 128 + self.interrupted if self.interrupted else DivergenceError.status if self.diverged else 0

    def updates(self) -> Iterator[dict[str, Tensor]]:
        """Call the step until ``train.steps``, until a signal asks to stop, or until every seed has diverged.

        Yields:
            the losses of each call, of which :attr:`count` tells how many updates are done.
        """
        at_once = self.options.train.updates_per_call
        steps = self.steps
        if self._new and self.count == self._interaction.begins:
            self._evaluate()  # what the online phase starts from
            self._save_best()
        with Interruption() as interruption, self.step.ranks.watching(self._resuming):
            try:
                for count in range(self.count + at_once, steps + 1, at_once):
                    if self._interaction.due(self.count):
                        self._interact()
                    if not self._going_on:
                        return
                    # The first call compiles; its time would spoil the updates per second.
                    compiling = self.step.compiled and "compile" not in self.clock.seconds
                    if compiling:
                        self._say("compiling the training step ...")
                    with self.clock("compile" if compiling else "train"):
                        losses = self.step()
                        self._add(losses)
                    self.count = count
                    self._improved.clear()
                    self._logged_count += at_once * compiling
                    if self._bar is None:  # whose rate starts with the second call
                        self._bar = tqdm(total=steps, initial=count, unit="update", smoothing=0.05, disable=self.quiet)
                    else:
                        self._bar.update(at_once)
                    # Looked at once, so that what is saved and whether it ends here cannot disagree.
                    alone = self.step.ranks.count == 1
                    asked = interruption.look() if alone else self._agreed(interruption.signal)
                    self._saving = None if self.last else asked
                    self._stopping = self._saving is not None and (not alone or self._saving == interruption.signal)
                    yield losses
                    if self._stopping:
                        self.interrupted = self._saving
                        return
                    if not self._going_on:
                        return
            finally:
                if self._bar is not None:
                    self._bar.close()

    def evaluate_when_due(self) -> None:
        """Every ``eval.interval`` updates and after the last: held-out transitions, and episodes of every policy."""
        if self.count % self._evaluate_every == 0 or self.last or self.count == self._interaction.begins:
            self._evaluate()

    def _interact(self) -> None:
        try:
            with self._writing():
                self._interaction.advance(self.count, self.policies, self._going_on)
        except DivergenceError:
            going_on, self._checked_count = len(self._going_on), -1
            self._look_for_divergence()
            if len(self._going_on) == going_on:
                raise
            if self._going_on:
                self._interact()
        except SimulatorError as error:
            raise RunError(f"step {self.count}: {error} {self._last_good(self._going_on[0])}") from error

    def _evaluate(self) -> None:
        self._look_for_divergence()
        with self.clock("evaluate"):
            validation = self.data.validation
            if validation is not None:
                self._held_out = {
                    index: held_out_metrics(self.step.losses[index], validation) for index in self._going_on
                }
                if self._evaluator is None:
                    for index, found in self._held_out.items():
                        self._compare(index, found)
            if self._evaluator is None or not self._going_on:
                return
            scores = []
            for index in self._going_on:
                seed = self.seeds[index]
                try:
                    evaluation = self._evaluator.evaluate(self.policies[index], seed=1000 * (seed + 1))
                except SimulatorError as error:
                    raise RunError(f"step {self.count}: {error} {self._last_good(index)}") from error
                self._write("eval", seed, evaluation.row())
                self._compare(index, evaluation.row())
                scores.append(evaluation.score)
            if self._bar is not None:
                self._bar.set_postfix_str(f"{self.data.score_label} {sum(scores) / len(scores):.1f}")

    def _compare(self, index: int, row: Mapping[str, float | None]) -> None:
        """Note an evaluation that is better than all before it."""
        found = self._quality(row)
        if found is not None and found > self._best[index]:
            self._best[index] = found
            self._improved.add(index)

    def _quality(self, row: Mapping[str, float | None]) -> float | None:
        """What the best checkpoint is the best in: the score or mean return; without a simulator what is held out.

        That is the TD error, and of behaviour cloning the log-likelihood of the actions.
        """
        if self._evaluator is not None:
            score = row.get("normalized_score")
            return row.get("episode_return_mean") if score is None else score
        if self.options.algorithm.temperature == 0:
            return row.get("validation_log_prob")
        error = row.get("validation_td_error")
        return None if error is None else -error

    def _best_until_now(self, seed: int) -> float:
        rows = self.records.metrics() if self._evaluator is None else self.records.evaluations()
        found = [self._quality(row) for row in rows if row["seed"] == seed]
        return max((one for one in found if one is not None), default=-math.inf)

    def log_when_due(self, losses: Mapping[str, Tensor]) -> None:
        """Every ``train.log_interval`` updates and after the last: losses, diagnostics and rates, a row a seed."""
        if self.count % self._log_every and not self.last and not self._held_out:
            return
        self._look_for_divergence()
        # The row that shows it is the last of a seed that has diverged.
        diverged = [self.seeds.index(one.seed) for one in self.diverged if one.step == self.count]
        with self.clock("log"):
            seconds = self.clock.seconds.get("train", 0.0)
            rates = {"learning_rate": self.step.learning_rates["actor"]}
            if self.count > self._logged_count:
                rates["updates_per_second"] = (self.count - self._logged_count) / (seconds - self._logged_seconds)
            for index in (*self._going_on, *diverged):
                row = {key: float(value.reshape(-1)[index]) for key, value in losses.items()} | rates
                row |= self._means(losses, index)
                diagnostics = self.step.losses[index].diagnostics(self.step.batch(index))
                row |= {key: float(value) for key, value in diagnostics.items()} | self._interaction.row(index)
                self._write("train", self.seeds[index], row | self._held_out.get(index, {}))
                self._warn_of_explosion(index, row)
            self._logged_count, self._logged_seconds, self._held_out = self.count, seconds, {}
            self._sums, self._calls = None, 0

    def save_when_due(self) -> None:
        """Every ``checkpoint.interval`` updates, after the last, and when asked to stop: a checkpoint a seed.

        And, after an evaluation that is the best so far, one that is kept until a better one.
        """
        saving = self._saving
        alone = self.step.ranks.count == 1
        due = self.last or saving or self.count % self._save_every == 0
        if (alone and not self._checkpoints) or not (due or self._improved):
            return
        self._look_for_divergence()  # at the same updates in all ranks
        if not self._checkpoints:
            return
        path = None
        with self.clock("checkpoint"):
            if isinstance(self.records, RunFolder):
                self.records.sync()
            self._save_best()
            if not due:
                return
            for index in self._going_on:
                path = self._save(index)
            # Once each seed has its own of this step: what all of them have is gone on from.
            for index in self._going_on:
                remove_old_checkpoints(self._checkpoints[index], keep=self.options.checkpoint.keep)
                remove_surpassed(self._checkpoints[index], self.count)
        if saving and path is not None and isinstance(self.records, RunFolder):
            if self._stopping and self._bar is not None:
                self._bar.close()
            then = (
                f"continue with resume=auto run_dir={self.records.path}" if self._stopping else "going on until killed"
            )
            self._say(f"{saving.name}: saved {path}; {then}")

    def _save_best(self) -> None:
        for index in self._improved if self._checkpoints else ():
            self._save(index, best=True)

    def _save(self, index: int, *, best: bool = False) -> Path:
        with self._writing(), self.step.random_state(index):
            return save_checkpoint(self._checkpoints[index], self.count, self._content(index), best=best)

    def _content(self, index: int) -> dict[str, Any]:
        """Of a checkpoint of a seed."""
        environment, training = self.data.environment, self.step.state_dict(index)
        policy = self.policies[index].state_dict(actor_arguments(self._architecture))
        return {
            "training": training,
            "architecture": self._architecture,
            "policy": sharing(policy, training["loss"].values()),
            "config": self._config,
            "products": self.step.products,
            "stacked": self.step.stacked,
            "dataset_fingerprint": self.data.fingerprint,
            "environment": None if environment is None else asdict(environment),
            "interval": {"calls": self._calls, "sums": None if self._sums is None else self._of(index).cpu()},
            **self._interaction.state_dict(index),
        }

    def finish(self) -> dict[str, Any]:
        """Draw the curves, write and print the summary and the doctor's findings, and hand them to the logger.

        Of a run that was interrupted or diverged too, marked as such.

        Returns:
            the summary, which is also in :attr:`summary`.

        Raises:
            SystemExit: by submitit, whose signal ended the run.
        """
        self._close_simulators()
        if self.step.compile_note != self._compile_note:  # found out at the first update
            self._say(self.step.compile_note)
        title = self.data.title
        if not self.last:
            how = "diverged" if self.diverged and not self.interrupted else "interrupted"
            title += f" ({how} at step {self.count:,} of {self.steps:,})"
        if isinstance(self.records, RunFolder):
            with self.clock("draw"), self._writing():
                draw_curves(
                    self.records,
                    title=title,
                    data_score=self.data.data_score,
                    score_label=self.data.score_label,
                    hand_over=self._interaction.begins,
                    updates=self.count,
                    has_likelihood=self.step.losses[0].has_likelihood,
                )
        with self.clock("diagnose"):
            facts = data_facts(self.data) if self.step.ranks.first else {}
            findings = diagnose(self.records, self.options.algorithm.model_dump(), facts)
        judged = self._judge()
        self.summary = summarise(
            self.records,
            self.data,
            self.step,
            self.clock.seconds,
            seeds=self.seeds,
            warnings=self.warnings,
            interrupted=None if self.interrupted is None else self.interrupted.name,
            diverged=[{"seed": one.seed, "step": one.step, "what": self._message(one)} for one in self.diverged],
            online=self._interaction.summary(),
            findings=findings,
            facts=facts,
            judged=judged,
        )
        if isinstance(self.records, RunFolder):
            self.records.write_summary(self.summary)
            if self._logger is not None:
                self._logger.log_outcome(self._config, self.summary, self.records.curves)
                self._logger.close()
        self._say(closing_table(self.summary))
        for seed, one in judged.items():
            likelihood = "" if one["log_prob"] is None else f"log-likelihood {one['log_prob']:.4g}, "
            self._say(
                f"seed {seed} by the data alone, discount {self.options.algorithm.discount:g}: fitted Q "
                f"{one['fitted_q']:.4g} ({one['fitted_q_low']:.4g} to {one['fitted_q_high']:.4g}), {likelihood}"
                f"distance from the data's actions {one['action_distance']:.3f}"
            )
        if findings:
            self._say(f"findings:\n{as_text(findings, len(self.seeds))}")
        if isinstance(self.records, RunFolder):
            self._say(f"curves: {self.records.curves}")
        self.step.ranks.wait()  # torchrun ends the others when the first has ended by a signal or diverged
        hand_on(self.interrupted)
        return self.summary

    def _judge(self) -> dict[int, dict[str, Any]]:
        """With ``eval.offline``, what the data say of the policies that have not diverged, by seed."""
        if not self.options.eval.offline or not self.step.ranks.first or not self._going_on or self.count == 0:
            return {}
        algorithm = self.options.algorithm
        with self.clock("judge"):
            found = judge_losses(
                [self.step.losses[index] for index in self._going_on],
                self.data,
                FittedQOptions(steps=self.options.eval.offline_steps),
                discount=algorithm.discount,
                seed=self.seeds[0],
                quiet=self.quiet,
                **self._choice,
            )
        return dict(zip((self.seeds[index] for index in self._going_on), found, strict=True))

    def raise_if_diverged(self) -> None:
        """Raise where every seed has diverged.

        Raises:
            DivergenceError: with what became of each, and what to try.
        """
        if self.diverged and not self._going_on:
            raise DivergenceError(" ".join(map(self._message, self.diverged)))

    def close(self) -> None:
        """Release the environments and the logger."""
        self._close_simulators()
        if self._logger is not None:
            self._logger.close()

    def _close_simulators(self) -> None:
        if self._evaluator is not None:
            self._evaluator.close()
        self._interaction.close()

    def _restore(self, resumed: Sequence[tuple[Path, Mapping[str, Any]] | None]) -> None:
        """Put checkpoints back: the count of updates, which all share, is that of the seeds that go on."""
        newest = max((found[1]["step"] for found in resumed if found is not None), default=0)
        self._going_on = [
            index
            for index in self._going_on
            if not resumed or ((found := resumed[index]) is not None and found[1]["step"] == newest)
        ]
        out = [index for index in range(len(resumed)) if index not in self._going_on]
        for index in (*out, *self._going_on):
            found = resumed[index] if resumed else None
            if found is None:
                continue
            path, checkpoint = found
            restore(
                path,
                checkpoint,
                self.step,
                self._architecture,
                self.data.fingerprint,
                index,
                other_data=self.options.resume_with_changes,
            )
            products = checkpoint.get("products", "mkl")
            if products != self.step.products:
                self._say(
                    f"the products of {path} were {products}, and are {self.step.products} now: the run goes on with "
                    "other rounding, not bit for bit as it would have"
                )
            if len(self.seeds) > 1 and was_stacked(checkpoint) != self.step.stacked:
                how = ("stacked, and are computed one after another", "computed one after another, and are stacked")
                if index == self._going_on[0]:
                    self._say(
                        f"the seeds in {path.parent.parent} were {how[self.step.stacked]} now: the run goes on with "
                        "other rounding and draws, not bit for bit as it would have"
                    )
                with self.step.random_state(index):  # stacked ones have all the same, that of the process
                    seed_apart(index)
            if index in out:
                self._say(f"seed {self.seeds[index]} had diverged, and stays at {path}")
                continue
            self._say(f"resumed from {path} at step {self.step.count}")
            interval = checkpoint.get("interval") or {"calls": 0, "sums": None}
            if interval["sums"] is not None:
                sums = interval["sums"].to(self.step.device)
                if self._sums is None:
                    self._sums = torch.zeros((len(sums), len(self.seeds)), dtype=sums.dtype, device=sums.device)
                self._sums[:, index], self._calls = sums, interval["calls"]

        self._interaction.restore(resumed)

    def _agreed(self, signal: Signals | None) -> Signals | None:
        """The signal that this rank or another has got, at an update at which all of them look."""
        ranks = self.step.ranks
        if self.count // self.options.train.updates_per_call % _CALLS_BETWEEN_LOOKS:
            return None
        found = ranks.largest(signal or 0)
        return Signals(found) if found else None

    def _add(self, losses: Mapping[str, Tensor]) -> None:
        stacked = torch.stack(list(losses.values()))
        if self._sums is None:
            self._sums = torch.zeros((len(losses), len(self.seeds)), dtype=torch.float64, device=stacked.device)
        self._sums.add_(stacked.reshape(len(losses), -1))
        self._calls += 1
        self._losses = losses

    def _of(self, index: int) -> Tensor:
        assert self._sums is not None
        return self._sums[:, index]

    def _means(self, losses: Mapping[str, Tensor], index: int) -> dict[str, float]:
        """Of each loss over the calls since the last row."""
        means = (self._of(index) / self._calls).tolist()
        return {f"{key}_mean": value for key, value in zip(losses, means, strict=True)}

    def _look_for_divergence(self) -> None:
        """Take seeds out whose losses or parameters are not finite."""
        if self._checked_count == self.count:
            return
        self._checked_count = self.count
        for index in list(self._going_on):
            values = {key: float(value.reshape(-1)[index]) for key, value in self._losses.items()}
            odd = {key: value for key, value in values.items() if not math.isfinite(value)}
            networks = self.step.not_finite(index)
            if odd or networks:
                self._going_on.remove(index)
                self.diverged.append(self._divergence(index, odd, networks))
                self._say(self._message(self.diverged[-1]))

    def _divergence(self, index: int, losses: Mapping[str, float], networks: Sequence[str]) -> Divergence:
        last_good = saved = None
        if self._checkpoints:
            last_good = next(reversed(list_checkpoints(self._checkpoints[index])), None)
            content = {
                "step": self.count,
                "losses": dict(losses),
                "batch": as_plain(self.step.batch(index)),
                "training": self.step.state_dict(index),
                "config": self._config,
            }
            with self._writing():
                saved = save_diverged(self._checkpoints[index], self.count, content)
        return Divergence(self.seeds[index], self.count, losses, tuple(networks), last_good, saved)

    def _last_good(self, index: int) -> str:
        if not isinstance(self.records, RunFolder):
            return ""
        newest = next(reversed(list_checkpoints(self._checkpoints[index])), None)
        return (
            f"The newest checkpoint is {newest}; " if newest else "There is no checkpoint yet; "
        ) + f"go on with resume=auto run_dir={self.records.path}."

    def _message(self, divergence: Divergence) -> str:
        return divergence.message(self.options.algorithm, self._largest_reward)

    def _warn_of_explosion(self, index: int, row: Mapping[str, float | None]) -> None:
        if index in self._exploded:
            return
        warning = explosion(row, self._largest_reward, self.options.algorithm.discount)
        if warning is not None:
            self._exploded.add(index)
            self.warnings.append(f"seed {self.seeds[index]}, step {self.count}: {warning}")
            self._say(f"warning: {self.warnings[-1]}")

    def _write(self, kind: str, seed: int, values: Mapping[str, float | None]) -> None:
        row = {"step": self.count, "seed": seed, **values}
        if kind == "eval":
            self.records.log_evaluation(row | {"phase": self._interaction.phase(self.count)})
        else:
            self.records.log_metrics(row)
        if self._logger is not None:
            prefix = f"seed-{seed}/{kind}" if len(self.seeds) > 1 else kind
            found = {f"{prefix}/{key}": value for key, value in values.items() if value is not None}
            self._logger.log_metrics(found, step=self.count)

    def _writing(self) -> AbstractContextManager[None]:
        return self.records.writing() if isinstance(self.records, RunFolder) else nullcontext()

    def _say(self, line: str) -> None:
        if not self.quiet:
            tqdm.write(line)
