"""How many of the doubtful labels are wrong: photographs with some labels changed on purpose.

python tests/tools/label_issues_check.py flip PHOTOS FOLDER    # links, and FOLDER.csv: what was changed
python main.py --data_dirs FOLDER --folds 3 --run_dir runs/cv
python tests/tools/label_issues_check.py check FOLDER runs/cv
"""

import csv
import os
import random
import sys
from pathlib import Path

SHARE = 0.05  # of the labels
MAX_PER_CLASS = 1000  # photographs
FIRST = (20, 50, 100, 200)


def flip(source, folder):
    """Link the photographs of class folders, SHARE of them in the folder of another class, drawn at random."""
    rng = random.Random(0)
    classes = sorted(path.name for path in source.iterdir() if path.is_dir())
    photos = [(name, path) for name in classes for path in sorted((source / name).iterdir())[:MAX_PER_CLASS]]
    flipped, rows = set(rng.sample(range(len(photos)), round(SHARE * len(photos)))), []
    for i, (name, path) in enumerate(photos):
        label = rng.choice([other for other in classes if other != name]) if i in flipped else name
        link = folder / label / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(path.resolve(), link)
        if i in flipped:
            rows.append([link.absolute(), name, label])
    with open(f"{folder}.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "class", "label"], *rows])
    print(f"{len(rows)} of {len(photos)} labels changed, listed in {folder}.csv")


def check(folder, cross_validation):
    with open(f"{folder}.csv", newline="", encoding="utf-8") as file:
        flipped = {os.path.abspath(row["path"]) for row in csv.DictReader(file)}
    with open(cross_validation / "label_issues.csv", newline="", encoding="utf-8") as file:
        found = [os.path.abspath(row["path"]) in flipped for row in csv.DictReader(file)]
    print(f"{len(flipped)} labels changed, {sum(found)} of them among the {len(found)} doubtful ones")
    for number in FIRST:
        print(f"first {number}: {sum(found[:number])} changed, {sum(found[:number]) / number:.0%}")


if __name__ == "__main__":
    command, first, second = sys.argv[1], *map(Path, sys.argv[2:])
    {"flip": flip, "check": check}[command](first, second)
