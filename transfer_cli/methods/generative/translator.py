"""Networks that translate small images from one domain to another, and those that judge the translations."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

Game = Literal["least_squares", "non_saturating"]
Norm = Literal["instance", "spectral"]

SMALLEST = 8  # pixels a side: what a critic's layers leave something of
GREY_LEVEL = 0.05  # black and white lie that far from 0 and 1 at least, where the logit's slope does not vanish


class Translator(nn.Module):
    """Images `(B, C, H, W)` in [0, 1] and class probabilities `(B, K)` to images in [0, 1] of the same shape.

        G(x, c) = σ( logit(x) + δ(x, c) ),        δ = 0 at first: the identity, but for a `GREY_LEVEL`

    δ is a residual network (He et al., CVPR 2016) with instance normalisation (Ulyanov et al. 2016) at half the resolution; its
    last layer sees those features, each four times (Odena, Dumoulin & Olah 2016: no checkerboards), and x. The class enters as an
    embedding added to the first layer's features; a probability vector mixes the classes' embeddings.
    """

    def __init__(self, channels: int, classes: int, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 5, stride=2, padding=2), nn.InstanceNorm2d(width, affine=True)
        )
        self.embedding = nn.Linear(classes, width, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                nn.InstanceNorm2d(width, affine=True),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.InstanceNorm2d(width, affine=True),
            )
            for _ in range(blocks)
        )
        self.last = nn.Conv2d(width + channels, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        h = F.relu(self.stem(x) + self.embedding(classes)[:, :, None, None])
        for block in self.blocks:
            h = h + block(h)
        upsampled = F.interpolate(h, scale_factor=2.0)[:, :, : x.shape[2], : x.shape[3]]  # an odd side was rounded up
        change = self.last(torch.cat([upsampled, x.to(h.dtype)], 1)).float()
        return torch.sigmoid(torch.logit(x.float().clamp(GREY_LEVEL, 1 - GREY_LEVEL)) + change)


class PatchCritic(nn.Module):
    """Images `(B, C, H, W)` to a map of logits `(B, 1, H/4, W/4)`, each of a patch of 18 pixels (Isola et al., CVPR 2017):
    positive for real ones. Instance or spectral normalisation (Miyato et al., ICLR 2018)."""

    def __init__(self, channels: int, width: int, norm: Norm) -> None:
        super().__init__()
        layers = [
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        ]
        first, second, last = (spectral_norm(layer) for layer in layers) if norm == "spectral" else layers
        middle = nn.InstanceNorm2d(2 * width, affine=True) if norm == "instance" else nn.Identity()
        self.layers = nn.Sequential(first, nn.LeakyReLU(0.2), second, middle, nn.LeakyReLU(0.2), last)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).float()


def verdict(logits: Tensor, real: bool, game: Game) -> Tensor:
    """How far a critic's logits are from saying `real`: `(logit - real)²`, or `-log σ(±logit)`; the mean, 0-dim.

    Critics minimise it on what is real and what is not; a translator, with `real=True`, on its translations (Mao et al.,
    ICCV 2017; Goodfellow et al., NIPS 2014, section 3).
    """
    if game == "least_squares":
        return (logits - float(real)).square().mean()
    return F.softplus(-logits if real else logits).mean()


def critic_loss(real: Tensor, translated: Tensor, game: Game) -> tuple[Tensor, Tensor]:
    """A critic's loss from its logits on both, each its own mean, halved; and its accuracy over all patches."""
    loss = 0.5 * (verdict(real, True, game) + verdict(translated, False, game))
    between = 0.5 if game == "least_squares" else 0.0
    accuracy = 0.5 * ((real > between).float().mean() + (translated <= between).float().mean())
    return loss, accuracy.detach()
