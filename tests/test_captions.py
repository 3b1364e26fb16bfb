"""Texts that are written: beam search against every text there is, scores against hand-made truth and a second way to count."""

import functools
import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layers import parameters
from test_objectives import LAST_IS_FILLING, ROWS, SOME, objective_of, view_of

from vmm.build import load_config
from vmm.data import text
from vmm.data.manifest import Row
from vmm.errors import UserError
from vmm.evals import captions
from vmm.evals.captions import Captions, Cider, bleu, bleu_counts, names, rouge_l, words_of
from vmm.evaluate import Predict
from vmm.experiment import Experiment
from vmm.model import Recipe
from vmm.objectives.writing import beam_search
from vmm.sharding import MeshShape, make_mesh

# Beam search on a tree of all texts: a node's logits are a row of a table.
VOCABULARY, LENGTH, END = 3, 4, 1
NODES = sum(VOCABULARY**i for i in range(LENGTH + 1))


def search(table, beams: int, penalty: float = 0.0, padding: int = -1):
    """(ids, log-probability) of each table [NODES V]; the children of node n are n V + 1 …."""
    table = jnp.asarray(table, jnp.float32)

    def step(memory, tokens, place):
        nodes = memory["node"] * VOCABULARY + tokens + 1
        found = jax.vmap(lambda own, mine: own[jnp.clip(mine, 0, NODES - 1)])(table, nodes)
        return found, {"node": nodes, "place": place}

    memory = {"node": jnp.zeros((len(table), beams), jnp.int32), "place": jnp.int32(0)}
    logits = jnp.broadcast_to(table[:, :1], (len(table), beams, VOCABULARY))
    return jax.jit(lambda: beam_search(step, memory, logits, LENGTH, END, padding, penalty))()


def chances(table: np.ndarray) -> dict[tuple, float]:
    """Text → log-probability, of every text that ends or has LENGTH tokens."""
    logs = table - np.log(np.exp(table).sum(-1, keepdims=True))
    result = {}
    for tokens in itertools.product(range(VOCABULARY), repeat=LENGTH):
        node, total, said = 0, 0.0, []
        for token in tokens:
            total, node = total + logs[node, token], node * VOCABULARY + token + 1
            said.append(token)
            if token == END:
                break
        result[tuple(said)] = total
    return result


def said_of(ids) -> tuple:
    """The tokens up to the end."""
    ids = list(map(int, ids))
    return tuple(ids[: ids.index(END) + 1] if END in ids else ids)


@functools.cache
def tables() -> np.ndarray:
    return 1.5 * np.random.default_rng(0).normal(size=(6, NODES, VOCABULARY))


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_beams_for_every_text_find_the_best_of_all(penalty: float):
    ids, score = search(tables(), VOCABULARY**LENGTH, penalty)
    lengths = set()
    for row, table in enumerate(tables()):
        every = chances(table)
        best = max(every, key=lambda said: every[said] / ((5 + len(said)) / 6) ** penalty)
        assert said_of(ids[row]) == best
        assert float(score[row]) == pytest.approx(every[best], abs=1e-5)
        lengths.add(len(best))
    assert len(lengths) > 1


def test_one_beam_is_greedy_and_stops_at_the_end():
    ids, score = search(tables(), 1, penalty=0.7)
    for row, table in enumerate(tables()):
        node, said = 0, []
        while len(said) < LENGTH and END not in said:
            said.append(int(table[node].argmax()))
            node = node * VOCABULARY + said[-1] + 1
        assert said_of(ids[row]) == tuple(said)
        assert np.asarray(ids[row])[len(said) :].tolist() == [-1] * (LENGTH - len(said))
        assert float(score[row]) == pytest.approx(chances(table)[tuple(said)], abs=1e-5)


def test_more_beams_find_what_greed_passes_by():
    """The best first token leads to nothing good."""
    table = np.zeros((1, NODES, VOCABULARY))
    table[0, 0] = [1.0, -5.0, 0.6]  # root: 0 first, 2 second
    table[0, 3] = [-5.0, 5.0, -5.0]  # after 2, the end is sure; after 0, nothing is
    assert said_of(search(table, 1)[0][0])[0] == 0
    assert said_of(search(table, 2)[0][0]) == (2, 1)
    # The more a text's length is paid for, the longer it is: text 2 1 has ln p = ln .31, all others of 4 tokens less.
    long = np.zeros((1, NODES, VOCABULARY))
    long[0, :, END] = -0.1
    assert len(said_of(search(long, 27, 0.0)[0][0])) == 1
    assert len(said_of(search(long, 27, 4.0)[0][0])) == LENGTH


