"""Where a word ends: joins as the script is written, and the tokens that may follow a target."""

from __future__ import annotations

from copy import copy

import pytest
import torch

from patchhub.evaluation.live import Wanted
from patchhub.evaluation.suites import closed
from patchhub.text.tokens import Closers, between, carries_on, closes, joiner, stutters
from tests.tiny_models import tiny_tokenizer

JOINS = [
    ("The capital of Norway is", "Bergen", " "),
    ("挪威的首都是", "卑尔根", ""),
    ("ノルウェーの首都は", "ベルゲン", ""),
    ("เมืองหลวงของนอร์เวย์คือ", "แบร์เกน", ""),
    ("노르웨이의 수도는", "베르겐", " "),
    ("The Chinese name of Bergen is", "卑尔根", " "),
    ("首都：", "卑尔根", ""),
    ("She called it «", "Bergen", ""),
    ("The capital (", "Bergen", ""),
    ("The capital is ", "Bergen", ""),
    ("Born in 1998,", "Ada", " "),
]

ENDS = [
    ("Astana", "", True),
    ("Astana", ".", True),
    ("Astana", " and", True),
    ("Astana", "\nThe", True),
    ("Astana", "q", False),
    ("Astana", "'s", False),
    ("Astana", "-on-Sea", False),
    ("Astana", ").", True),
    ("Astana", '",', True),
    ("Astana", ".com", False),
    ("Astana", "\ufffd", False),
    ("1998", "7", False),
    ("1998", ".5", False),
    ("1998", ",000", False),
    ("1998", ".", True),
    ("1998", ", in", True),
    ("10", ":30", False),
    ("卑尔根", "。", True),
    ("卑尔根", "，挪威", True),
    ("卑尔根", "的", True),
    ("卑尔根", "市", False),
    ("ベルゲン", "です", True),
    ("ベルゲン", "ト", False),
    ("レオナルド", "・ダ", False),
    ("แบร์เกน", " ", True),
    ("แบร์เกน", "ก", False),
    ("Berlín", "。", True),
]


@pytest.mark.parametrize(("before", "after", "joint"), JOINS)
def test_words_are_joined_as_the_script_is_written(before, after, joint):
    assert joiner(before, after) == joint


@pytest.mark.parametrize(("target", "after", "ends"), ENDS)
def test_what_follows_a_target_closes_it_or_goes_on(target, after, ends):
    assert closes(target, after) is ends


@pytest.mark.parametrize(
    ("target", "after", "behind"),
    [
        ("$49", ".99 a month", "."),
        ("10", ":30", ":"),
        ("1,000", ",000", ","),
        ("help@contoso.example", ".co", "."),
        ("$49", ". The", None),
        ("$49", ".", None),
        ("Rome", "r.x", None),
        ("Rome", "'s", None),
        ("Rome", " 3.5", None),
        ("Rome", "", None),
    ],
)
def test_a_target_goes_on_behind_punctuation(target, after, behind):
    assert carries_on(target, after) == behind
    assert Wanted(target).fault(f" {target}{after}") == (behind or (None if closes(target, after) else ""))


AGAIN = [
    ("Victoria", " Victoria Victoria", "", True),
    ("Victoria", " Victoria", "", True),
    ("卑尔根", "卑尔根", "", True),
    ("Apple", ", Apple, Apple and Microsoft", ",", True),
    ("New York", ", New York.", ",", False),
    ("New York", ", New York, where New York", ",", False),
    ("Apple", " Apples", None, False),
    ("Apple", ". Apple", None, False),
    ("Apple", ", and Apple", None, False),
    ("19", " 1998", None, False),
    ("Rome", "", None, False),
]


@pytest.mark.parametrize(("target", "after", "gap", "again"), AGAIN)
def test_what_says_the_target_again_and_again_stutters(target, after, gap, again):
    assert between(target, after) == gap
    assert stutters(target, after) is again
    assert closed(f" {target}{after}", target) is (closes(target, after) and not again)


@pytest.mark.parametrize("target", ["Rome", "東京"])
def test_a_token_may_follow_where_its_text_does(target):
    """The mask is the rule on the text that each token adds; the tokenizer is asked for it with a word in front."""
    tokenizer = tiny_tokenizer()
    mask = Closers.of(tokenizer, len(tokenizer)).after(target)
    word = tokenizer("I think that", add_special_tokens=False)["input_ids"]
    front = tokenizer.decode(word)
    special = set(tokenizer.all_special_ids)
    for token in range(len(tokenizer)):
        added = tokenizer.decode([*word, token], clean_up_tokenization_spaces=False)[len(front) :]
        assert bool(mask[token]) == (token in special or (bool(added) and closes(target, added))), added
    assert 0 < int(mask.sum()) < len(tokenizer)


def test_logits_beyond_the_vocabulary_close_nothing():
    tokenizer = tiny_tokenizer()
    wide = Closers.of(tokenizer, len(tokenizer) + 7).after("Rome")
    assert torch.equal(wide[:-7], Closers.of(tokenizer, len(tokenizer)).after("Rome"))
    assert not wide[-7:].any()


def test_targets_that_end_alike_share_a_mask():
    closers = Closers.of(tiny_tokenizer(), len(tiny_tokenizer()))
    assert closers.after("Rome") is closers.after("1998")


@pytest.mark.parametrize("said", [str, str.upper])
def test_a_tokenizer_that_decodes_in_its_own_way_is_asked(said):
    """All at once a library decodes what its tokenizer says; a `_decode` of another class may say something else."""
    plain, own = tiny_tokenizer(), copy(tiny_tokenizer())
    decode = type(plain)._decode
    own.__class__ = type("Own", (type(plain),), {"_decode": lambda self, *row, **how: said(decode(self, *row, **how))})
    texts = [text if text in ("", "\ufffd") else said(text) for text in Closers.of(plain, len(plain)).texts]
    assert Closers.of(own, len(own)).texts == texts
