// Small helpers for elements, tables and numbers.

export const $ = (id) => document.getElementById(id);

/** Make an element; `children` are nodes or text. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  setAll(made, attributes);
  made.append(...children);
  return made;
}

/** Make an SVG element. */
export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  setAll(made, attributes);
  made.append(...children);
  return made;
}

function setAll(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
}

/** A table with one header row; first cells are row headers. */
export function table(caption, head, rows) {
  const cells = ([first, ...rest]) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, String(first)),
      ...rest.map((value) => element("td", {}, String(value))),
    );
  return element(
    "table",
    { class: "data" },
    element("caption", {}, caption),
    element(
      "thead",
      {},
      element("tr", {}, ...head.map((name) => element("th", { scope: "col" }, name))),
    ),
    element("tbody", {}, ...rows.map(cells)),
  );
}

/** A scrolling box that the keyboard can scroll too. */
export function scroller(label, ...children) {
  return element(
    "div",
    { class: "scroller", tabindex: 0, role: "region", "aria-label": label },
    ...children,
  );
}

/** Show `text` in an element, or hide the element where there is none. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
  node.hidden = text === "";
}

export const number = (value) => Math.round(value).toLocaleString("en");

export const percent = (part, whole) =>
  whole > 0 ? `${Math.round((100 * part) / whole)} %` : "–";

export const plural = (count, noun) =>
  `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let index = 0;
  while (value >= 1024 && index < units.length - 1) {
    value /= 1024;
    index += 1;
  }
  return `${value >= 100 || index === 0 ? Math.round(value) : value.toFixed(1)} ${units[index]}`;
}
