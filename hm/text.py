"""Text -> documents: the first level of hm.data.

`documents(spec, split)` reads the source lazily: one string per document. Which split a document belongs to
depends on its text alone (or on which file it came from), so the splits never share a document and a longer
corpus does not move documents from one to the other.
"""

import glob
import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from hm import docstrings
from hm.errors import UserError
from hm.files import file_sha256

TEXT_DOCUMENT_CHARACTERS = 100_000  # a longer stretch of a .txt file is cut at the next line end
_COMPRESSION = (".xz", ".zst", ".gz")
_FORMATS = (".txt", ".jsonl", ".json")


@dataclass(frozen=True)
class DataSpec:
    """Where the text comes from.

    source: "docstrings"; a file, folder or glob of .txt, .jsonl or .json, each perhaps with .xz, .zst or .gz;
        or "hf:NAME[:CONFIG][@REVISION]" for a dataset of the `datasets` library (its split "train",
        streamed; name a revision if the dataset may change). Several are joined by " + ".
    validation: the same, all of it for validation. None: the held-out packages for "docstrings", and for all
        else the documents whose text hashes into the lowest `validation_fraction`.
    text_key: the column or JSON key that holds the text.
    max_documents: read no more than this many documents of `source` (held-out packages don't count).
    """

    source: str
    validation: str | None = None
    text_key: str = "text"
    max_documents: int | None = None
    validation_fraction: float = 0.005


def spec_fingerprint(spec: DataSpec) -> dict[str, Any]:
    """What determines the text: files' contents, packages' versions, hub datasets' names and revisions."""
    result: dict[str, Any] = {
        "source": [_part_fingerprint(part) for part in _parts(spec.source)],
        "max_documents": spec.max_documents,
    }
    if spec.validation is not None:
        result["validation"] = [_part_fingerprint(part) for part in _parts(spec.validation)]
    elif spec.source != "docstrings":
        result["validation_fraction"] = spec.validation_fraction
    if {*_parts(spec.source), *_parts(spec.validation or "docstrings")} != {"docstrings"}:
        result["text_key"] = spec.text_key
    return result


def documents(spec: DataSpec, split: str) -> Iterator[str]:
    """The documents of one split ("train" or "validation") in the source's order.

    Raises UserError for a source that isn't there, is empty, is no text or lacks the key.
    """
    labelled = labelled_documents(spec, validation_only=split == "validation")
    return (text for document_split, text in labelled if document_split == split)


def labelled_documents(spec: DataSpec, validation_only: bool = False) -> Iterator[tuple[str, str]]:
    """(split, text) of every document, in one pass; `validation_only` may leave out the rest."""
    sources = _parts(spec.source)
    own = _parts(spec.validation) if spec.validation else [part for part in sources if part == "docstrings"]
    split_by_hash = [part for part in sources if part != "docstrings"] if spec.validation is None else []
    held_out: set[bytes] = set()
    for part in own:
        for text in _read(part, spec.text_key, "validation"):
            held_out.add(_digest(text))
            yield "validation", text
    if validation_only and not split_by_hash:
        return
    texts = ((part, text) for part in sources for text in _read(part, spec.text_key, "train"))
    for part, text in islice(texts, spec.max_documents):
        digest = _digest(text)
        if part in split_by_hash and int.from_bytes(digest[:8], "little") < spec.validation_fraction * 2**64:
            yield "validation", text
        elif digest not in held_out:
            yield "train", text


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


# --- sources


def _parts(source: str) -> list[str]:
    return [part.strip() for part in source.split(" + ")]


