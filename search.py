#!/usr/bin/env python3
"""Search hyperparameters as a W&B sweep does, without W&B: the same sweep.yaml, no account, no network.

python search.py sweep.yaml --trials 20 --data_dirs data/forehead_wrinkles
python search.py sweep.yaml --trials 40 --jobs 2 --storage postgresql+psycopg://host/studies --data_dirs data/forehead

Flags that are not search.py's go to each trial's main.py. The study lies in a database: stopped or killed, the same
command goes on where it was, unfinished trials from their own checkpoints.
"""

import argparse
import os
import shlex
import signal
import socket
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import matplotlib

import main
from files import UserError, atomic_write, first_line, read_rows, write_csv
from flags import BEST_METRICS, Parser, flag_of, is_neutral, number
from flags import build_parser as build_main_parser
from resuming import Signals, exit_status
from sweep_config import read_sweep
from trials import OWN_FLAGS, TrialProcess, check_no_own_flags, is_left_over, keep_best_model_only

os.environ.setdefault("SQLALCHEMY_SILENCE_UBER_WARNING", "1")
import optuna
import sqlalchemy
from optuna.trial import TrialState

POLL_SECONDS = 1
BEAT_SECONDS = 20  # each trial at work says that somebody watches it
STALE_SECONDS = 120  # without a beat, nobody does
STORAGE_ATTEMPTS = 5
STORAGE_ERRORS = (optuna.exceptions.StorageInternalError, sqlalchemy.exc.OperationalError)
MOST_FAILURES = 3  # before any trial was finished: the command itself is wrong
MOST_KILLS = 2  # of a trial that is gone on with, as by a system without memory
WORDS = {TrialState.COMPLETE: "done", TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed"}
DATA_FLAGS = {"data_dirs", "val_dirs", "test_dirs"}


def build_parser():
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, prog="search.py"
    )
    add = parser.add_argument
    count = number(int, low=1)
    add("sweep", metavar="YAML", help="a W&B sweep's file, such as sweep.yaml")
    add("--trials", type=count, metavar="N", help="of the study in all [run_cap of the yaml; the grid's size; 20]")
    add("--jobs", type=count, default=1, metavar="N", help="trials at once on this machine [1]")
    add("--search_dir", metavar="DIR", help="trials and results go here [search_NAME, of the yaml's name]")
    add("--study", metavar="NAME", help="the study's name in the storage [that of the search_dir]")
    add("--storage", metavar="URL", help="a database for many machines, as SQLAlchemy names it [SQLite in search_dir]")
    add("--search_seed", type=number(int, low=0), metavar="N", help="of what is drawn [another each time]")
    return parser


# ----------------------------------------------------------------------------------------------------------- trials


@dataclass
class Running:
    """A trial that this search watches."""

    trial: optuna.Trial
    process: TrialProcess
    slot: int
    started: float
    epochs_seen: int = 0
    best: float | None = None
    is_pruned: bool = False


