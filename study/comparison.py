"""The comparison of an ablation's methods: paired bootstrap over images and seeds, and the files with the results."""

import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evaluation import adjust
from metrics import INTERVAL, Bootstrap, confusion_metrics, format_with_interval
from plots import save_figure
from run.cli import UserError
from run.files import atomic_write, read_json, read_predictions, write_csv
from study.ablation import MethodRun
from study.out_of_fold import tested_subjects

POSTHOC = "{}, post-hoc logit adjustment"  # of the baseline: a row of the table without a training of its own
RESAMPLES, CHUNK = 2000, 100
MAX_DRAWN = 20_000_000  # numbers of a chunk: fewer resamples at once of very many images
METRICS = {"balanced_acc": "balanced accuracy", "macro_f1": "macro F1"}
NUM_RAREST = 3  # classes whose recall the table shows


@dataclass
class EvaluatedRun:
    """The results of a finished run on its test images."""

    trained: MethodRun
    results: dict  # of results.json
    paths: list[str]  # N
    targets: np.ndarray  # (N,) int
    predictions: dict[str, np.ndarray]  # {"raw", "posthoc"}, each (N,) int
    subjects: list[str]  # N names, or empty without subjects


def read_run(run: MethodRun) -> EvaluatedRun:
    results = read_json(run.folder / "results.json")
    paths, targets, probabilities = read_predictions(run.folder / "test_predictions.csv", results["classes"])
    fitted = {name: results["posthoc"][name] for name in ("tau", "temperature")}
    adjusted = adjust(probabilities, results["samples_per_cls"], **fitted)
    predictions = {"raw": probabilities.argmax(axis=1), "posthoc": adjusted.argmax(axis=1)}
    pattern = read_json(run.folder / "args.json")["group_regex"]
    subjects = tested_subjects(run.folder, results, pattern, paths)
    return EvaluatedRun(run, results, paths.tolist(), targets, predictions, subjects)


def read_runs(runs: list[MethodRun]) -> dict[str, list[EvaluatedRun]]:
    """-> {method: [one EvaluatedRun per seed]}. Raises UserError if runs of a seed were tested on different images."""
    evaluated = {}
    for run in runs:
        evaluated.setdefault(run.method, []).append(read_run(run))
    for same_seed in zip(*evaluated.values(), strict=True):
        if len({tuple(run.paths) for run in same_seed}) > 1:
            seed = same_seed[0].trained.seed
            raise UserError(
                f"--ablate_dir: the runs of seed {seed} were not tested on the same images; choose another --ablate_dir"
            )
    return evaluated


# ------------------------------------------------------------------------------------------------------ statistics


