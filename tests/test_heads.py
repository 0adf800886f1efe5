"""Heads: predictions against scikit-learn's, probabilities against their definition, regression, weights and bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from feature_tasks import accuracy, context, regression, shifted_classes
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as PeersRidge
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.svm import SVC, SVR
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.evaluation.temperature import fit_temperature
from transfer_cli.methods.baseline.no_adaptation import NoAdaptation
from transfer_cli.methods.heads.base import Head
from transfer_cli.methods.heads.knn import KNN
from transfer_cli.methods.heads.logistic import Logistic
from transfer_cli.methods.heads.ridge import Ridge
from transfer_cli.methods.heads.svm import SVM
from transfer_cli.methods.math.logistic import fit_logistic, fit_ridge
from transfer_cli.methods.phases import Features, FeatureTask


def blobs(n: int = 90, classes: int = 3, spread: float = 1.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = 2 * torch.randn(classes, 4, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return centres[y] + spread * torch.randn(n, 4, generator=draw, dtype=torch.float64), y


def line(n: int = 80, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=draw, dtype=torch.float64)
    slopes = torch.tensor([[2.0, -1, 0, 0.5], [0, 3, 1, 0]]).double()
    return x, 5 + x @ slopes.T + 0.3 * torch.randn(n, 2, generator=draw, dtype=torch.float64)


HEADS: dict[str, Any] = {
    "knn": lambda kind, n: KNN(kind, n, k=5),
    "svm": lambda kind, n: SVM(kind, n),
    "linear svm": lambda kind, n: SVM(kind, n, kernel="linear"),
    "ridge": lambda kind, n: Ridge(kind, n),
    "logistic": lambda kind, n: Logistic(kind, n),
}


@pytest.mark.parametrize("name", HEADS)
def test_probabilities_are_honest_on_new_samples(name: str) -> None:
    """They sum to one, and are calibrated within what a few hundred samples tell."""
    head: Head = HEADS[name]("classification", 3)
    head.fit(*blobs(300))
    x, y = blobs(600, seed=1)
    probs = head.predict(x).probs.double()
    torch.testing.assert_close(probs.sum(1), torch.ones(600).double(), rtol=1e-5, atol=1e-5)
    right = (probs.argmax(1) == y).double()
    assert abs(float(probs.max(1).values.mean() - right.mean())) < 0.06, "as sure as it is right"
    assert float(-probs.gather(1, y[:, None]).log().mean()) < 0.8


@pytest.mark.parametrize("name", HEADS)
def test_a_head_survives_a_checkpoint(name: str) -> None:
    first, second = (HEADS[name]("classification", 3) for _ in range(2))
    x, y = blobs()
    first.fit(x, y)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.predict(x).probs, second.predict(x).probs)


def test_neighbours_are_scikit_learns_and_probabilities_smoothed_frequencies() -> None:
    x, y = blobs()
    new, _ = blobs(50, seed=1)
    head = KNN("classification", 3, k=5)
    head.fit(x, y)
    peer = KNeighborsClassifier(5).fit(x.numpy(), y.numpy())
    wanted = (5 * peer.predict_proba(new.numpy()) + 1 / 3) / 6
    np.testing.assert_allclose(head.predict(new).probs.numpy(), wanted, atol=1e-6)
    one = KNN("classification", 3)
    one.fit(x, y)
    assert torch.equal(one.predict(x).labels, y)
    assert float(one.predict(x).probs.max()) == pytest.approx((1 + 1 / 3) / 2)
    assert not head.takes_weights


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_the_svm_is_libsvms(kernel: Any, classes: int) -> None:
    x, y = blobs(100, classes)
    new, _ = blobs(200, classes, seed=1)
    head = SVM("classification", classes, kernel=kernel, C=2.0, gamma=0.3)
    head.fit(x, y)
    peer = SVC(C=2.0, kernel=kernel, gamma=0.3, decision_function_shape="ovo").fit(x.numpy(), y.numpy())
    assert np.array_equal(head.predict(new).labels.numpy(), peer.predict(new.numpy()))


def test_the_svm_chooses_c_by_cross_validation() -> None:
    x, y = blobs(120, spread=2.5)
    choices = [100.0, 1e-3, 0.05, 1.0]
    head = SVM("classification", 3, C=choices, gamma=0.1)
    head.fit(x, y)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    peer = GridSearchCV(SVC(gamma=0.1), {"C": choices}, cv=folds).fit(x.numpy(), y.numpy())
    alone = SVM("classification", 3, C=peer.best_params_["C"], gamma=0.1)
    alone.fit(x, y)
    torch.testing.assert_close(head.fitted.coefficients, alone.fitted.coefficients)
    assert peer.best_params_["C"] != choices[0], "a real choice"


def test_an_svm_that_never_saw_a_class_does_not_predict_it() -> None:
    x, y = blobs(60, 2)
    head = SVM("classification", 4)
    head.fit(x, 2 * y)  # classes 0 and 2 of 4
    probs = head.predict(x).probs
    assert float(probs[:, [1, 3]].max()) < 1e-6 and set(head.predict(x).labels.tolist()) == {0, 2}


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_in_an_svm_weights_are_repetitions(kernel: Any) -> None:
    """A sample of weight three is one that is there three times (C, by the mean weight, apart)."""
    x, y = blobs(60)
    weights = torch.ones(60).double()
    weights[:20] = 3
    weighted = SVM("classification", 3, kernel=kernel, gamma=0.2, C=100 / 60)
    repeated = SVM("classification", 3, kernel=kernel, gamma=0.2, C=1.0)
    weighted.fit(x, y, weights)
    repeated.fit(torch.cat([x, x[:20], x[:20]]), torch.cat([y, y[:20], y[:20]]))
    new, _ = blobs(100, seed=1)
    assert torch.equal(weighted.predict(new).labels, repeated.predict(new).labels)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_a_sample_of_weight_zero_is_not_there(kernel: Any) -> None:
    x, y = blobs(90)
    weights = (torch.rand(90, generator=torch.Generator().manual_seed(0)) > 0.4).double()
    whole, part = (SVM("classification", 3, kernel=kernel, gamma=0.2) for _ in range(2))
    whole.fit(x, y, weights)
    part.fit(x[weights > 0], y[weights > 0], weights[weights > 0])
    new, _ = blobs(100, seed=1)
    torch.testing.assert_close(whole.predict(new).probs, part.predict(new).probs)


@pytest.mark.parametrize("name", ["logistic", "ridge"])
def test_weights_enter_the_linear_heads(name: str) -> None:
    """Against scikit-learn's sample weights, on the same standardised features."""
    x, y = blobs(60)
    weights = torch.linspace(0.1, 4, 60).double()
    head: Head = HEADS[name]("classification", 3)
    head.fit(x, y, weights)
    z, w = ((x - x.mean(0)) / x.std(0, correction=0)).numpy(), (weights / weights.sum()).numpy()
    if name == "logistic":
        peer = LogisticRegression(C=1 / 1e-3, tol=1e-10, max_iter=9000).fit(z, y.numpy(), sample_weight=w)
        np.testing.assert_allclose(head.predict(x).probs.numpy(), peer.predict_proba(z), atol=1e-3)
    else:
        scores = PeersRidge(alpha=1e-3).fit(z, np.eye(3)[y.numpy()], sample_weight=w).predict(z)
        assert np.array_equal(head.predict(x).labels.numpy(), scores.argmax(1))


