// The page, from its data.

const DATA = JSON.parse(byId("data").textContent);

function headline(data, facts) {
  const branches = data.commits.flatMap((commit) => commit.labels).filter(([kind]) => kind === "branch").length;
  byId("name").append(userText(data.name));
  const shown =
    data.commit_id === null
      ? ["the unpatched model"]
      : [userText(data.revision), " (", element("span", { class: "id" }, short(data.commit_id)), ")"];
  byId("about").append(
    "Shown revision: ",
    ...shown,
    ` · base ${data.base.model_type} `,
    element("span", { class: "id" }, short(data.base.id)),
    ` · written ${data.made.replace("T", " ").replace("Z", " UTC")}`,
  );
  const [sentence, grounds] = data.verdict;
  byId("verdict").append(sentence);
  byId("grounds").append(...grounds.map(([level, words]) => element("li", { class: level }, words)));
  const totals = [
    ["Commits", data.commits.length],
    ["Branches", branches],
    ["Facts ever", facts.length],
    ["Active facts", facts.reduce((sum, fact) => sum + fact.active, 0)],
  ];
  byId("totals").append(
    ...totals.map(([name, value]) =>
      element("div", null, element("dt", null, name), element("dd", null, grouped(value))),
    ),
  );
  const { commits, facts: left } = data.left_out;
  if (commits || left) {
    byId("left-out").hidden = false;
    byId("left-out").textContent =
      `This page holds the newest: ${counted(commits, "older commit")} and ${counted(left, "fact")} are left out.`;
  }
}

function main(data) {
  const facts = readFacts(data);
  const lines = linesOf(data);
  const changed = new Map();
  for (const fact of facts) {
    for (const [commit, change] of fact.changes) {
      if (!changed.has(commit)) changed.set(commit, []);
      changed.get(commit).push([fact, change]);
    }
  }
  const scoresOf = (place) => data.scores.filter((note) => note.commit === place);
  let restrict = () => {};
  const open = commitDialog(
    data,
    (place) => changed.get(place) ?? [],
    scoresOf,
    (place) => restrict(place),
  );
  headline(data, facts);
  historySection(data, lines, open);
  restrict = factsSection(data, facts, open);
  scoresSection(data, lines, open);
  weightsSection(data, lines, open);
  overlapsSection(data, facts);
  guardSection(data, open);
}

main(DATA);
