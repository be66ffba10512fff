"""The losses of both stages. Every one is a mean over tokens, so none grows with the sequence length.

Losses on the next token are computed from hidden states and the output embedding, `ROWS` tokens at a time: the
logits of more tokens never exist, and none in float32 where the compute dtype is bfloat16 and the elementwise part
is compiled. The gradient with respect to the hidden states is worked out on the way forward, while a chunk's logits
are there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hm.compile import compiled

ROWS = 4096


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(student, teacher) over the last dimension, mean over tokens. Both (B, L, D) -> scalar float32."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """|student - teacher|^2 / |teacher|^2 over the last dimension, mean over tokens: it sees the magnitude as well as the
    direction, and is 1 for a student that says nothing. Both (B, L, D) -> scalar float32."""
    student, teacher = student.float(), teacher.float()
    return ((student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)).mean()


class NextToken(NamedTuple):
    """Scalars in nats, float32: the loss, and its two parts without their graph."""

    loss: Tensor
    ce: Tensor
    kl: Tensor


def next_token_loss(
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor,
    *,
    kl_weight: float = 0.0,
    teacher: tuple[Tensor, nn.Linear] | None = None,
    fused: bool = False,
) -> NextToken:
    """(1 - kl_weight) * cross-entropy + kl_weight * KL(teacher || student) of the next-token distributions.

    Args:
        hidden: (B, L, D) last hidden states; head: the output embedding (V, D). Gradients flow into both.
        labels: (B, L), the tokens that follow.
        teacher: its hidden states (B, L, D') and output embedding (V, D'), needed where kl_weight > 0.
        fused: compile the elementwise part.

    Products are computed in autocast's dtype, or that of `hidden`; the losses in float32 at least.
    """
    others = (None, None, None) if teacher is None else (teacher[0], teacher[1].weight, teacher[1].bias)
    part = compiled_token_losses() if fused else token_losses
    return NextToken(*_NextTokenLoss.apply(hidden, head.weight, head.bias, labels, *others, kl_weight, part))


def token_losses(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, kl_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of n tokens: the summed cross-entropy, the summed KL, and the gradient of their weighted sum by the logits.

    logits, teacher_logits: (n, V); labels: (n,). The gradient is (n, V), in the dtype of `logits`.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p = F.log_softmax(logits.to(dtype), dim=-1)
    ce = -log_p.gather(1, labels[:, None]).sum()
    right = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    if teacher_logits is None:
        return ce, torch.zeros_like(ce), (log_p.exp() - right.to(dtype)).to(logits.dtype)
    log_q = F.log_softmax(teacher_logits.to(dtype), dim=-1)
    q = log_q.exp()
    kl = (q * (log_q - log_p)).sum()
    grad = log_p.exp() - (1 - kl_weight) * right.to(dtype) - kl_weight * q
    return ce, kl, grad.to(logits.dtype)


@cache
def compiled_token_losses() -> Callable:
    return compiled(token_losses)


class _NextTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, teacher_hidden, teacher_weight, teacher_bias, kl_weight, part):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype

        def cast(*tensors):
            return [None if t is None else t.to(dtype) for t in tensors]

        w, b, teacher_w, teacher_b = cast(weight, bias, teacher_weight, teacher_bias)
        x, labels = hidden.flatten(0, 1), labels.flatten()
        teacher_x = None if teacher_hidden is None else teacher_hidden.flatten(0, 1)
        by_hidden, by_weight, by_bias = ctx.needs_input_grad[:3]
        dx = torch.empty_like(x, dtype=dtype) if by_hidden else None
        dw = torch.zeros_like(weight) if by_weight else None
        db = torch.zeros_like(bias) if by_bias else None
        total_ce, total_kl = (torch.zeros((), device=x.device, dtype=torch.promote_types(dtype, torch.float32)) for _ in "ck")
        with torch.autocast(device, enabled=False):
            for start in range(0, len(x), ROWS):
                rows = slice(start, start + ROWS)
                h = x[rows].to(dtype)
                logits = F.linear(h, w, b)
                teacher_logits = None if teacher_x is None else F.linear(teacher_x[rows].to(dtype), teacher_w, teacher_b)
                ce, kl, grad = part(logits, labels[rows], teacher_logits, kl_weight)
                total_ce += ce
                total_kl += kl
                if dx is not None:
                    torch.mm(grad, w, out=dx[rows])
                if dw is not None:
                    dw += grad.T @ h
                if db is not None:
                    db += grad.sum(0)
        ctx.save_for_backward(dx, dw, db)
        ctx.shape, ctx.dtype, ctx.tokens = hidden.shape, hidden.dtype, len(x)
        ce, kl = total_ce / len(x), total_kl / len(x)
        ctx.mark_non_differentiable(ce, kl)
        return (1 - kl_weight) * ce + kl_weight * kl, ce, kl

    @staticmethod
    def backward(ctx, grad, *_):
        dx, dw, db = ctx.saved_tensors
        scale = grad / ctx.tokens
        dx = None if dx is None else (dx.to(ctx.dtype) * scale).view(ctx.shape)
        return dx, *(None if d is None else d * scale for d in (dw, db)), None, None, None, None, None, None
