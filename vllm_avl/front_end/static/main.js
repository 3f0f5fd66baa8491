// Polls the server while the page is looked at, and decides what is shown.

import { NeedsKey, Refused, Unreachable, get, hasKey, setKey } from "./api.js";
import { $, element, number, plural, say } from "./dom.js";
import { hideRequest, listen, showRequest } from "./request.js";
import { listenToTotals, showTotals } from "./totals.js";

const POLL_MS = 2000;
// A long answer's history is large: asked for again after some rest only.
const REST = 10;
const SETTING = `--additional-config '{"avl": {"introspection": 16}}'`;

let config = null;
let shown = null;
// The engine's id, or the address's words where they mean none of the requests.
let chosen = null;
let polling = false;
let lastAnswer = null;
let requests = [];
let restUntil = 0;

async function poll() {
  if (polling || document.hidden || !$("key-form").hidden) return;
  polling = true;
  try {
    config ??= await get("config");
    const [stats, list] = await Promise.all([get("stats"), get("requests")]);
    showServer();
    showTotals(stats, config);
    showList(list);
    await showChosen();
    lastAnswer = new Date();
    say($("status"), "");
  } catch (error) {
    complain(error);
  } finally {
    polling = false;
  }
}

function complain(error) {
  if (error instanceof NeedsKey) {
    askForKey();
  } else if (error instanceof Unreachable) {
    // It may come back with other settings.
    config = null;
    const since = lastAnswer ? ` What is shown is of ${lastAnswer.toLocaleTimeString()}.` : "";
    say($("status"), `The server does not answer. Trying again every 2 seconds.${since}`);
  } else if (error instanceof Refused) {
    say($("status"), `The server answered ${error.status}: ${error.message}`);
  } else {
    throw error;
  }
}

function showServer() {
  $("content").hidden = false;
  say($("server"), `${config.model} · vllm-avl ${config.version} · vLLM ${config.vllm_version} · blocks of ${config.block_size} tokens`);
}

function askForKey() {
  $("key-form").hidden = false;
  $("key-wrong").hidden = !hasKey();
  $("content").hidden = true;
  say($("status"), "");
  $("key").focus();
}

const fromHash = () => {
  try {
    return decodeURIComponent(location.hash.slice(1)) || null;
  } catch {
    return location.hash.slice(1);
  }
};

/** The request that the address means: by the engine's id, or by its answer's. */
function fromAddress() {
  const said = fromHash();
  const named = requests.filter((request) => request.name === said);
  const isOwn = requests.some((request) => request.id === said);
  return !isOwn && named.length === 1 ? named[0].id : said;
}

/** What people call a request; clients may have given several the same name. */
function titleOf({ id, name }) {
  return requests.filter((request) => request.name === name).length > 1 ? id : name;
}

function showList(list) {
  requests = list.requests;
  // Without a choice in the address, the newest one of the first answer stays shown.
  chosen = fromAddress() ?? chosen ?? requests[0]?.id ?? null;
  const place = $("requests");
  const focused = place.contains(document.activeElement) ? document.activeElement.dataset.id : null;
  place.replaceChildren(...requests.map(item));
  if (focused) place.querySelector(`[data-id="${CSS.escape(focused)}"]`)?.focus();
  $("no-request").hidden = requests.length > 0;
  if (requests.length === 0) explainEmpty(list.remembers);
}

function item(request) {
  const { id, running, num_prompt_tokens, num_blocks_held, num_blocks_freed } = request;
  const stock = num_blocks_held + num_blocks_freed;
  const link = element(
    "a",
    {
      href: `#${encodeURIComponent(id)}`,
      "data-id": id,
      "aria-current": id === chosen ? "true" : null,
    },
    element("span", { class: "id" }, titleOf(request)),
    element(
      "small",
      { class: "muted" },
      `${running ? "running · " : ""}${number(num_prompt_tokens)} prompt tokens · ${number(num_blocks_held)} of stock's ${plural(stock, "block")}`,
    ),
  );
  return element("li", {}, link);
}

function explainEmpty(remembers) {
  const lines =
    remembers === 0
      ? [
          element("p", {}, "No adaptive request is running, and this server remembers none that have finished. Start it with"),
          element("pre", { tabindex: 0 }, SETTING),
          element("p", {}, "and it remembers the last 16."),
        ]
      : [
          element("p", {}, "No request with a picture yet. Ask the server one, and it appears here within two seconds."),
          element("p", { class: "muted" }, `The last ${number(remembers)} are remembered.`),
        ];
  if ($("no-request").dataset.remembers === String(remembers)) return;
  $("no-request").dataset.remembers = String(remembers);
  $("no-request").replaceChildren(...lines);
}

async function showChosen() {
  if (chosen === null) {
    hideRequest();
    return;
  }
  const running = requests.find((request) => request.id === chosen)?.running;
  if (shown?.as === chosen && !shown.running && !running) return;
  if (shown?.as === chosen && running && performance.now() < restUntil) return;
  const wanted = chosen;
  const asked = performance.now();
  try {
    const detail = await get(`requests/${encodeURIComponent(wanted)}`);
    if (wanted !== chosen) return;
    restUntil = asked + REST * (performance.now() - asked);
    shown = { as: wanted, running: detail.running };
    say($("missing"), "");
    showRequest(detail, titleOf(detail));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    shown = null;
    hideRequest();
    say($("missing"), error.status === 404 ? `The request ${wanted} is not known, or no longer remembered.` : error.message);
  }
}

async function choose() {
  chosen = fromAddress();
  for (const link of $("requests").querySelectorAll("a")) {
    if (link.dataset.id === chosen) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
  shown = null;
  try {
    await showChosen();
  } catch (error) {
    complain(error);
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value);
  $("key").value = "";
  $("key-form").hidden = true;
  poll();
});
window.addEventListener("hashchange", choose);
document.addEventListener("visibilitychange", poll);
listen();
listenToTotals();
poll();
setInterval(poll, POLL_MS);
