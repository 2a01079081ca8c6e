"""Every kind of LoRA adapter, and several at once."""

import pytest
import torch
from adapting import ConvNet, adapted, logits, ranks_by_name, train, trainable
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from roundoff import model_room
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorapre_peft import LoRAPreConfig, LoRAPreMuon, create_lorapre_optimizer

# ---- every kind of adapter: what is compressed, that it trains, that it survives -----------------------------------

# PEFT options, Llama options, and the trainable parameters (besides none) that take the AdamW path.
VARIANTS = {
    "lora": ({}, {}, ()),
    "newton": ({"update_rule": "newton"}, {}, ()),
    "plain LoraConfig": ({"config_class": LoraConfig}, {}, ()),
    "rslora": ({"use_rslora": True}, {}, ()),
    "dora": ({"use_dora": True}, {}, ("lora_magnitude_vector",)),
    "pissa": ({"init_lora_weights": "pissa"}, {}, ()),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, {}, ()),
    "rank_pattern": ({"rank_pattern": {"q_proj": 4, "down_proj": 16}}, {}, ()),
    "modules_to_save": ({"modules_to_save": ["lm_head", "norm"]}, {}, ("lm_head", "norm")),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, {}, ("lora_embedding_A",)),
    "bias all": ({"bias": "all"}, {"attention_bias": True}, ("bias",)),
    "lora_bias": (
        {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
        {"attention_bias": True},
        ("lora_B.default.bias",),
    ),
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


@variants
def test_variant_trains_and_survives_save_load_merge(make_llama, batch, tmp_path, variant):
    """Training lowers the loss and moves every parameter on the path it belongs to; saved, loaded and merged it is the
    same model.
    """
    peft_options, llama_options, adamw_path = variant
    model = adapted(make_llama(**llama_options), **peft_options)
    base_logits = logits(make_llama(**llama_options), batch)
    before = trainable(model)
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    model.train()
    losses = train(optimizer, lambda: model(**batch).loss)
    assert losses[-1] < losses[0] - 0.05
    assert not any(torch.equal(p, before[name]) for name, p in trainable(model).items())

    ranks = ranks_by_name(optimizer)
    assert ranks.keys() == before.keys()
    for name, k in ranks.items():
        on_adamw_path = any(part in name for part in adamw_path)
        assert k == (0 if on_adamw_path else max(1, min(before[name].shape) // 4)), name
    assert all(any(part in name for name in ranks) for part in adamw_path)

    trained = logits(model, batch)
    assert (trained - base_logits).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    config = None if peft_options.get("config_class") else LoRAPreConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(**llama_options), tmp_path, is_trainable=True, config=config)
    assert trainable(loaded).keys() == before.keys()
    torch.testing.assert_close(logits(loaded, batch), trained, rtol=0, atol=0)
    room = model_room(model, lambda model: logits(model, batch))
    torch.testing.assert_close(logits(model.merge_and_unload(), batch), trained, rtol=0, atol=2 * room)


def test_unload_gives_the_base_model_back(make_llama, batch):
    model = adapted(make_llama())
    train(create_lorapre_optimizer(model, lr=1e-2), lambda: model(**batch).loss, steps=2)
    torch.testing.assert_close(logits(model.unload(), batch), logits(make_llama(), batch), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"adamw_lr": 1e-3, "adjust_lr_fn": "match_rms_adamw"}], ids=["", "adamw_lr"])
def test_muon_trains(make_llama, batch, options):
    model = adapted(make_llama(), modules_to_save=["norm"])
    optimizer = create_lorapre_optimizer(model, "muon", lr=0.1, **options)
    assert type(optimizer) is LoRAPreMuon
    losses = train(optimizer, lambda: model(**batch).loss)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("use_dora", [False, True])
def test_convolutions_are_compressed_as_flattened_matrices(use_dora):
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 5
    options = {
        "r": 4,
        "target_modules": ["first", "second"],
        "modules_to_save": ["head", "norm"],
        "use_dora": use_dora,
    }
    model = adapted(ConvNet(), **options)
    optimizer = create_lorapre_optimizer(model, lr=2e-2)
    losses = train(optimizer, lambda: nn.functional.cross_entropy(model(x), y), steps=10)
    assert losses[-1] < losses[0] - 0.1
    for name, k in ranks_by_name(optimizer).items():
        assert k == (1 if any(part in name for part in ("lora_A", "lora_B")) else 0), name
    state = optimizer.state[model.base_model.model.second.lora_A["default"].weight]  # 4 × 16 × 3 × 3
    assert (state["m_B"].shape, state["m_A"].shape) == ((4, 1), (1, 144))
    trained = model.eval()(x)
    room = model_room(model, lambda model: model(x))
    torch.testing.assert_close(model.merge_and_unload()(x), trained, rtol=0, atol=2 * room)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_base(make_llama, batch, tmp_path, quant_type):
    """Hidden size 64: bitsandbytes' CPU kernels take whole blocks of 64 weights only."""
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_compute_dtype=torch.float32
    )

    def base():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantization, device_map={"": "cpu"}
        )

    model = adapted(prepare_model_for_kbit_training(base(), use_gradient_checkpointing=False)).train()
    assert type(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")).__name__ == "Linear4bit"
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    losses = train(optimizer, lambda: model(**batch).loss)
    assert losses[-1] < losses[0] - 0.1
    assert set(ranks_by_name(optimizer).values()) == {2}
    model.save_pretrained(tmp_path / "adapter")
    config = LoRAPreConfig.from_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True, config=config)
    # In training mode throughout: in evaluation bitsandbytes repacks the base on some CPUs, which rounds it anew.
    assert loaded.train()(**batch).loss.item() == model(**batch).loss.item()


