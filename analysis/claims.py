"""A verdict on each of the paper's claims: reproduced, not reproduced or undecided, by the rules below.

    python analysis/claims.py --runs runs        # prints the verdicts and writes <out>/claims.{md,json}

A verdict is about one place: a teacher, a text and a budget. It says what holds there and nothing about larger ones.
The thresholds come from the paper's figures and were fixed before any record was judged; judges.py applies them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository's root in place of this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import pandas as pd

from analysis import command, judges, paper
from analysis.formats import markdown_text
from analysis.judges import Finding
from analysis.places import places
from analysis.rows import Record, recipe_of, records_of

RULES = {
    "C1": ("HedgeMamba at 10/90 (or else 50/50) is at most 3.7% above the perplexity of the teacher, and of the teacher "
           "adapted to the same tokens: reproduced if both intervals end below, not if one begins above.",
           "The paper calls 1.8% close and improves on a baseline at 7.4%; 3.7% is half way on a logarithmic scale. The adapted "
           "teacher is there since a student trained on the evaluation's kind of text can pass a frozen teacher for that alone."),
    "C2": ("At each split that both were trained with, HedgeMamba's perplexity is below Hedgehog's (p < 0.05 after Holm): "
           "reproduced if at all of them, not if at one an advantage of 1% is excluded.",
           "The paper compares 10/90 with 50/50, and the split alone is worth 3% there, so only equal splits decide. Below 1% "
           "nobody would speak of an advantage; the smallest that the paper reports is 2.1%."),
    "C3": ("One-step students are at least 7.2 times the teacher's perplexity (1.98 nats): reproduced if every variant that was "
           "run is, not if one is not.",
           "Only a bound was published, 100 against a teacher of 13.86. Absolute perplexities of different teachers don't compare, so "
           "it is carried over as a ratio. A variant that does not collapse shows that the recipe collapses, not the single step."),
    "C4": ("At one split: +SSM and +SSM+conv are not ahead of Hedgehog by 1% (the intervals exclude it), and +SSM+conv+gate is "
           "ahead of +SSM+conv (p < 0.05). Where the controls were run, at this split or else at another, the gate alone is ahead of "
           "Hedgehog, and of a Hedgehog with as many parameters. Reproduced if all hold, not if the data exclude one.",
           "The gate adds 7% of parameters and comes last in the ladder, so without the controls its gain could be that of size "
           "or of the parts before it."),
    "C5": ("10/90 is below 0/100, below 100/0 and below every split with half or more of the tokens in stage 1 (p < 0.05 after "
           "Holm; at least one of these must have been run): reproduced if all hold, not if for one an advantage of 1% is excluded.",
           "25/75 is no rival of the claim: it is light too, and the paper has the two 1% apart."),
    "C6": ("Over at least three budgets of HedgeMamba at one split and setting, each is below the one before (p < 0.05 after "
           "Holm): reproduced if all are, not if one is above it or ends above its own start.",
           "Three points are the fewest that can show a trend; the paper has four."),
    "C7": ("C2 is reproduced at each of at least three teachers, each at its largest budget: not reproduced if C2 is not at one.",
           "The paper has three sizes. The claim is about the ordering alone, so teachers of different families may take part."),
    "C8": ("Over all ten tasks, HedgeMamba's mean accuracy is at most 3.4 points below the teacher's and at most 0.5 below "
           "Hedgehog's, and no task is below Hedgehog's (p < 0.05 after Holm): reproduced if the intervals end within, not if one "
           "lies outside. Undecided where the teacher itself is within 3.4 points of chance.",
           "The paper's shortfall is 3.05 points, the baseline's 3.83, and 3.4 lies between. Half a point is about the standard error "
           "of a mean over ten tasks. A teacher near chance is approached by guessing."),
}


@dataclass
class Claim:
    """A claim with the findings at each place, smallest first; the headline is the largest place that is decided."""

    id: str
    text: str
    paper: str
    rule: str
    reason: str
    verdict: str
    where: str
    why: str
    findings: list[Finding] = field(default_factory=list)


BEYOND = {"settings.stage1.train": "maps", "settings.stage1.loss": "cosine", "settings.stage1.feed": "teacher",
          "settings.stage2.loss": "ce", "settings.ssm_init": "exact"}
"""What the paper's two stages have; a student with anything else is a recipe of ours and decides no claim of the paper's."""


def of_the_papers_form(record: Record) -> bool:
    return recipe_of(record) != "two_stage" or all(record.get(name, value) == value for name, value in BEYOND.items())


def judge(frame: pd.DataFrame) -> list[Claim]:
    """The verdicts on C1 to C8 from the records of `frame` whose recipe is of the paper's form, at whatever rates."""
    where = places([r for r in records_of(frame) if of_the_papers_form(r)])
    root = frame.attrs.get("root", ".")
    claims = []
    for claim in paper.CLAIMS.values():
        findings = list(judges.JUDGES[claim.id](where, root)) or [judges.nowhere(claim.id, where)]
        decided = [f for f in findings if f.verdict != judges.UNDECIDED]
        last = (decided or findings)[-1]
        rule, reason = RULES[claim.id]
        claims.append(Claim(claim.id, claim.text, claim.paper, rule, reason, last.verdict, last.where, last.why, findings))
    return claims


def to_markdown(claims: Sequence[Claim]) -> str:
    """The verdicts as a table, then each claim with its rule, evidence, controls and what would decide it."""
    lines = ["# Verdicts", "", "A verdict is about the place that it names (teacher, text, budget), not about the paper's.", "",
             "| claim | verdict | at |", "| --- | --- | --- |"]
    lines += [f"| {c.id}. {markdown_text(c.text)} | **{c.verdict}** | {markdown_text(c.where)} |" for c in claims]
    for c in claims:
        lines += ["", f"## {c.id}: {markdown_text(c.text)}", "", f"Paper: {markdown_text(c.paper)}.", "",
                  f"Rule: {markdown_text(c.rule)}", "", f"Why: {markdown_text(c.reason)}"]
        for f in c.findings:
            lines += ["", f"**{f.verdict}** at {markdown_text(f.where)}: {markdown_text(f.why)}", ""]
            lines += [f"- {markdown_text(e)}" for e in f.evidence]
            lines += [f"- control: {markdown_text(e)}" for e in f.controls]
            lines += ["", f"Would decide it: {code(f.decide)}"] if f.decide else []
    return "\n".join(lines) + "\n"


def code(text: str) -> str:
    """`text` as Markdown code, whatever backticks it holds."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return f"`{text}`" if not longest else f"{'`' * (longest + 1)} {text} {'`' * (longest + 1)}"


def make(options: argparse.Namespace) -> None:
    """Write and print the verdicts on the records that were asked for."""
    frame = command.read(options.runs)
    out = Path(options.out)
    if options.study is not None:
        command.chosen(frame, options.study, options.runs)
        attrs, frame = frame.attrs, frame[frame["study"] == options.study]
        frame.attrs = attrs
        out /= command.folder_name(options.study)
    claims = judge(frame)
    data = json.dumps([asdict(c) for c in claims], indent=1, ensure_ascii=False) + "\n"
    files = [command.write_file(out / "claims.md", to_markdown(claims).encode(), options.out),
             command.write_file(out / "claims.json", data.encode(), options.out)]
    command.say(to_markdown(claims), sys.stdout)
    command.say("\n".join(f"wrote {path}" for path in files), sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, or 2 after one sentence on standard error."""
    return command.run(make, command.parser("Judge the paper's claims from records.").parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
