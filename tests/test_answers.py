"""Answers to questions, written or chosen: by hand, by truth and by chance; a talk's history is used where it is needed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_layers import parameters

from vmm.data import text
from vmm.data.manifest import Row
from vmm.data.targets import Choices, Text, fill
from vmm.errors import UserError
from vmm.evals.answers import Answers, exact, normalised, token_f1
from vmm.model import Recipe
from vmm.types import Batch


def test_scores_by_hand():
    assert normalised("The  Red-ring, an' a STAR!") == "redring star"
    assert exact("A red ring.", ["blue", "red ring"]) == 1.0 and exact("red", ["red ring"]) == 0.0
    assert token_f1("red ring", ["the red star", "ring ring red"]) == pytest.approx(2 * 2 / (2 + 3))
    assert token_f1("", ["the"]) == 1.0 and token_f1("", ["ring"]) == 0.0 == token_f1("star", ["ring"])


QUESTIONS = [  # answer, choices, the right one, kind
    ("red", ["red", "blue", "green", "pink"], 0, "colour"),
    (["a ring", "a circle"], ["star", "ring"], 1, "shape"),
    ("blue ring", ["blue ring", "blue", "ring"], 0, "shape"),
    (None, [], -1, "shape"),
]


class Said:
    """A model that writes given answers and weighs the choices by given numbers."""

    def __init__(self, texts: list[str], scores):
        self.tokenizer = text.train_tokenizer(["red blue green pink ring star circle", *texts], 300)
        text._ready(self.tokenizer, "<pad>", "<s>", "</s>")
        self.texts, self.scores = texts, np.asarray(scores, np.float32)

    def rows(self, manifest):
        return [
            Row(str(i), "", None, None, (), {}, texts={"kind": kind, "choices": choices} | ({"answer": answer} if answer else {}))
            for i, (answer, choices, _, kind) in enumerate(QUESTIONS)
        ]  # fmt: skip

    def ask(self, manifest, subset, method, objective, end, **options):
        ids = [text.encode(self.tokenizer, words, 12) for words in self.texts]
        return {"words/ids": np.array(ids), "words/likelihood": np.zeros(4), "row": np.arange(4)}

    def __call__(self, manifest, subset):
        return {
            "words/choices": self.scores, "label/answer": np.array([q[2] for q in QUESTIONS]), "row": np.arange(4),
        }  # fmt: skip


NO = -np.inf
SCORES = [[0, -1, -2, -3], [-1, 0, NO, NO], [-1, -3, 0, NO], [NO, NO, NO, NO]]


def test_answers_by_hand():
    found = Answers("m", "words", subsets=("VT",), by="kind")(Said(["The red.", "circle", "red ring", "star"], SCORES))
    assert found["VT/open/exact"] == pytest.approx(2 / 3)
    assert found["VT/open/f1"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert found["VT/open colour/exact"] == 1.0 and found["VT/open shape/f1"] == pytest.approx(1.5 / 2)
    assert found["VT/choices"] == pytest.approx(2 / 3)
    assert found["VT/choices colour"] == 1.0 and found["VT/choices shape"] == 0.5
    assert found["chance/choices"] == pytest.approx((1 / 4 + 1 / 2 + 1 / 3) / 3)
    assert found["chance/open"] == pytest.approx(1 / 3) and found["questions"] == 3


def test_truth_and_no_opinion():
    truth = [[0, -1, -2, -3], [-1, 0, NO, NO], [0, -3, -1, NO], [NO] * 4]
    found = Answers("m", "words", subsets=("VT",))(Said(["red", "ring", "blue ring", ""], truth))
    assert found["VT/open/exact"] == found["VT/open/f1"] == found["VT/choices"] == 1.0
    even = [[0] * 4, [0, 0, NO, NO], [0, 0, 0, NO], [NO] * 4]
    found = Answers("m", "words", ("choices",), subsets=("VT",))(Said([""] * 4, even))
    assert found == {"VT/choices": pytest.approx(found["chance/choices"]), "chance/choices": found["chance/choices"]}


def test_wrong_data_is_one_line():
    with pytest.raises(UserError, match="in no way 'opne'; did you mean 'open'"):
        Answers("m", ways=("opne",))
    with pytest.raises(UserError, match="clip '1' has labels.answer 1, but 1 choices"):
        Answers("m", "words", ("choices",))(Said([""] * 4, [[0] * 4, [0, NO, NO, NO], [0] * 4, [NO] * 4]))
    with pytest.raises(UserError, match="'other' tells of no choices"):
        Answers("m", "other", ("choices",))(Said([""] * 4, SCORES))
    with pytest.raises(UserError, match=r"no row has texts\.reply"):
        Answers("m", "words", ("open",), "reply")(Said([""] * 4, SCORES))


# A talk: what "it" is stands in the history alone.

SHAPES, COLOURS = ("ring", "star"), ("red", "blue", "green", "pink")


def talk(number: int) -> Row:
    """ "which shape ?" and its answer before, then "and its colour ?": shape k of clip i has colour (i + k) mod 4."""
    shape, colour = number % 2, (number // 2 + number % 2) % 4
    texts = {
        "history": ["which shape is that ?", f"a {COLOURS[colour]} {SHAPES[shape]}"], "question": "and its colour ?",
        "answer": COLOURS[colour], "choices": list(COLOURS),
    }  # fmt: skip
    return Row(str(number), "", None, None, (), {"answer": colour}, texts=texts)


ROWS = [talk(number) for number in range(8)]


class Talker:
    """A tiny model of text alone, trained on ROWS; what evaluators ask for."""

    def __init__(self):
        self.tokenizer = text.train_tokenizer([" ".join((*SHAPES, *COLOURS, "which is that and its colour a ?"))], 400)
        text._ready(self.tokenizer, "<pad>", "<s>", "</s>")
        vocabulary = self.tokenizer.get_vocab_size()
        encoder = dict(kind="text", vocabulary=vocabulary, width=32, depth=1, heads=2)
        self.recipe = Recipe(
            dict(encoders=dict(text=encoder), fusion=dict(kind="late", width=32, depth=0, heads=2)),
            dict(clean={}),
            dict(
                reply=dict(
                    kind="captioning", writes="answer", choices="choices", context=("text",), width=32, depth=1, heads=2
                )
            ),
        )
        start = parameters(self.recipe, self.batch("{question}"), self.keys)
        optimizer = optax.adam(1e-2)

        def train(batch):
            def step(carry, _):
                params, state = carry
                grad = jax.grad(lambda p: self.recipe.apply({"params": p}, batch, self.keys)[0])(params)
                change, state = optimizer.update(grad, state)
                return (optax.apply_updates(params, change), state), None

            return jax.lax.scan(step, (start, optimizer.init(start)), None, 150)[0][0]

        self.train = jax.jit(train)
        self.write = jax.jit(
            lambda params, batch: self.recipe.apply(
                {"params": params}, batch, self.keys, "reply", 3, 0, 2, method="generate"
            )
        )
        self.predict = jax.jit(lambda params, batch: self.recipe.apply({"params": params}, batch, method="predict"))

    @property
    def keys(self):
        return jax.random.split(jax.random.key(0), len(ROWS))

    def batch(self, template: str) -> Batch:
        """The batch of ROWS, as the loader makes it."""
        seen = [text.encode(self.tokenizer, fill(template, row, ""), 24) for row in ROWS]
        targets = {
            name: jnp.asarray(np.stack([target.read(row, 0.0, 1.0, self.tokenizer) for row in ROWS]))
            for name, target in (("answer", Text("{answer}", 4)), ("choices", Choices(length=4)))
        }
        there = jnp.ones(len(ROWS), bool)
        label = jnp.asarray([row.labels["answer"] for row in ROWS], jnp.int32)
        index = jnp.arange(len(ROWS), dtype=jnp.int32)
        inputs = {"text": jnp.asarray(np.stack(seen))}
        return Batch(inputs, {"text": there}, {"answer": label}, index, there, targets=targets)

    def learn(self, template: str) -> "Talker":
        self.seen = self.batch(template)
        self.params = self.train(self.seen)
        return self

    def rows(self, manifest):
        return ROWS

    def ask(self, manifest, subset, method, objective, end, **options):
        assert end == 3
        return {**jax.device_get(self.write(self.params, self.seen)), "row": np.arange(len(ROWS))}

    def __call__(self, manifest, subset):
        told = {"label/answer": np.asarray(self.seen.labels["answer"]), "row": np.arange(len(ROWS))}
        return {**jax.device_get(self.predict(self.params, self.seen)), **told}


def test_a_dialogue_is_answered_from_its_history():
    """With its history every answer is right, open and chosen; without it, only as many as chance gives: all rows look the same."""
    talker, evaluator = Talker(), Answers("m", "reply", subsets=("T",))
    found = evaluator(talker.learn("{history} {question}"))
    assert found["T/open/exact"] == found["T/choices"] == 1.0
    without = evaluator(talker.learn("{question}"))
    assert without["T/open/exact"] == without["T/choices"] == without["chance/choices"] == 0.25
