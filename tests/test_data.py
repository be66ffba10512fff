import errno
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hm import data
from hm.data import Batches, DataSpec, TokenDataset, documents, tokenize, validation_batches
from hm.errors import UserError

SENTENCE = "the state of a model decays with each step and its memory holds what came before it"
VOCAB_SIZE = 300
EOS = "<|endoftext|>"


def made_up_texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [
        f"Number {i}: " + " ".join(rng.choice(SENTENCE.split(), size=rng.integers(5, 60)))
        for i in range(count)
    ]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(made_up_texts(50), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


@pytest.fixture
def spec(tmp_path: Path) -> DataSpec:
    return DataSpec(str(write_jsonl(tmp_path / "text.jsonl", made_up_texts(200))), validation_fraction=0.2)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "BATCH_CHARACTERS", 500)


def tokenized(spec: DataSpec, tokenizer: PreTrainedTokenizerFast, folder: Path, **options) -> TokenDataset:
    tokenize(spec, tokenizer, folder, vocab_size=VOCAB_SIZE, **options)
    return TokenDataset(folder, "train")


def folder_contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- shards


def test_shards_hold_each_document_and_an_end_of_text(spec, tokenizer, tmp_path):
    tokenized(spec, tokenizer, tmp_path / "out")
    for split in ("train", "validation"):
        dataset = TokenDataset(tmp_path / "out", split)
        texts = list(documents(spec, split))
        decoded = tokenizer.decode(dataset.tokens(0, len(dataset)), clean_up_tokenization_spaces=False)
        assert decoded == "".join(text + EOS for text in texts)
        assert dataset.text_bytes == sum(len(text.encode()) for text in texts)
        assert dataset.num_documents == len(texts)


def test_end_of_text_written_out_in_a_document_is_ordinary_text(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", [f"before {EOS} after", "second"])
    spec = DataSpec(str(source), validation=str(write_jsonl(tmp_path / "v.jsonl", ["third"])))
    dataset = tokenized(spec, tokenizer, tmp_path / "out")
    assert list(dataset.tokens(0, len(dataset))).count(tokenizer.eos_token_id) == 2


def test_a_tokenizer_that_truncates_loses_no_text_here(spec, tokenizer, tmp_path):
    truncating = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=EOS)
    truncating.backend_tokenizer.enable_truncation(3)
    tokenized(spec, tokenizer, tmp_path / "whole")
    tokenized(spec, truncating, tmp_path / "out")
    whole, out = TokenDataset(tmp_path / "whole", "train"), TokenDataset(tmp_path / "out", "train")
    assert len(whole) == len(out)
    assert truncating.backend_tokenizer.truncation is not None


