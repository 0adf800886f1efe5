"""C-support vector machine (Cortes & Vapnik 1995; libsvm through scikit-learn), linear or RBF; in regression ε-SVR.

Several classes are decided one against one, by votes, the first class winning a tie, as libsvm does. A class's score is its votes
and, less than one vote, the squashed sum of its duels' decision values; probabilities are `softmax(scores / T)`, T being fitted
on scores of samples that were left out (cross-validation), so the most probable class is libsvm's.

`C` as a list is chosen by `folds`-fold cross-validation on the labelled samples at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.evaluation.temperature import fit_temperature
from transfer_cli.methods.heads.base import Head, check_classes, mean_one

CACHE_MB = 1000
CALIBRATION = 3000  # at most as many samples calibrate the probabilities


class SVM(Head):
    def __init__(
        self,
        kind: str,
        outputs: int,
        *,
        kernel: Literal["linear", "rbf"] = "rbf",
        C: float | Sequence[float] = 1.0,
        gamma: float | Literal["scale", "auto"] = "scale",
        epsilon: float = 0.1,
        folds: int = 5,
    ) -> None:
        super().__init__(kind, outputs)
        self.kernel, self.gamma, self.epsilon, self.folds = kernel, gamma, epsilon, folds
        self.choices = [float(c) for c in C] if isinstance(C, list | tuple) else [float(C)]  # type: ignore[arg-type]
        if not self.choices or min(self.choices) <= 0:
            raise TransferError(f"head.C is a positive number, or a list of them to choose from; not {C}.")

    def fit(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        gamma = self._gamma(x)
        if weights is not None:  # libsvm's precomputed kernels go wrong where a weight is zero
            kept = weights > 0
            x, y, weights = x[kept], y[kept], weights[kept]
        if self.kernel == "linear":
            self._fit(x @ x.T, x, y, weights, None)
        else:
            self._fit(_rbf(x, x, gamma), x, y, weights, gamma)

    def fit_bilinear(self, left: Tensor, right: Tensor, y: Tensor) -> None:
        """With `left_i · right_j` for the kernel of training samples i and j, and `x · left_j` for that of a new one."""
        if self.kernel != "linear":
            raise TransferError("a bilinear kernel needs head=svm head.kernel=linear.")
        self._fit(left @ right.T, left, y, None, None)

    def _fit(self, kernel: Tensor, x: Tensor, y: Tensor, weights: Tensor | None, gamma: float | None) -> None:
        gram, labels, sample_weight = kernel.cpu().numpy(), y.cpu().numpy(), mean_one(weights, x).cpu().numpy()
        if self.kind == "classification":
            check_classes(y)
            self._fit_classes(gram, labels, sample_weight, x)
        else:
            self._fit_targets(gram, labels, sample_weight, x)
        if gamma is not None:
            self.fitted.put(gamma=torch.tensor(gamma, dtype=torch.float64, device=x.device))

    def _fit_classes(self, gram: Any, labels: Any, weights: Any, x: Tensor) -> None:
        from sklearn.svm import SVC

        def make(c: float) -> Any:
            return SVC(C=c, kernel="precomputed", cache_size=CACHE_MB, decision_function_shape="ovo")

        folds = min(self.folds, int(np.unique(labels, return_counts=True)[1].min()))
        best = self.choices[0]
        if len(self.choices) > 1:
            if folds < 2:
                raise TransferError(
                    "head.C is to be chosen by cross-validation, but a class has a single labelled sample."
                )
            splits = _splits(labels, folds, stratified=True)
            scores = [_cross_validated(make(c), gram, labels, weights, splits, _accuracy) for c in self.choices]
            best = self.choices[int(np.argmax(scores))]
        model = make(best).fit(gram, labels, sample_weight=weights)
        present = torch.from_numpy(model.classes_)
        temperature = 1.0
        if folds >= 2:
            some = np.random.default_rng(0).permutation(len(labels))[:CALIBRATION]
            part = gram[np.ix_(some, some)]
            if np.unique(labels[some], return_counts=True)[1].min() >= folds and len(np.unique(labels[some])) == len(
                present
            ):
                held_out = np.empty((len(some), len(present)))
                for train, test in _splits(labels[some], folds, stratified=True):
                    duels = make(best).fit(
                        part[np.ix_(train, train)], labels[some][train], sample_weight=weights[some][train]
                    )
                    held_out[test] = _scores(
                        _both_ways(duels.decision_function(part[np.ix_(test, train)])), len(present)
                    )
                index = torch.from_numpy(np.searchsorted(model.classes_, labels[some]))
                temperature = fit_temperature(torch.from_numpy(held_out), index)
        coefficients, intercepts = _duels(model, len(labels))
        self._keep(coefficients, intercepts, x)
        self.fitted.put(
            present=present.to(x.device), temperature=torch.tensor(temperature, dtype=torch.float64, device=x.device)
        )

    def _fit_targets(self, gram: Any, labels: Any, weights: Any, x: Tensor) -> None:
        from sklearn.svm import SVR

        centre, spread = labels.mean(0), labels.std(0)
        spread = np.where(spread > 1e-12, spread, 1.0)
        folds = min(self.folds, len(labels))
        coefficients, intercepts, variances = [], [], []
        splits = _splits(labels, folds, stratified=False)
        for column in ((labels - centre) / spread).T:

            def make(c: float) -> Any:
                return SVR(C=c, kernel="precomputed", cache_size=CACHE_MB, epsilon=self.epsilon)

            errors = [_cross_validated(make(c), gram, column, weights, splits, _squared_error) for c in self.choices]
            best = int(np.argmin(errors))
            model = make(self.choices[best]).fit(gram, column, sample_weight=weights)
            row = np.zeros(len(labels))
            row[model.support_] = model.dual_coef_[0]
            coefficients.append(row)
            intercepts.append(model.intercept_[0])
            variances.append(errors[best])
        self._keep(np.stack(coefficients) * spread[:, None], np.array(intercepts) * spread + centre, x)
        self.fitted.put(variance=torch.from_numpy(np.array(variances) * spread**2).to(x.device))

    def _keep(self, coefficients: Any, intercepts: Any, x: Tensor) -> None:
        """A linear machine as weights; another as its support vectors."""
        coefficients = torch.from_numpy(coefficients).to(x.device)
        self.fitted.put(intercepts=torch.from_numpy(intercepts).to(x.device))
        if self.kernel == "linear":
            self.fitted.put(w=coefficients @ x)
        else:
            used = (coefficients != 0).any(0)
            self.fitted.put(coefficients=coefficients[:, used], support=x[used])

    def predict(self, x: Tensor) -> Prediction:
        f = self.fitted
        if self.kernel == "linear":
            values = x.double() @ f.w.T + f.intercepts
        else:
            values = _rbf(x.double(), f.support, float(f.gamma)) @ f.coefficients.T + f.intercepts
        if self.kind == "regression":
            return Prediction(mean=values.float(), variance=f.variance.float().expand_as(values))
        scores = _scores(values.cpu().numpy(), len(f.present))
        logits = torch.full((len(x), self.outputs), -1e4, dtype=torch.float64)  # classes without a labelled sample
        logits[:, f.present.cpu()] = torch.from_numpy(scores) / float(f.temperature)
        return Prediction.from_logits(logits.to(x.device))

    def _gamma(self, x: Tensor) -> float:
        if isinstance(self.gamma, float | int):
            return float(self.gamma)
        variance = float(x.var(correction=0)) if self.gamma == "scale" else 1.0
        return 1 / (x.shape[1] * (variance or 1.0))


def _rbf(a: Tensor, b: Tensor, gamma: float) -> Tensor:
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return torch.exp(-gamma * squares.clamp_min(0))


def _duels(model: Any, n: int) -> tuple[Any, Any]:
    """Coefficients `(K (K - 1) / 2, n)` over all training samples and intercepts, a row for each pair of classes (i, j > i)."""
    ends = np.cumsum(model.n_support_)
    starts = ends - model.n_support_
    classes = range(len(ends))
    pairs = [(i, j) for i in classes for j in classes if i < j]
    rows = np.zeros((len(pairs), n))
    for row, (i, j) in zip(rows, pairs, strict=True):
        row[model.support_[starts[i] : ends[i]]] = model.dual_coef_[j - 1, starts[i] : ends[i]]
        row[model.support_[starts[j] : ends[j]]] = model.dual_coef_[i, starts[j] : ends[j]]
    if len(ends) == 2:  # scikit-learn turns the sign of a single duel
        return -rows, -model.intercept_
    return rows, model.intercept_


def _both_ways(decisions: Any) -> Any:
    """scikit-learn's decisions `(N,)` of two classes favour the second; as a duel's `(N, 1)` they favour the first."""
    return -decisions[:, None] if decisions.ndim == 1 else decisions


def _scores(decisions: Any, num_classes: int) -> Any:
    """Duels' decisions `(N, K (K - 1) / 2)`, positive for the first of a pair, to scores `(N, K)`, libsvm's choice the largest."""
    scores, sums = np.zeros((len(decisions), num_classes)), np.zeros((len(decisions), num_classes))
    pairs = ((i, j) for i in range(num_classes) for j in range(i + 1, num_classes))
    for value, (i, j) in zip(decisions.T, pairs, strict=True):
        scores[:, i] += value > 0
        scores[:, j] += value <= 0
        sums[:, i] += value
        sums[:, j] -= value
    if num_classes == 2:
        return sums / 2  # one duel: its value is the score
    winner = scores.argmax(1)[:, None]  # the first of several
    scores = scores + sums / (3 * (np.abs(sums) + 1))
    np.put_along_axis(scores, winner, scores.max(1, keepdims=True) + 1e-6, axis=1)
    return scores


Split = tuple[Any, Any]


def _splits(labels: Any, folds: int, stratified: bool) -> list[Split]:
    from sklearn.model_selection import KFold, StratifiedKFold

    kind = StratifiedKFold if stratified else KFold
    return list(kind(folds, shuffle=True, random_state=0).split(np.zeros(len(labels)), labels))


def _cross_validated(
    model: Any, gram: Any, labels: Any, weights: Any, splits: Sequence[Split], score: Callable[[Any, Any], float]
) -> float:
    """The mean score of left-out samples."""
    found = []
    for train, test in splits:
        model.fit(gram[np.ix_(train, train)], labels[train], sample_weight=weights[train])
        found.append(score(model.predict(gram[np.ix_(test, train)]), labels[test]))
    return float(np.mean(found))


def _accuracy(predicted: Any, labels: Any) -> float:
    return float((predicted == labels).mean())


def _squared_error(predicted: Any, labels: Any) -> float:
    return float(((predicted - labels) ** 2).mean())
