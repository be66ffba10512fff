"""The published numbers of the paper that is reproduced: to compare against, never a result of this project.

Perplexity is on OpenWebText at sequence length 1024; accuracies are in percent. A value that no source gave
is None, one of which only a lower bound was published is an `Above`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TITLE = "Attention to Mamba: A Recipe for Cross-Architecture Distillation"
ARXIV = "2604.14191"
AUTHORS = ("Abhinav Moudgil", "Ningyuan Huang", "Eeshan Gunesh Dhekane", "Pau Rodriguez", "Luca Zappella",
           "Federico Danieli")
YEAR = 2026
TEACHER = "Pythia-1B"
PROVENANCE = (
    "Figures as given by public reading notes of the paper that quote its tables; two independent notes "
    "agree on every figure they share. Values marked None were not in any note. Treat as the published "
    "reference to compare against, never as a result of this project."
)


@dataclass(frozen=True)
class Above:
    """A value of which only "greater than `bound`" was published."""

    bound: float

    def __str__(self) -> str:
        return f"> {self.bound:g}"


Value = float | Above | None


@dataclass(frozen=True)
class Metric:
    """`name` is the record's; `better` is "down" or "up"; `meaning` states what is measured and its unit."""

    name: str
    short: str
    better: str
    meaning: str


METRICS = {m.name: m for m in (
    Metric("ppl", "ppl", "down", "validation perplexity on OpenWebText, sequence length 1024"),
    Metric("arc_challenge", "ARC-C", "up", "acc_norm, %"),
    Metric("arc_easy", "ARC-E", "up", "acc, %"),
    Metric("social_iqa", "SIQA", "up", "acc, %"),
    Metric("piqa", "PIQA", "up", "acc, %"),
    Metric("lambada_openai", "LAMBADA", "up", "acc, %"),
    Metric("boolq", "BoolQ", "up", "acc, %"),
    Metric("race", "RACE", "up", "acc, %"),
    Metric("logiqa", "LogiQA", "up", "acc, %"),
    Metric("winogrande", "WinoGrande", "up", "acc, %"),
    Metric("hellaswag", "HellaSwag", "up", "acc_norm, %"),
)}
COLUMNS = tuple(METRICS)
TASKS = COLUMNS[1:]


@dataclass(frozen=True)
class PaperTable:
    """`rows`: row name -> {column: value}; `params_millions`: row name -> parameters in M."""

    caption: str
    rows: dict[str, dict[str, Value]]
    params_millions: dict[str, float] = field(default_factory=dict)


def _rows(rows: dict[str, tuple[Value, ...]]) -> dict[str, dict[str, Value]]:
    return {name: dict(zip(COLUMNS, values, strict=True)) for name, values in rows.items()}


TABLES = {
    "main": PaperTable(
        "1B models, 10B distillation tokens (teacher: Pythia-1B). The Hedgehog baseline was trained with a "
        "50/50 split, HedgeMamba with 10/90.",
        _rows({
            "teacher": (13.86, 27.04, 56.98, 39.86, 70.72, 42.07, 60.82, 32.92, 22.12, 53.43, 47.16),
            "hedgehog": (14.89, 26.45, 52.74, 38.38, 68.01, 30.60, 54.80, 30.43, 21.65, 50.91, 40.79),
            "hedgemamba": (14.11, 27.13, 53.66, 39.76, 68.72, 32.31, 55.20, 30.91, 20.89, 52.17, 41.87),
        }),
    ),
    "mixer": PaperTable(
        "Sequence-mixer components, 1B, 10B tokens, 50/50 split",
        _rows({
            "hedgehog": (14.89, 26.45, 52.74, 38.38, 68.01, 30.60, 54.80, 30.43, 21.66, 50.91, 40.79),
            "+ssm": (14.89, 26.54, 52.90, 38.02, 68.23, 31.24, 55.63, 30.05, 22.73, 51.38, 40.77),
            "+ssm+conv": (14.89, 26.62, 52.74, 38.28, 68.93, 31.63, 55.84, 30.14, 22.43, 51.78, 40.74),
            "+ssm+conv+gate": (14.58, 26.19, 53.11, 39.56, 68.77, 32.16, 57.61, 31.00, 24.42, 50.99, 41.81),
        }),
        params_millions={"hedgehog": 1014.0, "+ssm": 1020.0, "+ssm+conv": 1020.0, "+ssm+conv+gate": 1087.0},
    ),
    "split": PaperTable(
        "Stage-1/stage-2 token split in %, HedgeMamba, 10B tokens in all",
        _rows({
            "100/0": (25.71, 25.85, 48.70, 36.34, 66.49, 12.12, 61.47, 27.27, 20.58, 50.83, 26.14),
            "90/10": (16.15, 25.00, 52.06, 38.69, 68.93, 28.08, 56.15, 30.24, 22.43, 51.14, 39.69),
            "75/25": (15.18, 26.71, 52.31, 38.59, 69.26, 30.66, 60.61, 30.24, 20.58, 49.96, 41.02),
            "50/50": (14.58, 26.19, 53.11, 39.56, 68.77, 32.16, 57.61, 31.00, 24.42, 50.99, 41.81),
            "25/75": (14.25, 26.19, 53.91, 39.71, 68.93, 31.90, 55.41, 30.81, 21.35, 51.30, 41.59),
            "10/90": (14.11, 27.13, 53.66, 39.76, 68.72, 32.31, 55.20, 30.91, 20.89, 52.17, 41.87),
            "0/100": (17.08, 26.11, 50.67, 37.31, 67.03, 27.61, 54.01, 30.33, 21.35, 50.51, 40.25),
        }),
    ),
    "budget": PaperTable(
        "Total distillation tokens, HedgeMamba, 10/90 split",
        _rows({
            "1B": (16.56, 26.19, 52.27, 38.74, 67.68, 27.32, 57.49, 29.76, 20.43, 52.25, 40.67),
            "2B": (15.61, 25.94, 51.05, 38.79, 69.04, 29.30, 56.45, 29.57, 23.04, 51.85, 40.29),
            "3B": (15.15, 25.09, 52.69, 38.43, 69.10, 30.56, 56.57, 29.28, 23.04, 51.93, 41.03),
            "10B": (14.11, 27.13, 53.66, 39.76, 68.72, 32.31, 55.20, 30.91, 20.89, 52.17, 41.87),
        }),
    ),
    "one_step": PaperTable(
        "Direct Transformer-to-Mamba distillation with no linear-attention stage",
        _rows({"one_step": (Above(100.0), *[None] * 10)}),
    ),
    "scale": PaperTable(
        "Model sizes 160M, 410M, 1B (appendix). Only the ordering is known: HedgeMamba is ahead of Hedgehog "
        "at each size, and both improve with size.",
        {},
    ),
}

