"""Finding mamba-ssm's operators, in installations that are whole, without the compiled extension, or broken."""

import sys

import pytest

from hm.ops import kernels, ssd
from hm.ops.kernels import load_kernel

BROKEN_INIT = "import selective_scan_cuda_that_was_not_compiled\n"
KERNEL = "from mamba_ssm.utils.torch import answer\ndef mamba_chunk_scan_combined():\n    return answer\n"


@pytest.fixture
def forget_mamba_ssm():
    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "mamba_ssm"}
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        del sys.modules[name]
    sys.modules.update(saved)


def install(folder, init):
    package = folder / "mamba_ssm"
    for sub in ("ops/triton", "utils"):
        (package / sub).mkdir(parents=True)
    (package / "__init__.py").write_text(init)
    (package / "utils" / "torch.py").write_text("answer = 42\n")
    (package / "ops" / "triton" / "ssd_combined.py").write_text(KERNEL)


@pytest.mark.usefixtures("forget_mamba_ssm")
@pytest.mark.parametrize("init", ["", BROKEN_INIT])
def test_the_kernel_is_found_with_and_without_the_compiled_extension(tmp_path, monkeypatch, init):
    install(tmp_path, init)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_kernel.__wrapped__(*ssd.KERNEL)() == 42


@pytest.mark.usefixtures("forget_mamba_ssm")
def test_others_still_meet_the_true_error_of_a_broken_installation(tmp_path, monkeypatch):
    install(tmp_path, BROKEN_INIT)
    monkeypatch.syspath_prepend(tmp_path)
    load_kernel.__wrapped__(*ssd.KERNEL)
    with pytest.raises(ImportError, match="selective_scan_cuda"):
        import mamba_ssm  # noqa: F401


@pytest.mark.usefixtures("forget_mamba_ssm")
def test_what_the_operator_lacks_is_reported(tmp_path, monkeypatch):
    install(tmp_path, BROKEN_INIT)
    (tmp_path / "mamba_ssm" / "ops" / "triton" / "ssd_combined.py").write_text(
        "import einops_not_installed\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(kernels, "load_kernel", load_kernel.__wrapped__)
    assert kernels.why_unavailable.__wrapped__(*ssd.KERNEL) == "No module named 'einops_not_installed'"