def test_padding_is_never_written_before_the_end():
    table = np.zeros((1, NODES, VOCABULARY))
    table[..., 0] = 9.0
    ids, score = search(table, 4, padding=0)
    assert said_of(ids[0])[-1] == END and 0 not in said_of(ids[0])
    assert float(score[0]) == pytest.approx(-math.log(2 + math.exp(9.0)), abs=1e-5)


# The decoder: what it recalls is what it would read again.


@functools.cache
def given(seed: int = 0):
    outputs, batch = view_of({**SOME, "text": np.ones(ROWS, bool)}, LAST_IS_FILLING, seed)
    answer = np.random.default_rng(seed).integers(1, 11, (ROWS, 5)).astype(np.int32)
    answer[np.arange(5) >= np.array([5, 4, 3, 2, 0])[:, None]] = 0  # the last has none
    choices = np.random.default_rng(1).integers(1, 11, (ROWS, 3, 4)).astype(np.int32)
    choices[:, :, 3] = 0
    choices[0, 2] = 0  # two choices
    targets = {"answer": jnp.asarray(answer), "choices": jnp.asarray(choices), "number": jnp.zeros(ROWS)}
    return outputs, batch._replace(targets=targets)


BLOCKS = [
    dict(positions="learned"),
    dict(block=dict(norm="post", cap=4.0), stage="fused"),
    dict(block=dict(prefix=2, bottleneck=4), positions="sincos_flat"),
]


@pytest.mark.parametrize("fields", BLOCKS)
def test_what_beams_find_is_as_likely_as_predict_says(fields: dict):
    outputs, batch = given()
    module = objective_of("captioning", writes="answer", context=("video", "text"), depth=2, **fields)
    params = {"params": jax.tree.map(lambda x: 2 * x, parameters(module, outputs, batch))}
    found = {
        beams: jax.jit(lambda b=beams: module.apply(params, outputs, batch, 3, 0, b, 0.6, method="generate"))()
        for beams in (1, 3)
    }
    predict = jax.jit(
        lambda ids: module.apply(
            params, outputs, batch._replace(targets={"answer": ids}), method="predict"
        )["tokens"]
    )  # fmt: skip
    for said in found.values():
        ids = np.asarray(said["ids"])
        assert ids.shape == (ROWS, 5) and (ids[:, 0] > 0).all()
        ended = np.cumsum(ids == 3, axis=1) - (ids == 3) > 0
        assert (ids[ended] == 0).all() and (ids[~ended] > 0).all()
        np.testing.assert_allclose(said["likelihood"], predict(said["ids"]).sum(1), rtol=1e-5, atol=1e-5)
    rank = [
        np.asarray(s["likelihood"]) / ((5 + (np.asarray(s["ids"]) > 0).sum(1)) / 6) ** 0.6 for s in found.values()
    ]  # fmt: skip
    assert (rank[1] >= rank[0] - 1e-5).mean() >= 0.6
    assert np.abs(rank[1] - rank[0]).max() > 1e-3 or fields is not BLOCKS[0]  # texts have changed places


def test_a_target_is_learned_and_choices_are_weighed():
    """The loss is that of the target's tokens alone; a choice is as likely as the same text as a target."""
    outputs, batch = given()
    module = objective_of("captioning", writes="answer", choices="choices", context=("video", "text"))
    params = {"params": parameters(module, outputs, batch)}

    question = outputs.encoded["text"]

    @jax.jit
    def run(answer, x):
        seen = outputs._replace(encoded=outputs.encoded | {"text": question._replace(x=x)})
        asked = batch._replace(targets=batch.targets | {"answer": answer})
        return module.apply(params, seen, asked)[0], module.apply(params, seen, asked, method="predict")

    value, said = run(batch.targets["answer"], question.x)
    tokens = np.asarray(said["tokens"])
    counted = np.arange(ROWS) < ROWS - 1
    assert float(value) == pytest.approx(-tokens[counted].sum() / (5 + 4 + 3 + 2), rel=1e-5)
    assert (tokens[4] == 0).all() and (tokens[0] < 0).all()
    choices = np.asarray(batch.targets["choices"])
    for place in range(3):
        answer = jnp.asarray(np.pad(choices[:, place], ((0, 0), (0, 1))))
        expected = np.array(run(answer, question.x)[1]["tokens"]).sum(1)
        if place == 2:
            assert said["choices"][0, 2] == -np.inf
            expected[0] = -np.inf
        np.testing.assert_allclose(said["choices"][:, place], expected, rtol=1e-5)
    each = objective_of("captioning", writes="answer", choices="choices", context=("video", "text"), mean=True)
    mean = jax.jit(lambda: each.apply(params, outputs, batch, method="predict")["choices"])()
    np.testing.assert_allclose(np.where(np.isfinite(mean), mean * 3, mean), said["choices"], rtol=1e-5)
    # The question counts.
    other = run(batch.targets["answer"], question.x[::-1])[1]["tokens"]
    assert np.abs(np.asarray(other) - tokens)[0].max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (dict(writes="anser"), "no target 'anser'.*did you mean 'answer'"),
        (dict(writes="number"), "holds no token ids; its kind must be text or subtitles"),
        (dict(writes="answer", choices="answer"), "captioning.choices.*its kind must be choices"),
        (dict(writes="answer", context=("smell",)), "context is"),
        (dict(text="audio", writes="answer"), "give the tokenizer's size"),
        (dict(context=("text",)), "itself not among them"),
    ],
)
def test_wrong_fields_are_one_line(fields: dict, line: str):
    outputs, batch = given()
    module = objective_of("captioning", **{"context": ("video",), **fields})
    with pytest.raises(UserError, match=line):
        jax.eval_shape(lambda key: module.init(key, outputs, batch, method="predict"), jax.random.key(0))


