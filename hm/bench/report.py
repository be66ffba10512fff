"""What every benchmark shares: the machine, its matrix rate, a table for people and a JSON file for plots."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hm.files import atomic_write, to_json
from hm.provenance import provenance

SCHEMA = 1
Column = Callable[[Any], str]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device, repeat: int = 10, warmup: int = 2) -> float:
    """The median time of `call` in seconds, each repetition timed to its end on the device."""
    times = []
    for i in range(warmup + repeat):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        if i >= warmup:
            times.append(time.perf_counter() - start)
    return median(times)


def matrix_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product of random numbers: 8192 wide in bf16 on a GPU, 1024 wide in fp32 on a CPU."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes allocated on a GPU since `reset_peak`; None on a CPU, where a part of a process can't be told."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def write(path: Path, kind: str, rows: Sequence[dict], **about: Any) -> None:
    """The rows as JSON with where they come from: {"schema", "kind", "device", "command", "git_commit", "rows", ...}."""
    source = provenance()
    head = {"schema": SCHEMA, "kind": kind, "device": source["device"], "command": source["command"],
            "git_commit": source["git_commit"], "git_dirty": source["git_dirty"], "versions": source["packages"],
            "started": source["started"]}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]
    atomic_write(path, to_json(head | about | {"rows": plain}, indent=1) + "\n")


def table(rows: Sequence[dict], columns: dict[str, Column]) -> str:
    """A Markdown table of `rows`; columns: name -> how its value is written. Missing values are dashes."""
    cells = [[form(row[name]) if row.get(name) is not None else "–" for name, form in columns.items()] for row in rows]
    widths = [max(len(c) for c in column) for column in zip(list(columns), *cells, strict=True)]
    lines = [list(columns), ["-" * w for w in widths], *cells]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)
