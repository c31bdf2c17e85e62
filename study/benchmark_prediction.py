"""Prediction from photographs, beside an evaluation of cached images: a measurement of `bench.py`."""

import tempfile
import time
from pathlib import Path

import torch

from dataset_double import DoubleSkinDataset, make_loader
from engine import build_engine
from flag_checks import parse_flags
from images.folders import ImageIndex
from inference import Grader, LoadedModel
from run.files import RowFile
from study import benchmark_common as common
from utils import CBLoss


def prediction_rates(device: torch.device, side: int) -> dict[str, float]:
    """Images per second of `Engine.evaluate` from the cache and of predict.py from JPEG files, with the same model.

    side: of the photographs, in pixels. -> {"cached", "files"}
    """
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        common.write_photos(photos, side)
        index = common.read_into_cache(photos, Path(folder, "cache"))
        grader = random_grader(index, device)
        engine = grader.models[0].engine
        dataset = DoubleSkinDataset(index, grader.image_size, grader.resize)
        loader = make_loader(dataset, grader.batch_size, pin_memory=device.type == "cuda")
        paths = list(index.paths)

        def cached():
            started = time.perf_counter()
            engine.evaluate(loader, "cached")
            return len(paths) / (time.perf_counter() - started)

        def files():
            started = time.perf_counter()
            with RowFile(Path(folder, "predictions.csv"), grader.columns, "--output") as rows:
                for batch in grader.batches(paths):
                    rows.write(map(grader.row, batch.predictions))
            return len(paths) / (time.perf_counter() - started)

        cached(), files()
        return common.median_rates({"cached": cached, "files": files})


def random_grader(index: ImageIndex, device: torch.device) -> Grader:
    """A model with random weights and the default flags, and prediction sets from random outputs."""
    sizes = ["--image_size", str(common.IMAGE_SIZE), "--batch_size", str(common.BATCH_SIZE)]
    args = parse_flags(["--data_dirs", str(Path(index.paths[0]).parents[1]), *sizes])
    engine = build_engine(args, device, CBLoss(index.counts()), len(index.classes))
    engine.model.eval()
    shape = len(index), len(index.classes)
    outputs = {
        "probabilities": torch.softmax(torch.randn(shape), dim=1),
        "targets": torch.from_numpy(index.targets),
    }
    checkpoint = {
        "classes": index.classes,
        "val_outputs": outputs,
        "splits": {"val": list(index.paths)},
        "file_sizes": {"val": torch.from_numpy(index.sizes)},
    }
    return Grader([LoadedModel(engine, checkpoint, args, Path("random"))], False, 0.9, False, None)
