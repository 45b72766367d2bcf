// How the workers are distributed over classes and hosts, and how busy each of these is.

import { $, el, keyed, setData, setText } from "./dom.js";
import { count, many, natural } from "./format.js";

const SHOWN = 12;
const groups = [group("By class", (row) => row.class || "no class"), group("By host", (row) => row.host || "unknown")];

export function begin() {
  $("places").append(...groups);
}

export function show(mesh) {
  for (const each of groups) each.show(mesh.present());
}

function group(title, nameOf) {
  const list = el("ul", { class: "spread" });
  const rest = el("p", { class: "sub", hidden: true });
  const none = el("p", { class: "empty" }, "No workers.");
  const node = el("div", { class: "group" }, el("h3", {}, title), list, rest, none);
  node.show = (workers) => {
    const found = new Map();
    for (const row of workers) {
      const name = nameOf(row);
      const sum = found.get(name) ?? { name, nodes: 0, ready: 0, slots: 0, busy: 0 };
      sum.nodes += 1;
      sum.ready += row.state === "ready" || row.state === "trial";
      sum.slots += row.slots;
      sum.busy += row.busy_slots;
      found.set(name, sum);
    }
    const rows = [...found.values()].sort((a, b) => b.nodes - a.nodes || natural(a.name, b.name));
    for (const row of rows) row.share = row.nodes / workers.length;
    keyed(list, rows.slice(0, SHOWN), (row) => row.name, (row) => line(row.name));
    none.hidden = rows.length > 0;
    rest.hidden = rows.length <= SHOWN;
    setText(rest, `and ${count(rows.length - SHOWN)} more`);
  };
  return node;
}

function line(name) {
  const text = el("span", { class: "of" });
  const [share, busy] = [el("span", { class: "fill" }), el("span", { class: "fill busy" })];
  const node = el("li", {}, el("span", { class: "title" }, name), text, el("span", { class: "bar", "aria-hidden": "true" }, share, busy));
  node.show = (row) => {
    const ready = row.ready === row.nodes ? "" : `, ${count(row.ready)} ready`;
    setText(text, `${many(row.nodes, "worker")}${ready} · ${count(row.busy)} of ${count(row.slots)} slots busy`);
    setData(node, "whole", row.ready === row.nodes);
    share.style.width = `${100 * row.share}%`;
    busy.style.width = `${row.slots ? 100 * row.share * Math.min(1, row.busy / row.slots) : 0}%`;
  };
  return node;
}
