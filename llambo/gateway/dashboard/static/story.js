// The story of one request: what happened to it, and why.

import { $, el, setText } from "./dom.js";
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
      text: "Its client is informed that it was cancelled, and keeps the tokens it has received.",
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
  setText($("story-title"), `Request ${id.slice(0, 8)}`);
  $("story-facts").replaceChildren();
  $("story-list").replaceChildren();
  $("story-cancel").hidden = true;
  $("story").showModal();
  look();
}

/** Called at each change of the mesh: the story of a running request is read again. */
export function show() {
  if (shown && !$("story-cancel").hidden) look();
}

async function look() {
  if (asking) return;
  asking = true;
  const id = shown;
  try {
    const request = await call(token, `board/requests/${encodeURIComponent(id)}`);
    if (id === shown) fill(request);
  } catch (error) {
    if (id === shown) setText($("story-problem"), error.message);
  } finally {
    asking = false;
  }
}

function fill(request) {
  setText($("story-problem"), request.error || "");
  const over = request.state === "ended";
  $("story-cancel").hidden = over;
  const facts = {
    Id: request.id,
    State: over ? `ended: ${request.reason}` : request.state,
    Model: request.model,
    Worker: request.worker || "none yet",
    Tokens: count(request.tokens),
    Moves: count(request.moves),
  };
  const list = $("story-facts");
  if (!list.childElementCount) {
    for (const name of Object.keys(facts)) list.append(el("div", {}, el("dt", {}, name), el("dd")));
  }
  Object.values(facts).forEach((value, at) => setText(list.children[at].lastChild, value));
  const lines = $("story-list");
  // The middle of a long story may have been dropped, so its lines cannot be identified by their position.
  const drawn = request.story.map((each) => `${each.at_ms} ${each.what} ${each.detail}`).join("\n");
  if (lines.drawn === drawn && lines.childElementCount) return;
  lines.drawn = drawn;
  lines.replaceChildren(...request.story.map(step));
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
