import pytest
import torch

from hm import config
from hm.errors import UserError
from hm.ops import SCANS, _announce, fused, kernels, linear_recurrence, resolve_scan, selective_scan, ssd


@pytest.fixture
def installed(monkeypatch):
    """installed(*names): of mamba-ssm's kernels (and "triton") these can be imported, and no other."""

    def pretend(*names):
        monkeypatch.setattr(
            kernels, "why_unavailable", lambda module, name: None if name in names else "No module named 'einops'"
        )
        monkeypatch.setattr(fused, "_has_triton", lambda: "triton" in names)

    return pretend


SSD, SELECTIVE = ssd.KERNEL[1], selective_scan.KERNEL[1]


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_auto_is_chunked_without_cuda(decay):
    assert resolve_scan("auto", "cpu", 128, decay) == "chunked"
    assert resolve_scan("auto", torch.device("meta"), 128, decay) == "chunked"


@pytest.mark.parametrize(
    ("names", "head", "channel"),
    [
        (["triton", SSD, SELECTIVE], "fused", "selective_scan"),
        (["triton"], "fused", "chunked"),
        ([], "chunked", "chunked"),
    ],
)
def test_auto_on_cuda_goes_by_the_form_of_the_decay_and_by_what_is_installed(installed, names, head, channel):
    installed(*names)
    assert resolve_scan("auto", "cuda", 128) == head
    assert resolve_scan("auto", "cuda", 128, "channel") == channel
    assert resolve_scan("auto", "cuda", 128, dtype=torch.float64) == "chunked"


def test_auto_says_once_what_it_took_and_why(installed, capsys):
    _announce.cache_clear()
    installed("triton")
    for _ in range(3):
        resolve_scan("auto", "cuda", 128)
        resolve_scan("auto", "cuda", 128, "channel")
        resolve_scan("chunked", "cuda", 128)
    assert capsys.readouterr().err.splitlines() == [
        "scan=auto takes fused for decay=head: the fastest here",
        "scan=auto takes chunked for decay=channel: selective_scan needs mamba-ssm, which can't be imported here "
        "(No module named 'einops'; see the extra hedgemamba[cuda])",
    ]


@pytest.mark.parametrize("scan", ["ssd", "selective_scan"])
def test_kernels_are_refused_where_they_can_not_run(installed, scan):
    with pytest.raises(UserError, match=rf"scan={scan} needs a CUDA device, not cpu: use scan=chunked or scan=auto"):
        resolve_scan(scan, "cpu", 128)
    installed()
    with pytest.raises(UserError, match="scan=fused needs Triton, which is not installed: use scan=chunked"):
        resolve_scan("fused", "cuda", 128)
    with pytest.raises(UserError, match=rf"scan={scan} needs mamba-ssm.*'einops'.*hedgemamba\[cuda\].*use scan=chunked"):
        resolve_scan(scan, "cuda", 128)
    with pytest.raises(UserError, match=rf"scan={scan} computes in float32 at most, not in float64: use scan=chunked"):
        resolve_scan(scan, "cuda", 128, dtype=torch.float64)


def test_ssd_is_refused_for_a_decay_per_channel_with_what_serves_it(installed):
    installed(SSD, SELECTIVE)
    with pytest.raises(UserError, match=r"scan=ssd has one decay per head, not decay=channel: use scan=selective_scan"):
        resolve_scan("ssd", "cuda", 128, "channel")
    with pytest.raises(UserError, match="scan=ssd has one decay per head"):
        linear_recurrence(*(torch.rand(1, 5, 2, 3) for _ in "qkvd"), scan="ssd")


def test_the_setting_offers_every_back_end():
    assert config.SCANS == SCANS


def test_an_unknown_scan_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"scan=chunk is not known: use one of auto, fused, ssd, selective_scan, chunked"):
        resolve_scan("chunk", "cpu", 128)


def test_every_named_scan_but_the_kernels_runs_on_a_cpu():
    q, k, v = torch.rand(1, 5, 2, 4), torch.rand(1, 5, 2, 4), torch.rand(1, 5, 2, 3)
    for scan in set(SCANS) - {"fused", "ssd", "selective_scan"}:
        assert linear_recurrence(q, k, v, scan=scan).shape == (1, 5, 2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.rand(1, 5, 3, 4)}, "multiple of the 3 key/value heads"),
        ({"k": torch.rand(1, 4, 2, 4)}, r"k must have shape \(1, 5, 2, 4\)"),
        ({"v": torch.rand(1, 5, 1, 3)}, r"v must have shape \(1, 5, 2, 3\)"),
        ({"delta": torch.rand(1, 5, 2)}, r"delta must have shape \(1, 5, 4\)"),
        ({"A": torch.rand(2)}, r"A must have shape \(4,\)"),
        ({"delta": torch.rand(1, 5, 4, 4)}, r"delta must have shape \(1, 5, 4, 3\)"),
        ({"delta": torch.rand(1, 5, 4), "A": torch.rand(4, 3, 4)}, r"delta must have shape \(1, 5, 4, 3\)"),
        ({"delta": torch.rand(1, 5, 4, 3), "A": torch.rand(4)}, r"A must have shape \(4, 3, 4\)"),
        ({"A": torch.rand(4, 3, 4), "initial_state": torch.rand(1, 4, 4, 4)}, r"initial_state must have shape \(1, 4, 4, 6\)"),
        ({"initial_state": torch.rand(1, 4, 4, 3)}, r"initial_state must have shape \(1, 4, 4, 4\)"),
        ({"q": torch.rand(5, 4, 4)}, "4 dimensions"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    fitting = {"q": torch.rand(1, 5, 4, 4), "k": torch.rand(1, 5, 2, 4), "v": torch.rand(1, 5, 2, 3)}
    with pytest.raises(ValueError, match=message):
        linear_recurrence(**{**fitting, **change})
