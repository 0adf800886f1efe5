"""What holds for every method that trains by gradients. They are found by their YAML: a new one is tested without a word here."""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Outcome
from test_methods import context
from test_resume import assert_same, outcome_of
from torch import Tensor, nn

from transfer_cli import experiment
from transfer_cli.backbones.digits import SmallCNN
from transfer_cli.config.compose import resolve_components, typed
from transfer_cli.config.folders import names_in, packaged_folder
from transfer_cli.config.hydra_glue import composed
from transfer_cli.config.schema import Config
from transfer_cli.data.inputs import InputSpec
from transfer_cli.data.readers.synth_digits import SynthDigits
from transfer_cli.errors import TransferError
from transfer_cli.loops import gradient
from transfer_cli.loops.session import Session
from transfer_cli.methods.base import Method
from transfer_cli.methods.output import bnm, mcc
from transfer_cli.methods.phases import Batch, ClosedForm, Features, FeatureTask, Gradient, Labelled, Progress, Update
from transfer_cli.registry import component, keyword_schema, resolve

Transfer = Callable[..., Outcome]

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "transfer_cli" / "methods"


def node_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((packaged_folder() / "method" / f"{name}.yaml").read_text())


METHODS: dict[str, type[Method]] = {
    name: resolve(node_of(name)["implementation"]) for name in names_in("method", [packaged_folder()])
}
TRAINED = {name: kind for name, kind in METHODS.items() if not kind.frozen_backbone}
every_method = pytest.mark.parametrize("name", TRAINED)

STEPS = 8  # of each phase
# Small parts, so that a pass over one, and with it a refresh, ends within a phase.
SMALLEST = [
    "experiment=smoke", "device=cpu", "threads=1", "source.n=640", "source.n_test=100", "subset.source=200",
    "subset.target=150", "subset.test=60", "backbone.widths=[4,8]", "backbone.features=16", f"trainer.steps={STEPS}",
    "trainer.batch_size=32", "trainer.eval_every=6", "trainer.log_every=2", "trainer.checkpoint_every=100",
]  # fmt: skip


def overrides(name: str) -> list[str]:
    """The smallest run of a method: its needs, and its own numbers of steps made small."""
    kind, chosen = TRAINED[name], [f"method={name}"]
    if kind.needs.target_labels:
        chosen.append("target_labels=3")
    if "closed" not in kind.label_spaces:
        chosen.append(f"label_space={kind.label_spaces[0]}")
    if kind.representation_only:
        chosen.append("then=linear_probe")
    for key, (_, default) in keyword_schema(kind).items():
        if key.endswith("_steps") and isinstance(default, int) and default > 2 * STEPS:
            chosen.append(f"method.{key}={STEPS}")
    return chosen


def config_of(name: str, *more: str) -> Config:
    return typed(composed([*SMALLEST, *overrides(name), *more]))


def trainer(config: Config, **changes: Any) -> Config:
    return replace(config, trainer=replace(config.trainer, **changes))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, rendered_once: None, tmp_path: Path) -> None:
    """In a folder of the test's own; no figure is drawn."""
    monkeypatch.setattr(experiment, "draw_figures", lambda folder: None)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def open_pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """Where the method wants classes that are the target's alone, the source lacks three digits."""
    if "closed" in TRAINED[request.node.callspec.params["name"]].label_spaces:
        return
    load = SynthDigits.load

    def fewer(self: SynthDigits) -> Any:
        domain = load(self)
        parts = [part.take((part.labels < 7).nonzero()[:, 0]) for part in (domain.train, domain.test)]
        return replace(domain, classes=domain.classes[:7], train=parts[0], test=parts[1])

    monkeypatch.setattr(SynthDigits, "load", fewer)


runs = [every_method, pytest.mark.usefixtures("open_pair")]


def every_run(test: Any) -> Any:
    for mark in runs:
        test = mark(test)
    return test


