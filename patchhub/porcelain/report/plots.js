// Plots as SVG, drawn for the width that there is and again when it changes, so letters keep their size on a phone.

const MARGIN = { left: 46, right: 12, top: 10, bottom: 34 };
const COLOURS = 6;
const DASHES = 4;

// Classes of series number n: colours first, then dashes.
const stroke = (n) => `s${n % COLOURS} d${Math.floor(n / COLOURS) % DASHES}`;
const fill = (n) => `f${n % COLOURS}`;

// About `wanted` round numbers that cover [low, high].
function ticks(low, high, wanted = 4) {
  const raw = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  const found = [];
  for (let at = Math.floor(low / step + 1e-9); (at - 1) * step < high - step * 1e-6; at += 1)
    found.push(Number((at * step).toPrecision(12)));
  return found;
}

// Axes over the ranges of x and y; returns the drawing, and how values become places in it.
function axes(width, height, spec) {
  const right = width - MARGIN.right;
  const bottom = height - MARGIN.bottom;
  const span = (range) => range[1] - range[0] || 1;
  const x = (value) => MARGIN.left + ((value - spec.x[0]) / span(spec.x)) * (right - MARGIN.left);
  const y = (value) => bottom - ((value - spec.y[0]) / span(spec.y)) * (bottom - MARGIN.top);
  const group = drawn("g", { class: "axis" });
  for (const value of spec.yTicks) {
    group.append(drawn("line", { x1: MARGIN.left, x2: right, y1: y(value), y2: y(value) }));
    group.append(drawn("text", { x: MARGIN.left - 6, y: y(value) + 4, "text-anchor": "end" }, spec.yText(value)));
  }
  for (const [value, text] of spec.xTicks) {
    const anchor = x(value) > right - 30 ? "end" : x(value) < MARGIN.left + 30 ? "start" : "middle";
    group.append(drawn("line", { x1: x(value), x2: x(value), y1: bottom, y2: bottom + 4 }));
    group.append(drawn("text", { x: x(value), y: bottom + 17, "text-anchor": anchor }, text));
  }
  group.append(drawn("text", { x: (MARGIN.left + right) / 2, y: height - 3, "text-anchor": "middle" }, spec.xName));
  return { group, x, y, bottom, right };
}

// A figure: title, plot, and a line that tells the value under the pointer, or at the cursor that the arrow keys move.
// spec: title, about, height, marks (number of places for the cursor), start, tell(place) -> nodes, open(place),
// draw(width, height) -> {node, at(place) -> [x, y], list of places is 0 .. marks - 1}
function plot(spec) {
  const readout = element("p", { class: "readout" });
  const holder = drawn("svg", {
    role: "img",
    tabindex: 0,
    height: spec.height,
    "aria-label": `${spec.title}. Arrow keys read the points.`,
  });
  const cursor = drawn("circle", { class: "cursor", r: 7 });
  let at = spec.start;
  let picture = null;
  function point(place) {
    at = place;
    const [x, y] = picture.at(place);
    cursor.setAttribute("cx", x);
    cursor.setAttribute("cy", y);
    readout.replaceChildren(...spec.tell(place));
  }
  function redraw() {
    const width = holder.clientWidth || holder.parentNode.clientWidth;
    if (!width) return;
    picture = spec.draw(width, spec.height);
    holder.setAttribute("viewBox", `0 0 ${width} ${spec.height}`);
    holder.replaceChildren(picture.node, cursor);
    point(at);
  }
  function nearest(event) {
    const box = holder.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let best = 0;
    let least = Infinity;
    for (let place = 0; place < spec.marks; place += 1) {
      const [px, py] = picture.at(place);
      const distance = (px - x) ** 2 + (spec.flat ? 0.01 : 1) * (py - y) ** 2;
      if (distance < least) [best, least] = [place, distance];
    }
    return best;
  }
  holder.addEventListener("pointermove", (event) => point(nearest(event)));
  holder.addEventListener("pointerdown", (event) => point(nearest(event)));
  holder.addEventListener("click", (event) => event.detail === 2 && spec.open && spec.open(at));
  holder.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: spec.marks - 1 }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      point(Math.min(spec.marks - 1, Math.max(0, to)));
      readout.setAttribute("aria-live", "polite");
    } else if (event.key === "Enter" && spec.open) spec.open(at);
  });
  new ResizeObserver(redraw).observe(holder);
  return element(
    "figure",
    null,
    element(
      "figcaption",
      null,
      element("h3", null, spec.title),
      spec.about ? element("span", { class: "dim small" }, spec.about) : null,
    ),
    holder,
    spec.legend || null,
    readout,
  );
}

