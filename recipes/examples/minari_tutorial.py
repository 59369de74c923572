"""Minari's IQL tutorial in a few lines: `python recipes/examples/minari_tutorial.py [--steps 50000]`.

Learns to turn a pen in a hand of 24 joints from 25 human demonstrations, `D4RL/pen/human-v2`, which is downloaded where
it is not there yet. Prints the mean return of every evaluation, and of ten episodes in the environment that Minari
recovers from the dataset. Needs `pip install "iql_torchrl[robotics]"`, as `make train` has done.
"""

import argparse

import minari
import numpy as np

from iql_torchrl import train

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=50_000)
parser.add_argument("--episodes", type=int, default=10, help="of every evaluation")
arguments = parser.parse_args()

dataset = minari.load_dataset("D4RL/pen/human-v2", download=True)
# MinariExperienceReplay of TorchRL, which the tutorial reads it with, returns zeros in release 0.14.

# The dataset's name picks the preset kitchen_adroit: temperature 0.5, and dropout 0.1 in the policy. Its metadata name
# the environment, in which the policy is evaluated on the way.
run = train(
    dataset,
    steps=arguments.steps,
    seed=42,
    options={"eval.interval": max(1, arguments.steps // 10), "eval.episodes": arguments.episodes},
)
for row in run.records.evaluations():
    print(f"step {row['step']:.0f}: return {row['episode_return_mean']:.1f}, score {row['normalized_score']:.1f}")

# The policy is a function from observations to actions, so it acts in any environment.
environment = dataset.recover_environment(eval_env=True)
returns = []
for episode in range(arguments.episodes):
    observation, _ = environment.reset(seed=episode)
    rewards, over = [], False
    while not over:
        observation, reward, terminated, truncated, _ = environment.step(run.policy(observation))
        rewards.append(reward)
        over = terminated or truncated
    returns.append(sum(rewards))
environment.close()
print(f"return in the recovered environment: {np.mean(returns):.1f} over {len(returns)} episodes")
