"""Linear discriminant analysis with a prior from the source (normal-inverse-Wishart; Gelman et al., section 3.6).

    Σ ~ IW(ν0, (ν0 - D - 1) S)        μ_c ~ N(m_c, Σ / κ0)        p(c | x) ∝ ((n_c + 1) t(x | c))^(1 / T)

S is the source's covariance within classes. Where the head's classes are the source's, m_c are its class means and κ0, how little
they move, is chosen by the target labels' evidence; elsewhere (`centre: common`) m is the mean of all and κ0 the source's own
spread of class means. ν0 is chosen by evidence over a wide grid; both may be set. t is the posterior predictive, Student's; T is
found by `folds`-fold cross-validation on the granted labels, with log T ~ N(0, ½²): where few samples are all right when left out,
likelihood alone would make every prediction certain. Without target labels the prior itself predicts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.evaluation.temperature import fit_temperature
from transfer_cli.methods.base import Context, Needs
from transfer_cli.methods.bayes.base import SourceInformed
from transfer_cli.methods.bayes.summary import Summary
from transfer_cli.methods.heads.base import Head
from transfer_cli.methods.math.folds import folds_of
from transfer_cli.methods.math.niw import NIW, log_evidence
from transfer_cli.methods.phases import FeatureTask

SPARE = torch.logspace(0, 6, 25, dtype=torch.float64)  # ν0 - D - 1
KAPPA = torch.logspace(-3, 4, 15, dtype=torch.float64)


class NIWHead(Head):
    """The posterior and its predictive; fitted by the method."""

    kinds = ("classification",)

    def predict(self, x: Tensor) -> Prediction:
        state = self.fitted
        posterior = NIW(state.mean, state.kappa, float(state.nu), state.scale)
        return Prediction.from_logits(class_scores(posterior, state.counts, x.double()) / state.temperature)


class NIWLDA(SourceInformed):
    version = 3  # the source's covariance is shrunk in units of each feature
    needs = Needs(source_of_any_classes=True)

    def __init__(
        self,
        context: Context,
        *,
        centre: Literal["auto", "common", "class"] = "auto",
        nu: float | None = None,
        kappa: float | None = None,
        folds: int = 5,
    ) -> None:
        super().__init__(context, NIWHead(context.kind, context.outputs), folds)
        shared = context.source_labels_fit_head
        if centre == "class" and not shared:
            raise ValueError("centre=class needs the source's classes: set method.centre=common")
        if not shared and not context.has_target_labels:
            raise ValueError("has no label of the target's classes: set target_labels=N")
        if (kappa is not None and kappa <= 0) or (nu is not None and nu <= context.feature_dim + 1):
            raise ValueError(f"kappa is positive, and nu above D + 1 = {context.feature_dim + 1}, or null")
        self.by_class = shared if centre == "auto" else centre == "class"
        self.nu, self.kappa = nu, kappa

    def learn(self, task: FeatureTask) -> dict[str, float]:
        summary, few = self.summary(task), task.target_labelled
        x = summary.means[:0] if few is None else few.x
        y = torch.zeros(0, dtype=torch.int64, device=x.device) if few is None or few.y is None else few.y
        prior = self.prior(summary, x, y)
        posterior, counts = prior.update(x, y), torch.bincount(y, minlength=self.num_classes).to(x)
        temperature, nu = x.new_tensor(self.temperature(prior, x, y)), x.new_tensor(posterior.nu)
        self.head.fitted.put(mean=posterior.mean, kappa=posterior.kappa, nu=nu, scale=posterior.scale)
        self.head.fitted.put(counts=counts, temperature=temperature)
        return {"nu": prior.nu, "kappa": float(prior.kappa[0]), "temperature": float(temperature)}

    def prior(self, summary: Summary, x: Tensor, y: Tensor) -> NIW:
        """With ν0 and κ0 of the greatest evidence of the granted samples `(n, D)`, `(n,)`, where they are not set."""
        width = x.shape[1]
        if self.by_class:
            unseen = summary.counts == 0
            means = torch.where(unseen[:, None], summary.centre, summary.means)
            kappas = KAPPA.to(x) if self.kappa is None else x.new_tensor([self.kappa])
        else:
            means = summary.centre.expand(self.num_classes, -1)
            kappas = x.new_tensor([1 / summary.spread() if self.kappa is None else self.kappa])
        spare = SPARE.to(x) if self.nu is None else x.new_tensor([self.nu - width - 1])
        if not len(y):  # nothing chooses: the source is believed
            spare, kappas = spare[-1:], kappas[-1:]
        table = [log_evidence(x, y, means, k.expand(len(means)), summary.within, spare) for k in kappas]
        best = int(torch.stack(table).argmax())
        kappa, s = kappas[best // len(spare)], float(spare[best % len(spare)])
        return NIW(means.contiguous(), kappa.expand(len(means)).contiguous(), width + 1 + s, s * summary.within)

    def temperature(self, prior: NIW, x: Tensor, y: Tensor) -> float:
        """Of predictions at samples that the posterior has not seen; 1 where no class has two."""
        folds = folds_of(y, self.folds)
        if folds is None:
            return 1.0
        scores = x.new_zeros(len(y), self.num_classes)
        for fold in folds.unique():
            left, seen = folds == fold, folds != fold
            counts = torch.bincount(y[seen], minlength=self.num_classes).to(x)
            scores[left] = class_scores(prior.update(x[seen], y[seen]), counts, x[left])
        return fit_temperature(scores, y, centre=1.0)


def class_scores(posterior: NIW, counts: Tensor, x: Tensor) -> Tensor:
    """Unnormalised log-probabilities `(B, K)`; classes by their granted samples, with one more each."""
    return posterior.log_density(x) + (counts + 1).log()
