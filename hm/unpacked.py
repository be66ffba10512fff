"""A GGUF file unpacked once: config, tokenizer and dense weights as the files that are read in a moment.

Transformers parses a GGUF file in Python, for SmolLM2-135M 20 s for config, tokenizer and weights together on a slow
core, in every process anew. With HM_CACHE set (`sweep.py` and its jobs set it) each part is kept there when it is
first needed, below a name that the file's content and Transformers' version determine.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import transformers


def unpacked(content: str, part: str, make: Callable[[Path], object]) -> Path | None:
    """The folder that holds `part` of the file with this hash of its content; None without HM_CACHE.

    Args:
        part: config, tokenizer or model, each in a folder of its own, which is complete once it is there.
        make: writes the part's files into an empty folder; called where they are missing.
    """
    cache = os.environ.get("HM_CACHE")
    if not cache:
        return None
    folder = Path(cache).expanduser() / "teachers" / f"{content[:32]}-{transformers.__version__}"
    place = folder / part
    if not place.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder, prefix=f".{part}-"))
        try:
            make(work)
            work.rename(place)
        except OSError:
            if not place.is_dir():  # nobody else was faster: a full disk, no right to write
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return place
