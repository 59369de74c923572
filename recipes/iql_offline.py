"""Train IQL on a fixed dataset: `python recipes/iql_offline.py`; `--help` shows the options."""

from __future__ import annotations

from iql_torchrl.configuration.command_line import output_folder, recipe
from iql_torchrl.configuration.launching import launched_rank
from iql_torchrl.errors import UserError
from iql_torchrl.running.options import OfflineOptions


@recipe("iql_offline", OfflineOptions)
def main(options: OfflineOptions) -> float | None:
    """One run: what to resume, data, step, loop, summary. Returns the final score, for sweeps."""
    # Imported here so that --help and a misspelt option answer at once.
    from iql_torchrl.data.preparation import prepare_data
    from iql_torchrl.running.run import Run
    from iql_torchrl.running.stopwatch import Stopwatch
    from iql_torchrl.training.checkpoints import checkpoint_folders, find_checkpoints
    from iql_torchrl.training.construction import build_step
    from iql_torchrl.training.data_parallel import join_ranks

    clock, folder = Stopwatch(), output_folder()
    try:
        ranks = join_ranks(options, options.train.device)  # the processes that torchrun has started, or this one
        folder = ranks.from_first(output_folder)
        resumed = ranks.from_first(
            lambda: find_checkpoints(options.resume, checkpoint_folders(folder, options.train.seeds))
        )
        with ranks.together():
            with clock("data"):
                data = prepare_data(options.dataset, options.algorithm, options.env, ranks.device)
            step = build_step(options.algorithm, options.train, data, ranks.device, resumed, ranks)
            run = Run(step, data, options, folder, resumed=resumed, clock=clock)
    except UserError:
        if launched_rank() == 0 and not any(folder.iterdir()):
            folder.rmdir()
        raise

    for losses in run.updates():
        run.evaluate_when_due()
        run.log_when_due(losses)
        run.save_when_due()

    summary = run.finish()
    if run.exit_status:
        raise SystemExit(run.exit_status)
    return summary["final_score"]


if __name__ == "__main__":
    main()
