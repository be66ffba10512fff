"""How each claim is judged: the rules of claims.py, carried out on places.

Each judge gives a finding for every place where the claim's cells, or some of them, were run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from analysis import paper
from analysis.places import Cells, Place, unlike
from analysis.rows import TEACHER, Record, human
from analysis.stats import LEVEL, Difference, accuracy_difference, difference, holm

SCALES = ("pythia160m", "pythia410m", "pythia1b")
"""The paper's teachers."""
REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced", "undecided"

CLOSE = math.log(1.037)
SMALLEST = math.log(1.01)
COLLAPSE = math.log(100 / 13.86)
NEAR_POINTS, BESIDE_POINTS = 3.4, 0.5
LIGHT = ("10/90", "50/50")
CHANCE = {"arc_challenge": 25, "arc_easy": 25, "social_iqa": 100 / 3, "piqa": 50, "lambada_openai": 0, "boolq": 50,
          "race": 25, "logiqa": 25, "winogrande": 50, "hellaswag": 25}
"""Percent by guessing, from the number of answers."""


@dataclass
class Finding:
    """A verdict at one place: `why` in a sentence, the numbers, the controls that bear on it, what would decide it.

    `paths` are the records behind it.
    """

    where: str
    verdict: str
    why: str
    evidence: list[str] = field(default_factory=list)
    controls: list[str] = field(default_factory=list)
    decide: str = ""
    paths: list[str] = field(default_factory=list)


@dataclass
class Case:
    """What one judge gathers at one place."""

    place: Place
    root: str
    evidence: list[str] = field(default_factory=list)
    controls: list[str] = field(default_factory=list)
    paths: dict[str, None] = field(default_factory=dict)

    def compare(self, a: Cells, b: Cells, remark: str = "", control: bool = False) -> Difference | None:
        """ln ppl(a) - ln ppl(b), with a line of evidence that also says in which settings they differ."""
        found = difference(a.records, b.records, self.root)
        self.paths.update(dict.fromkeys(r["path"] for r in [*a.records, *b.records]))
        line = f"{a.name} {a.ppl:.4g} against {b.name} {b.ppl:.4g}: " + (found.percent if found else "no seed in common")
        (self.controls if control else self.evidence).append("; ".join(filter(None, (line, remark, unlike(a, b)))))
        return found

    def finding(self, verdict: str, why: str, study: str = "", seeds: Sequence[Cells] = ()) -> Finding:
        """The finding; an undecided one names the run of `study` with two seeds more than `seeds` have, at least three."""
        wanted = max(3, 2 + max((c.seeds for c in seeds), default=0))
        decide = self.place.command(study, wanted) if study and verdict == UNDECIDED else ""
        evidence = [*self.evidence, *dict.fromkeys(self.place.notes)]
        return Finding(self.place.label, verdict, why, evidence, self.controls, decide, list(self.paths))


def below(found: Difference, p: float | None = None) -> bool:
    return found.value < 0 and (found.p if p is None else p) < LEVEL


def excluded(found: Difference) -> bool:
    """Whether the interval leaves no room for an advantage of SMALLEST."""
    return found.low > -SMALLEST


def closeness(places: Sequence[Place], root: str) -> Iterator[Finding]:
    """C1."""
    for place in places:
        case = Case(place, root)
        student = next((c for split in LIGHT if (c := place.best("hedgemamba", split))), None)
        teacher = place.teacher()
        if student is None:
            continue
        if teacher is None:
            yield case.finding(UNDECIDED, "the teacher was not measured on this text", "+study=main", [student])
            continue
        gaps = {"the teacher": case.compare(student, teacher)}
        if adapted := place.adapted(student):
            gaps["the adapted teacher"] = case.compare(student, adapted, control=True)
        far = [f"{100 * math.expm1(g.low):.3g}% from {name}" for name, g in gaps.items() if g and g.low > CLOSE]
        if far:
            yield case.finding(NOT_REPRODUCED, f"the student is at least {' and '.join(far)}, and 3.7% would be close")
        elif len(gaps) == 2 and all(g and g.high <= CLOSE for g in gaps.values()):
            yield case.finding(REPRODUCED, "the student is within 3.7% of the teacher and of the adapted teacher")
        else:
            why = ("the adapted teacher, the control of domain adaptation, was not run" if len(gaps) < 2 else
                   "the intervals reach across 3.7%" if all(gaps.values()) else f"no seed in common with {next(n for n, g in gaps.items() if not g)}")
            yield case.finding(UNDECIDED, why, "+study=main", [student])


