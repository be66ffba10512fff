"""Where compiled kernels are kept."""

import os

import pytest

from hm.cache import use_cache

NAMES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_AUTOTUNING")


@pytest.fixture
def clean(monkeypatch):
    for name in (*NAMES, "HM_CACHE"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    return monkeypatch


def test_kernels_are_kept_in_the_store_or_in_hm_cache_and_what_is_set_already_stays(clean, tmp_path):
    use_cache(tmp_path)
    assert [os.environ[name] for name in NAMES] == [f"{tmp_path}/cache/triton", f"{tmp_path}/cache/inductor", "1"]
    clean.setenv("HM_CACHE", f"{tmp_path}/own")
    clean.delenv("TORCHINDUCTOR_CACHE_DIR")
    use_cache(tmp_path)
    assert [os.environ[name] for name in NAMES] == [f"{tmp_path}/cache/triton", f"{tmp_path}/own/inductor", "1"]
