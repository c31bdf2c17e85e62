"""tests/tools/coverage_check.py on a finished run."""

import json

import numpy as np
from coverage_check import measure

from inference import load
from run.files import read_predictions


def test_the_coverage_of_each_class_is_that_of_the_predicted_sets(finished_run, thin_network):
    rows = measure([str(finished_run)], 0.6)
    results = json.loads((finished_run / "results.json").read_text())
    assert [(name, num_test) for name, _, num_test, *_ in rows[:-1]] == [
        (name, metrics["support"]) for name, metrics in results["test"]["per_class"].items()
    ]
    grade = load(finished_run, "cpu", coverage=0.6)
    paths, targets, _ = read_predictions(finished_run / "test_predictions.csv", grade.classes)
    predictions = grade(paths)
    is_covered = [grade.classes[c] in p.prediction_set for c, p in zip(targets, predictions, strict=True)]
    sizes = [len(p.prediction_set) for p in predictions]
    expected = np.mean(is_covered), np.mean(sizes), np.mean(np.array(sizes) == 1)
    np.testing.assert_allclose(rows[-1][3:], expected)
