// Where to draw each token of a picture: panels of cells in unit coordinates.
//
// A panel is one view of the picture: grids that overlap go into different panels.
// Tokens that have no place in the picture form a last panel, in reading order.

import { positionsOf } from "./tokens.js";

const OVERLAP = 1e-6;
const STRIP_COLUMNS = 32;

/** Panels of one picture: {cells, lines, aspect, hasPlaces, seen}. */
export function panelsOf(picture) {
  const views = [];
  for (const grid of picture.grids) {
    const current = views.at(-1);
    const fits = current?.every((other) => !overlap(other.box, grid.box));
    if (fits) current.push(grid);
    else views.push([grid]);
  }
  const panels = views.map((grids) => placed(picture, grids));
  const drawn = new Set(panels.flatMap((panel) => panel.cells.map((c) => c.position)));
  const rest = positionsOf(picture.ranges).filter((position) => !drawn.has(position));
  if (rest.length > 0) panels.push(strip(rest));
  return panels;
}

function overlap(a, b) {
  const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  const height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  return width > OVERLAP && height > OVERLAP;
}

function placed(picture, grids) {
  const lines = grids.flatMap(linesOf);
  const seen = grids.reduce(
    (sum, { box }) => sum + (box[2] - box[0]) * (box[3] - box[1]),
    0,
  );
  const [{ rows, columns, box }] = grids;
  const guess = (columns / (box[2] - box[0])) / (rows / (box[3] - box[1]));
  return {
    lines: joined(lines),
    cells: lines.flat(),
    aspect: picture.width && picture.height ? picture.width / picture.height : guess,
    hasPlaces: true,
    seen,
  };
}

function linesOf({ start, rows, columns, box: [left, upper, right, lower] }) {
  const width = (right - left) / columns;
  const height = (lower - upper) / rows;
  return Array.from({ length: rows }, (_, row) =>
    Array.from({ length: columns }, (_, column) => ({
      position: start + row * columns + column,
      left: left + column * width,
      upper: upper + row * height,
      right: left + (column + 1) * width,
      lower: upper + (row + 1) * height,
    })),
  );
}

/** Lines of tiles that lie side by side become one line. */
function joined(lines) {
  const byHeight = new Map();
  for (const line of lines) {
    const height = line[0].upper.toFixed(6);
    byHeight.set(height, [...(byHeight.get(height) ?? []), ...line]);
  }
  const all = [...byHeight.values()];
  for (const line of all) line.sort((a, b) => a.left - b.left);
  return all.sort((a, b) => a[0].upper - b[0].upper);
}

function strip(positions) {
  const columns = Math.min(STRIP_COLUMNS, positions.length);
  const rows = Math.ceil(positions.length / columns);
  const cells = positions.map((position, index) => {
    const [row, column] = [Math.floor(index / columns), index % columns];
    return {
      position,
      left: column / columns,
      upper: row / rows,
      right: (column + 1) / columns,
      lower: (row + 1) / rows,
    };
  });
  const lines = Array.from({ length: rows }, (_, row) =>
    cells.slice(row * columns, (row + 1) * columns),
  );
  return { cells, lines, aspect: columns / rows, hasPlaces: false, seen: 1 };
}
