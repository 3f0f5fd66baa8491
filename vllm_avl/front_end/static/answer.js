// The answer token by token: what is said at a step, what comes later, what is evicted.

import { $, element, number, plural, say } from "./dom.js";
import { GONE } from "./tokens.js";

/** Show `detail`'s answer as far as `step`; `found` gives states, null if not known. */
export function showAnswer(detail, step, found) {
  const tokens = detail.answer_tokens ?? (detail.answer === null ? null : [detail.answer]);
  const place = $("answer");
  place.hidden = tokens === null;
  if (tokens === null) {
    say($("answer-says"), detail.hidden ?? "The answer is not known.");
    return;
  }
  const single = detail.answer_tokens === null;
  const classesOf = (index) => {
    const position = detail.num_prompt_tokens + index;
    const isKnown = found !== null && position < detail.num_tokens;
    const classes = [];
    if (index > step) classes.push("later");
    if (index === step) classes.push("now");
    if (isKnown && found[position] === GONE) classes.push("gone");
    return classes.join(" ");
  };
  place.replaceChildren(...tokens.map((text, index) => token(text, index, single ? "" : classesOf(index))));
  keepInSight(place, place.querySelector(".now"));
  const gone = place.querySelectorAll(".gone").length;
  const parts = [single ? "" : `${plural(Math.min(step + 1, tokens.length), "token")} of ${number(tokens.length)} at this step.`];
  if (gone > 0) parts.push(`Struck out: ${plural(gone, "token")} evicted from this layer since.`);
  say($("answer-says"), parts.join(" ").trim());
}

/** Scroll the box only: the page stays where it is. */
function keepInSight(place, now) {
  if (!now) return;
  const top = now.offsetTop - place.offsetTop;
  if (top < place.scrollTop || top + now.offsetHeight > place.scrollTop + place.clientHeight) {
    place.scrollTop = top - place.clientHeight / 2;
  }
}

function token(text, index, classes) {
  return element("span", { "data-step": index, class: classes || null }, text);
}
