// What happened lately, the latest first.

import { $, el, keyed, state } from "./dom.js";
import { clock, moment } from "./format.js";

const SHOWN = 60;
const list = el("ol", { class: "events" });
const none = el("p", { class: "empty" }, "Quiet so far. Workers that come, go or recover are told here.");

export function begin() {
  $("activity").append(list, none);
}

export function show(mesh) {
  const rows = mesh.events.slice(-SHOWN).reverse();
  keyed(list, rows, (event) => event.number, made);
  list.hidden = !rows.length;
  none.hidden = rows.length > 0;
}

function made(event) {
  const { verb, tone, detail } = event.told;
  const node = el(
    "li",
    {},
    el("time", { datetime: new Date(event.at).toISOString(), title: moment(event.at) }, clock(event.at)),
    el(
      "div",
      {},
      el("p", {}, state("", tone), event.worker ? el("b", {}, event.worker) : "", event.worker ? " " : "", verb),
      detail ? el("p", { class: "sub" }, detail) : "",
    ),
  );
  node.show = () => {}; // what has happened does not change
  return node;
}