def test_the_logistic_head_is_scikit_learns() -> None:
    x, y = blobs()
    head = Logistic("classification", 3, l2=0.01)
    head.fit(x, y)
    z = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    peer = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-10, max_iter=5000).fit(z, y.numpy())
    np.testing.assert_allclose(head.predict(x).probs.numpy(), peer.predict_proba(z), atol=1e-4)


def test_the_ridge_classifiers_left_out_scores_are_exact() -> None:
    """Against fitting again without each sample, at the standardisation of all."""
    x, y = blobs(30)
    head = Ridge("classification", 3, l2=0.1)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    share = torch.full((30,), 1 / 30).double()
    one_hot = torch.eye(3).double()[y]
    leverage = head._leverage(z, share)
    fitted = PeersRidge(alpha=0.1 * 30).fit(z.numpy(), one_hot.numpy())
    errors = one_hot.numpy() - fitted.predict(z.numpy())
    found = errors / (1 - leverage.numpy())[:, None]
    for i in range(0, 30, 7):
        others = [j for j in range(30) if j != i]
        alone = PeersRidge(alpha=0.1 * 30).fit(z[others].numpy(), one_hot[others].numpy())
        wanted = one_hot[i].numpy() - alone.predict(z[i : i + 1].numpy())[0]
        np.testing.assert_allclose(found[i], wanted, atol=1e-9)


