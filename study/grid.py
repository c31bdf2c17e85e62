"""The methods that an ablation compares: their names and flags, read from YAML and checked."""

import shlex
from collections.abc import Mapping

from data_flags import FOLDER_FLAGS, LABEL_FLAGS
from flag_checks import parse_flags
from flag_queries import flag_of
from flags import CORRECTION, FROM_SCRATCH, RECIPES
from run.cli import UserError
from run.files import read_yaml
from study.process import RESERVED_FLAGS, refuse_flags

# 0.8E: 80 % of the epochs. Oversampling makes all counts equal, and with them the Class-Balanced weights: a CB focal
# loss whose counts are taken after oversampling is the focal loss
GRID = {
    "cross entropy": "--train_loss ce",
    "focal": "--train_loss focal",
    "CB focal": "--train_loss cb",
    "oversampling": "--train_loss ce --use_augmentation",
    "CB focal + oversampling": "--train_loss cb --use_augmentation",
    "CB focal of augmented counts": "--train_loss focal --use_augmentation",
    "balanced softmax": "--train_loss balanced_softmax",
    "LDAM-DRW": "--train_loss ldam --drw_epoch 0.8E",
}
# flags of main.py that are not passed on, and those that are the same for all methods of a grid
NOT_PASSED_ON = RESERVED_FLAGS | {"seed", "wandb_mode", "config", "patience"}
SAME_FOR_ALL = {"seed", "epochs", *FOLDER_FLAGS, *LABEL_FLAGS, "split", "group_regex", "skip_broken"}


def read_grid(path: str | None) -> dict[str, str]:
    """-> {name of a method: its flags of main.py, as one string}; the default methods if `path` is None.

    Raises UserError, naming `--grid`, the file and the method, for a mistake in it.
    """
    if path is None:
        return GRID
    grid = read_yaml(path, "--grid")
    if not isinstance(grid, dict) or not grid:
        raise UserError(f"--grid: {path}: expected a mapping from names to flags of main.py")
    for name, flags in grid.items():
        if not isinstance(flags, str):
            raise UserError(f'--grid: {path}: {name}: expected a string of flags ("" for none)')
        try:
            words = shlex.split(flags)
            refuse_flags(words, SAME_FOR_ALL, "must be the same for all methods; give it on the command line")
            refuse_flags(words, NOT_PASSED_ON | {"help"})
        except (ValueError, UserError) as error:
            raise UserError(f"--grid: {path}: {name}: {error}") from error
    return {str(name): flags for name, flags in grid.items()}


def varied_flags(grid: Mapping[str, str]) -> set[str]:
    """-> the flags that a method sets, or that are set for all methods: a file of `--config` cannot."""
    words = [word for flags in grid.values() for word in shlex.split(flags) if word.startswith("--")]
    names = set(map(flag_of, words))
    if "recipe" in names:
        names = names.union(CORRECTION, *RECIPES.values(), *FROM_SCRATCH.values())
    return {"augment_all", "recipe", *NOT_PASSED_ON, *names}


def common_flags(main_flags: list[str]) -> list[str]:
    """-> the flags of main.py that every run of an ablation gets. main_flags: those of the command line."""
    return ["--augment_all", *main_flags, "--wandb_mode", "disabled"]


def with_epochs(flags: str, epochs: int) -> list[str]:
    """-> the flags of a method as words, with `--epochs` and with `0.8E` replaced by that share of the epochs."""
    words = []
    for word in shlex.split(flags):
        share = word.removesuffix("E")
        if word != share and share.replace(".", "", 1).isdecimal():
            word = str(round(float(share) * epochs))
            if word in ("0", str(epochs)) and 0 < float(share) < 1:
                raise UserError(f"{share}E: is rounded to {word} of {epochs} epochs; increase --epochs")
        words.append(word)
    return [*words, "--epochs", str(epochs)]


def check_flags(main_flags: list[str], grid: Mapping[str, str], epochs: int) -> None:
    """Raise UserError for flags of main.py that cannot be, on the command line or of a method."""
    refuse_flags(main_flags, NOT_PASSED_ON)
    refuse_flags(main_flags, {"recipe"}, "sets flags in which the methods differ; name it in a method of --grid")
    _check_batch_size(parse_flags([*common_flags(main_flags), "--epochs", str(epochs)]))
    for name, flags in grid.items():
        try:
            _check_batch_size(parse_flags([*common_flags(main_flags), *with_epochs(flags, epochs)]))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error


def _check_batch_size(args):
    if args.batch_size == "auto":
        raise UserError("--batch_size: methods are compared after equally many steps; name a number instead of auto")
