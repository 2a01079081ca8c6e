"""Matrices that are stepped together, in tiles, or with other strides: each takes the step that it takes alone."""

from functools import partial

import numpy as np
import pytest
import torch
from roundoff import assert_same_steps, undisturbed
from stepping import LR, both_optimizers, both_rules, products, stream, take_steps, weights
from torch import nn

from lorapre_peft import LoRAPreAdamW, LoRAPreMuon
from lorapre_peft.lowrank import constants as module
from lorapre_peft.lowrank.batch import Batch
from lorapre_peft.lowrank.constants import constants
from lorapre_peft.lowrank.layout import TEMPORARIES


@both_optimizers
@both_rules
@pytest.mark.parametrize(("shape", "k"), [((12, 10), 2), ((40, 24), 6), ((140, 132), 5), ((12, 40), 1)], ids=str)
def test_stacked_equal_alone(cls, rule, shape, k):
    """What is beside a matrix must not show in its step, but for the order in which a BLAS sums a batch and a single
    product.
    """
    n, grads = 5, [stream(shape, 8, seed=i) for i in range(5)]

    def trained(groups, prepare=undisturbed):
        params = [weights(*shape, seed=i) for i in range(n)]
        optimizer = prepare(cls(groups(params), lr=LR, momentum_rank=k, update_rule=rule))
        take_steps(optimizer, params, *grads)
        return [*params, *(product for param in params for product in products(optimizer.state[param]))]

    # A group each: never stacked, and the positions stay.
    assert_same_steps(trained(list), partial(trained, lambda params: [{"params": [param]} for param in params]))


def bytes_for_tiles_of(entries):
    """``temporary_bytes`` of which half holds all temporaries of a tile of so many entries."""
    return 2 * 4 * TEMPORARIES * entries


def watch_tiles(monkeypatch):
    """{((matrices), (rows)), …}: the tiles of gradients that are read from now on."""
    seen, gradients = set(), Batch.gradients

    def spy(batch, matrices, rows):
        seen.add(((matrices.start, matrices.stop), (rows.start, rows.stop)))
        return gradients(batch, matrices, rows)

    monkeypatch.setattr(Batch, "gradients", spy)
    return seen


@both_rules
@pytest.mark.parametrize("shape", [(40, 10), (10, 2, 20)], ids=str)
@pytest.mark.parametrize("rows", [3, 7, 39])
def test_tiles_equal_whole(monkeypatch, rule, shape, rows):
    """Row tiles, the last one smaller, give the whole's step up to the order of float32 sums.

    k + 8 ≥ min(p, q), so that the subspace iteration by which a tiled start replaces the SVD is exact.
    """
    q = int(np.prod(shape[1:]))
    seen = watch_tiles(monkeypatch)
    grads = [stream(shape, 15, seed=i) for i in range(2)]

    def trained(temporary_bytes, prepare=undisturbed):
        params = [weights(*shape, seed=i) for i in range(2)]
        options = dict(momentum_rank=2, update_rule=rule, temporary_bytes=temporary_bytes)
        take_steps(prepare(LoRAPreAdamW(params, lr=LR, backend="eager", **options)), params, *grads)
        return params

    assert_same_steps(trained(bytes_for_tiles_of(q * rows)), partial(trained, 64_000_000))
    p, step = shape[0], min(rows, shape[0])
    assert {tile for _, tile in seen} == {(0, p)} | {(i, min(i + step, p)) for i in range(0, p, step)}


def watch_batches(monkeypatch):
    """[n, …]: how many matrices each batch has that is stepped from now on."""
    sizes, update = [], LoRAPreAdamW._update

    def spy(optimizer, batch):
        sizes.append(len(batch))
        return update(optimizer, batch)

    monkeypatch.setattr(LoRAPreAdamW, "_update", spy)
    return sizes


def test_batches_equal_whole(monkeypatch):
    """Matrices too many for the bound are stepped in several batches: the same steps."""
    shapes, sizes = [(12, 10)] * 3 + [(8, 14)] * 2, watch_batches(monkeypatch)
    grads = [stream(shape, 10, seed=i) for i, shape in enumerate(shapes)]
    factors = (2 + 1) * 22  # entries: moments of k(p+q) and of p+q, the same for both shapes

    def trained(temporary_bytes, prepare=undisturbed):
        sizes.clear()
        params = [weights(*shape, seed=i) for i, shape in enumerate(shapes)]
        options = dict(momentum_rank=2, temporary_bytes=temporary_bytes, backend="eager")
        take_steps(prepare(LoRAPreAdamW(params, lr=LR, **options)), params, *grads)
        return params

    found = trained(bytes_for_tiles_of(2 * factors))
    assert sizes == [2, 1, 2] * 10
    assert_same_steps(found, partial(trained, 64_000_000))
    assert sizes == [3, 2] * 10


