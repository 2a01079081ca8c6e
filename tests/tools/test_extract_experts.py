"""`extract_lora` of stacked experts: an adapter of PEFT's target_parameters, which plain PEFT opens."""

import pytest
import torch
from mixtures import MIXTURES, mixtral, qwen, tokens_of
from peft import PeftConfig, PeftModel
from roundoff import model_room
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from versions import skip_before

from lorapre_peft import extract_lora
from lorapre_peft.extract.lora import main
from lorapre_peft.integrations.targets import expert_parameters

pytestmark = skip_before("peft", "0.20", "takes the inputs of stacked experts for their outputs")

every_mixture = pytest.mark.parametrize("name", MIXTURES)


def experts_changed(changed, rank=2):
    """A change of rank ``rank`` of the experts numbered ``changed``, by a multiple of their number plus one."""

    def change(name, parameter, generator):
        if parameter.ndim != 3:
            return None
        delta = torch.zeros_like(parameter)
        for e in changed:
            p, q = parameter.shape[1:]
            factors = torch.randn(p, rank, generator=generator), torch.randn(rank, q, generator=generator)
            delta[e] = 0.01 * (e + 1) * factors[0] @ factors[1]
        return delta

    return change


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens_of(0)).logits


def opened(model_of, folder):
    return PeftModel.from_pretrained(model_of(), folder)


@every_mixture
def test_plain_peft_makes_of_it_the_tuned_model(name, tmp_path, checkpoint_pair):
    """Also where the files hold each expert's matrices by themselves, or gate and up apart, or [in, out]."""
    model = MIXTURES[name]()
    base, tuned = checkpoint_pair(experts_changed((0, 2)), model)
    report = extract_lora(base, tuned, tmp_path / "lora", rank=2)
    assert {m.name for m in report.modules} == expert_parameters(model).keys()
    assert report.left_out == []
    assert report.kept_energy == pytest.approx(1, abs=1e-9)
    expected = logits(model)
    assert (logits(MIXTURES[name]()) - expected).abs().max() > 1e-2
    found = logits(opened(MIXTURES[name], tmp_path / "lora"))
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * model_room(model, logits))


def test_the_rank_is_what_the_most_demanding_expert_needs(tmp_path, checkpoint_pair):
    """By energy; experts of a lower rank have zeros there, as those have that did not change."""

    def change(name, parameter, generator):
        if name.endswith("experts.down_proj"):
            return experts_changed((1,), rank=5)(name, parameter, generator) + experts_changed((3,), rank=2)(
                name, parameter, generator
            )
        return None

    model = qwen()
    base, tuned = checkpoint_pair(change, model)
    report = extract_lora(base, tuned, tmp_path / "lora", energy=1 - 1e-9)
    assert [(m.rank, m.shape) for m in report.modules] == [(5, (6, 32, 24))] * 2
    found = opened(qwen, tmp_path / "lora").merge_and_unload()
    before = dict(qwen().named_parameters())
    for name, param in found.named_parameters():
        if name.endswith("experts.down_proj"):
            for e in (0, 2, 4, 5):
                assert torch.equal(param[e], before[name][e])
            assert not torch.equal(param[3], before[name][3])


def test_experts_alone_can_be_selected(tmp_path, checkpoint_pair):
    """By their module, by a weight of theirs, and with all linear modules, in any case of letters."""
    base, tuned = checkpoint_pair(experts_changed((0, 1)), qwen())
    for target_modules, count in ((["experts"], 4), ("All-Linear", 4)):
        report = extract_lora(base, tuned, tmp_path / "lora", rank=2, target_modules=target_modules)
        assert len(report.modules) == count
    with pytest.warns(UserWarning, match="not in target_modules ×2"):
        main([base, tuned, str(tmp_path / "lora"), "--rank", "2", "--target-modules", "experts.down_proj"])
    config = PeftConfig.from_pretrained(tmp_path / "lora")
    assert all(name.endswith("experts.down_proj") for name in config.target_parameters)
    with pytest.raises(ValueError, match=r"no linear module: the model has experts.down_proj, experts.gate_up"):
        extract_lora(base, tuned, tmp_path / "lora", rank=2, target_modules=["nothing"])


def test_experts_that_are_stored_transposed_or_not(tmp_path, checkpoint_pair):
    """Transformers looks at the shape that the model has to know which they are."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    text = dict(num_key_value_heads=2, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
    vision = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, out_hidden_size=32)
    vision |= dict(num_position_embeddings=16, deepstack_visual_indexes=[0])
    tokens = dict(image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)

    def build():
        torch.manual_seed(0)
        config = Qwen3VLMoeConfig(text_config=sizes | text, vision_config=vision, **tokens)
        return Qwen3VLMoeForConditionalGeneration(config)

    def logits(model):
        with torch.no_grad():
            return model.eval()(input_ids=torch.arange(16)[None]).logits

    model = build()
    base, tuned = checkpoint_pair(experts_changed((0, 2)), model)
    report = extract_lora(base, tuned, tmp_path / "lora", rank=2)
    assert {m.name for m in report.modules} == expert_parameters(model).keys()
    expected = logits(model)
    assert (logits(build()) - expected).abs().max() > 1e-2
    found = logits(opened(build, tmp_path / "lora"))
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * model_room(model, logits))


def test_what_is_not_selected_is_left_out(tmp_path, checkpoint_pair):
    base, tuned = checkpoint_pair(experts_changed((0, 1)), mixtral())
    with pytest.warns(UserWarning, match="not in target_modules ×2"):
        report = extract_lora(base, tuned, tmp_path / "lora", rank=2, target_modules=["q_proj", "experts.down_proj"])
    assert {m.name.rpartition(".")[2] for m in report.modules} == {"down_proj"}
    assert {entry.name.rpartition(".")[2] for entry in report.left_out} == {"gate_up_proj"}
    config = PeftConfig.from_pretrained(tmp_path / "lora")
    assert all(name.endswith("experts.down_proj") for name in config.target_parameters)
