"""A whole made-up store: every study, several budgets and seeds, curves, losses, diagnostics, benchmarks.

`python tests/analysis/made.py FOLDER [RECORDS]` writes one to look at.
"""

import json
import math
import random
import sys
from pathlib import Path

TASKS = ("arc_challenge", "arc_easy", "social_iqa", "piqa", "lambada_openai", "boolq", "race", "logiqa", "winogrande", "hellaswag")
EFFECT = {"hedgehog": 0.10, "ssm": 0.10, "ssm_conv": 0.10, "hedgemamba": 0.06, "gate": 0.07}
PARTS = {"hedgehog": (), "ssm": ("ssm",), "ssm_conv": ("ssm", "conv"), "hedgemamba": ("ssm", "conv", "gate"), "gate": ("gate",)}


def cells(budget):
    """(study, row, recipe, mixer, percent of stage 1, budget) of the paper's studies."""
    teachers = [("teacher", "teacher", "hedgemamba", 0, 0), ("adapted_teacher", "adapted_teacher", "hedgemamba", 10, budget)]
    rows = {"main": [*teachers, ("hedgehog", "two_stage", "hedgehog", 50, budget), ("hedgehog 10/90", "two_stage", "hedgehog", 10, budget),
                     ("hedgemamba", "two_stage", "hedgemamba", 10, budget)],
            "mixer": [teachers[0], *[(name, "two_stage", mixer, 50, budget) for name, mixer in (
                ("hedgehog", "hedgehog"), ("+ssm", "ssm"), ("+ssm+conv", "ssm_conv"), ("+ssm+conv+gate", "hedgemamba"), ("+gate", "gate"))]],
            "split": [teachers[0], *[(f"{s}/{100 - s}", "two_stage", "hedgemamba", s, budget) for s in (100, 90, 75, 50, 25, 10, 0)]],
            "budget": [teachers[0], *[(name, "two_stage", "hedgemamba", 10, budget * part // 100) for name, part in (
                ("1B", 10), ("2B", 20), ("3B", 30), ("10B", 100))]],
            "one_step": [teachers[0], ("hedgemamba", "two_stage", "hedgemamba", 10, budget), ("one_step", "one_step", "mamba", 0, budget)]}
    return [(study, *row) for study, of_study in rows.items() for row in of_study]


def log_ppl(recipe, mixer, percent, budget):
    """A made-up law with the paper's orderings."""
    if recipe == "teacher":
        return math.log(24.0)
    if recipe == "adapted_teacher":
        return math.log(23.0)
    gap = EFFECT.get(mixer, 0.1) * (2e7 / budget) ** 0.4
    gap += {0: 0.2, 100: 0.6}.get(percent, 0.001 * max(0, percent - 10))
    return math.log(24.0) + (2.3 if recipe == "one_step" else gap)


def write(root, study, row, recipe, mixer, percent, budget, seed, teacher="smollm2", size=134_515_008, rng=None, default_budget=None):
    """One run folder. Returns it."""
    rng = rng or random.Random(f"{recipe}{mixer}{percent}{budget}{seed}{teacher}")
    value = log_ppl(recipe, mixer, percent, budget) + (rng.gauss(0, 0.004) if recipe != "teacher" else 0)
    one, two = budget * percent // 100, budget - budget * percent // 100
    untouched, student = recipe == "teacher", recipe in ("two_stage", "one_step")
    sequences = random.Random("text")
    losses = [value + sequences.gauss(0, 0.3) + rng.gauss(0, 0.02) for _ in range(100)]
    losses = [v - sum(losses) / len(losses) + value for v in losses]
    metrics = {"ppl": {"value": math.exp(value), "stderr": 0.03 * math.exp(value)}, "bits_per_byte": {"value": value / 3, "stderr": 0.01}}
    for i, task in enumerate(TASKS):
        metrics[task] = {"value": 45 + 2 * i - 12 * (value - math.log(23)) + rng.gauss(0, 0.3), "stderr": 0.8, "version": 1.0, "shots": 0}
    positions = [256, 512, 1024, 2048, 4096]
    metrics["ppl_by_position"] = {"positions": positions, "ppl": [math.exp(value) * (1 + 100 / p) for p in positions], "stderr": [0.5] * 5}
    metrics["recall"] = [{"pairs": pairs, "length": length, "n": 32, "accuracy": 100 / pairs if student else 90.0 - length / 100, "stderr": 2.0, "exact": 0.0}
                         for length in (256, 512, 1024) for pairs in (4, 16, 64)]
    metrics["needle"] = [{"length": length, "depth": depth, "n": 4, "accuracy": 100.0 * depth, "gain": 1.0, "stderr": 0.1}
                         for length in (1024, 4096) for depth in (0.1, 0.5, 0.9)]
    if student:
        metrics["ppl_start"] = {"value": 280.0, "stderr": 5.0}
        metrics["diagnostics"] = {"quantiles": [0, 0.5, 1], "layers": [
            {"layer": i, "decay_rate": [0.001 * (i + 1), 0.01 * (i + 1), 0.1 * (i + 1)]} for i in range(12)]}
    parts = PARTS.get(mixer, ())
    key = f"{rng.getrandbits(64):016x}" if not untouched else "cafe" * 4
    settings = {"scale": teacher, "teacher": teacher, "recipe": recipe, "mixer": mixer, **{p: p in parts for p in ("ssm", "conv", "gate")},
                "budget": budget, "stage1_tokens": one, "stage2_tokens": two, "default_budget": default_budget or budget, "seed": seed, "seq_len": 1024,
                "data": "/data/train.jsonl.xz", "validation": "/data/validation.jsonl.xz", "keep_attention": None, "study": study,
                "eval": {"sequences": 200, "batch_size": 16, "tasks": list(TASKS)}, "stage1": {"lr": 0.01}, "stage2": {"lr": 0.001, "lr_new": 0.01}}
    new = 10_000_000 if "gate" in parts else 300_000
    record = {"schema": 1, "study": study, "cell": row, "row": row, "key": key, "status": "done", "settings": settings, "metrics": metrics,
              "params": {"total": size + (new if student else 0), "new": new if student else 0, "trainable": 0},
              "tokens": {"stage1": one, "stage2": two},
              "timing": {} if untouched else {"stage1_seconds": 100.0, "student_seconds": 900.0, "student_tokens_per_second": 24000.0},
              "curves": training_curves(one, two, value) if student else {},
              "peak_memory": {} if untouched else {"stage1": 3e10, "student": 4e10},
              "provenance": {"command": f"python sweep.py -m +study={study} scale={teacher} seed=0,1,2", "device": "NVIDIA H200", "device_type": "cuda",
                             "git_commit": "0123456789abcdef", "started": f"2026-11-2{seed}T10:00:00+00:00", "artifacts": {"eval": key} | (
                                 {} if untouched else {"student": f"{rng.getrandbits(64):016x}"})}}
    folder = Path(root) / study / f"{''.join(c if c.isalnum() else '-' for c in row)}-s{seed}-{budget}-{teacher}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(record))
    (folder / "losses.json").write_text(json.dumps({"tokens": "t", "seq_len": 1024, "loss": losses}))
    return folder


