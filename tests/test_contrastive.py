"""Contrastive first phases: the losses against loops and cross-entropy, what they learn, and chains of two methods."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, Outcome
from test_methods import MIDDLE, context, gradients
from test_resume import assert_same, outcome_of, stop_at
from torch import Tensor, nn

from transfer_cli.backbones.vectors import MLP
from transfer_cli.data.inputs import InputSpec
from transfer_cli.methods.adversarial.dann import DANN
from transfer_cli.methods.base import Method
from transfer_cli.methods.chain import Chain
from transfer_cli.methods.contrastive.info_nce import info_nce, nt_xent
from transfer_cli.methods.contrastive.simclr import SimCLR
from transfer_cli.methods.contrastive.supcon import SupCon
from transfer_cli.methods.finetuning.finetune import FineTune
from transfer_cli.methods.finetuning.linear_probe import LinearProbe
from transfer_cli.methods.phases import Batch, Gradient, Labelled, Progress

Transfer = Callable[..., Outcome]

# --- the losses -----------------------------------------------------------------------------------


def by_loops(z: Tensor, classes: Tensor, temperature: float) -> float:
    """Equation 2 of Khosla et al., sample by sample."""
    z = z / z.norm(dim=1, keepdim=True)
    terms = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        total = sum(math.exp(float(z[i] @ z[a]) / temperature) for a in others)
        positive = [p for p in others if classes[p] == classes[i]]
        if positive:
            logs = [float(z[i] @ z[p]) / temperature - math.log(total) for p in positive]
            terms.append(-sum(logs) / len(logs))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_supervised_loss_is_the_papers(temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(11, 4, generator=draw, dtype=torch.float64)
    classes = torch.tensor([0, 0, 1, 2, 2, 2, 0, 3, 1, 2, 4])  # 3 and 4 occur once: no anchors, yet negatives
    assert float(info_nce(z, classes, temperature)) == pytest.approx(by_loops(z, classes, temperature), rel=1e-10)
    assert float(info_nce(5 * z, classes, temperature)) == pytest.approx(by_loops(z, classes, temperature))
    few = info_nce(z[:6], classes[:6], temperature)
    assert float(few) != pytest.approx(float(info_nce(z[:6], torch.zeros(6), temperature)))


def test_nt_xent_is_a_cross_entropy_over_all_other_views() -> None:
    draw = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 7, 5, generator=draw, dtype=torch.float64)
    z = F.normalize(torch.cat([first, second]), dim=1)
    logits = z @ z.T / 0.5
    logits.fill_diagonal_(-math.inf)
    partner = torch.cat([torch.arange(7, 14), torch.arange(7)])
    torch.testing.assert_close(nt_xent(torch.cat([first, second]), 0.5), F.cross_entropy(logits, partner))


def test_gradients_of_the_loss() -> None:
    z = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    classes = torch.tensor([0, 1, 0, 2, 1, 0])
    assert torch.autograd.gradcheck(lambda z: info_nce(z, classes, 0.3), z)


def test_no_positive_at_all_costs_nothing() -> None:
    z = torch.randn(4, 3, requires_grad=True)
    loss = info_nce(z, torch.arange(4), 0.1)
    loss.backward()
    assert float(loss.detach()) == 0.0 and z.grad is not None and float(z.grad.abs().max()) == 0.0


def test_half_precision_does_not_reach_the_similarities() -> None:
    z = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = nt_xent(z, 0.05)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(by_loops(z.double(), torch.arange(4).repeat(2), 0.05), rel=1e-5)


# --- the methods ----------------------------------------------------------------------------------


def views_of(n_source: int = 6, n_target: int = 5, granted: int = 0, seed: int = 0, classes: int = 2) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    sizes = {"source": n_source, "target": n_target, "target_labelled": granted}
    views = {part: [torch.randn(n, 2, generator=draw) for _ in "ab"] for part, n in sizes.items() if n}
    labels = {part: torch.randint(classes, (n,), generator=draw) for part, n in sizes.items()}
    labelled = {p: Labelled(views[p][0], labels[p]) if p in views else None for p in ("source", "target_labelled")}
    return Batch(labelled["source"], views["target"][0], labelled["target_labelled"], views)


def test_simclr_contrasts_all_views_of_both_domains() -> None:
    method, batch = SimCLR(context(), temperature=0.3, dim=4), views_of()
    losses = method.losses(batch, MIDDLE)
    first, second = (torch.cat([batch.views[part][i] for part in ("source", "target")]) for i in (0, 1))
    z = method.projection(method.network.features(torch.cat([first, second])))
    assert z.shape == (22, 4) and list(losses.terms) == ["nt_xent"]
    wanted = by_loops(z.detach().double(), torch.arange(11).repeat(2), 0.3)
    assert float(losses.terms["nt_xent"].detach()) == pytest.approx(wanted, rel=1e-5)


def test_simclr_needs_no_source() -> None:
    method = SimCLR(context(has_source=False), temperature=0.3)
    batch = views_of()
    batch = Batch(None, batch.target, None, {"target": batch.views["target"]})
    z = method.projection(method.network.features(torch.cat([*batch.views["target"]])))
    torch.testing.assert_close(method.losses(batch, MIDDLE).terms["nt_xent"], nt_xent(z, 0.3))


def test_supcon_draws_classes_together_across_domains_and_target_views_of_one_sample() -> None:
    method, batch = SupCon(context(), weight=0.7, temperature=0.2), views_of(granted=3)
    losses = method.losses(batch, MIDDLE)
    assert batch.source is not None and batch.target_labelled is not None

    def project(*parts: str) -> Tensor:
        x = torch.cat([view for part in parts for view in batch.views[part]])
        return method.projection(method.network.features(x)).detach().double()

    classes = torch.cat([batch.source.y, batch.source.y, batch.target_labelled.y, batch.target_labelled.y])
    wanted = by_loops(project("source", "target_labelled"), classes, 0.2)
    assert float(losses.terms["supcon"].detach()) == pytest.approx(wanted, rel=1e-5)
    wanted = 0.7 * by_loops(project("target"), torch.arange(5).repeat(2), 0.2)
    assert float(losses.terms["nt_xent"].detach()) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("method_class", [SimCLR, SupCon])
def test_what_a_contrastive_phase_moves_and_asks_for(method_class: Any) -> None:
    method = method_class(context(bottleneck=3), steps=17, hidden=6)
    (phase,) = method.phases()
    assert phase.steps == 17 and not phase.predicts
    assert all(views == ("strong", "strong") for views in phase.views.values()) and {"source", "target"} <= {
        *phase.views
    }
    assert set(phase.parts) == set(phase.views), "no part is loaded without its views"
    (moves,) = phase.updates[0].moves
    head = set(method.network.head.parameters())
    assert set(moves.parameters) == set(method.parameters()) - head
    losses = method.losses(views_of(), MIDDLE)
    found = gradients(sum(losses.terms.values()), list(moves.parameters))  # each is reached
    assert all(bool(g.isfinite().all()) for g in found)


@pytest.mark.parametrize("domain_batches", ["joint", "separate", "domain_specific"])
def test_unequal_domains_and_classes_that_occur_once(domain_batches: str) -> None:
    for method_class in (SimCLR, SupCon):
        method = method_class(context(bottleneck=4, classes=5, domain_batches=domain_batches))
        batch = views_of(2, 9, granted=2, classes=5)
        assert batch.source is not None and batch.target_labelled is not None
        apart = replace(batch.source, y=torch.tensor([0, 3])), replace(batch.target_labelled, y=torch.tensor([1, 4]))
        losses = method.losses(replace(batch, source=apart[0], target_labelled=apart[1]), MIDDLE)
        total = sum(losses.terms.values())
        moved = list(method.phases()[0].updates[0].moves[0].parameters)
        assert bool(total.isfinite()) and all(bool(g.isfinite().all()) for g in gradients(total, moved))


def test_the_projection_is_as_wide_as_the_features_unless_said() -> None:
    for hidden, width in ((None, 3), (6, 6)):
        layers = [m for m in SimCLR(context(bottleneck=3), hidden=hidden).projection if isinstance(m, nn.Linear)]
        assert [(m.in_features, m.out_features) for m in layers] == [(3, width), (width, 128)]


def test_wrong_values_are_refused() -> None:
    for method_class in (SimCLR, SupCon):
        with pytest.raises(ValueError, match="temperature must be positive"):
            method_class(context(), temperature=0.0)


# --- what is learnt -------------------------------------------------------------------------------

CLASSES, NUISANCES, N = 2, 6, 128


def noisy(n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """One quiet coordinate tells the class; loud ones tell nothing, and a view draws them anew."""
    y = torch.arange(n) % CLASSES
    return torch.cat([(2 * y - 1)[:, None] + 0.3 * torch.randn(n, 1, generator=draw), loud(n, draw)], 1), y


def loud(n: int, draw: torch.Generator) -> Tensor:
    return 3 * torch.randn(n, NUISANCES, generator=draw)


def probed(method: SimCLR | SupCon, steps: int, views: str = "nuisance", labels: str = "true") -> float:
    """Nearest-neighbour accuracy on target features after the phase, from the source's."""
    draw = torch.Generator().manual_seed(0)
    (phase,) = method.phases()
    optimizer = torch.optim.Adam(list(phase.updates[0].moves[0].parameters), lr=0.01)
    (xs, ys), (xt, _) = noisy(N, draw), noisy(N, draw)
    method.train()
    for step in range(steps):
        seen = {}
        for part, x in (("source", xs), ("target", xt)):
            seen[part] = [x] * 2 if views == "none" else [torch.cat([x[:, :1], loud(N, draw)], 1) for _ in "ab"]
            if views == "of others":
                seen[part] = [seen[part][0], seen[part][1][torch.randperm(N, generator=draw)]]
        y = ys if labels == "true" else ys[torch.randperm(N, generator=draw)]
        losses = method.losses(Batch(Labelled(seen["source"][0], y), xt, None, seen), Progress(step, steps))
        optimizer.zero_grad()
        sum(losses.terms.values()).backward()
        optimizer.step()
    method.eval()
    test, labels_of_test = noisy(200, draw)
    with torch.no_grad():
        near = torch.cdist(method.features(test), method.features(xs)).argmin(1)
    return float((ys[near] == labels_of_test).float().mean())


