"""Captions → token ids: a small byte-pair tokenizer, trained on the captions, kept as one JSON file."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from vmm.errors import UserError

PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<s>", "</s>"  # ids 0, 1, 2, 3


def train_tokenizer(captions: Iterable[str], vocabulary: int = 512) -> Tokenizer:
    """Returns a byte-level BPE tokenizer of at most `vocabulary` entries; <pad> is id 0."""
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


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer.json.

    Raises:
      UserError: the file is missing, broken, or does not keep id 0 for padding.
    """
    if not Path(path).is_file():
        raise UserError(f"tokenizer {path}: no such file; make one with `vmm data tokenizer MANIFEST {path}`")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer {path}: not a tokenizer.json ({error})") from None
    if tokenizer.token_to_id(PAD) != 0:
        raise UserError(f"tokenizer {path}: id 0 must be {PAD!r}; make one with `vmm data tokenizer`")
    for token in (START, END):
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"tokenizer {path}: has no {token!r}; make one with `vmm data tokenizer`")
    tokenizer.encode_special_tokens = True  # a caption that spells <pad> means the letters
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, length: int) -> np.ndarray:
    """Returns int32 [L]: <s> text </s>, cut at `length`, padded with 0."""
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    ids = [start, *tokenizer.encode(text).ids[: length - 2], end]
    return np.pad(np.asarray(ids, np.int32), (0, length - len(ids)))


def decode_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Returns the text of token ids, without the special tokens."""
    return tokenizer.decode([int(i) for i in ids if i > 3]).strip()
