// Norms per weight along the first-parent line, and a table of the last ones.

function weightsSection(data, lines, open) {
  const measured = lines.line.filter((place) => data.commits[place].state.some((norm) => norm !== null));
  if (!measured.length)
    return void byId("weight-plots").replaceChildren(nothing("No commit of this line changed a weight."));
  const names = shortNames(data.weights.map(([name]) => name));
  const of = (kind, title, about) => {
    const series = names.map((name, n) => ({
      name,
      points: measured.map((place, at) => [at, data.commits[place][kind][n]]).filter((point) => point[1] !== null),
    }));
    const largest = measured.map((place, at) => [
      at,
      Math.max(...data.commits[place][kind].filter((norm) => norm !== null)),
    ]);
    return linePlot({
      title,
      about,
      height: 230,
      range: null,
      xName: "commits, oldest first",
      xs: measured.map((place) => short(data.commits[place].id).slice(0, 7)),
      series,
      marksAt: largest,
      start: measured.length - 1,
      legend: legend(names),
      open: (mark) => open(measured[mark]),
      tell: (mark) => tellNorms(data, names, measured[mark], kind, open),
    });
  };
  byId("weight-plots").replaceChildren(
    of("state", "State", "norm of all changes together / norm of the base's weight"),
    of("change", "Change", "norm of what the commit changed / norm of the base's weight"),
  );
  byId("weight-table").replaceChildren(
    element("h3", null, "At the last commit of the line"),
    lastNorms(data, measured[measured.length - 1]),
  );
}

// The part of each name in which it differs from the others.
function shortNames(names) {
  const parts = names.map((name) => name.split("."));
  const differs = parts[0].map((part, n) =>
    parts.some((other) => other.length !== parts[0].length || other[n] !== part),
  );
  if (names.length < 2 || parts.some((other) => other.length !== parts[0].length)) return names;
  return parts.map((words) =>
    words
      .map((word, n) => (differs[n] ? (/^\d+$/.test(word) ? `${(words[n - 1] ?? "").replace(/s$/, "")} ${word}` : word) : null))
      .filter(Boolean)
      .join("."),
  );
}

function tellNorms(data, names, place, kind, open) {
  const norms = data.commits[place][kind];
  const text = names
    .map((name, n) => [name, norms[n]])
    .filter(([, norm]) => norm !== null)
    .map(([name, norm]) => `${name}: ${figure(norm)}`)
    .join(", ");
  return [commitLink(data, place, open), ` ${text}`];
}

function lastNorms(data, place) {
  const commit = data.commits[place];
  const rows = data.weights
    .map(([name, norm], n) => ({ name, norm, change: commit.change[n], state: commit.state[n] }))
    .filter((row) => row.state !== null);
  const largest = Math.max(...rows.map((row) => row.state), 1e-9);
  return table(
    [
      ["weight", false],
      ["base", true],
      ["change", true],
      ["state", true],
      ["", false],
    ],
    rows.map((row) => {
      const bar = element("span", { class: "bar", "aria-hidden": "true" });
      bar.style.width = `${(100 * row.state) / largest}%`;
      return [userText(row.name, "id"), figure(row.norm), figure(row.change), figure(row.state), bar];
    }),
  );
}
