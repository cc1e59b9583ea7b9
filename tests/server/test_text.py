"""Detokenizing and stop strings: pieces join to the whole, and nothing leaks early."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardline_server.text import MAX_PENDING_TOKENS, IncrementalDetokenizer, StopMatcher

TEXTS = [
    "Hello world, the quick brown fox.",
    "Grüße, 你好 👩‍👩‍👧!",
    "x" * 50,
    " leading and trailing ",
]


def stream(tokenizer, token_ids, prompt=(), **options):
    detokenizer = IncrementalDetokenizer(tokenizer.backend, prompt, **options)
    return [detokenizer.push(token_id) for token_id in token_ids] + [detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text_and_no_piece_holds_half_a_character(tokenizer, text):
    pieces = stream(tokenizer, tokenizer.encode(text).ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(data=st.data())
def test_any_tokens_at_all_come_out_as_decode_would_give_them(tokenizer, data):
    token_ids = data.draw(st.lists(st.integers(0, 399), max_size=60))
    whole = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert "".join(stream(tokenizer, token_ids)) == whole


def test_an_unfinished_character_is_flushed_as_a_replacement(tokenizer):
    token_ids = tokenizer.encode("a🎉").ids[:-1]
    assert stream(tokenizer, token_ids)[-1] == "\ufffd"


def test_endless_invalid_bytes_are_let_go(tokenizer):
    stray = tokenizer.backend.token_to_id("Ģ")  # byte 0x80 alone is never a character
    detokenizer = IncrementalDetokenizer(tokenizer.backend)
    pieces = [detokenizer.push(stray) for _ in range(3 * MAX_PENDING_TOKENS)]
    assert "".join(pieces) == "\ufffd" * 3 * MAX_PENDING_TOKENS


def test_special_tokens_are_skipped_unless_asked_for(tokenizer):
    token_ids = tokenizer.encode("a<|end|>b").ids
    assert "".join(stream(tokenizer, token_ids)) == "ab"
    assert "".join(stream(tokenizer, token_ids, skip_special_tokens=False)) == "a<|end|>b"


def test_the_text_follows_a_prompt_that_ends_inside_a_character(tokenizer):
    token_ids = tokenizer.encode(" the fox").ids
    prompt = tokenizer.encode("🎉").ids[:1]
    assert "".join(stream(tokenizer, token_ids, prompt=prompt)) == " the fox"


def test_characters_are_counted(tokenizer):
    detokenizer = IncrementalDetokenizer(tokenizer.backend)
    text = "".join(detokenizer.push(token_id) for token_id in tokenizer.encode(TEXTS[1]).ids)
    assert detokenizer.num_characters == len(text)


def feed(stops, pieces, **options):
    matcher, sent = StopMatcher(stops, **options), []
    for piece in pieces:
        sent.append(matcher.push(piece))
        if matcher.matched is not None:
            return sent, matcher.matched
    return [*sent, matcher.flush()], None


@pytest.mark.parametrize(
    ("stops", "pieces", "sent", "matched"),
    [
        (["end"], ["the e", "n", "d."], ["the ", "", ""], "end"),
        (["end"], ["the e", "nemy"], ["the ", "enemy", ""], None),
        (["end"], ["bitter e"], ["bitter ", "e"], None),
        (["\n\n", "x"], ["a\n", "\nb"], ["a", ""], "\n\n"),
        (["b", "abc"], ["xabc"], ["xa"], "b"),
        (["bc", "abc"], ["xabc"], ["x"], "abc"),
        (["aab"], ["aaa", "b"], ["a", ""], "aab"),
        (["👩‍👧"], ["👩", "‍", "👧"], ["", "", ""], "👩‍👧"),
        ([], ["anything"], ["anything", ""], None),
    ],
)
def test_stop_strings(stops, pieces, sent, matched):
    assert feed(stops, pieces) == (sent, matched)


def test_the_stop_string_stays_in_the_text_if_asked_for():
    assert feed(["end"], ["the e", "nd."], include_in_output=True) == (["the ", "end"], "end")


@given(
    text=st.text(alphabet="ab", max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_where_the_pieces_are_cut_makes_no_difference(text, stops, cuts):
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    whole, matched = feed(stops, list(text))
    assert ("".join(feed(stops, pieces)[0]), feed(stops, pieces)[1]) == ("".join(whole), matched)
