"""A policy as a file that needs none of this: `python recipes/export.py checkpoint=RUN_OR_FILE output=policy.onnx`."""

from __future__ import annotations

from iql_torchrl.configuration.command_line import recipe
from iql_torchrl.running.options import ExportOptions


@recipe("export", ExportOptions)
def main(options: ExportOptions) -> None:
    """Write the policy, once it acts as the checkpoint does, and print by how much it differs."""
    from iql_torchrl.shipping.export import export_policy

    print(export_policy(**options.model_dump()))


if __name__ == "__main__":
    main()
