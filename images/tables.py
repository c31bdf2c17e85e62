"""Tables of labels as they come: CSV with any usual separator and encoding, or Excel's .xlsx -> columns of text."""

import codecs
import csv
import io
import itertools
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from run.cli import UserError, first_line, printable
from run.folder import check_is_file

FLAG = "--labels"
SEPARATORS = (",", ";", "\t")
KOREAN = "cp949"  # in which Excel of a Korean Windows saves CSV files
SEPARATOR_LINE = re.compile(r"(sep=([,;\t]))\r?\n")  # the first line, for Excel
LONGEST_CELL = 2**20  # characters
BLOCK = 512  # rows at a time: fewer lists than start the garbage collector
MAX_SHARED = 2**16  # different texts of a column
SHOWN_COLUMNS, SHOWN_ROWS = 30, 5  # in a message
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
OLD_EXCEL, ZIP = b"\xd0\xcf\x11\xe0", b"PK\x03\x04"  # how the files of Excel begin, before 2007 and since
OLD_EXCEL_PROBLEM = "is an Excel file of the old format, or has a password; save it as .xlsx without one, or as CSV"


class Table:
    """One or several files below each other. A cell is text without spaces around it, "" where it is empty.

    columns: {name: N cells}, in the order of the files. A column that a file lacks is empty in its rows.
    """

    def __init__(self):
        self.columns: dict[str, list[str]] = {}
        self._rows = array("l")  # the number of each row in its file, as a spreadsheet counts
        self._starts, self._files, self._columns_of = [], [], {}  # where each file begins; {file: its columns}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, path: str, header: Sequence[str], blocks: Iterable[tuple[Sequence[int], list[list[str]]]]) -> None:
        """Append a file. header: names, "" for a column that is left out; blocks: (numbers of rows, their cells)."""
        self._starts.append(len(self))
        self._files.append(path)
        self._columns_of[path] = [name for name in header if name]
        for name in self._columns_of[path]:
            self.columns.setdefault(name, [""] * len(self))
        known = {name: {} for name in header}  # equal texts share their memory
        for numbers, rows in blocks:
            self._rows.extend(numbers)
            for name, cells in zip(header, zip(*rows, strict=True), strict=True):
                if not name:
                    continue
                cells = list(map(str.strip, cells))
                if known[name] is not None:
                    cells = list(map(known[name].setdefault, cells, cells))
                    if len(known[name]) > MAX_SHARED:  # names of images, which are all different
                        known[name] = None
                self.columns[name] += cells
        for cells in self.columns.values():
            cells += [""] * (len(self) - len(cells))

    def place(self, i: int) -> str:
        """-> for a message: the file and the row of row i."""
        return f"{printable(self._file_of(i))}, row {self._rows[i]}"

    def places(self, positions: Sequence[int]) -> str:
        """-> for a message: files and numbers of the first of these rows."""
        listed, positions = [], list(map(int, positions))
        shown = positions[:SHOWN_ROWS]
        for path, group in itertools.groupby(shown, self._file_of):
            numbers = [str(self._rows[i]) for i in group]
            listed.append(f"{printable(path)}, row{'s' * (len(numbers) > 1)} {', '.join(numbers)}")
        more = len(positions) - len(shown)
        return "; ".join(listed) + (f" and {more} more" if more else "")

    def _file_of(self, i):
        return self._files[bisect_right(self._starts, i) - 1]

    def require(self, name: str, flag: str) -> None:
        """Raise UserError, naming `flag`, unless each file has the column `name`."""
        for path, columns in self._columns_of.items():
            if name not in columns:
                raise UserError(f"{flag}: {printable(path)} has no column {name!r}; its columns are {_listed(columns)}")

    def listed_columns(self) -> str:
        """-> for a message: the names of the columns."""
        return _listed(list(self.columns))


def _listed(names):
    more = f" and {len(names) - SHOWN_COLUMNS} more" if len(names) > SHOWN_COLUMNS else ""
    return ", ".join(map(printable, names[:SHOWN_COLUMNS])) + more


def read_tables(paths: Sequence[str | Path]) -> Table:
    """Read the files of `--labels`, one after another. Prints the encoding of a file that is not in UTF-8.

    Raises UserError, naming the file, for what cannot be read and what is not a table.
    """
    table = Table()
    for path in map(str, paths):
        check_is_file(path, FLAG)
        records = enumerate(_excel_rows(path) if path.lower().endswith(".xlsx") else _text_rows(path), start=1)
        number, cells = next(((number, cells) for number, cells in records if any(cells)), (0, []))
        header = _header(path, cells)
        table.add(path, header, _blocks(path, header, (cells for _, cells in records), number + 1))
    if not len(table):
        raise UserError(f"{FLAG}: {' '.join(map(printable, map(str, paths)))} has a header, but no rows")
    return table


def _header(path, cells):
    names = [cell.strip() for cell in cells]
    while names and not names[-1]:
        names.pop()
    if not any(names):
        raise UserError(f"{FLAG}: {printable(path)} is empty; expected a table whose first row names the columns")
    for name in names:
        if name and names.count(name) > 1:
            raise UserError(f"{FLAG}: {printable(path)} has two columns {name!r}; rename or delete one of them")
    return names


