"""Deep CORAL (Sun & Saenko, ECCV 2016 workshops).

    min_{F,C}  CE(C(F(x_s)), y_s) + λ · ‖C_s - C_t‖²_F / (4 d²)

C_s and C_t are the covariances `(d, d)` of a batch of activations. The paper applies it to the last layer's outputs
(`layer: logits`), later work to the features (`layer: features`). `weight` is λ, which the paper sets so that both terms end
alike; for wide features 1 / (4 d²) makes that a large number.
"""

from __future__ import annotations

from typing import Literal

from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math.divergences import coral
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class DeepCORAL(NetworkMethod):
    version = 2  # another default weight
    needs = Needs(source_labels=True, target_inputs=True)

    def __init__(
        self, context: Context, *, weight: float = 1.0, layer: Literal["logits", "features"] = "logits"
    ) -> None:
        super().__init__(context)
        self.weight, self.layer = weight, layer

    def phases(self) -> list[Gradient]:
        return [Gradient("adapt", [Update(self.losses, [Moves.of(self.network)])])]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        supervised = self.network.supervised(source.logits, batch.source.y)
        distance = coral(getattr(source, self.layer), getattr(target, self.layer))
        return Losses(
            {"supervised": supervised, "coral": self.weight * distance}, {"coral_distance": distance.detach()}
        )
