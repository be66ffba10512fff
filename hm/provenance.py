"""Where a number comes from: code, packages, machine and command."""

import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "hydra-core", "safetensors", "tokenizers",
             "numpy", "mamba-ssm", "causal-conv1d", "triton", "gguf", "lm-eval", "submitit")


def provenance() -> dict[str, Any]:
    """What a record keeps about its making (JSON). No network, nothing heavy is imported.

    `device` is the GPU's name once CUDA is in use by this process, else the processor's. `git_commit` and
    `git_dirty` (tracked files changed) are None where hm isn't run from a git checkout of its own.
    """
    commit, dirty = _git(Path(__file__).parent)
    return {"git_commit": commit, "git_dirty": dirty, "packages": _versions(), "host": socket.gethostname(),
            "platform": platform.platform(), "cpus": os.cpu_count(), "device": _device(),
            "command": command_line(),
            "started": datetime.now(UTC).isoformat(timespec="seconds")}


def command_line() -> str:
    """The command line as one would type it in the checkout: `python sweep.py ...` or `python -m hm.pretrain ...`.

    In a job that a sweep started it is the sweep's, which stands in HM_COMMAND.
    """
    if given := os.environ.get("HM_COMMAND"):
        return given
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    if main is not None and main.name != "__main__":
        program = ["-m", main.name.removesuffix(".__main__")]
    else:
        path, root = Path(sys.argv[0]), Path(__file__).parent.parent
        program = [str(path.resolve().relative_to(root)) if path.resolve().is_relative_to(root) else path.name]
    return shlex.join(["python", *program, *sys.argv[1:]])


def _git(folder: Path) -> tuple[str | None, bool | None]:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], check=True, text=True, timeout=10,
                              capture_output=True, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"}).stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # fails where hm lies in someone else's checkout
        lines = git("status", "--porcelain=v2", "--branch", "--untracked-files=no").splitlines()
    except (OSError, subprocess.SubprocessError):
        return None, None
    commit = next(line.split()[2] for line in lines if line.startswith("# branch.oid"))
    return commit, any(not line.startswith("#") for line in lines)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _device() -> str:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
