"""Kronecker factors of all layers: against dense Gauss-Newton matrices where they are exact, Jacobians, and brute force."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from test_methods import context, regression
from test_network_posteriors import classes_of, mlp, trained
from torch import Tensor, nn

from transfer_cli.backbones.digits import SmallCNN
from transfer_cli.data.inputs import InputSpec
from transfer_cli.errors import TransferError
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.bayes.curvature import Curvature, curvature_root, is_factored
from transfer_cli.methods.bayes.laplace import LEVERAGE, LastLayerLaplace, without_itself
from transfer_cli.methods.phases import Batch, Labelled
from transfer_cli.torchvision_compat import models


class Out(NamedTuple):
    features: Tensor
    logits: Tensor


class Small(nn.Module):
    """What a curvature asks of a network."""

    kind = "classification"

    def __init__(self, *below: nn.Module, width: int, classes: int = 3, bias: bool = True) -> None:
        super().__init__()
        self.below, self.head = nn.Sequential(*below), nn.Linear(width, classes, bias=bias)

    def forward(self, x: Tensor, domain: str = "target") -> Out:
        features = self.below(x)
        return Out(features, self.head(features))


def dense(network: Small, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Probabilities `(B, K)`, and by parameter the Jacobian `(B, K, ...)` of the logits."""
    names = dict(network.named_parameters())

    def logits(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(network, parameters, (one[None],)).logits[0]

    jacobian = torch.func.vmap(torch.func.jacrev(logits), in_dims=(None, 0))(names, x)
    return network(x).logits.softmax(1), jacobian


def joined(jacobians: dict[str, Tensor], layer: str) -> Tensor:
    """Of a layer's weights, each output's followed by its bias: `(B, K, P)`."""
    weight = jacobians[f"{layer}.weight"].flatten(3)
    bias = jacobians.get(f"{layer}.bias")
    return (weight if bias is None else torch.cat([weight, bias[..., None]], 3)).flatten(2)


def factored(network: Small, x: Tensor, weight: float = 1.0) -> Curvature:
    curvature = Curvature(network.double().eval())  # type: ignore[arg-type]
    curvature.add(x, "target", weight)
    curvature.decompose()
    return curvature


NETWORKS: dict[str, Any] = {
    "one layer": lambda: (Small(nn.Flatten(), width=6), ["head"], (6,)),
    "three layers": lambda: (
        Small(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3, bias=False), nn.Tanh(), width=3),
        ["below.0", "below.2", "head"],
        (4,),
    ),
    "a convolution of one place": lambda: (
        Small(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), width=4),
        ["below.0", "head"],
        (2, 3, 3),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_of_one_sample_each_layers_block_is_the_dense_matrix(name: str) -> None:
    torch.manual_seed(0)
    network, layers, shape = NETWORKS[name]()
    x = torch.randn(1, *shape, dtype=torch.float64)
    curvature = factored(network, x, weight=3.0)  # one sample that stands for three
    probs, jacobians = dense(network, x)
    middle = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
    lam, wanted = 0.3, torch.zeros(1, 3, 3, dtype=torch.float64)
    for i, layer in enumerate(layers):
        own = joined(jacobians, layer)
        block = 3 * torch.einsum("nkp,nkl,nlq->pq", own, middle, own)
        a, g = getattr(curvature, f"inputs{i}"), getattr(curvature, f"slopes{i}")
        torch.testing.assert_close(torch.kron(g, a) / 3, block)
        inverse = torch.linalg.inv(block + lam * torch.eye(len(block)).double())
        wanted += torch.einsum("nkp,pq,nlq->nkl", own, inverse, own)
    logits, found, _ = curvature.outputs(x, "target", torch.tensor(lam))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(logits, network(x).logits.detach())


def test_of_many_samples_each_layer_is_the_product_of_its_means() -> None:
    torch.manual_seed(0)
    network, x = Small(nn.Linear(4, 5), nn.ReLU(), width=5), torch.randn(7, 4, dtype=torch.float64)
    curvature = factored(network, x)
    hidden = torch.cat([network.below(x), torch.ones(7, 1).double()], 1)
    probs = network(x).logits.softmax(1)
    between = torch.diag(probs.sum(0)) - probs.T @ probs
    torch.testing.assert_close(curvature.inputs1, (hidden.T @ hidden).detach())
    torch.testing.assert_close(curvature.slopes1, between.detach())
    values = torch.linalg.eigvalsh(torch.kron(between, hidden.T @ hidden) / 7).clamp_min(0)
    torch.testing.assert_close(curvature.decompose()[-18:].sort().values, values.detach(), rtol=1e-6, atol=1e-9)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0].mean(1)


class Uncalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight


def test_layers_whose_inputs_are_not_seen_keep_their_weights_or_are_refused() -> None:
    torch.manual_seed(0)
    network, x = Small(Attention(), nn.Linear(4, 4), width=4), torch.randn(3, 5, 4, dtype=torch.float64)
    curvature = factored(network, x)
    assert curvature.layers == [network.below[1], network.head]
    assert curvature.outputs(x, "target", torch.tensor(0.1))[1].isfinite().all()
    assert len(Curvature(models.swin_t()).layers) == 2 * 12 + 3 + 2  # type: ignore[arg-type]
    with pytest.raises(TransferError, match=r"Linear.* is not called: set method\.layers=last"):
        factored(Small(Uncalled(), width=4), x[:, 0])


@pytest.mark.parametrize("stride", [1, 2])
def test_jacobians_of_convolutions_of_many_places(stride: int) -> None:
    """Where the prior is all that is known, λ C is J Jᵀ."""
    torch.manual_seed(0)
    below = (
        nn.Conv2d(2, 3, 3, padding=1, stride=stride),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 2, bias=False),
        nn.Flatten(),
    )
    side = {1: 3, 2: 1}[stride]
    network = Small(*below, width=4 * side**2)
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    curvature, lam = factored(network, x), torch.tensor(1e9).double()
    with torch.inference_mode():  # as an evaluation does
        _, found, of_head = curvature.outputs(torch.clone(x), "target", lam)
    _, jacobians = dense(network, x)
    wanted = sum(
        torch.einsum("nkp,nlp->nkl", own, own)
        for own in (joined(jacobians, name) for name in ("below.0", "below.3", "head"))
    )
    torch.testing.assert_close(lam * found, wanted, rtol=1e-5, atol=1e-5)
    own = joined(jacobians, "head")
    torch.testing.assert_close(lam * of_head, torch.einsum("nkp,nlp->nkl", own, own), rtol=1e-5, atol=1e-5)


def test_what_has_no_factors() -> None:
    assert not is_factored(nn.BatchNorm2d(3)) and not is_factored(nn.Conv2d(4, 4, 3, groups=2))
    frozen = nn.Linear(2, 3).requires_grad_(False)
    assert not is_factored(frozen) and is_factored(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"too large for this network: set method\.layers=last"):
        Curvature(Small(nn.Linear(2, 12_000), width=12_000))  # type: ignore[arg-type]


def test_the_root_of_a_softmaxs_curvature() -> None:
    probs = torch.randn(6, 4, dtype=torch.float64).softmax(1)
    root = curvature_root(probs)
    torch.testing.assert_close(root @ root.mT, torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :])


