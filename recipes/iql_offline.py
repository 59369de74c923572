"""Train IQL on a fixed dataset: `python recipes/iql_offline.py`; `--help` shows the options."""

from __future__ import annotations

from contextlib import nullcontext

from iql_torchrl.configuration.command_line import in_sweep, output_folder, recipe
from iql_torchrl.configuration.launching import launched_rank
from iql_torchrl.running.options import OfflineOptions
from iql_torchrl.running.sweep import job_of_sweep


@recipe("iql_offline", OfflineOptions, job_of_sweep)
def main(options: OfflineOptions) -> float | None:
    """One run: what to resume, data, step, loop, summary. Returns the objective of a sweep."""
    # Imported here so that --help and a misspelt option answer at once.
    from iql_torchrl.data.preparation import prepare_data
    from iql_torchrl.reporting.run_lock import RunLock
    from iql_torchrl.running.run import Run
    from iql_torchrl.running.starting import load_starts, start_from
    from iql_torchrl.running.stopwatch import Stopwatch
    from iql_torchrl.training.checkpoints import checkpoint_folders, find_checkpoints
    from iql_torchrl.training.construction import build_step
    from iql_torchrl.training.data_parallel import join_ranks

    clock = Stopwatch()
    # A job that was moved to here may still be ending elsewhere.
    with RunLock(output_folder(), wait=120 if in_sweep() else 0) if launched_rank() == 0 else nullcontext():
        ranks = join_ranks(options, options.train.device)  # the processes that torchrun has started, or this one
        folder = ranks.from_first(output_folder)
        resumed = ranks.from_first(
            lambda: find_checkpoints(options.resume, checkpoint_folders(folder, options.train.seeds))
        )
        with ranks.together():
            with clock("data"):
                data = prepare_data(options.dataset, options.algorithm, options.env, ranks.device)
            step = build_step(options.algorithm, options.train, data, ranks.device, resumed, ranks)
            if not resumed and (starts := load_starts(options)):
                start_from(step, starts, options, data, count=0)
            run = Run(step, data, options, folder, resumed=resumed, clock=clock)

        for losses in run.updates():
            run.evaluate_when_due()
            run.log_when_due(losses)
            run.save_when_due()

        summary = run.finish()
    if run.exit_status:
        raise SystemExit(run.exit_status)
    return summary["objective"]


if __name__ == "__main__":
    main()
