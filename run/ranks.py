"""The processes ("ranks") of one training that torchrun has started: how they share work, wait for each other and end.

The first rank reads flags, images and checkpoints, decides and writes; the others do the jobs that it hands out. A
process that was started alone is the first and only rank, and everything here is a no-op for it.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from run.cli import UserError
from run.rank_group import RankGroup
from run.signals import Stopped
from run.surroundings import launched_by_torchrun, restarts_here

if TYPE_CHECKING:
    import torch

_group: RankGroup | None = None  # of this process, while `run_together` runs


def check_restart(continues: bool) -> None:
    """Raise UserError if torchrun has restarted this training, unless it continues from its last checkpoint."""
    if (_group.restarts if _group else restarts_here()) and not continues:
        raise UserError(
            "--run_dir: torchrun has restarted this training, which would begin from its first epoch; with "
            "--max_restarts, add --run_dir DIR --auto_resume, so that it continues from the last checkpoint"
        )


def num_ranks() -> int:
    return _group.size if _group else 1


def rank() -> int:
    """The number of this rank, from 0."""
    return _group.rank if _group else 0


def num_ranks_here() -> int:
    """Ranks on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched_by_torchrun() else 1


def is_first() -> bool:
    """Whether this is the rank that decides and writes."""
    return rank() == 0


def is_on_first_machine() -> bool:
    return _group is None or _group.machine[0] == 0


@contextmanager
def alone() -> Iterator[None]:
    """A context in which this rank computes as if it were the only one: without exchanges."""
    global _group
    group, _group = _group, None
    try:
        yield
    finally:
        _group = group


def share_of(total: int) -> tuple[int, int]:
    """-> (start, stop) of this rank's share of `total` items; shares differ by at most one item."""
    return rank() * total // num_ranks(), (rank() + 1) * total // num_ranks()


# -------------------------------------------------------------------------------------------------------- exchanges
# every rank calls them in the same order


def sum_over_ranks(tensor: "torch.Tensor") -> "torch.Tensor":
    """-> `tensor`, in place the sum of those of all ranks. The host does not wait for a GPU."""
    if _group:
        _group.dist.all_reduce(tensor)
    return tensor


def share_tensors(tensors: "Iterable[torch.Tensor]") -> None:
    """Set tensors, in place, to those of the first rank."""
    if _group:
        for tensor in tensors:
            _group.dist.broadcast(tensor, 0)


def gather(value: Any) -> list:
    """-> the values of all ranks in their order"""
    return _group.gather(value) if _group else [value]


def from_first(make: Callable[[], Any], doing: str) -> Any:
    """-> on every rank, what `make()` returns on the first, which may take any time. doing: what it does, in words."""
    return _group.from_first(make, doing, range(_group.size), _group.control) if _group else make()


def from_first_here(make: Callable[[], Any], doing: str) -> Any:
    """`from_first`, but on each machine from its own first rank. Waits until all machines have finished."""
    return _group.from_first_here(make, doing) if _group else make()


def agree(number: int) -> int:
    """-> the largest `number` of all ranks at their previous call, so that none of them has to wait for the others."""
    return _group.agree(number) if _group else number


def statistics_group() -> Any:
    """-> the process group for statistics of batches, apart from that of gradients, which are sent meanwhile."""
    return _group.statistics


# ---------------------------------------------------------------------------------------------------- begin and end


def run_together(lead: Callable[[], int], follow: Callable[[Any], None]) -> int:
    """Run a command. -> exit status. The first rank calls `lead()`, the others `follow(job)` for each `hand_out(job)`.

    The error of a rank is raised by that rank; the others cannot go on without it, and end without a message.
    """
    global _group
    if not launched_by_torchrun():
        return lead()
    _group = group = RankGroup()
    status = 2
    try:
        group.join()
        status = lead() if group.rank == 0 else group.follow(follow)
    except Stopped as stop:
        status = stop.status
        group.wait_for_first()  # which saves
    except SystemExit as end:  # of --help
        status = end.code or 0
    except Exception as error:
        try:
            status = group.end_after(error)
        except Stopped as stop:  # by torchrun, as another process has ended
            status = stop.status
            if group.rank == 0:
                print("stopped, as another process has ended", file=sys.stderr)
    finally:
        group.leave(status)
        _group = None
    return status


def hand_out(job: Any) -> None:
    """Let the other ranks do `follow(job)`."""
    if _group:
        _group.hand_out(job)
