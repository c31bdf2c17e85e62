"""--merge and --drop."""

import argparse

import pytest

from images.classes import ClassNames
from images.folders import index_folders
from run.cli import UserError, class_merge


def test_classes_are_merged_and_dropped():
    names = ClassNames(["0, 1=low", "3=2"], ["unknown"])
    assert [names.of(name) for name in ("0", "1", "2", "3", "unknown")] == ["low", "low", "2", "2", None]
    assert names.merged() == {"low": ["0", "1"], "2": ["3"]}


@pytest.mark.parametrize(
    ("merge", "drop", "message"),
    [
        (["0,1=a", "1,2=b"], [], "--merge: class '1' is listed twice"),
        (["0,1=a"], ["1"], "--merge: class '1' is listed in --merge and in --drop"),
        (["0,7=a"], [], "--merge: there is no class '7'; the classes are 0, 1, 2"),
        ([], ["x"], "--drop: there is no class 'x'; the classes are 0, 1, 2"),
    ],
)
def test_a_wrong_name_is_refused(merge, drop, message):
    with pytest.raises(UserError, match=message):
        ClassNames(merge, drop).check(["2", "0", "1"])


def test_a_name_with_a_comma_is_quoted():
    names = ClassNames(['"x, y", z=a=b', "c=d"])
    assert names.merged() == {"b": ["x, y", "z=a"], "d": ["c"]}
    with pytest.raises(argparse.ArgumentTypeError, match="is not of the form A,B=NAME"):
        class_merge("a\nb=c")


def test_class_folders_are_merged_and_dropped(data_dir):
    plain, index = index_folders([data_dir]), index_folders([data_dir], names=ClassNames(["0,10=9"], []))
    assert plain.classes == ["0", "2", "10"] and plain.counts().tolist() == [20, 10, 5]
    assert index.classes == ["2", "9"] and index.counts().tolist() == [10, 25]  # merged names sort naturally
    assert sorted(index.paths) == sorted(plain.paths)
    dropped = index_folders([data_dir], names=ClassNames([], ["2", ""]))
    assert dropped.classes == ["0", "10"] and dropped.counts().tolist() == [20, 5]
    tests = index_folders([data_dir], ["2", "9"], "--test_dirs", names=ClassNames(["0,10=9"], []))
    assert tests.classes == ["2", "9"] and tests.targets.tolist() == index.targets.tolist()