class Search:
    """A study and its trials on this machine. `loop` runs until there are `trials` of them."""

    def __init__(self, args, main_flags, config):
        self.args, self.main_flags, self.config = args, main_flags, config
        self.folder, self.host = Path(args.search_dir).absolute(), socket.gethostname()
        given = {flag_of(word) for word in main_flags if word.startswith("--")}
        config.parameters = [p for p in config.parameters if flag_of(p.name) not in given]
        if config.metric in BEST_METRICS and "best_metric" not in given:
            self.main_flags = ["--best_metric", config.metric, *main_flags]
        self.constants = self._check_flags()
        self.epochs = config.most("epochs") or self.constants.epochs
        self.points = config.grid()
        wanted = args.trials or config.content.get("run_cap") or (len(self.points) if self.points else 20)
        self.trials = min(wanted, len(self.points)) if self.points else wanted  # of a grid no point comes twice
        self.folder.mkdir(parents=True, exist_ok=True)
        self.running, self.failures, self.is_stopping, self.last_beat = [], [], False, 0.0
        self.told_to_end = set()  # folders of trials that a killed search has left
        self.study = self._open_study()

    # ---------------------------------------------------------------------------------------------------- the flags

    def command_flags(self, values, constants_only=False):
        """{searched parameter: drawn} -> the flags of a trial's main.py; those of this command line win."""
        parameters = [p for p in self.config.parameters if p.distribution is None or not constants_only]
        flags = self.config.flags({p.name: p.value(values.get(p.name)) for p in parameters})
        for word in self.main_flags:
            if word.startswith("--"):
                flags = without(flags, word.partition("=")[0])
        return [*flags, *self.main_flags]

    def _check_flags(self):
        """Try every value that a trial could get on main.py's own parser. -> the flags that all trials share."""
        path, parse = self.config.path, build_main_parser().parse_args
        parse(self.main_flags)
        check_no_own_flags(self.main_flags)
        meanings = {}
        for parameter in self.config.parameters:
            former = meanings.setdefault(flag_of(parameter.name), parameter.name)
            if former != parameter.name:
                raise UserError(f"{path}: parameters.{former} and parameters.{parameter.name} are the same flag")
            if flag_of(parameter.name) in OWN_FLAGS:
                raise UserError(f"{path}: parameters.{parameter.name}: the search sets this flag itself")
            for value in parameter.samples():
                try:
                    parse(self.config.flags_of({parameter.name: value}))
                except UserError as error:
                    raise UserError(f"{path}: parameters.{parameter.name}: {error}") from error
        try:
            return parse(self.command_flags({}, constants_only=True))
        except UserError as error:
            raise UserError(f"{path}: command: {error}") from error

    def _description(self):
        """What makes the trials of a study comparable."""
        flags, defaults = vars(self.constants), vars(build_main_parser().parse_args([]))
        # with a storage that machines share, the data may lie elsewhere on each
        elsewhere = DATA_FLAGS if self.args.storage else set()
        chosen = {k: v for k, v in flags.items() if v != defaults[k] and not is_neutral(k) and k not in elsewhere}
        for name in DATA_FLAGS & chosen.keys():
            chosen[name] = [os.path.abspath(folder) for folder in chosen[name]]
        return {**{key: self.config.content.get(key) for key in ("parameters", "metric", "method")}, "flags": chosen}

    # ---------------------------------------------------------------------------------------------------- the study

    def _open_study(self):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message=".*already reported.*")  # before this search was stopped
        study = optuna.create_study(
            storage=open_storage(self.args.storage or sqlite_url(self.folder / "study.db")),
            pruner=self.config.pruner(self.epochs),
            study_name=self.args.study or self.folder.name,
            direction="maximize" if self.config.maximizes else "minimize",
            load_if_exists=True,
        )
        described = self._description()
        former = study.user_attrs.get("search", described)
        differing = [key for key in described if described[key] != former.get(key)]
        if differing:
            what = "flags" if differing == ["flags"] else f"sweep ({', '.join(differing)})"
            raise UserError(
                f"--search_dir: the study {study.study_name} began with other {what}; name another folder"
                + (", or another --study" if self.args.storage else "")
            )
        study.set_user_attr("search", described)
        trials = study.get_trials(deepcopy=False)
        taken = [t.params or t.system_attrs.get("fixed_params") for t in trials if t.state is not TrialState.FAIL]
        for values in self.points or []:  # what has failed before is tried again
            if values not in taken:
                study.enqueue_trial(values)
        return study

    def finished(self, *states):
        return self.study.get_trials(deepcopy=False, states=states)

    def loop(self, signals):
        is_reachable = True
        with signals.deferred():
            try:
                while True:
                    try:
                        if not self._round(signals):
                            break
                        is_reachable = True
                    except STORAGE_ERRORS as error:  # the trials need no database
                        if is_reachable:
                            print(f"warning: the storage does not answer, trying again ({first_line(error)})")
                        is_reachable = False
                    time.sleep(POLL_SECONDS)
            finally:
                self._stop_all()
                for one in self.running:
                    one.process.wait()

    def _round(self, signals):
        """Look at all trials once, and start what is to be started. -> whether there is more to do."""
        if signals.stopped and not self.is_stopping:
            self._stop_all()
        for one in list(self.running):
            self._look_at(one)
        is_waiting = not self.is_stopping and self._start_what_fits()
        self._beat()
        self._show()
        return bool(self.running) or is_waiting

    def _start_what_fits(self):
        """-> whether a trial that nobody watches still has a process, which is to end first."""
        alone = [frozen for frozen in self.finished(TrialState.RUNNING) if self._is_alone(frozen)]
        # those whose search was killed save and end, and this search goes on with them
        busy = [frozen for frozen in alone if is_left_over(frozen.user_attrs.get("run_dir", ""), self.told_to_end)]
        free = [frozen for frozen in alone if frozen not in busy]
        while len(self.running) + len(busy) < self.args.jobs:
            if free:
                self._start(optuna.Trial(self.study, free.pop(0)._trial_id))
            elif self._wants_more():
                self._start(self._new_trial())
            else:
                break
        return bool(busy)

    def _is_alone(self, frozen):
        """Whether a trial that is not finished is watched by no search any more."""
        if frozen.number in [one.trial.number for one in self.running]:
            return False
        about = frozen.user_attrs
        host, _, pid = about.get("owner", "").rpartition(":")
        if about.get("beat") == 0 or (host == self.host and int(pid) != os.getpid() and not is_process(int(pid))):
            return True
        return time.time() - about.get("beat", frozen.datetime_start.timestamp()) > STALE_SECONDS

    def _wants_more(self):
        done = self.finished(TrialState.COMPLETE)
        if len(self.failures) >= (self.trials + MOST_FAILURES if done else MOST_FAILURES):
            return False
        if self.config.target is not None and done:
            best, target = self.study.best_value, self.config.target
            if best >= target if self.config.maximizes else best <= target:
                return False
        begun = self.finished(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        is_left = self.points is None or self.finished(TrialState.WAITING)
        return bool(is_left) and len(begun) < self.trials

    def _new_trial(self):
        # by the number of trials, so that a search that is started again does not draw the same ones
        seed = self.args.search_seed
        seeds = None if seed is None else (seed, len(self.study.get_trials(deepcopy=False)))
        self.study.sampler = self.config.sampler(seeds)
        return self.study.ask(self.config.searched())

    def _start(self, trial):
        run_dir = trial.user_attrs.get("run_dir")
        if run_dir is None or not Path(run_dir).parent.exists():  # new, or of a machine whose files are not here
            run_dir = str(self.folder / f"trial_{trial.number:04d}")
            if Path(run_dir).exists() and trial.user_attrs.get("run_dir") != run_dir:
                self.study.tell(trial, state=TrialState.FAIL)
                raise UserError(f"--search_dir: {run_dir} is there already, of another study; name another folder")
        trial.set_user_attr("run_dir", run_dir)
        trial.set_user_attr("owner", f"{self.host}:{os.getpid()}")
        trial.set_user_attr("beat", time.time())
        slot = min(set(range(self.args.jobs)) - {one.slot for one in self.running})
        process = TrialProcess(self.command_flags(trial.params), run_dir, self.args.jobs, slot)
        self.running.append(Running(trial, process, slot, time.time()))

    def _beat(self):
        if time.time() - self.last_beat > BEAT_SECONDS:
            for one in self.running:
                one.trial.set_user_attr("beat", time.time())
            self.last_beat = time.time()

    def _look_at(self, one):
        """Report new epochs, stop what does not promise anything, and close what has ended."""
        has_ended = one.process.status is not None  # asked before the history is read, so that no row is missed
        with suppress(optuna.exceptions.UpdateFinishedTrialError):  # closed by a search that had taken it for left over
            history = one.process.run_dir / "history.csv"
            for row in (read_rows(history) if history.exists() else [])[one.epochs_seen :]:
                value = float(row[self.config.metric])
                better = max if self.config.maximizes else min
                best = value if one.best is None else better(one.best, value)
                one.trial.report(best, one.epochs_seen + 1)
                one.best, one.epochs_seen = best, one.epochs_seen + 1
            if has_ended:
                self._close(one)
            elif not (one.is_pruned or self.is_stopping) and one.epochs_seen < self.epochs and one.trial.should_prune():
                one.is_pruned = True
                one.process.stop()
        if has_ended:
            self.running.remove(one)

    def _close(self, one):
        minutes = one.trial.user_attrs.get("minutes", 0) + (time.time() - one.started) / 60
        one.trial.set_user_attr("minutes", minutes)
        one.trial.set_user_attr("epochs", one.epochs_seen)
        if one.process.status == 0 and one.best is not None:
            self._tell(one, one.best, TrialState.COMPLETE)
        elif one.is_pruned and one.best is not None:
            one.trial.set_user_attr("best", one.best)
            self._tell(one, None, TrialState.PRUNED)
        elif one.process.was_stopped or self._may_go_on_after_kill(one) or "is in use by" in one.process.error():
            one.trial.set_user_attr("beat", 0)  # to be gone on with
        else:
            error = one.process.error()
            one.trial.set_user_attr("error", error)
            self.failures.append(f"trial {one.trial.number}: {error}")
            self._tell(one, None, TrialState.FAIL)

    def _may_go_on_after_kill(self, one):
        kills = one.trial.user_attrs.get("kills", 0)
        if one.process.status != -signal.SIGKILL or kills >= MOST_KILLS:
            return False
        one.trial.set_user_attr("kills", kills + 1)
        print(f"trial {one.trial.number}: {one.process.error()}; going on with it")
        return True

    def _tell(self, one, value, state):
        self.study.tell(one.trial, value, state)
        if state is not TrialState.FAIL:
            keep_best_model_only(one.process.run_dir)
        if not sys.stdout.isatty():
            print(self._line(self.study.get_trials(deepcopy=False)[one.trial.number]))

    def _stop_all(self):
        self.is_stopping = True
        for one in self.running:
            one.process.stop()

    # --------------------------------------------------------------------------------------------------- showing

    def _show(self):
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
        word = WORDS.get(frozen.state, "waits" if frozen.state is TrialState.WAITING else "at work")
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
        numbers = {word: sum(row["state"] == word for row in rows) for word in (*WORDS.values(), "unfinished")}
        print(f"trials: {', '.join(f'{number} {word}' for word, number in numbers.items() if number) or 'none'}")
        if not self.finished(TrialState.COMPLETE):
            return
        self._plot()
        best = self.study.best_trial
        flags = self.command_flags(best.params)
        if "epochs" not in self.config.searched():  # the search trains briefly; the best setting deserves the default
            flags = without(flags, "--epochs")
        program = os.path.relpath(Path(main.__file__).with_name("main.py"))
        print(f"best: {self._line(best)}")
        print(f"its model: {best.user_attrs['run_dir']}/best_model.pth")
        print(f"in full: {shlex.join(['python', program, *flags])}")
        print(f"all trials: {self.folder / 'search.csv'}")

    def _plot(self):
        matplotlib.use("Agg")
        from optuna.visualization import matplotlib as plots

        figures = {"search_history.png": plots.plot_optimization_history}
        values = {trial.value for trial in self.finished(TrialState.COMPLETE)}
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


def sqlite_url(path):
    url = sqlalchemy.URL.create("sqlite", database=str(path))  # which a path with ? or # would break as a text
    return url.render_as_string()


def open_storage(url):
    """The database, with its tables, which two searches that begin at once must not make at once."""
    for attempts_left in reversed(range(STORAGE_ATTEMPTS)):
        try:
            return optuna.storages.RDBStorage(url)
        except Exception as error:  # of SQLAlchemy, of the driver, or for want of one
            if attempts_left and isinstance(error, sqlalchemy.exc.DBAPIError):
                time.sleep(1)
                continue
            with suppress(sqlalchemy.exc.ArgumentError):
                url = sqlalchemy.make_url(url).render_as_string(hide_password=True)
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"--storage: {url} cannot be opened ({reason})") from error


def is_process(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def without(flags, name):
    """A command line of main.py without one flag, whatever its form (--lr, --no-pretrained), and what stands behind."""
    kept, is_kept = [], True
    for word in flags:
        if word.startswith("--"):
            is_kept = flag_of(word) != flag_of(name)
        if is_kept:
            kept.append(word)
    return kept


def run(argv):
    args, main_flags = build_parser().parse_known_args(argv)
    known = {option[2:] for action in build_main_parser()._actions for option in action.option_strings}
    config = read_sweep(args.sweep, known - {"help"})
    args.search_dir = args.search_dir or f"search_{Path(args.sweep).stem}"
    try:
        with Signals() as signals:
            search = Search(args, main_flags, config)
            try:
                search.loop(signals)
            finally:
                search.write_results()
    except STORAGE_ERRORS as error:
        raise UserError(f"--storage: {first_line(error)}") from error
    if search.failures and not search.finished(TrialState.COMPLETE):
        raise UserError(f"{len(search.failures)} trials failed and none was finished; {search.failures[-1]}")


def main_search(argv=None):
    """-> exit status, as main.py's."""
    return exit_status(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main_search())