def training_curves(one, two, value, points=60):
    """What hm.record keeps of the two steps' logs."""
    curves = {}
    done = [(i + 1) / points for i in range(points)]
    if one:
        layers = {f"layer.{n}": [float(f"{0.6 * math.exp(-3 * x) + 0.01 * n:.5g}") for x in done] for n in range(12)}
        curves["stage1"] = {"loss": [float(f"{sum(of_all) / 12:.5g}") for of_all in zip(*layers.values(), strict=True)], **layers}
    if two:
        curves["student"] = {"loss": [float(f"{value + 2 * math.exp(-5 * x):.5g}") for x in done]}
    return {step: {"step": list(range(points)), "tokens": [int(tokens * x) for x in done], **curves[step]}
            for step, tokens in (("stage1", one), ("student", two)) if tokens}


def store(root, seeds=(0, 1, 2), budgets=(20_000_000,), teachers=(("smollm2", 134_515_008),), limit=None):
    """Every study at every budget and teacher. Returns the number of records."""
    count = 0
    for teacher, size in teachers:
        for budget in budgets:
            for study, row, recipe, mixer, percent, own in cells(budget):
                for seed in seeds if recipe != "teacher" else seeds[:1]:
                    if limit is None or count < limit:
                        write(root, study, row, recipe, mixer, percent, own, seed, teacher, size, default_budget=budget)
                        count += 1
    return count


def bench(folder):
    """The files of an inference and a training benchmark."""
    inference = [{"model": model, "shape": "pythia1b", "context": 1024 << i, "batch": batch, "status": "ok",
                  "prefill_tokens_per_second": 1e5, "decode_tokens_per_second": 100 * batch / (1 if model == "student" else 1 + 0.2 * (1 << i)),
                  "seconds_per_token": 0.01 if model == "student" else 0.005 + 0.002 * (1 << i),
                  "peak_memory_bytes": 3e9 if model == "student" else 3e9 + 2e8 * batch * (1 << i)}
                 for model in ("student", "teacher") for batch in (1, 16) for i in range(7)]
    inference.append({"model": "teacher", "shape": "pythia1b", "context": 131072, "batch": 256, "status": "out of memory"})
    training = [{"shape": "smollm2", "what": what, "mixer": "hedgemamba", "scan": "ssd", "seq_len": 1024, "batch": 16, "tokens_per_second": rate,
                 "share_of_peak": 0.31, "peak_memory_bytes": 4e10, "ratio_to_teacher": 0.95, "compile": True, "checkpointing": False}
                for what, rate in (("stage1", 300_000), ("stage2", 250_000))]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for kind, rows in (("inference", inference), ("training", training)):
        (Path(folder) / f"{kind}.json").write_text(json.dumps({
            "schema": 1, "kind": kind, "device": "NVIDIA H200", "command": f"python -m hm.bench {kind}", "git_commit": None, "versions": {}, "rows": rows}))


if __name__ == "__main__":
    wanted = int(sys.argv[2]) if len(sys.argv) > 2 else None
    many = {} if wanted is None else {"seeds": tuple(range(6)), "budgets": tuple(1_000_000 * n for n in (1, 2, 5, 10, 20, 50)), "limit": wanted,
                                      "teachers": tuple((f"teacher{i}", 10**8 * (i + 1)) for i in range(4))}
    print(store(Path(sys.argv[1]) / "runs", **many), "records")
    bench(Path(sys.argv[1]) / "results/bench")
