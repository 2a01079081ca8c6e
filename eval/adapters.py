"""This module gives lm-eval models with PEFT adapters, with the tokenizer and vocabulary of the adapter's training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from lm_eval.models.huggingface import HFLM
from peft import PeftModel, load_peft_weights
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

# This maps the end of a tensor's name, behind the name of the embedding or the head, to the dimension that is the
# vocabulary. The tensors are those of the module itself (in modules_to_save, or saved because it was resized), of the
# layer under an adapter, and LoRA's matrices for an embedding and for a head.
VOCABULARY_SIDE = {".weight": 0, ".base_layer.weight": 0, ".lora_embedding_A": 1, ".lora_B.weight": 0}


class AdaptedLM(HFLM):
    """Extends lm-eval's `HFLM` by another rule for the vocabulary of a model under an adapter.

    HFLM resizes the base model to the number of its tokenizer's tokens. That cuts every vocabulary that is padded
    (Qwen's, Phi's), and an adapter with an output head or embeddings of its own no longer fits. Here the model gets
    the vocabulary of the adapter's own tensors. If the adapter has none, the vocabulary is enlarged if the tokenizer
    has more tokens, and never cut.

    Raises:
        SystemExit: the adapter does not fit the model, or its tokenizer does not fit its vocabulary.
    """

    def _create_model(self, pretrained: str, *, peft: str | None = None, **options: Any) -> None:
        super()._create_model(pretrained, **options)
        if peft is None:
            return
        tokens, rows = len(self.tokenizer), len(self._model.get_input_embeddings().weight)
        own = vocabulary_size(self._model, load_peft_weights(peft, device="cpu"))
        if own is not None and own < tokens:
            raise SystemExit(
                f"the adapter {peft!r} has a vocabulary of {own}, and the tokenizer {self.tokenizer.name_or_path!r} "
                f"has {tokens} tokens: save the tokenizer that the adapter was trained with beside it"
            )
        wanted = own or max(rows, tokens)
        if wanted != rows:
            print(f"the vocabulary of {pretrained} is resized from {rows} to {wanted}, for the adapter {peft}")
            self._model.resize_token_embeddings(wanted)
        try:
            self._model = PeftModel.from_pretrained(self._model, peft)
        except RuntimeError as error:  # load_state_dict raises this for tensors of other shapes.
            raise SystemExit(
                f"the adapter {peft!r} does not fit the model {pretrained!r}, give the one that it was trained on: "
                f"{error}"
            ) from error


def vocabulary_size(model: PreTrainedModel, weights: dict[str, Tensor]) -> int | None:
    """Return for how many tokens an adapter's embeddings or output head have rows, or None if it has neither.

    model: base model. weights: tensors of the adapter, by their names in its file.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, module in model.named_modules():
        if any(module is end for end in ends):
            for rest, side in VOCABULARY_SIDE.items():
                tensor = weights.get(f"base_model.model.{name}{rest}")
                if tensor is not None:
                    return tensor.shape[side]
    return None


def own_tokenizer(adapter: str) -> str | None:
    """Return the adapter's name if a tokenizer lies beside it, in its folder or on the hub, or None otherwise."""
    if Path(adapter).is_dir():
        return adapter if Path(adapter, TOKENIZER_CONFIG_FILE).is_file() else None
    try:
        hf_hub_download(adapter, TOKENIZER_CONFIG_FILE)
    except (OSError, ValueError):  # There is no such file, repository or name, or no network.
        return None
    return adapter
