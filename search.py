#!/usr/bin/env python3
"""Search hyperparameters as a W&B sweep does, without W&B: the same sweep.yaml, no account, no network.

python search.py sweep.yaml --trials 20 --data_dirs data/forehead_wrinkles
python search.py sweep.yaml --trials 40 --jobs 2 --storage postgresql+psycopg://host/studies --data_dirs data/forehead

Flags that are not search.py's go to each trial's main.py. The study lies in a database: stopped or killed, the same
command goes on where it was, unfinished trials from their own checkpoints.
"""

import argparse
import csv
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import matplotlib

import main
from files import UserError, atomic_write, write_csv
from resuming import LAST, PREVIOUS, Signals, Stopped
from sweep_config import read_sweep

os.environ.setdefault("SQLALCHEMY_SILENCE_UBER_WARNING", "1")
import optuna
import sqlalchemy
from optuna.trial import TrialState

POLL_SECONDS = 1
STORAGE_ATTEMPTS = 5
MOST_FAILURES = 3  # in a row before any trial was finished: the command itself is wrong
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
WORDS = {TrialState.COMPLETE: "done", TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed"}


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, prog="search.py"
    )
    add = parser.add_argument
    count = main.number(int, low=1)
    add("sweep", metavar="YAML", help="a W&B sweep's file, such as sweep.yaml")
    add("--trials", type=count, metavar="N", help="of the study in all [the grid's size; run_cap of the yaml; 20]")
    add("--jobs", type=count, default=1, metavar="N", help="trials at once on this machine [1]")
    add("--search_dir", metavar="DIR", help="trials and results go here [search_NAME, of the yaml's name]")
    add("--study", metavar="NAME", help="the study's name in the storage [that of the search_dir]")
    add("--storage", metavar="URL", help="a database for many machines, as SQLAlchemy names it [SQLite in search_dir]")
    add("--search_seed", type=int, metavar="N", help="of what is drawn [another each time]")
    return parser


# ----------------------------------------------------------------------------------------------------------- trials


@dataclass
class Running:
    """A trial whose main.py is at work."""

    trial: optuna.Trial
    process: subprocess.Popen
    run_dir: Path
    slot: int
    started: float
    epochs_seen: int = 0
    best: float | None = None
    pruned: bool = False


