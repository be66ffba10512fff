"""Makes students known to Transformers' Auto classes once `hm` is imported, without importing PyTorch for that.

Transformers has no way to register a class that isn't loaded yet. So where its modules of Auto classes are already
there, ours are imported now; else each right after the one that it registers with.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AFTER = {
    "transformers.models.auto.configuration_auto": "hm.student_config",
    "transformers.models.auto.modeling_auto": "hm.modeling",
}
"""What is imported after which module of Transformers."""


class _Watch(MetaPathFinder):
    """Finds nothing itself: it lets others find a module of AFTER, and has ours imported after it."""

    def __init__(self, auto: str) -> None:
        self.auto = auto

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.auto:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            _then_import(loader, AFTER[name])
        return spec


def _then_import(loader: Loader, module_name: str) -> None:
    load = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        load(module)
        importlib.import_module(module_name)

    loader.exec_module = exec_module  # type: ignore[method-assign]


def register() -> None:
    for auto, ours in AFTER.items():
        if auto in sys.modules:
            importlib.import_module(ours)
        else:
            sys.meta_path.insert(0, _Watch(auto))
