// The models of hosts that load them on demand: one row for each model at each host, and its actions.

import { $, el, keyed, setData, setText, state } from "./dom.js";
import { bytes, duration, natural } from "./format.js";
import { confirm } from "./confirm.js";
import { call } from "./live.js";

const ROWS = 40;
const TONES = { ready: "good", loading: "wait", unloading: "calm", stored: "calm", failed: "bad" };
const LOADED = new Set(["ready", "loading"]);

let token = "";
let everything = false;
let last = null;

const body = el("tbody");
const more = el("button", { type: "button", class: "quiet more", hidden: true, on: { click: showAll } });

export function begin() {
  const names = ["Model", "State", "Memory", "Used", "Held by", "Actions"];
  const cells = names.map((name) =>
    el("th", { scope: "col", class: name === "Memory" ? "num" : undefined }, name === "Actions" ? el("span", { class: "unseen" }, name) : name),
  );
  $("models-table").append(el("table", {}, el("thead", {}, el("tr", {}, cells)), body), more);
}

function showAll() {
  everything = true;
  if (last) show(last, token);
}

export function show(mesh, withToken) {
  [last, token] = [mesh, withToken];
  const all = [...mesh.hosted.values()].sort((a, b) => natural(a.host, b.host) || natural(a.model, b.model));
  $("models").hidden = !all.length;
  if (!all.length) return;
  const shown = everything ? all : all.slice(0, ROWS);
  keyed(body, shown, (row) => row.id, (row) => made(row));
  const now = mesh.now();
  for (const node of body.children) node.time(now);
  more.hidden = shown.length === all.length;
  setText(more, `Show all ${all.length}`);
  setText($("models-count"), [...mesh.hosts.values()].map(memoryOf).join(" · "));
}

function memoryOf(host) {
  const parts = Object.entries(host.memory).map(
    ([name, memory]) => `${bytes(memory.used)} of ${bytes(memory.budget)}${name === "ram" ? "" : ` of ${name}`}`,
  );
  return `${host.host}: ${parts.join(", ")}`;
}

// A row.

function made(first) {
  const where = el("span", { class: "sub" });
  const note = el("span", { class: "sub note" });
  const word = state("", "calm");
  const fill = el("span", { class: "fill" });
  const bar = el("span", { class: "bar", "aria-hidden": "true" }, fill);
  const [size, used, held] = ["Memory", "Used", "Held by"].map((label) => el("td", { data: { label } }));
  size.className = "num";
  const act = el("button", { type: "button", class: "small" });
  const verb = el("span");
  act.append(verb, el("span", { class: "unseen" }, ` ${first.model}`));
  act.addEventListener("click", () => ask(node.row));
  const node = el(
    "tr",
    {},
    el("th", { scope: "row" }, el("span", { class: "title" }, first.model), where),
    el("td", { class: "how" }, word, bar, note),
    size,
    used,
    held,
    el("td", { class: "act" }, act),
  );
  node.show = (row) => {
    node.row = row;
    setData(node, "state", row.state);
    setText(where, [row.host, row.kind === "generate" ? "" : row.kind].filter(Boolean).join(" · "));
    word.show(row.state === "loading" ? `loading, ${row.percent} %` : row.state, TONES[row.state] ?? "calm");
    bar.hidden = row.state !== "loading";
    fill.style.width = `${row.percent}%`;
    setText(note, row.note);
    setText(size, bytes(row.bytes));
    setText(held, [row.pinned ? "pinned" : "", ...row.holders].filter(Boolean).join(", "));
    setText(verb, LOADED.has(row.state) ? "Unload" : "Load");
    act.hidden = row.state === "unloading";
  };
  node.time = (now) => setText(used, node.row.used ? (node.row.in_use ? "now" : `${duration(now - node.row.used)} ago`) : "");
  return node;
}

// Actions.

function ask(row) {
  const { model, host } = row;
  if (LOADED.has(row.state)) {
    const others = row.holders.length ? ` ${row.holders.join(", ")} no longer hold${row.holders.length === 1 ? "s" : ""} it.` : "";
    confirm({
      title: `Unload ${model} on ${host}?`,
      text: `It finishes what runs on it.${others} The next request that names it loads it again.`,
      yes: "Unload",
      act: () => call(token, "board/load", { model, host, undo: true }),
    });
    return;
  }
  confirm({
    title: `Load ${model} on ${host}?`,
    text: "It stays in memory until it is unloaded. Where the memory does not suffice, models are unloaded that nothing uses.",
    option: "Pin it: never unload it for another model",
    yes: "Load",
    act: (pin) => call(token, "board/load", { model, host, pin }),
  });
}
