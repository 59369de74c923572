"""Time one update, ours against TorchRL's recipe, in one process: `python recipes/benchmark.py [rounds=15]`."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import hydra
from omegaconf import DictConfig

from iql_torchrl.configuration import check_command_line, report_errors

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NAME = "benchmark"
Step = Callable[[], object]


def random_transitions(config: DictConfig):
    """Transitions of random numbers, the same for every implementation."""
    import torch
    from tensordict import TensorDict

    generator = torch.Generator().manual_seed(config.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    count = config.transitions
    flags = torch.zeros(count, 1, dtype=torch.bool)
    return TensorDict(
        {
            "observation": normal(count, config.observation_dim),
            "action": normal(count, config.action_dim).tanh() * 0.99,
            "episode": torch.zeros(count, dtype=torch.int64),
            "next": {
                "observation": normal(count, config.observation_dim),
                "reward": normal(count, 1),
                "done": flags,
                "terminated": flags.clone(),
                "truncated": flags.clone(),
            },
        },
        batch_size=[count],
    )


def our_step(config: DictConfig, transitions, device, *, compile: bool, order: str) -> Step:
    """This project's update: sampling, three losses, three Adams, target update."""
    import torch

    from iql_torchrl import IQLLoss, TrainingStep, build_actor, build_qvalues, build_value, make_buffer

    torch.manual_seed(config.seed)
    sizes = {"hidden_dims": list(config.hidden_dims)}
    loss = IQLLoss(
        build_actor(config.observation_dim, config.action_dim, **sizes),
        build_qvalues(config.observation_dim, config.action_dim, **sizes),
        build_value(config.observation_dim, **sizes),
    ).to(device)
    buffer = make_buffer(transitions, batch_size=config.batch_size, seed=config.seed, device=device)
    return TrainingStep(loss, buffer, total_steps=1_000_000, order=order, compile=compile)


def torchrl_step(config: DictConfig, transitions, device, folder: str) -> Step:
    """The update of TorchRL's own offline recipe, eager, with the networks and hyperparameters of the rows above."""
    import torch
    from tensordict.nn import TensorDictModule
    from torch import nn
    from torchrl.data import Bounded, LazyMemmapStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
    from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
    from torchrl.objectives import IQLLoss, SoftUpdate, group_optimizers

    torch.manual_seed(config.seed)

    def mlp(inputs: int, outputs: int) -> MLP:
        cells = list(config.hidden_dims)
        return MLP(in_features=inputs, out_features=outputs, num_cells=cells, activation_class=nn.ReLU)

    observation_dim, action_dim = config.observation_dim, config.action_dim
    extractor = NormalParamExtractor(scale_mapping="biased_softplus_1.0", scale_lb=0.1)
    policy = nn.Sequential(mlp(observation_dim, 2 * action_dim), extractor)
    actor = ProbabilisticActor(
        TensorDictModule(policy, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=Bounded(-1.0, 1.0, (action_dim,)),
        distribution_class=TanhNormal,
    )
    qvalue = ValueOperator(mlp(observation_dim + action_dim, 1), in_keys=["observation", "action"])
    value = ValueOperator(mlp(observation_dim, 1), in_keys=["observation"])
    loss = IQLLoss(actor, qvalue, value, loss_function="l2", temperature=3.0, expectile=0.7).to(device)
    loss.make_value_estimator(gamma=0.99)
    targets = SoftUpdate(loss, tau=0.005)
    networks = (loss.actor_network_params, loss.value_network_params, loss.qvalue_network_params)
    optimizer = group_optimizers(*(torch.optim.Adam(list(params.values(True, True)), lr=3e-4) for params in networks))
    buffer = TensorDictReplayBuffer(
        storage=LazyMemmapStorage(config.transitions, scratch_dir=folder),
        sampler=SamplerWithoutReplacement(),
        batch_size=config.batch_size,
    )
    buffer.extend(transitions.exclude("episode"))

    def step() -> object:
        batch = buffer.sample().to(device)
        optimizer.zero_grad(set_to_none=True)
        losses = loss(batch)
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
        optimizer.step()
        targets.step()
        return losses.detach()

    return step


def milliseconds(step: Step, count: int, device) -> float:
    """Mean over ``count`` updates."""
    import torch

    start = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / count * 1e3


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=NAME)
@report_errors
def main(config: DictConfig) -> None:
    """Build every row, warm it up, time them in interleaved rounds, print and write the table."""
    import torch
    from omegaconf import OmegaConf
    from tqdm import tqdm

    from iql_torchrl.atomic import write_atomically
    from iql_torchrl.experiment import resolve_device
    from iql_torchrl.reporting import versions

    device = resolve_device(config.device)
    transitions = random_transitions(config)
    with tempfile.TemporaryDirectory() as folder:
        steps: dict[tuple[str, str], Step] = {
            ("TorchRL recipe", "eager"): torchrl_step(config, transitions, device, folder),
            ("iql_torchrl, joint", "eager"): our_step(config, transitions, device, compile=False, order="joint"),
            ("iql_torchrl, joint", "compiled"): our_step(config, transitions, device, compile=True, order="joint"),
            ("iql_torchrl, paper", "eager"): our_step(config, transitions, device, compile=False, order="sequential"),
            ("iql_torchrl, paper", "compiled"): our_step(config, transitions, device, compile=True, order="sequential"),
        }
        for step in tqdm(steps.values(), desc="compile and warm up", unit="row"):
            milliseconds(step, config.warm_up, device)
        times: dict[tuple[str, str], list[float]] = {row: [] for row in steps}
        for _ in tqdm(range(config.rounds), desc="measure", unit="round"):
            for row, step in steps.items():
                times[row].append(milliseconds(step, config.steps_per_round, device))

    rows = []
    baseline = statistics.median(times["TorchRL recipe", "eager"])
    for (implementation, mode), values in times.items():
        low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        rows.append(
            {
                "implementation": implementation,
                "mode": mode,
                "milliseconds_median": median,
                "milliseconds_quartiles": [low, high],
                "updates_per_second": 1e3 / median,
                "times_torchrl_eager": baseline / median,
            }
        )
    print(f"\n{'implementation':<20} {'mode':<9} {'ms/update':>10} {'quartiles':>15} {'updates/s':>10} {'ratio':>6}")
    for row in rows:
        low, high = row["milliseconds_quartiles"]
        print(
            f"{row['implementation']:<20} {row['mode']:<9} {row['milliseconds_median']:>10.2f} "
            f"{f'{low:.2f} - {high:.2f}':>15} {row['updates_per_second']:>10.1f} {row['times_torchrl_eager']:>6.2f}"
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    report = {
        "rows": rows,
        "config": OmegaConf.to_container(config, resolve=True),
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    text = json.dumps(report, indent=2) + "\n"
    write_atomically(Path(config.output), lambda file: file.write(text.encode()))
    print(f"{name}, {torch.get_num_threads()} threads; ratio: updates per second over TorchRL's; wrote {config.output}")


if __name__ == "__main__":
    report_errors(check_command_line)(sys.argv[1:], CONFIGS, NAME)
    main()
