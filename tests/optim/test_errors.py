"""Every documented error, by its message, and that what was refused has changed nothing."""

import copy
from types import SimpleNamespace

import pytest
import torch
from stepping import both_optimizers
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from lorapre_peft import LoRAPreAdamW, LoRAPreMuon
from lorapre_peft.optim.options import check_gradient

NAN, INF = float("nan"), float("inf")

COMMON = [
    ({"lr": -1e-3}, r"lr=-0\.001: expected a number of at least 0"),
    ({"lr": NAN}, r"lr=nan: expected a number of at least 0"),
    ({"lr": INF}, r"lr=inf: expected a number of at least 0"),
    ({"lr": "fast"}, r"lr='fast': expected a number of at least 0"),
    ({"lr": "2e-4"}, r"lr='2e-4': expected a number of at least 0"),  # as YAML reads it
    ({"lr": torch.ones(2)}, r"lr is a tensor of shape \(2,\); expected a number or a tensor with one element"),
    ({"lr": torch.tensor(-1.0)}, r"lr=tensor\(-1\.\): expected a number of at least 0"),
    ({"weight_decay": -0.1}, r"weight_decay=-0\.1: expected a number of at least 0"),
    ({"weight_decay": None}, r"weight_decay=None: expected a number of at least 0"),
    ({"update_rule": "sgd"}, r"update_rule='sgd': expected one of 'als', 'newton'"),
    ({"momentum_rank": -1}, r"momentum_rank=-1: expected a whole number of at least 1, None .*, or 0"),
    ({"momentum_rank": 2.0}, r"momentum_rank=2\.0: expected a whole number"),
    ({"momentum_rank": True}, r"momentum_rank=True: expected a whole number"),
    ({"residual_weight": -0.1}, r"residual_weight=-0\.1: expected a number in \[0, 1\]$"),
    ({"residual_weight": 1.1}, r"residual_weight=1\.1: expected a number in \[0, 1\]$"),
    (
        {"residual_weight": 0.2, "update_rule": "newton"},
        r"residual_weight=0\.2 is an option of update_rule='als', found update_rule='newton': leave it out, or",
    ),
    ({"seed": 0.5}, r"seed=0\.5: expected a whole number"),
    ({"seed": -1}, r"seed=-1: expected a whole number of at least 0"),
    ({"update_scale": -1.0}, r"update_scale=-1\.0: expected a number above 0"),
    ({"update_scale": 0}, r"update_scale=0: expected a number above 0"),
    ({"max_param_grad_norm": 0}, r"max_param_grad_norm=0: expected a number above 0, or None for no clipping"),
    ({"max_param_grad_norm": "1e3x"}, r"max_param_grad_norm='1e3x': expected a number above 0"),
    ({"max_param_grad_norm": float("inf")}, r"max_param_grad_norm=inf: expected a number above 0"),
    ({"maximize": "False"}, r"maximize='False': expected True or False"),  # as a shell or YAML may give it
    ({"bf16_rounding": "up"}, r"bf16_rounding='up': expected 'nearest' or 'stochastic'"),
    ({"temporary_bytes": 0}, r"temporary_bytes=0: expected a number of at least 1"),
]
ADAMW = [
    ({"betas": (1.0, 0.95)}, r"betas\[0\]=1\.0: expected a number in \[0, 1\)$"),
    ({"betas": (-0.1, 0.95)}, r"betas\[0\]=-0\.1: expected a number in \[0, 1\)$"),
    ({"betas": (0.9, 1.0)}, r"betas\[1\]=1\.0: expected a number in \[0, 1\)$"),
    ({"betas": (0.9, NAN)}, r"betas\[1\]=nan: expected a number in \[0, 1\)$"),
    (
        {"betas": (0.9, 0.81)},
        r"betas=\(0\.9, 0\.81\): update_rule='als' needs betas\[0\]² < betas\[1\], found 0\.81 and",
    ),
    (
        {"betas": (0.99, 0.95)},
        r"needs betas\[0\]² < betas\[1\], found 0\.9801 and 0\.95; .* the paper has \(0\.9, 0\.95\)",
    ),
    ({"eps": -1e-8}, r"eps=-1e-08: expected a number of at least 0"),
]
MUON = [
    ({"momentum": 1.0}, r"momentum=1\.0: expected a number in \[0, 1\)$"),
    ({"momentum": -0.5}, r"momentum=-0\.5: expected a number in \[0, 1\)$"),
    ({"adamw_betas": (1.0, 0.95)}, r"adamw_betas\[0\]=1\.0: expected a number in \[0, 1\)$"),
    ({"adamw_betas": (0.9, -1)}, r"adamw_betas\[1\]=-1: expected a number in \[0, 1\)$"),
    ({"adamw_eps": -1.0}, r"adamw_eps=-1\.0: expected a number of at least 0"),
    ({"adjust_lr_fn": "rms"}, r"adjust_lr_fn='rms': expected None, 'original' or 'match_rms_adamw'"),
    ({"ns_steps": 0}, r"ns_steps=0: expected a whole number of at least 1"),
    ({"ns_steps": 2.5}, r"ns_steps=2\.5: expected a whole number of at least 1"),
    ({"adamw_lr": -1.0}, r"adamw_lr=-1\.0: expected a number of at least 0"),
    ({"adamw_lr": 1e-3, "lr": 0.0}, r"adamw_lr follows the schedule of lr in proportion and cannot follow lr=0"),
]
OPTIONS = [(cls, *case) for cls in (LoRAPreAdamW, LoRAPreMuon) for case in COMMON]
OPTIONS += [(LoRAPreAdamW, *case) for case in ADAMW] + [(LoRAPreMuon, *case) for case in MUON]


