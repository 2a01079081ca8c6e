"""`docs/upstream`: what other projects would get is made from this one's code, and does the same."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import peft.optimizers
import pytest
from peft import LoraConfig, PeftConfig, get_peft_model
from roundoff import assert_same_steps
from tiny_llama import build_llama

from lorapre_peft import create_lorapre_optimizer
from lorapre_peft.lowrank.rules import test_rows as start_rows

UPSTREAM = Path(__file__).parents[2] / "docs" / "upstream"
BRANCH = UPSTREAM / "peft"


def load(name: str, path: Path):
    """A module from a file, under the name that it would have."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lorapre(monkeypatch):
    """`peft.optimizers.lorapre`, as it would be in PEFT."""
    module = load("peft.optimizers.lorapre", BRANCH / "src/peft/optimizers/lorapre.py")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(peft.optimizers, "create_lorapre_optimizer", module.create_lorapre_optimizer, raising=False)
    return module


def test_branch_for_peft_is_what_the_script_writes(tmp_path):
    load("make_peft", UPSTREAM / "make_peft.py").write(tmp_path)
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 3
    stale = [str(path) for path in written if (BRANCH / path).read_text() != (tmp_path / path).read_text()]
    assert not stale, "run python docs/upstream/make_peft.py"


def test_branch_for_peft_takes_the_same_steps(lorapre, monkeypatch, batch):
    """At rank 4 and so momentum rank 1, of both moments, with the same rows to start from."""
    monkeypatch.setattr(lorapre, "test_rows", start_rows)

    def weights(make):
        model = get_peft_model(build_llama(), LoraConfig(r=4, target_modules="all-linear"))
        optimizer = make(model)
        for _ in range(4):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [param for param in model.parameters() if param.requires_grad]

    options = dict(lr=1e-3, weight_decay=0.1)

    def ours(prepare):
        return weights(lambda model: prepare(create_lorapre_optimizer(model, verbose=False, **options)))

    assert_same_steps(weights(partial(lorapre.create_lorapre_optimizer, **options)), ours)


def test_tests_for_peft_pass(lorapre):
    tests = load("test_lorapre", BRANCH / "tests/test_lorapre.py")
    plain = [
        test for name, test in vars(tests).items() if name.startswith("test_") and not hasattr(test, "pytestmark")
    ]
    assert len(plain) >= 6
    for test in plain:
        test()
    (rejections,) = tests.test_lorapre_rejects.pytestmark
    for options, error in rejections.args[1]:
        tests.test_lorapre_rejects(options, error)


def test_method_comparison_entry_is_a_config_of_pefts():
    (config,) = BRANCH.rglob("adapter_config.json")
    assert PeftConfig.from_pretrained(config.parent).r == 32


def test_patch_for_llamafactory_reads_options_that_exist():
    """Each is one of `create_lorapre_optimizer`; LLaMA-Factory itself is run by `tests/external/run.py`."""
    patch = (UPSTREAM / "llamafactory_v0.patch").read_text()
    added = [line[1:] for line in patch.splitlines() if line.startswith("+")]
    handed = {line.split("=")[0].strip() for line in added if "=finetuning_args.lorapre_" in line.replace(" ", "")}
    assert handed == {"momentum_rank", "update_rule"}
    assert handed <= create_lorapre_optimizer.__kwdefaults__.keys()
