"""This module finds the model class that a config belongs to."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PretrainedConfig,
    PreTrainedModel,
)

# For a config without an architecture, the first of these that knows it is taken. Whole models come before their
# decoders, which AutoModelForCausalLM would give for some configs.
WHOLE_MODELS = (
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoModelForImageTextToText,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModel,
)


def architecture(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the class that ``config.architectures`` names, as every saved model's config does.

    For a config made by hand, this is the model that is trained as a whole, with encoder, decoder and head.

    Raises ValueError for a name that transformers does not have, and for a kind of config that it has no model for.
    """
    name = next(iter(config.architectures or []), None)
    if name is not None:
        if not hasattr(transformers, name):
            raise ValueError(f"the config is of the architecture {name!r}: expected one of transformers' own")
        return getattr(transformers, name)
    for auto in WHOLE_MODELS:
        if type(config) in auto._model_mapping:
            found: Any = auto._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(
        f"transformers has no model for a {type(config).__name__}: name one in config.architectures, such as "
        "['LlamaForCausalLM']"
    )
