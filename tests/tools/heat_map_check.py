"""Check that heat maps show the wrinkles of demo patches: python tests/tools/heat_map_check.py CHECKPOINT DEMO_DATA

CHECKPOINT: of a run on the folder DEMO_DATA, which `python main.py --demo` has written. In 90 % of the correctly graded
patches of grades 2 to 4, the share of the map that lies on the patch's own wrinkles must exceed the mean share that
lies on the wrinkles of the other patches of that grade. The same figure of an ideal map, the mask of the patch's own
wrinkles at the resolution of the features, shows what can be reached. Validation and test images of the run are used,
and patches drawn for this check until there are --per_grade.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from explain import STRIDE, grad_cam, rival_grades, upsample
from images.decode import read_image
from images.demo import draw_patch, wrinkle_mask
from inference import load
from model import Model
from run.cli import UserError, end_process, run_command

GRADES = (2, 3, 4)
REQUIRED = 0.9
FRESH_SEED = 10_000  # of patches drawn for the check: no run has used it
MAX_DRAWN = 4  # patches drawn, as a multiple of those wanted; a poor model grades few of them correctly


def find_patches(checkpoint: dict, demo_data: str, grade: int, seed: int) -> list[tuple[Path, tuple]]:
    """-> validation and test images of this grade, and what each one's generator was started with"""
    paths = [Path(path) for split in ("val", "test") for path in checkpoint["splits"][split]]
    numbers = sorted(int(path.stem.removeprefix("patch_")) for path in paths if path.parent.name == str(grade))
    return [(Path(demo_data, str(grade), f"patch_{number:03d}.jpg"), (seed, grade, number)) for number in numbers]


def draw_patches(folder: str, grade: int, count: int) -> list[tuple[Path, tuple]]:
    """As `find_patches`, drawn now."""
    patches = []
    for number in range(count):
        start = (FRESH_SEED, grade, number)
        path = Path(folder, f"{grade}_{number}.jpg")
        patch = cv2.cvtColor(draw_patch(grade, np.random.default_rng(start)), cv2.COLOR_RGB2BGR)
        path.write_bytes(cv2.imencode(".jpg", patch, [cv2.IMWRITE_JPEG_QUALITY, 92])[1])
        patches.append((path, start))
    return patches


def read_patches(patches: list, grade: int, args: dict) -> tuple[torch.Tensor, np.ndarray]:
    """-> (images (N, 3, S, S) uint8, masks (N, S, S) float32, 0 to 1). Raises UserError for files of another seed."""
    size, images, masks = args["image_size"], [], []
    for path, start in patches:
        drawn = draw_patch(grade, np.random.default_rng(start))
        if np.abs(read_image(path, len(drawn)).astype(int) - drawn).mean() > 8:  # far more than JPEG changes
            raise UserError(
                f"{path} is not what --seed {start[0]} draws; pass the --seed of the run that has written it"
            )
        images.append(torch.from_numpy(read_image(path, size, args.get("resize", "stretch")).copy()).permute(2, 0, 1))
        mask = wrinkle_mask(grade, np.random.default_rng(start)).astype(np.float32)
        masks.append(cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA))
    return torch.stack(images), np.stack(masks)


def ideal_maps(masks: np.ndarray) -> np.ndarray:
    """(N, S, S) -> (N, S, S): each mask at the resolution of the features, laid over the image as a heat map is."""
    size = masks.shape[-1]
    cells = -(-size // STRIDE)
    means = F.avg_pool2d(torch.from_numpy(masks)[:, None], STRIDE, STRIDE, STRIDE // 2, count_include_pad=False)
    return upsample(means[..., :cells, :cells], size).numpy()


def is_on_own_wrinkles(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """maps, masks: (N, S, S), of one grade -> (N,) bool. A map of zeros is on no wrinkles."""
    mass = np.einsum("ihw,jhw->ij", maps, masks)
    own = np.diag(mass)
    others = (mass.sum(axis=1) - own) / (len(mass) - 1)
    return own > others


def correct_patches(
    model: Model, checkpoint: dict, demo_data: str, grade: int, seed: int, count: int
) -> tuple[torch.Tensor, np.ndarray]:
    """At least `count` correctly graded patches, as `read_patches` returns them, if the model is good enough."""
    target = checkpoint["classes"].index(str(grade))
    with tempfile.TemporaryDirectory() as folder:
        patches = find_patches(checkpoint, demo_data, grade, seed)
        patches += draw_patches(folder, grade, MAX_DRAWN * count)
        chosen_images, chosen_masks = [], []
        for start in range(0, len(patches), 16):
            images, masks = read_patches(patches[start : start + 16], grade, checkpoint["args"])
            with torch.inference_mode():
                is_correct = (model(images).argmax(dim=1) == target).numpy()
            chosen_images += list(images[is_correct])
            chosen_masks += list(masks[is_correct])
            if len(chosen_images) >= count and start + 16 >= len(patches) - MAX_DRAWN * count:
                break
    if len(chosen_images) < 2:
        raise UserError(f"the model grades fewer than 2 patches of grade {grade} correctly; train a better one")
    return torch.stack(chosen_images), np.stack(chosen_masks)


def check(model: Model, checkpoint: dict, options: argparse.Namespace) -> int:
    """Print one line per grade and the sum. -> exit status"""
    hits, ideal_hits = [], []
    for grade in GRADES:
        images, masks = correct_patches(model, checkpoint, options.demo_data, grade, options.seed, options.per_grade)
        targets = [checkpoint["classes"].index(str(grade))] * len(images)
        maps = grad_cam(model, images, targets, rival_grades(targets, len(checkpoint["classes"])))
        hits.append(is_on_own_wrinkles(maps, masks))
        ideal_hits.append(is_on_own_wrinkles(ideal_maps(masks), masks))
        print(f"grade {grade}: {hits[-1].mean():.1%} of {len(images)} maps, {ideal_hits[-1].mean():.1%} of ideal maps")
    share = np.concatenate(hits).mean()
    print(f"all: {share:.1%} of {sum(map(len, hits))} maps, {np.concatenate(ideal_hits).mean():.1%} of ideal maps")
    return 0 if share >= REQUIRED else 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("demo_data")
    parser.add_argument("--seed", type=int, default=42, help="of the run that has written DEMO_DATA")
    parser.add_argument("--per_grade", type=int, default=50, help="correctly graded patches per grade, at least")
    return parser


def run(argv: list[str]) -> int:
    options = build_parser().parse_args(argv)
    (loaded,) = load(options.checkpoint, "cpu").models
    return check(loaded.model, loaded.checkpoint, options)


if __name__ == "__main__":
    end_process(run_command(run, None))
