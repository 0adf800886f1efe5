"""Features without weights: gradient histograms against the paper's sums written as loops, and the scattering transform
against direct convolutions; what each is invariant to, and what is refused."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from transfer_cli.backbones.base import Backbone
from transfer_cli.backbones.hog import HOG, _strongest_gradient
from transfer_cli.backbones.scattering import Scattering
from transfer_cli.data.inputs import InputSpec
from transfer_cli.errors import TransferError

Array = NDArray[np.float64]


def image(height: int, width: int | None = None, channels: int = 1) -> InputSpec:
    return InputSpec("image", (channels, height, width or height))


def pictures(spec: InputSpec, n: int = 3) -> Tensor:
    return torch.rand(n, *spec.shape, generator=torch.Generator().manual_seed(0))


def blob(side: int, shift: int = 0) -> Tensor:
    """A few bright spots in the middle of a dark image, `shift` pixels to the right."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    spots = ((0.0, 0.0, 1.0), (-3.0, 2.0, 0.7), (2.0, 3.0, 0.8))
    middle = side / 2
    found = sum(h * torch.exp(-((y - middle - a) ** 2 + (x - middle - shift - b) ** 2) / 3) for a, b, h in spots)
    assert isinstance(found, Tensor)
    return found[None, None]


# --- gradient histograms --------------------------------------------------------------------------


def hog_loops(x: Array, *, orientations: int, cell: int, block: int, signed: bool, interpolation: str) -> list[float]:
    """One image `(C, H, W)`, a pixel at a time."""
    channels, height, width = x.shape
    cells_y, cells_x = height // cell, width // cell
    top, left = (height - cells_y * cell) // 2, (width - cells_x * cell) // 2
    turn = 360.0 if signed else 180.0
    histograms = np.zeros((cells_y, cells_x, orientations))
    for i in range(height):
        for j in range(width):
            gradients = [
                (
                    x[c, min(i + 1, height - 1), j] - x[c, max(i - 1, 0), j],
                    x[c, i, min(j + 1, width - 1)] - x[c, i, max(j - 1, 0)],
                )
                for c in range(channels)
            ]
            dy, dx = max(gradients, key=lambda g: math.hypot(*g))
            magnitude, angle = math.hypot(dy, dx), math.degrees(math.atan2(dy, dx)) % turn
            for k in range(orientations):
                away = abs(angle - (k + 0.5) * turn / orientations)
                away = min(away, turn - away) * orientations / turn  # from the bin's centre, in bins
                vote = float(away < 0.5) if interpolation == "none" else max(0.0, 1 - away)
                for a in range(cells_y):
                    for b in range(cells_x):
                        down = abs(i - top - a * cell - (cell - 1) / 2) / cell  # from the cell's centre, in cells
                        right = abs(j - left - b * cell - (cell - 1) / 2) / cell
                        if interpolation == "full":
                            share = max(0.0, 1 - down) * max(0.0, 1 - right)
                        else:
                            share = float(down < 0.5 and right < 0.5)
                        histograms[a, b, k] += magnitude * vote * share / cell**2
    features: list[float] = []
    for a in range(cells_y - block + 1):
        for b in range(cells_x - block + 1):
            v = histograms[a : a + block, b : b + block].ravel()
            v = np.minimum(v / math.sqrt(v @ v + 1e-10), 0.2)
            features += (v / math.sqrt(v @ v + 1e-10)).tolist()
    return features


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (image(12), {}),
        (image(12), {"interpolation": "none"}),
        (image(12), {"interpolation": "orientation", "orientations": 6}),
        (image(10, 15, 3), {}),  # sides that the cell does not divide, in colour
        (image(9, 13, 3), {"interpolation": "none", "cell": 3, "block": 1, "signed": True}),
        (image(13, 9, 2), {"cell": 2, "block": 3, "signed": True, "orientations": 5}),
    ],
)
def test_hog_is_what_the_paper_sums(spec: InputSpec, options: dict[str, Any]) -> None:
    backbone, x = HOG(spec, **options), pictures(spec, 2)
    found = backbone(x)
    known: dict[str, Any] = {
        "orientations": 9,
        "cell": 4,
        "block": 2,
        "signed": False,
        "interpolation": "full",
    } | options
    wanted = torch.tensor([hog_loops(one.double().numpy(), **known) for one in x], dtype=torch.float64)
    assert found.shape == (2, backbone.out_features) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)


