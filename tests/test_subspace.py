"""Methods on frozen features: subspaces and moments, each against a closed form, a dense solution or a peer's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from feature_tasks import accuracy, context, shifted_classes
from scipy.linalg import eigh
from sklearn.decomposition import NMF as PeersNMF
from sklearn.decomposition import PCA as PeersPCA
from sklearn.decomposition import KernelPCA
from sklearn.neighbors import kneighbors_graph
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.base import FeatureOptions
from transfer_cli.methods.baseline.no_adaptation import NoAdaptation
from transfer_cli.methods.feature_method import FeatureMethod
from transfer_cli.methods.finetuning.linear_probe import LinearProbe
from transfer_cli.methods.heads.logistic import Logistic
from transfer_cli.methods.heads.svm import SVM
from transfer_cli.methods.math.kernel_map import KernelMap, rbf
from transfer_cli.methods.math.mmd_subspace import Span, domain_contrast, joint_contrast
from transfer_cli.methods.math.nmf import encode, factorise
from transfer_cli.methods.math.principal import principal_components
from transfer_cli.methods.moments.coral import CORAL
from transfer_cli.methods.moments.mean_match import MeanMatch
from transfer_cli.methods.phases import Features, FeatureTask
from transfer_cli.methods.subspace.bda import BDA
from transfer_cli.methods.subspace.gfk import GFK, geodesic_factor
from transfer_cli.methods.subspace.jda import JDA
from transfer_cli.methods.subspace.kpca import KPCA
from transfer_cli.methods.subspace.nmf import NMF
from transfer_cli.methods.subspace.pca import PCA
from transfer_cli.methods.subspace.sa import SubspaceAlignment
from transfer_cli.methods.subspace.sstca import SSTCA, laplacian_form
from transfer_cli.methods.subspace.tca import TCA

FAMILY: dict[str, Callable[..., FeatureMethod]] = {
    "pca": lambda c: PCA(c, components=3),
    "kpca": lambda c: KPCA(c, components=3),
    "sa": lambda c: SubspaceAlignment(c, components=3),
    "gfk": lambda c: GFK(c, components=2),
    "tca": lambda c: TCA(c, components=3),
    "tca rbf": lambda c: TCA(c, components=3, kernel="rbf"),
    "sstca": lambda c: SSTCA(c, components=3),
    "jda": lambda c: JDA(c, components=3, iterations=3),
    "bda": lambda c: BDA(c, components=3, iterations=3, balance=0.3, weighted=True),
    "coral": lambda c: CORAL(c, ridge=0.1),
    "mean_match": lambda c: MeanMatch(c),
    "no_adaptation": lambda c: NoAdaptation(c),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def up_to_signs(found: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    signs = torch.sign((found * wanted).sum(0))
    torch.testing.assert_close(found * signs, wanted, rtol=tolerance, atol=tolerance)


# --- TCA, JDA and kin -------------------------------------------------------------------------------


def dense_tca(kernel: Tensor, mmd: Tensor, ridge: float, k: int) -> Tensor:
    """The published dual form, with its matrices of samples x samples: embedding `(n, k)`."""
    n = len(kernel)
    centring = np.eye(n) - 1 / n
    k_ = kernel.numpy()
    objective = k_ @ mmd.numpy() @ k_ + ridge * np.eye(n)
    _, vectors = eigh(k_ @ centring @ k_, objective)
    vectors = vectors[:, ::-1][:, :k]
    return torch.from_numpy(k_ @ (vectors / np.linalg.norm(vectors, axis=0)))


def dense_mmd(n_s: int, n_t: int) -> Tensor:
    e = torch.cat([torch.full((n_s,), 1 / n_s), torch.full((n_t,), -1 / n_t)]).double()
    return torch.outer(e, e) / e.square().sum()


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("width", [5, 90])  # fewer and more features than samples
def test_tca_is_the_published_dual_form(kernel: Any, width: int) -> None:
    task, _ = shifted_classes(30, width)
    assert task.source is not None and task.target is not None
    x = torch.cat([task.source.x, task.target.x])
    method = TCA(context(width), components=4, ridge=0.7, kernel=kernel, gamma=0.01, unit=False)
    method.fit(task)
    gram = x @ x.T if kernel == "linear" else rbf(x, x, 0.01)
    wanted = dense_tca(gram, dense_mmd(len(task.source.x), len(task.target.x)), 0.7, 4)
    up_to_signs(method.map_target(x), wanted, 1e-5)


def test_tca_is_a_minimum_of_its_objective() -> None:
    """The trace quotient's gradient vanishes (autograd), and no small step lowers it."""
    x = torch.cat([randn(20, 4), randn(25, 4, seed=1) + 1])
    e = torch.cat([torch.full((20,), 1 / 20), torch.full((25,), -1 / 25)]).double()
    kernel = x @ x.T
    centring = torch.eye(45).double() - 1 / 45
    objective = kernel @ torch.outer(e, e) / (e @ e) @ kernel + 0.5 * torch.eye(45)
    constraint = kernel @ centring @ kernel

    def quotient(a: Tensor) -> Tensor:
        return torch.linalg.solve(a.T @ constraint @ a, a.T @ objective @ a).trace()

    found = Span.of(x, 2).solve(domain_contrast(x[:20], x[20:]).normalised(), 0.5, 2)
    a = torch.linalg.lstsq(kernel, x @ found, driver="gelsd").solution.requires_grad_()  # Z = K a; shortest a
    value = quotient(a)
    (gradient,) = torch.autograd.grad(value, a)
    value = value.detach()
    assert float(gradient.norm() * a.detach().norm()) < 1e-3 * float(value)
    for seed in range(5):
        assert float(quotient(a.detach() + 0.05 * float(a.detach().norm()) * randn(45, 2, seed=seed))) > float(value)