def resample_images(runs: Sequence[EvaluatedRun]) -> Iterator[list[np.ndarray]]:
    """Resample the test images of several runs, which may share some. -> how often each is drawn, S arrays (B, N)

    Stratified by class; subjects are drawn whole if they are known, see `Bootstrap`. The first chunk has B = 1: every
    image once. An image that several runs share is drawn equally often for each.
    """
    target_of, subject_of = {}, {}
    for run in runs:
        target_of |= zip(run.paths, run.targets, strict=True)
        subject_of |= zip(run.paths, run.subjects, strict=False)
    subjects = np.unique(list(subject_of.values()), return_inverse=True)[1] if subject_of else None
    bootstrap = Bootstrap(np.array(list(target_of.values())), subjects)
    position = {path: i for i, path in enumerate(target_of)}
    positions = [np.array([position[path] for path in run.paths]) for run in runs]
    rng, chunk = np.random.default_rng(0), max(1, min(CHUNK, MAX_DRAWN // len(target_of)))
    yield [np.ones((1, len(run.paths)), np.int32) for run in runs]
    for start in range(0, RESAMPLES, chunk):
        drawn = bootstrap.draw(min(chunk, RESAMPLES - start), rng)
        yield [drawn[:, of_run] for of_run in positions]


def resampled_metrics(
    predictions_of: Mapping[str, Sequence[np.ndarray]], runs: Sequence[EvaluatedRun]
) -> dict[str, dict[str, np.ndarray]]:
    """-> {method: {metric: (1 + RESAMPLES, S)}} for S seeds; the first row is computed from the images themselves.

    predictions_of: {method: S arrays (N,) int}; runs: S runs, whose images they are. A resample draws the same images
    for every method, and an image that several seeds share equally often for each.
    """
    num_classes = len(runs[0].results["classes"])
    cells_of = {
        method: [_Cells(run.targets * num_classes + p) for run, p in zip(runs, predictions, strict=True)]
        for method, predictions in predictions_of.items()
    }
    chunks = {method: [] for method in predictions_of}
    for times_drawn in resample_images(runs):
        for method, cells_of_runs in cells_of.items():
            sums = [cells.sums(drawn, num_classes**2) for cells, drawn in zip(cells_of_runs, times_drawn, strict=True)]
            metrics = confusion_metrics(np.stack(sums, axis=1).reshape(-1, num_classes, num_classes))
            chunks[method].append({name: metrics[name].reshape(-1, len(runs)) for name in METRICS})
    return {
        method: {name: np.concatenate([chunk[name] for chunk in chunks[method]]) for name in METRICS}
        for method in chunks
    }


class _Cells:
    """The images sorted by their cells of the confusion matrix: with 100 classes, a matrix (N, 10,000) of which image
    is in which cell would take gigabytes. cells: (N,) int."""

    def __init__(self, cells):
        self.order = np.argsort(cells, kind="stable")
        self.cells, self.starts = np.unique(cells[self.order], return_index=True)

    def sums(self, weights, num_cells):
        """weights of the images, (B, N) int -> (B, num_cells) float64"""
        result = np.zeros((len(weights), num_cells))
        result[:, self.cells] = np.add.reduceat(weights[:, self.order], self.starts, axis=1)
        return result


def compare_methods(evaluated: Mapping[str, Sequence[EvaluatedRun]], baseline: str) -> list[dict]:
    """-> one row of the table per method: mean over the seeds, interval, and paired difference from the baseline.

    evaluated: from `read_runs`. A resample draws test images and seeds, the same for every method. Intervals and p
    values thus describe what other images and other trainings would have given, as far as a few seeds can tell.
    """
    predictions_of = {}
    for method, runs in evaluated.items():
        predictions_of[method] = [run.predictions["raw"] for run in runs]
        if method == baseline:
            predictions_of[POSTHOC.format(method)] = [run.predictions["posthoc"] for run in runs]
    table = compare_predictions(predictions_of, evaluated[baseline], baseline)
    correct_p_values([row for row in table if row["method"] != baseline])
    return [row | summarize_runs(evaluated.get(row["method"], [])) for row in table]


def compare_predictions(
    predictions_of: Mapping[str, Sequence[np.ndarray]], runs: Sequence[EvaluatedRun], baseline: str
) -> list[dict]:
    """The statistics of `compare_methods`, with p values that are not corrected; arguments: see `resampled_metrics`."""
    metrics_of = resampled_metrics(predictions_of, runs)
    weights = _resampled_seed_weights(len(runs))
    table = []
    for method, metrics in metrics_of.items():
        row = {"method": method}
        for name in METRICS:
            means, baseline_means = ((m[name] * weights).sum(axis=1) for m in (metrics, metrics_of[baseline]))
            row |= _compare_seeds(name, metrics[name][0], metrics_of[baseline][name][0])
            row |= {f"{name}{suffix}": value for suffix, value in summarize(means, baseline_means).items()}
        table.append(row)
    return table


def correct_p_values(rows: Sequence[dict]) -> None:
    """Correct the p values of rows of `compare_predictions` for their number, in place; see `holm`."""
    for name in METRICS:
        for row, p in zip(rows, holm([row[f"{name}_p"] for row in rows]), strict=True):
            row[f"{name}_p"] = p


def _resampled_seed_weights(num_seeds):
    """-> (1 + RESAMPLES, S) weights of the seeds in each resample, which sum to 1; the first row has equal weights."""
    drawn = np.random.default_rng(1).multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), RESAMPLES)
    # stretched: the variance of a bootstrap of n seeds is too small by (n - 1) / n (Hesterberg 2015, sec. 3.2)
    deviations = np.concatenate([np.zeros((1, num_seeds)), drawn - 1])
    return 1 / num_seeds + deviations / np.sqrt(num_seeds * max(1, num_seeds - 1))


