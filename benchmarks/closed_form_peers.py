"""Time, memory and results of the methods on features, beside the public packages that have the same formulation.

    python benchmarks/closed_form_peers.py [--methods tca coral] [--sizes 1000 3000 10000] [--rounds 5] [--limit 30] [--alone]

n is the number of samples in all, half of them source and half target, of 256 features (post-ReLU, 10 classes, the target's latent
space turned and shifted). Then our TCA and JDA alone at 100,000 x 512, which must stay within 8 GB. Peers are used where they are
installed: pip install scikit-learn pot skada adapt (adapt brings tensorflow).

Each side of a cell is a process of its own with one thread, warmed up on small data; its memory is its peak resident size in the
first round less that before, data and imports being there. The two sides take turns, one working while the other waits; times are
medians over rounds, and rounds end early when a cell has had six seconds. What is timed is the fit and the map of both domains
(weights: the fit; heads: the fit on the source and the prediction of the target). A peer that needs longer than the limit is
stopped; where growth with the square of n alone would take it there (all such peers form matrices of n x n), it is not run, and
that time stands as its lower bound. A ratio above 1 says that ours is faster, or smaller. The exact plans of ot and jdot are
POT's on both sides.

Goals: no cell of the same formulation in which ours is slower (a ratio below 0.95), and TCA at least 5 times faster
than the fastest peer.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}

import argparse
import contextlib
import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import FeatureMethod
from transfer_cli.methods.heads.base import Head
from transfer_cli.methods.heads.knn import KNN
from transfer_cli.methods.heads.logistic import Logistic
from transfer_cli.methods.heads.ridge import Ridge
from transfer_cli.methods.heads.svm import SVM
from transfer_cli.methods.math.nmf import factorise
from transfer_cli.methods.math.transport import TOLERANCE, relative_cost
from transfer_cli.methods.moments.coral import CORAL
from transfer_cli.methods.phases import Features, FeatureTask
from transfer_cli.methods.subspace.jda import JDA
from transfer_cli.methods.subspace.kpca import KPCA
from transfer_cli.methods.subspace.pca import PCA
from transfer_cli.methods.subspace.sa import SubspaceAlignment
from transfer_cli.methods.subspace.tca import TCA
from transfer_cli.methods.transport.jdot import JDOT
from transfer_cli.methods.transport.linear_ot import LinearOT
from transfer_cli.methods.transport.ot import OT
from transfer_cli.methods.weighting.kmm import KMM, solve

Array = NDArray[np.float64]
Thunk = Callable[[], Any]  # what is timed

CLASSES, LATENT, WIDTH = 10, 20, 256
K = 30  # components
REG = 0.1  # of transport, in median costs
L2 = 1e-3  # of the linear heads
ENOUGH = 6.0  # seconds of rounds
EQUAL = 0.95  # ratios from here on may be noise
KIB = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss


@dataclass(frozen=True)
class Data:
    x_s: Array
    y_s: NDArray[np.int64]
    x_t: Array
    y_t: NDArray[np.int64]

    @classmethod
    def draw(cls, n: int, width: int = WIDTH, seed: int = 0) -> Data:
        rng = np.random.default_rng(seed)
        centres, weights = 0.8 * rng.standard_normal((CLASSES, LATENT)), rng.standard_normal((LATENT, width))
        turn = np.linalg.qr(np.eye(LATENT) + 0.08 * rng.standard_normal((LATENT, LATENT)))[0]
        turn *= np.sign(np.diag(turn))
        y = rng.integers(CLASSES, size=n)
        z = centres[y] + rng.standard_normal((n, LATENT))
        z[n // 2 :] = z[n // 2 :] @ turn + 0.4
        x = z @ weights / LATENT**0.5
        x += 0.3 * rng.standard_normal(x.shape)
        np.maximum(x, 0, out=x)
        return cls(x[: n // 2], y[: n // 2], x[n // 2 :], y[n // 2 :])

    @property
    def x(self) -> Array:
        return np.concatenate([self.x_s, self.x_t])

    @property
    def task(self) -> FeatureTask:
        source = Features(torch.from_numpy(self.x_s), torch.from_numpy(self.y_s))
        return FeatureTask(source, Features(torch.from_numpy(self.x_t)), None)

    @property
    def masked(self) -> dict[str, Any]:
        """skada's arguments: the source's labels, -1 for the target's."""
        y = np.concatenate([self.y_s, np.full(len(self.y_t), -1)])
        return {"X": self.x, "y": y, "sample_domain": np.repeat([1, -2], [len(self.y_s), len(self.y_t)])}

    @property
    def standardised(self) -> Data:
        mean, scale = self.x_t.mean(0), self.x_t.std(0)
        return Data((self.x_s - mean) / scale, self.y_s, (self.x_t - mean) / scale, self.y_t)


