"""A divergence of choice between the domains' features as a penalty: the source's error and a divergence bound the target's
(Ben-David, Blitzer, Crammer, Kulesza, Pereira & Vaughan, Machine Learning 79, 2010).

    min_{F,C}  CE(C(F(x_s)), y_s) + λ · d(F(x_s), F(x_t))

`divergence` is d, of `methods/math/divergences.py`, between the batch's samples at `layer`; `weight` is λ. Those in nats (`kl`,
`knn_kl`, `renyi`) grow with the number of features and are divided by it. `shrinkage` is δ of the Gaussians' covariances, `alpha`
the order of Rényi's, `neighbours` the k of `knn_kl`, and `directions` how many `wasserstein` draws in each step. `mmd` and `coral`
are those of `dan` and, on the logits, of `deep_coral`.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math import divergences
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class Divergence(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)

    def __init__(
        self,
        context: Context,
        *,
        divergence: Literal["mmd", "coral", "kl", "knn_kl", "wasserstein", "renyi"] = "mmd",
        weight: float = 1.0,
        layer: Literal["features", "logits"] = "features",
        shrinkage: float = 0.1,
        alpha: float = 0.5,
        neighbours: int = 3,
        directions: int = 64,
    ) -> None:
        super().__init__(context)
        if not 0 < shrinkage <= 1:
            raise ValueError(f"shrinkage is a share above 0 and at most 1, not {shrinkage}")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha is an order between 0 and 1, not {alpha}: towards 1 it is divergence=kl")
        if neighbours < 1 or directions < 1:
            raise ValueError(f"neighbours and directions are at least 1; they are {neighbours} and {directions}")
        self.divergence, self.weight, self.layer = divergence, weight, layer
        self.shrinkage, self.alpha, self.neighbours, self.directions = shrinkage, alpha, neighbours, directions

    def phases(self) -> list[Gradient]:
        return [Gradient("adapt", [Update(self.losses, [Moves.of(self.network)])])]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        supervised = self.network.supervised(source.logits, batch.source.y)
        distance = self.between(getattr(source, self.layer), getattr(target, self.layer))
        return Losses(
            {"supervised": supervised, "divergence": self.weight * distance}, {self.divergence: distance.detach()}
        )

    def between(self, source: Tensor, target: Tensor) -> Tensor:
        width = source.shape[1]
        match self.divergence:
            case "mmd":
                return divergences.mmd(source, target)
            case "coral":
                return divergences.coral(source, target)
            case "kl":
                return divergences.kl(source, target, self.shrinkage) / width
            case "knn_kl":
                return divergences.knn_kl(source, target, self.neighbours) / width
            case "renyi":
                return divergences.renyi(source, target, self.alpha, self.shrinkage) / width
            case _:
                return divergences.wasserstein(source, target, number=self.directions)