def _compare_seeds(name, values, baseline_values):
    """(S,) each -> standard deviation, and in how many seeds the difference has the sign of the mean difference."""
    differences = values - baseline_values
    return {
        f"{name}_std": np.std(values, ddof=1) if len(values) > 1 else 0.0,
        f"{name}_agreeing": int((np.sign(differences) == np.sign(differences.mean())).sum()),
    }


def summarize(values: np.ndarray, baseline_values: np.ndarray) -> dict[str, float | np.ndarray]:
    """(1 + RESAMPLES,) each, the estimate first -> {suffix: estimate, interval, paired difference, p value}."""
    difference = values - baseline_values
    tail = min(np.mean(difference[1:] <= 0), np.mean(difference[1:] >= 0))
    return {
        "": values[0],
        "_ci": np.percentile(values[1:], INTERVAL),
        "_difference": difference[0],
        "_difference_ci": np.percentile(difference[1:], INTERVAL),
        "_p": min(1.0, 2 * max(tail, 1 / RESAMPLES)),
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for multiple tests (Holm 1979)."""
    order = np.argsort(p_values)
    corrected = np.maximum.accumulate(np.array(p_values)[order] * np.arange(len(p_values), 0, -1))
    return np.minimum(1, corrected)[np.argsort(order)].tolist()


def summarize_runs(runs: Sequence[EvaluatedRun]) -> dict:
    """-> means over the seeds that need no resampling; None for a row without runs."""
    if not runs:
        return {"validation": None, "posthoc": None, "tau": None, "minutes": 0.0, "recalls": None}
    results = [run.results for run in runs]
    counts = np.array(results[0]["samples_per_cls"])
    rarest = [results[0]["classes"][i] for i in np.argsort(counts, kind="stable")[:NUM_RAREST]]
    return {
        "validation": np.mean([result["val"]["balanced_acc"] for result in results]),
        "posthoc": np.mean([result["posthoc"]["test"]["balanced_acc"] for result in results]),
        "tau": np.mean([result["posthoc"]["tau"] for result in results]),
        "minutes": np.mean([run.trained.minutes() for run in runs]),
        "recalls": {c: np.mean([result["test"]["per_class"][c]["recall"] for result in results]) for c in rarest},
    }


# ----------------------------------------------------------------------------------------------------------- files


def write_comparison(folder: Path, runs: list[MethodRun], baseline: str, seeds: Sequence[int]) -> None:
    """Compare the finished runs; write ablation.csv, ablation.md and ablation.png, and print the table."""
    evaluated = read_runs(runs)
    table = compare_methods(evaluated, baseline)
    table.sort(key=lambda row: row["method"] != baseline)  # the baseline first, the others in the order of the grid
    write_runs(folder / "ablation.csv", evaluated)
    has_subjects = any(run.subjects for run in itertools.chain.from_iterable(evaluated.values()))
    text = markdown(table, baseline, seeds, has_subjects)
    with atomic_write(folder / "ablation.md") as file:
        file.write(text)
    plot(folder / "ablation.png", table)
    print(f"{text}\nresults saved to {folder}")


def write_runs(path: Path, evaluated: Mapping[str, Sequence[EvaluatedRun]]) -> None:
    """Write a CSV file with one row per run, seed by seed."""
    rows = []
    for run in itertools.chain.from_iterable(zip(*evaluated.values(), strict=True)):
        trained, results = run.trained, run.results
        row = {"method": trained.method, "seed": trained.seed, "minutes": round(trained.minutes(), 1)}
        for prefix, metrics in (("", results["test"]), ("posthoc_", results["posthoc"]["test"])):
            row |= {f"{prefix}{name}": metrics[name] for name in ("balanced_acc", "macro_f1", "acc", "ece")}
        row["tau"] = results["posthoc"]["tau"]
        row |= {f"recall_{name}": metrics["recall"] for name, metrics in results["test"]["per_class"].items()}
        about = {"best_epoch": results["best_epoch"], "run_dir": trained.folder, "flags": shlex.join(trained.flags)}
        rows.append(row | about)
    write_csv(path, list(rows[0]), rows)


def markdown(table: Sequence[dict], baseline: str, seeds: Sequence[int], has_subjects: bool = False) -> str:
    """-> the table of the methods and an explanation of its columns. has_subjects: whether they are drawn whole."""
    rarest = next(list(row["recalls"]) for row in table if row["recalls"])
    heads = [
        "method", *METRICS.values(), f"difference from {baseline}", "p", *(f"recall {name}" for name in rarest),
        "post hoc", "tau", "validation", "minutes",
    ]  # fmt: skip
    lines = [_table_row(heads), f"|{' --- |' * len(heads)}"]
    lines += [_table_row(_cells(row, rarest, row["method"] == baseline, len(seeds))) for row in table]
    drawn = "subjects, each with all its images" if has_subjects else "images"
    explanation = (
        f"Metrics of the test images, mean over seeds {' '.join(map(str, seeds))}. In brackets: 95 % intervals of a "
        f"bootstrap over {drawn} (stratified by class) and seeds. ±: standard deviation over the seeds. Difference and "
        "p: balanced accuracy, paired, with the number of seeds that agree on the sign; p is corrected for the number "
        "of methods (Holm). With few seeds, intervals and p say little about what another training would give, and "
        "with one seed nothing. Post hoc: balanced accuracy after logit adjustment with tau, fitted on the validation "
        "images. Validation: balanced accuracy on the validation images; choose a method by this column."
    )
    return "\n".join([*lines, "", explanation, ""])


def _table_row(cells):
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"


def _cells(row, rarest, is_baseline, num_seeds):
    cells = [row["method"]]
    for name in METRICS:
        deviation = f" ± {row[f'{name}_std']:.3f}" if num_seeds > 1 else ""
        cells.append(format_with_interval(row[name], row[f"{name}_ci"]) + deviation)
    difference = format_with_interval(row["balanced_acc_difference"], row["balanced_acc_difference_ci"], sign="+")
    difference += f", {row['balanced_acc_agreeing']} of {num_seeds} seeds" if num_seeds > 1 else ""
    cells += ["", ""] if is_baseline else [difference, f"{row['balanced_acc_p']:.3f}"]
    cells += [f"{row['recalls'][name]:.2f}" if row["recalls"] else "" for name in rarest]
    formats = {"posthoc": ".3f", "tau": ".2f", "validation": ".3f", "minutes": ".0f"}
    return cells + [format(row[name], spec) if row["recalls"] else "" for name, spec in formats.items()]


def plot(path: Path, table: Sequence[dict]) -> None:
    """Plot every method's metrics with their intervals. The dotted line is the baseline, the first row."""
    figure = Figure(figsize=(11, 1.2 + 0.42 * len(table)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    heights = np.arange(len(table))[::-1]
    for axes, (name, title) in zip(panels, METRICS.items(), strict=True):
        values = np.array([row[name] for row in table])
        low, high = np.array([row[f"{name}_ci"] for row in table]).T
        axes.errorbar(values, heights, xerr=[values - low, high - values], fmt="o", capsize=3)
        axes.axvline(values[0], color="0.6", linestyle=":")
        axes.set_title(f"{title}, test, 95 % intervals")
        axes.grid(alpha=0.3)
    panels[0].set_yticks(heights, [row["method"] for row in table], parse_math=False)
    save_figure(figure, path)
