"""ImageNet -> CIFAR-10 on tiny folders in the published layouts: weights from one run, a new head and fine-tuning in another."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Outcome
from PIL import Image

Transfer = Callable[..., Outcome]

COMMON = [
    "data_root=data", "threads=1", "device=cpu", "augment=crop_flip", "workers=0", "image.size=40", "trainer.batch_size=8",
    "trainer.eval_every=10", "trainer.checkpoint_every=10", "backbone=squeezenet1_1",
]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """`imagenet/{train,val}/<wnid>/*.JPEG` with three classes, and `cifar-10-batches-py` with the published ten."""
    draw = np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 4)):
        for c, wnid in enumerate(("n01440764", "n02102040", "n03000684")):
            folder = tmp_path / "data" / "imagenet" / split / wnid
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = draw.integers(0, 90, (40, 48, 3)) + 80 * c
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{wnid}_{i}.JPEG")
    batches = tmp_path / "data" / "cifar-10-batches-py"
    batches.mkdir()
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        labels = list(range(10)) * 2
        pixels = draw.integers(0, 60, (20, 3072)) + 19 * np.array(labels)[:, None]
        (batches / name).write_bytes(pickle.dumps({"data": pixels.astype(np.uint8), "labels": labels}))
    return tmp_path / "data"


def test_pretrain_then_new_head_then_finetune(transfer: Transfer, data: Path) -> None:
    source = transfer(
        "run",
        *COMMON,
        "source=imagenet",
        "target=imagenet",
        "method=source_only",
        "trainer.steps=15",
        "backbone.weights=none",
    )
    assert source.code == 0, source.err
    weights = source.run / "checkpoints" / "best.pt"

    new_head = [
        *COMMON,
        "source=none",
        "target=cifar10",
        "target_labels=all",
        f"backbone.weights={weights}",
        "trainer.steps=20",
    ]
    for method in (["method=linear_probe", "backbone.freeze=all"], ["method=lp_ft", "backbone.batchnorm=frozen"]):
        done = transfer("run", *new_head, *method)
        assert done.code == 0, done.err
        result = json.loads((done.run / "result.json").read_text())
        assert result["setting"]["source_free"] and len(result["classes"]) == 10
        assert result["metrics"]["target_test"]["accuracy"] > 0.15
        assert transfer("evaluate", str(done.run)).code == 0

    image = next((data / "imagenet" / "val").rglob("*.JPEG"))
    assert transfer("predict", str(done.run), str(image)).out.splitlines()[0] == "sample,class,probability"


def test_the_label_spaces_must_be_stated(transfer: Transfer, data: Path) -> None:
    pair = [*COMMON, "source=imagenet", "target=cifar10", "target_labels=2", "backbone.weights=none", "trainer.steps=4"]
    refused = transfer("run", *pair, "method=finetune")
    assert refused.code == 2 and "label_space=separate" in refused.err
    stated = transfer("run", *pair, "method=finetune", "label_space=separate")
    assert stated.code == 0, stated.err
    assert "10 target classes, head of its own" in stated.out
    unfit = transfer("run", *pair, "method=dann", "label_space=separate")
    assert unfit.code == 2 and "label_space=separate has none" in unfit.err


def test_weights_that_do_not_fit_are_reported(transfer: Transfer, data: Path) -> None:
    import torch

    torch.save({"features.0.weight": torch.zeros(3, 3), "surplus": torch.zeros(1)}, data / "bad.pt")
    refused = transfer(
        "run",
        *COMMON,
        "source=none",
        "target=cifar10",
        "target_labels=all",
        "method=finetune",
        "backbone.weights=data/bad.pt",
    )
    assert refused.code == 2
    assert (
        "missing (" in refused.err
        and "not in the network (surplus)" in refused.err
        and "of another shape" in refused.err
    )
