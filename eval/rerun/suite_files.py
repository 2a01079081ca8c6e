"""This module reads suite files and checks what they say."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from eval.methods import METHODS
from recipes.corpus import CorpusArguments

from .data import SOURCES
from .suite import Entry, Paper, Pretraining, Suite, Training, Tuned

SUITES = Path(__file__).parents[1] / "suites"
RESULTS = SUITES.parent / "results"  # It has a folder for each suite.
_LOSSES = ("validation_loss", "test_loss")
_JUDGED = ("accuracy", "gsm8k", "gsm8k_paper", "math500")  # These judge answers to problems (`eval.rerun.data`).


def load_suite(name: str) -> Suite:
    """Return a suite of ``eval/suites`` by its name, or from a file by its path.

    A suite may name another one as its ``base``. It then has that one's keys except for those that it gives itself. Of
    ``training`` or ``pretraining`` it need give only what differs.

    Raises ValueError for a file that does not say what a suite must.
    """
    path, said = _read(name)
    try:
        methods = said.pop("methods")
        kind = Pretraining if "pretraining" in said else Training
        said["training"] = kind(**said.pop("pretraining" if kind is Pretraining else "training"))
        kinds = {"paper": Paper, "tuned": Tuned}
        said["protocols"] = {kind: kinds[kind](**options) for kind, options in said["protocols"].items()}
        suite = Suite(name=path.stem, entries=[_entry(item) for item in methods], **said)
        for part in (suite, suite.training, *suite.protocols.values(), *suite.entries):
            _check_types(part)
        for tuned in suite.protocols.values():
            for entry in suite.entries if isinstance(tuned, Tuned) else []:
                suite.grid(entry, tuned)
        for option in (option for factor in suite.factors for option in factor):
            if not any(option in entry.options for entry in suite.entries):
                raise ValueError(f"factor {option!r}: none of the methods has that option")
        _check_data(suite)
        _check_metrics(suite)
        if suite.primary not in suite.metrics:
            raise ValueError(f"primary {suite.primary!r}: expected one of the metrics, {', '.join(suite.metrics)}")
        for other in suite.records_of:
            _file(other)
        labels = [entry.label for entry in suite.entries]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"two rows are called {', '.join(twice)}: give one of them a label")
        for label in (label for rows in suite.published.values() for label in rows):
            if label not in labels:
                raise ValueError(f"published {label!r}: none of the rows is called so")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    return suite


def _check_types(part: Any) -> None:
    """Raise ValueError for a field whose value is of another type than it declares."""
    for name, declared in get_type_hints(type(part)).items():
        value = getattr(part, name)
        alternatives = get_args(declared) if isinstance(declared, UnionType) else (declared,)
        kinds = {get_origin(kind) or kind for kind in alternatives}
        fits = type(value) in kinds or (float in kinds and type(value) is int) or isinstance(value, Training)
        if not fits:
            expected = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in alternatives)
            raise ValueError(f"{name}: found {value!r}, expected {expected}")


def _check_data(suite: Suite) -> None:
    """Raise ValueError for data that no run could read."""
    options = dict(suite.data)
    source = options.pop("source", None)
    if not source or not (suite.pretrains or source in SOURCES):
        expected = "the name of a text" if suite.pretrains else f"one of {', '.join(SOURCES)}"
        raise ValueError(f"data: found the source {source!r}, expected {expected}")
    try:
        if suite.pretrains:
            inspect.signature(CorpusArguments).bind(**options)
        else:
            inspect.signature(SOURCES[source]).bind(rows=0, seed=0, **options)
    except TypeError as error:
        raise ValueError(f"data of the source {source}: {error}") from error


def _check_metrics(suite: Suite) -> None:
    """Raise ValueError for a metric that no run would have."""
    for metric in suite.metrics:
        if metric not in (*_LOSSES, *_JUDGED):
            raise ValueError(f"metric {metric!r}: expected one of {', '.join((*_LOSSES, *_JUDGED))}")
        if metric in _JUDGED and (suite.pretrains or not suite.answers):
            raise ValueError(f"metric {metric!r}: found no answers to judge, expected answers above 0 in fine-tuning")


def _read(name: str, above: tuple[str, ...] = ()) -> tuple[Path, dict[str, Any]]:
    """Return a suite's file, and what it and its bases say. above: suites that build on it."""
    if name in above:
        raise ValueError(f"suites build on each other in a circle: {', '.join((*above, name))}. Take one 'base' out")
    path = _file(name)
    said = _numbers(yaml.safe_load(path.read_text(encoding="utf-8")))
    if not isinstance(said, dict):
        raise ValueError(f"{path}: found {type(said).__name__}, expected a mapping with the keys of a suite")
    if "base" not in said:
        return path, said
    base = _read(said.pop("base"), (*above, name))[1]
    kind, other = ("pretraining", "training") if "pretraining" in base else ("training", "pretraining")
    if other in said:
        raise ValueError(f"{path}: found {other!r}, but the suite it builds on has {kind!r}: change that one's keys")
    return path, base | said | {kind: base[kind] | said.get(kind, {})}


def _file(name: str) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) else SUITES / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in SUITES.glob("*.yaml")))
        raise ValueError(f"no suite {name!r}: expected one of {known}, or the path of a YAML file")
    return path


def _entry(item: str | dict[str, Any]) -> Entry:
    """Return the entry of an item: a method's name, or a mapping with ``method``.

    The mapping may also have the other fields of `Entry` and the method's options.
    """
    options = {"method": item} if isinstance(item, str) else dict(item)
    name = options.pop("method")
    if name not in METHODS:
        raise ValueError(f"no method {name!r}: expected one of {', '.join(METHODS)}")
    label = options.pop("label", METHODS[name].title)
    own = {key: options.pop(key, None) for key in ("rates", "tuning_seeds")}
    return Entry(name, METHODS[name].merged(options), label, **own)


def _numbers(value: Any) -> Any:
    """Return what YAML has read, with numbers in place of texts such as 2e-5, which YAML does not take for numbers."""
    if isinstance(value, dict):
        return {name: _numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
