"""`python tests/support/own.py [FILE …]`: prints the test files that speak of files of vmm, for `make check`.

Without files: those that git says are changed. A module's own tests are `test_NAME.py` of its name or of its folder's;
where there is none, the three test files that import most of it.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TESTS = ROOT / "tests"
MOST = 3


def changed() -> list[str]:
    """Returns the files that differ from the last commit, those that git does not know among them."""
    lines = subprocess.run(
        ["git", "status", "--porcelain", "--no-renames", "-uall"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [line[3:] for line in lines.splitlines()]


def own_tests(file: str) -> list[str]:
    """Returns the names of the test files of one file, "" where it has none."""
    path = Path(file)
    if path.parts[0] == "tests":
        return [path.name] if path.name.startswith("test_") else []
    if path.parts[0] == "configs":
        return ["test_configs.py"]
    if path.parts[0] != "vmm" or path.suffix != ".py":
        return []
    for name in (path.stem, path.parent.name):
        if (TESTS / f"test_{name}.py").exists():
            return [f"test_{name}.py"]
    module = ".".join(path.with_suffix("").parts)
    words = rf"\b{re.escape(module)}\b|from {re.escape(module.rpartition('.')[0])} import .*\b{path.stem}\b"
    counts = {test.name: len(re.findall(words, test.read_text())) for test in TESTS.glob("test_*.py")}
    return sorted((name for name, count in counts.items() if count), key=lambda name: -counts[name])[:MOST]


def main(files: list[str]) -> None:
    names = {name for file in files or changed() for name in own_tests(file)}
    print(" ".join(f"tests/{name}" for name in sorted(names) if (TESTS / name).exists()))


if __name__ == "__main__":
    main(sys.argv[1:])
