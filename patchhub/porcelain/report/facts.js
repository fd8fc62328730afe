// The table of facts: search, filter, order, pages.

const FACT_PAGE = 50;
const ID = /^[0-9a-f]{6,64}$/;
const CHANGES = { 1: ["added", "good"], [-1]: ["removed", "bad"], 0: ["recorded again", "dim"] };

function readFacts(data) {
  return data.facts.map((row, place) => ({
    place,
    ...Object.fromEntries(data.fact_fields.map((field, n) => [field, row[n]])),
  }));
}

const plainText = (fact) =>
  fact.prompt === null ? `request ${fact.id}` : `${fact.prompt.replace("{}", () => fact.subject)} ${fact.target_new}`;

// A fact in words, its subject and its target marked; its id where the texts are withheld.
function factText(fact) {
  if (fact.prompt === null)
    return element("span", { class: "dim" }, "request ", element("span", { class: "id" }, fact.id), " (text withheld)");
  const [before, after] = fact.prompt.split("{}");
  return element(
    "span",
    { class: "user", dir: "auto" },
    before,
    element("bdi", { class: "subject" }, fact.subject),
    after,
    " ",
    element("bdi", { class: "target" }, fact.target_new),
  );
}

function factsSection(data, facts, open) {
  const place = byId("fact-rows");
  const form = byId("filter");
  let only = null; // the commit whose facts are shown alone
  let texts = null; // what is searched, made at the first search
  const show = paged(place, FACT_PAGE, "fact", (rows) =>
    rows.length
      ? table(
          [
            ["Fact", false],
            ["", false],
            ["Misfit", true],
            ["History", false],
          ],
          rows.map((fact) => factRow(data, fact, open)),
        )
      : nothing(facts.length ? "No fact matches." : "No fact was ever committed."),
  );

  function searched(fact) {
    const who = fact.changes.map(
      ([at]) => `${data.commits[at].author} ${data.commits[at].message} ${day(data.commits[at].time)}`,
    );
    return `${plainText(fact)} ${fact.target_true ?? ""} ${who.join(" ")}`.toLowerCase();
  }
  // A word is in the texts, or it begins the id of the fact or of one of its commits.
  function fits(fact, word) {
    return (
      texts[fact.place].includes(word) ||
      (ID.test(word) &&
        (fact.id.startsWith(word.slice(0, fact.id.length)) ||
          fact.changes.some(([at]) => data.commits[at].id.startsWith(word))))
    );
  }
  function update() {
    const words = byId("words").value.toLowerCase().split(/\s+/).filter(Boolean);
    const state = byId("state").value;
    texts = texts ?? (words.length ? facts.map(searched) : null);
    const found = facts.filter(
      (fact) =>
        (state === "all" || (state === "active") === (fact.active === 1)) &&
        (only === null || fact.changes.some(([commit]) => commit === only)) &&
        words.every((word) => fits(fact, word)),
    );
    sortFacts(found, byId("order").value);
    const active = found.reduce((sum, fact) => sum + fact.active, 0);
    const clear =
      only === null
        ? null
        : element(
            "button",
            { type: "button", class: "link", onclick: () => restrict(null) },
            "Show those of all commits",
          );
    byId("found").replaceChildren(
      `${counted(found.length, "fact")}, ${grouped(active)} active`,
      ...(only === null
        ? []
        : [" that ", element("span", { class: "id" }, short(data.commits[only].id)), " changed. ", clear]),
    );
    show(found);
  }
  function restrict(commit) {
    only = commit;
    update();
    byId("facts").scrollIntoView({ block: "start" });
  }
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  update();
  return restrict;
}

function sortFacts(facts, order) {
  if (order === "text") facts.sort((one, other) => plainText(one).localeCompare(plainText(other)));
  if (order === "misfit")
    facts.sort((one, other) => (other.misfit ?? -1) - (one.misfit ?? -1) || one.place - other.place);
}

function factRow(data, fact, open) {
  const was = fact.target_true ? element("div", { class: "dim small" }, "was ", userText(fact.target_true)) : null;
  const state = fact.active
    ? element("span", { class: "state good" }, "active")
    : element("span", { class: "state dim" }, "not active");
  const share = fact.misfit === null ? null : percent(fact.misfit);
  const recent = fact.changes.slice(-4).reverse();
  const hidden = fact.changes.length - recent.length;
  const steps = recent.map(([commit, change]) => changeItem(data.commits[commit], commit, change, open));
  return [
    [factText(fact), was],
    state,
    share,
    element(
      "ul",
      { class: "changes" },
      steps,
      hidden ? element("li", { class: "dim" }, `and ${hidden} earlier`) : null,
    ),
  ];
}

function changeItem(commit, place, change, open) {
  const [verb, look] = CHANGES[change];
  return element(
    "li",
    null,
    element("span", { class: look }, verb),
    ` ${day(commit.time)} in `,
    element(
      "button",
      { type: "button", class: "link id", onclick: () => open(place), "aria-label": `commit ${short(commit.id)}` },
      short(commit.id),
    ),
    commit.parents.length > 1 ? " (merge)" : "",
    " by ",
    userText(person(commit.author)),
    ": ",
    userText(firstLine(commit.message)),
  );
}