def test_the_temperature_is_the_likelihoods_optimum() -> None:
    x, y = blobs(400)
    scores = 7.0 * torch.log_softmax(-torch.cdist(x, torch.stack([x[y == c].mean(0) for c in range(3)])) / 1.5, 1)
    temperature = fit_temperature(scores, y)

    def loss(t: float) -> float:
        return float(torch.nn.functional.cross_entropy(scores / t, y))

    assert loss(temperature) <= min(loss(temperature * f) for f in (0.9, 0.99, 1.01, 1.1))


@pytest.mark.parametrize("name", ["knn", "svm", "linear svm", "ridge"])
def test_regression_has_a_mean_and_an_honest_variance(name: str) -> None:
    x, y = line(300)
    head: Head = HEADS[name]("regression", 2)
    head.fit(x, y)
    new, truth = line(300, seed=1)
    prediction = head.predict(new)
    assert prediction.mean is not None and prediction.variance is not None
    error = (prediction.mean - truth).square().mean(0)
    assert bool((error < 0.6 * truth.var(0)).all()), error
    ratio = error / prediction.variance.double().mean(0)
    assert bool((ratio > 0.6).all() and (ratio < 1.7).all()), ratio


def test_regression_heads_are_scikit_learns() -> None:
    x, y = line()
    new, _ = line(40, seed=1)
    knn = KNN("regression", 2, k=3)
    knn.fit(x, y)
    wanted = KNeighborsRegressor(3).fit(x.numpy(), y.numpy()).predict(new.numpy())
    np.testing.assert_allclose(knn.predict(new).mean.numpy(), wanted, atol=1e-5)  # type: ignore[union-attr]
    svr = SVM("regression", 2, gamma=0.3)
    svr.fit(x, y)
    scaled = ((y - y.mean(0)) / y.std(0, correction=0)).numpy()
    peers = [SVR(gamma=0.3).fit(x.numpy(), column).predict(new.numpy()) for column in scaled.T]
    wanted = np.stack(peers, 1) * y.std(0, correction=0).numpy() + y.mean(0).numpy()
    np.testing.assert_allclose(svr.predict(new).mean.numpy(), wanted, atol=1e-4)  # type: ignore[union-attr]


def test_a_method_on_features_does_regression() -> None:
    x, y = line(100)
    target, truth = line(60, seed=1)
    method = NoAdaptation(regression(4, head=Ridge("regression", 2)))
    method.fit(FeatureTask(Features(x, y), Features(target), None))
    assert float((method.predict(target).mean - truth).square().mean()) < 0.2  # type: ignore[operator]


def test_granted_labels_weigh_as_much_as_the_source() -> None:
    """Five granted samples of a target whose classes are swapped outweigh none of sixty source samples, and a few."""
    task, labels = shifted_classes(60, shift=0.0, granted=12)
    assert task.source is not None
    head = Ridge("classification", 3)
    alone = accuracy(NoAdaptation(context(head=head)), FeatureTask(task.source, task.target, None), labels)
    granted = accuracy(NoAdaptation(context(head=head, has_target_labels=True)), task, labels)
    assert granted >= alone - 0.02


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: KNN("classification", 3, k=0), "head.k is a number of neighbours"),
        (lambda: KNN("classification", 3, k=91).fit(*blobs()), "head.k=91 neighbours, but only 90 labelled samples"),
        (lambda: SVM("classification", 3, C=0.0), "head.C is a positive number"),
        (lambda: SVM("classification", 3, C=[1.0, 2.0]).fit(*blobs(4)), "a class has a single labelled sample"),
        (lambda: Logistic("regression", 1), "head logistic does not do regression"),
        (lambda: Ridge("classification", 3).fit(blobs()[0], torch.zeros(90, dtype=torch.int64)), "all of one class"),
    ],
)
def test_bad_input_is_told_in_one_line(make: Any, said: str) -> None:
    with pytest.raises(TransferError) as caught:
        make()
    assert said in str(caught.value)


@pytest.mark.parametrize("fit", [fit_logistic, fit_ridge])
def test_a_negative_penalty_is_refused(fit: Any) -> None:
    x, y = blobs()
    weights = torch.full((len(x),), 1 / len(x), dtype=torch.float64)
    arguments = (x, y, 3, -1.0, weights) if fit is fit_logistic else (x, y[:, None].double(), -1.0, weights)
    with pytest.raises(TransferError, match="is not negative"):
        fit(*arguments)
