"""One kind of progress bar for everything that takes time: rate, time left, and gone when it is done."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

silent = False
"""In all of several processes but the first."""


def progress_bar(iterable: Any = None, **options: Any) -> tqdm:
    """A bar on standard error if that is a terminal, else a line that says what begins. Workers side by side each have a
    line of their own (HM_BAR)."""
    from tqdm import tqdm

    if options.get("desc") and not sys.stderr.isatty():
        say(f"{options['desc']} ...")
    line = int(os.environ.get("HM_BAR", "0"))
    return tqdm(iterable, position=line, leave=False, dynamic_ncols=True, mininterval=1.0, disable=silent or None, **options)


def say(text: str) -> None:
    """A line on standard error that does not run into a bar."""
    from tqdm import tqdm

    if not silent:
        tqdm.write(text, file=sys.stderr)


def quiet() -> None:
    """Only our own progress bars: not those of Transformers for each file that it reads, and where standard error is no
    terminal none at all. To be called first: tqdm reads its switch when it is imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars that their libraries have no switch for: GGUF, lm-eval's items
    import transformers

    transformers.utils.logging.disable_progress_bar()
