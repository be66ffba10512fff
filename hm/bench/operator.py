"""`python -m hm.bench operator`: the recurrence, or a whole mixer, forward and backward, by back end and length.

The yardstick is the teacher's softmax attention (PyTorch's SDPA) at the same heads and tokens. A back end that can't
serve a shape is a row that says so; out of memory is a result too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hm.bench.report import Column, peak_memory, reset_peak, seconds_of, table, write
from hm.bench.shapes import attention_shape
from hm.config import tokens
from hm.errors import UserError
from hm.ops import SCANS, linear_recurrence, resolve_scan

COLUMNS: dict[str, Column] = {
    "shape": str, "scan": str, "seq_len": str, "batch": str, "forward_ms": "{:.3f}".format, "backward_ms": "{:.3f}".format,
    "ns_per_token": "{:.1f}".format, "peak_memory_bytes": lambda b: f"{b / 2**30:.2f} GiB", "status": str,
}  # fmt: skip


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal softmax attention; q (B, L, H, d), k and v (B, L, G, d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def inputs(shape: str, scan: str, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and, for a recurrence, delta and A of random numbers."""
    s = attention_shape(shape)
    torch.manual_seed(0)
    width = s.head_dim if scan == "attention" else 2 * s.head_dim
    q, k = (torch.randn(batch, length, h, width, device=device) for h in (s.num_heads, s.num_kv_heads))
    v = torch.randn(batch, length, s.num_kv_heads, s.head_dim, device=device).to(dtype)
    if scan == "attention":
        return [x.to(dtype).requires_grad_() for x in (q, k, v)]
    delta = torch.rand(batch, length, s.num_heads, device=device) * 0.1
    A = torch.rand(s.num_heads, device=device)
    return [x.requires_grad_() for x in (q.softmax(-1).to(dtype), k.softmax(-1).to(dtype), v, delta, A)]


def measure(shape: str, scan: str, batch: int, length: int, device: torch.device, repeat: int) -> dict:
    """One row: the times of a forward and of a backward pass in ms, and the peak of memory beyond the inputs."""
    row: dict[str, Any] = {"shape": shape, "scan": scan, "seq_len": length, "batch": batch, "status": "ok"}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    s = attention_shape(shape)
    row |= {"heads": s.num_heads, "kv_heads": s.num_kv_heads, "head_dim": s.head_dim, "d_state": 2 * s.head_dim}
    try:
        if scan != "attention":
            resolve_scan(scan, device, d_state=2 * s.head_dim)
        given = inputs(shape, scan, batch, length, device, dtype)

        def forward() -> torch.Tensor:
            y = attention(*given) if scan == "attention" else linear_recurrence(*given, scan=scan)
            assert isinstance(y, torch.Tensor)
            return y

        reset_peak(device)
        before = peak_memory(device)
        dy = torch.randn_like(forward())
        with torch.no_grad():
            row["forward_ms"] = 1e3 * seconds_of(forward, device, repeat)

        def both() -> None:
            for x in given:
                x.grad = None
            forward().backward(dy)

        total = 1e3 * seconds_of(both, device, repeat)
        row["backward_ms"] = total - row["forward_ms"]
        row["ns_per_token"] = 1e6 * total / (batch * length)
        after = peak_memory(device)
        row["peak_memory_bytes"] = None if after is None or before is None else after - before
    except torch.OutOfMemoryError:
        row["status"] = "out of memory"
    except UserError as refused:
        row["status"] = str(refused)
    return row


def parse(argv: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m hm.bench operator", description=(__doc__ or "").splitlines()[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("--shapes", default="smollm2", help="teachers' shapes, by comma")
    p.add_argument("--scans", default="auto,attention", help=f"back ends, by comma: {', '.join(SCANS)}, or attention")
    p.add_argument("--lengths", default="1024,4096,16384", help="tokens of a sequence, by comma")
    p.add_argument("--tokens", default="16384", help="tokens at a time: fewer sequences where they are longer")
    p.add_argument("--repeat", type=int, default=5, help="repetitions, of which the median is given")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", type=Path, default=Path("results/bench/operator.json"))
    return p.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    device, total, rows = torch.device(args.device), tokens(args.tokens, "--tokens"), []
    for shape in args.shapes.split(","):
        for scan in args.scans.split(","):
            for length in (tokens(text, "--lengths") for text in args.lengths.split(",")):
                rows.append(measure(shape, scan, max(1, total // length), length, device, args.repeat))
                print(table(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
                write(args.out, "operator", rows)
    print("\n" + table(rows, COLUMNS))
