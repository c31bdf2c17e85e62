"""The files of a run: written whole or not at all, as JSON, CSV and predictions."""

import csv
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from run.cli import UserError, printable

HISTORY_COLUMNS = (
    "epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_balanced_acc", "val_macro_f1",
    "learning_rate", "seconds", "images_per_second",
)  # fmt: skip


@contextmanager
def atomic_write(path: str | Path, mode: str = "w", previous: str | None = None) -> Iterator[IO]:
    """Open a temporary file beside `path`; sync it and rename it to `path` once it is complete.

    A crash at any moment leaves the previous file or the new one. mode: "w" (UTF-8 text) or "wb". previous: a name
    under which the previous file is kept. Raises OSError, with the name of the file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # a file name that is not valid UTF-8 gets escapes, which JSON reads back as they were: the file is valid UTF-8
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            _keep(path, path.with_name(previous))
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a failed write does not name its file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _keep(path, previous):
    """Give the file at `path` the second name `previous`, so that there is a file at `path` at any time."""
    link = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        os.replace(path, previous)
    else:
        os.replace(link, previous)
        link.unlink(missing_ok=True)  # os.replace leaves it where both names were the same file already


def _sync_folder(folder):
    """Let the new name of a file survive a power cut too, where the system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Lines:
    """Where a csv.writer writes whose rows end in "\r\n", so that it quotes either of them; they become "\n"."""

    def __init__(self, file):
        self.file = file

    def write(self, line):
        self.file.write(f"{line[:-2]}\n")


def csv_writer(file: IO) -> Any:
    """-> a csv.writer whose rows end in "\n", and that quotes any text which readers would take for several rows."""
    return csv.writer(_Lines(file), lineterminator="\r\n")


def valid_text(text: str) -> str:
    """-> `text` with escapes for what is not valid UTF-8, as in the name of a file from another system."""
    return text.encode("utf-8", "backslashreplace").decode()


def shortened(name: str, letters: int = 40) -> str:
    """-> `printable(name)`, cut to this many letters where it has more, for labels with little room."""
    name = printable(name)
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def write_bytes(path: str | Path, content: bytes, previous: str | None = None) -> None:
    """content: of a checkpoint. previous: see `atomic_write`."""
    with atomic_write(path, "wb", previous) as file:
        file.write(content)


