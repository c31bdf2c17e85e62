"""Trainings on the same cores take turns: one computes a step on all of them while the others sleep.

Side by side they would be several times slower: a thread that waits for the others of its step keeps a core busy on
which they could compute. The number of threads stays as it is, and with it every bit of the results.
"""

import functools
import os
import sys
import tempfile
import zlib
from pathlib import Path

import filelock

POLL_SECONDS = 0.002
LONGEST_WAIT = 300.0  # s; a training that was suspended during its step must not keep the others from going on


class Turns:
    """Two locks: who holds `now` computes, and who holds `next` is the first to follow, so that nobody starves."""

    def __init__(self, name: str | Path):
        """name: of the files of the locks, without their extension."""
        options = {"timeout": LONGEST_WAIT, "poll_interval": POLL_SECONDS, "preserve_lock_file": True}
        self.now, self.next = (filelock.FileLock(f"{name}.{which}", **options) for which in ("now", "next"))
        self.is_working = True

    def take(self) -> None:
        """Wait for this training's turn. Where locks do not work, or nobody gives his back, there are no turns."""
        if not self.is_working:
            return
        try:
            with self.next:
                self.now.acquire()
        except filelock.Timeout:
            self.is_working = False
            print(f"warning: another training has computed for {LONGEST_WAIT:.0f} s; not waiting for it any more")
        except (OSError, NotImplementedError):
            self.is_working = False

    def give_back(self) -> None:
        """Let the next training compute."""
        self.now.release()


@functools.cache
def turns_of(num_threads: int, num_cores: int) -> Turns | None:
    """The turns of this user's trainings on the same cores; None if two trainings fit beside each other."""
    if 2 * num_threads <= num_cores or sys.platform == "win32":
        return None
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    name = f"skin-grading-{os.getuid()}-{zlib.crc32(repr(cores).encode()):08x}"
    return Turns(Path(tempfile.gettempdir(), name))
