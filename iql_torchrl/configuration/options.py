"""The options of algorithm, networks, training step and run. Their values are in ``configs/``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from iql_torchrl.configuration.declaring import Options, option
from iql_torchrl.errors import ConfigurationError

Width = Annotated[int, Field(ge=1)]
Widths = Annotated[list[Width], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Precision = Literal["float32", "tf32", "bfloat16"]
Selection = Literal["largest", "expectile", "exponential"]
ActionSpace = Literal["categorical", "one_hot", "mult_one_hot", "binary"]
NetworkName = Literal["actor", "value", "critic"]

WIDTHS = "a list of at least one positive width such as [256,256]"
_APPENDIX = "paper, appendix B"
_CODE = "the paper's code"


def _in_order(bounds: list[float]) -> list[float]:
    if not bounds[0] < bounds[1]:
        raise ValueError("not in order")
    return bounds


def _with_step_limit(kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    limit = (kwargs or {}).get("max_episode_steps")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError("no step limit")
    return kwargs


class Sizes(Options):
    """Of observations and actions."""

    observation_dim: int = option("numbers of an observation", ge=1)
    action_dim: int = option("numbers of an action", ge=1)


class AlgorithmOptions(Options):
    """The losses, the networks, and what is done to the data for them."""

    loss_type: Literal["offline_iql"] = option("kind of algorithm", source="RLinf's key")
    variant: str = option(
        "implementation that is followed; sets the options of configs/variant",
        expected="one of the files in configs/variant: paper, rlinf, corl, torchrl",
    )
    batch_size: int = option("transitions in the batch of an update, of all processes together", ge=1, source=_APPENDIX)
    actor_lr: float = option("Adam's learning rate of the policy", ge=0, allow_inf_nan=False, source=_APPENDIX)
    value_lr: float = option("Adam's learning rate of V", ge=0, allow_inf_nan=False, source=_APPENDIX)
    critic_lr: float = option("Adam's learning rate of the critics", ge=0, allow_inf_nan=False, source=_APPENDIX)
    hidden_dims: Widths = option("widths of every network's hidden layers", expected=WIDTHS, source=_APPENDIX)
    discount: float = option("discount of the return, gamma", ge=0, le=1, source=_APPENDIX)
    gamma: float | None = option("another name of discount", ge=0, le=1, source="RLinf's key")
    tau: float = option("Polyak coefficient of the target update", gt=0, le=1, source=_APPENDIX)
    expectile: float = option(
        "expectile of V's regression, tau: 0.5 is a mean, 1 the largest", gt=0, le=1, source="paper, equation 5"
    )
    value_loss: Literal["expectile", "gumbel"] = option(
        "regression of V: an expectile, or XQL's Gumbel regression, for which expectile is without meaning",
        source="paper, equation 5; XQL (Garg et al. 2023)",
        default="expectile",
    )
    gumbel_temperature: float = option(
        "temperature of the Gumbel regression, XQL's beta: V is beta log E exp(Q / beta), near 0 the largest Q",
        gt=0,
        allow_inf_nan=False,
        source="XQL's code: temp",
        default=1.0,
    )
    gumbel_clip: float = option(
        "upper clip of (Q - V) / gumbel_temperature; inf: none", gt=0, source="XQL's code: max_clip", default=7.0
    )
    temperature: float = option(
        "inverse temperature beta of the advantage weights; 0 is behaviour cloning",
        ge=0,
        allow_inf_nan=False,
        source="paper, equation 7",
    )
    max_weight: float = option("upper clip of the advantage weights", gt=0, source=_CODE)
    delay_value: bool = option("give V target parameters of its own, for V(s') and the advantage", source="RLinf")
    num_qvalue_nets: int = option("number of critics", ge=1, source=_CODE)
    num_sampled_qvalue_nets: int | None = option(
        "critics whose targets count, drawn anew for each update; null: all of them",
        ge=1,
        source="REDQ (Chen et al. 2021), RLPD (Ball et al. 2023): 2 of 10",
        default=None,
    )
    qvalue_aggregation: Literal["min", "mean"] = option(
        "of the target critics, what counts: the smallest, or the mean", source=f"{_CODE}; FQL's q_agg", default="min"
    )
    dropout_rate: float | None = option(
        "dropout in the policy's hidden layers", ge=0, lt=1, source="paper, appendix B, for Kitchen and Adroit"
    )
    layer_norm: bool | list[NetworkName] = option(
        "layer normalisation in the hidden layers: of every network, of none, or of those that are named",
        expected="true, false, or a list of actor, value and critic such as [value,critic]",
        source="OGBench, FQL: [value,critic]",
    )
    activation: Literal["relu", "tanh", "gelu", "silu", "elu"] = option(
        "activation of every network's hidden layers", source=_APPENDIX
    )
    opt_decay_schedule: Literal["cosine", "periodic_cosine", None] = option(
        "schedule of the policy's learning rate: to 0 over train.steps, the same and up again after them, or constant",
        source=f"{_CODE}; periodic: CORL's, where it goes on online",
    )
    reward_transform: Literal["none", "return_range", "minus_one"] = option(
        "rewards as they are, x 1000 / (largest - smallest return of an episode), or - 1", source=_APPENDIX
    )
    update_order: Literal["sequential", "joint"] = option(
        "V first and the others with the new V, or all losses at the old parameters", source=_CODE
    )
    qvalue_reduction: Literal["sum", "mean"] = option("reduction of the Q loss over the critics", source=_CODE)
    policy: Literal["tanh_mean_normal", "tanh_normal", "normal", "deterministic"] = option(
        "policy: Normal around a squashed mean, squashed Normal, Normal, or a point trained by squared error",
        source=_CODE,
    )
    standard_deviation: Literal["state_independent", "state_dependent", "biased_softplus", "constant"] = option(
        "the policy's standard deviation: learnt, from the state, TorchRL's from the state, or 1",
        source=f"{_CODE}; constant: OGBench's GCIQL",
    )
    log_std_bounds: Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(_in_order)] = option(
        "the policy's log standard deviation is clipped to these",
        expected="two ordered numbers such as [-5,2]",
        source=_CODE,
    )
    extraction: Literal["awr", "ddpgbc", "flow", "diffusion"] = option(
        "how the policy is taken from Q and V: weights on the data's actions (the paper's), the gradient of Q beside "
        "behaviour cloning, or the best by Q of the draws of a flow or a diffusion",
        source="OGBench: ddpgbc; IFQL: flow; IDQL: diffusion",
        default="awr",
    )
    behaviour_cloning_coefficient: float = option(
        "weight of behaviour cloning beside Q, alpha, with extraction=ddpgbc",
        ge=0,
        allow_inf_nan=False,
        source="OGBench's GCIQL: 0.3, 1 on its manipulation tasks",
        default=0.3,
    )
    flow_steps: int = option("Euler steps of a draw with extraction=flow", ge=1, source="IFQL", default=10)
    diffusion_steps: int = option(
        "steps of the diffusion with extraction=diffusion", ge=1, le=1000, source="IDQL", default=5
    )
    noise_schedule: Literal["vp", "cosine", "linear"] = option(
        "of the noise that these add: variance preserving, cosine or linear", source="IDQL's code", default="vp"
    )
    residual_blocks: int = option(
        "of the network with extraction=diffusion, whose width is the last of hidden_dims",
        ge=1,
        source="IDQL",
        default=3,
    )
    actor_tau: float = option(
        "Polyak coefficient of the average of the policy, which acts with extraction=diffusion",
        gt=0,
        le=1,
        source="IDQL",
        default=0.001,
    )
    extra_actor_layer: bool = option("one more hidden layer of the last width in the policy", source="RLinf")
    initialisation: Literal["orthogonal", "default"] = option(
        "of the networks: orthogonal with gain sqrt(2) and biases 0, or PyTorch's", source=_CODE
    )
    normalise_observations: bool = option("(observation - mean) / (std + 0.001) over the training data", source="CORL")
    action_clip: float = option(
        "the data's actions are clipped to +-(1 - this), after rescaling", ge=0, lt=1, source=_CODE
    )
    replacement: bool = option("draw batches with replacement, or in shuffled passes", source=_CODE)

    @model_validator(mode="after")
    def _enough_critics(self) -> AlgorithmOptions:
        if (self.num_sampled_qvalue_nets or 1) > self.num_qvalue_nets:
            raise ConfigurationError(
                f"algorithm.num_sampled_qvalue_nets must be at most algorithm.num_qvalue_nets={self.num_qvalue_nets}, "
                f"got {self.num_sampled_qvalue_nets}; raise that, or give null for all of them."
            )
        return self


class RLinfTask(Options):
    """``env.train`` in the files of RLinf's documentation."""

    env_type: Literal["d4rl"] = option("the kind of environment", source="RLinf's key")
    env_name: str = option("the dataset", expected="the name of a dataset", source="RLinf's key")


