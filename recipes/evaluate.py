"""Evaluate a checkpoint's policy: `python recipes/evaluate.py checkpoint=FILE [episodes=20] [env.name=Hopper-v5]`."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from iql_torchrl.configuration import check_command_line, report_errors
from iql_torchrl.errors import ConfigurationError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NAME = "evaluate"


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=NAME)
@report_errors
def main(config: DictConfig) -> None:
    """Load the policy, run the episodes, print what they returned."""
    from iql_torchrl.evaluation import EnvironmentSpec, Evaluator, Policy, spaces_of
    from iql_torchrl.experiment import environment_kwargs, resolve_device
    from iql_torchrl.training import load_checkpoint

    checkpoint = load_checkpoint(config.checkpoint)
    policy = Policy.from_state_dict(checkpoint["policy"], resolve_device(config.device))
    if config.env.name != "auto":
        environment = EnvironmentSpec.of(config.env.name)
    elif checkpoint["environment"] is not None:
        environment = EnvironmentSpec.from_state(checkpoint["environment"])
    else:
        raise ConfigurationError("the checkpoint's run had no environment; name one with env.name=ID.")
    environment = environment.with_kwargs(environment_kwargs(config))
    architecture = checkpoint["architecture"]
    spaces_of(environment, observation_dim=architecture["observation_dim"], action_dim=architecture.get("action_dim"))

    evaluator = Evaluator(environment, episodes=config.episodes, seed=config.seed)
    evaluation = evaluator.evaluate(policy)
    evaluator.close()
    score = evaluation.normalized_score
    returns = evaluation.returns
    print(f"{config.checkpoint}, step {checkpoint['step']}, in {environment.name}:")
    print(f"  return            {returns.mean():.1f} +- {returns.std():.1f} over {len(returns)} episodes")
    print(f"  lowest, highest   {returns.min():.1f}, {returns.max():.1f}")
    print(f"  episode length    {evaluation.lengths.mean():.1f}")
    print(f"  normalised score  {environment.note or 'no D4RL reference' if score is None else f'{score:.1f}'}")
    if score is not None and environment.note:
        print(f"                    {environment.note}")
    if evaluation.success_rate is not None:
        print(f"  success rate      {evaluation.success_rate:.2f}")


if __name__ == "__main__":
    report_errors(check_command_line)(sys.argv[1:], CONFIGS, NAME)
    main()
