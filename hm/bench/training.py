"""`python -m hm.bench training`: tokens/s, share of the machine's matrix rate, and memory of the real training loop.

What runs is `hm.train.train` with its own optimiser, loss, logging and input; only the tokens and the weights are
random. The teacher's own fine-tuning step (SDPA, same loop) is measured in the same run, as the yardstick.

Model FLOPs a token, as they are counted here: with M the numbers in the matrices that a token passes (layers and
output embedding), T those of them that are trained, and F for mixing over the length L in each of the layers
(attention: 2 L H d, causal; recurrence: 8 H d (d + 1) for writing and reading a state of 2d x (d + 1)),

    stage 2 and teacher   2 M + 2 M + 2 T + 3 layers F        stage 1   2 M' + layers (F_attention + 3 (2 M'' + F))

stage 1: M' without the output embedding, M'' one mixer's matrices, of which only the feature maps need the
gradient of their weights (left out of the count; recomputed activations are never counted).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hm import parallel
from hm.adapters import adapter_for
from hm.bench.report import Column, matrix_rate, peak_memory, reset_peak, synchronize, table, write
from hm.bench.shapes import SHAPES, attention_shape, build_teacher, shape_config
from hm.config import PARALLEL, Stage
from hm.convert import convert, embeddings
from hm.objectives import Align, FineTune, Objective
from hm.ops import resolve_scan
from hm.train import Run, train

COLUMNS: dict[str, Column] = {
    "shape": str, "what": str, "mixer": str, "scan": str, "seq_len": str, "batch": str, "gpus": str, "tokens_per_second": "{:,.0f}".format,
    "ratio_to_teacher": "{:.2f}".format, "share_of_peak": "{:.1%}".format, "peak_memory_bytes": lambda b: f"{b / 1e9:.1f} GB",
    "first_step_seconds": "{:.1f}".format, "final_loss": "{:.5f}".format, "status": str,
}  # fmt: skip


def model_flops(objective: Objective, what: str, seq_len: int) -> float:
    """FLOPs a token of one training step, by the formula at the top."""
    model: Any = objective.model
    config = getattr(model, "backbone", model).config
    shape = adapter_for(config).shape(config)
    layers, width = config.num_hidden_layers, shape.num_heads * shape.head_dim
    attention, recurrence = 2.0 * seq_len * width, 8.0 * width * (shape.head_dim + 1)
    named = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    embedded = {id(p) for _, p in embeddings(model)}
    head = config.vocab_size * config.hidden_size
    inside = sum(p.numel() for p in named.values() if id(p) not in embedded)
    if what == "stage1":
        mixer = sum(p.numel() for p in model.mixers[0].parameters() if p.dim() == 2)
        return 2.0 * inside + layers * (attention + 3 * (2.0 * mixer + recurrence))
    trained = sum(p.numel() for _, p, _ in objective.parameters if p.dim() == 2)
    mixing = attention if what == "teacher" else recurrence
    return 4.0 * (inside + head) + 2.0 * trained + 3 * layers * mixing


def objective_of(what: str, shape: str, mixer: str, scan: str, seq_len: int, device: torch.device) -> Objective:
    teacher = build_teacher(shape, max(2048, seq_len), device)
    if what == "teacher":
        return FineTune(teacher)
    if what == "stage1":
        return Align(teacher, convert(teacher, "hedgehog", scan=scan))
    return FineTune(convert(teacher, mixer, scan=scan))


def measure(what: str, shape: str, mixer: str, scan: str, seq_len: int, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row. The first step (compiling) and `warmup` more are not timed, the others as a whole.

    Raises:
        Diverged: when the loss is not finite, since the speed of such a run means nothing.
    """
    device = torch.device(args.device)
    precision = "bf16" if device.type == "cuda" else "fp32"
    row: dict[str, Any] = {"shape": shape, "what": what, "seq_len": seq_len, "batch": batch, "compile": args.compile,
                           "checkpointing": args.checkpointing, "precision": precision, "device_type": device.type, "status": "ok",
                           "gpus": parallel.processes(), "parallel": args.parallel}  # fmt: skip
    if what != "teacher":
        row |= {"mixer": "hedgehog" if what == "stage1" else mixer}
        row["scan"] = resolve_scan(scan, device, 2 * attention_shape(shape).head_dim, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    try:
        objective = objective_of(what, shape, mixer, scan, seq_len, device)
    except torch.OutOfMemoryError:
        return row | {"status": "out of memory"}
    vocab = shape_config(shape).vocab_size
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(vocab, (8, batch, seq_len + 1), generator=generator)
    first = args.warmup + 1
    marks: dict[int, float] = {}

    def give(step: int) -> torch.Tensor:
        if step in (1, first):
            synchronize(device)
            marks[step] = time.perf_counter()
        return data[step % len(data)]

    reset_peak(device)
    stage = Stage(lr=1e-5, batch_size=batch, micro_batch=args.micro_batch)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(f"{shape} {what}", Path(folder), "bench", device, precision, checkpoint_every=10**9, log_every=args.log_every,
                  compile=args.compile, checkpointing=args.checkpointing, parallel=args.parallel)  # fmt: skip
        start = time.perf_counter()
        try:
            result = train(objective, give, first + args.steps, stage, run)
        except torch.OutOfMemoryError:
            return row | {"status": "out of memory"}
        end = time.perf_counter()
    seconds = (end - marks[first]) / args.steps
    rate = batch * seq_len / seconds
    flops = model_flops(objective, what, seq_len)
    parameters = sum(p.numel() for p in objective.model.parameters())
    return row | {
        "parameters": parameters, "tokens_per_second": rate, "seconds_per_step": seconds, "flops_per_token": flops,
        "share_of_peak": rate * flops / (args.rate * parallel.processes()), "peak_memory_bytes": peak_memory(device),
        "first_step_seconds": marks[1] - start, "final_loss": result["final_loss"],
    }  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m hm.bench training", description=(__doc__ or "").splitlines()[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("--shapes", default="tiny", help=f"teachers' shapes, by comma: {', '.join(SHAPES)}")
    p.add_argument("--what", default="teacher,stage2,stage1", help="what is trained, by comma")
    p.add_argument("--mixer", default="hedgemamba", help="the student's mixer in stage 2")
    p.add_argument("--scans", default="auto", help="back ends of the recurrence, by comma")
    p.add_argument("--lengths", default="1024", help="tokens of a sequence, by comma")
    p.add_argument("--batch", type=int, default=16, help="sequences a step, of all processes, at the first length; fewer where they are longer")
    p.add_argument("--micro-batch", type=int, default=None, help="sequences a backward pass")
    p.add_argument("--steps", type=int, default=20, help="steps that are timed")
    p.add_argument("--warmup", type=int, default=3, help="steps between the first and the timed ones")
    p.add_argument("--log-every", type=int, default=10, help="steps between log lines, where the loop waits for the device")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="torch.compile; default: on cuda")
    p.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward pass")
    p.add_argument("--parallel", default="auto", choices=PARALLEL, help="of several processes (torchrun): as the setting parallel=")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", type=Path, default=Path("results/bench/training.json"), help="JSON; a plot of the same name lies beside it")
    return p.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    with parallel.group(torch.device(args.device)):
        measure_all(args)


