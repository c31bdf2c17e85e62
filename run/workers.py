"""Worker processes of a data loader: how they begin and how they end."""

import atexit
import multiprocessing
import signal
from collections.abc import Callable


def begin_worker(prepare: Callable[[], None], worker_id: int) -> None:
    """Ignore the signals that stop a run, then call `prepare`. A `worker_init_fn`, with `functools.partial`.

    Terminals and queues signal the whole process group, but the main process still waits for this worker's batch. A
    worker ends when the main process tells it to, or is gone.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    prepare()


@atexit.register
def _end_workers():
    """Kill workers that are still there: Python would send them SIGTERM, which they ignore, and wait forever."""
    if hasattr(signal, "SIGCHLD"):  # torch's handler would report every killed worker as a failure, with a traceback
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()
