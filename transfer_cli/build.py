"""From resolved components to live objects: the domains of a pair, the task they pose, the method on its backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from transfer_cli.backbones.base import Backbone, build_checked
from transfer_cli.config.compose import data_root
from transfer_cli.config.identity import component_content, label
from transfer_cli.config.schema import Config
from transfer_cli.data.batching import derive_seed
from transfer_cli.data.domain import (
    Domain,
    Origin,
    Part,
    Place,
    Reader,
    fingerprint_code,
    fingerprint_values,
    keep_classes,
)
from transfer_cli.data.extraction import make_extractor, state_digest, with_features
from transfer_cli.data.feature_cache import FeatureCache
from transfer_cli.data.inputs import InputSpec
from transfer_cli.data.reconcile import as_samples, reconcile
from transfer_cli.data.task import Heldout, TaskShape, TransferTask, Unlabelled, match_labels, split_pair
from transfer_cli.errors import TransferError
from transfer_cli.evaluation.calibrated import Calibrated, check_calibration
from transfer_cli.evaluation.evaluator import Predictor
from transfer_cli.evaluation.samples import evenly
from transfer_cli.loops.checkpoints import read_checkpoint
from transfer_cli.loops.console import Console
from transfer_cli.loops.gradient import AUTOCAST
from transfer_cli.loops.rng import seed_all
from transfer_cli.methods.base import Context, FeatureOptions, Method
from transfer_cli.methods.bayes.artefact import SourcePosterior
from transfer_cli.methods.chain import Chain
from transfer_cli.registry import Component
from transfer_cli.run_folder import RunFolder, read_object

Components = Mapping[str, Component]


@dataclass(frozen=True)
class Problem:
    """A posed task, its held-out labels, and what was done to bring the two domains together."""

    task: TransferTask
    heldout: Heldout
    notes: tuple[str, ...]


def readers(config: Config, components: Components) -> dict[str, Reader]:
    place = Place(data_root(config), config.download)
    return {group: components[group].build(place) for group in ("source", "target", "ood") if group in components}


def pose_problem(config: Config, components: Components, fingerprints: Mapping[str, str] | None = None) -> Problem:
    """Load both domains, bring them to one shape, relate their classes and draw the splits.

    With `fingerprints`, the readers' by group, every part knows its origin.
    """
    domains: dict[str, Domain] = {group: reader.load() for group, reader in readers(config, components).items()}
    source, target = domains.get("source"), domains["target"]
    wanted = config.subset.source_classes, config.subset.target_classes
    narrow = None if source is None else keep_classes(source, wanted[0])
    space = match_labels(narrow, keep_classes(target, wanted[1]), config.label_space)
    wants, cache = components["backbone"].implementation, Path(config.outputs) / "cache" / "decoded"
    image = config.image
    if image.storage == "auto" and _works_on_features(components):
        image = replace(image, storage="files")  # each is read once at most, and none whose features are there
    source, target, notes = reconcile(source, target, image, wants=wants, cache=cache)
    if fingerprints is not None:
        source = None if source is None else _with_origin(source, components["source"], fingerprints["source"])
        target = _with_origin(target, components["target"], fingerprints["target"])
    # Only now, since kept features are those of a whole data set's rows.
    source, target = None if source is None else keep_classes(source, wanted[0]), keep_classes(target, wanted[1])
    task, heldout = split_pair(
        source,
        target,
        space,
        protocol=config.protocol,
        target_labels=config.target_labels,
        test_share=config.split.test,
        validation_share=config.split.validation,
        subset=asdict(config.subset),
        data_seed=config.data_seed,
        reserve=config.calibration_share if config.calibration != "none" or config.conformal == "target" else 0.0,
    )
    check_calibration(config, task)
    if "ood" in domains:
        heldout = replace(heldout, ood=_strange(domains["ood"], task.input, config, components, fingerprints))
    read = [note for domain in domains.values() for note in domain.notes]
    return Problem(task, heldout, (*dict.fromkeys(read), *notes))


def _strange(
    domain: Domain, spec: InputSpec, config: Config, components: Components, fingerprints: Mapping[str, str] | None
) -> Unlabelled:
    """The test inputs of a third data set, all where it has no test split, as samples of the task."""
    part = domain.train if domain.test is None else domain.test
    part = replace(part, inputs=as_samples(domain.name, part.inputs, spec))
    if fingerprints is not None:
        domain = replace(domain, train=part, test=None if domain.test is None else part)
        domain = _with_origin(domain, components["ood"], fingerprints["ood"])
        part = domain.train if domain.test is None else domain.test
    kept = evenly(len(part), len(part) if config.subset.test is None else config.subset.test)
    return Unlabelled.of(part.take(kept))


def build_method(
    config: Config,
    components: Components,
    shape: TaskShape,
    device: torch.device,
    labels: Tensor | None = None,
    trained: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> Method:
    """The method on its backbone, freshly initialised from the run's seed.

    `labels` `(N, T)`: those of a regression task's training samples, for standardisation; without them (a method that
    is about to load a checkpoint) placeholders. `trained`: it is, and needs nothing to train on. `sizes`: of the labelled parts.

    Raises:
        TransferError: the task lacks what the method needs.
    """
    chosen = [components[group] for group in ("method", "then") if group in components]
    for component in chosen:  # the first alone starts from another run's network
        starts_there = config.source_model is not None and component is chosen[0]
        check_needs(component, shape, trained or starts_there, config.prior is not None, config.calibration_share == 1)
    if config.source_model is not None and chosen[0].implementation.frozen_backbone:  # type: ignore[attr-defined]
        raise TransferError(
            f"method {chosen[0].name} has no network that could start from source_model: "
            f"backbone.weights={config.source_model} takes the backbone alone."
        )
    last = chosen[-1]
    if chosen[0].implementation.last_only and last is not chosen[0]:  # type: ignore[attr-defined]
        raise TransferError(f"no method can follow {chosen[0].name}, which ends in BatchNorm layers of its own.")
    if (
        config.trainer.domain_batches == "domain_specific"
        and last is not chosen[0]
        and last.implementation.frozen_backbone  # type: ignore[attr-defined]
    ):
        raise TransferError(
            f"then={last.name} reads both domains through one backbone: set trainer.domain_batches=separate or joint."
        )
    if last.implementation.representation_only:  # type: ignore[attr-defined]
        way = (
            "add then=linear_probe (or another method)"
            if len(chosen) == 1
            else f"take it as the first, method={last.name}"
        )
        raise TransferError(f"{last.name} learns a representation: {way}.")
    seed_all(derive_seed(config.seed, "initialisation"), torch.device("cpu"))
    backbone = build_checked(components["backbone"].build, shape.input, components["backbone"].name)
    if labels is None and shape.kind == "regression":
        labels = torch.zeros(2, shape.target_width)
    source_model = None if config.source_model is None else read_source_model(config.source_model, shape)
    chosen_backbone, fingerprint = (
        components["backbone"],
        lambda: backbone_fingerprint(backbone, chosen_backbone, shape),
    )
    prior = None
    if config.prior is not None and not trained:
        prior = read_prior(config, chosen, shape, backbone.out_features, fingerprint)
    context = Context(
        backbone=backbone,
        feature_dim=backbone.out_features,
        kind=shape.kind,
        num_classes=len(shape.label_space.classes),
        source_classes=len(shape.label_space.source if prior is None else prior.classes),
        has_source=shape.has_source,
        has_target_labels=shape.has_target_labels,
        source_labels_fit_head=shape.source_labels_fit_head or _prior_fits_head(config, shape),
        target_width=shape.target_width,
        label_mean=None if labels is None else labels.mean(0),
        label_std=None if labels is None else _deviation(labels),
        label_space=shape.label_space.setting,
        bottleneck=config.bottleneck,
        domain_batches=config.trainer.domain_batches,
        features=FeatureOptions(
            tuple(config.features.normalise), config.features.reduce, config.features.components, config.features.whiten
        ),
        source_model=source_model,
        input=shape.input,
        prior=prior,
        class_names=shape.label_space.classes,
        fingerprint=fingerprint,
        about={"backbone": components["backbone"].name, "input": str(shape.input)},
        labelled=sizes or {},
        make_backbone=lambda: build_checked(chosen_backbone.build, shape.input, chosen_backbone.name),
    )
    if "head" in components:
        make_head = components["head"].build
        context = replace(context, make_head=lambda: make_head(context.kind, context.outputs))
    method: Method = chosen[0].build(context)
    if len(chosen) > 1:
        method = Chain(method, chosen[1].build(replace(context, source_model=None, make_backbone=None)))
    method.to(device)
    _set_up(backbone, config, device, frozen=method.frozen_backbone)
    return method


def build_frozen_backbone(config: Config, components: Components, spec: InputSpec, device: torch.device) -> Backbone:
    """The backbone alone, as the methods that never train it have it: the features are the same."""
    seed_all(derive_seed(config.seed, "initialisation"), torch.device("cpu"))
    backbone = build_checked(components["backbone"].build, spec, components["backbone"].name).to(device)
    _set_up(backbone, config, device, frozen=True)
    return backbone


def _set_up(backbone: Backbone, config: Config, device: torch.device, frozen: bool) -> None:
    """Memory layout, precision and compilation, in place."""
    if config.trainer.channels_last:
        backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if frozen and config.trainer.precision != "32":
        # Gradient phases have an autocast of their own. Here it goes wherever the backbone goes: features that are kept,
        # those of `transfer evaluate` and of new samples are of one precision.
        cast = torch.autocast(device.type, AUTOCAST[config.trainer.precision])
        backbone.forward = cast(backbone.forward)  # type: ignore[method-assign]
    if config.trainer.compile:
        backbone.compile()  # in place: names of parameters stay, so checkpoints fit with and without


def extract_features(
    problem: Problem, method: Method, config: Config, components: Components, device: torch.device, console: Console
) -> Problem:
    """The problem on features, extracted once and shared with other runs, where the method never trains its backbone."""
    if not _works_on_features(components):
        return problem
    assert isinstance(method.backbone, Backbone)
    extractor = make_extractor(method.backbone, components["backbone"], problem.task.input, config, device)
    cache = feature_cache(config)
    return Problem(*with_features(problem.task, problem.heldout, extractor, cache, console), problem.notes)


def feature_cache(config: Config) -> FeatureCache | None:
    limit = int(config.features.cache_gb * 2**30)
    return FeatureCache(Path(config.outputs) / "cache" / "features", limit) if limit else None


def _works_on_features(components: Components) -> bool:
    methods = [components[group].implementation for group in ("method", "then") if group in components]
    frozen = all(method.frozen_backbone for method in methods)  # type: ignore[attr-defined]
    return frozen and not components["backbone"].implementation.trivial  # type: ignore[attr-defined]


def _with_origin(domain: Domain, component: Component, fingerprint: str) -> Domain:
    content = component_content(component)
    reading = (
        component.reference,
        content["version"],
        content["parameters"],
        fingerprint_code(component.implementation),
    )

    def known(part: Part, split: str) -> Part:
        key = fingerprint_values(fingerprint, reading, split, part.inputs.spec)
        name = label(component) + (f" {split}" if domain.test is not None else "")
        return replace(part, origin=Origin(key, name, torch.arange(len(part)), len(part)))

    test = None if domain.test is None else known(domain.test, "test")
    return replace(domain, train=known(domain.train, "train"), test=test)


def training_labels(task: TransferTask) -> Tensor | None:
    """Regression targets `(N, T)` that a method may learn from; None in classification."""
    if task.kind == "classification":
        return None
    return torch.cat([part.labels for part in (task.source, task.target_labelled) if part is not None])


def rebuild_model(
    folder: RunFolder, config: Config, components: Components, device: torch.device
) -> tuple[Predictor, TaskShape]:
    """The model of a finished run: its method with the weights that the selection kept, recalibrated where it was; and the
    shape of its task.

    Raises:
        TransferError: no whole checkpoint, or one of another configuration.
    """
    path = folder.checkpoints / "best.pt"
    kept = read_checkpoint(path)
    if kept is None:
        raise TransferError(f"{path} is missing or not whole: force=true runs the experiment again.")
    identity = read_object(folder.manifest).get("identity")
    if kept["identity"] != identity:
        raise TransferError(f"{path} belongs to another configuration ({kept['identity']}, not {identity}).")
    shape = TaskShape.restore(kept["task"])
    backbone = components["backbone"]
    if "weights" in backbone.parameters:  # the checkpoint has them; the file they came from may be gone
        backbone = replace(backbone, parameters={**backbone.parameters, "weights": "none"})
    config = replace(config, source_model=None)  # nor is what training started from needed
    method = build_method(config, {**components, "backbone": backbone}, shape, device, trained=True)
    method.load_state_dict(kept["method"])
    if config.calibration == config.conformal == "none":
        return method, shape
    calibration = read_checkpoint(folder.calibration)
    if calibration is None:
        raise TransferError(f"{folder.calibration} is missing or not whole: force=true runs the experiment again.")
    return Calibrated.restore(method, calibration), shape


def read_source_model(path: str, shape: TaskShape) -> dict[str, Tensor]:
    """The network of another run's checkpoint.

    Raises:
        TransferError: no such checkpoint, none of a network, or one of other classes.
    """
    kept = read_checkpoint(Path(path))
    if kept is None:
        raise TransferError(f"source_model: {path} is missing or not a whole checkpoint.")
    if not {"method", "task"} <= kept.keys():
        raise TransferError(f"source_model: {path} is not the checkpoints/best.pt of a run.")
    state = {k.removeprefix("second."): v for k, v in kept["method"].items()}  # of a chain, what predicts
    network = {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
    if not network:
        raise TransferError(f"source_model: {path} holds no network: take a run of a method that trains one.")
    if any("parametrizations" in key or ".source." in key for key in network):
        raise TransferError(
            f"source_model: {path} is of a method whose network has layers of its own kind (low-rank updates, BatchNorm of each "
            "domain): take a run of another."
        )
    classes, wanted = TaskShape.restore(kept["task"]).label_space.classes, shape.label_space.classes
    if classes != wanted:
        raise TransferError(
            f"source_model: {path} predicts {len(classes)} other classes than this task's {len(wanted)}."
        )
    return network


def labelled_sizes(task: TransferTask) -> dict[str, int]:
    """How many labelled samples a method may learn from, by part."""
    parts = {"source": task.source, "target_labelled": task.target_labelled}
    return {name: len(part) for name, part in parts.items() if part is not None}


def backbone_fingerprint(backbone: Backbone, chosen: Component, shape: TaskShape) -> str:
    """Of all that a backbone's features depend on besides their inputs."""
    content = component_content(chosen)
    settings = {k: v for k, v in content["parameters"].items() if k not in ("weights", "freeze")}
    code = (chosen.reference, content["version"], settings, fingerprint_code(chosen.implementation))
    return fingerprint_values(code, state_digest(backbone), str(shape.input))


