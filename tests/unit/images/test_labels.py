"""A table of labels becomes an index: columns, names of images, labels, splits, subjects."""

import os
import pickle
import re
from argparse import Namespace

import numpy as np
import pytest
from helpers import index_of

from flags import SPLITS
from images.folders import ImageIndex
from images.labels import check_columns, index_table
from images.leakage import subjects_of
from images.splits import stratified_split
from images.table_state import table_digest, table_state, with_table
from run.cli import UserError

FILES = ["a.jpg", "b.jpg", "in/c.png", "in/deep/d.jpg"]
TABLE = "img_id,patient_id,diagnostic,age\na,1,MEL,40\nb.jpg,1,NEV,\nc,2,MEL,60\nd.jpg,3,NEV,70\n"


@pytest.fixture
def photos(tmp_path):
    for name in FILES:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    return tmp_path / "photos"


@pytest.fixture
def read(tmp_path, photos):
    """A function: the text of a table, and flags -> the index and the splits."""

    def index(text=TABLE, classes=None, only=None, **flags):
        (tmp_path / "t.csv").write_text(text, encoding="utf-8")
        names = ("image_column", "label_column", "subject_column", "split_column", "group_regex", "folds")
        args = dict.fromkeys([*names, "merge", "drop"]) | {"skip_broken": False, "eval_only": False}
        args |= {"labels": [str(tmp_path / "t.csv")], **flags}
        return index_table(Namespace(**args), [str(photos)], "--data_dirs", classes, only=only)

    return index


def names(index):
    return [os.path.basename(path) for path in index.paths]


def test_images_are_found_by_name_at_any_depth_with_and_without_extension(read, capsys):
    index, splits = read()
    assert names(index) == ["a.jpg", "b.jpg", "c.png", "d.jpg"] and splits is None
    assert index.classes == ["MEL", "NEV"] and index.targets.tolist() == [0, 1, 0, 1]
    assert {name: list(cells) for name, cells in index.columns.items()} == {
        "patient_id": ["1", "1", "2", "3"],
        "age": ["40", "", "60", "70"],
    }
    assert index.subject_column == "patient_id"
    guessed = "--image_column img_id, --subject_column patient_id, --label_column diagnostic"
    assert capsys.readouterr().out == f"--labels: columns guessed by their names: {guessed}\n"


def test_columns_that_flags_name_win_over_guesses(read, capsys):
    text = "path,name,label,grade,lesion_id,who\n9,a,x,0,5,kim\n9,b,x,1,5,lee\n"
    flags = {"image_column": "name", "label_column": ["grade"], "subject_column": "who"}
    index, _ = read(text, **flags)
    assert index.classes == ["0", "1"] and index.subject_column == "who"
    # columns that would have the name of one of a file of predictions
    assert list(index.columns) == ["table_path", "table_label", "lesion_id", "who"]
    out = capsys.readouterr().out
    assert "guessed" not in out and "photos that no row names: 2\n" in out
    assert read(text, **flags | {"subject_column": ""})[0].subject_column is None
    assert read(text, **flags | {"subject_column": None})[0].subject_column == "lesion_id"
    assert read(text, **flags | {"subject_column": None, "group_regex": ""})[0].subject_column is None


def test_one_hot_columns_are_labels(read):
    text = "image,MEL,NEV,BCC,age\na,1.0,0.0,0,5\nb,0,1,0,1\nc,0,1,0,0\nd,0,0,1,0\n"
    index, _ = read(text)
    assert index.classes == ["BCC", "MEL", "NEV"] and index.targets.tolist() == [1, 2, 2, 0]
    assert list(index.columns) == ["age"]
    text = text.replace(",age", ",itch").replace(",5\n", ",1\n")
    with pytest.raises(UserError, match=r"t.csv, row 2 has a 1 in 'MEL' and 'itch'; a row has one class"):
        read(text)
    assert read(text, label_column=["MEL", "NEV", "BCC"])[0].classes == index.classes
    with pytest.raises(UserError, match=r"1 of 4 rows have no label \(.*t.csv, row 5\)"):
        read(text, label_column=["MEL", "NEV"])


def test_published_splits_are_read_in_any_spelling(read):
    text = "image,label,Split\na,x,Training\nb,y,TRAIN\nc,x,valid\nd,y,test\n"
    assert [SPLITS[i] for i in read(text)[1]] == ["train", "train", "val", "test"]
    assert read(text, folds=2)[1] is None and read(text, eval_only=True)[1] is None
    other = text.replace("valid", "holdout")
    assert read(other)[1] is None  # not a column of splits
    with pytest.raises(UserError, match=r"--split_column: 'holdout' in 'Split' \(.*, row 4\) is not train"):
        read(other, split_column="Split")


