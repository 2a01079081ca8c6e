"""MLorc's optimizer from its published package, whose 0.1.8 cannot be imported: it says `..utilX` where its files are `util/X.py`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_found = importlib.util.find_spec("MLorc_optim")
if _found is None:
    raise ModuleNotFoundError("No module named 'MLorc_optim'")
for _file in Path(_found.submodule_search_locations[0], "util").glob("[A-Z]*.py"):
    _spec = importlib.util.spec_from_file_location(f"MLorc_optim.util{_file.stem}", _file)
    sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_spec.name])

from MLorc_optim import MLorc_AdamW  # noqa: E402, F401
