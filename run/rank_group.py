"""All ranks as one of them sees them: process groups, a store of short texts, signs of life, and the end."""

import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from datetime import timedelta
from typing import Any

from run.cli import UserError, first_line
from run.log import keep_in_log
from run.signals import Stopped
from run.surroundings import rank_here, restarts_here

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


class OtherEnded(Exception):
    """Another rank has ended, and this one cannot go on without it."""


class RankGroup:
    """All ranks, as one of them sees them: process groups, and a store of short texts that every rank reads."""

    def __init__(self):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.store, self.steps, self.doing = None, 0, "starts"
        self._end = None  # (rank, exit status, message) of the first rank that ended
        self._jobs, self._turns, self._agreement, self._has_left = 0, 0, None, threading.Event()
        self.machine, self._stops_after_step, self._watcher = [self.rank], False, None
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
        self._meet(store)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
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
        first_of_each, restarts = zip(*self.gather((self.rank - rank_here(), restarts_here())), strict=True)
        self.restarts = max(restarts)  # of the machine whose rank has died: torchrun does not count on the others
        self.first_of_machines = sorted(set(first_of_each))
        for first in self.first_of_machines:  # every rank takes part in making every group
            members = [rank for rank in range(self.size) if first_of_each[rank] == first]
            group = dist.new_group(members, timeout, "gloo")
            if self.rank in members:
                self.machine, self.machine_group = members, group

    def _meet(self, store):
        """Wait until all ranks of this start have come, and set `self.store` to the part of `store` that is theirs.

        torchrun may keep its store when it restarts the ranks, each machine counts its restarts for itself, and a
        process may run several commands. So the first rank names each start, and then lists those who have come to it:
        who has found the name of an earlier start is not in its list.
        """
        own_name, deadline = uuid.uuid4().hex, time.monotonic() + JOIN_SECONDS
        names = [f"name/{rank}" for rank in range(self.size)]
        if self.rank == 0:
            store.set("start", own_name)
        while True:
            if store.check(["start"]):
                self.store = self.dist.PrefixStore(store.get("start").decode(), store)
                self.store.set(f"host/{self.rank}", socket.gethostname())
                self.store.set(f"name/{self.rank}", own_name)
                if self.rank == 0 and self.store.check(names):
                    self.store.set("all", b" ".join(self.store.multi_get(names)))
                if self.store.check(["all"]) and own_name in self.store.get("all").decode():
                    return
            if time.monotonic() > deadline:
                missing = [rank for rank in range(self.size) if not self.store or not self.store.check([names[rank]])]
                raise UserError(f"torchrun: of {self.size} ranks, {missing[:10]} have not started in {JOIN_SECONDS} s")
            time.sleep(POLL_SECONDS)

    # signs of life

    def _watch(self):
        """In a thread: give signs of life; end the process if another rank has ended and this one does not."""
        beat = 0
        while not self._has_left.wait(BEAT_SECONDS):
            beat += 1
            with suppress(OtherEnded):
                self._in_store("set", f"alive/{self.rank}", f"{beat}|{self.steps}|{self.doing}")
                self._raise_if_ended()
                continue
            if not self._has_left.wait(GRACE_SECONDS):
                self._report_lost_store()
                os._exit(self._end[1] or 2)

    def _in_store(self, method, *arguments):
        """Call a method of the store. Raises OtherEnded if it is gone, and with it the first machine."""
        try:
            return getattr(self.store, method)(*arguments)
        except RuntimeError as error:
            self._end = self._end or (0, 2, STORE_IS_LOST)
            raise OtherEnded from error

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
            raise OtherEnded

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

    def from_first_here(self, make: Callable[[], Any], doing: str) -> Any:
        result = self.from_first(make, doing, self.machine, self.machine_group)
        for first in self.first_of_machines:
            self._wait_for(f"ready/{self._turns}/{first}", first)
        return result

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
                except OtherEnded:
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
            if not isinstance(error, OtherEnded):
                self._declare_end(2, first_line(error) or type(error).__name__)
                self._raise_if_ended()
                raise error
        except OtherEnded:
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
        with suppress(OtherEnded, Stopped):
            last = None
            while time.monotonic() < deadline and (beat := self._sign_of(0)[0]) != last:  # it may have been killed
                last = beat
                self._pause(min(3 * BEAT_SECONDS, deadline - time.monotonic()))

    def leave(self, status: int) -> None:
        """Tell the others that this rank ends."""
        if self.store is not None and (self.rank == 0 or status == 2):
            with suppress(OtherEnded):
                self._declare_end(status, "")
                self._let_others_read()
        self._has_left.set()
        if self._watcher:
            self._watcher.join(BEAT_SECONDS)  # not while the process ends: it may be using the store
        if status == 0 and self.store is not None:
            with suppress(RuntimeError):
                self.dist.destroy_process_group()

    def _let_others_read(self):
        """Without torchrun, wait a moment for the other ranks to read how this one has ended."""
        if self.rank == 0 and not self._store_is_apart:
            time.sleep(LINGER_SECONDS)

    def _declare_end(self, status, message):
        self._in_store("compare_set", "end", "", f"{self.rank}|{status}|{message}")
