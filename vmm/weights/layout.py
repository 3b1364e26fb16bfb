"""How tensors of two layouts correspond: rules that can be read in both directions.

Ours are parameter paths with dots, loops of layers written out (`layer_0`, `layer_1`, …); theirs are names in a
published file. A rule turns some tensors of theirs into some of ours, and back.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from vmm.errors import UserError


class Rule(NamedTuple):
    """theirs, ours: names. load: (their arrays) → our arrays. save: (our arrays) → their arrays."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    load: Callable[..., tuple]
    save: Callable[..., tuple]


def same(theirs: str, ours: str) -> Rule:
    """One tensor, as it is."""
    return Rule((theirs,), (ours,), lambda x: (x,), lambda x: (x,))


def reshaped(theirs: str, ours: str, shape_theirs: tuple[int, ...], shape_ours: tuple[int, ...]) -> Rule:
    """One tensor, the same numbers in the same order."""
    return Rule((theirs,), (ours,), lambda x: (x.reshape(shape_ours),), lambda x: (x.reshape(shape_theirs),))


def scaled(theirs: str, ours: str, factor: float) -> Rule:
    """ours = theirs · factor, in float32."""
    factor = np.float32(factor)
    return Rule((theirs,), (ours,), lambda x: (x * factor,), lambda x: (x / factor,))


def zeros(ours: str, *shape: int, matters: bool = True) -> Rule:
    """A parameter of ours that their layout lacks, and is zero there.

    matters: writing theirs needs it to be zero still; False: its value changes no output (a key's bias: softmax
    does not see what is added to all logits of a query).
    """

    def save(x):
        if matters and np.abs(x).max(initial=0) > 0:
            raise UserError(f"export: {ours} is not zero, and this layout has no place for it")
        return ()

    return Rule((), (ours,), lambda: (np.zeros(shape, np.float32),), save)


def absent(theirs: str, array: np.ndarray) -> Rule:
    """A tensor of theirs that ours lacks, since it is always this."""
    return Rule((theirs,), (), lambda x: (), lambda: (array,))


def class_token(
    token: str,
    positions: str,
    encoder: str,
    grid: tuple[int, ...],
    width: int,
    table: str = "table",
    batched: bool = True,
) -> Rule:
    """A class token [1 1 D] and positions [1 1+N D], the first its own ↔ the encoder's one register, the sum of both,
    and its learned table over the grid. Written back, the token is the sum and its position zero.

    table: its name among layers.Positions' parameters. batched: False where theirs are [D] and [1+N D].
    """

    def load(token, positions):
        rows = positions.reshape(-1, width)
        return token.reshape(1, width) + rows[:1], rows[1:].reshape(*grid, width)

    def save(register, table):
        rows = np.concatenate([np.zeros_like(register), table.reshape(-1, width)])
        return (register[None], rows[None]) if batched else (register[0], rows)

    return Rule((token, positions), (f"{encoder}.registers", f"{encoder}.positions.{table}"), load, save)


def norm(theirs: str, ours: str) -> list[Rule]:
    """Layer norm: weight, bias ↔ scale, bias."""
    return [same(f"{theirs}.weight", f"{ours}.scale"), same(f"{theirs}.bias", f"{ours}.bias")]


def linear(theirs: str, ours: str, bias: bool = True) -> list[Rule]:
    """Linear [O I] ↔ Dense [I O]. bias: whether both have one."""
    kernel = Rule((f"{theirs}.weight",), (f"{ours}.kernel",), lambda w: (w.T,), lambda k: (k.T,))
    return [kernel, same(f"{theirs}.bias", f"{ours}.bias")] if bias else [kernel]


def into_heads(weight: str, bias: str | None, ours: str, heads: int) -> list[Rule]:
    """Linear [(A d) D] ↔ Dense [D A d]. weight, bias: names of theirs; ours always has a bias, without one of theirs
    see `zeros`."""
    kernel = Rule(
        (weight,),
        (f"{ours}.kernel",),
        lambda w: (w.T.reshape(w.shape[1], heads, -1),),
        lambda k: (k.reshape(k.shape[0], -1).T,),
    )
    if bias is None:
        return [kernel]
    return [
        kernel,
        Rule((bias,), (f"{ours}.bias",), lambda b: (b.reshape(heads, -1),), lambda b: (b.reshape(-1),)),
    ]


def out_of_heads(theirs: str, ours: str, heads: int) -> list[Rule]:
    """Linear [D (A d)] with bias ↔ Dense [A d D]."""
    kernel = Rule(
        (f"{theirs}.weight",),
        (f"{ours}.kernel",),
        lambda w: (w.T.reshape(heads, -1, w.shape[0]),),
        lambda k: (k.reshape(-1, k.shape[-1]).T,),
    )
    return [kernel, same(f"{theirs}.bias", f"{ours}.bias")]


