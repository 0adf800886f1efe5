"""`transfer predict RUN_DIR FILES...` or `--dataset NAME`: what a finished run's model says of new samples."""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from transfer_cli.config.compose import data_root, load_run, resolve_components
from transfer_cli.errors import TransferError
from transfer_cli.registry import component

if TYPE_CHECKING:
    from transfer_cli.config.schema import Config
    from transfer_cli.data.inputs import Inputs, InputSpec


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="transfer predict", description=__doc__)
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("files", nargs="*", help="image files, or .npy files with features, a row a sample")
    parser.add_argument(
        "--dataset", nargs="+", metavar=("NAME", "KEY=VALUE"), help="a configured data set, with its keys"
    )
    parser.add_argument(
        "--format", choices=("csv", "jsonl"), default="csv", help="jsonl has the probability of every class"
    )
    parser.add_argument(
        "--level",
        type=_level,
        default=None,
        metavar="SHARE",
        help="regression: the share of values that an interval is to hold (default: 0.95, or a conformal run's own)",
    )
    parser.add_argument(
        "--risk",
        type=_risk,
        default=None,
        metavar="RISK",
        help="abstain where the probability of an error, or in regression half the width of the interval, is above this",
    )
    parser.add_argument(
        "--draws",
        type=int,
        default=0,
        metavar="N",
        help="method gp: as many functions drawn from its posterior, without noise, a column each",
    )
    parser.add_argument("--output", default=None, help="a file instead of standard output")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data-root", default=None)
    arguments = parser.parse_args(argv)
    if bool(arguments.files) == bool(arguments.dataset):
        parser.error("name files, or a data set with --dataset")
    if arguments.draws < 0:
        parser.error(f"--draws is a number of functions, not {arguments.draws}")

    folder, config = load_run(arguments.run)
    level = arguments.level
    if config.conformal != "none" and level not in (None, config.conformal_level):
        raise TransferError(
            f"--level {level}: this run's sets are conformal at {config.conformal_level:g}, and at no other level."
        )
    config.data_root = arguments.data_root or config.data_root

    import torch

    from transfer_cli.build import rebuild_model
    from transfer_cli.data.batching import in_order
    from transfer_cli.evaluation.evaluator import isolated
    from transfer_cli.loops.devices import choose_device

    device = choose_device(arguments.device)
    model, shape = rebuild_model(folder, config, resolve_components(config), device)
    model.eval()
    names, inputs = (
        _dataset(config, arguments.dataset, shape.input) if arguments.dataset else _files(arguments.files, shape.input)
    )

    with _opened(arguments.output) as stream:
        write = (
            _csv_writer(stream)
            if arguments.format == "csv"
            else lambda row: stream.write(json.dumps(_finite(row)) + "\n")
        )
        position = 0
        # A function is drawn at all inputs at once.
        batch_size = max(1, len(inputs)) if arguments.draws else arguments.batch_size
        with torch.inference_mode(), isolated(config.seed, device):  # methods that draw say the same again
            for x in in_order(inputs, batch_size, device, arguments.workers):
                prediction, drawn = model.predict(x), _drawn(model, x, arguments.draws)
                for i, row in enumerate(
                    _rows(prediction, shape.label_space.evaluated, arguments.format == "jsonl", level, arguments.risk)
                ):
                    write({"sample": names[position], **row, **{name: values[i] for name, values in drawn.items()}})
                    position += 1
    return 0


def _drawn(model: Any, x: Any, n: int) -> dict[str, list[float]]:
    """Columns of `n` functions, one an output."""
    if n == 0:
        return {}
    functions = getattr(model, "functions", None)
    if functions is None:
        raise TransferError("--draws: functions are not calibrated; take a run with calibration=none conformal=none.")
    return {
        f"draw{i}_{t}": [_rounded(float(v)) for v in column]
        for i, function in enumerate(functions(x, n).cpu())
        for t, column in enumerate(function.T)
    }


def _files(files: Sequence[str], spec: InputSpec) -> tuple[list[str], Inputs]:
    import numpy as np
    import torch

    from transfer_cli.data.inputs import ArrayInputs, ImageFiles

    if spec.kind == "image":
        for file in files:
            if not file.endswith((".npy", ".npz")):
                continue
            raise TransferError(
                f"{file}: this run was trained on images; name image files, or use --dataset arrays path=..."
            )
        return list(files), ImageFiles(list(files), channels=spec.shape[0], size=spec.shape[1])
    if spec.kind != "vector":
        raise TransferError(f"this run was trained on {spec}: use --dataset NAME.")
    names, rows = [], []
    for file in files:
        try:
            array = np.atleast_2d(np.load(file)).astype(np.float32)
        except (OSError, ValueError) as error:
            raise TransferError(f"{file}: not an array of features ({error}).") from error
        if array.shape[1:] != spec.shape:
            raise TransferError(f"{file}: {array.shape[1]} features a sample, this run was trained on {spec.shape[0]}.")
        names += [f"{file}:{i}" for i in range(len(array))]
        rows.append(torch.from_numpy(array))
    return names, ArrayInputs(torch.cat(rows))


