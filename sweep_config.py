"""A W&B sweep's yaml file for Optuna: its parameters as distributions, its method as sampler, its stopping as pruner.

Keys and distributions are those of https://docs.wandb.ai/models/sweeps/sweep-config-keys. What is not known there, or
cannot be done without W&B, is an error that names it.
"""

import itertools
import math
import os
import re
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import optuna
import yaml

from files import HISTORY_COLUMNS, UserError

KEYS = {
    "": {"program", "method", "metric", "parameters", "early_terminate", "command", "run_cap"}
    | {"name", "description", "project", "entity"},  # for W&B's pages only
    "metric": {"name", "goal", "target"},
    "early_terminate": {"type", "min_iter", "max_iter", "s", "eta"},
}
METHODS = ("bayes", "random", "grid")
# {distribution: (keys it needs, keys it may have beside)}
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
PROGRAM, ARGS = "${program}", ("${args}", "${args_no_boolean_flags}")
VARIABLE = re.compile(r"\$\{envvar:(\w+)\}")
QUANTILES = optuna.distributions.FloatDistribution(1e-6, 1 - 1e-6)  # of a normal distribution, whose ends are infinite


class Parameter:
    """One parameter of a sweep. `distribution`: what Optuna draws from, None for a constant; see `value`."""

    def __init__(self, name, spec):
        """spec: the parameter's dict in the yaml. Raises UserError, naming the parameter, if it makes no sense."""
        self.name = name
        if not isinstance(spec, dict):
            raise UserError(f"parameters.{name}: a mapping is wanted, such as value: 3, not {spec!r}")
        self.kind = spec.get("distribution") or _kind_of(name, spec)
        if not isinstance(self.kind, str) or self.kind not in DISTRIBUTIONS:
            raise UserError(f"parameters.{name}.distribution: {self.kind} is none of {', '.join(DISTRIBUTIONS)}")
        needed, possible = DISTRIBUTIONS[self.kind]
        given = set(spec) - {"distribution"}
        if needed - given:
            raise UserError(f"parameters.{name}: {self.kind} needs {' and '.join(sorted(needed - given))}")
        if given - needed - possible:
            extra = ", ".join(sorted(map(str, given - needed - possible)))
            raise UserError(f"parameters.{name}: {extra} is not known, or not for {self.kind}")
        self.spec = {"mu": 0, "sigma": 1, "q": 1, **spec}
        self._check_figures()
        self._check_values()
        try:
            self.distribution = self._distribution()
            self.samples()
        except (ValueError, OverflowError) as error:
            hint = "; its min and max are exponents" if self.kind.endswith("log_uniform") else ""
            raise UserError(f"parameters.{name}: {self.kind} cannot be drawn from ({error}{hint})") from error

    def _check_figures(self):
        for key in ("min", "max", "mu", "sigma", "q"):
            figure = self.spec.get(key, 1)
            try:
                number = figure if isinstance(figure, int) else float(figure)  # yaml reads 1e-5 as a text
            except (TypeError, ValueError):
                number = math.nan
            if isinstance(figure, bool) or not math.isfinite(number):
                raise UserError(f"parameters.{self.name}.{key}: {figure!r} is not a finite number")
            if key in ("q", "sigma") and number <= 0:
                raise UserError(f"parameters.{self.name}.{key}: {figure!r} is not above 0")
            self.spec[key] = number
        if self.spec["min"] > self.spec["max"]:
            raise UserError(f"parameters.{self.name}: min must not be above max")
        if self.kind.endswith("_values") and self.spec["min"] <= 0:
            raise UserError(f"parameters.{self.name}: min must be above 0 for {self.kind}")

    def _check_values(self):
        values, shares = self.spec.get("values", [0]), self.spec.get("probabilities")
        if not isinstance(values, list) or not values:
            raise UserError(f"parameters.{self.name}.values: a list is wanted, not {values!r}")
        for value in values:
            if value != value or not isinstance(value, (str, int, float, list)):
                raise UserError(f"parameters.{self.name}.values: {value!r} is no value of a flag")
        if shares is None:
            return
        are_numbers = isinstance(shares, list) and all(isinstance(share, (int, float)) for share in shares)
        if not are_numbers or len(shares) != len(values) or not abs(sum(shares) - 1) <= 1e-6 or min(shares) < 0:
            raise UserError(f"parameters.{self.name}.probabilities: one for each of values, that sum to 1")

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

    def value(self, drawn):
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

    def samples(self):
        """Values to try main.py's parser on: all choices, or the ends of a range."""
        if "values" in self.spec:
            return self.spec["values"]
        if self.distribution is None:
            return [self.spec["value"]]
        if self.distribution is QUANTILES:
            return [self.value(quantile) for quantile in (0.16, 0.5, 0.84)]
        return [self.value(self.distribution.low), self.value(self.distribution.high)]

    def grid(self):
        """Every value Optuna can draw, once. Raises UserError where there is no end of them."""
        d = self.distribution
        if isinstance(d, optuna.distributions.CategoricalDistribution):
            return list(dict.fromkeys(d.choices))
        if isinstance(d, optuna.distributions.IntDistribution):
            return list(range(d.low, d.high + 1))
        if getattr(d, "step", None):
            return [d.low + i * d.step for i in range(round((d.high - d.low) / d.step) + 1)]
        if self.spec.get("probabilities"):
            raise UserError(f"parameters.{self.name}.probabilities: method grid takes every value once")
        raise UserError(f"parameters.{self.name}: method grid needs values, int_uniform or q_uniform, not {self.kind}")


