#!/usr/bin/env python3
"""Compare the remedies for unequal classes on your own images: the same steps, the same images, several seeds.

python ablate.py --data_dirs data/forehead_wrinkles --epochs 30 --seeds 0 1 2

Each remedy is a run of main.py for each seed, with the same number of optimizer steps; flags that are not ablate.py's
go to all of them. Broken off, the same command goes on. At the end: ablation.csv, ablation.md, ablation.png.
"""

import argparse
import csv
import itertools
import json
import shlex
import sys
import time
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure

import main
import posthoc
from files import UserError, atomic_write, own_folder, write_csv
from flags import Parser, number, parse_args
from image_cache import limit_image_size
from metrics import confusion_figures
from report import save_figure
from resuming import Signals, exit_status
from trials import OWN_FLAGS, TrialProcess, check_no_own_flags, is_left_over, keep_best_model_only

# 0.8E: that share of the epochs. Oversampling makes all counts equal, and with them the Class-Balanced weights: counted
# after it, the loss is the focal loss
GRID = {
    "cross entropy": "--train_loss ce",
    "focal": "--train_loss focal",
    "CB focal": "--train_loss cb",
    "oversampling": "--train_loss ce --use_augmentation",
    "CB focal + oversampling": "--train_loss cb --use_augmentation",
    "CB focal of augmented counts": "--train_loss focal --use_augmentation",
    "balanced softmax": "--train_loss balanced_softmax",
    "LDAM-DRW": "--train_loss ldam --drw_epoch 0.8E",
}
POSTHOC = "{}, logit adjustment post hoc"  # of the baseline: a row without a training of its own
RESAMPLES = 2000
RAREST = 3  # classes whose recall the table shows
POLL_SECONDS = 1


def build_parser():
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, prog="ablate.py"
    )
    add = parser.add_argument
    add("--epochs", type=number(int, low=1), required=True, metavar="E", help="of the baseline; all get its steps")
    add("--seeds", type=number(int, low=0), nargs="+", default=[0, 1, 2], metavar="N", help="[0 1 2]")
    add("--grid", metavar="YAML", help="{name: flags of main.py}, instead of the default remedies")
    add("--baseline", metavar="NAME", help="what the others are compared with [the first of the grid]")
    add("--ablate_dir", default="ablation", metavar="DIR", help="runs and results go here [ablation]")
    add("--jobs", type=number(int, low=1), default=1, metavar="N", help="runs at once on this machine [1]")
    return parser


# ------------------------------------------------------------------------------------------------------------ the runs


@dataclass
class Run:
    """One remedy with one seed."""

    remedy: str
    seed: int
    flags: list
    folder: Path

    def is_finished(self):
        return (self.folder / "results.json").exists()


def read_grid(path):
    if path is None:
        return GRID
    try:
        grid = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--grid: {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--grid: {path} is no yaml: {' '.join(str(error).split())}") from error
    if not isinstance(grid, dict) or not grid or not all(isinstance(flags, str) for flags in grid.values()):
        raise UserError(f"--grid: {path}: a mapping is wanted, from a name to a text of main.py's flags")
    return {str(name): flags for name, flags in grid.items()}


def with_epochs(flags, epochs):
    """Flags of a remedy, `0.8E` put into figures, and `--epochs`."""
    words = []
    for word in shlex.split(flags):
        share = word.removesuffix("E")
        is_share = word != share and share.replace(".", "", 1).isdecimal()
        words.append(str(round(float(share) * epochs)) if is_share else word)
    return [*words, "--epochs", str(epochs)]


def plan_runs(args, main_flags, grid, ablate_dir):
    """-> [Run], seed by seed. Reads the images once, to count the steps, and checks every flag."""
    common = [*main_flags, "--wandb_mode", "disabled"]

    def parse(flags):
        return parse_args([*common, *flags], ablate_dir)[0]

    base = parse(["--epochs", str(args.epochs)])
    limit_image_size(base.max_megapixels)
    index = main.split_data(base)["train"]
    flags_of = {}
    for name, flags in grid.items():
        try:
            flags_of[name] = with_same_steps(flags, parse, base, index)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        print(f"{name}: {shlex.join(flags_of[name])}, {sum(steps_of(parse(flags_of[name]), index))} steps")
    runs = []
    for seed, name in itertools.product(args.seeds, grid):
        folder = ablate_dir / f"{slug(name)}_seed{seed}"
        runs.append(Run(name, seed, [*common, *flags_of[name], "--seed", str(seed)], folder))
    if len({run.folder for run in runs}) < len(runs):
        raise UserError("--grid / --seeds: two runs would have the same folder; give each a name of its own")
    return runs


def with_same_steps(flags, parse, base, index):
    """Flags of a remedy with the epochs that come nearest to the steps of `base`, and as many steps of warm-up."""
    wanted = steps_of(base, index)
    parse(with_epochs(flags, base.epochs))  # raises what is wrong with the flags

    def total(epochs):
        try:
            return sum(steps_of(parse(with_epochs(flags, epochs)), index))
        except UserError:  # so few epochs that a share of them is none
            return 0

    first_enough = 1 + bisect_left(range(1, 100 * base.epochs), sum(wanted), key=total)
    epochs = min((max(1, first_enough - 1), first_enough), key=lambda epochs: abs(total(epochs) - sum(wanted)))
    chosen = with_epochs(flags, epochs)
    warmup = base.warmup_epochs * wanted[0] / steps_of(parse(chosen), index)[0]
    return ["--warmup_epochs", f"{warmup:.4g}", *chosen]  # in front: a remedy may name its own


def steps_of(args, index):
    """-> the optimizer's steps in each epoch of a training on `index`."""
    stages = main.plan_stages(args, index, main.make_loss(args, index.counts()), torch.device("cpu"))
    return [stage.steps(args.grad_accum) for stage in stages for _ in range(stage.start, stage.end)]


def slug(name):
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower())


