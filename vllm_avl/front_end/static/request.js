// One request: its picture layer by layer and step by step, its answer, its blocks.

import { showAnswer } from "./answer.js";
import { $, element, number, percent, plural, say, scroller } from "./dom.js";
import { paint } from "./paint.js";
import { panelsOf } from "./panels.js";
import { showTimeline } from "./timeline.js";
import {
  CORE,
  GONE,
  KEPT,
  SECONDARY,
  count,
  numHeads,
  positionsOf,
  selectionAt,
  states,
} from "./tokens.js";

const LETTERS = { [CORE]: "C", [SECONDARY]: "s", [KEPT]: "+", [GONE]: "·" };
const NAMES = { [CORE]: "core", [SECONDARY]: "secondary", [KEPT]: "always read", [GONE]: "evicted" };
const PLAY_MS = 160;
const SETTINGS = {
  store_ratio: "stored",
  core_ratio: "core",
  refresh_interval: "refresh interval",
  text_keep_ratio: "text kept",
};

let detail = null;
let chosen = { picture: 0, rank: 0, layer: 0, head: 0, step: 0 };
let panels = [];
let cursor = null;
let timer = null;
const images = new Map();

/** Show a request under `title`; the same one keeps what was chosen in it. */
export function showRequest(next, title) {
  const isSame = detail?.id === next.id;
  const wasAtEnd = !isSame || chosen.step >= lastStep(detail);
  detail = next;
  if (!isSame) {
    chosen = { picture: 0, rank: ranks()[0] ?? 0, layer: 0, head: 0, step: 0 };
    stop();
  }
  if (wasAtEnd && timer === null) chosen.step = lastStep(detail);
  $("request").hidden = false;
  say($("request-title"), `Request ${title}`);
  showFacts();
  showChoices();
  choosePicture();
  draw();
}

export function hideRequest() {
  detail = null;
  stop();
  $("request").hidden = true;
}

const lastStep = (one) => Math.max(0, one.num_tokens - one.num_prompt_tokens);
const ranks = () => [...new Set(detail.layers.map((layer) => layer.rank))];
const layers = () => detail.layers.filter((layer) => layer.rank === chosen.rank);
const lengthNow = () => detail.num_prompt_tokens + chosen.step;

function showFacts() {
  const settings = Object.entries(SETTINGS)
    .filter(([name]) => detail.settings[name] !== undefined && detail.settings[name] !== null)
    .map(([name, text]) => `${text} ${detail.settings[name]}`);
  const facts = [
    detail.running ? "running" : "finished",
    `policy ${detail.policy}`,
    ...settings,
    `${plural(detail.num_prompt_tokens, "prompt token")}, ${number(detail.num_vision_tokens)} of them vision`,
    plural(detail.num_refreshes, "refresh").replace("refreshs", "refreshes"),
  ];
  say($("request-facts"), facts.join(" · "));
  say($("request-notice"), whatIsMissing());
  $("rows").hidden = detail.layers.length === 0 || detail.pictures.length === 0;
}

function whatIsMissing() {
  if (detail.layers.length === 0) {
    return "Which tokens this request stores is not remembered: start the server with the introspection setting.";
  }
  return detail.pictures.length === 0 ? "Where this request's pictures lie is not known." : "";
}

function showChoices() {
  const all = layers();
  const most = Math.max(0, all.length - 1);
  chosen.layer = Math.min(chosen.layer, most);
  $("layer").max = most;
  $("layer").value = chosen.layer;
  $("step").max = lastStep(detail);
  $("step").value = chosen.step;
  options("picture", detail.pictures.length, (i) => `${i + 1} of ${detail.pictures.length}`);
  options("rank", ranks().length, (i) => String(ranks()[i]), ranks().indexOf(chosen.rank));
  const heads = all.length > 0 ? numHeads(all[chosen.layer]) : 1;
  chosen.head = Math.min(chosen.head, heads - 1);
  options("head", heads, (i) => `${i + 1} of ${heads}`);
}

function options(id, size, name, value = chosen[id]) {
  $(`${id}-choice`).hidden = size < 2;
  const select = $(id);
  if (select.length !== size) {
    select.replaceChildren(
      ...Array.from({ length: size }, (_, i) => element("option", { value: i }, name(i))),
    );
  }
  select.value = String(value);
}

function choosePicture() {
  const picture = detail.pictures[chosen.picture];
  panels = picture ? panelsOf(picture) : [];
  cursor = null;
  const place = $("panels");
  if (place.children.length !== panels.length) {
    place.replaceChildren(...panels.map((_, index) => makePanel(index)));
  }
  for (const [index, panel] of panels.entries()) {
    const [figure, canvas] = [place.children[index], canvasOf(index)];
    figure.classList.toggle("strip", !panel.hasPlaces);
    say(figure.querySelector("figcaption"), caption(panel, index, picture));
    canvas.width = 1000;
    canvas.height = Math.round(1000 / panel.aspect);
  }
  if (picture?.url && !images.has(picture.url)) load(picture.url);
}

