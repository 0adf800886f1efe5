"""The transfer task: what a method may see, and the held-out labels that only the evaluator sees.

Leakage is impossible by construction: `TransferTask.target_unlabelled` is inputs, the object has no labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from transfer_cli.data.batching import derive_seed
from transfer_cli.data.domain import Domain, Kind, Origin, Part
from transfer_cli.data.inputs import Inputs, InputSpec
from transfer_cli.errors import TransferError

UNKNOWN = "unknown"  # the evaluator's extra class for target samples of no source class (open label space)


@dataclass(frozen=True)
class Unlabelled:
    """Inputs, the names of samples and where they come from: nothing else to read."""

    inputs: Inputs
    ids: tuple[str, ...]
    origin: Origin | None = None

    @classmethod
    def of(cls, part: Part) -> Unlabelled:
        return cls(part.inputs, part.ids, part.origin)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class LabelSpace:
    """The classes of both domains and their map. `classes` are those the method's head predicts."""

    setting: str  # closed | partial | open | separate
    source: tuple[str, ...]
    target: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.target if self.setting == "separate" or not self.source else self.source

    @property
    def shared(self) -> tuple[str, ...]:
        return tuple(name for name in self.target if name in self.source)

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The head's classes, and `unknown` where the target has classes of its own."""
        return (*self.classes, UNKNOWN) if self.setting == "open" else self.classes

    def target_index(self) -> Tensor:
        """`(len(target),)`: for each target class its index among `evaluated`."""
        return torch.tensor(
            [self.evaluated.index(n if n in self.classes else UNKNOWN) for n in self.target], dtype=torch.int64
        )

    def overlap(self) -> str:
        """How many classes, and which, are shared and only in one domain."""
        only_source = [n for n in self.source if n not in self.target]
        only_target = [n for n in self.target if n not in self.source]
        found = (("shared", self.shared), ("only in the source", only_source), ("only in the target", only_target))
        return "".join(_some(where, names) for where, names in found).removeprefix(", ")

    def __str__(self) -> str:
        if self.setting == "separate" or not self.source:
            return f"{len(self.target)} target classes, head of its own"
        own_s, own_t = len(self.source) - len(self.shared), len(self.target) - len(self.shared)
        extra = ", ".join(f"{n} only in the {d}" for n, d in ((own_s, "source"), (own_t, "target")) if n)
        return f"{len(self.shared)} classes shared" + (f" ({extra})" if extra else "")


@dataclass(frozen=True)
class TaskShape:
    """A task without its data: all that building a method needs, and what a checkpoint keeps of it."""

    kind: Kind
    label_space: LabelSpace
    input: InputSpec
    target_width: int  # regression targets a sample; 0 in classification
    has_source: bool
    has_target_labels: bool

    @property
    def source_labels_fit_head(self) -> bool:
        return self.has_source and self.label_space.setting != "separate"

    def plain(self) -> dict[str, Any]:
        """As values that a checkpoint may hold; `restore` reads them."""
        return asdict(self)

    @classmethod
    def restore(cls, plain: dict[str, Any]) -> TaskShape:
        space, spec = plain["label_space"], plain["input"]
        return cls(
            **{
                **plain,
                "label_space": LabelSpace(space["setting"], tuple(space["source"]), tuple(space["target"])),
                "input": InputSpec(spec["kind"], tuple(spec["shape"])),
            }
        )


@dataclass(frozen=True)
class TransferTask:
    """All that a method and its loops may see.

    `source` is None in source-free settings. `target_unlabelled` holds every target training input, granted samples
    included. Class labels of `source` index `label_space.source`; those of `target_labelled` and of `target_calibration`, the
    granted samples that are kept back for calibration, index `label_space.classes`.
    """

    kind: Kind
    label_space: LabelSpace
    input: InputSpec
    target_width: int  # regression targets a sample; 0 in classification
    source: Part | None
    source_validation: Part | None
    target_unlabelled: Unlabelled
    target_validation: Unlabelled
    target_labelled: Part | None
    target_calibration: Part | None = None

    @property
    def source_labels_fit_head(self) -> bool:
        return self.shape.source_labels_fit_head

    @property
    def shape(self) -> TaskShape:
        has_source, granted = self.source is not None, self.target_labelled is not None
        return TaskShape(self.kind, self.label_space, self.input, self.target_width, has_source, granted)


