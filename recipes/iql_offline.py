"""Train IQL on a fixed dataset: `python recipes/iql_offline.py`; `--help` shows the options."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from iql_torchrl.configuration import check_command_line, compose, report_errors
from iql_torchrl.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NAME = "iql_offline"


def train(config: DictConfig, run_path: Path) -> None:
    """One run: what to resume, data, loss, step, loop, summary."""
    # Imported here so that --help and a misspelt option answer at once.
    from tqdm import tqdm

    from iql_torchrl import experiment
    from iql_torchrl.evaluation import Evaluator, Policy
    from iql_torchrl.reporting import RunFolder, Stopwatch, closing_table, draw_curves, make_logger, summarise
    from iql_torchrl.training import Interruption, checkpoint_folders, find_checkpoints, restore, save_checkpoint

    clock = Stopwatch()
    algorithm, steps, seeds = config.algorithm, config.train.steps, experiment.seeds_of(config)
    folders = checkpoint_folders(run_path, seeds)
    resumed = find_checkpoints(config.resume, folders)

    # ---- data, losses and training step, policies
    with clock("data"):
        data = experiment.prepare_data(config)
    step = experiment.build_step(config, data, experiment.resolve_device(config.train.device))
    architecture = experiment.architecture_of(algorithm, data.spaces)
    bounds = (data.spaces.action_low, data.spaces.action_high)
    policies = [Policy.from_loss(loss, *bounds, data.normaliser) for loss in step.losses]
    for run_index, (path, checkpoint) in enumerate(resumed or []):
        restore(path, checkpoint, step, architecture, data.fingerprint, run_index)
        print(f"resumed from {path} at step {step.count}")

    # ---- run folder
    run = RunFolder(run_path, resume_step=step.count if config.resume == "auto" else None)
    run.write_config(config)
    logger = make_logger(config, run_path)
    evaluator = None
    if data.environment is not None:
        evaluator = Evaluator(data.environment, episodes=config.eval.episodes)
    print(f"{data.title_line()}; writing to {run_path}")
    for line in filter(None, (data.note, note := step.compile_note)):
        print(line)

    def log(count: int, seed: int, row: dict[str, float | None], write: Callable[[dict], None], prefix: str) -> None:
        row = {"step": count, "seed": seed, **row}
        write(row)
        if logger is not None:
            prefix = f"seed-{seed}/{prefix}" if len(seeds) > 1 else prefix
            logger.log_metrics(
                {f"{prefix}/{key}": value for key, value in row.items() if value is not None}, step=count
            )

    def save() -> Path:
        for index, (folder, policy) in enumerate(zip(folders, policies, strict=True)):
            content = {
                "training": step.state_dict(index),
                "architecture": architecture,
                "policy": policy.state_dict(experiment.actor_arguments(architecture)),
                "config": OmegaConf.to_container(config, resolve=True),
                "dataset_fingerprint": data.fingerprint,
                "environment": None if data.environment is None else asdict(data.environment),
            }
            path = save_checkpoint(folder, step.count, content, keep=config.checkpoint.keep)
        return path

    # ---- training
    at_once = config.train.updates_per_call
    # Looking an option up in the configuration takes longer than the rest of the loop.
    log_every, evaluate_every, save_every = config.train.log_interval, config.eval.interval, config.checkpoint.interval
    held_out: list[dict[str, float]] = []
    logged_count, logged_seconds = step.count, 0.0
    with Interruption() as interruption, tqdm(total=steps, initial=step.count, unit="update", smoothing=0.05) as bar:
        for count in range(step.count + at_once, steps + 1, at_once):
            # The first call compiles; its time would spoil the updates per second.
            compiling = step.compiled and "compile" not in clock.seconds
            with clock("compile" if compiling else "train"):
                losses = step()
            logged_count += at_once * compiling
            bar.update(at_once)
            last = count == steps
            if count % evaluate_every == 0 or last:
                with clock("evaluate"):
                    if data.validation is not None:
                        held_out = [experiment.held_out_metrics(loss, data.validation) for loss in step.losses]
                    if evaluator is not None:
                        scores = []
                        for seed, policy in zip(seeds, policies, strict=True):
                            evaluation = evaluator.evaluate(policy, seed=1000 * (seed + 1))
                            log(count, seed, evaluation.row(), run.log_evaluation, "eval")
                            scores.append(data.score(float(evaluation.returns.mean())))
                        bar.set_postfix_str(f"{data.score_label} {sum(scores) / len(scores):.1f}")
            if count % log_every == 0 or last or held_out:
                with clock("log"):
                    seconds = clock.seconds.get("train", 0.0)
                    rates = {"learning_rate": step.learning_rates["actor"]}
                    if count > logged_count:
                        rates["updates_per_second"] = (count - logged_count) / (seconds - logged_seconds)
                    for index, (seed, loss) in enumerate(zip(seeds, step.losses, strict=True)):
                        row = {key: float(value.reshape(-1)[index]) for key, value in losses.items()} | rates
                        row |= {key: float(value) for key, value in loss.diagnostics(step.batch(index)).items()}
                        log(count, seed, row | (held_out[index] if held_out else {}), run.log_metrics, "train")
                    logged_count, logged_seconds, held_out = count, seconds, []
            if count % save_every == 0 or last or interruption.signal:
                with clock("checkpoint"):
                    path = save()
            if interruption.signal and not last:
                bar.close()
                print(f"{interruption.signal.name}: saved {path}; continue with resume=auto run_dir={run_path}")
                raise SystemExit(128 + interruption.signal)
    if evaluator is not None:
        evaluator.close()
    if step.compile_note != note:  # found out at the first update
        print(step.compile_note)

    # ---- summary
    with clock("draw"):
        draw_curves(run, title=data.name, data_score=data.data_score, score_label=data.score_label)
    summary = summarise(run, data, step, clock, seeds=seeds)
    run.write_summary(summary)
    print(closing_table(summary))
    print(f"curves: {run.curves}")


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=NAME)
@report_errors
def main(_: DictConfig) -> None:
    job = HydraConfig.get()
    run_path = Path(job.runtime.output_dir)
    try:
        train(compose(job.job.config_name or NAME, list(job.overrides.task)), run_path)
    except UserError:
        if not any(run_path.iterdir()):
            run_path.rmdir()
        raise


if __name__ == "__main__":
    sys.argv[1:] = report_errors(check_command_line)(sys.argv[1:], CONFIGS, NAME)
    main()
