"""The state that a GPU's kernels leave after a prompt: what goes on from it agrees with the whole pass."""

import itertools

import pytest
import torch

from hm.ops.kernels import why_unavailable
from hm.ops.selective_scan import KERNEL as SELECTIVE_SCAN
from hm.ops.ssd import KERNEL as SSD

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

KERNELS = {"ssd": SSD, "selective_scan": SELECTIVE_SCAN}
CUTS = [130, 131, *range(200, 216)]


def passes(student, tokens):
    """Logits of tokens (B, L) at once, and of the pieces between the cuts, each going on from the cache."""
    cache, bounds = student.new_cache(), [0, *CUTS, tokens.shape[1]]
    with torch.no_grad():
        whole = student(input_ids=tokens).logits
        pieces = [student(input_ids=tokens[:, a:b], past_key_values=cache).logits for a, b in itertools.pairwise(bounds)]
    return whole.float(), torch.cat(pieces, 1).float()


@pytest.mark.parametrize(("mixer", "decay"), [("hedgehog", "head"), ("hedgemamba", "head"), ("hedgemamba", "channel"), ("mamba", "head")])
@pytest.mark.parametrize("scan", ["fused", "ssd", "selective_scan"])
def test_a_mixed_pass_is_no_further_from_float32_than_a_whole_one(kind, scan, mixer, decay, make_teacher, make_student, ids):
    if scan in KERNELS and (reason := why_unavailable(*KERNELS[scan])):
        pytest.skip(f"needs mamba-ssm: {reason}")
    if decay == "channel" and scan != "selective_scan":
        pytest.skip("only selective_scan has a decay per channel")
    teacher, tokens = make_teacher(kind, hidden_size=256, intermediate_size=256), ids(2, 230).cuda()
    exact, _ = passes(make_student(teacher, mixer, decay=decay, scan="recurrent").cuda(), tokens)
    whole, mixed = passes(make_student(teacher, mixer, decay=decay, scan=scan).cuda().bfloat16(), tokens)
    noise = (whole - exact).square().mean().sqrt()
    assert 0 < (mixed - exact).square().mean().sqrt() < 1.5 * noise
    assert noise < 0.4 * exact.std()
