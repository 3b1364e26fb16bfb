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
    "session": 4, "show_config": 4, "testing": 4, "train": 4, "verify": 4, "supervise": 4, "evaluate": 4, "suites": 4, "compare": 4, "similar": 4, "summarise": 4, "ablate": 4, "ablation": 4, "publish": 4, "publishing": 4, "average": 4, "ensemble": 4, "teachers": 4, "source": 4, "convert": 4, "report": 4, "bench": 4, "search": 4, "planning": 4, "__main__": 4, "__init__": 4,
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


def _kinds() -> dict[str, dict[str, type]]:
    from vmm.encoders import ENCODERS
    from vmm.evals import EVALS
    from vmm.fusion import FUSIONS
    from vmm.objectives import OBJECTIVES

    return {"encoders": ENCODERS, "evals": EVALS, "fusion": FUSIONS, "objectives": OBJECTIVES}


def _mentions_kind(node: ast.expr) -> bool:
    """Whether an expression reads a spec's kind: kind, spec["kind"], spec.get("kind")."""
    return any(
        (isinstance(part, ast.Name) and part.id == "kind") or (isinstance(part, ast.Constant) and part.value == "kind")
        for part in ast.walk(node)
    )


def _named_kinds(tree: ast.Module, folder: str, kinds: set[str], classes: set[str]) -> set[str]:
    """Kinds that a module compares with or looks up, and classes of kinds that it imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and _mentions_kind(node):
            found |= {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and part.value in kinds}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith(f"vmm.{folder}"):
            found |= {alias.name for alias in node.names} & classes
        elif isinstance(node, ast.Attribute) and node.attr in classes and getattr(node.value, "id", "") == folder:
            found.add(node.attr)
    return found


@pytest.mark.parametrize("folder", ["encoders", "evals", "fusion", "objectives"])
def test_no_one_else_names_a_kind(folder: str):
    """Each kind declares itself; its table alone knows it."""
    table = _kinds()[folder]
    # Encoders are named as their modalities, which are kinds of much else.
    kinds, classes = set(table) if folder != "encoders" else set(), {cls.__name__ for cls in table.values()}
    for path in modules():
        mine = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        # Lower floors have other kinds of the same names; a family of weights names what it is made of.
        if mine not in (folder, "weights") and FLOORS[mine] >= FLOORS[folder]:
            found = _named_kinds(ast.parse(path.read_text()), folder, kinds, classes)
            assert not found, f"{path.relative_to(PACKAGE)}: {found}"


def test_naming_a_kind_is_seen():
    for code in (
        'spec["kind"] == "masked"', 'spec.get("kind") in ("a", "masked")', "objectives.Masked",
        "from vmm.objectives.masked import Masked", "from vmm.objectives import Masked",
    ):  # fmt: skip
        assert _named_kinds(ast.parse(code), "objectives", {"masked"}, {"Masked"}), code
    for code in ('view == "masked"', "from vmm.other import Masked"):
        assert not _named_kinds(ast.parse(code), "objectives", {"masked"}, {"Masked"}), code


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