def _dataset(config: Config, choice: Sequence[str], spec: InputSpec) -> tuple[list[str], Inputs]:
    """All samples of a configured data set, its test split alone where it has one."""
    from omegaconf import OmegaConf

    from transfer_cli.config.hydra_glue import composed
    from transfer_cli.data.domain import Place
    from transfer_cli.data.reconcile import as_samples

    name, *keys = choice
    wrong = [key for key in keys if "=" not in key]
    if wrong:
        raise TransferError(
            f"--dataset {name}: '{wrong[0]}' is not key=value; the run's folder comes before --dataset."
        )
    node = composed([f"target={name}", *(f"target.{key}" for key in keys)]).target
    chosen = component("dataset", OmegaConf.to_container(node, resolve=True), config.plugins)  # type: ignore[arg-type]
    domain = chosen.build(Place(data_root(config), config.download)).load()
    part = domain.test if domain.test is not None else domain.train
    return list(part.ids), as_samples(domain.name, part.inputs, spec)


def _risk(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must not be negative, not {text}")
    return value


def _level(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, not {text}")
    return value


def _rows(
    prediction: Any, classes: Sequence[str], every_class: bool, level: float | None, risk: float | None
) -> Iterator[dict[str, Any]]:
    """`abstains` with a `risk`; `set` of a conformal run, its classes from the most probable on."""
    from transfer_cli.evaluation.metrics import epistemic_share

    if prediction.log_probs is not None:
        members = None if prediction.members is None else prediction.members.cpu()
        shares = None if prediction.epistemic is None else epistemic_share(prediction)
        for i, probs in enumerate(prediction.probs.cpu()):
            best = int(probs.argmax())
            row: dict[str, Any] = {"class": classes[best], "probability": round(float(probs[best]), 6)}
            if shares is not None:
                row["epistemic_share"] = round(float(shares[i]), 6)
            if members is not None:
                inside = [classes[c] for c in probs.argsort(descending=True).tolist() if members[i, c]]
                row["set"] = inside if every_class else "|".join(inside)
            if risk is not None:
                row["abstains"] = bool(1 - probs[best] > risk)
            yield {**row, "probabilities": dict(zip(classes, probs.tolist(), strict=False))} if every_class else row
        return
    half = NormalDist().inv_cdf((1 + (level or 0.95)) / 2)  # in standard deviations
    columns = {"mean": prediction.mean.double().cpu(), "std": prediction.variance.double().sqrt().cpu()}
    if prediction.lower is not None:
        columns |= {"lower": prediction.lower.double().cpu(), "upper": prediction.upper.double().cpu()}
    else:
        columns["lower"] = columns["mean"] - half * columns["std"]
        columns["upper"] = columns["mean"] + half * columns["std"]
    abstains = None if risk is None else ((columns["upper"] - columns["lower"]) / 2 > risk).any(1).tolist()
    if prediction.epistemic is not None:
        columns["epistemic_share"] = epistemic_share(prediction)
    for i in range(len(columns["mean"])):
        row = {
            f"{name}_{t}": _rounded(float(value))
            for name, values in columns.items()
            for t, value in enumerate(values[i])
        }
        yield row if abstains is None else {**row, "abstains": abstains[i]}


def _rounded(value: float) -> float:
    """To as many digits as float32 has."""
    return float(f"{value:.7g}")


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: a bound that is none is null."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}


def _csv_writer(stream: Any) -> Any:
    writer: list[csv.DictWriter[str]] = []

    def write(row: dict[str, Any]) -> None:
        if not writer:
            writer.append(csv.DictWriter(stream, fieldnames=list(row), lineterminator="\n"))
            writer[0].writeheader()
        writer[0].writerow(row)

    return write


def _opened(path: str | None) -> Any:
    if path is None:
        return _standard_output()
    try:
        return open(path, "w")
    except OSError as error:
        raise TransferError(f"--output {path}: {error.strerror}.") from error


class _standard_output:
    """Standard output as a context that leaves it open."""

    def __enter__(self) -> Any:
        return sys.stdout

    def __exit__(self, *exception: object) -> None:
        sys.stdout.flush()