def _baselines(place: Place, split: str, student: Cells) -> tuple[Cells | None, Cells | None]:
    """The Hedgehog to compare `student` with, and the control with as many parameters, if they were run.

    The control is a Hedgehog with a linear path past it (hedgehog_bypass), or one that is as large within 1%.
    """
    found = place.variants("hedgehog", split)
    large = [c for c in found if c.params >= 0.99 * student.params > 0]
    plain = [c for c in found if c not in large]
    same = [c for c in plain if c.settings == student.settings]
    wide = [*large, *place.variants("hedgehog_bypass", split)]
    return min(same or plain, key=lambda c: c.ppl, default=None), min(wide, key=lambda c: c.ppl, default=None)


def _controls(case: Case, split: str) -> dict[str, Difference | None]:
    """What speaks against the gate if it is not ahead, at `split` or else at the first split where it was run."""
    place, found = case.place, {}
    for at in [split, *(s for s in case.place.splits if s != split)]:
        gate, full = place.best("gate", at), place.best("hedgemamba", at)
        if (first := full or gate) is None:
            continue
        plain, wide = _baselines(place, at, first)
        if plain and (pair := place.matched(("gate", at), ("hedgehog", at))):
            found["the gate alone is not ahead of Hedgehog"] = case.compare(*pair, control=True)
        for ahead in (gate, full):
            if ahead and wide:
                found[f"{ahead.name} is not ahead of a Hedgehog with as many parameters"] = case.compare(ahead, wide, control=True)
        if found:
            break
    return found


def _ahead(place: Place, root: str) -> Finding | None:
    """C2 at one place."""
    case, pairs, students = Case(place, root), [], []
    for split in place.splits:
        pair = place.matched(("hedgemamba", split), ("hedgehog", split))
        if pair is None:
            continue
        student, _ = pair
        baseline, wide = _baselines(place, split, student)
        if baseline is None:
            continue
        students.append(student)
        pairs.append((split, case.compare(student, baseline)))
        if (teacher := place.teacher()) and math.inf > baseline.ppl > teacher.ppl and student.ppl < math.inf:
            case.evidence.append(f"{(baseline.ppl - student.ppl) / (baseline.ppl - teacher.ppl):.0%} of Hedgehog's gap to the teacher "
                                 f"closed at {split} (paper: 76%, at different splits)")
        for control in filter(None, (wide, place.best("gate", split))):
            name = "Hedgehog with as many parameters" if control is wide else "the gate alone"
            case.compare(student, control, name, control=True)
    if not pairs:
        return None
    if place.best("hedgemamba", "10/90") and (usual := place.best("hedgehog", "50/50")):
        case.compare(place.best("hedgemamba", "10/90"), usual, "the paper's pair, of different splits: does not decide")  # type: ignore[arg-type]
    known = [(split, d) for split, d in pairs if d]
    adjusted = holm([d for _, d in known])
    if lost := [split for split, d in known if excluded(d)]:
        return case.finding(NOT_REPRODUCED, f"at {', '.join(lost)} an advantage of 1% is excluded")
    if known and len(known) == len(pairs) and all(below(d, p) for (_, d), p in zip(known, adjusted, strict=True)):
        return case.finding(REPRODUCED, f"HedgeMamba is below Hedgehog at {', '.join(s for s, _ in pairs)}")
    return case.finding(UNDECIDED, "the difference is not clear of chance at every split", "+study=main", students)


def advantage(places: Sequence[Place], root: str) -> Iterator[Finding]:
    """C2."""
    yield from filter(None, (_ahead(place, root) for place in places))


