"""`transfer report --html`: what the pages hold, and, in a real browser, what they do."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.decomposition import PCA

from transfer_cli.commands import report
from transfer_cli.errors import TransferError
from transfer_cli.evaluation.metrics import area_under_risk_coverage, classification, regression
from transfer_cli.report.html.details import details
from transfer_cli.report.html.images import as_data_uri
from transfer_cli.report.html.maps import feature_map, pca
from transfer_cli.run_folder import RunFolder, write_json

EVIL = "<script>document.title='owned'</script>"
CLASSES = ["cat", "dog", "</script><b>eel</b>"]
N = 120
Report = tuple[Path, dict[str, Any]]


def rng(*key: object) -> np.random.Generator:
    return np.random.default_rng([sum(map(ord, str(one))) for one in key])


def write_run(
    root: Path,
    method: str,
    seed: int = 0,
    *,
    skill: float = 1.0,
    pair: tuple[str, str] = ("photo", "art"),
    kind: str = "classification",
    state: str = "finished",
    warnings: tuple[str, ...] = (),
) -> Path:
    """A run's folder as a run leaves it. The images of the target are uniform: their value is their row."""
    path = root / "-".join(pair) / f"{method.replace('/', '')}-seed{seed}-{pair[0][0]}{pair[1][0]}345678"
    path.mkdir(parents=True)
    draw = rng(method, seed, *pair)
    config = {
        "source": {"name": pair[0], "implementation": "m:A"},
        "target": {"name": pair[1], "implementation": "m:B"},
        "backbone": {"name": "small_cnn", "widths": [32, 64]},
        "method": {"name": method, "weight": 1.0 + len(method)},
        "optimizer": {"name": "sgd", "lr": 0.01},
        "schedule": {"name": "constant"},
        "augment": {"name": "none"},
        "trainer": {"steps": 100},
        "seed": seed,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    write_json(
        path / "manifest.json", {"command": ["transfer", "run", f"method={method}", f"seed={seed}"], "git": "abc"}
    )
    status = {"state": state, "time": f"2026-11-01T10:00:0{seed}+0000"}
    events = [
        {"step": step, "phase": "adapt", "split": split, "values": values}
        for step in range(20, 101, 20)
        for split, values in (
            ("train", {"supervised": 2.0 / step, "domain": float("nan") if step == 40 else 0.6}),
            ("validators", {"im": step / 100, "source_val": -1 / step}),
            ("target_test", {"accuracy" if kind == "classification" else "rmse": 0.5 + step / 400, "nll": 1.0}),
        )
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"cut')
    (path / "run.log").write_text(f"it began\n{EVIL}\n")
    if state != "finished":
        write_json(
            path / "status.json", {**status, **({"error": f"a loss is nan {EVIL}"} if state == "failed" else {})}
        )
        return path
    arrays: dict[str, np.ndarray] = {}
    for domain in ("source", "target"):
        arrays[f"{domain}_test_ids"] = np.array([f"{domain}/{i}" for i in range(N)])
        if kind == "classification":
            labels = np.arange(N) % 3
            logits = draw.normal(size=(N, 3)) + skill * np.eye(3)[labels]
            arrays[f"{domain}_test_labels"] = labels
            arrays[f"{domain}_test_probs"] = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)
        else:
            truth = np.linspace(-3, 3, N)[:, None]
            arrays[f"{domain}_test_labels"] = truth.astype(np.float32)
            arrays[f"{domain}_test_mean"] = (truth + draw.normal(size=(N, 1)) / skill).astype(np.float32)
            arrays[f"{domain}_test_variance"] = np.full((N, 1), 0.8, np.float32)
    np.savez(path / "predictions.npz", **arrays)
    features = {
        f"{d}_test": draw.normal(size=(N, 5)).astype(np.float32) + k for k, d in enumerate(("source", "target"))
    }
    labels = {f"{d}_test_labels": arrays[f"{d}_test_labels"] for d in ("source", "target")}
    np.savez(path / "features.npz", **features, **labels)
    if kind == "classification":
        rows = np.arange(0, N, 2)
        images = np.broadcast_to(rows.astype(np.uint8)[:, None, None, None], (len(rows), 1, 8, 8))
        np.savez(path / "examples.npz", target_test=images, target_test_index=rows)
    metrics = {f"{d}_test": figures_of(arrays, d, kind) for d in ("source", "target")}
    selection = {"validator": "im", "uses_target_labels": method == "oracle", "candidates": 5, "step": 80, "score": 0.8}
    write_json(
        path / "result.json",
        {
            "schema_version": 1,
            "source": pair[0],
            "target": pair[1],
            "backbone": "small_cnn",
            "method": method,
            "seed": seed,
            "data_seed": 0,
            "kind": kind,
            "classes": CLASSES if kind == "classification" else [],
            "metrics": metrics,
            "selection": selection | {"oracle": {"step": 100, "score": 0.9, "uses_target_labels": True}},
            "validators": {"im": 0.8},
            "health": {"proxy_a_distance": 1.2, "warnings": [{"kind": "x", "text": text} for text in warnings]},
            "seconds": {"load": 0.1, "fit": 61.0, "evaluate": 0.1},
            "steps": 100,
            **({"fit": {"transfer_weight": 0.94, "log_evidence_gain": 2.7}} if method == "gp" else {}),
        },
    )
    write_json(path / "status.json", status)
    return path


def figures_of(arrays: dict[str, np.ndarray], domain: str, kind: str) -> dict[str, float]:
    of = {
        name: torch.from_numpy(arrays[f"{domain}_test_{name}"])
        for name in ("labels", "probs", "mean", "variance")
        if f"{domain}_test_{name}" in arrays
    }
    if kind == "classification":
        return classification(of["probs"].log(), of["labels"])
    return regression(of["mean"], of["variance"], of["labels"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods with two seeds on two pairs, a regression, and all that goes wrong."""
    root = tmp_path_factory.mktemp("runs")
    for pair in (("photo", "art"), ("photo", "sketch")):
        for seed in (0, 1):
            write_run(root, "source_only", seed, pair=pair)
            write_run(root, "dann", seed, pair=pair, skill=2.5, warnings=(f"collapsed {EVIL}",) if seed else ())
    write_run(root, EVIL, skill=1.5)
    write_run(root, "mcd", state="failed")
    write_run(root, "cdan", state="running")  # by nobody: interrupted
    write_run(root, "source_only", pair=("men", "women"), kind="regression")
    write_run(root, "gp", pair=("men", "women"), kind="regression", skill=2.0)
    return root


def write(root: Path, where: Path, *more: str) -> str:
    assert report.main([str(root), "--html", str(where), *more]) == 0
    return (where if where.suffix == ".html" else where / "index.html").read_text()


def unpack(text: str) -> Any:
    return json.loads(zlib.decompress(base64.b64decode(text), wbits=-15))


def data_of(page: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)[0])
    return found


# What the pages hold


def test_one_file_holds_every_run_and_asks_nothing_of_a_network(root: Path, tmp_path: Path) -> None:
    page = write(root, tmp_path / "report.html")
    runs = data_of(page)["runs"]
    assert len(runs) == 13
    blocks = dict(re.findall(r'<script type="text/plain" id="run:([^"]+)">([^<]+)</script>', page))
    assert set(blocks) == {run["id"] for run in runs}
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", page) and "@import" not in page
    by_state = {state: [run["method"] for run in runs if run["state"] == state] for state in ("failed", "interrupted")}
    assert by_state == {"failed": ["mcd"], "interrupted": ["cdan"]}
    failed = next(run for run in runs if run["state"] == "failed")
    assert unpack(blocks[failed["id"]])["log"][0] == "it began"
    assert "1 failed" in page and "1 unfinished" in page, "in their cells of the table"


def test_names_of_runs_are_text_and_never_markup(root: Path, tmp_path: Path) -> None:
    page = write(root, tmp_path / "report.html")
    assert EVIL not in page and "<b>eel" not in page
    assert "&lt;script&gt;document.title" in page
    assert page.count("<script") == 2 + len(data_of(page)["runs"]), "the data, the program, and a block for each run"


def test_a_run_is_compared_with_the_one_without_transfer_of_its_pair_and_seed(root: Path, tmp_path: Path) -> None:
    runs = data_of(write(root, tmp_path / "report.html"))["runs"]
    dann = next(r for r in runs if r["method"] == "dann" and r["seed"] == [1, 0] and r["pair"] == ["photo", "sketch"])
    base = runs[dann["baseline"]]
    assert (base["method"], base["seed"], base["pair"]) == ("source_only", [1, 0], ["photo", "sketch"])
    assert base["baseline"] is None and dann["compared"] == ""
    found = details(RunFolder(Path(dann["path"])), RunFolder(Path(base["path"])))
    ours, theirs = (np.load(Path(run["path"]) / "predictions.npz") for run in (dann, base))
    now, was = (a["target_test_probs"].argmax(1) == a["target_test_labels"] for a in (ours, theirs))
    counts = found["changes"]["counts"]
    assert counts["gained"] == (now & ~was).sum() > 10 and counts["lost"] == (was & ~now).sum()
    assert sum(counts.values()) == N
    recalls = [100 * float(now[ours["target_test_labels"] == c].mean()) for c in range(3)]
    assert [100 * row[2] for row in found["per_class"]] == pytest.approx(recalls, rel=1e-3)
    earlier = [100 * float(was[ours["target_test_labels"] == c].mean()) for c in range(3)]
    assert [100 * row[3] for row in found["per_class"]] == pytest.approx(earlier, rel=1e-3)


def test_a_baseline_with_other_settings_is_told(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "source_only")
    dann = write_run(tmp_path / "runs", "dann")
    config = yaml.safe_load((dann / "config.yaml").read_text())
    config["optimizer"]["lr"] = 0.5
    (dann / "config.yaml").write_text(yaml.safe_dump(config))
    runs = data_of(write(tmp_path / "runs", tmp_path / "report.html"))["runs"]
    entry = next(run for run in runs if run["method"] == "dann")
    assert entry["compared"] == "optimizer.lr" and runs[entry["baseline"]]["method"] == "source_only"


def test_folders_of_one_name_have_pages_of_their_own(tmp_path: Path) -> None:
    for place in ("here", "there"):
        write_run(tmp_path / "runs" / place, "dann")
    page = write(tmp_path / "runs", tmp_path / "report.html")
    ids = [run["id"] for run in data_of(page)["runs"]]
    assert len(set(ids)) == 2 and all(f'id="run:{one}"' in page for one in ids)


def test_images_are_those_of_the_samples_they_stand_for(root: Path) -> None:
    own, base = (RunFolder(root / "photo-art" / f"{name}-seed0-pa345678") for name in ("dann", "source_only"))
    found = details(own, base)["changes"]
    labels = np.arange(N) % 3
    assert found["gained"]
    for one in [*found["gained"], *found["lost"]]:
        row = int(one["id"].partition("/")[2])
        picture = Image.open(io.BytesIO(base64.b64decode(one["image"].partition(",")[2])))
        assert np.asarray(picture)[0, 0] == row and one["label"] == labels[row]
    assert all(one["after"][0] == one["label"] != one["before"][0] for one in found["gained"])
    assert all(one["before"][0] == one["label"] != one["after"][0] for one in found["lost"])


def test_examples_of_older_runs_are_the_first_samples(root: Path, tmp_path: Path) -> None:
    path = shutil.copytree(root / "photo-art" / "dann-seed0-pa345678", tmp_path / "run")
    first = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None, None], (40, 1, 8, 8))
    np.savez(path / "examples.npz", target_test=first)
    found = details(RunFolder(path), RunFolder(root / "photo-art" / "source_only-seed0-pa345678"))["changes"]
    rows = [int(one["id"].partition("/")[2]) for one in found["gained"]]
    assert found["pictures"] == 40 and rows and max(rows) < 40


def test_large_and_coloured_images_are_made_small() -> None:
    image = np.zeros((3, 200, 100), np.uint8)
    image[0] = 255
    picture = Image.open(io.BytesIO(base64.b64decode(as_data_uri(image).partition(",")[2])))
    assert picture.size == (32, 64) and picture.getpixel((5, 5)) == (255, 0, 0)


def test_reliability_and_risk_agree_with_the_evaluator(root: Path) -> None:
    folder = RunFolder(root / "photo-art" / "dann-seed0-pa345678")
    arrays, result = np.load(folder.predictions), json.loads(folder.result.read_text())
    target = next(one for one in details(folder, None)["reliability"] if one["name"] == "target test")
    assert target["ece"] == pytest.approx(result["metrics"]["target_test"]["ece"], rel=1e-3)
    probs, labels = (torch.from_numpy(arrays[f"target_test_{name}"]) for name in ("probs", "labels"))
    assert target["aurc"] == pytest.approx(
        area_under_risk_coverage(probs.max(1).values, probs.argmax(1) != labels), rel=1e-3
    )
    assert target["risk"][-1][1] == pytest.approx(1 - result["metrics"]["target_test"]["accuracy"], rel=1e-3)
    assert sum(share for _, _, share in target["bins"]) == pytest.approx(1, rel=1e-3)


def test_the_confusion_matrix_counts_true_classes_in_rows(root: Path) -> None:
    folder = RunFolder(root / "photo-art" / "dann-seed0-pa345678")
    arrays = np.load(folder.predictions)
    counts = np.zeros((3, 3), int)
    for label, guess in zip(arrays["target_test_labels"], arrays["target_test_probs"].argmax(1), strict=True):
        counts[label, guess] += 1
    found = details(folder, None)
    assert found["matrices"]["target test"] == counts.tolist()
    off = counts - np.diag(np.diag(counts))
    assert found["confused"][0][2] == off.max() and off[tuple(found["confused"][0][:2])] == off.max()


def test_regression_has_its_predictions_and_intervals(root: Path) -> None:
    own, base = (RunFolder(root / "men-women" / f"{name}-seed0-mw345678") for name in ("gp", "source_only"))
    found, result = details(own, base), json.loads(own.result.read_text())
    (output,) = found["outputs"]
    metrics = result["metrics"]["target_test"]
    assert output["rmse"] == pytest.approx(metrics["rmse"], rel=1e-3)
    inside = dict(map(tuple, output["coverage"]))[0.95]
    assert inside == pytest.approx(metrics["coverage_95"], abs=1e-6)
    assert output["width"] == pytest.approx(metrics["width_95"], rel=1e-3)
    assert output["points"][0][2] == pytest.approx(1.96 * 0.8**0.5, rel=1e-3)
    assert output["base_rmse"] > output["rmse"] and 0.5 < output["closer"] <= 1
    assert found["verdict"] == ["transfer weight 0.94: the source helps (log evidence +2.7)"]
    assert details(base, None)["verdict"] == []


def test_intervals_of_targets_in_small_units_are_drawn_as_those_in_large(root: Path, tmp_path: Path) -> None:
    own = RunFolder(root / "men-women" / "gp-seed0-mw345678")
    small = RunFolder(Path(shutil.copytree(own.path, tmp_path / own.path.name)))
    unit = {"labels": 1e-14, "mean": 1e-14, "variance": 1e-28}
    with np.load(own.predictions) as arrays:
        np.savez(small.predictions, **{k: v * unit[k[12:]] if k[12:] in unit else v for k, v in arrays.items()})
    found, wanted = (details(folder, None)["outputs"][0] for folder in (small, own))
    assert found["coverage"] == wanted["coverage"]
    assert found["width"] == pytest.approx(1e-14 * wanted["width"], rel=1e-3)


@pytest.mark.parametrize("shape", [(60, 5), (12, 40)])
def test_principal_components_are_those_of_scikit_learn(shape: tuple[int, int]) -> None:
    features = rng("pca").normal(size=shape) * np.linspace(3, 1, shape[1])
    points, explained = pca(features)
    other = PCA(2, svd_solver="full")
    theirs = other.fit_transform(features)
    assert np.abs(points) == pytest.approx(np.abs(theirs), abs=1e-8)
    assert explained == pytest.approx(other.explained_variance_ratio_, rel=1e-3)


def test_the_map_keeps_its_proportions_and_says_which_points_are_the_source(root: Path) -> None:
    path = root / "photo-art" / "dann-seed0-pa345678" / "features.npz"
    found = feature_map(path)
    assert found is not None and found["source"] == N and len(found["x"]) == len(found["labels"]) == 2 * N
    arrays = np.load(path)
    both = np.concatenate([arrays["source_test"], arrays["target_test"]])
    spread = np.ptp(PCA(2).fit_transform(both), axis=0)
    assert max(found["y"]) / max(found["x"]) == pytest.approx(spread[1] / spread[0], rel=0.01)
    assert max(found["x"]) == 1000 and found["labels"][:4] == [0, 1, 2, 0]
    near = feature_map(path, "tsne")
    assert near is not None and near["how"] == "tsne" and near["explained"] is None and len(near["x"]) == 2 * N


def test_umap_without_its_package_names_the_extra(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(TransferError, match=r"transfer-cli\[umap\]"):
        write(root, tmp_path / "report.html", "--map", "umap")
    with pytest.raises(TransferError, match="--map must be one of pca, tsne, umap"):
        write(root, tmp_path / "report.html", "--map", "PCA")


def test_a_folder_is_brought_up_to_date(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = shutil.copytree(root, tmp_path / "runs")
    page = write(runs, tmp_path / "folder")
    assert "the pages of 13 made now" in capsys.readouterr().out
    ids = {run["id"] for run in data_of(page)["runs"]}
    written = {path.stem: path for path in (tmp_path / "folder" / "runs").iterdir()}
    assert set(written) == ids and 'id="run:' not in page and data_of(page)["folder"] == "runs"
    name, packed = re.findall(
        r'transferRun\((".*?"),(".*")\);', next(iter(written.values())).read_text().replace('", "', '","')
    )[0]
    assert json.loads(name) in ids and "curves" in unpack(json.loads(packed))
    write(runs, tmp_path / "folder")
    assert "the pages of 0 made now" in capsys.readouterr().out
    result = runs / "photo-art" / "source_only-seed0-pa345678" / "result.json"
    result.write_text(result.read_text() + "\n")
    write(runs, tmp_path / "folder")
    told = capsys.readouterr().out
    assert "the pages of 3 made now" in told, "the run's own, and of the two that are compared with it"


def test_damaged_files_leave_the_rest(root: Path, tmp_path: Path) -> None:
    path = shutil.copytree(root / "photo-art" / "dann-seed0-pa345678", tmp_path / "runs" / "p" / "dann")
    for name in ("predictions.npz", "features.npz", "examples.npz"):
        (path / name).write_bytes((path / name).read_bytes()[:100])
    (path / "metrics.jsonl").unlink()
    (run,) = data_of(write(tmp_path / "runs", tmp_path / "report.html"))["runs"]
    assert run["state"] == "finished"
    found = details(RunFolder(path), None)
    assert found["curves"] == {} and found["maps"] == {} and "matrices" not in found and found["metrics"]["target_test"]


def test_what_is_not_finite_is_not_drawn(root: Path) -> None:
    found = details(RunFolder(root / "photo-art" / "dann-seed0-pa345678"), None)
    steps, values = found["curves"]["train"]["domain"]
    assert steps[1] == 40 and values[:3] == [0.6, None, 0.6]
    json.dumps(found, allow_nan=False)


def test_names_of_a_file_and_a_folder_are_not_mixed_up(root: Path, tmp_path: Path) -> None:
    (tmp_path / "x.html").mkdir()
    (tmp_path / "y").write_text("")
    for name in ("x.html", "y"):
        with pytest.raises(TransferError, match=r"a name ending in \.html is that of a file"):
            write(root, tmp_path / name)


def test_a_choice_leaves_the_names_of_all_runs_in_the_list(tmp_path: Path) -> None:
    for seed, weight, angle in ((0, 1.0, 0), (0, 2.0, 0), (1, 1.0, 20), (1, 2.0, 20)):
        path = write_run(tmp_path / "runs" / f"{weight}-{angle}", "dann", seed, skill=weight)
        config = yaml.safe_load((path / "config.yaml").read_text())
        config["method"]["weight"], config["target"]["rotate"] = weight, angle
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    plain, chosen = (
        data_of(write(tmp_path / "runs", tmp_path / "report.html", *more))["runs"] for more in ([], ["--select", "im"])
    )
    for key in ("pair", "told"):
        assert [run[key] for run in chosen] == [run[key] for run in plain]
    assert {(run["told"], run["pair"][1]) for run in chosen} == {
        (f"method.weight={w}", f"art rotate={r}") for w in (1, 2) for r in (0, 20)
    }
    assert [run["cell"] is None for run in chosen].count(True) == 2, "those that were not chosen are in no table"


def test_validators_are_ranked_where_asked(root: Path, tmp_path: Path) -> None:
    assert "Validators, classification" not in write(root, tmp_path / "report.html")
    for more in ([], ["--select", "im"]):
        assert "Validators, classification" in write(root, tmp_path / "report.html", "--validators", *more)


def test_reports_need_no_torch_and_numpy_only_for_pages() -> None:
    names = "('torch', 'numpy', 'sklearn', 'PIL')"
    code = f"import sys, transfer_cli.report.html.write; print([name for name in {names} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


# What they do in a browser

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install 'transfer-cli[dev]'"
    )
    if EXECUTABLE is None:
        pytest.skip("there is no chromium or google-chrome on this machine")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=EXECUTABLE, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def reports(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of the one file and of the folder."""
    where = tmp_path_factory.mktemp("reports")
    write(root, where / "report.html", "--validators")
    write(root, where / "folder")
    return {"file": (where / "report.html").as_uri(), "folder": (where / "folder" / "index.html").as_uri()}


@pytest.fixture
def open_page(browser: Any, reports: dict[str, str]) -> Iterator[Any]:
    """`open_page(size, scheme, which)`; at the end nothing may have gone wrong or asked a network for anything."""
    pages, wrong = [], []

    def call(size: tuple[int, int] = DESKTOP, scheme: str = "light", which: str = "file") -> Any:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url)
        )
        page.goto(reports[which])
        pages.append(context)
        return page

    yield call
    for context in pages:
        context.close()
    assert wrong == []


def shot(page: Any, name: str) -> None:
    """For people, where TRANSFER_SCREENSHOTS names a folder."""
    folder = os.environ.get("TRANSFER_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def expect(what: Any) -> Any:
    """Of what the page shows a moment after a click."""
    from playwright.sync_api import expect

    return expect(what)


def column(page: Any, table: int = 0) -> list[str]:
    rows = page.locator("table.results").nth(table).locator("tbody tr:visible th")
    return [text.partition("\n")[0].strip() for text in rows.all_inner_texts()]


def go(page: Any, method: str, seed: int = 0) -> None:
    page.locator("table.runs tbody tr", has=page.get_by_role("link", name=method, exact=True)).locator("a").nth(
        seed
    ).click()
    page.wait_for_selector("#page[data-ready]")


def test_the_table_is_sorted_by_clicks_and_by_keys(open_page: Any) -> None:
    page = open_page()
    assert page.title() == "Report on 13 runs"
    first = column(page)
    head = page.locator("table.results").first.locator("thead th").nth(1)
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending" and column(page)[0] == "dann"
    page.keyboard.press("Enter")  # the button has the focus
    assert head.get_attribute("aria-sort") == "ascending" and column(page)[0] == "source_only"
    assert column(page)[-2:] == ["cdan", "mcd"], "cells without a figure stay last"
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") is None and column(page) == first
    runs = page.locator("table.runs")
    runs.get_by_role("button", name="seed").click()
    seeds = [text for text in runs.locator('td[data-label="seed"]').all_inner_texts()]
    assert seeds == sorted(seeds) and seeds[0] == "0"


def test_filters_leave_what_they_say(open_page: Any) -> None:
    page = open_page()
    page.get_by_label("Pair").select_option("photo → sketch")
    heads = page.locator("table.results").first.locator("thead th:visible").all_inner_texts()
    assert [head.strip(" ↕") for head in heads if "→" in head] == ["photo → sketch"]
    assert column(page) == ["source_only", "dann"]
    assert page.locator("table.results").nth(1).is_hidden(), "no regression has this pair"
    assert page.locator("table.runs tbody tr").count() == 4
    page.get_by_label("Method").select_option("dann")
    assert column(page) == ["dann"] and "2 runs of 13" in page.locator("#filters output").inner_text()
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("table.runs tbody tr")).to_have_count(13)
    page.get_by_label("State").select_option("failed")
    assert column(page) == ["mcd"] and "a loss is nan" in page.locator("table.runs").inner_text()
    page.get_by_label("State").select_option("")
    page.get_by_label("Search").fill("collapsed")
    assert page.locator("table.runs tbody tr").count() == 2
    page.get_by_label("Search").fill("no such word")
    assert page.get_by_text("No run passes these filters").is_visible()


def test_another_figure_is_averaged_from_the_runs(open_page: Any, root: Path) -> None:
    page = open_page()
    page.get_by_label("Figure").first.select_option("nll")
    results = [
        json.loads((root / "photo-art" / f"dann-seed{seed}-pa345678" / "result.json").read_text()) for seed in (0, 1)
    ]
    values = [result["metrics"]["target_test"]["nll"] for result in results]
    row = page.locator("table.results").first.locator("tbody tr", has=page.get_by_text("dann", exact=True))
    assert row.locator("td").first.inner_text() == f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} (2)"
    page.locator("table.results").first.locator("thead th").nth(1).get_by_role("button").click()
    assert column(page)[0] != "dann", "the greatest NLL first"