# Scores.


def test_bleu_by_hand():
    """The clipped unigrams of Papineni et al. 2002, sec. 2.1: 2 of 7."""
    references = [words_of("the cat is on the mat"), words_of("There is a cat on the mat.")]
    counts = bleu_counts(["the"] * 7, references)
    assert counts.tolist() == [7, 7, 2, 0, 0, 0, 7, 6, 5, 4]
    assert bleu(counts[None]) == pytest.approx({"bleu1": 2 / 7, "bleu2": 0.0, "bleu3": 0.0, "bleu4": 0.0})
    short = bleu_counts(["the", "cat"], [["the", "cat", "sat"]])
    assert bleu(short[None])["bleu2"] == pytest.approx(math.exp(1 - 3 / 2))
    # Of references as near, the shorter.
    assert bleu_counts(["a"] * 3, [["a"] * 4, ["a"] * 2])[1] == 2
    assert bleu(np.zeros((1, 10), int))["bleu1"] == 0.0


def corpus(seed: int = 0, clips: int = 12) -> tuple[list, list]:
    """(texts, several references each), of few words, so that much is shared."""
    rng = np.random.default_rng(seed)

    def text():
        return [f"w{i}" for i in rng.integers(0, 5, rng.integers(1, 9))]

    return [text() for _ in range(clips)], [[text() for _ in range(rng.integers(1, 4))] for _ in range(clips)]


def test_bleu_agrees_with_fractions():
    texts, truths = corpus()
    counts = np.array([bleu_counts(*pair) for pair in zip(texts, truths)])
    for most in range(1, 5):
        product = Fraction(1)
        for n in range(1, most + 1):
            hits = total = 0
            for mine, several in zip(texts, truths):
                runs = [tuple(mine[i : i + n]) for i in range(len(mine) - n + 1)]
                total += len(runs)
                for run in set(runs):
                    there = max(sum(tuple(r[i : i + n]) == run for i in range(len(r))) for r in several)
                    hits += min(runs.count(run), there)
            product *= Fraction(hits, total)
        length = sum(map(len, texts))
        near = sum(sorted((abs(len(r) - len(m)), len(r)) for r in s)[0][1] for m, s in zip(texts, truths))
        expected = min(1.0, math.exp(1 - near / length)) * float(product) ** (1 / most)
        assert bleu(counts)[f"bleu{most}"] == pytest.approx(expected, rel=1e-12)
    assert 0.1 < bleu(counts)["bleu2"] < 0.9


def test_rouge_by_hand():
    """Lin 2004, sec. 3.1: "police kill the gunman" has 3 of 4 words in order, "the gunman kill police" 2."""
    truth = [words_of("police killed the gunman")]
    assert rouge_l(words_of("police kill the gunman"), truth) == pytest.approx(3 / 4)
    assert rouge_l(words_of("the gunman kill police"), truth) == pytest.approx(2 / 4)
    # P of the first reference, R of the second: 2/2 and 2/2.
    assert rouge_l(["a", "b"], [["a", "b", "c", "d"], ["a", "x", "b"]]) == pytest.approx(
        2.44 * (2 / 3) / (2 / 3 + 1.44)
    )
    assert rouge_l([], truth) == rouge_l(["x"], truth) == 0.0


