// Interference: pairs of active facts with near keys, and how much of what each asked is missing.

const OVERLAP_PAGE = 20;
const BINS = 20;

function overlapsSection(data, facts) {
  const active = facts.reduce((sum, fact) => sum + fact.active, 0);
  const fitted = facts.filter((fact) => fact.misfit !== null);
  const shown = data.overlaps.length < data.pairs ? `; the ${grouped(data.overlaps.length)} nearest are shown` : "";
  byId("compared").textContent = data.compared
    ? `${counted(data.pairs, "pair")} among ${counted(data.compared, "compared fact")} of ${grouped(active)} active${shown}.`
    : "No facts were compared.";
  const plots = byId("overlap-plots");
  if (fitted.length) plots.append(misfitPlot(fitted));
  if (!data.overlaps.length) return;
  plots.append(overlapPlot(data, facts));
  const names = [...new Set([...data.weights.map(([name]) => name), ...data.overlaps.map((pair) => pair[2])])];
  const brief = new Map(shortNames(names).map((name, n) => [names[n], name]));
  const rows = paged(byId("overlap-rows"), OVERLAP_PAGE, "pair", (pairs) =>
    table(
      [
        ["Fact", false],
        ["Fact", false],
        ["cosine of keys", true],
        ["of residuals", true],
        ["weight", false],
      ],
      pairs.map(([left, right, weight, key, residual]) => [
        factText(facts[left]),
        factText(facts[right]),
        key.toFixed(2),
        residual.toFixed(2),
        userText(brief.get(weight)),
      ]),
    ),
  );
  rows(data.overlaps);
}

// How many facts miss how much: bins of the misfit up to 100 %, the last one holds all above.
function misfitPlot(facts) {
  const counts = new Array(BINS + 1).fill(0);
  for (const fact of facts) counts[Math.min(BINS, Math.floor(fact.misfit * BINS))] += 1;
  const most = Math.max(...counts);
  const yTicks = ticks(0, most).filter(Number.isInteger);
  const range = (bin) => (bin === BINS ? "100 % or more" : `${(100 * bin) / BINS} to ${(100 * (bin + 1)) / BINS} %`);
  function draw(width, height) {
    const box = axes(width, height, {
      x: [0, BINS + 1],
      y: [0, yTicks[yTicks.length - 1]],
      yTicks,
      yText: grouped,
      xTicks: [
        [0, "0 %"],
        [BINS / 2, "50 %"],
        [BINS, "100 %"],
      ],
      xName: "misfit of a fact",
    });
    const node = drawn("g", null, box.group);
    counts.forEach((count, bin) =>
      node.append(
        drawn("rect", {
          class: fill(bin === BINS ? 1 : 0),
          x: box.x(bin) + 1,
          y: box.y(count),
          width: Math.max(1, box.x(1) - box.x(0) - 2),
          height: box.bottom - box.y(count),
        }),
      ),
    );
    return { node, at: (bin) => [box.x(bin + 0.5), box.y(counts[bin])] };
  }
  return plot({
    title: "Misfit",
    about: "number of compared facts by the share of what they asked that is missing",
    height: 230,
    marks: BINS + 1,
    start: counts.indexOf(most),
    flat: true,
    draw,
    tell: (bin) => [element("strong", null, counted(counts[bin], "fact")), ` with a misfit of ${range(bin)}`],
  });
}

function overlapPlot(data, facts) {
  const points = data.overlaps.map(([left, right, weight, key, residual]) => [
    Math.abs(key),
    Math.sign(key || 1) * residual,
    left,
    right,
  ]);
  const yTicks = [-1, -0.5, 0, 0.5, 0.9];
  function draw(width, height) {
    const box = axes(width, height, {
      x: [0.5, 1],
      y: [-1, 1],
      yTicks,
      yText: String,
      xTicks: [0.5, 0.6, 0.7, 0.8, 0.9, 1].map((at) => [at, String(at)]),
      xName: "cosine of the keys",
    });
    const node = drawn("g", null, box.group);
    for (const [key, residual] of points)
      node.append(
        drawn("circle", { class: fill(0), cx: box.x(key), cy: box.y(residual), r: 3.5, "fill-opacity": 0.7 }),
      );
    return { node, at: (mark) => [box.x(points[mark][0]), box.y(points[mark][1])] };
  }
  return plot({
    title: "Overlaps",
    about: "up: cosine of what the two ask for; to the right: nearer keys; lower right is the worst",
    height: 230,
    marks: points.length,
    start: 0,
    draw,
    tell: (mark) => [factText(facts[points[mark][2]]), element("br"), factText(facts[points[mark][3]])],
  });
}