def test_long_documents_encoded_in_pieces_decode_to_the_same_text(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE_CHARACTERS", 50)
    text = " ".join(made_up_texts(30)) + "x" * 200 + " end"
    assert "".join(data._pieces(text)) == text
    assert max(map(len, data._pieces(text))) == 50
    source = write_jsonl(tmp_path / "x.jsonl", [text])
    spec = DataSpec(str(source), validation=str(write_jsonl(tmp_path / "v.jsonl", ["third"])))
    dataset = tokenized(spec, tokenizer, tmp_path / "out")
    assert tokenizer.decode(dataset.tokens(0, len(dataset) - 1), clean_up_tokenization_spaces=False) == text


def test_the_stream_does_not_depend_on_the_shard_size(spec, tokenizer, tmp_path, small_batches):
    one, many = (
        tokenized(spec, tokenizer, tmp_path / str(size), shard_documents=size) for size in (20_000, 7)
    )
    assert len(list((tmp_path / "20000").glob("train-*.bin"))) == 1
    assert len(list((tmp_path / "7").glob("train-*.bin"))) > 20
    np.testing.assert_array_equal(one.tokens(0, len(one)), many.tokens(0, len(many)))
    for i in range(one.num_blocks(64)):
        np.testing.assert_array_equal(one.block(i, 64), many.block(i, 64))


@pytest.mark.parametrize("documents_before", [0, 1, 60, 150])
def test_a_killed_tokenisation_goes_on_to_the_same_bytes(
    spec, tokenizer, tmp_path, small_batches, monkeypatch, documents_before
):
    tokenized(spec, tokenizer, tmp_path / "whole", shard_documents=10)
    add, added = data.ShardWriter.add, []

    def add_or_die(self, tokens, text_bytes):
        if len(added) == documents_before:
            raise KeyboardInterrupt
        added.append(self.split)
        add(self, tokens, text_bytes)

    monkeypatch.setattr(data.ShardWriter, "add", add_or_die)
    with pytest.raises(KeyboardInterrupt):
        tokenized(spec, tokenizer, tmp_path / "out", shard_documents=10)
    with pytest.raises(UserError, match=r"index\.json"):
        TokenDataset(tmp_path / "out", "train")
    kept = sum(added.count(split) // 10 * 10 for split in data.SPLITS)

    def count(self, tokens, text_bytes):
        added.append(self.split)
        add(self, tokens, text_bytes)

    added.clear()
    monkeypatch.setattr(data.ShardWriter, "add", count)
    tokenized(spec, tokenizer, tmp_path / "out", shard_documents=10)
    assert len(added) == 200 - kept
    assert folder_contents(tmp_path / "out") == folder_contents(tmp_path / "whole")


def test_a_torn_shard_is_made_again_on_restart(spec, tokenizer, tmp_path):
    tokenized(spec, tokenizer, tmp_path / "whole", shard_documents=10)
    tokenized(spec, tokenizer, tmp_path / "out", shard_documents=10)
    (tmp_path / "out" / "index.json").unlink()
    os.truncate(tmp_path / "out" / "train-00003.bin", 6)
    (tmp_path / "out" / "validation-00001.json").unlink()
    tokenized(spec, tokenizer, tmp_path / "out", shard_documents=10)
    assert folder_contents(tmp_path / "out") == folder_contents(tmp_path / "whole")


def test_a_finished_folder_is_not_tokenised_again(spec, tokenizer, tmp_path):
    calls: list[tuple[int, int]] = []
    dataset = tokenized(spec, tokenizer, tmp_path / "out", progress=lambda *counts: calls.append(counts))
    validation = TokenDataset(tmp_path / "out", "validation")
    assert calls[-1] == (len(dataset) + len(validation), dataset.text_bytes + validation.text_bytes)
    calls.clear()
    tokenized(spec, tokenizer, tmp_path / "out", progress=lambda *counts: calls.append(counts))
    assert calls == []


def test_other_text_in_the_same_folder_replaces_what_was_there(spec, tokenizer, tmp_path):
    tokenized(spec, tokenizer, tmp_path / "out")
    other = DataSpec(str(write_jsonl(tmp_path / "o.jsonl", made_up_texts(40))), validation_fraction=0.5)
    dataset = tokenized(other, tokenizer, tmp_path / "out")
    assert dataset.num_documents == len(list(documents(other, "train")))


def test_ids_above_16_bits_survive(spec, tokenizer, tmp_path):
    tokenize(spec, tokenizer, tmp_path / "wide", vocab_size=70_000)
    narrow, wide = tokenized(spec, tokenizer, tmp_path / "narrow"), TokenDataset(tmp_path / "wide", "train")
    assert (tmp_path / "wide/train-00000.bin").stat().st_size == 4 * len(wide)
    assert (tmp_path / "narrow/train-00000.bin").stat().st_size == 2 * len(wide)
    np.testing.assert_array_equal(narrow.tokens(0, len(narrow)), wide.tokens(0, len(wide)))


def test_a_vocabulary_beyond_the_embedding_is_refused_before_anything_is_written(spec, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"ids up to 299 .* only 256 rows"):
        tokenize(spec, tokenizer, tmp_path / "out", vocab_size=256)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_end_of_text_is_refused(spec, tokenizer, tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="eos_token"):
        tokenize(spec, bare, tmp_path / "out", vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize(("fraction", "split"), [(0.0, "validation"), (1.0, "train")])
def test_an_empty_split_is_refused_and_leaves_no_index(spec, tokenizer, tmp_path, fraction, split):
    with pytest.raises(UserError, match=f"none for {split}"):
        tokenized(DataSpec(spec.source, validation_fraction=fraction), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("failing_sync", [0, 1, 2, 5])
def test_a_full_or_read_only_disk_is_named_and_leaves_nothing_taken_for_whole(
    spec, tokenizer, tmp_path, monkeypatch, small_batches, code, failing_sync
):
    calls = itertools.count()

    def fsync(fileno):
        if next(calls) >= failing_sync:
            raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match="can't be written") as caught:
            tokenized(spec, tokenizer, tmp_path / "out", shard_documents=10)
    assert str(tmp_path / "out") in str(caught.value)
    with pytest.raises(UserError, match=r"index\.json"):
        TokenDataset(tmp_path / "out", "train")
    tokenized(spec, tokenizer, tmp_path / "out", shard_documents=10)
    tokenized(spec, tokenizer, tmp_path / "whole", shard_documents=10)
    assert folder_contents(tmp_path / "out") == folder_contents(tmp_path / "whole")


def test_an_output_folder_that_is_a_file_is_named(spec, tokenizer, tmp_path):
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(UserError, match="can't be written"):
        tokenized(spec, tokenizer, tmp_path / "out")


def test_a_truncated_shard_is_named_with_its_sizes(spec, tokenizer, tmp_path):
    dataset = tokenized(spec, tokenizer, tmp_path / "out")
    shard = tmp_path / "out/train-00000.bin"
    os.truncate(shard, 100)
    with pytest.raises(UserError, match=f"has 100 bytes where {2 * len(dataset):,} belong; delete") as caught:
        TokenDataset(tmp_path / "out", "train")
    assert str(shard) in str(caught.value)
    shard.unlink()
    with pytest.raises(UserError, match="has 0 bytes"):
        TokenDataset(tmp_path / "out", "train")


# --- blocks and batches


@pytest.fixture
def dataset(spec, tokenizer, tmp_path) -> TokenDataset:
    return tokenized(spec, tokenizer, tmp_path / "out", shard_documents=9)


def test_labels_are_the_next_tokens_and_each_is_predicted_once(dataset):
    stream = dataset.tokens(0, len(dataset))
    blocks = [dataset.block(i, 32) for i in range(dataset.num_blocks(32))]
    inputs, labels = (np.concatenate([b[s] for b in blocks]) for s in (slice(None, -1), slice(1, None)))
    assert all(len(block) == 33 for block in blocks)
    assert len(stream) - 1 - len(labels) < 32
    np.testing.assert_array_equal(inputs, stream[: len(inputs)])
    np.testing.assert_array_equal(labels, stream[1 : 1 + len(labels)])


def test_the_last_block_ends_with_the_stream_where_the_length_just_fits(dataset):
    seq_len = len(dataset) - 1
    assert dataset.num_blocks(seq_len) == 1
    assert dataset.num_blocks(len(dataset)) == 0
    assert dataset.block(0, seq_len)[-1] == dataset.eos_id
    with pytest.raises(IndexError):
        dataset.block(1, seq_len)


def test_batches_after_a_restart_are_those_of_an_undisturbed_run(dataset):
    undisturbed = Batches(dataset, 16, 4, seed=3)
    steps = 3 * undisturbed.num_blocks // 4  # three epochs, with batches across their borders
    seen = [undisturbed.batch(step) for step in range(steps)]
    for resumed_at in (0, 1, steps // 3, steps // 2, steps - 1):
        fresh = Batches(dataset, 16, 4, seed=3)
        for step in range(resumed_at, min(resumed_at + 5, steps)):
            assert torch.equal(fresh.batch(step), seen[step])


def test_batches_are_int64_rows_of_inputs_and_labels(dataset):
    batches = Batches(dataset, 16, 4, seed=0)
    batch = batches.batch(2)
    assert (batch.dtype, batch.shape) == (torch.int64, (4, 17))
    np.testing.assert_array_equal(batch[1], dataset.block(batches.block_index(9), 16))


def test_each_epoch_holds_every_block_once_in_an_order_of_its_own(dataset):
    batches = Batches(dataset, 16, 4, seed=0)
    n = batches.num_blocks
    epochs = [[batches.block_index(e * n + i) for i in range(n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(range(n))


def test_the_order_depends_on_the_seed_and_not_on_the_batch_size(dataset):
    wide, narrow, other = (Batches(dataset, 16, *args) for args in ((6, 1), (2, 1), (6, 2)))
    assert torch.equal(wide.batch(5), torch.cat([narrow.batch(step) for step in (15, 16, 17)]))
    assert not torch.equal(wide.batch(5), other.batch(5))


def test_a_stage_that_starts_later_goes_on_where_the_one_before_stopped(dataset):
    whole, second = Batches(dataset, 16, 4, seed=0), Batches(dataset, 16, 4, seed=0, start_block=12)
    assert torch.equal(second.batch(0), whole.batch(3))


def test_the_order_is_the_one_that_earlier_checkpoints_count_on():
    class Blocks:
        split = "train"

        def __len__(self):
            return 81

        def num_blocks(self, seq_len):
            return 80 // seq_len

    batches = Batches(Blocks(), 10, 2, seed=7)  # type: ignore[arg-type]
    assert [batches.block_index(i) for i in range(8)] == [6, 3, 4, 0, 2, 7, 5, 1]


def test_a_corpus_shorter_than_one_batch_is_refused_with_the_numbers(dataset):
    blocks = dataset.num_blocks(128)
    with pytest.raises(
        UserError, match=rf"{len(dataset):,} tokens, {blocks} blocks of seq_len=128.*{blocks + 1}"
    ):
        Batches(dataset, 128, blocks + 1, seed=0)
    Batches(dataset, 128, blocks, seed=0)


def test_validation_blocks_are_evenly_spaced_and_always_the_same(spec, tokenizer, tmp_path):
    tokenized(spec, tokenizer, tmp_path / "out")
    dataset = TokenDataset(tmp_path / "out", "validation")
    n = dataset.num_blocks(16)
    batches = list(validation_batches(dataset, 16, 4, sequences=10))
    assert [tuple(b.shape) for b in batches] == [(4, 17), (4, 17), (2, 17)]
    expected = np.stack([dataset.block(i * n // 10, 16) for i in range(10)])
    np.testing.assert_array_equal(torch.cat(batches), expected)
    for sequences in (None, 10**6):
        assert sum(len(b) for b in validation_batches(dataset, 16, 4, sequences)) == n
    with pytest.raises(UserError, match="less than one block of seq_len=100000"):
        next(validation_batches(dataset, 100_000, 4, None))
