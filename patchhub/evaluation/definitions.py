"""What every score means, in one line; which ones come first and which way is better. Plain data, no torch.

The full definitions, with sources and differences from other code, are in docs/evaluation.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

SUITES: Final = ("counterfact", "zsre", "wise")
"""The teacher-forced suites; live decoding, fluency and drift stand beside each."""

DEFINITIONS: Final[Mapping[str, str]] = {
    "live_efficacy": "what the model writes begins with the new target; the word may go on",
    "live_paraphrase": "the same at other phrasings",
    "closure": "it begins with the new target and the word ends there",
    "judged": "a judge behind an address says that what it writes gives the new target",
    "leak": "share of other subjects' prompts that now say a new target and did not before",
    "perplexity_ratio": "perplexity over the base's, on text kept aside; 1 is no drift",
    "kl": "KL(base || now) per token of that text, nats; 0 is no drift",
    "S": "harmonic mean of efficacy, paraphrase and neighborhood (zsRE: specificity)",
    "ES": "efficacy: P(new) > P(true) at the prompt",
    "PS": "paraphrase: P(new) > P(true) at other phrasings",
    "NS": "neighborhood: P(true) > P(new) at other subjects' prompts",
    "EA": "every token of the new target is the argmax at the prompt",
    "PA": "every token of the new target is the argmax at other phrasings",
    "NA": "every token of the true answer is the argmax at other subjects' prompts",
    "EM": "magnitude: P(new) - P(true) at the prompt",
    "PM": "magnitude: P(new) - P(true) at other phrasings",
    "NM": "magnitude: P(true) - P(new) at other subjects' prompts",
    "efficacy": "share of the new target's tokens that are the argmax at the prompt",
    "paraphrase": "share of the new target's tokens that are the argmax at other phrasings",
    "specificity": "share of the true answer's tokens that are the argmax at unrelated prompts",
    "unchanged": "the argmax along the true answers at other prompts is the base's",
    "average": "arithmetic mean of reliability, generalisation and locality",
    "reliability": "every token of the new target is the argmax at the prompt",
    "generalisation": "every token of the new target is the argmax at other phrasings",
    "locality": "the argmax along the true answers at other prompts is the base's",
    "exact": "what the model writes begins with the new target",
    "exact_in_context": "what it writes begins with the new target, with other text before the prompt",
    "contained": "the new target occurs in what the model writes",
    "contained_in_context": "the new target occurs in what it writes, with other text before the prompt",
    "stopped": "the answer, up to where it stops, is the new target and nothing else",
    "negation": "after '... is not' what it writes does not begin with the new target",
    "fluency": "entropy of words in sampled text, bits: (2/3 H2 + 4/3 H3) / 2; repetition lowers it",
}

GROUPS: Final[Mapping[str, str]] = {
    "counterfact": "CounterFact, teacher forced: the model reads the target's own tokens",
    "zsre": "zsRE, teacher forced: the model reads the target's own tokens",
    "wise": "WISE, teacher forced: the model reads the target's own tokens",
    "live": "Live: the model reads only what it wrote, greedily",
    "judge": "Judge: a model behind an address reads what was written",
    "fluency": "Fluency",
    "drift": "Drift",
}

FIGURES: Final = ("live_efficacy", "live_paraphrase", "closure", "judged", "leak", "perplexity_ratio", "kl")
"""What a person sees first of any suite, "judged" where a judge was asked; its teacher-forced summary follows."""

LEADING: Final[Mapping[str, tuple[str, ...]]] = {
    "counterfact": ("S", "ES", "PS", "NS"),
    "zsre": ("S", "efficacy", "paraphrase", "specificity"),
    "wise": ("average", "reliability", "generalisation", "locality"),
}
"""Per suite the scores that a line has room for; the summary first."""

BESIDE: Final = ("exact", "exact_in_context", "perplexity_ratio")
"""What is always said beside them."""

GENERALITY: Final[Mapping[str, str]] = {"counterfact": "PS", "zsre": "paraphrase", "wise": "generalisation"}
SPECIFICITY: Final[Mapping[str, str]] = {"counterfact": "NS", "zsre": "specificity", "wise": "locality"}


def headline(suite: str) -> tuple[str, ...]:
    """The scores that stand for a suite, the summary first; of an unknown suite only those that every suite has."""
    return (*LEADING.get(suite, ()), *BESIDE)
