// The blocks of one request over its answer, against what stock would hold.

import { chart } from "./charts.js";
import { $, number, plural, say, scroller, table } from "./dom.js";

/** Show how many blocks `detail` held as it grew; `cursor` is a length to mark. */
export function showTimeline(detail, cursor) {
  const line = detail.timeline;
  if (line.length === 0) {
    say($("timeline-says"), "Nothing has been recorded yet.");
    $("timeline").replaceChildren();
    $("timeline-table").replaceChildren();
    return;
  }
  const last = line.at(-1);
  const freed = detail.num_blocks_freed;
  say(
    $("timeline-says"),
    `${plural(last.held, "block")} held at ${plural(detail.num_tokens, "token")}; stock would hold ${number(last.stock)}, ${number(freed)} more.`,
  );
  const points = line.map(({ num_tokens, held, stock }) => ({ x: num_tokens, held, stock }));
  // The prompt is held whole before its blocks come free: begin with some of that.
  const lead = Math.max(1, Math.round((detail.num_tokens - detail.num_prompt_tokens) / 20));
  points.unshift({ ...points[0], x: points[0].x - lead });
  chart($("timeline"), {
    points,
    to: detail.num_tokens,
    label: "Blocks held over the answer's length; as a table below",
    nameX: (value) => (value <= detail.num_prompt_tokens ? "prompt" : number(value - detail.num_prompt_tokens)),
    xLabel: "tokens of the answer",
    capacity: null,
    cursor,
  });
  const rows = line.map(({ num_tokens, held, stock }) => [num_tokens, held, stock]);
  const content = table("Blocks at each length where a count changes", ["tokens", "held", "stock"], rows);
  if ($("timeline-table").textContent !== content.textContent) {
    $("timeline-table").replaceChildren(scroller("Blocks of this request", content));
  }
}