def on_noise(method_class: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return method_class(context(MLP(InputSpec("vector", (1 + NUISANCES,)), hidden=(32,))), hidden=32, dim=8, **options)


def test_simclr_keeps_what_the_views_share() -> None:
    assert probed(on_noise(SimCLR), 100) > 0.95
    assert probed(on_noise(SimCLR), 0) < 0.7
    assert probed(on_noise(SimCLR), 100, views="of others") < 0.7, "pairs that are none"
    assert probed(on_noise(SimCLR), 100, views="none") < 0.85, "views that share all"


def test_supcon_keeps_what_tells_the_classes() -> None:
    assert probed(on_noise(SupCon, weight=0.0), 100, views="none") > 0.85
    assert probed(on_noise(SupCon, weight=0.0), 100, views="none", labels="drawn") < 0.7


# --- one method after another ---------------------------------------------------------------------


def test_a_chains_phases_keep_their_owners_and_only_the_second_predicts() -> None:
    shared = context()
    first, second = SimCLR(shared), DANN(shared)
    chain = Chain(first, second)
    phases = chain.phases()
    assert [(p.name, p.owner, p.predicts) for p in phases] == [("contrast", first, False), ("adapt", second, True)]
    x = torch.randn(5, 2)
    chain.eval()
    torch.testing.assert_close(chain.features(x), second.features(x))
    for name in ("predict", "predict_source"):
        torch.testing.assert_close(getattr(chain, name)(x).probs, getattr(second, name)(x).probs)
    two = Chain(FineTune(shared, source_steps=3), LinearProbe(shared)).phases()
    assert [p.predicts for p in two] == [False] * (len(two) - 1) + [True], "nor does a first one that could"


def test_a_chain_shares_the_backbone_and_nothing_else() -> None:
    shared = context(bottleneck=3)
    chain = Chain(SimCLR(shared), DANN(shared))
    assert chain.first.network.backbone is chain.second.network.backbone
    others = [set(m.parameters()) - set(shared.backbone.parameters()) for m in (chain.first, chain.second)]
    assert others[0] and others[1] and not others[0] & others[1]
    with torch.no_grad():
        for p in chain.first.parameters():
            p.add_(1.0)
    fresh = Chain(*(type(m)(context(bottleneck=3)) for m in (chain.first, chain.second)))
    fresh.load_state_dict(chain.state_dict())
    x = torch.randn(4, 2)
    torch.testing.assert_close(fresh.eval().predict(x).probs, chain.eval().predict(x).probs)


TEN = [
    *SMALL, "subset.source=300", "subset.target=200", "backbone.widths=[4,8]",
    "backbone.features=16", "trainer.batch_size=32", "trainer.steps=10", "trainer.eval_every=10", "trainer.log_every=5",
    "trainer.checkpoint_every=10",
]  # fmt: skip


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfer_cli.experiment.draw_figures", lambda folder: None)


CHAINS = {
    "linear_probe": [],
    "coral": [],
    "finetune": ["target_labels=5"],
    "dann": ["target_labels=3"],
}


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("then", CHAINS)
def test_simclr_and_then(transfer: Transfer, tmp_path: Path, then: str) -> None:
    done = transfer("run", *TEN, "method=simclr", f"then={then}", *CHAINS[then])
    assert done.code == 0, done.err
    assert done.run.name.startswith(f"simclr+{then}-seed0-")
    result = json.loads((done.run / "result.json").read_text())
    assert result["method"] == f"simclr+{then}" and math.isfinite(result["metrics"]["target_test"]["nll"])
    found = events(done.run)
    contrast = [e for e in found if e["phase"] == "contrast"]
    assert {e["split"] for e in contrast} == {"train", "diagnostics"}, "nothing is evaluated before the second method"
    assert all(set(e["values"]) == {"nt_xent"} for e in contrast if e["split"] == "train")
    if then == "dann":  # its own rule for granted labels, and not the first method's
        trained = next(e for e in found if e["phase"] == "adapt" and e["split"] == "train")
        assert set(trained["values"]) == {"supervised", "domain", "target_supervised"}
    if then not in ("dann", "linear_probe"):
        return
    again = transfer("evaluate", str(done.run))
    assert again.code == 0 and "result.json agrees" in again.out
    rows = transfer("predict", str(done.run), "--dataset", "digits", "--format", "jsonl")
    assert rows.code == 0 and set(json.loads(rows.out.splitlines()[0])["probabilities"]) == set("0123456789")


def test_each_method_of_a_chain_adds_the_target_term_by_its_own_rule(transfer: Transfer) -> None:
    done = transfer("run", *TEN, "method=dann", "then=finetune", "target_labels=3", "then.source_steps=0")
    assert done.code == 0, done.err
    terms = {e["phase"]: set(e["values"]) for e in events(done.run) if e["split"] == "train"}
    assert terms == {"adapt": {"supervised", "domain", "target_supervised"}, "finetune": {"target_supervised"}}


def test_supcon_reads_source_and_granted_labels_before_dann(transfer: Transfer) -> None:
    done = transfer("run", *TEN, "method=supcon", "then=dann", "target_labels=2", "method.steps=6")
    assert done.code == 0, done.err
    found = [e for e in events(done.run) if e["split"] == "train"]
    assert [e["step"] for e in found if e["phase"] == "contrast"] == [5, 6]
    assert set(found[0]["values"]) == {"supcon", "nt_xent"}
    assert json.loads((done.run / "result.json").read_text())["steps"] == 16


def test_simclr_on_the_target_alone(transfer: Transfer) -> None:
    done = transfer("run", *TEN, "method=simclr", "then=linear_probe", "source=none", "target_labels=4")
    assert done.code == 0, done.err
    assert json.loads((done.run / "result.json").read_text())["setting"]["source_free"]


def test_a_representation_alone_predicts_nothing(transfer: Transfer, tmp_path: Path) -> None:
    for chosen, said in (
        (["method=simclr"], "simclr learns a representation: add then=linear_probe (or another method)."),
        (["method=supcon"], "supcon learns a representation: add then=linear_probe (or another method)."),
        (["method=dann", "then=simclr"], "simclr learns a representation: take it as the first, method=simclr."),
    ):
        refused = transfer("run", *TEN, *chosen)
        assert refused.code == 2 and refused.err == f"transfer: {said}\n"
    assert not [*tmp_path.rglob("outputs/runs/*")]


def test_the_needs_of_a_chain_are_those_of_both(transfer: Transfer) -> None:
    for chosen, said in (
        (["method=simclr", "then=dann", "source=none"], "method dann needs a labelled source"),
        (["method=supcon", "then=linear_probe", "source=none"], "method supcon needs a labelled source"),
        (["method=simclr", "then=linear_probe", "source=none"], "method linear_probe needs labels"),
    ):
        refused = transfer("run", *TEN, *chosen)
        assert refused.code == 2 and said in refused.err, refused.err


def test_a_chain_is_resumed_in_the_first_and_in_the_second_phase(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [*TEN, "method=simclr", "then=dann", "target_labels=2", "trainer.log_every=3"]
    expected = outcome_of(transfer("run", *chosen).run)
    # The process that goes on from step 4 draws six batches more in the first phase.
    for call, phase, step, extra in ((4, 0, 4, ["force=true"]), (6 + 5, 1, 5, [])):
        with monkeypatch.context() as patch:
            stop_at(patch, call)
            stopped = transfer("run", *chosen, *extra)
        assert stopped.code == 143, stopped.err
        (last,) = Path("outputs").rglob("last.pt")
        position = torch.load(last, weights_only=True)["position"]
        assert (position["phase"], position["step"]) == (phase, step)
    finished = transfer("run", *chosen)
    assert finished.code == 0 and "going on at step 5/10" in finished.out
    assert_same(finished.run, expected)


def test_a_chain_that_ends_in_a_closed_form_is_resumed(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [*TEN, "method=simclr", "then=linear_probe", "trainer.ema=0.9"]
    expected = outcome_of(transfer("run", *chosen).run)
    with monkeypatch.context() as patch:
        stop_at(patch, 10, stream="target")  # at the first phase's end
        assert transfer("run", *chosen, "force=true").code == 143
    assert_same(transfer("run", *chosen).run, expected)


def test_the_second_method_starts_from_what_the_first_has_learnt(transfer: Transfer) -> None:
    """The same probe after a first phase that moves nothing is another."""
    figures = []
    for rate in ("0.02", "0"):
        run = transfer("run", *TEN, "then=linear_probe", "method=simclr", f"optimizer.lr={rate}").run
        figures.append(json.loads((run / "result.json").read_text())["metrics"]["target_test"]["nll"])
    assert abs(figures[0] - figures[1]) > 1e-3


def test_another_run_starts_from_a_chains_network(transfer: Transfer) -> None:
    chain = transfer("run", *TEN, "method=simclr", "then=source_only").run
    started = transfer("run", *TEN, "method=dann", f"source_model={chain}")
    assert started.code == 0, started.err
    state = torch.load(chain / "checkpoints" / "best.pt", weights_only=True)["method"]
    assert any(key.startswith("second.network.backbone.") for key in state)
    taken = transfer(
        "run", *TEN, "method=source_only", f"backbone.weights={chain}/checkpoints/best.pt", "optimizer.lr=0"
    )
    assert taken.code == 0, taken.err
    kept = torch.load(taken.run / "checkpoints" / "best.pt", weights_only=True)["method"]
    weights = [k for k in kept if k.startswith("network.backbone.") and k.endswith("weight") and kept[k].ndim > 1]
    assert weights and all(torch.equal(kept[k], state[f"second.{k}"]) for k in weights)


def test_representation_only_is_said_by_the_class() -> None:
    assert SimCLR.representation_only and SupCon.representation_only and not Method.representation_only
    assert isinstance(SimCLR(context()).phases()[0], Gradient) and issubclass(SimCLR, nn.Module)