def test_one_hot_columns_may_be_booleans(read):
    index, _ = read("image,MEL,NEV\na,True,False\nb,False,True\nc,FALSE,TRUE\n")
    assert index.classes == ["MEL", "NEV"] and index.targets.tolist() == [0, 1, 1]


@pytest.mark.parametrize(("split", "folds", "reason"), [("dev", None, "'dev' .*row 4.* is not"), ("val", 3, "--folds")])
def test_splits_that_are_not_used_are_named(read, capsys, split, folds, reason):
    text = f"image,label,Split\na,x,train\nb,y,test\nc,x,{split}\n"
    index, splits = read(text, folds=folds)
    assert splits is None and list(index.columns) == ["Split"]
    assert re.search(f"warning: --labels: the splits in 'Split' are not used: {reason}", capsys.readouterr().out)
    read(text, folds=folds, split_column="")
    assert "warning" not in capsys.readouterr().out


def test_classes_are_merged_and_dropped(read, capsys):
    index, _ = read(merge=["MEL=malign"], drop=None)
    assert index.classes == ["NEV", "malign"]
    text = "image,label\na,0\nb,1\nc,2\nd,\n"
    index, _ = read(text, merge=["0,1=low"], drop=[""])
    assert names(index) == ["a.jpg", "b.jpg", "c.png"] and index.classes == ["2", "low"]
    assert "in no row" not in capsys.readouterr().out  # the dropped one has a row


def test_rows_that_repeat_an_image_are_left_out(read, capsys):
    index, _ = read(TABLE + "a.jpg,1,MEL,41\n")
    assert len(index) == 4 and index.columns["age"][0] == "40"
    assert "1 of 5 rows repeat a row of the same image" in capsys.readouterr().out


