"""Three seeds at once, and how sure their mean is: `python recipes/examples/many_seeds.py [--steps 30000]`.

Prints the final score of every seed, their mean and its 95% bootstrap interval, and an action of the best seed's
policy. Each seed is trained as it would be by itself.
"""

# The same from the command line, with curves, checkpoints and summary.json in the folder of the run:
#
#     python recipes/iql_offline.py train.num_seeds=3

import argparse

from iql_torchrl import load_transitions, train

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=30_000)
parser.add_argument("--episodes", type=int, default=20, help="of every evaluation")
arguments = parser.parse_args()

transitions = load_transitions("embedded")
run = train(
    transitions,
    environment="Hopper-v5",
    steps=arguments.steps,
    seed=0,  # and the next two
    options={"train.num_seeds": 3, "eval.episodes": arguments.episodes},
)
scores = run.summary["final_scores"]
low, high = run.summary["mean_interval"]
for seed, score in scores.items():
    print(f"seed {seed}: {run.summary['score']} {score:.1f}")
print(f"mean {run.summary['mean']:.1f}, 95% interval {low:.1f} to {high:.1f}")

best = max(scores, key=scores.get)
policy = run.policies[list(scores).index(best)]
print(f"seed {best} acts:", policy(transitions["observation"][0]))