@dataclass(frozen=True)
class Heldout:
    """Labelled test samples, for the evaluator alone; target labels index `label_space.evaluated`.

    `ood`: inputs of a third data set, which a model is to be unsure of.
    """

    source_test: Part | None
    target_test: Part
    ood: Unlabelled | None = None


def match_labels(source: Domain | None, target: Domain, setting: str) -> LabelSpace:
    """Relate the class names of a pair as `label_space` states.

    Raises:
        TransferError: the names do not fit the stated setting; the message says which setting would.
    """
    if source is not None and source.kind != target.kind:
        raise TransferError(
            f"{source.name} is for {source.kind} and {target.name} for {target.kind}: they cannot be paired."
        )
    space = LabelSpace(setting, source.classes if source else (), target.classes)
    if source is None or target.kind == "regression":
        return space
    only_source = [n for n in space.source if n not in space.target]
    only_target = [n for n in space.target if n not in space.source]
    fitting = (
        "closed"
        if not only_source and not only_target
        else "partial"
        if not only_target
        else "open"
        if space.shared
        else "separate"
    )
    if setting == "separate" or setting == fitting or (setting == "open" and fitting == "partial"):
        return space
    raise TransferError(
        f"the classes of {source.name} and {target.name} do not fit label_space={setting}: {len(space.shared)} shared"
        f"{_some('only in the source', only_source)}{_some('only in the target', only_target)}. "
        f"Set label_space={fitting} if that is meant, or rename classes."
    )


def _some(where: str, names: Sequence[str]) -> str:
    return f", {len(names)} {where} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""


def split_pair(
    source: Domain | None,
    target: Domain,
    space: LabelSpace,
    *,
    protocol: str,
    target_labels: Any,
    test_share: float,
    validation_share: float,
    subset: dict[str, int | None],
    data_seed: int,
    reserve: float = 0.0,
) -> tuple[TransferTask, Heldout]:
    """Draw splits, subsets and granted target samples, all a function of `data_seed` and, but for the grants, blind to labels.

    `reserve`: the share of the granted samples that is kept back for calibration.
    """
    if source is not None and source.train.labels.shape[1:] != target.train.labels.shape[1:]:
        widths = (f"{d.name} has {d.train.labels.shape[1]}" for d in (source, target))
        raise TransferError(f"source and target differ in the number of regression targets: {', '.join(widths)}.")
    # One generator a domain: what is drawn of the target does not depend on the source or its subset.
    draw = torch.Generator().manual_seed(derive_seed(data_seed, "source"))
    source_train = source_val = source_test = None
    if source is not None:
        source_train, source_test = _train_test(source, test_share, draw)
        source_train = _limit(source_train, subset["source"], draw)
        source_train = _limit_classes(source_train, subset.get("source_per_class"), draw)
        source_test = _limit(source_test, subset["test"], draw) if source_test is not None else None
        source_train, source_val = _hold_out(source_train, validation_share, draw)
        _check_every_class(source, source_train)

    draw = torch.Generator().manual_seed(derive_seed(data_seed, "target"))
    if protocol == "transductive":
        target_train = _limit(target.train, subset["target"], draw)
        labelled, rest = _grant(target_train, target_labels, target, draw)
        target_test, validation = rest, target_train
        unlabelled = target_train
    else:
        target_train, held_out = _train_test(target, test_share, draw)
        if held_out is None:
            raise TransferError(
                f"protocol=inductive needs target test samples: {target.name} has no test split and split.test is 0."
            )
        target_train = _limit(target_train, subset["target"], draw)
        target_test = _limit(held_out, subset["test"], draw)
        unlabelled, validation = _hold_out(target_train, validation_share, draw)
        labelled, _ = _grant(unlabelled, target_labels, target, draw)

    if not len(target_test):
        raise TransferError(f"target_labels={target_labels} and the splits leave no target sample to test on.")
    if target.kind == "classification":
        index = space.target_index()
        target_test = replace(target_test, labels=index[target_test.labels])
        if labelled is not None:
            labelled = replace(labelled, labels=index[labelled.labels])
            known = labelled.labels < len(space.classes)
            labelled = labelled if bool(known.all()) else labelled.take(known.nonzero()[:, 0])
    reserved = None
    if labelled is not None and reserve > 0:
        labelled, reserved = deal(labelled, reserve, torch.Generator().manual_seed(derive_seed(data_seed, "reserve")))

    task = TransferTask(
        kind=target.kind,
        label_space=space,
        input=target.train.inputs.spec,
        target_width=0 if target.kind == "classification" else target.train.labels.shape[1],
        source=source_train,
        source_validation=source_val if source_val is not None and len(source_val) else None,
        target_unlabelled=Unlabelled.of(unlabelled),
        target_validation=Unlabelled.of(validation if len(validation) else unlabelled),
        target_labelled=labelled if labelled is not None and len(labelled) else None,
        target_calibration=reserved,
    )
    return task, Heldout(source_test, target_test)


