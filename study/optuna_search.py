"""A sweep run by Optuna: every trial is a process of main.py, and the study can be resumed at any time."""

import argparse
import os
import signal
import socket
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from data_flags import PATH_FLAGS
from flag_checks import with_config
from flag_queries import flag_of, is_neutral
from flags import BEST_METRICS, complete_flags
from flags import build_parser as build_main_parser
from run.cli import UserError, first_line
from run.files import read_rows, valid_text
from run.signals import Signals, call_in_thread
from study.process import ANSWER_SECONDS, RESERVED_FLAGS, ProcessPool, TrialProcess, keep_best_model_only, without_flag
from study.search_results import trial_line, write_search_results
from study.started_with import check_same_settings
from study.sweep_yaml import SweepConfig, read_sweep

BEAT_SECONDS = 20  # how often a search notes in the study that it still supervises a trial
STALE_SECONDS = 120  # without such a note, no search supervises the trial any more
STORAGE_ATTEMPTS = 5
STORAGE_ERRORS = (optuna.exceptions.StorageInternalError, sqlalchemy.exc.OperationalError)
MAX_FAILURES = 3  # before any trial has finished: then the command itself is wrong
MAX_KILLS = 2  # of a trial that is resumed afterwards, for example by a system that ran out of memory
IN_USE = "is in use by"  # in the error of main.py if another process holds the lock of the run's folder


def run_search(args: argparse.Namespace, main_flags: list[str]) -> None:
    """Run trials until the study has enough of them; write the results, also if a signal stops the search.

    args: of search.py; main_flags: of main.py, for all trials. Raises UserError and Stopped.
    """
    known = {option[2:] for action in build_main_parser()._actions for option in action.option_strings}
    config = read_sweep(args.sweep, known - {"help"})
    args.search_dir = args.search_dir or f"search_{Path(args.sweep).stem}"
    try:
        with Signals() as signals:
            search = call_in_thread(lambda: Search(args, main_flags, config))
            try:
                search.run_trials(signals)
            finally:
                deadline = time.monotonic() + ANSWER_SECONDS

                def give_up():
                    if time.monotonic() > deadline:
                        signals.raise_if_stopped()

                with suppress(*STORAGE_ERRORS if signals.stopped else ()):
                    call_in_thread(search.write_results, give_up)
    except STORAGE_ERRORS as error:
        raise UserError(f"--storage: {first_line(error)}") from error
    if search.failures and not search.trials_in(TrialState.COMPLETE):
        raise UserError(f"{len(search.failures)} trials failed and none finished; {search.failures[-1]}")


@dataclass
class RunningTrial:
    """A trial that this search supervises."""

    trial: optuna.Trial
    process: TrialProcess
    started: float
    epochs_seen: int = 0
    best: float | None = None
    is_pruned: bool = False