function load(url) {
  const image = new Image();
  image.addEventListener("load", draw);
  image.src = url;
  images.clear();
  images.set(url, image);
}

function makePanel(index) {
  const canvas = element("canvas", { role: "img", tabindex: 0 });
  canvas.addEventListener("keydown", (event) => moveCursor(event, index));
  canvas.addEventListener("pointermove", (event) => pointCursor(event, index));
  canvas.addEventListener("pointerdown", (event) => pointCursor(event, index));
  for (const away of ["pointerleave", "blur"]) {
    canvas.addEventListener(away, () => setCursor(null));
  }
  return element("figure", {}, canvas, element("figcaption", { class: "muted" }));
}

const canvasOf = (index) => $("panels").children[index].querySelector("canvas");

function caption(panel, index, picture) {
  if (!panel.hasPlaces) {
    const why = index === 0 ? "Where these tokens lie in the picture is not known" : "Tokens without a place in the picture";
    return `${why}: ${plural(panel.cells.length, "token")} in reading order.`;
  }
  const size = `${panel.lines.length} × ${panel.lines[0].length} patches`;
  const parts = [panels.length > 1 ? `View ${index + 1}: ${size}` : size];
  if (panel.seen < 0.999) parts.push("the model does not see the plain grey margins");
  if (picture.url === null) parts.push("the picture itself is not shown");
  return `${parts.join("; ")}.`;
}

/** Draw everything that depends on layer, head and step. */
function draw() {
  if (detail === null) return;
  const layer = layers()[chosen.layer];
  const found = layer ? states(detail, layer, chosen.head, lengthNow()) : null;
  showSliders(layer);
  showAnswer(detail, chosen.step, found);
  showTimeline(detail, lengthNow());
  const picture = detail.pictures[chosen.picture];
  if (!found || !picture) return;
  const counts = count(found, positionsOf(picture.ranges));
  showLegend(counts);
  const image = images.get(picture.url);
  const ready = image?.complete && image.naturalWidth > 0 ? image : null;
  for (const [index, panel] of panels.entries()) {
    const canvas = canvasOf(index);
    canvas.setAttribute("aria-label", inWords(counts));
    paint(canvas, panel, found, ready, cursor?.panel === index ? cursor.cell : null);
  }
  showCell(found);
  if ($("map").open) showMap(found);
}

function inWords(counts) {
  const parts = [CORE, SECONDARY, KEPT, GONE]
    .filter((state) => counts[state] > 0)
    .map((state) => `${number(counts[state])} ${NAMES[state]}`);
  const layer = layers()[chosen.layer].layer + 1;
  return `Picture ${chosen.picture + 1}, layer ${layer}: patches ${parts.join(", ")}. Arrow keys name single patches.`;
}

function showSliders(layer) {
  if (!layer) return;
  const layerText = `${layer.layer + 1} of ${layers().at(-1).layer + 1}`;
  const stepText = `${chosen.step} of ${lastStep(detail)}`;
  say($("layer-out"), layerText);
  say($("step-out"), stepText);
  $("layer").setAttribute("aria-valuetext", layerText);
  $("step").setAttribute("aria-valuetext", stepText);
  say($("step-says"), aboutStep(layer));
}

function aboutStep(layer) {
  const selection = selectionAt(layer, lengthNow());
  if (!layer.secondary.some((list) => list.length > 0)) {
    return "Every step reads all that is stored: core and stored are the same.";
  }
  if (!selection) return "Core as it is now.";
  const at = selection.num_tokens - detail.num_prompt_tokens;
  if (at > 0 && at === chosen.step) return "This step read all that is stored and chose this core.";
  const since = at <= 0 ? "after the prompt" : `at step ${at}`;
  // A long answer's selections are thinned out.
  const isWhole = layer.history.length > detail.num_refreshes;
  return `Core as it was chosen ${since}${isWhole ? "" : ", the last choice on record up to here"}.`;
}

