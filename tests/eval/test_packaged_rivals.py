"""LoRA-FA, LoRA-Pro and SOAP, which come from packages, follow their papers. The oracles are in numpy and float64."""

import numpy as np
import pytest
import rivals
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainingArguments

from eval.methods import METHODS

LR, BETAS, EPS, STEPS = 1e-2, (0.9, 0.95), 1e-8, 6


def built(name, tmp_path, r, rows, columns):
    """Return an adapted linear layer and the method's optimizer for it. SOAP's factors are random."""
    method = METHODS[name]
    if reason := method.unavailable():
        pytest.skip(reason)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, rows, bias=False, dtype=torch.float64))
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"], init_lora_weights=name != "soap")
    model = get_peft_model(model, config, autocast_adapter_dtype=False).double()
    args = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=LR, adam_beta2=BETAS[1], weight_decay=0.0, use_cpu=True
    )
    layer = model.get_submodule("base_model.model.0")
    return layer, method.build(model, args, dict(method.options))


def test_lora_fa_follows_the_nearest_gradient_that_b_alone_can_have(tmp_path):
    """arXiv 2308.03303 as PEFT has it: the X of least ‖s X A − G‖ is G Aᵀ(A Aᵀ)⁻¹/s; Adam follows it."""
    layer, optimizer = built("lora-fa", tmp_path, 3, 9, 14)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    start, theta, s = A.detach().clone(), B.detach().numpy().copy(), 2.0
    adam, rng = rivals.Rule(LR, betas=BETAS, eps=EPS), np.random.default_rng(0)
    for t in range(1, STEPS + 1):
        G = rng.standard_normal((9, 14))
        B.grad = torch.tensor(s * G @ start.numpy().T)
        optimizer.step()
        adam.t = t
        m, v = rivals.moments(adam, G @ np.linalg.pinv(start.numpy()) / s)
        theta -= LR * rivals.late(adam) * m / (np.sqrt(v) + EPS)
        # The package adds 1e-8 to the diagonal of A Aᵀ, whose eigenvalues are above 0.1 here.
        np.testing.assert_allclose(B.detach().numpy(), theta, rtol=0, atol=1e-7 * LR * t)
    assert torch.equal(A, start)


def test_lora_pro_moves_the_product_as_full_fine_tuning_would(tmp_path):
    """arXiv 2407.18242, Algorithm 1.

    The factors' gradients stand for the part of the full gradient in the tangent space of B A. Adam's direction of
    that is again followed in the tangent space, and among the factors' steps that do so it is the one nearest to their
    own gradients (Theorem 2.3), for which g_A Aᵀ = Bᵀ g_B holds.
    """
    layer, optimizer = built("lora-pro", tmp_path, 3, 9, 14)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    s, adam, rng = 2.0, rivals.Rule(LR, betas=BETAS, eps=EPS), np.random.default_rng(0)
    for t in range(1, STEPS + 1):
        G, old_A, old_B = rng.standard_normal((9, 14)), A.detach().numpy().copy(), B.detach().numpy().copy()
        A.grad, B.grad = torch.tensor(s * old_B.T @ G), torch.tensor(s * G @ old_A.T)
        optimizer.step()
        step_A, step_B = (old_A - A.detach().numpy()) / LR, (old_B - B.detach().numpy()) / LR

        def tangent(X, A=old_A, B=old_B):
            outside_B, outside_A = np.eye(9) - B @ np.linalg.pinv(B), np.eye(14) - np.linalg.pinv(A) @ A
            return X - outside_B @ X @ outside_A

        adam.t = t
        wanted = tangent(rivals.corrected(adam, *rivals.moments(adam, tangent(G))))
        # The package, like the authors' code, rounds the gradient to bfloat16 (8 bits) where it is squared: v is off
        # by 2⁻⁸ at most, its root by half of that, and the projection lengthens no error.
        room = 2.0**-9 * np.linalg.norm(wanted)
        assert np.linalg.norm(s * (old_B @ step_A + step_B @ old_A) - wanted) < room
        if t > 1:  # Before, B is zero, and any step of A moves the product equally little.
            np.testing.assert_allclose(step_A @ old_A.T, old_B.T @ step_B, rtol=0, atol=1e-4 * abs(step_A).max())


def test_soap_is_adam_in_shampoos_eigenbasis(tmp_path):
    """arXiv 2409.11321, Algorithms 3 and 4: the first gradient only makes the basis, which is renewed every ten steps.

    The factors are square, since the null space of a Gram matrix has no basis that could be compared.
    """
    layer, optimizer = built("soap", tmp_path, 6, 6, 6)
    param = layer.lora_A["default"].weight
    other = layer.lora_B["default"].weight
    rng, beta, adam = np.random.default_rng(0), BETAS[1], rivals.Rule(LR, betas=BETAS)
    theta, m, v = param.detach().numpy().copy(), np.zeros((6, 6)), np.zeros((6, 6))
    L, R, Q_L, Q_R = (np.zeros((6, 6)) for _ in range(4))
    for t in range(13):
        G = rng.standard_normal((6, 6))
        param.grad, other.grad = torch.tensor(G), torch.tensor(G)
        optimizer.step()
        if t:
            m, v = BETAS[0] * m + (1 - BETAS[0]) * G, beta * v + (1 - beta) * (Q_L.T @ G @ Q_R) ** 2
            adam.t = t
            theta -= LR * rivals.late(adam) * Q_L @ ((Q_L.T @ m @ Q_R) / (np.sqrt(v) + EPS)) @ Q_R.T
        L, R = beta * L + (1 - beta) * G @ G.T, beta * R + (1 - beta) * G.T @ G
        if t == 0:
            Q_L, Q_R = (np.linalg.eigh(X)[1][:, ::-1] for X in (L, R))
        elif t % 10 == 0:
            orders = [np.argsort(-np.diag(Q.T @ X @ Q)) for X, Q in ((L, Q_L), (R, Q_R))]
            v = v[orders[0]][:, orders[1]]
            Q_L, Q_R = (np.linalg.qr((X @ Q)[:, order])[0] for X, Q, order in zip((L, R), (Q_L, Q_R), orders))
        # The package makes the renewed basis in float32; a step is LR long in each entry of the basis.
        np.testing.assert_allclose(param.detach().numpy(), theta, rtol=0, atol=1e-12 if t <= 10 else 1e-5 * LR)
