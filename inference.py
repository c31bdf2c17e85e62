"""Prediction: the classes of photographs by one trained model, or by the mean of several."""

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from calibration import PredictionSets, ValOutputs, adjust
from engine import Engine, build_engine
from flag_checks import check_inherited
from flag_queries import is_ordinal, shown_at_any_angle
from flags import NOT_INHERITED, complete_flags
from images.augment import views
from images.decode import limit_image_size, to_square, warn_of_other_decoder
from images.decode_ahead import DecodedBatches
from images.device_batches import DeviceBatches
from images.folders import natural_key
from model import Model, load_checkpoint, weights_do_not_fit
from run.cli import UserError, printable
from run.files import decimal, probability_columns, read_json, read_predictions, valid_text
from run.folder import FOLDS_FILE
from run.machine import choose_device, out_of_memory_reason, set_float32_precision
from run.saver import BEST

FLAG = "MODEL"  # of predict.py
MAX_PIXELS = 2**24  # of a batch, for which a forward pass of the network needs about 5 GB
# tensors of a checkpoint that are not needed any more once the model is built: twice its size
NOT_KEPT = ("model_state_dict", "raw_state_dict", "optimizer_state_dict", "scheduler_state_dict", "rng_state")
MAX_LISTED = 20  # classes, in a message


# --------------------------------------------------------------------------------------------------------- the models


@dataclass
class LoadedModel:
    """A trained model in evaluation mode on its device.

    checkpoint: its content, without the tensors that only a training needs; args: all flags, with defaults for those
    that did not exist when it was trained.
    """

    engine: Engine
    checkpoint: dict
    args: argparse.Namespace
    path: Path

    @property
    def model(self) -> Model:
        return self.engine.model


def find_checkpoints(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """-> the checkpoints that are named: files, the best model of a run folder, those of a cross-validation's folds.

    Each once, however it is named. Raises UserError for anything else.
    """
    found = {}
    for path in map(Path, [paths] if isinstance(paths, (str, Path)) else paths):
        for checkpoint in _checkpoints_of(path):
            found.setdefault(os.path.realpath(checkpoint), checkpoint)
    return list(found.values())


def _checkpoints_of(path):
    if not path.exists():
        raise UserError(f"{FLAG}: {path} does not exist")
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{FLAG}: {path} is not a regular file")  # opening a named pipe would wait forever
    if (path / BEST).exists():
        return [path / BEST]
    folds = sorted(path.glob(f"fold_*/{BEST}"), key=lambda file: natural_key(file.parent.name))
    if not folds:
        raise UserError(
            f"{FLAG}: {path} holds no {BEST}; pass a run folder, a checkpoint, or the folder of a cross-validation"
        )
    if (path / FOLDS_FILE).exists():
        try:
            num_folds = int(read_json(path / FOLDS_FILE)["flags"]["folds"])
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path / FOLDS_FILE} is damaged; restore it or delete it") from error
        if len(folds) < num_folds:
            print(f"{path}: only {len(folds)} of the {num_folds} folds have a {BEST}; the others are left out")
    return folds


def load(
    checkpoints: str | Path | Sequence[str | Path],
    device: str = "auto",
    *,
    tta: bool = False,
    coverage: float = 0.9,
    adjusted: bool = False,
    batch_size: int | None = None,
) -> "Grader":
    """Load models for prediction; several are averaged.

    checkpoints: a checkpoint, the folder of a run (its best model) or of a cross-validation (the best model of each
    fold), or several of these. device: auto, cpu, cuda, cuda:1, mps ... tta: predict from the mean of each photograph
    and its mirror image, turned too if the training showed every angle. coverage: share of the cases of each class in
    which its truth is in `prediction_set`. adjusted: apply the tau and the temperature that were fitted after training.
    batch_size: by default that of the runs' own evaluation, within what memory allows; a GPU that has too little memory
    gets smaller pieces.

    Sets the largest image that Pillow opens in this process to `--max_megapixels` of the runs.
    Raises UserError if a file is not a checkpoint, or if the models do not fit together.
    """
    if not 0 < coverage < 1:
        raise UserError(f"--coverage: must be above 0 and below 1, not {coverage:g}")
    chosen = choose_device(str(device))
    models = [_load_model(path, chosen) for path in find_checkpoints(checkpoints)]
    _check_alike(models)
    if adjusted:
        for loaded in models:
            if not loaded.checkpoint["posthoc"]:
                raise UserError(
                    f"--adjusted: {loaded.path} has no tau and temperature; they are fitted when the training has ended"
                )
    limit_image_size(max(loaded.args.max_megapixels for loaded in models))
    return Grader(models, tta, coverage, adjusted, batch_size)


