"""Time one update, ours against others' and its matrix products alone: `python recipes/benchmark.py [suite=full]`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from iql_torchrl.configuration.command_line import recipe
from iql_torchrl.running.options import BenchmarkOptions


@recipe("benchmark", BenchmarkOptions)
def main(options: BenchmarkOptions) -> None:
    """Build the rows of every case, warm them up, time them in interleaved rounds; print, write and draw the table."""
    import torch

    from iql_torchrl.atomic import write_text_atomically
    from iql_torchrl.benchmark.chart import draw
    from iql_torchrl.benchmark.machine import device_name, machine
    from iql_torchrl.benchmark.measuring import large_product_rate, measure, table
    from iql_torchrl.benchmark.online import online_rates, online_table
    from iql_torchrl.benchmark.suite import cases_of, describe, evaluation, rows_of
    from iql_torchrl.reporting.summary import versions
    from iql_torchrl.training.devices import resolve_device

    output, device = Path(options.output), resolve_device(options.device)
    about = {"config": options.model_dump(), "machine": machine(device), "versions": versions()}
    about |= {"device": device_name(device), "threads": torch.get_num_threads()}
    if options.suite == "online":
        found = online_rates(options)
        write_text_atomically(output, json.dumps({"online": found, **about}, indent=2) + "\n")
        print(f"\n{online_table(found)}\nwrote {output}")
        return
    if options.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    cases = cases_of(options, device)
    with tempfile.TemporaryDirectory() as folder:
        results = measure([(case, rows_of(case, options, folder)) for case in cases], options)

    rate = large_product_rate(device, options.precision)
    print(f"\n{table(results)}\nlarge product: {rate / 1e9:.0f} GFLOP/s; {about['device']}, {options.precision}")
    report = {
        "rows": results,
        "cases": describe(cases),
        "large_product_flops_per_second": rate,
        "evaluation": evaluation() if options.suite == "full" else None,
        **about,
    }
    write_text_atomically(output, json.dumps(report, indent=2) + "\n")
    title = f"One IQL update, {options.precision}, {about['device']}"
    draw(results, cases, title, output.with_suffix(".png"))
    print(f"wrote {output} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