def _kind_of(name, spec):
    """As W&B does where no distribution is named."""
    if "parameters" in spec:
        raise UserError(f"parameters.{name}.parameters: main.py has no nested flags")
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical"
    whole = isinstance(spec.get("min"), int) and isinstance(spec.get("max"), int)
    return "int_uniform" if whole else "uniform"


def _simple(value):
    """Optuna keeps choices of plain types only; a list (several words of one flag) becomes a text."""
    return yaml.safe_dump(value, default_flow_style=True).strip() if isinstance(value, (list, dict)) else value


def _rounded(value, q):
    """W&B's q_ distributions: round(value / q) * q, an integer where q is one."""
    multiple = round(value / q) * q
    return multiple if isinstance(q, int) else float(f"{multiple:.12g}")


@dataclass
class SweepConfig:
    """A sweep's yaml, checked."""

    path: str
    content: dict
    parameters: list

    @property
    def metric(self):
        return self.content["metric"]["name"]

    @property
    def maximizes(self):
        return self.content["metric"].get("goal", "minimize") == "maximize"

    @property
    def target(self):
        return self.content["metric"].get("target")

    def searched(self):
        """-> {name: distribution} of the parameters that are not constant."""
        return {p.name: p.distribution for p in self.parameters if p.distribution is not None}

    def grid(self):
        """-> [{name: drawn}], every combination, in the order of the yaml; None for another method."""
        if self.content["method"] != "grid":
            return None
        searched = [p for p in self.parameters if p.distribution is not None]
        combinations = itertools.product(*(p.grid() for p in searched))
        return [dict(zip((p.name for p in searched), values, strict=True)) for values in combinations]

    def most(self, name):
        """The highest value of a searched parameter, None where it is not searched."""
        chosen = [p for p in self.parameters if p.name == name and p.distribution is not None]
        return max(chosen[0].samples()) if chosen else None

    def sampler(self, seeds):
        """seeds: figures that decide what is drawn, or None."""
        seed = None if seeds is None else int(np.random.SeedSequence(seeds).generate_state(1)[0])
        if self.content["method"] == "bayes":
            return optuna.samplers.TPESampler(seed=seed)  # its constant liar keeps trials that run at once apart
        return optuna.samplers.RandomSampler(seed=seed)

    def pruner(self, epochs):
        """Hyperband from W&B's keys: the first look after `min_iter` epochs, or after `max_iter / eta^s`."""
        given = self.content.get("early_terminate")
        if not given:
            return optuna.pruners.NopPruner()
        eta = given.get("eta", 3)
        longest = given.get("max_iter", epochs)
        first = given["min_iter"] if "min_iter" in given else longest // eta ** given.get("s", 1)
        first = max(1, first)
        return optuna.pruners.HyperbandPruner(first, max(first, longest), eta)

    def flags(self, values):
        """{parameter: value} -> main.py's command line behind the program, in the order of `command`."""
        words = []
        for word in _words_behind_program(self.content.get("command")):
            words += self.flags_of(values) if word in ARGS else [VARIABLE.sub(lambda m: os.environ[m[1]], word)]
        return words

    @staticmethod
    def flags_of(values):
        """{parameter: value} -> flags; a list becomes several words behind one flag."""
        words = []
        for name, value in values.items():
            words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
        return words


