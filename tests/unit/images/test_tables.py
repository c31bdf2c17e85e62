"""Tables of labels: separators, encodings, Excel, and what is no table."""

import re
import struct
import sys
import tracemalloc
from zipfile import ZipFile

import pytest

from images.tables import MAX_SHARED, read_tables
from run.cli import UserError

TEXT = "img_id,diagnostic,region\na.jpg,비립종,NOSE\nb.jpg,MEL,\n"
COLUMNS = {"img_id": ["a.jpg", "b.jpg"], "diagnostic": ["비립종", "MEL"], "region": ["NOSE", ""]}


def write(tmp_path, text, name="t.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_commas_semicolons_and_tabs_separate_cells(tmp_path, separator, end):
    path = write(tmp_path, TEXT.replace(",", separator).replace("\n", end))
    assert read_tables([path]).columns == COLUMNS


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("utf-8", None),
        ("utf-8-sig", None),
        ("cp949", "CP949"),
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16-LE"),
        ("utf-16-be", "UTF-16-BE"),
    ],
)
def test_encodings_are_recognized_and_named(tmp_path, capsys, encoding, name):
    path = write(tmp_path, TEXT, encoding=encoding)
    assert read_tables([path]).columns == COLUMNS
    assert capsys.readouterr().out == (f"--labels: {path} is read as {name}\n" if name else "")


def test_quoted_cells_may_contain_separators_quotes_and_newlines(tmp_path):
    table = read_tables([write(tmp_path, 'image,note,label\na,"red, ""dry""\nand old", 1 \n\n,,\nb,,2\n')])
    assert table.columns["note"] == ['red, "dry"\nand old', ""] and table.columns["label"] == ["1", "2"]
    assert table.place(1).endswith("t.csv, row 5")  # as a spreadsheet counts, with the blank rows


def test_several_tables_are_read_below_each_other(tmp_path):
    paths = [write(tmp_path, "image,label\na,1\n", "a.csv"), write(tmp_path, "label;image;age\n2;b;40\n", "b.csv")]
    table = read_tables(paths)
    assert table.columns == {"image": ["a", "b"], "label": ["1", "2"], "age": ["", "40"]}
    assert table.places([0, 1]) == f"{paths[0]}, row 2; {paths[1]}, row 2"
    with pytest.raises(
        UserError, match=rf"--subject_column: {paths[0]} has no column 'age'; its columns are image, la"
    ):
        table.require("age", "--subject_column")


def test_the_line_that_names_the_separator_and_blank_lines_before_the_header_are_passed_over(tmp_path):
    for start in ("sep=;\n", "\n;\n", "sep=;\r\n\n"):
        table = read_tables([write(tmp_path, f"{start}image;label\na;1,5\n")])
        assert table.columns == {"image": ["a"], "label": ["1,5"]}
        assert table.place(0).endswith(f"row {start.count(chr(10)) + 2}")


def test_columns_without_a_name_are_left_out(tmp_path):
    table = read_tables([write(tmp_path, ",image,label,,\n0,a,1,,\n1,b,2\n2,c,3,,,\n")])
    assert table.columns == {"image": ["a", "b", "c"], "label": ["1", "2", "3"]}


NO_TABLES = {
    "an empty file": (b" \n", "is empty"),
    "separators only": (b",,\n,,\n", "is empty"),
    "a header only": (b"image,label\n", "has a header, but no rows"),
    "an HTML page": (b"\xef\xbb\xbf <!DOCTYPE html><html>", "is an HTML page"),
    "an Excel file by another name": (b"PK\x03\x04\0\0", "rename it to end in .xlsx"),
    "an old Excel file": (b"\xd0\xcf\x11\xe0\xa1\xb1", "or has a password; save it as .xlsx without one"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "another encoding": ("image,label\na,é\xff\n".encode("latin-1"), "is not text in UTF-8, UTF-16 or CP949"),
    "a binary file": (bytes(range(256)) * 5, "is not text in UTF-8, UTF-16 or CP949"),
    "a short row": (
        b"image,label,age\na,1,2\nb,1\n",
        "row 3 has 2 cells, but the header has 3 \\(image, label, age\\); complete",
    ),
    "a long row": (b"image,label\na,1,2\n", "row 2 has 3 cells.*; quote"),
    "an open quote": (b'image,label\na,1\nb,"2\nc,3\n', "line 4 ends in an unbalanced quote"),
    "a column twice": (b"image,label,label\na,1,2\n", "two columns 'label'"),
}


@pytest.mark.parametrize("name", NO_TABLES)
def test_what_is_not_a_table_is_refused(tmp_path, name):
    content, message = NO_TABLES[name]
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"--labels: .*t.csv.* {message}|--labels: .*t.csv {message}"):
        read_tables([tmp_path / "t.csv"])


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--labels: .*none.csv does not exist"):
        read_tables([tmp_path / "none.csv"])


