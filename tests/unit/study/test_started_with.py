"""A folder is continued only with the settings that it was started with."""

import pytest

from run.cli import UserError
from study.started_with import check_same_settings


def test_a_changed_setting_is_named_with_its_values():
    previous = {"--gamma": 2.0, "--beta": 0.9, "removed": 1}
    check_same_settings(previous, {"--gamma": 2.0, "--beta": 0.9, "added": 1}, "--run_dir", "the folds in x")
    with pytest.raises(UserError) as error:
        check_same_settings(previous, {"--beta": 0.9, "--gamma": 1.0}, "--run_dir", "the folds in x")
    assert str(error.value) == (
        "--run_dir: the folds in x was started with other settings (--gamma: 2.0, now 1.0); choose another --run_dir"
    )
    with pytest.raises(UserError, match=r"other settings \(images\);"):
        check_same_settings({"images": "x" * 90}, {"images": "y" * 90}, "--run_dir", "it")
