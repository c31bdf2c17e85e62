#!/usr/bin/env python3
"""Compare the remedies for unequal classes on your own images: the same steps, the same images, several seeds.

python ablate.py --data_dirs data/forehead_wrinkles --epochs 30 --seeds 0 1 2

Each remedy is a run of main.py for each seed, with the same number of optimizer steps; flags that are not ablate.py's
go to all of them. Broken off, the same command goes on. At the end: ablation.csv, ablation.md, ablation.png.
"""

import argparse
import itertools
import json
import shlex
import sys
import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure

import main
import posthoc
from files import UserError, atomic_write, own_folder, read_json, read_predictions, read_rows, write_csv
from flags import Parser, number, parse_args
from image_cache import limit_image_size
from leaks import group_names
from metrics import INTERVAL, Bootstrap, confusion_figures
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
RESAMPLES, CHUNK = 2000, 100
METRICS = ("balanced_acc", "macro_f1")
RAREST = 3  # classes whose recall the table shows
POLL_SECONDS = 1
# flags that must be the same for all
GIVEN_TO_ALL = OWN_FLAGS | {
    "seed", "epochs", "data_dirs", "val_dirs", "test_dirs", "split", "group_regex", "skip_broken", "wandb_mode", "help",
}  # fmt: skip


def build_parser():
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, prog="ablate.py"
    )
    add = parser.add_argument
    add("--epochs", type=number(int, low=1), required=True, metavar="E", help="of the baseline; all get its steps")
    add("--seeds", type=number(int, low=0, below=2**32), nargs="+", default=[0, 1, 2], metavar="N", help="[0 1 2]")
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
        text = Path(path).read_text(encoding="utf-8")
        grid = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"--grid: {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--grid: {path} is no yaml: {' '.join(str(error).split())}") from error
    if not isinstance(grid, dict) or not grid:
        raise UserError(f"--grid: {path}: a mapping is wanted, from a name to a text of main.py's flags")
    names = Counter(key.value for key, _ in yaml.compose(text).value)  # safe_load keeps the last of a name
    if max(names.values()) > 1:
        raise UserError(f"--grid: {path}: {names.most_common(1)[0][0]} is there twice")
    for name, flags in grid.items():
        if not isinstance(flags, str):
            raise UserError(f'--grid: {path}: {name}: a text of flags is wanted, "" for none')
        try:
            check_no_own_flags(shlex.split(flags), GIVEN_TO_ALL)
        except (ValueError, UserError) as error:
            raise UserError(f"--grid: {path}: {name}: {error}") from error
    return {str(name): flags for name, flags in grid.items()}


def with_epochs(flags, epochs):
    """Flags of a remedy, `0.8E` put into figures, and `--epochs`."""
    words = []
    for word in shlex.split(flags):
        share = word.removesuffix("E")
        if word != share and share.replace(".", "", 1).isdecimal():
            word = str(round(float(share) * epochs))
            if word in ("0", str(epochs)) and 0 < float(share) < 1:
                raise UserError(f"{share}E: there is no such share of {epochs} epochs; take more --epochs")
        words.append(word)
    return [*words, "--epochs", str(epochs)]


def plan_runs(args, main_flags, grid, ablate_dir):
    """-> ([Run], seed by seed, number of images). Reads the images once, to count steps, and checks every flag."""
    common = ["--augment_all", *main_flags, "--wandb_mode", "disabled"]

    def parse(flags):
        return parse_args([*common, *flags], ablate_dir)[0]

    base = parse(["--epochs", str(args.epochs)])
    limit_image_size(base.max_megapixels)
    parts = main.split_data(base)
    index, flags_of = parts["train"], {}
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
    return runs, sum(map(len, parts.values()))


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


@dataclass
class Tested:
    """What a finished run says of its test images."""

    run: Run
    results: dict
    paths: list
    targets: np.ndarray  # (N,)
    predictions: dict  # {"raw", "posthoc"}, each (N,)
    persons: list  # a name an image, or nothing without --group_regex


def read_run(run):
    results = read_json(run.folder / "results.json")
    paths, targets, probabilities = read_predictions(run.folder / "test_predictions.csv", results["classes"])
    fitted = {name: results["posthoc"][name] for name in ("tau", "temperature")}
    adjusted = posthoc.adjust(probabilities, results["samples_per_cls"], **fitted)
    predictions = {"raw": probabilities.argmax(axis=1), "posthoc": adjusted.argmax(axis=1)}
    pattern = read_json(run.folder / "args.json")["group_regex"]
    return Tested(run, results, paths.tolist(), targets, predictions, group_names(paths, pattern) if pattern else [])


def read_runs(runs):
    """-> {remedy: [Tested a seed]}. Raises UserError if those of a seed were not tested on the same images."""
    tested = {}
    for run in runs:
        tested.setdefault(run.remedy, []).append(read_run(run))
    for of_seed in zip(*tested.values(), strict=True):
        if len({tuple(test.paths) for test in of_seed}) > 1:
            raise UserError(f"the runs of seed {of_seed[0].run.seed} were not tested on the same images; start anew")
    return tested