def test_excel_files_are_read_with_openpyxl(tmp_path, capsys):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in [["이미지", "grade", "age"], ["a.jpg", 3, 40.0], [], ["b.jpg", 0, None]]:
        book.active.append(row)
    book.create_sheet("notes").append(["x"])
    book.save(tmp_path / "t.xlsx")
    table = read_tables([tmp_path / "t.xlsx"])
    assert table.columns == {"이미지": ["a.jpg", "b.jpg"], "grade": ["3", "0"], "age": ["40", ""]}
    assert table.place(1).endswith("row 4")
    assert "has 2 sheets; the first one, 'Sheet', is read" in capsys.readouterr().out
    for content in (b"", b"<html>", b"PK\x03\x04" + b"\0" * 50):
        (tmp_path / "no.xlsx").write_bytes(content)
        with pytest.raises(UserError, match=r"no.xlsx is not an Excel file"):
            read_tables([tmp_path / "no.xlsx"])
    (tmp_path / "no.xlsx").write_bytes(NO_TABLES["an old Excel file"][0])
    with pytest.raises(UserError, match=r"no.xlsx is an Excel file of the old format, or has a password"):
        read_tables([tmp_path / "no.xlsx"])
    for stated in (b"A1", b"A1:XFD1048576"):  # the size of the sheet, as some programs write it
        with ZipFile(tmp_path / "t.xlsx") as book, ZipFile(tmp_path / "stated.xlsx", "w") as other:
            for name in book.namelist():
                content = book.read(name).replace(b'<dimension ref="A1:C4"', b'<dimension ref="%s"' % stated)
                other.writestr(name, content)
                assert name != "xl/worksheets/sheet1.xml" or stated in content
        assert read_tables([tmp_path / "stated.xlsx"]).columns == table.columns


@pytest.mark.parametrize("field, value", [(8, 1), (10, 99), (None, 255)])
def test_a_damaged_excel_file_is_refused(tmp_path, field, value):
    """Its entries claim to be encrypted, or to be compressed by an unknown method, or cannot be decompressed."""
    openpyxl = pytest.importorskip("openpyxl")
    path, book = tmp_path / "t.xlsx", openpyxl.Workbook()
    book.active.append(["image", "label"])
    book.save(path)
    content = bytearray(path.read_bytes())
    for entry in re.finditer(b"PK\1\2", bytes(content)):
        (header,) = struct.unpack_from("<L", content, entry.start() + 42)
        first_byte = header + 30 + sum(struct.unpack_from("<HH", content, header + 26))
        content[first_byte if field is None else entry.start() + field] = value
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"t.xlsx is not an Excel file \("):
        read_tables([path])


def test_without_openpyxl_an_excel_file_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(UserError, match="pip install openpyxl"):
        read_tables([write(tmp_path, "", "t.xlsx")])


def test_equal_texts_share_their_memory(tmp_path):
    rows = 2 * MAX_SHARED
    path = write(tmp_path, "image,label\n" + "".join(f"{i},a long name of a class {i % 3}\n" for i in range(rows)))
    tracemalloc.start()
    try:
        table = read_tables([path])
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(table) == rows and kept < 120 * rows  # 70 for the name of an image, 8 for a label
