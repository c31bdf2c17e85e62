"""`report.html` of one run, written again from its folder."""

from collections.abc import Sequence
from pathlib import Path

from flags import SPLITS
from images.decode import limit_image_size
from images.folders import ImageIndex
from images.splits import index_of_checkpoint
from images.table_state import with_table
from inference import load
from model import load_checkpoint
from pages import REPORT_FILE, write_report
from run.cli import UserError, attempt
from run.saver import BEST, LAST
from study.run_records import RunRecord


def rewrite_report(run: RunRecord) -> bool:
    """Write the report of a run as the run itself did, with heat maps and augmented images where its model and its
    training images can still be read. A run that is not finished gets a report of the epochs so far.

    -> whether it was written; if not, the reason is printed."""
    limit_image_size(run.max_megapixels())
    splits = model = None
    if run.results:
        if loaded := attempt(lambda: load(_checkpoint_path(run)).models[0], "the report has no heat maps"):
            model = loaded.model
            splits = attempt(lambda: _find_images(loaded.checkpoint, ["train"]), "the report has no augmented images")
    elif (run.folder / LAST).exists():
        splits = attempt(
            lambda: _find_images(load_checkpoint(run.folder / LAST), SPLITS), "the report has no images per class"
        )
    if is_written := write_report(run.folder, splits, None, model):
        print(f"report saved to {run.folder / REPORT_FILE}")
    return is_written


def _checkpoint_path(run):
    """Of the evaluated model: a run of --eval_only has none of its own."""
    path = run.folder / BEST
    return Path(run.args["resume"]) if run.args.get("eval_only") and not path.exists() else path


def _find_images(checkpoint: dict, names: Sequence[str]) -> dict[str, ImageIndex]:
    """The splits in their order, without the cache. Raises UserError if an image is not where it was."""
    index = index_of_checkpoint(checkpoint, checkpoint["args"], "--data_dirs", allow_missing=True)
    position = {path: i for i, path in enumerate(index.paths)}
    paths_of = {split: checkpoint["splits"][split] for split in names}
    if gone := [path for paths in paths_of.values() for path in paths if path not in position]:
        raise UserError(f"{gone[0]} does not exist" + (f", nor do {len(gone) - 1} others" if gone[1:] else ""))
    splits = {split: index.subset([position[path] for path in paths]) for split, paths in paths_of.items()}
    return with_table(splits, checkpoint)
