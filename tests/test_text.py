"""Pieces of text add up to the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from redrafter.engine.results import Event
from redrafter.engine.text import Detokenizer, with_text


def byte_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A decoder that drops the space before the first word, as sentencepiece models do."""
    vocabulary = {token: i for i, token in enumerate(["</s>", "<unk>", "▁the", "▁cat", "s", "▁sat"])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def cleaning_tokenizer(kind=models.WordLevel, **more) -> PreTrainedTokenizerFast:
    """Every piece of text that clean-up looks at is a token; pieces are joined as they are, or by spaces."""
    pieces = [" ", ".", "?", "!", ",", "'", "n", "t", "m", "s", "v", "e", "r", " n't", "x", "漢", " '", "can", "\n"]
    vocabulary = {token: i for i, token in enumerate(["</s>", "<unk>", *pieces])}
    tokenizer = Tokenizer(kind(vocab=vocabulary, **more))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=True
    )


def word_pieces(cleanup: bool) -> PreTrainedTokenizerFast:
    """As of BERT: words are joined by spaces, which its decoder or transformers cleans up."""
    pieces = [".", "?", "!", ",", "'", "n", "n't", "t", "'s", "'re", "##s", "x", "can"]
    vocabulary = {token: i for i, token in enumerate(["</s>", "<unk>", *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=not cleanup
    )


CLEANING = {
    "joined": cleaning_tokenizer(unk_token="<unk>"),
    "by spaces": word_pieces(cleanup=False),
    "by its decoder": word_pieces(cleanup=True),
    "byte pairs, which transformers leaves": cleaning_tokenizer(models.BPE, merges=[]),
}

BYTES, WORDS = byte_tokenizer(), word_tokenizer()


@given(st.text(alphabet=st.sampled_from("ab é漢🙂\n"), max_size=20))
def test_bytes_of_a_character_come_out_together(text):
    pieces = Detokenizer(BYTES)
    given_out = [pieces.push(token) for token in BYTES(text).input_ids]
    assert "".join(given_out) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in given_out)


@given(st.lists(st.integers(2, 5), max_size=12))
def test_spaces_between_words_are_kept(ids):
    pieces = Detokenizer(WORDS)
    assert "".join(pieces.push(token) for token in ids) == WORDS.decode(ids)


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS])
def test_special_tokens_add_no_text(tokenizer):
    assert Detokenizer(tokenizer).push(0) == ""


@given(st.lists(st.lists(st.integers(0, 256), max_size=4), min_size=1, max_size=6), st.sampled_from([BYTES, WORDS]))
def test_the_pieces_of_a_row_add_up_to_its_text(steps, tokenizer):
    """Broken characters at the end included, and whatever another row writes in between."""
    vocabulary = len(tokenizer)
    steps = [[token % vocabulary for token in step] for step in steps]
    ends = [None] * (len(steps) - 1) + ["length"]
    events = []
    for tokens, end in zip(steps, ends, strict=True):
        events += [Event(0, tokens, 0, 0, end), Event(1, [2], 0, 0, end)]
    pieces = list(with_text(events, tokenizer))
    for row, ids in ((0, [t for step in steps for t in step]), (1, [2] * len(steps))):
        text = "".join(event.text for event in pieces if event.row == row)
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", CLEANING)
@given(data=st.data())
def test_pieces_of_a_tokenizer_that_cleans_up_add_up_to_its_own_text(kind, data):
    tokenizer = CLEANING[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=24))
    pieces = Detokenizer(tokenizer)
    assert "".join([*map(pieces.push, ids), pieces.rest()]) == tokenizer.decode(ids, skip_special_tokens=True)


def test_clean_up_of_ones_own_is_heeded_too():
    class Own(PreTrainedTokenizerFast):
        def clean_up_tokenization(self, text):
            return text.replace("x", "").upper()

    tokenizer = Own(tokenizer_object=CLEANING["joined"].backend_tokenizer, clean_up_tokenization_spaces=True)
    ids = [16, 2, 15, 18, 6, 16]
    pieces = Detokenizer(tokenizer)
    assert "".join([*map(pieces.push, ids), pieces.rest()]) == tokenizer.decode(ids, skip_special_tokens=True)


def test_what_clean_up_leaves_alone_comes_out_at_once():
    tokenizer = CLEANING["joined"]
    pieces = Detokenizer(tokenizer)
    for token in tokenizer.convert_tokens_to_ids(["漢", "x", "can", "x", "漢"]):
        assert pieces.push(token) in ("漢", "x", "ca", "nx"), "but for the letter n, after which 't may follow"
