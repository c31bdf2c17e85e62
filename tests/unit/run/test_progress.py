"""How far a training is: the best epoch, the end by --patience, the time left."""

import pytest

from run.progress import Progress, duration


def trained(*metrics, seconds=60.0):
    progress = Progress()
    for epoch, metric in enumerate(metrics):
        progress.add_epoch({"epoch": epoch, "val_macro_f1": metric, "seconds": seconds * (epoch + 1)}, "val_macro_f1")
    return progress


def test_a_run_has_stalled_after_patience_epochs_without_improvement():
    assert not trained(0.5, 0.4).has_stalled(2, 0)
    assert trained(0.5, 0.4, 0.5).has_stalled(2, 0)
    assert not trained(0.5, 0.4, 0.6).has_stalled(2, 0)
    assert not trained(0.5, 0.4, 0.4).has_stalled(None, 0)
    assert not Progress().has_stalled(1, 0)


def test_epochs_before_the_last_stage_do_not_count():
    assert not trained(0.5, 0.4, 0.4, 0.4).has_stalled(2, first_epoch=3)
    assert trained(0.5, 0.4, 0.4, 0.4, 0.4).has_stalled(2, first_epoch=3)


def test_the_time_left_is_that_of_the_last_three_epochs():
    progress = trained(0.1, 0.2, 0.3, 0.4)  # 1, 2, 3 and 4 minutes
    assert progress.seconds_left(6) == pytest.approx(2 * 180) and progress.seconds_left(4) == 0
    assert progress.hours_trained() == pytest.approx(10 / 60)


def test_durations_are_written_in_the_unit_that_fits():
    assert [duration(s) for s in (0.4, 59, 60, 3569, 3600, 7500, 90000)] == [
        "0 s", "59 s", "1 min", "59 min", "1 h 00 min", "2 h 05 min", "25 h 00 min",
    ]  # fmt: skip
