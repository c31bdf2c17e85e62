"""Whether prediction sets hold their promise on the test images of finished runs, class by class.

    python tests/tools/coverage_check.py RUN... [--coverage 0.9]      run folders, or the folder of a cross-validation

The test images of each run or fold are predicted by its own model, whose sets are those of its own validation images.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from inference import find_checkpoints, load
from run.files import read_predictions


def measure(runs: list[str], coverage: float) -> list[tuple[str, int, int, float, float, float]]:
    """-> rows of each class, and of all: (class, validation images per model, test images, share with the truth in the
    set, mean number of classes in the set, share of sets of one class)"""
    targets, sets, val_counts = [], [], []
    for path in find_checkpoints(runs):
        grader = load(path, "cpu", coverage=coverage)
        _, true, probabilities = read_predictions(path.parent / "test_predictions.csv", grader.classes)
        targets.append(true)
        sets.append(grader.prediction_sets(probabilities[None].astype(np.float32)))
        val_counts.append(grader.prediction_sets.counts)
    targets, sets, val_counts = np.concatenate(targets), np.concatenate(sets), np.mean(val_counts, axis=0)
    is_covered, sizes = sets[np.arange(len(targets)), targets], sets.sum(axis=1)
    rows = []
    for name, members, val_count in [
        *((name, targets == c, val_counts[c]) for c, name in enumerate(grader.classes)),
        ("all", np.full(len(targets), True), val_counts.sum()),
    ]:
        chosen = is_covered[members].mean(), sizes[members].mean(), (sizes[members] == 1).mean()
        rows.append((name, round(float(val_count)), int(members.sum()), *map(float, chosen)))
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--coverage", type=float, default=0.9)
    args = parser.parse_args(argv)
    print("| class | validation images | test images | coverage | mean size | one class |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, num_val, num_test, covered, size, single in measure(args.runs, args.coverage):
        print(f"| {name} | {num_val} | {num_test} | {covered:.2f} | {size:.2f} | {single:.0%} |")


if __name__ == "__main__":
    main()