def test_tca_lowers_the_domains_difference_and_keeps_the_classes() -> None:
    task, labels = shifted_classes(shift=6.0)
    adapted, plain = TCA(context(), components=3, unit=False), PCA(context(), components=3)

    def difference(method: FeatureMethod) -> float:
        method.fit(task)
        assert task.source is not None and task.target is not None
        z_s, z_t = method.map_source(task.source.x), method.map_target(task.target.x)
        scale = torch.cat([z_s, z_t]).std(0)
        return float(((z_s.mean(0) - z_t.mean(0)) / scale).norm())

    assert difference(adapted) < 0.2 * difference(plain)
    assert accuracy(TCA(context(), components=3), task, labels) > 0.9


def brute_contrast(
    n_s: int, n_t: int, ys: Tensor, yt: Tensor, classes: int, marginal: float, conditional: float, by_prior: bool
) -> Tensor:
    """The MMD matrix `(n, n)`, coefficient by coefficient."""
    e = torch.cat([torch.full((n_s,), 1 / n_s), torch.full((n_t,), -1 / n_t)]).double()
    total = marginal * torch.outer(e, e)
    for c in range(classes):
        in_s, in_t = (ys == c).double(), (yt == c).double()
        if not in_s.sum() or not in_t.sum():
            continue
        root_s, root_t = ((in_s.sum() / n_s).sqrt(), (in_t.sum() / n_t).sqrt()) if by_prior else (1.0, 1.0)
        e = torch.cat([root_s * in_s / in_s.sum(), -root_t * in_t / in_t.sum()])
        total += conditional * torch.outer(e, e)
    return total / total.norm()


@pytest.mark.parametrize(
    ("marginal", "conditional", "by_prior"), [(4.0, 1.0, False), (1.2, 0.7, True), (0.0, 1.0, False)]
)
def test_the_joint_contrast_is_the_mmd_matrix_of_the_papers(
    marginal: float, conditional: float, by_prior: bool
) -> None:
    x, y = randn(50, 5), torch.randint(4, (50,), generator=torch.Generator().manual_seed(3))
    y[30:][y[30:] == 2] = 1  # a class that the target lacks
    found = joint_contrast(
        x[:30], y[:30], x[30:], y[30:], 4, marginal=marginal, conditional=conditional, by_prior=by_prior
    ).normalised()
    wanted = brute_contrast(30, 20, y[:30], y[30:], 4, marginal, conditional, by_prior)
    torch.testing.assert_close(found @ found.T, x.T @ wanted @ x)


