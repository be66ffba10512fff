"""The recurrence on CUDA by Triton kernels of our own: normalised in the same pass, grouped keys read where they are.

A sequence is cut into chunks of C tokens. With a_t = delta_t A and W_ts = exp(-sum_{s<r<=t} a_r) delta_s inside of
a chunk, h and z the state that enters it (kept once a chunk in the inputs' dtype, accumulated in float32):

    y_t = (W_t h^T q_t + sum_s W_ts (q_t . k_s) v_s) / (W_t z^T q_t + sum_s W_ts (q_t . k_s))

Backward. With g_t = dy_t / den_t and gz_t = -(dy_t . y_t) / den_t the numerator and the denominator are one bilinear
form, so dq, dk and dv are such sums again, with the gradient of the state that leaves a chunk carried back. Multiplying
all weights of a token t leaves y_t as it is, so the decay's gradient comes from the keys' side alone (`decay_kernel`).
The states are computed again in the backward pass rather than kept. Time and memory are linear in the length.

The plain twin is `hm.ops.chunked`. Kernels: `hm.ops.fused_kernels`.
"""

import functools
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """How one kernel is launched: features and values in a tile (at most), warps and pipeline stages."""

    BN: int
    BP: int
    num_warps: int
    num_stages: int


def launches(dtype: torch.dtype, N: int, P: int) -> tuple[int, dict[str, Launch]]:
    """Tokens in a chunk, and the launch of each kernel: the best of those tried on an H100 (results/bench/)."""
    if dtype == torch.float32:
        return 32, dict.fromkeys(KERNELS, Launch(32, 32, 4, 1))
    if N * P > 256 * 128:
        best = (64, 128, 4, 2), (64, 128, 8, 3), (64, 128, 4, 2), (128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)
        return 128, {name: Launch(*values) for name, values in zip(KERNELS, best, strict=True)}
    best = (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 4, 2), (128, 64, 4, 2), (64, 64, 4, 2)
    return 64, {name: Launch(*values) for name, values in zip(KERNELS, best, strict=True)}


KERNELS = ("states", "output", "exits", "dq", "dk", "dv")


@functools.cache
def why_unavailable() -> str | None:
    """Why the kernels can't run here, in a few words, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return None


def fused_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor | None,
    A: Tensor | None,
    initial_state: Tensor | None = None,
    *,
    normalize: bool = True,
    return_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `hm.ops.linear_recurrence`; the state is empty unless `return_state`.

    Matrix products run in the widest dtype of q, k and v (float64 as float32), sums and states in float32.
    """
    dtype = functools.reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype))
    dtype = torch.float32 if dtype == torch.float64 else dtype
    q, k, v = (_rows(x.to(dtype)) for x in (q, k, v))
    delta, A, initial_state = (x if x is None else x.float().contiguous() for x in (delta, A, initial_state))
    y, _, state = _forward(q, k, v, delta, A, initial_state, normalize, return_state)
    return y, state


