"""What each recipe can be told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

from pydantic import Field, model_validator

from iql_torchrl.configuration.declaring import Options, option
from iql_torchrl.configuration.options import (
    WIDTHS,
    AlgorithmOptions,
    CheckpointOptions,
    EnvironmentOptions,
    EvaluationOptions,
    FittedQOptions,
    LoggerOptions,
    OnlineOptions,
    RLinfActor,
    Seed,
    Selection,
    Sizes,
    TrainOptions,
    Widths,
)
from iql_torchrl.data.sources import HELD, KINDS
from iql_torchrl.data.sources.source import PathText, Source
from iql_torchrl.errors import ConfigurationError

if TYPE_CHECKING:
    SomeSource = Source
else:
    SomeSource = Annotated[Union[KINDS + HELD], Field(discriminator="source")]  # noqa: UP007

_DEVICE = "auto, cpu or cuda"
_NUM_SAMPLES = option("draws of the policy of which a decision takes one by Q; null: as in the run", ge=1, default=None)
_SELECTION = option("which of the draws; null: as in the run", default=None)


class StartOptions(CheckpointOptions):
    """When a checkpoint is written, how many stay, and what the run starts from."""

    start: PathText | None = option(
        "networks that are trained on, also as checkpoint=PATH; null: new ones",
        expected="a run folder, a checkpoint, networks of CORL, JAX or TorchRL, or null",
    )


class RunOptions(Options):
    """Of every recipe that trains."""

    dataset: SomeSource = Field()
    algorithm: AlgorithmOptions
    env: EnvironmentOptions
    train: TrainOptions
    eval: EvaluationOptions
    checkpoint: StartOptions
    logger: LoggerOptions
    resume: str | None = option(
        "what to go on from; auto: the newest good checkpoint in run_dir", expected="a checkpoint file, auto or null"
    )
    resume_with_changes: bool = option(
        "go on although options are changed on which what is learnt depends", learnt=False
    )
    run_dir: PathText = option("folder of the run; of a multirun, whose jobs have folders in it", expected="a folder")

    @model_validator(mode="after")
    def _whole_calls(self) -> RunOptions:
        at_once = self.train.updates_per_call
        for key in ("train.steps", "train.log_interval", "eval.interval", "checkpoint.interval"):
            section, _, name = key.partition(".")
            value = getattr(getattr(self, section), name)
            if value % at_once:
                raise ConfigurationError(f"{key} must be a multiple of train.updates_per_call={at_once}, got {value}.")
        return self


class OfflineOptions(RunOptions):
    """Of ``recipes/iql_offline.py``."""

    rlinf: PathText | None = option(
        "a configuration file of RLinf, whose options then replace the defaults",
        expected="a configuration file of RLinf, or null",
    )
    actor: RLinfActor | None = option("the kind of worker", source="RLinf's key", default=None)


class OfflinePhase(TrainOptions):
    """Of a run that goes on online."""

    steps: int = option("updates on the dataset before, where no checkpoint is given", learnt=False, ge=0)


class FinetuneOptions(RunOptions):
    """Of ``recipes/iql_finetune.py``."""

    train: OfflinePhase  # pyright: ignore[reportIncompatibleVariableOverride]
    online: OnlineOptions

    @model_validator(mode="after")
    def _judged_by_a_dataset(self) -> FinetuneOptions:
        if self.eval.offline:
            raise ConfigurationError(
                "eval.offline must be false in a run that goes on online; judge its checkpoints with recipes/judge.py."
            )
        return self

    @model_validator(mode="after")
    def _calls_between_steps(self) -> FinetuneOptions:
        at_once, between = self.train.updates_per_call, self.online.updates_per_step * self.online.num_envs
        if between % at_once:
            raise ConfigurationError(
                f"train.updates_per_call={at_once} must divide online.updates_per_step * online.num_envs = {between}, "
                "the updates between two steps of the environments."
            )
        return self


class EvaluateOptions(Options):
    """Of ``recipes/evaluate.py``."""

    checkpoint: PathText = option("of the policy", expected="a run folder or a checkpoint file", example="RUN_OR_FILE")
    best: bool = option("of a run folder, the checkpoint of the best evaluation in place of the newest")
    num_samples: int | None = _NUM_SAMPLES
    selection: Selection | None = _SELECTION
    episodes: int = option("how many", ge=1)
    seed: Seed = option("of the first episode; each further one has the next")
    device: str = option("where the policy runs", expected=_DEVICE)
    video: bool = option("write the best and the worst episode as MP4")
    output: PathText | None = option(
        "folder of the videos; null: videos, beside the checkpoint", expected="a folder, or null"
    )
    env: EnvironmentOptions


class ExportOptions(Options):
    """Of ``recipes/export.py``."""

    checkpoint: PathText = option("of the policy", expected="a run folder or a checkpoint file", example="RUN_OR_FILE")
    best: bool = option("of a run folder, the checkpoint of the best evaluation in place of the newest")
    output: PathText = option(
        "the file: ONNX, or a program of torch.export", expected="a file name that ends in .onnx or .pt2"
    )
    num_samples: int | None = _NUM_SAMPLES
    selection: Selection | None = _SELECTION
    opset: int | None = option("version of ONNX's operators; null: 18", ge=18, le=25)
    latency: bool = option("also measure how long one action takes on one core")

    @model_validator(mode="after")
    def _one_format(self) -> ExportOptions:
        suffix = Path(self.output).suffix
        if suffix not in (".onnx", ".pt2"):
            raise ConfigurationError(f"output must end in .onnx, or in .pt2 for torch.export, got {self.output}.")
        if suffix == ".pt2" and self.opset is not None:
            raise ConfigurationError(f"opset={self.opset} is of ONNX, and output={self.output} is not; leave it out.")
        return self


class InspectOptions(Options):
    """Of ``recipes/inspect_dataset.py``."""

    dataset: SomeSource = Field()
    env: EnvironmentOptions
    output: PathText = option("folder of report.json and report.png", expected="the name of a file or folder")


class JudgeOptions(Options):
    """Of ``recipes/judge.py``."""

    checkpoints: Annotated[list[PathText], Field(min_length=1)] = option(
        "checkpoint files, run folders (the newest of each seed), folders of these, and patterns",
        expected="a list of files, folders and patterns such as [runs/hopper,runs/*/checkpoints/*.pt]",
        example="'[runs/hopper-*]'",
    )
    best: bool = option("of run folders, the checkpoint of the best evaluation in place of the newest")
    output: PathText = option("folder of judge.json, judge.csv and judge.png", expected="a folder")
    dataset: SomeSource | None = Field(default=None)
    env: EnvironmentOptions
    episodes: int = option("of each policy in the simulator, to see how far the figures can be trusted; 0: none", ge=0)
    discount: float | None = option("of future rewards; null: that of the first run", ge=0, le=1)
    behaviour_cloning_steps: int = option("updates of a policy that clones the data, judged beside; 0: none", ge=0)
    seed: Seed = option("of resamples, networks, draws and episodes")
    device: str = option("of the critics", expected=_DEVICE)
    fitted_q: FittedQOptions


class ReportOptions(Options):
    """Of ``recipes/report.py``."""

    runs: Annotated[list[PathText], Field(min_length=1)] = option(
        "run folders, folders of runs such as that of a sweep, and patterns of both",
        expected="a list of folders and patterns such as [runs/hopper-*,runs/sweep]",
        example="'[runs/hopper-*]'",
    )
    output: PathText = option("folder of report.html, its pictures and table.csv", expected="a folder")


class BehaviourOptions(Options):
    """A behaviour policy that SAC trains."""

    steps: int = option("of the environment, an update after each beyond the warm-up", ge=1)
    warm_up: int = option("first steps, with uniform actions and no updates", ge=0)
    learning_rate: float = option("of Adam, for all networks", gt=0, allow_inf_nan=False)
    discount: float = option("of future rewards", ge=0, le=1)
    batch_size: int = option("transitions of an update", ge=1)
    hidden_dims: Widths = option("widths of every network's hidden layers", expected=WIDTHS)
    evaluation_interval: int = option("steps between two evaluations, at one of which the policy is medium", ge=1)
    evaluation_episodes: int = option("episodes of an evaluation", ge=1)
    checkpoint_interval: int = option("steps that are done again after a kill, at most", learnt=False, ge=1)


class RolloutOptions(Options):
    """The sets in which a policy stays as it is."""

    steps: int = option("of each set, at which the last episode goes on to its end", ge=1)
    sample_actions: bool = option("draw actions from the policy's distribution; false: its mean", source="D4RL: true")


class CollectedEnvironment(EnvironmentOptions):
    """The environment that data are collected in."""

    name: str = option(  # pyright: ignore[reportIncompatibleVariableOverride]
        "Gymnasium id of a task with continuous actions", expected="a Gymnasium id", example="Hopper-v5"
    )


class CollectOptions(Options):
    """Of ``recipes/collect_dataset.py``."""

    env: CollectedEnvironment
    output: PathText = option("folder of Minari datasets, new or not", expected="a folder", example="FOLDER")
    policy: PathText | None = option(
        "what acts, in place of a policy that is trained for it",
        expected="a checkpoint of this package, a run folder, module:function or null",
    )
    name: str | None = option("of the set that policy makes", expected="letters, digits, - and _, or null")
    seed: Seed = option("of training, environments and actions")
    overwrite: bool = option("replace sets of these names that are there", learnt=False)
    author: str | None = option("for the metadata", learnt=False)
    code_permalink: str | None = option("for the metadata: where the code that made the data is", learnt=False)
    training: BehaviourOptions
    rollouts: RolloutOptions

    @model_validator(mode="after")
    def _named(self) -> CollectOptions:
        if self.policy is not None and not re.fullmatch(r"[\w-]+", self.name or "", re.ASCII):
            raise ConfigurationError(
                f"name must be letters, digits, - and _ with policy={self.policy}, got {self.name!r}; it becomes the "
                "last part of the dataset's id."
            )
        if self.policy is None and self.name is not None:
            raise ConfigurationError(
                f"name={self.name} is for the set of a policy; give policy=CHECKPOINT or policy=module:function too, "
                "or leave name out: a training makes five sets, each with a name of its own."
            )
        return self


class UpdateOptions(Sizes):
    """An update that is timed: its networks, its batch, and how often."""

    batch_size: int = option("transitions of an update", ge=1)
    hidden_dims: Widths = option("widths of every network's hidden layers", expected=WIDTHS)
    transitions: int = option("rows of random numbers", ge=1)
    compile: bool = option("false: the eager step alone")
    rounds: int = option("of the measurement, in which rows take turns", ge=1)
    steps_per_round: int = option("updates of each row in a round", ge=1)
    warm_up: int = option("updates that are not counted", ge=1)
    seed: Seed = option("of the random numbers")
    output: PathText = option("the file of the results", expected="the name of a file or folder")


_PlainCase = Literal[
    "locomotion", "antmaze", "ogbench_256", "ogbench_1024", "discrete", "calls_8", "seeds_4", "seeds_16"
]
CaseName = Literal[_PlainCase, "ddpgbc", "flow", "diffusion"]

# Of the first case of the full suite, which the others differ from.
_FULL_SUITE: dict[str, Any] = {
    "observation_dim": 17,
    "action_dim": 6,
    "hidden_dims": [256, 256],
    "batch_size": 256,
    "seeds": 4,
    "updates_per_call": 8,
}


class BenchmarkOptions(UpdateOptions):
    """Of ``recipes/benchmark.py``."""

    suite: Literal["update", "full", "online"] = option(
        "update: one case, of the sizes below; full: the cases, of their own; online: the loops of fine-tuning"
    )
    cases: Annotated[list[CaseName], Field(min_length=1)] | None = option(
        "of suite=full; null: all", expected=f"a list of {', '.join(get_args(CaseName))}, or null"
    )
    seeds: int = option("trained at once in the row for several", ge=1)
    stacked_seeds: Literal["auto", True, False] = option("as train.stacked_seeds", default="auto")
    updates_per_call: int = option("in the rows for several", ge=1)
    precision: Literal["float32", "tf32", "bfloat16", "float64"] = option("of the matrix products")
    device: str = option("of all rows", expected=_DEVICE)

    @model_validator(mode="after")
    def _cases_have_sizes(self) -> BenchmarkOptions:
        if self.suite != "full" and self.cases is not None:
            raise ConfigurationError(f"cases must be null with suite={self.suite}, got {self.cases}; give suite=full.")
        if self.suite == "full":
            for name, own in _FULL_SUITE.items():
                value = getattr(self, name)
                if value != own:
                    raise ConfigurationError(
                        f"{name} must be {own} with suite=full, whose cases have their own, got {value}; choose with "
                        "cases, or give suite=update."
                    )
        return self


class StorageBenchmarkOptions(UpdateOptions):
    """Of ``recipes/benchmark_storage.py``."""

    storages: Annotated[list[Literal["memory", "memmap"]], Field(min_length=1)] = option(
        "measured one after the other", expected="a list of memory and memmap"
    )
    folder: PathText | None = option(
        "for the log and the mapped files; null: a temporary one", expected="a folder, or null"
    )
