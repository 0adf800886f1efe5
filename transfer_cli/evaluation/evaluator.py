"""The one evaluator: holds the held-out labels, which nothing else sees, and dispatches on the task's kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
from transfer_cli.evaluation.health import evenly, prediction_health
from transfer_cli.evaluation.metrics import final_score, out_of_distribution, score
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.evaluation.validators import VALIDATORS, WITHOUT_A_SCORE, Validator, View, applicable, load_validator
from transfer_cli.run_folder import HEADLINE

SAMPLE = 500  # samples a domain whose features are kept for the report
EXAMPLES = 64  # samples a domain whose inputs are kept, spread over the test set
SMALL, MORE_EXAMPLES = 4096, 256  # of the target's, if an image has so few bytes, so many
PICTURED = 16  # samples a domain that a method may make pictures of
NORMED = 128  # samples a domain whose features' norm is watched: a mean needs no more


class Predictor(Protocol):
    def predict(self, x: Any) -> Prediction: ...
    def predict_source(self, x: Any) -> Prediction: ...
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

    @property
    def uses_target_labels(self) -> bool:
        return self.selection == "oracle"

    def _choose(self, selection: str) -> str:
        if selection == "auto":
            if self.task.kind == "classification":
                return "im"
            return "source_val" if self.task.source_validation is not None else "last"
        if selection in ("im", "entropy") and self.task.kind != "classification":
            raise TransferError(f"selection={selection} is for classification: set selection=source_val or last.")
        return selection

    def look(self, method: Predictor) -> Look:
        """Every validator's score, and the figures on the target test set (for the record and the oracle alone)."""
        view, test = self._view(method), self.predict(method, self.heldout.target_test.inputs)
        return replace(self._look(view, test), health={**prediction_health(view), **self._feature_norms(method)})

    def _look(self, view: View, test: Prediction) -> Look:
        scores = {n: v(view) for n, v in self.validators.items() if n not in VALIDATORS or applicable(view, n)}
        figures = score(self.task.kind, test, self.heldout.target_test.labels, self.known)
        name = HEADLINE[self.task.kind]
        oracle = figures[name] if name == "accuracy" else -figures[name]
        chosen = {"last": 0.0, "oracle": oracle}.get(self.selection)
        if chosen is None:
            if self.selection not in scores:
                self.validators[self.selection](view)  # says what it lacks
            chosen = scores[self.selection]
        return Look(chosen, oracle, scores, figures, (name, figures[name]))

    def _feature_norms(self, method: Predictor) -> dict[str, float]:
        """The mean Euclidean norm of some validation samples' features, by domain."""
        norms: dict[str, float] = {}
        for domain, part in (("source", self.task.source_validation), ("target", self.task.target_validation)):
            if part is not None and len(part):
                few = part.inputs.take(evenly(len(part), min(NORMED, self.batch_size)))
                features = self.run(method, few, _features(method, domain), workers=0)[0].flatten(1)
                norms[f"feature_norm_{domain}"] = float(features.double().norm(dim=1).mean())
        return norms

    def _view(self, method: Predictor) -> View:
        target = self.predict(method, self.task.target_validation.inputs)
        part = self.task.source_validation
        if part is None or not self.task.source_labels_fit_head:
            return View(self.task.kind, None, None, target)
        return View(self.task.kind, self.predict(method, part.inputs, "source"), part.labels, target)

    def final(self, method: Predictor) -> tuple[dict[str, Any], dict[str, float], dict[str, Any]]:
        """Metrics by split, validators' scores, and arrays for predictions.npz."""
        metrics: dict[str, Any] = {"source_test": None}
        arrays: dict[str, Any] = {}
        parts = {"target_test": self.heldout.target_test}
        if self.heldout.source_test is not None and self.task.source_labels_fit_head:
            parts["source_test"] = self.heldout.source_test
        for split, part in parts.items():
            prediction = self.predict(method, part.inputs, split.removesuffix("_test"))
            known = self.known if split == "target_test" else None
            metrics[split] = score(self.task.kind, prediction, part.labels, known)
            metrics[split] |= final_score(prediction, part.labels)
            arrays.update(_arrays(split, prediction, part.labels, part.ids))
            if split == "target_test":
                validators = self._look(self._view(method), prediction).validators
                if self.heldout.ood is not None:
                    metrics["ood"] = out_of_distribution(prediction, self.predict(method, self.heldout.ood.inputs))
        return metrics, validators, arrays

    def samples(self, method: Predictor) -> tuple[dict[str, Any], dict[str, Any]]:
        """Features of the first samples of both test sets, and images of some, whose rows `<split>_index` names; for the report."""
        features: dict[str, Any] = {}
        examples: dict[str, Any] = {}
        for split, part in (("source_test", self.heldout.source_test), ("target_test", self.heldout.target_test)):
            if part is None or not len(part):
                continue
            few = part.take(torch.arange(min(SAMPLE, len(part))))
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
        prediction = Prediction.concatenate(self.run(method, inputs, function))
        if not prediction.is_finite():
            raise TransferError(
                "the predictions are not finite: the weights have diverged. A lower optimizer.lr or trainer.clip_norm=1 "
                "usually helps."
            )
        return prediction

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
