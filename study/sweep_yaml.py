"""The YAML of a W&B sweep: its keys checked, its distributions as Optuna draws them, its flags of main.py."""

import itertools
import math
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import optuna
import yaml

from run.cli import UserError
from run.files import HISTORY_COLUMNS, read_yaml

KEYS = {
    "": {"program", "method", "metric", "parameters", "early_terminate", "command", "run_cap"}
    | {"name", "description", "project", "entity"},  # only shown by W&B
    "metric": {"name", "goal", "target"},
    "early_terminate": {"type", "min_iter", "max_iter", "s", "eta"},
}
METHODS = ("bayes", "random", "grid")
# {distribution: (required keys, optional keys)}
DISTRIBUTIONS = {
    "constant": ({"value"}, set()),
    "categorical": ({"values"}, {"probabilities"}),
    "int_uniform": ({"min", "max"}, set()),
    "uniform": ({"min", "max"}, set()),
    "q_uniform": ({"min", "max"}, {"q"}),
    "log_uniform": ({"min", "max"}, set()),
    "log_uniform_values": ({"min", "max"}, set()),
    "q_log_uniform": ({"min", "max"}, {"q"}),
    "q_log_uniform_values": ({"min", "max"}, {"q"}),
    "inv_log_uniform": ({"min", "max"}, set()),
    "inv_log_uniform_values": ({"min", "max"}, set()),
    "normal": (set(), {"mu", "sigma"}),
    "q_normal": (set(), {"mu", "sigma", "q"}),
    "log_normal": (set(), {"mu", "sigma"}),
    "q_log_normal": (set(), {"mu", "sigma", "q"}),
}
PROGRAM, ARGS, NO_FALSE = "${program}", ("${args}", "${args_no_equals}"), "${args_no_boolean_flags}"
VARIABLE = re.compile(r"\$\{envvar:(\w+)\}")
QUANTILES = optuna.distributions.FloatDistribution(1e-6, 1 - 1e-6)  # of normal distributions, whose range is infinite


