"""The one training loop: stage 1, stage 2, the one-step baseline, the adapted teacher, and pre-training.

A run is determined by its objective, its batches (a function of the step alone) and its settings; there is no
dropout and no other randomness, so a checkpoint of weights, optimiser state and step is all that a restart needs.
"""

from __future__ import annotations

import json
import math
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hm import parallel
from hm.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, save_checkpoint
from hm.compile import Replayed
from hm.config import Stage
from hm.errors import Interrupted, UserError
from hm.files import atomic_write
from hm.objectives import Objective
from hm.progress import progress_bar


class Diverged(UserError):
    """The loss is no longer finite; the message says at which step, in which layer, and what to try."""


@dataclass
class Run:
    """Where and how a training run happens, apart from what is learnt.

    `stop` is asked after each step with the number of steps done; True: save a checkpoint and raise `Interrupted`.
    """

    name: str
    workdir: Path
    key: str
    device: torch.device
    precision: str = "fp32"
    checkpoint_every: int = 200
    log_every: int = 10
    stop: Callable[[int], bool] = lambda step: False
    compile: bool | None = None  # None: on CUDA
    checkpointing: bool = False
    parallel: str = "auto"  # of several processes: ddp or fsdp


def learning_rate(step: int, steps: int, stage: Stage) -> float:
    """The factor on the peak rate at `step` (from 0): linear warm-up, then a cosine down to `stage.min_lr`."""
    warmup = max(1, round(stage.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return stage.min_lr + (1 - stage.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(objective: Objective, stage: Stage) -> torch.optim.AdamW:
    """AdamW with decay on matrices only and a rate of their own for new parameters; each group keeps its peak rate."""
    groups: dict[tuple[bool, bool], list] = {}
    for name, parameter, new in objective.parameters:
        matrix = parameter.dim() >= 2 and not name.endswith(("bias", "ssm.A"))  # both can have more than one dimension
        groups.setdefault((new, matrix), []).append(parameter)
    rates = {False: stage.lr, True: stage.lr if stage.lr_new is None else stage.lr_new}
    return torch.optim.AdamW(
        [
            {"params": ps, "lr": rates[new], "peak": rates[new], "weight_decay": stage.weight_decay if matrix else 0.0}
            for (new, matrix), ps in groups.items()
        ],
        betas=(stage.beta1, stage.beta2),
        fused=runs_ahead(objective.parameters[0][1].device),
    )


def train(objective: Objective, batch: Callable[[int], Tensor], steps: int, stage: Stage, run: Run) -> dict:
    """Train for `steps` steps, going on from the newest checkpoint in run.workdir if there is one.

    Args:
        batch: step -> tokens (stage.batch_size, L + 1), the same in all of several processes: each takes its rows.
        run: where checkpoints and metrics.jsonl lie; `run.key` must be that of the checkpoints there.

    Returns:
        {"steps", "tokens", "seconds", "tokens_per_second", "final_loss", "peak_memory", "processes"}: seconds of training
        alone, peak_memory in bytes: of the GPU, or the peak resident memory of this process on a CPU; processes: how many
        shared the work, each with a device of its own (where a run went on with another number, the last).

    Raises:
        Diverged: when the loss is not finite.
        Interrupted: when `run.stop` asked for it.
        UserError: when a checkpoint there was made with other settings, or batches can't be cut over the processes.
    """
    parallel.rows(stage.batch_size, objective.flags)
    with parallel.sharing(objective, run.parallel, run.precision) as shared:
        return train_shared(shared, batch, steps, stage, run)


def train_shared(objective: Objective, batch: Callable[[int], Tensor], steps: int, stage: Stage, run: Run) -> dict:
    """`train`, of an objective as this process trains it; the first of several processes writes."""
    optimizer = make_optimizer(objective, stage)
    names = {p: n for n, p, _ in objective.parameters}
    folder, log = run.workdir / "checkpoints", run.workdir / "metrics.jsonl"
    run.workdir.mkdir(parents=True, exist_ok=True)
    first, seconds = restore(objective, optimizer, folder, run)
    parallel.on_main(lambda: truncate_log(log, first))
    cuda, several, main = run.device.type == "cuda", parallel.processes() > 1, parallel.rank() == 0
    ahead = runs_ahead(run.device) and not (several and run.parallel == "fsdp")  # which waits for others in any case
    if cuda:
        torch.cuda.reset_peak_memory_stats(run.device)
    tokens = on_device(batch(min(first, steps - 1)), run)
    parts = parallel.micro_batches(len(tokens), stage.micro_batch)
    per_step = tokens[:, 1:].numel() * parallel.processes()
    losses: dict[str, float] = last_losses(log)
    start = time.perf_counter()
    bar = progress_bar(
        total=steps * per_step, initial=first * per_step, desc=run.name, unit="tok", unit_scale=True
    )
    objective.model.eval()  # a teacher's config may ask for dropout: the student learns what the teacher computes
    broken = torch.full((), -1, device=run.device)  # the first step whose loss or gradient was not finite
    compile = cuda if run.compile is None else run.compile
    running = objective.running(compile, run.checkpointing)
    step_gradients = partial(gradients, objective, parts=parts, run=run)
    replayed = Replayed(step_gradients) if compile and cuda and not several else None
    with bar, open(log if main else os.devnull, "a") as out, running:
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(step, steps, stage)
            found = (replayed or step_gradients)(tokens)
            norm = parallel.full(torch.nn.utils.clip_grad_norm_(list(names), stage.clip if stage.clip > 0 else math.inf))
            finite = torch.isfinite(found["loss"] + norm)
            broken = torch.where((broken < 0) & ~finite, step, broken)
            logged = step % run.log_every == 0 or step == steps - 1
            stopping = any(parallel.exchange(run.stop(step + 1))) and step + 1 < steps
            saved = stopping or ((step + 1) % run.checkpoint_every == 0 and step + 1 < steps)
            if ahead:  # no waiting for the GPU: the optimiser itself leaves the weights alone from the broken step on
                optimizer.found_inf = (broken >= 0).float()  # type: ignore[attr-defined]
            if (logged or saved or not ahead) and broken >= 0:
                raise diverged(objective, batch, int(broken), parts, stage, run)
            optimizer.step()
            if replayed is None or not replayed.recorded:
                optimizer.zero_grad(set_to_none=not several)  # DDP's gradients lie in its buckets
            bar.update(per_step)
            if logged:
                losses = {name: float(value) for name, value in found.items()}
                bar.set_postfix(loss=f"{losses['loss']:.4f}", refresh=False)
                line = {"step": step, "tokens": (step + 1) * per_step, "lr": optimizer.param_groups[0]["lr"],
                        "grad_norm": float(norm), **losses}  # fmt: skip
                out.write(json.dumps(line) + "\n")
            if saved:
                out.flush()
                spent = seconds + time.perf_counter() - start
                save(objective, optimizer, names, folder, step + 1, {"seconds": spent}, run)
            if stopping:
                raise Interrupted(f"{run.name} was asked to stop and saved its state after step {step + 1} of {steps}")
            if step + 1 < steps:
                tokens = on_device(batch(step + 1), run)
    optimizer.zero_grad(set_to_none=True)
    if cuda:
        torch.cuda.synchronize(run.device)
    seconds += time.perf_counter() - start
    return {
        "steps": steps,
        "tokens": steps * per_step,
        "seconds": seconds,
        "tokens_per_second": steps * per_step / max(seconds, 1e-9),
        "final_loss": losses.get("loss"),
        "peak_memory": torch.cuda.max_memory_allocated(run.device) if cuda else peak_resident_memory(),
        "processes": parallel.processes(),
    }


def runs_ahead(device: torch.device) -> bool:
    """Whether Python is ahead of the device, so that looking at a number costs a wait."""
    return device.type == "cuda"


def on_device(tokens: Tensor, run: Run) -> Tensor:
    """This process's rows of a batch on their way to the device; the GPU copies them while it computes."""
    tokens = parallel.own_rows(tokens)
    if run.device.type != "cuda":
        return tokens.to(run.device)
    return tokens.pin_memory().to(run.device, non_blocking=True)


def gradients(objective: Objective, tokens: Tensor, parts: int, run: Run) -> dict[str, Tensor]:
    """Add the gradients of one step, `parts` micro-batches, and return its mean losses, still on the device."""
    found: dict[str, Tensor] = {}
    for i, chunk in enumerate(tokens.chunk(parts)):
        autocast = torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bf16")
        with autocast, parallel.micro_batch(objective, last=i == parts - 1):
            values = objective.backward(chunk, 1 / parts)
        for name, value in values.items():
            found[name] = found.get(name, 0) + value / parts
    parallel.reduce_gradients(objective)
    objective.project()
    return parallel.mean(found)


def save(objective: Objective, optimizer: torch.optim.Optimizer, names: dict, folder: Path, step: int, state: dict, run: Run) -> None:
    weights = {f"model.{n}": p.detach() for n, p, _ in objective.parameters}
    moments = {f"optimizer.{n}": t for n, t in optimizer_tensors(optimizer, names).items()}
    tensors = parallel.gathered(weights | moments)
    parallel.on_main(lambda: save_checkpoint(folder, step, tensors, state, run.key))


def restore(objective: Objective, optimizer: torch.optim.Optimizer, folder: Path, run: Run) -> tuple[int, float]:
    """Load the newest checkpoint, if there is one; returns (steps done, seconds spent on them)."""
    checkpoint = load_checkpoint(folder, run.key)
    if len(found := set(parallel.exchange(checkpoint.step if checkpoint else 0))) > 1:
        raise UserError(f"{folder} holds other checkpoints for one process than for another (steps {found}); `runs` must be a folder that all share.")
    if checkpoint is None:
        return 0, 0.0
    with torch.no_grad():
        for name, parameter, _ in objective.parameters:
            parameter.copy_(parallel.part_of(checkpoint.tensors[f"model.{name}"], parameter))
    own = {n: p for n, p, _ in objective.parameters}
    moments = {n.removeprefix("optimizer."): t for n, t in checkpoint.tensors.items() if n.startswith("optimizer.")}
    moments = {n: parallel.part_of(t, own.get(n.rpartition(".")[0], t)) for n, t in moments.items()}
    load_optimizer(optimizer, moments, own)
    return checkpoint.step, float(checkpoint.state["seconds"])


def truncate_log(log: Path, steps: int) -> None:
    """Drop the lines of steps that will be run again, and a half-written last line."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text().splitlines():
        try:
            if json.loads(line)["step"] < steps:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    atomic_write(log, "".join(kept))


def last_losses(log: Path) -> dict[str, float]:
    lines = log.read_text().splitlines() if log.exists() else []
    return json.loads(lines[-1]) if lines else {}


def diverged(objective: Objective, batch: Callable[[int], Tensor], step: int, parts: int, stage: Stage, run: Run) -> Diverged:
    """The error of a step that broke, found again: a step's batch is known, and its weights are still there."""
    flags, tokens = objective.flags, batch(step)
    losses = {name: float(value) for name, value in gradients(objective, on_device(tokens, run), parts, run).items()}
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
        where = objective.suspect(tokens.to(run.device).chunk(parts * parallel.processes()), losses)
    remedy = ", or try precision=fp32" if run.precision == "bf16" else ""
    return Diverged(
        f"{run.name}: the loss or its gradient is not finite at step {step} (loss {losses['loss']}; "
        f"{where}); lower {flags}lr (now {stage.lr:g}) or {flags}lr_new, "
        f"or lower {flags}clip (now {stage.clip:g}){remedy}."
    )


def peak_resident_memory() -> int:
    """Bytes; Linux gives kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
