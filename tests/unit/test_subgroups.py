"""Metrics of groups of images: groups by a column, intervals, the largest gap."""

import csv

import numpy as np
import pytest

from metrics import full_metrics, summary_metrics
from run.cli import UserError
from subgroups import MAX_GROUPS, groups_of, subgroup_metrics, write_subgroups


def test_values_are_groups_in_their_order():
    group, names = groups_of(["10", "2", "", "2"])
    assert names == ["2", "10", "(empty)"] and group.tolist() == [1, 0, 2, 0]
    group, names = groups_of(["M", "F", "M"])
    assert names == ["F", "M"] and group.tolist() == [1, 0, 1]


def test_more_than_twenty_numbers_are_cut_into_quartiles():
    ages = [str(age) for age in range(21, 61)] + [""]
    group, names = groups_of(ages)
    assert names == ["21 to 30", "31 to 40", "41 to 50", "51 to 60", "(empty)"]
    assert np.bincount(group).tolist() == [10, 10, 10, 10, 1]
    assert len(groups_of([str(age) for age in range(20)])[1]) == 20
    assert len(groups_of([f"p{age}" for age in range(40)])[1]) == 40  # no numbers


@pytest.fixture
def outputs():
    """Targets and probabilities of 400 images; those of the second group are worse. -> cells, targets, probabilities"""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 400)
    cells = np.where(np.arange(400) < 200, "light", "dark")
    scores = rng.random((400, 3))
    scores[np.arange(400), targets] += np.where(cells == "light", 0.8, 0.2)
    cells[:4] = "other"
    return cells.tolist(), targets, scores / scores.sum(axis=1, keepdims=True)


def test_the_metrics_of_a_group_are_those_of_its_images(outputs):
    cells, targets, probabilities = outputs
    result = subgroup_metrics(cells, targets, probabilities, list("abc"))
    few, light, dark = (next(g for g in result["groups"] if g["value"] == name) for name in ("other", "light", "dark"))
    assert few == {"value": "other", "images": 4}
    for group in (light, dark):
        of_group = np.array(cells) == group["value"]
        expected = summary_metrics(targets[of_group], probabilities[of_group])
        assert {name: group[name] for name in expected} == pytest.approx(expected)
        whole = full_metrics(targets[of_group], probabilities[of_group], list("abc"), [1, 1, 1])
        assert group["balanced_acc_ci"] == pytest.approx(whole["balanced_acc_ci"], abs=0.02)
    gap = result["gap"]
    assert (gap["high"], gap["low"], gap["classes"]) == ("light", "dark", ["a", "b", "c"])
    assert gap["value"] == pytest.approx(light["balanced_acc"] - dark["balanced_acc"])
    assert 0 < gap["ci"][0] < gap["value"] < gap["ci"][1]


def test_a_gap_is_that_of_the_classes_that_both_groups_have():
    targets = np.array([0] * 10 + [1] * 10 + [0] * 10)
    cells = ["x"] * 20 + ["y"] * 10
    probabilities = np.eye(2)[[0] * 10 + [0] * 10 + [0] * 5 + [1] * 5]
    result = subgroup_metrics(cells, targets, probabilities, ["a", "b"])
    gap = result["gap"]
    assert [group["classes"] for group in result["groups"]] == [2, 1]
    assert gap["value"] == 0.5 and gap["classes"] == ["a"] and (gap["high"], gap["low"]) == ("x", "y")


def test_whole_subjects_are_drawn(outputs):
    cells, targets, probabilities = outputs
    # 20 copies of each image are no more certain than one
    index = np.repeat(np.arange(4, 400, 4), 20)
    once = subgroup_metrics([cells[i] for i in index[::20]], targets[index[::20]], probabilities[index[::20]], "abc")
    repeated = [cells[i] for i in index], targets[index], probabilities[index], "abc"
    with_subjects, without = (subgroup_metrics(*repeated, subjects) for subjects in (index, None))
    width = [np.diff(result["groups"][0]["acc_ci"])[0] for result in (once, with_subjects, without)]
    assert width[1] == pytest.approx(width[0], rel=0.2) and width[2] < width[0] / 3


def test_too_many_groups_are_refused():
    cells = [f"clinic {i // 10}" for i in range(10 * (MAX_GROUPS + 1))]
    targets = np.arange(len(cells)) % 2
    with pytest.raises(UserError, match="51 different values of at least 10 images, more than 50"):
        subgroup_metrics(cells, targets, np.eye(2)[targets], ["a", "b"])
    cells, targets = [f"lesion {i}" for i in range(1001)], np.arange(1001) % 2
    with pytest.raises(UserError, match="1001 different values, more than 1000"):
        subgroup_metrics(cells, targets, np.eye(2)[targets], ["a", "b"])
    assert subgroup_metrics(["a"] * 9, np.zeros(9, int), np.eye(2)[[0] * 9], ["a", "b"])["gap"] is None


def test_the_file_has_a_row_per_group_and_one_for_the_gap(outputs, tmp_path):
    cells, targets, probabilities = outputs
    write_subgroups(tmp_path / "s.csv", {"tone": subgroup_metrics(cells, targets, probabilities, list("abc"))})
    with open(tmp_path / "s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["value"], row["note"]) for row in rows] == [
        ("dark", ""), ("light", ""), ("other", "too few"), ("light minus dark", "largest gap"),
    ]  # fmt: skip
    assert all(float(row["acc_low"]) <= float(row["acc"]) <= float(row["acc_high"]) for row in rows[:2])
