"""`python -m hm.bench inference`: prefill and decoding of a student and of its teacher, against context and batch.

Both are random weights of one shape in bfloat16 (float32 on a CPU) and get the same treatment: attention by PyTorch's
SDPA over a cache of constant size, one CUDA graph per token, decoder layers compiled if --compile is given.
Decoding starts from a made-up cache (`hm.decode.made_up_cache`), since its cost depends on the cache's size alone.
To run out of memory is a result: a row says so, and the next one is tried.

What bounds a step: the weights are read once (Pythia-1B: 2 GB in bfloat16), a student's state once and written once
(8 heads x 512 x 257 x 4 B x 16 layers = 67 MB per sequence, 135 MB of traffic), a Transformer's keys and values once
(16 layers x 2 x 2048 x 2 B = 131 kB per token of context and sequence: 4.3 GB at 32k). `bound_seconds` is these bytes
over --bandwidth.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hm import decode
from hm.adapters import adapter_for
from hm.bench.report import write
from hm.bench.shapes import SHAPES, build_teacher
from hm.check import pick_device
from hm.compile import unmasked
from hm.config import MIXERS, tokens
from hm.convert import convert
from hm.decode import Decoder, cache_bytes
from hm.modeling import StudentForCausalLM
from hm.ops import SCANS

CONTEXTS = [1024 << i for i in range(8)]
LEAST_SECONDS = 0.2
"""A measurement is repeated for at least so long, and at least once."""


def main(argv: list[str]) -> None:
    args = parse(argv)
    decode.LAUNCH = decode.Launch(*args.launch)
    found = []
    for row in rows(args):
        found.append(row)
        print(line(row), flush=True)
        write(args.out, "inference", found, shape=args.shape, mixer=args.mixer, compile=args.compile, launch=decode.LAUNCH._asdict())


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m hm.bench inference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="pythia1b", choices=SHAPES, help="of both models (default: pythia1b)")
    parser.add_argument("--mixer", default="hedgemamba", choices=MIXERS, help="of the student (default: hedgemamba)")
    parser.add_argument("--scan", default="auto", choices=SCANS, help="back end of the student's prefill (default: auto)")
    parser.add_argument("--models", nargs="+", default=["student", "teacher"], choices=["student", "teacher"])
    parser.add_argument("--contexts", nargs="+", type=positive, default=CONTEXTS, help="tokens (default: 1024 to 131072)")
    parser.add_argument("--batches", nargs="+", type=positive, default=[16, 1], help="sequences at each context (default: 16 1)")
    parser.add_argument("--sweep", nargs="*", type=positive, default=[1 << i for i in range(9)], help="batches at --sweep-context (default: 1 to 256)")
    parser.add_argument("--sweep-context", type=positive, default=2048)
    parser.add_argument("--steps", type=positive, default=16, help="tokens decoded in one measurement (default: 16)")
    parser.add_argument("--prefill-tokens", type=int, default=1 << 18, help="prefill is measured up to so many tokens, batch x context")
    parser.add_argument("--compile", action="store_true", help="compile the decoder layers of both models for decoding")
    parser.add_argument("--launch", nargs=4, type=positive, default=decode.LAUNCH, metavar=("STATES", "CHANNELS", "WARPS", "PROGRAMS"),
                        help=f"of the student's decoding kernel (default: {' '.join(map(str, decode.LAUNCH))}), to find the best for another GPU")
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes/s, for bound_seconds (default: an H100's 3.35e12; H200: 4.8e12)")
    parser.add_argument("--minutes", type=float, default=4.0, help="no row is begun after so long (default: 4)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("results/bench/inference.json"), help="JSON, written after each row")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """An argument such as 32768 or 128k (1000 tokens each)."""
    count = tokens(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return count


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of the grid as they are measured: each context with each batch, then the sweep over batches."""
    begun = time.perf_counter()
    device = pick_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher = build_teacher(args.shape, device=device, dtype=dtype).requires_grad_(False)
    models: dict[str, PreTrainedModel] = {"teacher": teacher}
    if "student" in args.models:
        models["student"] = convert(teacher, args.mixer, scan=args.scan).requires_grad_(False)
    if args.compile:
        torch._dynamo.config.recompile_limit = 4 * teacher.config.num_hidden_layers  # each layer knows its number
        torch._dynamo.config.accumulated_recompile_limit = 1 << 12
    cases = [(batch, context) for batch in args.batches for context in args.contexts]
    cases += [(b, args.sweep_context) for b in args.sweep if (b, args.sweep_context) not in cases]
    for batch, context in cases:
        for name in args.models:
            row = {"model": name, "shape": args.shape, "context": context, "batch": batch}
            if time.perf_counter() - begun > 60 * args.minutes:
                yield row | {"status": "not run: --minutes is over"}
                continue
            yield row | measured_row(models[name], batch, context, args)