def _blocks(path, header, records, start) -> Iterator[tuple[Sequence[int], list[list[str]]]]:
    """-> (numbers, cells) of the rows that are not blank, with as many cells as the header, in blocks.

    start: number of the first of `records`. Raises UserError for a row of another length.
    """
    width = len(header)
    while block := list(itertools.islice(records, BLOCK)):
        numbers = range(start, start + len(block))
        start += len(block)
        if set(map(len, block)) != {width} or not all(map(any, block)):
            numbers = [number for number, cells in zip(numbers, block, strict=True) if any(cells)]
            block = [
                _of_width(cells, path, number, header)
                for cells, number in zip(filter(any, block), numbers, strict=True)
            ]
        if block:
            yield numbers, block


def _of_width(cells, path, number, header):
    width = len(header)
    if len(cells) < width or any(cells[width:]):
        advice = "complete the row" if len(cells) < width else "quote cells that contain the separator"
        raise UserError(
            f"{FLAG}: {printable(path)}, row {number} has {len(cells)} cells, but the header has {width} "
            f"({_listed(header)}); {advice}"
        )
    return cells[:width]


# -------------------------------------------------------------------------------------------------------------- text


def _text_rows(path) -> Iterator[list[str]]:
    """-> the cells of each row of a CSV file, blank ones too."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{FLAG}: {printable(path)} cannot be read: {error.strerror}") from error
    _refuse_other_kinds(path, content)
    text = _decoded(path, content)
    del content
    if hint := SEPARATOR_LINE.match(text):
        text = text[hint.end(1) :]  # its line end stays, so that rows have their numbers
    separator = hint[2] if hint else _separator(text)
    previous = csv.field_size_limit(LONGEST_CELL)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        yield from rows
    except csv.Error as error:
        raise UserError(
            f"{FLAG}: {printable(path)} is not a table: line {rows.line_num} ends in an unbalanced quote or an "
            f"endless cell ({error}); fix it"
        ) from error
    finally:
        csv.field_size_limit(previous)


def _refuse_other_kinds(path, content):
    start = content[:1000].removeprefix(codecs.BOM_UTF8).lstrip().lower()
    problem = None
    if not start:
        problem = "is empty; expected a table whose first row names the columns"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        problem = "is an HTML page, not a table: the download failed, or needs a login; download the table again"
    elif start.startswith(b"version https://git-lfs"):
        problem = "is a Git LFS pointer, not a table; run git lfs pull"
    elif content.startswith(ZIP):
        problem = "is an Excel file or another zip file; if it is an Excel file, rename it to end in .xlsx"
    elif content.startswith(OLD_EXCEL):
        problem = OLD_EXCEL_PROBLEM
    if problem:
        raise UserError(f"{FLAG}: {printable(path)} {problem}")


def _decoded(path, content):
    """The text of a file. UTF-8, UTF-16, or else CP949; what is not UTF-8 is printed."""
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), None)
    if encoding is None and b"\0" in content[:1000]:  # ASCII letters in UTF-16, without the mark that names it
        encoding = "utf-16-be" if content[0] == 0 else "utf-16-le"
    for candidate in [encoding] if encoding else ["utf-8", KOREAN]:
        try:
            text = content.decode(candidate)
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            break
        if candidate not in ("utf-8", "utf-8-sig"):
            print(f"{FLAG}: {printable(path)} is read as {candidate.upper()}")
        return text
    raise UserError(
        f"{FLAG}: {printable(path)} is not text in UTF-8, UTF-16 or CP949; save it as CSV in UTF-8, or as .xlsx"
    )


def _separator(text):
    """The separator that gives the first row the most cells."""
    first = next((line for line in io.StringIO(text[:LONGEST_CELL], newline="") if line.strip()), "")

    def width(separator):
        try:
            return len(next(csv.reader([first], delimiter=separator), []))
        except csv.Error:
            return 0

    return max(SEPARATORS, key=width)


# ------------------------------------------------------------------------------------------------------------- Excel


def _excel_rows(path) -> Iterator[list[str]]:
    """-> the cells of each row of the first sheet, blank ones too."""
    try:
        import openpyxl
    except ImportError as error:
        raise UserError(
            f"{FLAG}: to read {printable(path)}, install the package openpyxl (pip install openpyxl), or save it as CSV"
        ) from error
    try:
        with open(path, "rb") as file:
            if file.read(len(OLD_EXCEL)) == OLD_EXCEL:
                raise UserError(f"{FLAG}: {printable(path)} {OLD_EXCEL_PROBLEM}")
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        sheets = book.worksheets
        if len(sheets) > 1:
            print(f"{FLAG}: {printable(path)} has {len(sheets)} sheets; the first one, {sheets[0].title!r}, is read")
        width = 0
        sheets[0].reset_dimensions()  # those of some programs are wrong: rows would be cut off or filled up
        for cells in sheets[0].iter_rows(values_only=True):
            texts = list(map(_text_of_cell, cells))
            while texts and not texts[-1]:
                texts.pop()
            width = width or len(texts)  # of the header
            yield texts + [""] * (width - len(texts))
        book.close()
    except OSError as error:
        raise UserError(f"{FLAG}: {printable(path)} cannot be read: {error.strerror or first_line(error)}") from error
    except (ValueError, KeyError, IndexError, TypeError, SyntaxError, EOFError, RuntimeError, *_zip_errors()) as error:
        raise UserError(f"{FLAG}: {printable(path)} is not an Excel file ({first_line(error)})") from error


def _zip_errors():
    """What a damaged zip file raises besides built-in errors."""
    import zipfile
    import zlib

    return zipfile.BadZipFile, zlib.error


def _text_of_cell(value):
    """Grades that Excel stores as floating-point numbers are written as whole ones: 3, not 3.0."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
