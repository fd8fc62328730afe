// What the guard measured when each commit was made.

const GUARD_PAGE = 20;

const MEASURED = [
  ["new facts held", (guard) => shareOf(guard.own)],
  ["earlier facts lost", (guard) => shareOf(guard.earlier)],
  ["drift, nats per token", (guard) => known(guard.drift)],
  ["perplexity ratio", (guard) => known(guard.perplexity_ratio)],
  ["crowded out", (guard) => shareOf(guard.crushed)],
  ["largest stretch", (guard) => known(guard.stretch)],
];
const shareOf = (share) => (share ? `${grouped(share[0])} of ${grouped(share[1])}` : null);
const known = (value) => (value === null ? null : figure(value));

function guardSection(data, open) {
  const place = byId("guard-rows");
  const checked = data.commits.map((commit, at) => at).filter((at) => data.commits[at].guard);
  if (!checked.length) return void place.replaceChildren(nothing("No commit has been checked by the guard."));
  const columns = [["Commit", false], ["Verdict", false], ...MEASURED.map(([name]) => [name, true])];
  const row = (at) => [
    [commitLink(data, at, open), " ", userText(firstLine(data.commits[at].message))],
    verdict(data.commits[at].guard),
    ...MEASURED.map(([, read]) => read(data.commits[at].guard)),
  ];
  paged(place, GUARD_PAGE, "commit", (rows) => table(columns, rows.map(row)))(checked);
}

// In words: what failed, if anything, and whether that was overruled.
function verdict(guard) {
  if (guard.failed.length) {
    const word = guard.forced ? "failed, and was forced" : "failed";
    const reasons = guard.failed.map((reason) => element("div", null, userText(reason)));
    return [element("span", { class: guard.forced ? "warn" : "bad" }, word), reasons];
  }
  const seen = MEASURED.some(([, read]) => read(guard) !== null);
  return element("span", { class: seen ? "state good" : "state dim" }, seen ? "passed" : "nothing new");
}

// The same of one commit, for its dialog.
function guardPart(guard) {
  if (!guard) return null;
  const found = MEASURED.map(([name, read]) => [name, read(guard)]).filter(([, value]) => value !== null);
  return element("section", null, element("h3", null, "Guard"), verdict(guard), numberList(found));
}
