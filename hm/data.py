"""Documents -> token shards -> blocks -> batches.

Each level is an iterator or an array over the one before, and each can be had by itself:

    documents    `documents(spec, split)` of hm.text: one string per document, read lazily; the splits never
                 share a document.
    shards       `tokenize(...)` encodes the documents once, in order, each followed by the end-of-text token,
                 into the files of hm.shards.
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

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hm.errors import UserError
from hm.files import NO_FOLDER, UNWRITABLE, atomic_write, disk_errors, to_json
from hm.shards import FORMAT_VERSION, ShardWriter, TokenDataset, read_index
from hm.text import DataSpec, labelled_documents, spec_fingerprint
from hm.text import documents as documents

SPLITS = ("train", "validation")
PIECE_CHARACTERS = 1_000_000  # a longer document is encoded in pieces, cut at a space
BATCH_CHARACTERS = 2_000_000  # what is encoded at a time


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
    writing = partial(disk_errors, out_dir, UNWRITABLE | NO_FOLDER)
    with writing():
        out_dir.mkdir(parents=True, exist_ok=True)
        if read_index(out_dir).get("key") == key:
            return
        (out_dir / "index.json").unlink(missing_ok=True)
        writers = {split: ShardWriter(out_dir, split, dtype, shard_documents, key) for split in SPLITS}

    def encode(batch: list[tuple[str, str]]) -> list[tuple[str, int, np.ndarray]]:
        pieces = [list(_pieces(text)) for _, text in batch]
        encoded = iter(encoder.encode_batch_fast([p for ps in pieces for p in ps], add_special_tokens=False))
        result = []
        for (split, text), ps in zip(batch, pieces, strict=True):
            ids = [i for encoding in islice(encoded, len(ps)) for i in encoding.ids]
            result.append((split, len(text.encode()), np.array([*ids, eos_id], dtype=dtype)))
        return result

    def write(encoded: list[tuple[str, int, np.ndarray]]) -> None:
        with writing():
            for split, text_bytes, tokens in encoded:
                writers[split].add(tokens, text_bytes)
        if progress is not None:
            progress(sum(w.tokens for w in writers.values()), sum(w.text_bytes for w in writers.values()))

    try:
        with _encoding_threads(workers), ThreadPoolExecutor(1) as pool:  # the next batch is read meanwhile
            pending = None
            for batch in _batched(labelled_documents(spec), writers):
                following = pool.submit(encode, batch)
                if pending is not None:
                    write(pending.result())
                pending = following
            if pending is not None:
                write(pending.result())
        with writing():
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
    with writing():
        atomic_write(out_dir / "index.json", to_json(index, indent=1))


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


def _batched(labelled: Iterator[tuple[str, str]], writers: "dict[str, ShardWriter]") -> Iterator[list]:
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


# --- batches


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


def validation_blocks(dataset: TokenDataset, seq_len: int, sequences: int | None) -> list[int]:
    """The numbers of `sequences` evenly spaced blocks, at most all (None: all).

    Raises UserError where the split is shorter than one block.
    """
    available = dataset.num_blocks(seq_len)
    if available == 0:
        raise UserError(
            f"the {dataset.split} split has {len(dataset):,} tokens, less than one block of "
            f"seq_len={seq_len}; use more validation text or lower seq_len"
        )
    count = available if sequences is None else min(sequences, available)
    return [i * available // count for i in range(count)]


def validation_batches(
    dataset: TokenDataset, seq_len: int, batch_size: int, sequences: int | None
) -> Iterator[torch.Tensor]:
    """The `validation_blocks` as int64 (<= batch_size, seq_len + 1); raises as they do."""
    indices = validation_blocks(dataset, seq_len, sequences)
    for start in range(0, len(indices), batch_size):
        blocks = [dataset.block(i, seq_len) for i in indices[start : start + batch_size]]
        yield torch.from_numpy(np.stack(blocks))
