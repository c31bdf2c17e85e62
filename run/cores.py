"""How many CPU cores this process may use."""


def num_cores() -> int:
    """The cores of the machine, limited by CPU affinity, by the container's CPU quota and by LOKY_MAX_CPU_COUNT."""
    from joblib import cpu_count  # joblib takes longer to import than most commands take to parse their flags

    return cpu_count()
