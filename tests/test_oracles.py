"""Our figures beside those of libraries that are no dependency; skipped unless `pip install -e .[dev,oracles]` brought them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import transfer_cli.torchvision_compat  # noqa: F401 - they import torchvision too
from transfer_cli.evaluation.metrics import classification, out_of_distribution
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.bayes.curvature import Curvature
from transfer_cli.methods.math.softmax import Precision, Softmax

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture
def metrics() -> Iterator[Any]:
    yield pytest.importorskip("torchmetrics.functional.classification")


def test_figures_are_those_of_torchmetrics(metrics: Any) -> None:
    """But for a confidence of 1.0, which torchmetrics puts into a bin of its own; here there is none."""
    draw = torch.Generator().manual_seed(0)
    probs = torch.softmax(2 * torch.randn(500, 4, generator=draw), 1).double()
    labels = torch.multinomial(probs.sqrt(), 1, generator=draw)[:, 0]
    ours = classification(probs.log(), labels)
    theirs = {
        "accuracy": metrics.multiclass_accuracy(probs, labels, 4, average="micro"),
        "macro_f1": metrics.multiclass_f1_score(probs, labels, 4, average="macro"),
        "ece": metrics.multiclass_calibration_error(probs, labels, 4, n_bins=15, norm="l1"),
    }
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(float(value), abs=1e-6)
    strange = torch.softmax(torch.randn(300, 4, generator=draw), 1).double()
    entropy = torch.cat([-(p * p.log()).sum(1) for p in (probs, strange)])
    found = out_of_distribution(Prediction(log_probs=probs.log()), Prediction(log_probs=strange.log()))
    expected = metrics.binary_auroc(entropy, torch.arange(800) >= 500)
    assert found["auroc"] == pytest.approx(float(expected), abs=1e-6)


def test_the_laplace_approximation_of_a_head_is_that_of_laplace_torch() -> None:
    """Posterior precision and evidence of a linear head at its optimum, with an isotropic prior: all of its weights."""
    laplace = pytest.importorskip("laplace")
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=draw).double()
    y = (x @ torch.randn(5, 3, generator=draw).double()).argmax(1)
    lam = 0.7
    mean = torch.zeros(3, 5).double()
    problem = Softmax(x, y, torch.ones(60).double(), mean, Precision(torch.full_like(mean, lam)))
    w = problem.minimise()
    network = torch.nn.Linear(5, 3, bias=False).double()
    with torch.no_grad():
        network.weight.copy_(w)
    theirs = laplace.Laplace(
        network, "classification", subset_of_weights="all", hessian_structure="full", prior_precision=lam
    )
    theirs.fit(DataLoader(TensorDataset(x, y), batch_size=60))
    torch.testing.assert_close(problem.hessian(w), theirs.posterior_precision.double(), rtol=1e-6, atol=1e-8)
    dets = [torch.linalg.slogdet(m).logabsdet for m in (problem.precision.dense(), problem.hessian(w))]
    ours = -problem.value(w) + 0.5 * float(dets[0] - dets[1])
    assert ours == pytest.approx(float(theirs.log_marginal_likelihood()), rel=1e-6)


@pytest.mark.parametrize("kind", ["linear", "convolutions"])
def test_kronecker_factors_of_all_layers_are_those_of_laplace_torch(kind: str) -> None:
    """Variances of linearised logits. Without biases, whose factors laplace-torch keeps apart from the weights'."""
    laplace = pytest.importorskip("laplace")
    from test_curvature import Small

    torch.manual_seed(0)
    nn = torch.nn
    below = {
        "linear": [nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh()],
        "convolutions": [nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.Tanh(), nn.Flatten()],
    }[kind]
    network = Small(*below, width={"linear": 5, "convolutions": 27}[kind], bias=False).double()
    x = torch.randn(20, *{"linear": (4,), "convolutions": (1, 3, 3)}[kind]).double()
    y, lam = torch.arange(20) % 3, 0.4
    curvature = Curvature(network)  # type: ignore[arg-type]
    curvature.add(x, "target", 1.0)
    curvature.decompose()
    logits, ours, of_head = curvature.outputs(x[:7], "target", torch.tensor(lam))
    plain = nn.Sequential(*below, network.head)
    theirs = laplace.Laplace(
        plain, "classification", subset_of_weights="all", hessian_structure="kron", prior_precision=lam
    )
    theirs.fit(DataLoader(TensorDataset(x, y), batch_size=20))
    mean, covariance = theirs._glm_predictive_distribution(x[:7])
    torch.testing.assert_close(logits, mean.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours, covariance.detach(), rtol=1e-4, atol=1e-6)
    assert bool((ours - of_head).diagonal(dim1=1, dim2=2).ge(0).all()) and not torch.allclose(ours, of_head)
