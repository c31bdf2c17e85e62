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

import optuna
import yaml

from files import HISTORY_COLUMNS, UserError

KEYS = {
    "": {"program", "method", "metric", "parameters", "early_terminate", "command", "run_cap"}
    | {"name", "description", "project", "entity"},  # for W&B's pages only
    "metric": {"name", "goal", "target"},
    "early_terminate": {"type", "min_iter", "max_iter", "s", "eta", "strict"},
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
MACRO = re.compile(r"\$\{(env|interpreter|program|args|args_no_boolean_flags|envvar:\w+)\}")
QUANTILES = optuna.distributions.FloatDistribution(1e-6, 1 - 1e-6)  # of a normal distribution, whose ends are infinite


class Parameter:
    """One parameter of a sweep. `distribution`: what Optuna draws from, None for a constant; see `value`."""

    def __init__(self, name, spec):
        """spec: the parameter's dict in the yaml. Raises UserError, naming the parameter, if it makes no sense."""
        self.name = name
        if not isinstance(spec, dict):
            raise UserError(f"parameters.{name}: a mapping is wanted, such as value: 3, not {spec!r}")
        self.kind = spec.get("distribution") or _kind_of(name, spec)
        if self.kind not in DISTRIBUTIONS:
            raise UserError(f"parameters.{name}.distribution: {self.kind} is none of {', '.join(DISTRIBUTIONS)}")
        needed, possible = DISTRIBUTIONS[self.kind]
        given = set(spec) - {"distribution"}
        if needed - given:
            raise UserError(f"parameters.{name}: {self.kind} needs {' and '.join(sorted(needed - given))}")
        if given - needed - possible:
            extra = ", ".join(sorted(given - needed - possible))
            raise UserError(f"parameters.{name}: {extra} is not known, or not for {self.kind}")
        self.spec = {"mu": 0, "sigma": 1, "q": 1, **spec}
        self._check_figures()
        self.distribution = self._distribution()

    def _check_figures(self):
        for key in ("min", "max", "mu", "sigma", "q"):
            figure = self.spec.get(key, 1)
            try:
                self.spec[key] = figure if isinstance(figure, int) else float(figure)  # yaml reads 1e-5 as a text
            except (TypeError, ValueError) as error:
                raise UserError(f"parameters.{self.name}.{key}: {figure!r} is not a number") from error
        low, high = self.spec["min"], self.spec["max"]
        if low > high or self.spec["q"] <= 0 or self.spec["sigma"] <= 0:
            raise UserError(f"parameters.{self.name}: min must not be above max, and q and sigma must be above 0")
        if "values" in self.kind and low <= 0:
            raise UserError(f"parameters.{self.name}: min must be above 0 for {self.kind}")
        values, shares = self.spec.get("values", [0]), self.spec.get("probabilities")
        if not isinstance(values, list) or not values:
            raise UserError(f"parameters.{self.name}.values: a list is wanted, not {values!r}")
        if shares is not None and (len(shares) != len(values) or abs(sum(shares) - 1) > 1e-6 or min(shares) < 0):
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
            return next((v for v, end in zip(self.spec["values"], ends, strict=True) if drawn <= end), drawn)
        if self.kind == "categorical":
            return next(value for value in self.spec["values"] if _simple(value) == drawn)
        if "normal" in self.kind:
            drawn = NormalDist(self.spec["mu"], self.spec["sigma"]).inv_cdf(drawn)
            drawn = math.exp(drawn) if "log" in self.kind else drawn
        return _rounded(drawn, self.spec["q"]) if self.kind.startswith("q_") else drawn

    def grid(self):
        """Every value Optuna can draw. Raises UserError where there is no end of them."""
        d = self.distribution
        if isinstance(d, optuna.distributions.CategoricalDistribution):
            return list(d.choices)
        if isinstance(d, optuna.distributions.IntDistribution):
            return list(range(d.low, d.high + 1))
        if getattr(d, "step", None):
            return [d.low + i * d.step for i in range(round((d.high - d.low) / d.step) + 1)]
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

    def sampler(self, seed):
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
        for word in self.content.get("command") or ["${program}", "${args}"]:
            word = str(word)
            if word in ("${args}", "${args_no_boolean_flags}"):
                words += flags_of(values)
            elif variable := re.fullmatch(r"\$\{envvar:(\w+)\}", word):
                words.append(os.environ.get(variable[1], ""))
            elif word not in ("${env}", "${interpreter}", "${program}"):
                words.append(word)
        return words


def flags_of(values):
    """{parameter: value} -> flags; a list becomes several words behind one flag."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
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
    for word in map(str, content.get("command") or []):
        if word.startswith("${") and not MACRO.fullmatch(word):
            raise UserError(f"command: {word} is not known to this search")
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
    if not isinstance(metric.get("target", 0), (int, float)):
        raise UserError(f"metric.target: {metric['target']!r} is not a number")


def _check_stopping(stopping):
    if stopping and stopping.get("type") != "hyperband":
        raise UserError(f"early_terminate.type: {stopping.get('type')} is not hyperband")
    for key in ("min_iter", "max_iter", "s", "eta"):
        least = 2 if key == "eta" else 1
        if key in stopping and not (isinstance(stopping[key], int) and stopping[key] >= least):
            raise UserError(f"early_terminate.{key}: {stopping[key]!r} is not an integer from {least} on")
    if stopping and not {"min_iter", "max_iter"} & set(stopping):
        raise UserError("early_terminate: min_iter or max_iter is wanted")
