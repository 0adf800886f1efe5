"""Augmentation against torchvision's functions and closed forms: geometry, ranges, photometry, erasing, bending."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.data.augment import Augment
from transfer_cli.torchvision_compat import torchvision

reference: Any = pytest.importorskip(f"{torchvision.__name__}.transforms.v2.functional")

EVERYTHING: dict[str, Any] = {
    "rotate": 25.0, "translate": 0.2, "scale": (0.8, 1.3), "stretch": 0.2, "shear": 12.0, "flip": 0.5,
    "crop_area": (0.3, 1.0), "crop_ratio": 1.5, "elastic": 0.15, "brightness": 0.5, "contrast": 0.5, "saturation": 0.5,
    "noise": 0.3, "erase": 0.5,
}  # fmt: skip


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(n: int = 4, channels: int = 3, size: int = 32) -> Tensor:
    """Pictures without sharp edges, so that two interpolations of them agree; dark at the border."""
    coarse = torch.rand(n, channels, 4, 4, generator=draw(9))
    images = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True).clamp(0, 1)
    window = torch.sin(torch.linspace(0, math.pi, size))
    return images * window[:, None] * window


def fixed(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Every uniform number drawn is `share`: 1 takes each setting's upper end, 0 its lower, 0.5 its middle."""

    def rand(*size: Any, generator: torch.Generator) -> Tensor:
        return torch.full(size[0] if isinstance(size[0], tuple | torch.Size) else size, share)

    monkeypatch.setattr(torch, "rand", rand)


def affine(n: int = 4000, **settings: Any) -> Tensor:
    return Augment(**settings)._affine(n, draw())


# --- what changes nothing -------------------------------------------------------------------------


def test_identity_settings_change_nothing() -> None:
    images = torch.rand(3, 3, 8, 8, generator=draw())
    assert torch.equal(Augment()(images, draw()), images)
    assert not Augment().applies_to("source")
    torch.testing.assert_close(affine(1), torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]))
    whole = Augment(scale=(1.0, 1.0), crop_area=(1.0, 1.0))(images, draw())
    torch.testing.assert_close(whole, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("setting", [{"rotate": 1.0}, {"noise": 0.1}, {"crop_area": (0.5, 1.0)}, {"erase": 0.1}])
def test_domains_choose_whose_batches_are_augmented(setting: dict[str, Any]) -> None:
    for domains, wanted in (("both", (True, True)), ("source", (True, False)), ("target", (False, True))):
        augment = Augment(**setting, domains=domains)
        assert (augment.applies_to("source"), augment.applies_to("target")) == wanted


# --- geometry -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_rotation_is_torchvisions(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    images = smooth()
    fixed(monkeypatch, share)
    found = Augment(rotate=20.0)(images, draw())
    wanted = reference.rotate(
        images, 20.0 if share == 1.0 else -20.0, interpolation=reference.InterpolationMode.BILINEAR
    )
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0)


