// Building the page. Texts become text nodes, never markup.

const SVG = "http://www.w3.org/2000/svg";

// An HTML element: attributes ("on..." are listeners), then children; strings become text nodes, null is left out.
function element(name, attributes, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function drawn(name, attributes, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== null && value !== false && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

// What a user wrote: isolated, so that its writing direction turns nothing around it.
function userText(text, kind) {
  return element("span", { class: kind ? `user ${kind}` : "user", dir: "auto" }, text);
}

const byId = (id) => document.getElementById(id);
const short = (id) => id.slice(0, 12);
const day = (time) => time.slice(0, 10);
const firstLine = (text) => text.split("\n", 1)[0];
const person = (author) => author.replace(/\s*<[^<>]*>\s*$/, "") || author;
const grouped = (number) => number.toLocaleString("en");
const counted = (number, noun) => `${grouped(number)} ${noun}${number === 1 ? "" : "s"}`;
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;

// A number with three or four digits that mean something.
function figure(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(size < 1 ? 3 : 4)));
}

// Pages of a list: `show(rows, first)` makes the node for rows[first...]. Returns a function that takes a new list.
function paged(place, size, noun, show) {
  let rows = [];
  let first = 0;
  const content = element("div");
  const where = element("span", { role: "status" });
  const step = (label, target) =>
    element("button", { type: "button", class: "box", onclick: () => turn(target()) }, label);
  const last = () => Math.max(0, Math.floor((rows.length - 1) / size) * size);
  const back = [step("First", () => 0), step("Previous", () => first - size)];
  const onward = [step("Next", () => first + size), step("Last", last)];
  const bar = element("div", { class: "pager" }, back, where, onward);
  place.replaceChildren(content, bar);
  function render() {
    content.replaceChildren(show(rows.slice(first, first + size), first));
    where.textContent = `${grouped(first + 1)}–${grouped(Math.min(rows.length, first + size))} of ${counted(rows.length, noun)}`;
    bar.hidden = rows.length <= size;
    bar.style.display = bar.hidden ? "none" : "";
    for (const button of back) button.disabled = first === 0;
    for (const button of onward) button.disabled = first + size >= rows.length;
  }
  function turn(target) {
    first = Math.min(Math.max(0, target), last());
    render();
    place.scrollIntoView({ block: "start" });
  }
  return (list) => {
    rows = list;
    first = 0;
    render();
  };
}

// A table whose rows become cards on a narrow screen; a column is [title, whether it holds numbers].
function table(columns, rows) {
  const head = columns.map(([title, number]) =>
    element("th", { scope: "col", role: "columnheader", class: number ? "number" : null }, title),
  );
  const body = rows.map((cells) =>
    element(
      "tr",
      { role: "row" },
      cells.map((cell, at) => {
        const [title, number] = columns[at];
        return element(
          "td",
          { role: "cell", class: number ? "number" : null, "data-name": number ? title : null },
          cell,
        );
      }),
    ),
  );
  return element(
    "table",
    { class: "cards", role: "table" },
    element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, head)),
    element("tbody", { role: "rowgroup" }, body),
  );
}

// That there is nothing to show; what stands in backticks is a command.
const nothing = (text) =>
  element(
    "p",
    { class: "empty" },
    text.split("`").map((part, n) => (n % 2 ? element("code", null, part) : part)),
  );
