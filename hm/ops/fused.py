"""The recurrence on CUDA by Triton kernels of our own: normalised in the same pass, grouped keys read where they are.

A sequence is cut into chunks of C tokens. With a_t = delta_t A and W_ts = exp(-sum_{s<r<=t} a_r) delta_s inside of
a chunk, h and z the state that enters it (kept once a chunk in the inputs' dtype, accumulated in float32):

    y_t = (W_t h^T q_t + sum_s W_ts (q_t . k_s) v_s) / (W_t z^T q_t + sum_s W_ts (q_t . k_s))

Backward. With g_t = dy_t / den_t and gz_t = -(dy_t . y_t) / den_t the numerator and the denominator are one bilinear
form, so dq, dk and dv are such sums again, with the gradient of the state that leaves a chunk carried back. Multiplying
all weights of a token t leaves y_t as it is, so the decay's gradient comes from the keys' side alone (`decay_kernel`).
The states are computed again in the backward pass where they are larger than q. Time and memory are linear in the
length.

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
    best = (64, 64, 4, 2), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 4, 2), (128, 64, 4, 2), (64, 64, 4, 3)
    return 64, {name: Launch(*values) for name, values in zip(KERNELS, best, strict=True)}


KERNELS = ("states", "output", "exits", "dq", "dk", "dv")


def refusal(device: torch.device, d_state: int, decay: str, dtype: torch.dtype) -> str | None:
    """Why `fused_scan` can't serve this, as the end of a sentence, or None."""
    if decay != "head":
        return f"has one decay per head, not decay={decay}"
    if device.type != "cuda":
        return f"needs a CUDA device, not {device}"
    if dtype == torch.float64:
        return "computes in float32 at most, not in float64"
    if not _has_triton():
        return "needs Triton, which is not installed"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs compute capability 8.0, which {torch.cuda.get_device_name(device)} has not"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


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

    Matrix products run in the widest dtype of q, k and v, sums and states in float32.
    """
    dtype = functools.reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype))
    q, k, v = (_rows(x.to(dtype)) for x in (q, k, v))
    delta, A, initial_state = (x if x is None else x.float().contiguous() for x in (delta, A, initial_state))
    y, _, state, *_ = _forward(q, k, v, delta, A, initial_state, normalize, return_state)
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
        self.k = k
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

    @property
    def keeps_states(self) -> bool:
        return self.P <= self.C

    def empty_states(self) -> tuple[Tensor, Tensor]:
        """For what enters each chunk: (B, H, chunks, N, P) and, in float32, (B, H, chunks, N)."""
        shape = self.B, self.H, self.chunks, self.N
        return self.k.new_empty(*shape, self.P), self.k.new_empty(shape, dtype=torch.float32)

    def states(self, states: Tensor, norms: Tensor, initial: Tensor | None, last: Tensor | None) -> None:
        """Fill `states` and `norms` with what enters each chunk, and `last` with what leaves the sequence."""
        self.run("states", (*self.blocks("states"), self.B * self.H), initial=initial, states=states, norms=norms, last=last,
                 HAS_INITIAL=initial is not None, HAS_LAST=last is not None)  # fmt: skip


def _power_of_two(size: int) -> int:
    """The next power of two, and no less than the 16 that a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


@torch.library.custom_op("hm::fused_scan", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, delta: Tensor | None, A: Tensor | None, initial: Tensor | None,
    normalize: bool, return_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y (B, L, H, P); the denominator (B, L, H) if normalize; the last state if return_state; what enters each chunk
    if it is no larger than q. What is not to be had is empty."""
    call = _Call(q, k, v, delta, A, normalize)
    y, den, last, states, norms = _empty(q, k, v, delta, A, initial, normalize, return_state)
    if not states.numel():
        states, norms = call.empty_states()
    call.states(states, norms, initial, last if return_state else None)
    grid = (call.blocks("output")[0], call.chunks, call.B * call.H)
    call.run("output", grid, states=states, norms=norms, y=y, den=den)
    kept = (states, norms) if call.keeps_states else (q.new_empty(0), den.new_empty(0))
    return y, den, last, *kept


@_forward.register_fake
def _empty(q, k, v, delta, A, initial, normalize, return_state):
    (B, L, H, N), P = q.shape, v.shape[3]
    call = _Call(q, k, v, delta, A, normalize)
    return (
        q.new_empty(B, L, H, P),
        q.new_empty((B, L, H) if normalize else (0,), dtype=torch.float32),
        q.new_empty((B, H, N, P + 1 if normalize else P) if return_state else (0,), dtype=torch.float32),
        *(call.empty_states() if call.keeps_states else (q.new_empty(0), q.new_empty(0, dtype=torch.float32))),
    )


@torch.library.custom_op("hm::fused_scan_backward", mutates_args=())
def _backward(
    dy: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, delta: Tensor | None, A: Tensor | None,
    initial: Tensor | None, y: Tensor, den: Tensor, last: Tensor, states: Tensor, norms: Tensor, normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dq (B, L, H, N), dk (B, L, H, N) and dv (B, L, H, P) by query head, ddelta, dA, dinitial; the last three
    empty where there is no such input."""
    from hm.ops import fused_kernels as kernels

    call = _Call(q, k, v, delta, A, normalize)
    B, L, H, chunks = call.B, call.L, call.H, call.chunks
    gradients = _empty_gradients(dy, dlast, q, k, v, delta, A, initial, y, den, last, states, norms, normalize)
    dq, dk, dv, ddelta, dA, dinitial = gradients
    float32: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    g, gz = torch.empty_like(y), torch.empty(B, L, H, **float32)
    if not call.keeps_states:
        states, norms = call.empty_states()
        call.states(states, norms, initial, None)
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
    call.run("dk", (call.blocks("dk")[1], chunks, B * H), g=g, gz=gz, exits=exits, exit_norms=exit_norms, dk=dk)
    call.run("dv", (call.blocks("dv")[0], chunks, B * H), g=g, gz=gz, exits=exits, exit_norms=exit_norms, dv=dv,
             dweight=dweight)  # fmt: skip
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
    return gradients


@_backward.register_fake
def _empty_gradients(dy, dlast, q, k, v, delta, A, initial, y, den, last, states, norms, normalize):
    optional = [q.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in (delta, A, initial)]
    return (q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(y.shape), *optional)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.normalize, ctx.return_state = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1], *output[3:])


def _gradients(ctx, dy, _den, dlast, _states, _norms):
    q, k, v, delta, A, initial, *output = ctx.saved_tensors
    inputs = q, k, v, delta, A, initial
    dq, *by_head, ddelta, dA, dinitial = _backward(dy, dlast if ctx.return_state else None, *inputs, *output, ctx.normalize)
    if (R := q.shape[2] // k.shape[2]) > 1:
        by_head = [x.unflatten(2, (-1, R)).sum(3) for x in by_head]
    optional = [g if x is not None else None for g, x in zip((ddelta, dA, dinitial), inputs[3:], strict=True)]
    return dq, *by_head, *optional, None, None


_forward.register_autograd(_gradients, setup_context=_save)