# --- ours ---------------------------------------------------------------------------------------------


ONE_NN = partial(KNN, "classification", CLASSES)


def build_context(width: int, make_head: Callable[[], Head] = ONE_NN) -> Context:
    return Context(nn.Identity(), width, "classification", CLASSES, CLASSES, True, False, True, make_head=make_head)


def build(
    method: Callable[..., FeatureMethod], width: int, make_head: Callable[[], Head] = ONE_NN, **settings: Any
) -> FeatureMethod:
    return method(build_context(width, make_head), **settings)


def embedding(method: Callable[..., FeatureMethod], data: Data, **settings: Any) -> Thunk:
    task = data.task

    def run() -> list[Any]:
        fitted = build(method, data.x_s.shape[1], **settings)
        fitted.adapt(task)
        return [fitted.map_source(task.source.x).numpy(), fitted.map_target(task.target.x).numpy()]  # type: ignore[union-attr]

    return run


def weights(method: Callable[..., FeatureMethod], data: Data, **settings: Any) -> Thunk:
    def run() -> Any:
        fitted = build(method, data.x_s.shape[1], **settings)
        fitted.adapt(data.task)
        return fitted.weights.numpy()  # type: ignore[union-attr]

    return run


def rough_kmm(data: Data) -> Thunk:
    """To a thousandth of the objective, the accuracy of a thousand Frank-Wolfe steps."""
    x_s, x_t = (torch.from_numpy(part) for part in (data.x_s, data.x_t))
    n = len(x_s)

    def run() -> Any:
        method = KMM(build_context(WIDTH), gamma=1 / WIDTH)
        return solve(*method.problem(x_s, x_t), method.max_weight, n**0.5, 2 * n - n**0.5, 1e-3).numpy()

    return run


def head(make: Callable[[], Head], data: Data) -> Thunk:
    x_s, y_s, x_t = (torch.from_numpy(part) for part in (data.x_s, data.y_s, data.x_t))

    def run() -> Any:
        fitted = make()
        fitted.fit(x_s, y_s)
        return fitted.predict(x_t).labels.numpy()

    return run


def our_nmf(data: Data) -> Thunk:
    x = torch.from_numpy(data.x)

    def run() -> Any:
        codes, basis, _ = factorise(x, K, steps=100, tolerance=0.0)
        return (codes @ basis).numpy()

    return run


def our_jdot(data: Data) -> Thunk:
    data = data.standardised
    task = data.task
    cost = torch.cdist(task.source.x, task.target.x).square()  # type: ignore[union-attr]
    alpha = median_cost(data) / float(cost.mean())  # the weight of skada's alpha = 1/2
    del cost

    def run() -> Any:
        fitted = build(JDOT, WIDTH, partial(Logistic, "classification", CLASSES, l2=L2), alpha=alpha)
        fitted.fit(task)
        return fitted.predict(task.target.x).labels.numpy()  # type: ignore[union-attr]

    return run


def median_cost(data: Data) -> float:
    """That our costs are divided by."""
    relative = relative_cost(torch.from_numpy(data.x_s), torch.from_numpy(data.x_t))
    return float(((data.x_s[0] - data.x_t[0]) ** 2).sum() / relative[0, 0])


# --- peers --------------------------------------------------------------------------------------------


def skada_transform(make: Callable[[], Any], data: Data) -> Thunk:
    masked = data.masked
    return lambda: make().fit_transform(**masked)


def adapt_transform(make: Callable[[], Any], data: Data) -> Thunk:
    def run() -> Any:
        peer = make()
        return [peer.fit_transform(data.x_s, data.x_t), peer.transform(data.x_t)]

    return run


def mu(data: Data) -> float:
    """The peers' weight of the MMD for which their problem is ours at `ridge=1`: one over the Frobenius norm of the MMD matrix."""
    return 1 / (1 / len(data.x_s) + 1 / len(data.x_t))