RECIPE = {
    "teacher": "Pythia-1B (GPT-NeoX, 16 layers, width 2048, 8 heads of 256, rotary on 25% of each head)",
    "data": "OpenWebText, GPT-NeoX tokenizer, about 9B tokens (10B is about 1.1 epochs); about 4M tokens "
            "held out",
    "sequence_length": 1024,
    "batch_sequences": 48,
    "stage1": {"tokens": 1_000_000_000, "steps": 20_000, "trainable": "feature maps only",
               "loss": "cosine embedding loss between teacher and student layer outputs"},
    "stage2": {"tokens": 9_000_000_000, "steps": 180_000, "loss": "next-token cross-entropy",
               "trainable": "all but the input and output embeddings"},
    "optimizer": "AdamW, beta1 0.9, beta2 0.95; linear warm-up, cosine decay to 0.1 of the peak; weight "
                 "decay 0.1 and gradient clipping at 1 (one note)",
    "peak_learning_rate": "the notes disagree (0.01 in one, the order of 1e-5 in another): make it a "
                          "setting and report what works",
    "hardware": "8x A100, 12 days 9 hours for 10B tokens at 1B",
}


@dataclass(frozen=True)
class Claim:
    """What the paper says (`text`) and the figures that it rests on (`paper`)."""

    id: str
    text: str
    paper: str


CLAIMS = {c.id: c for c in (
    Claim("C1", "The two-stage student comes close to the teacher's perplexity",
          "14.11 against 13.86, a gap of 1.8%"),
    Claim("C2", "HedgeMamba is ahead of the Hedgehog baseline at the same total budget",
          "14.11 against 14.89; 76% of Hedgehog's gap to the teacher closed"),
    Claim("C3", "Direct one-step distillation collapses", "perplexity above 100"),
    Claim("C4", "Of the mixer's parts, the gate brings the improvement; SSM and convolution alone bring none",
          "14.89, 14.89, 14.89, then 14.58"),
    Claim("C5", "A light stage 1 and a heavy stage 2 is the best split, and both stages are needed",
          "10/90 best; 0/100 gives 17.08, 100/0 gives 25.71"),
    Claim("C6", "Perplexity falls steadily with the total budget and does not diverge",
          "16.56, 15.61, 15.15, 14.11 at 1B, 2B, 3B, 10B"),
    Claim("C7", "The ordering holds across model sizes", "160M, 410M and 1B"),
    Claim("C8", "Downstream accuracy approaches the teacher's and is at or above the Hedgehog baseline's",
          "ten zero-shot tasks"),
)}


def gap(ppl: Value, teacher: float = 13.86) -> Value:
    """How far `ppl` is above the teacher's, in percent; of an `Above`, again an `Above`."""
    if ppl is None:
        return None
    percent = 100 * ((ppl.bound if isinstance(ppl, Above) else ppl) / teacher - 1)
    return Above(percent) if isinstance(ppl, Above) else percent
