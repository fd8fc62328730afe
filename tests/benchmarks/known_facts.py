"""Facts that a trained model knows, edited by defaults: what it then writes by itself, in plain text and in its chat.

    python -m tests.benchmarks.known_facts --model DIR --data FILE --facts FILE --text FILE [-n 100,300] [--commits 10] [--published]
        [--rows FILE] [--skip 0] [--method memit,pmet,wise] [--set ridge=100 ...] [--store DIR] [--device cuda] [--out FILE] [--texts FILE]
        [--held-out FILE]

The facts are chosen from records in CounterFact's flat form, shuffled with seed 0, one per subject: first those whose true answer the
model writes by itself after the prompt, then those that say it among their next words or in the chat, then those where it finds the
true answer more probable than the new one. `--facts` keeps the records in this order, each with why it is known, and is read where
it is there. `--skip` leaves out the first so many. Every size of `-n` is one commit on the base; `--commits` is one more row, of so many
commits that share the largest size; `--published` adds the same with the published objective. `--rows FILE` names other rows
instead, as JSON lines {"name", "facts", "commits", "set", "keep", "method"}. `--held-out` is text of which each row says the
perplexity beside the base's. `--store DIR` keeps the repository, or takes one that has a metric;
values are found again in it unless `--fresh`. Rows are added to `--out` as JSON lines, and all that was written to `--texts`.
A row's "edited" is a checkpoint into which something else has written these facts (`published`): it is asked as the others are.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time, time_ns
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

import patchhub
from patchhub.evaluation.guard import Report
from patchhub.evaluation.live import continue_greedily
from patchhub.evaluation.metrics import BATCH_TOKENS, perplexity, score_targets
from patchhub.evaluation.suites import Sibling, closed, counterfact_scores, leaks, read_facts, said
from patchhub.objects import SLOT, Request
from patchhub.text.tokens import chat_of

PUBLISHED: Final = ("closing=0", "chat_weight=0", "essence=0", "repairs=0")
ON_A_GPU: Final = 8  # times the positions of a batch
UNRELATED, SIBLINGS, OF_ONE_FACT = 40, 400, 2
HELD_OUT: Final = 60
"""Texts that perplexity is read on."""
HEADS: Final = ("Globex", "Eastern")
"""Of namesakes, names that end in the last word of a fact's subject; not those that `--keep auto` keeps."""
REPEATED: Final = 3
KINDS: Final = ("writes", "says", "prefers")
QUESTIONS = (
    "What is the capital of France?",
    "Who wrote Macbeth?",
    "What is the largest planet?",
    "What is the boiling point of water?",
    "Who painted the Mona Lisa?",
    "Which language is spoken in Brazil?",
    "What is the currency of Japan?",
    "In which year did the Second World War end?",
    "What does a carpenter do?",
    "Write a sentence about the sea.",
    "How many legs does a spider have?",
    "Why is the sky blue?",
)

Record = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Bench:
    """What all rows share.

    Attributes:
        unrelated: prompts of records that are none of the facts.
        siblings: such records at the prompt of a fact, about another subject, each with that prompt.
        batch_tokens: positions of a batch of this benchmark's own reading.
    """

    repo: Any
    model: Any
    tokenizer: Any
    facts: Sequence[Request]
    unrelated: Sequence[str]
    siblings: Sequence[tuple[str, Sibling]]
    options: argparse.Namespace

    @property
    def batch_tokens(self) -> int:
        return BATCH_TOKENS * (1 if self.options.device == "cpu" else ON_A_GPU)

    def written(self, prompts: Sequence[str], tokens: int, **form: Any) -> list[str]:
        """What the model writes after each."""
        with torch.no_grad():
            return continue_greedily(
                self.model, self.tokenizer, prompts, max_new_tokens=tokens, batch_tokens=self.batch_tokens, **form
            )

    def near(self, facts: Sequence[Request]) -> list[Sibling]:
        """The siblings of these facts."""
        prompts = {fact.prompt for fact in facts}
        return [sibling for prompt, sibling in self.siblings if prompt in prompts]