class Search:
    """A study, and its trials on this machine. `run_trials` runs them until the study has `num_trials`."""

    def __init__(self, args: argparse.Namespace, main_flags: list[str], config: SweepConfig):
        self.args, self.main_flags, self.config = args, main_flags, config
        self.folder, self.host = Path(args.search_dir).absolute(), socket.gethostname()
        on_command_line = {flag_of(word) for word in main_flags if word.startswith("--")}
        config.parameters = [p for p in config.parameters if flag_of(p.name) not in on_command_line]
        if config.metric in BEST_METRICS and "best_metric" not in on_command_line:
            self.main_flags = ["--best_metric", config.metric, *main_flags]
        self.constants = self._check_flags()
        self.epochs = int(config.highest("epochs", self.constants.epochs))
        self.points = config.grid()
        num_trials = args.trials or config.content.get("run_cap") or (len(self.points) if self.points else 20)
        self.num_trials = min(num_trials, len(self.points)) if self.points else num_trials  # each point once
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pool = ProcessPool(args.jobs)
        self.running: list[RunningTrial] = []
        self.failures: list[str] = []
        self.last_beat, self.storage_responds = 0.0, True
        self.study = self._open_study()
        # left by an earlier search, or supervised by another one: the next beats tell which
        self.found_running = {frozen.number: beat_of(frozen) for frozen in self.trials_in(TrialState.RUNNING)}
        self.opened_at, self.waiting = time.monotonic(), ""  # waiting: what it waits for, in one line

    # ---------------------------------------------------------------------------------------------------- the flags

    def command_flags(self, drawn: dict, constants_only: bool = False) -> list[str]:
        """-> flags of main.py for a trial: of `--config`, of the sweep, and of the command line, of which the last win.

        drawn: {parameter: what Optuna drew}.
        """
        parameters = [p for p in self.config.parameters if p.distribution is None or not constants_only]
        flags = self.config.flags({p.name: p.value(drawn.get(p.name)) for p in parameters})
        for word in self.main_flags:
            if word.startswith("--"):
                flags = without_flag(flags, word.partition("=")[0])
        return with_config([*flags, *self.main_flags], RESERVED_FLAGS)

    def _check_flags(self):
        """Try every value that a trial could get on main.py's own parser. -> the flags that all trials share."""
        path, parse = self.config.path, build_main_parser().parse_args
        name_of = {}
        for parameter in self.config.parameters:
            previous = name_of.setdefault(flag_of(parameter.name), parameter.name)
            if previous != parameter.name:
                raise UserError(f"{path}: parameters.{previous} and parameters.{parameter.name} are the same flag")
            if flag_of(parameter.name) in RESERVED_FLAGS:
                raise UserError(f"{path}: parameters.{parameter.name}: the search sets this flag itself; delete it")
            for value in parameter.samples():
                try:
                    parse(self.config.flags_of({parameter.name: value}))
                except UserError as error:
                    raise UserError(f"{path}: parameters.{parameter.name}: {error}") from error
        try:
            constants = parse(self.command_flags({}, constants_only=True))
        except UserError as error:
            raise UserError(f"{path}: command: {error}") from error
        if not constants.data_dirs and "data_dirs" not in name_of:
            raise UserError("--data_dirs: name the folder that holds the class folders")
        return constants

    def _settings(self):
        """What makes the trials of a study comparable, as the study keeps it."""
        flags, defaults = vars(self.constants), vars(build_main_parser().parse_args([]))
        # machines that share a storage may have the images in different folders
        ignored = PATH_FLAGS if self.args.storage else ()
        changed = {
            name: value
            for name, value in flags.items()
            if value != defaults[name] and (name == "recipe" or not is_neutral(name)) and name not in ignored
        }  # the flags of the recipe are not among these
        for name in changed.keys() & set(PATH_FLAGS):
            changed[name] = [os.path.abspath(folder) for folder in changed[name]]
        return {**{key: self.config.content.get(key) for key in ("parameters", "metric", "method")}, "flags": changed}

    # ---------------------------------------------------------------------------------------------------- the study

    def _open_study(self):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message=".*already reported.*")  # by this search before it was stopped
        study = optuna.create_study(
            storage=open_storage(self.args.storage or sqlite_url(self.folder / "study.db")),
            pruner=self.config.pruner(self.epochs),
            study_name=self.args.study or self.folder.name,
            direction="maximize" if self.config.maximizes else "minimize",
            load_if_exists=True,
        )
        self._check_and_record_settings(study)
        trials = study.get_trials(deepcopy=False)
        tried = [t.params or t.system_attrs.get("fixed_params") for t in trials if t.state is not TrialState.FAIL]
        for point in self.points or []:  # those that failed are tried again
            if point not in tried:
                study.enqueue_trial(point)
        return study

    def _check_and_record_settings(self, study):
        """Raise UserError if the study was started with another sweep or other flags, else note them in it."""

        def by_name(settings):
            flags = {f"--{name}": value for name, value in complete_flags(settings["flags"]).items()}
            return {key: settings.get(key) for key in ("parameters", "metric", "method")} | flags

        settings = self._settings()
        previous = study.user_attrs.get("search", settings)
        flag = "--search_dir or --study" if self.args.storage else "--search_dir"
        check_same_settings(by_name(previous), by_name(settings), flag, f"the study {study.study_name}")
        study.set_user_attr("search", settings)

    def trials_in(self, *states: TrialState) -> list[FrozenTrial]:
        """-> the trials of the study that are in one of these states."""
        return self.study.get_trials(deepcopy=False, states=states)

    def write_results(self) -> None:
        write_search_results(self.study, self.config, self.folder, self.command_flags)

    def run_trials(self, signals: Signals) -> None:
        """Raises Stopped after a signal, once all trials have saved."""
        self.pool.supervise(self._poll, signals)

    def _poll(self):
        """Look at all trials once, and start what can be started. -> whether there is more to do."""
        try:
            for running in list(self.running):
                self._update(running)
            is_waiting = not self.pool.is_stopping and self._start_trials()
            self._heartbeat()
            self._show()
        except STORAGE_ERRORS as error:  # the trials need no storage to train
            if self.storage_responds:
                print(f"warning: the storage does not respond, retrying ({first_line(error)})")
            self.storage_responds = False
            return not self.pool.is_stopping or any(process.status is None for process in self.pool.processes)
        self.storage_responds = True
        return bool(self.running) or is_waiting

    def _start_trials(self):
        """-> whether there is something to wait for: the process of a trial that no search supervises, which must end
        first, or a sign that another search supervises a trial."""
        running = self.trials_in(TrialState.RUNNING)
        unsupervised = [frozen for frozen in running if self._is_unsupervised(frozen)]
        unclear = [frozen for frozen in running if self._is_silent(frozen) and frozen not in unsupervised]
        # processes whose search was killed save and end, then this search resumes their trials
        busy = [frozen for frozen in unsupervised if self._has_left_over(frozen)]
        free = [frozen for frozen in unsupervised if frozen not in busy]
        while self.pool.num_free() > len(busy):
            if free:
                self._start(optuna.Trial(self.study, free.pop(0)._trial_id))
            elif self._needs_more():
                self._start(self._new_trial())
            else:
                break
        self._note_waiting([] if busy or self.running else unclear)
        return bool(busy or unclear)

    def _note_waiting(self, unclear):
        was_waiting, self.waiting = self.waiting, ""
        if unclear:
            trials = ", ".join(
                f"trial {frozen.number} of {owner_of(frozen) or 'an unknown search'}" for frozen in unclear
            )
            self.waiting = f"waiting up to {STALE_SECONDS} s for a sign that another search supervises {trials}"
            if not was_waiting:
                print(self.waiting)

    def _has_left_over(self, frozen):
        run_dir = frozen.user_attrs.get("run_dir")
        return run_dir is not None and self.pool.stop_left_over(run_dir)

    def _is_unsupervised(self, frozen):
        """Whether no search supervises an unfinished trial any more."""
        if frozen.number in [running.trial.number for running in self.running]:
            return False
        beat = beat_of(frozen)
        host, _, pid = owner_of(frozen).rpartition(":")
        # its own process id says nothing: two containers can have the same host name, and their searches the same id
        if beat == 0 or (host == self.host and int(pid) != os.getpid() and not is_process(int(pid))):
            return True
        is_silent = self._is_silent(frozen) and time.monotonic() - self.opened_at > STALE_SECONDS
        return is_silent or time.time() - beat > STALE_SECONDS  # is_silent: the clock of its machine may be ahead

    def _is_silent(self, frozen):
        """Whether a trial was running when this search began, and nobody has given a sign of supervising it since."""
        return self.found_running.get(frozen.number) == beat_of(frozen)

    def _needs_more(self):
        done = self.trials_in(TrialState.COMPLETE)
        if len(self.failures) >= (self.num_trials + MAX_FAILURES if done else MAX_FAILURES):
            return False
        if self.config.target is not None and done:
            best, target = self.study.best_value, self.config.target
            if best >= target if self.config.maximizes else best <= target:
                return False
        started = self.trials_in(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        is_left = self.points is None or self.trials_in(TrialState.WAITING)
        return bool(is_left) and len(started) < self.num_trials

    def _new_trial(self):
        # the seed depends on the number of trials: a resumed search must not draw the same ones again
        seed = self.args.search_seed
        seeds = None if seed is None else (seed, len(self.study.get_trials(deepcopy=False)))
        self.study.sampler = self.config.sampler(seeds)
        return self.study.ask(self.config.searched())

    def _start(self, trial):
        run_dir = trial.user_attrs.get("run_dir")
        if run_dir is None or not Path(run_dir).parent.exists():  # new, or from a machine whose files are not here
            run_dir = str(self.folder / f"trial_{trial.number:04d}")
            if Path(run_dir).exists() and trial.user_attrs.get("run_dir") != run_dir:
                self.study.tell(trial, state=TrialState.FAIL)
                raise UserError(f"--search_dir: {run_dir} belongs to another study; choose another --search_dir")
        trial.set_user_attr("run_dir", run_dir)
        trial.set_user_attr("owner", f"{self.host}:{os.getpid()}")
        trial.set_user_attr("beat", time.time())
        process = self.pool.start(self.command_flags(trial.params), run_dir)
        self.running.append(RunningTrial(trial, process, time.time()))

    def _heartbeat(self):
        if time.time() - self.last_beat > BEAT_SECONDS:
            for running in self.running:
                running.trial.set_user_attr("beat", time.time())
            self.last_beat = time.time()

    def _update(self, running):
        """Report new epochs of a trial, stop it if it is not promising, and close it if it has ended."""
        has_ended = running.process.status is not None  # asked before the history is read: so no epoch is missed
        # another search may have closed the trial, if it thought that nobody supervised it
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._report_epochs(running)
            if has_ended:
                self._close(running)
            elif running.is_pruned:
                running.process.stop()  # again: it is killed if it does not end
            elif not self.pool.is_stopping and running.epochs_seen < self.epochs:
                running.is_pruned = running.trial.should_prune()
                if running.is_pruned:
                    running.process.stop()
        if has_ended:
            self.running.remove(running)
            self.pool.release(running.process)

    def _report_epochs(self, running):
        history = running.process.run_dir / "history.csv"
        better = max if self.config.maximizes else min
        for row in (read_rows(history) if history.exists() else [])[running.epochs_seen :]:
            value = float(row[self.config.metric])
            best = value if running.best is None else better(running.best, value)
            running.trial.report(best, running.epochs_seen + 1)
            running.best, running.epochs_seen = best, running.epochs_seen + 1

    def _close(self, running):
        trial, process = running.trial, running.process
        minutes = trial.user_attrs.get("minutes", 0) + (time.time() - running.started) / 60
        trial.set_user_attr("minutes", minutes)
        trial.set_user_attr("epochs", running.epochs_seen)
        if process.status == 0 and running.best is not None:
            self._tell(running, running.best, TrialState.COMPLETE)
        elif running.is_pruned and running.best is not None:
            trial.set_user_attr("best", running.best)
            self._tell(running, None, TrialState.PRUNED)
        elif process.was_stopped or self._can_resume_after_kill(running) or IN_USE in process.error():
            trial.set_user_attr("beat", 0)  # to be resumed
        else:
            error = process.error()
            trial.set_user_attr("error", error)
            self.failures.append(f"trial {trial.number}: {error}")
            self._tell(running, None, TrialState.FAIL)

    def _can_resume_after_kill(self, running):
        kills = running.trial.user_attrs.get("kills", 0)
        if running.process.status != -signal.SIGKILL or kills >= MAX_KILLS:
            return False
        running.trial.set_user_attr("kills", kills + 1)
        print(f"trial {running.trial.number}: {running.process.error()}; resuming it")
        return True

    def _tell(self, running, value, state):
        self.study.tell(running.trial, value, state)
        if state is not TrialState.FAIL:
            keep_best_model_only(running.process.run_dir)
        if not sys.stdout.isatty():
            print(trial_line(self.study.get_trials(deepcopy=False)[running.trial.number], self.config))

    def _show(self):
        """The table of the trials, redrawn on a terminal."""
        if not sys.stdout.isatty():
            return
        name, trials = self.config.metric, self.study.get_trials(deepcopy=False)
        lines = [f"{name} of {self.num_trials} trials, study {self.study.study_name}, folder {self.folder}"]
        lines += [trial_line(trial, self.config) for trial in trials[-30:]]
        lines += filter(None, [self.waiting, *self.pool.left_over.values()])
        sys.stdout.write("\033[H\033[J" + "\n".join(lines) + "\n")
        sys.stdout.flush()


def owner_of(frozen: FrozenTrial) -> str:
    """-> "host:pid" of the search that has started a trial; "" if it was killed before it noted that."""
    return frozen.user_attrs.get("owner", "")


def beat_of(frozen: FrozenTrial) -> float:
    """-> when a search last noted that it supervises a trial; 0 if it noted that it no longer does."""
    return frozen.user_attrs.get("beat", frozen.datetime_start.timestamp())


def sqlite_url(path: Path) -> str:
    """Raises UserError for a path that a URL cannot hold."""
    if valid_text(str(path)) != str(path):
        raise UserError(f"--search_dir: {valid_text(str(path.parent))} is not valid UTF-8; name another folder")
    url = sqlalchemy.URL.create("sqlite", database=str(path))  # escapes ? and # in the path
    return url.render_as_string()


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """Open the database and create its tables; retried, as two searches that start at once collide there."""
    for attempts_left in reversed(range(STORAGE_ATTEMPTS)):
        try:
            return optuna.storages.RDBStorage(url)
        except Exception as error:  # from SQLAlchemy, from the driver, or because the driver is missing
            if attempts_left and isinstance(error, sqlalchemy.exc.DBAPIError):
                time.sleep(1)
                continue
            with suppress(sqlalchemy.exc.ArgumentError):
                url = sqlalchemy.make_url(url).render_as_string(hide_password=True)
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"--storage: {url} cannot be opened ({reason})") from error


def is_process(pid: int) -> bool:
    """Whether a process with this id runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True
