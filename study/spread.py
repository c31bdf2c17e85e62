"""Mean and spread of the metrics of several runs."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from run.files import read_json

SPREAD_METRICS = ("balanced_acc", "macro_f1", "acc")


def spread_over(run_dirs: Sequence[Path]) -> dict[str, dict]:
    """-> {metric: {"mean", "std", "values"}} of `results.json` over runs: test_..., test_posthoc_... and val_...

    std: sample standard deviation, None for one run.
    """
    values = {}
    for run_dir in run_dirs:
        results = read_json(Path(run_dir) / "results.json")
        evaluated = {"test": results["test"], "test_posthoc": results.get("posthoc", {}).get("test")}
        for title, metrics in {**evaluated, "val": results.get("val")}.items():
            for name in SPREAD_METRICS if metrics else ():
                values.setdefault(f"{title}_{name}", []).append(metrics[name])
    spread = {}
    for name, of_runs in values.items():
        std = statistics.stdev(of_runs) if len(of_runs) > 1 else None
        spread[name] = {"mean": statistics.mean(of_runs), "std": std, "values": of_runs}
    return spread


def print_spread(title: str, spread: dict[str, dict]) -> None:
    print(f"{title}:")
    for name, summary in spread.items():
        std = "" if summary["std"] is None else f" +- {summary['std']:.3f}"
        values = ", ".join(f"{value:.3f}" for value in summary["values"])
        print(f"{name:>26} {summary['mean']:.3f}{std}  ({values})")