def matrix():
    return nn.Parameter(torch.ones(20, 12))


def trained(cls, **options):
    """An optimizer of one compressed matrix and one vector, after a step."""
    params = [matrix(), nn.Parameter(torch.ones(12))]
    optimizer = cls(params, momentum_rank=2, **options)
    for param in params:
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    return optimizer


def assert_unchanged(optimizer, before):
    now = optimizer.state_dict()
    assert now["param_groups"] == before["param_groups"]
    assert now["state"].keys() == before["state"].keys()
    for index, state in before["state"].items():
        assert now["state"][index].keys() == state.keys()
        assert all(torch.equal(now["state"][index][name], value) for name, value in state.items())


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "options", "message"), OPTIONS)
def test_option_out_of_range(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls([matrix()], **options)


@pytest.mark.parametrize(("cls", "options", "message"), OPTIONS)
def test_bad_group_leaves_the_optimizer_as_it_was(cls, options, message):
    optimizer = trained(cls)
    before = copy.deepcopy(optimizer.state_dict())
    added = matrix()
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [added], **options})
    assert_unchanged(optimizer, before)
    optimizer.add_param_group({"params": [added]})  # it was not left behind as a duplicate either
    assert len(optimizer.param_groups) == 2


# A learning rate below 0 is let be, as schedules end there by round-off, and one of 0 once there was another. A rank
# of 2.0 is equal to what was there.
LET_BE = ("lr=-0", "lr=tensor", "adamw_lr follows", "momentum_rank=2\\.0")
EDITED = [
    case for case in OPTIONS if not case[2].replace("\\(", "(").startswith(LET_BE) and "newton" not in case[1].values()
]


@pytest.mark.parametrize(("cls", "options", "message"), EDITED)
def test_an_option_edited_out_of_its_range_stops_the_next_step(cls, options, message):
    optimizer = trained(cls)
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.ones_like(param)
    weights, before = param.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(param, weights)
    assert str(optimizer.state_dict()["state"]) == str(before)


@both_optimizers
def test_a_list_of_betas_edited_in_place_stops_the_next_step(cls):
    name = "betas" if cls is LoRAPreAdamW else "adamw_betas"
    optimizer = trained(cls, **{name: [0.9, 0.95]})
    optimizer.step()
    optimizer.param_groups[0][name][0] = 2.0
    with pytest.raises(ValueError, match=rf"{name}\[0\]=2.0: expected"):
        optimizer.step()


@both_optimizers
def test_keys_of_a_group_that_look_like_options_are_named(cls):
    with pytest.warns(
        UserWarning, match="found the key 'momentm_rank' in a group .*; alike is 'momentum_rank'"
    ) as said:
        cls([{"params": [matrix()], "momentm_rank": 2, "name": "mine"}], momentum_rank=2)
    assert [warning.filename for warning in said] == [__file__]
    optimizer = trained(cls)
    with pytest.warns(UserWarning, match="found the key 'rank'") as said:
        optimizer.add_param_group({"params": [matrix()], "rank": 2})
    assert __file__ in {warning.filename for warning in said}


@both_optimizers
@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.95, 0.99), 0.9, None])
def test_betas_are_a_pair(cls, betas):
    name = "betas" if cls is LoRAPreAdamW else "adamw_betas"
    optimizer = trained(cls)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=rf"^{name}=.*: expected a pair of numbers in \[0, 1\)"):
        optimizer.add_param_group({"params": [matrix()], name: betas})
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("betas", [(0.9, 0.81), (0.99, 0.95), (0.9, 0.0)])
def test_newton_takes_any_betas(betas):
    """The bound that als clamps to needs β1² < β2; the published rule has no clamp."""
    param = matrix()
    optimizer = LoRAPreAdamW([param], betas=betas, update_rule="newton", momentum_rank=2)
    for _ in range(3):
        param.grad = torch.ones(20, 12)
        optimizer.step()
    assert param.isfinite().all()


