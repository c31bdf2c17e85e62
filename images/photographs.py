"""Photographs without classes: found in folders, or named one by one."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from images.folders import Paths, images_below, print_left_out, with_real_paths
from images.formats import HEIF_EXTENSIONS, IMAGE_EXTENSIONS
from run.cli import UserError, printable


def find_photographs(names: Sequence[str | Path], flag: str) -> Paths:
    """The photographs in folders, at any depth, and those named one by one, in this order, each once.

    HEIC photographs are among them even if they cannot be read here: the reader of a list of photographs must not
    miss any. What systems and runs have put into a folder is passed over. Raises UserError, naming `flag`, for a name
    that does not exist, a folder that cannot be read, and if there are none.
    """
    missing = [str(name) for name in names if not os.path.exists(name)]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{flag}: {printable(missing[0])} does not exist{more}")
    found, skipped, passed_over = [], Counter(), Counter()
    for name in map(str, names):
        if not os.path.isdir(name):
            found.append(name)
            continue
        images, others, _ = images_below(Path(name), flag, passed_over, IMAGE_EXTENSIONS + HEIF_EXTENSIONS)
        found += images
        skipped.update(others)
    print_left_out(passed_over, skipped, flag)
    if not found:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"{flag}: no photographs in {printable(str(names[0]))}{more}")
    first_names = {}
    for path, real_path in with_real_paths(found):
        first_names.setdefault(real_path, path)
    return Paths(first_names.values())