def _load_model(path, device):
    checkpoint = load_checkpoint(path, FLAG)
    trained = {name: value for name, value in checkpoint["args"].items() if name not in NOT_INHERITED}
    check_inherited(trained, path, FLAG)
    warn_of_other_decoder(path, checkpoint["decoder_version"], FLAG)
    args = argparse.Namespace(**complete_flags(checkpoint["args"]))
    # compiling takes longer than most predictions; the averaged weights are those that were stored
    flags = argparse.Namespace(**vars(args) | {"compile": False, "ema": 0, "mixup": 0, "cutmix": 0})
    engine = build_engine(flags, device, torch.nn.Identity(), len(checkpoint["classes"]))
    try:
        engine.model.load_state_dict(checkpoint["model_state_dict"])
    except RuntimeError as error:
        raise weights_do_not_fit(path, error, FLAG) from error
    if not all(tensor.isfinite().all() for tensor in engine.model.state_dict().values()):
        raise UserError(f"{FLAG}: {path} has weights that are not finite: its training has diverged")
    engine.model.eval()
    kept = {key: value for key, value in checkpoint.items() if key not in NOT_KEPT}
    return LoadedModel(engine, kept, args, path)


def _check_alike(models):
    """Raise UserError if the models do not have the same classes, or do not read photographs alike."""
    first = models[0]
    for other in models[1:]:
        if other.checkpoint["classes"] != first.checkpoint["classes"]:
            ours, theirs = (", ".join(map(printable, m.checkpoint["classes"][:MAX_LISTED])) for m in (first, other))
            raise UserError(f"{FLAG}: {other.path} has other classes ({theirs}) than {first.path} ({ours})")
        for flag in ("image_size", "resize"):
            ours, theirs = getattr(first.args, flag), getattr(other.args, flag)
            if ours != theirs:
                raise UserError(
                    f"{FLAG}: {other.path} was trained with --{flag} {theirs}, {first.path} with {ours}; predict with "
                    "each of them separately"
                )


# -------------------------------------------------------------------------------------------------------- predictions


@dataclass
class Prediction:
    """Of one photograph. If it cannot be read, everything but `path` and `error` is None.

    prediction: most likely class; probability: of it; probabilities: (C,) float32; expected_grade: mean grade, weighted
    by the probabilities, None unless the classes are ordered; prediction_set: classes, None if the models have no
    validation outputs; uncertain: whether the set does not have exactly one class; agreement: share of the models whose
    most likely class is `prediction`, None for a single model; error: why the file cannot be read.
    """

    path: str
    prediction: str | None = None
    probability: float | None = None
    probabilities: np.ndarray | None = None
    expected_grade: float | None = None
    prediction_set: list[str] | None = None
    uncertain: bool | None = None
    agreement: float | None = None
    error: str | None = None


class Batch(NamedTuple):
    """predictions: of consecutive photographs; images: (N, 3, S, S) uint8 on the device, of those without an error."""

    predictions: list[Prediction]
    images: torch.Tensor


