"""Mixtures of experts: full weights and PEFT's target_parameters, from the model to each expert's own factors."""

import warnings

import pytest
import torch
from adapting import train
from mixtures import MIXTURES, deepseek, mixtral, qwen, tokens_of, with_adapter
from peft import LoraConfig
from peft.tuners.lora import ParamWrapper
from stacking import unstacked
from trainers import arguments, lorapre_trainer
from transformers import Trainer, TrainerCallback, ViTConfig, ViTModel, Wav2Vec2Config, Wav2Vec2Model
from versions import skip_before

from lorapre_peft import LoRAPreCallback, LoRAPreConfig, create_lorapre_optimizer
from lorapre_peft.integrations.targets import expert_parameters
from lorapre_peft.memory.peers import main

every_mixture = pytest.mark.parametrize("name", MIXTURES)
both_optimizers = pytest.mark.parametrize("optimizer", ["adamw", "muon"])


def groups_by_name(optimizer):
    return {name: group for group in optimizer.param_groups for name in group["param_names"]}


def loss_of(model, step=0):
    return lambda: model(input_ids=tokens_of(step), labels=tokens_of(step)).loss


@every_mixture
@both_optimizers
def test_full_weights(name, optimizer, capsys):
    """Every matrix of every expert at k = 2, in state a fraction of AdamW's, and the model learns."""
    model = MIXTURES[name]()
    built = create_lorapre_optimizer(model, optimizer, lr=1e-2, momentum_rank=2)
    table = capsys.readouterr().out
    losses = train(built, loss_of(model))
    assert losses[-1] < losses[0] - 0.1
    stacks = expert_parameters(model)
    assert len(stacks) == (2 if name == "deepseek-v3" else 4)
    named = groups_by_name(built)
    for name, param in stacks.items():
        assert named[name]["experts"] == len(param)
        state = built.state[param]
        assert state["m_B"].shape == (len(param), param.shape[1], 2)
        assert state["m_A"].shape == (len(param), 2, param.shape[2])
    row = next(line for line in table.splitlines() if line.startswith(f"{len(param)} experts each, k=2"))
    assert f"{sum(p.numel() for p in stacks.values()):,}" in row
    assert all(group["experts"] is None for name, group in named.items() if name not in stacks)


class Turns(TrainerCallback):
    """Counts evaluations, of which the first is then the best."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_turn"] = state.global_step


@every_mixture
def test_a_resumed_run_has_the_experts_of_its_checkpoint(name, tmp_path, tokens):
    """A file holds each expert's matrices by themselves, and Trainer looks for those of the model's own names."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "turn", "greater_is_better": False}
    args = arguments(tmp_path, **options, **best)
    straight, resumed = (
        lorapre_trainer(MIXTURES[name](), args, tokens, [Turns()], eval_dataset=tokens) for _ in range(2)
    )
    straight.train()
    assert straight.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    losses = [entry["eval_loss"] for entry in straight.state.log_history if "eval_loss" in entry]
    assert straight.evaluate()["eval_loss"] == losses[0] != losses[1]
    last = type(straight.model).from_pretrained(tmp_path / "checkpoint-3", dtype=straight.model.dtype)
    resumed.args.load_best_model_at_end = False
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, param), expected in zip(resumed.model.named_parameters(), last.parameters()):
        assert torch.equal(param, expected), name


def test_the_callback_loads_experts_where_the_optimizer_was_there_before(tmp_path, tokens):
    """A trainer that has trained goes back to a checkpoint, and one that was given its optimizer resumes."""
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    straight = lorapre_trainer(MIXTURES["qwen3-moe"](), args, tokens)
    straight.train()
    expected = [param.detach().clone() for param in straight.model.parameters()]
    model = MIXTURES["qwen3-moe"]()
    optimizer = create_lorapre_optimizer(model, "adamw", lr=args.learning_rate, verbose=False)
    options = {"train_dataset": tokens, "callbacks": [LoRAPreCallback()]}
    given = Trainer(model, args, optimizers=(optimizer, None), **options)
    for trainer in (straight, given):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        for (name, param), end in zip(trainer.model.named_parameters(), expected):
            assert torch.equal(param, end), name


