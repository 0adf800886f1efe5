"""The one place that imports torchvision, so that it also works beside a torch it was not compiled for.

A torchvision wheel built for CUDA beside a CPU torch fails on import with `operator torchvision::nms does not
exist`. Models, data sets and transforms need none of its compiled operators, only two schemas.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch


def _define_missing_operators() -> torch.library.Library | None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return None
    for library in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return None
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        fragment.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return fragment


_fragment = _define_missing_operators()  # the definitions live as long as this object

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a mismatched build warns about its image extension, which is not used here
    import torchvision
    from torchvision import datasets, models

__all__ = ["datasets", "models", "torchvision"]
