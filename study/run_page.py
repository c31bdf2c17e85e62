"""`report.html` of one run, written again from its folder."""

from collections.abc import Callable
from pathlib import Path

from flags import data_folders
from images.decode import limit_image_size
from images.folders import index_folders
from inference import load
from pages import REPORT_FILE, write_report
from run.cli import UserError, first_line
from run.saver import BEST
from study.run_records import RunRecord


def rewrite_report(run: RunRecord) -> None:
    """Write the report of a run as the run itself did, with heat maps and augmented images where its model and its
    training images can still be read. A run that is not finished gets a report of the epochs so far."""
    limit_image_size(run.max_megapixels())
    splits = model = None
    if run.results and (loaded := _attempt("heat maps", lambda: load(_checkpoint_path(run)).models[0])):
        model = loaded.model
        splits = _attempt("augmented images", lambda: {"train": _training_images(loaded.checkpoint)})
    if write_report(run.folder, splits, None, model):
        print(f"report saved to {run.folder / REPORT_FILE}")


def _attempt(what: str, read: Callable):
    """-> what `read()` returns; after a failure None: it is only a part of the report."""
    try:
        return read()
    except Exception as error:
        print(f"warning: the report has no {what} ({first_line(error) or type(error).__name__})")
        return None


def _checkpoint_path(run):
    """Of the evaluated model: a run of --eval_only has none of its own."""
    path = run.folder / BEST
    return Path(run.args["resume"]) if run.args.get("eval_only") and not path.exists() else path


def _training_images(checkpoint):
    """The training split in its order, without the cache. Raises UserError if an image is not where it was."""
    index = index_folders(data_folders(checkpoint["args"]), checkpoint["classes"], "--data_dirs", allow_missing=True)
    position = {path: i for i, path in enumerate(index.paths)}
    if gone := [path for path in checkpoint["splits"]["train"] if path not in position]:
        raise UserError(f"{gone[0]} does not exist" + (f", nor do {len(gone) - 1} others" if gone[1:] else ""))
    return index.subset([position[path] for path in checkpoint["splits"]["train"]])
