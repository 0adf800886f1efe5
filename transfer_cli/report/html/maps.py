"""Features of both domains as points on a plane. NumPy, scikit-learn and umap-learn are imported on use."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfer_cli.errors import TransferError

if TYPE_CHECKING:
    import numpy as np

POINTS = 250  # of a domain
GRID = 1000  # coordinates are whole numbers from 0 to this
MAPS = ("pca", "tsne", "umap")


def feature_map(path: Path, how: str = "pca") -> dict[str, Any] | None:
    """Of a features.npz: `x` and `y` (whole numbers; both axes have the same scale), `labels`, the number of `source` points,
    which come first, and, for PCA, the shares of the variance `explained`. None where there are no features.

    Raises:
        TransferError: `umap` without its package.
    """
    import numpy as np

    try:
        with path.open("rb") as file, np.load(file) as arrays:
            parts = [(s, arrays[s], arrays[f"{s}_labels"]) for s in ("source_test", "target_test") if s in arrays.files]
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    few = [
        (name, *(a[np.linspace(0, len(a) - 1, min(POINTS, len(a))).astype(int)] for a in two)) for name, *two in parts
    ]
    features = np.concatenate([f.reshape(len(f), -1) for _, f, _ in few]).astype(float) if few else np.zeros((0, 0))
    if len(features) < 3 or not np.isfinite(features).all():
        return None
    points, explained = pca(features) if how == "pca" else (_neighbours(features, how), None)
    points = points - points.min(0)
    whole = np.rint(points * (GRID / max(float(points.max()), 1e-12))).astype(int)
    labels = np.concatenate([labels.reshape(len(labels), -1)[:, 0] for _, _, labels in few]).tolist()
    return {
        "how": how,
        "x": whole[:, 0].tolist(),
        "y": whole[:, 1].tolist(),
        "labels": [int(v) if float(v).is_integer() else float(f"{v:.4g}") for v in labels],
        "source": sum(len(f) for name, f, _ in few if name == "source_test"),
        "explained": explained,
    }


def pca(features: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """The first two principal components of `(N, D)`, and the share of the variance that each explains.

    The sign of a component is arbitrary: here its largest loading is positive, so that the same features give the same map.
    """
    import numpy as np

    centred = features - features.mean(0)
    if centred.shape[1] <= len(centred):
        values, vectors = np.linalg.eigh(centred.T @ centred)
        axes = vectors[:, ::-1][:, :2]
    else:  # the same from the smaller matrix of inner products
        values, inner = np.linalg.eigh(centred @ centred.T)
        axes = centred.T @ inner[:, ::-1][:, :2]
        axes /= np.maximum(np.linalg.norm(axes, axis=0), 1e-300)
    axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0))
    points = centred @ axes
    if points.shape[1] == 1:
        points = np.column_stack([points, np.zeros(len(points))])
    total = max(float(np.square(centred).sum()), 1e-300)
    return points, [float(f"{max(v, 0) / total:.4g}") for v in values[::-1][:2].tolist()]


def _neighbours(features: np.ndarray, how: str) -> np.ndarray:
    """t-SNE or UMAP, `(N, 2)`: near points were near, distances between groups mean little."""
    if how == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(features) - 1) / 3)
        return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features).astype(float)
    try:
        import umap
    except ImportError as error:
        raise TransferError("--map umap needs umap-learn: pip install 'transfer-cli[umap]'.") from error
    return umap.UMAP(random_state=0, n_jobs=1).fit_transform(features).astype(float)
