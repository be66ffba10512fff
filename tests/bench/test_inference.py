"""The inference benchmark at tiny sizes: what its rows say, and that what it times is decoding."""

import json
import subprocess
import sys

import pytest
import torch

from hm.bench.inference import CONTEXTS, guarded, main, parse, rows
from hm.decode import Decoder
from hm.errors import UserError

TINY = ["--shape", "tiny", "--device", "cpu", "--steps", "2"]


@pytest.mark.parametrize("mixer", ["hedgehog", "hedgemamba", "mamba"])
def test_the_decoder_takes_the_steps_that_generate_takes(kind, mixer, make_teacher, make_student, ids):
    student, prompt = make_student(make_teacher(kind), mixer), ids(2, 9)
    student.generation_config.eos_token_id = None
    expected = student.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0)
    cache = student.new_cache()
    with torch.no_grad():
        student(input_ids=prompt[:, :-1], past_key_values=cache)
    decoder = Decoder(student, batch=2, context=9)
    for made_up, real in zip(decoder.cache.layers, cache.layers, strict=True):
        made_up.state.ssm = real.state.ssm
        if real.state.conv is not None:
            made_up.state.conv = real.state.conv
    decoder.ids.copy_(prompt[:, -1:])
    for t in range(8):
        decoder.step()
        assert torch.equal(decoder.ids[:, 0], expected[:, 9 + t])
    decoder.close()
    torch.testing.assert_close(
        student(input_ids=prompt).logits[:, -1].argmax(-1), expected[:, 9], msg="the model is as it was"
    )


def test_the_kernel_steps_as_the_definition_does():
    pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA builds")
    code = """
import itertools
import torch
from hm import decode
from hm.decode import step_in_place
from hm.ops import step
for decode.LAUNCH, (B, H, G, N, P, normalize, delta, A) in itertools.product([decode.Launch(), decode.Launch(8, 64, 8, 64)], [(2, 4, 2, 32, 16, True, 1, 1), (1, 2, 2, 130, 65, True, 0, 0),
                                           (3, 2, 1, 64, 33, False, 1, 1), (1, 2, 2, 8, 31, True, 1, 0),
                                           (16, 16, 8, 96, 40, True, 1, 1)]):
    q, k, v = torch.rand(B, H, N), torch.rand(B, G, N), torch.randn(B, G, P)
    delta, A = torch.rand(B, H) if delta else None, torch.rand(H) if A else None
    state = torch.rand(B, H, N, P + normalize)
    y, new = step(state, q, k, v, delta, A, normalize)
    padded = torch.cat([state, torch.full((B, H, N, 7), torch.nan)], -1)[..., : P + normalize]
    for kept in (state, padded):
        torch.testing.assert_close(step_in_place(kept, q, k, v, delta, A, normalize), y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(kept, new)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_students_state_is_as_large_at_every_context_and_a_teachers_cache_grows_with_it(tmp_path):
    out = tmp_path / "bench" / "inference.json"
    main([*TINY, "--contexts", "64", "256", "--batches", "2", "--sweep", "4", "--sweep-context", "64", "--out", str(out)])
    found = json.loads(out.read_text())
    assert (found["schema"], found["kind"]) == (1, "inference")
    assert {"device", "command", "git_commit", "versions"} <= set(found)
    table = {(r["model"], r["context"], r["batch"]): r for r in found["rows"]}
    assert set(table) == {(m, c, b) for m in ("student", "teacher") for c, b in ((64, 2), (256, 2), (64, 4))}
    for row in found["rows"]:
        assert row["status"] == row["prefill_status"] == "ok"
        assert row["decode_tokens_per_second"] == pytest.approx(row["batch"] / row["seconds_per_token"])
        assert row["prefill_tokens_per_second"] == pytest.approx(row["batch"] * row["context"] / row["prefill_seconds"])
    held = {key: row["state_bytes_per_sequence"] for key, row in table.items()}
    layers, heads, d, row = 2, 4, 16, 24  # a row of d + 1 numbers, filled up to whole sectors of 8
    assert {held["student", c, b] for c, b in ((64, 2), (256, 2), (64, 4))} == {4 * layers * (heads * 2 * d * row + 3 * heads * d)}
    assert {c: held["teacher", c, 2] for c in (64, 256)} == {c: 4 * layers * 2 * heads * d * c for c in (64, 256)}


def test_running_out_of_memory_is_a_row_and_what_else_goes_wrong_is_not():
    def fail(error):
        raise error

    cpu = torch.device("cpu")
    assert guarded(lambda: fail(torch.OutOfMemoryError("no")), cpu, 8) == (None, None, "out of memory")
    assert guarded(lambda: 3.0, cpu, 8) == (3.0, None, "ok")
    with pytest.raises(RuntimeError, match="other"):
        guarded(lambda: fail(RuntimeError("other")), cpu, 8)


def test_when_the_minutes_are_over_the_rest_is_listed_as_not_run():
    args = parse([*TINY, "--contexts", "64", "--batches", "1", "--sweep", "--minutes", "0"])
    assert [(r["model"], r["status"]) for r in rows(args)] == [(m, "not run: --minutes is over") for m in ("student", "teacher")]


def test_a_prefill_that_is_too_long_to_be_measured_leaves_decoding_measured():
    args = parse([*TINY, "--contexts", "64", "--batches", "2", "--sweep", "--prefill-tokens", "100", "--models", "student"])
    (row,) = rows(args)
    assert (row["prefill_seconds"], row["prefill_status"], row["status"]) == (None, "not measured", "ok")


def test_the_default_grid_is_the_one_of_the_targets(capsys):
    args = parse([])
    assert CONTEXTS == [1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]
    assert (args.contexts, args.batches, args.sweep[-1]) == (CONTEXTS, [16, 1], 256)
    with pytest.raises(SystemExit) as stopped:
        parse(["--contexts", "many"])
    assert stopped.value.code == 2
    assert "many" in capsys.readouterr().err


def test_an_unknown_benchmark_is_refused_by_name():
    from hm.bench.__main__ import main as dispatch

    with pytest.raises(UserError, match=r"inferense.*did you mean benchmark=inference"):
        dispatch(["inferense"])
