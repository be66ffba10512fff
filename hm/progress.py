"""One kind of progress bar for everything that takes time: rate, time left, and gone when it is done."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm import tqdm

silent = False
"""In all of several processes but the first."""


def progress_bar(iterable: Any = None, **options: Any) -> tqdm:
    """A bar on standard error if that is a terminal. Workers side by side each have a line of their own (HM_BAR)."""
    line = int(os.environ.get("HM_BAR", "0"))
    return tqdm(iterable, position=line, leave=False, dynamic_ncols=True, mininterval=1.0, disable=silent or None, **options)


def say(text: str) -> None:
    """A line on standard error that does not run into a bar."""
    if not silent:
        tqdm.write(text, file=sys.stderr)


def quiet() -> None:
    """Only our own progress bars: not those of Transformers for each file that it reads."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
