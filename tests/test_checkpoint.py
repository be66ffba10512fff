import errno
import os
import random

import pytest
import safetensors.torch
import torch

import hm.checkpoint
from hm.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, save_checkpoint
from hm.errors import UserError


def save(folder, step, **options):
    tensors = {"w": torch.full((3,), float(step))}
    return save_checkpoint(folder, step, tensors, {"seen": step * 8}, "key", **options)


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    tensors = {"w": torch.randn(3, 4).to(torch.bfloat16), "step": torch.tensor(7.0),
               "rng": torch.get_rng_state(), "none": torch.empty(0, 2)}
    save_checkpoint(tmp_path, 12, tensors, {"loss": 0.1, "nested": {"a": [1, None]}}, "key")
    loaded = load_checkpoint(tmp_path, "key")
    assert loaded.step == 12
    assert loaded.state == {"loss": 0.1, "nested": {"a": [1, None]}}
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)


def test_tied_tensors_are_stored_once_and_views_are_copied(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"embed": base, "head": base, "transposed": base.T, "row": base[1], "flat": base.view(12)}
    path = save_checkpoint(tmp_path, 1, tensors, {}, "key")
    assert set(safetensors.torch.load_file(path / "tensors.safetensors")) == set(tensors) - {"head"}
    loaded = load_checkpoint(tmp_path, "key").tensors
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_without_checkpoints_there_is_nothing_to_load(tmp_path):
    assert load_checkpoint(tmp_path / "absent", "key") is None


def test_the_newest_are_kept_and_loaded(tmp_path):
    for step in (5, 10, 999_999, 1_000_000):
        save(tmp_path, step, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-1000000", "step-999999"]
    assert load_checkpoint(tmp_path, "key").step == 1_000_000


def truncate(path):
    os.truncate(path / "tensors.safetensors", 20)


def flip(path):
    data = bytearray((path / "tensors.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "tensors.safetensors").write_bytes(data)


def remove(path):
    (path / "tensors.safetensors").unlink()


def cut_json(path):
    os.truncate(path / "checkpoint.json", 30)


@pytest.mark.parametrize("damage", [truncate, flip, remove, cut_json])
def test_a_damaged_checkpoint_is_named_and_skipped_for_the_one_before(tmp_path, damage):
    save(tmp_path, 10)
    damage(save(tmp_path, 20))
    with pytest.warns(UserWarning, match="step-000020 is damaged"):
        loaded = load_checkpoint(tmp_path, "key")
    assert loaded.step == 10
    assert torch.equal(loaded.tensors["w"], torch.full((3,), 10.0))


def test_a_damaged_checkpoint_does_not_crowd_out_a_good_one(tmp_path):
    save(tmp_path, 10)
    truncate(save(tmp_path, 20))
    save(tmp_path, 15, keep=1)
    assert os.listdir(tmp_path) == ["step-000015"]
    save(tmp_path, 20)
    assert load_checkpoint(tmp_path, "key").step == 20


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    save(tmp_path, 10)
    with pytest.raises(UserError, match=r"step-000010 was made with other settings.*delete"):
        load_checkpoint(tmp_path, "another")


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_of_the_new(tmp_path, monkeypatch, call):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(UserError, match="No space left"):
            save(tmp_path, 20)
    assert os.listdir(tmp_path) == ["step-000010"]
    assert load_checkpoint(tmp_path, "key").step == 10


def test_a_full_disk_met_by_safetensors_is_a_user_error_too(tmp_path, monkeypatch):
    def full(*_args):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr(hm.checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 10)
    assert os.listdir(tmp_path) == []


def test_a_work_folder_that_was_taken_over_is_not_made_anew(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    save(work / "checkpoints", 10)
    work.rename(tmp_path / "theirs")
    with pytest.raises(FileNotFoundError):
        save(work / "checkpoints", 20)
    assert os.listdir(tmp_path) == ["theirs"]


def test_a_state_that_is_not_json_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="loss is nan"):
        save_checkpoint(tmp_path, 1, {}, {"loss": float("nan")}, "key")
    assert os.listdir(tmp_path) == []


# --- optimiser ----------------------------------------------------------------------------------------------

def trainer(order=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.LayerNorm(16),
                                torch.nn.Linear(16, 2))
    named = list(model.named_parameters())
    if order is not None:
        order.shuffle(named)
    matrices = [p for _, p in named if p.dim() > 1]
    vectors = [p for _, p in named if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                                   {"params": vectors, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.95))
    return model, optimizer


def train(model, optimizer, steps):
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x[:, :2]).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("order", [None, random.Random(1)], ids=["same order", "other order"])
def test_stopping_and_going_on_is_bit_for_bit_never_having_stopped(tmp_path, order):
    model, optimizer = trainer()
    train(model, optimizer, range(10))

    stopped, its_optimizer = trainer()
    train(stopped, its_optimizer, range(5))
    state = optimizer_tensors(its_optimizer, dict(stopped.named_parameters()))
    weights = {f"model.{n}": t for n, t in stopped.state_dict().items()}
    save_checkpoint(tmp_path, 5, weights | state, {}, "key")

    resumed, resumed_optimizer = trainer(order)
    checkpoint = load_checkpoint(tmp_path, "key")
    weights = {n.removeprefix("model."): t for n, t in checkpoint.tensors.items() if n.startswith("model.")}
    resumed.load_state_dict(weights)
    load_optimizer(resumed_optimizer, {n: checkpoint.tensors[n] for n in state},
                   {p: n for n, p in resumed.named_parameters()})
    train(resumed, resumed_optimizer, range(checkpoint.step, 10))

    wanted = model.state_dict() | optimizer_tensors(optimizer, dict(model.named_parameters()))
    found = resumed.state_dict() | optimizer_tensors(resumed_optimizer, dict(resumed.named_parameters()))
    assert wanted.keys() == found.keys()
    assert len(wanted) == 6 * 4  # weight, exp_avg, exp_avg_sq and step of six parameters
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_loading_keeps_the_groups_and_rates_of_the_run(tmp_path):
    model, optimizer = trainer()
    train(model, optimizer, range(2))
    state = optimizer_tensors(optimizer, dict(model.named_parameters()))
    other, its_optimizer = trainer()
    its_optimizer.param_groups[0]["lr"] = 0.5
    load_optimizer(its_optimizer, state, dict(other.named_parameters()))
    assert its_optimizer.param_groups[0]["lr"] == 0.5
    assert its_optimizer.param_groups[1]["weight_decay"] == 0.0


def test_optimiser_state_of_unknown_or_other_parameters_is_refused():
    model, optimizer = trainer()
    train(model, optimizer, range(1))
    names = dict(model.named_parameters())
    state = optimizer_tensors(optimizer, names)
    with pytest.raises(UserError, match=r"state for 9\.weight"):
        load_optimizer(optimizer, state | {"9.weight.exp_avg": torch.zeros(1)}, names)
    with pytest.raises(UserError, match=r"0\.weight\.exp_avg has shape \(2, 2\)"):
        load_optimizer(optimizer, state | {"0.weight.exp_avg": torch.zeros(2, 2)}, names)
