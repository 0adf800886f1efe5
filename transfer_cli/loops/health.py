"""Watches a run for the ways in which transfer goes wrong, and says each once, in words, with what usually helps.

It sees only what is logged: the interval's means of loss terms and diagnostics, and the figures of an evaluation.
docs/health.md explains the warnings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from transfer_cli.data.task import TransferTask
from transfer_cli.loops.metrics_log import GRADIENT_NORM

BEGINNING = 0.1  # of a phase, in which a discriminator may well win and ramps stand at zero
LONG = 0.2  # of a phase: a stretch that is no passing state
INTERVALS = 5  # below so many means a stretch is chance: a run of seconds has no more
CERTAIN = 0.99  # discriminator's accuracy: it saturates, and its gradient with it
SETTLED = 0.25  # of a phase, after which predictions should have spread over the classes
EARLY = 100  # steps within which they never need to
ALONE = 1.05  # effective classes: all but one sample in a hundred are one class
GROWTH = 100.0  # of the features' norm: training moves it by some factors, matching or divergence by orders
NOTHING = 1e-8  # of a loss term: below float32's resolution beside a supervised loss of order one
NO_GRADIENT = 1e-12  # of a gradient's norm, which is rather 1e-6 where a loss is at its minimum
EXPLOSION = 1000.0  # of a gradient's norm against the phase's beginning
GUESSING = 0.98  # of log K, the supervised loss of guessing
COLLAPSED = {  # what usually helps
    "terms": "A smaller transfer weight, a term that keeps the classes in balance or a lower optimizer.lr",
    "labels alone": "A method that looks at the target (adabn, where BatchNorm has the source's statistics)",
    "closed form": "Another backbone, a stronger regularisation of the map (or fewer dimensions), or features.normalise",
}
SUPERVISED = ("supervised", "target_supervised")


class Health:
    """`classes`: as many as predictions on target validation inputs should show at least, were they to be balanced; 0 in
    regression. `guessing`: the supervised loss of guessing, 0 where it has no such value.

    State is plain numbers and strings, which checkpoints keep: what was said before an interruption is not said again.
    """

    def __init__(self, say: Callable[[str], None], classes: float, guessing: float) -> None:
        self._say, self.classes, self.guessing = say, classes, guessing
        self.warnings: list[dict[str, Any]] = []  # kind, phase, step, text
        self.norms: dict[str, float] = {}  # of features, at the run's first evaluation
        self.begin(0)

    def begin(self, steps: int) -> None:
        """A phase of so many steps; a closed form has none."""
        self.steps, self.done, self.collapses, self.looks = steps, 0, 0, 0
        self.kind = "labels alone" if steps else "closed form"
        self.streaks: dict[str, list[int]] = {}  # by condition, the step since which it holds and its intervals
        self.late: dict[str, list[float]] = {}  # by loss term, the second half's: intervals, sum, largest magnitude
        self.gradients: dict[str, list[float]] = {}  # by player, the norm at the beginning

    def interval(
        self, step: int, phase: str, done: int, terms: Mapping[str, float], diagnostics: Mapping[str, float]
    ) -> None:
        """Means since the last call; the phase has `done` of its steps, the run `step` in all."""

        def warn(kind: str, text: str) -> None:
            self._warn(kind, phase, step, text)

        before, self.done = self.done, done
        if any(name not in SUPERVISED for name in terms):
            self.kind = "terms"
        if "discriminator_accuracy" in diagnostics:
            accuracy = diagnostics["discriminator_accuracy"]
            if self._long("discriminator", accuracy > CERTAIN, before):
                since = step - done + self.streaks["discriminator"][0]
                warn(
                    "discriminator_certain",
                    f"the discriminator has told the domains apart at {100 * accuracy:.1f} % since step {since:,}: its gradient "
                    "hardly says any more how to align them. A slower or smaller discriminator, or a larger transfer weight, "
                    "usually helps.",
                )
        for name, norm in diagnostics.items():
            if name.startswith(GRADIENT_NORM):
                self._gradient(name.removeprefix(GRADIENT_NORM), norm, before, warn)
        if 2 * before >= self.steps:
            for name, value in terms.items():
                count, total, largest = self.late.get(name, [0, 0.0, 0.0])
                self.late[name] = [count + 1, total + value, max(largest, abs(value))]
        if done == self.steps:
            self._at_end(phase, warn)

    def evaluation(self, step: int, phase: str, figures: Mapping[str, float]) -> None:
        """The figures of the evaluator's health (`target_classes`, ...); `interval` came first."""

        def warn(kind: str, text: str) -> None:
            self._warn(kind, phase, step, text)

        if "target_classes" in figures:
            self.looks += 1
            expected = min(figures.get("source_classes", math.inf), self.classes)
            found = figures["target_classes"]
            settled = self.done >= max(SETTLED * self.steps, EARLY) or not self.steps
            self.collapses = self.collapses + 1 if settled and found < max(expected / 2, ALONE) else 0
            # A closed form, or a phase as short as an interval, has but one evaluation.
            only = self.looks == 1 and self.done == self.steps
            if self.collapses == (1 if only else 2):
                other = f"those on the source {figures['source_classes']:.1f}" if "source_classes" in figures else ""
                warn(
                    "predictions_collapsed",
                    f"predictions on the target use {found:.1f} classes, {other or f'of about {self.classes:.0f}'} (effective "
                    f"numbers): they have collapsed. {COLLAPSED[self.kind]} usually helps.",
                )
        for domain in ("source", "target"):
            norm = figures.get(f"feature_norm_{domain}")
            if norm is not None:
                self.norms[domain] = self.norms.get(domain) or norm
                self._features(domain, norm, self.norms[domain], warn)

    def _features(self, domain: str, norm: float, first: float, warn: Callable[[str, str], None]) -> None:
        if not math.isfinite(norm) or norm > GROWTH * first:
            warn(
                "features_exploded",
                f"the {domain} features' norm is {norm:.3g}, at the first evaluation it was {first:.3g}: they explode. "
                "trainer.clip_norm=1, a lower optimizer.lr or a smaller transfer weight usually helps.",
            )
        elif norm * GROWTH < first:
            warn(
                "features_vanished",
                f"the {domain} features' norm is {norm:.3g}, at the first evaluation it was {first:.3g}: they vanish, which "
                "brings any two domains together. A smaller transfer weight or a lower optimizer.lr usually helps.",
            )

    def _gradient(self, player: str, norm: float, before: int, warn: Callable[[str, str], None]) -> None:
        start = self.gradients.setdefault(player, [])
        if self._long(f"no gradient {player}", norm < NO_GRADIENT, before):
            warn(
                f"no_gradient:{player}",
                f"no gradient reaches '{player}': it does not learn. A weight of zero, frozen layers, saturated outputs or an "
                "objective that does not depend on it are the usual reasons.",
            )
        if len(start) < INTERVALS:
            start.append(norm)
            return
        exploded = max(start) > 0 and norm > EXPLOSION * max(start)
        if self._held(f"explosion {player}", exploded, before)[1] == INTERVALS:
            warn(
                f"gradient_exploded:{player}",
                f"the gradient of '{player}' is {norm / max(start):,.0f} times that of the phase's beginning. "
                "trainer.clip_norm=1 or a lower optimizer.lr usually helps.",
            )

    def _at_end(self, phase: str, warn: Callable[[str, str], None]) -> None:
        for name, (count, total, largest) in self.late.items():
            if count < INTERVALS:
                continue
            if name not in SUPERVISED and largest < NOTHING:
                warn(
                    f"term_zero:{name}",
                    f"the loss term '{name}' was zero in the second half of phase '{phase}': it transfers nothing. Look at its "
                    "weight, its ramp and, if it has one, its confidence threshold.",
                )
            if name == "supervised" and 0 < GUESSING * self.guessing < total / count:
                warn(
                    "source_not_learnt",
                    f"the supervised loss is {total / count:.3g} in the second half of phase '{phase}', no better than guessing "
                    f"({self.guessing:.3g}): there is nothing to transfer. Another optimizer.lr (higher if it never fell, lower "
                    "if it rose), more trainer.steps or a smaller transfer weight usually helps.",
                )

    def _long(self, condition: str, holds: bool, before: int) -> bool:
        """Whether it has held for long, the phase's beginning apart."""
        since, intervals = self._held(condition, holds and before >= BEGINNING * self.steps, before)
        return intervals >= INTERVALS and self.done - since >= LONG * self.steps

    def _held(self, condition: str, holds: bool, before: int) -> tuple[int, int]:
        """The step of the phase since which it has held, and for how many intervals."""
        if not holds:
            self.streaks.pop(condition, None)
            return self.done, 0
        since, intervals = self.streaks.get(condition, [before, 0])
        self.streaks[condition] = [since, intervals + 1]
        return since, intervals + 1

    def _warn(self, kind: str, phase: str, step: int, text: str) -> None:
        if all(kind != warning["kind"] for warning in self.warnings):
            self.warnings.append({"kind": kind, "phase": phase, "step": step, "text": text})
            self._say(f"warning: {text}")

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_say", "classes", "guessing")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def health_of(task: TransferTask, say: Callable[[str], None]) -> Health:
    """The watcher of a run on this task."""
    if task.kind != "classification":
        return Health(say, 0.0, 0.0)
    space = task.label_space
    expected = len(space.shared if task.source_labels_fit_head else space.classes)
    # of a few samples even balanced predictions miss classes
    classes = min(expected, max(1.0, len(task.target_validation) / 2))
    return Health(say, classes, math.log(max(2, len(space.source), len(space.classes))))
