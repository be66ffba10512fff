"""phi: the learned features whose inner product stands in for the kernel of softmax attention."""

import torch
from torch import Tensor, nn

from hm.errors import UserError

SOFTMAXES = ("joint", "separate")


class HedgehogFeatureMap(nn.Module):
    """phi(x) = softmax([Wx + b, -(Wx + b)]) in R^{2d}, with W the identity and b zero at the start.

    Three published forms differ, and this one names its choice:

    - `softmax="joint"` (default; arXiv 2604.14191): one softmax over all 2d features, which sum to 1.
    - `softmax="separate"` (lolcats): one softmax over each half, so that the features sum to 2. lolcats also
      has no bias and one W per head.
    - flash-linear-attention: joint softmax of [2Wx, -2Wx]. It is the joint form here with W and b doubled, so
      it starts sharper; the set of functions is the same.

    weight: (d, d), shared by the heads of a layer, or (num_heads, d, d) with `per_head`; bias: (d,) or
    (num_heads, d). The softmax is computed in float32 at least; the result has the dtype of x.

    Raises UserError if `softmax` is not one of SOFTMAXES.
    """

    def __init__(self, num_heads: int, head_dim: int, per_head: bool = False, softmax: str = "joint") -> None:
        super().__init__()
        if softmax not in SOFTMAXES:
            raise UserError(f"feature_map.softmax={softmax!r} is not known: use {' or '.join(SOFTMAXES)}.")
        self.num_heads, self.head_dim, self.per_head, self.softmax = num_heads, head_dim, per_head, softmax
        heads = (num_heads,) if per_head else ()
        self.weight = nn.Parameter(torch.empty(*heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.empty(*heads, head_dim))
        self.reset_parameters()

    @property
    def out_dim(self) -> int:
        """Features per head: 2d."""
        return 2 * self.head_dim

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W = I, b = 0."""
        self.weight.copy_(torch.eye(self.head_dim, device=self.weight.device).expand_as(self.weight))
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, L, num_heads, d), after the rotary embedding -> (B, L, num_heads, 2d)."""
        if self.per_head:
            u = torch.einsum("blhd,hed->blhe", x, self.weight) + self.bias
        else:
            u = nn.functional.linear(x, self.weight, self.bias)
        if u.dtype in (torch.bfloat16, torch.float16):
            return _LowPrecisionFeatures.apply(u, self.softmax == "joint").to(x.dtype)
        if self.softmax == "joint":
            features = torch.cat([u, -u], dim=-1).softmax(dim=-1)
        else:
            features = torch.cat([u.softmax(dim=-1), (-u).softmax(dim=-1)], dim=-1)
        return features.to(x.dtype)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, d={self.head_dim}, per_head={self.per_head}, softmax={self.softmax}"


class _LowPrecisionFeatures(torch.autograd.Function):
    """softmax([u, -u]) computed in float32, of which only the rounded result is kept for the backward pass: the
    recurrence keeps it anyway, and autograd would keep it in float32 beside that."""

    @staticmethod
    def forward(ctx, u: Tensor, joint: bool) -> Tensor:
        halves = torch.stack([u, -u], dim=-2).float()  # (..., 2, d)
        features = halves.flatten(-2).softmax(-1) if joint else halves.softmax(-1).flatten(-2)
        features = features.to(u.dtype)
        ctx.save_for_backward(features)
        ctx.joint = joint
        return features

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (features,) = ctx.saved_tensors
        weighted = (features.float() * grad.float()).unflatten(-1, (2, -1))
        total = weighted.sum((-2, -1), keepdim=True) if ctx.joint else weighted.sum(-1, keepdim=True)
        by_half = weighted - features.float().unflatten(-1, (2, -1)) * total
        return (by_half[..., 0, :] - by_half[..., 1, :]).to(grad.dtype), None