def test_the_theme_follows_the_system_and_the_switch(open_page: Any) -> None:
    page = open_page(scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(20, 23, 28)"
    switch = page.locator("#theme")
    switch.click()
    assert switch.inner_text() == "Theme: light" and page.evaluate(background) == "rgb(255, 255, 255)"
    switch.click()
    assert switch.inner_text() == "Theme: dark" and page.evaluate(background) == "rgb(20, 23, 28)"
    page.reload()
    expect(page.locator("#theme")).to_have_text("Theme: dark")  # it is remembered
    page.emulate_media(media="print")
    assert page.evaluate(background) == "rgb(255, 255, 255)" and page.locator("#filters").is_hidden()
    assert page.locator("table.results thead th").nth(1).inner_text().startswith("photo → art")


@pytest.mark.parametrize("which", ["file", "folder"])
def test_a_run_has_its_page(which: str, open_page: Any) -> None:
    page = open_page(which=which)
    go(page, "dann", seed=1)
    assert "dann, seed 1" in page.locator("#page h1").inner_text()
    heads = page.locator("#page h2").all_inner_texts()
    assert heads[:7] == [
        "Figures", "Learning curves", "Confusion matrix", "Reliability", "Gains and losses by class",
        "Samples that changed against source_only", "Feature map",
    ]  # fmt: skip
    assert "transfer run method=dann seed=1" in page.locator("pre.command").inner_text()
    assert page.locator("#page img").count() > 4
    assert page.evaluate("[...document.querySelectorAll('#page img')].every((i) => i.complete && i.naturalWidth === 8)")
    assert page.locator("#page svg").count() > 8
    assert "</script><b>eel</b>" in page.locator("#page").inner_text(), "a class of that name, as text"
    matrix = page.locator("#page svg[aria-label^=Confusion]")
    shown = matrix.inner_html()
    page.get_by_label("Shown").first.select_option("target test, baseline")
    assert matrix.inner_html() != shown
    curve = page.locator("#page svg[aria-label^=Losses]")
    curve.hover()
    assert page.locator("#page .readout").first.inner_text().startswith("step ")
    page.go_back()
    assert page.locator("#overview").is_visible() and page.locator("#page").is_hidden()
    page.locator("table.runs").get_by_role("link", name="mcd").click()
    page.wait_for_selector("#page[data-ready]")
    assert "a loss is nan" in page.locator("#page .box.failed").inner_text()
    assert "it began" in page.locator("#page pre").first.inner_text()
    assert page.title() == "mcd, seed 0", "and no markup of a run took it"


def test_a_warning_and_a_regression_have_their_place(open_page: Any) -> None:
    page = open_page()
    go(page, "dann", seed=1)
    assert "collapsed <script>" in page.locator("#page .box").first.inner_text()
    page.goto(page.url.partition("#")[0] + "#run/gp-seed0-mw345678")
    page.wait_for_selector("#page[data-ready=gp-seed0-mw345678]")
    heads = page.locator("#page h3").all_inner_texts()
    assert {"Predicted against true", "Residuals", "Intervals: coverage"} <= set(heads)
    assert "transfer weight 0.94: the source helps" in page.locator("#page").inner_text()
    named = page.locator("#page table th[scope=col]").all_inner_texts()
    assert named[1:7] == ["RMSE", "R²", "NLL", "CRPS", "95 % coverage", "95 % width"]
    page.goto(page.url.partition("#")[0] + "#runs")
    assert " wide" in page.locator("table.runs tbody tr", has=page.get_by_role("link", name="gp")).inner_text()


def test_two_runs_are_compared(open_page: Any) -> None:
    page = open_page()
    page.get_by_label("Pair").select_option("photo → art")
    boxes = page.locator("table.runs tbody tr", has=page.get_by_role("link", name="dann", exact=True)).locator("input")
    boxes.first.check()
    page.locator("table.runs tbody tr", has=page.get_by_role("link", name="source_only", exact=True)).locator(
        "input"
    ).first.check()
    page.get_by_role("link", name="compare the two").click()
    table = page.locator("table.diff").first
    expect(table.locator("tbody th")).to_have_text(["method", "method.weight"])
    values = table.locator("tbody tr").nth(1).locator("td")
    expect(values).to_have_text(["5", "12"])  # dann, then source_only
    page.get_by_role("button", name="Swap").click()
    expect(values).to_have_text(["12", "5"])
    page.get_by_label("equal keys too").check()
    expect(table.locator("tbody tr").nth(20)).to_be_visible()
    page.locator("#second").select_option("gp-seed0-mw345678")
    expect(table.locator("thead")).to_contain_text("gp")


def test_a_cell_leads_to_its_runs(open_page: Any) -> None:
    page = open_page()
    page.locator("table.results").first.locator("tbody tr", has=page.get_by_text("dann", exact=True)).locator(
        "td a"
    ).first.click()
    expect(page.locator("#page h1")).to_contain_text("dann: photo → art")
    expect(page.locator("#page table.runs tbody tr")).to_have_count(2)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_is_wider_than_the_screen(size: tuple[int, int], scheme: str, open_page: Any) -> None:
    page = open_page(size, scheme)
    address = page.url.partition("#")[0]
    name = f"{'phone' if size == PHONE else 'desktop'}-{scheme}"
    for what in ("", "run/dann-seed1-pa345678", "run/gp-seed0-mw345678", "run/mcd-seed0-pa345678",
                 "diff/dann-seed0-pa345678/gp-seed0-mw345678", "cell/0.1.0"):  # fmt: skip
        page.goto(f"{address}#{what}")
        if what.startswith("run"):
            page.wait_for_selector(f"#page[data-ready='{what[4:]}']")
        page.wait_for_timeout(100)  # the charts are drawn for the width they find
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0], what
        shot(page, f"{name}-{what.replace('/', '-') or 'table'}")
