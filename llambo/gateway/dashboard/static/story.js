// One request's story: what the broker remembers of it, and why things happened.

import { $, el, say } from "./dom.js";
import { confirm } from "./confirm.js";
import { count, duration } from "./format.js";
import { call } from "./live.js";

const TONES = {
  "engine died": "bad", suspected: "warn", cancelled: "warn", repair: "warn", "not adopted": "warn",
  dispatched: "good", accepted: "good", ended: "calm",
};

let token = "";
let shown = "";
let asking = false;

export function begin() {
  const dialog = $("story");
  dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => (shown = ""));
  $("story-cancel").addEventListener("click", () => {
    const id = shown;
    confirm({
      title: `Cancel request ${id.slice(0, 8)}?`,
      text: "Whoever waits for it is told that it was cancelled, and keeps what has come so far.",
      yes: "Cancel it",
      act: async () => {
        await call(token, "board/cancel", { id });
        await look();
      },
    });
  });
}

export function use(withToken) {
  token = withToken;
}

export function open(id) {
  shown = id;
  say($("story-title"), `Request ${id.slice(0, 8)}`);
  $("story-facts").replaceChildren();
  $("story-list").replaceChildren();
  $("story-cancel").hidden = true;
  $("story").showModal();
  look();
}

/** Called with each news of the mesh: a story that goes on is read again. */
export function show() {
  if (shown && !$("story-cancel").hidden) look();
}

async function look() {
  if (asking) return;
  asking = true;
  const id = shown;
  try {
    const told = await call(token, `board/requests/${encodeURIComponent(id)}`);
    if (id === shown) tell(told);
  } catch (error) {
    if (id === shown) say($("story-problem"), error.message);
  } finally {
    asking = false;
  }
}

function tell(told) {
  say($("story-problem"), told.error || "");
  const over = told.state === "ended";
  $("story-cancel").hidden = over;
  const facts = {
    Id: told.id,
    State: over ? `ended: ${told.reason}` : told.state,
    Model: told.model,
    Worker: told.worker || "none yet",
    Tokens: count(told.tokens),
    Moves: count(told.moves),
  };
  const list = $("story-facts");
  if (!list.childElementCount) {
    for (const name of Object.keys(facts)) list.append(el("div", {}, el("dt", {}, name), el("dd")));
  }
  Object.values(facts).forEach((value, at) => say(list.children[at].lastChild, value));
  const lines = $("story-list");
  // The middle of a long story may have been left out, so that nothing of it can be taken over by its place.
  const kept = told.story.map((each) => `${each.at_ms} ${each.what} ${each.detail}`).join("\n");
  if (lines.kept === kept && lines.childElementCount) return;
  lines.kept = kept;
  lines.replaceChildren(...told.story.map(step));
}

function step({ at_ms: at, what, detail }) {
  const time = el("span", { class: "when" }, at < 60_000 ? `+${at < 1000 ? `${at} ms` : `${(at / 1000).toFixed(2)} s`}` : `+${duration(at)}`);
  return el(
    "li",
    { data: { tone: TONES[what] ?? "calm" } },
    time,
    el("div", {}, el("b", {}, what), detail ? el("p", { class: "sub" }, detail) : ""),
  );
}
