"""Time one update, ours against TorchRL's recipe, in one process: `python recipes/benchmark.py [rounds=15]`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import hydra
from omegaconf import DictConfig

from iql_torchrl.configuration import check_command_line, report_errors

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NAME = "benchmark"


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=NAME)
@report_errors
def main(config: DictConfig) -> None:
    """Build every row, warm it up, time them in interleaved rounds; print, write and draw the table."""
    import torch
    from omegaconf import OmegaConf

    from iql_torchrl import benchmarking
    from iql_torchrl.atomic import write_atomically
    from iql_torchrl.experiment import resolve_device
    from iql_torchrl.reporting import versions

    device = resolve_device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if config.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    modes = ["eager", "compiled", *(["CUDA graph"] if device.type == "cuda" else [])] if config.compile else ["eager"]
    orders = ("joint", "sequential")
    with tempfile.TemporaryDirectory() as folder:
        compile = [False, True] if config.compile else [False]
        rows = [benchmarking.torchrl_row(config, device, f"{folder}/{flag}", compile=flag) for flag in compile]
        rows += [benchmarking.our_row(config, device, order=order, mode=mode) for order in orders for mode in modes]
        paper = {"order": "sequential", "mode": modes[-1]}
        rows.append(benchmarking.our_row(config, device, **paper, at_once=config.updates_per_call))
        rows.append(benchmarking.our_row(config, device, **paper, at_once=config.updates_per_call, seeds=config.seeds))
        rows += [benchmarking.products_row(config, device, order=order) for order in orders]
        results = benchmarking.measure(rows, config, device)

    rate = benchmarking.large_product_rate(device, config.precision)
    print(f"\n{benchmarking.table(results)}\nlarge product: {rate / 1e9:.0f} GFLOP/s; {name}, {config.precision}")
    report = {
        "rows": results,
        "large_product_flops_per_second": rate,
        "config": OmegaConf.to_container(config, resolve=True),
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    output = Path(config.output)
    text = json.dumps(report, indent=2) + "\n"
    write_atomically(output, lambda file: file.write(text.encode()))
    title = f"One IQL update, batch {config.batch_size}, hidden {list(config.hidden_dims)}, {config.precision}, {name}"
    benchmarking.draw(results, title, output.with_suffix(".png"))
    print(f"wrote {output} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    report_errors(check_command_line)(sys.argv[1:], CONFIGS, NAME)
    main()