class Parameter:
    """One parameter of a sweep. `distribution`: what Optuna draws from, None for a constant; see `value`."""

    def __init__(self, name: str, spec: dict):
        """spec: the parameter's mapping in the YAML. Raises UserError, naming the parameter, if it is invalid."""
        self.name = name
        if not isinstance(spec, dict):
            raise UserError(f"parameters.{name}: expected a mapping such as {{value: 3}}, not {spec!r}")
        self.kind = spec.get("distribution") or _kind_of(name, spec)
        if not isinstance(self.kind, str) or self.kind not in DISTRIBUTIONS:
            raise UserError(f"parameters.{name}.distribution: {self.kind} is not one of {', '.join(DISTRIBUTIONS)}")
        required, optional = DISTRIBUTIONS[self.kind]
        keys = set(spec) - {"distribution"}
        if required - keys:
            raise UserError(f"parameters.{name}: {self.kind} needs {' and '.join(sorted(required - keys))}")
        if keys - required - optional:
            extra = ", ".join(sorted(map(str, keys - required - optional)))
            raise UserError(f"parameters.{name}: {self.kind} has no key {extra}")
        self.spec = {"mu": 0, "sigma": 1, "q": 1, **spec}
        self._check_numbers()
        self._check_values()
        try:
            self.distribution = self._distribution()
            self.samples()
        except (ValueError, OverflowError) as error:
            hint = "; its min and max are exponents" if self.kind.endswith("log_uniform") else ""
            raise UserError(f"parameters.{name}: invalid {self.kind} ({error}{hint})") from error

    def _check_numbers(self):
        for key in ("min", "max", "mu", "sigma", "q"):
            value = self.spec.get(key, 1)
            try:
                number = value if isinstance(value, int) else float(value)  # YAML reads 1e-5 as a string
            except (TypeError, ValueError):
                number = math.nan
            if isinstance(value, bool) or not math.isfinite(number):
                raise UserError(f"parameters.{self.name}.{key}: {value!r} is not a finite number")
            if key in ("q", "sigma") and number <= 0:
                raise UserError(f"parameters.{self.name}.{key}: {value!r} is not above 0")
            self.spec[key] = number
        if self.spec["min"] > self.spec["max"]:
            raise UserError(f"parameters.{self.name}: min must not be above max")
        if self.kind.endswith("_values") and self.spec["min"] <= 0:
            raise UserError(f"parameters.{self.name}: min must be above 0 for {self.kind}")

    def _check_values(self):
        values, shares = self.spec.get("values", [0]), self.spec.get("probabilities")
        if not isinstance(values, list) or not values:
            raise UserError(f"parameters.{self.name}.values: expected a list, not {values!r}")
        for value in values:
            if value != value or not isinstance(value, (str, int, float, list, type(None))):
                raise UserError(f"parameters.{self.name}.values: {value!r} cannot be the value of a flag")
        if shares is None:
            return
        are_numbers = isinstance(shares, list) and all(isinstance(share, (int, float)) for share in shares)
        if not are_numbers or len(shares) != len(values) or not abs(sum(shares) - 1) <= 1e-6 or min(shares) < 0:
            raise UserError(f"parameters.{self.name}.probabilities: expected one per value, with a sum of 1")

    def _distribution(self):
        low, high, q = self.spec["min"], self.spec["max"], self.spec["q"]
        if self.kind == "constant":
            return None
        if self.kind == "categorical":
            if self.spec.get("probabilities"):
                return optuna.distributions.FloatDistribution(0, 1)
            return optuna.distributions.CategoricalDistribution([_simple(value) for value in self.spec["values"]])
        if self.kind == "int_uniform":
            return optuna.distributions.IntDistribution(math.ceil(low), math.floor(high))
        if self.kind == "q_uniform":
            return optuna.distributions.FloatDistribution(_rounded(low, q), _rounded(high, q), step=q)
        if "normal" in self.kind:
            return QUANTILES
        if self.kind.endswith("log_uniform"):  # min and max are exponents, of the inverse for inv_
            low, high = (math.exp(-high), math.exp(-low)) if self.kind[:3] == "inv" else (math.exp(low), math.exp(high))
        return optuna.distributions.FloatDistribution(low, high, log="log" in self.kind)

    def value(self, drawn: Any) -> Any:
        """What Optuna drew -> the value of main.py's flag."""
        if self.kind == "constant":
            return self.spec["value"]
        if self.kind == "categorical" and self.spec.get("probabilities"):
            ends = itertools.accumulate(self.spec["probabilities"])
            return next(
                (v for v, end in zip(self.spec["values"], ends, strict=True) if drawn <= end), self.spec["values"][-1]
            )
        if self.kind == "categorical":
            return next(value for value in self.spec["values"] if _simple(value) == drawn)
        if "normal" in self.kind:
            drawn = NormalDist(self.spec["mu"], self.spec["sigma"]).inv_cdf(drawn)
            drawn = math.exp(drawn) if "log" in self.kind else drawn
        return _rounded(drawn, self.spec["q"]) if self.kind.startswith("q_") else drawn

    def samples(self) -> list:
        """-> values to test main.py's parser with: all choices, or the ends of a range."""
        if "values" in self.spec:
            return self.spec["values"]
        if self.distribution is None:
            return [self.spec["value"]]
        if self.distribution is QUANTILES:
            return [self.value(quantile) for quantile in (0.16, 0.5, 0.84)]
        return [self.value(self.distribution.low), self.value(self.distribution.high)]

    def grid(self) -> list:
        """-> every value that Optuna can draw, once. Raises UserError if there are infinitely many."""
        d = self.distribution
        if isinstance(d, optuna.distributions.CategoricalDistribution):
            return list(dict.fromkeys(d.choices))
        if isinstance(d, optuna.distributions.IntDistribution):
            return list(range(d.low, d.high + 1))
        if getattr(d, "step", None):
            return [d.low + i * d.step for i in range(round((d.high - d.low) / d.step) + 1)]
        if self.spec.get("probabilities"):
            raise UserError(f"parameters.{self.name}.probabilities: method grid takes every value once; delete them")
        raise UserError(f"parameters.{self.name}: method grid needs values, int_uniform or q_uniform, not {self.kind}")