def test_cider_by_hand():
    cider = Cider([[["a", "b"]], [["c", "d"]]])
    assert cider(["a", "b"], [["a", "b"]]) == pytest.approx(10 * (1 + 1) / 4)  # no runs of three or four
    assert cider(["a", "c"], [["a", "b"]]) == pytest.approx(10 * 0.5 / 4)
    assert cider(["a"], [["a", "b"]]) == pytest.approx(10 / math.sqrt(2) * math.exp(-1 / 72) / 4)
    assert cider(["a", "b", "a", "b"], [["a", "b"]]) < cider(["a", "b"], [["a", "b"]])
    assert cider([], [["a"]]) == 0.0
    long = ["a", "b", "c", "d", "e"]
    assert Cider([[long], [["x"]]])(long, [long]) == pytest.approx(10.0)
    assert Cider([[long]])(long, [long]) == 0.0  # of one clip nothing is told


def test_cider_agrees_with_dense_vectors():
    """Vedantam et al. 2015, eq. of CIDEr-D, as vectors over all n-grams."""
    texts, truths = corpus(1)
    found, cider = [], Cider(truths)
    for mine, several in zip(texts, truths):
        total = 0.0
        for n in range(1, 5):
            runs = [[tuple(t[i : i + n]) for i in range(len(t) - n + 1)] for own in truths for t in own]
            known = sorted(
                {run for own in [*runs, [tuple(mine[i : i + n]) for i in range(len(mine) - n + 1)]] for run in own}
            )
            if not known:
                continue
            place = {run: i for i, run in enumerate(known)}
            clips = np.zeros(len(known))
            for own in truths:
                for run in {tuple(t[i : i + n]) for t in own for i in range(len(t) - n + 1)}:
                    clips[place[run]] += 1
            weight = np.log(len(truths) / np.maximum(clips, 1))

            def vector(words, n=n, known=known, place=place, weight=weight):
                result = np.zeros(len(known))
                for i in range(len(words) - n + 1):
                    result[place[tuple(words[i : i + n])]] += 1
                return result * weight

            ours = vector(mine)
            for reference in several:
                theirs = vector(reference)
                size = np.linalg.norm(ours) * np.linalg.norm(theirs)
                if size:
                    gap = np.exp(-((len(mine) - len(reference)) ** 2) / 72)
                    total += gap * (np.minimum(ours, theirs) @ theirs) / size
        found.append(10 * total / (4 * len(several)))
    ours = [cider(*pair) for pair in zip(texts, truths)]
    np.testing.assert_allclose(ours, found, rtol=1e-10)
    assert max(ours) > 0.3


def test_facts_are_named_word_for_word():
    motions = ("clockwise", ["anticlockwise", "counter-clockwise"], "moves left")
    assert names("It circles Counter-Clockwise!", motions).tolist() == [True, True, False]
    assert names("it circles anticlockwise", motions).tolist() == [False, True, False]
    assert names("it moves, left", motions).tolist() == [False, False, True]
    assert names("leftmoves", motions).tolist() == [False] * 3


# The evaluator.

FACTS = dict(shape=("circle", "square"), colour=("red", "blue", "green"))
LABELS = [(0, 0), (1, 1), (0, 2), (1, -1)]
TRUTH = [
    "a red circle grows and shrinks",
    "one blue square moves to the left",
    "some green circle is turning round",
    "a square goes",
]


class Said:
    """A model that writes given texts, in two windows a clip; the second is the likelier."""

    def __init__(self, texts: list[str]):
        words = " ".join([*TRUTH, *texts])
        self.tokenizer = text.train_tokenizer([words], 400)
        text._ready(self.tokenizer, "<pad>", "<s>", "</s>")
        self.texts = texts

    def rows(self, manifest):
        labels = [dict(shape=a, colour=b) for a, b in LABELS]
        return [Row(str(i), "", None, None, (TRUTH[i],), labels[i]) for i in range(4)]

    def ask(self, manifest, subset, method, objective, end, **options):
        assert (manifest, method, objective, end) == ("m", "generate", "words", 3)
        if subset == "A":
            return None
        ids = [ids for own in self.texts for ids in (text.encode(self.tokenizer, t, 40) for t in ("nothing", own))]
        labels = {f"label/{k}": np.repeat([own[i] for own in LABELS], 2) for i, k in enumerate(("shape", "colour"))}
        return {
            "words/ids": np.array(ids), "words/likelihood": np.tile(np.float32([-9, -1]), 4),
            "row": np.repeat(np.arange(4), 2), "start": np.zeros(8), **labels,
        }  # fmt: skip


