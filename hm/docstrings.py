"""The embedded corpus: the English docstrings of the installed packages, read as source and never imported.

Every installation of this project has PyTorch, Transformers, NumPy, pandas, Matplotlib and what they depend
on, and with them some 25 MB of real technical English. A *document* here is one module: its docstrings in
source order, each under a line with its qualified name. Docstrings that repeat an earlier one are dropped;
validation packages are read first, so no training docstring equals a validation one.

Parsing is what takes the time, so the files are dealt out to one process per core. These processes run this
file as a script, which is why it imports nothing but the standard library: no fork of a process with threads,
and no second import of PyTorch.
"""

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

STDLIB = "python"
PACKAGES = (
    "torch", "transformers", "numpy", "pandas", "sympy", "networkx", "matplotlib", "mpl_toolkits", STDLIB,
    "huggingface_hub", "tokenizers", "safetensors", "fontTools", "PIL", "pyarrow", "packaging", "click",
    "anyio", "filelock", "dateutil", "dill", "multiprocess", "psutil", "requests", "urllib3", "tqdm", "hydra",
    "omegaconf", "zstandard", "contourpy", "cycler", "regex", "yaml", "xxhash", "torchgen", "functorch",
)  # fmt: skip
VALIDATION_PACKAGES = ("accelerate", "datasets", "fsspec", "jinja2", "mpmath", "pyparsing")

MIN_CHARACTERS = 80
MIN_BYTES = {"train": 1_000_000, "validation": 100_000}
RULES_VERSION = 1  # to be raised when a rule below changes what the corpus holds

_DISTRIBUTIONS = {
    "PIL": "pillow", "dateutil": "python-dateutil", "fontTools": "fonttools", "functorch": "torch",
    "hydra": "hydra-core", "mpl_toolkits": "matplotlib", "torchgen": "torch", "yaml": "pyyaml",
}  # fmt: skip
_SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "dist-packages", "idlelib", "lib2to3"}
_COMMON_WORDS = {"the", "of", "to", "a", "is", "and", "in", "for", "this", "that", "be", "with", "if", "are"}
_Docstrings = list[tuple[str, str]]  # (qualified name below the module, docstring)


def documents(split: Literal["train", "validation"]) -> Iterator[str]:
    """The corpus as one string per module, in a fixed order.

    Raises UserError where so few packages are installed (or only without their sources) that the split holds
    less than MIN_BYTES.
    """
    from hm.errors import UserError

    files = [("validation", *file) for file in _source_files(VALIDATION_PACKAGES)]
    if split == "train":
        files += [("train", *file) for file in _source_files(PACKAGES)]
    seen: set[bytes] = set()
    num_bytes = 0
    parsed = _parse_in_processes([path for _, _, path in files])
    for (file_split, module, _), docstrings in zip(files, parsed, strict=True):
        parts = []
        for name, docstring in docstrings:
            digest = hashlib.blake2b(docstring.encode(), digest_size=12).digest()
            if digest not in seen:
                seen.add(digest)
                parts.append(f"{module}.{name}\n{docstring}" if name else f"{module}\n{docstring}")
        if parts and file_split == split:
            document = "\n\n".join(parts)
            num_bytes += len(document.encode())
            yield document
    if num_bytes < MIN_BYTES[split]:
        raise UserError(
            f"data=docstrings found only {num_bytes:,} bytes of {split} docstrings in the installed packages "
            f"(at least {MIN_BYTES[split]:,} are needed); name a text file or folder with data=PATH instead"
        )


def fingerprint() -> dict[str, str]:
    """What determines the corpus: the rules' version and that of each package it is read from."""
    versions = {"rules": str(RULES_VERSION)}
    for package in sorted(PACKAGES + VALIDATION_PACKAGES):
        if package == STDLIB:
            versions[package] = ".".join(map(str, sys.version_info[:3]))
        elif _folders(package):
            try:
                versions[package] = importlib.metadata.version(_DISTRIBUTIONS.get(package, package))
            except importlib.metadata.PackageNotFoundError:
                versions[package] = "unknown"
    return versions