def test_jda_alternates_between_labels_and_projection() -> None:
    """Two rounds by hand, with dense matrices."""
    task, _ = shifted_classes(24)
    assert task.source is not None and task.target is not None and task.source.y is not None
    x, n = torch.cat([task.source.x, task.target.x]), len(task.source.x)
    method = JDA(context(), components=3, iterations=2)
    method.fit(task)
    z = dense_tca(x @ x.T, dense_mmd(n, len(x) - n), 1.0, 3)
    z = z / z.norm(dim=1, keepdim=True)
    labels = task.source.y[torch.cdist(z[n:], z[:n]).argmin(1)]
    mmd = brute_contrast(n, len(x) - n, task.source.y, labels, 3, 3.0, 1.0, False)
    z = dense_tca(x @ x.T, mmd, 1.0, 3)
    up_to_signs(method.map_target(x), z / z.norm(dim=1, keepdim=True))


def test_balanced_adaptation_in_the_middle_is_joint_adaptation() -> None:
    task, _ = shifted_classes()
    first, second = JDA(context(), components=3), BDA(context(), components=3, balance=0.5)
    first.fit(task)
    second.fit(task)
    torch.testing.assert_close(first.fitted.projection, second.fitted.projection)
    other = BDA(context(), components=3, balance=0.9)
    other.fit(task)
    assert not torch.allclose(first.fitted.projection, other.fitted.projection, atol=1e-3)


@pytest.mark.parametrize("build", [TCA, JDA, SSTCA, BDA])
def test_granted_labels_help_where_classes_are_confused(build: Callable[..., FeatureMethod]) -> None:
    """Mean over a few draws of classes that a large turn mixes up."""

    def mean(granted: int) -> float:
        found = []
        for seed in range(6):
            task, labels = shifted_classes(90, 4, 3, seed=seed, granted=granted, turn=1.5)
            method = build(context(4, head=Logistic("classification", 3), has_target_labels=granted > 0), components=3)
            found.append(accuracy(method, task, labels))
        return sum(found) / len(found)

    assert mean(15) > mean(0) + 0.1


def test_the_laplacian_is_that_of_the_symmetrised_neighbour_graph() -> None:
    x = randn(40, 3)
    graph = kneighbors_graph(x.numpy(), 5, mode="connectivity").toarray()
    weights = torch.from_numpy((graph + graph.T) / 2)
    laplacian = torch.diag(weights.sum(1)) - weights
    torch.testing.assert_close(laplacian_form(x, 5), x.T @ laplacian @ x)


def test_sstca_is_the_dense_solution() -> None:
    task, _ = shifted_classes(25, 4)
    assert task.source is not None and task.target is not None and task.source.y is not None
    x, n_s = torch.cat([task.source.x, task.target.x]), len(task.source.x)
    n = len(x)
    method = SSTCA(context(4), components=2, ridge=0.5, label_weight=0.6, locality=30.0, neighbours=4, unit=False)
    method.fit(task)
    kernel = x @ x.T
    graph = kneighbors_graph(x.numpy(), 4, mode="connectivity").toarray()
    weights = torch.from_numpy((graph + graph.T) / 2)
    laplacian = torch.diag(weights.sum(1)) - weights
    centring = torch.eye(n).double() - 1 / n
    same = torch.zeros(n, n).double()
    same[:n_s, :n_s] = (task.source.y[:, None] == task.source.y).double()
    dependence = kernel @ centring @ (0.6 * same + 0.4 * torch.eye(n)) @ centring @ kernel
    mmd = dense_mmd(n_s, n - n_s)
    objective = kernel @ (mmd + 30.0 / n**2 * laplacian) @ kernel + 0.5 * torch.eye(n)
    _, vectors = eigh(dependence.numpy(), objective.numpy())
    vectors = vectors[:, ::-1][:, :2]
    wanted = kernel @ torch.from_numpy(vectors / np.linalg.norm(vectors, axis=0))
    up_to_signs(method.map_target(x), wanted, 1e-5)


# --- kernels as features ------------------------------------------------------------------------------