class Grid:
    """The runs at work, `jobs` at once, until all are finished or one signal stops them."""

    def __init__(self, runs, jobs):
        self.waiting, self.jobs = [run for run in runs if not run.is_finished()], jobs
        self.at_work, self.errors, self.told_to_end = {}, [], set()  # {slot: (run, process)}

    def train_all(self, signals):
        """Raises UserError for runs that failed, after all others."""
        with signals.deferred():
            try:
                while self.waiting or self.at_work:
                    if signals.stopped:
                        self.waiting = []
                        self.stop()
                    self.start_what_fits()
                    self.close_what_has_ended()
                    time.sleep(POLL_SECONDS)
            finally:
                self.stop()
                for _, process in self.at_work.values():
                    process.wait()
        if self.errors:
            raise UserError(f"{len(self.errors)} runs failed; {self.errors[-1]}")

    def stop(self):
        for _, process in self.at_work.values():
            process.stop()

    def start_what_fits(self):
        for slot in set(range(self.jobs)) - self.at_work.keys():
            # what an ablate.py that was killed has left saves and ends first
            free = (run for run in self.waiting if not is_left_over(run.folder, self.told_to_end))
            if run := next(free, None):
                self.waiting.remove(run)
                self.at_work[slot] = run, TrialProcess(run.flags, run.folder, self.jobs, slot)

    def close_what_has_ended(self):
        for slot, (run, process) in list(self.at_work.items()):
            if process.status is None:
                continue
            del self.at_work[slot]
            if process.status == 0:
                keep_best_model_only(run.folder)
                print(f"{run.remedy}, seed {run.seed}: done, {minutes_of(run):.1f} min")
            elif not process.was_stopped:
                self.errors.append(f"{run.remedy}, seed {run.seed}: {process.error()}")
                print(self.errors[-1])


# --------------------------------------------------------------------------------------------------------- the figures


def read_run(run):
    """-> (results, paths, targets, {"raw": predictions, "posthoc": predictions}) of a finished run's test images."""
    results = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
    with open(run.folder / "test_predictions.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    targets = np.array([results["classes"].index(row["label"]) for row in rows])
    probabilities = np.array([[float(row[f"prob_{name}"]) for name in results["classes"]] for row in rows])
    adjusted = posthoc.adjust(probabilities, results["samples_per_cls"], results["posthoc"]["tau"])
    predictions = {"raw": probabilities.argmax(axis=1), "posthoc": adjusted.argmax(axis=1)}
    return results, [row["path"] for row in rows], targets, predictions


def resampled_figures(targets, predictions, num_classes, seed):
    """Balanced accuracy and macro F1 of bootstrap resamples, stratified by class, the same for every prediction.

    -> {"balanced_acc", "macro_f1"}, each (1 + RESAMPLES,): first that of the images themselves.
    """
    rng = np.random.default_rng(seed)
    weights = np.zeros((1 + RESAMPLES, len(targets)), np.float32)
    weights[0] = 1
    for members in (np.flatnonzero(targets == c) for c in np.unique(targets)):
        weights[1:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), RESAMPLES)
    cells = np.eye(num_classes**2, dtype=np.float32)[targets * num_classes + predictions]
    matrices = (weights @ cells).reshape(-1, num_classes, num_classes).astype(np.float64)
    figures = confusion_figures(matrices)
    return {name: figures[name] for name in ("balanced_acc", "macro_f1")}


