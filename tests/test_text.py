import gzip
import json
import lzma
from pathlib import Path

import pytest
import zstandard

from hm import text
from hm.errors import UserError
from hm.text import DataSpec, documents, spec_fingerprint


def made_up_texts(count: int) -> list[str]:
    return [f"Number {i}: " + "what the state holds decays with each step " * (i % 7) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def spec(tmp_path: Path) -> DataSpec:
    return DataSpec(str(write_jsonl(tmp_path / "text.jsonl", made_up_texts(200))), validation_fraction=0.2)


def test_every_document_is_in_exactly_one_split(spec):
    train, validation = list(documents(spec, "train")), list(documents(spec, "validation"))
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(made_up_texts(200))
    assert 20 < len(validation) < 60  # a fifth of 200


def test_a_document_stays_in_its_split_when_the_corpus_grows(spec, tmp_path):
    longer = write_jsonl(
        tmp_path / "longer.jsonl", ["something new " * i for i in range(1, 50)] + made_up_texts(200)
    )
    grown = DataSpec(str(longer), validation_fraction=spec.validation_fraction)
    assert set(documents(spec, "validation")) <= set(documents(grown, "validation"))
    assert set(documents(spec, "train")) <= set(documents(grown, "train"))


def test_documents_of_the_validation_file_are_dropped_from_training(tmp_path):
    texts = made_up_texts(20)
    source, held_out = write_jsonl(tmp_path / "a.jsonl", texts), write_jsonl(tmp_path / "b.jsonl", texts[5:8])
    spec = DataSpec(str(source), validation=str(held_out))
    assert list(documents(spec, "validation")) == texts[5:8]
    assert list(documents(spec, "train")) == texts[:5] + texts[8:]


def test_max_documents_limits_what_is_read_of_the_source(spec):
    limited = DataSpec(spec.source, max_documents=30, validation_fraction=0.2)
    both = [*documents(limited, "train"), *documents(limited, "validation")]
    assert sorted(both) == sorted(made_up_texts(200)[:30])


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_compressed_json_lines_read_as_plain_ones_do(tmp_path, suffix):
    texts = [*made_up_texts(5), "Ærøskøbing — 数学"]
    content = "".join(json.dumps({"body": text}) + "\n" for text in texts).encode()
    compress = {
        "": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress
    }[suffix]  # fmt: skip
    (tmp_path / f"x.jsonl{suffix}").write_bytes(compress(content))
    spec = DataSpec(str(tmp_path), text_key="body", validation_fraction=0.0)
    assert list(documents(spec, "train")) == texts


def test_a_json_file_may_be_lines_or_one_array(tmp_path):
    records = [{"text": text} for text in made_up_texts(4)]
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "array.json").write_text(json.dumps(records, indent=1))
    read = [
        list(documents(DataSpec(str(tmp_path / f"{name}.json"), validation_fraction=0.0), "train"))
        for name in ("lines", "array")
    ]
    assert read[0] == read[1] == made_up_texts(4)


def test_plain_text_is_parted_at_two_blank_lines_and_where_it_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "TEXT_DOCUMENT_CHARACTERS", 100)
    long = "".join(f"line {i:03d}\n" for i in range(40))
    (tmp_path / "x.txt").write_text(f"One.\n\nStill one.\n\n\n\nTwo.\n\n\n{long}")
    first, second, *rest = documents(DataSpec(str(tmp_path / "x.txt"), validation_fraction=0.0), "train")
    assert (first, second) == ("One.\n\nStill one.", "Two.")
    assert max(map(len, rest)) <= 110
    assert "\n".join(rest) + "\n" == long


def test_a_glob_and_joined_sources_are_read_in_order(tmp_path):
    write_jsonl(tmp_path / "b1.jsonl", ["second"])
    write_jsonl(tmp_path / "b0.jsonl", ["first"])
    write_jsonl(tmp_path / "a.jsonl", ["third"])
    spec = DataSpec(f"{tmp_path}/b*.jsonl + {tmp_path}/a.jsonl", validation_fraction=0.0)
    assert list(documents(spec, "train")) == ["first", "second", "third"]


def test_a_datasets_name_is_streamed(tmp_path, monkeypatch):
    import datasets

    def load_dataset(name, config, *, split, streaming, revision):
        assert (name, config, split, streaming, revision) == ("owner/name", "plain", "train", True, "abc")
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    spec = DataSpec("hf:owner/name:plain@abc", validation_fraction=0.0)
    assert list(documents(spec, "train")) == ["one", "two"]


def test_the_fingerprint_follows_the_contents_and_not_the_path(tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", ["x"]), write_jsonl(tmp_path / "b.jsonl", ["x"])
    assert spec_fingerprint(DataSpec(str(a))) == spec_fingerprint(DataSpec(str(b)))
    assert spec_fingerprint(DataSpec(str(a))) != spec_fingerprint(DataSpec(str(a), text_key="body"))
    assert spec_fingerprint(DataSpec(str(a))) != spec_fingerprint(DataSpec(str(a), max_documents=1))
    before = spec_fingerprint(DataSpec(str(a)))
    write_jsonl(a, ["y, longer"])
    assert spec_fingerprint(DataSpec(str(a))) != before


BAD_FILES = {
    "empty.txt": (b"", "holds no text"),
    "blank.txt": (b" \n\n \n", "holds no text"),
    "empty.jsonl": (b"", "holds no text"),
    "empty.jsonl.xz": (lzma.compress(b""), "holds no text"),
    "nul.txt": (b"some\0thing", "NUL"),
    "binary.txt": (bytes(range(128, 256)), "not UTF-8"),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', "not UTF-8"),
    "key.jsonl": (b'{"text": "a"}\n{"body": "a"}\n', r"key\.jsonl:2 has no text under 'text'.*text_key="),
    "json.jsonl": (b'{"text": "a"}\n\n{"text": \n', r"json\.jsonl:3 is not JSON"),
    "array.json": (b'[{"text": "a"}, 3]', "has no text under"),
    "cut.jsonl.xz": (lzma.compress(b'{"text": "a"}\n' * 999)[:-20], "damaged"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 999)[:-20], "damaged"),
    "no.jsonl.gz": (b"plain", "damaged"),
    "no.jsonl.zst": (b"plain text", "damaged"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_an_unusable_file_is_named(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(documents(DataSpec(str(tmp_path / name)), "train"))
    assert name in str(caught.value)


def test_a_source_that_is_not_there_is_named(tmp_path):
    for source in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError, match=str(source)):
            list(documents(DataSpec(str(source)), "train"))
