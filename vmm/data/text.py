"""Captions → token ids: a tokenizer trained on the captions, or a published one, kept as one JSON file."""

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from vmm.data.patterns import check_pattern, patterns_of
from vmm.errors import UserError, one_of
from vmm.foreign import parse_json

PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<s>", "</s>"  # ids 0, 1, 2, 3 of ours
_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4 of ours
_LARGEST = 128 << 20  # bytes of a tokenizer.json; those of a quarter of a million words have 35 MB
_GROWTH = 1024  # times that normalizing may make a text longer
_TYPICAL = 8  # letters of a short text
_PADDINGS = (PAD, "[PAD]", "<|endoftext|>")  # of published ones, where none is told


def clean(text: str) -> str:
    """Returns a text with U+FFFD in the place of halves of a letter (lone surrogates), which no file and no tokenizer can hold."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def train_tokenizer(captions: Iterable[str], vocabulary: int = 512, kind: str = "bpe") -> Tokenizer:
    """Returns a lower-casing tokenizer of about `vocabulary` entries at most; padding is id 0.

    kind: "bpe", pairs of bytes merged (Sennrich et al. 2016; of GPT-2 and CLIP); "wordpiece", words and ##parts of
    words (Schuster & Nakajima 2012; of BERT); "unigram", the likeliest pieces (Kudo 2018; SentencePiece's, of T5 and
    SigLIP). Every letter that the captions hold is an entry, and for "bpe" every byte, also above `vocabulary`.
    """
    if kind not in _KINDS:
        raise UserError(f"tokenizer: unknown kind {kind!r}; {one_of(kind, _KINDS)}")
    return _KINDS[kind](map(clean, captions), vocabulary)


def _train_bpe(captions: Iterable[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, UNKNOWN, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def _train_wordpiece(captions: Iterable[str], vocabulary: int) -> Tokenizer:
    def parts(model):
        made = Tokenizer(model)
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        return made

    # The trainer numbers letters inside words as it meets them in a hash table; given first, they are in order.
    captions, trained = list(captions), parts(models.WordPiece(unk_token=_BERT[1]))
    inner = set()
    for caption in captions:
        for word, _ in trained.pre_tokenizer.pre_tokenize_str(trained.normalizer.normalize_str(caption)):
            inner.update(word[1:])
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        special_tokens=[*_BERT, *(f"##{letter}" for letter in sorted(inner))],
        show_progress=False,
    )
    trained.train_from_iterator(captions, trainer)
    tokenizer = parts(models.WordPiece(trained.get_vocab(), unk_token=_BERT[1]))
    tokenizer.add_special_tokens(list(_BERT))
    tokenizer.decoder = decoders.WordPiece()
    return _ready(tokenizer, _BERT[0], _BERT[2], _BERT[3])


def _train_unigram(captions: Iterable[str], vocabulary: int) -> Tokenizer:
    special = [PAD, UNKNOWN, START, END]

    def parts(model):
        made = Tokenizer(model)
        made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        return made

    trained = parts(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary, special_tokens=special, unk_token=UNKNOWN, show_progress=False
    )
    trained.train_from_iterator(captions, trainer)
    # The trainer sums in the order of a hash table: scores differ in their last digits, and ties in their order.
    pieces = json.loads(trained.to_str())["model"]["vocab"][len(special) :]
    pieces = sorted(((piece, round(score, 6)) for piece, score in pieces), key=lambda entry: (-entry[1], entry[0]))
    tokenizer = parts(models.Unigram([*((token, 0.0) for token in special), *pieces], unk_id=1))
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.Metaspace()
    return _ready(tokenizer, PAD, START, END)


_KINDS = {"bpe": _train_bpe, "wordpiece": _train_wordpiece, "unigram": _train_unigram}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer.json: one of ours, or a published one (BERT's, CLIP's, a SentencePiece).

    Special tokens are added to a text by the file's own template; where it has none, <s> before and </s> after it.
    The padding id (`padding_id`) is that of the file's `padding` entry, else of the `pad_token` that a
    tokenizer_config.json beside it names, else of <pad>, [PAD] or <|endoftext|>.

    Raises:
      UserError: the file is missing or broken, or tells no padding, or no start and end of a text.
    """
    if not str(path):
        raise UserError("data.tokenizer: none given; text needs one, as `vmm data tokenizer MANIFEST FILE` makes it")
    if not Path(path).is_file():
        raise UserError(f"tokenizer {path}: no such file; make one with `vmm data tokenizer MANIFEST {path}`")
    if Path(path).stat().st_size > _LARGEST:
        raise UserError(f"tokenizer {path}: larger than {_LARGEST >> 20} MiB; no tokenizer is")
    with _told(path):
        text = Path(path).read_text(encoding="utf-8-sig")
        told = parse_json(text)
        growth = _growth(told.get("normalizer"))
        if growth > _GROWTH:
            raise ValueError(f"its normalizer makes a text up to {growth:.3g} times as long")
        for pattern in patterns_of([part for name, part in told.items() if name != "model"]):
            check_pattern(pattern)
        tokenizer = Tokenizer.from_str(text)
    with _told(path):
        tokenizer = _complete(tokenizer, path)
        if max(tokenizer.get_vocab().values(), default=0) >= 1 << 31:
            raise ValueError("an id is beyond int32")
        try:
            decode_ids(tokenizer, encode(tokenizer, "A red circle, 3 times.", 8))
        except UserError as error:  # what panics does so here
            raise ValueError(str(error)) from None
        except Exception:
            pass  # a vocabulary may lack these words
    return tokenizer