function showLegend(counts) {
  const total = counts.reduce((sum, value) => sum + value, 0);
  const hasSecondary = counts[SECONDARY] > 0;
  const rows = [
    [CORE, "Core", hasSecondary ? "clear, outlined: read at every step" : "clear, outlined: stored, read at every step"],
    [SECONDARY, "Secondary", "dimmed, dotted: stored, read on refreshes"],
    [KEPT, "Always read", "clear: too near the prompt's end to be ranked"],
    [GONE, "Evicted", "dark, hatched: freed for other requests"],
  ].filter(([state]) => counts[state] > 0 || state === CORE || state === GONE);
  const body = $("legend").tBodies[0];
  body.replaceChildren(
    ...rows.map(([state, name, text]) =>
      element(
        "tr",
        {},
        element("td", {}, swatch(state)),
        element("th", { scope: "row" }, name, element("small", { class: "muted" }, text)),
        element("td", { class: "count" }, number(counts[state])),
        element("td", { class: "count muted" }, percent(counts[state], total)),
      ),
    ),
  );
  for (const [index, [state]] of rows.entries()) {
    const canvas = body.rows[index].querySelector("canvas");
    const cell = { position: 0, left: 0.16, upper: 0.16, right: 0.84, lower: 0.84 };
    const panel = { cells: [cell], aspect: 1, hasPlaces: false };
    paint(canvas, panel, [state], null, null);
  }
}

const swatch = () => element("canvas", { class: "swatch", "aria-hidden": "true" });

function showMap(found) {
  const maps = panels.map((panel) =>
    panel.lines.map((line) => line.map((cell) => LETTERS[found[cell.position]]).join("")).join("\n"),
  );
  $("map-text").replaceChildren(
    element("p", { class: "muted" }, "C core, s secondary, + always read, · evicted"),
    ...maps.map((text, index) => scroller(`View ${index + 1} as text`, element("pre", {}, text))),
  );
}

function setCursor(next) {
  if (next === null && cursor === null) return;
  cursor = next;
  draw();
}

function pointCursor(event, index) {
  const area = event.currentTarget.getBoundingClientRect();
  const x = (event.clientX - area.left) / area.width;
  const y = (event.clientY - area.top) / area.height;
  const inside = (cell) => cell.left <= x && x < cell.right && cell.upper <= y && y < cell.lower;
  const cell = panels[index].cells.find(inside);
  setCursor(cell ? { panel: index, cell } : null);
}

function moveCursor(event, index) {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const move = moves[event.key];
  if (!move) return;
  event.preventDefault();
  const { lines } = panels[index];
  if (cursor?.panel !== index) {
    setCursor({ panel: index, cell: lines[0][0] });
    return;
  }
  const row = lines.findIndex((line) => line.includes(cursor.cell));
  const column = lines[row].indexOf(cursor.cell);
  const nextRow = lines[Math.min(Math.max(row + move[0], 0), lines.length - 1)];
  const nextColumn = Math.min(Math.max(column + move[1], 0), nextRow.length - 1);
  setCursor({ panel: index, cell: nextRow[nextColumn] });
}

function showCell(found) {
  if (cursor === null) {
    say($("cell"), "");
    return;
  }
  const { lines } = panels[cursor.panel];
  const row = lines.findIndex((line) => line.includes(cursor.cell));
  const column = lines[row].indexOf(cursor.cell);
  const state = NAMES[found[cursor.cell.position]];
  say($("cell"), `Row ${row + 1}, column ${column + 1} (token ${cursor.cell.position}): ${state}.`);
}

function stop() {
  clearInterval(timer);
  timer = null;
  $("play").setAttribute("aria-pressed", "false");
  say($("play"), "Play the answer");
}

function play() {
  if (timer !== null) {
    stop();
    return;
  }
  if (chosen.step >= lastStep(detail)) chosen.step = 0;
  $("play").setAttribute("aria-pressed", "true");
  say($("play"), "Stop");
  timer = setInterval(() => {
    setStep(chosen.step + 1);
    if (chosen.step >= lastStep(detail)) stop();
  }, PLAY_MS);
}

function setStep(step) {
  chosen.step = Math.min(step, lastStep(detail));
  $("step").value = chosen.step;
  draw();
}

/** Wire the controls, once. */
export function listen() {
  $("layer").addEventListener("input", (event) => {
    chosen.layer = Number(event.target.value);
    showChoices();
    draw();
  });
  $("step").addEventListener("input", (event) => {
    stop();
    setStep(Number(event.target.value));
  });
  $("rank").addEventListener("change", (event) => {
    chosen.rank = ranks()[Number(event.target.value)];
    showChoices();
    draw();
  });
  $("head").addEventListener("change", (event) => {
    chosen.head = Number(event.target.value);
    draw();
  });
  $("picture").addEventListener("change", (event) => {
    chosen.picture = Number(event.target.value);
    choosePicture();
    draw();
  });
  $("answer").addEventListener("click", (event) => {
    const step = event.target.dataset.step;
    if (step === undefined || detail.answer_tokens === null) return;
    stop();
    setStep(Number(step));
  });
  $("play").addEventListener("click", play);
  $("map").addEventListener("toggle", draw);
  new ResizeObserver(() => requestAnimationFrame(draw)).observe($("request"));
}