// Lines over the commits. spec as in `plot`, and: xs (names of the places), series [{name, points [[place, value, low, high, loose]]}],
// range (of y) or null, level (of a dashed line across) or null. Points that are `loose` are rings and no line leads to them. The cursor stops at the points of `spec.track`.
function linePlot(spec) {
  const values = [
    spec.level,
    ...spec.series.flatMap((series) => series.points.flatMap((point) => point.slice(1, 4))),
  ].filter(Number.isFinite);
  const low = spec.range ? spec.range[0] : Math.min(0, ...values);
  const high = spec.range ? spec.range[1] : Math.max(...values, low + 1e-9);
  const yTicks = ticks(low, high);
  const count = spec.xs.length;
  function draw(width, height) {
    const room = Math.max(1, Math.floor((width - MARGIN.left) / 92));
    const every = Math.max(1, Math.ceil(count / room));
    const xTicks = spec.xs.map((name, place) => [place, name]).filter(([place]) => (count - 1 - place) % every === 0);
    const box = axes(width, height, {
      x: count > 1 ? [0, count - 1] : [-1, 1],
      y: [yTicks[0], yTicks[yTicks.length - 1]],
      yTicks,
      yText: figure,
      xTicks,
      xName: spec.xName,
    });
    const node = drawn("g", null, box.group);
    if (Number.isFinite(spec.level))
      box.group.append(
        drawn("line", { class: "limit", x1: MARGIN.left, x2: box.right, y1: box.y(spec.level), y2: box.y(spec.level) }),
      );
    const dense = count > width / 12;
    spec.series.forEach((series, n) => {
      const line = series.points
        .filter((point) => !point[4])
        .map(([place, value]) => `${box.x(place)},${box.y(value)}`);
      if (line.length > 1) node.append(drawn("polyline", { class: `curve ${stroke(n)}`, points: line.join(" ") }));
      for (const [place, value, from, to, loose] of series.points) {
        if (Number.isFinite(to) && !dense) {
          node.append(
            drawn("line", {
              class: `interval ${stroke(n)}`,
              x1: box.x(place),
              x2: box.x(place),
              y1: Math.min(box.bottom, box.y(from)),
              y2: Math.max(MARGIN.top, box.y(to)),
            }),
          );
        }
        if (dense && !loose) continue;
        const look = loose ? `ring ${stroke(n)}` : fill(n);
        node.append(drawn("circle", { class: look, cx: box.x(place), cy: box.y(value), r: loose ? 3.5 : 3 }));
      }
    });
    return { node, at: (mark) => [box.x(spec.marksAt[mark][0]), box.y(spec.marksAt[mark][1])] };
  }
  return plot({ ...spec, draw, flat: true, marks: spec.marksAt.length });
}

// The key of several series.
function legend(names) {
  return element(
    "ul",
    { class: "legend" },
    names.map((name, n) =>
      element(
        "li",
        null,
        drawn(
          "svg",
          { viewBox: "0 0 24 8", height: 8, "aria-hidden": "true" },
          drawn("line", { class: `curve ${stroke(n)}`, x1: 0, x2: 24, y1: 4, y2: 4 }),
        ),
        name,
      ),
    ),
  );
}
