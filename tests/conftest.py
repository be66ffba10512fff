"""Shared by the tests: small random teachers, the embedded teacher, a byte tokenizer, a small corpus."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: kernels run on the CPU then

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from hm.convert import convert
from hm.data import DataSpec, TokenDataset, tokenize
from hm.feature_maps import HedgehogFeatureMap
from hm.mixer import CausalConv, Gate, MambaMixer, SelectiveDecay
from hm.teacher import load_teacher

torch.set_num_threads(1)

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS = {
    # as Pythia: parallel residual, partial rotary, biases, untied embeddings
    "neox": lambda **changes: GPTNeoXConfig(**SMALL | {"rotary_pct": 0.25} | changes),
    # as SmolLM2: grouped key/value heads, full rotary, no biases, tied embeddings
    "llama": lambda **changes: LlamaConfig(
        **SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True} | changes
    ),
    # norms of queries and keys, heads wider than hidden_size / heads
    "qwen3": lambda **changes: Qwen3Config(**SMALL | {"num_key_value_heads": 2, "head_dim": 16} | changes),
}


def build_teacher(kind, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**changes), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            is_norm = "norm" in name and name.endswith("weight")
            p.copy_(1 + 0.1 * noise if is_norm else noise * (0.2 if p.dim() > 1 else 0.1))
    return model.requires_grad_(False)


@pytest.fixture(scope="session")
def make_teacher():
    """make_teacher("neox", "llama" or "qwen3", seed=0, **config changes): a small one, all random."""
    return build_teacher


@pytest.fixture(params=["neox", "llama", "qwen3"])
def kind(request):
    return request.param


@pytest.fixture
def teacher(kind):
    """A small random teacher of each architecture."""
    return build_teacher(kind)


@pytest.fixture(scope="session")
def tiny_teacher():
    """The embedded teacher. Not to be changed."""
    return load_teacher("tiny")


@pytest.fixture(scope="session")
def randomize():
    """randomize(student, maps=True, parts=True): moves feature maps and other new parts off their start."""

    @torch.no_grad()
    def move(student, maps=True, parts=True, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def noise(p, scale):
            return scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)

        for module in student.modules():
            if isinstance(module, HedgehogFeatureMap) and maps:
                module.weight += noise(module.weight, 0.5)
                module.bias += noise(module.bias, 0.5)
            elif isinstance(module, SelectiveDecay) and parts:
                module.up.weight += noise(module.up.weight, 1.0)
                module.A += noise(module.A, 5.0).abs()
            elif isinstance(module, CausalConv) and parts:
                module.weight += noise(module.weight, 0.3)
            elif isinstance(module, Gate) and parts:
                module.proj.weight += noise(module.proj.weight, 0.3)
            elif isinstance(module, MambaMixer) and parts:
                module.D += noise(module.D, 0.5)
                module.norm.weight += noise(module.norm.weight, 0.2)
        return student

    return move


@pytest.fixture(scope="session")
def make_student(randomize):
    """make_student(teacher, mixer, **convert's arguments): converted, every new part moved off its start."""

    def make(teacher, mixer="hedgemamba", **options):
        return randomize(convert(teacher, mixer, **options))

    return make


@pytest.fixture
def ids():
    """ids(batch, length, vocab=61, seed=0): random token ids."""

    def draw(batch, length, vocab=61, seed=0):
        return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(scope="session")
def byte_tokenizer():
    """257 entries: an end-of-text token and every byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    """A text file of 300 short, all different, very regular documents."""
    animals, verbs = ["cat", "dog", "owl", "fox", "hen"], ["sees", "likes", "follows", "hears"]
    documents = [
        " ".join(
            f"the {animals[(i + j) % 5]} {verbs[(i * j) % 4]} the {animals[(i * 3 + j) % 5]}."
            for j in range(8)
        )
        + f" {i}"
        for i in range(300)
    ]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(f'{{"text": "{d}"}}\n' for d in documents))
    return path


@pytest.fixture(scope="session")
def token_folder(corpus_file, byte_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    tokenize(
        DataSpec(str(corpus_file), validation_fraction=0.1), byte_tokenizer, folder, vocab_size=257, workers=1
    )
    return folder


@pytest.fixture
def token_dataset(token_folder):
    """The corpus as bytes: token_dataset("train"), token_dataset("validation")."""
    return lambda split: TokenDataset(token_folder, split)