class Search:
    """A study and its trials on this machine. `loop` runs until there are `trials` of them."""

    def __init__(self, args, main_flags, config):
        self.args, self.main_flags, self.config = args, main_flags, config
        self.folder = Path(args.search_dir)
        self.host = socket.gethostname()
        self.epochs = main.build_parser().parse_args(self.command_flags({}, constants_only=True)).epochs
        self.trials = args.trials or len(config.grid() or []) or config.content.get("run_cap") or 20
        self.running, self.failures, self.stopping = [], [], False
        self.study = self._open_study()

    def command_flags(self, values, constants_only=False):
        """{searched parameter: value} -> the flags of a trial's main.py; those of this command line win."""
        parameters = [p for p in self.config.parameters if p.distribution is None or not constants_only]
        flags = self.config.flags({p.name: p.value(values.get(p.name)) for p in parameters})
        for word in self.main_flags:
            if word.startswith("--"):
                flags = without(flags, word.partition("=")[0])
        return [*flags, *self.main_flags]

    def _open_study(self):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message=".*already reported.*")  # before this search was stopped
        study = optuna.create_study(
            storage=open_storage(self.args.storage or f"sqlite:///{self.folder.absolute() / 'study.db'}"),
            sampler=self.config.sampler(self.args.search_seed),
            pruner=self.config.pruner(self.epochs),
            study_name=self.args.study or self.folder.name,
            direction="maximize" if self.config.maximizes else "minimize",
            load_if_exists=True,
        )
        described = {name: self.config.content.get(name) for name in ("parameters", "metric", "method")}
        if study.user_attrs.setdefault("sweep", described) != described:
            raise UserError(
                f"{self.config.path}: is not the sweep that the study {study.study_name} began with; "
                "name another with --search_dir"
            )
        study.set_user_attr("sweep", described)
        for values in self.config.grid() or []:
            study.enqueue_trial(values, skip_if_exists=True)
        return study

    # -------------------------------------------------------------------------------------------------- the loop

    def loop(self, signals):
        with signals.deferred():
            try:
                while self.running or self._wants_more():
                    while len(self.running) < self.args.jobs and self._wants_more():
                        self._start(*self._left_over() or self._new_trial())
                    for one in list(self.running):
                        self._look_at(one)
                    self.show()
                    if signals.stopped and not self.stopping:
                        self._stop_all()
                    time.sleep(POLL_SECONDS)
            finally:
                self._stop_all()
                for one in self.running:
                    one.process.wait()

    def _wants_more(self):
        if self.stopping or (len(self.failures) >= MOST_FAILURES and not self._finished(TrialState.COMPLETE)):
            return False
        here = {one.trial.number for one in self.running}
        trials = self.study.get_trials(deepcopy=False)
        if self.config.target is not None and self._finished(TrialState.COMPLETE):
            best, target = self.study.best_value, self.config.target
            if best >= target if self.config.maximizes else best <= target:
                return False
        elsewhere = [t for t in trials if t.state in (*ENDED, TrialState.RUNNING) and t.number not in here]
        left_over = [t for t in elsewhere if self._is_left_over(t)]
        return bool(left_over) or len(elsewhere) + len(here) < self.trials

    def _finished(self, *states):
        return self.study.get_trials(deepcopy=False, states=states)

    def _is_left_over(self, frozen):
        """A trial that this machine began and that nobody runs any more."""
        owner = frozen.user_attrs.get("process", "")
        host, _, pid = owner.rpartition(":")
        if frozen.state is not TrialState.RUNNING or host != self.host or int(pid) == os.getpid():
            return False
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    def _left_over(self):
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._is_left_over(frozen):
                return (optuna.Trial(self.study, frozen._trial_id),)
        return None

    def _new_trial(self):
        trial = self.study.ask(self.config.searched())
        return (trial,)

    def _start(self, trial):
        run_dir = Path(trial.user_attrs.get("run_dir") or self.folder.absolute() / f"trial_{trial.number:04d}")
        trial.set_user_attr("run_dir", str(run_dir))
        trial.set_user_attr("process", f"{self.host}:{os.getpid()}")
        slot = min(set(range(self.args.jobs)) - {one.slot for one in self.running})
        flags = [*self.command_flags(trial.params), "--run_dir", str(run_dir), "--auto_resume", *self._device(slot)]
        command = [sys.executable, str(Path(main.__file__).resolve()), *flags]
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        with open(log_of(run_dir), "a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            # a group of its own: Ctrl-C is for this process, which then stops the trials
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment(), process_group=0
            )
        self.running.append(Running(trial, process, run_dir, slot, time.time()))

    def _device(self, slot):
        gpus = main.torch.cuda.device_count()
        return ["--device", f"cuda:{slot % gpus}"] if gpus > 1 and "--device" not in " ".join(self.main_flags) else []

    def _environment(self):
        """Without W&B unless it is asked for; the cores are shared out, as threads of two trials would fight."""
        environment = {"WANDB_MODE": "disabled", **os.environ}
        if self.args.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, main.cpu_count() // self.args.jobs)))
        return environment

    def _look_at(self, one):
        """Report new epochs, stop what is not promising, and close what has ended."""
        ended = one.process.poll() is not None  # asked before the history is read, so that no row is missed
        for row in read_rows(one.run_dir / "history.csv")[one.epochs_seen :]:
            one.epochs_seen += 1
            value = float(row[self.config.metric])
            better = max if self.config.maximizes else min
            one.best = value if one.best is None else better(one.best, value)
            one.trial.report(one.best, one.epochs_seen)
        if ended:
            self._close(one)
        elif not (one.pruned or self.stopping) and one.epochs_seen < self.epochs and one.trial.should_prune():
            one.pruned = True
            one.process.send_signal(signal.SIGTERM)

    def _close(self, one):
        self.running.remove(one)
        status = one.process.returncode
        minutes = one.trial.user_attrs.get("minutes", 0) + (time.time() - one.started) / 60
        one.trial.set_user_attr("minutes", minutes)
        one.trial.set_user_attr("epochs", one.epochs_seen)
        if status == 0 and one.best is not None:
            self._tell(one, one.best, TrialState.COMPLETE)
        elif one.pruned and one.best is not None:
            one.trial.set_user_attr("best", one.best)
            self._tell(one, None, TrialState.PRUNED)
        elif not self.stopping:  # else it goes on when this search does
            error = last_line(log_of(one.run_dir))
            one.trial.set_user_attr("error", error)
            self.failures.append(f"trial {one.trial.number}: {error}")
            self._tell(one, None, TrialState.FAIL)

    def _tell(self, one, value, state):
        self.study.tell(one.trial, value, state)
        if state is not TrialState.FAIL:  # the best model stays; twenty trials would fill a disk with the others
            for name in (LAST, PREVIOUS):
                (one.run_dir / name).unlink(missing_ok=True)
        if not sys.stdout.isatty():
            print(self._line(self.study.get_trials(deepcopy=False)[one.trial.number]))

    def _stop_all(self):
        self.stopping = True
        for one in self.running:
            if one.process.poll() is None:
                one.process.send_signal(signal.SIGTERM)

    # --------------------------------------------------------------------------------------------------- showing

    def show(self):
        """The table of the trials, redrawn on a terminal."""
        if not sys.stdout.isatty():
            return
        trials = self.study.get_trials(deepcopy=False)
        lines = [f"{self.config.metric} of {self.trials} trials, study {self.study.study_name}, folder {self.folder}"]
        lines += [self._line(trial) for trial in trials[-30:]]
        sys.stdout.write("\033[H\033[J" + "\n".join(lines) + "\n")
        sys.stdout.flush()

    def _line(self, frozen):
        best = frozen.value if frozen.state is TrialState.COMPLETE else None
        if best is None and frozen.intermediate_values:
            best = frozen.intermediate_values[max(frozen.intermediate_values)]
        epochs = max(frozen.intermediate_values, default=0)
        figure = "" if best is None else f"{best:.4f}"
        chosen = " ".join(f"{name}={self._value(name, drawn)}" for name, drawn in frozen.params.items())
        word = WORDS.get(frozen.state, "at work")
        error = frozen.user_attrs.get("error", "") if frozen.state is TrialState.FAIL else ""
        return f"trial {frozen.number:3d} {word:>13} {epochs:4d} epochs {figure:>8}  {chosen}  {error}".rstrip()

    def _value(self, name, drawn):
        value = next(p for p in self.config.parameters if p.name == name).value(drawn)
        return f"{value:.4g}" if isinstance(value, float) else value

    def write_results(self):
        """search.csv, the plots, and the command that trains the best setting in full."""
        searched = [p for p in self.config.parameters if p.distribution is not None]
        rows = []
        for trial in self.study.get_trials(deepcopy=False):
            about = trial.user_attrs
            best = trial.value if trial.value is not None else about.get("best", "")
            fixed = {"trial": trial.number, "state": WORDS.get(trial.state, "unfinished"), self.config.metric: best}
            chosen = {p.name: p.value(trial.params[p.name]) if p.name in trial.params else "" for p in searched}
            rest = {"epochs": about.get("epochs", ""), "minutes": round(about.get("minutes", 0), 2)}
            rows.append({**fixed, **chosen, **rest, "run_dir": about.get("run_dir"), "error": about.get("error", "")})
        if rows:
            write_csv(self.folder / "search.csv", list(rows[0]), rows)
        if not self._finished(TrialState.COMPLETE):
            return
        self._plot()
        best = self.study.best_trial
        flags = self.command_flags(best.params)
        print(f"best: {self._line(best)}")
        print(f"its model: {best.user_attrs['run_dir']}/best_model.pth")
        # the search may train for few epochs; the best setting deserves main.py's default
        print(f"in full: {shlex.join(['python', 'main.py', *without(flags, '--epochs')])}")
        print(f"all trials: {self.folder / 'search.csv'}")

    def _plot(self):
        matplotlib.use("Agg")
        from optuna.visualization import matplotlib as plots

        figures = {"search_history.png": plots.plot_optimization_history}
        values = {trial.value for trial in self._finished(TrialState.COMPLETE)}
        if len(values) > 1 and self.config.searched():  # else there is nothing that could matter
            figures["search_importance.png"] = plots.plot_param_importances
        for name, plot in figures.items():
            axes = plot(self.study, target_name=self.config.metric)
            axes.set_title(f"{self.config.metric} of study {self.study.study_name}")
            if name == "search_importance.png":
                axes.get_legend().remove()  # of one colour, and over the bars
            else:
                axes.xaxis.get_major_locator().set_params(integer=True)
            axes.figure.set_size_inches(9, 5)
            axes.figure.set_layout_engine("constrained")
            with atomic_write(self.folder / name, "wb") as file:
                axes.figure.savefig(file, format="png", dpi=100)