def test_kernel_features_have_the_kernels_inner_products() -> None:
    x, new = randn(50, 4), randn(7, 4, seed=1)
    exact = KernelMap("rbf", gamma=0.3)
    features = exact.fit(x)
    torch.testing.assert_close(features @ features.T, rbf(x, x, 0.3), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(exact(new) @ features.T, rbf(new, x, 0.3), rtol=1e-6, atol=1e-6)
    every = KernelMap("rbf", 0.3, "nystroem", landmarks=50)
    torch.testing.assert_close(every.fit(x) @ every(x).T, rbf(x, x, 0.3), rtol=1e-6, atol=1e-6)
    random = KernelMap("rbf", 0.3, "random_features", landmarks=20_000)
    found = random.fit(x)
    assert float((found @ found.T - rbf(x, x, 0.3)).abs().max()) < 0.05


def test_too_many_samples_for_an_exact_kernel_are_refused_before_any_memory_is_taken() -> None:
    with pytest.raises(TransferError, match="nystroem"):
        KernelMap("rbf", 0.1).fit(torch.zeros(20_001, 1, dtype=torch.float64))


# --- principal components, subspaces ---------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
@pytest.mark.parametrize("whiten", [False, True])
def test_pca_is_scikit_learns(shape: tuple[int, int], whiten: bool) -> None:
    task = FeatureTask(Features(randn(*shape), torch.arange(shape[0]) % 2), Features(randn(*shape, seed=1) + 1), None)
    method = PCA(context(shape[1], 2), components=4, whiten=whiten)
    report = method.fit(task)
    assert task.source is not None and task.target is not None
    x = torch.cat([task.source.x, task.target.x])
    peer = PeersPCA(4, whiten=False, svd_solver="full").fit(x.numpy())
    wanted = torch.from_numpy(peer.transform(x.numpy()))
    wanted = wanted / wanted.std(0, correction=0) if whiten else wanted
    up_to_signs(method.map_target(x), wanted)
    assert report["explained_variance"] == pytest.approx(peer.explained_variance_ratio_.sum())


def test_kernel_pca_is_scikit_learns() -> None:
    task, _ = shifted_classes(30)
    method = KPCA(context(), components=3, gamma=0.05)
    method.fit(task)
    assert task.source is not None and task.target is not None
    x = torch.cat([task.source.x, task.target.x]).numpy()
    peer = KernelPCA(3, kernel="rbf", gamma=0.05).fit(x)
    up_to_signs(method.map_target(torch.from_numpy(x)), torch.from_numpy(peer.transform(x)), 1e-5)


def test_subspace_alignment_minimises_the_difference_of_the_bases() -> None:
    task, _ = shifted_classes(40, 8)
    method = SubspaceAlignment(context(8), components=3)
    method.fit(task)
    assert task.source is not None and task.target is not None
    bases = [torch.from_numpy(PeersPCA(3).fit(d.x.numpy()).components_.T.copy()) for d in (task.source, task.target)]
    best = torch.linalg.lstsq(bases[0], bases[1]).solution
    wanted = (task.source.x - task.source.x.mean(0)) @ bases[0] @ best
    up_to_signs(method.map_source(task.source.x), wanted)
    found = task.target.x - task.target.x.mean(0)
    up_to_signs(method.map_target(task.target.x), found @ bases[1])


@pytest.mark.parametrize("shared", [0, 1])  # directions that both subspaces have
def test_gfk_is_the_integral_over_the_geodesic(shared: int) -> None:
    """Against Gauss-Legendre quadrature of `Φ(t) Φ(t)ᵀ` along the geodesic made of the matrix exponential."""
    width, k = 9, 3
    source = torch.linalg.qr(randn(width, k))[0]
    target = randn(width, k, seed=1)
    target[:, :shared] = source[:, :shared]
    target = torch.linalg.qr(target)[0]
    # the geodesic from one span to the other: exp(t [[0, -Bᵀ], [B, 0]]) in a basis that begins with the source's
    whole = torch.linalg.qr(torch.cat([source, randn(width, width - k, seed=2)], 1))[0]
    whole[:, :k] = source
    u, cosines, vt = torch.linalg.svd(source.T @ target)
    rest = whole[:, k:].T @ target @ vt.T
    sines = rest.norm(dim=0)
    angles = torch.atan2(sines, cosines)
    velocity = torch.where(sines > 1e-12, rest / sines.clamp_min(1e-12), 0.0) * angles @ u.T
    generator = torch.zeros(width, width, dtype=torch.float64)
    generator[k:, :k], generator[:k, k:] = velocity, -velocity.T
    nodes, weights = np.polynomial.legendre.leggauss(40)
    wanted = torch.zeros(width, width, dtype=torch.float64)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        flow = (whole @ torch.matrix_exp(float(node) * generator))[:, :k]
        wanted += float(weight) * flow @ flow.T
    end = (whole @ torch.matrix_exp(generator))[:, :k]
    torch.testing.assert_close(end @ end.T, target @ target.T, rtol=1e-8, atol=1e-8)  # it does arrive
    factor = geodesic_factor(source, target)
    torch.testing.assert_close(factor @ factor.T, wanted, rtol=1e-8, atol=1e-8)


def test_gfk_of_equal_subspaces_is_their_projection() -> None:
    basis = torch.linalg.qr(randn(7, 3))[0]
    factor = geodesic_factor(basis, basis)
    torch.testing.assert_close(factor @ factor.T, basis @ basis.T)


def test_a_linear_svm_on_gfk_features_is_an_svm_with_its_kernel() -> None:
    from sklearn.svm import SVC

    task, _ = shifted_classes(40)
    method = GFK(context(head=SVM("classification", 3, kernel="linear")), components=2)
    method.fit(task)
    assert task.source is not None and task.target is not None and task.source.y is not None
    g = (method.fitted.factor @ method.fitted.factor.T).numpy()
    a, b = task.source.x.numpy(), task.target.x.numpy()
    peer = SVC(C=1.0, kernel="precomputed").fit(a @ g @ a.T, task.source.y.numpy())
    assert np.array_equal(method.predict(task.target.x).labels.numpy(), peer.predict(b @ g @ a.T))


# --- non-negative factors ---------------------------------------------------------------------------


def test_nmf_is_not_negative_never_rises_and_gets_as_low_as_scikit_learns() -> None:
    x = randn(60, 4).abs() @ randn(4, 12, seed=1).abs() + 0.05 * randn(60, 12, seed=2).abs()
    codes, basis, errors = factorise(x, 4, steps=400, tolerance=0.0)
    assert float(codes.min()) >= 0 and float(basis.min()) >= 0
    assert all(b <= a + 1e-9 * errors[0] for a, b in pairwise(errors))
    assert errors[-1] == pytest.approx(float((x - codes @ basis).square().sum()), rel=1e-6)
    peer = PeersNMF(4, init="nndsvda", max_iter=2000, tol=1e-8).fit(x.numpy())
    assert errors[-1] < 1.05 * peer.reconstruction_err_**2
    best = torch.from_numpy(np.stack([np.abs(encode(row[None], basis).numpy()[0]) for row in x[:3]]))
    from scipy.optimize import nnls

    wanted = np.stack([nnls(basis.T.numpy(), row.numpy())[0] for row in x[:3]])
    np.testing.assert_allclose(best.numpy(), wanted, atol=1e-4)


def test_nmf_as_a_method_and_as_a_reduction() -> None:
    task, labels = shifted_classes(shift=0.2)
    assert task.source is not None and task.target is not None
    low = torch.cat([task.source.x, task.target.x]).min()
    positive = FeatureTask(Features(task.source.x - low, task.source.y), Features(task.target.x - low), None)
    assert accuracy(NMF(context(), components=4), positive, labels) > 0.8
    reduced = context(features=FeatureOptions(reduce="nmf", components=4))
    assert accuracy(NoAdaptation(reduced), positive, labels) > 0.8


# --- moments ------------------------------------------------------------------------------------------


def test_corals_source_has_the_targets_covariance_and_mean() -> None:
    task, _ = shifted_classes()
    method = CORAL(context(), ridge=0.0)
    method.fit(task)
    assert task.source is not None and task.target is not None
    mapped = method.map_source(task.source.x)
    torch.testing.assert_close(mapped.T.cov(), task.target.x.T.cov())
    torch.testing.assert_close(mapped.mean(0), task.target.x.mean(0))
    assert torch.equal(method.map_target(task.target.x), task.target.x)


def test_coral_on_a_covariance_without_full_rank() -> None:
    """What the source does not vary in is left out, and nothing becomes infinite."""
    task, _ = shifted_classes(40)
    assert task.source is not None and task.target is not None
    flat = torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 0]).double())
    task = FeatureTask(Features(task.source.x @ flat, task.source.y), task.target, None)
    method = CORAL(context(), ridge=0.0)
    method.fit(task)
    assert task.source is not None
    assert bool(torch.isfinite(method.map_source(task.source.x)).all())