def _train_test(domain: Domain, share: float, draw: torch.Generator) -> tuple[Part, Part | None]:
    if domain.test is not None:
        return domain.train, domain.test
    train, test = _hold_out(domain.train, share, draw)
    return train, test if len(test) else None


def _hold_out(part: Part, share: float, draw: torch.Generator) -> tuple[Part, Part]:
    order = torch.randperm(len(part), generator=draw)
    n_held = round(share * len(part))
    # Sorted, so that a subset keeps the order of its data set and reads files in sequence.
    return part.take(order[n_held:].sort().values), part.take(order[:n_held].sort().values)


def _limit(part: Part, size: int | None, draw: torch.Generator) -> Part:
    order = torch.randperm(len(part), generator=draw)
    if size is None or size >= len(part):
        return part
    return part.take(order[:size].sort().values)


def _limit_classes(part: Part, size: int | None, draw: torch.Generator) -> Part:
    """At most `size` samples of each class."""
    if size is None or part.labels.ndim != 1:
        return part
    order = torch.randperm(len(part), generator=draw)
    kept = torch.cat([order[part.labels[order] == c][:size] for c in part.labels.unique()])
    return part.take(kept.sort().values)


def _grant(part: Part, budget: Any, target: Domain, draw: torch.Generator) -> tuple[Part | None, Part]:
    """The samples whose labels the method is given, and the others."""
    if budget == 0:
        return None, part
    if budget == "all":
        return part, part.take(torch.empty(0, dtype=torch.int64))
    order = torch.randperm(len(part), generator=draw)
    if target.kind == "regression":
        if budget > len(part):
            raise TransferError(f"target_labels={budget}: {target.name} has only {len(part)} training samples.")
        chosen = order[:budget]
    else:
        labels = part.labels[order]
        per_class = [order[labels == c][:budget] for c in range(len(target.classes))]
        short = [target.classes[c] for c, found in enumerate(per_class) if len(found) < budget]
        if short:
            raise TransferError(
                f"target_labels={budget}: {target.name} has fewer training samples of {', '.join(short[:5])}."
            )
        chosen = torch.cat(per_class)
    kept = torch.ones(len(part), dtype=torch.bool)
    kept[chosen] = False
    return part.take(chosen.sort().values), part.take(kept.nonzero()[:, 0])


def deal(part: Part, share: float, draw: torch.Generator) -> tuple[Part, Part]:
    """The part without a share of its samples, and these; of every class as evenly as can be."""
    order = torch.randperm(len(part), generator=draw)
    if part.labels.ndim == 1:  # classes take turns, each as often as it has samples
        own = torch.nn.functional.one_hot(part.labels[order])
        turn = (own.cumsum(0) * own).sum(1) - 0.5
        order = order[(turn / own.sum(0)[part.labels[order]]).argsort(stable=True)]
    kept = len(part) - round(share * len(part))
    return part.take(order[:kept].sort().values), part.take(order[kept:].sort().values)


def _check_every_class(source: Domain, train: Part) -> None:
    if source.kind == "regression":
        return
    counts = torch.bincount(train.labels, minlength=len(source.classes))
    empty = [source.classes[c] for c in (counts == 0).nonzero()[:, 0].tolist()]
    if empty:
        raise TransferError(f"source {source.name} has no training sample of class {', '.join(empty[:5])}.")
