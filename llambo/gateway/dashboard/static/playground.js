// A question and its answer, as any OpenAI client would ask it.

import { $, el, mark, say } from "./dom.js";
import { count, duration, number } from "./format.js";
import { events, headers, refusal } from "./live.js";
import { open } from "./story.js";

let token = "";
let running = null;
let id = "";

export function begin() {
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      $("ask").requestSubmit();
    }
  });
  $("ask-stop").addEventListener("click", () => running?.abort());
  $("answer-story").addEventListener("click", () => open(id));
}

/** The models to choose from. A choice that was made stays. */
export function show(mesh, withToken) {
  token = withToken;
  const names = (mesh.mesh.models ?? []).filter((model) => model.workers).map((model) => model.model);
  const select = $("model");
  const known = [...select.options].map((option) => option.value);
  if (names.join("\n") !== known.join("\n")) {
    const chosen = select.value;
    select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    if (names.includes(chosen)) select.value = chosen;
  }
  $("ask-send").disabled = !names.length || running !== null;
}

async function ask() {
  if (running) return;
  const leaving = (running = new AbortController());
  const began = performance.now();
  const told = { tokens: 0, first: 0 };
  id = "";
  say($("answer"), "");
  say($("answer-facts"), "Sent");
  mark($("answer"), "state", "running");
  $("answer-story").hidden = true;
  working(true);
  try {
    await read(leaving.signal, began, told);
    mark($("answer"), "state", "done");
  } catch (error) {
    mark($("answer"), "state", leaving.signal.aborted ? "done" : "failed");
    if (!leaving.signal.aborted) say($("answer-facts"), error.message);
    else say($("answer-facts"), `Stopped after ${count(told.tokens)} tokens`);
  } finally {
    running = null;
    working(false);
    $("answer-story").hidden = !id;
  }
}

function working(now) {
  $("ask-send").hidden = now;
  $("ask-send").disabled = now;
  $("ask-stop").hidden = !now;
  // Whoever pressed the one by keyboard goes on at the other.
  if (document.activeElement === document.body) (now ? $("ask-stop") : $("ask-send")).focus();
}

async function read(signal, began, told) {
  const reply = await fetch("v1/chat/completions", {
    method: "POST",
    signal,
    headers: { ...headers(token), "Content-Type": "application/json" },
    body: JSON.stringify({
      model: $("model").value,
      messages: [{ role: "user", content: $("prompt").value }],
      max_tokens: Number($("max-tokens").value) || 200,
      temperature: Number($("temperature").value),
      stream: true,
      stream_options: { include_usage: true },
    }),
  });
  if (!reply.ok) throw await refusal(reply);
  let why = "";
  for await (const data of events(reply.body)) {
    if (data === "[DONE]") break;
    const said = JSON.parse(data);
    if (said.error) throw new Error(said.error.message);
    id ||= /[0-9a-f]{32}$/.exec(said.id ?? "")?.[0] ?? "";
    const choice = said.choices?.[0];
    if (choice?.finish_reason) why = choice.finish_reason;
    if (said.usage) told.tokens = said.usage.completion_tokens;
    const text = choice?.delta?.content;
    if (!text) continue;
    told.first ||= performance.now() - began;
    told.tokens += 1;
    put(text);
  }
  tell(performance.now() - began, told, why);
}

/** At its end, and in sight if the end was in sight before. */
function put(text) {
  const box = $("answer");
  const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 24;
  box.append(text);
  if (follows) box.scrollTop = box.scrollHeight;
}

function tell(took, told, why) {
  const later = took - told.first;
  const pace = told.tokens > 1 && later > 5 ? `${number(((told.tokens - 1) * 1000) / later)} tokens/s` : "";
  const first = told.first ? `first after ${duration(told.first)}` : "";
  const end = why === "length" ? "stopped at its limit" : "";
  say($("answer-facts"), [`${count(told.tokens)} tokens in ${duration(took)}`, pace, first, end].filter(Boolean).join(" · "));
}
