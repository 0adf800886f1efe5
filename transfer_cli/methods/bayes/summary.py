"""What a labelled source says of features: class means, the spread within classes and that between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.math.logistic import deviation


@dataclass(frozen=True)
class Summary:
    """Counts `(K,)`, means `(K, D)` and the covariance within classes `(D, D)`, which is never singular; float64."""

    counts: Tensor
    means: Tensor
    within: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, classes: int) -> Summary:
        """Of samples `(N, D)` and class indices `(N,)`; the covariance is shrunk as Ledoit & Wolf (2004) would, in units of each
        feature's standard deviation, so that units of measurement do not matter.

        Raises:
            TransferError: fewer than two samples in each class, or features that do not vary.
        """
        own = F.one_hot(y, classes).to(x)
        counts, offset, scale = own.sum(0), x.mean(0), deviation(x)
        x = (x - offset) / scale
        means = own.T @ x / counts.clamp_min(1)[:, None]
        inner = x - means[y]
        spare = len(x) - int((counts > 0).sum())
        if spare < 1 or not bool(inner.any()):
            raise TransferError(
                "the source has no spread within its classes, from which a covariance could be learnt: it needs several "
                "different samples of a class."
            )
        within, share = inner.T @ inner / spare, ledoit_wolf_shrinkage(inner.cpu().numpy(), assume_centered=True)
        share = max(float(share), 1e-6)
        even = within.diagonal().mean() * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        within = ((1 - share) * within + share * even) * torch.outer(scale, scale)
        return cls(counts, offset + means * scale, within)

    @property
    def centre(self) -> Tensor:
        """The mean `(D,)` of the class means that there are."""
        return self.means[self.counts > 0].mean(0)

    def half(self, whiten: bool = True) -> Tensor:
        """The factor `(D, D)` by which features are whitened, or, with `whiten=False`, only brought to one scale."""
        return torch.linalg.cholesky(self.within if whiten else torch.diag(self.within.diagonal()))

    def spread(self) -> float:
        """By how much class means vary, in units of the covariance within classes: 1/κ of μ_c ~ N(m, Σ / κ).

        The mean over directions of the class means' covariance, without the part that finite samples make.
        """
        there = self.counts > 0
        if int(there.sum()) < 2:
            return 1.0
        apart = self.means[there] - self.centre
        half = torch.linalg.cholesky(self.within)
        z = torch.linalg.solve_triangular(half, apart.T, upper=False)
        raw = float(z.square().sum()) / (int(there.sum()) - 1) / len(half)
        return max(raw - float((1 / self.counts[there]).mean()), 1e-3)
