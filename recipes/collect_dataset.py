"""Collect datasets: `python recipes/collect_dataset.py env.name=Swimmer-v5 output=FOLDER`; `--help` lists options."""

from __future__ import annotations

from iql_torchrl.configuration.command_line import recipe
from iql_torchrl.running.options import CollectOptions


@recipe("collect_dataset", CollectOptions)
def main(options: CollectOptions) -> None:
    """Train a policy, or take one, and write what it does as datasets; interrupted, the same command goes on."""
    from iql_torchrl.collecting.collection import Collection

    status = Collection(options).run()
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
