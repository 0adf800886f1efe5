"""The story of a diagnosis: two domains compared before anything is trained. No target label is read but those that are granted."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transfer_cli.backbones.base import Backbone
from transfer_cli.build import Components, Problem, build_frozen_backbone, feature_cache, pose_problem, readers
from transfer_cli.config.compose import resolve_components
from transfer_cli.config.identity import identify, label
from transfer_cli.config.schema import Config
from transfer_cli.data.batching import derive_seed, in_order
from transfer_cli.data.domain import Part
from transfer_cli.data.extraction import make_extractor, on_features
from transfer_cli.data.inputs import Extracted, Inputs, SequenceInputs
from transfer_cli.data.task import TransferTask, Unlabelled
from transfer_cli.diagnosis import distances, duplicates, label_shift, statistics, transferability
from transfer_cli.diagnosis.advice import ALPHA, advise
from transfer_cli.errors import TransferError
from transfer_cli.loops.console import Console
from transfer_cli.loops.devices import choose_device, reproducible, use_threads
from transfer_cli.run_folder import write_json

SCHEMA = 1
SCANNED = 5000  # samples of a part, kept in memory, that are searched for duplicates
SMALL = 64 * 64 * 3  # values of a sample, above which reading it takes time
COLUMNS = 64  # columns whose means are told one by one


def diagnose(configs: Mapping[str, Config], samples: int) -> dict[str, Any]:
    """Compare the domains as each backbone shows them, and write what is found to outputs/diagnose/.

    Args:
        configs: by backbone; they differ in nothing else.
        samples: of each domain, at most, on which features are compared.

    Raises:
        TransferError: what the user can mend.
    """
    began, console = time.perf_counter(), Console()
    first = next(iter(configs.values()))
    device = choose_device(first.device)
    reproducible(device)
    use_threads(first.threads)

    found: dict[str, Any] = {}
    for name, config in configs.items():
        # the domains and the task they pose, as a run would; of its held-out samples the inputs alone
        components = resolve_components(config)
        if "source" not in components:
            raise TransferError("diagnose compares two domains, and source=none leaves one: set source=NAME.")
        fingerprints = {group: reader.fingerprint() for group, reader in readers(config, components).items()}
        problem = pose_problem(config, components, fingerprints)
        task, tests = problem.task, _tests(problem)

        # what the inputs alone tell, once
        if not found:
            found = _of_inputs(config, components, problem, tests, samples)

        # features of some samples, and what they tell
        parts = _some(task, samples, config)
        backbone = build_frozen_backbone(config, components, task.input, device)
        features = _features(parts, backbone, config, components, device, console)
        figures, sentences = compare(task, parts, features, config.seed)
        found["backbones"][name] = {**figures, "seconds": round(time.perf_counter() - began, 1)}
        found["sentences"] = list(
            dict.fromkeys([*found["sentences"], *sentences, *_untrained(name, components, backbone)])
        )

    # in words
    found["advised"] = next(iter(configs))
    found["advice"] = advise(found, found["advised"])
    found["path"] = str(_path(configs, samples))
    found["seconds"] = round(time.perf_counter() - began, 1)
    return _written(finite(found))


def compare(
    task: TransferTask, parts: Mapping[str, Part | Unlabelled], features: Mapping[str, Tensor], seed: int
) -> tuple[dict[str, Any], list[str]]:
    """All figures of one backbone's features `(N, D)` of `source`, `target` and, where labels are granted, `granted`; and
    sentences about those that are left out."""
    seed = derive_seed(seed, "diagnose") % 2**31
    s, t = distances.standardised(features["source"], features["target"])
    source = parts["source"]
    assert isinstance(source, Part)
    figures: dict[str, Any] = {
        "width": features["source"].shape[1],
        "a_distance": distances.a_distance(s, t, seed),
        "mmd": distances.mmd_test(s, t, seed),
        "moments": distances.moments(s, t, seed),
    }
    scores, guesses, sentences = _labelled(task, parts, features, seed)
    figures |= guesses
    weights = figures.get("label_shift", {}).get("weights")
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    differs = figures["mmd"]["p"] <= ALPHA  # else there is nothing to remove but chance
    figures["removed"] = distances.removed(s, t, source.labels, given, seed) if differs else {}
    figures["transferability"] = scores
    return figures, sentences


def _labelled(
    task: TransferTask, parts: Mapping[str, Part | Unlabelled], features: Mapping[str, Tensor], seed: int
) -> tuple[dict[str, float], dict[str, Any], list[str]]:
    """Scores of transferability, what source classifiers find, and sentences."""
    source, granted = parts["source"], parts.get("granted")
    assert isinstance(source, Part)
    labels, x = (source, features["source"]) if granted is None else (granted, features["granted"])
    assert isinstance(labels, Part)
    sentences = []
    if granted is None:
        sentences.append(
            "No target label is granted (target_labels=0): LogME and H-score are of the source's labels, and say how well the "
            "features tell those; LEEP and NCE are left out."
        )
    if task.kind == "regression":
        sentences.append("Regression: label shift by BBSE, H-score, LEEP and NCE are for classes, and left out.")
        return {"logme": transferability.logme(x, labels.labels)}, {}, sentences

    classes = len(task.label_space.source)
    own = len(task.label_space.classes) if granted is not None else classes
    scores = {"logme": transferability.logme(x, labels.labels, own)}
    shrunk, plain = (transferability.h_score(x, labels.labels, shrunk=how) for how in (True, False))
    scores |= {name: value for name, value in (("h_score_shrunk", shrunk), ("h_score", plain)) if value is not None}
    further = features["granted"] if granted is not None else features["target"][:0]
    guessed = label_shift.cross_fitted(features["source"], source.labels, classes, features["target"], further)
    if guessed is None:
        sentences.append("A source class has too few samples for a classifier: label shift, LEEP and NCE are left out.")
        return scores, {}, sentences
    if granted is not None:
        share = torch.bincount(labels.labels, minlength=own).double() / len(labels)
        scores["leep"] = transferability.leep(guessed.further, labels.labels, own)
        scores["nce"] = transferability.nce(guessed.further.argmax(1), labels.labels, classes, own)
        scores["label_entropy"] = float(torch.special.entr(share).sum())
    right = float((guessed.source == source.labels).double().mean())
    largest = float(torch.bincount(source.labels).max()) / len(source)
    figures: dict[str, Any] = {"source_classifier": {"accuracy": right, "chance": largest}}
    if task.label_space.setting == "closed":
        figures["label_shift"] = label_shift.bbse(source.labels, guessed.source, guessed.target, classes, seed)
    else:
        sentences.append(
            f"Label shift by BBSE needs the same classes in both domains, not label_space={task.label_space.setting}."
        )
    return scores, figures, sentences


def _tests(problem: Problem) -> dict[str, Unlabelled]:
    """Held-out inputs by domain; their labels stay behind."""
    held = {"source test": problem.heldout.source_test, "target test": problem.heldout.target_test}
    return {name: Unlabelled.of(part) for name, part in held.items() if part is not None}


def _of_inputs(
    config: Config, components: Components, problem: Problem, tests: Mapping[str, Unlabelled], samples: int
) -> dict[str, Any]:
    task, space = problem.task, problem.task.label_space
    assert task.source is not None
    granted = task.target_labelled
    parts: dict[str, Part | Unlabelled] = {"source train": task.source, "target train": task.target_unlabelled, **tests}
    some = _some(task, samples, config)
    known = {side: statistics.describe(some[side].inputs, config.workers) for side in ("source", "target")}
    shown = statistics.differences(known["source"], known["target"])
    columns = len(known["source"]["mean"])
    if columns > COLUMNS:
        known = {side: {k: v for k, v in d.items() if k == "length"} for side, d in known.items()}
    by_design = {("target train", "target test")} if config.protocol == "transductive" else set()
    named = task.kind == "classification"
    return {
        "schema_version": SCHEMA,
        "source": label(components["source"]),
        "target": label(components["target"]),
        "kind": task.kind,
        "setting": {
            "target_labels": config.target_labels,
            "protocol": config.protocol,
            "label_space": config.label_space,
        },
        "label_space": {"setting": space.setting, "overlap": space.overlap(), "shared": list(space.shared)}
        if named
        else None,
        "samples": {
            "source": len(some["source"]),
            "source_all": len(task.source),
            "target": len(some["target"]),
            "target_all": len(task.target_unlabelled),
            "granted": 0 if granted is None else len(granted),
        },
        "notes": list(problem.notes),
        "statistics": {"kind": task.input.kind, **known, "differences": shown},
        "labels": None
        if named
        else statistics.regression_labels(task.source.labels, None if granted is None else granted.labels),
        "duplicates": duplicates.between(_prints(parts, samples, config), by_design),
        "by_design": [" / ".join(pair) for pair in sorted(by_design)],
        "backbones": {},
        "sentences": [],
    }


def _prints(parts: Mapping[str, Part | Unlabelled], samples: int, config: Config) -> dict[str, duplicates.Prints]:
    limits = {name: SCANNED if _is_small(part.inputs) else samples for name, part in parts.items()}
    chosen = {name: _take(part, _draw(len(part), limits[name], config, name)) for name, part in parts.items()}
    sequences = [part.inputs.values for part in chosen.values() if isinstance(part.inputs, SequenceInputs)]
    longest = max((len(sequence) for values in sequences for sequence in values), default=0)
    return {name: duplicates.prints(p.inputs, p.ids, config.workers, longest) for name, p in chosen.items()}


def _is_small(inputs: Inputs) -> bool:
    return inputs.in_memory and math.prod(inputs.spec.shape) <= SMALL


def _some(task: TransferTask, samples: int, config: Config) -> dict[str, Part | Unlabelled]:
    """At most so many samples of each domain, and all that is granted."""
    assert task.source is not None
    parts: dict[str, Part | Unlabelled] = {"source": task.source, "target": task.target_unlabelled}
    chosen = {name: _take(part, _draw(len(part), samples, config, name)) for name, part in parts.items()}
    granted = task.target_labelled
    return (
        chosen
        if granted is None
        else {**chosen, "granted": _take(granted, _draw(len(granted), samples, config, "granted"))}
    )


def _draw(n: int, wanted: int, config: Config, name: str) -> Tensor:
    draw = torch.Generator().manual_seed(derive_seed(config.data_seed, "diagnose", name))
    return torch.randperm(n, generator=draw)[:wanted].sort().values


def _take(part: Part | Unlabelled, rows: Tensor) -> Part | Unlabelled:
    if isinstance(part, Part):
        return part.take(rows)
    origin = None if part.origin is None else part.origin.take(rows)
    return Unlabelled(part.inputs.take(rows), tuple(part.ids[i] for i in rows.tolist()), origin)


def _features(
    parts: Mapping[str, Part | Unlabelled],
    backbone: Backbone,
    config: Config,
    components: Components,
    device: torch.device,
    console: Console,
) -> dict[str, Tensor]:
    """`(N, D)` float64 on the CPU, those that runs keep shared with them."""
    changed: Sequence[Part | Unlabelled] = list(parts.values())
    if not backbone.trivial:
        extractor = make_extractor(backbone, components["backbone"], changed[0].inputs.spec, config, device)
        changed = on_features(changed, extractor, feature_cache(config), console)
    backbone.eval()
    found = {name: _values(part.inputs, backbone, config, device) for name, part in zip(parts, changed, strict=True)}
    for name, values in found.items():
        if not bool(values.isfinite().all()):
            raise TransferError(f"backbone {components['backbone'].name} gives {name} features that are not finite.")
    return found


@torch.no_grad()
def _values(inputs: Inputs, backbone: Backbone, config: Config, device: torch.device) -> Tensor:
    with closing(in_order(inputs, config.trainer.eval_batch_size, device)) as batches:
        return torch.cat([(x.values if isinstance(x, Extracted) else backbone(x)).double().cpu() for x in batches])


def _untrained(name: str, components: Components, backbone: Backbone) -> list[str]:
    """A word on networks whose weights are random: their features say nothing of what training will make of them."""
    if components["backbone"].parameters.get("weights", "") != "none" or not any(True for _ in backbone.parameters()):
        return []
    return [
        f"{name} has random weights: its figures are of the inputs through them, not of what training makes of them. "
        "backbone.weights=RUN/checkpoints/best.pt takes a run's; hog and scattering need none."
    ]


def _path(configs: Mapping[str, Config], samples: int) -> Path:
    """A function of what was asked."""
    first = next(iter(configs.values()))
    identities = [identify(config, resolve_components(config)) for config in configs.values()]
    text = json.dumps([samples, *(identity.hash for identity in identities)])
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Path(first.outputs) / "diagnose" / f"{identities[0].pair}-{digest}.json"


def _written(found: dict[str, Any]) -> dict[str, Any]:
    path = Path(found["path"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    except OSError as error:
        raise TransferError(
            f"cannot write {path}: {error.strerror}. Set outputs=DIR to a folder that can be written."
        ) from error
    return found


def finite(value: Any) -> Any:
    """The same without numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
