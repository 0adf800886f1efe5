"""Supervised contrastive learning (Khosla et al., NeurIPS 2020) on the labelled samples, SimCLR on the unlabelled target.

    min_{F,g}  L_out(labelled) + w · L_NT-Xent(target)
    L_out = mean_i -1/|P(i)| Σ_{p ∈ P(i)} log( exp(z_i·z_p / τ) / Σ_{a ≠ i} exp(z_i·z_a / τ) )        z = g(F(x)) / ‖g(F(x))‖

over two strong views of each sample. P(i) are the other views of i's class, in the source and among granted target labels
together; in the second term (Chen et al., ICML 2020) those of the same sample. `temperature` is τ of both terms, `weight` is w;
g is an MLP with one hidden layer of `hidden` units (null: as wide as the features) and `dim` outputs, which is dropped
afterwards. `steps`: of this phase (null: the trainer's).

Nothing is predicted: another method follows on the backbone (`then=`).
"""

from __future__ import annotations

import torch

from transfer_cli.methods.adversarial.perceptron import perceptron
from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.contrastive.info_nce import info_nce, nt_xent
from transfer_cli.methods.phases import ALL_PARTS, Batch, Gradient, Losses, Moves, Progress, Update


class SupCon(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)
    kinds = ("classification",)
    label_spaces = ("closed", "partial", "open")
    handles_target_labels = True
    uses_strong = True
    representation_only = True

    def __init__(
        self,
        context: Context,
        *,
        weight: float = 1.0,
        temperature: float = 0.1,
        hidden: int | None = None,
        dim: int = 128,
        steps: int | None = None,
    ) -> None:
        super().__init__(context)
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        self.weight, self.temperature, self.steps = weight, temperature, steps
        width = self.network.feature_dim
        self.projection = perceptron(width, hidden or width, dim, hidden_layers=1)

    def phases(self) -> list[Gradient]:
        moves = [Moves.of(self.network.backbone, self.network.bottleneck, self.projection)]
        views = dict.fromkeys(ALL_PARTS, ("strong", "strong"))
        return [Gradient("contrast", [Update(self.losses, moves)], steps=self.steps, views=views, predicts=False)]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = (torch.cat([*batch.views[part]]) for part in ("source", "target"))
        classes, granted = [batch.source.y.repeat(2)], batch.views.get("target_labelled", [])
        if batch.target_labelled is not None:
            classes.append(batch.target_labelled.y.repeat(2))
        of_source, of_target = self.network.both(source, torch.cat([target, *granted]))
        z_source, z_target = self.projection(of_source.features), self.projection(of_target.features)
        labelled, unlabelled = torch.cat([z_source, z_target[len(target) :]]), z_target[: len(target)]
        return Losses(
            {
                "supcon": info_nce(labelled, torch.cat(classes), self.temperature),
                "nt_xent": self.weight * nt_xent(unlabelled, self.temperature),
            }
        )