def _kind_of(name, spec):
    """The distribution of a parameter that names none, as W&B chooses it."""
    if "parameters" in spec:
        raise UserError(f"parameters.{name}.parameters: main.py has no nested flags")
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical"
    are_integers = isinstance(spec.get("min"), int) and isinstance(spec.get("max"), int)
    return "int_uniform" if are_integers else "uniform"


def _simple(value):
    """A choice as Optuna can store it: a list (several words of one flag) becomes a string."""
    return yaml.safe_dump(value, default_flow_style=True).strip() if isinstance(value, (list, dict)) else value


def _rounded(value, q):
    """round(value / q) * q, as in W&B's q_ distributions: an integer if q is one."""
    multiple = round(value / q) * q
    return multiple if isinstance(q, int) else float(f"{multiple:.12g}")


@dataclass
class SweepConfig:
    """The checked YAML of a sweep."""

    path: str | Path
    content: dict
    parameters: list[Parameter]

    @property
    def metric(self) -> str:
        return self.content["metric"]["name"]

    @property
    def maximizes(self) -> bool:
        return self.content["metric"].get("goal", "minimize") == "maximize"

    @property
    def target(self) -> float | None:
        return self.content["metric"].get("target")

    def searched(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """-> {name: distribution} of the parameters that are not constant."""
        return {p.name: p.distribution for p in self.parameters if p.distribution is not None}

    def value(self, name: str, drawn: Any) -> Any:
        """What Optuna drew for a parameter -> the value of main.py's flag."""
        return next(p for p in self.parameters if p.name == name).value(drawn)

    def grid(self) -> list[dict] | None:
        """-> [{name: drawn}], every combination, in the order of the YAML; None for another method."""
        if self.content["method"] != "grid":
            return None
        searched = [p for p in self.parameters if p.distribution is not None]
        combinations = itertools.product(*(p.grid() for p in searched))
        return [dict(zip((p.name for p in searched), values, strict=True)) for values in combinations]

    def highest(self, name: str, default: float) -> float:
        """-> the highest value of a searched parameter. default: of main.py's flag, also where it is not searched."""
        chosen = [p for p in self.parameters if p.name == name and p.distribution is not None]
        return max(default if value is None else float(value) for value in chosen[0].samples()) if chosen else default

    def sampler(self, seeds: int | Sequence[int] | None) -> optuna.samplers.BaseSampler:
        """seeds: numbers that decide what is drawn, or None."""
        seed = None if seeds is None else int(np.random.SeedSequence(seeds).generate_state(1)[0])
        if self.content["method"] == "bayes":
            return optuna.samplers.TPESampler(seed=seed)  # its constant liar keeps concurrent trials apart
        return optuna.samplers.RandomSampler(seed=seed)

    def pruner(self, epochs: int) -> optuna.pruners.BasePruner:
        """Hyperband with W&B's keys: the first decision after `min_iter` epochs, or after `max_iter / eta^s`."""
        keys = self.content.get("early_terminate")
        if not keys:
            return optuna.pruners.NopPruner()
        eta = keys.get("eta", 3)
        longest = keys.get("max_iter", epochs)
        first = keys["min_iter"] if "min_iter" in keys else longest // eta ** keys.get("s", 1)
        first = max(1, first)
        return optuna.pruners.HyperbandPruner(first, max(first, longest), eta)

    def flags(self, values: dict) -> list[str]:
        """{parameter: value} -> the command line of main.py after the program, in the order of `command`."""
        words = []
        for word in _words_after_program(self.content.get("command")):
            if word in (*ARGS, NO_FALSE):
                words += self.flags_of({k: v for k, v in values.items() if v is not False or word != NO_FALSE})
            else:
                words.append(VARIABLE.sub(lambda m: os.environ[m[1]], word))
        return words

    @staticmethod
    def flags_of(values: dict) -> list[str]:
        """{parameter: value} -> flags; a list becomes several words after its flag."""
        words = []
        for name, value in values.items():
            words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
        return words


def _words_after_program(command):
    """Raises UserError for a `command` that does not run main.py, or has a macro that is not supported."""
    words = [PROGRAM, *ARGS[:1]] if command is None else command
    if not isinstance(words, list):
        raise UserError(f"command: expected a list of words, not {words!r}")
    words = [str(word) for word in words]
    starts = [i for i, word in enumerate(words) if word == PROGRAM or os.path.basename(word) == "main.py"]
    if not starts:
        raise UserError("command: ${program} is missing")
    words = words[starts[0] + 1 :]
    for word in words:
        for name in VARIABLE.findall(word):
            if name not in os.environ:
                raise UserError(f"command: the environment variable {name} is not set")
        unknown = re.search(r"\$\{[^}]*\}?", VARIABLE.sub("", word))
        if unknown and word not in (*ARGS, NO_FALSE):
            raise UserError(f"command: {unknown[0]} is not supported by search.py")
    return words


def read_sweep(path: str | Path, known_flags: Collection[str]) -> SweepConfig:
    """known_flags: names of main.py's flags. Raises UserError, naming file and key, for a mistake in the YAML."""
    content = read_yaml(path)
    try:
        config = SweepConfig(path, content, _checked(content, known_flags))
        config.grid()  # raises for an infinite grid
        return config
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _checked(content, known_flags):
    if not isinstance(content, dict):
        raise UserError("expected the keys of a sweep: program, method, metric, parameters")
    for place, known in KEYS.items():
        section = content.get(place) if place else content
        if section is not None and not isinstance(section, dict):
            raise UserError(f"{place}: expected a mapping, not {section!r}")
        unknown = [key for key in section or {} if key not in known]
        if unknown:
            key = f"{place}.{unknown[0]}" if place else unknown[0]
            raise UserError(f"{key}: unknown key, expected one of {', '.join(sorted(known))}")
    if os.path.basename(str(content.get("program", "main.py"))) != "main.py":
        raise UserError(f"program: {content['program']} is not main.py")
    if content.get("method") not in METHODS:
        raise UserError(f"method: {content.get('method')} is not one of {', '.join(METHODS)}")
    _check_metric(content.get("metric") or {})
    _check_early_terminate(content.get("early_terminate") or {})
    _words_after_program(content.get("command"))
    cap = content.get("run_cap", 1)
    if not isinstance(cap, int) or isinstance(cap, bool) or cap < 1:
        raise UserError(f"run_cap: {cap!r} is not a positive integer")
    parameters = content.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        raise UserError("parameters: expected a mapping with at least one parameter")
    for name in parameters:
        if name not in known_flags:
            raise UserError(f"parameters.{name}: main.py has no flag --{name}")
    return [Parameter(name, spec) for name, spec in parameters.items()]


def _check_metric(metric):
    names = [name for name in HISTORY_COLUMNS if name.startswith(("val_", "train_"))]
    if metric.get("name") not in names:
        raise UserError(f"metric.name: {metric.get('name')} is not one of {', '.join(names)}")
    if metric.get("goal", "minimize") not in ("minimize", "maximize"):
        raise UserError(f"metric.goal: {metric['goal']} is neither minimize nor maximize")
    if isinstance(metric.get("target"), bool) or not isinstance(metric.get("target", 0), (int, float)):
        raise UserError(f"metric.target: {metric['target']!r} is not a number")


def _check_early_terminate(keys):
    if keys and keys.get("type") != "hyperband":
        raise UserError(f"early_terminate.type: {keys.get('type')} is not hyperband")
    for key in ("min_iter", "max_iter", "s", "eta"):
        least = 2 if key == "eta" else 1
        is_integer = isinstance(keys.get(key), int) and not isinstance(keys[key], bool)
        if key in keys and not (is_integer and keys[key] >= least):
            raise UserError(f"early_terminate.{key}: {keys[key]!r} is not an integer of at least {least}")
    if keys and not {"min_iter", "max_iter"} & set(keys):
        raise UserError("early_terminate: min_iter or max_iter is missing")
