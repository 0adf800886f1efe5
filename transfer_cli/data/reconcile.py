"""Brings the inputs of a pair to one shape, and says what it did, or refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from transfer_cli.config.schema import Image
from transfer_cli.data.decoded import decode_once
from transfer_cli.data.domain import Domain, Part
from transfer_cli.data.inputs import (
    ArrayInputs,
    ImageFiles,
    Inputs,
    InputSpec,
    ResizedArrays,
    convert_channels,
    resize_square,
)
from transfer_cli.errors import TransferError


@dataclass(frozen=True)
class ImagePlan:
    """The common shape of a pair's images and where they are kept."""

    size: int
    channels: int
    storage: str
    memory_limit: int  # bytes a domain
    cache: Path


def reconcile(
    source: Domain | None, target: Domain, image: Image, *, wants: Any, cache: Path
) -> tuple[Domain | None, Domain, list[str]]:
    """Resize and convert both domains' images to one `(C, S, S)`.

    Returns the domains and a sentence for each change made. `wants` is the backbone class
    with its `preferred_size`, `minimum_size` and `preferred_channels`.

    Raises:
        TransferError: kinds or widths that nothing can reconcile.
    """
    domains = [d for d in (source, target) if d is not None]
    specs = [d.train.inputs.spec for d in domains]
    told = ", ".join(f"{d.name} is {s}" for d, s in zip(domains, specs, strict=True))
    kinds = {spec.kind for spec in specs}
    if len(kinds) > 1:
        raise TransferError(f"source and target differ in kind: {told}.")
    if kinds != {"image"}:
        if len({spec.shape for spec in specs}) > 1:
            raise TransferError(f"source and target differ in width: {told}.")
        return source, target, []
    sides = [side for spec in specs for side in spec.shape[1:]]
    size = image.size if image.size != "auto" else wants.preferred_size or max(*sides, wants.minimum_size)
    if size == 1:
        size = 224  # files of any size, and a backbone that takes any
    channels = (
        image.channels if image.channels != "auto" else wants.preferred_channels or max(s.shape[0] for s in specs)
    )
    plan = ImagePlan(size, channels, image.storage, image.memory_limit_mb * 2**20, cache)
    notes = []
    for domain in domains:
        had = domain.train.inputs.spec.shape
        changes = []
        if had[0] != channels:
            changes.append("grey -> rgb" if channels == 3 else "rgb -> grey")
        if had[1:] != (size, size):
            was = f"{had[1]} x {had[2]}" if had[1] else "any size"
            changes.append(f"{was} -> {size} x {size}")
        if changes:
            notes.append(f"{domain.name}: {', '.join(changes)}")
    return (_apply(source, plan) if source is not None else None), _apply(target, plan), notes


def as_samples(name: str, inputs: Inputs, spec: InputSpec) -> Inputs:
    """Inputs of the data set `name` as samples of `spec`, to which images are resized and converted.

    Raises:
        TransferError: of another kind or width.
    """
    if inputs.spec.kind == spec.kind == "image":
        return conform(inputs, spec.shape[0], spec.shape[1])
    if inputs.spec != spec:
        raise TransferError(f"{name} is {inputs.spec}; this run is trained on {spec}.")
    return inputs


def conform(inputs: Inputs, channels: int, size: int) -> Inputs:
    """Any images as `(channels, size, size)`; files stay files."""
    if isinstance(inputs, ImageFiles):
        return replace(inputs, channels=channels, size=size)
    assert isinstance(inputs, ArrayInputs)
    # By blocks: the float copy that resizing makes is four times the images.
    blocks = [resize_square(convert_channels(block, channels), size) for block in inputs.values.split(4096)]
    return ArrayInputs(torch.cat(blocks) if len(blocks) > 1 else blocks[0])


def _apply(domain: Domain, plan: ImagePlan) -> Domain:
    return replace(
        domain,
        train=_apply_part(domain.train, plan),
        test=None if domain.test is None else _apply_part(domain.test, plan),
    )


def _apply_part(part: Part, plan: ImagePlan) -> Part:
    if plan.storage == "files" and isinstance(part.inputs, ArrayInputs):
        wanted = ResizedArrays(part.inputs.values, plan.channels, plan.size)
        return part if wanted.spec == part.inputs.spec else Part(wanted, part.labels, part.ids)
    inputs = conform(part.inputs, plan.channels, plan.size)
    if isinstance(inputs, ImageFiles):
        fits = len(inputs) * plan.channels * plan.size**2 <= plan.memory_limit
        if plan.storage == "memory" or (plan.storage == "auto" and fits):
            inputs = inputs.to_memory()
        elif plan.storage == "decoded":
            inputs = decode_once(inputs, plan.cache)
    return Part(inputs, part.labels, part.ids)
