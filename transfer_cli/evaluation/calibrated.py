"""What follows the choice of a checkpoint: a model recalibrated, and with prediction sets, from labels that trained nothing.

Target labels that were granted and kept back for it; with none, the source's validation samples. Where the calibration and the sets
would use the same samples, each gets half of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transfer_cli.config.schema import Config
from transfer_cli.data.batching import derive_seed
from transfer_cli.data.domain import Part
from transfer_cli.data.task import TransferTask, deal
from transfer_cli.errors import TransferError
from transfer_cli.evaluation.calibration import Calibration, LabelledPrediction, fit_calibration
from transfer_cli.evaluation.conformal import ENOUGH, Conformal, DensityRatio, fewest, fit_conformal, fit_density_ratio
from transfer_cli.evaluation.evaluator import Evaluator, Predictor
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.evaluation.samples import evenly

WEIGHED = 2000  # samples a domain that the density ratio is found from


@dataclass(frozen=True)
class Calibrated:
    """A model whose predictions are recalibrated, and given sets or intervals, as far as the parts are there."""

    model: Predictor
    calibration: Calibration | None = None
    conformal: Conformal | None = None

    def predict(self, x: Any) -> Prediction:
        return self.finish(self.model.predict(x), lambda: self.model.features(x).cpu())

    def predict_source(self, x: Any) -> Prediction:
        return self.finish(self.model.predict_source(x), lambda: self.model.features_source(x).cpu())

    def predict_and_features(self, x: Any, domain: str) -> tuple[Prediction, Tensor | None]:
        return (self.predict_source(x) if domain == "source" else self.predict(x)), None

    def finish(self, prediction: Prediction, features: Callable[[], Tensor]) -> Prediction:
        """What the model predicts, recalibrated; `features` `(B, D)` of the same samples are asked for where sets need them."""
        prediction = prediction.cpu()  # where float64 is sure to be
        if self.calibration is not None:
            prediction = self.calibration(prediction)
        if self.conformal is not None:
            prediction = self.conformal(prediction, None if self.conformal.ratio is None else features())
        return prediction

    def finish_all(self, evaluator: Evaluator, found: Mapping[str, Prediction]) -> dict[str, Prediction]:
        """The model's `predictions` by the evaluator, recalibrated without predicting again."""
        parts = evaluator.parts()
        return {
            name: self.finish(prediction, partial(evaluator.features, self.model, *parts[name]))
            for name, prediction in found.items()
        }

    def features(self, x: Any) -> Tensor:
        return self.model.features(x)

    def features_source(self, x: Any) -> Tensor:
        return self.model.features_source(x)

    def pictures(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        return self.model.pictures(source, target)

    def eval(self) -> Any:
        return self.model.eval()

    def state(self) -> dict[str, dict[str, Any] | None]:
        """Tensors and numbers, of which `restore` makes the same again."""
        conformal = None if self.conformal is None else dict(vars(self.conformal))
        if conformal is not None and conformal["ratio"] is not None:
            conformal["ratio"] = dict(vars(conformal["ratio"]))
        return {
            "calibration": None if self.calibration is None else dict(vars(self.calibration)),
            "conformal": conformal,
        }

    @classmethod
    def restore(cls, model: Predictor, state: dict[str, Any]) -> Calibrated:
        calibration, conformal = state["calibration"], state["conformal"]
        if conformal is not None and conformal["ratio"] is not None:
            conformal = {**conformal, "ratio": DensityRatio(**conformal["ratio"])}
        return cls(
            model,
            None if calibration is None else Calibration(**calibration),
            None if conformal is None else Conformal(**conformal),
        )


@dataclass(frozen=True, eq=False)
class Samples:
    """Labelled samples that trained nothing, of the `domain` source or target."""

    part: Part
    domain: str


@dataclass(frozen=True)
class Roles:
    """What each is fitted to: the calibration, its prior's centre, and the scores of the sets."""

    calibration: Samples | None
    prior: Samples | None
    scores: Samples | None


def roles(config: Config, task: TransferTask) -> Roles:
    kept = task.target_calibration
    target = None if kept is None else Samples(kept, "target")
    validation = task.source_validation if task.source_labels_fit_head else None
    source = None if validation is None else Samples(validation, "source")
    calibration = None if config.calibration == "none" else target or source
    prior = source if config.calibration in ("ts_map", "vector") and calibration is not source else None
    scores = {"none": None, "target": target}.get(config.conformal, source)
    if scores is not None and scores in (calibration, prior):
        draw = torch.Generator().manual_seed(derive_seed(config.data_seed, "calibration"))
        first, second = (Samples(part, scores.domain) for part in deal(scores.part, 0.5, draw))
        calibration = first if calibration is scores else calibration
        prior = first if prior is scores else prior
        scores = second
    return Roles(calibration, prior, scores)


def check_calibration(config: Config, task: TransferTask) -> None:
    """Raises:
    TransferError: the task has no labels for what is asked, or too few."""
    parts = roles(config, task)
    if config.calibration != "none" and parts.calibration is None:
        raise TransferError(
            f"calibration={config.calibration} needs labels that train nothing: set target_labels=N, or a source with the target's "
            "classes and split.validation above 0."
        )
    for what in (parts.calibration, parts.prior):
        if what is not None and not len(what.part):
            raise TransferError(
                f"calibration={config.calibration} has no {what.domain} label: "
                f"set {'target_labels or calibration_share' if what.domain == 'target' else 'split.validation'} higher."
            )
    kept, rest = task.target_calibration, task.target_labelled
    if kept is not None and config.calibration_share < 1 and task.kind == "classification":
        trained = set() if rest is None else set(rest.labels.tolist())
        if missing := set(kept.labels.tolist()) - trained:
            raise TransferError(
                f"calibration_share={config.calibration_share:g} leaves {len(missing)} classes without a target label to learn "
                "from: set target_labels higher, or calibration_share=1 for a method that needs none."
            )
    if task.label_space.setting == "open" and (config.conformal != "none" or config.calibration == "vector"):
        raise TransferError(
            "label_space=open has classes of which no label can be granted: no set can be promised to hold them. "
            "Set conformal=none and calibration=ts or ts_map."
        )
    if config.conformal == "none":
        return
    granted = config.conformal == "target"
    if parts.scores is None and not granted:
        raise TransferError(
            f"conformal={config.conformal} needs validation samples of a source with the target's classes: set source=NAME and "
            "split.validation above 0, or conformal=target with target_labels=N."
        )
    found, needed = 0 if parts.scores is None else len(parts.scores.part), fewest(config.conformal_level)
    if found < needed:
        raise TransferError(
            f"conformal={config.conformal} needs {needed} labels at conformal_level={config.conformal_level:g}, and has {found}: "
            f"set {'target_labels or calibration_share' if granted else 'split.validation'} higher, or the level lower."
        )


def calibrate(evaluator: Evaluator, model: Predictor, config: Config) -> tuple[Calibrated, dict[str, Any]]:
    """The model with what the configuration asks for; and what was found of the `calibration` and of the `conformal` sets, for
    people, None where there is none."""
    task = evaluator.task
    parts = roles(config, task)

    def predicted(predictor: Predictor, samples: Samples) -> LabelledPrediction:
        return LabelledPrediction(
            evaluator.predict(predictor, samples.part.inputs, samples.domain), samples.part.labels
        )

    scaled, found = Calibrated(model), None
    if parts.calibration is not None:
        prior = None if parts.prior is None else predicted(model, parts.prior)
        calibration, figures = fit_calibration(config.calibration, predicted(model, parts.calibration), prior)
        scaled = Calibrated(model, calibration)
        known = {"labels": len(parts.calibration.part), "domain": parts.calibration.domain}
        found = {"kind": config.calibration, **known, **figures}
    if parts.scores is None:
        return scaled, {"calibration": found, "conformal": None}
    ratio, features = None, None
    if config.conformal == "weighted":
        assert task.source is not None
        few = [part.inputs.take(evenly(len(part), WEIGHED)) for part in (task.source, task.target_unlabelled)]
        ratio = fit_density_ratio(
            evaluator.features(model, few[0], "source"), evaluator.features(model, few[1], "target")
        )
        features = evaluator.features(model, parts.scores.part.inputs, "source")
    conformal = fit_conformal(predicted(scaled, parts.scores), config.conformal_level, ratio, features)
    known = {"labels": len(parts.scores.part), "domain": parts.scores.domain}
    told = {"kind": config.conformal, "level": config.conformal_level, **known, "effective_labels": conformal.effective}
    told["few"] = conformal.effective < ENOUGH
    return Calibrated(model, scaled.calibration, conformal), {"calibration": found, "conformal": told}
