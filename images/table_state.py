"""The labels of a table in a checkpoint, so that a resumed run needs the table no more."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from images.folders import ImageIndex, Paths
from run.cli import UserError


def table_state(splits: Mapping[str, ImageIndex]) -> dict[str, Any] | None:
    """-> what a checkpoint keeps of a table: None if the classes are folders, else

    {"targets": {split: (N,) int64}, "columns": {split: {name: {"letters": the bytes of all cells, uint8, "ends": (N,)
    int64, where each cell ends in them}}}, "subject_column": its name or None}.
    """
    if all(index.columns is None for index in splits.values()):
        return None
    return {
        "targets": {split: torch.tensor(index.targets) for split, index in splits.items()},
        "columns": {
            split: {
                name: {"letters": torch.tensor(cells.letters), "ends": torch.tensor(cells.ends)}
                for name, cells in index.columns.items()
            }
            for split, index in splits.items()
        },
        "subject_column": next(iter(splits.values())).subject_column,
    }


def with_table(splits: dict[str, ImageIndex], checkpoint: Mapping[str, Any]) -> dict[str, ImageIndex]:
    """The splits of a checkpoint with their labels and columns, if those were of a table.

    splits: {split: its images in their order}. Raises UserError if the checkpoint has been altered.
    """
    state = checkpoint["table"]
    if not state:
        return splits
    try:
        subject_column, restored = state["subject_column"], {}
        for split, index in splits.items():
            columns = {
                name: Paths.from_arrays(cells["letters"].numpy(), cells["ends"].numpy())
                for name, cells in state["columns"][split].items()
            }
            targets = state["targets"][split].numpy()
            is_whole = {len(index)} == {len(targets), *map(len, columns.values())}
            if not is_whole or (subject_column is not None and subject_column not in columns):
                raise ValueError
            restored[split] = replace(index, targets=targets, columns=columns, subject_column=subject_column)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError("--resume: the table of labels in the checkpoint is damaged; restore the file") from error
    return restored


def table_digest(splits: Mapping[str, ImageIndex]) -> str | None:
    """-> what changes with the images, labels and subjects of a table, in their order; None if the classes are folders.

    With another table, folds and seeds would be of other splits, and comparisons of other labels.
    """
    if all(index.columns is None for index in splits.values()):
        return None
    digest = hashlib.sha256()
    for index in splits.values():
        subjects = [index.columns[index.subject_column].letters] if index.subject_column else []
        for array in (index.paths.letters, index.targets, *subjects):
            digest.update(array.tobytes())
    return digest.hexdigest()
