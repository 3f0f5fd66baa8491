// Two step lines over one axis: blocks held, and blocks that stock would hold.

import { element, number, svg } from "./dom.js";

const HEIGHT = 220;
const EDGE = { left: 40, right: 76, top: 14, bottom: 38 };
const TICKS = 4;
const WIDE = 520;
const LEAST_GAP = 16;

/**
 * Draw `points` [{x, held, stock}], each of which holds until the next.
 *
 * `to` is where the last one ends, `capacity` a line to draw if it is in reach, and
 * `cursor` a mark on the x axis or null. `nameX` names a value of x.
 */
export function chart(place, { points, to, label, nameX, xLabel, capacity, cursor }) {
  const width = Math.max(280, place.clientWidth);
  const [from, end] = [points[0].x, Math.max(to, points[0].x + 1)];
  const top = Math.max(4, ...points.map((p) => Math.max(p.held, p.stock)));
  const ceiling = niceStep(top / TICKS) * Math.ceil(top / niceStep(top / TICKS));
  const x = (value) => scale(value, from, end, EDGE.left, width - EDGE.right);
  const y = (value) => scale(value, 0, ceiling, HEIGHT - EDGE.bottom, EDGE.top);
  const drawing = svg("svg", {
    viewBox: `0 0 ${width} ${HEIGHT}`,
    width,
    height: HEIGHT,
    role: "img",
    "aria-label": label,
  });
  const within = { points, end, x, y };
  drawing.append(
    ...yAxis(ceiling, width, y),
    ...xAxis(from, end, x, nameX, xLabel, width < WIDE ? 2 : TICKS),
    svg("path", { class: "saved", d: between(within) }),
    svg("path", { class: "stock", d: line(within, "stock") }),
    svg("path", { class: "held", d: line(within, "held") }),
    ...capacityLine(capacity, ceiling, width, y),
    ...cursorLine(cursor, x),
    ...names(points, width, y),
  );
  place.replaceChildren(drawing, key());
}

const scale = (value, from, to, low, high) =>
  low + ((Math.min(Math.max(value, from), to) - from) / (to - from)) * (high - low);

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(Math.max(rough, 1)));
  const factor = [1, 2, 5, 10].find((one) => one * power >= rough);
  return Math.max(1, factor * power);
}

function line({ points, end, x, y }, name) {
  const [first, ...rest] = points;
  const steps = rest.map((p) => `H${x(p.x)}V${y(p[name])}`);
  return `M${x(first.x)} ${y(first[name])}${steps.join("")}H${x(end)}`;
}

function between(within) {
  const { points, end, x, y } = within;
  const back = [...points].reverse().map((p, index) => {
    const next = index === 0 ? end : points[points.length - index].x;
    return `L${x(next)} ${y(p.held)}H${x(p.x)}`;
  });
  return `${line(within, "stock")}${back.join("")}Z`;
}

function yAxis(ceiling, width, y) {
  const step = niceStep(ceiling / TICKS);
  const marks = [];
  for (let value = 0; value <= ceiling; value += step) {
    marks.push(
      svg("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(value), y2: y(value) }),
      svg("text", { x: EDGE.left - 6, y: y(value) + 4, "text-anchor": "end" }, number(value)),
    );
  }
  return marks;
}

function xAxis(from, end, x, nameX, xLabel, ticks) {
  const marks = [];
  for (let index = 0; index <= ticks; index += 1) {
    const value = from + Math.round(((end - from) * index) / ticks);
    const anchor = index === 0 ? "start" : index === ticks ? "end" : "middle";
    marks.push(
      svg("text", { x: x(value), y: HEIGHT - EDGE.bottom + 16, "text-anchor": anchor }, nameX(value)),
    );
  }
  const middle = (x(from) + x(end)) / 2;
  marks.push(svg("text", { x: middle, y: HEIGHT - 4, "text-anchor": "middle" }, xLabel));
  return marks;
}

function capacityLine(capacity, ceiling, width, y) {
  if (!capacity || capacity > ceiling) return [];
  const at = y(capacity);
  return [
    svg("line", { class: "capacity", x1: EDGE.left, x2: width - EDGE.right, y1: at, y2: at }),
    svg("text", { class: "over", x: EDGE.left + 4, y: at - 5 }, `the whole pool: ${number(capacity)}`),
  ];
}

function cursorLine(cursor, x) {
  if (cursor === null || cursor === undefined) return [];
  const at = x(cursor);
  return [svg("line", { class: "cursor", x1: at, x2: at, y1: EDGE.top, y2: HEIGHT - EDGE.bottom })];
}

/** The two last values beside the right end, kept apart. */
function names(points, width, y) {
  const { held, stock } = points.at(-1);
  const middle = (y(held) + y(stock)) / 2;
  const apart = Math.max(LEAST_GAP, Math.abs(y(held) - y(stock))) / 2;
  const at = (place, text) =>
    svg("text", { class: "name", x: width - EDGE.right + 6, y: place + 4 }, text);
  return [
    at(middle - apart, `stock ${number(stock)}`),
    at(middle + apart, `held ${number(held)}`),
  ];
}

function key() {
  const sample = (name, text) =>
    element(
      "span",
      {},
      svg("svg", { width: 26, height: 10, "aria-hidden": "true" },
        svg("line", { class: name, x1: 1, x2: 25, y1: 5, y2: 5 })),
      ` ${text}`,
    );
  return element(
    "p",
    { class: "key muted" },
    sample("held", "held"),
    sample("stock", "stock vLLM would hold"),
  );
}