class RLinfActor(Options):
    """``actor`` in the files of RLinf's documentation."""

    worker_cls: Literal["iql"] = option("the kind of worker", source="RLinf's key")


class EnvironmentOptions(Options):
    """The environment of the evaluation."""

    name: str | None = option(
        "Gymnasium id; auto: the one that the data come from; null: no simulator",
        expected="a Gymnasium id, auto or null",
    )
    kwargs: Annotated[dict[str, Any] | None, AfterValidator(_with_step_limit)] = option(
        "further arguments of gymnasium.make",
        expected="a mapping such as {max_episode_steps:500}, that one an integer >= 1",
    )
    dataset_type: Literal["d4rl"] | None = option("the kind of dataset", source="RLinf's key", default=None)
    train: RLinfTask | None = option("the dataset", source="RLinf's key", default=None)


class TrainOptions(Options):
    """How long, from which seeds and how fast."""

    steps: int = option("number of updates", learnt=False, ge=1, source="paper: 1,000,000")
    seed: Seed = option("random seed of the first run")
    num_seeds: int = option("seeds train.seed, +1, ... are trained at once, each as it would be by itself", ge=1)
    stacked_seeds: Literal["auto", True, False] = option(
        "compute them in one kernel, faster on a GPU, for small networks and without a compiler, each equal to itself "
        "alone but for rounding and draws; auto: on a GPU, and where a run resumed on a CPU did",
        learnt=False,
        default="auto",
    )
    device: str = option(
        "where the networks are; auto: on the GPU where there is one",
        learnt=False,
        expected="auto, cpu, cuda, cuda:1, ...",
    )
    compile: Literal["auto", True, False] = option(
        "compile the step; auto: where a C++ compiler is found, or Triton for a GPU",
        learnt=False,
    )
    cudagraphs: Literal["auto", True, False] = option(
        "launch all updates of a call as one CUDA graph; auto: on a GPU", learnt=False
    )
    updates_per_call: int = option("updates that a call of the step does", learnt=False, ge=1)
    precision: Precision = option("precision of the matrix products; tf32 and bfloat16 (autocast) round more")
    products: Literal["auto", "mkl", "onednn", "tensor_cores"] = option(
        "float32 matrix products: PyTorch's own (mkl), oneDNN's on a CPU, or on a GPU's tensor cores with float32's "
        "accuracy; auto: the faster ones",
        learnt=False,
    )
    log_interval: int = option("updates between rows of metrics.csv", learnt=False, ge=1)

    @property
    def seeds(self) -> range:
        """``num_seeds`` seeds from ``seed`` on."""
        return range(self.seed, self.seed + self.num_seeds)

    @model_validator(mode="after")
    def _seeds_in_range(self) -> TrainOptions:
        if self.seed + self.num_seeds > 2**32:
            raise ConfigurationError("train.seed + train.num_seeds must not exceed 2^32.")
        return self