def skada_tca(kernel: str, data: Data) -> Thunk:
    from skada import TransferComponentAnalysisAdapter

    return skada_transform(lambda: TransferComponentAnalysisAdapter(kernel, K, mu(data)), data)


def adapt_tca(kernel: str, data: Data) -> Thunk:
    from adapt.feature_based import TCA as Peer

    width = {"gamma": 1 / WIDTH} if kernel == "rbf" else {}
    return adapt_transform(lambda: Peer(n_components=K, mu=mu(data), kernel=kernel, verbose=0, **width), data)


def skada_coral(data: Data) -> Thunk:
    from skada import CORALAdapter

    return skada_transform(lambda: CORALAdapter(reg=None), data)


def adapt_coral(data: Data) -> Thunk:
    from adapt.feature_based import CORAL as Peer

    return adapt_transform(lambda: Peer(lambda_=1.0, verbose=0), data)


def skada_sa(data: Data) -> Thunk:
    from skada import SubspaceAlignmentAdapter

    return skada_transform(lambda: SubspaceAlignmentAdapter(K, random_state=0), data)


def adapt_sa(data: Data) -> Thunk:
    from adapt.feature_based import SA as Peer

    return adapt_transform(lambda: Peer(n_components=K, verbose=0, random_state=0), data)


def sklearn_pca(solver: str, data: Data) -> Thunk:
    from sklearn.decomposition import PCA as Peer

    x = data.x
    return lambda: Peer(K, svd_solver=solver, random_state=0).fit_transform(x)


def sklearn_kpca(data: Data) -> Thunk:
    from sklearn.decomposition import KernelPCA

    x = data.x
    return lambda: KernelPCA(K, kernel="rbf", gamma=1 / WIDTH, random_state=0).fit_transform(x)


def sklearn_nmf(data: Data) -> Thunk:
    from sklearn.decomposition import NMF

    x, draw = data.x, torch.Generator().manual_seed(0)
    scale = (x.mean() / K) ** 0.5
    codes, basis = (
        scale * torch.rand(*shape, generator=draw, dtype=torch.float64).numpy() for shape in ((len(x), K), (K, WIDTH))
    )

    def run() -> Any:
        peer = NMF(K, init="custom", tol=0, max_iter=100)
        return peer.fit_transform(x, W=codes.copy(), H=basis.copy()) @ peer.components_

    return run


def skada_kmm(data: Data) -> Thunk:
    from skada import KMMReweightAdapter

    masked = data.masked
    return lambda: KMMReweightAdapter(gamma=1 / WIDTH).fit(**masked).source_weights_


def adapt_kmm(data: Data) -> Thunk:
    from adapt.instance_based import KMM as Peer

    size = len(data.x_s)  # of the parts that it solves one by one: all in one
    return lambda: Peer(gamma=1 / WIDTH, max_size=size, verbose=0).fit_weights(data.x_s, data.x_t)


def pot_linear(data: Data) -> Thunk:
    from ot.da import LinearTransport

    reg = 1 - 1 / len(data.x_s)  # to covariances over n as 1 is to ours over n - 1

    def run() -> Any:
        return [LinearTransport(reg=reg).fit(data.x_s, Xt=data.x_t).transform(data.x_s), data.x_t]

    return run


def skada_linear(data: Data) -> Thunk:
    from skada import LinearOTMappingAdapter

    return skada_transform(lambda: LinearOTMappingAdapter(reg=1 - 1 / len(data.x_s)), data)


def l2_tolerance(data: Data) -> float:
    """Of the marginal's error in the Euclidean norm, about as strict as ours in the sum of absolute values."""
    return TOLERANCE / len(data.x_t) ** 0.5


def pot_sinkhorn(data: Data) -> Thunk:
    import ot

    reg, tolerance = REG * median_cost(data), l2_tolerance(data)

    def run() -> Any:
        cost = ot.dist(data.x_s, data.x_t)
        plan = ot.sinkhorn([], [], cost, reg, method="sinkhorn", numItermax=10_000, stopThr=tolerance)
        return [plan @ data.x_t / plan.sum(1, keepdims=True), data.x_t]

    return run