def measured_row(model: PreTrainedModel, batch: int, context: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row's numbers; null where something was not measured or ran out of memory."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    prefill, prefill_peak, prefill_status = (
        guarded(lambda: measure_prefill(model, batch, context), model.device, weights)
        if batch * context <= args.prefill_tokens else (None, None, "not measured")
    )  # fmt: skip
    decode, decode_peak, status = guarded(lambda: measure_decode(model, batch, context, args.steps, args.compile), model.device, weights)
    seconds, held = decode or (None, None)
    passes = 2 if isinstance(model, StudentForCausalLM) else 1  # a state is read and written, keys and values are read
    return {
        "prefill_tokens_per_second": prefill and batch * context / prefill, "prefill_seconds": prefill,
        "prefill_peak_memory_bytes": prefill_peak, "prefill_status": prefill_status,
        "decode_tokens_per_second": seconds and batch / seconds, "seconds_per_token": seconds,
        "bound_seconds": held and (weights + passes * held) / args.bandwidth,
        "state_bytes_per_sequence": held and held // batch, "peak_memory_bytes": decode_peak, "status": status,
    }  # fmt: skip


def guarded(measure: Callable[[], Any], device: torch.device, weights: int) -> tuple[Any, int | None, str]:
    """What `measure` gives, its peak memory in bytes with the model's own weights but without what else lies on the
    GPU (null on a CPU), and "ok" or "out of memory"."""
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    try:
        value = measure()
    except torch.OutOfMemoryError:
        return None, None, "out of memory"
    return value, torch.cuda.max_memory_allocated() - before + weights if device.type == "cuda" else None, "ok"


@torch.no_grad()
def measure_prefill(model: PreTrainedModel, batch: int, context: int) -> float:
    """Seconds from the prompt (batch, context) to the cache and the last token's logits."""
    ids = torch.randint(model.config.vocab_size, (batch, context), device=model.device)
    return seconds_of(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1), model.device)


def measure_decode(model: PreTrainedModel, batch: int, context: int, steps: int, compiled: bool) -> tuple[float, int]:
    """Seconds per token of `batch` sequences after `context` tokens, and the bytes of their cache."""
    backbone: PreTrainedModel = getattr(model, "backbone", model)
    layers = adapter_for(backbone.config).layers(backbone)
    decoder = Decoder(model, batch, context)

    def run() -> None:
        for _ in range(steps):
            decoder.step()

    try:
        with unmasked([backbone]):  # one token sees all that is cached
            if compiled:
                torch.compiler.reset()  # PyTorch compiles a function so many times and no more
                for layer in layers:
                    layer.compile()
            decoder.capture()
            return seconds_of(run, model.device) / steps, cache_bytes(decoder.cache)
    finally:
        decoder.close()
        for layer in layers:
            layer._compiled_call_impl = None


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """The median of several runs after one that warms up."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    times = [once()]
    while sum(times) < LEAST_SECONDS:
        times.append(once())
    return statistics.median(times)


def line(row: dict[str, Any]) -> str:
    """A row for people."""

    def show(name: str, scale: float, unit: str) -> str:
        return f"{row[name] * scale:10.3f} {unit}" if row.get(name) is not None else f"{'-':>10} {unit}"

    return (f"{row['model']:<8} context {row['context']:>7} batch {row['batch']:>4}"
            f"  prefill {show('prefill_tokens_per_second', 1e-3, 'ktok/s')}  decode {show('seconds_per_token', 1e3, 'ms')}"
            f" (bound {show('bound_seconds', 1e3, 'ms')})  memory {show('peak_memory_bytes', 2**-30, 'GiB')}  {row['status']}")  # fmt: skip
