"""The memory estimate: held against real training of small models, and against public numbers of large ones."""

import pytest
import torch
from mixtures import qwen, with_adapter
from peft import get_peft_model
from torch import nn
from transformers import DeepseekV3Config, LlamaConfig
from versions import skip_before

from lorapre_peft import LoRAPreConfig, create_lorapre_optimizer
from lorapre_peft.memory.models import SHAPES, find_config, meta_model, quantization_bytes
from lorapre_peft.memory.peak import AllocationTracker, estimate, measure
from lorapre_peft.memory.peers import peers

# Several matrices to a chunk, one matrix to a chunk and several tiles to a matrix all occur with these shapes and this
# bound.
SIZES = {"hidden_size": 128, "intermediate_size": 320}
TEMPORARY_BYTES = 1_200_000
TOKENS = (2, 64)  # batch, seq_len
PUBLISHED = {  # parameter counts on the models' hub pages
    "Llama-2-7b-hf": 6_738_415_616,
    "Llama-2-13b-hf": 13_015_864_320,
    "Llama-2-70b-hf": 68_976_648_192,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "SmolLM2-135M": 134_515_008,
}
both_optimizers = pytest.mark.parametrize("optimizer", ["adamw", "muon"])
both_rules = pytest.mark.parametrize("rule", ["als", "newton"])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
both_modes = pytest.mark.parametrize("in_backward", [True, False], ids=["in_backward", "ordinary"])


def latent_attention():
    return DeepseekV3Config(
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4},
        **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16},
        **{"qk_nope_head_dim": 16, "v_head_dim": 16, "vocab_size": 64, "first_k_dense_replace": 1},
    )


def train(model, optimizer, in_backward, steps=2, **options):
    """Really train on the CPU; measured bytes of gradients, state and temporaries."""
    options = {"backend": "eager"} | options
    built = create_lorapre_optimizer(model, optimizer, lr=1e-3, update_in_backward=in_backward, **options)
    found = {"gradients": 0, "temporaries": 0}
    apply = built._step

    def state_bytes():
        return sum(value.nbytes for state in built.state.values() for value in state.values())

    def watched(located):
        found["gradients"] = max(found["gradients"], sum(param.grad.nbytes for _, param, _ in located))
        with AllocationTracker() as tracker:
            apply(located)
        for state in built.state.values():
            for value in state.values():
                tracker.leave_out(value)
        found["temporaries"] = max(found["temporaries"], tracker.peak_bytes)

    built._step = watched
    tokens = torch.randint(0, 64, TOKENS)
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        built.step()
        built.zero_grad()
    return found | {"state": state_bytes()}


def assert_as_measured(estimated, measured):
    """Of the eager backend, which is what the estimate runs."""
    assert (estimated.gradients, estimated.state) == (measured["gradients"], measured["state"])
    # Equal with the pinned torch; another one may decompose an operation differently on the meta device.
    assert estimated.temporaries == pytest.approx(measured["temporaries"], rel=0.01)


@both_optimizers
@both_rules
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=["fp32", "bf16"]
)
@both_modes
def test_full_weights_as_trained(make_llama, optimizer, rule, dtype, in_backward):
    model = make_llama(dtype=dtype, **SIZES)
    options = dict(momentum_rank=4, update_rule=rule, temporary_bytes=TEMPORARY_BYTES)
    estimated = estimate(model, optimizer, in_backward=in_backward, batch=0, **options)
    assert_as_measured(estimated, train(model, optimizer, in_backward, **options))


@both_optimizers
@both_rules
@both_modes
@pytest.mark.parametrize("adapter", [False, True], ids=["weights", "target_parameters"])
def test_experts_as_trained(optimizer, rule, in_backward, adapter):
    model = with_adapter(qwen(), momentum_rank=2) if adapter else qwen()
    options = dict(momentum_rank=2, update_rule=rule, temporary_bytes=200_000)
    estimated = estimate(model, optimizer, in_backward=in_backward, batch=0, **options)
    assert_as_measured(estimated, train(model, optimizer, in_backward, **options))


@both_optimizers
@both_modes
def test_adapters_as_trained(make_llama, optimizer, in_backward):
    model = get_peft_model(make_llama(**SIZES), LoRAPreConfig(r=16, target_modules=["q_proj", "down_proj"]))
    estimated = estimate(model, optimizer, in_backward=in_backward, batch=0)
    # A third step: the factors of lora_A start in the second one, for its first gradients are zero.
    assert_as_measured(estimated, train(model, optimizer, in_backward, steps=3))


@both_modes
def test_kernels_take_less_than_estimated(make_llama, in_backward):
    model = make_llama(**SIZES)
    options = dict(momentum_rank=4, temporary_bytes=TEMPORARY_BYTES)
    estimated = estimate(model, in_backward=in_backward, batch=0, **options)
    assert train(model, "adamw", in_backward, backend="auto", **options)["temporaries"] <= estimated.temporaries


