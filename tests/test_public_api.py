"""The names that the README shows."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("first", ["hm.convert", "hm.train", "hm.teacher"])
def test_hm_convert_is_the_function_whatever_was_imported_before(first):
    code = f"import hm, {first}; assert callable(hm.convert), hm.convert; assert callable(hm.load_teacher)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
    import hm

    assert all(getattr(hm, name) is not None for name in hm.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = hm.nonsense


def test_reading_records_needs_no_pytorch():
    code = "import sys, hm, analysis.make_tables; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
