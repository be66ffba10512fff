"""Waiting for a plan's jobs: a live view on a terminal, a line for each change elsewhere, and what became of each step."""

from __future__ import annotations

import shutil
import sys
import time

from hm.store import Store
from slurm.local import Outcome
from slurm.plan import Plan
from slurm.states import ENDED, SETTLE, State
from slurm.status import read_states, text


def wait(plan: Plan, store: Store, poll: float) -> Outcome:
    """Wait until each step is done, or has come to an end without its artifact. Jobs go on if this is interrupted.

    A job that has left the queue is given SETTLE seconds for a shared file system to show what it left.
    """
    before: dict[str, State] = {}
    missing_since: dict[str, float] = {}
    answered = True
    screen = Screen()
    while True:
        states, trouble = read_states(store.root, plan.steps)
        if bool(trouble) == answered:
            answered = not trouble
            print(trouble or "the scheduler answers again", file=sys.stderr, flush=True)
        screen.show(plan, states, before)
        before, now = states, time.monotonic()
        gone = [n for n, s in states.items() if s.name == "lost"]
        missing_since = {n: missing_since.get(n, now) for n in gone}
        settled = all(now - since >= SETTLE for since in missing_since.values())
        if settled and all(s.name in ("done", *ENDED) for s in states.values()):
            break
        time.sleep(min(poll, SETTLE))
    screen.close()
    outcome = Outcome()
    for name, state in states.items():
        if state.name == "blocked":
            outcome.blocked[name] = plan.steps[name].parent or ""
        elif state.name in ENDED:
            outcome.failed[name] = state.why + (f" (log: {state.log})" if state.log else "")
    return outcome


class Screen:
    """The table again and again on a terminal; else a line for each step whose state has changed."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.lines = 0

    def show(self, plan: Plan, states: dict[str, State], before: dict[str, State]) -> None:
        if self.live:
            width, height = shutil.get_terminal_size()
            shown = [line[: width - 1] for line in text(plan.steps, states).splitlines()][-(height - 1) :]
            print(self.erase() + "\n".join(shown), file=sys.stderr, flush=True)
            self.lines = len(shown)
            return
        for name, state in states.items():
            old = before.get(name, State("to do"))
            if (state.name, state.node, state.requeues) != (old.name, old.node, old.requeues):
                where = f" on {state.node}" if state.node and state.name == "running" else ""
                again = f" (requeued {state.requeues} times)" if state.requeues else ""
                why = f": {state.why}" if state.name in ENDED else ""
                print(f"{time.strftime('%H:%M:%S')}  {plan.steps[name].kind} of {plan.steps[name].label}: {state.name}{where}{again}{why}",
                      file=sys.stderr, flush=True)  # fmt: skip

    def erase(self) -> str:
        return f"\x1b[{self.lines}A\x1b[J" if self.lines else ""

    def close(self) -> None:
        if self.live:
            print(self.erase(), end="", file=sys.stderr, flush=True)
