"""Memory estimates of models that are no causal language models: all that is trained is counted, by the class that the
config names.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import (
    BartConfig,
    BertConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2VLConfig,
    T5Config,
    ViTConfig,
    WhisperConfig,
)

from lorapre_peft.memory import estimate
from lorapre_peft.memory.peers import main

TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
PAIR = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
PAIR |= dict(encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=64, pad_token_id=0, decoder_start_token_id=1)
SOUND = dict(max_source_positions=30, max_target_positions=64, num_mel_bins=8)
IMAGES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8
)
ROPE = dict(rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4})
LLAMA = dict(TEXT, num_key_value_heads=2, pad_token_id=0)

# What transformers trains as a whole, so that the class is the same whether the config names it or not.
WHOLE = {
    "WhisperForConditionalGeneration": lambda: WhisperConfig(**PAIR, **SOUND),
    "T5ForConditionalGeneration": lambda: T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0
    ),
    "BartForConditionalGeneration": lambda: BartConfig(**PAIR, max_position_embeddings=64),
    "ViTForImageClassification": lambda: ViTConfig(**IMAGES),
    "Qwen2VLForConditionalGeneration": lambda: Qwen2VLConfig(
        text_config=dict(TEXT, num_key_value_heads=2, **ROPE),
        vision_config=dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2),
    ),
    "LlavaForConditionalGeneration": lambda: LlavaConfig(
        text_config=LlamaConfig(**LLAMA), vision_config=CLIPVisionConfig(**IMAGES)
    ),
    "LlamaForCausalLM": lambda: LlamaConfig(**LLAMA),
}
NAMED = {
    "LlamaForSequenceClassification": lambda: LlamaConfig(**LLAMA, num_labels=3),
    "BertForSequenceClassification": lambda: BertConfig(**TEXT),
    "BertForTokenClassification": lambda: BertConfig(**TEXT),
    "BertForMaskedLM": lambda: BertConfig(**TEXT),
    "WhisperForCausalLM": lambda: WhisperConfig(**PAIR, **SOUND),
}


def weight_bytes(name: str, config) -> int:
    model = getattr(transformers, name)(config)
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", [*WHOLE, *NAMED])
def test_the_class_that_the_config_names(name):
    config = (WHOLE | NAMED)[name]()
    config.architectures = [name]
    found = estimate(config, momentum_rank=2, batch=0, dtype=torch.float32)
    assert found.weights == weight_bytes(name, config)
    assert found.activations == 0
    assert 0 < found.gradients < found.weights


@pytest.mark.parametrize("name", WHOLE)
def test_a_config_without_a_name_is_the_whole_model(name):
    config = WHOLE[name]()
    assert not config.architectures
    assert estimate(config, momentum_rank=2, batch=0, dtype=torch.float32).weights == weight_bytes(name, config)


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM",
        "T5ForConditionalGeneration",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in [*WHOLE, *NAMED]
            if name not in ("LlamaForCausalLM", "T5ForConditionalGeneration", "WhisperForCausalLM")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_activations_grow_with_the_batch(name):
    """A training step of each runs: forward with labels, and backward."""
    config = (WHOLE | NAMED)[name]()
    config.architectures = [name]
    one, four = (estimate(config, momentum_rank=2, batch=batch, seq_len=16).activations for batch in (1, 4))
    assert one > 0
    assert 2 * one < four <= 4 * one


def test_an_architecture_that_transformers_does_not_have():
    config = LlamaConfig(**LLAMA)
    config.architectures = ["MyOwnModel"]
    with pytest.raises(ValueError, match="of the architecture 'MyOwnModel': expected one of transformers' own"):
        estimate(config)


def test_the_command_says_what_was_built(tmp_path, capsys):
    config = WhisperConfig(**PAIR, **SOUND)
    config.architectures = ["WhisperForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    main([str(tmp_path), "--seq-len", "16", "--momentum-rank", "2"])
    assert "; WhisperForConditionalGeneration, " in capsys.readouterr().out
