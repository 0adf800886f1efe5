"""What every method predicts: a distribution a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

NO_SPREAD = 1e-30  # a standard deviation that stands for zero: far below any that targets in small units have


@dataclass(frozen=True)
class Prediction:
    """Classification: `log_probs` `(B, K)`. Regression: `mean` and `variance` `(B, T)` in the targets' units, `variance`
    the whole of it and `epistemic` the part that more data would remove, where the method knows it: in classification the
    mutual information `(B,)`, in nats, of class and weights.

    Of a conformal run: the set of classes `members` `(B, K)`, or the interval from `lower` to `upper` `(B, T)`."""

    log_probs: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    epistemic: Tensor | None = None
    members: Tensor | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None

    @classmethod
    def from_logits(cls, logits: Tensor) -> Prediction:
        return cls(log_probs=F.log_softmax(logits.float(), dim=1))

    @classmethod
    def from_probs(cls, probs: Tensor) -> Prediction:
        """Probabilities `(B, K)` that sum to one; a zero is taken for the smallest positive number."""
        return cls(log_probs=probs.clamp_min(torch.finfo(probs.dtype).tiny).log())

    @classmethod
    def mixture(cls, parts: Sequence[Prediction]) -> Prediction:
        """Of equal weights, those of networks or of draws of one; what they disagree on is the epistemic part."""
        if parts[0].log_probs is not None:
            return cls.of_draws(torch.stack([part.log_probs for part in parts if part.log_probs is not None]))
        means = torch.stack([part.mean for part in parts if part.mean is not None])
        noise = torch.stack([part.variance for part in parts if part.variance is not None]).mean(0)
        spread = means.var(0, correction=0)
        return cls(mean=means.mean(0), variance=noise + spread, epistemic=spread)

    @classmethod
    def of_draws(cls, log_probs: Tensor) -> Prediction:
        """Log-probabilities `(S, B, K)` of S equally likely classifiers."""
        mixed = log_probs.logsumexp(0) - math.log(len(log_probs))
        doubt, inner = (torch.special.entr(lp.exp()).sum(-1) for lp in (mixed, log_probs))
        return cls(log_probs=mixed, epistemic=(doubt - inner.mean(0)).clamp_min(0))

    @property
    def probs(self) -> Tensor:
        assert self.log_probs is not None
        return self.log_probs.exp()

    @property
    def labels(self) -> Tensor:
        """The most probable class `(B,)`."""
        assert self.log_probs is not None
        return self.log_probs.argmax(1)

    def is_finite(self) -> bool:
        """Whether no value is NaN, and none infinite but the logarithm of a probability of zero."""
        numbers = [value for value in (self.mean, self.variance, self.epistemic) if value is not None]
        certain = self.log_probs is None or not bool(self.log_probs.isnan().any())
        return certain and all(bool(torch.isfinite(value).all()) for value in numbers)

    def cpu(self) -> Prediction:
        """The same on the CPU."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return Prediction(**{name: None if value is None else value.cpu() for name, value in columns.items()})

    @classmethod
    def concatenate(cls, parts: Sequence[Prediction]) -> Prediction:
        """Batches as one, on the CPU."""
        columns = {f.name: [getattr(p, f.name) for p in parts] for f in fields(cls)}
        return cls(
            **{name: torch.cat([v.cpu() for v in vs]) for name, vs in columns.items() if vs and vs[0] is not None}
        )
