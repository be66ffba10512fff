"""What can be seen to be wrong with a cell on the machine where the command is typed, before any work begins.

`Settings.resolve` checks what the settings alone say; here they meet the teacher's config, the machine and the disk.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from hm.adapters import adapter_for, max_seq_len
from hm.config import Settings
from hm.convert import kept_layers
from hm.errors import UserError
from hm.generation import PROMPT
from hm.inputs import Inputs
from hm.mixer import MixerSpec, build_mixer
from hm.ops import resolve_scan
from hm.tasks import check_data


def check(settings: Settings, device: torch.device | None = None, inputs: Inputs | None = None) -> Settings:
    """The settings, resolved; everything that can be seen to be wrong before work begins is refused here.

    device: what the cell will run on, where that is another machine; its scan is then checked over there.

    Raises:
        UserError: one sentence that names the setting, the value and the remedy.
    """
    s = settings.resolve()
    inputs = inputs or Inputs()
    config = inputs.config(s.teacher)
    longest = max_seq_len(config)
    if s.seq_len > longest:
        raise UserError(f"seq_len={s.seq_len} is longer than the teacher {s.teacher} was made for; lower it to {longest} or less.")
    if s.eval.stride and s.eval.stride > s.seq_len:
        raise UserError(f"eval.stride={s.eval.stride} is longer than a sequence; lower it to seq_len={s.seq_len} or less.")
    if s.eval.generation and s.seq_len < PROMPT:
        raise UserError(f"seq_len={s.seq_len} leaves eval.generation=true nothing to continue beyond its prompt of {PROMPT} tokens; raise it to {PROMPT} or more, or leave eval.generation out.")
    if len(kept_layers(s.keep_attention, config.num_hidden_layers)) == config.num_hidden_layers:
        raise UserError(f"keep_attention={s.keep_attention} keeps all {config.num_hidden_layers} layers, so nothing is converted; keep fewer.")
    shape = adapter_for(config).shape(config)
    spec = MixerSpec.of(s, shape)
    if s.recipe in ("two_stage", "one_step") and repr(spec) not in inputs.built:
        with torch.device("meta"):
            build_mixer(spec, 0)  # a mixer may refuse what it can't do
        inputs.built.add(repr(spec))
    if device is None:
        resolve_scan(s.scan, pick_device(s.device), 2 * shape.head_dim, s.decay)
    if s.tracker == "wandb" and find_spec("wandb") is None:
        raise UserError("tracker=wandb, but the package wandb is not installed; run `pip install wandb`, or leave tracker out.")
    data_exists(s)
    check_data(s.eval)
    return s


def data_exists(s: Settings) -> None:
    """Refuse a `data` or `validation` that names no text, without reading it."""
    for name, value in (("data", s.data), ("validation", s.validation)):
        if value is None:
            continue
        for part in (p.strip() for p in value.split(" + ")):
            built_in = part == "docstrings" or part.startswith("hf:")
            if not built_in and not any(c in part for c in "*?[") and not Path(part).expanduser().exists():
                raise UserError(f"{name}={part} is no file or folder here; give a path, hf:<name> or docstrings.")


def pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but this machine shows PyTorch no GPU; use device=cpu or device=auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
