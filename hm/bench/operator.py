"""`python -m hm.bench operator`: the recurrence, or a whole mixer, forward and backward, by back end and length.

The yardstick is the teacher's softmax attention (PyTorch's SDPA) at the same heads and tokens. A back end that can't
serve a shape is a row that says so; out of memory is a result too. --what layer measures a HedgeMamba mixer with all
its parts (projections, convolution, feature maps, recurrence, gate), or the attention layer that it replaces, in
training precision and compiled as in training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hm.adapters import adapter_for
from hm.bench.report import Column, peak_memory, reset_peak, seconds_of, table, write
from hm.bench.shapes import SHAPES, attention_shape, build_teacher
from hm.compile import compiled, unmasked
from hm.config import check_choice, tokens
from hm.convert import convert
from hm.errors import UserError
from hm.ops import SCANS, linear_recurrence, resolve_scan

COLUMNS: dict[str, Column] = {
    "what": str, "shape": str, "scan": str, "seq_len": str, "batch": str, "forward_ms": "{:.3f}".format,
    "backward_ms": "{:.3f}".format, "ns_per_token": "{:.1f}".format, "peak_memory_bytes": lambda b: f"{b / 2**30:.2f} GiB",
    "status": str,
}  # fmt: skip
ATTENTION = "attention"


def operator(shape: str, scan: str, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Tensor], list]:
    """A forward pass of the recurrence (or of softmax attention) on random numbers, and what gradients flow into."""
    s = attention_shape(shape)
    torch.manual_seed(0)
    width = s.head_dim if scan == ATTENTION else 2 * s.head_dim
    q, k = (torch.randn(batch, length, h, width, device=device) for h in (s.num_heads, s.num_kv_heads))
    v = torch.randn(batch, length, s.num_kv_heads, s.head_dim, device=device)
    if scan == ATTENTION:
        q, k, v = (x.transpose(1, 2).to(dtype).requires_grad_() for x in (q, k, v))
        gqa = s.num_heads != s.num_kv_heads
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa), [q, k, v]
    delta, A = torch.rand(batch, length, s.num_heads, device=device) * 0.1, torch.rand(s.num_heads, device=device)
    given = [q.softmax(-1).to(dtype), k.softmax(-1).to(dtype), v.to(dtype), delta, A]
    given = [x.requires_grad_() for x in given]
    return lambda: linear_recurrence(*given, scan=scan), given  # type: ignore[return-value]


def layer(shape: str, scan: str, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Tensor], list]:
    """A forward pass of one mixer (or attention) module on random numbers, and what gradients flow into."""
    model = build_teacher(shape, length, device, layers=1)
    adapter = adapter_for(model.config)
    base: Any = model.base_model
    module: nn.Module = adapter.attention(adapter.layers(model)[0])
    if scan != ATTENTION:
        module = convert(model, "hedgemamba", scan=scan).mixers[0]
    torch.manual_seed(0)
    x = torch.randn(batch, length, model.config.hidden_size, device=device, requires_grad=True)
    rotary = base.rotary_emb(x, torch.arange(length, device=device)[None])
    run = compiled(module.forward) if device.type == "cuda" else module.forward

    def forward() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), unmasked([base]):
            return run(x, position_embeddings=rotary, attention_mask=None)[0]

    return forward, [x, *module.requires_grad_().parameters()]


def measure(what: str, shape: str, scan: str, batch: int, length: int, device: torch.device, repeat: int) -> dict[str, Any]:
    """One row: the times of a forward and of a backward pass in ms, and the peak of memory beyond what was there."""
    s = attention_shape(shape)
    row: dict[str, Any] = {"what": what, "shape": shape, "scan": scan, "seq_len": length, "batch": batch, "heads": s.num_heads,
                           "kv_heads": s.num_kv_heads, "head_dim": s.head_dim, "d_state": 2 * s.head_dim, "status": "ok"}  # fmt: skip
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        if scan != ATTENTION:
            resolve_scan(scan, device, d_state=2 * s.head_dim)
        torch.compiler.reset()  # PyTorch compiles a function for a few shapes only
        forward, leaves = {"operator": operator, "layer": layer}[what](shape, scan, batch, length, device, dtype)
        dy = torch.randn_like(forward())

        def both() -> None:
            for x in leaves:
                x.grad = None
            forward().backward(dy)

        both()
        reset_peak(device)
        before = peak_memory(device)
        total = 1e3 * seconds_of(both, device, repeat)
        after = peak_memory(device)
        with torch.no_grad():
            row["forward_ms"] = 1e3 * seconds_of(forward, device, repeat)
        row["backward_ms"] = total - row["forward_ms"]
        row["ns_per_token"] = 1e6 * total / (batch * length)
        row["peak_memory_bytes"] = None if after is None or before is None else after - before
    except torch.OutOfMemoryError:
        row["status"] = "out of memory"
    except UserError as refused:
        row["status"] = str(refused)
    return row


def parse(argv: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m hm.bench operator", description=(__doc__ or "").splitlines()[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("--what", default="operator", choices=["operator", "layer"], help="the recurrence alone, or a whole mixer")
    p.add_argument("--shapes", default="smollm2", help=f"teachers' shapes, by comma: {', '.join(SHAPES)}")
    p.add_argument("--scans", default="auto,attention", help=f"back ends, by comma: {', '.join(SCANS)}, or {ATTENTION}")
    p.add_argument("--lengths", default="1024,4096,16384", help="tokens of a sequence, by comma")
    p.add_argument("--tokens", default="16384", help="tokens at a time: fewer sequences where they are longer")
    p.add_argument("--repeat", type=int, default=5, help="repetitions, of which the median is given")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", type=Path, default=Path("results/bench/operator.json"), help="JSON; a plot of the same name lies beside it")
    return p.parse_args(argv)


def main(argv: list[str]) -> None:
    from hm.bench.plot import plot_lengths

    args = parse(argv)
    device, total = torch.device(args.device), tokens(args.tokens, "--tokens")
    for scan in args.scans.split(","):
        check_choice("--scans", scan, [*SCANS, ATTENTION])
    rows: list[dict[str, Any]] = []
    for shape in args.shapes.split(","):
        for scan in args.scans.split(","):
            for length in (tokens(text, "--lengths") for text in args.lengths.split(",")):
                rows.append(measure(args.what, shape, scan, max(1, total // length), length, device, args.repeat))
                print(table(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
                write(args.out, "operator", rows)
    print("\n" + table(rows, COLUMNS))
    plot_lengths(rows, args.out.with_suffix(".png"))
