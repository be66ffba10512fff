import pytest
import torch

import hm.ops
from hm.errors import UserError
from hm.ops import SCANS, linear_recurrence, resolve_scan


def test_auto_is_chunked_without_cuda():
    assert resolve_scan("auto", "cpu", 128) == "chunked"
    assert resolve_scan("auto", torch.device("meta"), 128) == "chunked"


@pytest.mark.parametrize(("reason", "expected"), [(None, "ssd"), ("No module named 'mamba_ssm'", "chunked")])
def test_auto_on_cuda_is_ssd_if_it_can_be_imported(monkeypatch, reason, expected):
    monkeypatch.setattr(hm.ops, "why_unavailable", lambda: reason)
    assert resolve_scan("auto", "cuda", 128) == expected


def test_ssd_is_refused_on_a_cpu_and_where_it_is_not_installed(monkeypatch):
    with pytest.raises(UserError, match=r"scan=ssd needs a CUDA device, not cpu: use scan=auto"):
        resolve_scan("ssd", "cpu", 128)
    monkeypatch.setattr(hm.ops, "why_unavailable", lambda: "No module named 'einops'")
    with pytest.raises(UserError, match=r"scan=ssd.*No module named 'einops'.*hedgemamba\[cuda\]"):
        resolve_scan("ssd", "cuda", 128)


def test_selective_scan_is_named_as_not_available():
    with pytest.raises(
        UserError, match=r"scan=selective_scan is not available in this version: use scan=auto"
    ):
        resolve_scan("selective_scan", "cuda", 128)


def test_an_unknown_scan_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"scan=chunk is not known: use one of auto, chunked, ssd"):
        resolve_scan("chunk", "cpu", 128)


def test_every_named_scan_but_ssd_runs_on_a_cpu():
    q, k, v = torch.rand(1, 5, 2, 4), torch.rand(1, 5, 2, 4), torch.rand(1, 5, 2, 3)
    for scan in set(SCANS) - {"ssd"}:
        assert linear_recurrence(q, k, v, scan=scan).shape == (1, 5, 2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.rand(1, 5, 3, 4)}, "multiple of the 3 key/value heads"),
        ({"k": torch.rand(1, 4, 2, 4)}, r"k must have shape \(1, 5, 2, 4\)"),
        ({"v": torch.rand(1, 5, 1, 3)}, r"v must have shape \(1, 5, 2, 3\)"),
        ({"delta": torch.rand(1, 5, 2)}, r"delta must have shape \(1, 5, 4\)"),
        ({"A": torch.rand(2)}, r"A must have shape \(4,\)"),
        ({"initial_state": torch.rand(1, 4, 4, 3)}, r"initial_state must have shape \(1, 4, 4, 4\)"),
        ({"q": torch.rand(5, 4, 4)}, "4 dimensions"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    fitting = {"q": torch.rand(1, 5, 4, 4), "k": torch.rand(1, 5, 2, 4), "v": torch.rand(1, 5, 2, 3)}
    with pytest.raises(ValueError, match=message):
        linear_recurrence(**{**fitting, **change})
