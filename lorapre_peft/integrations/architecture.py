"""From a model's config to the class that it is the config of."""

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

# Of a config that names no architecture, the first of these that knows it: whole models before their decoders, which
# AutoModelForCausalLM would give for some.
WHOLE_MODELS = (
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoModelForImageTextToText,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModel,
)


def architecture(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that ``config.architectures`` names, as every saved model's does; else, of a config made by hand, the
    model trained as a
    whole: with encoder, decoder and head.

    Raises ValueError for a name that transformers does not have, and a kind of config that it has no model for.
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
