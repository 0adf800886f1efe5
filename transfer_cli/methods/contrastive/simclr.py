"""SimCLR (Chen, Kornblith, Norouzi & Hinton, ICML 2020), on the inputs of both domains (Shen et al., ICML 2022).

    min_{F,g}  mean_i -log( exp(sim(z_i, z_j) / τ) / Σ_{k ≠ i} exp(sim(z_i, z_k) / τ) )        z = g(F(x)), sim the cosine

i and j are two strong views of one sample, k runs over all other views of the step's source and target samples together. No
label is read, and a source is not needed. `temperature` is τ; g is an MLP with one hidden layer of `hidden` units (null: as
wide as the features) and `dim` outputs, which is dropped afterwards. `steps`: of this phase (null: the trainer's).

Nothing is predicted: another method follows on the backbone (`then=`).
"""

from __future__ import annotations

import torch

from transfer_cli.methods.adversarial.perceptron import perceptron
from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.contrastive.info_nce import nt_xent
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class SimCLR(NetworkMethod):
    needs = Needs(target_inputs=True)
    label_spaces = ("closed", "partial", "open", "separate")
    handles_target_labels = True  # it reads none
    uses_strong = True
    representation_only = True

    def __init__(
        self,
        context: Context,
        *,
        temperature: float = 0.5,
        hidden: int | None = None,
        dim: int = 128,
        steps: int | None = None,
    ) -> None:
        super().__init__(context)
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        self.temperature, self.steps = temperature, steps
        width = self.network.feature_dim
        self.projection = perceptron(width, hidden or width, dim, hidden_layers=1)

    def phases(self) -> list[Gradient]:
        moves = [Moves.of(self.network.backbone, self.network.bottleneck, self.projection)]
        parts, two = ("source", "target"), ("strong", "strong")
        views = dict.fromkeys(parts, two)
        update = Update(self.losses, moves)
        return [Gradient("contrast", [update], steps=self.steps, parts=parts, views=views, predicts=False)]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        views = {part: torch.cat([*pair]) for part, pair in batch.views.items()}
        if "source" in views:
            source, target = self.network.both(views["source"], views["target"])
            features = [source.features.chunk(2), target.features.chunk(2)]
        else:
            features = [self.network.features(views["target"]).chunk(2)]
        first, second = (torch.cat(halves) for halves in zip(*features, strict=True))
        return Losses({"nt_xent": nt_xent(self.projection(torch.cat([first, second])), self.temperature)})