SKIMAGE = [
    0.25516, 0.25516, 0.00000, 0.25516, 0.25516, 0.00000, 0.00000, 0.25516, 0.16630,
    0.25516, 0.15348, 0.25516, 0.00000, 0.17478, 0.00000, 0.13309, 0.00000, 0.06855,
    0.17478, 0.11487, 0.15211, 0.00000, 0.24311, 0.14562, 0.09741, 0.00000, 0.12395,
    0.25516, 0.25367, 0.17217, 0.11107, 0.25516, 0.00000, 0.12426, 0.12683, 0.00000,
]  # fmt: skip


def test_hog_equals_scikit_images() -> None:
    """Figures of skimage.feature.hog 0.26 (its votes are `none`, its border has no gradient, so the border is repeated)."""
    i, j = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    x = nn.functional.pad(((3 * i * i + 5 * j + i * j) % 17)[None, None] / 16.0, (1, 1, 1, 1), mode="replicate")
    found = HOG(image(8), interpolation="none")(x)
    torch.testing.assert_close(found[0], torch.tensor(SKIMAGE), atol=1e-5, rtol=0)


def test_hog_finds_the_direction_of_a_ramp() -> None:
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    for angle, bins in ((50, {2: 1.0}), (55, {2: 0.75, 3: 0.25}), (0, {0: 0.5, 8: 0.5}), (230, {2: 1.0})):
        ramp = (x * math.cos(math.radians(angle)) + y * math.sin(math.radians(angle)))[None, None] / 40
        middle = HOG(image(16), block=1)._votes(*gradient_inside(ramp)).mean((0, 2, 3))
        wanted = torch.tensor([bins.get(k, 0.0) for k in range(9)])
        torch.testing.assert_close(middle / middle.sum(), wanted, atol=1e-4, rtol=0)


def gradient_inside(x: Tensor) -> tuple[Tensor, Tensor]:
    magnitude, angle = _strongest_gradient(x)
    return magnitude[..., 1:-1, 1:-1], angle[..., 1:-1, 1:-1]


def test_signed_hog_tells_light_on_dark_from_dark_on_light() -> None:
    x = pictures(image(16))
    unsigned, signed = HOG(image(16)), HOG(image(16), signed=True)
    torch.testing.assert_close(unsigned(1 - x), unsigned(x), atol=1e-4, rtol=0)
    assert (signed(1 - x) - signed(x)).abs().max() > 0.1
    even = HOG(image(16), signed=True, orientations=18)
    opposite = even(x).view(3, -1, 18).roll(9, -1).flatten(1)
    torch.testing.assert_close(even(1 - x), opposite, atol=1e-4, rtol=0)


def test_hog_of_nothing_is_zero_and_contrast_does_not_matter() -> None:
    backbone, x = HOG(image(20, channels=3)), pictures(image(20, channels=3))
    assert torch.equal(backbone(torch.full_like(x, 0.3)), torch.zeros(3, backbone.out_features))
    torch.testing.assert_close(backbone(0.2 * x + 0.4), backbone(x), atol=1e-4, rtol=0)
    assert backbone(x).max() < 1 and backbone(x).min() >= 0
    norms = backbone(x).view(3, -1, 36).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("signed", "bins"), [(False, 4), (True, 2)])