def test_the_bilinear_form_is_the_published_kernel() -> None:
    from sklearn.svm import SVC

    task, _ = shifted_classes(40)
    method = CORAL(context(head=SVM("classification", 3, kernel="linear", C=0.1)), form="bilinear")
    method.fit(task)
    assert task.source is not None and task.target is not None and task.source.y is not None
    a, b = (d.x - d.x.mean(0) for d in (task.source, task.target))
    w = method.fitted.alignment
    peer = SVC(C=0.1, kernel="precomputed").fit((a @ w @ a.T).numpy(), task.source.y.numpy())
    assert np.array_equal(method.predict(task.target.x).labels.numpy(), peer.predict((a @ w @ b.T).T.numpy()))


@pytest.mark.parametrize("match", ["mean", "zscore"])
def test_mean_match_gives_the_source_the_targets_moments(match: Any) -> None:
    task, _ = shifted_classes()
    method = MeanMatch(context(), match=match)
    method.fit(task)
    assert task.source is not None and task.target is not None
    mapped = method.map_source(task.source.x)
    torch.testing.assert_close(mapped.mean(0), task.target.x.mean(0))
    if match == "zscore":
        torch.testing.assert_close(mapped.std(0), task.target.x.std(0) * (69 / 70) ** 0.5 / (59 / 60) ** 0.5)


