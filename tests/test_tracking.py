"""What a training run shows of itself while it runs: progress.json, and event files in which no step stands twice."""

import contextlib
import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hm.cell import Cell
from hm.check import check
from hm.config import from_dict
from hm.errors import UserError
from hm.store import Store
from hm.tracking import PROGRESS, Watch, open_trackers
from hm.train import Interrupted


def scalars(folder, name):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def log(work, steps):
    lines = [json.dumps({"step": n, "loss": 1.0 / (n + 1), "lr": 0.1}) + "\n" for n in steps]
    (work / "metrics.jsonl").write_text("".join(lines))


def test_progress_is_written_while_it_runs_and_gone_once_it_is_complete(tmp_path):
    log(tmp_path, range(3))
    with Watch(tmp_path, 10, 32, lambda: [], lambda: False) as watch:
        assert watch(1) is False
        about = json.loads((tmp_path / PROGRESS).read_text())
        assert (about["step"], about["steps"], about["tokens_per_step"]) == (1, 10, 32)
    assert not (tmp_path / PROGRESS).exists()
    with contextlib.suppress(Interrupted), Watch(tmp_path, 10, 32, lambda: [], lambda: True) as watch:
        assert watch(4) is True
        raise Interrupted
    assert json.loads((tmp_path / PROGRESS).read_text())["step"] == 4, "kept for those who ask how far it came"


def test_a_run_that_goes_on_shows_each_logged_step_once(tmp_path):
    events = tmp_path / "events"

    def watched(steps, end):
        log(tmp_path, steps)
        try:
            with Watch(tmp_path, 10, 32, lambda: open_trackers(events, "run", "key", "tensorboard"), lambda: False) as watch:
                watch(steps[0] + 1)
                log(tmp_path, steps)
                with open(tmp_path / "metrics.jsonl", "a") as file:
                    file.write('{"step": 99, "lo')  # not yet a whole line
                if end:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass

    watched(range(6), end=True)
    watched(range(9), end=False)
    assert scalars(events / "run", "loss") == [(n, pytest.approx(1.0 / (n + 1))) for n in range(9)]


def test_a_trained_cell_has_event_files_that_say_what_its_log_says(tmp_path, make_teacher, byte_tokenizer):
    make_teacher("neox", vocab_size=257).save_pretrained(tmp_path / "teacher")
    byte_tokenizer.save_pretrained(tmp_path / "teacher")
    for name, count in (("train", 40), ("validation", 4)):
        (tmp_path / f"{name}.txt").write_text("\n\n\n".join(f"{name} {n}: the owl sees {n * n} birds." for n in range(count)))
    values = {"teacher": str(tmp_path / "teacher"), "data": str(tmp_path / "train.txt"), "validation": str(tmp_path / "validation.txt"),
              "seq_len": 16, "stage1.batch_size": 1, "stage2.batch_size": 1, "stage1_tokens": 0, "budget": 64, "device": "cpu",
              "eval.sequences": 2, "log_every": 1, "study": "seen"}  # fmt: skip
    cell = Cell(from_dict(values), Store(tmp_path / "runs"))
    cell.run()
    lines = [json.loads(line) for line in next((tmp_path / "runs/seen").glob("*/metrics.jsonl")).read_text().splitlines()]
    shown = scalars(tmp_path / "runs/tensorboard/seen" / f"{cell.name} stage 2", "loss")
    assert shown == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    assert not list((tmp_path / "runs").rglob(PROGRESS))


def test_weights_and_biases_that_is_not_installed_is_refused_before_work_begins(monkeypatch):
    monkeypatch.setattr("hm.check.find_spec", lambda name: None)
    with pytest.raises(UserError, match="tracker=wandb, but the package wandb is not installed; run `pip install wandb`"):
        check(from_dict({"tracker": "wandb"}))
    with pytest.raises(UserError, match=r"tracker=wandbb is not known; did you mean tracker=wandb\?"):
        check(from_dict({"tracker": "wandbb"}))