def measure_all(args: argparse.Namespace) -> None:
    from hm.bench.plot import plot_lengths

    device, main = torch.device(args.device), parallel.rank() == 0
    args.rate = matrix_rate(device, "bf16" if device.type == "cuda" else "fp32")
    if main:
        print(f"matrix rate: {args.rate / 1e12:.3g} TFLOP/s", flush=True)
    lengths = [int(text) for text in args.lengths.split(",")]
    rows: list[dict[str, Any]] = []
    for shape in args.shapes.split(","):
        for length in lengths:
            batch = max(1, args.batch * lengths[0] // length)
            yardstick = None
            for what in args.what.split(","):
                for scan in args.scans.split(",") if what != "teacher" else [""]:
                    row = measure(what, shape, args.mixer, scan, length, batch, args)
                    if what == "teacher":
                        yardstick = row.get("tokens_per_second")
                    elif yardstick and what == "stage2" and "tokens_per_second" in row:
                        row["ratio_to_teacher"] = row["tokens_per_second"] / yardstick
                    rows.append(row)
                    if main:
                        print(table([row], COLUMNS).splitlines()[-1], flush=True)
                        write(args.out, "training", rows, matrix_flops_per_second=args.rate)
                    reset_peak(device)
    if main:
        print("\n" + table(rows, COLUMNS))
        plot_lengths(rows, args.out.with_suffix(".png"))