@both_rules
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_groups_share_batches(monkeypatch, rule, backend):
    """Matrices of groups that differ in every number are stepped together, each by its own group's."""
    sizes = watch_batches(monkeypatch)
    own = [
        dict(lr=LR),
        dict(lr=3 * LR, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1, update_scale=0.5),
        dict(lr=LR, max_param_grad_norm=1.0, maximize=True, **({"residual_weight": 0.3} if rule == "als" else {})),
    ]
    grads = [stream((20, 12), 10, seed=i) for i in range(3)]

    def trained(groups, prepare=undisturbed):
        params = [group["params"][0] for group in groups]
        take_steps(prepare(LoRAPreAdamW(groups, momentum_rank=2, update_rule=rule, backend=backend)), params, *grads)
        return params

    def alone(prepare):
        found = []
        for i, options in enumerate(own):
            params = [weights(20, 12, seed=j) for j in range(3)]  # the positions, which `newton` starts from, stay
            optimizer = LoRAPreAdamW(params, momentum_rank=2, update_rule=rule, backend="eager", **options)
            take_steps(prepare(optimizer), params, *grads)
            found.append(params[i])
        return found

    found = trained([{"params": [weights(20, 12, seed=i)], **options} for i, options in enumerate(own)])
    assert sizes == ([3] * 10 if backend == "eager" else [])
    assert_same_steps(found, alone)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_options_that_matrices_of_a_batch_share_are_those_of_their_group(backend):
    """Muon's groups of equal shape and rank, of which each differs from the first one in one thing."""
    own = [
        {},
        {"momentum": 0.8},
        {"nesterov": True},
        {"ns_steps": 3},
        {"ns_dtype": "bfloat16"},
        {"adjust_lr_fn": "match_rms_adamw"},
        {"residual_weight": 0.1},
        {"weight_decay": 0.1},
        {"update_rule": "newton", "residual_weight": None},
        {"bf16_rounding": "nearest"},
    ]
    check_each_group(LoRAPreMuon, own, backend)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_rules_and_roundings_of_adamws_groups_are_their_own(backend):
    check_each_group(LoRAPreAdamW, [{}, {"update_rule": "newton"}, {"bf16_rounding": "nearest"}], backend)


def check_each_group(cls, own, backend):
    """Groups of one bfloat16 matrix each take the steps of optimizers in which all matrices have their options."""
    grads = [stream((20, 12), 6, seed=i) for i in range(len(own))]

    def trained(options):
        params = [weights(20, 12, seed=i, dtype=torch.bfloat16) for i in range(len(own))]
        groups = [{"params": [param], **given} for param, given in zip(params, options)]
        take_steps(cls(groups, lr=LR, momentum_rank=2, backend=backend), params, *grads)
        return params

    together, plain = trained(own), trained([{}] * len(own))
    for i, options in enumerate(own):
        assert torch.equal(together[i], trained([options] * len(own))[i]), options
        assert (not options) == torch.equal(together[i], plain[i]), options


@both_optimizers
@both_rules
def test_non_contiguous_gradients_and_parameters(cls, rule):
    """Transposed storage and channels_last are what autograd may hand over; the step must see shapes, not strides."""
    grads, conv = stream((20, 12), 10), stream((8, 4, 3, 3), 10)
    turned = [g.mT.contiguous().mT for g in grads], [g.contiguous(memory_format=torch.channels_last) for g in conv]
    strided = [
        nn.Parameter(weights(20, 12).detach().mT.contiguous().mT),
        nn.Parameter(weights(8, 4, 3, 3).detach().clone(memory_format=torch.channels_last)),
    ]

    def trained(params, streams, prepare=undisturbed):
        take_steps(prepare(cls(params, lr=LR, momentum_rank=2, update_rule=rule)), params, *streams)
        return params

    assert_same_steps(
        trained(strided, turned),
        lambda prepare: trained([weights(20, 12), weights(8, 4, 3, 3)], (grads, conv), prepare),
    )


@both_optimizers
@both_rules
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_convolution_as_large_as_a_matrix(cls, rule, backend):
    """A linear layer and convolutions that flatten to its shape are stepped as three linear layers would be."""
    shapes = [(20, 12), (20, 12, 1), (20, 3, 2, 2)]
    grads = [stream((20, 12), 10, seed=i) for i in range(3)]

    def trained(shapes, prepare=undisturbed):
        params = [nn.Parameter(weights(20, 12, seed=i).detach().reshape(shape)) for i, shape in enumerate(shapes)]
        streams = [[g.reshape(shape) for g in own] for own, shape in zip(grads, shapes)]
        options = dict(momentum_rank=2, update_rule=rule, weight_decay=0.1, backend=backend)
        take_steps(prepare(cls(params, lr=LR, **options)), params, *streams)
        return [param.view(20, 12) for param in params]

    assert_same_steps(trained(shapes), partial(trained, [(20, 12)] * 3))


def test_a_constant_of_a_captured_graph_is_its_own(monkeypatch):
    """One that was there before is read, and stays; one made in a capture is filled by that graph alone."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(module, "_kept", {})
    monkeypatch.setattr(module, "_of_graphs", {})
    monkeypatch.setattr(module, "KEPT", 2)
    before = constants((1.0, 2.0), cpu)
    monkeypatch.setattr(module, "capturing", lambda device: True)
    assert constants((1.0, 2.0), cpu) is before
    captured = constants((3.0,), cpu)
    assert torch.equal(captured, torch.tensor([3.0], dtype=torch.float64))
    assert constants((3.0,), cpu) is not captured
    monkeypatch.setattr(module, "capturing", lambda device: False)
    later = [constants((float(i),), cpu) for i in range(3, 7)]
    assert constants((6.0,), cpu) is later[-1]
    assert constants((3.0,), cpu) is not later[0]  # only `KEPT` are kept,
    assert constants((1.0, 2.0), cpu) is before  # and what a graph reads