@every_mixture
@both_optimizers
def test_adapters_of_target_parameters(name, optimizer):
    """Each expert's A and B have factors of their own, at a momentum rank up to r − 1."""
    model = with_adapter(MIXTURES[name](), momentum_rank=2, momentum_rank_pattern={"experts.down_proj": 3})
    built = create_lorapre_optimizer(model, optimizer, lr=1e-2 if optimizer == "adamw" else 0.1, verbose=False)
    losses = train(built, loss_of(model), steps=8)
    assert losses[-1] < losses[0] - 0.02
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert len(wrappers) == (2 if name == "deepseek-v3" else 4)
    for wrapper in wrappers:
        k = 3 if wrapper.parameter_name == "down_proj" else 2
        A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        assert built.state[A]["m_B"].shape == (wrapper.num_experts, 4, k)
        assert built.state[B]["m_A"].shape == (wrapper.num_experts, k, 4)


def test_an_expert_is_what_peft_takes_for_it():
    """The blocks that the optimizer sees are those from which PEFT makes each expert's change: blanking one blanks
    that change alone.
    """
    model = with_adapter(qwen(), init_lora_weights=False)
    built = create_lorapre_optimizer(model, lr=1e-2, verbose=False)
    wrapper = next(module for module in model.modules() if isinstance(module, ParamWrapper))
    change = wrapper.get_delta_weight("default").detach()
    named = {param: group for group in built.param_groups for param in group["params"]}
    for held, layout in ((wrapper.lora_A, "lora_A"), (wrapper.lora_B, "lora_B")):
        weight = held["default"].weight
        assert named[weight]["experts_dim"] == (0 if layout == "lora_A" else -1)
        kept = weight.detach().clone()
        unstacked(layout, weight.data, wrapper.num_experts)[1].zero_()
        without = wrapper.get_delta_weight("default").detach()
        assert not without[1].any()
        assert torch.equal(without[[0, *range(2, len(without))]], change[[0, *range(2, len(change))]])
        weight.data.copy_(kept)


def test_the_default_rank_is_a_quarter_of_one_experts_rank():
    model = with_adapter(mixtral(), r=8, config_class=LoraConfig)
    built = create_lorapre_optimizer(model, lr=1e-2, verbose=False)
    assert {group["momentum_rank"] for group in built.param_groups} == {2}


@skip_before("peft", "0.20", "does not know Mixtral's older names")
def test_names_of_older_mixtures_reach_the_experts():
    """PEFT turns Mixtral's w1 and w3 into the stacked gate_up_proj at twice the rank, and w2 into down_proj."""
    model = with_adapter(mixtral(), target_modules=["w1", "w2", "w3"], target_parameters=None, momentum_rank=3)
    built = create_lorapre_optimizer(model, lr=1e-2, verbose=False)
    train(built, loss_of(model), steps=2)
    ranks = {tuple(state["m_B"].shape) for state in built.state.values()}
    assert ranks == {(4, 8, 3), (4, 96, 3), (4, 4, 3), (4, 32, 3)}


def test_a_momentum_rank_that_is_an_experts_whole_rank_is_refused():
    model = with_adapter(mixtral(), r=4, momentum_rank=3)
    with pytest.raises(ValueError, match=r"momentum_rank=4 is not below r=4 of .*experts"):
        create_lorapre_optimizer(model, lr=1e-2, momentum_rank=4)


def test_a_pattern_that_names_no_expert_is_warned_about():
    model = with_adapter(mixtral(), momentum_rank_pattern={"experts.up_proj": 2})
    with pytest.warns(UserWarning, match="'experts.up_proj' names no module with an adapter"):
        create_lorapre_optimizer(model, lr=1e-2, verbose=False)


