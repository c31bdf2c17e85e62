#!/usr/bin/env python3
"""Real trainings, disturbed in every way that a night on a shared server knows, and compared with an undisturbed one.

python tests/torture.py --rounds 100

Each round starts or goes on with a ResNet-50 on tiny images (`main.py --auto_resume --save_every 1`), disturbs it once,
and looks at what is left; when a training has come to its end, all of it must be bit for bit that of the undisturbed
run. Every other training has its folder on a small tmpfs, where it can be mounted (as root; else try `unshare -rm`).
The rounds are kept in FOLDER/rounds.jsonl: broken off, the same command goes on counting.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the same sums whatever else the machine does
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import write_class_folders  # noqa: E402
from test_faults import differences  # noqa: E402

from files import UserError  # noqa: E402
from resuming import BEST, LAST, PREVIOUS, checkpoint_to_go_on_with  # noqa: E402

FLAGS = "--no-pretrained --image_size 32 --batch_size 8 --epochs 3 --use_augmentation --amp off --save_every 1"
TMPFS_BYTES = 1500 * 2**20  # four checkpoints of the ResNet-50 and some room
# main.py on a disk that takes 4 s for a checkpoint: the writes of files.py go in small pieces
SLOW_MAIN = """
import sys, time, engine, files, main
class Slow:
    def __init__(self, file):
        self.file = file
    def write(self, data):
        for start in range(0, len(data), 4_000_000):
            self.file.write(data[start : start + 4_000_000])
            time.sleep(0.05)
    def __getattr__(self, name):
        return getattr(self.file, name)
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.file.close()
files.open = lambda path, mode="r", **text: Slow(open(path, mode)) if mode == "wb" else open(path, mode, **text)
engine.keep_freed_memory()
sys.exit(main.main())
"""


class Lost(Exception):
    """What must never happen."""


class Training:
    """One training in its folder, from its start to its end over many processes."""

    def __init__(self, folder, data, generator):
        self.folder, self.data, self.generator = folder, data, generator
        self.place = (-1, 0)  # the last epoch and the images of the next one that are known to be saved
        self.finished = False

    def start(self, slow=False):
        program = ["-c", SLOW_MAIN] if slow else [str(ROOT / "main.py")]
        flags = [*FLAGS.split(), "--auto_resume", "--data_dirs", str(self.data), "--run_dir", str(self.folder)]
        self.said, self.training = [], threading.Event()
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen([sys.executable, *program, *flags], cwd=ROOT, start_new_session=True, **pipes)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.said.append(line)
            if "training on" in line:
                self.training.set()
        self.training.set()

    def end(self, *allowed):
        """Wait for the process. -> its exit status, which must be 0 or one of `allowed`."""
        status = self.process.wait(timeout=300)
        self.reader.join()
        said = "".join(self.said)
        # a signal that comes when main.py has done all and Python is closing down ends it as any other process
        self.finished = status == 0 or (status < 0 and "results lie in" in said)
        if not self.finished and (status not in allowed or "Traceback" in said):
            raise Lost(f"exit status {status}: {''.join(self.said[-5:])}")
        return status

    def check(self, may_lose=0):
        """Look at what is left: a whole checkpoint, no earlier than the one before but for `may_lose` saved steps."""
        if not self.folder.exists() or not list(self.folder.glob("*_model.pth")):
            if self.place > (-1, 0):
                raise Lost("no checkpoint is left")
            return
        _, checkpoint = checkpoint_to_go_on_with(self.folder)
        position = checkpoint["position"]
        place = checkpoint["epoch"], position["images"] if position else 0
        if not may_lose and place < self.place:
            raise Lost(f"from {self.place} back to {place}")
        self.place = place

    def wait_at_random(self):
        """Until a moment somewhere in the start-up, or in the training."""
        if self.generator.random() < 0.15:
            time.sleep(self.generator.uniform(0, 5))
        else:
            self.wait_in_the_training()

    def wait_in_the_training(self):
        self.training.wait(60)
        time.sleep(self.generator.uniform(0, 8))

    def wait_for_a_save(self):
        """Until a checkpoint is being written, and then a part of the time that takes."""
        self.training.wait(60)
        time.sleep(self.generator.uniform(0, 3))
        deadline = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < deadline:
            if list(self.folder.glob(".*_model.pth.*.tmp")):
                time.sleep(self.generator.uniform(0, 1) ** 2)
                return
            time.sleep(0.002)

    def wait_in_a_slow_save(self):
        self.wait_for_a_save()
        time.sleep(self.generator.uniform(0, 4))

    def signal_all(self, number):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


# Each fault: how it disturbs a Training. Exit status -N: by a signal that came before main.py was there to handle it.


def start_and_signal(training, number, *allowed, wait=Training.wait_at_random, slow=False):
    """Start it, send the signal at the moment for which `wait` waits, and expect one of the statuses `allowed`."""
    training.start(slow)
    wait(training)
    training.signal_all(number)
    training.end(*allowed)


def killed(training):
    start_and_signal(training, signal.SIGKILL, -signal.SIGKILL)


def killed_while_saving(training):
    start_and_signal(training, signal.SIGKILL, -signal.SIGKILL, wait=Training.wait_for_a_save)


def killed_while_saving_slowly(training):
    start_and_signal(training, signal.SIGKILL, -signal.SIGKILL, wait=Training.wait_in_a_slow_save, slow=True)


def terminated(training):
    start_and_signal(training, signal.SIGTERM, 143, -signal.SIGTERM)


def terminated_while_saving(training):
    start_and_signal(training, signal.SIGTERM, 143, wait=Training.wait_for_a_save)


def terminated_while_saving_slowly(training):
    start_and_signal(training, signal.SIGTERM, 143, wait=Training.wait_for_a_save, slow=True)


def interrupted(training):
    start_and_signal(training, signal.SIGINT, 130, wait=Training.wait_in_the_training)


def stopped_twice(training):
    training.start()
    training.wait_for_a_save()
    training.signal_all(signal.SIGTERM)
    time.sleep(training.generator.choice([0, 1.2]))  # the same signal come twice; an impatient user
    training.signal_all(signal.SIGTERM)
    training.end(143)


def asked_to_save(training):
    training.start()
    training.training.wait(60)
    for _ in range(5):
        time.sleep(training.generator.uniform(0, 1))
        training.signal_all(signal.SIGUSR1)
    training.signal_all(signal.SIGTERM)
    training.end(143)


def disk_full(training):
    """A file fills the disk for some seconds; the training goes on through it, or ends with an error at its end."""
    training.start()
    training.wait_at_random()
    filler = training.folder.parent / "filler"
    with suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**20))
    time.sleep(training.generator.uniform(1, 8))
    if training.generator.random() < 0.5:
        training.signal_all(training.generator.choice([signal.SIGKILL, signal.SIGTERM]))
        time.sleep(2)
    filler.unlink()
    time.sleep(2)
    training.signal_all(signal.SIGTERM)
    training.end(143, -signal.SIGKILL, -signal.SIGTERM, 2)


def damage(training, name, how):
    path = training.folder / name
    content = path.read_bytes()
    path.unlink()  # it may be the same file as another
    if how == "cut":
        content = content[: training.generator.randrange(len(content))]
    else:
        content = bytearray(content)
        for _ in range(training.generator.choice([1, 1, 100])):
            content[training.generator.randrange(len(content))] ^= 1 << training.generator.randrange(8)
    path.write_bytes(content)


def last_model_cut_short(training):
    damage(training, LAST, "cut")
    training.check(may_lose=1)
    terminated(training)


def bits_of_the_last_model_flipped(training):
    damage(training, LAST, "flip")
    training.check(may_lose=1)
    terminated(training)


def other_files_damaged(training):
    last_is_whole = checkpoint_to_go_on_with(training.folder)[0].name == LAST  # a fault before may have damaged it
    for name in [PREVIOUS] * last_is_whole + ["history.csv", "splits.json", "args.json"]:
        damage(training, name, training.generator.choice(["cut", "flip"]))
    (training.folder / f".{LAST}.1.tmp").write_bytes(b"half")
    terminated(training)


def nothing_readable(training):
    """Both checkpoints are damaged: main.py must say so, and go on when they are put back."""
    copies = {name: training.folder / f"copy_of_{name}.bytes" for name in (LAST, PREVIOUS)}
    for name, copy in copies.items():
        shutil.copy(training.folder / name, copy)
        damage(training, name, "cut")
    training.start()
    if training.end(2) != 2 or "to start again from nothing" not in "".join(training.said):
        raise Lost(f"no refusal of damaged checkpoints: {''.join(training.said)}")
    for name, copy in copies.items():
        os.replace(copy, training.folder / name)
    terminated(training)


def best_model_damaged(training):
    """It must be refused by name, or made anew from the last model."""
    copy = training.folder / "copy.bytes"
    shutil.copy(training.folder / BEST, copy)
    damage(training, BEST, "cut")
    training.start()
    training.training.wait(60)
    training.signal_all(signal.SIGTERM)
    if training.end(2, 143) == 2:
        if BEST not in training.said[-1]:
            raise Lost(f"no word of {BEST}: {training.said[-1]}")
        os.replace(copy, training.folder / BEST)
    copy.unlink(missing_ok=True)


def two_at_once(training):
    training.start()
    training.training.wait(60)
    first, said = training.process, training.said
    if first.poll() is None:
        second = Training(training.folder, training.data, training.generator)
        second.start()
        second.end(2)
        if first.poll() is None and f"process {first.pid} on" not in "".join(second.said):
            raise Lost(f"the second process was let in: {''.join(second.said)}")
    training.process, training.said = first, said
    training.signal_all(signal.SIGTERM)
    training.end(143)


# by the files that they need
DAMAGES = {
    last_model_cut_short: PREVIOUS, bits_of_the_last_model_flipped: PREVIOUS, other_files_damaged: PREVIOUS,
    nothing_readable: PREVIOUS, best_model_damaged: BEST,
}  # fmt: skip
FAULTS = [
    killed, killed, killed_while_saving, killed_while_saving, killed_while_saving, killed_while_saving_slowly,
    killed_while_saving_slowly, terminated_while_saving_slowly, terminated, terminated_while_saving, interrupted,
    stopped_twice, asked_to_save, two_at_once, *DAMAGES,
]  # fmt: skip


def mount_tmpfs(folder):
    """-> whether a small tmpfs is at `folder` now."""
    folder.mkdir(exist_ok=True)
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def one_training(folder, data, whole, generator, rounds_left, note, chosen):
    """Disturb a training until it ends. note: called with (fault, what was lost or None) after each round.

    chosen: names of the only faults that there shall be, or None.
    """
    on_tmpfs = generator.random() < 0.5 and mount_tmpfs(folder / "small")
    place = folder / ("small" if on_tmpfs else "disk")
    shutil.rmtree(place / "run", ignore_errors=True)
    training = Training(place / "run", data, generator)
    faults = FAULTS + [disk_full] * 6 * on_tmpfs
    try:
        while not training.finished and rounds_left > 0:
            possible = [fault for fault in faults if (training.folder / DAMAGES.get(fault, "")).exists()]
            possible = [fault for fault in possible if not chosen or fault.__name__ in chosen]
            fault, lost = generator.choice(possible or [killed, terminated]), None
            try:
                fault(training)
                if not training.finished:
                    training.check()
                elif different := differences(whole, training.folder):
                    raise Lost(f"not the undisturbed run: {', '.join(different)}")
            except (Lost, UserError, subprocess.TimeoutExpired) as error:
                lost = f"{type(error).__name__}: {error}"
                training.signal_all(signal.SIGKILL)
            note(fault.__name__, lost, training.finished)
            rounds_left -= 1
            if lost:
                print(f"    the folder is kept: {shutil.copytree(training.folder, folder / f'lost_{time.time():.0f}')}")
                return
        if not training.finished:  # the last round of all: let it come to its end
            training.start()
            training.end()
            if different := differences(whole, training.folder):
                note("undisturbed end", f"not the undisturbed run: {', '.join(different)}", True)
    finally:
        shutil.rmtree(training.folder, ignore_errors=True)
        if on_tmpfs:
            subprocess.run(["umount", str(folder / "small")], check=True)


def read_rounds(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("torture"), help="where it works; needs 3 GB [torture]")
    names = sorted({fault.__name__ for fault in [*FAULTS, disk_full]})
    parser.add_argument("--faults", nargs="+", choices=names, metavar="NAME", help=f"only these of {', '.join(names)}")
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "rounds.jsonl"
    data, whole = folder / "images", folder / "whole"
    if not data.exists():
        write_class_folders(data)
    undisturbed = Training(whole, data, random.Random(0))
    undisturbed.start()  # or found to be finished
    undisturbed.end()

    def note(fault, lost, finished):
        entry = {"round": len(read_rounds(log)) + 1, "fault": fault, "finished": finished, "lost": lost}
        print(entry, flush=True)
        with open(log, "a") as file:
            file.write(json.dumps(entry) + "\n")

    while (done := len(read_rounds(log))) < args.rounds:
        one_training(folder, data, whole, random.Random(done), args.rounds - done, note, args.faults)
    rounds = read_rounds(log)
    print(f"\n{len(rounds)} rounds, {sum(entry['finished'] for entry in rounds)} trainings to their end")
    for fault, count in sorted(Counter(entry["fault"] for entry in rounds).items(), key=lambda item: -item[1]):
        print(f"{count:5d} {fault.replace('_', ' ')}")
    losses = [entry for entry in rounds if entry["lost"]]
    print(f"losses: {len(losses)}")
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