def test_translation_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    images = smooth()
    fixed(monkeypatch, 1.0)
    found = Augment(translate=0.25)(images, draw())  # reads from 8 pixels to the right and below
    wanted = reference.affine(images, angle=0.0, translate=[-8, -8], scale=1.0, shear=[0.0, 0.0])
    torch.testing.assert_close(found[..., :24, :24], wanted[..., :24, :24], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[..., :24, :24], images[..., 8:, 8:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_scaling_is_torchvisions(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    images = smooth()
    fixed(monkeypatch, share)
    found = Augment(scale=(0.8, 1.25))(images, draw())
    factor = 1.25 if share == 1.0 else 0.8  # of the object's size
    wanted = reference.affine(
        images, angle=0.0, translate=[0, 0], scale=factor, shear=[0.0, 0.0],
        interpolation=reference.InterpolationMode.BILINEAR,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0)
    assert float((found - images).abs().max()) > 0.1


def test_a_flip_mirrors_left_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(4, 1, 7, 7, generator=draw())
    torch.testing.assert_close(Augment(flip=1.0)(images, draw()), reference.horizontal_flip(images), atol=1e-5, rtol=0)
    few = Augment(flip=0.25)
    mirrored = few._affine(4000, draw())[:, 0, 0] < 0
    assert float(mirrored.float().mean()) == pytest.approx(0.25, abs=0.03)


def test_a_shear_slants(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(monkeypatch, 1.0)
    theta = Augment(shear=30.0)._affine(1, draw())[0]
    slope = math.tan(math.radians(30))
    torch.testing.assert_close(theta, torch.tensor([[1.0, slope, 0], [slope, 1, 0]]))


def test_a_crop_is_a_window_of_the_picture() -> None:
    theta = affine(crop_area=(0.3, 0.8), crop_ratio=1.5)
    width, height = theta[:, 0, 0], theta[:, 1, 1]
    assert torch.equal(theta[:, 0, 1], torch.zeros(4000)) and torch.equal(theta[:, 1, 0], torch.zeros(4000))
    shift = theta[:, :, 2].abs()
    assert bool((shift[:, 0] <= 1 - width + 1e-6).all() and (shift[:, 1] <= 1 - height + 1e-6).all()), "inside"
    inside = (width < 1) & (height < 1)
    area, ratio = (width * height)[inside], (width / height)[inside]
    assert float(area.min()) >= 0.3 - 1e-6 and float(area.max()) <= 0.8 + 1e-6
    assert float(area.min()) < 0.31 and float(area.max()) > 0.78
    assert 1 / 1.5 - 1e-5 <= float(ratio.min()) < 0.7 and 1.43 < float(ratio.max()) <= 1.5 + 1e-5
    corner = affine(crop_area=(0.25, 0.25))
    torch.testing.assert_close(corner[:, 0, 0], torch.full((4000,), 0.5))
    assert float(corner[:, 0, 2].min()) < -0.48 and float(corner[:, 0, 2].max()) > 0.48


def test_a_crop_shows_what_torchvisions_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    images = smooth()
    fixed(monkeypatch, 1.0)  # the lower right quarter
    found = Augment(crop_area=(0.25, 0.25))(images, draw())
    wanted = reference.resized_crop(images, top=16, left=16, height=16, width=16, size=[32, 32], antialias=False)
    torch.testing.assert_close(found[..., 2:-2, 2:-2], wanted[..., 2:-2, 2:-2], atol=0.02, rtol=0)


def test_stretching_changes_the_aspect_and_keeps_the_area() -> None:
    theta = affine(stretch=0.5)
    ratio = theta[:, 0, 0] / theta[:, 1, 1]
    torch.testing.assert_close(theta[:, 0, 0] * theta[:, 1, 1], torch.ones(4000))
    assert 1 / 1.5 - 1e-5 <= float(ratio.min()) < 0.68 and 1.47 < float(ratio.max()) <= 1.5 + 1e-5


def test_settings_stay_within_their_ranges_and_centre_on_no_change() -> None:
    theta = affine(rotate=15.0)
    angle = torch.rad2deg(torch.atan2(theta[:, 1, 0], theta[:, 0, 0]))
    assert -15.001 <= float(angle.min()) < -14.9 and 14.9 < float(angle.max()) <= 15.001
    assert abs(float(angle.mean())) < 0.5
    torch.testing.assert_close(torch.linalg.det(theta[:, :, :2]), torch.ones(4000))
    shift = affine(translate=0.1)[:, :, 2]  # from -1 to 1 is one side, so a tenth of it is 0.2
    assert -0.2 <= float(shift.min()) < -0.199 and 0.199 < float(shift.max()) <= 0.2
    assert float(torch.corrcoef(shift.T)[0, 1].abs()) < 0.05, "the axes are drawn apart"
    size = 1 / affine(scale=(0.5, 2.0))[:, 0, 0]
    assert 0.5 - 1e-5 <= float(size.min()) < 0.51 and 1.97 < float(size.max()) <= 2.0 + 1e-5
    assert float(size.log().mean()) == pytest.approx(0, abs=0.03), "as often smaller as larger"
    slant = affine(shear=10.0)[:, 0, 1]
    assert float(slant.abs().max()) <= math.tan(math.radians(10)) + 1e-6 and float(slant.abs().max()) > 0.17


def test_composition_is_rotation_after_shear_after_crop() -> None:
    settings: dict[str, Any] = {
        "rotate": 20.0,
        "shear": 10.0,
        "scale": (0.8, 1.2),
        "flip": 0.5,
        "crop_area": (0.5, 1.0),
    }
    theta = affine(50, **settings)
    # The same draws, in the order in which they are made.
    g = draw()
    angle, sx, sy, zoom = (torch.rand(50, generator=g) for _ in range(4))
    angle = torch.deg2rad(40 * angle - 20)
    sx, sy = (torch.tan(torch.deg2rad(20 * s - 10)) for s in (sx, sy))
    zoom = torch.exp(-(math.log(0.8) + (math.log(1.2) - math.log(0.8)) * zoom))
    torch.rand(50, generator=g), torch.rand(50, generator=g)  # shifts, here zero
    mirror = 1 - 2 * (torch.rand(50, generator=g) < 0.5).float()
    side = (0.5 + 0.5 * torch.rand(50, generator=g)).sqrt()
    zero, one = torch.zeros(50), torch.ones(50)

    def matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return torch.stack([torch.stack([a, b], 1), torch.stack([c, d], 1)], 1)

    rotation = matrix(angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    wanted = zoom[:, None, None] * rotation @ matrix(one, sx, sy, one) @ matrix(side * mirror, zero, zero, side)
    torch.testing.assert_close(theta[:, :, :2], wanted)


@pytest.mark.parametrize(("padding", "outside"), [("zeros", 0.0), ("border", 1.0), ("reflection", 1.0)])
def test_padding_is_what_lies_outside(padding: Any, outside: float, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(monkeypatch, 1.0)
    found = Augment(translate=0.5, padding=padding)(torch.ones(1, 1, 8, 8), draw())
    assert float(found[..., -3:, -3:].mean()) == pytest.approx(outside)
    assert float(found[..., :4, :4].mean()) == pytest.approx(1.0)


def test_bending_is_smooth_and_bounded() -> None:
    """A picture of its own coordinates shows where each pixel was read from."""
    size, elastic = 32, 0.1
    axis = (torch.arange(size) + 0.5) / size
    coordinates = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))[None].expand(64, -1, -1, -1)
    found = Augment(elastic=elastic)(coordinates, draw())
    moved = 2 * (found - coordinates)  # in half sides
    inner = moved[..., 8:-8, 8:-8]
    # bicubic interpolation may overshoot its knots: by a factor of 1.375 an axis at the most
    assert 0.6 * elastic < float(inner.abs().max()) < 1.375**2 * elastic
    assert float(inner.abs().median()) < 0.6 * elastic
    assert float((inner[..., 1:] - inner[..., :-1]).abs().max()) < 0.3 * elastic, "neighbours move together"
    assert float(inner.mean().abs()) < 0.1 * elastic
    assert float(inner.mean((2, 3)).std()) > 0.05 * elastic, "each picture in its own way"


# --- photometry -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.0])
@pytest.mark.parametrize(("name", "function"), [("brightness", "adjust_brightness")])
def test_brightness_is_torchvisions(name: str, function: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    images = smooth()
    fixed(monkeypatch, share)
    found = Augment(**{name: 0.4})(images, draw())
    torch.testing.assert_close(found, getattr(reference, function)(images, 1.4 if share == 1.0 else 0.6))


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_contrast_and_saturation_scale_about_their_means(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    images = 0.25 + 0.5 * torch.rand(4, 3, 6, 6, generator=draw())
    fixed(monkeypatch, share)
    factor = 1.4 if share == 1.0 else 0.6
    contrast = Augment(contrast=0.4)(images, draw())
    torch.testing.assert_close(contrast.mean((1, 2, 3)), images.mean((1, 2, 3)))
    torch.testing.assert_close(contrast.std((1, 2, 3)), factor * images.std((1, 2, 3)))
    saturation = Augment(saturation=0.4)(images, draw())
    torch.testing.assert_close(saturation.mean(1), images.mean(1))
    torch.testing.assert_close(saturation.std(1), factor * images.std(1))
    grey = images[:, :1]
    assert torch.equal(Augment(saturation=0.4)(grey, draw()), grey), "grey has none"


def test_factors_are_drawn_for_each_picture_within_their_range() -> None:
    images = torch.full((2000, 1, 1, 1), 0.5)
    factors = Augment(brightness=0.3)(images, draw()).flatten() / 0.5
    assert 0.7 <= float(factors.min()) < 0.71 and 1.29 < float(factors.max()) <= 1.3
    assert float(factors.mean()) == pytest.approx(1, abs=0.02)


def test_noise_has_the_stated_deviation() -> None:
    images = torch.full((20, 3, 32, 32), 0.5)
    noise = Augment(noise=0.05)(images, draw()) - images
    assert float(noise.std()) == pytest.approx(0.05, rel=0.02) and float(noise.mean()) == pytest.approx(0, abs=1e-3)
    np.testing.assert_allclose(np.corrcoef(noise[:, 0].flatten(), noise[:, 1].flatten())[0, 1], 0, atol=0.05)


def test_erasing_covers_one_rectangle_of_up_to_a_quarter() -> None:
    images = torch.ones(2000, 2, 20, 20)
    erased = Augment(erase=0.3)(images, draw()) == 0.5
    assert torch.equal(erased[:, 0], erased[:, 1])
    mask = erased[:, 0]
    touched = mask.any(2).any(1)
    assert float(touched.float().mean()) == pytest.approx(0.3, abs=0.04)
    rows, columns = mask.any(2), mask.any(1)
    assert torch.equal(mask, rows[:, :, None] & columns[:, None, :]), "rectangles"
    assert float(mask.flatten(1).float().mean(1).max()) <= 0.25
    assert int(rows.sum(1).max()) == 10, "half a side at the most"
    always = Augment(erase=1.0)(images, draw()) == 0.5
    assert float(always.flatten(1).any(1).float().mean()) > 0.98


# --- as a whole -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_values_stay_between_zero_and_one(channels: int) -> None:
    images = torch.rand(64, channels, 16, 16, generator=draw())
    found = Augment(**EVERYTHING)(images, draw(1))
    assert found.shape == images.shape and found.dtype == images.dtype
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("name", list(EVERYTHING))
def test_each_setting_does_something_of_its_own(name: str) -> None:
    images = smooth(8)
    with_it = {**EVERYTHING, "crop_area": (0.3, 1.0)} if name == "crop_ratio" else {name: EVERYTHING[name]}
    without = {**with_it, "crop_ratio": 1.0} if name == "crop_ratio" else {}
    assert not torch.equal(Augment(**with_it)(images, draw()), Augment(**without)(images, draw()))


def test_a_picture_is_changed_by_the_generator_alone() -> None:
    images = smooth(8)
    augment = Augment(**EVERYTHING)
    torch.manual_seed(0)
    first = augment(images, draw(3))
    torch.manual_seed(1)
    assert torch.equal(first, augment(images, draw(3)))
    assert not torch.equal(first, augment(images, draw(4)))
    assert not torch.equal(images, first)
    twins = images[:1].expand(8, -1, -1, -1)
    assert len({tuple(x.flatten()[:50].tolist()) for x in augment(twins, draw(3))}) == 8, "each picture by itself"
