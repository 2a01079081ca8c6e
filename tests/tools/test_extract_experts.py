"""`extract_lora` of stacked experts: an adapter of PEFT's target_parameters, which plain PEFT opens."""

import pytest
import torch
from mixtures import MIXTURES, mixtral, qwen, tokens_of
from peft import PeftConfig, PeftModel
from roundoff import model_room
from versions import skip_before

from lorapre_peft import extract_lora
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


def test_what_is_not_selected_is_left_out(tmp_path, checkpoint_pair):
    base, tuned = checkpoint_pair(experts_changed((0, 1)), mixtral())
    with pytest.warns(UserWarning, match="not in target_modules ×2"):
        report = extract_lora(base, tuned, tmp_path / "lora", rank=2, target_modules=["q_proj", "experts.down_proj"])
    assert {m.name.rpartition(".")[2] for m in report.modules} == {"down_proj"}
    assert {entry.name.rpartition(".")[2] for entry in report.left_out} == {"gate_up_proj"}
    config = PeftConfig.from_pretrained(tmp_path / "lora")
    assert all(name.endswith("experts.down_proj") for name in config.target_parameters)
