"""Kernels of attention against plain attention: values, gradients, what they are chosen for, what they count for."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from vmm import sharding
from vmm.layers import kernels
from vmm.layers.attention import attention
from vmm.planning.topology import libtpu_folder
from vmm.sharding import MeshShape, make_mesh
from vmm.training.metrics import count_flops

BATCH, QUERIES, KEYS, HEADS, WIDTH = 4, 200, 300, 2, 64


@pytest.fixture(scope="module")
def arrays():
    """Query, key, value, valid (holes anywhere, one sample without any), and a weight of every output."""
    random = np.random.default_rng(0)
    q, k, v, weight = (
        jnp.asarray(random.normal(size=(BATCH, count, HEADS, WIDTH)), jnp.float32)
        for count in (QUERIES, KEYS, KEYS, QUERIES)
    )
    valid = jnp.asarray(random.random((BATCH, KEYS)) < 0.7).at[1].set(False).at[2].set(True)
    return q, k, v, valid, weight


def value_and_gradients(function, arrays):
    q, k, v, valid, weight = arrays
    return jax.jit(jax.value_and_grad(lambda q, k, v: (function(q, k, v, valid) * weight).sum(), argnums=(0, 1, 2)))(q, k, v)  # fmt: skip


def plain(query, key, value, valid):
    logits = jnp.einsum("bqad,bkad->baqk", query, key) / WIDTH**0.5
    seen = valid[:, None, None, :]
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1) * seen.any(-1, keepdims=True)
    return jnp.einsum("baqk,bkad->bqad", weights, value)


@pytest.fixture(scope="module")
def expected(arrays):
    return value_and_gradients(plain, arrays)


def same(found, expected):
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    for ours, theirs in zip(found[1], expected[1]):
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * float(jnp.abs(theirs).max()) + 1e-6)


def test_splash_attention_is_attention(arrays, expected):
    same(value_and_gradients(lambda *given: kernels.fused("splash", *given, interpret=True), arrays), expected)


def test_keys_moved_to_the_front_change_nothing(arrays, expected):
    """What cuDNN is given, computed by XLA: valid keys first, and their number."""

    def function(q, k, v, valid):
        return kernels._cudnn(q, k, v, valid, "xla") * valid.any(-1)[:, None, None, None]

    same(value_and_gradients(function, arrays), expected)
    q, k, v, _, weight = arrays
    prefix = jnp.arange(KEYS)[None] < jnp.asarray([300, 7, 1, 0])[:, None]
    arrays = q, k, v, prefix, weight
    same(value_and_gradients(function, arrays), value_and_gradients(plain, arrays))


def test_kernels_split_over_a_mesh(arrays, expected):
    """Clips over data, heads over tensor, queries over sequence: the partitioner is told, and the numbers stay."""
    mesh = make_mesh(MeshShape(2, 1, 2, 2), jax.devices()[:8])
    with jax.set_mesh(mesh):
        same(value_and_gradients(lambda *given: kernels.fused("splash", *given, interpret=True), arrays), expected)


@pytest.mark.parametrize(
    ("where", "dtype", "queries", "mask", "cap", "kind"),
    [
        ("gpu", "bfloat16", 16, None, 0.0, "cudnn"),
        ("gpu", "float32", 2048, None, 0.0, "xla"),
        ("gpu", "bfloat16", 2048, True, 0.0, "xla"),
        ("gpu", "bfloat16", 2048, None, 30.0, "xla"),
        ("tpu", "bfloat16", 2048, None, 0.0, "splash"),
        ("tpu", "bfloat16", 160, None, 0.0, "xla"),
        ("cpu", "float32", 2048, None, 0.0, "chunked"),
        ("cpu", "float32", 16, None, 0.0, "xla"),
    ],
)
def test_what_is_chosen(where, dtype, queries, mask, cap, kind, monkeypatch):
    monkeypatch.setattr(kernels, "platform", lambda: where)
    monkeypatch.setattr(kernels, "on_one_cpu", lambda: where == "cpu")
    x = jnp.zeros((1, queries, 2, 64), dtype)
    assert kernels.choose(x, x, mask, cap) == kind


def test_platform_is_that_of_the_mesh(monkeypatch):
    """What is traced for a mesh is chosen for its devices, whatever the default backend is."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert sharding.platform() == "tpu"
    with jax.set_mesh(make_mesh(MeshShape(8))):
        assert sharding.platform() == "cpu"


def test_a_kernel_counts_as_the_products_it_stands_for(arrays):
    """Forward 2 products, backward 4, of what is padded to whole tiles; on a mesh those of all devices."""
    q, k, v, valid, _ = arrays
    padded = 2 * BATCH * HEADS * WIDTH * 256 * 384
    forward = jax.jit(lambda q, k, v: kernels.fused("splash", q, k, v, valid, interpret=True).sum())
    backward = jax.jit(jax.grad(lambda q, k, v: forward(q, k, v), argnums=(0, 1, 2)))
    assert count_flops(forward, q, k, v) == 2 * padded
    assert count_flops(backward, q, k, v) == pytest.approx(6 * padded, rel=1e-3)  # and a sum over the width
    with jax.set_mesh(make_mesh(MeshShape(2, 1, 2, 1), jax.devices()[:4])):
        again = jax.jit(lambda q, k, v: kernels.fused("splash", q, k, v, valid, interpret=True).sum())
        assert count_flops(again, q, k, v) == 2 * padded


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("width", [64, 128])
def test_cudnn_attention_is_attention(width):
    random = np.random.default_rng(1)
    q, k, v = (jnp.asarray(random.normal(size=(4, n, 2, width)), jnp.bfloat16) for n in (200, 301, 301))
    valid = jnp.asarray(random.random((4, 301)) < 0.7).at[1].set(False)
    assert kernels.choose(q, k, None, 0.0) == "cudnn"
    found = jax.jit(jax.grad(lambda *given: attention(*given, valid).astype(jnp.float32).sum(), argnums=(0, 1, 2)))
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    for ours, theirs in zip(found(q, k, v), found(*wide)):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=0.03 * float(jnp.abs(theirs).max()))


ELSEWHERE = """
from vmm.planning import topology
from vmm.planning.chips import parse_device
target = parse_device("v5e-8")
topology.prepare(target)
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from vmm.layers.attention import attention
from vmm.sharding import MeshShape, make_mesh
mesh = make_mesh(MeshShape(2, 2, 1, 2), topology.devices(target))
with jax.set_mesh(mesh):
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((8, 1568, 2, 64), jnp.bfloat16, sharding=place)
    valid = jax.ShapeDtypeStruct((8, 1568), bool, sharding=place)
    function = lambda *given: attention(*given).astype(jnp.float32).sum()
    text = jax.jit(jax.grad(function, argnums=(0, 1, 2))).lower(x, x, x, valid).compile().as_text()
print(text.count('custom_call_target="tpu_custom_call"'))
"""


@pytest.mark.skipif(libtpu_folder() is None, reason="libtpu is not installed: make libtpu")
def test_a_tpus_compiler_takes_the_kernel():
    """Three kernels, forward and backward, on a mesh that splits queries too, for a slice that is not there."""
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"
