"""The closed-form loop: extract features once, fit once, in float64. Resumes by starting over, identically."""

from __future__ import annotations

from transfer_cli.loops.features import feature_task
from transfer_cli.loops.session import Place, Session
from transfer_cli.methods.phases import ClosedForm


def run_closed_form(phase: ClosedForm, session: Session, place: Place) -> None:
    session.console.start(phase.name, 0, 1)
    session.method.eval()
    figures = phase.fit(feature_task(session, phase.owner or session.method, phase.parts))
    session.restart_average()
    session.monitor.fit = figures or {}
    if figures:
        session.metrics.write(step=place.steps_before, phase=phase.name, split="diagnostics", values=figures)
        told = "  ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in figures.items())
        session.console.say(f"{phase.name}: {told}")
    session.console.advance(1, figures or {})
    if phase.predicts:
        session.monitor.observe(session.evaluated, place.steps_before, phase.name, candidate=place.last)
    session.console.stop()
