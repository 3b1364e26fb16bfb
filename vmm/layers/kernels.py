"""Which program computes attention on which platform: the one place where that is chosen.

cuDNN's fused attention on NVIDIA GPUs in half precision; Pallas' splash attention on TPUs where sequences are long; chunks
(chunks.py) on one CPU device; XLA elsewhere, and wherever a mask or a cap is in the way of the others.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmm.layers.dense import on_one_cpu
from vmm.sharding import partition, platform

_LONG = 1024 * 1024  # logits a head from which splash attention saves more than its padding costs
_TILE = 128  # rows and columns of a TPU's matrix unit
_LANES = 2048  # keys of a splash block at most: with 512 queries 4 MB of float32 logits


def choose(query: Float[Array, "B Q A d"], key: Float[Array, "B K A d"], mask, cap: float) -> str:
    """Returns "cudnn", "splash", "chunked" or "xla" for what is traced now.

    Of arrays' shapes, types and the platform of the mesh that is set alone, so that a program compiled for devices that
    are not there is the one that runs on them.
    """
    logits, width, where = query.shape[1] * key.shape[1], query.shape[-1], platform()
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    plain = mask is None and not cap
    if where == "gpu" and half and plain and width % 8 == 0 and width <= 128 and _ampere():
        return "cudnn"
    if where == "tpu" and plain and logits >= _LONG and width % 64 == 0:
        return "splash"
    if on_one_cpu() and logits >= 128 * 128:
        return "chunked"
    return "xla"


def _ampere() -> bool:
    """Whether cuDNN's kernel runs on the GPUs: those of compute capability 8.0 on. One compiled for from elsewhere is."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return capability is None or float(capability) >= 8.0


def fused(
    kind: str,
    query: Float[Array, "B Q A d"],
    key: Float[Array, "B K A d"],
    value: Float[Array, "B K A d"],
    valid: Bool[Array, "B K"],
    interpret: bool = False,
) -> Float[Array, "B Q A d"]:
    """attention.attention by the kernel "cudnn" or "splash", each device of the mesh its clips, heads and queries.

    A sample without a valid key gets zeros. interpret: splash attention without a TPU, for tests.
    """
    kernel = _cudnn if kind == "cudnn" else functools.partial(_splash, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        # Kernels are opaque to the partitioner: told how they are split, it gathers nothing but keys and values.
        of_queries = partition(("batch", "tokens", "heads", None), query.shape, mesh)
        of_keys = partition(("batch", None, "heads", None), key.shape, mesh)
        of_valid = partition(("batch", None), valid.shape, mesh)
        kernel = jax.shard_map(
            kernel, in_specs=(of_queries, of_keys, of_keys, of_valid), out_specs=of_queries, check_vma=False
        )
    mixed = kernel(query, key, value, valid)
    return jnp.where(valid.any(-1)[:, None, None, None], mixed, 0)


def _cudnn(query, key, value, valid, implementation: str = "cudnn"):
    """cuDNN skips keys beyond a length, at a fraction of the cost of a mask; attention does not mind the order of keys."""
    counts = valid.sum(-1, dtype=jnp.int32)
    in_front = valid == (jnp.arange(valid.shape[1]) < counts[:, None])

    def to_the_front(key, value):
        order = jnp.argsort(~valid, axis=1, stable=True)[..., None, None]
        return jnp.take_along_axis(key, order, axis=1), jnp.take_along_axis(value, order, axis=1)

    key, value = jax.lax.cond(in_front.all(), lambda *both: both, to_the_front, key, value)
    lengths = jnp.maximum(counts, 1)
    return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, implementation=implementation)


def _splash(query, key, value, valid, interpret: bool = False):
    """Queries and keys are padded to whole tiles; what is padded or not valid is another segment, which nothing sees."""
    # Pallas takes long to import, and is for TPUs alone.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    queries, keys, heads, width = query.shape[1], key.shape[1], query.shape[2], query.shape[-1]
    block_keys = _block(keys, _LANES)
    block_queries = _block(queries, (1 << 20) // max(block_keys, 1024))
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % _TILE), (0, 0), (0, 0))).swapaxes(1, 2) for x in (query, key, value)
    )
    sizes = splash.BlockSizes(
        block_q=block_queries, block_kv=block_keys, block_kv_compute=block_keys,
        block_q_dkv=block_queries, block_kv_dkv=block_keys, block_kv_dkv_compute=block_keys,
        block_q_dq=block_queries, block_kv_dq=block_keys,
    )  # fmt: skip
    everything = splash_mask.MultiHeadMask([splash_mask.FullMask((q.shape[2], k.shape[2]))] * heads)
    kernel = splash.make_splash_mha(everything, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    seen = jnp.pad(valid, ((0, 0), (0, k.shape[2] - keys))).astype(jnp.int32)
    segments = splash.SegmentIds(jnp.ones((len(query), q.shape[2]), jnp.int32), seen)
    scale = jnp.asarray(width**-0.5, query.dtype)
    mixed = jax.vmap(kernel)(q * scale, k, v, segments)
    return mixed.swapaxes(1, 2)[:, :queries].astype(query.dtype)


def _block(count: int, most: int) -> int:
    """Returns the largest part of `count`, filled up to whole tiles, that is whole tiles itself and at most `most`."""
    tiles = math.ceil(count / _TILE)
    return _TILE * max(size for size in range(1, tiles + 1) if tiles % size == 0 and size * _TILE <= max(most, _TILE))


# Part of a primitive's or kernel's name → products of Q K d multiply-adds that the model asks of it: what a kernel computes a
# second time does not count.
_PRODUCTS = {
    "dot_product_attention_fwd": 2,
    "dot_product_attention_bwd": 4,
    "splash_mha_fwd": 2,
    "splash_mha_dkv": 3,
    "splash_mha_dq": 1,
}


def attention_flops(equation) -> int | None:
    """Returns the FLOPs of one call of a kernel of attention in a jaxpr, None for any other equation."""
    name = str(equation.params.get("name", "")) if equation.primitive.name == "pallas_call" else equation.primitive.name
    products = next((count for part, count in _PRODUCTS.items() if part in name), None)
    if products is None:
        return None
    query, key = [value.aval.shape for value in equation.invars if value.aval.ndim >= 4][:2]
    keys = key[-2] if "splash" in name else key[-3]
    return 2 * products * math.prod(query) * keys