def assert_finite(run: Path) -> dict[str, Any]:
    """All that a run wrote down is a number; its result."""
    result = json.loads((run / "result.json").read_text())
    for split, figures in result["metrics"].items():
        for name, value in (figures or {}).items():
            assert math.isfinite(value), (split, name)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        for name, value in event["values"].items():
            assert math.isfinite(value), event | {"name": name}
    return result


def stops(monkeypatch: pytest.MonkeyPatch, phase: int, step: int) -> Any:
    """A context in which a signal comes with the batch of one step of one phase."""
    patch, original, run = monkeypatch.context(), gradient.batches_of, gradient.run_gradient
    index: list[int] = []

    def run_gradient(spec: Gradient, session: Session, place: Any) -> None:
        index[:] = [place.index]
        run(spec, session, place)

    def batches(spec: Gradient, session: Session, start: int) -> Iterator[Batch]:
        with closing(original(spec, session, start)) as drawn:
            for at, batch in enumerate(drawn, start):
                if (index[0], at) == (phase, step):
                    signal.raise_signal(signal.SIGTERM)
                yield batch

    with_patch = patch.__enter__()
    with_patch.setattr(gradient, "run_gradient", run_gradient)
    with_patch.setattr(gradient, "batches_of", batches)
    return patch


# --- runs -----------------------------------------------------------------------------------------


