// Requests that wait or run, and those that ended recently. Each has a story.

import { $, el, keyed, setData, setText, state } from "./dom.js";
import { count, duration, number, shortId } from "./format.js";
import { open } from "./story.js";

const ROWS = 10;
const ENDED = 4; // at least this many, if there are any
const WAITING = 3; // of those that wait, which are what matters when the mesh is full
const TONES = { waiting: "wait", dispatched: "wait", running: "good", completing: "good" };
const REASONS = { stop: "done", length: "done, at its limit", cancelled: "cancelled", deadline: "out of time", error: "failed" };

let everything = false;
let last = null;

const body = el("tbody");
const more = el("button", { type: "button", class: "quiet more", hidden: true, on: { click: toggle } });
const none = el("p", { class: "empty", hidden: true }, "There were no requests yet. Send one below, or with ", el("code", {}, "llambo send"), ".");

export function begin() {
  const names = ["Request", "State", "Worker", "Tokens", "Tokens/s", "Waited", "Took"];
  const numeric = new Set(["Tokens", "Tokens/s", "Waited", "Took"]);
  const cells = names.map((name) => el("th", { scope: "col", class: numeric.has(name) ? "num" : undefined }, name));
  $("requests-table").append(el("table", {}, el("thead", {}, el("tr", {}, cells)), body), none, more);
}

function toggle() {
  everything = !everything;
  if (last) show(last);
}

/** Those that run, then those that wait, each the first to be served first; some of both, and some that ended. */
function chosen(live, over) {
  const running = live.filter((row) => row.state !== "waiting").sort((a, b) => a.at - b.at);
  const waiting = live.filter((row) => row.state === "waiting").sort((a, b) => a.ahead - b.ahead || a.at - b.at);
  if (everything) return [...running, ...waiting, ...over];
  const places = ROWS - Math.min(ENDED, over.length);
  const held = Math.min(waiting.length, Math.max(WAITING, places - running.length));
  const rows = [...running.slice(0, places - held), ...waiting.slice(0, held)];
  return [...rows, ...over.slice(0, ROWS - rows.length)];
}

export function show(mesh) {
  const live = [...mesh.requests.values()];
  const known = new Set(live.map((row) => row.id));
  const over = mesh.ended.filter((row) => !known.has(row.id)).reverse();
  last = mesh;
  const rows = chosen(live, over);
  const hidden = live.length + over.length - rows.length;
  more.hidden = !everything && !hidden;
  setText(more, everything ? "Show fewer" : `Show all ${count(live.length + over.length)}`);
  keyed(body, rows, (row) => row.id, (row) => made(row.id));
  const now = mesh.now();
  for (const node of body.children) node.time(now);
  body.parentElement.hidden = !rows.length;
  none.hidden = rows.length > 0;
  const { running = 0, waiting = 0 } = mesh.mesh;
  setText($("requests-count"), running + waiting ? `${count(running)} running, ${count(waiting)} waiting` : "");
}

function made(id) {
  const cell = (label) => el("td", { class: "num", "data-label": label });
  const [tokens, pace, waited, took] = ["Tokens", "Tokens/s", "Waited", "Took"].map(cell);
  const about = el("span", { class: "sub" });
  const note = el("span", { class: "sub note" });
  const word = state("", "calm");
  const worker = el("td", { "data-label": "Worker" });
  const title = el("button", { type: "button", class: "plain mono", on: { click: () => open(id) } });
  title.append(shortId(id), el("span", { class: "unseen" }, ", its story"));
  const node = el(
    "tr",
    {},
    el("th", { scope: "row" }, title, about),
    el("td", { class: "how" }, word, note),
    worker,
    tokens,
    pace,
    waited,
    took,
  );
  node.show = (row) => {
    node.row = row;
    const over = row.reason !== undefined;
    setData(node, "over", over);
    setText(about, [row.model, row.task === "generate" ? "" : row.task, row.priority === "normal" ? "" : row.priority].filter(Boolean).join(" · "));
    if (over) word.show(REASONS[row.reason] ?? row.reason, row.error ? "bad" : "calm");
    else word.show(row.state, TONES[row.state] ?? "calm");
    setText(note, noteOf(row));
    setText(worker, row.worker || "–");
    setText(tokens, over ? count(row.tokens) : `${count(row.tokens)} / ${count(row.max_tokens)}`);
    const known = over && row.tokens > 1 && row.decode_ms ? ((row.tokens - 1) * 1000) / row.decode_ms : row.pace;
    setText(pace, known ? number(known) : "–");
    if (row.state !== "waiting") setText(waited, duration(row.queued_ms));
    if (over) setText(took, duration(row.total_ms));
  };
  node.time = (now) => {
    const { row } = node;
    if (row.reason !== undefined) return;
    setText(took, duration(now - row.at));
    if (row.state === "waiting") setText(waited, duration(now - row.at));
  };
  return node;
}

function noteOf(row) {
  const moved = row.moves ? `moved ${row.moves === 1 ? "once" : `${count(row.moves)} times`}` : "";
  const ahead = row.state === "waiting" ? (row.ahead ? `${count(row.ahead)} before it` : "next in line") : "";
  return [row.error, ahead, moved].filter(Boolean).join(" · ");
}
