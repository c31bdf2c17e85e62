"""The processes ("ranks") of one training that torchrun has started: how they share work, wait for each other and end.

The first rank reads flags, images and checkpoints, decides and writes; the others do the jobs that it hands out. A
process that was started alone is the first and only rank, and everything here is a no-op for it.
"""

import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from run.cli import UserError, first_line
from run.log import keep_in_log
from run.signals import Stopped
from run.surroundings import launched_by_torchrun

if TYPE_CHECKING:
    import torch

JOIN_SECONDS = 300  # for all ranks to start
COLLECTIVE_SECONDS = 600  # for all ranks to come to the same point
SILENT_SECONDS = 120  # a rank that has given no sign of life for so long is missing
BEAT_SECONDS = 2  # between two signs of life
GRACE_SECONDS = 30  # for a rank to end after another one has; torchrun kills after as many
LINGER_SECONDS = 3
POLL_SECONDS = 0.1
STORE_IS_LOST = "the store does not answer"
# words of errors below torch.distributed when a rank is gone or does not answer
LOST_WORDS = (
    "onnection",
    "imed out",
    "NCCL",
    "gloo",
    "Broken pipe",
    "pair closure",
    "recvValue failed",
    "sendBytes failed",
)

_commands = itertools.count()
_group: "_Group | None" = None  # of this process, while `run_together` runs


