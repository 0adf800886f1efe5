"""Wavelet scattering (Mallat, CPAM 2012; Bruna & Mallat, TPAMI 35(8), 2013), computed by Kymatio (Andreux et al., JMLR 2020).

    S₀ x = x * φ_J        S₁ x = |x * ψ_λ| * φ_J        S₂ x = ||x * ψ_λ| * ψ_μ| * φ_J,  μ coarser than λ

Morlet wavelets ψ_λ, λ = (scale 2^j, angle πl/L), j < J, l < L; φ_J is a Gaussian as wide as 2^J pixels. All are subsampled by 2^J.
"""

from __future__ import annotations

import importlib
from typing import ClassVar, Literal

from torch import Tensor

from transfer_cli.backbones.base import Backbone
from transfer_cli.data.inputs import InputSpec
from transfer_cli.errors import TransferError


class Scattering(Backbone):
    """Images `(B, C, H, W)` of any size to `(B, C · paths · ⌊H/2^J⌋ · ⌊W/2^J⌋)`, or `(B, C · paths)` with `pool: mean`;
    nothing in it is learnt. There are `1 + JL` paths to order 1, and `L² J(J - 1)/2` more of order 2.

    Args:
        J: scales; features hardly change while an image moves by much less than 2^J pixels.
        L: angles of half a turn.
        max_order: wavelet transforms in a row.
        pool: `flatten` keeps the maps, `mean` averages them over the image.

    Raises:
        TransferError: Kymatio is not installed, or an image is smaller than 2^J pixels.
    """

    minimum_size: ClassVar[int] = 16  # with J=2, the best cross-validated choice on the labels of 8 x 8 digits

    def __init__(
        self,
        spec: InputSpec,
        *,
        J: int = 2,
        L: int = 8,
        max_order: Literal[1, 2] = 2,
        pool: Literal["flatten", "mean"] = "flatten",
    ) -> None:
        super().__init__(spec)
        for key, value in (("J", J), ("L", L)):
            if value < 1:
                raise TransferError(f"backbone.{key} must be 1 or more, not {value}.")
        channels, height, width = spec.shape
        if min(height, width) < 2**J:
            raise TransferError(
                f"backbone scattering needs images of {2**J} pixels or more (2^J), not {height} x {width}: set "
                f"image.size={2**J} or larger, or a smaller backbone.J."
            )
        try:
            kymatio = importlib.import_module("kymatio")
        except ModuleNotFoundError as error:
            raise TransferError("backbone scattering needs kymatio: pip install 'transfer-cli[scattering]'.") from error
        self.transform = kymatio.Scattering2D(J, (height, width), L=L, max_order=max_order, frontend="torch")
        for name, wavelet in list(self.transform.named_buffers()):  # computed anew, never kept in a checkpoint
            self.transform.register_buffer(name, wavelet, persistent=False)
        self.pool = pool
        paths = 1 + J * L + (L * L * J * (J - 1) // 2 if max_order == 2 else 0)
        places = (height // 2**J) * (width // 2**J) if pool == "flatten" else 1
        self.out_features = channels * paths * places

    def forward(self, x: Tensor) -> Tensor:
        maps = self.transform(x.float().contiguous())  # (B, C, paths, H / 2^J, W / 2^J); autocast leaves FFTs alone
        return maps.flatten(1) if self.pool == "flatten" else maps.mean((-2, -1)).flatten(1)