def _prior_fits_head(config: Config, shape: TaskShape) -> bool:
    return config.prior is not None and shape.label_space.setting != "separate"


def read_prior(
    config: Config, chosen: Sequence[Component], shape: TaskShape, width: int, fingerprint: Callable[[], str]
) -> SourcePosterior:
    """The source's posterior that stands for the source.

    Raises:
        TransferError: it cannot be read, or does not fit the run.
    """
    path, method = str(config.prior), chosen[0]
    if len(chosen) > 1:
        raise TransferError("prior: is for a backbone that nothing trains beforehand: leave out then, or prior.")
    if shape.has_source:
        raise TransferError("prior: stands in the place of a source: set source=none, or leave out prior.")
    if shape.label_space.setting in ("partial", "open"):
        raise TransferError("prior: label_space is closed or separate; partial and open need the source itself.")
    kinds = method.implementation.takes_prior  # type: ignore[attr-defined]
    if not kinds:
        raise TransferError(f"prior: method {method.name} takes none; bayes_head and niw_lda do.")
    found = SourcePosterior.read(path)
    if found.kind not in kinds:
        raise TransferError(
            f"prior: {path} is of kind {found.kind}, and method {method.name} takes {' or '.join(kinds)}."
        )
    made = f"{found.settings.get('backbone')}, {found.settings.get('input')}"
    if found.settings.get("width") != width:
        raise TransferError(
            f"prior: {path} is of {found.settings.get('width')} features ({made}), and this run's are {width}."
        )
    if found.fingerprint != fingerprint():
        raise TransferError(
            f"prior: {path} was made on another backbone, other weights or another input ({made}): set backbone.weights and "
            "image.size as that run had them."
        )
    if list(config.features.normalise) != found.settings.get("normalise", []) or config.features.reduce != "none":
        raise TransferError(
            f"prior: {path} was made with features.normalise={found.settings.get('normalise')} and features.reduce=none: "
            "set the same."
        )
    classes = shape.label_space.classes
    if _prior_fits_head(config, shape) and set(classes) != set(found.classes):
        raise TransferError(
            f"prior: {path} is of {len(found.classes)} classes ({', '.join(found.classes[:4])}, ...) other than the target's "
            f"{len(classes)}: set label_space=separate if that is meant."
        )
    return found


