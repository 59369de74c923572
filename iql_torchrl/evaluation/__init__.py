"""Vectorised rollouts, normalised scores and stored policies."""

from iql_torchrl.evaluation.environments import Spaces, make_environment, spaces_of
from iql_torchrl.evaluation.policy import Policy, load_policy
from iql_torchrl.evaluation.rollouts import Evaluation, Evaluator
from iql_torchrl.evaluation.scores import normalised_score, reference_returns
from iql_torchrl.evaluation.specification import EnvironmentSpec

__all__ = [
    "EnvironmentSpec",
    "Evaluation",
    "Evaluator",
    "Policy",
    "Spaces",
    "load_policy",
    "make_environment",
    "normalised_score",
    "reference_returns",
    "spaces_of",
]
