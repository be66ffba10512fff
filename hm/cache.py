"""Where what takes long to find out is kept between processes, so that the second of a shape starts at once: kernels of
Triton and torch.compile, and unpacked teachers (hm/unpacked.py)."""

from __future__ import annotations

import os
from pathlib import Path


def use_cache(store: Path | str) -> None:
    """Keep kernels and unpacked teachers below HM_CACHE, by default `store`/cache; what is set already stays.

    To be called before Triton or torch.compile are used.
    """
    folder = Path(os.environ.get("HM_CACHE") or Path(store) / "cache").expanduser().absolute()
    os.environ["HM_CACHE"] = str(folder)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