def skada_sinkhorn(data: Data) -> Thunk:
    from skada import EntropicOTMappingAdapter

    reg, tolerance = REG * median_cost(data), l2_tolerance(data)
    return skada_transform(lambda: EntropicOTMappingAdapter(reg, max_iter=10_000, tol=tolerance), data)


def pot_exact(data: Data) -> Thunk:
    from ot.da import EMDTransport

    def run() -> Any:
        peer = EMDTransport(max_iter=10**9).fit(data.x_s, Xt=data.x_t)
        return [peer.transform(data.x_s), data.x_t]

    return run


def skada_jdot(data: Data) -> Thunk:
    from skada import JDOTClassifier
    from sklearn.linear_model import LogisticRegression

    data = data.standardised
    base = LogisticRegression(C=1 / (L2 * len(data.x_t)), tol=1e-6, max_iter=2000)
    masked = data.masked

    def run() -> Any:
        peer = JDOTClassifier(base, alpha=0.5, n_iter_max=10)
        peer.fit(**masked)
        return peer.predict(data.x_t)

    return run


def sklearn_head(make: Callable[[int], Any], data: Data) -> Thunk:
    return lambda: make(len(data.x_s)).fit(data.x_s, data.y_s).predict(data.x_t)


def knn(_: int) -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(1)


def logistic(n: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=1 / (L2 * n), tol=1e-6, max_iter=2000))


def ridge(n: int) -> Any:
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), RidgeClassifier(alpha=L2 * n))


def svc(_: int) -> Any:
    from sklearn.svm import SVC

    return SVC()


def calibrated_svc(_: int) -> Any:
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.svm import SVC

    return CalibratedClassifierCV(SVC(), method="temperature", ensemble=False, cv=5)


# --- do they agree? -----------------------------------------------------------------------------------


def relative(ours: Array, theirs: Array) -> str:
    return f"differ by {np.abs(ours - theirs).max() / np.abs(theirs).max():.0e}"


def accuracy(labels: Any, data: Data) -> float:
    return 100 * float((labels == data.y_t).mean())


def nearest_labels(z: Array, data: Data) -> Any:
    return head(ONE_NN, Data(z[: len(data.x_s)], data.y_s, z[len(data.x_s) :], data.y_t))()


def by_neighbours(ours: Array, theirs: Array, data: Data) -> str:
    return same_labels(nearest_labels(ours, data), nearest_labels(theirs, data), data).replace(
        "accuracy", "1-NN accuracy"
    )


def same_labels(ours: Any, theirs: Any, data: Data) -> str:
    equal = 100 * float((ours == theirs).mean())
    return f"accuracy {accuracy(ours, data):.1f} and {accuracy(theirs, data):.1f} %, {equal:.1f} % of labels equal"


def same_embedding(ours: Array, theirs: Array, data: Data) -> str:
    signs = np.sign((ours * theirs).sum(0))
    return f"{relative(ours * signs, theirs)}; {by_neighbours(ours, theirs, data)}"


def same_up_to_shift(ours: Array, theirs: Array, data: Data) -> str:
    parts = [(z[: len(data.x_s)], z[len(data.x_s) :]) for z in (ours, theirs)]
    centred = [np.concatenate([part - part.mean(0) for part in both]) for both in parts]
    return f"{relative(*centred)} but for shifts; {by_neighbours(ours, theirs, data)}"


def same_numbers(ours: Array, theirs: Array, data: Data) -> str:
    return relative(ours, theirs)


def tca_objective(z: Array, data: Data) -> float:
    """`tr((Aᵀ K H K A)⁻¹ (Aᵀ K M K A + A Aᵀ))` of an embedding `Z = K A`, A the smallest that gives it; linear kernel."""
    x = data.x
    projection = np.linalg.lstsq(x, z, rcond=None)[0]
    gap = z[: len(data.x_s)].mean(0) - z[len(data.x_s) :].mean(0)
    size = projection.T @ np.linalg.lstsq(x.T @ x, projection, rcond=None)[0]
    centred = z - z.mean(0)
    return float(np.trace(np.linalg.solve(centred.T @ centred, mu(data) * np.outer(gap, gap) + size)))


def tca_quality(ours: Array, theirs: Array, data: Data) -> str:
    mine, peers = tca_objective(ours, data), tca_objective(theirs, data)
    return f"objective {peers / mine:.3f} times ours; {by_neighbours(ours, theirs, data)}"


