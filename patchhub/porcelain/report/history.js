// The list of commits with their tracks, and one commit in a dialog.

const ROW = 52; // the height of a commit, as in the style
const HISTORY_PAGE = 50;

// Places of the commits that are below the shown revision, and those on its first-parent line, oldest first.
function linesOf(data) {
  const below = new Set();
  const waiting = data.commit === null ? [] : [data.commit];
  while (waiting.length) {
    const place = waiting.pop();
    if (typeof place !== "number" || below.has(place)) continue;
    below.add(place);
    waiting.push(...data.commits[place].parents);
  }
  const line = [];
  for (let place = data.commit; typeof place === "number"; [place] = data.commits[place].parents) line.unshift(place);
  return { below, line };
}

function historySection(data, lines, open) {
  const place = byId("commits");
  if (!data.commits.length)
    return void place.replaceChildren(
      nothing("There are no commits yet: `patchhub commit FILE -m TEXT` writes the first facts."),
    );
  const tracks = 1 + Math.max(...data.commits.map((commit) => Math.max(commit.track, ...commit.lines.flat())));
  const show = paged(place, HISTORY_PAGE, "commit", (rows, first) => {
    const gap = Math.max(4, Math.min(16, (place.clientWidth * 0.3) / tracks));
    const width = gap * tracks + 8;
    const list = element(
      "ol",
      null,
      rows.map((commit, n) => commitRow(commit, first + n, open)),
    );
    list.style.paddingLeft = `${width}px`;
    return element("div", { class: "commits" }, drawTracks(data, lines.below, first, rows.length, gap, width), list);
  });
  show(data.commits);
}

function drawTracks(data, below, first, count, gap, width) {
  const x = (track) => 10 + gap * track;
  const y = (place) => (place - first + 0.5) * ROW;
  const svg = drawn("svg", { class: "tracks", width, height: count * ROW, "aria-hidden": "true" });
  for (let place = Math.max(0, first - 1); place < first + count; place += 1) {
    for (const [from, to] of data.commits[place].lines) {
      const [top, bottom] = [y(place), y(place + 1)];
      const bend = `M${x(from)} ${top}C${x(from)} ${top + 0.6 * ROW} ${x(to)} ${bottom - 0.6 * ROW} ${x(to)} ${bottom}`;
      svg.append(
        drawn("path", {
          class: `track s${Math.max(from, to) % COLOURS}`,
          d: from === to ? `M${x(from)} ${top}V${bottom}` : bend,
        }),
      );
    }
  }
  for (let place = first; place < first + count; place += 1) {
    const track = data.commits[place].track;
    const look = below.has(place) ? fill(track) : `ring s${track % COLOURS}`;
    svg.append(drawn("circle", { class: look, cx: x(track), cy: y(place), r: Math.min(5, gap / 2 + 1) }));
  }
  return svg;
}

function labels(commit, data) {
  return commit.labels.map(([kind, name]) =>
    element(
      "span",
      { class: `label ${kind}` },
      userText(`${kind === "tag" ? "tag " : ""}${name}${kind === "branch" && name === data.branch ? " (HEAD)" : ""}`),
    ),
  );
}

function commitRow(commit, place, open) {
  const changes = `+${grouped(commit.added)} −${grouped(commit.removed)}, ${grouped(commit.active)} active`;
  return element(
    "li",
    null,
    element(
      "button",
      { type: "button", class: "plain", "data-commit": place, onclick: () => open(place) },
      element(
        "span",
        { class: "line" },
        commit.labels.length ? labels(commit, DATA) : null,
        userText(firstLine(commit.message) || "(no message)"),
      ),
      element(
        "span",
        { class: "line dim small" },
        element("span", { class: "roomy" }, element("span", { class: "id" }, short(commit.id)), " · "),
        `${changes} · ${day(commit.time)}`,
        element("span", { class: "roomy" }, " · ", userText(person(commit.author))),
      ),
    ),
  );
}

