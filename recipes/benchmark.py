"""Time one update, ours against TorchRL's recipe, in one process: `python recipes/benchmark.py [rounds=15]`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from iql_torchrl.configuration.command_line import recipe
from iql_torchrl.running.options import BenchmarkOptions


@recipe("benchmark", BenchmarkOptions)
def main(options: BenchmarkOptions) -> None:
    """Build every row, warm it up, time them in interleaved rounds; print, write and draw the table."""
    import torch

    from iql_torchrl.atomic import write_atomically
    from iql_torchrl.benchmark.chart import draw
    from iql_torchrl.benchmark.measuring import large_product_rate, measure, table
    from iql_torchrl.benchmark.rows import our_row, products_row, torchrl_row
    from iql_torchrl.reporting.summary import versions
    from iql_torchrl.training.devices import resolve_device

    device = resolve_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if options.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    modes = ["eager", "compiled", *(["CUDA graph"] if device.type == "cuda" else [])] if options.compile else ["eager"]
    orders = ("joint", "sequential")
    with tempfile.TemporaryDirectory() as folder:
        compile = [False, True] if options.compile else [False]
        rows = [torchrl_row(options, device, f"{folder}/{flag}", compile=flag) for flag in compile]
        rows += [our_row(options, device, order=order, mode=mode) for order in orders for mode in modes]
        paper = {"order": "sequential", "mode": modes[-1]}
        rows.append(our_row(options, device, **paper, at_once=options.updates_per_call))
        rows.append(our_row(options, device, **paper, at_once=options.updates_per_call, seeds=options.seeds))
        rows += [products_row(options, device, order=order) for order in orders]
        results = measure(rows, options, device)

    rate = large_product_rate(device, options.precision)
    print(f"\n{table(results)}\nlarge product: {rate / 1e9:.0f} GFLOP/s; {name}, {options.precision}")
    report = {
        "rows": results,
        "large_product_flops_per_second": rate,
        "config": options.model_dump(),
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    output = Path(options.output)
    text = json.dumps(report, indent=2) + "\n"
    write_atomically(output, lambda file: file.write(text.encode()))
    title = f"One IQL update, batch {options.batch_size}, hidden {options.hidden_dims}, {options.precision}, {name}"
    draw(results, title, output.with_suffix(".png"))
    print(f"wrote {output} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
