"""The source's posterior as a file: the same result as with the source, and a refusal of what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome
from safetensors import safe_open
from safetensors.torch import save_file

from tests.feature_tasks import context
from tests.test_bayes import draws, stretched
from transfer_cli.errors import TransferError
from transfer_cli.methods.base import FeatureOptions
from transfer_cli.methods.bayes.artefact import FILE, FORMAT, SourcePosterior
from transfer_cli.methods.bayes.bayes_head import BayesHead
from transfer_cli.methods.bayes.niw_lda import NIWLDA
from transfer_cli.methods.bayes.source_head import diagonal_curvature, source_curvature, source_optimum, whitened
from transfer_cli.methods.bayes.source_posterior import SourcePosteriorHead, root
from transfer_cli.methods.bayes.summary import Summary
from transfer_cli.methods.math.softmax import Precision
from transfer_cli.methods.phases import Features, FeatureTask

Transfer = Callable[..., Outcome]
SMALLEST = [
    "experiment=smoke", "threads=1", "device=cpu", "subset.source=200", "subset.test=60",
    "backbone.widths=[4,8]", "backbone.features=16", "image.size=16",
]  # fmt: skip
NAMES = ("a", "b", "c", "d")


def left(source: Features, path: Path, width: int = 12, **changes: Any) -> SourcePosterior:
    method = SourcePosteriorHead(context(width, 4, class_names=NAMES, fingerprint=lambda: "f"), **changes)
    method.fit(FeatureTask(source, None, None))
    (path / FILE).write_bytes(method.artefacts()[FILE])
    return SourcePosterior.read(str(path / FILE))


# --- the same result ------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["isotropic", "l2sp", "ewc", "source"])
@pytest.mark.parametrize("covariance", ["boehning", "laplace"])
def test_a_head_is_the_same_without_its_source(prior: Any, covariance: Any, tmp_path: Path) -> None:
    source, few, test = stretched(3)
    known = left(source, tmp_path)
    setting = {"num_classes": 4, "has_target_labels": True, "class_names": NAMES}
    whole = BayesHead(context(12, 4, **setting), prior=prior, covariance=covariance)
    told = whole.fit(FeatureTask(source, None, few))
    alone = BayesHead(context(12, 4, has_source=False, prior=known, **setting), prior=prior, covariance=covariance)
    assert alone.fit(FeatureTask(None, None, few)) == pytest.approx(told, rel=1e-6)
    torch.testing.assert_close(alone.predict(test.x).probs, whole.predict(test.x).probs, atol=1e-7, rtol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_discriminant_analysis_is_the_same_without_its_source(shared: bool, tmp_path: Path) -> None:
    source, few, test = stretched(3, new=not shared)
    setting = {"num_classes": 4, "source_classes": 4, "has_target_labels": True, "source_labels_fit_head": shared}
    whole = NIWLDA(context(12, 4, **setting))
    told = whole.fit(FeatureTask(source, None, few))
    alone = NIWLDA(context(12, 4, has_source=False, prior=left(source, tmp_path), class_names=NAMES, **setting))
    assert alone.fit(FeatureTask(None, None, few)) == pytest.approx(told, rel=1e-6)
    torch.testing.assert_close(alone.predict(test.x).probs, whole.predict(test.x).probs, atol=1e-6, rtol=0)


def test_classes_in_another_order_are_put_in_the_head_s(tmp_path: Path) -> None:
    source, few, test = stretched(3)
    known, turn = left(source, tmp_path), torch.tensor([2, 0, 3, 1])
    setting: dict[str, Any] = {"num_classes": 4, "source_classes": 4, "has_target_labels": True, "has_source": False}
    names = tuple(NAMES[i] for i in turn)
    back = torch.argsort(turn)
    for kind, changes in ((NIWLDA, {}), (BayesHead, {"prior": "source", "covariance": "laplace"})):
        plain = kind(context(12, 4, prior=known, class_names=NAMES, **setting), **changes)
        plain.fit(FeatureTask(None, None, few))
        other = kind(context(12, 4, prior=known, class_names=names, **setting), **changes)
        other.fit(FeatureTask(None, None, Features(few.x, back[few.y])))
        torch.testing.assert_close(
            other.predict(test.x).probs[:, back], plain.predict(test.x).probs, atol=2e-2, rtol=0
        )  # the draws are those of another order
        assert (other.predict(test.x).labels == back[plain.predict(test.x).labels]).double().mean() > 0.99


def test_runs_with_the_file_and_with_the_source_agree(transfer: Transfer) -> None:
    common = [*SMALLEST, "backbone.features=8"]
    made = transfer("run", *common, "method=source_posterior")
    assert made.code == 0, made.err
    assert (made.run / FILE).is_file()
    few = [*common, "target_labels=5", "method=bayes_head", "method.prior=source"]
    whole = transfer("run", *few)
    assert whole.code == 0, whole.err
    alone = transfer("run", *few, "source=none", f"prior={made.run}")
    assert alone.code == 0, alone.err
    found = [np.load(o.run / "predictions.npz")["target_test_probs"] for o in (whole, alone)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert whole.run != alone.run
    again = transfer("run", *few, "source=none", f"prior={made.run / FILE}")
    assert "finished before" in again.out and again.run == alone.run  # the file enters by content
    (made.run / FILE).unlink()
    evaluated = transfer("evaluate", str(alone.run))
    assert evaluated.code == 0 and "result.json agrees" in evaluated.out, evaluated.err
    gone = transfer("run", *few, "source=none", f"prior={made.run / FILE}")
    assert gone.code == 2 and "there is no file" in gone.err


# --- what the file holds --------------------------------------------------------------------------


def test_factor_and_diagonal_are_the_hessian_s(tmp_path: Path) -> None:
    """Against automatic differentiation of the source's loss."""
    source, _, _ = stretched(3)
    tensors = left(source, tmp_path).tensors
    summary = Summary.of(source.x, source.y, 4)
    z = whitened(source.x, summary.centre, tensors["whitening"])
    w = source_optimum(z, source.y, 4, 1e-3)
    torch.testing.assert_close(tensors["mean"], w, atol=0, rtol=0)

    def loss(flat: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(z @ flat.view(4, 13).T, source.y, reduction="sum")

    hessian = torch.func.hessian(loss)(w.flatten())
    torch.testing.assert_close(tensors["factor"] @ tensors["factor"].T, hessian, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(tensors["diagonal"].flatten(), hessian.diagonal(), atol=1e-8, rtol=1e-8)


def test_a_low_rank_keeps_the_largest_directions(tmp_path: Path) -> None:
    source, _, _ = stretched(3)
    whole, few = (left(source, tmp_path, rank=rank).tensors["factor"] for rank in (None, 5))
    values = torch.linalg.eigvalsh(whole @ whole.T)
    assert few.shape == (52, 5)
    torch.testing.assert_close(torch.linalg.eigvalsh(few @ few.T)[-5:], values[-5:])


def test_wide_heads_keep_a_kronecker_factor(tmp_path: Path) -> None:
    """Beyond a thousand unknowns; with the source present the same bound is the prior."""
    z, w = draws(300, 260), 0.05 * draws(4, 260, seed=3)
    whole = source_curvature(z, w)
    assert whole.kron is not None
    factor = root(whole, None)
    torch.testing.assert_close(factor @ factor.T, z.T @ z)
    assert diagonal_curvature(z, w).shape == w.shape
    assert root(Precision(w, kron=(whole.kron[0], z.T @ z)), 7).shape == (260, 7)


def test_the_temperature_mends_a_head_that_is_too_sure_or_too_modest(tmp_path: Path) -> None:
    source, _, _ = stretched(3)
    tensors = left(source, tmp_path).tensors
    few = Features(source.x[:40], source.y[:40])
    other = left(few, tmp_path).tensors
    assert float(tensors["temperature"]) >= 0 and float(other["temperature"]) >= 0
    method = SourcePosteriorHead(context(12, 4, class_names=NAMES, fingerprint=lambda: "f"))
    told = method.fit(FeatureTask(source, None, None))
    assert told["left_out_nll"] < 1.0 and float(method.head.fitted.temperature) == told["temperature"]


# --- what does not fit ----------------------------------------------------------------------------


def test_equal_posteriors_are_equal_bytes_and_a_flipped_bit_is_found(tmp_path: Path) -> None:
    source, _, _ = stretched(3)
    known = left(source, tmp_path)
    data = (tmp_path / FILE).read_bytes()
    assert known.to_bytes() == data
    for broken in (data[:-9], data[:-100] + bytes([data[-100] ^ 1]) + data[-99:], b"", b"no tensors at all"):
        (tmp_path / FILE).write_bytes(broken)
        with pytest.raises(TransferError, match="damaged"):
            SourcePosterior.read(str(tmp_path / FILE))


def test_files_of_others_and_of_later_versions_are_refused(tmp_path: Path) -> None:
    source, _, _ = stretched(3)
    left(source, tmp_path)
    path = str(tmp_path / FILE)
    with safe_open(path, "pt") as file:
        whole, tensors = json.loads(file.metadata()[FORMAT]), {k: file.get_tensor(k) for k in list(file.keys())}
    for change, message in (
        ({"version": 2}, "update transfer-cli"),
        ({"format": "other"}, "no source's posterior"),
        ({"about": whole["about"].replace("head", "tail")}, "digest"),
    ):
        save_file(tensors, path, {FORMAT: json.dumps({**whole, **change})})
        with pytest.raises(TransferError, match=message):
            SourcePosterior.read(path)
    save_file(tensors, path)
    with pytest.raises(TransferError, match="no source's posterior"):
        SourcePosterior.read(path)
    with pytest.raises(TransferError, match="there is no file"):
        SourcePosterior.read(str(tmp_path / "none"))
    strange = SourcePosterior("tail", NAMES, "f", {}, tensors)
    (tmp_path / FILE).write_bytes(strange.to_bytes())
    with pytest.raises(TransferError, match="kind 'tail'"):
        SourcePosterior.read(path)
    (tmp_path / FILE).write_bytes(replace(strange, kind="head", tensors={"mean": tensors["mean"]}).to_bytes())
    with pytest.raises(TransferError, match="lacks counts"):
        SourcePosterior.read(path)


def test_what_does_not_fit_a_run_is_refused_in_a_line(transfer: Transfer) -> None:
    common = SMALLEST
    made = transfer("run", *common, "method=source_posterior")
    assert made.code == 0, made.err
    taken = ["source=none", *common, f"prior={made.run}", "target_labels=3"]
    for overrides, message in (
        (["method=niw_lda", "backbone.features=4"], "of 16 features"),
        (
            ["method=niw_lda", "seed=1"],
            "another backbone, other weights or another input",
        ),
        (["method=niw_lda", "features.normalise=[l2]"], "features.normalise=[]"),
        (["method=finetune"], "method finetune takes none"),
        (["method=niw_lda", "source=synth_digits"], "set source=none"),
        (["method=niw_lda", "subset.target_classes=['1','2','3']"], "label_space=separate"),
        (["method=niw_lda", "label_space=partial"], "closed or separate"),
        (["method=bayes_head", "method.prior=ewc", "method.whiten=false"], "method.whiten=True"),
    ):
        outcome = transfer("run", *taken, *overrides)
        assert outcome.code == 2 and message in outcome.err, outcome.err
        assert len(outcome.err.strip().splitlines()) == 1
    without = transfer("run", *common, "source=none", "target_labels=3", "method=niw_lda")
    assert without.code == 2 and "prior=FILE" in without.err
    new = transfer("run", *taken, "method=niw_lda", "label_space=separate")
    assert new.code == 0, new.err


def test_features_that_depend_on_one_target_are_refused() -> None:
    for options in (FeatureOptions(reduce="pca"), FeatureOptions(normalise=("zscore",))):
        with pytest.raises(ValueError, match="any target"):
            SourcePosteriorHead(context(12, 4, features=options))
    SourcePosteriorHead(context(12, 4, features=FeatureOptions(normalise=("l2",))))
    for wrong in ({"source_l2": 0.0}, {"draws": 1}, {"rank": 0}, {"folds": 1}):
        with pytest.raises(ValueError, match=r"positive|at least"):
            SourcePosteriorHead(context(12, 4), **wrong)
