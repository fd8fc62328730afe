"""The chat form of a base: what its chat template puts around a user's message, up to where the answer begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from patchhub.errors import SettingsError
from patchhub.objects import SLOT

_QUESTION: Final = "questionqxz"
_ANSWER: Final = "answerqxz"


@dataclass(frozen=True)
class Chat:
    """A prompt is read as ``before + prompt + after``, and the answer follows without a space.

    Both texts spell out their special tokens, so the tokenizer adds none of its own. They are kept with a patch: a template that
    writes the day's date, or a newer tokenizer, does not change what was recorded.
    """

    before: str
    after: str

    def around(self, prompt: str) -> str:
        """The text that the model reads for a prompt."""
        return f"{self.before}{prompt}{self.after}"

    def asking(self, prompt: str) -> str:
        """`around` to generate from: a space before the answer is left out, since tokenizers make it part of the answer."""
        return self.around(prompt).rstrip(" ")

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None) -> Chat | None:
        """The chat form in a patch's settings; None where facts were written as plain text."""
        return None if value is None else cls(str(value["before"]), str(value["after"]))


def chat_of(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """The chat form that a tokenizer's template gives one user message and its answer, without a thinking part.

    It is taken from a rendered answer, not from the generation prompt, which in some templates lacks the space before an answer.

    Raises:
        SettingsError: there is no chat template, or it changes the texts that it is given.
    """
    if not tokenizer.chat_template:
        raise SettingsError(
            "the base's tokenizer has no chat template",
            remedy="Leave --chat out: without a template, prompts are read as they are.",
        )
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False))
    except Exception as error:  # the model's own template runs here
        reason = str(error).partition("\n")[0]
        raise SettingsError(
            f"the base's chat template cannot be used ({reason})", remedy="Correct the tokenizer's chat template."
        ) from error
    before, _, rest = text.partition(_QUESTION)
    after, answer, end = rest.partition(_ANSWER)
    if not answer or _QUESTION in rest or _ANSWER in before + end or SLOT in before + after:
        raise SettingsError(
            "the base's chat template does not write a message once and as it is",
            remedy="Leave --chat out, and write the template into the prompts yourself.",
            template=text,
        )
    return Chat(before, after)
