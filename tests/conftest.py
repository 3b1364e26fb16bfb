"""What several test files share."""

from pathlib import Path

import pytest

WORLD_SIZES = {"train": 48, "validation": 12, "test": 18}


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory) -> Path:
    """A small synthetic world: train 48, validation 12 and test 18 clips. Read it, never write into it."""
    from vmm.data import world

    folder = tmp_path_factory.mktemp("world")
    world.generate(folder, WORLD_SIZES)
    return folder
