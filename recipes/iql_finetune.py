"""Go on online from an offline policy: `python recipes/iql_finetune.py checkpoint=RUN online.steps=100000`."""

from __future__ import annotations

from iql_torchrl.configuration.command_line import in_sweep, output_folder, recipe
from iql_torchrl.running.options import FinetuneOptions
from iql_torchrl.running.sweep import job_of_sweep


@recipe("iql_finetune", FinetuneOptions, job_of_sweep)
def main(options: FinetuneOptions) -> float | None:
    """One run: data with room behind them, step, environments, loop, summary. Returns the objective of a sweep."""
    # Imported here so that --help and a misspelt option answer at once.
    from iql_torchrl.data.preparation import prepare_data
    from iql_torchrl.reporting.run_lock import RunLock
    from iql_torchrl.running.online import build_online
    from iql_torchrl.running.run import Run
    from iql_torchrl.running.stopwatch import Stopwatch
    from iql_torchrl.training.checkpoints import checkpoint_folders, find_checkpoints
    from iql_torchrl.training.devices import resolve_device

    clock, folder = Stopwatch(), output_folder()
    with RunLock(folder, wait=120 if in_sweep() else 0):
        resumed = find_checkpoints(options.resume, checkpoint_folders(folder, options.train.seeds))
        device = resolve_device(options.train.device)
        with clock("data"):
            data = prepare_data(options.dataset, options.algorithm, options.env, device)
        step, data, interaction = build_online(options, data, device, folder, resumed, clock)
        run = Run(step, data, options, folder, resumed=resumed, clock=clock, interaction=interaction)

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