def _part_fingerprint(part: str) -> dict[str, Any]:
    if part == "docstrings":
        return {"docstrings": docstrings.fingerprint()}
    if part.startswith("hf:"):
        return {"hf": part.removeprefix("hf:")}
    return {"files": [_file_digest(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in source_files(part)]}


@cache
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    return file_sha256(path)


def _read(part: str, text_key: str, split: str) -> Iterator[str]:
    """The documents of one source, with what UTF-8 can't hold (lone surrogates) replaced; none is blank."""
    if part == "docstrings":
        texts = docstrings.documents("train" if split == "train" else "validation")
    elif part.startswith("hf:"):
        texts = _read_hub(part, text_key)
    else:
        texts = (text for path in source_files(part) for text in _read_file(path, text_key))
    for text in texts:
        if text and not text.isspace():
            yield text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def source_files(part: str) -> list[Path]:
    """The files that a path, folder or glob names, in sorted order."""
    path = Path(part).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [f for f in path.rglob("*") if f.is_file() and _text_format(f)]
    else:
        found = [Path(f) for f in glob.glob(str(path), recursive=True) if Path(f).is_file()]
    if not found:
        raise UserError(
            f"data={part} names no text: give 'docstrings', 'hf:NAME', or a file, folder or glob of "
            f"{', '.join(_FORMATS)} (plain or with {', '.join(_COMPRESSION)})"
        )
    return sorted(found)


def _text_format(path: Path) -> str | None:
    """The suffix below a compression's: one of _FORMATS, or None for another kind of file."""
    suffixes = path.suffixes[:-1] if path.suffix in _COMPRESSION else path.suffixes
    return suffixes[-1] if suffixes and suffixes[-1] in _FORMATS else None


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """The file as text, decompressed; what is wrong with it comes out as a UserError that names it."""
    options: dict[str, Any] = {"mode": "rt", "encoding": "utf-8-sig"}
    broken: tuple[type[Exception], ...] = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error)
    openers: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
    opener = openers.get(path.suffix, open)
    if path.suffix == ".zst":
        import zstandard

        opener, broken = zstandard.open, (*broken, zstandard.ZstdError)
    try:
        with opener(path, **options) as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8 or leave it out of data="
        ) from error
    except broken as error:
        raise UserError(f"{path} is damaged or not {path.suffix} ({error}); fetch it again") from error
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}); check data= and its permissions"
        ) from error


def _read_file(path: Path, text_key: str) -> Iterator[str]:
    empty = True
    with open_text(path) as file:
        reader = _read_json if _text_format(path) in (".jsonl", ".json") else _read_text
        for text in reader(file, path, text_key):
            empty = empty and (not text or text.isspace())
            yield text
    if empty:
        raise UserError(f"{path} holds no text; put text into it or leave it out of data=")


def _read_text(file: IO[str], path: Path, text_key: str) -> Iterator[str]:
    """Documents of a plain text file: parted by two or more blank lines, or at TEXT_DOCUMENT_CHARACTERS."""
    lines: list[str] = []
    length = blank = 0
    for line in iter(partial(file.readline, TEXT_DOCUMENT_CHARACTERS), ""):
        if "\0" in line:
            raise UserError(
                f"{path} is a binary file (it has NUL bytes); give text, or leave it out of data="
            )
        if lines and ((blank >= 2 and not line.isspace()) or length >= TEXT_DOCUMENT_CHARACTERS):
            yield "".join(lines).strip()
            lines, length = [], 0
        blank = blank + 1 if line.isspace() else 0
        lines.append(line)
        length += len(line)
    yield "".join(lines).strip()


def _read_json(file: IO[str], path: Path, text_key: str) -> Iterator[str]:
    """Documents of a file of JSON lines; a .json file may also be one array."""
    start = file.read(1) if _text_format(path) == ".json" else ""
    if start == "[":
        yield from _json_texts(start + file.read(), 1, path, text_key)
        return
    for number, line in enumerate(file, 1):
        line, start = start + line, ""
        if not line.isspace():
            yield from _json_texts(line, number, path, text_key)


def _json_texts(line: str, number: int, path: Path, text_key: str) -> Iterator[str]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}:{number} is not JSON ({error}); mend that line or drop it") from error
    for record in value if isinstance(value, list) else [value]:
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(f"{path}:{number} has no text under {text_key!r} (it has {keys}); set text_key=")
        yield text


def _read_hub(part: str, text_key: str) -> Iterator[str]:
    """A dataset of the `datasets` library, streamed; its code is never executed."""
    import datasets

    name, _, revision = part.removeprefix("hf:").partition("@")
    name, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(
            name, config or None, split="train", streaming=True, revision=revision or None
        )
        for row in rows:
            if not isinstance(row.get(text_key), str):
                raise UserError(
                    f"data={part} has no text column {text_key!r} (it has {sorted(row)}); set text_key="
                )
            yield row[text_key]
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"data={part} can't be loaded ({error}); check the name and the connection"
        ) from error
