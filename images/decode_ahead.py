"""Photographs decoded ahead of the computation by threads, in batches."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch

from images.decode import decode, failure_reason
from run.cores import num_cores

MAX_UNREADABLE = 10_000  # of a batch, which is then complete: their reasons take memory


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

    def first_without_reason(self, start: int) -> int:
        """-> the first position from `start` on whose reason is not known: it can be read, or was not decoded yet."""
        for position, _ in self._reasons:
            if position != start:
                break
            start += 1
        return start

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
