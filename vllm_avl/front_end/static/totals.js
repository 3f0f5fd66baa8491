// The server's totals: tiles, the pool's past, and every number in tables.

import { chart } from "./charts.js";
import { $, bytes, element, number, percent, plural, say, scroller, table } from "./dom.js";

const LEFT_ALONE = /^vllm_avl_requests_left_alone_total\{reason=(.+)\}$/;
const REASONS = {
  no_vision: "no picture in it",
  nothing_to_save: "nothing to free in whole blocks",
  off: "asked for stock (avl: 0)",
  policy_full: "policy full",
  one_token: "one token of answer only",
  pooling: "pooling",
  streaming_input: "streaming input",
  no_pressure: "the pool had room",
  no_room: "no room beside a KV connector",
};

let drawn = "";
let fillTable = () => {};

export function showTotals(stats, config) {
  showTiles(stats);
  showReasons(stats);
  showPool(stats);
  // Tables that somebody may be reading are left alone while nothing changes.
  const now = JSON.stringify([stats.metrics, config]);
  if (now === drawn) return;
  drawn = now;
  $("metrics").replaceChildren(
    scroller("Every metric", table("Metrics", ["name", "value"], Object.entries(stats.metrics))),
  );
  $("settings").replaceChildren(
    scroller(
      "Settings",
      table(
        "additional_config.avl, defaults filled in",
        ["setting", "value"],
        Object.entries(config.settings).map(([name, value]) => [name, JSON.stringify(value)]),
      ),
    ),
  );
}

const metric = (stats, name) => stats.metrics[`vllm_avl_${name}`] ?? 0;

function leftAlone(stats) {
  return Object.entries(stats.metrics)
    .map(([name, value]) => [LEFT_ALONE.exec(name)?.[1], value])
    .filter(([reason, value]) => reason && value > 0)
    .sort((a, b) => b[1] - a[1]);
}

function showTiles(stats) {
  const get = (name) => metric(stats, name);
  const freed = get("blocks_freed_early_total");
  const [held, stock] = [get("kv_bytes_held"), get("kv_bytes_stock")];
  const alone = leftAlone(stats).reduce((sum, [, value]) => sum + value, 0);
  const [evicted, stored] = [get("vision_tokens_evicted_total"), get("vision_tokens_stored_total")];
  const [entered, selected] = [get("core_rows_entered_total"), get("core_rows_selected_total")];
  $("tiles").replaceChildren(
    tile("Blocks freed early", number(freed), `${number(freed * stats.block_size)} tokens of KV cache`),
    tile(
      "KV cache now",
      bytes(held),
      stock > 0 ? `stock would hold ${bytes(stock)}` : "no request is running",
      stock > 0 ? held / stock : null,
    ),
    tile("Requests adapted", number(get("requests_adapted_total")), `${number(alone)} left as stock`),
    tile("Vision tokens evicted", percent(evicted, evicted + stored), "after prefill, of those ranked"),
    tile(
      "Core refreshes",
      number(get("refreshes_total")),
      selected > 0 ? `${percent(entered, selected)} of core new each time` : "core is not selected",
    ),
  );
}

function tile(name, value, more, part = null) {
  const made = element(
    "li",
    {},
    element("span", { class: "tile-name" }, name),
    element("strong", {}, value),
    element("span", { class: "muted" }, more),
  );
  if (part !== null) {
    const meter = element("progress", { max: 1, value: part, "aria-label": `${name}, part of stock's` });
    made.append(meter);
  }
  return made;
}

function showReasons(stats) {
  const rows = leftAlone(stats).map(([reason, value]) => [REASONS[reason] ?? reason, number(value)]);
  $("reasons").replaceChildren(
    rows.length > 0
      ? table("Requests served exactly as stock", ["why", "requests"], rows)
      : element("p", { class: "muted" }, "No request has been served as stock."),
  );
}

/** Engines report at moments of their own: each counts with its latest sample. */
function summed(samples) {
  const latest = new Map();
  const points = new Map();
  for (const { time, engine, held, stock } of samples) {
    latest.set(engine, { held, stock });
    const all = [...latest.values()];
    points.set(time, {
      x: time,
      held: all.reduce((sum, one) => sum + one.held, 0),
      stock: all.reduce((sum, one) => sum + one.stock, 0),
    });
  }
  return [...points.values()];
}

function showPool(stats) {
  const points = summed(stats.pool);
  if (points.length === 0) {
    say($("pool-says"), "No request has been served yet.");
    $("pool").replaceChildren();
    $("pool-table").replaceChildren();
    return;
  }
  const engines = new Set(stats.pool.map((sample) => sample.engine)).size;
  const capacity = stats.num_blocks ? stats.num_blocks * engines : null;
  const last = points.at(-1);
  const most = Math.max(...points.map((p) => p.stock));
  const room = capacity ? ` The pool has ${plural(capacity, "block")}.` : "";
  const over = capacity && most > capacity ? " Stock would not have had room for all." : "";
  say(
    $("pool-says"),
    `${plural(last.held, "block")} held now, stock would hold ${number(last.stock)}.${room}${over}`,
  );
  chart($("pool"), {
    points,
    to: last.x,
    label: `Blocks held by all requests over ${plural(last.x - points[0].x, "second")}; as a table below`,
    nameX: clock,
    xLabel: "time",
    capacity,
    cursor: null,
  });
  fillTable = () => showPoolTable(points);
  fillTable();
}

/** Many rows: only while somebody looks, and in the same box, which keeps its scroll. */
function showPoolTable(points) {
  const place = $("pool-table");
  if (!place.closest("details").open) return;
  const rows = points.map((p) => [clock(p.x), p.held, p.stock]).reverse();
  if (!place.firstElementChild) place.append(scroller("Blocks over time"));
  place.firstElementChild.replaceChildren(table("Blocks over time", ["when", "held", "stock"], rows));
}

/** Wire what is opened, once. */
export function listenToTotals() {
  $("pool-table").closest("details").addEventListener("toggle", () => fillTable());
}

/** Time of the day of seconds since 1970. */
const clock = (seconds) => new Date(1000 * seconds).toLocaleTimeString();
