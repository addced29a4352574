"""What a user sees: lines and bars in a terminal, pages, pictures.

`console.py` speaks (`Reporter`), also where `encoding.py` has to write names out, `progress.py`
makes every bar, `streams.py` bears whatever stands in the place of stdout, `html.py` writes pages
that run and load nothing in the one style of `style.py`, `svg.py` draws charts as inline SVG,
`layer_figure.py` which layers are compared, `plotting.py` what needs matplotlib (extra `study`),
and `report.py` is what a run came to, with the panels of `curves.py`. What comes from outside is
text: never markup, never a control character.

`report.py`, `curves.py` and `side_by_side.py` know runs; all else is given numbers and words.
"""

import importlib
import random

# rich draws random numbers when it is imported, and they are the caller's
_numbers = random.getstate()
importlib.import_module("rich.console")
random.setstate(_numbers)
