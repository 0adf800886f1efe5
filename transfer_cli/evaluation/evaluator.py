"""The one evaluator: holds the held-out labels, which nothing else sees, and dispatches on the task's kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from transfer_cli.config.schema import Config
from transfer_cli.data.batching import derive_seed, in_order
from transfer_cli.data.inputs import ArrayInputs, FeatureInputs, Inputs
from transfer_cli.data.task import Heldout, TransferTask
from transfer_cli.errors import TransferError
from transfer_cli.evaluation.health import prediction_health
from transfer_cli.evaluation.metrics import final_score, out_of_distribution, score
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.evaluation.samples import evenly
from transfer_cli.evaluation.validators import (
    SAMPLED,
    VALIDATORS,
    WITHOUT_A_SCORE,
    Validator,
    View,
    applicable,
    load_validator,
    needed,
    refuse,
)
from transfer_cli.run_folder import HEADLINE

SAMPLE = 500  # samples a domain whose features are kept for the report
EXAMPLES = 64  # samples a domain whose inputs are kept, spread over the test set
SMALL, MORE_EXAMPLES = 4096, 256  # of the target's, if an image has so few bytes, so many
PICTURED = 16  # samples a domain that a method may make pictures of


class Predictor(Protocol):
    def predict(self, x: Any) -> Prediction: ...
    def predict_source(self, x: Any) -> Prediction: ...
    def predict_and_features(self, x: Any, domain: str) -> tuple[Prediction, Tensor | None]: ...
    def features(self, x: Any) -> Tensor: ...
    def features_source(self, x: Any) -> Tensor: ...
    def pictures(self, source: Tensor, target: Tensor) -> dict[str, Tensor]: ...
    def eval(self) -> Any: ...


@dataclass(frozen=True)
class Look:
    """One evaluation during training. `score` is the selection's; `oracle` that of target test labels."""

    score: float
    oracle: float
    validators: dict[str, float]
    target_test: dict[str, float]
    headline: tuple[str, float]
    health: dict[str, float] = field(default_factory=dict)


