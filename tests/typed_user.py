"""What a user of the front door writes; the type checker reads this file, and nothing runs it."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

import patchhub


def teach(folder: Path) -> PreTrainedModel:
    with patchhub.open(folder) as repo:
        done = repo.commit(
            [{"prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon"}],
            message="why",
            set={"layers": [3, 4]},
            on_conflict="replace",
        )
        held: int = done.held
        newest: str = repo.log(limit=1)[0].id
        answers: list[str] = [answer.continuation for answer in repo.ask("The capital of France is", rev=newest)]
        facts: tuple[patchhub.Request, ...] = repo["HEAD~1"].facts
        branches: list[str] = [named.name for named in repo.branch()]
        moved: str | None = repo.branch("x", "HEAD~1").after
        score: float = repo.eval(suite="facts.json").scores["S"].value
        print(branches, moved, score)
        merged = repo.merge("side", theirs=True)
        if merged.outcome == "merged":
            print(held, answers, facts)
        document: dict[str, object] = repo.status().to_json()
        print(document)
        try:
            repo.revert("HEAD", check=True)
        except patchhub.PatchhubError as error:
            print(error.message, error.remedy, error.exit_code)
        model: PreTrainedModel = repo.load("main", side_path=True)
        return repo.attach(model, "base")


def load(folder: Path) -> PreTrainedModel:
    model = patchhub.load(folder, revision="main", dtype="bfloat16")
    patchhub.detach(model)
    return patchhub.attach(model, folder)


def misuse(repo: patchhub.Repository) -> None:
    repo.commit([], message="why", on_conflict="never")  # type: ignore[arg-type]
    repo.log(limit="many")  # type: ignore[arg-type]
    repo.apply("HEAD")  # type: ignore[call-arg]
    repo.load(verify="yes")  # type: ignore[arg-type]
