"""The results of a search: one line per trial, search.csv, the plots, and the command that trains the best setting."""

import os
from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from run.files import atomic_write, write_csv
from run.surroundings import command_line
from study import process
from study.sweep_yaml import SweepConfig

STATES = {TrialState.COMPLETE: "done", TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed"}


def trial_line(trial: FrozenTrial, config: SweepConfig) -> str:
    """State, epochs, best metric and parameters of a trial."""
    best = trial.value if trial.state is TrialState.COMPLETE else None
    if best is None and trial.intermediate_values:
        best = trial.intermediate_values[max(trial.intermediate_values)]
    epochs = max(trial.intermediate_values, default=0)
    metric = "" if best is None else f"{best:.4f}"
    values = " ".join(f"{name}={_short(config.value(name, drawn))}" for name, drawn in trial.params.items())
    state = STATES.get(trial.state, "waiting" if trial.state is TrialState.WAITING else "running")
    error = trial.user_attrs.get("error", "") if trial.state is TrialState.FAIL else ""
    return f"trial {trial.number:3d} {state:>13} {epochs:4d} epochs {metric:>8}  {values}  {error}".rstrip()


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else value


def write_search_results(
    study: optuna.Study, config: SweepConfig, folder: Path, command_flags: Callable[[dict], list[str]]
) -> None:
    """Write search.csv and the plots, and print the command that trains the best setting for the full time.

    command_flags: {parameter: what Optuna drew} -> flags of main.py.
    """
    rows = [_row(trial, config) for trial in study.get_trials(deepcopy=False)]
    if rows:
        write_csv(folder / "search.csv", list(rows[0]), rows)
    counts = {state: sum(row["state"] == state for row in rows) for state in (*STATES.values(), "unfinished")}
    print(f"trials: {', '.join(f'{count} {state}' for state, count in counts.items() if count) or 'none'}")
    if not counts["done"]:
        return
    _plot(study, config, folder)
    best = study.best_trial
    flags = command_flags(best.params)
    if "epochs" not in config.searched():  # trials are short; the best setting gets main.py's default
        flags = process.without_flag(flags, "--epochs")
    print(f"best: {trial_line(best, config)}")
    print(f"best model: {best.user_attrs['run_dir']}/best_model.pth")
    print(f"full training: {command_line(['python', os.path.relpath(process.MAIN), *flags])}")
    print(f"all trials: {folder / 'search.csv'}")


def _row(trial, config):
    attrs = trial.user_attrs
    best = trial.value if trial.value is not None else attrs.get("best", "")
    row = {"trial": trial.number, "state": STATES.get(trial.state, "unfinished"), config.metric: best}
    for name in config.searched():
        row[name] = config.value(name, trial.params[name]) if name in trial.params else ""
    row |= {"epochs": attrs.get("epochs", ""), "minutes": round(attrs.get("minutes", 0), 2)}
    return {**row, "run_dir": attrs.get("run_dir"), "error": attrs.get("error", "")}


def _plot(study, config, folder):
    import matplotlib

    matplotlib.use("Agg")
    from optuna.visualization import matplotlib as plots

    figures = {"search_history.png": plots.plot_optimization_history}
    values = {trial.value for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])}
    if len(values) > 1 and config.searched():  # else no parameter can be important
        figures["search_importance.png"] = plots.plot_param_importances
    for name, plot in figures.items():
        axes = plot(study, target_name=config.metric)
        axes.set_title(f"{config.metric} of study {study.study_name}")
        if name == "search_importance.png":
            axes.get_legend().remove()  # it has one color and hides the bars
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.figure.set_size_inches(9, 5)
        axes.figure.set_layout_engine("constrained")
        with atomic_write(folder / name, "wb") as file:
            axes.figure.savefig(file, format="png", dpi=100)
