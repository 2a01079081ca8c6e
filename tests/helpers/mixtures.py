"""This module builds tiny mixtures of experts from transformers, and adapters on their experts."""

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lorapre_peft import LoRAPreConfig

VOCAB_SIZE = 64
_SIZES = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def _built(model_class, config) -> PreTrainedModel:
    torch.manual_seed(0)
    return model_class(config)


def qwen(num_experts: int = 6) -> PreTrainedModel:
    """Return a Qwen3-MoE model, of whose experts each token uses two."""
    sizes = dict(head_dim=8, moe_intermediate_size=24, num_experts=num_experts, num_experts_per_tok=2)
    return _built(Qwen3MoeForCausalLM, Qwen3MoeConfig(**_SIZES, **sizes))


def mixtral() -> PreTrainedModel:
    """Return a Mixtral model, of whose four experts each token uses one."""
    return _built(MixtralForCausalLM, MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=1))


def gpt_oss() -> PreTrainedModel:
    """Return a GPT-OSS model. The matrices of its experts are [in, out]."""
    return _built(GptOssForCausalLM, GptOssConfig(**_SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2))


def deepseek() -> PreTrainedModel:
    """Return a DeepSeek-V3 model with a dense layer and one of experts, some of which are shared by all tokens."""
    attention = dict(
        q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, num_key_value_heads=4
    )
    routing = dict(n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1)
    config = DeepseekV3Config(**(_SIZES | attention | routing), moe_intermediate_size=24)
    return _built(DeepseekV3ForCausalLM, config)


MIXTURES = {"qwen3-moe": qwen, "mixtral": mixtral, "gpt-oss": gpt_oss, "deepseek-v3": deepseek}
EXPERT_WEIGHTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def with_adapter(model: PreTrainedModel, config_class=LoRAPreConfig, **options) -> PeftModel:
    """Return the model with an adapter of rank 4 on each expert. ``options`` override the adapter's configuration."""
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": [], "target_parameters": EXPERT_WEIGHTS} | options
    return get_peft_model(model, config_class(**options))


def tokens_of(step: int) -> torch.Tensor:
    """Return the batch of a step: four sequences of 16 tokens, int64 [4, 16]."""
    return torch.randint(VOCAB_SIZE, (4, 16), generator=torch.Generator().manual_seed(step))
