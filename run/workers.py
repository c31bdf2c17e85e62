"""Worker processes of a data loader: how many there is memory for, how they begin, and how they end."""

import atexit
import errno
import functools
import gc
import mmap
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import time
from collections.abc import Callable

from run.cli import UserError

# where torch keeps the batches of workers on Linux, with either of its sharing strategies
SHARED_MEMORY = "/dev/shm"
PREFETCHED = 2  # batches per worker, as torch does by default
KILL_SECONDS = 5  # for workers to end after they were killed; the system may not let go of one that reads a dead disk

# garbage of the main process, such as the iterator of an earlier loader, is not for a forked worker to finalize
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=gc.freeze)


def free_shared_memory() -> float:
    """Bytes that are free in the file system that holds shared memory; infinite where it has no limit of its own."""
    if sys.platform != "linux":
        return float("inf")
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0  # there is none at all
    if not os.access(SHARED_MEMORY, os.W_OK):
        return 0
    return status.f_bavail * status.f_frsize if status.f_blocks else float("inf")


@functools.cache  # all loaders of a process get the same answer, and one line says it
def affordable_workers(num_workers: int, image_bytes: int, batch_size: int, grad_accum: int) -> tuple[int, int]:
    """The number of workers whose batches fit into the free shared memory. -> (for training, for evaluation)

    num_workers: the wanted number; image_bytes: per image of a batch; batch_size: of training, half of that of
    evaluation. Only one loader at a time has batches, as training and evaluation take turns.
    """
    if not num_workers:
        return 0, 0
    free = free_shared_memory()

    def affordable(size, held):
        batch_bytes = size * image_bytes + 3 * mmap.PAGESIZE  # each of up to three tensors takes whole pages
        fitting = (free / batch_bytes - held) / PREFETCHED
        return num_workers if fitting >= num_workers else max(0, int(fitting))

    # besides those that the workers have prepared: the batches of a step, and the one that replaces them
    workers = affordable(batch_size, grad_accum + 1), affordable(2 * batch_size, 2)
    if min(workers) < num_workers:
        print(
            f"--num_workers: {SHARED_MEMORY} has {free / 1e6:.1f} MB free, too little for the batches of {num_workers} "
            f"workers: using {workers[0]} for training and {workers[1]} for evaluation; enlarge it "
            "(docker run --shm-size=1g), or reduce --batch_size"
        )
    return workers


def begin_worker(prepare: Callable[[], None], worker_id: int) -> None:
    """Ignore the signals that stop a run, then call `prepare`. A `worker_init_fn`, with `functools.partial`.

    Terminals and queues signal the whole process group, but the main process still waits for this worker's batch. A
    worker ends when the main process tells it to, or is gone. A batch that cannot be sent is replaced by its error.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # by itself, the queue would print the error, lose the batch, and let the main process wait for it forever
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error
    prepare()


def _send_error(queue, error, item):
    from torch._utils import ExceptionWrapper

    position, _ = item
    reason = str(error).strip() or type(error).__name__
    what, advice = f"a loader worker cannot send its batch ({reason})", "use fewer workers, or 0"
    if os.strerror(errno.ENOSPC) in reason:
        what = f"the batches of the loader workers do not fit into {SHARED_MEMORY}"
        advice = "enlarge it (docker run --shm-size=1g) or use fewer workers, or 0"
    error = UserError(f"--num_workers: {what}; {advice}")
    queue.put((position, ExceptionWrapper((UserError, error, None), where="in a loader worker")))


@atexit.register
def end_workers() -> None:
    """Kill the workers of all loaders, whose work is done: at once, also those that do not answer any more.

    torch would wait 5 s for each, and Python would send them SIGTERM, which they ignore, and wait forever.
    """
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if not workers:
        return
    # torch's handler would report every killed worker as a failure, with a traceback
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if hasattr(signal, "SIGCHLD") else None
    for worker in workers:
        worker.kill()
    deadline = time.monotonic() + KILL_SECONDS
    for worker in workers:
        worker.join(max(0, deadline - time.monotonic()))
    if previous is not None:
        signal.signal(signal.SIGCHLD, previous)
