"""The Weights & Biases run: started, resumed by its id, offline where there is no server, and logged to."""

import argparse
import math
import os
import secrets
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from images.decode import read_image
from images.folders import ImageIndex
from run.cli import UserError, first_line
from run.files import valid_text
from run.progress import Progress
from run.ranks import is_first
from run.signals import Stopped, call_in_thread
from run.surroundings import command_line, is_writable, user_folder

INIT_TIMEOUT_S = 60
FINISH_TIMEOUT_S = 120  # for uploads that remain at the end; a server that is gone delays nobody for longer
STOP_TIMEOUT_S = 10  # for uploads after a signal: who sends one often kills the process soon
TEAR_DOWN_TIMEOUT_S = 10
SWEEP_TIMEOUT_S = 10
TABLE_IMAGE_SIZE = 224  # pixels
PR_POINTS = 51  # per curve
DELETED = "previously created and deleted"  # part of the server's answer


class WandbRun:
    """A W&B run as a context: marked as finished at its end, or as failed if the training raises.

    With `--wandb_mode disabled`, and on all ranks but the first, it does nothing. Without an account, a key, a network
    or an answer it falls back to offline, and one line says how to upload it later.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        run_dir: str | Path,
        checkpoint: Mapping[str, Any] | None,
        samples_per_cls: Mapping[str, int],
    ):
        """args: flags of main.py; checkpoint: of the resumed run, or None; samples_per_cls: {class: training images}.

        Raises UserError for flags or environment variables that W&B does not accept.
        """
        self.id = args.wandb_id or (checkpoint and checkpoint["wandb_id"])
        self._num_images, self._resize, self._with_artifact = args.wandb_images, args.resize, args.wandb_artifact
        self._run, self._has_failed = None, False
        self._has_results = False  # the run is finished, and if it is stopped, only its report is lacking
        if args.wandb_mode == "disabled":
            if args.wandb_id:
                print("W&B: disabled; --wandb_id is only stored in the checkpoints (to log, add --wandb_mode online)")
            return
        if not is_first():
            return
        folder = os.path.abspath(args.wandb_dir or os.environ.get("WANDB_DIR") or run_dir)
        os.makedirs(folder, exist_ok=True)
        arguments = {
            "name": args.wandb_name or os.path.basename(os.path.abspath(run_dir)),
            "resume": args.wandb_resume,
            "dir": folder,
            "config": {**vars(args), "samples_per_cls": samples_per_cls},
        }
        if "WANDB_SWEEP_ID" not in os.environ:  # in a sweep the agent sets both
            arguments |= {"project": args.wandb_project, "id": self.id}
        # of the client in a program that started this one, a notebook for example: only that program can end it
        os.environ.pop("WANDB_SERVICE", None)
        try:
            _provide_folders(folder)
            import wandb  # here: a run without W&B does not need it

            self._wandb = wandb
            self._run = self._start(args, arguments | {"settings": self._settings()})
        except UserError:
            raise
        except Exception as error:  # whatever the client raises: of its import, of its process, of files
            print(f"warning: W&B does not start ({first_line(error) or type(error).__name__}); continuing without it")
            return
        self.id = self._run.id
        with self._never_stopping_the_training():
            # the epoch is the x axis of all charts, so that a resumed run continues its line
            self._run.define_metric("epoch")
            self._run.define_metric("*", step_metric="epoch")

    def _settings(self):
        try:
            settings = self._wandb.Settings(silent=True)
            if "WANDB_INIT_TIMEOUT" not in os.environ:
                settings.init_timeout = INIT_TIMEOUT_S
            if "WANDB_FINISH_TIMEOUT" not in os.environ:
                settings.finish_timeout = FINISH_TIMEOUT_S
            settings.finish_timeout_raises = True
            self._wandb.setup(settings)  # reads the WANDB_ variables of the environment
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"W&B does not accept a WANDB_ variable of the environment: {reason}") from error
        return settings

    def _start(self, args, arguments):
        """-> the run, offline if it cannot be online. Raises UserError for what was asked for and cannot be had."""
        run, why_offline = None, ""
        if args.wandb_mode == "online":
            try:
                run = self._start_online(arguments)
            except UserError:
                raise
            except Exception as error:  # of the client, of its process, of its server
                self._tear_down()  # otherwise the id of the run that did not start counts as taken
                if DELETED in str(error):
                    run = self._start_under_new_id(args, arguments)
                why_offline = f" ({first_line(error) or type(error).__name__})"
        if run:
            print(f"W&B: {run.url}")
            return run
        if arguments["resume"] == "must":  # offline there is no server to ask whether the run exists
            arguments["resume"] = "allow"
        with self._naming_refused_flags():
            run = self._wandb.init(mode="offline", **arguments)
        print(f"W&B: offline{why_offline}; the command to upload it is printed at the end")
        return run

    def _start_online(self, arguments):
        try:
            if not self._wandb.login(prompt=False, verify=True):
                raise ConnectionError("no API key")
        except self._wandb.errors.AuthenticationError as error:
            raise ConnectionError("the server did not accept the API key or did not answer") from error
        with self._naming_refused_flags():
            return self._wandb.init(mode="online", **arguments)

    def _start_under_new_id(self, args, arguments):
        """Start a new run, as the server never takes the id of a deleted one again."""
        if args.wandb_id or args.wandb_resume == "must":
            raise UserError(f"--wandb_id: the run {self.id} was deleted from the server; omit it to log to a new run")
        if "WANDB_SWEEP_ID" in os.environ:
            raise ConnectionError("the run of this trial was deleted from the server")
        print(f"W&B: the run {self.id} was deleted from the server; logging to a new run")
        return self._wandb.init(mode="online", **arguments | {"id": secrets.token_hex(4), "resume": "never"})

    @contextmanager
    def _naming_refused_flags(self):
        """Raise UserError where the client or its server refuses what a flag asks for."""
        try:
            yield
        except self._wandb.errors.UsageError as error:
            flags = {"project name": "--wandb_project", "Run ID": "--wandb_id", "resum": "--wandb_id / --wandb_resume"}
            for words, flag in flags.items():
                if words in str(error):
                    raise UserError(f"{flag}: {first_line(error)}") from error
            raise

    @contextmanager
    def _never_stopping_the_training(self):
        """An error of W&B, for example when its process is killed, is reported once, and nothing more is logged."""
        try:
            yield
        except Exception as error:  # of sockets, of the client, of its server
            print(f"warning: W&B has failed ({first_line(error) or type(error).__name__}); continuing without it")
            self._has_failed = True

    def catch_up(self, progress: Progress) -> None:
        """Log the epochs that are saved but not logged, because the run was interrupted or is new on this server.

        Offline, what the server has is unknown: all epochs are logged, so that the last segment
        of the run is complete.
        """
        if self._is_active():
            last = self._run.summary.get("epoch", -1) if self._run.resumed else -1
            if self._run.offline and self._segments("run"):
                last = progress.epoch  # it was online before: the server has them
            for row in progress.history:
                if row["epoch"] > last:
                    self.log_epoch(row, progress)

    def _segments(self, kind):
        """Folders that W&B wrote for this run, one per start. kind: "run" (online) or "offline-run"."""
        return sorted(Path(self._run.dir).parent.parent.glob(f"{kind}-*-{self.id}"))

    def log_epoch(self, row: Mapping[str, Any], progress: Progress) -> None:
        """row: of the epoch in `history.csv`, with {class: recall} as `val_recall`."""
        if self._is_active():
            with self._never_stopping_the_training():
                best = {"best_epoch": progress.best_epoch, "best_metric": progress.best_metric}
                self._run.log({**_flat(row), **best})
                self._summarize_best_epoch(progress)

    def _summarize_best_epoch(self, progress):
        """A sweep compares the metrics of the best epoch, not of the last one, also for a trial that is stopped."""
        best_row = progress.best_row()
        if best_row:
            self._run.summary.update({name: value for name, value in _flat(best_row).items() if name != "epoch"})

    def log_results(
        self,
        progress: Progress,
        results: Mapping[str, Any],
        test: ImageIndex,
        probabilities: np.ndarray,
        best_model: str | Path,
    ) -> None:
        """Log test metrics, confusion matrix and PR curves; with their flags, the worst mistakes and the best model.

        progress: `Progress`; results: as in `results.json`; test: N images; probabilities: (N, C); best_model: path of
        the checkpoint.
        """
        self._has_results = True
        if self._is_active():
            with self._never_stopping_the_training():
                self._log_results(progress, results, test, probabilities)
                if self._num_images:
                    self._run.log({"test_worst_mistakes": self._worst_mistakes(test, probabilities)})
                if self._with_artifact:
                    best = {"best_epoch": progress.best_epoch, "best_metric": progress.best_metric}
                    artifact = self._wandb.Artifact(f"model-{self.id}", type="model", metadata=best)
                    artifact.add_file(str(best_model))
                    self._run.log_artifact(artifact, aliases=["best"])

    def _log_results(self, progress, results, test, probabilities):
        targets, classes, plot = test.targets.tolist(), results["classes"], self._wandb.plot
        predictions = np.argmax(probabilities, axis=1).tolist()
        matrix = plot.confusion_matrix(
            y_true=targets, preds=predictions, class_names=classes, title="test: confusion matrix"
        )
        points = precision_recall_points(test.targets, probabilities, classes)
        curves = self._wandb.plot_table(
            "wandb/area-under-curve/v0",  # the chart of wandb.plot.pr_curve, which needs pandas
            self._wandb.Table(["class", "recall", "precision"], points),
            {"x": "recall", "y": "precision", "class": "class"},
            {"title": "test: precision and recall", "x-axis-title": "Recall", "y-axis-title": "Precision"},
        )
        self._run.log({"test_confusion_matrix": matrix, "test_pr_curves": curves})
        self._summarize_best_epoch(progress)
        metrics, adjusted = results["test"], results["posthoc"]["test"]
        for name in ("loss", "acc", "balanced_acc", "macro_f1"):
            self._run.summary.update({f"test_{name}": metrics[name], f"test_posthoc_{name}": adjusted[name]})

    def _worst_mistakes(self, test, probabilities):
        """A table of the wrongly predicted images whose label got the lowest probabilities."""
        predictions = np.argmax(probabilities, axis=1)
        label_probabilities = probabilities[np.arange(len(test)), test.targets]
        wrong = np.flatnonzero(predictions != test.targets)
        table = self._wandb.Table(["image", "path", "label", "prediction", "prob_label", "prob_prediction"])
        for i in wrong[np.argsort(label_probabilities[wrong], kind="stable")][: self._num_images]:
            image = self._wandb.Image(read_image(test.paths[i], TABLE_IMAGE_SIZE, self._resize))
            label, prediction = test.classes[test.targets[i]], test.classes[predictions[i]]
            of_label, of_prediction = label_probabilities[i], probabilities[i, predictions[i]]
            table.add_data(image, valid_text(test.paths[i]), label, prediction, of_label, of_prediction)
        return table

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback):
        if self._run:
            stopped = error if isinstance(error, Stopped) else None
            in_a_sweep = "WANDB_SWEEP_ID" in os.environ and self._is_active()
            if in_a_sweep and stopped and stopped.number == signal.SIGTERM and not self._has_results:
                with self._never_stopping_the_training():
                    if not self._was_stopped_by_sweep():
                        self._run.mark_preempting()  # the sweep hands it out again
            exit_code = stopped.status if stopped else int(error is not None)
            self._finish(stopped, 0 if stopped and self._has_results else exit_code)

    def _finish(self, stopped, exit_code):
        offline, folder, is_complete = self._run.offline, Path(self._run.dir).parent, True
        # the client keeps to its finish_timeout only while its process answers
        limit = STOP_TIMEOUT_S if stopped else (self._run.settings.finish_timeout or math.inf) + TEAR_DOWN_TIMEOUT_S
        give_up = _after(limit, stopped or TimeoutError())

        try:
            try:  # in a thread: the client itself does not end its wait at a signal
                call_in_thread(lambda: self._run.finish(exit_code=exit_code), give_up)
            except Exception:  # no answer in time, or the process of the client is gone
                is_complete = False
                self._tear_down(stopped)  # otherwise the client would complain again when Python ends
        except Stopped as stop:
            print(f"W&B: not everything was uploaded; to upload the rest: {_sync_command(folder)}")
            raise stop from None
        if offline or not is_complete:
            what = "to upload this run" if offline else "not everything was uploaded; to upload the rest"
            print(f"W&B: {what}: {_sync_command(folder)}")

    def _tear_down(self, stopped=None):
        """End the process of the client, or give it up. stopped: what to raise then."""
        with suppress(Exception, SystemExit):  # the client exits with the status of its process
            call_in_thread(self._wandb.teardown, _after(TEAR_DOWN_TIMEOUT_S, stopped or TimeoutError()))

    def _is_active(self):
        return self._run and not self._has_failed

    def _was_stopped_by_sweep(self):
        """Whether SIGTERM was the sweep's early termination, which its server records before the agent sends it."""
        from wandb.apis.public.sweeps import _sweep_with_runs  # which the agent of the client uses

        sweep = _sweep_with_runs(
            self._wandb.Api(timeout=SWEEP_TIMEOUT_S),
            os.environ["WANDB_SWEEP_ID"],
            "{}",
            project=self._run.project,
            entity=self._run.entity,
        )
        (run,) = (run for run in sweep["runs"] if run["name"] == self.id)
        return run["shouldStop"] or run["stopped"]


