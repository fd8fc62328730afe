"""The page of `report` in a real browser: what a reader sees, with a mouse, with keys, on a phone, in the dark, and under attack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from patchhub.objects import Note
from patchhub.porcelain import refs
from patchhub.porcelain.merge import merge
from patchhub.porcelain.report.report import write_report
from patchhub.progress import Silent
from patchhub.sets.commits import Draft, prepare, record
from patchhub.who import Who
from tests.browser import Page, open_browser
from tests.porcelain.synthetic import AUTHOR, BY, TIME, Synthetic, make_request, make_store, stamp

PHONE, DESK = 360, 1200
ATTACKS = [
    "</script><script>document.title='taken'</script>",
    "<img src=nowhere onerror=\"document.title='taken'\">",
    "<!--<script>",
    "javascript:document.title='taken'",
    "{}\"'`${document.title='taken'}",
]

CONTRASTS = """
(() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => parts(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)).reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (parts(colour)[3] !== 0) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    if (!text.textContent.trim() || !node.checkVisibility() || node.closest('script, style, noscript')) continue;
    const style = getComputedStyle(node);
    const [one, other] = [light(node.closest('svg') ? style.fill : style.color), light(ground(node))];
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    found.push([contrast, parseFloat(style.fontSize), text.textContent.trim().slice(0, 40)]);
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty facts on two branches, merged and evaluated."""
    store = make_store(tmp_path_factory.mktemp("store"))
    store.commit(*(make_request(f"Person {n}") for n in range(52)), message="many people\n\nfrom a list")
    refs.create_branch(store.repository, "side", "HEAD", BY)
    for n in range(4):
        store.commit(make_request(f"Here {n}", "Dutch"), message=f"here {n}")
    refs.switch(store.repository, "side", BY)
    for n in range(4):
        store.commit(make_request(f"There {n}", "German"), message=f"there {n}")
    refs.switch(store.repository, "main", BY)
    merge(store.repository, "side", stamp("both sides"))
    for n, revision in enumerate(["HEAD~3", "HEAD~1", "side", "HEAD"]):
        commit = store.repository.resolve(revision)
        assert commit is not None
        scores = {"S": {"value": 0.5 + n / 10, "low": 0.4, "high": 1.0}, "kl": n / 50}
        note = Note(commit=commit, made_by=AUTHOR, scores=scores, settings={"facts": 9}, suite="counterfact")
        store.repository.add_note(note, command="eval", arguments={}, author=AUTHOR, time=TIME)
    return written(store)


def written(store: Synthetic) -> Path:
    file = store.repository.root.parent / "report.html"
    write_report(store.repository, file, Silent(), time=TIME)
    return file


def text(page: Page, selector: str) -> str:
    return str(page.run(f"document.querySelector('{selector}').innerText"))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_it_fits_the_screen_and_can_be_read(page: Page, report: Path, width: int, dark: bool) -> None:
    page.show(report, width=width, dark=dark)
    assert page.errors == []
    assert page.requests == [report.as_uri()]
    assert page.run("document.documentElement.scrollWidth") <= width
    cut = "[...document.querySelectorAll('#commits .line.dim')].filter(line => line.scrollWidth > line.clientWidth).length"
    assert page.run(cut) == 0
    found = page.run(CONTRASTS)
    assert len(found) > 200
    assert [entry for entry in found if entry[0] < 4.5 or entry[1] < 12] == []


def test_every_section_shows_what_there_is(page: Page, report: Path) -> None:
    page.show(report, width=DESK)
    assert text(page, "#totals").split() == [
        "Commits",
        "10",
        "Branches",
        "2",
        "Facts",
        "ever",
        "60",
        "Active",
        "facts",
        "60",
    ]
    assert page.run("document.querySelectorAll('#commits li').length") == 10
    assert "main (HEAD)" in text(page, "#commits li")
    assert page.run("document.querySelectorAll('#fact-rows tbody tr').length") == 50
    assert page.run("[...document.querySelectorAll('#score-plots h3')].map(node => node.textContent)") == ["kl", "S"]
    assert page.run("document.querySelectorAll('#weight-plots .curve').length") >= 4
    assert not page.run("/layers \\d/.test(document.getElementById('weight-plots').innerText)")
    assert "60 compared facts of 60 active" in text(page, "#compared")


def test_every_plot_has_axes_with_numbers_and_all_marks_inside(page: Page, report: Path) -> None:
    page.show(report, width=PHONE)
    outside = page.run(
        "[...document.querySelectorAll('figure svg[role=img]')].flatMap(svg => { const box = svg.getBoundingClientRect();"
        " return [...svg.querySelectorAll('text, circle, rect')].filter(mark => { const at = mark.getBoundingClientRect();"
        " return at.left < box.left - 1 || at.right > box.right + 1 || at.top < box.top - 1 || at.bottom > box.bottom + 1; })"
        ".map(mark => mark.outerHTML); })"
    )
    assert outside == []
    labels = page.run(
        "[...document.querySelectorAll('figure svg[role=img]')].map(svg => svg.querySelectorAll('.axis text').length)"
    )
    assert len(labels) >= 5
    assert min(labels) >= 4


def test_search_narrows_the_facts(page: Page, report: Path) -> None:
    page.show(report, width=PHONE)
    page.click("#words")
    page.write("dutch HERE")
    assert text(page, "#found") == "4 facts, 4 active"
    page.write(" 3")
    assert page.run("document.querySelectorAll('#fact-rows tbody tr').length") == 1
    assert "Here 3" in text(page, "#fact-rows")
    page.run("document.getElementById('words').select()")
    page.write(make_request("Here 2", "Dutch").id[:12])
    assert text(page, "#found") == "1 fact, 1 active"
    page.write(" nothing like it")
    assert text(page, "#fact-rows").strip() == "No fact matches."


def test_the_table_turns_its_pages(page: Page, report: Path) -> None:
    page.show(report, width=DESK)
    page.click("#fact-rows .pager button:last-child")
    assert "51–60 of 60 facts" in text(page, "#fact-rows .pager")
    assert page.run("document.querySelectorAll('#fact-rows tbody tr').length") == 10


def test_a_commit_opens_and_leads_to_its_facts(page: Page, report: Path) -> None:
    page.show(report, width=PHONE)
    page.click('#commits [data-commit="0"]')
    shown = text(page, "#commit")
    assert "both sides" in shown
    assert "+4 −0, 60 active after it" in shown
    assert "S" in shown
    assert "[0.4, 1]" in shown
    page.click("#commit section button.link")
    assert not page.run("document.getElementById('commit').open")
    assert text(page, "#found").startswith("4 facts, 4 active that ")
    page.click("#found button")
    assert text(page, "#found") == "60 facts, 60 active"


def test_everything_can_be_reached_with_keys(page: Page, report: Path) -> None:
    page.show(report, width=DESK)
    reached = set()
    for _ in range(80):
        page.press("Tab")
        reached.add(
            page.run("document.activeElement.closest('section, nav, form, a')?.id || document.activeElement.tagName")
        )
    assert {"history", "filter", "facts"} <= reached
    page.run("document.querySelector('#commits button').focus()")
    page.press("Enter")
    assert page.run("document.getElementById('commit').open && document.activeElement.closest('dialog') !== null")
    page.press("Escape")
    assert not page.run("document.getElementById('commit').open")
    readout = "#score-plots > :last-child .readout"
    page.run("document.querySelector('#score-plots > :last-child svg').focus()")
    last = text(page, readout)
    page.press("Home")
    first = text(page, readout)
    page.press("ArrowRight")
    assert len({first, text(page, readout), last}) == 3
    assert first.startswith("0.5 [0.4, 1] at ")


def test_texts_stay_texts(page: Page, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for attack in ATTACKS:
        subject, target = attack.replace("{}", "[]"), f"target {attack}"
        patch = store.put_patch([make_request(subject, target)])
        _, head = store.repository.head
        draft = Draft(
            (head,) if head else (), store.repository.active(head) | patch.elements, patch.metric, "commit", {}
        )
        by = Who(f"{attack} <a@example.org>", TIME, f"{attack}\n{attack}")
        check = {"guard": {"failed": [f"failed {attack}"]}, "forced": True}
        commit = record(
            store.repository,
            replace(
                prepare(store.repository, draft, by), check={**prepare(store.repository, draft, by).check, **check}
            ),
            draft,
        )
        note = Note(commit=commit, made_by=attack, scores={attack: 0.5}, settings={attack: attack}, suite="counterfact")
        store.repository.add_note(note, command="eval", arguments={}, author=AUTHOR, time=TIME)
    file = written(store)
    page.show(file, width=DESK)
    before = page.run("document.querySelectorAll('script, img, iframe, object, embed, form, link, a').length")
    for attack in ATTACKS:
        assert attack in text(page, "#commits")
        assert attack.replace("{}", "[]") in text(page, "#fact-rows")
        assert attack in text(page, "#score-plots")
        assert f"failed {attack}" in text(page, "#guard-rows")
    for place in range(len(ATTACKS)):
        page.click(f'#commits [data-commit="{place}"]')
        page.press("Escape")
    assert page.run("document.title") != "taken"
    assert page.run("document.querySelectorAll('script, img, iframe, object, embed, form, link, a').length") == before
    assert page.run("document.querySelectorAll('script').length") == 2
    assert page.errors == []
    assert page.requests == [file.as_uri()]


def test_a_page_without_anything_says_so(page: Page, tmp_path: Path) -> None:
    file = written(make_store(tmp_path))
    page.show(file, width=PHONE)
    assert page.errors == []
    for section in ("commits", "fact-rows", "score-plots", "weight-plots", "guard-rows"):
        assert page.run(f"document.querySelector('#{section} .empty') !== null"), section
    assert page.run("document.querySelector('#scores .empty code').textContent") == "patchhub eval --suite FILE"
    assert not page.run("document.body.innerText.includes('`')")


def test_it_prints_on_white(page: Page, report: Path) -> None:
    page.show(report, width=DESK, dark=True)
    assert page.printed().startswith(b"%PDF")
    page.show(report, width=DESK, dark=True, paper=True)
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert min(entry[0] for entry in page.run(CONTRASTS)) >= 4.5
    assert page.run("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_a_revision_older_than_the_page_is_still_named(page: Page, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    first = store.commit(make_request("Ada"))
    store.commit(make_request("Bob"))
    file = tmp_path / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("patchhub.porcelain.report.report.COMMITS", 1)
        write_report(store.repository, file, Silent(), time=TIME, revision=first)
    page.show(file, width=PHONE)
    assert page.errors == []
    assert first[:12] in text(page, "#about")
    assert "1 older commit" in text(page, "#left-out")
