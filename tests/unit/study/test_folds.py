"""With which flags a cross-validation is resumed."""

import pytest

from flag_checks import parse_flags
from run.cli import UserError
from run.files import read_json, write_json
from study.folds import check_and_record_folds


def test_folds_that_are_older_than_a_flag_were_trained_with_its_default(tmp_path):
    path = tmp_path / "folds_begun.json"

    def check(*flags):
        check_and_record_folds(path, parse_flags(["--demo", "--folds", "3", *flags]))

    check()
    content = read_json(path)
    del content["flags"]["gamma"]
    write_json(path, content)
    check("--gamma", "2")
    with pytest.raises(UserError, match=r"^--run_dir: .* with other settings \(gamma: 2\.0, now 3\.0\)"):
        check("--gamma", "3")