@every_run
def test_runs_and_goes_on_bit_identically_from_the_middle_of_every_phase(
    monkeypatch: pytest.MonkeyPatch, name: str, transfer: Transfer
) -> None:
    whole = transfer("run", *SMALLEST, *overrides(name))
    assert whole.code == 0, whole.err
    result, expected = assert_finite(whole.run), outcome_of(whole.run)
    config = replace(config_of(name), force=False)
    phases = gradient_phases(whole.run, config)
    assert phases, "a method on features alone says so: frozen_backbone"
    assert result["steps"] == sum(steps for _, steps in phases)
    moments = [(index, at) for index, steps in phases[:-1] for at in (steps // 2 - 1, steps - 1)]
    index, steps = phases[-1]
    moments += [(index, 2), (index, steps - 2)]
    for i, moment in enumerate(moments):
        patch = stops(monkeypatch, *moment)
        with pytest.raises(SystemExit) as stopped:
            experiment.run(replace(config, force=i == 0))
        patch.__exit__(None, None, None)
        assert stopped.value.code == 143, moment
    experiment.run(config)
    assert_same(whole.run, expected)
    again = transfer("evaluate", str(whole.run))
    assert again.code == 0 and "result.json agrees" in again.out, again.out + again.err


def gradient_phases(run: Path, config: Config) -> list[tuple[int, int]]:
    """Index and number of steps of each, as a finished run's method has them."""
    from transfer_cli.build import rebuild_model
    from transfer_cli.run_folder import RunFolder

    method, _ = rebuild_model(RunFolder(run), config, resolve_components(config), torch.device("cpu"))
    return [
        (index, phase.steps or config.trainer.steps)
        for index, phase in enumerate(method.phases())
        if isinstance(phase, Gradient)
    ]


@every_run
@pytest.mark.parametrize("precision", ["bf16", "16"])
def test_half_precision(name: str, precision: str) -> None:
    folder = experiment.run(trainer(config_of(name), precision=precision))
    assert_finite(folder.path)


@every_run
@pytest.mark.parametrize("domain_batches", ["joint", "domain_specific"])
def test_ways_of_batchnorm(name: str, domain_batches: str) -> None:
    config = trainer(config_of(name), domain_batches=domain_batches)
    try:
        folder = experiment.run(config)
    except TransferError as refused:
        assert domain_batches == "domain_specific" and "trainer.domain_batches" in str(refused)
        return
    assert_finite(folder.path)


@every_run
def test_an_average_of_weights_pairs_them_rightly(name: str) -> None:
    """With hardly any memory it is the weights themselves; state that appears on the way must not shift the rest."""
    folder = experiment.run(trainer(config_of(name), ema=1e-9, steps=3))
    parts = torch.load(folder.checkpoints / "last.pt", weights_only=True)["parts"]
    average = {key.removeprefix("module."): value for key, value in parts["average"].items()}
    average.pop("n_averaged")
    assert set(average) == set(parts["method"])
    for key, value in parts["method"].items():
        torch.testing.assert_close(average[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@every_run
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu(name: str) -> None:
    config = replace(config_of(name), device="cuda")
    results = []
    for precision in ("32", "bf16", "16"):
        results.append(assert_finite(experiment.run(trainer(config, precision=precision)).path))
    assert all(result["device"].startswith("cuda") for result in results)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, on tracing inputs with gradients
@every_run
def test_compiled(name: str) -> None:
    torch._dynamo.reset()  # after some networks of one shape it would compile no more
    plain = experiment.run(config_of(name))
    folder = experiment.run(trainer(config_of(name), compile=True))
    assert_finite(folder.path)
    assert folder.path != plain.path
    first = [json.loads((f.path / "metrics.jsonl").read_text().splitlines()[0]) for f in (plain, folder)]
    for term, value in first[0]["values"].items():
        assert first[1]["values"][term] == pytest.approx(value, rel=0.05, abs=0.05), term


# --- objectives on batches of any shape -----------------------------------------------------------

CLASSES = 4
SPEC = InputSpec("image", (1, 16, 16))
Case = tuple[Sequence[int], int, Sequence[int]]
CASES: dict[str, Case] = {  # source labels, number of target inputs, granted labels
    "classes absent, fewer in the target": ([1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1], 7, [3, 3, 0, 1, 3]),
    "fewer in the source": ([3, 0, 3, 3, 3], 12, [0, 0]),
    "a tiny batch of one class": ([2, 2], 2, [2, 2]),
}


def built(name: str, **changes: Any) -> Method:
    """The method on a tiny network."""
    torch.manual_seed(0)
    kind = TRAINED[name]
    settings = {
        "classes": CLASSES,
        "has_target_labels": kind.needs.target_labels,
        "label_space": kind.label_spaces[0],
        "input": SPEC,
        "make_backbone": lambda: SmallCNN(SPEC, widths=(4, 8), features=16),
        **changes,
    }
    given = context(SmallCNN(SPEC, widths=(4, 8), features=16), **settings)
    return component("method", node_of(name)).build(given)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, *SPEC.shape, generator=torch.Generator().manual_seed(seed))


def batch_for(phase: Gradient, case: Case, granted: bool, device: str = "cpu") -> Batch:
    """What the loop would give the phase of such a batch."""
    source_y, n_target, granted_y = case
    sizes = {"source": len(source_y), "target": n_target, "target_labelled": len(granted_y)}
    views = {
        part: [images(n, seed=10 * i + v).to(device) for v in range(len(phase.views.get(part, ["weak"])))]
        for i, (part, n) in enumerate(sizes.items())
        if part in phase.parts and (part != "target_labelled" or granted)
    }
    labels = {
        "source": torch.tensor(source_y, device=device),
        "target_labelled": torch.tensor(granted_y, device=device),
    }
    labelled = {part: Labelled(views[part][0], labels[part]) for part in labels if part in views}
    target = views["target"][0] if "target" in views else None
    several = {part: found for part, found in views.items() if len(found) > 1}
    return Batch(labelled.get("source"), target, labelled.get("target_labelled"), several)


def feature_task(method: Method, parts: Sequence[str], device: str = "cpu") -> FeatureTask:
    method.eval()
    found: dict[str, Features | None] = {}
    for i, part in enumerate(("source", "target", "target_labelled")):
        x = method.features(images(24, seed=100 + i).to(device)).double().detach() if part in parts else None
        y = torch.arange(24, device=device) % CLASSES
        found[part] = None if x is None else Features(x, None if part == "target" else y)
    method.train()
    return FeatureTask(**found)


def step(method: Method, update: Update, batch: Batch, first: bool) -> dict[str, Tensor]:
    """The loop's step but for the optimiser: the terms."""
    progress = Progress(5, 10)
    if not update.moves:
        with torch.no_grad():
            return {**update.objective(batch, progress).terms}
    losses = update.objective(batch, progress)
    terms = dict(losses.terms)
    for figure in losses.diagnostics.values():
        assert figure.ndim == 0 and not figure.requires_grad
    if first and batch.target_labelled is not None and not method.handles_target_labels:
        terms["target_supervised"] = method.supervised_loss(batch.target_labelled.x, batch.target_labelled.y)
    method.zero_grad(set_to_none=True)
    total = torch.stack([term.float() for term in terms.values()]).sum()
    total.backward()
    return terms


def started(method: Method) -> Iterator[Gradient]:
    """The gradient phases in order, each when it may begin; closed forms between them are fitted."""
    for phase in method.phases():
        if isinstance(phase, ClosedForm):
            phase.fit(feature_task(method, phase.parts))
            continue
        if phase.on_start is not None:
            phase.on_start()
        if phase.refresh is not None:
            phase.refresh.fit(feature_task(method, phase.refresh.parts))
        method.train()
        yield phase


@pytest.mark.parametrize("case", CASES)
@every_method
def test_losses_and_gradients_are_finite_whatever_the_batch(name: str, case: str) -> None:
    method = built(name)
    for granted in {method.needs.target_labels, True}:
        for phase in started(method):
            batch = batch_for(phase, CASES[case], granted)
            for i, update in enumerate(phase.updates):
                terms = step(method, update, batch, first=i == 0)
                for term, value in terms.items():
                    assert value.ndim == 0 and math.isfinite(float(value.detach())), (phase.name, term)
                for parameter in (p for move in update.moves for p in move.parameters):
                    assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all()), (phase.name, i)
            if phase.after_step is not None:
                phase.after_step(Progress(5, 10))


@every_method
def test_every_parameter_that_moves_is_reached_and_no_other_trains_unmoved(name: str) -> None:
    """Of each phase: an update's parameters get a gradient, and none of them is frozen or doubled."""
    method = built(name)
    for phase in started(method):
        batch = batch_for(phase, ([0, 1, 2, 3] * 4, 16, [0, 1, 2, 3] * 2), method.needs.target_labels)
        for i, update in enumerate(phase.updates):
            moved = [p for move in update.moves for p in move.parameters]
            assert len(moved) == len({id(p) for p in moved})
            assert all(p.requires_grad for p in moved)
            assert {id(p) for p in moved} <= {id(p) for p in method.parameters()}, "or no checkpoint keeps it"
            step(method, update, batch, first=i == 0)
            if moved:
                assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in moved), (phase.name, i)


@every_method
def test_training_changes_no_plain_attribute(name: str) -> None:
    """A checkpoint keeps parameters and buffers alone; what a Python attribute holds would be lost with the process."""
    method = built(name)
    method.train()
    before: dict[str, Any] = {}
    for phase in started(method):
        before = before or plain(method)
        for i, update in enumerate(phase.updates):
            step(
                method,
                update,
                batch_for(phase, ([0, 1, 2, 3] * 2, 8, [0, 1, 2, 3]), method.needs.target_labels),
                i == 0,
            )
        if phase.after_step is not None:
            phase.after_step(Progress(5, 10))
        if phase.refresh is not None:
            phase.refresh.fit(feature_task(method, phase.refresh.parts))
    assert plain(method) == before


def plain(method: Method) -> dict[str, Any]:
    """The attributes of all modules that are neither modules, parameters nor buffers."""
    internal = set(vars(nn.Module())) | {"domain"}  # DomainBatchNorm's, which each forward sets
    return {
        f"{path}.{key}": repr(value) if not isinstance(value, Tensor) else value.tolist()
        for path, module in method.named_modules()
        for key, value in vars(module).items()
        if key not in internal and not isinstance(value, nn.Module)
    }


# torch's own cumulative average reads the number of batches on the host; the phase that has it is short and trains nothing.
WAITS_BY_TORCH = {"adabn", "swag"}


@every_method
def test_objectives_keep_to_their_device_and_never_wait_for_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device `meta`, which has no values: to read one (`.item()`, `if tensor`, a boolean index) is an error, as is a
    tensor made on another device."""
    real = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, *a, **k: real("cpu" if device == "meta" else device, *a, **k))
    method = built(name)
    list(started(method))
    method.to("meta")
    method.train()
    for phase in method.phases():
        if not isinstance(phase, Gradient):
            continue
        for i, update in enumerate(phase.updates):
            if name in WAITS_BY_TORCH and not update.moves:
                continue
            batch = batch_for(phase, ([0, 1, 2, 3] * 3, 8, [0, 1, 2, 3]), method.needs.target_labels, "meta")
            terms = step(method, update, batch, first=i == 0)
            assert all(term.device.type == "meta" for term in terms.values())
        if phase.after_step is not None:
            phase.after_step(Progress(5, 10))


# --- sources --------------------------------------------------------------------------------------

# Names that a method has no business with: devices, loaders, checkpoints, seeds, the screen.
FOREIGN = {
    "DataLoader", "tqdm", "print", "open", "manual_seed", "seed_all", "cuda", "set_device", "synchronize", "empty_cache",
    "torch.save", "torch.load", "time", "logging", "torch.optim",
}  # fmt: skip
# Reads on the host. Heads, closed forms and what they are made of solve once, on values that the host must see.
READS = {"item", "tolist", "cpu", "numpy", "from_numpy"}
SOLVERS = (
    "heads/",
    "math/",
    "subspace/",
    "moments/",
    "bayes/",
    "gaussian_process/",
    "transport/",
    "weighting/",
    "finetuning/linear_probe.py",
)
SOLVERS += ("preprocessing.py", "feature_method.py")
OWN_GENERATOR = "torch.Generator().manual_seed"  # of a fixed seed, for a closed form's own draws
YEAR, WITHOUT_A_PAPER = r"\b(19|20)\d\d\b", {"source_only"}


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCES)))
def test_a_method_touches_no_device_loader_checkpoint_or_bar(path: Path) -> None:
    where, found = str(path.relative_to(SOURCES)), []
    tree = ast.parse(path.read_text())
    imported = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    for node in imported:
        module = getattr(node, "module", None) or node.names[0].name
        for forbidden in (
            "transfer_cli.loops",
            "transfer_cli.data.readers",
            "transfer_cli.report",
            "tqdm",
            "logging",
            "torch.utils.data",
        ):
            if module.startswith(forbidden):
                found.append(f"line {node.lineno}: imports {module}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in FOREIGN:
            found.append(f"line {node.lineno}: {node.id}")
        if isinstance(node, ast.Attribute) and ast.unparse(node) != OWN_GENERATOR:
            if node.attr in FOREIGN or f"{ast.unparse(node.value)}.{node.attr}" in FOREIGN:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
            if node.attr in READS and not where.startswith(SOLVERS):
                found.append(f"line {node.lineno}: {ast.unparse(node)} waits for the device")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"cuda(:\d+)?", node.value):
            found.append(f"line {node.lineno}: {node.value!r}")
    assert not found


@every_method
def test_the_yaml_says_the_constructors_defaults(name: str) -> None:
    text = (packaged_folder() / "method" / f"{name}.yaml").read_text()
    node, first = yaml.safe_load(text), text.splitlines()[0]
    kind = TRAINED[name]
    assert first.startswith("# ")
    assert re.search(YEAR, first) or name in WITHOUT_A_PAPER, "what it is, by whom, and when"
    assert node["name"] == name
    schema = keyword_schema(kind)
    own = {key: value for key, value in node.items() if key not in ("name", "implementation", "search")}
    assert set(own) == set(schema)
    assert set(node.get("search", {})) <= set(own)
    if sum(other is kind for other in METHODS.values()) == 1:  # not a variant of another by its values
        for key, (_, default) in schema.items():
            assert own[key] == (list(default) if isinstance(default, tuple) else default), key


@every_method
def test_every_method_has_a_row_in_the_docs_and_a_citation_in_its_file(name: str) -> None:
    rows = re.findall(rf"^\| `{name}` \|.*\|$", (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE)
    assert len(rows) == 1, "one row"
    documentation = inspect.getmodule(TRAINED[name]).__doc__
    assert documentation and (re.search(YEAR, documentation) or name in WITHOUT_A_PAPER)


def test_method_files_are_short() -> None:
    """Without their docstrings, half of them below 80 lines."""
    lengths = {}
    for kind in set(TRAINED.values()):
        module = inspect.getmodule(kind)
        assert module is not None and module.__file__ is not None
        path = Path(module.__file__)
        text = path.read_text()
        doc = ast.parse(text).body[0]
        lengths[path.name] = len(text.splitlines()) - (doc.end_lineno or 0)
    listed = ", ".join(f"{name} {n}" for name, n in sorted(lengths.items(), key=lambda item: -item[1]))
    assert statistics.median(lengths.values()) < 80, listed


# --- what a term teaches --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "term", "through"),
    [
        ("dann", "domain", "source target"), ("cdan", "domain", "source target"), ("cdan_e", "domain", "source target head"),
        ("mdd", "disparity", "source target"), ("mcd", "features_discrepancy", "target head"),
        ("wdgrl", "wasserstein", "source target"), ("vada", "domain", "source target"),
        ("vada", "source_smoothness", "head"), ("vada", "target_smoothness", "head"), ("vada", "target_entropy", "target head"),
        ("dan", "mmd", "source target"), ("jan", "joint_mmd", "source target head"), ("cmd", "cmd", "source target"),
        ("deep_coral", "coral", "source target head"), ("dsan", "local_mmd", "source target"),
        ("deepjdot", "transport", "source target"), ("deepjdot", "label_transport", "target head"),
        ("mcc", "confusion", "target head"), ("bnm", "nuclear", "target head"), ("afn", "norm", "source target"),
        ("entropy_min", "entropy", "target head"), ("pseudo_label", "pseudo_label", "target head"),
    ],
)  # fmt: skip
def test_a_term_s_gradient_goes_through_all_that_it_reads(name: str, term: str, through: str) -> None:
    """Values alone would not show a part that is held fixed by mistake; and nothing else is reached."""
    torch.manual_seed(0)
    least = {"threshold": 0.0} if name == "pseudo_label" else {}
    method = TRAINED[name](context(classes=3), **parameters_of(name), **least).train()
    draw = torch.Generator().manual_seed(1)
    x_s, x_t = (torch.randn(n, 2, generator=draw).requires_grad_() for n in (12, 9))
    batch = Batch(Labelled(x_s, torch.arange(12) % 3), x_t, None)
    (phase,) = method.phases()
    assert isinstance(phase, Gradient)
    losses = (update.objective(batch, Progress(50, 100)).terms for update in phase.updates)
    loss = next(terms[term] for terms in losses if term in terms)
    reads = {"source": x_s, "target": x_t, "head": next(method.network.head.parameters())}  # type: ignore[union-attr]
    slopes = torch.autograd.grad(loss, list(reads.values()), allow_unused=True)
    reached = {key for key, slope in zip(reads, slopes, strict=True) if slope is not None and bool(slope.any())}
    assert set(through.split()) <= reached
    if "head" not in through and name != "mdd":
        assert "head" not in reached


def parameters_of(name: str) -> dict[str, Any]:
    """What the YAML sets beside the constructor's own defaults."""
    defaults = {key: default for key, (_, default) in keyword_schema(TRAINED[name]).items()}
    return {k: v for k, v in node_of(name).items() if k in defaults and v != defaults[k]}


@pytest.mark.parametrize("name", ["bnm", "mcc"])
def test_predictions_beyond_numbers_are_a_loss_that_is_not_finite_and_no_error(name: str) -> None:
    """So that the loop can name step and term; and certainty beyond float32's range is no such case."""
    function = {"bnm": bnm.nuclear_norm, "mcc": lambda logits: mcc.class_confusion(logits, 1.0)}[name]
    assert torch.isnan(function(torch.full((4, 3), torch.nan)))
    logits = torch.tensor([[0.0, 500.0, -500.0], [0.0, 400.0, -500.0]], requires_grad=True)
    loss = function(logits)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
