"""What the figures of a diagnosis suggest, in words that say what they rest on. The rules and where they mislead: docs/diagnose.md.

Standard library only: a rule reads figures, never data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

CLOSE, FAR = 0.4, 1.6  # proxy A-distance: the domain classifier errs in 40 %, in 10 %
ALPHA = 0.05  # of tests
MOST = 0.7  # share of MMD² that counts as most of it
FURTHER = 0.15  # share that covariances must remove beyond means and scales
CONDITION = 10.0  # of the confusion matrix, above which BBSE is not believed
SHIFT = 0.1  # distance between class shares that matters
MARGIN = 0.1  # by which moments may remove more than class shares that still explain them
SUPPORT = 0.25  # share of MMD² that the estimated class shares must remove to be believed
POOR = 0.6  # of the way from chance to perfect, below which a source classifier is weak
FEW = 100  # samples a domain, below which figures are rough
LEAK = 3.0  # near twins between parts count when they are so many times as frequent as within one

Advice = dict[str, str]


def advise(found: Mapping[str, Any], backbone: str) -> list[Advice]:
    """One entry a rule that applies, the weightiest first: `rule`, `says`, `rests_on`."""
    figures = found["backbones"][backbone]
    rules = (_duplicates, _label_space, _samples, _weak_features, _distance, _label_shift, _granted, _backbones)
    return [
        dict(zip(("rule", "says", "rests_on"), entry, strict=True)) for rule in rules for entry in rule(found, figures)
    ]


Entries = Iterator[tuple[str, str, str]]


def _duplicates(found: Mapping[str, Any], figures: Mapping[str, Any]) -> Entries:
    for pair, counts in found["duplicates"].items():
        one, other = pair.split(" / ")
        if counts["exact"]:
            yield (
                "duplicates",
                f"Clean the data before believing anything: {counts['exact']:,} samples of {other} are also in {one}.",
                f"equal checksums of {counts['compared'][1]:,} against {counts['compared'][0]:,} samples",
            )
        near, own = counts.get("near", 0), counts.get("own_share") or 0.0
        share = near / max(1, counts["compared"][1])
        if near and share > LEAK * own and one.split()[0] == other.split()[0]:
            what = "a leak between training and test, if they are copies"
        elif near and share > LEAK * own:
            what = "the domains share pictures, if they are copies"
        else:
            continue
        first = counts["near_pairs"][0]
        yield (
            "near_duplicates",
            f"Look at them: {near:,} samples of {other} look like one of {one} ({first[1]} like {first[0]}): {what}.",
            f"thumbnails {_percent(share)} near, against {_percent(own)} within {one}",
        )


def _label_space(found: Mapping[str, Any], figures: Mapping[str, Any]) -> Entries:
    space = found.get("label_space") or {}
    words = {
        "partial": "Methods that match whole domains draw target samples to classes that it lacks: pada weighs those down.",
        "open": "Methods that match whole domains draw samples of unknown classes onto known ones: osbp expects them.",
        "separate": "The classes differ, so only features transfer: linear_probe, finetune or lp_ft, with target labels.",
    }
    if space.get("setting") in words:
        yield "label_space", words[space["setting"]], f"class names: {space['overlap']}"


def _samples(found: Mapping[str, Any], figures: Mapping[str, Any]) -> Entries:
    n = min(found["samples"]["source"], found["samples"]["target"])
    if n < FEW:
        yield "few_samples", "Take every figure here as rough.", f"{n} samples in the smaller domain"


def _weak_features(found: Mapping[str, Any], figures: Mapping[str, Any]) -> Entries:
    classifier = figures.get("source_classifier")
    if classifier is None:
        return
    accuracy, chance = classifier["accuracy"], classifier["chance"]
    if accuracy - chance < POOR * (1 - chance):
        yield (
            "weak_features",
            "Another backbone, or a trained one, comes first: these features hardly tell the source's own classes apart, and no "
            "adaptation of them will do better on the target.",
            f"a cross-fitted linear classifier has {_percent(accuracy)} on the source (the largest class: {_percent(chance)})",
        )


def _distance(found: Mapping[str, Any], figures: Mapping[str, Any]) -> Entries:
    distance, test = figures["a_distance"], figures["mmd"]
    if distance is None:
        yield (
            "too_few",
            "The samples are too few to say how far apart the domains are.",
            "fewer than 20 samples in a domain",
        )
        return
    rests = (
        f"A-distance {distance['value']:.2f} [{distance['low']:.2f}, {distance['high']:.2f}], "
        f"MMD² {test['value']:.3g} (p {test['p']:.3f})"
    )
    regression = found["kind"] == "regression"
    baseline = "gp or no_adaptation head=ridge" if regression else "source_only (or finetune, with target labels)"
    if test["p"] > ALPHA and distance["value"] < CLOSE:
        yield "alike", f"Nothing to adapt is seen in the inputs: {baseline} should do.", rests
        return
    if distance["high"] < CLOSE:
        yield (
            "not_linear",
            f"No linear classifier tells the domains apart, yet they differ: whether {baseline} still works cannot be seen "
            "from here.",
            rests,
        )
    elif distance["low"] > FAR:
        yield (
            "far",
            "The domains are told apart almost always: much to adapt, or little in common. Density weights (kmm, kliep, "
            "density_ratio) will rest on few samples, and source_only belongs in every comparison.",
            rests,
        )
    else:
        yield "apart", f"The domains differ: adaptation may help; {baseline} is the measure of it.", rests
    yield from _moments(found, figures)


def _moments(found: Mapping[str, Any], figures: Mapping[str, Any]) -> Entries:
    gone = figures["removed"]
    if not gone or _class_shares_explain(figures):  # moved means may be nothing but other shares of the classes
        return
    first, both = max(gone["means"], gone["scales"]), gone["covariance"]
    moments = figures["moments"]
    rests = (
        f"of MMD², matched means remove {_percent(gone['means'])}, means and scales {_percent(gone['scales'])}, covariances "
        f"{_percent(both)}; mean shift {moments['mean_shift']:.2f} deviations, covariance distance "
        f"{moments['covariance_distance']:.2f} ({moments['covariance_noise']:.2f} by chance)"
    )
    regression = found["kind"] == "regression"
    networks = {"first": "adabn", "second": "deep_coral or dan"}
    if both > MOST and both - first > FURTHER:
        also = "" if regression else f"; trained networks: {networks['second']}"
        yield "covariance", f"Second moments are what differs: coral, linear_ot{also}.", rests
    elif first > MOST:
        also = "" if regression else f"; networks with BatchNorm: {networks['first']}"
        yield (
            "means",
            f"Means and scales are most of it: mean_match (or features.normalise=[zscore_domain]){also}.",
            rests,
        )
    elif max(first, both) < 1 - MOST:
        which = "jdot, ot, kmm or gp" if regression else "dann, cdan, dsan or mcc on networks, ot or jdot on features"
        yield (
            "shape",
            f"Moments do not explain the difference: try what matches whole distributions or classes: {which}.",
            rests,
        )
    else:
        which = "coral, then jdot or ot" if regression else "coral or deep_coral, then dann, cdan or jdot"
        yield "mixed", f"Moments explain a part: try {which}.", rests


def _label_shift(found: Mapping[str, Any], figures: Mapping[str, Any]) -> Entries:
    shift = figures.get("label_shift")
    if not shift or shift["distance"] < max(SHIFT, 2 * shift["noise"]):
        return
    gone = figures["removed"].get("class_shares", 0.0)
    rests = (
        f"BBSE: distance {shift['distance']:.2f} [{shift['low']:.2f}, {shift['high']:.2f}], condition "
        f"{shift['condition']:.1f}; these shares remove {_percent(gone)} of MMD²"
    )
    if shift["condition"] > CONDITION:  # infinite where a class is never told from others
        yield (
            "label_shift_unknown",
            "Class shares cannot be estimated: the classifier confuses classes too much.",
            rests,
        )
    elif gone >= SUPPORT:
        yield (
            "label_shift",
            "Class shares differ: methods that assume them equal are at risk (dann, deep_coral, dan, ot, jdot, linear_ot, coral, "
            "mean_match, bnm); kmm and density_ratio weigh the source instead, and source_only assumes nothing of the kind.",
            rests,
        )
    else:
        yield (
            "label_shift_doubtful",
            "Class shares look different, but weighting classes does not bring the domains together: more likely the "
            "source's classifier errs on the target. Check the shares if you can.",
            rests,
        )


def _class_shares_explain(figures: Mapping[str, Any]) -> bool:
    """Whether a label shift that is believed removes as much of MMD² as any moments."""
    shift, gone = figures.get("label_shift"), figures["removed"]
    if not shift or shift["distance"] < max(SHIFT, 2 * shift["noise"]) or shift["condition"] > CONDITION:
        return False
    shares = gone.get("class_shares", 0.0)
    return bool(shares >= max(SUPPORT, *(gone[key] - MARGIN for key in ("means", "scales", "covariance"))))


def _granted(found: Mapping[str, Any], figures: Mapping[str, Any]) -> Entries:
    n = found["samples"]["granted"]
    if not n:
        return
    scores = figures["transferability"]
    if found["kind"] == "regression":
        yield (
            "granted",
            "Granted labels: gp weighs the source against none; finetune for networks.",
            f"{n:,} target labels",
        )
        return
    if "nce" not in scores:
        return
    lost = -scores["nce"] / max(1e-9, scores["label_entropy"])
    if lost < 0.5:
        words = "The source's classes say much of the granted labels: use both (source_only adds them; mme, fixmatch)."
    else:
        words = "The source's classifier says little of the granted labels: trust those more (lp_ft, linear_probe)."
    yield (
        "granted",
        words,
        f"NCE {scores['nce']:.2f} of an entropy of {scores['label_entropy']:.2f} nats, {n:,} granted labels",
    )


def _backbones(found: Mapping[str, Any], figures: Mapping[str, Any]) -> Entries:
    scores = {name: f["transferability"].get("logme") for name, f in found["backbones"].items()}
    if len(scores) < 2 or any(value is None for value in scores.values()):
        return
    best = max(scores, key=lambda name: scores[name])
    others = [name for name in ("leep", "h_score_shrunk") if name in figures["transferability"]]
    agree = [
        n for n in others if max(found["backbones"], key=lambda b: found["backbones"][b]["transferability"][n]) == best
    ]
    whose = (
        "granted target labels"
        if found["samples"]["granted"]
        else "source labels alone, none of the target being granted"
    )
    said = (
        f"; {' and '.join(agree)} agree{'s' * (len(agree) == 1)}"
        if agree
        else f"; {' and '.join(others)} would take another"
        if others
        else ""
    )
    yield (
        "backbone",
        f"Of these backbones, {best} suits the labels best.",
        f"LogME {scores[best]:.3f} on {whose}{said}",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
