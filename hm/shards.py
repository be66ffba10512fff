"""A split's token shards on disk: how they are written, and how they are read as one stream.

A shard is a file of 16- or 32-bit little-endian integers. It ends with a document, exists complete or not
at all, and says in a small JSON beside it how many documents it holds: that is all a restart needs.
`index.json`, written last, means that the folder is complete.
"""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from hm.errors import UserError
from hm.files import atomic_write, to_json

FORMAT_VERSION = 1
SHARD_TOKENS = 1 << 26


class ShardWriter:
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
        atomic_write(path.with_suffix(".json"), to_json(shard, indent=1))
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


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a complete folder; {} for any other."""
    try:
        return json.loads((folder / "index.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}


class TokenDataset:
    """One split of a token folder as one memory-mapped stream of `len(dataset)` tokens.

    Raises UserError where the folder is not complete or a shard has not the size that the index says.
    """

    def __init__(self, path: Path | str, split: str) -> None:
        folder, self.split = Path(path), split
        index = read_index(folder)
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