@pytest.mark.parametrize("adapter", [False, True], ids=["weights", "target_parameters"])
def test_experts_that_the_router_passes_over_stay_as_they_are(adapter):
    """Three tokens reach at most three of Mixtral's four experts in a layer."""
    model = mixtral()
    model = with_adapter(model, init_lora_weights=False) if adapter else model
    built = create_lorapre_optimizer(model, lr=1e-2, weight_decay=0.1, momentum_rank=2, verbose=False)
    ids = tokens_of(0)[:1, :3]
    model(input_ids=ids, labels=ids).loss.backward()
    stacks = {p: g for g in built.param_groups if g["experts"] is not None for p in g["params"]}
    before = {param: param.detach().clone() for param in stacks}
    built.step()
    passed_over = 0
    for param, group in stacks.items():
        layout = "3-D" if param.ndim == 3 else "lora_A" if group["experts_dim"] == 0 else "lora_B"
        views = (unstacked(layout, tensor, 4) for tensor in (param, before[param], param.grad))
        for e, (new, old, grad) in enumerate(zip(*views)):
            assert torch.equal(new, old) == (not grad.any())
            assert built.state[param]["step"][e] == bool(grad.any())
            passed_over += not grad.any()
    assert passed_over >= len(stacks)


def test_target_modules_select_experts_by_name():
    for names, expected in (
        (["gate_up_proj"], {"gate_up_proj"}),
        (["q_proj", "experts.down_proj"], {"down_proj"}),
        (["experts"], {"gate_up_proj", "down_proj"}),
        (r".*\.layers\.0\.mlp\.experts\.down_proj", {"down_proj"}),
        (["q_proj"], set()),
    ):
        model = qwen()
        built = create_lorapre_optimizer(model, target_modules=names, momentum_rank=2, verbose=False)
        found = {name.rpartition(".")[2] for name, g in groups_by_name(built).items() if g["experts"] is not None}
        assert found == expected


def test_router_and_shared_experts_are_matrices_of_their_own():
    model = deepseek()
    built = create_lorapre_optimizer(model, momentum_rank=2, verbose=False)
    named = groups_by_name(built)
    assert named["model.layers.1.mlp.gate.weight"]["momentum_rank"] == 0
    shared = named["model.layers.1.mlp.shared_experts.down_proj.weight"]
    assert (shared["momentum_rank"], shared["experts"]) == (2, None)


@pytest.mark.parametrize(
    "model",
    [
        ViTModel(
            ViTConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32
            )
        ),
        Wav2Vec2Model(
            Wav2Vec2Config(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=4,
                conv_dim=(8,),
                conv_stride=(2,),
                conv_kernel=(3,),
                num_conv_pos_embedding_groups=4,
            )
        ),
    ],
    ids=["vit", "wav2vec2"],
)  # fmt: skip
def test_other_tensors_of_three_dimensions_are_no_experts(model):
    assert any(param.ndim == 3 for param in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built = create_lorapre_optimizer(model, momentum_rank=2, verbose=False)
    assert all(group["experts"] is None for group in built.param_groups)


def test_the_command_line_of_memory_knows_experts(tmp_path, capsys):
    model = qwen()
    model.config.save_pretrained(tmp_path)
    main([str(tmp_path), "--momentum-rank", "2", "--dtype", "float32", "--batch", "0"])
    lines = capsys.readouterr().out.splitlines()
    ours = next(line for line in lines if line.startswith("LoRA-Pre AdamW, als k=2, in backward"))
    built = create_lorapre_optimizer(model, momentum_rank=2, verbose=False)
    state = sum(built.param_state_bytes(p, g) for g in built.param_groups for p in g["params"])
    assert f"{state / 1e3:.2f} kB" in ours
    main([str(tmp_path), "--lora-r", "8"])
    assert "r = 8" in capsys.readouterr().out


def test_a_saved_adapter_and_its_optimizer_go_on(tmp_path):
    """The state of a run on target_parameters comes back with a fresh model and optimizer."""
    model = with_adapter(mixtral(), momentum_rank=3)
    optimizer = create_lorapre_optimizer(model, lr=1e-2, verbose=False)
    train(optimizer, loss_of(model), steps=3)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = with_adapter(
        mixtral(), **{n: getattr(LoRAPreConfig.from_pretrained(tmp_path), n) for n in ("momentum_rank",)}
    )
    again.load_adapter(str(tmp_path), "default", is_trainable=True)
    resumed = create_lorapre_optimizer(again, lr=1e-2, verbose=False)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for each, its in ((model, optimizer), (again, resumed)):
        train(its, loss_of(each, step=1), steps=2)
    pairs = list(zip(model.named_parameters(), again.named_parameters(), strict=True))
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    assert any(name.endswith("lora_B.default.weight") and param.any() for (name, param), _ in pairs)