def compare(runs, baseline):
    """-> [row of the table a remedy]: mean over the seeds, its interval, and the paired difference to the baseline.

    The interval and the test tell what other test images would have given; `std` what other seeds (and splits) gave.
    """
    by_remedy, lines = {}, {}
    for run in runs:
        results, paths, targets, predictions = read_run(run)
        kinds = {run.remedy: predictions["raw"]}
        if run.remedy == baseline:
            kinds[POSTHOC.format(baseline)] = predictions["posthoc"]
        for name, chosen in kinds.items():
            figures = resampled_figures(targets, chosen, len(results["classes"]), run.seed)
            by_remedy.setdefault(name, {})[run.seed] = figures
        lines.setdefault(run.remedy, []).append((run, results, paths))
    for of_seed in zip(*lines.values(), strict=True):
        if len({tuple(paths) for _, _, paths in of_seed}) > 1:
            raise UserError(f"the runs of seed {of_seed[0][0].seed} were not tested on the same images; start anew")
    table = []
    for name, of_seeds in by_remedy.items():
        row = {"remedy": name}
        for metric in ("balanced_acc", "macro_f1"):
            mean = np.mean([figures[metric] for figures in of_seeds.values()], axis=0)
            difference = mean - np.mean([figures[metric] for figures in by_remedy[baseline].values()], axis=0)
            row[metric], row[f"{metric}_ci"] = mean[0], np.percentile(mean[1:], [2.5, 97.5])
            of_each = [figures[metric][0] for figures in of_seeds.values()]
            row[f"{metric}_std"] = np.std(of_each, ddof=1) if len(of_each) > 1 else 0.0
            row[f"{metric}_difference"] = difference[0]
            row[f"{metric}_difference_ci"] = np.percentile(difference[1:], [2.5, 97.5])
            side = min(np.mean(difference[1:] <= 0), np.mean(difference[1:] >= 0))
            row[f"{metric}_p"] = min(1.0, 2 * max(side, 1 / RESAMPLES))
        table.append(row | about_runs(lines.get(name, [])))
    return table


def about_runs(lines):
    if not lines:
        return {"posthoc": None, "tau": None, "minutes": 0.0, "recalls": None}
    counts = np.array(lines[0][1]["samples_per_cls"])
    rarest = [lines[0][1]["classes"][i] for i in np.argsort(counts, kind="stable")[:RAREST]]
    recalls = {
        name: np.mean([results["test"]["per_class"][name]["recall"] for _, results, _ in lines]) for name in rarest
    }
    return {
        "posthoc": np.mean([results["posthoc"]["test"]["balanced_acc"] for _, results, _ in lines]),
        "tau": np.mean([results["posthoc"]["tau"] for _, results, _ in lines]),
        "minutes": np.mean([minutes_of(run) for run, _, _ in lines]),
        "recalls": recalls,
    }


def minutes_of(run):
    with open(run.folder / "history.csv", encoding="utf-8", newline="") as file:
        return sum(float(row["seconds"]) for row in csv.DictReader(file)) / 60


# --------------------------------------------------------------------------------------------------------- the results


def write_csv_of(path, runs):
    """One row a run."""
    rows = []
    for run in runs:
        results = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
        row = {"remedy": run.remedy, "seed": run.seed, "minutes": round(minutes_of(run), 1)}
        for kind, figures in (("", results["test"]), ("posthoc_", results["posthoc"]["test"])):
            row |= {f"{kind}{name}": figures[name] for name in ("balanced_acc", "macro_f1", "acc", "ece")}
        row["tau"] = results["posthoc"]["tau"]
        row |= {f"recall_{name}": figures["recall"] for name, figures in results["test"]["per_class"].items()}
        rows.append({**row, "best_epoch": results["best_epoch"], "run_dir": run.folder, "flags": shlex.join(run.flags)})
    write_csv(path, list(rows[0]), rows)


