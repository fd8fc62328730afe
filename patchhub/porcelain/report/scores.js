// Scores over commits: one small plot for each number of a suite.

const OPEN_ENDED = /perplexity|entropy|fluency|kl|drift|ratio/i; // numbers that are no shares, whatever their values

function scoresSection(data, lines, open) {
  const place = byId("score-plots");
  const suites = [...new Set(data.scores.map((note) => note.suite))].sort();
  if (!suites.length)
    return void place.replaceChildren(
      nothing("No commit has scores yet: `patchhub eval --suite FILE` measures one and keeps the numbers."),
    );
  const choice = byId("suite");
  const titles = new Map(data.scores.map((note) => [note.suite, note.title]));
  choice.append(...suites.map((suite) => element("option", { value: suite }, titles.get(suite))));
  byId("suite-label").hidden = false;
  const update = () => place.replaceChildren(...suitePlots(data, lines, choice.value, open));
  choice.addEventListener("input", update);
  update();
}

function suitePlots(data, lines, suite, open) {
  const notes = data.scores.filter((note) => note.suite === suite).sort((one, other) => other.commit - one.commit);
  const names = [...new Set(notes.flatMap((note) => Object.keys(note.scores)))];
  const line = new Set(lines.line);
  return names.map((name) => {
    const measured = notes.map((note, at) => [at, note]).filter(([, note]) => note.scores[name]);
    const points = measured.map(([at, note]) => [at, ...note.scores[name].slice(0, 3), !line.has(note.commit)]);
    const base = measured[measured.length - 1][1].scores[name][3];
    const share = points.every(([, value]) => value >= 0 && value <= 1) && !OPEN_ENDED.test(name);
    const last = points.length - 1 - [...points].reverse().findIndex((point) => !point[4]);
    return linePlot({
      title: name,
      about: data.definitions[name] ?? null,
      height: 170,
      range: share ? [0, 1] : null,
      xName: "commits, oldest first",
      xs: notes.map((note) => short(data.commits[note.commit].id).slice(0, 7)),
      series: [{ name, points }],
      level: base,
      marksAt: points,
      start: last < points.length ? last : points.length - 1,
      open: (mark) => open(notes[points[mark][0]].commit),
      tell: (mark) => tellScore(data, notes[points[mark][0]].commit, points[mark], base, open),
    });
  });
}

function tellScore(data, commit, [, value, low, high], base, open) {
  const interval = `${high === null ? "" : ` [${figure(low)}, ${figure(high)}]`}${base === null ? "" : ` (base ${figure(base)})`}`;
  return [
    element("strong", null, figure(value)),
    `${interval} at `,
    commitLink(data, commit, open),
    " ",
    userText(firstLine(data.commits[commit].message)),
  ];
}

function commitLink(data, commit, open) {
  return element(
    "button",
    { type: "button", class: "link id", onclick: () => open(commit) },
    short(data.commits[commit].id),
  );
}