@pytest.mark.parametrize("interpolation", ["orientation", "full"])
def test_a_quarter_turn_permutes_cells_and_orientations(signed: bool, bins: int, interpolation: Any) -> None:
    """The quarter turn is `bins` of the 8 orientations; histograms turn with the image."""
    spec = image(16)
    backbone, x = HOG(spec, orientations=8, signed=signed, interpolation=interpolation), pictures(spec)
    turned = backbone(torch.rot90(x, 1, (2, 3))).view(3, 3, 3, 2, 2, 8)
    wanted = backbone(x).view(3, 3, 3, 2, 2, 8)
    wanted = torch.rot90(torch.rot90(wanted, 1, (1, 2)), 1, (3, 4)).roll(-bins, -1)
    torch.testing.assert_close(turned, wanted, atol=1e-4, rtol=0)


def test_hog_takes_the_channel_with_the_largest_gradient() -> None:
    spec, grey = image(16, channels=3), image(16)
    x = pictures(grey)
    loud = torch.cat([0.1 * x.flip(3), x, torch.full_like(x, 0.7)], 1)
    steep = HOG(spec)(loud)
    other = HOG(grey)(0.1 * x.flip(3))
    assert (steep - HOG(grey)(x)).abs().max() < (steep - other).abs().max()
    torch.testing.assert_close(HOG(spec)(x.expand(-1, 3, -1, -1)), HOG(grey)(x))
    torch.testing.assert_close(HOG(spec)(torch.cat([torch.zeros_like(x), x, torch.ones_like(x)], 1)), HOG(grey)(x))


@pytest.mark.parametrize(
    ("side", "options", "message"),
    [
        (7, {}, "needs images of 8 pixels or more (cell x block), not 7 x 7: set image.size=8 or larger"),
        (28, {"cell": 10, "block": 3}, "needs images of 30 pixels or more (cell x block), not 28 x 28"),
        (28, {"cell": 0}, "backbone.cell must be 1 or more, not 0"),
        (28, {"block": -1}, "backbone.block must be 1 or more, not -1"),
        (28, {"orientations": 1}, "backbone.orientations must be 2 or more, not 1"),
    ],
)
def test_hog_says_what_does_not_fit(side: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TransferError) as caught:
        HOG(image(side), **options)
    assert message in str(caught.value)


# --- scattering -----------------------------------------------------------------------------------


@pytest.fixture
def kymatio() -> None:
    pytest.importorskip("kymatio", reason="the extra transfer-cli[scattering] is not installed")


def gabor(side: int, sigma: float, theta: float, xi: float, slant: float) -> NDArray[np.complex128]:
    """A Gaussian with a wave in it, `(side, side)`, summed over its periodic copies."""
    at = np.arange(-3 * side, 4 * side)
    y, x = np.meshgrid(at, at, indexing="ij")
    along = y * math.cos(theta) + x * math.sin(theta)
    across = x * math.cos(theta) - y * math.sin(theta)
    wave = np.exp(-(along**2 + slant**2 * across**2) / (2 * sigma**2) + 1j * xi * along) * slant
    return wave.reshape(7, side, 7, side).sum((0, 2)) / (2 * math.pi * sigma**2)


def morlet(side: int, j: int, theta: float, angles: int) -> NDArray[np.complex128]:
    shape = (0.8 * 2**j, theta)
    wave, envelope = gabor(side, *shape, 0.75 * math.pi / 2**j, 4 / angles), gabor(side, *shape, 0.0, 4 / angles)
    return wave - wave.sum() / envelope.sum() * envelope