def write_json(path: str | Path, content: Any) -> None:
    with atomic_write(path) as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: str | Path) -> Any:
    """Raises UserError if the file is not valid JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8", errors="surrogateescape"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it or delete it") from error


def read_yaml(path: str | Path, flag: str | None = None) -> Any:
    """The content of a YAML file. flag: the flag that names the file, for error messages.

    Raises UserError if the file cannot be read, is not valid YAML, or lists a key twice (a YAML reader would keep the
    last one).
    """
    import yaml

    where = f"{flag}: {path}" if flag else str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
        content, nodes = yaml.safe_load(text), [yaml.compose(text, yaml.SafeLoader)]
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    for node in nodes:  # which grows: every node once, as an alias is the node of its anchor
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            if repeated := [key for key in keys if keys.count(key) > 1]:
                raise UserError(f"{where}: {repeated[0]} is listed twice; fix or delete one of them")
        if isinstance(node, yaml.CollectionNode):
            children = [child[1] if isinstance(child, tuple) else child for child in node.value]
            nodes += [child for child in children if child not in nodes]
    return content


def refuse_output(output: str | Path, flag: str, overwrite: bool) -> None:
    """Raise UserError, naming `flag`, if no file can be written as `output`, or one exists, unless `overwrite`."""
    output = Path(output)
    if output.is_dir():
        raise UserError(f"{flag}: {output} is a folder; name a file")
    if output.exists() and not output.is_file():
        raise UserError(f"{flag}: {output} is not a regular file")  # such as /dev/null, which would be replaced
    if not output.parent.is_dir():
        raise UserError(f"{flag}: the folder {output.parent} does not exist; create it")
    if output.exists() and not overwrite:
        raise UserError(f"{flag}: {output} already exists; name another file, or add --overwrite to replace it")


def refuse_input(output: str | Path, inputs: Iterable[str | Path], flag: str) -> None:
    """Raise UserError, naming `flag`, if one of the inputs is the file that `output` would replace."""
    if not os.path.exists(output):
        return
    replaced = os.stat(output)
    for path in inputs:
        with suppress(OSError):  # one that cannot be reached
            if os.path.samestat(os.stat(path), replaced):
                raise UserError(f"{flag}: {output} is an input of this command; name another file")


def part_of(path: str | Path) -> Path:
    """-> where the rows of an unfinished `RowFile` are."""
    return Path(f"{path}.part")


class RowFile:
    """A CSV file that is written row by row under the name of `part_of`, and gets its name once it is complete.

    A context; if it is left before `finish`, the rows so far are kept. Each `write` is whole or not there.
    """

    def __init__(self, path: str | Path, columns: Sequence[str], flag: str):
        """flag: the flag that names the file, for error messages. Replaces the file of `part_of`."""
        self.path, self.part, self.columns, self.flag = Path(path), part_of(path), columns, flag
        self.rows, self._size = 0, 0  # that are written; in bytes
        self._is_complete = False

    def __enter__(self) -> "RowFile":
        with self._naming_errors():
            self._file = open(self.part, "w", encoding="utf-8", errors="backslashreplace", newline="")
            self._writer = csv_writer(self._file)
            self._write([self.columns])
        return self

    def write(self, rows: Iterable[Sequence]) -> None:
        """Raises UserError, naming the flag, if there is no room for the rows."""
        rows = list(rows)
        with self._naming_errors():
            self._write(rows)
            self.rows += len(rows)

    def _write(self, rows):
        self._writer.writerows(rows)
        self._file.flush()
        self._size = os.fstat(self._file.fileno()).st_size

    def finish(self) -> None:
        """Rename the complete file. Raises UserError, naming the flag."""
        with self._naming_errors():
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.part, self.path)
            self._is_complete = True
            _sync_folder(self.path.parent)

    @property
    def kept(self) -> str:
        """-> for a message: where the rows so far are."""
        if self._is_complete:
            return f"; {self.path} is complete"
        return f"; the {self.rows} rows so far are in {self.part}" if self.rows else ""

    def __exit__(self, *_):
        if self._file.closed:
            return
        with suppress(OSError):  # what a full disk did not take before
            self._file.close()
        with suppress(OSError):
            if self.rows:
                os.truncate(self.part, self._size)
            else:
                self.part.unlink()

    @contextmanager
    def _naming_errors(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.flag}: {self.path} cannot be written: {error.strerror}") from error


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """Read a file of `write_csv` or `write_predictions`. -> [{column: text}]"""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[Mapping]) -> None:
    """rows: dicts; keys that are not in `columns` are left out."""
    with atomic_write(path) as file:
        writer = csv.DictWriter(_Lines(file), columns, extrasaction="ignore", lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(rows)


def write_history(path: str | Path, history: Iterable[Mapping]) -> None:
    write_csv(path, HISTORY_COLUMNS, history)


PREDICTION_COLUMNS = ("path", "label", "prediction", "correct")  # then one for the probability of each class


def probability_columns(classes: Sequence[str]) -> list[str]:
    """-> the column of each class in a file of predictions."""
    return [f"prob_{name}" for name in classes]


def decimal(value: float) -> str:
    """-> a probability as it is written: 7 digits, about what float32 has."""
    return f"{value:.7g}"


def write_predictions(
    path: str | Path,
    image_paths: Iterable[str],
    targets: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    columns: Mapping[str, Iterable[str]] | None = None,
) -> None:
    """One row per image. image_paths: N; targets: (N,) int; probabilities: (N, C) float; classes: C names; columns:
    {name: N cells} that are written behind the others."""
    columns = columns or {}
    predictions = np.argmax(probabilities, axis=1)
    with atomic_write(path) as file:
        writer = csv_writer(file)
        writer.writerow([*PREDICTION_COLUMNS, *probability_columns(classes), *columns])
        rows = zip(image_paths, targets, predictions, probabilities, *columns.values(), strict=True)
        for image_path, target, prediction, row, *cells in rows:
            correct = int(target == prediction)
            writer.writerow([image_path, classes[target], classes[prediction], correct, *map(decimal, row), *cells])


def read_predictions(path: str | Path, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read a file of `write_predictions`. -> (paths (N,) of str objects, targets (N,) int, probabilities (N, C))

    Raises UserError if the file is not complete, or not of these classes.
    """
    paths, targets, probabilities, position = [], [], array("d"), {name: i for i, name in enumerate(classes)}
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        try:
            header = next(rows, [])
            path_column, label_column = header.index("path"), header.index("label")
            columns = [header.index(column) for column in probability_columns(classes)]
            for row in rows:  # kept as numbers: a million rows of text would take gigabytes
                paths.append(row[path_column])
                targets.append(position[row[label_column]])
                probabilities.extend([float(row[column]) for column in columns])
        except (ValueError, KeyError, IndexError, csv.Error) as error:
            raise UserError(f"{path} is damaged, or not of the classes in results.json; restore it") from error
    return np.array(paths, object), np.array(targets, int), np.array(probabilities).reshape(-1, len(classes))


def read_column(path: str | Path, name: str) -> list[str]:
    """-> the cells of a column of a file of `write_predictions`. Raises UserError if it has no such column."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        try:
            column = next(rows, []).index(name)
            return [row[column] for row in rows]
        except (ValueError, IndexError, csv.Error) as error:
            raise UserError(f"{path} is damaged: it has no column {name!r}; restore it") from error
