// The workers: one row each, and their actions.

import { $, el, keyed, setData, setText, state } from "./dom.js";
import { count, duration, many, natural, number } from "./format.js";
import { confirm } from "./confirm.js";
import { call } from "./live.js";

const ROWS = 40;
const PIPS = 16;
const TONES = {
  ready: "good", trial: "warn", slow: "warn", mending: "warn", loading: "wait", joining: "wait",
  draining: "calm", drained: "calm", lost: "bad",
};
const DRAINED = new Set(["draining", "drained"]);

let token = "";
let everything = false;
let wanted = "";
let last = null;

const body = el("tbody");
const more = el("button", { type: "button", class: "quiet more", hidden: true, on: { click: showAll } });
const none = el("div", { class: "empty", hidden: true });

export function begin() {
  const names = ["Worker", "State", "Slots", "Tokens/s", "Done", "Up", "Actions"];
  const cells = names.map((name) => el("th", { scope: "col", class: head(name) }, name === "Actions" ? unseen(name) : name));
  const table = el("table", {}, el("thead", {}, el("tr", {}, cells)), body);
  $("workers-table").append(table, none, more);
  $("workers-filter").addEventListener("input", (event) => {
    wanted = event.target.value.trim().toLowerCase();
    if (last) show(last, token);
  });
}

const unseen = (text) => el("span", { class: "unseen" }, text);
const head = (name) => (["Tokens/s", "Done", "Up"].includes(name) ? "num" : undefined);

function showAll() {
  everything = true;
  if (last) show(last, token);
}

const matches = (row) =>
  [row.worker, row.class, row.host, row.state, ...row.models].some((text) => text.toLowerCase().includes(wanted));

export function show(mesh, withToken) {
  [last, token] = [mesh, withToken];
  const all = [...mesh.workers.values()].sort((a, b) => natural(a.worker, b.worker));
  const found = wanted ? all.filter(matches) : all;
  const shown = everything ? found : found.slice(0, ROWS);
  keyed(body, shown, (row) => row.worker, (row) => made(row.worker));
  const now = mesh.now();
  for (const node of body.children) node.time(now);
  body.parentElement.hidden = !shown.length;
  more.hidden = shown.length === found.length;
  setText(more, `Show all ${count(found.length)}`);
  setText($("workers-count"), all.length ? count(mesh.present().length) : "");
  none.hidden = shown.length > 0;
  if (!shown.length) showNone(all.length);
}

function showNone(others) {
  const text = others ? `No worker has “${wanted}” in its name, class, host, model or state.` : "";
  if (none.dataset.text === text) return;
  setData(none, "text", text);
  none.replaceChildren(
    ...(text
      ? [text]
      : [
          el("p", {}, "No worker has joined yet. Start one on any machine that reaches the broker:"),
          el("pre", {}, el("code", {}, "llambo-worker --broker tcp://BROKER:7330 --model smollm2")),
          el("p", {}, "or try it all on one machine with ", el("code", {}, "llambo up"), "."),
        ]),
  );
}

// A row.

function made(name) {
  const where = el("span", { class: "sub" });
  const note = el("span", { class: "sub note" });
  const word = state("", "calm");
  const pips = slots();
  const [speed, done, up] = [el("td", { class: "num" }), el("td", { class: "num" }), el("td", { class: "num" })];
  const act = el("button", { type: "button", class: "small" });
  const verb = el("span");
  act.append(verb, el("span", { class: "unseen" }, ` ${name}`));
  act.addEventListener("click", () => ask(node.row));
  const node = el(
    "tr",
    {},
    el("th", { scope: "row" }, el("span", { class: "title" }, name), where),
    el("td", { class: "how" }, word, note),
    el("td", { class: "slots-cell", "data-label": "Slots" }, pips),
    labelled(speed, "Tokens/s"),
    labelled(done, "Done"),
    labelled(up, "Up"),
    el("td", { class: "act" }, act),
  );
  node.show = (row) => {
    node.row = row;
    setData(node, "state", row.state);
    setText(where, [row.class, row.host, modelsOf(row)].filter(Boolean).join(" · "));
    word.show(row.state === "loading" && row.percent ? `loading, ${row.percent} %` : row.state, TONES[row.state] ?? "calm");
    setText(note, noteOf(row));
    pips.show(row);
    setText(speed, number(row.tokens_per_s));
    setText(done, count(row.done));
    setText(verb, DRAINED.has(row.state) ? "Undrain" : "Drain");
    act.hidden = row.state === "lost";
  };
  node.time = (now) => setText(up, node.row.gone ? `gone ${duration(now - node.row.gone)}` : duration(now - node.row.since));
  return node;
}

/** Each model once: model@class is left out, because the class is shown beside it. */
function modelsOf(row) {
  const end = `@${row.class}`;
  return row.models.filter((name) => !(name.endsWith(end) && row.models.includes(name.slice(0, -end.length)))).join(", ");
}

function labelled(cell, label) {
  cell.dataset.label = label;
  return cell;
}

function noteOf(row) {
  const silent = row.silent_s ? `silent for ${row.silent_s} s` : "";
  const slow = row.slow ? `slow: ${row.slow}` : "";
  const restarts = row.engine_restarts ? `engine restarted ${many(row.engine_restarts, "time")}` : "";
  return [silent, slow, row.note, row.library, restarts].filter(Boolean).join(" · ");
}

/** A box for each slot, filled if it is busy; a bar if there are many slots. */
function slots() {
  const boxes = el("span", { class: "pips", "aria-hidden": "true" });
  const fill = el("span", { class: "fill" });
  const bar = el("span", { class: "bar", "aria-hidden": "true" }, fill);
  const text = el("span", { class: "of" });
  const node = el("span", { class: "slots" }, boxes, bar, text);
  node.show = (row) => {
    const busy = row.busy_slots;
    setText(text, `${count(busy)} / ${count(row.slots)}`);
    boxes.hidden = row.slots > PIPS;
    bar.hidden = !boxes.hidden;
    if (boxes.hidden) {
      fill.style.width = `${Math.min(100, (100 * busy) / row.slots)}%`;
      return;
    }
    while (boxes.childElementCount < row.slots) boxes.append(el("i"));
    while (boxes.childElementCount > row.slots) boxes.lastChild.remove();
    [...boxes.children].forEach((box, at) => box.classList.toggle("on", at < busy));
  };
  return node;
}

// Actions.

function ask(row) {
  if (DRAINED.has(row.state)) {
    confirm({
      title: `Give ${row.worker} work again?`,
      text: "It takes new requests at once.",
      yes: "Undrain",
      act: () => call(token, "board/drain", { worker: row.worker, undo: true }),
    });
    return;
  }
  const busy = row.busy_slots;
  confirm({
    title: `Drain ${row.worker}?`,
    text: `It gets no new work${busy ? `, and finishes ${many(busy, "answer")} that it runs` : ""}. It stays drained until you give it work again.`,
    option: busy ? "Move what it runs to other workers at once" : "",
    yes: "Drain",
    act: (move) => call(token, "board/drain", { worker: row.worker, move }),
  });
}