def convolve(x: Array, h: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """Periodic convolution as its definition, `Σ_v x(v) h(u - v)`."""
    side = len(x)
    back = (np.arange(side)[:, None] - np.arange(side)) % side
    return np.einsum("vw,uvzw->uz", x, h[back[:, :, None, None], back])


def scattering_by_convolution(x: Array, scales: int, angles: int) -> dict[tuple[int, ...], Array]:
    """Paths (j₁, l₁, j₂, l₂) of one image of 8 x 8 pixels."""
    step = 2**scales
    padded = np.pad(x, step, mode="reflect")
    side = len(padded)
    low = gabor(side, 0.8 * 2 ** (scales - 1), 0.0, 0.0, 1.0)
    thetas = [(angles / 2 - 1 - k) * math.pi / angles for k in range(angles)]
    filters = {(j, k): morlet(side, j, thetas[k], angles) for j in range(scales) for k in range(angles)}

    def smooth(u: Array) -> Array:
        return convolve(u, low).real[step:-step:step, step:-step:step]

    found: dict[tuple[int, ...], Array] = {(): smooth(padded)}
    first = {key: np.abs(convolve(padded, h)) for key, h in filters.items()}
    found |= {key: smooth(u) for key, u in first.items()}
    for one, u in first.items():
        found |= {(*one, *two): smooth(np.abs(convolve(u, h))) for two, h in filters.items() if two[0] > one[0]}
    return found


def test_scattering_is_convolution_modulus_convolution(kymatio: None) -> None:
    """Up to the aliasing of maps that are kept at half the resolution, after the coarser wavelet."""
    scales, angles, x = 2, 4, pictures(image(8), 1)
    backbone = Scattering(image(8), J=scales, L=angles)
    paths = scattering_by_convolution(x[0, 0].double().numpy(), scales, angles)
    found = backbone(x).view(len(paths), 2, 2).double().numpy()
    assert len(paths) == 1 + scales * angles + angles**2
    for (path, wanted), values in zip(paths.items(), found, strict=True):
        exact = path == () or (len(path) == 2 and path[0] == 0)
        assert np.abs(values - wanted).max() < (1e-4 if exact else 0.05) * np.abs(wanted).max(), path


@pytest.mark.parametrize(
    ("spec", "options", "width"),
    [
        (image(28), {}, 81 * 7 * 7),
        (image(28), {"J": 3}, 217 * 3 * 3),
        (image(16), {"J": 4, "L": 4}, 1 + 16 + 16 * 6),
        (image(9, 14, 3), {"J": 1, "L": 6}, 3 * 7 * 4 * 7),
        (image(16, 16, 3), {"max_order": 1, "pool": "mean"}, 3 * 17),
        (image(16), {"pool": "mean"}, 81),
    ],
)
def test_scattering_has_the_width_that_is_told(
    kymatio: None, spec: InputSpec, options: dict[str, Any], width: int
) -> None:
    backbone = Scattering(spec, **options)
    assert backbone.out_features == width and backbone(pictures(spec)).shape == (3, width)


def test_a_constant_image_scatters_into_its_mean_alone(kymatio: None) -> None:
    found = Scattering(image(16))(torch.full((2, 1, 16, 16), 0.7)).view(2, 81, 4, 4)
    torch.testing.assert_close(found[:, 0], torch.full((2, 4, 4), 0.7), atol=1e-3, rtol=0)
    assert found[:, 1:].abs().max() < 1e-5


def test_scattering_does_not_expand_distances(kymatio: None) -> None:
    """‖Sx - Sy‖ ≤ ‖x - y‖, each sample of the maps standing for 2^J x 2^J pixels; and energy decays with the order."""
    side, x = 32, pictures(image(32), 6)
    window = torch.hann_window(side, periodic=False)
    x = x * window[:, None] * window
    backbone = Scattering(image(side))
    found = 4 * backbone(x).view(6, 81, 8, 8)
    for a in range(5):
        assert (found[a] - found[a + 1]).norm() <= (x[a] - x[a + 1]).norm()
    energy = [found[:, part].square().sum() for part in (slice(0, 1), slice(1, 17), slice(17, 81))]
    assert energy[0] > energy[1] > energy[2] > 0 and sum(energy) <= x.square().sum()


def test_small_shifts_hardly_move_scattering_the_less_the_wider_its_window(kymatio: None) -> None:
    side = 32
    x, shifted = blob(side), blob(side, 1)
    moved = []
    for scales in (1, 2, 3):
        before, after = (Scattering(image(side), J=scales)(v) for v in (x, shifted))
        moved.append(float((after - before).norm() / before.norm()))
    pixels = float((shifted - x).norm() / x.norm())
    assert pixels > moved[0] > moved[1] > moved[2] and moved[2] < pixels / 3


def test_wavelets_are_told_apart_by_angle(kymatio: None) -> None:
    """Stripes excite the wavelets across them; a quarter turn of the stripes is half of the angles further."""
    x = torch.arange(32.0)
    stripes = (0.5 + 0.5 * torch.cos(0.75 * math.pi * x)).expand(1, 1, 32, 32)
    backbone = Scattering(image(32), pool="mean")
    across, down = (backbone(v)[0, 1:9] for v in (stripes, stripes.transpose(2, 3)))
    assert (int(across.argmax()) - int(down.argmax())) % 8 == 4
    assert across.max() > 5 * across.sort().values[4]


def test_mean_pooling_averages_the_maps(kymatio: None) -> None:
    spec = image(16, channels=2)
    x = pictures(spec)
    maps = Scattering(spec)(x).view(3, 2, 81, 16)
    torch.testing.assert_close(Scattering(spec, pool="mean")(x), maps.mean(-1).flatten(1))
    first = Scattering(spec, max_order=1)(x).view(3, 2, 17, 16)
    assert torch.equal(first, maps[:, :, :17])


@pytest.mark.parametrize(
    ("side", "options", "message"),
    [
        (7, {"J": 3}, "needs images of 8 pixels or more (2^J), not 7 x 7: set image.size=8 or larger"),
        (28, {"J": 0}, "backbone.J must be 1 or more, not 0"),
        (28, {"L": 0}, "backbone.L must be 1 or more, not 0"),
    ],
)
def test_scattering_says_what_does_not_fit(side: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TransferError) as caught:
        Scattering(image(side), **options)
    assert message in str(caught.value)


def test_scattering_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kymatio", None)
    with pytest.raises(TransferError, match=r"needs kymatio: pip install 'transfer-cli\[scattering\]'"):
        Scattering(image(28))


# --- both -----------------------------------------------------------------------------------------


@pytest.fixture(params=[HOG, Scattering])
def build(request: pytest.FixtureRequest) -> Callable[[InputSpec], Backbone]:
    if request.param is Scattering:
        request.getfixturevalue("kymatio")
    kind: Callable[[InputSpec], Backbone] = request.param
    return kind


def test_nothing_is_learnt_or_kept(build: Callable[[InputSpec], Backbone]) -> None:
    backbone = build(image(16))
    assert not list(backbone.parameters()) and not backbone.state_dict()


def test_features_are_float32_and_the_same_in_every_batch_layout_and_precision(
    build: Callable[[InputSpec], Backbone],
) -> None:
    spec = image(16, channels=3)
    backbone, x = build(spec), pictures(spec, 5)
    wanted = backbone(x)
    assert torch.equal(wanted, backbone(x)) and wanted.dtype == torch.float32
    torch.testing.assert_close(torch.cat([backbone(one) for one in x.split(2)]), wanted, atol=1e-6, rtol=0)
    assert torch.equal(backbone(x.contiguous(memory_format=torch.channels_last)), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(backbone(x), wanted)
    assert backbone(x.bfloat16()).dtype == torch.float32


def test_other_inputs_than_images_are_refused(build: Callable[[InputSpec], Backbone]) -> None:
    with pytest.raises(TransferError, match="takes image inputs, not vector"):
        build(InputSpec("vector", (10,)))


def test_a_linear_probe_on_few_labels_gains_from_hog(transfer: Any) -> None:
    few = ("source=none", "target=digits", "method=linear_probe", "target_labels=10", "threads=1", "device=cpu")

    def accuracy(backbone: str) -> float:
        outcome = transfer("run", f"backbone={backbone}", *few)
        assert outcome.code == 0, outcome.err
        result = json.loads((outcome.run / "result.json").read_text())
        return float(result["metrics"]["target_test"]["accuracy"])

    assert accuracy("hog") > accuracy("identity") + 0.02
