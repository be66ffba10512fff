"""Text -> documents -> token shards -> blocks -> batches.

Each level is an iterator or an array over the one before, and each can be had by itself:

    documents    `documents(spec, split)` reads the source lazily: one string per document. Which split a
                 document belongs to depends on its text alone (or on which file it came from), so the splits
                 never share a document and a longer corpus does not move documents from one to the other.
    shards       `tokenize(...)` encodes the documents once, in order, each followed by the end-of-text token,
                 into files of 16- or 32-bit little-endian integers. A shard ends with a document, exists
                 complete or not at all, and says in a small JSON beside it how many documents it holds: that
                 is all a restart needs. `index.json`, written last, means that the folder is complete.
    tokens       `TokenDataset` sees a split's shards as one long memory-mapped stream; where one shard ends
                 and the next begins can't be told from outside.
    blocks       Block i of length L is tokens i*L .. i*L + L *inclusive*: L inputs and, shifted by one, L
                 labels. The last label of a block is the first input of the next, so every token but the
                 first is predicted exactly once. Documents are packed: a block may hold the end of one and
                 the beginning of another.
    batches      `Batches` goes through the blocks in a random order, epoch after epoch, each with a
                 permutation of its own drawn from (seed, epoch). Nothing is carried from one batch to the
                 next: `batch(step)` is a function of the step, so a run that resumes at step 1,000 sees what
                 it would have seen, and there is no iterator state to save.

Validation has no randomness at all: `validation_batches` takes evenly spaced blocks.
"""

import glob
import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EACCES, EDQUOT, EEXIST, ENOSPC, ENOTDIR, EPERM, EROFS
from functools import cache, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from hm import docstrings
from hm.errors import UserError

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
TEXT_DOCUMENT_CHARACTERS = 100_000  # a longer stretch of a .txt file is cut at the next line end
PIECE_CHARACTERS = 1_000_000  # a longer document is encoded in pieces, cut at a space
BATCH_CHARACTERS = 2_000_000  # what is encoded at a time
SHARD_TOKENS = 1 << 26
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
    labelled = _labelled(spec, validation_only=split == "validation")
    return (text for document_split, text in labelled if document_split == split)


