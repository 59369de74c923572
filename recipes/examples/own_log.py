"""A policy from your own log, without a simulator: `python recipes/examples/own_log.py [--log FILE.npz]`.

Without a file it trains on a log made up here, of a noisy controller that brings a mass on a line to rest at 0. Prints
how likely the policy finds the actions of episodes that training does not see, then an action for a new observation,
from the policy at hand and from the one that is saved in the folder; run again, it goes on from there.
"""

import argparse

import numpy as np

from iql_torchrl import load_policy, train

parser = argparse.ArgumentParser()
parser.add_argument("--log", help="an .npz file with the arrays below")
parser.add_argument("--steps", type=int, default=5_000)
parser.add_argument("--folder", default="runs/own_log")
arguments = parser.parse_args()


def made_up_log(episodes: int = 100, length: int = 50) -> dict[str, np.ndarray]:
    """Position and velocity of the mass, the force on it, and what its distance and the force cost."""
    random, rows = np.random.default_rng(0), []
    for episode in range(episodes):
        state = random.normal(size=2)
        for _ in range(length):
            force = np.clip(random.normal(-state[0] - 1.5 * state[1], 0.3), -1, 1)
            rows.append((state, [force], -(state[0] ** 2) - 0.1 * force**2, False, episode))
            state = state + 0.1 * np.array([state[1], force])
    names = ("observations", "actions", "rewards", "terminals", "episode_ids")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


# Rows in the order of time. terminals: the episode ended by itself and nothing follows; none does here. episode_ids
# tell the episodes apart; instead, timeouts may flag the last row of each.
log = dict(np.load(arguments.log)) if arguments.log else made_up_log()

run = train(
    log,
    environment=None,  # a tenth of the episodes is held out
    steps=arguments.steps,
    folder=arguments.folder,
    resume=True,
    options={"eval.interval": max(1, arguments.steps // 5)},
)
for row in run.records.metrics():
    if "validation_log_prob" in row:
        print(f"step {row['step']:.0f}: held-out log-likelihood {row['validation_log_prob']:.3f}")

observation = log["observations"][0] * 0.9  # one that is not in the log
print("action:", run.policy(observation))
later = load_policy(f"{arguments.folder}/checkpoints/step-{arguments.steps:08d}.pt")  # in another process, say
print("action of the saved policy:", later(observation))