def drawn_images(tests):
    """Resamples of the images of several tests, which may share some. -> a generator of {path: times drawn (B,)}.

    tests: [Tested]. Stratified by class, of persons where they are told; see `Bootstrap`. First B = 1: the images
    themselves.
    """
    target_of, person_of = {}, {}
    for test in tests:
        target_of |= zip(test.paths, test.targets, strict=True)
        person_of |= zip(test.paths, test.persons, strict=False)
    groups = np.unique(list(person_of.values()), return_inverse=True)[1] if person_of else None
    bootstrap = Bootstrap(np.array(list(target_of.values())), groups)
    rng = np.random.default_rng(0)
    yield dict.fromkeys(target_of, np.ones(1, np.int32))
    for start in range(0, RESAMPLES, CHUNK):
        drawn = bootstrap.draw(min(CHUNK, RESAMPLES - start), rng)
        yield dict(zip(target_of, drawn.T, strict=True))


def resampled_figures(by_remedy, tests):
    """-> {remedy: {"balanced_acc", "macro_f1": (1 + RESAMPLES, S)}}, S seeds; first those of the images themselves.

    by_remedy: {remedy: [predictions (N,) a seed]}; tests: [Tested a seed]. Every remedy is given the same images, and
    every seed the same times of an image that it has.
    """
    num_classes = len(tests[0].results["classes"])
    one_hot = np.eye(num_classes**2, dtype=np.float32)
    chunks = {name: [] for name in by_remedy}
    for times_drawn in drawn_images(tests):
        weights = [np.stack([times_drawn[path] for path in test.paths], axis=1).astype(np.float32) for test in tests]
        for name, predictions in by_remedy.items():
            cells = [one_hot[test.targets * num_classes + of] for test, of in zip(tests, predictions, strict=True)]
            matrices = np.stack([w @ of_seed for w, of_seed in zip(weights, cells, strict=True)], axis=1)
            figures = confusion_figures(matrices.reshape(-1, num_classes, num_classes).astype(np.float64))
            chunks[name].append({metric: figures[metric].reshape(-1, len(tests)) for metric in METRICS})
    return {
        name: {metric: np.concatenate([chunk[metric] for chunk in of]) for metric in METRICS}
        for name, of in chunks.items()
    }


def compare(tested, baseline):
    """-> [row of the table a remedy]: mean over the seeds, its interval, and the paired difference to the baseline.

    A resample draws test images and seeds, both the same for every remedy: intervals and p tell what other images and
    other trainings would have given, as far as few seeds can. tested: of `read_runs`.
    """
    by_remedy = {}
    for name, tests in tested.items():
        by_remedy[name] = [test.predictions["raw"] for test in tests]
        if name == baseline:
            by_remedy[POSTHOC.format(name)] = [test.predictions["posthoc"] for test in tests]
    figures = resampled_figures(by_remedy, tested[baseline])
    seeds = len(tested[baseline])
    drawn = np.random.default_rng(1).multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES)
    # stretched: the spread of a bootstrap of few is too small by (n - 1) / n (Hesterberg 2015, sec. 3.2)
    weights = 1 / seeds + np.concatenate([np.zeros((1, seeds)), drawn - 1]) / np.sqrt(seeds * max(1, seeds - 1))
    means = {name: {metric: (of[metric] * weights).sum(axis=1) for metric in METRICS} for name, of in figures.items()}
    table = []
    for name, mean in means.items():
        row = {"remedy": name}
        for metric in METRICS:
            of_seeds = figures[name][metric][0]
            row[f"{metric}_std"] = np.std(of_seeds, ddof=1) if seeds > 1 else 0.0
            differences = of_seeds - figures[baseline][metric][0]
            row[f"{metric}_agreeing"] = int((np.sign(differences) == np.sign(differences.mean())).sum())
            of_metric = summarise(mean[metric], means[baseline][metric])
            row |= {f"{metric}{suffix}": value for suffix, value in of_metric.items()}
        table.append(row | about_runs(tested.get(name, [])))
    others = [row for row in table if row["remedy"] != baseline]
    for metric in METRICS:
        for row, p in zip(others, holm([row[f"{metric}_p"] for row in others]), strict=True):
            row[f"{metric}_p"] = p
    return table


def summarise(values, of_baseline):
    """(1 + RESAMPLES,) each, first the figure itself -> {suffix: figure, interval, paired difference, p}."""
    difference = values - of_baseline
    side = min(np.mean(difference[1:] <= 0), np.mean(difference[1:] >= 0))
    return {
        "": values[0],
        "_ci": np.percentile(values[1:], INTERVAL),
        "_difference": difference[0],
        "_difference_ci": np.percentile(difference[1:], INTERVAL),
        "_p": min(1.0, 2 * max(side, 1 / RESAMPLES)),
    }


def holm(p_values):
    """p values corrected for their number (Holm 1979)."""
    order = np.argsort(p_values)
    corrected = np.maximum.accumulate(np.array(p_values)[order] * np.arange(len(p_values), 0, -1))
    return np.minimum(1, corrected)[np.argsort(order)].tolist()