class EvaluationOptions(Options):
    """When and how long the policy is evaluated."""

    interval: int = option("updates between evaluations", learnt=False, ge=1, source="paper's code: 5,000")
    episodes: int = option("episodes of an evaluation", learnt=False, ge=1, source="paper: 10, AntMaze 100")
    timeout: float | None = option(
        "seconds in which simulators must answer, in a process that is restarted once; null: the run's own, unbounded",
        learnt=False,
        gt=0,
        allow_inf_nan=False,
    )
    num_samples: int | None = option(
        "draws of the policy of which a decision takes one by Q; null: 1, the distribution's mean, with "
        "extraction=awr and ddpgbc, and 32 with the others",
        learnt=False,
        ge=1,
        source="IFQL: 32; IDQL: 64",
        default=None,
    )
    selection: Selection = option(
        "which of the draws: that of the largest Q, or one drawn with the weights of V's expectile, or of awr",
        learnt=False,
        source="IDQL",
        default="largest",
    )
    offline: bool = option(
        "at the end, fitted Q evaluation of the policy on the data, for summary.json", learnt=False, default=False
    )
    offline_steps: int = option("updates of each of its critics", learnt=False, ge=1, default=10_000)


class FittedQOptions(Options):
    """The critics of fitted Q evaluation, and how they are trained."""

    steps: int = option("updates of each critic", ge=1, default=10_000)
    batch_size: int = option("transitions of an update of each critic", ge=1, default=256)
    hidden_dims: Widths = option("widths of the critics' hidden layers", expected=WIDTHS, default=[256, 256])
    layer_norm: bool = option("normalise each hidden layer before its activation", default=False)
    learning_rate: float = option("of Adam", gt=0, allow_inf_nan=False, default=3e-4)
    tau: float = option("Polyak coefficient of the target critics", gt=0, le=1, default=0.02)
    resamples: int = option("critics more, each on resampled episodes, for the interval; 0: none", ge=0, default=5)
    compile: Literal["auto", True, False] = option(
        "compile the update; auto: where a C++ compiler is found, or Triton for a GPU", default="auto"
    )