def _folders(package: str) -> list[Path]:
    if package == STDLIB:
        return [Path(sysconfig.get_path("stdlib"))]
    spec = importlib.util.find_spec(package)  # of a top-level name: looks for it, imports nothing
    return [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []


def _source_files(packages: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(module name, path) of every source file outside test folders; files in sorted order."""
    for package in packages:
        for folder in _folders(package):
            found = []
            for parent, folders, names in os.walk(folder):
                folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS and f.isidentifier()]
                found += [Path(parent, name) for name in names if name.endswith(".py")]
            for path in sorted(found):
                parts = path.relative_to(folder).with_suffix("").parts
                names_ = [*([] if package == STDLIB else [package]), *parts]
                yield ".".join(names_[:-1] if names_[-1] == "__init__" else names_), str(path)


def _parse_in_processes(paths: list[str]) -> Iterator[_Docstrings]:
    """docstrings_of_file for each path, in order, by one process per core; the pipes bound the memory."""
    count = max(1, min(len(os.sched_getaffinity(0)), 16, len(paths) // 50))
    workers = [
        subprocess.Popen([sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(count)
    ]
    try:
        for i, worker in enumerate(workers):
            assert worker.stdin is not None
            worker.stdin.write(json.dumps(paths[i::count]).encode())
            worker.stdin.close()
        for i, path in enumerate(paths):
            stdout = workers[i % count].stdout
            assert stdout is not None
            line = stdout.readline()
            if not line:
                raise RuntimeError(f"the process that reads docstrings ended at {path}")
            yield json.loads(line)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()


def docstrings_of_file(path: str) -> _Docstrings:
    """The usable docstrings of one source file, in source order; none where Python can't parse it."""
    try:
        source = Path(path).read_text(encoding="utf-8")
        if '"""' not in source and "'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return []
    return [(name, text) for name, text in _walk(tree, "") if is_english(text)]


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if docstring := ast.get_docstring(node):
            yield name, docstring.strip()
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield from _attached_docstring(node.value)
    for field in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, field, ()):
            if isinstance(child, ast.stmt | ast.ExceptHandler):
                own = getattr(child, "name", None) if not isinstance(child, ast.ExceptHandler) else None
                yield from _walk(child, f"{name}.{own}".lstrip(".") if own else name)


def _attached_docstring(call: ast.Call) -> Iterator[tuple[str, str]]:
    """PyTorch and NumPy give their compiled functions docstrings by add_docstr(f, ...), add_newdoc(...)."""
    function = getattr(call.func, "id", None) or getattr(call.func, "attr", None)
    if function not in ("add_docstr", "add_newdoc") or len(call.args) < 2:
        return
    names = [a.value for a in call.args[:-1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    name = ".".join(names) or ast.unparse(call.args[0])
    strings = [n.value for n in ast.walk(call.args[-1]) if isinstance(n, ast.Constant)]
    text = max((s for s in strings if isinstance(s, str)), key=len, default="")
    yield name, inspect.cleandoc(text).strip()


def is_english(text: str) -> bool:
    """Long enough, mostly letters, mostly ASCII, and with several of English's commonest words."""
    if len(text) < MIN_CHARACTERS:
        return False
    visible = "".join(text.split())
    letters = sum(map(str.isalpha, visible))
    ascii_ = len(visible.encode("ascii", "ignore"))
    common = len(_COMMON_WORDS.intersection(text.lower().split()))
    return letters > 0.6 * len(visible) and ascii_ > 0.95 * len(visible) and common >= 2


if __name__ == "__main__":
    gc.disable()  # syntax trees have no cycles; looking for some takes a tenth of the time
    for source_path in json.loads(sys.stdin.read()):
        print(json.dumps(docstrings_of_file(source_path)))
