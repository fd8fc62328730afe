"""Habits of the hand: what people type who know git, jj and hf, answered with what does it here.

A usage error names what was meant, or nothing at all: a wrong suggestion is worse than none.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Final

import click

_REVERT = "`patchhub revert --subject TEXT` takes facts back, whichever commit wrote them."
_TEXTS = (
    "Nothing is checked out as files: `patchhub show REV` lists a commit's facts, `patchhub search WORDS` finds facts."
)

_LOGIN = "`hf auth login` signs in to the Hub, `hf auth whoami` says who that is; patchhub uses what they keep."
_FILES = "`patchhub export` writes a revision for other programs, `patchhub push` to a folder all of the store."
_ONE_MODEL = "A store is about one base, and nothing is checked out as files: `patchhub clone` makes another store."
_SHORT = "patchhub has no short names:"

COMMANDS: Final[Mapping[str, str]] = {
    "abandon": "`patchhub undo` takes the last command back, `patchhub revert REV` any commit.",
    "add": "There is no staging area: `patchhub commit FILE -m TEXT` writes the facts of a file.",
    "am": "`patchhub import FOLDER` takes an adapter, `patchhub pull` what others pushed.",
    "archive": _FILES,
    "auth": _LOGIN,
    "bookmark": "`patchhub branch` lists and makes branches, `patchhub tag` tags.",
    "br": f"{_SHORT} `patchhub branch`.",
    "bundle": _FILES,
    "cat-file": "`patchhub show REV --json` tells all of a commit, `patchhub fsck` reads every object.",
    "ci": f"{_SHORT} `patchhub commit FILE -m TEXT`.",
    "co": f"{_SHORT} `patchhub switch BRANCH`.",
    "amend": "`patchhub commit --amend` changes the last commit.",
    "checkout": "`patchhub switch BRANCH` changes the branch, `patchhub switch --detach REV` looks at a commit.",
    "clean": "`patchhub gc` deletes what nothing needs.",
    "delete": _REVERT,
    "describe": "`patchhub show REV` begins with a commit's names.",
    "download": "`patchhub clone hf://user/repo` makes a store of a shared one, `patchhub fetch` brings what is new.",
    "edit": "`patchhub update --subject TEXT --target TEXT` changes one fact, `patchhub commit` writes new ones.",
    "format-patch": _FILES,
    "git": "Leave `git` out: `patchhub push`, `patchhub fetch` and `patchhub clone` are commands themselves.",
    "grep": "`patchhub search WORDS` finds facts, `patchhub log -S TEXT` the commits that changed some.",
    "list": "`patchhub show REV` lists a commit's facts, `patchhub diff` all active ones, `patchhub log` the commits.",
    "ls": "`patchhub show REV` lists a commit's facts, `patchhub diff` all active ones, `patchhub log` the commits.",
    "ls-files": _TEXTS,
    "ls-remote": "`patchhub fetch`, then `patchhub branch -r` lists what a remote has.",
    "login": _LOGIN,
    "mv": "`patchhub update --subject TEXT --target TEXT` changes a fact, `patchhub branch -m OLD NEW` renames a branch.",
    "new": "`patchhub switch -c NAME REV` begins a branch, `patchhub commit` writes facts.",
    "notes": "`patchhub eval` makes notes of scores, `patchhub show REV` tells them.",
    "range-diff": "`patchhub diff A...B` and `patchhub log A...B` tell what two branches do not share.",
    "rebase": "A state is a set of facts, so order does not matter: `patchhub merge REV` joins two "
    "branches, `patchhub cherry-pick REV` takes one commit.",
    "restore": "`patchhub revert REV` takes a commit back, `patchhub reset REV` moves the branch, "
    "`patchhub undo` takes back the last command.",
    "repo": "`patchhub push` makes a repository on the Hub, private, where there is none.",
    "rev-list": "`patchhub log --format %H` prints the ids of commits.",
    "rev-parse": "`patchhub show REV --json` has a commit's id; a branch, a tag or some digits stand for it everywhere.",
    "rm": _REVERT,
    "shortlog": "`patchhub log --format '%an %s'` prints authors and messages.",
    "split": "`patchhub revert --subject TEXT` takes one fact back, `patchhub commit` writes it in a commit of its own.",
    "st": f"{_SHORT} `patchhub status`.",
    "stash": "There is nothing to put aside: commits are made whole. Make a branch: `patchhub switch -c NAME`.",
    "submodule": _ONE_MODEL,
    "upload": "`patchhub push` brings branches to a remote, `patchhub remote add origin hf://user/repo` names one.",
    "version": "`patchhub --version` says it.",
    "whatchanged": "`patchhub log -p` lists each commit's facts, `patchhub log --stat` its sizes.",
    "whoami": _LOGIN,
    "worktree": _ONE_MODEL,
}
"""Commands of git, jj and hf that are none here."""

_BISECTED = "One command does all steps: `patchhub bisect GOOD BAD -- COMMAND`, or with --metric in place of COMMAND."
_LISTED = "`patchhub remote` lists every remote with its address."
_BACK = "`patchhub undo N` goes back by N operations, which `patchhub op log` lists; `patchhub redo` forward."

WORDS: Final[Mapping[tuple[str, str], str]] = {
    **dict.fromkeys((("bisect", word) for word in ("start", "good", "bad", "run", "reset", "skip", "log")), _BISECTED),
    **dict.fromkeys((("op", word) for word in ("restore", "undo", "revert", "show", "diff")), _BACK),
    **dict.fromkeys((("remote", word) for word in ("show", "get-url")), _LISTED),
    ("remote", "prune"): "`patchhub fetch REMOTE --prune` forgets branches that the remote does not have any more.",
    ("remote", "update"): "`patchhub fetch REMOTE` brings all branches, tags and notes of a remote.",
    ("reflog", "expire"): "Nothing that an operation leads to is deleted: `patchhub gc` deletes the rest.",
    ("reflog", "delete"): "Nothing that an operation leads to is deleted: `patchhub gc` deletes the rest.",
    ("config", "--list"): "`patchhub config` lists all settings.",
    ("config", "-l"): "`patchhub config` lists all settings.",
    ("config", "list"): "`patchhub config` lists all settings.",
    ("config", "--get"): "`patchhub config KEY` shows one setting.",
    ("config", "get"): "`patchhub config KEY` shows one setting.",
    ("config", "set"): "`patchhub config KEY VALUE` sets one.",
    ("config", "--add"): "`patchhub config KEY VALUE` sets one.",
    ("config", "unset"): "`patchhub config KEY --unset` goes back to the default.",
    **dict.fromkeys(
        (("config", word) for word in ("--global", "--system", "--local", "--user", "--edit", "-e")),
        "Settings belong to one store: `patchhub config` lists them, `patchhub config KEY VALUE` sets one.",
    ),
}
"""What people write first after a command, where git or jj has commands below it."""

MORE: Final[Mapping[str, str]] = {
    "cherry-pick": "One commit at a time: `patchhub cherry-pick REV`; `patchhub merge REV` brings all of a branch.",
    "fetch": "`patchhub fetch REMOTE` brings all branches, tags and notes of one remote.",
    "log": "Write a range in one word: `patchhub log A..B`.",
    "merge": "Two branches at a time: `patchhub merge REV`, then the next.",
    "pull": "`patchhub pull REMOTE` brings the branch of the current one's name; `patchhub merge REMOTE/BRANCH` another.",
    "revert": "One commit at a time: `patchhub revert REV`; `patchhub squash N` first makes one of several.",
    "show": "One at a time: `patchhub show REV`, `patchhub show FACT` or `patchhub show REV:FACT`.",
}
"""Commands that git gives more words than they take here."""

MISSING: Final[Mapping[str, str]] = {
    "init": "BASE is a folder with a model, or its name on the Hub: `patchhub init HuggingFaceTB/SmolLM2-135M-Instruct`.",
    "clone": "ADDRESS is a Hub repository, hf://user/facts, or the folder of another store or remote.",
    "blame": 'PROMPT is what the model was asked: `patchhub blame "The capital of Kenya is"`.',
    "squash": "SPAN is how many of the newest commits become one: `patchhub squash 2`.",
    "bisect": _BISECTED,
    "apply": "`patchhub apply HEAD --out FOLDER` writes the model.",
    "import": "SOURCE is a folder with a LoRA adapter of PEFT, or with a fine-tuned model of this base.",
    "switch": "`patchhub branch` lists the branches.",
    "merge": "`patchhub branch -a` lists what can be merged.",
    "reset": "`patchhub log` lists the commits; `patchhub reset HEAD~1` leaves the last one.",
    "cherry-pick": "`patchhub log --all` lists the commits.",
    "verify-served": "ADDRESS is where the server listens: `patchhub verify-served http://localhost:8080`.",
    "patchhub": "`patchhub --help` lists the commands.",
}
"""What an argument is that was left out."""

_NO_STAGING = "There is no staging area: `patchhub commit FILE -m TEXT` writes the facts of a file."
_FORCE = (
    "A push never overwrites what others pushed. `patchhub pull` first, which merges by fact, then push; "
    "--force-with-lease overwrites what was seen at the last fetch."
)
_PLAIN_RESET = "`patchhub reset REV` is enough: there are no files that could differ."

_NO_EDITOR = "No editor opens: -m says why."
_WHOLE = "It is one commit or none; nothing stops half-way. `patchhub undo` takes it back."
_ONE_COMMIT = "A commit is made whole; `patchhub squash 2` joins it with the one before."

OPTIONS: Final[Mapping[tuple[str, str], str]] = {
    **{(command, "--no-edit"): _NO_EDITOR for command in ("commit", "merge", "revert", "cherry-pick")},
    **{(command, option): _WHOLE for command in ("revert", "cherry-pick") for option in ("--abort", "--continue")},
    ("cherry-pick", "-n"): _ONE_COMMIT,
    ("cherry-pick", "--no-commit"): _ONE_COMMIT,
    ("cherry-pick", "-x"): "`patchhub show REV` says which commit was picked.",
    ("branch", "--show-current"): "`patchhub status` begins with the branch.",
    (
        "branch",
        "--merged",
    ): "`patchhub log A..B` is empty where A has all of B; `patchhub merge-base A B` is what both have.",
    ("branch", "--contains"): "`patchhub merge-base REV BRANCH` is REV itself where BRANCH has it.",
    ("branch", "-u"): "Branches of one name belong together; `patchhub push REMOTE BRANCH` is enough.",
    ("commit", "-p"): _NO_STAGING,
    ("commit", "--allow-empty"): "`patchhub tag NAME -m TEXT` says something of a commit without facts.",
    ("commit", "-a"): _NO_STAGING,
    ("commit", "--dry-run"): "A commit is taken back bit for bit: try it, then `patchhub undo`.",
    ("commit", "-F"): "`patchhub commit FILE -m TEXT`: FILE holds the facts, -m the reason.",
    ("push", "--force"): _FORCE,
    ("push", "-f"): _FORCE,
    ("push", "-u"): "Branches of one name belong together; `patchhub push REMOTE BRANCH` is enough.",
    ("push", "--set-upstream"): "Branches of one name belong together; `patchhub push REMOTE BRANCH` is enough.",
    ("pull", "--rebase"): "Order does not matter: `patchhub pull` merges by fact.",
    ("fetch", "--all"): "`patchhub fetch REMOTE` brings all branches, tags and notes of one remote.",
    ("clone", "--depth"): 'A store is cloned whole: deltas are small. `patchhub.load("hf://user/repo")` '
    "reads only what one revision needs.",
    ("clone", "-b"): "`patchhub clone ADDRESS`, then `patchhub switch BRANCH` in its folder.",
    ("branch", "-f"): "`patchhub switch BRANCH`, then `patchhub reset REV` moves it.",
    (
        "log",
        "--merges",
    ): "`patchhub log --graph` draws merges, `patchhub log --first-parent` leaves what they brought out.",
    (
        "log",
        "--no-merges",
    ): "`patchhub log --graph` draws merges, `patchhub log --first-parent` leaves what they brought out.",
    ("log", "--decorate"): "`patchhub log` always names branches and tags.",
    ("log", "--reverse"): "`patchhub log` begins with the newest; `--json` for programs.",
    ("log", "--grep"): "`patchhub log -S TEXT` looks for facts, `patchhub search WORDS` too.",
    ("tag", "-a"): "`patchhub tag NAME -m TEXT` says what a tag is for.",
    ("tag", "-f"): "Tags do not move; `patchhub tag -d NAME` drops one, which then can be made anew.",
    ("reset", "--hard"): _PLAIN_RESET,
    ("reset", "--soft"): _PLAIN_RESET,
    ("reset", "--mixed"): _PLAIN_RESET,
    ("merge", "--ff-only"): "`patchhub merge --dry-run REV` says what it would do.",
    ("merge", "--no-commit"): "`patchhub merge --dry-run REV` says what it would do, `patchhub undo` takes it back.",
    ("merge", "--squash"): "`patchhub merge REV`, then `patchhub squash 2` makes one commit of the newest two.",
    ("revert", "-n"): "A revert is one commit; `patchhub squash 2` joins it with the one before.",
    ("revert", "--no-commit"): "A revert is one commit; `patchhub squash 2` joins it with the one before.",
    ("switch", "-C"): "`patchhub switch BRANCH`, then `patchhub reset REV` moves it; -c makes a new one.",
    ("switch", "-f"): "There are no files that could differ: `patchhub switch BRANCH` is enough.",
    ("gc", "--prune"): "`patchhub gc --grace 0` keeps nothing for a while; `--dry-run` first says what would go.",
    ("gc", "--aggressive"): "`patchhub gc --pack` makes few files of many.",
    ("undo", "--list"): "`patchhub op log` lists what can be undone.",
    ("clone", "--branch"): "`patchhub clone ADDRESS`, then `patchhub switch BRANCH` in its folder.",
    ("init", "--bare"): "A store has no files beside it; `patchhub push` to a folder makes a remote there.",
    ("init", "-b"): "The first branch is main: `patchhub branch -m NAME` renames it.",
    ("show", "--name-only"): "`patchhub show REV` lists the facts, `patchhub show --stat` sizes alone.",
    ("diff", "--name-only"): "`patchhub diff A B` lists facts, one a line.",
    ("patchhub", "-v"): "`patchhub --version` says the version; a command's own -v follows its name.",
    ("patchhub", "--json"): "It follows the command: `patchhub log --json`.",
    ("patchhub", "-C"): "`patchhub --repo FOLDER COMMAND` names the store.",
    ("diff", "--cached"): "There is no staging area: `patchhub diff A B` compares two revisions.",
    ("diff", "--staged"): "There is no staging area: `patchhub diff A B` compares two revisions.",
    ("diff", "--stat"): "`patchhub diff --weights` compares norms and ranks, `patchhub log --stat` tells sizes.",
    ("status", "--porcelain"): "`patchhub status --json` is for programs.",
    ("status", "-s"): "`patchhub log -1 --oneline` is the short form.",
    ("status", "--short"): "`patchhub log -1 --oneline` is the short form.",
}
"""Options of git that are none here, by command."""

_ALIKE: Final = 0.8  # of two names: less, and a suggestion misleads


def answered(error: click.UsageError) -> click.UsageError:
    """A usage error with the answer to a habit, or with a suggestion only where it is near."""
    root = error.ctx is None or error.ctx.parent is None
    command = "patchhub" if root else (error.ctx.info_name if error.ctx else None) or ""
    here = "patchhub" if root else f"patchhub {command}"
    if isinstance(error, click.MissingParameter):
        hint = f" {MISSING[command]}" if command in MISSING else ""
        return click.UsageError(f"{error.format_message()}{hint}", error.ctx)
    if not isinstance(error, click.NoSuchOption):
        hint = f" {MORE[command]}" if command in MORE and "extra argument" in error.message else ""
        return click.UsageError(f"{error.format_message().rstrip('.')}.{hint}", error.ctx) if hint else error
    name = error.option_name
    if (command, name) in OPTIONS:
        return click.UsageError(f"{here} has no {name}. {OPTIONS[command, name]}", error.ctx)
    known = [option for param in (error.ctx.command.params if error.ctx else ()) for option in param.opts]
    stems = {option.lstrip("-"): option for option in known if option.startswith("--")}
    close = difflib.get_close_matches(name.lstrip("-"), stems, n=1, cutoff=_ALIKE)
    hint = f" Did you mean {stems[close[0]]}?" if close else ""
    return click.UsageError(f"there is no option {name}.{hint}", error.ctx)
