"""The font of the plots: a small part of Matplotlib's own DejaVu Sans.

A PDF embeds the part of its font that it uses. Cutting that out of the whole font, with 6,000 glyphs and tables for scripts that no
plot has, takes longer than drawing; out of this one it takes a tenth of that. What it lacks comes from the whole font.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from functools import cache

from fontTools import subset
from matplotlib import font_manager

WHOLE = "DejaVu Sans"
SMALL = "DejaVu Sans of Latin and Greek"
LETTERS = [*range(0x20, 0x180), *range(0x370, 0x400), *range(0x2010, 0x2040), *range(0x2190, 0x21A0), *range(0x2200, 0x2270)]


@cache
def families() -> list[str]:
    """The families to draw with, in order of preference. The first call of a process makes the small one."""
    options = subset.Options(drop_tables=["FFTM", "GDEF", "GPOS", "GSUB", "MATH"], legacy_kern=True, name_IDs=["*"], notdef_outline=True)
    with subset.load_font(font_manager.findfont(WHOLE), options) as font, tempfile.NamedTemporaryFile(suffix=".ttf", delete=False) as file:
        atexit.register(os.unlink, file.name)
        cut = subset.Subsetter(options)
        cut.populate(unicodes=LETTERS)
        cut.subset(font)
        for record in font["name"].names:
            if record.nameID in (1, 16):  # the family, by which Matplotlib finds it
                record.string = SMALL
        font.save(file)
    font_manager.fontManager.addfont(file.name)
    return [SMALL, WHOLE]