// A dialog about one commit; `facts` are [fact, change] of what it changed, `more` shows them in the table.
function commitDialog(data, changesOf, scoresOf, more) {
  const dialog = byId("commit");
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  function open(place) {
    const commit = data.commits[place];
    const go = (parent) =>
      typeof parent === "number"
        ? element(
            "button",
            { type: "button", class: "link id", onclick: () => open(parent) },
            short(data.commits[parent].id),
          )
        : element("span", { class: "id" }, parent);
    const parents = commit.parents.map((parent) => element("div", null, go(parent)));
    const pairs = [
      ["Commit", element("span", { class: "id" }, commit.id)],
      ["Author", userText(commit.author)],
      ["Time", commit.time],
      ["Parents", parents.length ? parents : "none: made on the unpatched model"],
      ["Facts", `+${grouped(commit.added)} −${grouped(commit.removed)}, ${grouped(commit.active)} active after it`],
      commit.methods.length ? ["Written by", userText(commit.methods.join(", "))] : null,
      commit.proof !== null
        ? ["Proof", `${figure(commit.proof)} (relative residual of the joint solution; 0 is exact)`]
        : null,
      commit.survival !== null
        ? ["Survival", `${percent(commit.survival)} of the change is left at the worst weight after rounding`]
        : null,
    ];
    const body = element(
      "div",
      { class: "body" },
      element(
        "div",
        { class: "top" },
        element(
          "h2",
          { id: "commit-title", tabindex: -1 },
          labels(commit, data),
          userText(firstLine(commit.message) || "(no message)"),
        ),
        element("button", { type: "button", class: "box", onclick: () => dialog.close() }, "Close"),
      ),
      commit.message.includes("\n")
        ? element("p", { class: "message" }, userText(commit.message.slice(commit.message.indexOf("\n") + 1).trim()))
        : null,
      pairList(pairs),
      factList(data, changesOf(place), () => {
        dialog.close();
        more(place);
      }),
      normList(data, commit),
      scoreLists(scoresOf(place)),
      guardPart(commit.guard),
    );
    dialog.replaceChildren(body);
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    byId("commit-title").focus({ preventScroll: true });
  }
  return open;
}

function pairList(pairs) {
  return element(
    "dl",
    { class: "pairs" },
    pairs
      .filter((pair) => pair !== null)
      .map(([name, value]) => [element("dt", null, name), element("dd", null, value)]),
  );
}

function factList(data, changed, more) {
  if (!changed.length) return null;
  const few = changed
    .slice(0, 12)
    .map(([fact, change]) => element("li", null, CHANGES[change][0], " ", factText(fact)));
  const rest = element(
    "button",
    { type: "button", class: "link", onclick: more },
    `Show ${changed.length > 12 ? `all ${grouped(changed.length)}` : "them"} in the table`,
  );
  return element("section", null, element("h3", null, "Facts"), element("ul", { class: "changes" }, few), rest);
}

function normList(data, commit) {
  const rows = data.weights.map(([name], n) => [
    userText(name, "id"),
    figure(commit.change[n]),
    figure(commit.state[n]),
  ]);
  const shown = rows.filter((row, n) => commit.state[n] !== null);
  return shown.length
    ? element(
        "details",
        null,
        element("summary", null, "Norms, as a share of the base's weight"),
        table(
          [
            ["weight", false],
            ["change", true],
            ["in all", true],
          ],
          shown,
        ),
      )
    : null;
}

function scoreLists(notes) {
  const text = ([value, low, high]) =>
    high === null ? figure(value) : `${figure(value)} [${figure(low)}, ${figure(high)}]`;
  return notes.map((note) =>
    element(
      "details",
      { open: true },
      element("summary", null, "Scores: ", userText(note.title)),
      numberList(Object.entries(note.scores).map(([name, found]) => [name, text(found)])),
      element("p", { class: "dim small" }, "Measured by ", userText(note.made_by)),
    ),
  );
}

// Names with their numbers, as many beside each other as there is room for.
function numberList(rows) {
  const row = ([name, number]) =>
    element("div", null, element("dt", null, userText(name)), element("dd", null, number));
  return element("dl", { class: "numbers" }, rows.map(row));
}