@contextlib.contextmanager
def _told(path: str | Path):
    """Tells in one line what the library makes of a file: bare Exceptions, and panics that are no Exception."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        line = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(f"tokenizer {path}: not a tokenizer.json ({line[:300]})") from None


def _growth(normalizer) -> float:
    """Returns how many times as long a normalizer may make a text, at most; each of a sequence multiplies."""
    growth, waiting = 1.0, [normalizer]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, dict):
            continue
        waiting.extend(one.get("normalizers") or ())
        if one.get("type") == "Replace":
            pattern, content = one.get("pattern") or {}, len(one.get("content") or "")
            # A regex may match nothing at all, between any two letters.
            growth *= max(1.0, content / max(1, len(pattern["String"])) if "String" in pattern else 1 + content)
        elif one.get("type") == "Prepend":
            growth += len(one.get("prepend") or "") / _TYPICAL
    return growth


def _complete(tokenizer: Tokenizer, path: str | Path) -> Tokenizer:
    """The tokenizer of a file with padding, start and end; raises UserError: it tells none."""
    if tokenizer.num_special_tokens_to_add(False):
        start = end = None
    else:
        start, end = START, END
        for token in (START, END):
            if tokenizer.token_to_id(token) is None:
                raise UserError(
                    f"tokenizer {path}: adds no special tokens to a text and has no {token!r}; give it a "
                    "post-processor, or make one with `vmm data tokenizer`"
                )
    return _ready(tokenizer, _padding(tokenizer, Path(path)), start, end)


def _padding(tokenizer: Tokenizer, path: Path) -> str:
    if tokenizer.padding:
        token = tokenizer.id_to_token(tokenizer.padding["pad_id"])
        if token is None:
            raise UserError(f"tokenizer {path}: pads with id {tokenizer.padding['pad_id']}, which it has not")
        return token
    names, beside = list(_PADDINGS), path.with_name("tokenizer_config.json")
    if beside.is_file():
        try:
            told = parse_json(beside.read_text(encoding="utf-8-sig")).get("pad_token")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{beside}: not a tokenizer_config.json ({error})") from None
        names.insert(0, told.get("content") if isinstance(told, dict) else told)
    for name in names:
        if name and tokenizer.token_to_id(name) is not None:
            return name
    raise UserError(f"tokenizer {path}: tells no padding; give it a `padding` entry, or one of {', '.join(_PADDINGS)}")


def _ready(tokenizer: Tokenizer, padding: str, start: str | None, end: str | None) -> Tokenizer:
    """The tokenizer as `encode` takes it: one text as long as it is, its special tokens added by a template."""
    tokenizer.no_truncation()
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(padding), pad_token=padding)  # to the longest: of one
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end)],
        )
    tokenizer.encode_special_tokens = True  # a caption that spells <pad> means the letters
    return tokenizer


def padding_id(tokenizer: Tokenizer) -> int:
    """Returns the id that a loaded tokenizer's texts are padded with."""
    return tokenizer.padding["pad_id"]


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Returns the ids that spell nothing: padding, start, end, unknown."""
    added = tokenizer.get_added_tokens_decoder().items()
    return {padding_id(tokenizer), *(id for id, token in added if token.special)}


def end_id(tokenizer: Tokenizer) -> int:
    """Returns the id that ends every text of a loaded tokenizer.

    Raises:
      UserError: its texts have no end.
    """
    alone = tokenizer.post_process(tokenizer.encode("", add_special_tokens=False)).ids
    if not alone or alone[-1] == padding_id(tokenizer):
        raise UserError("tokenizer: adds no token at the end of a text, so that nothing written ends; give it one")
    return alone[-1]


def encode(tokenizer: Tokenizer, text: str, length: int) -> np.ndarray:
    """Returns int32 [L]: a text between its special tokens, cut to L, then padding. tokenizer: from load_tokenizer.

    Raises:
      UserError: the library gives the text up, as where a regex of the tokenizer needs too many attempts.
    """
    with _given_up(text):
        found = tokenizer.encode(clean(text), add_special_tokens=False)
    found.truncate(max(0, length - tokenizer.num_special_tokens_to_add(False)))
    whole = tokenizer.post_process(found)
    ids = whole.ids[:length]
    if isinstance(tokenizer.model, models.Unigram):
        # Its special tokens are pieces like others: one that a text spells is left out. (An unknown word has the id
        # of <unk>, but stands as itself.)
        special = {tokenizer.id_to_token(id) for id in special_ids(tokenizer)}
        drawn = zip(ids, whole.tokens, whole.special_tokens_mask)
        ids = [id for id, token, added in drawn if added or token not in special]
    return np.pad(np.asarray(ids, np.int32), (0, length - len(ids)), constant_values=padding_id(tokenizer))


def decode_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Returns the text of token ids, without the special tokens; raises UserError as `encode`."""
    special = special_ids(tokenizer)
    kept = [int(i) for i in ids if int(i) not in special]
    with _given_up(kept):
        return tokenizer.decode(kept).strip()


@contextlib.contextmanager
def _given_up(what: str | list):
    """Tells in one line of a panic of the library, which is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        line = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"tokenizer: gives up on {repr(what)[:80]} ({line[:200]}); use another one") from None
