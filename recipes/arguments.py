"""This module reads the command line of a recipe.

It parses argument classes and configs that build on each other, and chooses the dtypes that ``auto`` stands for.
"""

from __future__ import annotations

from argparse import Action, ArgumentError
from collections.abc import Sequence
from dataclasses import field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from trl import TrlParser

from recipes.precision import AUTO, Precision, accelerator, choose
from recipes.training import started_with

CONFIGS = Path(__file__).parent / "configs"


def with_bases(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config's keys together with those of the configs that it builds on. Its own keys win.

    Raises ValueError if configs build on each other in a circle.
    """
    seen: list[str] = []
    while "base" in config:
        if config["base"] in seen:
            raise ValueError(f"configs build on each other in a circle: {', '.join(seen)}. Take one 'base' out")
        seen.append(config["base"])
        base = CONFIGS / config["base"]
        own = {name: value for name, value in config.items() if name != "base"}
        config = (yaml.safe_load(base.read_text(encoding="utf-8")) or {}) | own
    return config


def dtype_field(of: str) -> Any:
    """Return the dataclass field of a recipe's dtype.

    of: beginning of the help, which says what has the dtype, such as "Of the weights.".
    """
    chosen = (
        "'auto': the one that this machine multiplies fast, or float32 with fp16; bf16, where it is not given, "
        "follows the same choice."
    )
    choices = [AUTO, "bfloat16", "float16", "float32"]
    return field(default=AUTO, metadata={"help": f"{of} {chosen}", "choices": choices})


class RecipeParser(TrlParser):
    """Extends `TrlParser` to configs that name another config as their ``base``, by its path in ``recipes/configs``.

    A config's own keys win over those of its base. The argument classes must have the keys ``output_dir``, ``resume``,
    ``use_cpu``, ``fp16``, ``bf16`` and ``dtype``.

    Attributes:
        given: values of all keys before the argument classes rewrite some of them. It exists after parsing.
        precision: dtypes that ``dtype`` and ``bf16`` have become. A run that goes on keeps those that it began with.
    """

    given: dict[str, Any]
    precision: Precision

    def parse_args_into_dataclasses(self, args: list[str], **options: Any) -> tuple[Any, ...]:
        """Return an instance of each argument class, with the chosen dtypes in place of ``auto``.

        args: command line. options: as in `TrlParser`. Exits if the command line has arguments that there are not.
        """
        known, unknown = self.parse_known_args(args)
        if unknown:
            self.error(f"unknown: {' '.join(unknown)}; --help lists the options, and at most one --config is read")
        self.given = vars(known)
        given = SimpleNamespace(**self.given)
        self.precision = choose(
            "cpu" if given.use_cpu else accelerator(),
            given.dtype,
            given.bf16,
            given.fp16,
            earlier=started_with(Path(given.output_dir)) if given.resume and given.output_dir else None,
        )
        return super().parse_args_into_dataclasses([*args, *self.precision.options], **options)

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Set the values of a config and of its bases as defaults, and return its other keys as arguments.

        Exits if a value could not be given on the command line.
        """
        config = with_bases(config)
        for action in self._actions:
            if config.get(action.dest) is not None:
                self._check(action, config[action.dest])
        return super().set_defaults_with_config(**config)

    def _check(self, action: Action, value: Any) -> None:
        """Exit unless a config's value could be given on the command line. argparse itself checks only those."""
        for one in value if action.nargs in ("*", "+") and isinstance(value, list) else [value]:
            try:
                self._check_value(action, self._get_value(action, str(one)))
            except ArgumentError as error:
                self.error(f"{action.dest}: {value!r} in the config: {error.message}")


def parse_recipe(argv: Sequence[str], classes: Sequence[type]) -> tuple[RecipeParser, tuple[Any, ...], dict[str, Any]]:
    """Return the parser, an instance of each argument class, and the keys whose values are not the defaults.

    argv: command line. classes: argument classes. Exits if there is no such config, or if it is no YAML.
    """
    parser = RecipeParser(classes, allow_abbrev=False)
    parser.set_defaults(use_cpu=not torch.cuda.is_available())  # With bf16, TrainingArguments needs CUDA or use_cpu.
    defaults = vars(parser.parse_known_args([])[0])
    # TrlParser knows the file of --config only as a word of its own.
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if words and words[-1] == "--config":
        parser.error(f"--config: expected a file; those of this project are in {CONFIGS}")
    try:
        parsed = parser.parse_args_and_config(words)
    except (FileNotFoundError, IsADirectoryError) as error:
        parser.error(f"there is no config {error.filename}; those of this project are in {CONFIGS}")
    except yaml.YAMLError as error:
        parser.error(f"the config is no YAML: {error}")
    config = {
        name: value.value if isinstance(value, Enum) else value
        for name, value in parser.given.items()
        if value != defaults[name]
    }
    return parser, parsed, config
