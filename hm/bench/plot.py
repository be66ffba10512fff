"""Plots beside the benchmarks' JSON: what a token costs, in time and memory, against the length of its sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_lengths(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Rows with seq_len, and ns_per_token or tokens_per_second: a line for each shape and back end. No plot of no rows.

    A line that is level is linear in the length; one that rises with slope 1 is quadratic.
    """
    from matplotlib.figure import Figure

    series: dict[str, list[tuple[int, float, float | None]]] = {}
    for row in rows:
        cost = row.get("ns_per_token") or (1e9 / row["tokens_per_second"] if row.get("tokens_per_second") else None)
        if cost is not None:
            memory = row.get("peak_memory_bytes")
            per_token = memory / (row["batch"] * row["seq_len"]) / 1024 if memory else None
            name = " ".join(str(row[k]) for k in ("shape", "what", "scan") if row.get(k))
            series.setdefault(name, []).append((row["seq_len"], cost, per_token))
    if not series:
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = {"time of a token (ns)": 1, "peak memory of a token (KiB)": 2}
    if not any(point[2] for points in series.values() for point in points):
        del panels["peak memory of a token (KiB)"]
    for ax, (title, column) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for style, (name, points) in enumerate(sorted(series.items())):
            known = [(p[0], p[column]) for p in sorted(points, key=lambda point: point[0]) if p[column]]
            if known:
                ax.plot(*zip(*known, strict=True), marker="osD^vPX<>*"[style % 10], label=name)
        ax.set(yscale="log", xlabel="tokens in a sequence", title=title)
        ax.set_xscale("log", base=2)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    figure.savefig(path, dpi=150)
