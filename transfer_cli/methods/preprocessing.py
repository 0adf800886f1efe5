"""What is done to frozen features before a method sees them (config section `features`): normalisation, then reduction.

Its statistics are those of the training features of both domains, or, for the `_domain` steps, of each domain alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transfer_cli.errors import check_choice
from transfer_cli.methods.base import FeatureOptions
from transfer_cli.methods.fitted import Fitted
from transfer_cli.methods.math.logistic import standardising
from transfer_cli.methods.math.nmf import encode, factorise
from transfer_cli.methods.math.principal import principal_components

STEPS = ("row_sum", "l2", "zscore", "zscore_domain", "center_domain")
REDUCTIONS = ("none", "pca", "nmf")


class Preprocessing(nn.Module):
    def __init__(self, options: FeatureOptions) -> None:
        super().__init__()
        for step in options.normalise:
            check_choice(step, STEPS, "features.normalise")
        check_choice(options.reduce, REDUCTIONS, "features.reduce")
        self.options = options
        self.fitted = Fitted()

    def fit(self, source: Tensor | None, target: Tensor | None) -> dict[str, float]:
        """Statistics from the training features `(N, D)` of the domains there are; what the reduction kept, to be logged."""
        domains = {name: x for name, x in (("source", source), ("target", target)) if x is not None}
        if not domains:  # a source's posterior alone is there
            return {}
        for i, step in enumerate(self.options.normalise):
            pooled = torch.cat(list(domains.values()))
            for name, x in domains.items():
                mean, scale = standardising(x if step.endswith("_domain") else pooled)
                scale = torch.ones_like(scale) if step == "center_domain" else scale
                self.fitted.put(**{f"mean{i}_{name}": mean, f"scale{i}_{name}": scale})
            domains = {name: self._step(x, i, name) for name, x in domains.items()}
        if self.options.reduce == "pca":
            basis, mean, variances = principal_components(list(domains.values()), self.options.components)
            share = float(variances[: self.options.components].sum() / variances.sum())
            if self.options.whiten:
                basis = basis * variances[: self.options.components].rsqrt()
            self.fitted.put(basis=basis, offset=mean)
            return {"explained_variance": share}
        if self.options.reduce == "nmf":
            x = torch.cat(list(domains.values()))
            _, basis, errors = factorise(x, self.options.components)
            self.fitted.put(basis=basis)
            return {"explained_variance": 1 - errors[-1] / float((x - x.mean(0)).square().sum())}
        return {}

    def forward(self, x: Tensor, domain: str) -> Tensor:
        """Features `(B, D)` float64 of `source` or `target`."""
        if self.options.normalise and not hasattr(self.fitted, f"mean0_{domain}"):
            domain = "target" if domain == "source" else "source"  # fitted without this one
        for i in range(len(self.options.normalise)):
            x = self._step(x, i, domain)
        if self.options.reduce == "pca":
            return (x - self.fitted.offset) @ self.fitted.basis
        if self.options.reduce == "nmf":
            return encode(x, self.fitted.basis)
        return x

    def _step(self, x: Tensor, i: int, domain: str) -> Tensor:
        step = self.options.normalise[i]
        if step == "row_sum":
            sums = x.sum(1, keepdim=True)
            return x / torch.where(sums != 0, sums, 1.0)
        if step == "l2":
            return unit_rows(x)
        return (x - getattr(self.fitted, f"mean{i}_{domain}")) / getattr(self.fitted, f"scale{i}_{domain}")


def unit_rows(x: Tensor) -> Tensor:
    """Rows `(N, D)` scaled to length one; a zero row stays."""
    norms = x.norm(dim=1, keepdim=True)
    return x / torch.where(norms > 0, norms, 1.0)