def evaluated(texts: list[str], **fields) -> dict:
    return Captions("m", "words", ("VA", "A"), facts=FACTS, **fields)(Said(texts))


def test_truth_is_perfect():
    found = evaluated(TRUTH)
    assert found["VA/shape"] == found["VA/colour"] == found["VA/facts"] == 1.0
    assert found["VA/rouge_l"] == found["VA/bleu4"] == pytest.approx(1.0)
    assert found["VA/cider"] == pytest.approx((10 * 3 + 7.5) / 4)  # the last has no run of four words
    assert found["clips"] == 4 and not [key for key in found if key.startswith("A")]


def test_wrong_texts_by_hand():
    found = evaluated([TRUTH[1], TRUTH[1], "a red green circle", ""])
    assert found["VA/shape"] == pytest.approx(2 / 4)  # clips 1 and 2
    assert found["VA/colour"] == pytest.approx(1 / 3)  # two colours are none; the last one is not known
    assert found["VA/facts"] == pytest.approx((0 + 1 + 0.5 + 0) / 4)
    assert evaluated([TRUTH[1]] * 4, metrics=("bleu",)).keys() == {
        "VA/bleu1", "VA/bleu2", "VA/bleu3", "VA/bleu4", "VA/shape", "VA/colour", "VA/facts", "clips",
    }  # fmt: skip


def test_shuffled_texts_are_at_chance():
    """Of many clips, each with a text of another, as many facts are right as by chance, and CIDEr falls to a fraction."""
    rng = np.random.default_rng(0)
    shapes, colours = rng.integers(0, 6, 400), rng.integers(0, 8, 400)
    texts = [f"a c{c} s{s} goes its way" for s, c in zip(shapes, colours)]
    truths = [[words_of(text)] for text in texts]
    cider = Cider(truths)
    order = rng.permutation(400)
    right = np.mean([names(texts[j], [f"s{k}" for k in range(6)])[shapes[i]] for i, j in enumerate(order)])
    assert right == pytest.approx(1 / 6, abs=0.06)
    own = np.mean([cider(words_of(t), r) for t, r in zip(texts, truths)])
    other = np.mean([cider(words_of(texts[j]), truths[i]) for i, j in enumerate(order)])
    assert own == pytest.approx(10.0) and other < 4


def test_wrong_evaluations_are_one_line():
    with pytest.raises(UserError, match="no metric 'meteor'"):
        Captions("m", metrics=("meteor",))
    with pytest.raises(UserError, match="facts.colour: 2 phrases, but a clip of m has class 2"):
        Captions("m", "words", ("VA",), facts=dict(colour=("red", "blue")))(Said(TRUTH))
    with pytest.raises(UserError, match="without label 'size'"):
        Captions("m", "words", ("VA",), facts=dict(size=("big",)))(Said(TRUTH))
    assert captions.METRICS == ("bleu", "rouge_l", "cider")


def test_a_model_is_asked(world_folder):
    """The whole way, untrained: from files to scores; a name that does not write is one line."""
    config = load_config("configs/finetune_caption.py:small")
    data = config["data"] | dict(
        train=str(world_folder / "train.jsonl"), tokenizer=str(world_folder / "tokenizer.json"), workers=0
    )
    test = config["evals"]["captions"] | dict(data=str(world_folder / "test.jsonl"), beams=2, subsets=("V",))
    experiment = Experiment(config | dict(data=data, evals=dict(captions=test)))
    params = parameters(experiment.recipe, *asked(experiment))
    predict = Predict(experiment, params, make_mesh(MeshShape(), jax.devices()))
    measured = experiment.evals["captions"].measure(predict, None)
    found, ends = measured.numbers(), measured.intervals()
    told = sum(bool(row.captions) for row in predict.rows(test["data"]))
    assert found["clips"] == told < 18 and 0 <= found["V/facts"] < 0.7
    assert len(measured.scored[-1].row) == 18  # facts are known without a caption
    assert set(found) - {"clips"} == set(ends) and all(low <= high for low, high in ends.values())
    words = config["objectives"]["words"] | dict(vocabulary=20)
    with pytest.raises(UserError, match=r"objectives\.words: vocabulary must be \d+ or more and padding 0"):
        Experiment(config | dict(data=data, objectives=dict(words=words)))
    with pytest.raises(UserError, match="no objective 'word' that writes"):
        Recipe.apply(experiment.recipe, {"params": params}, *asked(experiment), "word", 3, method="generate")


def asked(experiment) -> tuple:
    shapes = experiment.batch_shapes(2)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), jax.random.split(jax.random.key(0), 2)
