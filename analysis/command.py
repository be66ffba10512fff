"""What the commands of this folder share: their arguments, what they read and say, and how they write files."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pandas as pd

from analysis.load import load_records
from analysis.tables import studies
from hm.errors import UserError


def parser(description: str) -> argparse.ArgumentParser:
    """--runs, --out and --study, which every command has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--runs", default=os.environ.get("HM_RUNS") or "runs",
                      help="folder with records, at any depth (default: HM_RUNS, or runs)")
    made.add_argument("--out", default="results", help="what is made goes to OUT/STUDY/ (default: results)")
    made.add_argument("--study", help="only this study (default: all)")
    return made


def run(main: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """The exit status of a command: 0, or 2 after one sentence on standard error."""
    try:
        main(options)
        sys.stdout.flush()
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        return 2
    except BrokenPipeError:  # of make_tables.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def read(runs: str | Path) -> pd.DataFrame:
    """The records under `runs`; those that can't be used are listed on standard error.

    Raises:
        UserError: if there is none that can be used.
    """
    frame = load_records(runs)
    for name, reason in frame.attrs["problems"]:
        say(f"skipped {name}: {reason}", sys.stderr)
    if frame.empty:
        raise UserError(f"none of the {len(frame.attrs['problems'])} records under runs={runs} can be used "
                        "(the reasons are above); run their cells again or name another folder.")
    return frame


def chosen(frame: pd.DataFrame, study: str | None, runs: str | Path) -> list[str]:
    """The study that was asked for, or all. Raises UserError, with the nearest name, if it has no record."""
    known = studies(frame)
    if study is None:
        return known
    if study not in known:
        near = difflib.get_close_matches(study, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"study={study} has no record under runs={runs}; {hint}There: {', '.join(known)}.")
    return [study]


def folder_name(study: str) -> str:
    """`study` as a name of a folder that leads nowhere else."""
    name = re.sub(r"[^\w.+=,@-]", "_", study)
    return name if name.strip(".") else name.replace(".", "_")


def write_file(path: Path, data: bytes, out: str | Path) -> Path:
    """`data` at `path`, whole or not at all; a file that holds it already is not touched."""
    try:
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            beside.write_bytes(data)
            os.replace(beside, path)
    except OSError as error:
        raise UserError(f"out={out} can't be written ({path}: {error.strerror}); name another folder.") from error
    return path


def say(text: str, file: TextIO) -> None:
    """Print, with question marks for what the terminal's encoding lacks."""
    coding = getattr(file, "encoding", None) or "utf-8"
    print(text.encode(coding, "replace").decode(coding), file=file)
