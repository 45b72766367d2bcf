// A prompt and its answer, by the same API that OpenAI clients use.

import { $, el, setData, setText } from "./dom.js";
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

/** A model that is stored is loaded when it is asked. */
const canAnswer = (model) => (model.workers || model.state === "stored") && !["embed", "rerank"].includes(model.kind);

/** The models to choose from. The current choice is kept. */
export function show(mesh, withToken) {
  token = withToken;
  const names = (mesh.mesh.models ?? []).filter(canAnswer).map((model) => model.model);
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
  const measured = { tokens: 0, first: 0 };
  id = "";
  setText($("answer"), "");
  setText($("answer-facts"), "Sent");
  setData($("answer"), "state", "running");
  $("answer-story").hidden = true;
  working(true);
  try {
    await read(leaving.signal, began, measured);
    setData($("answer"), "state", "done");
  } catch (error) {
    setData($("answer"), "state", leaving.signal.aborted ? "done" : "failed");
    if (!leaving.signal.aborted) setText($("answer-facts"), error.message);
    else setText($("answer-facts"), `Stopped after ${count(measured.tokens)} tokens`);
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
  // The focus moves from the button that disappears to the other one.
  if (document.activeElement === document.body) (now ? $("ask-stop") : $("ask-send")).focus();
}

async function read(signal, began, measured) {
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
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    id ||= /[0-9a-f]{32}$/.exec(chunk.id ?? "")?.[0] ?? "";
    const choice = chunk.choices?.[0];
    if (choice?.finish_reason) why = choice.finish_reason;
    if (chunk.usage) measured.tokens = chunk.usage.completion_tokens;
    const text = choice?.delta?.content;
    if (!text) continue;
    measured.first ||= performance.now() - began;
    measured.tokens += 1;
    put(text);
  }
  showFacts(performance.now() - began, measured, why);
}

/** Appends, and scrolls if the end was visible before. */
function put(text) {
  const box = $("answer");
  const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 24;
  box.append(text);
  if (follows) box.scrollTop = box.scrollHeight;
}

function showFacts(took, measured, why) {
  const later = took - measured.first;
  const pace = measured.tokens > 1 && later > 5 ? `${number(((measured.tokens - 1) * 1000) / later)} tokens/s` : "";
  const first = measured.first ? `first after ${duration(measured.first)}` : "";
  const end = why === "length" ? "stopped at its limit" : "";
  setText($("answer-facts"), [`${count(measured.tokens)} tokens in ${duration(took)}`, pace, first, end].filter(Boolean).join(" · "));
}