def markdown(table, baseline, seeds):
    rarest = next(row["recalls"] for row in table if row["recalls"])
    heads = [
        "remedy", "balanced accuracy", "macro F1", f"to {baseline}", "p", *(f"recall {name}" for name in rarest),
        "post hoc", "tau", "minutes",
    ]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in table:
        difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format(
            row["balanced_acc_difference"], *row["balanced_acc_difference_ci"]
        )
        is_baseline = row["remedy"] == baseline
        cells = [row["remedy"]]
        for metric in ("balanced_acc", "macro_f1"):
            cells.append("{:.3f} [{:.3f}, {:.3f}]".format(row[metric], *row[f"{metric}_ci"]))
            cells[-1] += f" ± {row[f'{metric}_std']:.3f}" if len(seeds) > 1 else ""
        cells += ["", ""] if is_baseline else [difference, f"{row['balanced_acc_p']:.3f}"]
        cells += [f"{row['recalls'][name]:.2f}" if row["recalls"] else "" for name in rarest]
        cells += [f"{row['posthoc']:.3f}", f"{row['tau']:.2f}", f"{row['minutes']:.0f}"] if row["recalls"] else [""] * 3
        lines.append(f"| {' | '.join(cells)} |")
    about = (
        f"Mean over seeds {' '.join(map(str, seeds))} of the test images; in brackets the 95 % interval of a bootstrap "
        "over them, stratified by class; ± standard deviation over the seeds, each with its own split. Difference and "
        "p: paired bootstrap, balanced accuracy. Post hoc: balanced accuracy with logit adjustment by tau, fitted on "
        "the validation images."
    )
    return "\n".join([*lines, "", about, ""])


def plot(path, table):
    figure = Figure(figsize=(11, 1.2 + 0.42 * len(table)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = {"balanced_acc": "balanced accuracy", "macro_f1": "macro F1"}
    heights = np.arange(len(table))[::-1]
    for axes, (metric, title) in zip(panels, names.items(), strict=True):
        values = np.array([row[metric] for row in table])
        low, high = np.array([row[f"{metric}_ci"] for row in table]).T
        axes.errorbar(values, heights, xerr=[values - low, high - values], fmt="o", capsize=3)
        axes.axvline(values[0], color="0.6", linestyle=":")
        axes.set_title(f"{title}, test, 95 % intervals")
        axes.grid(alpha=0.3)
    panels[0].set_yticks(heights, [row["remedy"] for row in table])
    save_figure(figure, path)


def run(argv):
    args, main_flags = build_parser().parse_known_args(argv)
    grid = read_grid(args.grid)
    baseline = args.baseline or next(iter(grid))
    if baseline not in grid:
        raise UserError(f"--baseline: {baseline} is none of {', '.join(grid)}")
    for words in (main_flags, *map(str.split, grid.values())):
        check_no_own_flags(words, OWN_FLAGS | {"seed"})
    with Signals() as signals, own_folder(args.ablate_dir, "--ablate_dir") as folder:
        runs = plan_runs(args, main_flags, grid, folder)
        check_same_flags(folder / "ablation.json", runs)
        Grid(runs, args.jobs).train_all(signals)
        write_results(folder, runs, baseline, args.seeds)


def write_results(folder, runs, baseline, seeds):
    table = compare(runs, baseline)
    table.sort(key=lambda row: row["remedy"] != baseline)  # the baseline first, the others as in the grid
    write_csv_of(folder / "ablation.csv", runs)
    text = markdown(table, baseline, seeds)
    with atomic_write(folder / "ablation.md") as file:
        file.write(text)
    plot(folder / "ablation.png", table)
    print(f"{text}\nresults lie in {folder}")


def check_same_flags(path, runs):
    """Raise UserError if the runs of the folder were begun with other flags."""
    flags = {run.folder.name: run.flags for run in runs}
    former = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in flags:
        if flags[name] != former.get(name, flags[name]):
            raise UserError(f"--ablate_dir: {path.parent / name} was begun with other flags; name another folder")
    with atomic_write(path) as file:
        json.dump({**former, **flags}, file, indent=1)


def main_ablate(argv=None):
    """-> exit status, as main.py's."""
    return exit_status(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main_ablate())