def collapse(places: Sequence[Place], root: str) -> Iterator[Finding]:
    """C3."""
    for place in places:
        case = Case(place, root)
        variants, teacher = place.variants("", "", "one_step"), place.teacher()
        if not variants:
            continue
        if teacher is None:
            yield case.finding(UNDECIDED, "the teacher was not measured on this text", "+study=one_step", variants)
            continue
        ratios = [case.compare(c, teacher, _variant(c)) for c in variants]
        if student := place.best("hedgemamba", "10/90"):
            case.compare(min(variants, key=lambda c: c.ppl), student, "the best one-step student against two stages", control=True)
        if any(d and d.high < COLLAPSE for d in ratios):
            least = min(d.high for d in ratios if d)
            yield case.finding(NOT_REPRODUCED, f"a one-step student is at most {math.exp(least):.2g} times the teacher's perplexity, and 7.2 times "
                                               "is what the paper's bound means")
        elif all(d and d.low > COLLAPSE for d in ratios):
            yield case.finding(REPRODUCED, "every one-step student that was run is above 7.2 times the teacher's perplexity")
        else:
            yield case.finding(UNDECIDED, "the interval reaches across 7.2 times the teacher's perplexity", "+study=one_step", variants)


def _variant(cells: Cells) -> str:
    said = {"settings.mamba.copy_projections": "copied projections", "settings.stage2.loss": "loss"}
    return ", ".join(f"{name} {cells.settings[k]}" for k, name in said.items() if k in cells.settings)


def parts(places: Sequence[Place], root: str) -> Iterator[Finding]:
    """C4, at the split that has the most of its cells."""
    ladder = ("hedgehog", "ssm", "ssm_conv", "hedgemamba")
    for place in places:
        run = {s: [m for m in ladder if place.variants(m, s)] for s in place.splits}
        split = max(run, key=lambda s: len(run[s]), default=None)
        if split is None or not {"ssm", "ssm_conv"} & set(run[split]):
            continue
        case, cells = Case(place, root), {m: place.best(m, split) for m in ladder}
        pairs = {"ssm": ("ssm", "hedgehog"), "ssm_conv": ("ssm_conv", "hedgehog"), "gate": ("hedgemamba", "ssm_conv")}
        matched = {k: place.matched((a, split), (b, split)) for k, (a, b) in pairs.items()}
        found = {k: case.compare(*pair) if pair else None for k, pair in matched.items()}
        controls = _controls(case, split)
        wrong = [f"{m} alone is ahead by 1% or more" for m in ("ssm", "ssm_conv") if (d := found[m]) and d.high < -SMALLEST]
        wrong += ["the gate's advantage of 1% is excluded"] if (d := found["gate"]) and excluded(d) else []
        wrong += [text for text, d in controls.items() if d and excluded(d)]
        none = all((d := found[m]) and excluded(d) for m in ("ssm", "ssm_conv"))
        gained = bool((d := found["gate"]) and below(d)) and all(d and below(d) for d in controls.values())
        if wrong:
            yield case.finding(NOT_REPRODUCED, f"at {split}: {'; '.join(wrong)}")
        elif none and gained:
            unseen = "" if len(controls) > 1 else "; the controls (the gate alone, Hedgehog with as many parameters) were not all run"
            yield case.finding(REPRODUCED, f"at {split} the gate is ahead and SSM and convolution alone are not{unseen}")
        else:
            missing = [m for m, c in cells.items() if c is None]
            why = f"not run at {split}: {', '.join(missing)}" if missing else f"at {split} the differences are not clear of chance"
            yield case.finding(UNDECIDED, why, "+study=mixer", [c for c in cells.values() if c])


def splits(places: Sequence[Place], root: str) -> Iterator[Finding]:
    """C5."""
    for place in places:
        others = [s for s in place.splits if s != "10/90" and not 0 < _stage1(s) < 50 and place.best("hedgemamba", s)]
        light = place.best("hedgemamba", "10/90")
        if light is None or not others:
            continue
        case = Case(place, root)
        found = {}
        for split in others:
            pair = place.matched(("hedgemamba", "10/90"), ("hedgemamba", split))
            if pair and (d := case.compare(*pair)):
                found[split] = d
        for split in place.splits:
            if split not in (*others, "10/90") and (pair := place.matched(("hedgemamba", "10/90"), ("hedgemamba", split))):
                case.compare(*pair, "light too: does not decide")
        adjusted = dict(zip(found, holm(list(found.values())), strict=True))
        wanted = {"0/100": "0/100" in found, "100/0": "100/0" in found, "50/50": any(50 <= _stage1(s) < 100 for s in found)}
        missing = [split for split, there in wanted.items() if not there]
        if lost := [split for split, d in found.items() if excluded(d)]:
            yield case.finding(NOT_REPRODUCED, f"an advantage of 1% of 10/90 over {', '.join(lost)} is excluded")
        elif not missing and all(below(d, adjusted[s]) for s, d in found.items()):
            yield case.finding(REPRODUCED, f"10/90 is below {', '.join(found)}")
        else:
            why = f"not run: {', '.join(missing)}" if missing else "not every difference is clear of chance"
            yield case.finding(UNDECIDED, why, "+study=split", [light])


