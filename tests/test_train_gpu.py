"""What only a GPU does in training: compiled layers, a recorded step, activations computed again."""

import json

import pytest
import torch

from hm.bench.shapes import build_teacher
from hm.config import Stage
from hm.convert import convert
from hm.objectives import Align, FineTune
from hm.train import Diverged, Run, train

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

STEPS = 8


def batch(step):
    generator = torch.Generator().manual_seed(step % 2)  # seen again, so that the loss falls
    return torch.randint(512, (4, 129), generator=generator)


def losses(objective, folder, steps=STEPS, **how):
    run = Run("gpu", folder, "key", torch.device("cuda"), "bf16", checkpoint_every=5, log_every=1, **how)
    train(objective, batch, steps, Stage(lr=1e-3, lr_new=1e-2, batch_size=4, micro_batch=2), run)
    return torch.tensor([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])


def objective(what):
    teacher = build_teacher("tiny", 256, "cuda")
    if what == "stage1":
        return Align(teacher, convert(teacher, "hedgehog"))
    return FineTune(teacher if what == "teacher" else convert(teacher), "ce+kl" if what == "kl" else "ce", teacher)


@pytest.mark.parametrize("what", ["stage1", "stage2", "teacher", "kl"])
def test_a_compiled_and_recorded_run_has_the_losses_of_a_plain_one(what, tmp_path):
    plain = losses(objective(what), tmp_path / "plain", compile=False)
    recorded = losses(objective(what), tmp_path / "recorded")
    assert len(plain) == STEPS
    assert plain[-1] < plain[0]
    torch.testing.assert_close(recorded, plain, rtol=0.01, atol=0.01)


def test_activations_computed_again_give_the_same_losses(tmp_path):
    kept = losses(objective("stage2"), tmp_path / "kept")
    again = losses(objective("stage2"), tmp_path / "again", checkpointing=True)
    torch.testing.assert_close(again, kept, rtol=0.01, atol=0.01)


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    whole = losses(objective("stage2"), tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stopping(step):
        if step == 6:
            raise Stopped
        return batch(step)

    folder = tmp_path / "pieces"
    run = Run("gpu", folder, "key", torch.device("cuda"), "bf16", checkpoint_every=5, log_every=1)
    with pytest.raises(Stopped):
        train(objective("stage2"), stopping, STEPS, Stage(lr=1e-3, lr_new=1e-2, batch_size=4, micro_batch=2), run)
    torch.testing.assert_close(losses(objective("stage2"), folder), whole, rtol=0.01, atol=0.01)


def test_a_loss_that_breaks_between_two_log_lines_stops_the_run_at_its_step(tmp_path):
    spoilt = objective("stage2")

    def give(step):
        if step == 5:
            with torch.no_grad():
                spoilt.model.mixers[1].phi_q.bias.fill_(float("nan"))
        return batch(step)

    run = Run("gpu", tmp_path, "key", torch.device("cuda"), "bf16", log_every=100)
    with pytest.raises(Diverged, match=r"not finite at step 5 .*layer 1"):
        train(spoilt, give, 20, Stage(lr=1e-3, batch_size=4), run)
