"""Verbs that ask, measure and write out the model, and that fit the editors to it."""

# No `from __future__ import annotations` here: what a verb takes is checked against its annotations when it is called.

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchhub.errors import SettingsError
from patchhub.repository.arguments import (
    Amount,
    Count,
    FileFormat,
    Index,
    Metrics,
    Mode,
    Opened,
    Place,
    Placed,
    Quantization,
    Source,
    Type,
    harness_of,
    judge_of,
    many,
    path,
    texts,
    verb,
)
from patchhub.results import Rows
from patchhub.store.store import refuse_store
from patchhub.who import Who

if TYPE_CHECKING:
    from patchhub.evaluation.outside import Harness
    from patchhub.porcelain.exchange import Exported, Served
    from patchhub.porcelain.measure import Bench, Evaluation, Facts
    from patchhub.porcelain.metric import Shown as ShownMetric
    from patchhub.porcelain.model import Answer, Applied
    from patchhub.porcelain.report.report import Written
    from patchhub.porcelain.trust.audit import WrittenEvidence
    from patchhub.porcelain.tune import Tuned


class ModelVerbs(Opened):
    """Verbs around the model and its metric."""

    @verb
    def ask(
        self,
        prompt: str | Sequence[str],
        *,
        rev: str | Sequence[str] = ("HEAD", "base"),
        base: Place | None = None,
        device: str | None = None,
        dtype: Type | None = None,
        quantization: Quantization | None = None,
        chat: bool | None = None,
    ) -> "Rows[Answer]":
        """What the model says to a prompt at each revision: likely next words and a short continuation.

        Args:
            prompt: one, or several, whose answers follow one another; the model is loaded once.
        """
        revisions = many(rev) or ("HEAD", "base")
        self._resolve(*revisions)
        prompts = many(prompt)
        if not prompts or not all(one.strip() for one in prompts):
            problem = (
                "the prompt is empty"
                if len(prompts) == 1
                else "there is no prompt"
                if not prompts
                else "a prompt is empty"
            )
            raise SettingsError(problem, remedy='For example: patchhub ask "The capital of France is"')
        place, placement = self._place(base), self._placement(device, dtype, quantization)
        from patchhub.porcelain.model import ask

        with self._heard() as progress:
            return Rows(ask(self.store, prompts, revisions, progress, base=place, placement=placement, chat=chat))

    @verb
    def apply(
        self,
        rev: str,
        *,
        out: Place,
        base: Place | None = None,
        overwrite: bool = False,
        link: bool = True,
        wise: Mode | None = None,
    ) -> "Applied":
        """Write the model at a revision as an ordinary checkpoint folder, one tensor at a time.

        Args:
            out: the folder to write.
            overwrite: replace an existing folder.
            link: hard-link weight files that the patch does not touch; False: copy them.
            wise: how loading routes to shards; None: as the config says.
        """
        self._resolve(rev)
        place = self._place(base)
        from patchhub.models.fingerprint import refuse_occupied

        refuse_store(self.store, Path(out))
        refuse_occupied(None, Path(out), overwrite=overwrite)
        from patchhub.porcelain.model import apply

        with self._heard() as progress:
            return apply(self.store, rev, Path(out), progress, base=place, overwrite=overwrite, link=link, wise=wise)

    @verb
    def eval(
        self,
        rev: str = "HEAD",
        *,
        suite: Source = None,
        metrics: Metrics = "auto",
        limit: Count | None = None,
        seed: Index | None = None,
        text: Sequence[Place] = (),
        context: Sequence[str] = (),
        all: bool = False,
        csv: Place | None = None,
        facts_csv: Place | None = None,
        plot: Place | None = None,
        note: bool = True,
        judge: str | None = None,
        judge_model: str | None = None,
        harness: str | None = None,
        harness_path: Place | None = None,
        harness_limit: Count | None = None,
        author: str | None = None,
        time: str | None = None,
        device: str | None = None,
        dtype: Type | None = None,
        quantization: Quantization | None = None,
        chat: bool | None = None,
        workers: Count | None = None,
        on: str | None = None,
    ) -> "Evaluation":
        """How well a revision holds facts, and what that costs elsewhere. The scores are kept as a note of the commit.

        Args:
            suite: facts, as `commit` takes them; None only where ``harness`` alone is run.
            metrics: whose scores; auto: zsRE's for a file of its records, else CounterFact's.
            limit: at most so many facts: the first ones, or with ``seed`` a sample.
            seed: of the sample, of sampled text and of the intervals.
            text: files to measure drift on; none: what was kept aside.
            context: text around the prompt in live decoding, with one ``{}``.
            all: every commit below the revision that has no such scores yet; the result's ``history`` lists them.
            csv, facts_csv, plot: files to write the scores to, each fact's own values, and a picture as SVG.
            note: keep the scores with the commit.
            judge, judge_model: an OpenAI-compatible server, whose model (None: its first) says of each answer whether it gives the
                target. Its key is ``PATCHHUB_JUDGE_KEY`` or ``OPENAI_API_KEY`` of the environment.
            harness, harness_path, harness_limit: tasks of lm-evaluation-harness, separated by commas, run on the revision and the base in
                this process; a folder with further tasks; at most so many documents of each.
        """
        self._resolve(rev)
        tasks = None if harness is None else harness_of(harness, harness_path, harness_limit, check=not all)
        self._refuse_device(device)
        placed = (device, dtype, quantization)
        if suite is None:
            return self._harness(rev, None if all or judge else tasks, placed)
        who, asked = self._who(author, time), judge_of(judge, judge_model, os.environ)
        facts = self._suite(suite, metrics, limit=limit, seed=seed, text=text, contexts=tuple(context))
        options = {"judge": asked, "chat": chat, "workers": workers, "on": on}
        done = self._evaluation(rev, facts, who, placed, options, walk=all, keep=note, harness=tasks)
        from patchhub.porcelain.report.charts import write_scores

        write_scores(self.store, done, csv=path(csv), facts_csv=path(facts_csv), plot=path(plot))
        return done

    def _evaluation(
        self,
        rev: str,
        facts: "Facts",
        who: Who,
        placed: Placed,
        options: Mapping[str, Any],
        *,
        walk: bool,
        keep: bool,
        harness: "Harness | None",
    ) -> "Evaluation":
        """The scores of a revision, or of every commit below it; options are those of `Evaluator`."""
        from patchhub.porcelain import measure

        if walk:
            measure.refuse_unkept(keep, harness)
        options = {**options, "placement": self._placement(*placed)}
        with self._heard() as progress, measure.Evaluator(self.store, facts, progress, **options) as evaluator:
            if walk:
                return measure.evaluate_all(evaluator, rev, who)
            return measure.evaluate(evaluator, rev, who, keep=keep, harness=harness)

    def _harness(self, rev: str, harness: "Harness | None", placed: Placed) -> "Evaluation":
        if harness is None:
            raise SettingsError(
                "eval needs facts to evaluate on", remedy="Give --suite FILE; --harness TASKS alone needs none."
            )
        from patchhub.porcelain import measure

        with self._heard() as progress:
            return measure.evaluate_harness(self.store, rev, harness, progress, placement=self._placement(*placed))

    @verb
    def bench(
        self,
        *methods: str,
        suite: Source,
        metrics: Metrics = "auto",
        limit: Count | None = None,
        seed: Index | None = None,
        text: Sequence[Place] = (),
        batch: Count | None = None,
        csv: Place | None = None,
        author: str | None = None,
        time: str | None = None,
        chat: bool | None = None,
    ) -> "Bench":
        """Compare editors on one list of facts, each alone on the base, in a temporary repository.

        Args:
            methods: ``"memit"``, or with settings ``"memit:ridge=400:layers=3-5"``.
            suite, metrics, limit, seed, text, chat: as in `eval`.
            batch: commit so many facts at a time; None: all at once.
            csv: a file to write the table to.
        """
        from patchhub.sets.settings import contender

        contenders = [contender(method) for method in methods]
        facts = self._suite(suite, metrics, limit=limit, seed=seed, text=text)
        from patchhub.porcelain import measure

        with self._heard() as progress:
            who = self._who(author, time)
            done = measure.bench(self.store, contenders, facts, progress, who=who, batch=batch, chat=chat)
        if csv is not None:
            measure.write_bench(done, Path(csv))
        return done

    @verb
    def tune(
        self,
        facts: Source,
        *,
        method: str | None = None,
        limit: Count = 24,
        dry_run: bool = False,
        text: Sequence[Place] = (),
        format: FileFormat | None = None,
    ) -> "Tuned":
        """Try bands of layers, step sizes and lambda on some facts, and write the best into the config.

        Args:
            facts: as `commit` takes them.
            method: memit or pmet; None: the config's.
            limit: use at most so many of the facts.
            dry_run: only show what is found.
            text: files to compute the metric from; only before the first commit.
        """
        from patchhub.editing.requests import read_facts
        from patchhub.sets.settings import chosen_method

        requests, method = read_facts(facts, format=format).requests, chosen_method(self.store, method)
        read = texts(text)
        from patchhub.porcelain.tune import tune

        options: dict[str, Any] = {"method": method, "limit": limit, "dry_run": dry_run, "text": read}
        with self._heard() as progress:
            return tune(self.store, requests, progress, **options)

    @verb
    def metric(self) -> "ShownMetric":
        """The metric: what the weights are asked to keep while facts are written."""
        from patchhub.porcelain.metric import show

        return show(self.store)

    @verb
    def metric_compute(
        self,
        *,
        layers: str | Sequence[int] = (),
        text: Sequence[Place] = (),
        device: str | None = None,
        dtype: Type | None = None,
        quantization: Quantization | None = None,
        memory: Count | None = None,
        workers: Count | None = None,
        on: str | None = None,
    ) -> "ShownMetric":
        """Compute the metric now; else the first commit does.

        Args:
            layers: for which; none: the edited ones.
            text: files to compute it from; none: the base writes it.
            memory: bytes that sums and factors may take.
        """
        from patchhub.sets.settings import layers_of

        chosen, read = layers_of(layers), texts(text)
        from patchhub.porcelain.metric import compute

        with self._heard() as progress:
            placement = self._placement(device, dtype, quantization)
            options: dict[str, Any] = {"placement": placement, "memory": memory, "workers": workers, "on": on}
            return compute(self.store, progress, layers=chosen, text=read, **options)

    @verb
    def metric_import(self, *sources: Place) -> "ShownMetric":
        """Take the metric from a file that `metric_export` wrote, or from second moments of the published editors.

        Args:
            sources: that file; or .npz files, a folder of them, or ``"LAYER=FILE"``.
        """
        from patchhub.porcelain.metric import import_any

        with self._heard() as progress:
            return import_any(self.store, [os.fspath(source) for source in sources], progress)

    @verb
    def metric_export(self, file: Place, *, overwrite: bool = False) -> str:
        """Write the metric to a file, to be imported where facts about the same base are recorded; the file's SHA-256."""
        from patchhub.porcelain.metric import export_metric

        return export_metric(self.store, Path(file), overwrite=overwrite)

    @verb
    def export_peft(
        self,
        rev: str = "HEAD",
        *,
        out: Place,
        rank: Count | None = None,
        tolerance: Amount = 1e-6,
        every_layer: bool = False,
        overwrite: bool = False,
    ) -> "Exported":
        """Write a LoRA adapter for PEFT, vLLM, SGLang and llama.cpp, in a folder of ``out`` named after the commit.

        Args:
            rank: rank of the adapter; None: the smallest that is exact.
            tolerance: largest relative error of a weight.
            every_layer: hold factors of zeros for the layers that do not change, as TGI and LoRAX expect.
            overwrite: replace what is there.
        """
        self._resolve(rev)
        from patchhub.porcelain.exchange import export_peft

        options: dict[str, Any] = {"tolerance": tolerance, "rank": rank, "overwrite": overwrite}
        options["every_layer"] = every_layer
        with self._heard() as progress:
            return export_peft(self.store, rev, Path(out), progress, **options)

    @verb
    def export_gguf(
        self,
        rev: str = "HEAD",
        *,
        out: Place,
        rank: Count | None = None,
        tolerance: Amount = 1e-6,
        fuse: Place | None = None,
        overwrite: bool = False,
    ) -> "Exported":
        """Write an adapter for llama.cpp and Ollama into a folder: a GGUF file named after the commit, and a Modelfile.

        Args:
            rank, tolerance, overwrite: as in `export_peft`.
            fuse: a GGUF file of the base: write the whole model instead, with all of that file but the weights that change.
        """
        self._resolve(rev)
        from patchhub.porcelain.exchange import export_gguf

        options: dict[str, Any] = {"tolerance": tolerance, "rank": rank, "fuse": path(fuse), "overwrite": overwrite}
        with self._heard() as progress:
            return export_gguf(self.store, rev, Path(out), progress, **options)

    @verb
    def verify_served(
        self, url: str, *, rev: str = "HEAD", model: str | None = None, limit: Count = 8, chat: bool = False
    ) -> "Served":
        """Ask an OpenAI-compatible server a few facts of a revision: is it on there?

        Args:
            url: where the interface begins, such as ``http://localhost:8000/v1``.
            model: the name of the model or adapter there; None: the first that the server names.
            limit: at most so many facts.
            chat: ask as a user's message, not as a text to continue.
        """
        self._resolve(rev)
        from patchhub.porcelain.exchange import verify_served

        with self._heard() as progress:
            return verify_served(self.store, url, progress, revision=rev, model=model, limit=limit, chat=chat)

    @verb
    def export_bom(
        self, rev: str = "HEAD", *, out: Place, allowed: Place | None = None, overwrite: bool = False
    ) -> "WrittenEvidence":
        """Write a CycloneDX ML-BOM: the base with its hashes, the pedigree with a patch for each commit and its facts, scores.

        Args:
            allowed: the file of allowed signers; None: the config's.
        """
        self._resolve(rev)
        from patchhub.porcelain.trust.audit import export_bom

        with self._heard() as progress:
            return export_bom(self.store, rev, Path(out), progress, allowed=path(allowed), overwrite=overwrite)

    @verb
    def export_attestations(
        self,
        rev: str = "HEAD",
        *,
        out: Place,
        sign: bool | None = None,
        key: Place | None = None,
        overwrite: bool = False,
    ) -> "WrittenEvidence":
        """Write the scores that are noted about a revision as in-toto Statements, a JSON document a line.

        Args:
            sign, key: as in `commit`: each in a DSSE envelope that is signed.
        """
        self._resolve(rev)
        from patchhub.porcelain.trust.audit import export_attestations

        signer = self._signing(None, None, sign=sign, key=key).signer
        return export_attestations(self.store, rev, Path(out), signer=signer, overwrite=overwrite)

    @verb
    def export_diff(self, rev: str = "HEAD", *, out: Place, overwrite: bool = False) -> "Exported":
        """Write the change of each weight alone, as one safetensors file (docs/format.md, "delta")."""
        self._resolve(rev)
        from patchhub.porcelain.exchange import export_diff

        with self._heard() as progress:
            return export_diff(self.store, rev, Path(out), progress, overwrite=overwrite)

    @verb
    def export_checkpoint(
        self, rev: str = "HEAD", *, out: Place, base: Place | None = None, overwrite: bool = False
    ) -> "Applied":
        """Write the whole model with the change fused in, as `apply` does."""
        applied: Applied = self.apply(rev, out=out, base=base, overwrite=overwrite)
        return applied

    @verb
    def report(
        self,
        rev: str = "HEAD",
        *,
        out: Place,
        compare: Index = 1000,
        overwrite: bool = False,
        time: str | None = None,
    ) -> "Written":
        """Write one HTML page about the repository: history, facts with search, scores, norms, interference.

        Args:
            rev: where a fact counts as active.
            compare: compare so many active facts with one another, the last changed ones.
            overwrite: replace what is there, even if it is no report.
        """
        self._resolve(rev)
        from patchhub.porcelain.report.report import write_report

        made = self._who(None, time).time
        options: dict[str, Any] = {"revision": rev, "compared": compare, "overwrite": overwrite}
        with self._heard() as progress:
            return write_report(self.store, Path(out), progress, time=made, **options)
