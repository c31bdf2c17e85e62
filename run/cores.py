"""The CPU cores: how many this process may use, and how it leaves them to others."""

import os

SPINS = "1000"  # about 50 microseconds


def num_cores() -> int:
    """The cores of the machine, limited by CPU affinity, by the container's CPU quota and by LOKY_MAX_CPU_COUNT."""
    from joblib import cpu_count  # joblib takes longer to import than most commands take to parse their flags

    return cpu_count()


def let_waiting_threads_sleep() -> None:
    """Bound how long a thread of OpenMP that waits for the others keeps its core busy. Call it before torch is loaded.

    By itself, it spins for milliseconds, and two trainings at once on the same cores keep each other from computing.
    What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # of the GNU library, which torch has on Linux
