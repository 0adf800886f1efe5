"""Kronecker-factored curvature of a network's linear and convolutional layers (Martens & Grosse, ICML 2015; Grosse & Martens, ICML
2016; as a posterior: Ritter, Botev & Barber, ICLR 2018; linearised predictions: Immer, Korzepa & Bauer, AISTATS 2021).

    H_l ≈ A_l ⊗ G_l / N        A_l = Σ_n Σ_t a aᵀ,  G_l = Σ_n 1/T Σ_t g gᵀ        θ_l ~ N(θ̂_l, (H_l + λ I)⁻¹)
    f(x) ~ N(f_θ̂(x), C(x)),    C(x) = Σ_l J_l(x) (H_l + λ I)⁻¹ J_l(x)ᵀ

a are a layer's inputs, with a one for its bias, at each of its T places (1 where it is linear); g = (∂f / ∂s)ᵀ S are slopes in its
outputs s along the columns of S, of which S Sᵀ is the likelihood's curvature in the network's outputs f. Layers are independent.
Frozen layers, those that normalise, convolutions in groups and attention (whose layers are not called, so that no inputs are seen)
keep their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Network
from transfer_cli.methods.fitted import Fitted

NUMBERS = 2**22  # of Jacobians at once
ATTENTION = ("MultiheadAttention", "ShiftedWindowAttention", "ShiftedWindowAttentionV2")  # of torch and torchvision
MOST = 2**27  # numbers in all factors: a gigabyte


class Curvature(nn.Module):
    """`network` is looked at, not owned."""

    samples: Tensor

    def __init__(self, network: Network) -> None:
        super().__init__()
        hidden = {inner for m in network.modules() if type(m).__name__ in ATTENTION for inner in m.modules()}
        found: list[Any] = [layer for layer in network.modules() if layer not in hidden and is_factored(layer)]
        self._looked_at = (network, found)  # in a tuple, so that they are no modules of this one
        sizes = [(width_of(layer), len(layer.weight)) for layer in found]
        if sum(a * a + g * g for a, g in sizes) > MOST:
            raise ValueError(
                "layers=all keeps two matrices a layer, too large for this network: set method.layers=last"
            )
        for i, (a, g) in enumerate(sizes):
            self.register_buffer(f"inputs{i}", torch.zeros(a, a, dtype=torch.float64))
            self.register_buffer(f"slopes{i}", torch.zeros(g, g, dtype=torch.float64))
        self.register_buffer("samples", torch.zeros((), dtype=torch.float64))
        self.eigen = Fitted()

    @property
    def layers(self) -> list[Any]:
        return self._looked_at[1]

    def add(self, x: Any, domain: str, weight: float) -> None:
        """Samples `(B, ...)`, each counting `weight` times, to A and G."""
        for part in self.parts(x):
            logits, seen = self.look(part, domain)
            square = self.root(logits)
            self.samples += weight * len(logits)
            for i, (a, _) in enumerate(seen):
                own = getattr(self, f"inputs{i}")
                own += weight * torch.einsum("bit,bjt->ij", a, a)
            for k in range(square.shape[2]):
                for i, g in enumerate(self.slopes(logits, seen, square[:, :, k])):
                    own = getattr(self, f"slopes{i}")
                    own += weight * torch.einsum("bot,bpt->op", g, g) / g.shape[2]

    def decompose(self) -> Tensor:
        """Eigenvectors of A and G; the eigenvalues of all H."""
        values = []
        for i in range(len(self.layers)):
            (a, left), (g, right) = (torch.linalg.eigh(getattr(self, f"{name}{i}")) for name in ("inputs", "slopes"))
            own = torch.outer(g.clamp_min(0), a.clamp_min(0)) / self.samples
            self.eigen.put(**{f"inputs{i}": left, f"slopes{i}": right, f"values{i}": own})
            values.append(own.flatten())
        return torch.cat(values)

    def weights(self) -> Tensor:
        """θ̂ of the layers, `(P,)` float64."""
        return torch.cat(
            [p.detach().double().flatten() for layer in self.layers for p in layer.parameters(recurse=False)]
        )

    def outputs(self, x: Any, domain: str, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f `(B, K)`, C `(B, K, K)` and what the head alone is of C, float64."""
        looked = (self.look(part, domain) for part in self.parts(x))
        found = [(logits.detach(), *self.covariance(logits, seen, lam)) for logits, seen in looked]
        logits, covariances, of_head = (torch.cat(column) for column in zip(*found, strict=True))
        return logits, covariances, of_head

    def covariance(self, logits: Tensor, seen: list[tuple[Tensor, Tensor]], lam: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.eye(logits.shape[1]).to(logits)
        slopes = [self.slopes(logits, seen, row.expand_as(logits)) for row in one]
        by_layer = []
        for i, (a, _) in enumerate(seen):
            left, right, values = (getattr(self.eigen, f"{name}{i}") for name in ("inputs", "slopes", "values"))
            a = left.T @ a  # turned before places are summed: Jacobians are wider than their factors
            g = right.T @ torch.stack([of[i] for of in slopes])
            jacobians = torch.einsum("kbot,bit->bkoi", g, a) * (values + lam).rsqrt()
            jacobians = jacobians.flatten(2)
            by_layer.append(jacobians @ jacobians.mT)
        return torch.stack(by_layer).sum(0), by_layer[self.layers.index(self._looked_at[0].head)]

    def parts(self, x: Any) -> Sequence[Any]:
        """Of a batch, small enough for their Jacobians to be held at once."""
        network = self._looked_at[0]
        size = network.head.out_features * sum(width_of(layer) * len(layer.weight) for layer in self.layers)
        return x.split(max(1, NUMBERS // size)) if isinstance(x, Tensor) else [x]

    def look(self, x: Any, domain: str) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits, float64, and inputs `(B, D, T)` and outputs of each layer, in evaluation mode."""
        network, layers = self._looked_at[0], self.layers
        seen: dict[Any, tuple[Tensor, Tensor]] = {}

        def note(layer: Any, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            seen[layer] = places(layer, inputs[0].detach()), out
            return out.clone()  # what follows may change it in place

        hooks, mode = [layer.register_forward_hook(note) for layer in layers], network.training
        device = network.head.weight.device.type
        try:
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
                network.eval()
                logits = network(x.clone() if isinstance(x, Tensor) else x, domain).logits.double()
        finally:
            network.train(mode)
            for hook in hooks:
                hook.remove()
        if len(seen) < len(layers):
            lacking = next(layer for layer in layers if layer not in seen)
            raise TransferError(
                f"layers=all looks at what enters and leaves each layer, and {lacking} is not called: set method.layers=last."
            )
        return logits, [seen[layer] for layer in layers]

    def slopes(self, logits: Tensor, seen: list[tuple[Tensor, Tensor]], along: Tensor) -> list[Tensor]:
        """Of Σ f · `along` `(B, K)` in each layer's outputs, `(B, D, T)` float64."""
        with torch.inference_mode(False), torch.enable_grad():
            found = torch.autograd.grad(logits, [s for _, s in seen], along.clone(), retain_graph=True)
        return [by_place(layer, g).double() for layer, g in zip(self.layers, found, strict=True)]

    def root(self, logits: Tensor) -> Tensor:
        """S `(B, K, K)`."""
        network = self._looked_at[0]
        if network.kind == "regression":
            return torch.diag(torch.exp(-0.5 * network.log_noise.double())).detach().expand(len(logits), -1, -1)
        return curvature_root(logits.detach().softmax(1))


def curvature_root(probs: Tensor) -> Tensor:
    """S `(B, K, K)` with S Sᵀ = diag p - p pᵀ."""
    half = probs.sqrt()
    return torch.diag_embed(half) - probs[:, :, None] * half[:, None, :]


def is_factored(layer: Any) -> bool:
    if isinstance(layer, nn.Conv2d) and (
        layer.groups > 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    ):
        return False
    return isinstance(layer, nn.Linear | nn.Conv2d) and bool(layer.weight.requires_grad)


def width_of(layer: Any) -> int:
    """Of a layer's inputs at one place, with the one of its bias."""
    return layer.weight[0].numel() + (layer.bias is not None)


def places(layer: Any, x: Tensor) -> Tensor:
    """A layer's inputs `(B, D, T)`, float64."""
    if isinstance(layer, nn.Conv2d):
        x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    else:
        x = by_place(layer, x)
    return (x if layer.bias is None else torch.cat([x, torch.ones_like(x[:, :1])], 1)).double()


def by_place(layer: Any, x: Tensor) -> Tensor:
    """Outputs of a layer `(B, D, ...)`, or `(B, ..., D)` where it is linear, as `(B, D, T)`."""
    if isinstance(layer, nn.Conv2d):
        return x.flatten(2)
    return x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2)