def about_runs(tests):
    if not tests:
        return {"validation": None, "posthoc": None, "tau": None, "minutes": 0.0, "recalls": None}
    results = [test.results for test in tests]
    counts = np.array(results[0]["samples_per_cls"])
    rarest = [results[0]["classes"][i] for i in np.argsort(counts, kind="stable")[:RAREST]]
    return {
        "validation": np.mean([of["val"]["balanced_acc"] for of in results]),
        "posthoc": np.mean([of["posthoc"]["test"]["balanced_acc"] for of in results]),
        "tau": np.mean([of["posthoc"]["tau"] for of in results]),
        "minutes": np.mean([minutes_of(test.run) for test in tests]),
        "recalls": {name: np.mean([of["test"]["per_class"][name]["recall"] for of in results]) for name in rarest},
    }


def minutes_of(run):
    return sum(float(row["seconds"]) for row in read_rows(run.folder / "history.csv")) / 60


# --------------------------------------------------------------------------------------------------------- the results


def write_csv_of(path, tested):
    """One row a run, seed by seed."""
    rows = []
    for test in itertools.chain.from_iterable(zip(*tested.values(), strict=True)):
        run, results = test.run, test.results
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
        "post hoc", "tau", "validation", "minutes",
    ]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in table:
        difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format(
            row["balanced_acc_difference"], *row["balanced_acc_difference_ci"]
        )
        difference += f", {row['balanced_acc_agreeing']} of {len(seeds)} seeds" if len(seeds) > 1 else ""
        is_baseline = row["remedy"] == baseline
        cells = [row["remedy"]]
        for metric in METRICS:
            cells.append("{:.3f} [{:.3f}, {:.3f}]".format(row[metric], *row[f"{metric}_ci"]))
            cells[-1] += f" ± {row[f'{metric}_std']:.3f}" if len(seeds) > 1 else ""
        cells += ["", ""] if is_baseline else [difference, f"{row['balanced_acc_p']:.3f}"]
        cells += [f"{row['recalls'][name]:.2f}" if row["recalls"] else "" for name in rarest]
        kinds = {"posthoc": ".3f", "tau": ".2f", "validation": ".3f", "minutes": ".0f"}
        cells += [format(row[name], kind) if row["recalls"] else "" for name, kind in kinds.items()]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    about = (
        f"Test images, mean over seeds {' '.join(map(str, seeds))}; in brackets the 95 % interval of a bootstrap of "
        "images, stratified by class, and of seeds; ± standard deviation over the seeds. Difference and p: balanced "
        "accuracy, paired, in how many seeds it has this sign, p corrected by Holm for the number of remedies; of few "
        "seeds they know little of what another training would give, of one nothing. Post hoc: balanced accuracy with "
        "logit adjustment by tau, fitted on validation images. Validation: balanced accuracy there, by which to choose."
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
    panels[0].set_yticks(heights, [row["remedy"] for row in table], parse_math=False)
    save_figure(figure, path)


def run(argv):
    args, main_flags = build_parser().parse_known_args(argv)
    grid = read_grid(args.grid)
    baseline = args.baseline or next(iter(grid))
    if baseline not in grid:
        raise UserError(f"--baseline: {baseline} is none of {', '.join(grid)}")
    check_no_own_flags(main_flags, OWN_FLAGS | {"seed", "wandb_mode"})
    with Signals() as signals, own_folder(args.ablate_dir, "--ablate_dir") as folder:
        runs, num_images = plan_runs(args, main_flags, grid, folder)
        check_same_begin(folder / "ablation.json", runs, num_images)
        Grid(runs, args.jobs).train_all(signals)
        write_results(folder, runs, baseline, args.seeds)


def write_results(folder, runs, baseline, seeds):
    tested = read_runs(runs)
    table = compare(tested, baseline)
    table.sort(key=lambda row: row["remedy"] != baseline)  # the baseline first, the others as in the grid
    write_csv_of(folder / "ablation.csv", tested)
    text = markdown(table, baseline, seeds)
    with atomic_write(folder / "ablation.md") as file:
        file.write(text)
    plot(folder / "ablation.png", table)
    print(f"{text}\nresults lie in {folder}")


def check_same_begin(path, runs, num_images):
    """Raise UserError if the runs of the folder were begun with other flags or images."""
    flags = {run.folder.name: run.flags for run in runs}
    try:
        former = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"images": num_images, "flags": {}}
        former_images, former_flags = former["images"], former["flags"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--ablate_dir: {path} is damaged; name another folder") from error
    if former_images != num_images:
        raise UserError(f"--ablate_dir: began with {former_images} images, now {num_images}; name another folder")
    for name in flags:
        if flags[name] != former_flags.get(name, flags[name]):
            raise UserError(f"--ablate_dir: {path.parent / name} was begun with other flags; name another folder")
    with atomic_write(path) as file:
        json.dump({"images": num_images, "flags": {**former_flags, **flags}}, file, indent=1)


def main_ablate(argv=None):
    """-> exit status, as main.py's."""
    return exit_status(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main_ablate())
