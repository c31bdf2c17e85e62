"""The Weights & Biases run: start it, resume it by id, go on offline where there is no server, log to it."""

import os
import shlex
import signal
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from files import UserError, first_line
from image_cache import read_image
from metrics import precision_recall_points
from resuming import Stopped

INIT_TIMEOUT_S = 60
FINISH_TIMEOUT_S = 120  # for what is left to upload at the end; a server that is gone holds nobody up
SWEEP_TIMEOUT_S = 10
TABLE_IMAGE_SIZE = 224  # pixels
MODES = ("online", "offline", "disabled")


class Run:
    """A W&B run as a context: closed as finished, or as failed when the training raises. Under `disabled`, nothing.

    Without an account, a key, a network or an answer it goes on offline, and one line says how to upload it later.
    """

    def __init__(self, args, run_dir, checkpoint, samples_per_cls):
        """args: main.py's flags. checkpoint: the resumed one or None. samples_per_cls: {class: training images}."""
        self.id = args.wandb_id or (checkpoint and checkpoint["wandb_id"])
        self._num_images, self._with_artifact = args.wandb_images, args.wandb_artifact
        self._run, self._has_failed = None, False
        if args.wandb_mode == "disabled":
            if args.wandb_id:
                print("W&B: disabled; --wandb_id is only kept in the checkpoints (to log, add --wandb_mode online)")
            return
        import wandb  # here, since a run without W&B need not have it

        self._wandb = wandb
        folder = os.path.abspath(args.wandb_dir or os.environ.get("WANDB_DIR") or run_dir)
        os.makedirs(folder, exist_ok=True)
        arguments = {
            "name": args.wandb_name or os.path.basename(os.path.abspath(run_dir)),
            "resume": args.wandb_resume,
            "dir": folder,
            "config": {**vars(args), "samples_per_cls": samples_per_cls},
            "settings": self._settings(),
        }
        if "WANDB_SWEEP_ID" not in os.environ:  # else the agent sets both
            arguments |= {"project": args.wandb_project, "id": self.id}
        try:
            self._run = self._start(args.wandb_mode, arguments)
        except wandb.errors.UsageError as error:
            flag = "--wandb_project" if "project name" in str(error) else "--wandb_id / --wandb_resume"
            raise UserError(f"{flag}: {first_line(error)}") from error
        self.id = self._run.id
        with self._never_stopping_the_training():
            # every figure is drawn over the epoch, so that a resumed run goes on as one line
            self._run.define_metric("epoch")
            self._run.define_metric("*", step_metric="epoch")

    def _settings(self):
        try:
            settings = self._wandb.Settings(init_timeout=INIT_TIMEOUT_S, silent=True)
            if "WANDB_FINISH_TIMEOUT" not in os.environ:
                settings.finish_timeout = FINISH_TIMEOUT_S
            settings.finish_timeout_raises = True
            self._wandb.setup(settings)  # reads the WANDB_ variables of the environment
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"W&B does not accept a WANDB_ variable of the environment: {reason}") from error
        return settings

    def _start(self, mode, arguments):
        why_offline = None
        if mode == "online":
            run, why_offline = self._start_online(arguments)
        if mode == "offline" or why_offline:
            if arguments["resume"] == "must":  # offline there is no server to ask whether the run exists
                arguments["resume"] = "allow"
            run = self._wandb.init(mode="offline", **arguments)
            why = f" ({why_offline})" if why_offline else ""
            print(f"W&B: offline{why}; the command that uploads it later comes at the end")
        else:
            print(f"W&B: {run.url}")
        return run

    def _start_online(self, arguments):
        """-> (run, None), or (None, why there is none)."""
        wandb = self._wandb
        try:
            if not wandb.login(prompt=False, verify=True):
                return None, "no API key"
        except wandb.errors.AuthenticationError:
            return None, "the server did not accept the API key or did not answer"
        try:
            return wandb.init(mode="online", **arguments), None
        except wandb.errors.UsageError:
            raise
        except wandb.errors.Error as error:
            wandb.teardown()  # else the id of the run that did not start counts as taken
            return None, first_line(error)

    @contextmanager
    def _never_stopping_the_training(self):
        """What goes wrong with W&B now, as when its process is killed, is said once, and nothing more is logged."""
        try:
            yield
        except Exception as error:  # of sockets, of the client, of its server
            print(f"warning: W&B has failed ({first_line(error) or type(error).__name__}); going on without it")
            self._has_failed = True

    def catch_up(self, progress):
        """Log the epochs that are saved but are not there, as the run was broken off, or is new on this server.

        Offline nobody knows what is there: all are logged, so that the last part of the run has everything.
        """
        if self._is_at_work():
            last = self._run.summary.get("epoch", -1) if self._run.resumed else -1
            if self._run.offline and self._parts("run"):
                last = progress.epoch  # online before: the server has them
            for row in progress.history:
                if row["epoch"] > last:
                    self.log_epoch(row, progress)

    def _parts(self, kind):
        """Folders of this run: "run" for those online, "offline-run"."""
        return sorted(Path(self._run.dir).parent.parent.glob(f"{kind}-*-{self.id}"))

    def log_epoch(self, row, progress):
        """row: the epoch's row of `history.csv`, with {class: recall} as `val_recall`."""
        if self._is_at_work():
            with self._never_stopping_the_training():
                best = {"best_epoch": progress.best_epoch, "best_metric": progress.best_metric}
                self._run.log({**_flat(row), **best})
                self._summarise_best_epoch(progress)

    def _summarise_best_epoch(self, progress):
        """The best epoch's figures, not the last one's, are what a sweep compares, also of a trial that is stopped."""
        best_row = progress.best_row()
        if best_row:
            self._run.summary.update({name: value for name, value in _flat(best_row).items() if name != "epoch"})

    def log_results(self, progress, results, test, probabilities, best_model):
        """Test figures into the summary; confusion matrix, PR curves; worst mistakes and the model where asked for.

        test: ImageIndex of N images; probabilities: (N, C); best_model: path of the checkpoint.
        """
        if self._is_at_work():
            with self._never_stopping_the_training():
                self._log_results(progress, results, test, probabilities)
                if self._num_images:
                    self._run.log({"test_worst_mistakes": self._worst_mistakes(test, probabilities)})
                if self._with_artifact:
                    about = {"best_epoch": progress.best_epoch, "best_metric": progress.best_metric}
                    artifact = self._wandb.Artifact(f"model-{self.id}", type="model", metadata=about)
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
            "wandb/area-under-curve/v0",  # W&B's own chart for these curves; its function for them needs pandas
            self._wandb.Table(["class", "recall", "precision"], points),
            {"x": "recall", "y": "precision", "class": "class"},
            {"title": "test: precision and recall", "x-axis-title": "Recall", "y-axis-title": "Precision"},
        )
        self._run.log({"test_confusion_matrix": matrix, "test_pr_curves": curves})
        self._summarise_best_epoch(progress)
        figures = results["test"]
        adjusted = results["posthoc"]["test"]
        for name in ("loss", "acc", "balanced_acc", "macro_f1"):
            self._run.summary.update({f"test_{name}": figures[name], f"test_posthoc_{name}": adjusted[name]})

    def _worst_mistakes(self, test, probabilities):
        """A table of the images that the model was surest to know and did not."""
        predictions = np.argmax(probabilities, axis=1)
        of_label = probabilities[np.arange(len(test)), test.targets]
        wrong = np.flatnonzero(predictions != test.targets)
        table = self._wandb.Table(["image", "path", "label", "prediction", "prob_label", "prob_prediction"])
        for i in wrong[np.argsort(of_label[wrong], kind="stable")][: self._num_images]:
            image = self._wandb.Image(read_image(test.paths[i], TABLE_IMAGE_SIZE))
            label, prediction = test.classes[test.targets[i]], test.classes[predictions[i]]
            table.add_data(image, test.paths[i], label, prediction, of_label[i], probabilities[i, predictions[i]])
        return table

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback):
        if self._run:
            in_a_sweep = "WANDB_SWEEP_ID" in os.environ and self._is_at_work()
            if in_a_sweep and isinstance(error, Stopped) and error.number == signal.SIGTERM:
                with self._never_stopping_the_training():
                    if not self._is_to_stop():
                        self._run.mark_preempting()  # it is handed out again
            self._finish(error.status if isinstance(error, Stopped) else int(error is not None))

    def _finish(self, exit_code):
        offline, folder, whole = self._run.offline, Path(self._run.dir).parent, True
        try:
            self._run.finish(exit_code=exit_code)
        except Exception:  # no answer in time, or no process of the client any more
            whole = False
            with suppress(Exception):  # else the client would complain again when Python ends
                self._wandb.teardown()
        if offline or not whole:
            why = "to upload it" if offline else "not all was uploaded; to do it later"
            print(f"W&B: {why}: wandb login && {shlex.join(['wandb', 'sync', str(folder)])}")

    def _is_at_work(self):
        return self._run and not self._has_failed

    def _is_to_stop(self):
        """Whether SIGTERM was the sweep's early termination: its server has noted that before the agent sends it."""
        from wandb.apis.public.sweeps import _sweep_with_runs  # with which the client's own agent asks

        sweep = _sweep_with_runs(
            self._wandb.Api(timeout=SWEEP_TIMEOUT_S),
            os.environ["WANDB_SWEEP_ID"],
            "{}",
            project=self._run.project,
            entity=self._run.entity,
        )
        (run,) = (run for run in sweep["runs"] if run["name"] == self.id)
        return run["shouldStop"] or run["stopped"]


def default_mode():
    """`WANDB_MODE` where it is set, else online (which goes on offline by itself)."""
    mode = os.environ.get("WANDB_MODE") or "online"
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    if mode not in MODES:
        raise UserError(f"WANDB_MODE: {mode} is none of {', '.join(MODES)}")
    return mode


def _flat(row):
    """A row of the history as W&B takes it: `val_recall/CLASS` for each class."""
    recalls = {f"val_recall/{name}": recall for name, recall in row["val_recall"].items()}
    return {name: value for name, value in row.items() if name != "val_recall"} | recalls
