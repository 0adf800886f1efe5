"""Eigenvectors without the matrix, and what is solved with them: samples enough that Lanczos's method is used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from feature_tasks import context
from scipy.linalg import eigh
from sklearn.decomposition import KernelPCA
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.math.eigen import BLOCK, DENSE, gram, scatter, top_of_operator
from transfer_cli.methods.math.kernel_map import rbf
from transfer_cli.methods.math.mmd_subspace import KernelSpan, domain_contrast
from transfer_cli.methods.math.principal import kernel_components, principal_components
from transfer_cli.methods.phases import Features, FeatureTask
from transfer_cli.methods.subspace.kpca import KPCA
from transfer_cli.methods.subspace.tca import TCA

MANY = DENSE + 100


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clouds(width: int = 4) -> FeatureTask:
    source, target = randn(MANY // 2, width), randn(MANY // 2, width, seed=1) * 1.2 + 0.5
    return FeatureTask(Features(source, torch.arange(len(source)) % 2), Features(target), None)


def up_to_signs(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found * torch.sign((found * wanted).sum(0)), wanted, rtol=0, atol=tolerance * scale)


def test_a_scatter_is_the_covariance_times_n() -> None:
    x = randn(BLOCK + 5, 3) + 1e3
    wanted = torch.from_numpy(np.cov(x.numpy().T, bias=True)) * len(x)
    torch.testing.assert_close(scatter(x, x.mean(0)), wanted)
    torch.testing.assert_close(gram(x), torch.einsum("ni,nj->ij", x, x))


@pytest.mark.parametrize("n", [40, MANY])
def test_the_top_of_an_operator_is_that_of_its_matrix(n: int) -> None:
    root = randn(n, n)
    matrix = root @ root.T
    values, vectors = top_of_operator(lambda columns: matrix @ columns, matrix, 3)
    wanted = eigh(matrix.numpy(), subset_by_index=[n - 3, n - 1])
    torch.testing.assert_close(values, torch.from_numpy(wanted[0][::-1].copy()))
    up_to_signs(vectors, torch.from_numpy(wanted[1][:, ::-1].copy()), 1e-8)


def test_tca_on_a_kernel_of_many_samples_is_the_dense_solution() -> None:
    task = clouds()
    assert task.source is not None and task.target is not None
    x = torch.cat([task.source.x, task.target.x])
    method = TCA(context(4, 2), components=4, ridge=0.5, kernel="rbf", gamma=0.3, unit=False)
    method.fit(task)
    e = np.repeat([1 / len(task.source.x), -1 / len(task.target.x)], [len(task.source.x), len(task.target.x)])
    k, centring = rbf(x, x, 0.3).numpy(), np.eye(MANY) - 1 / MANY
    objective = k @ np.outer(e, e) @ k / (e @ e) + 0.5 * np.eye(MANY)
    vectors = eigh(k @ centring @ k, objective)[1][:, ::-1][:, :4]
    up_to_signs(method.map_target(x), torch.from_numpy(k @ (vectors / np.linalg.norm(vectors, axis=0))), 1e-6)


def test_kernel_pca_of_many_samples_is_scikit_learns() -> None:
    task = clouds()
    assert task.source is not None and task.target is not None
    method = KPCA(context(4, 2), components=5, gamma=0.3)
    report = method.fit(task)
    x, new = torch.cat([task.source.x, task.target.x]).numpy(), randn(9, 4, seed=2)
    peer = KernelPCA(5, kernel="rbf", gamma=0.3, eigen_solver="dense").fit(x)
    up_to_signs(method.map_target(new), torch.from_numpy(peer.transform(new.numpy())), 1e-8)
    every = KernelPCA(None, kernel="rbf", gamma=0.3).fit(x).eigenvalues_
    assert report["explained_variance"] == pytest.approx(every[:5].sum() / every.sum())


def test_a_kernel_of_too_low_a_rank_is_refused() -> None:
    """A few points, each many times: fewer dimensions than components."""
    x = randn(20, 3).repeat(MANY // 20, 1)
    kernel = rbf(x, x, 0.5)
    half = len(x) // 2
    with pytest.raises(TransferError, match="components=25 must be"):
        KernelSpan(kernel).solve(domain_contrast(kernel[:half], kernel[half:]).normalised(), 1.0, 25)
    with pytest.raises(TransferError, match="25 components are asked for"):
        kernel_components(kernel, 25)


def test_the_variances_of_components_end_with_those_of_the_others() -> None:
    x = randn(50, 6)
    every = torch.linalg.eigvalsh(torch.from_numpy(np.cov(x.numpy().T, bias=True))).flip(0)
    _, mean, variances = principal_components([x[:20], x[20:]], 2)
    torch.testing.assert_close(variances, torch.stack([every[0], every[1], every[2:].sum()]))
    torch.testing.assert_close(mean, x.mean(0))
