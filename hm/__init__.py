"""Convert pretrained Transformers into Mamba models, in two stages.

    import hm
    teacher = hm.load_teacher("EleutherAI/pythia-1b")
    student = hm.convert(teacher, mixer="hedgemamba")
    student.save_pretrained("out"); hm.load_student("out")

Names are loaded when they are first used, so that reading records needs no PyTorch. Transformers' Auto classes know
students once `hm` is imported (see hm.auto).
"""

import importlib
import sys
from types import ModuleType
from typing import Any

from hm import auto

__version__ = "0.1.0"

_WHERE = {
    "UserError": "hm.errors",
    "StudentConfig": "hm.student_config",
    "StudentForCausalLM": "hm.modeling",
    "convert": "hm.convert",
    "linear_recurrence": "hm.ops",
    "load_student": "hm.modeling",
    "load_teacher": "hm.teacher",
    "load_tokenizer": "hm.teacher",
    "perplexity": "hm.evaluate",
    "report": "hm.convert",
}
__all__ = ["UserError", *sorted(set(_WHERE) - {"UserError"})]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'hm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Importing the module hm.convert does not put it in the place of the function hm.convert."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
auto.register()