@pytest.mark.parametrize("seed", [2**32 - 1, 2**62])
def test_large_seeds(seed):
    """Any whole number of at least 0 is accepted, so none may fail at the first step instead."""
    param = matrix()
    optimizer = LoRAPreAdamW([param], update_rule="newton", seed=seed)
    param.grad = torch.ones(20, 12)
    optimizer.step()
    assert (param < 1).all()


@both_optimizers
def test_update_in_backward_is_of_the_whole_optimizer(cls):
    optimizer = trained(cls)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"update_in_backward is an option of the whole optimizer: give it to the"):
        optimizer.add_param_group({"params": [matrix()], "update_in_backward": True})
    assert_unchanged(optimizer, before)


@both_optimizers
def test_edges_of_the_ranges_are_allowed(cls):
    for options in (
        {"residual_weight": 0.0},
        {"residual_weight": 1},
        {"momentum_rank": 0},
        {"lr": 0},
        {"lr": torch.ones(1)},
    ):
        cls([matrix()], **options)
    if cls is LoRAPreAdamW:
        cls([matrix()], betas=(0.0, 0.5), eps=0)
    else:
        cls([matrix()], momentum=0.0, adamw_lr=0.0, ns_steps=1)


# ---- parameters and gradients ---------------------------------------------------------------------------------------


def marked(**attributes):
    param = matrix()
    for name, value in attributes.items():
        setattr(param, name, value)
    return param


PARAMETERS = [
    (nn.Parameter(torch.ones(4, 3, dtype=torch.complex64)), TypeError, r"shape \(4, 3\) .*complex64; .* real"),
    (nn.Parameter(torch.ones(4, 3).to(torch.float8_e4m3fn)), TypeError, r"float8_e4m3fn, which torch .* float16"),
    (nn.Parameter(TwoTensor(torch.ones(4, 3), torch.ones(4, 3))), TypeError, r"TwoTensor, which holds .* of torch"),
    (marked(_fsdp_flattened=True), NotImplementedError, r"shape \(20, 12\) that FSDP1 has "
                                                        r"flattened: .* Use FSDP2, DDP"),
    (marked(ds_id=3), NotImplementedError, r"shape \(20, 12\) that DeepSpeed ZeRO-3 has flattened: .* FSDP2"),
]  # fmt: skip


@both_optimizers
@pytest.mark.parametrize(
    ("param", "error", "message"), PARAMETERS, ids=["complex", "float8", "wrapper", "fsdp1", "zero3"]
)
def test_parameters_that_no_step_could_update(cls, param, error, message):
    with pytest.raises(error, match=message):
        cls([param])
    optimizer = trained(cls)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [matrix(), param]})
    assert_unchanged(optimizer, before)


@both_optimizers
def test_sparse_gradient(cls):
    """Refused before any parameter of the step has moved."""
    embedding, other = nn.Embedding(20, 12, sparse=True), matrix()
    optimizer = cls([other, embedding.weight], momentum_rank=2)
    embedding(torch.tensor([1, 2])).sum().backward()
    other.grad = torch.ones(20, 12)
    with pytest.raises(RuntimeError, match=r"found a sparse gradient of shape \(20, 12\); .* with sparse=False"):
        optimizer.step()
    assert torch.equal(other, torch.ones(20, 12))
    assert not optimizer.state


def test_complex_gradient():
    """torch does not let a real parameter have one by assignment; engines that write gradients themselves can."""
    grad = torch.ones(4, 3, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=r"found a complex gradient of shape \(4, 3\)"):
        check_gradient(SimpleNamespace(grad=grad, shape=grad.shape))


@both_optimizers
def test_flattened_shards(cls):
    """DeepSpeed ZeRO puts one flat tensor in the place of a group's parameters after the optimizer was built."""
    optimizer = cls([matrix(), nn.Parameter(torch.ones(12))])
    flat = nn.Parameter(torch.ones(252))
    flat.grad = torch.ones(252)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(
        RuntimeError, match=r"built with 1 matrices and now holds only flat tensors of shapes \[\(252,\)\].* Use FSDP2"
    ):
        optimizer.step()
    assert torch.equal(flat, torch.ones(252))


@both_optimizers
def test_groups_of_vectors_are_no_shards(cls):
    """Biases and norms in a group of their own are what every recipe has."""
    params = [matrix(), nn.Parameter(torch.ones(12))]
    optimizer = cls([{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}])
    for param in params:
        param.grad = torch.ones(param.shape)
    optimizer.step()
    assert (params[1] < 1).all()


# ---- loaded state ---------------------------------------------------------------------------------------------------


def saved_by(build):
    """The state_dict of an optimizer over the two parameters of `trained`, after a step."""
    params = [matrix(), nn.Parameter(torch.ones(12))]
    optimizer = build(params)
    for param in params:
        param.grad = torch.ones(param.shape)
    optimizer.step()
    return optimizer.state_dict()


