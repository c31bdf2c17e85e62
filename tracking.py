"""The Weights & Biases run: start it, resume it by id, go on offline where there is no server, log to it."""

import os
import shlex
from contextlib import contextmanager, suppress

import numpy as np

from files import UserError

INIT_TIMEOUT_S = 60
MODES = ("online", "offline", "disabled")


class Run:
    """A W&B run as a context: closed as finished, or as failed when the training raises. Under `disabled`, nothing.

    Without an account, a key, a network or an answer it goes on offline, and one line says how to upload it later.
    """

    def __init__(self, args, run_dir, checkpoint, samples_per_cls):
        """args: main.py's flags. checkpoint: the resumed one or None. samples_per_cls: {class: training images}."""
        self.id = args.wandb_id or (checkpoint and checkpoint["wandb_id"])
        self._run = None
        if args.wandb_mode == "disabled":
            if args.wandb_id:
                print("W&B: disabled; --wandb_id is only kept in the checkpoints (to log, add --wandb_mode online)")
            return
        import wandb  # here, since a run without W&B need not have it

        self._wandb = wandb
        folder = os.path.abspath(args.wandb_dir or run_dir)
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
            raise UserError(f"--wandb_id / --wandb_resume: {_first_line(error)}") from error
        self.id = self._run.id
        # every figure is drawn over the epoch, so that a resumed run goes on as one line
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")

    def _settings(self):
        try:
            settings = self._wandb.Settings(init_timeout=INIT_TIMEOUT_S, silent=True)
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
            upload = f"wandb sync {shlex.quote(os.path.dirname(run.dir))}"
            print(f"W&B: offline{why}; to upload it later: wandb login && {upload}")
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
            return None, _first_line(error)

    @contextmanager
    def _never_stopping_the_training(self):
        """What goes wrong with W&B now, as when its process is killed, is said once, and the run goes on without."""
        try:
            yield
        except Exception as error:  # of sockets, of the client, of its server
            print(f"warning: W&B has failed ({_first_line(error) or type(error).__name__}); going on without it")
            self._run = None
            with suppress(Exception):  # else the client would complain again when Python ends
                self._wandb.teardown()

    def log_epoch(self, row, progress):
        """row: the epoch's row of `history.csv`."""
        if self._run:
            with self._never_stopping_the_training():
                self._run.log({**row, "best_epoch": progress.best_epoch, "best_metric": progress.best_metric})
                self._summarise_best_epoch(progress)

    def _summarise_best_epoch(self, progress):
        """The best epoch's figures, not the last one's, are what a sweep compares, also of a trial that is stopped."""
        best_row = progress.best_row() or {}
        self._run.summary.update({name: value for name, value in best_row.items() if name != "epoch"})

    def log_results(self, progress, results, targets, probabilities):
        """Test figures into the summary, and the test's confusion matrix.

        targets: (N,), probabilities: (N, C) of the test set.
        """
        if self._run:
            with self._never_stopping_the_training():
                self._log_results(progress, results, targets, probabilities)

    def _log_results(self, progress, results, targets, probabilities):
        predictions = np.argmax(probabilities, axis=1)
        chart = self._wandb.plot.confusion_matrix(
            y_true=targets.tolist(),
            preds=predictions.tolist(),
            class_names=results["classes"],
            title="test: confusion matrix",
        )
        self._run.log({"test_confusion_matrix": chart})
        self._summarise_best_epoch(progress)
        test = results["test"]
        self._run.summary.update({f"test_{name}": test[name] for name in ("loss", "acc", "balanced_acc", "macro_f1")})

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback):
        if self._run:
            with self._never_stopping_the_training():
                self._run.finish(exit_code=0 if error_type is None else 1)


def default_mode():
    """`WANDB_MODE` where it is set, else online (which goes on offline by itself)."""
    mode = os.environ.get("WANDB_MODE") or "online"
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    if mode not in MODES:
        raise UserError(f"WANDB_MODE: {mode} is none of {', '.join(MODES)}")
    return mode


def _first_line(error):
    return str(error).strip().partition("\n")[0]
