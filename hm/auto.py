"""Makes students known to Transformers' Auto classes once `hm` is imported, without importing PyTorch for that.

Transformers has no way to register a class that isn't loaded yet. So where its Auto classes for models are already
there, hm.modeling is imported now; else right after they are.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.modeling_auto"


class _Watch(MetaPathFinder):
    """Finds nothing itself: it lets others find AUTO, and has hm.modeling imported after it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            _then_import(loader, "hm.modeling")
        return spec


def _then_import(loader: Loader, module_name: str) -> None:
    load = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        load(module)
        importlib.import_module(module_name)

    loader.exec_module = exec_module  # type: ignore[method-assign]


def register() -> None:
    if AUTO in sys.modules:
        importlib.import_module("hm.modeling")
    else:
        sys.meta_path.insert(0, _Watch())