def edited(edit):
    state_dict = saved_by(lambda params: LoRAPreAdamW(params, momentum_rank=2))
    edit(state_dict)
    return state_dict


def transposed(params):
    params[0] = nn.Parameter(torch.ones(12, 20))
    return LoRAPreAdamW(params, momentum_rank=2)


REFUSED = {
    "nothing": (lambda: {}, r"found no 'state' and 'param_groups' .* expected a state_dict of LoRAPreAdamW"),
    "a model": (lambda: nn.Linear(3, 2).state_dict(), r"found no 'state' and 'param_groups'"),
    "torch's AdamW": (
        lambda: saved_by(torch.optim.AdamW),
        r"the saved groups have no .*momentum_rank.*: they are another optimizer's, expected LoRAPreAdamW's",
    ),
    "Muon's": (
        lambda: saved_by(lambda params: LoRAPreMuon(params, momentum_rank=2)),
        r"the saved groups have no betas, eps, second_momentum_rank: they are another optimizer's, expected "
        r"LoRAPreAdamW's",
    ),
    "another rank": (
        lambda: saved_by(lambda params: LoRAPreAdamW(params, momentum_rank=3)),
        r"shape \(20, 12\) was saved with momentum_rank=3, .*; this LoRAPreAdamW has momentum_rank=2, .* Build the",
    ),
    "another rule": (
        lambda: saved_by(lambda params: LoRAPreAdamW(params, momentum_rank=2, update_rule="newton")),
        r"shape \(20, 12\) was saved with .* update_rule='newton'; this LoRAPreAdamW has .* update_rule='als'",
    ),
    "uncompressed": (
        lambda: saved_by(lambda params: LoRAPreAdamW(params, momentum_rank=0)),
        r"was saved with momentum_rank=0, .* has momentum_rank=2, .* factors are not converted",
    ),
    "another rank before the first step": (
        lambda: LoRAPreAdamW([matrix(), nn.Parameter(torch.ones(12))], momentum_rank=3).state_dict(),
        r"was saved with momentum_rank=3",
    ),
    "a number for a state": (lambda: edited(lambda s: s["state"].update({0: 1})), r"not those of a state_dict of Lo"),
    "a number for a group": (lambda: edited(lambda s: s["param_groups"].append(1)), r"not those of a "
                                                                                    r"state_dict of Lo"),
    "an option out of its range": (
        lambda: edited(lambda s: s["param_groups"][0].update(lr=NAN)),
        r"lr=nan: expected a number of at least 0",
    ),
    "another order": (
        lambda: saved_by(lambda params: LoRAPreAdamW(params[::-1], momentum_rank=2)),
        r"the saved state of parameter 0 of shape \(20, 12\) is .*exp_avg",
    ),
    "another shape": (lambda: saved_by(transposed), r"parameter 0 of shape \(20, 12\) is .*\(12, 2\)"),
    "a missing tensor": (lambda: edited(lambda s: s["state"][0].pop("m_A")), r"parameter 0 of shape \(20, 12\)"),
    "a number for a tensor": (lambda: edited(lambda s: s["state"][1].update(step=1)), r"parameter 1 .*'step': 'int'"),
    "more groups": (
        lambda: saved_by(lambda params: LoRAPreAdamW([{"params": [param]} for param in params], momentum_rank=2)),
        r"groups of \[1, 1\] parameters; this LoRAPreAdamW has groups of \[2\]",
    ),
    "fewer parameters": (
        lambda: edited(lambda s: (s["param_groups"][0]["params"].pop(), s["state"].pop(1))),
        r"groups of \[1\] parameters; this LoRAPreAdamW has groups of \[2\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_foreign_state_is_refused_with_nothing_changed(make, message):
    """torch would load much of this without a word and fail, or train wrongly, at the next step."""
    optimizer = trained(LoRAPreAdamW, lr=0.5)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make())
    assert_unchanged(optimizer, before)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
    optimizer.load_state_dict(before)
    optimizer.step()


def test_factors_of_another_rule_are_refused_though_their_shapes_agree():
    optimizer = trained(LoRAPreMuon)
    with pytest.raises(
        ValueError, match=r"saved with .*update_rule='newton'; this LoRAPreMuon has .*update_rule='als'"
    ):
        optimizer.load_state_dict(trained(LoRAPreMuon, update_rule="newton").state_dict())


def test_adamw_state_is_refused_by_muon():
    optimizer = trained(LoRAPreMuon)
    with pytest.raises(
        ValueError, match=r"the saved groups have no adamw_betas, .*momentum, .*expected LoRAPreMuon's"
    ):
        optimizer.load_state_dict(trained(LoRAPreAdamW).state_dict())
