"""Prediction with the thin network of a finished run."""

import pytest

from inference import load
from run.files import read_rows


@pytest.mark.usefixtures("thin_network")
def test_predictions_equal_those_of_the_run_digit_for_digit(finished_run):
    rows = read_rows(finished_run / "test_predictions.csv")
    predictions = load(finished_run, "cpu")([row["path"] for row in rows])
    assert [p.prediction for p in predictions] == [row["prediction"] for row in rows]
    digits = [[f"{value:.7g}" for value in p.probabilities] for p in predictions]
    assert digits == [[row[f"prob_{name}"] for name in ("0", "2", "10")] for row in rows]