def test_without_itself_a_sample_is_told_by_a_newton_step_of_the_others() -> None:
    """Of a linear model with the whole Hessian: dense, sample by sample."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
    w = torch.randn(3, 4, dtype=torch.float64)
    probs = (x @ w.T).softmax(1)
    middle = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
    each = torch.einsum("nkl,ni,nj->nkilj", middle, x, x).reshape(12, 12, 12)
    whole = each.sum(0) + 2 * torch.eye(12, dtype=torch.float64)

    def told(hessian: Tensor, n: int) -> Tensor:
        return torch.einsum("i,kilj,j->kl", x[n], torch.linalg.inv(hessian).view(3, 4, 3, 4), x[n])

    covariance = torch.stack([told(whole, n) for n in range(12)])
    mean = without_itself(x @ w.T, covariance, y)
    slopes = probs - F.one_hot(y, 3)
    for n in range(12):
        without = whole - each[n]
        step = torch.linalg.inv(without) @ torch.outer(slopes[n], x[n]).flatten()
        torch.testing.assert_close(mean[n], (w + step.view(3, 4)) @ x[n])
    bounded = without_itself(x @ w.T, 1e6 * covariance, y)  # more than a sample can say of itself
    assert bool(torch.isfinite(bounded).all()) and LEVERAGE < 1


def laplace_of(batch: Batch, **keys: Any) -> LastLayerLaplace:
    torch.manual_seed(0)
    labelled = {"source": 60, "target_labelled": 12}
    method = LastLayerLaplace(context(mlp(), classes=3, labelled=labelled), layers="all", curvature_steps=2, **keys)
    return trained(method, batch, steps=200, lr=0.1)  # type: ignore[return-value]


@torch.no_grad()
def test_all_layers_from_training_to_prediction() -> None:
    batch, test = classes_of(), classes_of(600, seed=7).source
    assert test is not None
    cold, warm, chosen = (laplace_of(batch, temperature=t) for t in (0.0, 1.0, None))
    plain = cold.network.predict(test.x).probs.double()
    torch.testing.assert_close(cold.predict(test.x).probs, plain, atol=1e-5, rtol=0)

    def nll(found: Prediction) -> float:
        assert found.log_probs is not None
        return float(F.nll_loss(found.log_probs, test.y))

    told = [nll(m.predict(test.x)) for m in (cold, warm, chosen)]
    assert told[2] <= min(told[0], told[1]) + 0.03
    near, far = (float(warm.predict(factor * test.x).epistemic.mean()) for factor in (1, 20))  # type: ignore[union-attr]
    assert far > near > 0  # away from the data
    assert chosen.predict_source(test.x).is_finite() and not chosen.network.training
    torch.testing.assert_close(chosen.curvature.samples, torch.tensor(72.0).double())  # type: ignore[union-attr]
    again = LastLayerLaplace(context(mlp(), classes=3), layers="all")
    again.load_state_dict(chosen.state_dict())
    torch.testing.assert_close(again.eval().predict(test.x).probs, chosen.predict(test.x).probs)


@torch.no_grad()
def test_what_is_left_out_of_a_convolutional_network_is_told_no_worse_than_what_is_new() -> None:
    """A step in all layers would have said an NLL hundreds of times that of new samples, and taken τ = 1."""
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x = (x.float() / 16).view(-1, 1, 8, 8)
    backbone = SmallCNN(InputSpec("image", (1, 8, 8)), widths=(8, 16), features=16)
    torch.manual_seed(0)
    method = LastLayerLaplace(context(backbone, 10, labelled={"source": 600}), layers="all", curvature_steps=1)
    trained(method, Batch(Labelled(x[:600], y[:600]), None, None), steps=80, lr=0.3)
    told = method.losses_by / 600
    by_network, found = (f.predict(x[600:]).log_probs for f in (method.network, method))
    assert by_network is not None and found is not None
    new, plain = (float(F.nll_loss(log_probs, y[600:])) for log_probs in (found, by_network))
    assert float(told.min()) < 2 * new and new < plain + 0.02


@torch.no_grad()
def test_regression_has_the_variance_of_its_linearised_outputs() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 2)
    y = 10 + 4 * (x[:, :1] + 0.3 * torch.randn(40, 1))
    method = LastLayerLaplace(regression(mlp(), labelled={"source": 40}), layers="all", lam=0.5, curvature_steps=1)
    trained(method, Batch(Labelled(x, y), None, None))
    found = method.predict(x[:7])
    logits, covariance, _ = method.curvature.outputs(x[:7], "target", torch.tensor(0.5))  # type: ignore[union-attr]
    assert found.mean is not None and found.variance is not None and found.epistemic is not None
    torch.testing.assert_close(found.epistemic, 16 * covariance[:, 0])
    torch.testing.assert_close(found.mean.double(), 10 + 4 * logits, rtol=1e-5, atol=1e-5)
    noise = float(method.network.log_noise.exp())
    torch.testing.assert_close(
        found.variance - found.epistemic, torch.full((7, 1), 16 * noise).double(), rtol=1e-5, atol=0
    )
    away = method.predict(x + 20).epistemic
    assert away is not None and float(away.mean()) > float(found.epistemic.mean())
    for wrong in ({"covariance": "full"}, {"curvature_steps": 0}):
        with pytest.raises(ValueError, match="layers=all has covariance=kronecker"):
            LastLayerLaplace(context(mlp(), classes=3), layers="all", **wrong)
