// Draws a panel on a canvas. The states differ in brightness and in pattern, so that
// they can be told apart without colour: core is clear and outlined, secondary is dimmed
// with a dot, evicted is dark and hatched.

import { CORE, KEPT, SECONDARY, GONE } from "./tokens.js";

const OUTLINE = "#ffb000";
const DARK = "rgba(8, 11, 16, 0.86)";
const HATCH = "rgba(255, 255, 255, 0.34)";
const DIM = "rgba(24, 30, 38, 0.5)";
const UNSEEN = "rgba(128, 136, 146, 0.88)";
const NO_PICTURE = "#dfe6ee";
const CURSOR = "#ffffff";
const SMALLEST_DOTTED = 7;

/** Draw `panel`; `found` gives each position's state, `cursor` is a cell or null. */
export function paint(canvas, panel, found, image, cursor) {
  const scale = window.devicePixelRatio || 1;
  const width = Math.max(1, Math.round(canvas.clientWidth * scale));
  const height = Math.max(1, Math.round(width / panel.aspect));
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  const context = canvas.getContext("2d");
  const boxes = panel.cells.map((cell) => box(cell, width, height));
  const path = (state) => pathOf(boxes.filter((_, i) => found[panel.cells[i].position] === state));
  const base = () => background(context, panel.hasPlaces ? image : null, width, height);

  base();
  veil(context, unseen(boxes, width, height), UNSEEN, "evenodd");
  veil(context, path(SECONDARY), DIM);
  veil(context, path(GONE), DARK);
  hatch(context, path(GONE), width, height, scale);
  dots(context, panel, boxes, found, scale);
  outline(context, [path(CORE), path(KEPT)], base, scale);
  if (cursor) mark(context, box(cursor, width, height), scale);
}

/** Cell edges fall on whole pixels: neighbours then leave no seam. */
function box(cell, width, height) {
  const [left, upper] = [Math.round(cell.left * width), Math.round(cell.upper * height)];
  return [
    left,
    upper,
    Math.round(cell.right * width) - left,
    Math.round(cell.lower * height) - upper,
  ];
}

function pathOf(boxes) {
  const path = new Path2D();
  for (const one of boxes) path.rect(...one);
  return path;
}

function background(context, image, width, height) {
  if (image) {
    context.drawImage(image, 0, 0, width, height);
    return;
  }
  context.fillStyle = NO_PICTURE;
  context.fillRect(0, 0, width, height);
}

function unseen(boxes, width, height) {
  const path = pathOf(boxes);
  path.rect(0, 0, width, height);
  return path;
}

function veil(context, path, colour, rule = "nonzero") {
  context.fillStyle = colour;
  context.fill(path, rule);
}

function hatch(context, path, width, height, scale) {
  context.save();
  context.clip(path);
  context.strokeStyle = HATCH;
  context.lineWidth = scale;
  context.beginPath();
  for (let x = -height; x < width; x += 6 * scale) {
    context.moveTo(x, height);
    context.lineTo(x + height, 0);
  }
  context.stroke();
  context.restore();
}

function dots(context, panel, boxes, found, scale) {
  context.fillStyle = "#ffffff";
  for (const [index, [left, upper, width, height]] of boxes.entries()) {
    const size = Math.min(width, height);
    if (found[panel.cells[index].position] !== SECONDARY) continue;
    if (size < SMALLEST_DOTTED * scale) continue;
    context.beginPath();
    context.arc(left + width / 2, upper + height / 2, Math.max(size / 10, scale), 0, 7);
    context.fill();
  }
}

/** Stroke every kept cell, then draw the picture over all but the outer half. */
function outline(context, [core, kept], base, scale) {
  context.strokeStyle = OUTLINE;
  context.lineWidth = 4 * scale;
  context.stroke(core);
  const clear = new Path2D(core);
  clear.addPath(kept);
  context.save();
  context.clip(clear);
  base();
  context.restore();
}

function mark(context, [left, upper, width, height], scale) {
  for (const [colour, line] of [["#000000", 5], [CURSOR, 2.5]]) {
    context.strokeStyle = colour;
    context.lineWidth = line * scale;
    context.strokeRect(left, upper, width, height);
  }
}