def kmm_quality(ours: Array, theirs: Array, data: Data) -> str:
    from sklearn.metrics.pairwise import rbf_kernel

    gram, linear = rbf_kernel(data.x_s), len(data.x_s) * rbf_kernel(data.x_s, data.x_t).mean(1)
    mine, peers = (float(0.5 * beta @ gram @ beta - linear @ beta) for beta in (ours, theirs))
    return (
        f"objective above ours by {(peers - mine) / abs(mine):.0e}; correlation {np.corrcoef(ours, theirs)[0, 1]:.3f}"
    )


# --- the cells ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    method: str
    peer: str
    package: str  # that must be importable
    ours: Callable[[Data], Thunk]
    theirs: Callable[[Data], Thunk]
    agree: Callable[[Any, Any, Data], str]
    differs: str = ""  # in the formulation


def ours(make: Callable[..., Thunk], method: Callable[..., FeatureMethod], **settings: Any) -> Callable[[Data], Thunk]:
    return partial(make, method, **settings)


NOT_SYMMETRIC = "takes eigenvectors of one triangle of a matrix that is not symmetric; not the optimum"
RANDOMISED = "scikit-learn's choice of solver: at some sizes a randomised approximation (differences of 1e-1)"
RBF = {"kernel": "rbf", "gamma": 1 / WIDTH}
LINEAR_TCA, RBF_TCA = (ours(embedding, TCA, components=K, unit=False, **kernel) for kernel in ({}, RBF))
OUR_KMM, OUR_LINEAR_OT = ours(weights, KMM, gamma=1 / WIDTH), ours(embedding, LinearOT)
ENTROPIC = ours(embedding, OT, regularise="entropic", reg=REG, max_iter=10_000)
OUR_SVM = partial(head, partial(SVM, "classification", CLASSES))
CASES = [
    Case("tca", "skada", "skada", LINEAR_TCA, partial(skada_tca, "linear"), tca_quality, NOT_SYMMETRIC),
    Case("tca", "adapt", "adapt", LINEAR_TCA, partial(adapt_tca, "linear"), tca_quality, NOT_SYMMETRIC),
    Case("tca rbf", "skada", "skada", RBF_TCA, partial(skada_tca, "rbf"), by_neighbours, NOT_SYMMETRIC),
    Case("tca rbf", "adapt", "adapt", RBF_TCA, partial(adapt_tca, "rbf"), by_neighbours, NOT_SYMMETRIC),
    Case(
        "coral", "skada", "skada", ours(embedding, CORAL, ridge=0.0), skada_coral, same_up_to_shift,
        "covariances without ridge; both domains centred",
    ),
    Case(
        "coral", "adapt", "adapt", ours(embedding, CORAL, ridge=1.0), adapt_coral, same_up_to_shift,
        "the source is neither centred nor shifted",
    ),
    Case("sa", "skada", "skada", ours(embedding, SubspaceAlignment, components=K), skada_sa, same_embedding, RANDOMISED),
    Case("sa", "adapt", "adapt", ours(embedding, SubspaceAlignment, components=K), adapt_sa, same_embedding, RANDOMISED),
    Case(
        "pca", "sklearn", "sklearn", ours(embedding, PCA, components=K), partial(sklearn_pca, "auto"), same_embedding,
        RANDOMISED,
    ),
    Case(
        "pca", "sklearn eigh", "sklearn", ours(embedding, PCA, components=K), partial(sklearn_pca, "covariance_eigh"),
        same_embedding,
    ),
    Case("kpca", "sklearn", "sklearn", ours(embedding, KPCA, components=K, gamma=1 / WIDTH), sklearn_kpca, same_embedding),
    Case("nmf", "sklearn", "sklearn", our_nmf, sklearn_nmf, same_numbers),
    Case("kmm", "skada", "skada", OUR_KMM, skada_kmm, kmm_quality, "1000 Frank-Wolfe steps, wherever they end"),
    Case("kmm to 1e-3", "skada", "skada", rough_kmm, skada_kmm, kmm_quality),
    Case("kmm", "adapt", "adapt", OUR_KMM, adapt_kmm, kmm_quality),
    Case("linear_ot", "pot", "ot", OUR_LINEAR_OT, pot_linear, same_embedding),
    Case("linear_ot", "skada", "skada", OUR_LINEAR_OT, skada_linear, same_embedding),
    Case("ot exact", "pot", "ot", ours(embedding, OT, regularise="none"), pot_exact, same_embedding),
    Case("ot entropic", "pot", "ot", ENTROPIC, pot_sinkhorn, same_embedding),
    Case("ot entropic", "skada", "skada", ENTROPIC, skada_sinkhorn, same_embedding),
    Case(
        "jdot", "skada", "skada", our_jdot, skada_jdot, same_labels,
        "starts from the plan without labels, ours from the source's classifier; another stopping rule",
    ),
    Case("1-nn", "sklearn", "sklearn", partial(head, ONE_NN), partial(sklearn_head, knn), same_labels),
    Case(
        "logistic", "sklearn", "sklearn", partial(head, partial(Logistic, "classification", CLASSES, l2=L2)),
        partial(sklearn_head, logistic), same_labels,
    ),
    Case(
        "ridge", "sklearn", "sklearn", partial(head, partial(Ridge, "classification", CLASSES, l2=L2)),
        partial(sklearn_head, ridge), same_labels, "no probabilities; ours fits a temperature",
    ),
    Case(
        "svm", "sklearn", "sklearn", OUR_SVM, partial(sklearn_head, svc), same_labels,
        "no probabilities; ours fits a temperature, by five further fits",
    ),
    Case("svm", "sklearn calibrated", "sklearn", OUR_SVM, partial(sklearn_head, calibrated_svc), same_labels),
]  # fmt: skip