def _after(seconds, error):
    """-> function that raises `error` once so many seconds have passed"""
    deadline = time.monotonic() + seconds

    def check():
        if time.monotonic() > deadline:
            raise error

    return check


def _sync_command(folder):
    return f"wandb login && {command_line(['wandb', 'sync', str(folder)])}"


def _provide_folders(folder):
    """Let the client keep its cache and what it uploads in the folder of the run if it cannot in the user's home."""
    folders = {"CACHE": ("XDG_CACHE_HOME", ".cache"), "DATA": ("XDG_DATA_HOME", os.path.join(".local", "share"))}
    for kind, place in folders.items():
        usual = user_folder(*place)
        if f"WANDB_{kind}_DIR" not in os.environ and not (usual and is_writable(usual)):
            os.environ[f"WANDB_{kind}_DIR"] = os.path.join(folder, "wandb", kind.lower())


def precision_recall_points(
    targets: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], points: int = PR_POINTS
) -> list[tuple[str, float, float]]:
    """One-against-rest curves of the classes that occur. -> [(class, recall, precision)], `points` rows per class.

    targets: (N,) int; probabilities: (N, C). The precision at a recall is the best one at this recall or more.
    """
    from sklearn.metrics import precision_recall_curve  # here: a run without W&B does not need it

    recalls = np.linspace(0, 1, points)
    rows = []
    for c in np.unique(targets):
        precision, recall, _ = precision_recall_curve(targets == c, probabilities[:, c])
        best = np.maximum.accumulate(precision)[np.searchsorted(-recall, -recalls, side="right") - 1]
        rows += [(classes[c], float(x), float(y)) for x, y in zip(recalls, best, strict=True)]
    return rows


def _flat(row):
    """A row of the history as W&B expects it: with `val_recall/CLASS` for each class."""
    recalls = {f"val_recall/{name}": recall for name, recall in row["val_recall"].items()}
    return {name: value for name, value in row.items() if name != "val_recall"} | recalls
