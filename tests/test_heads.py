"""Tags, numbers and identities: the heads' arithmetic, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layers import parameters

from vmm import losses
from vmm.errors import UserError
from vmm.objectives.classify import Classify
from vmm.objectives.identify import Identify, margin_logits
from vmm.objectives.line import TimeLine
from vmm.objectives.moments import Moments
from vmm.objectives.regress import Regress
from vmm.types import Batch, Mixed, Outputs, Patches, Tokens

ROWS, D = 4, 6


def view(seed: int = 0, **batch) -> tuple[Outputs, Batch]:
    """Two streams of three tokens; the last row has no audio."""
    rng = np.random.default_rng(seed)
    streams = {}
    for name in ("video", "audio"):
        there = np.ones((ROWS, 3), bool)
        there[-1] = name == "video"
        x = rng.normal(size=(ROWS, 3, D)).astype(np.float32) * there[..., None]
        at = np.tile(np.arange(3, dtype=np.int32), (ROWS, 1))
        streams[name] = Tokens(jnp.asarray(x), jnp.asarray(there), jnp.asarray(at))
    fields = dict(inputs={}, present={}, labels={}, index=jnp.arange(ROWS), valid=jnp.ones(ROWS, bool)) | batch
    return Outputs(streams, streams, {}, {}), Batch(**fields)


def test_tags_are_told_one_by_one():
    truth = np.array([[1, 0, 1], [0, 0, 0], [-1, -1, -1], [1, 1, 0]], np.int32)
    outputs, batch = view(labels={"tags": jnp.asarray(truth)})
    module = Classify({"tags": 3}, smoothing=0.2)
    params = {"params": parameters(module, outputs, batch)}
    logits = np.asarray(module.apply(params, outputs, batch, method="predict")["tags"], np.float64)
    loss, metrics = module.apply(params, outputs, batch)
    chance, soft = 1 / (1 + np.exp(-logits)), 0.8 * truth + 0.1
    error = -(soft * np.log(chance) + (1 - soft) * np.log(1 - chance)).mean(1)
    known = [0, 1, 3]
    assert float(loss) == pytest.approx(error[known].mean(), rel=1e-5)
    right = ((logits > 0) == (truth > 0)).mean(1)
    assert float(metrics["tags/accuracy"]) == pytest.approx(right[known].mean(), rel=1e-6)


def test_mixed_tags_are_weighed_by_their_share():
    truth = np.array([[1, 0], [0, 1], [1, 1], [-1, -1]], np.int32)
    others, share = truth[::-1][:, None], np.array([[0.25], [0.5], [0.0], [0.1]], np.float32)
    mixed = Mixed({"tags": jnp.asarray(others)}, jnp.asarray(share))
    outputs, batch = view(labels={"tags": jnp.asarray(truth)}, mixed=mixed)
    module = Classify({"tags": 2})
    params = {"params": parameters(module, outputs, batch)}
    logits = np.asarray(module.apply(params, outputs, batch, method="predict")["tags"], np.float64)
    got = module.apply(params, outputs, batch, method="features")["tags"]
    # Row 0's partner has no tags, row 3 itself has none; row 2 is not mixed.
    assert got["weight"].tolist() == [0, 1, 1, 0]

    def error(z, t):
        return -(t * np.log(1 / (1 + np.exp(-z))) + (1 - t) * np.log(1 / (1 + np.exp(z)))).mean(-1)

    assert float(got["error"][1]) == pytest.approx(
        0.5 * error(logits[1], truth[1]) + 0.5 * error(logits[1], truth[2]), rel=1e-5
    )
    assert float(got["error"][2]) == pytest.approx(error(logits[2], truth[2]), rel=1e-5)


def test_binary_cross_entropy_is_finite_far_out():
    z = jnp.array([-200.0, 200.0, 0.0])
    value, slope = jax.vmap(jax.value_and_grad(losses.binary_cross_entropy))(z, jnp.array([1.0, 1.0, 0.25]))
    assert value.tolist() == pytest.approx([200.0, 0.0, np.log(2)])
    assert slope.tolist() == pytest.approx([-1.0, 0.0, 0.25])


@pytest.mark.parametrize("error", ["squared", "absolute", "huber"])
def test_regression_is_the_mean_of_votes(error):
    truth = np.array([0.5, np.nan, -3.0, 1.0], np.float32)
    outputs, batch = view(targets={"mood": jnp.asarray(truth)})
    module = Regress(("mood",), error=error)
    params = {"params": parameters(module, outputs, batch)}
    said = np.asarray(module.apply(params, outputs, batch, method="predict")["mood"], np.float64)
    votes = []
    for name in ("video", "audio"):
        head = params["params"][f"{name}_mood"]
        pooled, kernel, bias = (
            np.asarray(outputs.fused[name].x).mean(1),
            np.asarray(head["kernel"]),
            np.asarray(head["bias"]),
        )
        votes.append(pooled @ kernel[:, 0] + bias[0])
    assert said[:3] == pytest.approx((votes[0] + votes[1])[:3] / 2, rel=1e-5)
    assert said[3] == pytest.approx(votes[0][3], rel=1e-5)
    off = (said - truth)[[0, 2, 3]]
    by_hand = {
        "squared": off**2,
        "absolute": abs(off),
        "huber": np.where(abs(off) <= 1, off**2 / 2, abs(off) - 0.5),
    }[error]
    loss, metrics = module.apply(params, outputs, batch)
    assert float(loss) == pytest.approx(by_hand.mean(), rel=1e-5)
    assert float(metrics["mood/absolute"]) == pytest.approx(abs(off).mean(), rel=1e-5)
    slope = jax.grad(lambda p: module.apply(p, outputs, batch)[0])(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))


def test_bounded_answers_stay_within():
    outputs, batch = view(targets={"mood": jnp.zeros(ROWS)})
    module = Regress(("mood",), bound=0.5)
    params = jax.tree.map(lambda p: 100 * p, {"params": parameters(module, outputs, batch)})
    said = np.asarray(module.apply(params, outputs, batch, method="predict")["mood"])
    assert (np.abs(said) <= 0.5).all() and np.abs(said).max() > 0.49


def test_an_unknown_number_or_label_is_one_line():
    outputs, batch = view(targets={"mood": jnp.zeros(ROWS)}, labels={"who": jnp.zeros(ROWS, jnp.int32)})
    with pytest.raises(UserError, match=r"regress\.values: no target 'moot' in data\.targets.*mood"):
        Regress(("moot",)).init(jax.random.key(0), outputs, batch)
    with pytest.raises(UserError, match=r"regress\.error: unknown 'l2'"):
        Regress(("mood",), error="l2").init(jax.random.key(0), outputs, batch)
    with pytest.raises(UserError, match=r"identify\.label: no label 'whom'"):
        Identify("whom", 3).init(jax.random.key(0), outputs, batch)
    with pytest.raises(UserError, match=r"identify\.kind: unknown 'arc'"):
        Identify("who", 3, kind="arc").init(jax.random.key(0), outputs, batch)


def test_margins_move_the_own_class_alone():
    angle = np.array([[0.3, 1.2, 2.0], [3.0, 0.5, 1.0]])
    cosine, labels = jnp.asarray(np.cos(angle)), jnp.array([1, 0])
    got = np.asarray(margin_logits(cosine, labels, "cosine", 0.35, 30.0))
    want = 30 * np.cos(angle)
    want[0, 1] -= 30 * 0.35
    want[1, 0] -= 30 * 0.35
    assert got == pytest.approx(want, rel=1e-5)
    got = np.asarray(margin_logits(cosine, labels, "angle", 0.5, 10.0))
    want = 10 * np.cos(angle)
    want[0, 1] = 10 * np.cos(1.2 + 0.5)
    want[1, 0] = 10 * (np.cos(3.0) - 0.5 * np.sin(0.5))  # 3.0 + 0.5 is past π
    assert got == pytest.approx(want, rel=1e-4)
    # The own logit falls with the angle all the way.
    along = np.linspace(0.01, np.pi - 0.01, 200)
    own = margin_logits(jnp.cos(along)[:, None], jnp.zeros(200, jnp.int32), "angle", 0.5, 1.0)[:, 0]
    assert (np.diff(own) < 0).all()
    slope = jax.grad(lambda c: margin_logits(c, jnp.zeros(2, jnp.int32), "angle", 0.5, 1.0).sum())(
        jnp.array([[1.0], [-1.0]])
    )
    assert np.isfinite(slope).all()


def test_identities_by_hand():
    labels = jnp.array([0, 2, -1, 1])
    outputs, batch = view(labels={"who": labels})
    module = Identify("who", 3, width=5, kind="cosine", margin=0.2, scale=8.0)
    params = {"params": parameters(module, outputs, batch)}
    own = np.asarray(params["params"]["identities"], np.float64)
    said = np.asarray(module.apply(params, outputs, batch, method="predict")["embedding"], np.float64)
    assert np.linalg.norm(said, axis=1) == pytest.approx(np.ones(ROWS), rel=1e-5)
    cosine = said @ (own / np.linalg.norm(own, axis=1, keepdims=True)).T
    logits = 8 * cosine
    for i, y in enumerate(labels.tolist()):
        if y >= 0:
            logits[i, y] -= 8 * 0.2
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    want = -np.mean([logs[0, 0], logs[1, 2], logs[3, 1]])
    loss, metrics = module.apply(params, outputs, batch)
    assert float(loss) == pytest.approx(want, rel=1e-4)
    hits = np.mean([cosine[i].argmax() == y for i, y in ((0, 0), (1, 2), (3, 1))])
    assert float(metrics["accuracy"]) == pytest.approx(hits)


def line_view(seed: int = 0, **batch) -> tuple[Outputs, Batch]:
    """A stream of 4 × 2 × 2 places; the last row has none of it."""
    rng = np.random.default_rng(seed)
    there = np.ones((ROWS, 16), bool)
    there[-1] = False
    x = rng.normal(size=(ROWS, 16, D)).astype(np.float32) * there[..., None]
    at = np.tile(np.arange(16, dtype=np.int32), (ROWS, 1))
    streams = {"video": Tokens(jnp.asarray(x), jnp.asarray(there), jnp.asarray(at))}
    patches = {"video": Patches(jnp.zeros((ROWS, 16, 3)), jnp.asarray(there), (4, 2, 2), 0)}
    fields = dict(inputs={}, present={}, labels={}, index=jnp.arange(ROWS), valid=jnp.ones(ROWS, bool)) | batch
    return Outputs(streams, streams, patches, {}), Batch(**fields)


@pytest.mark.parametrize("error", ["squared", "logistic"])
def test_moments_count_where_they_are_known(error):
    truth = np.random.default_rng(3).uniform(size=(ROWS, 8)).astype(np.float32)
    truth[0, 2:5] = np.nan
    truth[1] = np.nan
    outputs, batch = line_view(targets={"worth": jnp.asarray(truth)})
    module = Moments(("worth",), seconds=4.0, error=error, steps=8, width=D, depth=1, heads=2, points=2)
    params = {"params": parameters(module, outputs, batch)}
    told = module.apply(params, outputs, batch, method="predict")
    assert told["seconds"].tolist() == [4.0] * ROWS
    said, known = np.asarray(told["worth"], np.float64), np.isfinite(truth)
    known[-1] = False  # its stream is not there
    if error == "squared":
        errors = (said - truth) ** 2
    else:
        errors = -(truth * np.log(said) + (1 - truth) * np.log(1 - said))
    loss, metrics = module.apply(params, outputs, batch)
    assert float(loss) == pytest.approx(errors[known].mean(), rel=1e-4)
    # What is unknown has no say in the gradient.
    slope = jax.grad(lambda t: module.apply(params, outputs, batch._replace(targets={"worth": t}))[0])(
        jnp.asarray(truth)
    )
    assert np.isfinite(np.asarray(slope)[known]).all() and not np.asarray(slope)[~known].any()


def test_a_moment_is_told_of_what_is_seen_then():
    """The line has twice the steps of the stream: a change at one of its times moves the steps near it alone."""
    outputs, batch = line_view(targets={"worth": jnp.zeros((ROWS, 8))})
    line = TimeLine(("video",), 8, D, 0, 2, points=2)
    params = line.init(jax.random.key(0), outputs, "moments")
    before = np.asarray(line.apply(params, outputs, "moments"))
    tokens = outputs.fused["video"]
    moved = tokens._replace(x=tokens.x.at[0, 8:12].add(1.0))  # the third of four times
    after = np.asarray(line.apply(params, outputs._replace(fused={"video": moved}), "moments"))
    change = np.abs(after - before).max(-1)
    assert (change[0, 4:6] > 1e-3).all() and (change[0, [0, 1, 2, 7]] < 1e-6).all() and not change[1:].any()


def test_what_moments_cannot_tell_is_one_line():
    outputs, batch = line_view(targets={"worth": jnp.zeros((ROWS, 6))})
    fields = dict(seconds=4.0, steps=8, width=D, depth=1, heads=2)
    for module, message in (
        (Moments(("worth",), **fields), r"moments\.curves: 'worth' asks for a curve of 8 points.*\(6,\)"),
        (Moments(("value",), **fields), r"'value' asks for a curve.*\['worth'\]"),
        (Moments(("worth",), error="l1", **fields), r"moments\.error: unknown 'l1'"),
        (Moments(("worth",), streams=("text",), **fields), "moments: streams names 'text', which has no time"),
        (Moments(("worth",), streams=("audio",), **fields), r"moments: streams \('audio',\), but the trunk has"),
    ):
        with pytest.raises(UserError, match=message):
            module.init(jax.random.key(0), outputs, batch)
