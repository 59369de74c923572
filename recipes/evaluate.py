"""Evaluate a policy: `python recipes/evaluate.py checkpoint=RUN_OR_FILE [episodes=20] [env.name=Hopper-v5]`."""

from __future__ import annotations

from pathlib import Path

from iql_torchrl.configuration.command_line import recipe
from iql_torchrl.errors import ConfigurationError
from iql_torchrl.running.options import EvaluateOptions


@recipe("evaluate", EvaluateOptions)
def main(options: EvaluateOptions) -> None:
    """Load the policy, run the episodes, print what they returned, and film the best and the worst of them."""
    from iql_torchrl.data.comparability import changes_between, scored_beside
    from iql_torchrl.environments.simulators import spaces_of
    from iql_torchrl.environments.specification import EnvironmentSpec
    from iql_torchrl.evaluation.policy import Policy
    from iql_torchrl.evaluation.rollouts import Evaluator
    from iql_torchrl.evaluation.video import film_extremes, prepare_video
    from iql_torchrl.training.checkpoints import checkpoint_file, load_checkpoint
    from iql_torchrl.training.devices import resolve_device

    path = checkpoint_file(options.checkpoint, best=options.best)
    checkpoint = load_checkpoint(path)
    choice = options.model_dump(include={"num_samples", "selection"})
    policy = Policy.from_state_dict(checkpoint["policy"], resolve_device(options.device), **choice)
    of_run = None if checkpoint["environment"] is None else EnvironmentSpec.from_state(checkpoint["environment"])
    if options.env.name is not None and options.env.name != "auto":
        environment = scored_beside(of_run, EnvironmentSpec.of(options.env.name))
    elif of_run is not None:
        environment = of_run
    else:
        raise ConfigurationError("the checkpoint's run had no environment; name one with env.name=ID.")
    environment = environment.with_kwargs(options.env.kwargs or {})
    architecture = checkpoint["architecture"]
    spaces_of(environment, observation_dim=architecture["observation_dim"], action_dim=architecture.get("action_dim"))

    if options.video:
        prepare_video(environment)
    evaluator = Evaluator(environment, episodes=options.episodes, seed=options.seed)
    evaluation = evaluator.evaluate(policy)
    evaluator.close()
    score = evaluation.normalized_score
    returns = evaluation.returns
    print(f"{path}, step {checkpoint['step']}, in {environment.name}:")
    if of_run is not None and (changes := changes_between(of_run.name, environment.name)):
        print(f"  the run was in    {of_run.name}: {changes}")
    print(f"  return            {returns.mean():.1f} +- {returns.std():.1f} over {len(returns)} episodes")
    print(f"  lowest, highest   {returns.min():.1f}, {returns.max():.1f}")
    print(f"  episode length    {evaluation.lengths.mean():.1f}")
    told = environment.note or "no D4RL reference" if score is None else f"{score:.1f}"
    print(f"  {environment.score_label:<17} {told}")
    if score is not None and environment.note:
        print(f"                    {environment.note}")
    if evaluation.success_rate is not None:
        print(f"  success rate      {evaluation.success_rate:.2f}")
    if options.video:
        folder = path.parent / "videos" if options.output is None else Path(options.output).expanduser()
        film_extremes(evaluation, policy, options.seed, folder, path.stem)


if __name__ == "__main__":
    main()