class OnlineOptions(Options):
    """How a policy is trained on in its environment."""

    protocol: str = option(
        "how it is done; sets the options of configs/protocol",
        expected="one of the files in configs/protocol: paper, corl, rlpd, wsrl",
    )
    steps: int = option("steps of the environments of each seed", learnt=False, ge=1, source="paper: 1,000,000")
    offline_fraction: float | None = option(
        "share of each batch that is from the dataset; null: batches are drawn uniformly from it and what was added",
        ge=0,
        le=1,
        source="RLPD: 0.5",
    )
    anneal_to: float | None = option(
        "offline_fraction at the end, to which it changes linearly; null: it stays", ge=0, le=1
    )
    warmup_steps: int = option("of the steps, those with the policy as it is before the first update", ge=0)
    updates_per_step: int = option("updates for a step of an environment", ge=1, source="RLPD: up to 20")
    sample_actions: bool = option("draw actions from the policy's distribution, or take its mean", source=_CODE)
    exploration_noise: float = option(
        "standard deviation of what is added to an action in [-1, 1]", ge=0, allow_inf_nan=False
    )
    num_envs: int = option("environments of each seed; with several, they step beside the updates", ge=1)
    timeout: float = option(
        "seconds in which the environments must answer, in a process that is restarted when they do not",
        learnt=False,
        gt=0,
        allow_inf_nan=False,
    )

    @model_validator(mode="after")
    def _consistent(self) -> OnlineOptions:
        mistakes = []
        if self.steps % self.num_envs or self.warmup_steps % self.num_envs:
            mistakes.append(
                f"online.steps and online.warmup_steps must be multiples of online.num_envs={self.num_envs}, got "
                f"{self.steps} and {self.warmup_steps}."
            )
        if self.warmup_steps >= self.steps:
            mistakes.append(
                f"online.warmup_steps must be below online.steps={self.steps}, got {self.warmup_steps}: no update "
                "would be done."
            )
        if self.anneal_to is not None and self.offline_fraction is None:
            mistakes.append("online.anneal_to needs online.offline_fraction, from which it starts, and that is null.")
        if not self.sample_actions and not self.exploration_noise:
            mistakes.append(
                "online.sample_actions=false explores nothing by itself; give online.exploration_noise=0.1 or so."
            )
        if mistakes:
            raise ConfigurationError(*mistakes)
        return self


class CheckpointOptions(Options):
    """When a checkpoint is written, and how many stay."""

    interval: int = option("updates between checkpoints", learnt=False, ge=1)
    keep: int = option("how many of the newest checkpoints stay", learnt=False, ge=1)


class LoggerOptions(Options):
    """Where metrics go besides the run folder."""

    kind: Literal["csv", "wandb", "tensorboard"] = option(
        "what else is written than the run folder's files", learnt=False
    )
    mode: str = option("of wandb: online or offline", learnt=False, expected="online or offline", default="offline")
    project: str = option("of wandb", learnt=False, default="iql_torchrl")
