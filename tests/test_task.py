"""The transfer task: splits, grants and label spaces; what a method may see, and that target labels are not among it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from transfer_cli.data.domain import Domain, Kind, Part, keep_classes, numbered
from transfer_cli.data.inputs import ArrayInputs
from transfer_cli.data.task import UNKNOWN, Heldout, LabelSpace, TaskShape, TransferTask, match_labels, split_pair
from transfer_cli.errors import TransferError

NO_SUBSET: dict[str, int | None] = {"source": None, "target": None, "test": None}


def domain(
    name: str,
    classes: str = "abc",
    per_class: int = 40,
    test_per_class: int | None = None,
    kind: Kind = "classification",
) -> Domain:
    """Samples whose only input is their own number, so that each can be followed; classes in turn."""

    def part(per_class: int, first: int) -> Part:
        n = per_class * len(classes)
        values = torch.arange(first, first + n, dtype=torch.float32)[:, None]
        labels = torch.arange(n) % len(classes) if kind == "classification" else values.clone()
        return Part(ArrayInputs(values), labels, numbered(name, n))

    test = part(test_per_class, 10_000) if test_per_class is not None else None
    return Domain(name, kind, tuple(classes) if kind == "classification" else (), part(per_class, 0), test)


def split(
    source: Domain | None, target: Domain, *, setting: str = "closed", **changes: Any
) -> tuple[TransferTask, Heldout]:
    options: dict[str, Any] = {
        "protocol": "inductive", "target_labels": 0, "test_share": 0.25, "validation_share": 0.1, "subset": NO_SUBSET,
        "data_seed": 0,
    }  # fmt: skip
    return split_pair(source, target, match_labels(source, target, setting), **{**options, **changes})


def numbers(part: Any) -> list[int]:
    """Which samples a part holds."""
    return [] if part is None else [int(v) for v in part.inputs.values[:, 0]]


def visible(task: TransferTask) -> dict[str, Any]:
    """Everything that a method can read, as plain values."""
    out: dict[str, Any] = {
        "kind": task.kind,
        "space": task.label_space,
        "input": task.input,
        "width": task.target_width,
    }
    for name in ("source", "source_validation", "target_unlabelled", "target_validation", "target_labelled"):
        part = getattr(task, name)
        labels = part.labels.tolist() if isinstance(part, Part) else None
        out[name] = None if part is None else (numbers(part), part.ids, labels)
    return out


# --- splits ---------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_complete() -> None:
    source, target = domain("s"), domain("t", per_class=20)
    task, heldout = split(source, target)
    parts = [numbers(p) for p in (task.source, task.source_validation, heldout.source_test)]
    assert [len(p) for p in parts] == [81, 9, 30]
    assert sorted(sum(parts, [])) == list(range(120))
    parts = [numbers(p) for p in (task.target_unlabelled, task.target_validation, heldout.target_test)]
    assert [len(p) for p in parts] == [41, 4, 15]  # 60: a quarter to test, a tenth of the rest to validation
    assert sorted(sum(parts, [])) == list(range(60))
    assert all(p == sorted(p) for p in parts), "the order of the data set is kept"


def test_labels_and_ids_stay_with_their_samples() -> None:
    task, heldout = split(domain("s"), domain("t"), target_labels=4)
    for part in (task.source, task.source_validation, heldout.source_test, heldout.target_test, task.target_labelled):
        assert isinstance(part, Part)
        assert part.labels.tolist() == [n % 3 for n in numbers(part)]
        assert [int(i.split("/")[1]) for i in part.ids] == numbers(part)


def test_a_published_test_split_is_taken_as_it_is() -> None:
    task, heldout = split(domain("s", test_per_class=5), domain("t", test_per_class=7))
    assert numbers(heldout.source_test) == list(range(10_000, 10_015))
    assert numbers(heldout.target_test) == list(range(10_000, 10_021))
    assert sorted(numbers(task.target_unlabelled) + numbers(task.target_validation)) == list(range(120))


def test_the_data_seed_alone_decides_the_splits() -> None:
    first, again = (visible(split(domain("s"), domain("t"), target_labels=2)[0]) for _ in range(2))
    torch.manual_seed(123)
    assert first == again == visible(split(domain("s"), domain("t"), target_labels=2)[0])
    other = visible(split(domain("s"), domain("t"), target_labels=2, data_seed=1)[0])
    for name in ("source", "source_validation", "target_unlabelled", "target_validation", "target_labelled"):
        assert first[name] != other[name], name


def test_splitting_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    split(domain("s"), domain("t"), target_labels=2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("protocol", ["inductive", "transductive"])
def test_what_is_drawn_of_the_target_does_not_depend_on_the_source(protocol: str) -> None:
    """Baselines on one target from several sources, from fewer source samples, or from none are tested on the same samples."""

    def drawn(source: Domain | None, **changes: Any) -> tuple[list[int], ...]:
        task, heldout = split(source, domain("t"), protocol=protocol, target_labels=2, **changes)
        return tuple(
            numbers(p)
            for p in (task.target_unlabelled, task.target_validation, task.target_labelled, heldout.target_test)
        )

    wanted = drawn(domain("s"))
    assert drawn(domain("s2", per_class=70)) == wanted
    assert drawn(domain("s3", test_per_class=4)) == wanted
    assert drawn(domain("s"), subset={**NO_SUBSET, "source": 30}) == wanted
    assert drawn(None) == wanted


def test_subsets_have_their_sizes_and_change_nothing_else() -> None:
    sizes: dict[str, int | None] = {"source": 30, "target": 20, "test": 6}
    full, full_heldout = split(domain("s"), domain("t"))
    task, heldout = split(domain("s"), domain("t"), subset=sizes)
    assert len(task.source or ()) + len(task.source_validation or ()) == 30
    assert len(task.target_unlabelled) + len(task.target_validation) == 20
    assert len(heldout.source_test or ()) == len(heldout.target_test) == 6
    assert set(numbers(heldout.target_test)) < set(numbers(full_heldout.target_test))
    assert set(numbers(task.target_unlabelled)).isdisjoint(numbers(full_heldout.target_test))
    only_test = split(domain("s"), domain("t"), subset={**NO_SUBSET, "test": 6})[0]
    assert visible(only_test) == visible(full), "a smaller test set leaves what is trained on as it was"
    large = split(domain("s"), domain("t"), subset={"source": 1000, "target": 1000, "test": 1000})[0]
    assert visible(large) == visible(full)


def test_without_validation_the_unlabelled_inputs_serve() -> None:
    task, _ = split(domain("s"), domain("t"), validation_share=0.0)
    assert task.source_validation is None
    assert numbers(task.target_validation) == numbers(task.target_unlabelled)


def test_inductive_needs_a_test_set() -> None:
    with pytest.raises(TransferError, match="protocol=inductive needs target test samples: t has no test split"):
        split(domain("s"), domain("t"), test_share=0.0)
    assert split(domain("s"), domain("t"), test_share=0.0, protocol="transductive")[1].source_test is None


def test_transductive_tests_on_the_target_samples_that_it_trains_on() -> None:
    task, heldout = split(domain("s"), domain("t", test_per_class=5), protocol="transductive")
    assert numbers(task.target_unlabelled) == numbers(heldout.target_test) == numbers(task.target_validation)
    assert numbers(heldout.target_test) == list(range(120))
    assert heldout.target_test.labels.tolist() == [n % 3 for n in range(120)]


def test_a_task_without_a_source() -> None:
    task, heldout = split(None, domain("t"), target_labels=2)
    assert task.source is None and task.source_validation is None and heldout.source_test is None
    assert task.label_space.classes == ("a", "b", "c") and not task.source_labels_fit_head
    assert heldout.target_test.labels.tolist() == [n % 3 for n in numbers(heldout.target_test)]


def test_a_class_that_the_source_lacks_is_an_error() -> None:
    source = domain("s")
    labels = source.train.labels.clone()
    labels[labels == 1] = 0
    with pytest.raises(TransferError, match="source s has no training sample of class b"):
        split(replace(source, train=replace(source.train, labels=labels)), domain("t"))


# --- what a method may see --------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["inductive", "transductive"])
@pytest.mark.parametrize("published", [None, 9])
def test_without_grants_nothing_that_a_method_sees_depends_on_target_labels(
    protocol: str, published: int | None
) -> None:
    target = domain("t", test_per_class=published)

    def relabelled(part: Part, seed: int) -> Part:
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))
        return replace(part, labels=part.labels[order])

    for seed in range(3):
        other = replace(
            target,
            train=relabelled(target.train, seed),
            test=None if target.test is None else relabelled(target.test, seed),
        )
        (task, heldout), (other_task, other_heldout) = (
            split(domain("s"), t, protocol=protocol) for t in (target, other)
        )
        assert visible(task) == visible(other_task)
        assert numbers(heldout.target_test) == numbers(other_heldout.target_test)
        assert heldout.target_test.labels.tolist() != other_heldout.target_test.labels.tolist()


def test_unlabelled_parts_have_no_labels_to_read() -> None:
    task, _ = split(domain("s"), domain("t"), target_labels=3)
    for part in (task.target_unlabelled, task.target_validation):
        assert {f.name for f in fields(part)} == {"inputs", "ids", "origin"}
        assert not hasattr(part, "labels")
    for field in fields(task):  # nothing else in a task holds labels of the target but the granted ones
        value = getattr(task, field.name)
        assert not isinstance(value, Tensor | Domain | Heldout)
        if isinstance(value, Part):
            assert field.name in ("source", "source_validation", "target_labelled")


# --- grants ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["inductive", "transductive"])
@pytest.mark.parametrize("budget", [1, 5])
def test_a_number_is_granted_per_class(protocol: str, budget: int) -> None:
    task, heldout = split(domain("s"), domain("t"), target_labels=budget, protocol=protocol)
    assert task.target_labelled is not None
    assert torch.bincount(task.target_labelled.labels).tolist() == [budget] * 3
    granted = set(numbers(task.target_labelled))
    assert granted <= set(numbers(task.target_unlabelled)), "granted samples stay among the unlabelled inputs"
    assert granted.isdisjoint(numbers(heldout.target_test)), "and leave the test set"
    if protocol == "transductive":
        assert granted | set(numbers(heldout.target_test)) == set(range(120))


def test_no_grant_and_all() -> None:
    assert split(domain("s"), domain("t"))[0].target_labelled is None
    task, heldout = split(domain("s"), domain("t"), target_labels="all")
    assert numbers(task.target_labelled) == numbers(task.target_unlabelled)
    assert set(numbers(task.target_labelled)).isdisjoint(numbers(heldout.target_test))
    assert set(numbers(task.target_labelled)).isdisjoint(numbers(task.target_validation))
    with pytest.raises(TransferError, match="leave no target sample to test on"):
        split(domain("s"), domain("t"), target_labels="all", protocol="transductive")


def test_more_labels_than_samples_of_a_class_is_an_error() -> None:
    with pytest.raises(TransferError, match="target_labels=50: t has fewer training samples of a, b, c"):
        split(domain("s"), domain("t"), target_labels=50)


def test_regression_grants_a_number_in_all() -> None:
    source, target = domain("s", kind="regression"), domain("t", kind="regression")
    task, heldout = split(source, target, target_labels=7)
    assert task.target_labelled is not None and len(task.target_labelled) == 7
    assert torch.equal(task.target_labelled.labels, task.target_labelled.inputs.values)  # type: ignore[attr-defined]
    assert (task.kind, task.target_width, task.label_space.classes) == ("regression", 1, ())
    assert heldout.target_test.labels.shape == (30, 1)
    with pytest.raises(TransferError, match="target_labels=500: t has only 81 training samples"):
        split(source, target, target_labels=500)


def test_regression_targets_must_be_as_many_in_both_domains() -> None:
    source, target = domain("s", kind="regression"), domain("t", kind="regression")
    wide = replace(source.train, labels=source.train.labels.expand(-1, 2))
    with pytest.raises(TransferError, match="differ in the number of regression targets: s has 2, t has 1"):
        split(replace(source, train=wide), target)


def test_kinds_must_agree() -> None:
    for setting in ("closed", "separate"):
        with pytest.raises(TransferError, match="s is for classification and t for regression"):
            split(domain("s"), domain("t", kind="regression"), setting=setting)


# --- label spaces -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "setting", "evaluated", "index"),
    [
        ("abc", "closed", "abc", [0, 1, 2]),
        ("cab", "closed", "abc", [2, 0, 1]),
        ("ca", "partial", "abc", [2, 0]),
        ("ca", "open", "abc?", [2, 0]),
        ("xcya", "open", "abc?", [3, 2, 3, 0]),
        ("cab", "separate", "cab", [0, 1, 2]),
        ("xyz", "separate", "xyz", [0, 1, 2]),
    ],
)
def test_classes_are_matched_by_name(target: str, setting: str, evaluated: str, index: list[int]) -> None:
    space = match_labels(domain("s"), domain("t", target), setting)
    assert space.evaluated == tuple(UNKNOWN if c == "?" else c for c in evaluated)
    assert space.classes == tuple(evaluated.rstrip("?"))
    assert space.target_index().tolist() == index


@pytest.mark.parametrize("protocol", ["inductive", "transductive"])
def test_labels_of_a_permuted_target_are_the_heads(protocol: str) -> None:
    source, target = domain("s", "abc"), domain("t", "cab")
    task, heldout = split(source, target, target_labels=3, protocol=protocol)
    for part in (heldout.target_test, task.target_labelled):
        assert part is not None and task.label_space.classes == ("a", "b", "c")
        assert [task.label_space.classes[y] for y in part.labels] == ["cab"[n % 3] for n in numbers(part)]


def test_open_targets_own_classes_are_unknown_and_never_granted() -> None:
    task, heldout = split(domain("s", "abc"), domain("t", "axby"), setting="open", target_labels=4)
    names = [task.label_space.evaluated[y] for y in heldout.target_test.labels]
    assert names == [{"a": "a", "b": "b"}.get("axby"[n % 4], UNKNOWN) for n in numbers(heldout.target_test)]
    assert task.target_labelled is not None
    assert torch.bincount(task.target_labelled.labels, minlength=3).tolist() == [4, 4, 0]
    assert [("abc")[y] for y in task.target_labelled.labels] == ["axby"[n % 4] for n in numbers(task.target_labelled)]


def test_separate_spaces_keep_their_own_labels() -> None:
    task, heldout = split(domain("s", "abcd"), domain("t", "xyc"), setting="separate", target_labels=2)
    assert task.source is not None and not task.source_labels_fit_head
    assert task.source.labels.tolist() == [n % 4 for n in numbers(task.source)]
    assert heldout.target_test.labels.tolist() == [n % 3 for n in numbers(heldout.target_test)]


@pytest.mark.parametrize(
    ("target", "setting", "fitting", "told"),
    [
        ("ab", "closed", "partial", "2 shared, 1 only in the source (c)"),
        ("abx", "closed", "open", "2 shared, 1 only in the source (c), 1 only in the target (x)"),
        ("abcx", "closed", "open", "3 shared, 1 only in the target (x)"),
        ("xyz", "closed", "separate", "0 shared, 3 only in the source (a, b, c), 3 only in the target (x, y, z)"),
        ("abc", "partial", "closed", "3 shared."),
        ("abx", "partial", "open", "only in the target (x)"),
        ("abc", "open", "closed", "3 shared."),
        ("uvwxyz", "open", "separate", "6 only in the target (u, v, w, x, ...)"),
    ],
)
def test_an_error_names_the_label_space_that_fits(target: str, setting: str, fitting: str, told: str) -> None:
    source, other = domain("s"), domain("t", target)
    with pytest.raises(TransferError) as caught:
        match_labels(source, other, setting)
    message = str(caught.value)
    assert f"s and t do not fit label_space={setting}" in message and told in message
    assert f"Set label_space={fitting} " in message
    match_labels(source, other, fitting)


def test_label_spaces_in_words() -> None:
    assert str(LabelSpace("closed", ("a", "b"), ("b", "a"))) == "2 classes shared"
    assert str(LabelSpace("open", ("a", "b"), ("b", "x", "y"))) == (
        "1 classes shared (1 only in the source, 2 only in the target)"
    )
    assert str(LabelSpace("separate", ("a",), ("x", "y"))) == "2 target classes, head of its own"


@pytest.mark.parametrize("setting", ["closed", "separate"])
def test_a_tasks_shape_survives_a_checkpoint(setting: str) -> None:
    task, _ = split(domain("s"), domain("t"), target_labels=1, setting=setting)
    shape = TaskShape.restore(task.shape.plain())
    assert shape == task.shape
    assert shape.has_source and shape.has_target_labels and shape.source_labels_fit_head is (setting == "closed")


def test_parts_whose_lengths_differ_are_refused() -> None:
    with pytest.raises(TransferError, match="3 inputs, 2 labels and 3 ids do not fit"):
        Part(ArrayInputs(torch.zeros(3, 1)), torch.zeros(2), numbered("x", 3))


def test_a_number_of_source_samples_per_class_is_kept_and_nothing_else_changes() -> None:
    whole, held = split(domain("s"), domain("t"), validation_share=0.0)
    few, same = split(domain("s"), domain("t"), subset={**NO_SUBSET, "source_per_class": 5}, validation_share=0.0)
    assert whole.source is not None and few.source is not None
    most = whole.source.labels.bincount().clamp_max(5)
    assert few.source.labels.bincount().tolist() == most.tolist()
    assert set(few.source.ids) < set(whole.source.ids)
    assert few.target_unlabelled.ids == whole.target_unlabelled.ids and same.target_test.ids == held.target_test.ids
    again = split(
        domain("s"), domain("t"), subset={**NO_SUBSET, "source_per_class": 5}, validation_share=0.0, data_seed=7
    )[0]
    assert again.source is not None and again.source.ids != few.source.ids


def test_classes_can_be_left_out() -> None:
    whole = domain("t", "abc", per_class=10, test_per_class=4)
    assert keep_classes(whole, None) is whole
    kept = keep_classes(whole, ["c", "a"])
    assert kept.classes == ("a", "c")  # in the domain's own order
    assert kept.test is not None
    for part, before in ((kept.train, whole.train), (kept.test, whole.test)):
        assert before is not None
        rows = [numbers(before).index(n) for n in numbers(part)]
        assert rows == [i for i in range(len(before)) if i % 3 != 1]
        assert [kept.classes[y] for y in part.labels.tolist()] == [
            whole.classes[y] for y in before.labels[rows].tolist()
        ]
        assert part.ids == tuple(before.ids[i] for i in rows)
    with pytest.raises(TransferError, match=r"^t has no class x; its classes are a, b, c\.$"):
        keep_classes(whole, ["a", "x"])
    with pytest.raises(TransferError, match="needs at least one class"):
        keep_classes(whole, [])
    with pytest.raises(TransferError, match="none \\(regression\\)"):
        keep_classes(domain("r", kind="regression"), ["a"])