REFUSED = {
    "an unknown column": (
        {"label_column": ["dx"]},
        TABLE,
        "--label_column: .*t.csv has no column 'dx'; its col",
    ),
    "two columns of images": ({}, TABLE.replace("age", "file"), "--image_column: .*t.csv has 'img_id' and 'file'"),
    "two columns of labels": ({}, TABLE.replace("age", "dx"), "--label_column: .* has 'diagnostic' and 'dx'"),
    "no column of images": ({}, TABLE.replace("img_id", "id"), "--image_column: none of the columns of .*is called"),
    "no column of labels": ({}, TABLE.replace("diagnostic", "d"), "--label_column: none of the columns of .*is called"),
    "two columns of splits": (
        {},
        "image,label,split,set\na,x,train,val\nb,y,test,test\n",
        "--split_column: .* has 'split' and 'set'; name",
    ),
    "an image that is not there": (
        {},
        TABLE + "e.jpg,4,MEL,\nf,4,NEV,\n",
        "2 of 6 images are not below .*photos: e.jpg, f; add them, or go on without them with --skip_broken",
    ),
    "another case": (
        {},
        TABLE.replace("b.jpg", "B.jpg"),
        r"1 of 4 images are not below .*: B.jpg \(but there is b.jpg: extensions, upper and lower case have to be the",
    ),
    "no name": ({}, TABLE + ",4,MEL,\n", r"1 of 5 images are not below .*: \(an empty cell\); add"),
    "no image at all": ({}, "image,label\nx,0\ny,1\n", "2 of 2 images .*: x, y; check --image_column and --data_dirs"),
    "an empty label": (
        {},
        TABLE.replace("MEL", ""),
        r"2 of 4 rows have no label \(.*t.csv, rows 2, 4\); fill",
    ),
    "two labels": ({}, TABLE + "a,1,NEV,\n", r"a.jpg has two labels: 'MEL' \(.*row 2\) and 'NEV' \(.*row 6\)"),
    "two subjects": ({}, TABLE + "a,7,MEL,\n", "a.jpg has two subjects: '1' .*row 2.* and '7'"),
    "nothing left": ({"drop": ["MEL", "NEV"]}, TABLE, "--drop: no row of .*t.csv is left; its classes are MEL, NEV"),
    "one class": ({"drop": ["MEL"]}, TABLE, "found only one class, 'NEV'"),
    "an unknown class to drop": ({"drop": ["unknown"]}, TABLE, "--drop: there is no class 'unknown'; the"),
    "a class of no checkpoint": (
        {"classes": ["MEL", "SCC"]},
        TABLE,
        r"class 'NEV' \(.*row 3\) is not one of the classes MEL, SCC; rename it, or leave it out with --drop",
    ),
    "an unknown class beside empty labels": (
        {"drop": ["?"]},
        TABLE + "d,3,,\n",
        "--drop: there is no class '[?]'; the classes are MEL, NEV$",
    ),
    "one column of 0 and 1": (
        {},
        "image,malignant\na,0\nb,1\n",
        "and fewer than two columns are all 0 and 1; name the one to use",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_table_that_does_not_fit_is_refused(name, read):
    flags, text, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        read(text, **flags)


def test_images_that_are_not_there_can_be_left_out(read, capsys):
    index, _ = read(TABLE + "e.jpg,4,MEL,\n", skip_broken=True)
    assert len(index) == 4
    assert "warning: --labels: 1 of 5 images are not below" in capsys.readouterr().out


def test_the_same_name_in_two_folders_needs_the_folder(photos, read):
    (photos / "in" / "a.png").touch()
    with pytest.raises(UserError, match=r"'a' \(.*row 2\) is the name of .*photos/a.jpg and of .*photos/in/a.png"):
        read()
    assert names(read(TABLE.replace("\na,", "\nin/a,"))[0])[0] == "a.png"
    assert names(read(TABLE.replace("\na,", "\na.jpg,"))[0])[0] == "a.jpg"


def test_an_image_without_a_subject_is_a_subject_of_its_own(read):
    index, _ = read(TABLE.replace("1,", ","))
    assert len(np.unique(subjects_of(index, None))) == 4
    assert len(np.unique(subjects_of(read()[0], None))) == 3


def test_subjects_of_a_table_stay_together(tmp_path, read, photos):
    rows = [(f"{i:03d}", i // 4, "xy"[i % 2]) for i in range(120)]
    for name, *_ in rows:
        (photos / f"{name}.jpg").touch()
    index, _ = read("image,label,person_id\n" + "".join(f"{name},{c},{p}\n" for name, p, c in rows))
    splits = stratified_split(index, [0.6, 0.2, 0.2], 0, (), subjects_of(index, None))
    of_split = [set(part.columns["person_id"]) for part in splits.values()]
    assert sum(map(len, of_split)) == len(set.union(*of_split)) == 30


def test_an_unknown_column_of_subgroups_is_refused(read):
    index, _ = read()
    with pytest.raises(UserError, match=r"--subgroup_columns: there is no column 'sex' .*: patient_id, age"):
        check_columns(["age", "sex"], index)
    with pytest.raises(UserError, match="there are none without --labels"):
        check_columns(["age"], index_of([1, 1]))
    check_columns(None, index)


def test_the_labels_are_in_the_checkpoint(read):
    index, _ = read()
    splits = {"train": index.subset([2, 0]), "test": index.subset([3, 1])}
    splits = pickle.loads(pickle.dumps(splits))  # as other processes of a training get them
    state = table_state(splits)
    plain = {name: ImageIndex(part.paths, np.zeros(2, int), part.classes) for name, part in splits.items()}
    assert table_state(plain) is None and with_table(plain, {"table": None}) is plain
    restored = with_table(plain, {"table": state})
    for name, part in splits.items():
        assert restored[name].targets.tolist() == part.targets.tolist()
        assert list(restored[name].columns["age"]) == list(part.columns["age"])
        assert restored[name].subject_column == "patient_id"
    for damage in ({"targets": {}}, {"subject_column": "x"}, {"columns": {"train": {}, "test": {"age": 1}}}):
        with pytest.raises(UserError, match="the table of labels in the checkpoint is damaged"):
            with_table(plain, {"table": state | damage})


def test_only_the_rows_of_a_published_split_are_read(read):
    text = "image,label,split\na,x,test\nb,y,test\nz,x,train\n"
    assert names(read(text, split_column="split", only="test")[0]) == ["a.jpg", "b.jpg"]
    with pytest.raises(UserError, match=r"--split_column: no row of .*t.csv is in val"):
        read(text, split_column="split", only="val")


def test_the_digest_of_a_table_changes_with_its_labels_and_subjects(read):
    digests = {
        table_digest({"train": read(text)[0]})
        for text in (TABLE, TABLE.replace("c,2,MEL", "c,2,NEV"), TABLE.replace("c,2", "c,3"), TABLE.replace("40", "41"))
    }
    assert len(digests) == 3 and table_digest({"train": index_of([1, 1])}) is None
