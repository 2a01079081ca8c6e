"""This module holds `LoRAPreConfig`, a `peft.LoraConfig` that also says how its adapter's momenta are compressed."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import warnings
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.other import get_pattern_key

from ..lowrank.rules import RULES
from ..optim.options import RULE_OPTIONS, check_rule_options, is_whole, one_of

# This file lies beside adapter_config.json, which stays that of a plain LoraConfig: PEFT warns about unknown keys.
CONFIG_NAME = "lorapre_config.json"


@dataclass
class LoRAPreConfig(LoraConfig):
    """Configures a LoRA adapter that is trained with LoRA-Pre.

    It has all fields of `peft.LoraConfig`, and PEFT treats it as one, as ``peft_type`` stays LORA. The fields below
    are read by `create_lorapre_optimizer` and change nothing about the adapter itself. They are saved beside
    ``adapter_config.json`` in ``lorapre_config.json``, so that an adapter saved here opens in plain PEFT.
    `LoRAPreConfig.from_pretrained` reads both files.

    Raises ValueError for a momentum rank that is not a whole number ≥ 1, for an unknown rule, and for an option that
    the rule does not have or that is out of its range. Warns of a momentum rank that is not below the adapter's rank,
    with which `create_lorapre_optimizer` raises ValueError: PEFT makes such configs for adapters that are only merged
    (``add_weighted_adapter`` to a lower rank).
    """

    momentum_rank: int | None = field(
        default=None,
        metadata={
            "help": "Rank k of the momentum factors of each A and B, 1 ≤ k < r. None: a quarter of the adapter's "
            "rank, at least 1."
        },
    )
    momentum_rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "Momentum ranks of single modules, by layer name or regular expression as in `rank_pattern`, "
            "e.g. {'q_proj': 4}; of `target_parameters` by the parameter's name, e.g. {'experts.down_proj': 4}."
        },
    )
    update_rule: str = field(
        default="als",
        metadata={"help": "'als' (tracked, this project's default) or 'newton' (as published, Theorem 3.1)."},
    )
    second_momentum_rank: int | None = field(
        default=None,
        metadata={
            "help": "Rank of the second moment of update_rule='als', at most momentum_rank. None: 1. Muon has none."
        },
    )
    residual_weight: float | None = field(
        default=None,
        metadata={
            "help": "ρ of update_rule='als' in [0, 1]: weight of the gradient outside the momentum's subspace. None: "
            "1."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.momentum_rank_pattern = self.momentum_rank_pattern or {}  # Configs may say null.
        if not isinstance(self.momentum_rank_pattern, dict):
            raise ValueError(
                f"momentum_rank_pattern={self.momentum_rank_pattern!r}: expected ranks by module, such as "
                "{'q_proj': 4}"
            )
        one_of("update_rule", self.update_rule, RULES)
        largest = max([self.r, *(self.rank_pattern or {}).values()])
        named = {"momentum_rank": self.momentum_rank} | {
            f"momentum_rank_pattern[{key!r}]": k for key, k in self.momentum_rank_pattern.items()
        }
        for name, k in named.items():
            if k is None and name == "momentum_rank":
                continue
            if not is_whole(k, 1):
                raise ValueError(f"{name}={k!r}: expected a whole number of at least 1")
            if k >= largest:
                advice = f"1..{largest - 1}, or a larger r" if largest > 1 else "r=2 or more"
                warnings.warn(
                    f"{name}={k} is not below the adapter's rank {largest}, as training needs it: use {advice}",
                    stacklevel=4,
                )
        check_rule_options({name: getattr(self, name) for name in ("momentum_rank", *RULE_OPTIONS)})

    def pattern_key(self, module_name: str) -> str | None:
        """Return the first key of ``momentum_rank_pattern`` that matches a name in the base model, or None."""
        key = get_pattern_key(list(self.momentum_rank_pattern), module_name)
        return key if key in self.momentum_rank_pattern else None

    def module_momentum_rank(self, module_name: str, r: int) -> int:
        """Return the momentum rank k of the module of that name, whose adapter has rank r.

        Raises ValueError if a pattern gives the module a k ≥ r.
        """
        key = self.pattern_key(module_name)
        if key is not None:
            k = self.momentum_rank_pattern[key]
            if k >= r:
                raise ValueError(
                    f"momentum_rank_pattern[{key!r}]={k} is not below r={r} of {module_name}: nothing would be "
                    "compressed; use a smaller one there"
                )
            return k
        return self.momentum_rank if self.momentum_rank is not None else default_momentum_rank(r)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` as a plain `LoraConfig` does, and ``lorapre_config.json`` beside it."""
        plain: LoraConfig = copy.copy(self)
        plain.__class__ = LoraConfig
        plain.save_pretrained(save_directory, **kwargs)
        with open(os.path.join(save_directory, CONFIG_NAME), "w") as file:
            json.dump({name: getattr(self, name) for name in own_fields()}, file, indent=2, sort_keys=True)
            file.write("\n")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> LoRAPreConfig:
        """Read a saved adapter's configuration from a folder or the hub, as `peft.PeftConfig.from_pretrained` does.

        For an adapter without ``lorapre_config.json`` (a plain LoRA), the fields of this class take their defaults,
        with a warning.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        own = cls._load_own(pretrained_model_name_or_path, subfolder, **cls._split_kwargs(kwargs)[0])
        if own is None:
            warnings.warn(
                f"{pretrained_model_name_or_path} has no {CONFIG_NAME} (a plain LoRA adapter?), or the hub cannot be "
                "asked for it and it is not in the local cache: the options of LoRA-Pre take their defaults",
                stacklevel=2,
            )
            return config
        return dataclasses.replace(config, **own)

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> LoRAPreConfig:
        """Build a configuration of this class, and drop unknown keys with a warning, as PEFT does."""
        kind = kwargs.get("peft_type", PeftType.LORA)
        if kind != PeftType.LORA:
            raise ValueError(
                f"found the configuration of a {kind} adapter; expected a LORA one: read it with peft.PeftConfig"
            )
        # PEFT builds the class in this mapping, and names it in its messages.
        with patch.dict(PEFT_TYPE_TO_CONFIG_MAPPING, {PeftType.LORA: cls}):
            return super().from_peft_type(**kwargs)

    @classmethod
    def _load_own(cls, path: str, subfolder: str | None, **hub_kwargs: Any) -> dict[str, Any] | None:
        folder = os.path.join(path, subfolder) if subfolder is not None else path
        file_path = os.path.join(folder, CONFIG_NAME)
        if not os.path.isfile(file_path):
            if os.path.isdir(folder):
                return None
            try:
                file_path = hf_hub_download(path, CONFIG_NAME, subfolder=subfolder, **hub_kwargs)
            except EntryNotFoundError:  # The hub has no such file, or cannot be asked and the cache has none.
                return None
        with open(file_path) as file:
            own = json.load(file)
        unknown = own.keys() - own_fields()
        if unknown:
            raise ValueError(
                f"{file_path} has unknown keys {sorted(unknown)}: it was saved by a newer lorapre_peft; upgrade it"
            )
        return own


def own_fields() -> list[str]:
    """Return the names of the fields that `LoRAPreConfig` adds to `LoraConfig`."""
    inherited = {f.name for f in dataclasses.fields(LoraConfig)}
    return [f.name for f in dataclasses.fields(LoRAPreConfig) if f.name not in inherited]


def default_momentum_rank(r: int) -> int:
    """Return a quarter of the adapter's rank, at least 1."""
    return max(1, r // 4)