def _stage1(split: str) -> float:
    return float(split.partition("/")[0])


def budgets(places: Sequence[Place], root: str) -> Iterator[Finding]:
    """C6, over the places of one yardstick."""
    yards: dict[int, list[Place]] = {}
    for place in places:
        yards.setdefault(id(place.yard), []).append(place)
    for group in yards.values():
        for split in LIGHT:
            curve = _curve(group, split)
            if len(curve) < 2:
                continue
            case = Case(group[-1], root)
            steps = [d for a, b in zip(curve[1:], curve, strict=False) if (d := case.compare(a, b))]
            starts = [(c, s) for c in curve if (s := c.records[0].get("metrics.ppl_start.value"))]
            adjusted = holm(steps)
            diverged = [c.name for c, start in starts if c.ppl > start]
            risen = any(d.value > 0 and d.low > 0 for d in steps)
            label = f"{group[-1].label.rpartition(',')[0]}, {curve[0].name.split()[-1]} to {curve[-1].name.split()[-1]} tokens"
            if diverged or risen:
                finding = case.finding(NOT_REPRODUCED, f"diverged: {', '.join(diverged)}" if diverged else "a larger budget is worse than the one before")
            elif len(curve) >= 3 and len(steps) == len(curve) - 1 and all(below(d, p) for d, p in zip(steps, adjusted, strict=True)):
                finding = case.finding(REPRODUCED, f"each of {len(curve)} budgets is below the one before")
            else:
                why = "two budgets are no trend" if len(curve) == 2 else "not every step is clear of chance"
                finding = case.finding(UNDECIDED, why, "+study=budget", curve)
            finding.where = label
            yield finding
            break


def _curve(group: Sequence[Place], split: str) -> list[Cells]:
    """HedgeMamba at each budget, smallest first, at the one setting of the rest that has the most budgets."""
    by_settings: dict[tuple, list[Cells]] = {}
    for place in group:
        for cells in place.variants("hedgemamba", split):
            named = replace(cells, name=f"hedgemamba {human(place.budget)}")
            by_settings.setdefault(tuple(sorted(cells.settings.items())), []).append(named)
    return max(by_settings.values(), key=len, default=[])


def sizes(places: Sequence[Place], root: str) -> Iterator[Finding]:
    """C7, over the largest place of each teacher."""
    largest: dict[str, Finding] = {}
    last: dict[str, Place] = {}
    for place in places:
        if finding := _ahead(place, root):
            teacher = str(place.yard[0].get(TEACHER) or place.yard[0].get("settings.teacher"))
            largest[teacher], last[teacher] = finding, place
    if not largest:
        return
    evidence = [f"{f.where}: C2 {f.verdict}, {f.why}" for f in largest.values()]
    paths = list(dict.fromkeys(p for f in largest.values() for p in f.paths))
    where = "; ".join(f.where for f in largest.values())
    verdicts = [f.verdict for f in largest.values()]
    if NOT_REPRODUCED in verdicts:
        yield Finding(where, NOT_REPRODUCED, "HedgeMamba is not ahead at every teacher", evidence, [], "", paths)
    elif len(verdicts) >= 3 and set(verdicts) == {REPRODUCED}:
        yield Finding(where, REPRODUCED, f"HedgeMamba is ahead at each of {len(verdicts)} teachers", evidence, [], "", paths)
    else:
        runs = [f.decide for f in largest.values() if f.verdict == UNDECIDED and f.decide]
        run = {str(place.yard[0].get("settings.scale")) for place in last.values()}
        others = [scale for scale in SCALES if scale not in run][: max(0, 3 - len(verdicts))]
        runs += [f"python sweep.py -m +study=main scale={','.join(others)} seed=0,1,2"] if others else []
        why = f"{len(verdicts)} of three teachers were run" if len(verdicts) < 3 else "C2 is undecided at one of them"
        yield Finding(where, UNDECIDED, why, evidence, [], " && ".join(runs), paths)


