"""What setup.cfg says of the package, that all it imports is declared and under which names its commands are known;
and what the linter, which reads Python alone, does not see.
"""

import ast
import configparser
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def declared() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return {name.split(".")[0] for name in found}


def distributions(requirements: str) -> set[str]:
    """Names in a list of requirements as they are imported: of all that the package needs, the two are the same."""
    return {re.match(r"[\w.-]+", line)[0].replace("-", "_") for line in requirements.split("\n") if line}


def test_every_import_is_declared(declared):
    """An import that something else happens to bring along fails for the user whose something else is another
    version.
    """
    needed = distributions(declared["options"]["install_requires"])
    optional = {
        "gpu": distributions(declared["options.extras_require"]["triton"]),  # a folder of kernels
        "axolotl.py": {"axolotl", "pydantic"},  # imported by axolotl itself, which brings pydantic
        "llamafactory.py": {"llamafactory"},
    }
    used = set()
    for path in (ROOT / "lorapre_peft").rglob("*.py"):
        foreign = (
            imported(path)
            - sys.stdlib_module_names
            - optional.get(path.name, set())
            - optional.get(path.parent.name, set())
        )
        assert foreign <= needed, f"{path.name} imports {foreign - needed}, which install_requires does not name"
        used |= foreign
    assert used == needed


def test_commands_are_documented_by_their_names(declared, capsys):
    """`--help` and the README name the command that an installation puts on the PATH."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"([\w-]+) = ([\w.]+):(\w+)", declared["options.entry_points"]["console_scripts"])
    assert len(commands) == 2
    for name, module, function in commands:
        with pytest.raises(SystemExit, match="0"):
            getattr(importlib.import_module(module), function)(["--help"])
        assert capsys.readouterr().out.startswith(f"usage: {name} ")
        assert f"`{name} " in readme
    assert "python -m lorapre_peft" not in readme


def test_lines_of_the_kernels_are_as_short_as_the_linter_wants_python_to_be():
    limit = int(re.search(r"^line-length = (\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1])
    files = sorted(path for path in (ROOT / "lorapre_peft/kernels").iterdir() if path.suffix in (".h", ".cpp"))
    assert files
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= limit, f"{path.name}:{number} has {len(line)} characters; the limit is {limit}"
