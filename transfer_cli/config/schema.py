"""The typed configuration: every key outside the components' own, with its default.

A run's identity covers the values that differ from these defaults (`identity.py`), so a new key with a
default that changes nothing leaves old runs valid.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transfer_cli.errors import TransferError, check_choice

PROTOCOLS = ("inductive", "transductive")
LABEL_SPACES = ("closed", "partial", "open", "separate")
PRECISIONS = ("32", "bf16", "16")
STORAGE = ("auto", "memory", "files", "decoded")
CALIBRATIONS = ("none", "ts", "ts_map", "vector")
CONFORMAL = ("none", "split", "weighted", "target")
DOMAIN_BATCHES = ("joint", "separate", "domain_specific")
SWEEPS = ("grid", "points", "random", "optuna")


@dataclass
class Image:
    """How the images of both domains are brought to one shape; `auto` states its choice in the run's first lines."""

    size: Any = "auto"  # auto | pixels: the backbone's own size, else the larger of the two domains'
    channels: Any = "auto"  # auto | 1 | 3: the backbone's own, else the larger of the two domains'
    storage: str = "auto"  # auto | memory | files | decoded (files decoded once into a memory map beside the outputs)
    memory_limit_mb: int = 1024  # per domain; larger folders are read by workers under `auto`


@dataclass
class Split:
    """Shares held out, drawn by data_seed without looking at labels."""

    test: float = 1 / 3  # of a domain without a published test split
    validation: float = 0.1  # of source training samples (labelled) and of target training inputs (unlabelled)


@dataclass
class Subset:
    """Parts of the data: sizes, drawn by data_seed, and classes by name; null keeps all."""

    source: int | None = None
    source_per_class: int | None = None  # labelled source samples of each class, all of a smaller one
    target: int | None = None
    test: int | None = None
    source_classes: list[str] | None = None
    target_classes: list[str] | None = None


@dataclass
class Features:
    """What is done to frozen features before a method on features sees them."""

    normalise: list[str] = field(default_factory=list)  # row_sum, l2, zscore, zscore_domain, center_domain; in order
    reduce: str = "none"  # none | pca | nmf, fitted to both domains
    components: int = 50  # that the reduction keeps
    whiten: bool = False  # pca: components of variance one
    cache_gb: float = 10.0  # of features kept under outputs/cache/features; the longest unused go first


@dataclass
class Trainer:
    steps: int = 1500  # of every gradient phase that does not set its own
    batch_size: int = 64  # of each domain
    eval_batch_size: int = 512
    eval_every: int = 100
    checkpoint_every: int = 100
    log_every: int = 20
    clip_norm: float | None = None
    precision: str = "32"  # 32 | bf16 | 16
    channels_last: bool = True
    compile: bool = False
    ema: float | None = None  # decay of the average of weights that is evaluated and kept
    # joint: one forward over both domains (shared BatchNorm statistics) | separate | domain_specific: BatchNorm layers of each
    domain_batches: str = "separate"


@dataclass
class Sweep:
    """How `-m` makes its runs; none of them knows."""

    kind: str = "grid"  # grid | points | random | optuna; set by sweep=NAME
    n: int | None = None  # points of a search for each combination of the grid; also written n=20
    seed: int = 0  # of the points
    default: bool = True  # point 0 is the default configuration
    points: list[str] = field(default_factory=list)  # of sweep=points: each the words of one setting


@dataclass
class Config:
    source: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    then: dict[str, Any] = field(default_factory=dict)  # a second method, on the backbone that the first has trained
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    augment: dict[str, Any] = field(default_factory=dict)
    strong: dict[str, Any] = field(default_factory=dict)  # the augmentation of strong views
    head: dict[str, Any] = field(default_factory=dict)
    ood: dict[str, Any] = field(default_factory=dict)  # a third data set, which the model is to be unsure of
    trainer: Trainer = field(default_factory=Trainer)
    features: Features = field(default_factory=Features)
    image: Image = field(default_factory=Image)
    split: Split = field(default_factory=Split)
    subset: Subset = field(default_factory=Subset)
    protocol: str = "inductive"
    label_space: str = "closed"
    target_labels: Any = 0  # 0 | N (per class; in regression N in all) | all
    source_model: str | None = None  # a run's folder or its best.pt: the network that training starts from
    prior: str | None = (
        None  # a source's posterior that stands for the source: its file, or the folder of the run that wrote it
    )
    bottleneck: int | None = None  # width of a layer between backbone and head
    selection: str = (
        "auto"  # the validator that chooses the checkpoint: auto (im, or source_val in regression), last, oracle, ...
    )
    # After the selection, on granted labels that are kept back for it or, with none, on the source's validation samples.
    calibration: str = "none"  # none | ts (temperature) | ts_map (temperature with a prior from the source) | vector
    conformal: str = (
        "none"  # none | split (scores of the source) | weighted (by density ratio) | target (of granted labels)
    )
    conformal_level: float = 0.9  # the share of values that prediction sets or intervals are to hold
    calibration_share: float = 0.5  # of the granted labels that calibration and conformal=target keep back
    seed: int = 0
    data_seed: int = 0
    # What follows changes no result and stays out of a run's identity.
    outputs: str = "outputs"
    data_root: str | None = None
    download: bool = False
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    workers: int = 2  # that decode image files; sets in memory need none
    threads: int | None = None
    seeds_together: int = 1  # seeds, from `seed` on, that one process trains in one loop; each is a run of its own
    force: bool = False
    retry_failed: bool = False
    plugins: list[str] = field(default_factory=list)
    sinks: list[str] = field(default_factory=list)  # tensorboard, mlflow, wandb: where events go besides metrics.jsonl
    sweep: Sweep = field(default_factory=Sweep)