def downstream(places: Sequence[Place], root: str) -> Iterator[Finding]:
    """C8."""
    for place in places:
        asked = (c for split in LIGHT for c in sorted(place.variants("hedgemamba", split), key=lambda c: (c.seeds < 2, c.ppl)) if _tasks(c))
        student = next(asked, None)
        if student is None:
            continue
        case, split, teacher = Case(place, root), student.name.split()[-1], place.teacher()
        baseline, _ = _baselines(place, split, student)
        case.paths.update(dict.fromkeys(r["path"] for c in (student, teacher, baseline) if c for r in c.records))
        to_teacher = accuracy_difference(student.records, teacher.records, paper.TASKS) if teacher else None
        to_baseline = accuracy_difference(student.records, baseline.records, paper.TASKS) if baseline else None
        if to_teacher is None or to_baseline is None:
            yield case.finding(UNDECIDED, "the ten tasks were not all run for HedgeMamba, Hedgehog and the teacher",
                               "+study=main eval.tasks=all", [student])
            continue
        case.evidence += [f"mean of ten tasks, minus the teacher's: {to_teacher.points}", f"minus Hedgehog's: {to_baseline.points}"]
        each = {t: d for t in paper.TASKS if (d := accuracy_difference(student.records, baseline.records, [t]))}  # type: ignore[union-attr]
        adjusted = dict(zip(each, holm(list(each.values())), strict=True))
        lost = [t for t, d in each.items() if below(d, adjusted[t])]
        case.evidence.append("below Hedgehog after Holm: " + (", ".join(lost) or "no task"))
        above_chance = _mean(teacher.records) - sum(CHANCE.values()) / len(CHANCE)  # type: ignore[union-attr]
        case.controls.append(f"the teacher is {above_chance:.1f} points above chance")
        if above_chance <= NEAR_POINTS:
            yield case.finding(UNDECIDED, "the teacher is so near chance that closeness to it says nothing; a larger teacher would",
                               "+study=main scale=smollm2", [student])
        elif lost or to_teacher.high < -NEAR_POINTS or to_baseline.high < -BESIDE_POINTS:
            why = "tasks below Hedgehog: " + ", ".join(lost) if lost else "the mean is further below than the rule allows"
            yield case.finding(NOT_REPRODUCED, why)
        elif to_teacher.low >= -NEAR_POINTS and to_baseline.low >= -BESIDE_POINTS:
            yield case.finding(REPRODUCED, "the mean is within 3.4 points of the teacher's and not below Hedgehog's")
        else:
            yield case.finding(UNDECIDED, "the intervals reach across the limits",
                               "+study=main eval.tasks=all", [student])


def _tasks(cells: Cells) -> bool:
    return any(f"metrics.{task}.value" in r for r in cells.records for task in paper.TASKS)


def _mean(records: Sequence[Record]) -> float:
    return sum(r[f"metrics.{t}.value"] for t in paper.TASKS for r in records if f"metrics.{t}.value" in r) / (len(paper.TASKS) * len(records))


def nowhere(claim: str, places: Sequence[Place]) -> Finding:
    """The finding on a claim none of whose cells were run: what would decide it at the largest place there is."""
    study = {"C1": "+study=main", "C2": "+study=main", "C3": "+study=one_step", "C4": "+study=mixer", "C5": "+study=split",
             "C6": "+study=budget", "C7": "+study=main", "C8": "+study=main eval.tasks=all"}[claim]
    if not places:
        return Finding("no place: no student was run", UNDECIDED, "its cells were not run", decide=f"python sweep.py -m {study} seed=0,1,2")
    case = Case(places[-1], "")
    return case.finding(UNDECIDED, "its cells were not run", study)


JUDGES: dict[str, Callable[[Sequence[Place], str], Iterator[Finding]]] = {
    "C1": closeness, "C2": advantage, "C3": collapse, "C4": parts, "C5": splits, "C6": budgets, "C7": sizes, "C8": downstream}