def _rows(x: Tensor) -> Tensor:
    """x with the last dimension's values side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Call:
    """Sizes, strides and launches that the kernels of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, delta: Tensor | None, A: Tensor | None, normalize: bool):
        self.B, self.L, self.H, self.N = q.shape
        self.G, self.P = k.shape[2], v.shape[3]
        self.C, self.launches = launches(q.dtype, self.N, self.P)
        self.chunks = -(-self.L // self.C)
        self.inputs = {"delta": delta, "A": A, "L": self.L, "H": self.H, "N": self.N, "P": self.P, "chunks": self.chunks}
        self.flags = {"HAS_DELTA": delta is not None, "HAS_DECAY": A is not None, "NORM": normalize, "C": self.C}
        for name, x in (("q", q), ("k", k), ("v", v)):
            last = "h" if name == "q" else "g"
            self.inputs |= {name: x, **{f"{name}_{axis}": x.stride(j) for j, axis in enumerate(("b", "l", last))}}
        self.inputs["R"] = self.H // self.G

    def blocks(self, kernel: str) -> tuple[int, int]:
        """Into how many tiles `kernel` cuts the values and the features."""
        launch = self.tile(kernel)
        return -(-self.P // launch.BP), -(-self.N // launch.BN)

    def tile(self, kernel: str) -> Launch:
        launch = self.launches[kernel]
        return launch._replace(BN=min(launch.BN, _power_of_two(self.N)), BP=min(launch.BP, _power_of_two(self.P)))

    def run(self, kernel: str, grid: tuple[int, int, int], **tensors: Any) -> None:
        from hm.ops import fused_kernels

        function = getattr(fused_kernels, f"{kernel}_kernel")
        given = self.inputs | self.flags | tensors
        function[grid](**{n: given[n] for n in function.arg_names if n in given}, **self.tile(kernel)._asdict())

    def states(self, initial: Tensor | None, last: Tensor | None) -> tuple[Tensor, Tensor]:
        """What enters each chunk: (B, H, chunks, N, P) and, in float32, (B, H, chunks, N)."""
        k = self.inputs["k"]
        states = k.new_empty(self.B, self.H, self.chunks, self.N, self.P)
        norms = k.new_empty(self.B, self.H, self.chunks, self.N, dtype=torch.float32)
        self.run("states", (*self.blocks("states"), self.B * self.H), initial=initial, states=states, norms=norms, last=last,
                 HAS_INITIAL=initial is not None, HAS_LAST=last is not None)  # fmt: skip
        return states, norms


def _power_of_two(size: int) -> int:
    """The next power of two, and no less than the 16 that a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


@torch.library.custom_op("hm::fused_scan", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, delta: Tensor | None, A: Tensor | None, initial: Tensor | None,
    normalize: bool, return_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y (B, L, H, P); the denominator (B, L, H) if normalize; the last state if return_state."""
    call = _Call(q, k, v, delta, A, normalize)
    y, den, last = _empty(q, k, v, delta, A, initial, normalize, return_state)
    states, norms = call.states(initial, last if return_state else None)
    grid = (call.blocks("output")[0], call.chunks, call.B * call.H)
    call.run("output", grid, states=states, norms=norms, y=y, den=den)
    return y, den, last


@_forward.register_fake
def _empty(q, k, v, delta, A, initial, normalize, return_state):
    (B, L, H, N), P = q.shape, v.shape[3]
    float32 = {"dtype": torch.float32}
    return (
        q.new_empty(B, L, H, P),
        q.new_empty((B, L, H) if normalize else (0,), **float32),
        q.new_empty((B, H, N, P + 1 if normalize else P) if return_state else (0,), **float32),
    )


@torch.library.custom_op("hm::fused_scan_backward", mutates_args=())
def _backward(
    dy: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, delta: Tensor | None, A: Tensor | None,
    initial: Tensor | None, y: Tensor, den: Tensor, last: Tensor, normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dq, dk, dv, ddelta, dA, dinitial; the last three empty where there is no such input."""
    from hm.ops import fused_kernels as kernels

    call = _Call(q, k, v, delta, A, normalize)
    B, L, H, G, chunks = call.B, call.L, call.H, call.G, call.chunks
    dq, dk, dv, ddelta, dA, dinitial = _empty_gradients(dy, dlast, q, k, v, delta, A, initial, y, den, last, normalize)
    float32 = {"dtype": torch.float32, "device": q.device}
    g, gz = torch.empty_like(y), torch.empty(B, L, H, **float32)
    states, norms = call.states(initial, None)
    exits, exit_norms = torch.empty_like(states), torch.empty_like(norms)
    blocks = call.blocks("exits")
    boundary = torch.zeros(B, H, chunks + 1, blocks[0] * blocks[1], **float32) if A is not None else None
    weighted = delta is not None or A is not None
    dweight = torch.empty(call.blocks("dv")[0], B, L, H, **float32) if weighted else None

    dy = _rows(dy)
    kernels.scale_kernel[(chunks, B * H)](
        dy, y, den, g, gz, L, H, call.P, *dy.stride()[:3], C=call.C, BP=_power_of_two(call.P), NORM=normalize
    )
    call.run("exits", (*blocks, B * H), g=g, gz=gz, states=states, norms=norms, dlast=dlast, exits=exits,
             exit_norms=exit_norms, boundary=boundary, dinitial=dinitial, HAS_INITIAL=initial is not None,
             HAS_LAST=dlast is not None)  # fmt: skip
    call.run("dq", (call.blocks("dq")[1], chunks, B * H), g=g, gz=gz, states=states, norms=norms, dq=dq)
    by_head = [x if G == H else x.new_empty(B, L, H, x.shape[-1]) for x in (dk, dv)]
    call.run("dk", (call.blocks("dk")[1], chunks, B * H), g=g, gz=gz, exits=exits, exit_norms=exit_norms, dk=by_head[0])
    call.run("dv", (call.blocks("dv")[0], chunks, B * H), g=g, gz=gz, exits=exits, exit_norms=exit_norms, dv=by_head[1],
             dweight=dweight)  # fmt: skip
    if G < H:
        dk, dv = (x.view(B, L, G, H // G, -1).sum(3) for x in by_head)
    if dweight is not None:
        if boundary is not None and dlast is not None:
            boundary[:, :, -1, 0] = (dlast * last).sum((-1, -2))
        by_chunk = torch.empty(B, H, chunks, **float32) if A is not None else None
        kernels.decay_kernel[(chunks, B * H)](
            dweight, gz, boundary, delta, A, ddelta, by_chunk, L, H, chunks, len(dweight), blocks[0] * blocks[1],
            C=call.C, BLOCK=_power_of_two(blocks[0] * blocks[1]), HAS_DELTA=delta is not None, HAS_DECAY=A is not None,
            NORM=normalize,
        )  # fmt: skip
        if by_chunk is not None:
            torch.sum(by_chunk, (0, 2), out=dA)
    return dq, dk, dv, ddelta, dA, dinitial


@_backward.register_fake
def _empty_gradients(dy, dlast, q, k, v, delta, A, initial, y, den, last, normalize):
    optional = [q.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in (delta, A, initial)]
    return (*(x.new_empty(x.shape) for x in (q, k, v)), *optional)


def _save(ctx, inputs, output) -> None:
    q, k, v, delta, A, initial, ctx.normalize, ctx.return_state = inputs
    y, den, last = output
    ctx.save_for_backward(q, k, v, delta, A, initial, y, den, last)
    ctx.mark_non_differentiable(den)


def _gradients(ctx, dy, dden, dlast):
    *tensors, y, den, last = ctx.saved_tensors
    found = _backward(dy, dlast if ctx.return_state else None, *tensors, y, den, last, ctx.normalize)
    given = [g if x is not None else None for g, x in zip(found, tensors, strict=True)]
    return (*given, None, None)


_forward.register_autograd(_gradients, setup_context=_save)
