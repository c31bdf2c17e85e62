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