def test_alignment_helps_where_the_domains_are_scaled() -> None:
    task, labels = shifted_classes(shift=0.0)
    assert task.source is not None and task.target is not None
    scaled = FeatureTask(task.source, Features(task.target.x * torch.linspace(0.1, 6, 6).double() + 4), None)
    plain = accuracy(NoAdaptation(context()), scaled, labels)
    for build in (lambda c: CORAL(c, ridge=1e-3), MeanMatch):
        assert accuracy(build(context()), scaled, labels) > plain + 0.15


# --- the whole family --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_the_order_of_samples_changes_nothing(name: str) -> None:
    task, _ = shifted_classes()
    assert task.source is not None and task.target is not None and task.source.y is not None
    back = FeatureTask(Features(task.source.x.flip(0), task.source.y.flip(0)), Features(task.target.x.flip(0)), None)
    found = []
    for one in (task, back):
        method = FAMILY[name](context())
        method.fit(one)
        found.append(method.predict(task.target.x).labels)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", [n for n in FAMILY if n != "mean_match"])
def test_a_rotation_of_the_features_changes_nothing(name: str) -> None:
    task, _ = shifted_classes()
    assert task.source is not None and task.target is not None
    turn = torch.linalg.qr(randn(6, 6, seed=5))[0]
    turned = FeatureTask(Features(task.source.x @ turn, task.source.y), Features(task.target.x @ turn), None)
    first, second = FAMILY[name](context()), FAMILY[name](context())
    first.fit(task)
    second.fit(turned)
    assert torch.equal(first.predict(task.target.x).labels, second.predict(task.target.x @ turn).labels)


@pytest.mark.parametrize("name", FAMILY)
def test_a_fitted_method_survives_a_checkpoint_and_predicts_new_samples(name: str) -> None:
    task, labels = shifted_classes()
    first, second = FAMILY[name](context()), FAMILY[name](context())
    assert accuracy(first, task, labels) > 0.5
    second.load_state_dict(first.state_dict())
    new = randn(9, 6, seed=8)
    assert torch.equal(first.predict(new).probs, second.predict(new).probs)
    assert torch.equal(first.predict_source(new).probs, second.predict_source(new).probs)


