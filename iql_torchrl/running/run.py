"""A run: what goes on around the updates of a training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from signal import Signals
from typing import Any

from torch import Tensor
from torchrl.record.loggers import Logger
from tqdm import tqdm

from iql_torchrl.data.preparation import PreparedData
from iql_torchrl.evaluation.held_out import held_out_metrics
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.evaluation.rollouts import Evaluator
from iql_torchrl.reporting.curves import draw_curves
from iql_torchrl.reporting.loggers import make_logger
from iql_torchrl.reporting.run_folder import Records, RunFolder
from iql_torchrl.reporting.summary import closing_table, summarise
from iql_torchrl.running.interruption import Interruption
from iql_torchrl.running.options import RunOptions
from iql_torchrl.running.stopwatch import Stopwatch
from iql_torchrl.training.checkpoints import checkpoint_folders, restore, save_checkpoint
from iql_torchrl.training.construction import actor_arguments, architecture_of
from iql_torchrl.training.step import TrainingStep


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
        folder: the run folder; ``None`` keeps rows in memory and saves nothing.
        resumed: of :func:`iql_torchrl.training.checkpoints.find_checkpoints`; put back into the step.
        clock: that has measured what came before.
        quiet: print nothing and show no bar.

    Raises:
        CheckpointError: a checkpoint of another architecture, other data, or a later step.
        ConfigurationError: a folder that holds another run, or cannot be written.
        SimulatorError: an environment that does not start.
    """

    def __init__(
        self,
        step: TrainingStep,
        data: PreparedData,
        options: RunOptions,
        folder: Path | None = None,
        *,
        resumed: Sequence[tuple[Path, Mapping[str, Any]]] | None = None,
        clock: Stopwatch | None = None,
        quiet: bool = False,
    ) -> None:
        self.step = step
        self.data = data
        self.options = options
        self.seeds = options.train.seeds
        self.clock = clock or Stopwatch()
        self.quiet = quiet
        self.summary: dict[str, Any] = {}
        self.interrupted: Signals | None = None
        self._config = options.model_dump(exclude_unset=True)
        self._architecture = architecture_of(options.algorithm, data.spaces)
        bounds = (data.spaces.action_low, data.spaces.action_high)
        self.policies = [Policy.from_loss(loss, *bounds, data.normaliser) for loss in step.losses]
        for index, (path, checkpoint) in enumerate(resumed or []):
            restore(path, checkpoint, step, self._architecture, data.fingerprint, index)
            self._say(f"resumed from {path} at step {step.count}")
        self.count = step.count

        self.records = Records()
        self._checkpoints: list[Path] = []
        self._logger: Logger | None = None
        if folder is not None:
            self.records = RunFolder(folder, resume_step=step.count if options.resume == "auto" else None)
            self.records.write_config(self._config)
            self._checkpoints = checkpoint_folders(folder, self.seeds)
            self._logger = make_logger(options.logger, folder, self._config)
        self._evaluator = None
        if data.environment is not None:
            self._evaluator = Evaluator(data.environment, episodes=options.eval.episodes)
        self._say(data.description() + ("" if folder is None else f"; writing to {folder}"))
        self._compile_note = step.compile_note
        for line in filter(None, (data.note, self._compile_note)):
            self._say(line)

        # Looking options up takes longer than the rest of the loop.
        self._log_every, self._evaluate_every = options.train.log_interval, options.eval.interval
        self._save_every = options.checkpoint.interval
        self._held_out: list[dict[str, float]] = []
        self._logged_count, self._logged_seconds = self.count, 0.0
        self._bar: tqdm | None = None
        self._interruption: Interruption | None = None

    @property
    def policy(self) -> Policy:
        """The policy of the first seed; it follows the training."""
        return self.policies[0]

    @property
    def last(self) -> bool:
        """Whether all updates are done."""
        return self.count >= self.options.train.steps

    def updates(self) -> Iterator[dict[str, Tensor]]:
        """Call the step until ``train.steps``, or until SIGINT or SIGTERM asks to stop, which sets :attr:`interrupted`.

        Yields:
            the losses of each call, of which :attr:`count` tells how many updates are done.
        """
        at_once = self.options.train.updates_per_call
        steps = self.options.train.steps
        bar = tqdm(total=steps, initial=self.count, unit="update", smoothing=0.05, disable=self.quiet)
        with Interruption() as self._interruption, bar as self._bar:
            for count in range(self.count + at_once, steps + 1, at_once):
                # The first call compiles; its time would spoil the updates per second.
                compiling = self.step.compiled and "compile" not in self.clock.seconds
                with self.clock("compile" if compiling else "train"):
                    losses = self.step()
                self.count = count
                self._logged_count += at_once * compiling
                bar.update(at_once)
                yield losses
                if self._interruption.signal and not self.last:
                    self.interrupted = self._interruption.signal
                    return

    def evaluate_when_due(self) -> None:
        """Every ``eval.interval`` updates and after the last: held-out transitions, and episodes of every policy."""
        if self.count % self._evaluate_every and not self.last:
            return
        with self.clock("evaluate"):
            validation = self.data.validation
            if validation is not None:
                self._held_out = [held_out_metrics(loss, validation) for loss in self.step.losses]
            if self._evaluator is None:
                return
            scores = []
            for seed, policy in zip(self.seeds, self.policies, strict=True):
                evaluation = self._evaluator.evaluate(policy, seed=1000 * (seed + 1))
                self._write("eval", seed, evaluation.row())
                scores.append(self.data.score(float(evaluation.returns.mean())))
            if self._bar is not None:
                self._bar.set_postfix_str(f"{self.data.score_label} {sum(scores) / len(scores):.1f}")

    def log_when_due(self, losses: Mapping[str, Tensor]) -> None:
        """Every ``train.log_interval`` updates and after the last: losses, diagnostics and rates, a row a seed."""
        if self.count % self._log_every and not self.last and not self._held_out:
            return
        with self.clock("log"):
            seconds = self.clock.seconds.get("train", 0.0)
            rates = {"learning_rate": self.step.learning_rates["actor"]}
            if self.count > self._logged_count:
                rates["updates_per_second"] = (self.count - self._logged_count) / (seconds - self._logged_seconds)
            for index, (seed, loss) in enumerate(zip(self.seeds, self.step.losses, strict=True)):
                row = {key: float(value.reshape(-1)[index]) for key, value in losses.items()} | rates
                row |= {key: float(value) for key, value in loss.diagnostics(self.step.batch(index)).items()}
                self._write("train", seed, row | (self._held_out[index] if self._held_out else {}))
            self._logged_count, self._logged_seconds, self._held_out = self.count, seconds, []

    def save_when_due(self) -> None:
        """Every ``checkpoint.interval`` updates, after the last, and when asked to stop: a checkpoint a seed."""
        stopping = self._interruption is not None and self._interruption.signal
        if not self._checkpoints or (self.count % self._save_every and not self.last and not stopping):
            return
        path = self._checkpoints[0]
        with self.clock("checkpoint"):
            for index, (folder, policy) in enumerate(zip(self._checkpoints, self.policies, strict=True)):
                environment = self.data.environment
                content = {
                    "training": self.step.state_dict(index),
                    "architecture": self._architecture,
                    "policy": policy.state_dict(actor_arguments(self._architecture)),
                    "config": self._config,
                    "dataset_fingerprint": self.data.fingerprint,
                    "environment": None if environment is None else asdict(environment),
                }
                path = save_checkpoint(folder, self.count, content, keep=self.options.checkpoint.keep)
        if stopping and not self.last and isinstance(self.records, RunFolder):
            if self._bar is not None:
                self._bar.close()
            folder = self.records.path
            self._say(f"{stopping.name}: saved {path}; continue with resume=auto run_dir={folder}")

    def finish(self) -> dict[str, Any]:
        """Draw the curves, write the summary, print it.

        Returns:
            the summary, which is also in :attr:`summary`.
        """
        self.close()
        if self.step.compile_note != self._compile_note:  # found out at the first update
            self._say(self.step.compile_note)
        if isinstance(self.records, RunFolder):
            with self.clock("draw"):
                draw_curves(
                    self.records,
                    title=self.data.name,
                    data_score=self.data.data_score,
                    score_label=self.data.score_label,
                )
        self.summary = summarise(self.records, self.data, self.step, self.clock.seconds, seeds=self.seeds)
        if isinstance(self.records, RunFolder):
            self.records.write_summary(self.summary)
        self._say(closing_table(self.summary))
        if isinstance(self.records, RunFolder):
            self._say(f"curves: {self.records.curves}")
        return self.summary

    def close(self) -> None:
        """Release the environments."""
        if self._evaluator is not None:
            self._evaluator.close()

    def _write(self, kind: str, seed: int, values: Mapping[str, float | None]) -> None:
        row = {"step": self.count, "seed": seed, **values}
        if kind == "eval":
            self.records.log_evaluation(row)
        else:
            self.records.log_metrics(row)
        if self._logger is not None:
            prefix = f"seed-{seed}/{kind}" if len(self.seeds) > 1 else kind
            found = {f"{prefix}/{key}": value for key, value in row.items() if value is not None}
            self._logger.log_metrics(found, step=self.count)

    def _say(self, line: str) -> None:
        if not self.quiet:
            print(line)
