"""The tables of a run's configuration, one class each: keys, defaults and what is allowed."""

from typing import Annotated, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedaudit.config.texts import (
    Device,
    IntList,
    NumberList,
    Observer,
    Observers,
    Quantities,
    TriggerText,
    named_parts,
    one_of,
    pieces_of,
)
from fedaudit.registry import ATTACKS, DATASETS, DEFENSES, MEASURES, MODELS, PARTITIONERS
from fedaudit.spec import parse_specs


class Section(BaseModel):
    """A table of the configuration: kebab-case keys, nothing unknown, checked, frozen."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
    )


class DataConfig(Section):
    """What the clients train on."""

    name: Annotated[str, one_of(DATASETS)] = "digits"
    root: str = Field("data", description="folder (or .npz file) of datasets that are not embedded")
    download: bool = Field(False, description="let torchvision download a missing dataset")
    partitioner: Annotated[str, one_of(PARTITIONERS)] = "iid"
    test_fraction: float = Field(0.2, gt=0, lt=1, description="share held by the server for testing")
    reference_fraction: float = Field(
        0.1, ge=0, lt=1, description="share the auditing server owns as public data"
    )
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the clients' data the server evaluates on, not on the test set"
    )
    max_examples: int = Field(0, ge=0, description="use only this many examples; 0 is all")


class ModelConfig(Section):
    """What is trained."""

    name: Annotated[str, one_of(MODELS)] = "mlp"


class FederationConfig(Section):
    """Who takes part, how often, and where it runs."""

    clients: int = Field(10, ge=2)
    rounds: int = Field(10, ge=1)
    fraction_train: float = Field(1.0, gt=0, le=1, description="share of clients sampled per round")
    evaluate_every: int = Field(
        1, ge=1, description="server-side evaluation every this many rounds, and at the end"
    )
    engine: Literal["in-process", "ray", "deployment"] = "in-process"
    device: Device = "auto"
    workers: int = Field(1, ge=1, description="threads (in-process) or actors (ray)")
    gpu_share: float = Field(0.0, ge=0, le=1, description="share of a GPU per ray actor")
    round_timeout: float = Field(3600.0, gt=0, description="seconds to wait for replies")
    reject_bad_updates: bool = Field(True, description="hand an invalid update on as a failed client")


class StrategyConfig(Section):
    """The Flower strategy that aggregates."""

    name: Annotated[str, named_parts(None, at_least=1, at_most=1)] = "FedAvg"


class TrainConfig(Section):
    """Local training."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = Field(0.1, gt=0)
    lr_decay: float = Field(1.0, gt=0, le=1, description="factor on lr after every round")
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    batch_size: int = Field(16, ge=1)
    local_epochs: int = Field(1, ge=1)
    local_steps: int = Field(0, ge=0, description="steps per round instead of epochs; 0 means epochs")


class DefenseConfig(Section):
    """What protects the updates."""

    name: Annotated[str, one_of(DEFENSES)] = "none"


class AuditConfig(Section):
    """What is measured, by whom, how often."""

    measures: Annotated[str, named_parts(MEASURES)] = "cohort-gradient-uniqueness, update-norm, update-cosine"
    observers: Observers = "server"
    every: int = Field(1, ge=1, description="audit every this many rounds, the first and the last always")
    strict: bool = Field(False, description="stop on a skipped or failed measure")
    save_updates: bool = Field(False, description="keep raw updates of audited rounds as safetensors")
    verify: bool = Field(False, description="test what defense and strategy claim in every audited round")

    @property
    def observer_names(self) -> tuple[Observer, ...]:
        """The observers that measure."""
        return cast(tuple[Observer, ...], pieces_of(self.observers))


class AttackConfig(Section):
    """Which attacks run on which intercepted updates."""

    names: Annotated[str, named_parts(ATTACKS)] = ""
    rounds: IntList = Field("1", description="rounds whose updates are attacked")
    clients: int = Field(1, ge=1, description="how many of the round's clients are attacked")
    trigger: TriggerText = Field(
        "", description="attack clients for whom this holds, too: 'mutual-information > 3'"
    )
    save_images: bool = Field(False, description="keep originals and reconstructions for the report")
    lpips: bool = Field(False, description="score images by LPIPS too, if its weights are on this machine")


class CompareConfig(Section):
    """What `fedaudit compare` sets side by side."""

    defenses: Annotated[str, named_parts(DEFENSES, at_least=1)] = "none, dp-sgd"
    seeds: IntList = "0"
    vary: str = Field(
        "", description="further keys and their values: 'train.batch-size: 8 | 32; data.name: a | b'"
    )
    baseline: Annotated[str, named_parts(DEFENSES, at_most=1)] = Field(
        "", description="the defense that others are subtracted from; empty is none, else the first"
    )
    against: Quantities = Field(
        "", description="quantities drawn against accuracy; empty is all leakage and attack columns"
    )

    @model_validator(mode="after")
    def _baseline_is_compared(self) -> Self:
        listed = [str(spec) for spec in parse_specs(self.defenses)]
        if any(str(spec) not in listed for spec in parse_specs(self.baseline)):
            raise ValueError(
                f"compare.baseline is one of compare.defenses, got {self.baseline!r}: "
                f"choose from {'; '.join(listed)}"
            )
        return self


class TuneConfig(Section):
    """What `fedaudit tune` varies: every combination, or some of them, each one training per seed."""

    defense: str = Field(
        "dp-sgd(epsilon=8, clip-norm={clip}, lr={lr}, batch-size={batch-size})",
        description="a defense in which {lr}, {clip} and {batch-size} stand for what is varied",
    )
    lr: NumberList = Field("0.1, 0.3, 1", description="learning rates; empty varies none")
    clip: NumberList = Field("0.1, 0.3, 1", description="values of {clip}")
    batch_size: NumberList = Field("16, 64", description="batch sizes, whole numbers")
    trials: int = Field(0, ge=0, description="most combinations, drawn by the seed; 0 is all")
    rounds: int = Field(0, ge=0, description="rounds of a trial; 0 is federation.rounds")
    seeds: IntList = "0"
    validation_fraction: float = Field(0.2, gt=0, lt=1, description="share of the clients' data to score on")


class CalibrateConfig(Section):
    """What `fedaudit calibrate` attacks."""

    examples: int = Field(4, ge=1, description="examples of a client and round, reconstructed together")
    repetitions: int = Field(64, ge=4, description="local rounds repeated with and without an example")


class OutputConfig(Section):
    """Where results go."""

    directory: str = "runs"
    name: str = Field("", description="folder of the run inside directory; empty is <defense>-seed<seed>")
    resume: bool = Field(False, description="continue the run in that folder from its last complete round")