class Grader:
    """One or several models of the same classes that predict together; `load` makes one."""

    def __init__(
        self, models: Sequence[LoadedModel], tta: bool, coverage: float, adjusted: bool, batch_size: int | None
    ):
        """See `load`."""
        self.models, self.tta, self.coverage, self.adjusted = list(models), tta, coverage, adjusted
        self.classes: list[str] = models[0].checkpoint["classes"]
        self.is_ordinal = all(is_ordinal(loaded.args) for loaded in models)
        self.image_size, self.resize = models[0].args.image_size, models[0].args.resize
        self.device = models[0].engine.device
        evaluated = min(2 * loaded.args.batch_size for loaded in models)  # as `eval_loader` does
        self.batch_size = batch_size or max(1, min(evaluated, MAX_PIXELS // self.image_size**2))
        self._piece = self.batch_size  # images in a forward pass; fewer once the memory of a GPU was too small

    def __call__(self, paths: str | Path | Sequence[str | Path]) -> list[Prediction]:
        """Predict photographs, in their order. One that cannot be read has the reason in `error`."""
        names = [str(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
        return [prediction for batch in self.batches(names) for prediction in batch.predictions]

    def batches(self, paths: Sequence[str]) -> Iterator[Batch]:
        """Predict any number of photographs, batch by batch, in their order. Photographs are decoded ahead.

        Raises UserError if the outputs of a model are not finite.
        """
        sets = self.prediction_sets  # what is missing for them is printed first
        decoded = DecodedBatches(
            paths, self.image_size, self.resize, self.batch_size, pin_memory=self.device.type == "cuda"
        )
        start = 0
        for images, positions in DeviceBatches(decoded, self.device):
            positions = positions.tolist()
            # those that cannot be read come before the next photograph that can
            end = positions[-1] + 1 if positions else decoded.first_without_reason(start)
            predicted = dict(zip(positions, self._predict(images, sets), strict=True)) if positions else {}
            yield Batch(_in_order(paths, start, end, predicted, decoded), images)
            start = end
        if start < len(paths):
            yield Batch(_in_order(paths, start, len(paths), {}, decoded), torch.empty(0))

    def _predict(self, images, sets):
        """images: (N, 3, S, S) uint8 on the device -> N predictions without a path."""
        plain, shown = self._probabilities(images)
        mean = shown.mean(axis=0) if len(shown) > 1 else shown[0]
        best = mean.argmax(axis=1)
        agreement = (shown.argmax(axis=2) == best).mean(axis=0) if len(shown) > 1 else [None] * len(mean)
        chosen = sets(plain) if sets else [None] * len(mean)
        for row, c, share, in_set in zip(mean, best, agreement, chosen, strict=True):
            names = None if in_set is None else [self.classes[i] for i in np.flatnonzero(in_set)]
            yield Prediction(
                "",
                self.classes[c],
                float(row[c]),
                row,
                float(row @ self.grades) if self.is_ordinal else None,
                names,
                None if names is None else len(names) != 1,
                None if share is None else float(share),
            )

    def _probabilities(self, images, precise=False):
        """-> (of the photographs themselves, with test-time augmentation if asked for): each (K, N, C) float32."""
        plain, shown = [], []
        for loaded in self.models:
            logits = self._logits(loaded, images, precise)
            seen = views(images, shown_at_any_angle(loaded.args))[1:] if self.tta else []
            mean = sum((self._logits(loaded, view, precise) for view in seen), logits) / (1 + len(seen))
            for outputs, values in ((plain, logits), (shown, mean)):
                outputs.append(self._adjust(loaded, torch.softmax(values, dim=1).cpu().numpy()))
            if not np.isfinite(shown[-1]).all():
                raise UserError(f"{loaded.path}: the outputs of the model are not finite: its training has diverged")
        return np.stack(plain), np.stack(shown)

    def _adjust(self, loaded, probabilities):
        if not self.adjusted:
            return probabilities
        return adjust(probabilities, loaded.checkpoint["samples_per_cls"], **loaded.checkpoint["posthoc"])

    @torch.inference_mode()
    def _logits(self, loaded, images, precise):
        """-> (N, C) float32. precise: without autocast and TF32."""
        while True:
            try:
                return torch.cat([_forward(loaded, piece, precise) for piece in images.split(self._piece)])
            except RuntimeError as error:
                if not out_of_memory_reason(error):
                    raise
                self._piece = min(self._piece, len(images)) // 2
                if not self._piece:
                    raise UserError(
                        "--device: the memory of the GPU is too small; predict with --device cpu"
                    ) from error
            print(f"the memory of the GPU is too small; photographs per pass from now on: {self._piece}")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def probabilities_of(self, arrays: Sequence[np.ndarray], precise: bool = False) -> np.ndarray:
        """arrays: decoded photographs, (H, W, 3) uint8 RGB of any sides -> (N, C) float32.

        precise: in float32, whatever the precision of the run.
        """
        side, kept = self.image_size, []
        for start in range(0, len(arrays), self.batch_size):
            group = arrays[start : start + self.batch_size]
            squares = [to_square(Image.fromarray(array), side, self.resize) for array in group]
            images = torch.from_numpy(np.stack([np.asarray(square) for square in squares])).permute(0, 3, 1, 2)
            kept.append(self._probabilities(images.to(self.device), precise)[1].mean(axis=0))
        return np.concatenate(kept) if kept else np.empty((0, len(self.classes)), np.float32)

    @cached_property
    def grades(self) -> np.ndarray:
        """-> (C,) float: the grade of each class, its name if all names are ascending numbers, else its position."""
        if all(re.fullmatch(r"\d+(\.\d+)?", name) for name in self.classes):
            numbers = np.array([float(name) for name in self.classes])
            if (np.diff(numbers) > 0).all():
                return numbers
        return np.arange(len(self.classes), dtype=float)

    @property
    def columns(self) -> list[str]:
        """-> the columns of a file of predictions."""
        names = ["path", "prediction", "probability", *probability_columns(self.classes)]
        names += ["expected_grade"] if self.is_ordinal else []
        return names + ["prediction_set", "uncertain"] + (["agreement"] if len(self.models) > 1 else []) + ["error"]

    def row(self, prediction: Prediction) -> list[str | int]:
        """-> its row in a file with these columns. The classes of a set are written as {0/1}; a / in the name of a
        class, which is of a table then, as \\/."""
        if prediction.error is not None:
            return [prediction.path] + [""] * (len(self.columns) - 2) + [prediction.error]
        row = [prediction.path, prediction.prediction, decimal(prediction.probability)]
        row += map(decimal, prediction.probabilities)
        row += [decimal(prediction.expected_grade)] if self.is_ordinal else []
        has_set = prediction.prediction_set is not None
        names = [name.replace("/", "\\/") for name in prediction.prediction_set or []]
        row += [f"{{{'/'.join(names)}}}", int(prediction.uncertain)] if has_set else ["", ""]
        row += [decimal(prediction.agreement)] if len(self.models) > 1 else []
        return [*row, ""]

    @cached_property
    def prediction_sets(self) -> PredictionSets | None:
        """Of the runs' validation images; None, after one line that says why, if a run has no outputs for them."""
        outputs = []
        for loaded in self.models:
            try:
                targets, probabilities = _val_outputs(loaded)
            except UserError as error:
                print(f"no prediction sets: {error}")
                return None
            sizes = loaded.checkpoint["file_sizes"]["val"].tolist()
            images = list(zip(loaded.checkpoint["splits"]["val"], sizes, strict=True))
            outputs.append(ValOutputs(images, targets, self._adjust(loaded, probabilities)))
        sets = PredictionSets(outputs, self.coverage)
        if sets.small:
            listed = [f"{printable(self.classes[c])}: {sets.counts[c]}" for c in sets.small[:MAX_LISTED]]
            more = f", and {len(sets.small) - MAX_LISTED} more" if len(sets.small) > MAX_LISTED else ""
            print(
                f"prediction sets: classes with fewer than {sets.min_images} validation images ({', '.join(listed)}"
                f"{more}) have no quantile of their own; the coverage of {100 * self.coverage:.9g}% is not guaranteed "
                "for them"
            )
            if len(sets.small) == len(self.classes):
                print("prediction sets: no class has a guarantee; a lower --coverage needs fewer validation images")
        return sets


def _forward(loaded, images, precise):
    if not precise:
        return loaded.engine.forward(loaded.model, images)
    set_float32_precision(None)
    try:
        return loaded.model(images).float()
    finally:
        set_float32_precision(loaded.engine.amp_dtype)


def _in_order(paths, start, end, predicted, decoded):
    """-> the predictions of the photographs at start, start + 1, ... end - 1. predicted: {position: prediction}"""
    reasons = decoded.take_reasons(end)
    in_order = []
    for position in range(start, end):
        prediction = predicted.get(position) or Prediction("", error=reasons[position])
        prediction.path = paths[position]
        in_order.append(prediction)
    return in_order


def _val_outputs(loaded):
    """-> (targets (N,) int64, probabilities (N, C) float32) of the run's validation images, from its checkpoint or from
    the file beside it. Raises UserError if there are none."""
    checkpoint, num_images = loaded.checkpoint, len(loaded.checkpoint["splits"]["val"])
    num_classes = len(checkpoint["classes"])
    try:
        if outputs := checkpoint["val_outputs"]:
            targets, probabilities = outputs["targets"].numpy(), outputs["probabilities"].numpy()
        else:
            targets, probabilities = _read_val_outputs(loaded)
        is_whole = targets.shape == (num_images,) and probabilities.shape == (num_images, num_classes)
        is_whole = is_whole and set(targets.tolist()) <= set(range(num_classes)) and np.isfinite(probabilities).all()
    except (KeyError, AttributeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"the outputs for the validation images in {loaded.path} are damaged")
    return targets, probabilities


def _read_val_outputs(loaded):
    folder, checkpoint = loaded.path.parent, loaded.checkpoint
    results, predictions = folder / "results.json", folder / "val_predictions.csv"
    missing = f"{loaded.path} has no outputs for its validation images, which are stored when the training has ended"
    if not results.exists() or not predictions.exists():
        raise UserError(missing)
    try:
        is_same_model = read_json(results)["evaluated_epoch"] == checkpoint["epoch"]
        paths, targets, probabilities = read_predictions(predictions, checkpoint["classes"])
    except (UserError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{results} or {predictions} is damaged") from error
    if not is_same_model or paths.tolist() != [valid_text(path) for path in checkpoint["splits"]["val"]]:
        raise UserError(f"{missing}, and {predictions} is of another model or of other images")
    return targets.astype(np.int64), probabilities.astype(np.float32)
