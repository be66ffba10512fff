"""The state of a training run on disk: safetensors beside JSON, checked by sha256; nothing is ever unpickled.

    <folder>/step-000123/tensors.safetensors     weights, optimiser state, random states
    <folder>/step-000123/checkpoint.json         format, step, key, state, tied names, the other's sha256
"""

import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hm.errors import UserError
from hm.files import atomic_write, disk_errors, file_sha256, fsync_dir, to_json, weight_errors

FORMAT = 1


@dataclass
class Checkpoint:
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class _Damaged(Exception):
    pass


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any],
                    key: str, keep: int = 2) -> Path:
    """Saves `tensors` (any device, tied ones once) and `state` (JSON) as `folder`/step-NNNNNN, whole or not.

    The newest `keep` checkpoints up to `step` stay, and none beyond it: those are what loading had to skip.
    Raises UserError when the disk is full or read-only, TypeError or ValueError for a state that isn't JSON,
    FileNotFoundError if `folder`'s parent is gone: the store moves a work folder when another takes it over.
    """
    folder = Path(folder)
    final = folder / f"step-{step:06d}"
    temp = folder / f".{final.name}.{uuid.uuid4().hex}.tmp"
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        temp.mkdir()
        try:
            path = temp / "tensors.safetensors"
            unique, tied = _untie(tensors)
            _save_synced(unique, path)
            about = {"format": FORMAT, "step": step, "key": key, "state": state, "tied": tied,
                     "size": path.stat().st_size, "sha256": file_sha256(path)}
            atomic_write(temp / "checkpoint.json", to_json(about, indent=1))
            if final.exists():
                os.rename(final, folder / f".{final.name}.{uuid.uuid4().hex}.tmp")
            os.rename(temp, final)
            fsync_dir(folder)
        finally:
            for left in folder.glob(".step-*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
        steps = _steps(folder)
        kept = [n for n in steps if n <= step][-max(keep, 1):]
        for n in set(steps) - set(kept):
            shutil.rmtree(steps[n])
    return final


def load_checkpoint(folder: Path, key: str, device: torch.device | str = "cpu") -> Checkpoint | None:
    """The newest undamaged checkpoint in `folder`, or None. Damaged ones are named in a warning and skipped.

    Raises UserError for a checkpoint whose `key` differs: it was made with other settings.
    """
    steps = _steps(Path(folder))
    for step in reversed(steps):
        try:
            return _load(steps[step], key, device)
        except _Damaged as damage:
            warnings.warn(f"checkpoint {steps[step]} is damaged ({damage}) and is skipped", stacklevel=2)
    return None


def _load(folder: Path, key: str, device: torch.device | str) -> Checkpoint:
    path = folder / "tensors.safetensors"
    try:
        about = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        found_key, wanted = (about["format"], about["key"]), (about["size"], about["sha256"])
        step, state, tied = about["step"], about["state"], about["tied"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"checkpoint.json: {error!r}") from error
    if found_key != (FORMAT, key):
        raise UserError(f"checkpoint {folder} was made with other settings (key {found_key[1]}, format "
                        f"{found_key[0]}; now {key}, {FORMAT}): go back to those, or delete "
                        f"{folder.parent} to start anew")
    try:
        found = (path.stat().st_size, file_sha256(path))
    except OSError as error:
        raise _Damaged(f"tensors.safetensors: {error}") from error
    if found != wanted:
        raise _Damaged(f"tensors.safetensors: {found[0]} bytes with sha256 {found[1]}, "
                       f"expected {wanted[0]} with {wanted[1]}")
    tensors = load_file(path, device=str(device))
    tensors.update({name: tensors[first] for name, first in tied.items()})
    return Checkpoint(step, tensors, state)


def _steps(folder: Path) -> dict[int, Path]:
    found = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def _untie(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors on the CPU that share no memory, {name: name of the tensor that it is tied to})."""
    unique: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[tuple, str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in names:
            tied[name] = names[place]
            continue
        names[place] = name
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        is_view = storage.data_ptr() in storages or storage.nbytes() != plain.numel() * plain.element_size()
        unique[name] = plain.clone() if is_view else plain
        storages.add(storage.data_ptr())
    return unique, tied


def _save_synced(tensors: dict[str, Tensor], path: Path) -> None:
    with weight_errors():
        save_file(tensors, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping) -> dict[str, Tensor]:
    """The optimiser's state as {"<parameter name>.<exp_avg, exp_avg_sq, step>": tensor}.

    `names` maps parameters to names, or names to parameters as `dict(model.named_parameters())` does.
    """
    by_parameter = _by_parameter(names)
    return {f"{by_parameter[parameter]}.{slot}": value
            for parameter, slots in optimizer.state.items() for slot, value in slots.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], names: Mapping) -> None:
    """Gives `optimizer` the state that `optimizer_tensors` took, by name; its groups and rates stay.

    Raises UserError if the state is of parameters that this optimiser doesn't have, or of other shapes.
    """
    by_parameter, slots = _by_parameter(names), dict[str, dict[str, Tensor]]()
    for full_name, value in tensors.items():
        name, _, slot = full_name.rpartition(".")
        slots.setdefault(name, {})[slot] = value
    state, packed = {}, optimizer.state_dict()
    for group, indexed in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        for parameter, index in zip(group["params"], indexed["params"], strict=True):
            if (found := slots.pop(by_parameter[parameter], None)) is None:
                continue
            for slot, value in found.items():
                if value.dim() and value.shape != parameter.shape:
                    raise UserError(f"optimiser state {by_parameter[parameter]}.{slot} has shape "
                                    f"{tuple(value.shape)} and its parameter {tuple(parameter.shape)}: "
                                    "delete the checkpoint")
            state[index] = found
    if slots:
        raise UserError(f"the checkpoint has optimiser state for {', '.join(sorted(slots))}, which this run "
                        "doesn't train: go back to the settings it was made with, or delete the checkpoint")
    optimizer.load_state_dict({"state": state, "param_groups": packed["param_groups"]})


def _by_parameter(names: Mapping) -> dict[Tensor, str]:
    return {(b if isinstance(a, str) else a): (a if isinstance(a, str) else b) for a, b in names.items()}