class Evaluator:
    def __init__(
        self,
        task: TransferTask,
        heldout: Heldout,
        *,
        selection: str,
        plugins: Sequence[str],
        device: torch.device,
        batch_size: int,
        workers: int,
        seed: int,
        channels_last: bool = False,
    ) -> None:
        self.task, self.heldout = task, heldout
        self.device, self.batch_size, self.workers, self.channels_last = device, batch_size, workers, channels_last
        self.seed = derive_seed(seed, "evaluation")
        space = task.label_space
        self.known = len(space.classes) if space.setting == "open" else None  # of the target's classes; more is unknown
        self.selection = self._choose(selection)
        names = dict.fromkeys([*VALIDATORS, *([] if self.selection in WITHOUT_A_SCORE else [self.selection])])
        self.validators: dict[str, Validator] = {name: load_validator(name, plugins) for name in names}
        if self.selection not in WITHOUT_A_SCORE:  # said now, not after the first hundred steps
            lacking = [need for need in needed(self.validators[self.selection]) if not self._provides(need)]
            refuse(self.selection, lacking)

    @property
    def uses_target_labels(self) -> bool:
        return self.selection == "oracle"

    def _choose(self, selection: str) -> str:
        if selection == "auto":
            if self.task.kind == "classification":
                return "im"
            return "source_val" if self.task.source_validation is not None else "last"
        return selection

    def _provides(self, need: str) -> bool:
        """Whether the task has what a validator may need."""
        has_validation = self.task.source_validation is not None
        return {
            "classification": self.task.kind == "classification",
            "source_labels": has_validation and self.task.source_labels_fit_head,
            "source_features": has_validation,
        }.get(need, True)

    def look(self, method: Predictor) -> Look:
        """Every validator's score, and the figures on the target test set (for the record and the oracle alone)."""
        view, test = self._view(method), self.predict(method, self.heldout.target_test.inputs)
        return replace(self._look(view, test), health={**prediction_health(view), **_feature_norms(view)})

    def _look(self, view: View, test: Prediction) -> Look:
        scores = {name: validator(view) for name, validator in self.validators.items() if applicable(view, validator)}
        figures = score(self.task.kind, test, self.heldout.target_test.labels, self.known)
        name = HEADLINE[self.task.kind]
        oracle = figures[name] if name == "accuracy" else -figures[name]
        chosen = {"last": 0.0, "oracle": oracle}.get(self.selection)
        if chosen is None:
            chosen = scores[self.selection]
            if math.isnan(chosen):
                raise TransferError(f"selection={self.selection} says nan, which chooses nothing.")
        return Look(chosen, oracle, scores, figures, (name, figures[name]))

    def _view(self, method: Predictor) -> View:
        parts = {"source": self.task.source_validation, "target": self.task.target_validation}
        seen: dict[str, Tensor | None] = {}

        def extract(domain: str) -> Tensor | None:
            part = parts[domain]
            if seen.get(domain) is not None or part is None or not len(part):
                return seen.get(domain)
            return self.features(method, part.inputs.take(evenly(len(part), SAMPLED)), domain)

        target, seen["target"] = self._seen(method, self.task.target_validation.inputs, "target")
        part = self.task.source_validation
        if part is None or not self.task.source_labels_fit_head:
            return View(self.task.kind, None, None, target, extract)
        source, seen["source"] = self._seen(method, part.inputs, "source")
        return View(self.task.kind, source, part.labels, target, extract)

    def parts(self) -> dict[str, tuple[Inputs, str]]:
        """What the final figures are of: the inputs, and the domain that they are predicted as."""
        heldout = self.heldout
        found = {"target_test": (heldout.target_test.inputs, "target")}
        if heldout.source_test is not None and self.task.source_labels_fit_head:
            found["source_test"] = (heldout.source_test.inputs, "source")
        if heldout.ood is not None:
            found["ood"] = (heldout.ood.inputs, "target")
        return found

    def predictions(self, method: Predictor) -> dict[str, Prediction]:
        """Of the `parts`."""
        return {name: self.predict(method, *part) for name, part in self.parts().items()}

    def figures(self, found: Mapping[str, Prediction]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Metrics by split, and arrays for predictions.npz."""
        metrics: dict[str, Any] = {"source_test": None}
        arrays: dict[str, Any] = {}
        for split in ("target_test", "source_test"):
            if split not in found:
                continue
            part = self.heldout.target_test if split == "target_test" else self.heldout.source_test
            assert part is not None
            known = self.known if split == "target_test" else None
            metrics[split] = score(self.task.kind, found[split], part.labels, known)
            metrics[split] |= final_score(found[split], part.labels)
            arrays.update(_arrays(split, found[split], part.labels, part.ids))
        if "ood" in found:
            metrics["ood"] = out_of_distribution(found["target_test"], found["ood"])
        return metrics, arrays

    def scores(self, method: Predictor, test: Prediction) -> dict[str, float]:
        """The validators', of a method that predicts `test` of the target test set."""
        return self._look(self._view(method), test).validators

    def samples(self, method: Predictor) -> tuple[dict[str, Any], dict[str, Any]]:
        """Features and images of samples spread over both test sets, for the report; `<split>_index` names the images' rows."""
        features: dict[str, Any] = {}
        examples: dict[str, Any] = {}
        for split, part in (("source_test", self.heldout.source_test), ("target_test", self.heldout.target_test)):
            if part is None or not len(part):
                continue
            few = part.take(evenly(len(part), SAMPLE))
            function = _features(method, split.removesuffix("_test"))
            features[split] = torch.cat(self.run(method, few.inputs, function)).numpy()
            features[f"{split}_labels"] = few.labels.numpy()
            inputs = part.inputs.raw if isinstance(part.inputs, FeatureInputs) else part.inputs
            if inputs.spec.kind == "image":
                many = split == "target_test" and math.prod(inputs.spec.shape) <= SMALL
                rows = evenly(len(part), MORE_EXAMPLES if many else EXAMPLES)
                shown = inputs.take(rows)
                images = shown.values if isinstance(shown, ArrayInputs) else shown.batch(torch.arange(len(shown)))
                examples |= {split: images.numpy(), f"{split}_index": rows.numpy()}  # type: ignore[union-attr]
        return features, {**examples, **self._pictures(method)}

    def _pictures(self, method: Predictor) -> dict[str, Any]:
        """Those that the method makes of samples of both test sets, uint8 as the examples are."""
        images = []
        for part in (self.heldout.source_test, self.heldout.target_test):
            if part is None or not len(part) or part.inputs.spec.kind != "image":
                return {}
            few = part.inputs.take(evenly(len(part), PICTURED))
            images.append(torch.cat(self.run(method, few, lambda x: x, workers=0)))
        with torch.inference_mode(), isolated(self.seed, self.device):
            made = method.pictures(*images)
        return {name: x.float().mul(255).round().clamp(0, 255).byte().cpu().numpy() for name, x in made.items()}

    def predict(self, method: Predictor, inputs: Inputs, domain: str = "target") -> Prediction:
        """What the method predicts of inputs of a domain, on the CPU; the run's own random draws stay as they are.

        Raises:
            TransferError: a number that is not finite.
        """
        function = method.predict_source if domain == "source" else method.predict
        return _whole(self.run(method, inputs, function))

    def _seen(self, method: Predictor, inputs: Inputs, domain: str) -> tuple[Prediction, Tensor | None]:
        """`predict`, and the features of `SAMPLED` of the inputs where the method finds both in one pass."""
        chosen = torch.zeros(len(inputs), dtype=torch.bool)
        chosen[evenly(len(inputs), SAMPLED)] = True
        rest, kept = chosen, []

        def both(x: Any) -> Prediction:
            nonlocal rest
            prediction, features = method.predict_and_features(x, domain)
            if features is not None:
                mine, rest = rest[: len(features)], rest[len(features) :]
                kept.append(features[mine.to(features.device)].float().cpu().flatten(1))
            return prediction

        prediction = _whole(self.run(method, inputs, both))
        return prediction, torch.cat(kept) if kept else None

    def features(self, method: Predictor, inputs: Inputs, domain: str) -> Tensor:
        """The method's features `(N, D)` of inputs of a domain, float32 on the CPU."""
        return torch.cat(self.run(method, inputs, _features(method, domain))).flatten(1)

    def run(
        self, method: Predictor, inputs: Inputs, function: Callable[[Any], Any], workers: int | None = None
    ) -> list[Any]:
        method.eval()
        workers = self.workers if workers is None else workers
        batches = in_order(inputs, self.batch_size, self.device, workers, self.channels_last)
        with torch.inference_mode(), isolated(self.seed, self.device), closing(batches):
            return [function(x) for x in batches]


def _whole(batches: Sequence[Prediction]) -> Prediction:
    """Raises:
    TransferError: a number that is not finite."""
    prediction = Prediction.concatenate(batches)
    if not prediction.is_finite():
        raise TransferError(
            "the predictions are not finite: the weights have diverged. A lower optimizer.lr or trainer.clip_norm=1 "
            "usually helps."
        )
    return prediction


def _feature_norms(view: View) -> dict[str, float]:
    """The mean Euclidean norm of validation samples' features, by domain."""
    found = {"source": view.source_features, "target": view.target_features}
    return {f"feature_norm_{domain}": float(x.norm(dim=1).mean()) for domain, x in found.items() if x is not None}


def _features(method: Predictor, domain: str) -> Callable[[Any], Tensor]:
    """Inputs to features of their domain, on the CPU."""
    function = method.features_source if domain == "source" else method.features
    return lambda x: function(x).float().cpu()


def make_evaluator(config: Config, task: TransferTask, heldout: Heldout, device: torch.device) -> Evaluator:
    return Evaluator(
        task,
        heldout,
        selection=config.selection,
        plugins=config.plugins,
        device=device,
        batch_size=config.trainer.eval_batch_size,
        workers=config.workers,
        seed=config.seed,
        channels_last=config.trainer.channels_last,
    )


@contextmanager
def isolated(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators seeded for the block and then put back: an evaluation leaves a run's own draws alone."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _arrays(split: str, prediction: Prediction, labels: Tensor, ids: Sequence[str]) -> dict[str, Any]:
    arrays: dict[str, Any] = {f"{split}_labels": labels.numpy(), f"{split}_ids": np.array(ids)}
    if prediction.log_probs is not None:
        arrays[f"{split}_probs"] = prediction.probs.float().numpy()
    for name in ("mean", "variance", "epistemic", "lower", "upper"):
        value = getattr(prediction, name)
        if value is not None:
            arrays[f"{split}_{name}"] = value.float().numpy()
    if prediction.members is not None:
        arrays[f"{split}_members"] = prediction.members.numpy()
    return arrays
