import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "treelora_ray" / "core"
MODULES = sorted(path.stem for path in CORE.glob("*.py") if path.stem != "__init__")


def imported(path: Path) -> Iterator[str]:
    """Full names of all modules a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively: write the full name"
            assert node.module is not None
            yield node.module


def modules_of_the_table() -> list[str]:
    """The files of core in the order of the architecture page."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.split("### core, file by file")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)\.py` \|", section, re.MULTILINE)


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_core_imports_torch_numpy_scipy_the_standard_library_and_itself_only(module: str) -> None:
    foreign = {
        name
        for name in imported(CORE / f"{module}.py")
        if name.split(".")[0] not in {"torch", "numpy", "scipy", *sys.stdlib_module_names}
        and not name.startswith("treelora_ray.core")
    }
    assert not foreign


def test_the_architecture_page_lists_every_module_of_core() -> None:
    assert sorted(modules_of_the_table()) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_core_imports_only_those_listed_above_it(module: str) -> None:
    listed = modules_of_the_table()
    allowed = {f"treelora_ray.core.{name}" for name in listed[: listed.index(module)]}
    own = {name for name in imported(CORE / f"{module}.py") if name.startswith("treelora_ray")}
    assert own <= allowed


def test_importing_core_in_a_fresh_process_brings_no_heavy_library() -> None:
    code = (
        "import sys, treelora_ray.core\n"
        "heavy = {'ray', 'mlflow', 'transformers', 'matplotlib', 'peft', 'rapidfuzz', 'rouge_score', 'nltk'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


ORDER = {  # a room may import those listed with it, and core, config, files and store
    "data": {"objectives.scores"},
    "models": {"data"},
    "objectives": {"models", "data"},
    "methods": {"objectives", "models", "data"},
    "training": {"methods", "objectives", "models", "data"},
}


@pytest.mark.parametrize("room", list(ORDER))
def test_rooms_import_only_those_before_them(room: str) -> None:
    allowed = {"core", "config", "files", "store", room, *(name.split(".")[0] for name in ORDER[room])}
    for path in (ROOT / "treelora_ray" / room).glob("*.py"):
        own = {name.split(".")[1] for name in imported(path) if name.startswith("treelora_ray.")}
        assert own <= allowed, path.name


def test_importing_training_brings_neither_ray_nor_mlflow() -> None:
    code = (
        "import sys, treelora_ray.api\n"
        "print(sorted({'ray', 'mlflow', 'matplotlib'} & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
