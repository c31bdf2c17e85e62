"""The folders of runs that report.py summarizes: finished, interrupted, and those of a cross-validation."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flag_queries import is_neutral, text_of
from flags import build_parser, complete_flags
from run.cli import UserError
from run.files import read_json, read_rows
from run.folder import FOLDS_FILE, FOLDS_RESULTS

NOT_COMPARED = ("seed", "fold")  # flags that may differ between the runs of a group


@dataclass
class RunRecord:
    """What the files of a run say. results: of `results.json`, None for a run that is not finished."""

    folder: Path
    args: dict
    results: dict | None
    history: list[dict[str, float]]  # rows of history.csv

    def test_metrics(self) -> dict:
        return (self.results or {}).get("test") or {}

    def classes(self) -> tuple[str, ...] | None:
        classes = (self.results or {}).get("classes")
        return tuple(classes) if classes else None

    def val_balanced_acc(self) -> float | None:
        """Of the evaluated model; of the best epoch so far if the run is not finished."""
        if self.results:
            return (self.results.get("val") or {}).get("balanced_acc")
        return max((row["val_balanced_acc"] for row in self.history if "val_balanced_acc" in row), default=None)

    def max_megapixels(self) -> float:
        return self.args.get("max_megapixels") or build_parser().get_default("max_megapixels")

    def epochs_done(self) -> str:
        """-> "8", or "3 of 8" if the run is not finished."""
        if self.results:
            return str(self.results.get("epochs", "-"))
        return f"{len(self.history)} of {self.args.get('epochs', '?')}"


@dataclass
class RunGroup:
    """Runs of the same classes whose flags differ only in seed and fold."""

    title: str  # the flags that differ from those of other groups, or the folder
    flags: dict
    runs: list[RunRecord]

    def count(self) -> str:
        return "1 run" if len(self.runs) == 1 else f"{len(self.runs)} runs"

    def val_balanced_acc(self) -> float:
        """Mean over the runs, by which groups are sorted; -1 if none was validated."""
        values = [value for run in self.runs if (value := run.val_balanced_acc()) is not None]
        return sum(values) / len(values) if values else -1


def is_cross_validation(folder: Path) -> bool:
    return (folder / FOLDS_FILE).exists() or (folder / FOLDS_RESULTS).exists()


def fold_folders(folder: Path) -> list[Path]:
    """-> the folders of the folds of a cross-validation in the order of their numbers."""
    numbered = [path for path in folder.glob("fold_*") if path.name[5:].isdecimal() and path.is_dir()]
    return sorted(numbered, key=lambda path: int(path.name[5:]))


def read_records(folders: Iterable[str | Path]) -> list[RunRecord]:
    """Read each run once, those of a cross-validation fold by fold. Prints the folders that hold no run.

    Raises UserError, naming the file, for a damaged `args.json` or `results.json`.
    """
    records, seen = [], set()
    for folder in map(Path, folders):
        folder = folder.resolve()
        members = fold_folders(folder) if is_cross_validation(folder) else [folder]
        for member in members:
            if member in seen:
                continue
            seen.add(member)
            if record := read_record(member):
                records.append(record)
            else:
                problem = "holds no run with a finished epoch" if member.exists() else "does not exist"
                print(f"skipped: {member} {problem}")
    return records


def read_record(folder: Path) -> RunRecord | None:
    """-> None if the folder holds neither results nor the history of a run."""
    results = read_json(folder / "results.json") if (folder / "results.json").exists() else None
    if results is not None and not (isinstance(results, dict) and isinstance(results.get("test"), dict)):
        raise UserError(f"{folder / 'results.json'} is damaged; restore it or delete the run")
    if results is None and not (folder / "history.csv").exists():
        return None
    if results is None and not (folder / "args.json").exists():
        return None
    args = read_json(folder / "args.json")
    if not isinstance(args, dict):
        raise UserError(f"{folder / 'args.json'} is damaged; restore it or delete the run")
    return RunRecord(folder, args, results, _read_history(folder / "history.csv"))


def _read_history(path):
    """Rows of numbers. A damaged file costs the curves, not the report."""
    if not path.exists():
        return []
    try:
        rows = [{name: float(value) for name, value in row.items()} for row in read_rows(path)]
    except (ValueError, TypeError, AttributeError, OSError) as error:
        print(f"warning: {path} is damaged ({error}): no curves of this run")
        return []
    return [row for row in rows if math.isfinite(row.get("epoch", math.nan))]


def group_records(records: Sequence[RunRecord]) -> list[RunGroup]:
    """-> groups of runs with the same flags and classes, best validation balanced accuracy first."""
    by_flags = {}
    for record in records:
        flags = complete_flags(record.args)
        flags = {n: v for n, v in flags.items() if not is_neutral(n) and n not in NOT_COMPARED}
        by_flags.setdefault(json.dumps(flags, sort_keys=True), []).append(record)
    flags_of_groups = [json.loads(key) for key in by_flags]
    names = dict.fromkeys(name for flags in flags_of_groups for name in flags)
    differing = [name for name in names if len({json.dumps(flags.get(name)) for flags in flags_of_groups}) > 1]
    groups = []
    for flags, runs in zip(flags_of_groups, by_flags.values(), strict=True):
        values = {name: flags.get(name) for name in differing}
        title = " ".join(f"--{name} {text_of(value)}" for name, value in values.items() if value is not None)
        by_classes = split_by_classes(runs)
        for number, members in enumerate(by_classes, start=1):
            suffix = f" (classes {number})" if len(by_classes) > 1 else ""
            groups.append(RunGroup(f"{title or _common_folder(members)}{suffix}", values, members))
    return sorted(groups, key=lambda group: -group.val_balanced_acc())


def _common_folder(runs):
    """-> the cross-validation of which all runs are folds, else the first run"""
    parents = {run.folder.parent for run in runs}
    return parents.pop() if len(runs) > 1 and len(parents) == 1 and is_cross_validation(*parents) else runs[0].folder


def split_by_classes(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Runs of the same flags can have other classes, if the folders of the data have changed.

    Runs that are not finished say nothing of their classes, and are put with the first.
    """
    groups = {}
    for record in sorted(records, key=lambda record: record.classes() is None):
        key = record.classes() or next(iter(groups), None)
        groups.setdefault(key, []).append(record)
    return list(groups.values())
