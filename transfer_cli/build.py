"""From resolved components to live objects: the domains of a pair, the task they pose, the method on its backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from transfer_cli.backbones.base import Backbone
from transfer_cli.config.compose import data_root
from transfer_cli.config.identity import label
from transfer_cli.config.schema import Config
from transfer_cli.data.batching import derive_seed
from transfer_cli.data.domain import Domain, Place, Reader
from transfer_cli.data.inputs import InputSpec
from transfer_cli.data.reconcile import reconcile
from transfer_cli.data.task import Heldout, TransferTask, match_labels, split_pair
from transfer_cli.errors import TransferError
from transfer_cli.loops.rng import seed_all
from transfer_cli.methods.base import Context, Method
from transfer_cli.registry import Component

Components = Mapping[str, Component]


@dataclass(frozen=True)
class Problem:
    """A posed task, its held-out labels, and what was done to bring the two domains together."""

    task: TransferTask
    heldout: Heldout
    notes: tuple[str, ...]


def readers(config: Config, components: Components) -> dict[str, Reader]:
    place = Place(data_root(config), config.download)
    return {group: components[group].build(place) for group in ("source", "target") if group in components}


def pose_problem(config: Config, components: Components) -> Problem:
    """Load both domains, bring them to one shape, relate their classes and draw the splits."""
    domains: dict[str, Domain] = {group: reader.load() for group, reader in readers(config, components).items()}
    source, target = domains.get("source"), domains["target"]
    space = match_labels(source, target, config.label_space)
    wants, cache = components["backbone"].implementation, Path(config.outputs) / "cache" / "decoded"
    source, target, notes = reconcile(source, target, config.image, wants=wants, cache=cache)
    task, heldout = split_pair(
        source,
        target,
        space,
        protocol=config.protocol,
        target_labels=config.target_labels,
        test_share=config.split.test,
        validation_share=config.split.validation,
        subset={"source": config.subset.source, "target": config.subset.target, "test": config.subset.test},
        data_seed=config.data_seed,
    )
    return Problem(task, heldout, tuple(notes))


def build_method(config: Config, components: Components, task: TransferTask, device: torch.device) -> Method:
    """The method on its backbone, freshly initialised from the run's seed.

    Raises:
        TransferError: the task lacks what the method needs.
    """
    check_needs(components["method"], task)
    backbone = build_backbone(config, components, task.input)
    train_labels = [
        p.labels.float() for p in (task.source, task.target_labelled) if p is not None and task.kind == "regression"
    ]
    labels = torch.cat(train_labels) if train_labels else None
    context = Context(
        backbone=backbone,
        feature_dim=backbone.out_features,
        kind=task.kind,
        num_classes=task.num_classes,
        source_classes=len(task.label_space.source),
        has_source=task.source is not None,
        has_target_labels=task.target_labelled is not None,
        source_labels_fit_head=task.source_labels_fit_head,
        target_width=task.target_width,
        label_mean=None if labels is None else labels.mean(0),
        label_std=None if labels is None else labels.std(0, correction=0).clamp_min(1e-8),
        bottleneck=config.bottleneck,
        domain_batches=config.trainer.domain_batches,
    )
    method: Method = components["method"].build(context)
    method.to(device)
    if config.trainer.channels_last:
        backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return method


def build_backbone(config: Config, components: Components, spec: InputSpec) -> Backbone:
    seed_all(derive_seed(config.seed, "initialisation"), torch.device("cpu"))
    backbone: Backbone = components["backbone"].build(spec)
    return backbone


def check_needs(method: Component, task: TransferTask) -> None:
    """Raises:
    TransferError: naming what is missing and the key that would bring it."""
    needs = method.implementation.needs  # type: ignore[attr-defined]
    if task.kind not in method.implementation.kinds:  # type: ignore[attr-defined]
        raise TransferError(f"method {method.name} does not do {task.kind}.")
    if needs.source_labels and task.source is None:
        raise TransferError(f"method {method.name} needs a labelled source: set source=NAME.")
    if needs.source_labels and not task.source_labels_fit_head:
        raise TransferError(
            f"method {method.name} needs a source whose classes are the target's; label_space=separate has none."
        )
    if needs.target_labels and task.target_labelled is None:
        raise TransferError(
            f"method {method.name} needs target labels: set target_labels=N (a class) or target_labels=all."
        )
    if needs.any_labels and not task.source_labels_fit_head and task.target_labelled is None:
        raise TransferError(f"method {method.name} needs labels: set source=NAME or target_labels=N.")


def pair_label(components: Components) -> str:
    return f"{label(components.get('source'))} -> {label(components['target'])}"