def _words_behind_program(command):
    """Raises UserError for a `command` that does not run main.py, or has what this search does not know."""
    words = [PROGRAM, *ARGS[:1]] if command is None else command
    if not isinstance(words, list):
        raise UserError(f"command: a list of words is wanted, not {words!r}")
    words = [str(word) for word in words]
    starts = [i for i, word in enumerate(words) if word == PROGRAM or os.path.basename(word) == "main.py"]
    if not starts:
        raise UserError("command: ${program} is wanted in it")
    words = words[starts[0] + 1 :]
    for word in words:
        for name in VARIABLE.findall(word):
            if name not in os.environ:
                raise UserError(f"command: the environment has no variable {name}")
        unknown = re.search(r"\$\{[^}]*\}?", VARIABLE.sub("", word))
        if unknown and word not in ARGS:
            raise UserError(f"command: {unknown[0]} is not known to this search")
    return words


def read_sweep(path, known_flags):
    """-> SweepConfig. known_flags: names of main.py's flags. Raises UserError, naming the key, for what is wrong."""
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no yaml: {' '.join(str(error).split())}") from error
    try:
        config = SweepConfig(path, content, _checked(content, known_flags))
        config.grid()  # where it has no end, that is said now
        return config
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _checked(content, known_flags):
    if not isinstance(content, dict):
        raise UserError("a sweep's keys are wanted: program, method, metric, parameters")
    for place, known in KEYS.items():
        section = content.get(place) if place else content
        if section is not None and not isinstance(section, dict):
            raise UserError(f"{place}: a mapping is wanted, not {section!r}")
        unknown = [key for key in section or {} if key not in known]
        if unknown:
            raise UserError(
                f"{place + '.' if place else ''}{unknown[0]} is not known; known are {', '.join(sorted(known))}"
            )
    if os.path.basename(str(content.get("program", "main.py"))) != "main.py":
        raise UserError(f"program: {content['program']}; this search runs main.py")
    if content.get("method") not in METHODS:
        raise UserError(f"method: {content.get('method')} is none of {', '.join(METHODS)}")
    _check_metric(content.get("metric") or {})
    _check_stopping(content.get("early_terminate") or {})
    _words_behind_program(content.get("command"))
    cap = content.get("run_cap", 1)
    if not isinstance(cap, int) or isinstance(cap, bool) or cap < 1:
        raise UserError(f"run_cap: {cap!r} is not an integer from 1 on")
    given = content.get("parameters")
    if not isinstance(given, dict) or not given:
        raise UserError("parameters: none are given")
    for name in given:
        if name not in known_flags:
            raise UserError(f"parameters.{name}: main.py has no flag --{name}")
    return [Parameter(name, spec) for name, spec in given.items()]


def _check_metric(metric):
    names = [name for name in HISTORY_COLUMNS if name.startswith(("val_", "train_"))]
    if metric.get("name") not in names:
        raise UserError(f"metric.name: {metric.get('name')} is none of {', '.join(names)}")
    if metric.get("goal", "minimize") not in ("minimize", "maximize"):
        raise UserError(f"metric.goal: {metric['goal']} is neither minimize nor maximize")
    if isinstance(metric.get("target"), bool) or not isinstance(metric.get("target", 0), (int, float)):
        raise UserError(f"metric.target: {metric['target']!r} is not a number")


def _check_stopping(stopping):
    if stopping and stopping.get("type") != "hyperband":
        raise UserError(f"early_terminate.type: {stopping.get('type')} is not hyperband")
    for key in ("min_iter", "max_iter", "s", "eta"):
        least = 2 if key == "eta" else 1
        is_whole = isinstance(stopping.get(key), int) and not isinstance(stopping[key], bool)
        if key in stopping and not (is_whole and stopping[key] >= least):
            raise UserError(f"early_terminate.{key}: {stopping[key]!r} is not an integer from {least} on")
    if stopping and not {"min_iter", "max_iter"} & set(stopping):
        raise UserError("early_terminate: min_iter or max_iter is wanted")