def check_restart(continues: bool) -> None:
    """Raise UserError if torchrun has restarted this training, unless it continues from its last checkpoint."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and not continues:
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


def rank_here() -> int:
    """The number of this rank among those of its machine."""
    return int(os.environ["LOCAL_RANK"]) if launched_by_torchrun() else 0


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
    """`from_first`, but on each machine from its own first rank."""
    return _group.from_first(make, doing, _group.machine, _group.machine_group) if _group else make()


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
    _group = group = _Group()
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


class _OtherEnded(Exception):
    """Another rank has ended, and this one cannot go on without it."""


class _Group:
    """All ranks, as one of them sees them: process groups, and a store of short texts that every rank reads."""

    def __init__(self):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.store, self.steps, self.doing = None, 0, "starts"
        self._end = None  # (rank, exit status, message) of the first rank that ended
        self._jobs, self._turns, self._agreement, self._has_left = 0, 0, None, threading.Event()
        self.machine, self._stops_after_step = [self.rank], False
        # of torchrun; without it, the store is in the first rank and ends with it
        self._store_is_apart = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def join(self) -> None:
        """Wait until all ranks have started, and connect them. Raises UserError."""
        import torch
        from torch import distributed as dist

        self.dist = dist
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS)))
        except (RuntimeError, ValueError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(f"torchrun: {address} does not answer ({first_line(error)})") from error
        # torchrun may keep its store when it restarts the ranks, and a process may run several commands
        self.store = dist.PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}_{next(_commands)}", store)
        self.store.set(f"host/{self.rank}", socket.gethostname())
        self._wait_for_all()
        threading.Thread(target=self._watch, daemon=True).start()
        if torch.cuda.is_available():
            torch.cuda.set_device(min(rank_here(), torch.cuda.device_count() - 1))
        timeout = timedelta(seconds=COLLECTIVE_SECONDS)
        has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
            store=dist.PrefixStore("groups", self.store),
            rank=self.rank,
            world_size=self.size,
            timeout=timeout,
        )
        self.control = dist.new_group(backend="gloo", timeout=timeout)
        self.statistics = dist.new_group(timeout=timeout)
        first_of_each = self.gather(self.rank - rank_here())
        for first in sorted(set(first_of_each)):  # every rank takes part in making every group
            members = [rank for rank in range(self.size) if first_of_each[rank] == first]
            group = dist.new_group(members, timeout, "gloo")
            if self.rank in members:
                self.machine, self.machine_group = members, group

    def _wait_for_all(self):
        deadline = time.monotonic() + JOIN_SECONDS
        while missing := [rank for rank in range(self.size) if not self.store.check([f"host/{rank}"])]:
            if time.monotonic() > deadline:
                raise UserError(f"torchrun: of {self.size} ranks, {missing[:10]} have not started in {JOIN_SECONDS} s")
            time.sleep(POLL_SECONDS)

    # signs of life

    def _watch(self):
        """In a thread: give signs of life; end the process if another rank has ended and this one does not."""
        beat = 0
        while not self._has_left.wait(BEAT_SECONDS):
            beat += 1
            with suppress(_OtherEnded):
                self._in_store("set", f"alive/{self.rank}", f"{beat}|{self.steps}|{self.doing}")
                self._raise_if_ended()
                continue
            if not self._has_left.wait(GRACE_SECONDS):
                self._report_lost_store()
                os._exit(self._end[1] or 2)

    def _in_store(self, method, *arguments):
        """Call a method of the store. Raises _OtherEnded if it is gone, and with it the first machine."""
        try:
            return getattr(self.store, method)(*arguments)
        except RuntimeError as error:
            self._end = self._end or (0, 2, STORE_IS_LOST)
            raise _OtherEnded from error

    def _report_lost_store(self):
        """Print a line, once per machine, if the store is gone, so that no other rank can say why it has ended."""
        alive = [rank for rank in self.machine if rank or self._store_is_apart]
        if self._end[2] == STORE_IS_LOST and self.rank == min(alive, default=self.rank):
            text = "torchrun, or its first machine, has ended or does not answer; resume from the last checkpoint"
            print(f"error: {text}", file=sys.stderr)

    def _read(self, key, default=""):
        return self._in_store("get", key).decode() if self._in_store("check", [key]) else default

    def _raise_if_ended(self):
        if self._end is None and (text := self._read("end")):
            rank, status, message = text.split("|", 2)
            self._end = int(rank), int(status), message
        if self._end and self._end[0] != self.rank:
            raise _OtherEnded

    def _sign_of(self, rank):
        """-> (number of the sign of life, steps, what the rank does)"""
        beat, steps, doing = self._read(f"alive/{rank}", "0|0|starts").split("|", 2)
        return int(beat), int(steps), doing

    def _missing(self):
        """-> the ranks, in words, that have given no sign of life for a while, or else those that are behind"""
        before = [self._sign_of(rank)[0] for rank in range(self.size)]
        self._pause(3 * BEAT_SECONDS)
        signs = [self._sign_of(rank) for rank in range(self.size)]
        others = [rank for rank in range(self.size) if rank != self.rank]
        silent = [rank for rank in others if signs[rank][0] == before[rank]]
        behind = [rank for rank in others if signs[rank][1] == min(signs[rank][1] for rank in others)]
        return ", ".join(self._describe(rank) for rank in (silent or behind)[:5])

    def _describe(self, rank):
        _, steps, doing = self._sign_of(rank)
        return f"rank {rank} on {self._read(f'host/{rank}')} ({doing}, step {steps})"

    def _pause(self, seconds):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._raise_if_ended()
            time.sleep(POLL_SECONDS)

    # exchanges

    def gather(self, value: Any) -> list:
        values = [None] * self.size
        self.dist.all_gather_object(values, value, group=self.control)
        return values

    def from_first(self, make: Callable[[], Any], doing: str, ranks: list[int], group: Any) -> Any:
        self._turns += 1
        first, key, result = ranks[0], f"ready/{self._turns}/{ranks[0]}", [None]
        if self.rank == first:
            self.doing = doing
            result = [make()]
            self._in_store("set", key, "yes")
        else:
            self._wait_for(key, first)
        self.doing = "trains"
        self.dist.broadcast_object_list(result, first, group=group)
        return result[0]

    def _wait_for(self, key, rank):
        """Wait for a key as long as the rank that will set it gives signs of life."""
        last, heard = None, time.monotonic()
        while not self._read(key):
            self._raise_if_ended()
            if (beat := self._sign_of(rank)[0]) != last:
                last, heard = beat, time.monotonic()
            if time.monotonic() - heard > SILENT_SECONDS:
                raise UserError(f"torchrun: no sign of life for {SILENT_SECONDS} s from {self._describe(rank)}")
            time.sleep(POLL_SECONDS)

    def agree(self, number: int) -> int:
        import torch

        self.steps += 1
        previous, tensor = self._agreement, torch.tensor(number)
        work = self.dist.all_reduce(tensor, self.dist.ReduceOp.MAX, group=self.control, async_op=True)
        self._agreement = work, tensor
        if previous is None:
            return 0
        previous[0].wait()
        agreed = int(previous[1])
        self._stops_after_step = agreed > 0
        return agreed

    # jobs

    def hand_out(self, job: Any) -> None:
        self._jobs += 1
        self._in_store("set", f"job/{self._jobs}", "yes")
        self.dist.broadcast_object_list([job], 0, group=self.control)

    def follow(self, function: Callable[[Any], None]) -> int:
        """Do the jobs of the first rank until it ends. -> its exit status"""
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            while True:
                self._jobs += 1
                try:
                    self._wait_for(f"job/{self._jobs}", 0)
                except _OtherEnded:
                    if self._end[1] == 0:
                        return 0
                    raise
                job = [None]
                self.dist.broadcast_object_list(job, 0, group=self.control)
                function(job[0])

    # the end

    def end_after(self, error: Exception) -> int:
        """Raise `error`, or a line about a lost connection. -> exit status if another rank has ended before."""
        if self.store is None:
            raise error
        is_lost = isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_WORDS)
        try:
            if is_lost:
                lost = UserError(
                    f"torchrun: the connection is lost to {self._missing()}; resume from the last checkpoint"
                )
                lost.__cause__, error = error, lost
            if not isinstance(error, _OtherEnded):
                self._declare_end(2, first_line(error) or type(error).__name__)
                self._raise_if_ended()
                raise error
        except _OtherEnded:
            pass
        rank, status, message = self._end
        self._report_lost_store()
        keep_in_log(f"rank {rank} has ended: {message}\n")
        time.sleep(
            LINGER_SECONDS
        )  # torchrun stops the ranks that have not failed; its summary then names the one that has
        return status or 2

    def wait_for_first(self) -> None:
        """After a signal: torchrun must not see that another rank has ended while the first one saves.

        Before and after the training it saves nothing, and it may wait in an exchange for this rank to end.
        """
        if self.rank == 0 or self.store is None:
            return
        deadline = time.monotonic() + (GRACE_SECONDS if self._stops_after_step else LINGER_SECONDS)
        with suppress(_OtherEnded, Stopped):
            last = None
            while time.monotonic() < deadline and (beat := self._sign_of(0)[0]) != last:  # it may have been killed
                last = beat
                self._pause(min(3 * BEAT_SECONDS, deadline - time.monotonic()))

    def leave(self, status: int) -> None:
        """Tell the others that this rank ends."""
        if self.store is not None and (self.rank == 0 or status == 2):
            with suppress(_OtherEnded):
                self._declare_end(status, "")
                self._let_others_read()
        self._has_left.set()
        if status == 0 and self.store is not None:
            with suppress(RuntimeError):
                self.dist.destroy_process_group()

    def _let_others_read(self):
        """Without torchrun, wait a moment for the other ranks to read how this one has ended."""
        if self.rank == 0 and not self._store_is_apart:
            time.sleep(LINGER_SECONDS)

    def _declare_end(self, status, message):
        self._in_store("compare_set", "end", "", f"{self.rank}|{status}|{message}")