# --- measuring ----------------------------------------------------------------------------------------


def forget_peak() -> None:
    """Where the system can (Linux), the most memory so far starts anew from what is held now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """The most memory that this process ever had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB / 1e6


def work(connection: Connection, make: Callable[[Data], Thunk], n: int, width: int) -> None:
    """One side of a cell: for each message a run. Answers its seconds and, the first time, memory and result; or its error."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        make(Data.draw(600, width))()
        run = make(Data.draw(n, width))
        forget_peak()
        before, first = peak(), True
        connection.send("ready")
        while connection.recv():
            began = time.perf_counter()
            result = run()
            seconds = time.perf_counter() - began
            memory = (peak() - before, peak())
            result = np.concatenate(result) if isinstance(result, list) else result
            connection.send((seconds, memory, result) if first else (seconds, None, None))
            first = False
    except Exception as error:
        connection.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


class Failed(Exception):
    """What a side said instead of a result."""


class Side:
    """The process of one side."""

    def __init__(self, make: Callable[[Data], Thunk], n: int, width: int) -> None:
        processes = multiprocessing.get_context("forkserver")
        self.connection, other = processes.Pipe()
        self.process = processes.Process(target=work, args=(other, make, n, width), daemon=True)
        self.process.start()
        other.close()
        self.times: list[float] = []
        self.memory = self.total = 0.0
        self.result: Any = None

    def run(self, limit: float = 1e6) -> bool:
        """Another round; False if it took too long."""
        if not self.times and (said := self.connection.recv()) != "ready":
            raise Failed(said)
        self.connection.send(True)
        if not self.connection.poll(limit):
            return False
        answer = self.connection.recv()
        if isinstance(answer, str):
            raise Failed(answer)
        seconds, memory, result = answer
        if not self.times:
            (self.memory, self.total), self.result = memory, result
        self.times.append(seconds)
        return True

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.join()

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)


HEADINGS = ("method", "peer", "n", "rounds", "ours s", "peer s", "ratio", "ours MB", "peer MB", "ratio")


def show(*cells: object) -> None:
    """A line of the table; what comes after its columns as it is."""
    text = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
    columns = [f"{text[0]:<12}", f"{text[1]:<18}", *(f"{cell:>7}" for cell in text[2 : len(HEADINGS)])]
    print(" ".join([*columns, "", *text[len(HEADINGS) :]]).rstrip(), flush=True)


def compare(case: Case, n: int, rounds: int, limit: float, least: float) -> tuple[float, float]:
    """Print a cell's line; how many times faster ours is, and the peer's seconds (both at the least, where it took too long).

    Args:
        least: what the peer will take at the least.
    """
    with Side(case.ours, n, WIDTH) as mine:
        if least > limit:
            mine.run()
            ratio = least / mine.seconds
            show(
                case.method,
                case.peer,
                n,
                1,
                mine.seconds,
                f">{least:.3g}",
                f">{ratio:.3g}",
                round(mine.memory),
                "",
                "",
                "not run",
            )
            return ratio, least
        with Side(case.theirs, n, WIDTH) as peer:
            while len(peer.times) < rounds and sum(mine.times + peer.times) < ENOUGH:
                first, second = (mine, peer) if len(peer.times) % 2 == 0 else (peer, mine)
                if not (first.run(limit) and second.run(limit)):
                    ratio = limit / mine.seconds
                    late = (f">{limit:g}", f">{ratio:.3g}", round(mine.memory), "", "", "stopped")
                    show(case.method, case.peer, n, len(mine.times), mine.seconds, *late)
                    return ratio, limit
            ratio, memory = peer.seconds / mine.seconds, peer.memory / max(mine.memory, 1.0)
            cells = (len(peer.times), mine.seconds, peer.seconds, ratio, round(mine.memory), round(peer.memory), memory)
            show(case.method, case.peer, n, *cells, case.agree(mine.result, peer.result, Data.draw(n)))
            return ratio, peer.seconds


ALONE: dict[str, Callable[[Data], Thunk]] = {
    "tca": ours(embedding, TCA, components=K),
    "jda, head=ridge": ours(embedding, JDA, components=K, make_head=partial(Ridge, "classification", CLASSES)),
    "jda, head=knn": ours(embedding, JDA, components=K),
}


def alone(n: int, width: int) -> bool:
    """Ours without a peer; whether all stay within 8 GB."""
    within = True
    print(f"\nours alone, {n:,} x {width}, {K} components, 10 rounds of JDA")
    for name, make in ALONE.items():
        with Side(make, n, width) as side:
            side.run()
            memory = f"{side.memory / 1000:.2f} GB, {side.total / 1000:.2f} GB with data and program"
            print(f"{name:<16} {side.seconds:6.1f} s   {memory}", flush=True)
            within &= side.total < 8000
    return within


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="those of the table's first column")
    parser.add_argument("--peers", nargs="+", help="those of its second column")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1000, 3000, 10_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds of a peer's run")
    parser.add_argument("--alone", action="store_true", help="only ours at 100,000 x 512")
    arguments = parser.parse_args()
    missing = {case.package for case in CASES if find_spec(case.package) is None}
    installed = {"ot": "pot", "sklearn": "scikit-learn"}
    for package in sorted(missing):
        name = installed.get(package, package)
        print(f"{name} is not installed, and its rows are left out: pip install {name}")
    used = [c for c in CASES if c.package not in missing]
    used = [c for c in used if not arguments.methods or c.method in arguments.methods]
    used = [c for c in used if not arguments.peers or c.peer in arguments.peers]
    # imports once, shared by all processes
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", *sorted({c.package for c in used})])
    slower: dict[bool, list[str]] = {True: [], False: []}  # by whether the formulation differs
    tca: list[float] = []
    if not arguments.alone:
        show(*HEADINGS, "results")
    for case in [] if arguments.alone else used:
        least = 0.0
        for before, n in zip([arguments.sizes[0], *arguments.sizes], arguments.sizes, strict=False):
            try:
                ratio, seconds = compare(case, n, arguments.rounds, arguments.limit, least * (n / before) ** 2)
            except Failed as error:
                print(f"{case.method} / {case.peer} at {n}: {error}")
                break
            least = seconds if seconds >= 1 else 0.0
            if ratio < EQUAL:
                slower[bool(case.differs)].append(f"{case.method} / {case.peer} at {n} ({ratio:.2f})")
            if case.method.startswith("tca"):
                tca.append(ratio)
    if not arguments.alone:
        print("\nformulations that differ:")
        for case in used:
            if case.differs:
                print(f"  {case.method} / {case.peer}: {case.differs}")
        print(f"slower than a peer of the same formulation: {', '.join(slower[False]) or 'none'}")
        print(f"slower than a peer of another one: {', '.join(slower[True]) or 'none'}")
        if tca:
            print(f"tca: at least {min(tca):.1f} times faster than any peer")
    within = alone(100_000, 512) if arguments.alone or not arguments.methods else True
    raise SystemExit(0 if within and not slower[False] and min(tca, default=5.0) >= 5 else 1)


if __name__ == "__main__":
    main()
