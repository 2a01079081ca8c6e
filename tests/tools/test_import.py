"""What `import lorapre_peft` costs and touches: trainers, TRL and Triton load only when asked for, PEFT stays as it
was.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lorapre_peft

FRESH_IMPORT = """
import json, sys
from peft import mapping
tables = lambda: {name: dict(value) for name, value in vars(mapping).items() if name.startswith("PEFT_TYPE_TO_")}
loaded = set(sys.modules)  # PEFT itself imports bitsandbytes where it is installed, and that Triton
names = ("trl", "datasets", "triton", "transformers.trainer")
heavy = lambda: [name for name in names if name in {*sys.modules} - loaded]
before = tables()
import lorapre_peft
facts = {"heavy": heavy(), "tables": len(before), "tables untouched": tables() == before}
from lorapre_peft import LoRAPreCallback, lorapre_optimizer
facts["module"] = LoRAPreCallback.__module__
facts["heavy with trainer"] = [name for name in heavy() if name != "transformers.trainer"]
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts() -> dict:
    """What a fresh interpreter finds, since this one has imported everything already."""
    done = subprocess.run([sys.executable, "-c", FRESH_IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_loads_no_trainer_and_no_triton(facts):
    assert facts["heavy"] == []


def test_trainer_names_load_on_demand(facts):
    assert facts["module"] == "lorapre_peft.integrations.callback"
    assert facts["heavy with trainer"] == []


def test_import_leaves_pefts_mappings_alone(facts):
    """LoRA-Pre trains LoRA adapters: a new or replaced PEFT type would make them unreadable without this package."""
    assert facts["tables"] >= 2
    assert facts["tables untouched"]


@pytest.mark.parametrize("name", lorapre_peft.__all__)
def test_public_names_resolve(name):
    assert getattr(lorapre_peft, name).__name__ == name


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="module 'lorapre_peft' has no attribute 'LoRAPreSGD'"):
        _ = lorapre_peft.LoRAPreSGD


# What the modules of each package may import beside their own package, as docs/design.md draws it.
LAYERS = {
    "lowrank": set(),
    "kernels": {"lowrank"},
    "optim": {"lowrank", "kernels"},
    "integrations": {"lowrank", "kernels", "optim"},
    "memory": {"lowrank", "kernels", "optim", "integrations"},
    "extract": {"lowrank", "kernels", "optim", "integrations"},
}


@pytest.mark.parametrize("package", LAYERS)
def test_arrows_between_packages_run_one_way(package):
    """A layer can be read and tested without those above it; imports inside functions and for type checkers count."""
    root = Path(lorapre_peft.__file__).parent
    assert {path.parent.name for path in root.glob("*/__init__.py")} == LAYERS.keys()
    for path in (root / package).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(import|from) lorapre_peft", text), f"{path.name} imports the package by its own name"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level > len(path.relative_to(root / package).parts):
                other = (node.module or "the top").split(".")[0]
                assert other in LAYERS[package], f"{package}/{path.name} imports from {other}"