@both_modes
@pytest.mark.parametrize("temporary_bytes", [TEMPORARY_BYTES, 64_000_000])
def test_the_adamw_path_and_clipping_as_trained(make_llama, in_backward, temporary_bytes):
    # Few and small compressed matrices, so that the peak is the AdamW path's, which packs parameters of all shapes
    # together: in pieces under the smaller bound, all at once under the larger.
    model = make_llama(dtype=torch.bfloat16, vocab_size=1000, **SIZES)
    options = dict(
        target_modules=["k_proj"], embeddings="adamw", max_param_grad_norm=1e-6, temporary_bytes=temporary_bytes
    )
    estimated = estimate(model, in_backward=in_backward, batch=0, **options)
    assert_as_measured(estimated, train(model, "adamw", in_backward, **options))


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable`:FutureWarning"
)  # deprecated in later transformers 5
@both_dtypes
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    ("batch", "seq_len", "kv_heads"),
    [
        (2, 128, 4),
        pytest.param(
            2, 128, 2, marks=skip_before("torch", "2.8", "has no fused attention of grouped queries on CPUs")
        ),
        (1, 8, 4),
    ],
)
def test_activations_as_on_the_cpu(make_llama, dtype, checkpointing, batch, seq_len, kv_heads):
    """The CPU's attention is fused too, so nothing in this run is replaced. Gradients exceed all else at 8 tokens."""
    model = make_llama(dtype=dtype, num_key_value_heads=kv_heads, vocab_size=512, **SIZES)
    estimated = estimate(model, batch=batch, seq_len=seq_len, checkpointing=checkpointing)

    create_lorapre_optimizer(model.train())  # freezes what is not trained
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tracker = AllocationTracker()

    def free(param):
        tracker.leave_out(param.grad)
        param.grad = None

    for param in model.parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(free)
    tokens = torch.zeros(batch, seq_len, dtype=torch.long)
    with tracker:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    if kv_heads == 4:
        assert estimated.activations == tracker.peak_bytes
    else:  # grouped keys and values are counted as repeated
        assert tracker.peak_bytes <= estimated.activations <= 1.05 * tracker.peak_bytes


@both_optimizers
@both_modes
def test_total_bounds_a_whole_training_step(make_llama, optimizer, in_backward):
    """Nothing that training holds is in none of the parts, and those that are held together add up."""
    model = make_llama(dtype=torch.bfloat16, num_key_value_heads=4, **SIZES).train()
    batch, seq_len = TOKENS
    options = dict(momentum_rank=4, temporary_bytes=TEMPORARY_BYTES)
    modes = dict(in_backward=in_backward, batch=batch, seq_len=seq_len, checkpointing=False)
    estimated = estimate(model, optimizer, **modes, **options)
    built = create_lorapre_optimizer(model, optimizer, update_in_backward=in_backward, **options)
    tokens = torch.randint(0, 64, TOKENS)  # of equal tokens, attention would have no gradient
    with AllocationTracker() as tracker:
        for _ in range(2):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            built.step()
            built.zero_grad()
    # The first step, which has the largest temporaries, makes the state as it goes; the second has all of it.
    in_step = estimated.temporaries + (0 if in_backward else estimated.gradients)
    least = max(estimated.state + estimated.activations, in_step)
    assert least <= tracker.peak_bytes <= estimated.total - estimated.weights


def test_attention_other_than_fused_is_counted_as_it_is(make_llama):
    """Scores of [batch, heads, seq_len, seq_len] appear with eager attention and not with sdpa."""
    growth = {}
    for attention in ("sdpa", "eager"):
        config = make_llama(attn_implementation=attention, num_hidden_layers=1).config
        few, many = (estimate(config, seq_len=n, checkpointing=False).activations for n in (64, 256))
        growth[attention] = many / few
    assert growth["sdpa"] == pytest.approx(4, rel=0.05)
    assert growth["eager"] > 6


def test_values_narrower_than_keys_are_fused_too():
    """As in multi-head latent attention: activations grow with the tokens, not with their square."""
    few, many = (estimate(latent_attention(), momentum_rank=2, seq_len=n, checkpointing=False) for n in (256, 1024))
    assert many.activations / few.activations == pytest.approx(4, rel=0.05)


def test_scales_of_4bit_weights_are_counted():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(256, 128, bias=False, quant_type="nf4"), nn.Linear(128, 8))
    assert quantization_bytes(model) == 0  # They are quantized as they are moved.
    quantized = 256 * 128
    scales = quantized // 64 + 4 * quantized // 64 // 256  # of blocks of 64, a byte each, with scales of their own
    books = 4 * (16 + 256 + 1)  # of the values, of the scales, and the scales' mean
    found = estimate(model.to("cpu"), momentum_rank=2, batch=0)
    assert found.weights == quantized // 2 + scales + books + 4 * (128 * 8 + 8)


def test_a_model_with_adapters_runs(make_llama):
    model = get_peft_model(make_llama(dtype=torch.bfloat16, **SIZES), LoRAPreConfig(r=8, target_modules="all-linear"))
    estimated = estimate(model)
    assert estimated.weights == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert estimated.activations > 0


def test_the_callers_model_is_left_alone(make_llama):
    model = make_llama(tie_word_embeddings=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    estimate(model, others="frozen")
    assert all(param.requires_grad and param.grad is None for param in model.parameters())
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_copy_on_meta_keeps_ties_dtypes_and_what_is_frozen(make_llama):
    model = make_llama(tie_word_embeddings=True, dtype=torch.bfloat16)
    model.model.norm.float().requires_grad_(False)
    copied = meta_model(model)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert {tensor.device.type for tensor in (*copied.parameters(), *copied.buffers())} == {"meta"}
    pairs = zip(model.parameters(), copied.parameters(), strict=True)
    assert all((a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad) for a, b in pairs)


# ---- large models ---------------------------------------------------------------------------------------------------


def test_seven_billion_parameters_against_known_numbers():
    with measure() as idle:
        pass
    with measure() as measured:
        model = meta_model("meta-llama/Llama-2-7b-hf")
        estimated = estimate(model, momentum_rank=8)
    assert measured.peak_bytes - idle.peak_bytes < 200e6

    assert estimated.weights == pytest.approx(2 * PUBLISHED["Llama-2-7b-hf"], rel=1e-6)  # and a few buffers
    assert estimated.gradients == 11008 * 4096 * 2
    # Moments of k (p+q) and of p+q float32 numbers for 4 of 4096×4096 and 3 of 11008×4096 in each of 32 layers; the
    # norms' besides.
    factors = 32 * (4 * (4096 + 4096) + 3 * (11008 + 4096)) * (8 + 1) * 4
    assert factors == pytest.approx(0.09e9, rel=0.05)
    assert factors < estimated.state < 1.03 * factors  # norms take 2 MB

    compared = peers(model, 8, activations=0)
    assert compared["AdamW, fp32"].state == pytest.approx(53.9e9, rel=1e-3)
    assert compared["AdamW, bf16"].state == pytest.approx(27e9, rel=2e-3)


@both_modes
@both_rules
def test_temporaries_of_a_large_matrix_stay_below_the_bound(rule, in_backward):
    config = LlamaConfig(**{**SHAPES["Llama-2-7b-hf"], "num_hidden_layers": 1})
    one_shape = dict(target_modules=["gate_proj", "up_proj"], others="frozen")
    estimated = estimate(config, update_rule=rule, in_backward=in_backward, batch=0, **one_shape)
    assert 10e6 < estimated.temporaries < 64e6  # temporary_bytes; one float32 copy of the matrix would take 180 MB


@pytest.mark.parametrize("name", SHAPES)
def test_built_in_shapes_have_the_published_sizes(name):
    assert sum(param.numel() for param in meta_model(f"meta-llama/{name}").parameters()) == PUBLISHED[name]


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_names_and_paths_of_configs(llama_path, tmp_path):
    by_folder, by_file = find_config(llama_path)[0], find_config(llama_path / "config.json")[0]
    assert by_folder.hidden_size == by_file.hidden_size == 32
    assert find_config("Llama-3.1-8B")[0].vocab_size == 128256
    with pytest.raises(ValueError, match=r"'nobody/nothing' is no local folder.*Without a network.*Llama-2-7b-hf"):
        estimate("nobody/nothing")
    with pytest.raises(ValueError, match="exists but holds no config"):
        estimate(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(ValueError, match="exists but holds no config"):
        estimate(tmp_path)


def test_errors(make_llama):
    model = make_llama()
    with pytest.raises(ValueError, match="batch=-1: expected a whole number of at least 0"):
        estimate(model, batch=-1)
    with pytest.raises(ValueError, match=r"seq_len=1\.5: expected a whole number of at least 1"):
        estimate(model, seq_len=1.5)
    with pytest.raises(ValueError, match="expected one of 'adamw', 'muon'"):
        estimate(model, "sgd")
    with pytest.raises(ValueError, match="momentum_rank=0 compresses nothing"):
        estimate(model, momentum_rank=0)
    with pytest.raises(TypeError, match="found update_in_backward among the options; expected in_backward"):
        estimate(model, update_in_backward=True)
    layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.raises(RuntimeError, match=r"Sequential does not run on the meta device.*Use batch=0"):
        estimate(layers)
    assert estimate(layers, batch=0).weights == 2 * (64 * 64 + 64) * 4
