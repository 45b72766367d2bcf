// Recent events, the latest first.

import { $, el, keyed, setText, state } from "./dom.js";
import { clock, count, moment } from "./format.js";

const SHOWN = 60;
const list = el("ol", { class: "events" });
const none = el("p", { class: "empty" }, "Nothing has happened yet. Workers that join, leave or recover are shown here.");

export function begin() {
  $("activity").append(list, none);
}

export function show(mesh) {
  // Short pauses of the broker are no news: its leases allow for them.
  const events = mesh.events.filter((event) => event.warning || event.kind !== "stood still");
  const rows = folded(events.slice(-SHOWN).reverse());
  keyed(list, rows, (event) => event.number, made);
  list.hidden = !rows.length;
  none.hidden = rows.length > 0;
}

/** On an overloaded host the broker pauses again and again: the pauses become one line, that of the latest. */
function folded(events) {
  const rows = [];
  for (const event of events) {
    const last = rows.at(-1);
    if (last && last.kind === "stood still" && event.kind === last.kind) last.times += 1;
    else rows.push(Object.assign(event, { times: 1 }));
  }
  return rows;
}

function made(event) {
  const { verb, tone, detail } = event.phrase;
  const below = el("p", { class: "sub" });
  const node = el(
    "li",
    {},
    el("time", { datetime: new Date(event.at).toISOString(), title: moment(event.at) }, clock(event.at)),
    el(
      "div",
      {},
      el("p", {}, state("", tone), event.worker ? el("b", {}, event.worker) : "", event.worker ? " " : "", verb),
      below,
    ),
  );
  node.show = ({ times }) => setText(below, times > 1 ? `${detail}, the last of ${count(times)} times` : detail);
  return node;
}
