"""The house stands as its map says: floors, tables, names, commands."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vmm"

# Folder or module → floor; a module imports lower floors, or its own folder.
FLOORS = {
    "errors": 0, "plugins": 0, "flags": 0, "progress": 0, "paths": 0, "mel": 0, "types": 0, "rules": 0, "sizes": 0, "foreign": 0, "told": 0, "build": 0, "settings": 0, "sharding": 0,
    "layers": 1, "losses": 1, "masking": 1, "pairing": 1, "augment": 1, "perturb": 1, "adapters": 1, "corrupt": 1, "data": 1,
    "encoders": 2, "fusion": 2, "objectives": 2, "training": 2, "evals": 2, "weights": 2,
    "model": 3, "config": 3, "experiment": 3, "run": 3,
    "train": 4, "verify": 4, "supervise": 4, "evaluate": 4, "suites": 4, "compare": 4, "similar": 4, "summarise": 4, "ablate": 4, "ablation": 4, "publish": 4, "publishing": 4, "average": 4, "ensemble": 4, "teachers": 4, "source": 4, "convert": 4, "report": 4, "bench": 4, "search": 4, "planning": 4, "__main__": 4, "__init__": 4,
}  # fmt: skip


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that the file imports, anywhere in it, by full name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path: Path):
    mine = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert mine in FLOORS, f"{mine} has no floor: give it one, and a line in the README's map"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "vmm" or len(parts) < 2 or parts[1] not in FLOORS:
            continue
        theirs = parts[1]
        lower = FLOORS[theirs] < FLOORS[mine]
        own = theirs == mine or FLOORS[mine] == FLOORS[theirs] in (0, 3, 4)
        data = mine == theirs == "data"
        assert lower or own or data, (
            f"{path.name} ({mine}) imports {name}: floor {FLOORS[theirs]} from floor {FLOORS[mine]}"
        )


def test_data_imports_no_jax():
    for path in (PACKAGE / "data").rglob("*.py"):
        assert not {name for name in imports(path) if name.split(".")[0] in ("jax", "flax", "optax")}, path


def test_configs_import_nothing_of_vmm():
    for path in (ROOT / "configs").glob("*.py"):
        assert not {name for name in imports(path) if name.split(".")[0] in ("vmm", "jax", "flax")}, path


def test_nothing_is_unpickled():
    for path in [*modules(), *ROOT.glob("configs/*.py"), *ROOT.glob("experiments/**/*.py")]:
        assert not {
            name
            for name in imports(path)
            if name.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
        }, path
        assert "allow_pickle=True" not in path.read_text(), path


def test_readme_map_names_what_is_there():
    text = (ROOT / "README.md").read_text()
    block = re.search(r"```text\n(.*?)```", text, re.S).group(1)
    named = set(re.findall(r"[\w./]+\.py\b|[\w]+/", block))
    for path in modules():
        relative = path.relative_to(PACKAGE)
        if len(relative.parts) == 1:
            assert relative.name in named, f"vmm/{relative} is not in the README's map"
        else:
            assert f"{relative.parts[0]}/" in named
            assert relative.name == "__init__.py" or relative.name in named, (
                f"vmm/{relative} is not in the README's map"
            )
    for name in named:
        places = [ROOT, PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]
        assert any((place / name).exists() for place in places), f"the README's map names {name}, which is not there"


def test_readme_commands_parse():
    from vmm.__main__ import _parser

    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^(?:\$ )?vmm (.+?)(?:\s+#.*)?$", text, re.M)
    assert len(commands) >= 5
    for command in commands:
        _parser().parse_known_args(command.split())


def test_make_targets_of_readme_exist():
    text, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", text, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), (
            f"the README says `make {target}`, the Makefile has no such target"
        )


def test_help_does_not_import_jax():
    code = "import sys; sys.argv = ['vmm', '--help']\nimport vmm.__main__ as m\ntry: m.main()\nexcept SystemExit: pass\nassert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_no_path_of_a_machine():
    for path in [
        *modules(),
        *ROOT.glob("*.md"),
        *ROOT.glob("configs/*.py"),
        *ROOT.glob("tests/*.py"),
        ROOT / "Makefile",
    ]:
        found = re.findall(r"(?<![\w.])/(?:work|farm|root|home)/\w+", path.read_text())
        assert not found, f"{path.name}: {found}"
