"""Looks at a run from outside while it trains: evaluates, and keeps the weights that the configured validator prefers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transfer_cli.evaluation.evaluator import Evaluator
from transfer_cli.loops.checkpoints import serialise
from transfer_cli.loops.console import Console
from transfer_cli.loops.health import Health
from transfer_cli.loops.metrics_log import MetricsLog
from transfer_cli.methods.base import Method
from transfer_cli.run_folder import write_atomically


class Monitor:
    """The figures on target labels are written down and remembered for the report; the choice sees only `selection`'s score."""

    def __init__(
        self,
        evaluator: Evaluator,
        best: Path,
        description: dict[str, Any],
        metrics: MetricsLog,
        console: Console,
        health: Health,
    ) -> None:
        self.evaluator, self.best, self.description = evaluator, best, description
        self.metrics, self.console, self.health = metrics, console, health
        self.chosen_step, self.chosen_score = -1, -math.inf
        self.oracle_step, self.oracle_score = -1, -math.inf
        self.candidates = 0
        self.fit: dict[str, float] = {}  # what the last closed form told of itself

    def observe(self, method: Method, step: int, phase: str, candidate: bool) -> None:
        """Evaluate at `step`; where `candidate`, keep the weights if they score at least as well as any before."""
        look = self.evaluator.look(method)
        finite = {figure: value for figure, value in look.health.items() if math.isfinite(value)}  # JSON has no others
        for split, values in (
            ("validators", look.validators),
            ("target_test", look.target_test),
            ("health", finite),
        ):
            self.metrics.write(step=step, phase=phase, split=split, values=values)
        name, quality = look.headline
        self.console.milestone(phase, step, {self.evaluator.selection: look.score, f"target {name}": quality})
        self.health.evaluation(step, phase, look.health)
        if not candidate:
            return
        self.candidates += 1
        if look.score >= self.chosen_score or self.chosen_step < 0:
            self.chosen_step, self.chosen_score = step, look.score
            self.best.parent.mkdir(exist_ok=True)
            write_atomically(self.best, serialise({**self.description, "step": step, "method": method.state_dict()}))
        if look.oracle > self.oracle_score or self.oracle_step < 0:
            self.oracle_step, self.oracle_score = step, look.oracle

    def state_dict(self) -> dict[str, Any]:
        return {
            "chosen_step": self.chosen_step,
            "chosen_score": self.chosen_score,
            "oracle_step": self.oracle_step,
            "oracle_score": self.oracle_score,
            "candidates": self.candidates,
            "fit": self.fit,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)