def check_needs(
    method: Component,
    shape: TaskShape,
    has_source_model: bool = False,
    has_prior: bool = False,
    all_kept_back: bool = False,
) -> None:
    """Raises:
    TransferError: naming what is missing and the key that would bring it."""
    needs = method.implementation.needs  # type: ignore[attr-defined]
    if shape.kind not in method.implementation.kinds:  # type: ignore[attr-defined]
        raise TransferError(f"method {method.name} does not do {shape.kind}.")
    if needs.source_labels_or_model and not shape.source_labels_fit_head and not has_source_model:
        raise TransferError(
            f"method {method.name} needs a labelled source with the target's classes, or the model of one: set source=NAME, "
            "or source_model=RUN, the folder of a run that trained one."
        )
    if needs.source_of_any_classes and not shape.has_source and not has_prior:
        raise TransferError(
            f"method {method.name} needs a labelled source: set source=NAME, or prior=FILE, what method=source_posterior leaves."
        )
    if needs.source_labels and not shape.has_source:
        raise TransferError(f"method {method.name} needs a labelled source: set source=NAME.")
    if needs.source_labels and not shape.source_labels_fit_head:
        raise TransferError(
            f"method {method.name} needs a source with the target's classes; label_space=separate has none."
        )
    if needs.target_labels and not shape.has_target_labels and all_kept_back:
        raise TransferError(
            f"method {method.name} needs target labels, and calibration_share=1 keeps back all of them: set it lower, and "
            "target_labels=N."
        )
    if needs.target_labels and not shape.has_target_labels:
        raise TransferError(
            f"method {method.name} needs target labels: set target_labels=N (a class) or target_labels=all."
        )
    if needs.any_labels and not shape.source_labels_fit_head and not shape.has_target_labels:
        raise TransferError(f"method {method.name} needs labels: set source=NAME or target_labels=N.")


def pair_label(components: Components) -> str:
    return f"{label(components.get('source'))} -> {label(components['target'])}"


def _deviation(labels: Tensor) -> Tensor:
    """Standard deviations `(T,)` of targets `(N, T)`, whatever their unit; one where they are all alike."""
    found = labels.std(0, correction=0)
    return torch.where(found > 1e-7 * labels.abs().amax(0), found, 1.0)
