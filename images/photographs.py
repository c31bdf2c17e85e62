"""Photographs without labels: found in folders or named one by one, and decoded ahead in batches."""

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch

from images.decode import decode, failure_reason
from images.folders import Paths, images_below, print_left_out, with_real_paths
from images.formats import HEIF_EXTENSIONS
from run.cli import UserError
from run.cores import num_cores

MAX_UNREADABLE = 10_000  # consecutive ones, after which a batch is complete: their reasons take memory


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


class DecodedBatches:
    """Photographs decoded ahead by threads: batches of (images (N, 3, S, S) uint8, positions in `paths` (N,) int64).

    Those that cannot be read are not in any batch; `take_reasons` returns why. As many batches as the look-ahead of two
    are in memory, however many photographs there are.
    """

    def __init__(self, paths: Sequence[str], image_size: int, resize: str, batch_size: int, pin_memory: bool = False):
        """resize: as for `decode`; pin_memory: in memory from which a GPU copies while it computes."""
        self.paths, self.image_size, self.resize, self.batch_size = paths, image_size, resize, batch_size
        self.pin_memory = pin_memory
        self._reasons = deque()  # (position, reason), in ascending order

    def take_reasons(self, before: int) -> dict[int, str]:
        """-> {position: why it cannot be read} for positions below `before` that were not returned yet."""
        taken = {}
        while self._reasons and self._reasons[0][0] < before:
            position, reason = self._reasons.popleft()
            taken[position] = reason
        return taken

    def __len__(self) -> int:
        return -(-len(self.paths) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        pool = ThreadPoolExecutor(num_cores())  # the decoder releases the interpreter's lock
        try:
            waiting = (pool.submit(self._decode, path) for path in self.paths)
            ahead = deque(islice(waiting, 2 * self.batch_size))
            images, positions, unreadable = self._new_batch(), [], 0
            for position in range(len(self.paths)):
                pixels, reason = ahead.popleft().result()
                ahead.extend(islice(waiting, 1))
                if reason is None:
                    images.numpy()[len(positions)] = pixels
                    positions.append(position)
                else:
                    self._reasons.append((position, reason))
                    unreadable += 1
                is_last = position == len(self.paths) - 1
                if len(positions) == self.batch_size or unreadable == MAX_UNREADABLE or (is_last and positions):
                    yield images[: len(positions)].permute(0, 3, 1, 2), torch.tensor(positions, dtype=torch.int64)
                    images, positions, unreadable = self._new_batch(), [], 0
        finally:
            # no thread is waited for: its disk may never answer
            pool.shutdown(wait=False, cancel_futures=True)

    def _new_batch(self):
        shape = self.batch_size, self.image_size, self.image_size, 3
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin_memory)

    def _decode(self, path):
        """-> (pixels (S, S, 3) uint8, None), or (None, why the file cannot be read)."""
        try:
            return decode(path, self.image_size, self.resize)[0], None
        except Exception as error:  # whatever the decoder raises is the reason in the list
            return None, failure_reason(error, path)
