"""The folder of `--heatmaps`: a figure of each photograph with what supports its prediction."""

import functools
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from explain import Explanation, explain_predictions, overlay
from model import Model
from run.cli import first_line, printable
from run.files import atomic_write

PANEL, MARGIN, BAR, BAR_LABEL, LINE, FONT_SIZE = 336, 8, 18, 48, 20, 14  # pixels of a figure
MAX_NAME_BYTES = 100  # of the photograph's own name; some file systems allow 143 in all
MAX_PRINTED = 3  # failures
# files of fonts that have Hangul, as Pillow finds them on Linux, Windows and macOS
HANGUL_FONT_FILES = (
    "NotoSansCJK-Regular.ttc", "NotoSansCJKkr-Regular.otf", "NotoSansKR-Regular.ttf", "NanumGothic.ttf", "malgun.ttf",
    "AppleSDGothicNeo.ttc", "AppleGothic.ttf", "NotoSerifCJK-Regular.ttc",
)  # fmt: skip


class HeatMapFolder:
    """Writes figures to a folder. What fails is printed and counted, and never raises."""

    def __init__(self, folder: str | Path, models: Sequence[Model], classes: Sequence[str], is_ordinal: bool):
        """Creates the folder. See `explain_predictions`. Raises OSError."""
        self.folder, self.models, self.classes, self.is_ordinal = Path(folder), models, classes, is_ordinal
        self.rows = self.written = self.failed = 0
        self.folder.mkdir(exist_ok=True)

    def add(self, images: torch.Tensor, predictions: Sequence) -> None:
        """Explain the next photographs.

        images: (N, 3, S, S) uint8 on the device of the models; predictions: of `inference`, with an error for those
        that are not in `images`.
        """
        rows = {row: p for row, p in enumerate(predictions, self.rows + 1) if p.error is None}
        self.rows += len(predictions)
        try:
            probabilities = np.array([prediction.probabilities for prediction in rows.values()])
            photos = images.permute(0, 2, 3, 1).cpu().numpy()
            found = explain_predictions(self.models, images, probabilities, self.is_ordinal)
        except Exception as error:  # whatever it is, the predictions are worth more
            for prediction in rows.values():
                self._fail(prediction.path, error)
            return
        for (row, prediction), photo, explanations in zip(rows.items(), photos, found, strict=True):
            self._save(row, prediction, photo, explanations)

    def _save(self, row, prediction, photo, explanations):
        try:
            texts = [captions(explanation, prediction.probabilities, self.classes) for explanation in explanations]
            picture = figure(photo, [explanation.heat_map for explanation in explanations], texts)
            with atomic_write(self.folder / figure_name(row, prediction.path), "wb") as file:
                picture.save(file, "PNG", compress_level=1)
            self.written += 1
        except Exception as error:
            self._fail(prediction.path, error)

    def _fail(self, path, error):
        reason = getattr(error, "strerror", None) or first_line(error) or repr(error)
        self.failed += 1
        if self.failed <= MAX_PRINTED:
            more = "; further failures are only counted" if self.failed == MAX_PRINTED else ""
            print(f"no heat map of {printable(path)}: {reason}{more}")

    def print(self) -> int:
        """-> exit status: 1 if heat maps are missing."""
        failed = f"; {self.failed} failed" if self.failed else ""
        print(f"{self.written} heat maps saved to {self.folder}{failed}")
        return int(self.failed > 0)


def figure_name(row: int, path: str | Path) -> str:
    """-> 000012_photo.png, also for names that are too long with a number."""
    stem = Path(path).stem
    while len(os.fsencode(stem)) > MAX_NAME_BYTES:
        stem = stem[:-1]
    return f"{row:06d}_{stem}.png"


def captions(explanation: Explanation, probabilities: np.ndarray, classes: Sequence[str]) -> tuple[str, str]:
    """-> two lines above the map. probabilities: (C,) of the photograph."""
    target, rival = explanation.target, explanation.rival
    answer = f"{classes[target]}: {probabilities[target]:.0%}"
    if target != probabilities.argmax():
        return f"why not {answer}", f"what supports {classes[target]}"
    return answer, "what supports it" + (f" rather than {classes[rival]}" if rival is not None else "")


def figure(photo: np.ndarray, heat_maps: Sequence[np.ndarray], texts: Sequence[tuple[str, str]]) -> Image.Image:
    """The photograph, each heat map over it under its two lines of text, and the scale of the colors.

    photo: (S, S, 3) uint8, RGB; heat_maps: (S, S) float, 0 to 1.
    """
    side = max(PANEL, len(photo))
    photo = cv2.resize(photo, (side, side), interpolation=cv2.INTER_CUBIC)
    panels = [photo, *(overlay(photo, heat_map) for heat_map in heat_maps)]
    texts = [("photograph", "as the model sees it"), *texts]
    top, step = 2 * LINE + MARGIN, side + MARGIN
    bar_left = MARGIN + len(panels) * step
    picture = Image.new("RGB", (bar_left + BAR + BAR_LABEL, top + side + MARGIN), "white")
    drawing = ImageDraw.Draw(picture)
    for number, (panel, lines) in enumerate(zip(panels, texts, strict=True)):
        left = MARGIN + number * step
        if number and not heat_maps[number - 1].any():
            lines = (lines[0], "no region supports it")
        picture.paste(Image.fromarray(panel), (left, top))
        for line, text in enumerate(lines):
            _write(drawing, (left, (1 + line) * LINE), text, side)
    gray = np.full((side, BAR, 3), 128, np.uint8)
    scale = np.linspace(1, 0, side, dtype=np.float32)[:, None].repeat(BAR, axis=1)
    picture.paste(Image.fromarray(overlay(gray, scale)), (bar_left, top))
    for share, text in ((1, "max"), (0.5, "half"), (0, "0")):
        below = top + FONT_SIZE + (1 - share) * (side - FONT_SIZE - 2)
        _write(drawing, (bar_left + BAR + 4, below), text, BAR_LABEL - 4)
    return picture


def _write(drawing, position, text, width):
    """Write a text, shortened to `width` pixels, on a baseline. position: its left end."""
    text = printable(text)
    font = _font(text.isascii())
    while drawing.textlength(text, font) > width:
        text = text[: len(text) * 9 // 10 - 1].rstrip("…") + "…" if len(text) > 2 else ""
    drawing.text(position, text, "black", font, anchor="ls")


@functools.cache
def _font(is_ascii):
    for name in () if is_ascii else HANGUL_FONT_FILES:
        with suppress(OSError):
            return ImageFont.truetype(name, FONT_SIZE)
    return ImageFont.load_default(FONT_SIZE)  # draws boxes for letters it does not have
