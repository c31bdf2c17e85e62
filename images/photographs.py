"""Photographs without classes: found in folders, or named one by one."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from images.folders import Paths, images_below, print_left_out, with_real_paths
from images.formats import HEIF_EXTENSIONS
from run.cli import UserError


def find_photographs(names: Sequence[str | Path], flag: str) -> Paths:
    """The photographs in folders, at any depth, and those named one by one, in this order, each once.

    What systems and runs have put into a folder is passed over. Raises UserError, naming `flag`, for a name that does
    not exist, a folder that cannot be read, and if there are none.
    """
    missing = [str(name) for name in names if not os.path.exists(name)]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{flag}: {missing[0]} does not exist{more}")
    found, skipped, unread, passed_over = [], Counter(), Counter(), Counter()
    for name in map(str, names):
        if not os.path.isdir(name):
            found.append(name)
            continue
        images, others, _ = images_below(Path(name), flag, passed_over)
        found += images
        unread[name] += sum(others.pop(extension, 0) for extension in HEIF_EXTENSIONS)
        skipped.update(others)
    print_left_out(passed_over, skipped, unread, flag)
    if not found:
        raise UserError(f"{flag}: no photographs in {' '.join(map(str, names))}")
    first_names = {}
    for path, real_path in with_real_paths(found):
        first_names.setdefault(real_path, path)
    return Paths(first_names.values())
