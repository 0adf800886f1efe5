"""DELTA: fine-tuning that keeps the feature maps which matter (Li et al., ICLR 2019).

    min_{F,C}  CE(C(F(x_t)), y_t) + α 1/B Σ_i Σ_l Σ_j W_lj(x_i, y_i) ‖FM_lj(w, x_i) - FM_lj(w⁰, x_i)‖²
    W_l = softmax_j(g_lj / τ)        g_lj = L(w⁰ without channel j) - L(w⁰), standardised over j

FM_lj is channel j of what stage l puts out, w⁰ the network at the start, its head the linear probe's optimum (see `lp_ft`), L its
loss on the sample. The paper removes one channel after another; here the gap is the first-order estimate of that (Molchanov et
al., ICLR 2017), - Σ_positions FM_lj · ∂L/∂FM_lj, which one backward pass gives for all channels. A single channel changes the
loss by little, so that the paper's softmax of the gaps themselves would weigh all alike: they are centred and divided by their
mean absolute deviation.

`alpha` is α, `temperature` is τ. The paper's decay of the new head is `optimizer.weight_decay`. Channels are the last dimension of
sequences `(B, T, D)` and the second of all else, images `(B, C, H, W)` foremost (swin's `(B, H, W, C)` are weighed by rows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transfer_cli.backbones.base import Backbone
from transfer_cli.methods.base import Context
from transfer_cli.methods.finetuning.lp_ft import LPFT
from transfer_cli.methods.math.precision import in_full_precision
from transfer_cli.methods.phases import Batch, Labelled, Losses, Progress
from transfer_cli.methods.teacher import FrozenTeacher


class DELTA(LPFT):
    def __init__(
        self,
        context: Context,
        *,
        alpha: float = 0.01,
        temperature: float = 5.0,
        head_l2: float = 1e-2,
        backbone_lr: float = 0.1,
        layer_decay: float = 1.0,
        source_steps: int | None = None,
    ) -> None:
        super().__init__(
            context, head_l2=head_l2, backbone_lr=backbone_lr, layer_decay=layer_decay, source_steps=source_steps
        )
        if temperature <= 0:
            raise ValueError(f"temperature is above 0, not {temperature}")
        if not stages_of(self.network.backbone):
            raise ValueError("compares the outputs of a backbone's layers, and this one has none: take method=lp_ft")
        self.alpha, self.temperature = alpha, temperature
        self.start = FrozenTeacher(self.network)  # w⁰

    def begin(self) -> None:
        self.start.copy(self.network)

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.target_labelled is not None
        with feature_maps(self.network.backbone) as maps:
            losses = super().losses(batch, progress)
        first, gaps = self.at_start(batch.target_labelled)
        distances = [
            attended_distance(now, then, gap, temperature=self.temperature)
            for now, then, gap in zip(maps.values(), first, gaps, strict=True)
        ]
        return Losses({**losses.terms, "delta": self.alpha * torch.stack(distances).sum()})

    def at_start(self, labelled: Labelled) -> tuple[list[Tensor], list[Tensor]]:
        """By stage the start's feature maps, and `(B, C)` how much the loss of each sample would rise without each channel."""
        network = self.start.module
        with torch.enable_grad(), feature_maps(network.backbone) as found:  # type: ignore[arg-type]
            # Of one sample the mean is its own loss: times B, so that each has the gradient of its own.
            loss = network.supervised(network(labelled.x).logits, labelled.y) * len(labelled.y)  # type: ignore[operator]
        maps = list(found.values())
        slopes = torch.autograd.grad(loss, maps)
        maps = [m.detach() for m in maps]
        return maps, [
            -(by_channel(m).float() * by_channel(g).float()).sum(2) for m, g in zip(maps, slopes, strict=True)
        ]


def stages_of(backbone: nn.Module) -> dict[str, nn.Module]:
    """The stages that have parameters, by name."""
    stages = backbone.stages() if isinstance(backbone, Backbone) else dict(backbone.named_children())
    return {name: stage for name, stage in stages.items() if any(True for _ in stage.parameters())}


@contextmanager
def feature_maps(backbone: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What the stages put out inside the block, in the order in which they are run; gradients of it can be asked for."""
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            maps[name] = output.requires_grad_()
            return output.clone()  # the next layer may work in place

        return hook

    handles = [stage.register_forward_hook(keep(name)) for name, stage in stages_of(backbone).items()]
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled backbone would not call hooks that come after it
            yield maps
    finally:
        for handle in handles:
            handle.remove()


@in_full_precision
def attended_distance(now: Tensor, start: Tensor, gap: Tensor, *, temperature: float) -> Tensor:
    """The mean over samples of the squared distances of channels, weighed by the softmax of their standardised gaps `(B, C)`."""
    centred = gap - gap.mean(1, keepdim=True)
    scale = centred.abs().mean(1, keepdim=True).clamp_min(torch.finfo(gap.dtype).tiny)
    attention = (centred / scale / temperature).softmax(1)
    return (attention * by_channel(now - start).square().sum(2)).sum(1).mean()


def by_channel(maps: Tensor) -> Tensor:
    """`(B, C)`, `(B, T, C)` or `(B, C, ...)` to `(B, C, positions)`."""
    return maps.transpose(1, 2) if maps.ndim == 3 else maps.flatten(2) if maps.ndim > 3 else maps[:, :, None]
