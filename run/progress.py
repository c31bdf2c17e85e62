"""How far a training is."""

import math
from dataclasses import dataclass, field


@dataclass
class Progress:
    """How far a training is: the last finished epoch, the best one, and the rows of `history.csv`."""

    epoch: int = -1
    best_metric: float = -math.inf
    best_epoch: int = -1
    history: list[dict] = field(default_factory=list)

    def add_epoch(self, row: dict, best_metric_name: str) -> bool:
        """-> whether this epoch is the best so far."""
        self.epoch = row["epoch"]
        self.history.append(row)
        improved = row[best_metric_name] > self.best_metric
        if improved:
            self.best_metric, self.best_epoch = row[best_metric_name], self.epoch
        return improved

    def best_row(self) -> dict | None:
        """The row of the best epoch, None if a resumed run has not reached it again."""
        return next((row for row in self.history if row["epoch"] == self.best_epoch), None)

    def has_stalled(self, patience: int | None, first_epoch: int) -> bool:
        """Whether the best metric has not improved for `patience` epochs, counted from `first_epoch` on."""
        return patience is not None and self.epoch - max(self.best_epoch, first_epoch - 1) >= patience

    def hours_trained(self) -> float:
        """Of all finished epochs, also before the run was resumed."""
        return sum(float(row["seconds"]) for row in self.history) / 3600

    def seconds_left(self, epochs: int) -> float:
        """How long the epochs up to `epochs` will take, if they are like the last three."""
        recent = self.history[-3:]
        return (epochs - 1 - self.epoch) * sum(float(row["seconds"]) for row in recent) / max(1, len(recent))


def print_epoch(row: dict, epochs: int, improved: bool, seconds_left: float) -> None:
    """Print an epoch in one line. row: of `history.csv`."""
    print(
        f"epoch {row['epoch']:3d} ({row['epoch'] + 1}/{epochs})"
        f" | train loss {row['train_loss']:.4f} acc {row['train_acc']:.3f}"
        f" | val loss {row['val_loss']:.4f} acc {row['val_acc']:.3f}"
        f" balanced_acc {row['val_balanced_acc']:.3f} macro_f1 {row['val_macro_f1']:.3f}"
        f" | {row['images_per_second']:.0f} images/s, {row['seconds']:.0f} s, waiting for input {row['input_wait']:.1%}"
        f"{f' | {duration(seconds_left)} left' if seconds_left else ''}{' | best so far' if improved else ''}"
    )


def duration(seconds: float) -> str:
    """-> "45 s", "12 min" or "3 h 05 min" """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
