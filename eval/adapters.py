"""This module gives lm-eval models with PEFT adapters, with the tokenizer and vocabulary of the adapter's training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from lm_eval.models.huggingface import HFLM
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from eval.exact_match import without_own_decoding

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

    Decoding is as the task says, whatever ``generation_config.json`` the model is saved with.

    Raises:
        SystemExit: the adapter does not fit the model, a tokenizer does not fit its vocabulary or has no end token, or
            the model's logits are not numbers.
    """

    def _create_model(self, pretrained: str, *, peft: str | None = None, **options: Any) -> None:
        super()._create_model(pretrained, **options)
        self._model.generation_config = without_own_decoding(self._model.generation_config)
        tokens, rows = len(self.tokenizer), len(self._model.get_input_embeddings().weight)
        if self.tokenizer.eos_token_id is None:
            raise SystemExit(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no end token, at which completions stop: give it "
                "one (eos_token in tokenizer_config.json)"
            )
        if peft is not None:
            self._adapt(pretrained, peft, tokens, rows)
        elif rows < tokens:
            raise SystemExit(
                f"the model {pretrained!r} has a vocabulary of {rows}, and the tokenizer "
                f"{self.tokenizer.name_or_path!r} has {tokens} tokens: give the model its own tokenizer"
            )
        with torch.no_grad():
            token = torch.tensor([[self.tokenizer.eos_token_id]], device=self._model.device)
            if self._model(input_ids=token).logits.isnan().any():
                raise SystemExit(
                    f"the model {peft or pretrained!r} answers with NaN: its training has diverged, or its dtype "
                    "overflows (give --dtype bfloat16 or float32)"
                )

    def _adapt(self, pretrained: str, peft: str, tokens: int, rows: int) -> None:
        """Put an adapter on the model. tokens, rows: numbers of the tokenizer's tokens and of the embeddings' rows."""
        weights = load_peft_weights(peft, device="cpu")
        own = vocabulary_size(self._model, weights)
        if own is not None and own < tokens:
            raise SystemExit(
                f"the adapter {peft!r} has a vocabulary of {own}, and the tokenizer {self.tokenizer.name_or_path!r} "
                f"has {tokens} tokens: save the tokenizer that the adapter was trained with beside it"
            )
        wanted = own or max(rows, tokens)
        if wanted != rows:
            print(f"the vocabulary of {pretrained} is resized from {rows} to {wanted}, for the adapter {peft}")
            self._model.resize_token_embeddings(wanted)
        vocabulary = tuple(f"base_model.model.{name}." for name in _vocabulary_modules(self._model))
        try:
            self._model = PeftModel.from_pretrained(self._model, peft)
        except RuntimeError as error:  # load_state_dict raises this for tensors of other shapes.
            raise SystemExit(
                f"the adapter {peft!r} does not fit the model {pretrained!r}, give the one that it was trained on: "
                f"{error}"
            ) from error
        expected = get_peft_model_state_dict(self._model, save_embedding_layers=False).keys()
        odd = sorted(name for name in expected ^ weights.keys() if not name.startswith(vocabulary))
        if odd:
            raise SystemExit(
                f"the adapter {peft!r} does not fit the model {pretrained!r}, give the one that it was trained on: "
                f"{len(odd)} of its tensors are missing or have no place, such as {odd[0]}"
            )


def vocabulary_size(model: PreTrainedModel, weights: dict[str, Tensor]) -> int | None:
    """Return for how many tokens an adapter's embeddings or output head have rows, or None if it has neither.

    model: base model. weights: tensors of the adapter, by their names in its file.
    """
    for name in _vocabulary_modules(model):
        for rest, side in VOCABULARY_SIDE.items():
            tensor = weights.get(f"base_model.model.{name}{rest}")
            if tensor is not None:
                return tensor.shape[side]
    return None


def _vocabulary_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of the embeddings and of the output head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name for name, module in model.named_modules() if any(module is end for end in ends)]


def own_tokenizer(adapter: str) -> str | None:
    """Return the adapter's name if a tokenizer lies beside it, in its folder or on the hub, or None otherwise."""
    if Path(adapter).is_dir():
        return adapter if Path(adapter, TOKENIZER_CONFIG_FILE).is_file() else None
    try:
        hf_hub_download(adapter, TOKENIZER_CONFIG_FILE)
    except (OSError, ValueError):  # There is no such file, repository or name, or no network.
        return None
    return adapter