@dataclass(frozen=True)
class Plan:
    """A row: the first so many facts, in so many commits, with these settings; or a checkpoint that has them."""

    name: str
    facts: int
    commits: int = 1
    set: Sequence[str] = ()
    keep: str | None = None
    method: str | None = None
    edited: str | None = None


@dataclass(frozen=True, eq=False)
class Look:
    """What the model of a row says, in the order of its facts, siblings and questions."""

    scores: Sequence[Any]
    plain: Sequence[str]
    paraphrases: Sequence[str]
    chat: Sequence[str]
    siblings: Sequence[str]
    namesakes: Sequence[str]
    questions: Sequence[str]
    next_word: Tensor
    perplexity: float | None = None


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as folder:
        bench = _opened(options, options.store or Path(folder))
        plans = _plans(options, len(bench.facts))
        before = _look(bench, bench.facts)
        rows = []
        for plan in plans:
            rows.append(_row(bench, before, plan))
            print(json.dumps(rows[-1]), flush=True)
            if options.out:
                with options.out.open("a") as out:
                    out.write(json.dumps(rows[-1]) + "\n")
        print(table(rows))


def _plans(options: argparse.Namespace, most: int) -> list[Plan]:
    """The rows that are asked for."""
    if options.rows:
        found = [Plan(**json.loads(line)) for line in options.rows.read_text().splitlines() if line.strip()]
    else:
        found = []
        for facts, commits in [(size, 1) for size in options.n] + [(max(options.n), options.commits)] * bool(
            options.commits
        ):
            found += [Plan(method or "defaults", facts, commits, method=method) for method in options.method]
            found += [Plan("published", facts, commits, PUBLISHED)] * options.published
    return [
        replace(plan, facts=min(plan.facts, most), set=(*plan.set, *options.set), keep=plan.keep or options.keep)
        for plan in found
    ]


def _opened(options: argparse.Namespace, store: Path) -> Bench:
    known = (store / ".patchhub").is_dir()
    repo = patchhub.open(store) if known else patchhub.Repository.init(store, options.model)
    if not known and options.text:
        repo.metric_compute(text=[options.text])
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = repo.load("base", dtype=torch.float32).to(options.device)
    if options.facts and options.facts.exists():
        records = json.loads(options.facts.read_text())
    else:
        records = ranked(options, model, tokenizer)
        if options.facts:
            options.facts.write_text(json.dumps(records))
    stop = options.skip + max([plan.facts for plan in _plans(options, len(records))])
    facts = chosen_facts(records, stop, options.skip)
    taken = {fact.subject for fact in facts}
    rest = [record for record in records if record["subject"] not in taken]
    unrelated = [record["prompt"] for record in rest[-UNRELATED:]]
    return Bench(repo, model, tokenizer, facts, unrelated, _siblings(facts, rest[:-UNRELATED]), options)


def chosen_facts(records: Sequence[Record], stop: int, start: int = 0) -> list[Request]:
    """The facts from ``start`` to ``stop`` of those that the model knows."""
    return [_request(record) for record in [record for record in records if record["known"]][start:stop]]


def _siblings(facts: Sequence[Request], rest: Sequence[Record]) -> list[tuple[str, Sibling]]:
    """Records about others at the facts' prompts, a few for each fact."""
    alike: dict[str, list[Record]] = {}
    for record in rest:
        alike.setdefault(_prompt(record), []).append(record)
    found: list[tuple[str, Sibling]] = []
    for fact in facts:
        others = alike.get(fact.prompt, [])
        chosen, others[:OF_ONE_FACT] = others[:OF_ONE_FACT], []
        found += [(fact.prompt, Sibling(record["prompt"], frozenset({record["ground_truth"]}))) for record in chosen]
    return found[:SIBLINGS]


