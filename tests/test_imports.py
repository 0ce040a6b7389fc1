"""Imports run one way, and the parts that need no framework import none."""

import ast
import sys
from pathlib import Path

import pytest

import peft_lntune

PACKAGE = Path(peft_lntune.__file__).parent

# Rooms from the ground up; a room imports from itself and from those above it in this list. One line is one floor.
FLOORS = [
    {"errors", "version", "core"},
    {"architectures", "storage"},
    {"norms"},
    {"routing", "selection"},
    {"config", "analysis", "layers", "continuous"},
    {"planning"},
    {"tuner"},
    {"interop", "bank"},
    {"tasks", "plugin", "doctor", "recover"},
    {"__init__", "cli"},
]
# Neither PEFT nor transformers: usable, and testable, without.
BARE = {"errors", "version", "core", "architectures", "storage", "norms", "routing", "selection", "analysis"}
FRAMEWORKS = {"peft", "transformers", "accelerate"}


def room(module: str) -> str:
    """The room of `peft_lntune.<room>.<...>`; the package itself is the top one."""
    _, _, rest = module.partition(".")
    return rest.partition(".")[0] or "__init__"


def name_of(file: Path) -> str:
    return ".".join([PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def imported(source: str) -> set[str]:
    """Every module that a source imports, at its top or in a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports inside the package are written in full"
            found.add(node.module or "")
    return found


def problems(room_of_file: str, modules: set[str]) -> list[str]:
    """What is wrong with the imports of a file in this room."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    own = {room(module) for module in modules if module.partition(".")[0] == PACKAGE.name} - {room_of_file}
    wrong = [f"imports {name}" for name in sorted(own) if floor[name] > floor[room_of_file]]
    wrong += [f"imports {name}, its neighbour" for name in sorted(own) if floor[name] == floor[room_of_file] > 0]
    frameworks = {module.partition(".")[0] for module in modules} & FRAMEWORKS
    return wrong + [f"imports {name}" for name in sorted(frameworks) if room_of_file in BARE]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: name_of(file))
def test_imports_run_one_way(file: Path) -> None:
    assert problems(room(name_of(file)), imported(file.read_text())) == []


def test_every_room_has_its_floor() -> None:
    assert {room(name_of(file)) for file in FILES} == set().union(*FLOORS)


@pytest.mark.parametrize(
    ("room_of_file", "source", "wrong"),
    [
        ("core", "import peft", ["imports peft"]),
        ("core", "def f():\n    from transformers.utils import hub", ["imports transformers"]),
        ("core", "from peft_lntune.config import base", ["imports config"]),
        ("core", "import peft_lntune", ["imports __init__"]),
        ("tuner", "from peft_lntune.plugin import install", ["imports plugin"]),
        ("config", "from peft_lntune.layers import replacing", ["imports layers, its neighbour"]),
        ("plugin", "from peft import PeftModel\nfrom peft_lntune.tuner.model import LNTuneModel", []),
    ],
)
def test_the_check_itself(room_of_file: str, source: str, wrong: list[str]) -> None:
    assert problems(room_of_file, imported(source)) == wrong


def test_what_the_extras_bring_is_imported_in_functions() -> None:
    """So that nobody waits for matplotlib, or needs it, before something is drawn."""
    needed = {*FRAMEWORKS, "click", "huggingface_hub", "safetensors", "torch", "tqdm", PACKAGE.name}
    for file in FILES:
        at_the_top = [
            node for node in ast.parse(file.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        packages = {name.partition(".")[0] for node in at_the_top for name in imported(ast.unparse(node))}
        assert packages - sys.stdlib_module_names <= needed, name_of(file)


def test_nobody_imports_the_command_line() -> None:
    users = {name_of(file) for file in FILES if any(room(m) == "cli" for m in imported(file.read_text()))}
    assert {user for user in users if room(user) != "cli"} == set()


def test_only_the_package_itself_imports_the_plugin() -> None:
    users = {name_of(file) for file in FILES if any(room(m) == "plugin" for m in imported(file.read_text()))}
    assert {user for user in users if room(user) != "plugin"} == {PACKAGE.name}