COMPONENTS = (
    "source",
    "target",
    "backbone",
    "method",
    "then",
    "optimizer",
    "schedule",
    "augment",
    "strong",
    "head",
    "ood",
)
OPTIONAL_COMPONENTS = ("source", "then", "strong", "head", "ood")  # of which a run may have none
FILES = ("source_model", "prior")  # keys that name files, which enter a run's identity by content
OUTSIDE_IDENTITY = (
    "outputs",
    "data_root",
    "download",
    "device",
    "workers",
    "threads",
    "seeds_together",
    "force",
    "retry_failed",
    "plugins",
    "image.storage",
    "trainer.checkpoint_every",
    "image.memory_limit_mb",
    "trainer.eval_batch_size",
    "features.cache_gb",
    "sinks",
    "sweep.kind",
    "sweep.n",
    "sweep.seed",
    "sweep.default",
)


def check(config: Config) -> None:
    """Refuse values that the types admit and the program does not.

    Raises:
        TransferError: naming the key and what it takes.
    """
    check_choice(config.protocol, PROTOCOLS, "protocol")
    check_choice(config.label_space, LABEL_SPACES, "label_space")
    check_choice(config.trainer.precision, PRECISIONS, "trainer.precision")
    check_choice(config.trainer.domain_batches, DOMAIN_BATCHES, "trainer.domain_batches")
    check_choice(config.image.storage, STORAGE, "image.storage")
    check_choice(config.calibration, CALIBRATIONS, "calibration")
    check_choice(config.conformal, CONFORMAL, "conformal")
    check_sweep(config.sweep)
    if not 0 < config.conformal_level < 1:
        raise TransferError(f"conformal_level is a share between 0 and 1, not {config.conformal_level}.")
    if not 0 < config.calibration_share <= 1:
        raise TransferError(f"calibration_share is a share above 0 and at most 1, not {config.calibration_share}.")
    if config.conformal == "target" and config.target_labels == 0:
        raise TransferError("conformal=target needs target labels: set target_labels=N.")
    budget = config.target_labels
    if budget != "all" and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 0):
        raise TransferError(f"target_labels must be 0, a number per class, or all; not {budget!r}.")
    if budget == "all" and config.protocol == "transductive":
        raise TransferError(
            "target_labels=all leaves nothing to test on in the transductive protocol: set protocol=inductive."
        )
    for key, value, options in (("size", config.image.size, None), ("channels", config.image.channels, (1, 3))):
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if value != "auto" and (not whole or (options and value not in options)):
            raise TransferError(
                f"image.{key} must be auto or {'1 or 3' if options else 'a number of pixels'}; not {value!r}."
            )
    for key in ("steps", "batch_size", "eval_batch_size", "eval_every", "checkpoint_every", "log_every"):
        if getattr(config.trainer, key) < 1:
            raise TransferError(f"trainer.{key} must be at least 1, not {getattr(config.trainer, key)}.")
    if config.features.components < 1 or config.features.cache_gb < 0:
        raise TransferError("features.components must be at least 1, and features.cache_gb not negative.")
    for key in ("source", "source_per_class", "target", "test"):
        size = getattr(config.subset, key)
        if size is not None and size < 1:
            raise TransferError(f"subset.{key} is a number of samples, at least 1; not {size}.")
    for key in ("test", "validation"):
        if not 0 <= getattr(config.split, key) < 1:
            raise TransferError(f"split.{key} is a share between 0 and 1, not {getattr(config.split, key)}.")
    if config.trainer.clip_norm is not None and config.trainer.clip_norm <= 0:
        raise TransferError(f"trainer.clip_norm is a positive norm, or null; not {config.trainer.clip_norm}.")
    if config.seeds_together < 1:
        raise TransferError(f"seeds_together is a number of seeds, at least 1; not {config.seeds_together}.")
    if config.bottleneck is not None and config.bottleneck < 1:
        raise TransferError(f"bottleneck is a width, at least 1, or null; not {config.bottleneck}.")
    if config.trainer.ema is not None and not 0 < config.trainer.ema < 1:
        raise TransferError(f"trainer.ema is a decay between 0 and 1, not {config.trainer.ema}.")


def check_sweep(sweep: Sweep) -> None:
    """Raises:
    TransferError: naming what does not fit."""
    check_choice(sweep.kind, SWEEPS, "sweep.kind")
    if sweep.kind in ("grid", "points") and sweep.n is not None:
        raise TransferError(f"n={sweep.n} counts the points of a search: add sweep=random, or leave it out.")
    if sweep.n is not None and sweep.n < 1:
        raise TransferError(f"n is a number of points, at least 1; not {sweep.n}.")
    if (sweep.kind == "points") != bool(sweep.points):
        needs = "sweep=points needs sweep.points" if sweep.kind == "points" else "sweep.points needs sweep=points"
        raise TransferError(f"{needs}, a list of settings as they would be typed: ['method.weight=0.1', ...].")
