"""Pre-train a small GPT-NeoX and its tokenizer: how the embedded teacher (hm/assets/tiny) was made.

    python -m hm.pretrain --data 'corpus/train-*.jsonl.xz + docstrings' --validation corpus/validation.jsonl.xz --out my_teacher

Trains a byte-level BPE on the text, tokenises it, trains with next-token cross-entropy, and leaves a folder that is
a teacher: config.json, model.safetensors (bfloat16), the tokenizer, training.json (settings, validation bits per
byte, a sample) and metrics.jsonl. Runs on a CPU or a GPU and goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from hm.config import Stage, tokens
from hm.data import Batches, DataSpec, TokenDataset, documents, spec_fingerprint, tokenize, validation_batches
from hm.errors import UserError
from hm.evaluate import perplexity
from hm.objectives import FineTune
from hm.provenance import provenance
from hm.store import atomic_write, content_key, to_json
from hm.train import Run, train

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(spec: DataSpec, vocab_size: int, max_documents: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` entries from evenly spread training documents of `spec`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    parts = [DataSpec(p.strip(), spec.validation, spec.text_key) for p in spec.source.split(" + ")]
    texts = (itertools.islice(documents(p, "train"), max_documents // len(parts)) for p in parts)
    tokenizer.train_from_iterator(itertools.chain.from_iterable(texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def new_model(args: argparse.Namespace, vocab_size: int) -> GPTNeoXForCausalLM:
    """A GPT-NeoX as Pythia builds it: parallel residual, rotary on a quarter of each head, biases, untied embeddings."""
    torch.manual_seed(args.seed)
    config: dict[str, Any] = dict(
        vocab_size=vocab_size, hidden_size=args.hidden_size, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, intermediate_size=4 * args.hidden_size, max_position_embeddings=args.seq_len,
        rotary_pct=0.25, use_parallel_residual=True, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        attn_implementation="sdpa",
    )  # fmt: skip
    return GPTNeoXForCausalLM(GPTNeoXConfig(**config))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m hm.pretrain", description=__doc__.splitlines()[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("--data", default="docstrings", help="as the setting data=: text files, docstrings, hf:<name>, joined by ' + '")
    p.add_argument("--validation", default=None, help="own validation text; default: a document-disjoint part of the data")
    p.add_argument("--out", type=Path, required=True, help="the teacher's folder")
    p.add_argument("--work", type=Path, default=None, help="folder for token shards and checkpoints (default: OUT.work)")
    p.add_argument("--tokenizer", type=Path, default=None, help="folder of a tokenizer to use instead of training one")
    p.add_argument("--vocab", type=int, default=4096, help="entries of the tokenizer")
    p.add_argument("--hidden-size", type=int, default=256)
    p.add_argument("--layers", type=int, default=6)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--seq-len", type=int, default=1024, help="training length, and the teacher's longest")
    p.add_argument("--tokens", default="200M", help="training tokens")
    p.add_argument("--batch-size", type=int, default=32, help="sequences per step")
    p.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--compile", action="store_true", help="torch.compile each layer")
    p.add_argument("--only-tokens", action="store_true", help="stop after tokenising (to train on another machine)")
    p.add_argument("--have-tokens", action="store_true", help="train on the shards in the work folder; the text need not be here")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    work: Path = args.work or args.out.with_name(args.out.name + ".work")
    spec = DataSpec(args.data, args.validation)
    work.mkdir(parents=True, exist_ok=True)
    folder = args.tokenizer or work / "tokenizer"
    if not args.have_tokens and not (folder / "tokenizer.json").exists():
        print(f"training a tokenizer of {args.vocab} entries")
        train_tokenizer(spec, args.vocab).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if not args.have_tokens:
        tokenize(spec, tokenizer, work / "tokens", vocab_size=len(tokenizer),
                 progress=lambda n, b: print(f"\rtokenised {n / 1e6:.1f}M tokens", end="", flush=True))  # fmt: skip
        print()
        sources = [part.strip().rpartition("/")[2] for part in args.data.split(" + ")]
        atomic_write(work / "data.json", to_json({"sources": sources, **spec_fingerprint(spec)}, indent=1))
    data = TokenDataset(work / "tokens", "train")
    print(f"{len(data) / 1e6:.1f}M training tokens, {data.text_bytes / len(data):.2f} bytes per token")
    if args.only_tokens:
        return
    device = torch.device(args.device)
    precision = "bf16" if device.type == "cuda" else "fp32"
    model: Any = new_model(args, len(tokenizer))
    model.to(device)
    per_step = args.batch_size * args.seq_len
    steps = tokens(args.tokens, "--tokens") // per_step
    if steps < 1:
        raise UserError(f"--tokens={args.tokens} is less than one step of {per_step} tokens; raise it.")
    stage = Stage(lr=args.lr, warmup=0.02, min_lr=0.05, batch_size=args.batch_size)
    settings = {k: str(v) for k, v in vars(args).items()
                if k not in ("data", "validation", "tokenizer", "out", "work", "device", "only_tokens", "have_tokens", "compile")}  # fmt: skip
    key = content_key({**settings, "tokens_index": (work / "tokens" / "index.json").read_text()})
    run = Run("pretrain", work, key, device, precision, checkpoint_every=500, log_every=20, compile=args.compile)
    objective = FineTune(model, pretraining=True)
    batches = Batches(data, args.seq_len, args.batch_size, args.seed)
    result = train(objective, batches.batch, steps, stage, run)

    model = model.to(torch.bfloat16)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    shutil.copy(work / "metrics.jsonl", args.out / "metrics.jsonl")
    held = TokenDataset(work / "tokens", "validation")
    model = model.float()
    found = perplexity(model, validation_batches(held, args.seq_len, 8, 400), bytes_per_token=held.text_bytes / len(held))
    prompt = tokenizer("The history of the city", return_tensors="pt").input_ids.to(device)
    torch.manual_seed(0)
    text = tokenizer.decode(model.generate(prompt, max_new_tokens=120, do_sample=True, top_k=40, pad_token_id=0)[0])
    about = {
        "settings": settings, "data": json.loads((work / "data.json").read_text()), "tokenizer_entries": len(tokenizer),
        "parameters": sum(p.numel() for p in model.parameters()), "training": result, "validation": found,
        "validation_bytes_per_token": held.text_bytes / len(held), "sample": text, "provenance": provenance(),
    }  # fmt: skip
    atomic_write(args.out / "training.json", to_json(about, indent=1) + "\n")
    print(json.dumps({"validation": found, "sample": text}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