def attention(theirs: Mapping[str, str], ours: str, width: int, heads: int, biases: str) -> list[Rule]:
    """Attention. theirs: query, key, value, out → name of a Linear. biases: which of the first three have one there;
    where it is not called `<name>.bias`, theirs names it under query_bias, key_bias or value_bias."""
    rules = out_of_heads(theirs["out"], f"{ours}.out", heads)
    for part in ("query", "key", "value"):
        has = part in biases.split()
        bias = theirs.get(f"{part}_bias", f"{theirs[part]}.bias") if has else None
        rules += into_heads(f"{theirs[part]}.weight", bias, f"{ours}.{part}", heads)
        if not has:
            rules.append(zeros(f"{ours}.{part}.bias", heads, width // heads, matters=part != "key"))
    return rules


def fused_attention(qkv: str, out: str, ours: str, heads: int) -> list[Rule]:
    """Attention whose query, key and value stand in one Linear [(3 A d) D] (`qkv`), or one in_proj of PyTorch's."""
    names = [f"{ours}.{part}" for part in ("query", "key", "value")]

    def load_kernel(w):
        return tuple(part.T.reshape(w.shape[1], heads, -1) for part in np.split(w, 3))

    def save_kernel(*parts):
        return (np.concatenate([part.reshape(part.shape[0], -1).T for part in parts]),)

    weight, bias = ("_weight", "_bias") if qkv.endswith("in_proj") else (".weight", ".bias")
    return [
        Rule((qkv + weight,), tuple(f"{name}.kernel" for name in names), load_kernel, save_kernel),
        Rule(
            (qkv + bias,),
            tuple(f"{name}.bias" for name in names),
            lambda b: tuple(part.reshape(heads, -1) for part in np.split(b, 3)),
            lambda *parts: (np.concatenate([part.reshape(-1) for part in parts]),),
        ),
        *out_of_heads(out, f"{ours}.out", heads),
    ]


def patching(theirs: str, ours: str, patch: tuple[int, ...], channels: int = 3, bias: bool = True) -> list[Rule]:
    """Convolution over its own patches [O C *patch] ↔ Dense [(*patch C) O]: a tubelet's values in a row, colours last."""
    axes = len(patch)

    def load(w):
        return (w.transpose(*range(2, 2 + axes), 1, 0).reshape(-1, w.shape[0]),)

    def save(kernel):
        w = kernel.reshape(*patch, channels, kernel.shape[-1])
        return (w.transpose(axes + 1, axes, *range(axes)),)

    rules = [Rule((f"{theirs}.weight",), (f"{ours}.kernel",), load, save)]
    return [*rules, same(f"{theirs}.bias", f"{ours}.bias")] if bias else rules


def block(theirs: Mapping[str, str], ours: str, width: int, heads: int, biases: str = "query key value") -> list[Rule]:
    """A Transformer block. theirs: norm_attention, query, key, value, out, norm_mlp, up, down → name."""
    return [
        *norm(theirs["norm_attention"], f"{ours}.norm_attention"),
        *attention(theirs, f"{ours}.attention", width, heads, biases),
        *norm(theirs["norm_mlp"], f"{ours}.norm_mlp"),
        *linear(theirs["up"], f"{ours}.mlp.up"),
        *linear(theirs["down"], f"{ours}.mlp.down"),
    ]


def check_values(value: np.ndarray, where: str) -> None:
    """Raises UserError: whole numbers, which quantized weights are without their scales, or values that are not finite."""
    if not np.issubdtype(np.asarray(value).dtype, np.inexact) and value.dtype.name not in ("bfloat16", "float16"):
        raise UserError(f"{where} is of {value.dtype}: quantized weights are not read; give the model in floats")
    if not np.isfinite(np.asarray(value, np.float32)).all():
        raise UserError(f"{where} holds values that are not finite; the file is broken")


def beyond(rules: Iterable[Rule], left: Iterable[str]) -> str | None:
    """Returns the first tensor that is left over and is of a further layer of those that are read; None: none is."""
    known = {re.sub(r"\d+", "#", name) for rule in rules for name in rule.theirs if re.search(r"\d", name)}
    return next((name for name in left if re.sub(r"\d+", "#", name) in known), None)


def load(rules: Iterable[Rule], theirs: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns (our tensors in float32, the names of theirs that no rule reads).

    Raises:
      UserError: a tensor that a rule reads is not there, is quantized or not finite, or has a shape that does not go
        together with the config.
    """
    ours, left = {}, set(theirs)
    for rule in rules:
        missing = [name for name in rule.theirs if name not in theirs]
        if missing:
            raise UserError(f"weights: the file has no tensor {missing[0]!r}, which its config.json asks for")
        left -= set(rule.theirs)
        for name in rule.theirs:
            check_values(theirs[name], f"weights: {name}")
        try:
            arrays = rule.load(*(np.asarray(theirs[name], np.float32) for name in rule.theirs))
        except ValueError as error:
            shapes = ", ".join(f"{name} {theirs[name].shape}" for name in rule.theirs)
            raise UserError(f"weights: {shapes} does not fit config.json ({error})") from None
        ours |= dict(zip(rule.ours, arrays, strict=True))
    return ours, sorted(left)


def save(rules: Iterable[Rule], ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns their tensors: the same rules, read the other way.

    Raises:
      UserError: ours lacks a parameter, or has one that they have no place for.
    """
    theirs, left = {}, set(ours)
    for rule in rules:
        missing = [name for name in rule.ours if name not in ours]
        if missing:
            raise UserError(f"export: the model has no parameter {missing[0]!r}, which this layout asks for")
        left -= set(rule.ours)
        arrays = rule.save(*(np.asarray(ours[name], np.float32) for name in rule.ours))
        theirs |= {name: np.asarray(array, order="C") for name, array in zip(rule.theirs, arrays, strict=True)}
    if left:
        raise UserError(f"export: this layout has no place for {len(left)} parameters, the first {sorted(left)[0]!r}")
    return theirs
