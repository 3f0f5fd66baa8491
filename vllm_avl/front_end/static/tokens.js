// What became of each token of a request, in one layer, head and step.

export const GONE = 0;
export const CORE = 1;
export const SECONDARY = 2;
export const KEPT = 3;

/** The last of a layer's selections that was made at or before a length. */
export function selectionAt(layer, numTokens) {
  return layer.history.findLast((selection) => selection.num_tokens <= numTokens);
}

/**
 * State of each position: core as it was at `numTokens`, the rest as it is now.
 * What no list names has been evicted.
 */
export function states(detail, layer, head, numTokens) {
  const found = new Uint8Array(detail.num_tokens);
  const mark = (lists, state) => {
    for (const position of lists[head] ?? lists[0] ?? []) found[position] = state;
  };
  mark(layer.text, KEPT);
  mark(layer.secondary, SECONDARY);
  const selection = selectionAt(layer, numTokens);
  mark(layer.core, selection ? SECONDARY : CORE);
  if (selection) mark(selection.core, CORE);
  return found;
}

export function count(found, positions) {
  const counts = [0, 0, 0, 0];
  for (const position of positions) counts[found[position]] += 1;
  return counts;
}

export function positionsOf(ranges) {
  return ranges.flatMap(([start, end]) =>
    Array.from({ length: end - start }, (_, index) => start + index),
  );
}

/** How many lists a layer has: 1, or one a KV head. */
export const numHeads = (layer) =>
  Math.max(layer.core.length, layer.secondary.length, layer.evicted.length, 1);
