"""Shipped recipes are what tests/golden/ says: configs and losses here, parameters where test_configs.py traces them."""

import json

import numpy as np
import pytest
from golden import record

from vmm.build import differences
from vmm.config import full

LOSSES = record.read("losses")


def test_configs_are_the_recorded_ones():
    found = differences(json.loads(json.dumps(record.configs())), record.read("configs"))
    assert not found, "\n".join([*found, "if that is meant: python tests/golden/record.py configs"])


def test_a_full_config_is_full():
    """Filling in what is filled in changes nothing, and the defaults are those of the parts."""
    config = record.config("demo.py:small")
    assert json.loads(json.dumps(full(config))) == config
    assert config["optim"]["b2"] == 0.95 and config["trunk"]["encoders"]["video"]["ratio"] == 4.0
    assert config["data"]["augment"]["mixup"] == {}  # there is none, not one of defaults


def losses_cases():
    """Labels, a teacher and a sigmoid in the small suite; the others compile much of the same."""
    for name in record.TRAINED:
        small = name.startswith(("pretrain_mbt", "pretrain_vjepa2", "pretrain_siglip"))
        yield name if small else pytest.param(name, marks=pytest.mark.exhaustive("more recipes of the same parts"))


@pytest.mark.parametrize("name", losses_cases())
def test_first_losses_are_the_recorded_ones(name: str):
    """To what other versions of XLA and other numbers of cores round differently."""
    np.testing.assert_allclose(record.losses_of(name), LOSSES[name], rtol=2e-3)