@pytest.mark.parametrize("step", ["row_sum", "l2", "zscore", "zscore_domain", "center_domain"])
def test_normalisation_steps(step: str) -> None:
    task, _ = shifted_classes()
    assert task.source is not None and task.target is not None
    method = NoAdaptation(context(features=FeatureOptions((step,))))
    method.fit(task)
    z_s, z_t = (method.preprocessing(d.x, name) for d, name in ((task.source, "source"), (task.target, "target")))
    pooled, rows = torch.cat([z_s, z_t]), torch.cat([z_s, z_t])
    zero, one = torch.zeros(6).double(), torch.ones(6).double()
    if step == "row_sum":
        torch.testing.assert_close(rows.sum(1), torch.ones(len(rows)).double())
    elif step == "l2":
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)).double())
    elif step == "zscore":
        torch.testing.assert_close(pooled.mean(0), zero, atol=1e-12, rtol=0)
        torch.testing.assert_close(pooled.std(0, correction=0), one)
    else:
        for z in (z_s, z_t):
            torch.testing.assert_close(z.mean(0), zero, atol=1e-12, rtol=0)
            if step == "zscore_domain":
                torch.testing.assert_close(z.std(0, correction=0), one)


# --- bad input ---------------------------------------------------------------------------------------


def bad(task: FeatureTask, what: str) -> FeatureTask:
    assert task.source is not None and task.target is not None and task.source.y is not None
    source, target = task.source, task.target
    if what == "one class":
        return replace(task, source=replace(source, y=torch.zeros_like(source.y)))  # type: ignore[arg-type]
    if what == "nan":
        x = target.x.clone()
        x[3, 2] = float("nan")
        return replace(task, target=replace(target, x=x))
    constant = [replace(d, x=torch.full_like(d.x, 3.0)) for d in (source, target)]
    return FeatureTask(constant[0], constant[1], None)


@pytest.mark.parametrize(
    ("build", "what", "said"),
    [
        (lambda c: PCA(c, components=50), "", "ask for between 1 and 6"),
        (lambda c: SubspaceAlignment(c, components=7), "", "span 6 dimensions"),
        (lambda c: TCA(c, components=60), "", "method.components=60 must be between 1 and 6"),
        (lambda c: GFK(c, components=4), "", "at most half of the 6 features"),
        (lambda c: NMF(c, components=3), "", "nmf needs features that are not negative"),
        (lambda c: PCA(c, components=2), "constant", "span 0 dimensions"),
        (lambda c: KPCA(c, components=2), "constant", "the features are constant"),
        (lambda c: TCA(c, components=2), "nan", "1 of 420 values in the target features are NaN or infinite"),
        (lambda c: TCA(replace(c, make_head=lambda: Logistic("classification", 3)), components=2), "one class", "all of one class"),
        (lambda c: NoAdaptation(replace(c, make_head=lambda: SVM("classification", 3))), "one class", "all of one class"),
        (lambda c: BDA(c, balance=2.0), "", "method.balance is between 0"),
        (lambda c: CORAL(c, form="bilinear"), "", "set head=svm head.kernel=linear"),
        (lambda c: TCA(c, kernel="linear", approximate="nystroem"), "", "a linear kernel is exact"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_one_line(build: Callable[..., FeatureMethod], what: str, said: str) -> None:
    task, _ = shifted_classes()
    with pytest.raises(TransferError) as caught:
        build(context()).fit(bad(task, what) if what else task)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_principal_components_of_few_samples() -> None:
    basis, mean, variances = principal_components(randn(5, 30), 4)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4).double())
    assert len(variances) == 4 and mean.shape == (30,)


@pytest.mark.parametrize("step", ["l2", "zscore", "zscore_domain"])
def test_a_method_that_sees_one_domain_predicts_the_other(step: str) -> None:
    """The probe is fitted to the source alone; the target is normalised by what there is."""
    task, labels = shifted_classes(shift=0.0)
    method = LinearProbe(context(features=FeatureOptions((step, "zscore"))))
    assert accuracy(method, task, labels) > 0.8
    assert task.source is not None
    alone = LinearProbe(context(features=FeatureOptions((step,))))
    alone.fit(FeatureTask(task.source, None, None))
    assert alone.predict(task.source.x).labels.shape == task.source.x.shape[:1]