def open_storage(url):
    """The database, with its tables, which two searches that begin at once must not make at once."""
    for attempts_left in reversed(range(STORAGE_ATTEMPTS)):
        try:
            return optuna.storages.RDBStorage(url)
        except Exception as error:  # of SQLAlchemy, of the driver, or for want of one
            if attempts_left and isinstance(error, sqlalchemy.exc.DBAPIError):
                time.sleep(1)
                continue
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--storage: {url} cannot be opened ({type(error).__name__}: {reason})") from error


def log_of(run_dir):
    """What main.py prints, beside the run's folder, which must be the run's alone."""
    return run_dir.with_name(f"{run_dir.name}.log")


def last_line(path):
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def read_rows(path):
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def without(flags, name):
    """A command line of main.py without one flag, whatever its form (--lr, --no-pretrained), and what stands behind."""
    actions = main.build_parser()._option_string_actions

    def meaning(word):
        return getattr(actions.get(word), "dest", word)

    kept, is_kept = [], True
    for word in flags:
        if word.startswith("--"):
            is_kept = meaning(word.partition("=")[0]) != meaning(name)
        if is_kept:
            kept.append(word)
    return kept


def check_main_flags(flags):
    """Raises UserError for a flag that every trial would refuse, or that the search sets itself."""
    for word in flags:
        if word.partition("=")[0] in ("--run_dir", "--resume", "--auto_resume", "--output_dir", "--eval_only"):
            raise UserError(f"{word}: the search names the folders of its trials itself; leave this flag out")
    main.build_parser().parse_args(flags)


def run(argv):
    args, main_flags = build_parser().parse_known_args(argv)
    known = {option[2:] for action in main.build_parser()._actions for option in action.option_strings}
    config = read_sweep(args.sweep, known - {"help"})
    check_main_flags([*config.flags({}), *main_flags])
    args.search_dir = args.search_dir or f"search_{Path(args.sweep).stem}"
    folder = Path(args.search_dir)
    with Signals() as signals:
        folder.mkdir(parents=True, exist_ok=True)
        search = Search(args, main_flags, config)
        try:
            search.loop(signals)
        finally:
            search.show()
            search.write_results()
        if search.failures and len(search.failures) >= MOST_FAILURES and not search._finished(TrialState.COMPLETE):
            raise UserError(f"{len(search.failures)} trials failed and none was finished; {search.failures[-1]}")


def main_search(argv=None):
    """-> exit status, as main.py's."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        run(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"stopped; go on with: python search.py {shlex.join(argv)}", file=sys.stderr)
        return stop.status
    return 0


if __name__ == "__main__":
    sys.exit(main_search())