# ---- more than one adapter ----------------------------------------------------------------------------------------


def test_switching_adapters_trains_each_with_its_own_rank(two_adapters, batch):
    model = two_adapters
    for adapter, k in (("default", 2), ("second", 5), ("default", 2)):
        model.set_adapter(adapter)
        frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        optimizer = create_lorapre_optimizer(model, lr=1e-2)
        losses = train(optimizer, lambda: model(**batch).loss)
        assert losses[-1] < losses[0] - 0.05
        ranks = ranks_by_name(optimizer)
        assert set(ranks.values()) == {k}
        assert all(f".{adapter}." in name for name in ranks)
        assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())


def test_two_active_adapters_in_one_optimizer(two_adapters, batch):
    two_adapters.base_model.set_adapter(["default", "second"])
    optimizer = create_lorapre_optimizer(two_adapters, lr=1e-2)
    losses = train(optimizer, lambda: two_adapters(**batch).loss)
    assert losses[-1] < losses[0] - 0.1
    ranks = ranks_by_name(optimizer)
    assert {name: k for name, k in ranks.items() if ".second." in name and k != 5} == {}
    assert {name: k for name, k in ranks.items() if ".default." in name and k != 2} == {}
    assert len(set(ranks.values())) == 2


def test_delete_adapter_leaves_the_other_trainable(two_adapters, batch):
    two_adapters.delete_adapter("default")
    two_adapters.set_adapter("second")
    optimizer = create_lorapre_optimizer(two_adapters, lr=1e-2)
    train(optimizer, lambda: two_adapters(**batch).loss, steps=2)
    assert set(ranks_by_name(optimizer).values()) == {5}


def test_each_adapter_keeps_its_own_sidecar(two_adapters, tmp_path):
    two_adapters.save_pretrained(tmp_path)
    assert LoRAPreConfig.from_pretrained(tmp_path).momentum_rank == 2
    assert LoRAPreConfig.from_pretrained(tmp_path / "second").momentum_rank == 5


@pytest.mark.parametrize(
    "how", [{"combination_type": "cat"}, {"combination_type": "svd", "svd_rank": 8}], ids=["cat", "svd"]
)
def test_combined_adapter_trains_on(two_adapters, batch, how):
    """PEFT makes the config of the new adapter from the first one's, with another r."""
    two_adapters.add_weighted_adapter(["second", "default"], [1.0, 1.0], "both", **how)
    assert type(two_adapters.peft_config["both"]) is LoRAPreConfig
    two_adapters.set_adapter("both")
    optimizer = create_lorapre_optimizer(two_adapters, lr=1e-2)
    losses = train(optimizer, lambda: two_adapters(**batch).loss)
    assert losses[-1] < losses[0] - 0.1
    assert set(ranks_by_name(optimizer).values()) == {5}


def test_combined_adapter_of_a_lower_rank_than_the_momentums(two_adapters, batch):
    """PEFT can make and use it, as with `LoraConfig`; training it asks for another momentum rank."""
    with pytest.warns(UserWarning, match="momentum_rank=5 is not below the adapter's rank 3"):
        two_adapters.add_weighted_adapter(
            ["second", "default"], [1.0, 1.0], "small", combination_type="svd", svd_rank=3
        )
    two_adapters.set_adapter("small")
    assert two_adapters(**batch).loss.isfinite()
    with pytest.raises(ValueError, match="momentum_rank=5 is not below r=3"):
        create_lorapre_optimizer(two_adapters, lr=1e-2)
    optimizer = create_lorapre_optimizer(two_adapters, lr=1e-2, momentum_rank=2)
    train(optimizer, lambda: two_adapters(**batch).loss, steps=1)
    assert set(ranks_by_name(optimizer).values()) == {2}


def test_adapter_added_by_transformers(make_llama, batch, tmp_path):
    """PreTrainedModel.add_adapter holds the config on the model itself, without a PeftModel around it."""
    model = make_llama()
    model.add_adapter(LoRAPreConfig(r=8, target_modules=["q_proj"], momentum_rank=3))
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    train(optimizer, lambda: model(**batch).loss, steps=2)
    assert set(ranks_by_name(optimizer).values()) == {3}
    model.save_pretrained(tmp_path)
    assert LoRAPreConfig.from_pretrained(tmp_path).momentum_rank == 3
