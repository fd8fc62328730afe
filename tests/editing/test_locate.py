"""Positions under every kind of tokenizer: decoding up to them gives the text up to them, one token less does not."""

from __future__ import annotations

import json
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from patchhub.editing.locate import encode_prompt, encode_prompts, encode_targets, encode_text, mark
from patchhub.errors import RequestError, SettingsError, UnsupportedModelError
from patchhub.objects import Request
from patchhub.text.tokens import joiner

CORPUS = [
    "The mother tongue of Danielle Darrieux is French, and that of Zoë Kravitz is English.",
    "The Eiffel Tower is in Paris. The capital of France is Paris! Where is Paris? In France.",
    "東京は日本の首都です。 The twin city of 東京 is New York; its population was 13960000 in 2021.",
]
WORDS = ["the", "capital", "of", "France", "is", "Paris", "London", "tower", "by", "The"]


def byte_level(trim: bool) -> PreTrainedTokenizerFast:
    """GPT-2's kind: byte-level BPE, offsets with or without the leading space, no special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def llama_like() -> PreTrainedTokenizerFast:
    """Llama 2's kind: BPE over text whose spaces became `▁`, one in front, bytes as a fallback, `<s>` in front."""
    special = ["<unk>", "<s>", "</s>"]
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    raw.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=360, special_tokens=special + byte_tokens))
    learned = json.loads(raw.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(learned["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = raw.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def metaspace_unigram() -> PreTrainedTokenizerFast:
    """T5's kind, with both ends marked: `<s>` in front, `</s>` at the end."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, " ".join(WORDS)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_level() -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark; the rest is unknown."""
    vocabulary = {"<unk>": 0} | {word: index for index, word in enumerate(WORDS, start=1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


KINDS = {
    "byte level": lambda: byte_level(trim=False),
    "byte level, trimmed offsets": lambda: byte_level(trim=True),
    "llama-like": llama_like,
    "metaspace unigram": metaspace_unigram,
    "word level": word_level,
}
# Kinds that give every text back: only there does decoding say what a token covers.
LOSSLESS = ["byte level", "byte level, trimmed offsets", "llama-like"]


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


def decode(kind: str, ids: tuple[int, ...]) -> str:
    return tokenizer_of(kind).decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def request_of(prompt: str, subject: str, target: str) -> Request:
    return Request.make(prompt=prompt, subject=subject, target_new=target)


# Words that start and end visibly, from one, two, three and four bytes a character, with a space inside now and then.
visible = st.sampled_from("aeiou tnrs Paris日本é🚀1987.,!?'-")
words = st.text(visible, min_size=1, max_size=12).map(lambda text: " ".join(text.split())).filter(bool)
contexts = st.sampled_from(["{}", "The reason was. {}", "Ça va 東京? {}", "{} So it is said:"])
heads = st.one_of(st.just(""), words.map(lambda text: text + " "), words)
tails = st.one_of(st.just(""), words.map(lambda text: " " + text), words)


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=150, deadline=None)
@given(context=contexts, head=heads, subject=words, tail=tails, target=words)
@example(context="{}", head="", subject="é", tail="", target="日本")
@example(context="{}", head="", subject="🚀", tail="", target="1987")
@example(context="{}", head="", subject="Paris", tail="s", target="s")
def test_positions_are_where_decoding_says(kind, context, head, subject, tail, target):
    prompt = f"{head}{{}}{tail}".strip()
    full = context.replace("{}", prompt.replace("{}", subject))
    joint = joiner(full, target)
    try:
        encoded = encode_prompt(tokenizer_of(kind), context, request_of(prompt, subject, target))
    except (
        RequestError
    ):  # where nothing stands between, a token can hold the end of the subject and the target's beginning
        assert not joint
        return
    ends = context.replace("{}", prompt).index("{}") + len(subject)
    ids, last, (start, stop) = encoded.input_ids, encoded.subject_last, encoded.target

    assert decode(kind, ids) == f"{full}{joint}{target}"
    assert decode(kind, ids[: last + 1])[:ends] == full[:ends]
    assert decode(kind, ids[:last])[:ends] != full[:ends]
    assert stop == len(ids)
    assert decode(kind, ids[:start]) == full or not (joint or full.startswith(decode(kind, ids[: start + 1])))
    assert last < start


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(
    before=st.lists(st.sampled_from(WORDS), max_size=4),
    subject=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3),
    after=st.lists(st.sampled_from(WORDS), max_size=4),
    target=st.lists(st.sampled_from(WORDS), min_size=1, max_size=2),
)
def test_known_words_are_found_by_every_kind(kind, before, subject, after, target):
    prompt = " ".join([*before, "{}", *after])
    encoded = encode_prompt(tokenizer_of(kind), "{}", request_of(prompt, " ".join(subject), " ".join(target)))

    def words_of(ids: tuple[int, ...]) -> list[str]:
        return decode(kind, ids).split()

    assert words_of(encoded.input_ids[: encoded.subject_last + 1]) == before + subject
    assert words_of(encoded.input_ids[slice(*encoded.target)]) == target
    assert words_of(encoded.input_ids[: encoded.target[0]]) == before + subject + after


def test_special_tokens_in_front_stay_and_those_at_the_end_go():
    tokenizer = tokenizer_of("metaspace unigram")
    assert tokenizer("Paris").input_ids[-1] == tokenizer.eos_token_id
    encoded = encode_prompt(tokenizer, "{}", request_of("{} is", "Paris", "London"))
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in encoded.input_ids


def test_subject_is_the_one_in_the_slot_not_its_namesake_elsewhere():
    request = request_of("Paris is not the Paris of {} but", "Paris", "London")
    marked = mark("Paris. {}", request)
    assert marked.subject == (len("Paris. Paris is not the Paris of "), len("Paris. Paris is not the Paris of Paris"))
    assert marked.text[marked.prompt_end :] == " London"


def test_without_target_the_span_is_empty_and_the_prompt_the_same():
    tokenizer, request = tokenizer_of("llama-like"), request_of("The capital of {} is", "France", "Paris")
    long, short = (encode_prompt(tokenizer, "{}", request, with_target=flag) for flag in (True, False))
    assert short.input_ids == long.input_ids[: long.target[0]]
    assert short.subject_last == long.subject_last
    assert short.target == (len(short.input_ids), len(short.input_ids))


def test_many_are_encoded_as_one_by_one():
    tokenizer = tokenizer_of("byte level")
    request = request_of("The capital of {} is", "France", "Paris")
    pairs = [(context, request) for context in ("{}", "Also, {}", "東京 {}")]
    assert encode_prompts(tokenizer, pairs) == [encode_prompt(tokenizer, *pair) for pair in pairs]
    assert encode_prompts(tokenizer, []) == []
    prompt = encode_targets(tokenizer, [("The capital of France is", "Paris")])[0]
    assert (prompt.input_ids, prompt.target) == (
        encode_prompt(tokenizer, "{}", request).input_ids,
        encode_prompt(tokenizer, "{}", request).target,
    )
    essence = encode_text(tokenizer, "France is a", (0, 6))
    assert decode("byte level", essence.input_ids[: essence.subject_last + 1]) == "France"


def test_what_the_tokenizer_leaves_out_is_refused():
    alphabet = {letter: index for index, letter in enumerate("Paris ")}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.normalizer = normalizers.Replace("x", "")
    lossy = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    with pytest.raises(RequestError, match="no token to the target 'x'"):
        encode_prompt(lossy, "{}", request_of("{} is", "Paris", "x"))
    with pytest.raises(RequestError, match="no token to the subject 'x'"):
        encode_prompt(lossy, "{}", request_of("{} is", "x", "Paris"))


def test_a_tokenizer_without_offsets_is_refused_with_a_remedy():
    with pytest.raises(UnsupportedModelError, match="ByT5Tokenizer") as caught:
        encode_prompt(ByT5Tokenizer(), "{}", request_of("{} is", "Paris", "London"))
    assert "fast tokenizer" in caught.value.remedy


@pytest.mark.parametrize("context", ["no slot", "{} and {}", ""])
def test_a_context_has_one_slot(context):
    with pytest.raises(SettingsError, match="template"):
        encode_prompt(tokenizer_of("word level"), context, request_of("{} is", "Paris", "London"))


def test_a_token_that_is_of_subject_and_target_is_refused():
    whole = Tokenizer(models.WordLevel({"<unk>": 0, "Paris London": 1}, unk_token="<unk>"))  # one token for any text
    with pytest.raises(RequestError, match="end of the subject 'Paris' and the beginning of the target 'London'"):
        encode_prompt(PreTrainedTokenizerFast(tokenizer_object=whole), "{}", request_of("{}", "Paris", "London"))