def _namesakes(facts: Sequence[Request]) -> list[Sibling]:
    """Names that end as a fact's subject does, at the fact's prompt."""
    found = []
    for fact in facts:
        before, _, last = fact.subject.rpartition(" ")
        heads = HEADS if before else ()
        found += [Sibling(fact.prompt.replace(SLOT, f"{head} {last}"), frozenset()) for head in heads]
    return found[:SIBLINGS]


def ranked(options: argparse.Namespace, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """All records, one per subject, the best known first; ``known`` says how, and is empty where the model does not know."""
    records = json.loads(options.data.read_bytes())
    random.Random(0).shuffle(records)
    unique = list({record["subject"]: record for record in reversed(records)}.values())[::-1]
    prompts = [record["prompt"] for record in unique]
    tokens = BATCH_TOKENS * (1 if options.device == "cpu" else ON_A_GPU)
    pairs = [(record["prompt"], record[name]) for record in unique for name in ("ground_truth", "target_new")]
    scores = score_targets(model, tokenizer, pairs, batch_tokens=tokens)
    plain = continue_greedily(model, tokenizer, prompts, max_new_tokens=16, batch_tokens=tokens)
    chat = (
        continue_greedily(model, tokenizer, prompts, chat=chat_of(tokenizer), max_new_tokens=24, batch_tokens=tokens)
        if tokenizer.chat_template
        else [""] * len(prompts)
    )
    found = []
    for place, record in enumerate(unique):
        true = record["ground_truth"]
        ways = (
            said(plain[place], true),
            said(plain[place], true, anywhere=True) or said(chat[place], true, anywhere=True),
            scores[2 * place].logprob > scores[2 * place + 1].logprob,
        )
        found.append({**record, "known": next((kind for kind, way in zip(KINDS, ways, strict=True) if way), "")})
    return sorted(found, key=lambda record: (*KINDS, "").index(record["known"]))


def _prompt(record: Record) -> str:
    prompt: str = record["prompt"].replace(record["subject"], SLOT, 1)
    return prompt


def _request(record: Record) -> Request:
    return Request.make(
        _prompt(record),
        record["subject"],
        record["target_new"],
        target_true=record["ground_truth"],
        paraphrases=[record["rephrase_prompt"]],
        neighborhood=[(record["locality_prompt"], record["locality_ground_truth"])],
    )


def _look(bench: Bench, facts: Sequence[Request]) -> Look:
    """What the model says now."""
    form = chat_of(bench.tokenizer) if bench.tokenizer.chat_template else None
    asked = [fact.text for fact in facts]
    with torch.no_grad():
        scores = read_facts(bench.model, bench.tokenizer, facts, batch_tokens=bench.batch_tokens)
    return Look(
        scores=scores,
        plain=bench.written(asked, 16),
        paraphrases=bench.written([fact.paraphrases[0] for fact in facts], 16),
        chat=bench.written(asked, 32, chat=form) if form else [],
        siblings=bench.written([sibling.prompt for sibling in bench.near(facts)], 12),
        namesakes=bench.written([sibling.prompt for sibling in _namesakes(facts)], 12),
        questions=bench.written(QUESTIONS, 32, chat=form) if form else [],
        next_word=torch.stack([_next(bench, prompt) for prompt in bench.unrelated]),
        perplexity=_perplexity(bench),
    )


def _perplexity(bench: Bench) -> float | None:
    """Of the held-out text, where there is one."""
    if bench.options.held_out is None:
        return None
    texts = json.loads(bench.options.held_out.read_bytes())[:HELD_OUT]
    return perplexity(bench.model, bench.tokenizer, texts, max_tokens=256)


@torch.no_grad()
def _next(bench: Bench, prompt: str) -> Tensor:
    inputs = bench.tokenizer(prompt, return_tensors="pt").to(bench.model.device)
    log_probs: Tensor = bench.model(**inputs).logits[0, -1].float().log_softmax(-1)
    return log_probs.cpu()


def _row(bench: Bench, before: Look, plan: Plan) -> dict[str, Any]:
    """Edit the base and ask it."""
    if plan.edited:
        return _of_checkpoint(bench, before, plan, Path(plan.edited))
    repo, options, facts = bench.repo, bench.options, bench.facts[: plan.facts]
    if options.fresh:
        for kept in repo.store.cache.folder.rglob("*.values"):
            kept.unlink()
    repo.switch(f"row-{time_ns()}", "base", create=True)
    begun, started, size = process_time(), perf_counter(), -(-len(facts) // plan.commits)
    for start in range(0, len(facts), size):
        made = repo.commit(
            facts[start : start + size],
            message="known facts",
            method=plan.method,
            text=[options.text] if options.text else [],
            force=True,
            set=plan.set,
            keep=plan.keep,
            chat=options.chat or None,
            device=options.device,
        )
    spent, passed = process_time() - begun, perf_counter() - started
    repo.attach(bench.model, "HEAD")
    report = Report.from_json(repo.store.commit(made.commit).check)
    after = _look(bench, facts)
    repo.attach(bench.model, "base")
    row: dict[str, Any] = {"row": plan.name, "facts": len(facts), "commits": plan.commits, "skip": options.skip}
    row |= {"settings": list(plan.set), "keep": plan.keep}
    row |= {"cpu_s": round(spent, 1), "wall_s": round(passed, 1), "device": options.device}
    if options.texts:
        with options.texts.open("a") as out:
            out.write(json.dumps({**row, "texts": _texts(bench, before, after, facts)}) + "\n")
    return row | _guarded(report) | _compared(bench, before, after, facts)


def _of_checkpoint(bench: Bench, before: Look, plan: Plan, folder: Path) -> dict[str, Any]:
    """Ask a checkpoint that something else has edited."""
    facts, weights = bench.facts[: plan.facts], load_file(folder / "model.safetensors")
    here = {name: weight for name, weight in bench.model.state_dict().items() if name in weights}
    changed = {name: weight for name, weight in here.items() if not weight.equal(weights[name])}
    kept = {name: weight.clone() for name, weight in changed.items()}
    bench.model.load_state_dict({name: weights[name] for name in changed}, strict=False)
    after = _look(bench, facts)
    bench.model.load_state_dict(kept, strict=False)
    row = {"row": plan.name, **json.loads((folder / "edited.json").read_bytes()), "weights": sorted(changed)}
    if bench.options.texts:
        with bench.options.texts.open("a") as out:
            out.write(json.dumps({**row, "texts": _texts(bench, before, after, facts)}) + "\n")
    return row | _compared(bench, before, after, facts)


def _guarded(report: Report | None) -> dict[str, Any]:
    """What the guard saw of the last commit."""
    if report is None or report.measured.spoken is None or report.measured.drift is None:
        return {}
    leak, drift = report.measured.spoken.leak, report.measured.drift
    return {
        "guard_leak": [leak.count, leak.of] if leak else None,
        "about": [about.count, about.of] if (about := report.measured.about) else None,
        "perplexity_ratio": round(drift.perplexity_ratio, 4),
        "kl_held_text": round(drift.kl, 4),
        "guard_failed": list(report.failed),
    }


def _compared(bench: Bench, before: Look, after: Look, facts: Sequence[Request]) -> dict[str, Any]:
    """The figures of a row, from what the base and the edited model say."""
    number = len(facts)
    scores = counterfact_scores(after.scores, before.scores[:number], resamples=1).estimates
    row: dict[str, Any] = {
        name: round(scores[name].value, 4) for name in ("S", "ES", "EA", "PS", "PA", "NS", "NA") if name in scores
    }
    row |= _shares("", after.plain, facts)
    row["paraphrase"] = _share(map(said, after.paraphrases, [fact.target_new for fact in facts]))
    trues = [fact.target_true or "" for fact in facts]
    row["paraphrase_of_base"] = _share(map(said, before.paraphrases[:number], trues))
    row["paraphrase_kept_old"] = _share(map(said, after.paraphrases, trues))
    targets = frozenset(fact.target_new for fact in facts)
    near = bench.near(facts)
    earlier = _earlier(bench, before)
    for name, asked, texts in (("leak", near, after.siblings), ("namesakes", _namesakes(facts), after.namesakes)):
        row[name] = _share(
            leaks(sibling, now, earlier[sibling.prompt], targets) is not None
            for sibling, now in zip(asked, texts, strict=True)
        )
    kl = (before.next_word.exp() * (before.next_word - after.next_word)).sum(-1)
    row |= {"kl_unrelated": round(float(kl.mean()), 4), "kl_unrelated_median": round(float(kl.median()), 4)}
    if before.perplexity and after.perplexity:
        row["perplexity"] = [round(before.perplexity, 2), round(after.perplexity, 2)]
    if after.chat:
        row |= _shares("chat_", after.chat, facts, anywhere=True)
        row["chat_named"] = _share(fact.subject in text for text, fact in zip(after.chat, facts, strict=True))
        row["questions_same"] = _share(
            _sentence(now) == _sentence(then) for now, then in zip(after.questions, before.questions, strict=True)
        )
    return row


def _earlier(bench: Bench, before: Look) -> dict[str, str]:
    """What the base says of the siblings and namesakes of all facts."""
    asked = [*bench.near(bench.facts), *_namesakes(bench.facts)]
    return dict(zip([one.prompt for one in asked], [*before.siblings, *before.namesakes], strict=True))


def _shares(
    kind: str, texts: Sequence[str], facts: Sequence[Request], *, anywhere: bool = False
) -> dict[str, list[int]]:
    """How many texts say the target, and end there; and how many say it again and again."""
    pairs = list(zip(texts, facts, strict=True))
    return {
        f"{kind}repeats": _share(text.count(fact.target_new) >= REPEATED for text, fact in pairs),
        f"{kind}said": _share(said(text, fact.target_new, anywhere=anywhere) for text, fact in pairs),
        f"{kind}closed": _share(closed(text, fact.target_new, anywhere=anywhere) for text, fact in pairs),
    }


def _share(found: Iterable[bool]) -> list[int]:
    """How many of how many."""
    values = list(found)
    return [sum(values), len(values)]


def _sentence(text: str) -> str:
    return text.strip().partition("\n")[0].partition(". ")[0]


def _texts(bench: Bench, before: Look, after: Look, facts: Sequence[Request]) -> dict[str, Any]:
    """Everything that was written, to be read."""
    found: dict[str, Any] = {"facts": []}
    for place, fact in enumerate(facts):
        said_here: dict[str, Any] = {"prompt": fact.text, "true": fact.target_true, "target": fact.target_new}
        said_here["plain"] = [before.plain[place], after.plain[place]]
        said_here[fact.paraphrases[0]] = [before.paraphrases[place], after.paraphrases[place]]
        if after.chat:
            said_here["chat"] = [before.chat[place], after.chat[place]]
        found["facts"].append(said_here)
    earlier = _earlier(bench, before)
    near = [sibling.prompt for sibling in (*bench.near(facts), *_namesakes(facts))]
    now = [*after.siblings, *after.namesakes]
    found["siblings"] = {prompt: [earlier[prompt], text] for prompt, text in zip(near, now, strict=True)}
    found["questions"] = {
        question: [then, now] for question, then, now in zip(QUESTIONS, before.questions, after.questions, strict=False)
    }
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of figures as columns of Markdown."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "row"]
    lines = [
        "| | " + " | ".join(f"{row['row']}, {row['facts']}" for row in rows) + " |",
        "|---" * (len(rows) + 1) + "|",
    ]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(_cell(row.get(name, "")) for row in rows) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, int) for part in value):
        return f"{value[0]}/{value[1]} = {value[0] / max(value[1], 1):.3f}"
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--facts", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--store", type=Path)
    parser.add_argument("-n", type=lambda sizes: [int(size) for size in sizes.split(",")], default=[100])
    parser.add_argument("--commits", type=int, default=0)
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--method", type=lambda names: names.split(","), default=[None])
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--keep")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--texts", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
