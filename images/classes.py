"""`--merge` and `--drop`: several classes trained as one, and classes left out."""

import unicodedata
from collections.abc import Iterable, Sequence

from images.layout import enumerated
from run.cli import UserError, split_merge


class ClassNames:
    """What the classes of the data are called in the training."""

    def __init__(self, merge: Sequence[str] | None = None, drop: Sequence[str] | None = None):
        """merge: each as `split_merge` reads it; drop: names. Raises UserError for a class that is listed twice."""
        self.new_names, self.dropped = {}, set(map(_composed, drop or ()))
        for rule in merge or ():
            names, new_name = split_merge(rule)
            for name in names:
                name = _composed(name)
                if name in self.new_names or name in self.dropped:
                    where = "in --merge and in --drop" if name in self.dropped else "twice"
                    raise UserError(f"--merge: class {name!r} is listed {where}; keep one of them")
                self.new_names[name] = _composed(new_name)

    def of(self, name: str) -> str | None:
        """-> the name under which a class is trained, None if it is left out."""
        return None if name in self.dropped else self.new_names.get(name, name)

    def check(self, found: Iterable[str]) -> None:
        """Raise UserError for a name in --merge or --drop that is not one of the classes `found`."""
        found = set(found) - {""}
        for flag, names in (("--merge", self.new_names), ("--drop", self.dropped - {""})):
            for name in names:
                if name not in found:
                    raise UserError(f"{flag}: there is no class {name!r}; the classes are {enumerated(sorted(found))}")

    def merged(self) -> dict[str, list[str]]:
        """-> {new name: the classes that `--merge` lists for it}"""
        result = {}
        for name, new_name in self.new_names.items():
            result.setdefault(new_name, []).append(name)
        return result


def _composed(name):
    return unicodedata.normalize("NFC", name.strip())