def _labelled(spec: DataSpec, validation_only: bool = False) -> Iterator[tuple[str, str]]:
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
    return {"files": [_file_digest(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in _files(part)]}


@cache
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(part: str, text_key: str, split: str) -> Iterator[str]:
    """The documents of one source, with what UTF-8 can't hold (lone surrogates) replaced; none is blank."""
    if part == "docstrings":
        texts = docstrings.documents("train" if split == "train" else "validation")
    elif part.startswith("hf:"):
        texts = _read_hub(part, text_key)
    else:
        texts = (text for path in _files(part) for text in _read_file(path, text_key))
    for text in texts:
        if text and not text.isspace():
            yield text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _files(part: str) -> list[Path]:
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
def _open(path: Path) -> Iterator[IO[str]]:
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
    with _open(path) as file:
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


# --- tokenising


def tokenize(
    spec: DataSpec,
    tokenizer: Any,
    out_dir: Path,
    *,
    vocab_size: int,
    workers: int | None = None,
    shard_documents: int = 20_000,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Encode both splits of `spec` into token shards and an index in `out_dir`, with all cores.

    A call that was interrupted goes on after the last complete shard; a finished folder is left as it is.
    Memory does not grow with the corpus.

    tokenizer: a fast tokenizer of Transformers. vocab_size: rows of the teacher's embedding; a tokenizer with
        ids beyond it is refused. workers: threads that encode (None: as many as cores).
    shard_documents: documents in a shard (fewer where they are long).
    progress: called with (tokens, bytes of text) in the shards so far, whenever that grows.

    Raises UserError for unusable text, tokenizer or output folder, and where a split stays empty.
    """
    encoder, eos_id = _encoder(tokenizer, vocab_size)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    content = [FORMAT_VERSION, spec_fingerprint(spec), vocab_size, eos_id, encoder.to_str()]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    out_dir = Path(out_dir)
    with _writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        if _read_index(out_dir).get("key") == key:
            return
        (out_dir / "index.json").unlink(missing_ok=True)
        writers = {split: _ShardWriter(out_dir, split, dtype, shard_documents, key) for split in SPLITS}

    def encode(batch: list[tuple[str, str]]) -> list[tuple[str, int, np.ndarray]]:
        pieces = [list(_pieces(text)) for _, text in batch]
        encoded = iter(encoder.encode_batch_fast([p for ps in pieces for p in ps], add_special_tokens=False))
        result = []
        for (split, text), ps in zip(batch, pieces, strict=True):
            ids = [i for encoding in islice(encoded, len(ps)) for i in encoding.ids]
            result.append((split, len(text.encode()), np.array([*ids, eos_id], dtype=dtype)))
        return result

    def write(encoded: list[tuple[str, int, np.ndarray]]) -> None:
        with _writing(out_dir):
            for split, text_bytes, tokens in encoded:
                writers[split].add(tokens, text_bytes)
        if progress is not None:
            progress(sum(w.tokens for w in writers.values()), sum(w.text_bytes for w in writers.values()))

    try:
        with _encoding_threads(workers), ThreadPoolExecutor(1) as pool:  # the next batch is read meanwhile
            pending = None
            for batch in _batched(_labelled(spec), writers):
                following = pool.submit(encode, batch)
                if pending is not None:
                    write(pending.result())
                pending = following
            if pending is not None:
                write(pending.result())
        with _writing(out_dir):
            for writer in writers.values():
                writer.finish_shard()
    finally:
        for writer in writers.values():
            writer.discard_open_shard()
    for split, writer in writers.items():
        if not writer.shards:
            total = sum(w.documents for w in writers.values())
            raise UserError(
                f"data={spec.source} gives {total:,} documents and none for {split}; use more text, name "
                f"validation text of its own (validation=), or raise validation_fraction="
            )
    index = {
        "format": FORMAT_VERSION, "key": key, "dtype": dtype.str, "eos_id": eos_id,
        "vocab_size": vocab_size, "splits": {split: writer.summary() for split, writer in writers.items()},
    }  # fmt: skip
    with _writing(out_dir):
        _write_json(out_dir / "index.json", index)


def _encoder(tokenizer: Any, vocab_size: int) -> tuple[Any, int]:
    """A copy of the tokenizer's Rust part that neither cuts nor pads nor reads special tokens in the text."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"the tokenizer {type(tokenizer).__name__} is not a fast one; use a teacher that has one"
        )
    if tokenizer.eos_token_id is None:
        raise UserError("the teacher's tokenizer has no end-of-text token (eos_token); set one in its folder")
    largest = max(*backend.get_vocab().values(), tokenizer.eos_token_id)
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {largest:,} and the teacher's embedding only {vocab_size:,} rows; "
            f"use the teacher's own tokenizer"
        )
    encoder = Tokenizer.from_str(backend.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder, tokenizer.eos_token_id


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        stop = text.rfind(" ", start + 1, start + PIECE_CHARACTERS)
        stop = stop if stop > 0 else start + PIECE_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


def _batched(labelled: Iterator[tuple[str, str]], writers: "dict[str, _ShardWriter]") -> Iterator[list]:
    """Batches of about BATCH_CHARACTERS of the documents that no complete shard holds yet."""
    batch, length = [], 0
    to_skip = {split: writer.documents for split, writer in writers.items()}
    for split, text in labelled:
        if to_skip[split]:
            to_skip[split] -= 1
            continue
        batch.append((split, text))
        length += len(text)
        if length >= BATCH_CHARACTERS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


@contextmanager
def _encoding_threads(workers: int | None) -> Iterator[None]:
    """The Rust side reads its number of threads from the environment, when it first encodes a batch."""
    settings = {"TOKENIZERS_PARALLELISM": "false" if workers == 1 else "true"}
    if workers is not None:
        settings["RAYON_NUM_THREADS"] = str(workers)
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


class _ShardWriter:
    """Appends documents to one split's shards.

    `documents`, `tokens` and `text_bytes` count all of the split, also what an interrupted call left.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_documents: int, key: str) -> None:
        self.folder, self.split, self.dtype, self.key = folder, split, dtype, key
        self.shard_documents = shard_documents
        self.shards: list[dict[str, Any]] = []
        while (shard := self._complete_shard(len(self.shards))) is not None:
            self.shards.append(shard)
        self.documents = sum(shard["documents"] for shard in self.shards)
        self.tokens = sum(shard["tokens"] for shard in self.shards)
        self.text_bytes = sum(shard["text_bytes"] for shard in self.shards)
        self._file: IO[bytes] | None = None

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{self.split}-{number:05d}{suffix}"

    def _complete_shard(self, number: int) -> dict[str, Any] | None:
        try:
            shard = json.loads(self._path(number, ".json").read_text())
            size = self._path(number, ".bin").stat().st_size
        except (FileNotFoundError, ValueError):
            return None
        return shard if shard.get("key") == self.key and shard["bytes"] == size else None

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        if self._file is None:
            self._file = open(self._path(len(self.shards), ".bin.tmp"), "wb")  # noqa: SIM115
            self._hash = hashlib.sha256()
            self._start = self.documents, self.tokens, self.text_bytes
        data = tokens.tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.documents, self.tokens = self.documents + 1, self.tokens + len(tokens)
        self.text_bytes += text_bytes
        documents_, tokens_, _ = self._start
        if self.documents - documents_ >= self.shard_documents or self.tokens - tokens_ >= SHARD_TOKENS:
            self.finish_shard()

    def finish_shard(self) -> None:
        if self._file is None:
            return
        path = self._path(len(self.shards), ".bin")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        os.replace(f"{path}.tmp", path)
        documents_, tokens, text_bytes = self._start
        shard = {
            "file": path.name, "key": self.key, "documents": self.documents - documents_,
            "tokens": self.tokens - tokens, "text_bytes": self.text_bytes - text_bytes,
            "bytes": path.stat().st_size, "sha256": self._hash.hexdigest(),
        }  # fmt: skip
        _write_json(path.with_suffix(".json"), shard)
        self.shards.append(shard)

    def discard_open_shard(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # what a full disk refused is refused again
                self._file.close()
            self._file = None
            self._path(len(self.shards), ".bin.tmp").unlink(missing_ok=True)

    def summary(self) -> dict[str, Any]:
        totals = {"tokens": self.tokens, "text_bytes": self.text_bytes, "documents": self.documents}
        return {**totals, "shards": [{k: v for k, v in shard.items() if k != "key"} for shard in self.shards]}


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT, EROFS, EACCES, EPERM, EEXIST, ENOTDIR):
            raise
        raise UserError(
            f"the token folder {folder} can't be written ({error.strerror}); free space or set "
            f"another folder with HM_RUNS, and run again: complete shards are kept"
        ) from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "index.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}


# --- reading the shards


class TokenDataset:
    """One split of a token folder as one memory-mapped stream of `len(dataset)` tokens.

    Raises UserError where the folder is not complete or a shard has not the size that the index says.
    """

    def __init__(self, path: Path | str, split: str) -> None:
        folder, self.split = Path(path), split
        index = _read_index(folder)
        remedy = "delete the folder and run again"
        if index.get("format") != FORMAT_VERSION:
            raise UserError(
                f"{folder} holds no index.json of format {FORMAT_VERSION} (token shards); {remedy}"
            )
        self.eos_id: int = index["eos_id"]
        self.vocab_size: int = index["vocab_size"]
        info = index["splits"][split]
        self.text_bytes: int = info["text_bytes"]
        self.num_documents: int = info["documents"]
        self._shards = []
        for shard in info["shards"]:
            file = folder / shard["file"]
            size = file.stat().st_size if file.is_file() else 0
            if size != shard["bytes"]:
                raise UserError(f"{file} has {size:,} bytes where {shard['bytes']:,} belong; {remedy}")
            self._shards.append(np.memmap(file, dtype=np.dtype(index["dtype"]), mode="r"))
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1 of the stream: int64 (stop - start,)."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start}..{stop} of {len(self)}")
        out = np.empty(stop - start, dtype=np.int64)
        shard = int(np.searchsorted(self._ends, start, side="right"))
        position = start
        while position < stop:
            offset = position - (int(self._ends[shard - 1]) if shard else 0)
            taken = self._shards[shard][offset : offset + stop - position]
            out[position - start : position - start + len(taken)] = taken
            position += len(taken)
            shard += 1
        return out

    def num_blocks(self, seq_len: int) -> int:
        """Whole blocks of seq_len inputs and as many labels."""
        return (len(self) - 1) // seq_len

    def block(self, i: int, seq_len: int) -> np.ndarray:
        """Block i: int64 (seq_len + 1,); inputs are [:-1], labels [1:]."""
        return self.tokens(i * seq_len, (i + 1) * seq_len + 1)


class Batches:
    """The training batches of a run, as a function of the step.

    The blocks come in one infinite order that, for a given corpus, depends on the seed alone: epoch e is a
    permutation drawn from (seed, e). Batch `step` holds entries start_block + step * batch_size and on.

    Raises UserError where the split has fewer blocks than a batch.
    """

    def __init__(
        self, dataset: TokenDataset, seq_len: int, batch_size: int, seed: int, start_block: int = 0
    ) -> None:
        self.dataset, self.seq_len, self.batch_size = dataset, seq_len, batch_size
        self.seed, self.start_block = seed, start_block
        self.num_blocks = dataset.num_blocks(seq_len)
        if self.num_blocks < batch_size:
            raise UserError(
                f"the {dataset.split} split has {len(dataset):,} tokens, {self.num_blocks} blocks of "
                f"seq_len={seq_len}, and a batch takes batch_size={batch_size}; "
                f"use more text or lower seq_len or batch_size"
            )
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        # Of NumPy's random numbers only a bit generator's raw stream is the same in every version.
        raw = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.num_blocks)
        return np.argsort(raw, kind="stable").astype(np.uint32)

    def block_index(self, position: int) -> int:
        """Which block stands at `position` of the infinite order."""
        epoch, offset = divmod(position, self.num_blocks)
        return int(self._permutation(epoch)[offset])

    def batch(self, step: int) -> torch.Tensor:
        """Batch `step`: int64 (batch_size, seq_len + 1)."""
        first = self.start_block + step * self.batch_size
        indices = [self.block_index(first + i) for i in range(self.batch_size)]
        return torch.from_numpy(np.stack([self.dataset.block(i, self.seq_len) for i in indices]))


def validation_batches(
    dataset: TokenDataset, seq_len: int, batch_size: int, sequences: int | None
) -> Iterator[torch.Tensor]:
    """`sequences` evenly spaced blocks, at most all (None: all), as int64 (<= batch_size, seq_len + 1).

    Raises UserError where the split is shorter than one block.
    """
    available = dataset.num_blocks(seq_len)
    if available == 0:
        raise UserError(
            f"the {dataset.split} split has {len(dataset):,} tokens, less than one block of "
            f"seq_len={seq_len}; use more validation text or lower seq_len"
        )
    count = available if sequences is None else min(sequences, available)
    indices = [i * available // count for i in range(count)]
    for start in range(0, count, batch_size):
        blocks = [dataset.block(i, seq_len) for i in indices[start : start + batch_size]]
        yield torch.from_numpy(np.stack(blocks))
