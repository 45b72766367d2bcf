// The state of the mesh in four figures with their last five minutes, and in a sentence.

import { $, el, setData, setText } from "./dom.js";
import { count, duration, figure, many, number } from "./format.js";
import { spark } from "./spark.js";

function tile(name, kind) {
  const value = el("span", { class: "value" });
  const unit = el("span", { class: "unit" });
  const chart = spark(kind);
  const foot = el("p", { class: "foot" });
  const node = el(
    "article",
    { class: "figure" },
    el("h2", {}, name),
    el("p", { class: "reading" }, value, " ", unit),
    chart,
    foot,
  );
  node.show = ([reading, of], note) => {
    setText(value, reading);
    setText(unit, of);
    setText(foot, note);
  };
  node.draw = (points, now, top, title) => chart.draw(points, now, top, title);
  return node;
}

const tiles = {
  speed: tile("Throughput", "line"),
  use: tile("Utilisation", "line"),
  queue: tile("Queue", "line"),
  first: tile("First token", "dots"),
};

export function begin() {
  $("figures").append(...Object.values(tiles));
}

const peak = (points) => Math.max(0, ...points.map((point) => point.value));
const share = (busy, slots) => (slots ? Math.min(100, (100 * busy) / slots) : 0);

export function show(mesh) {
  const now = mesh.now();
  const of = (value) => mesh.samples.map((sample) => ({ at: sample.at, value: value(sample) }));
  showSpeed(mesh, of((sample) => sample.tokens_per_s), now);
  showUse(mesh, of((sample) => share(sample.busy, sample.slots)), now);
  showQueue(mesh, of((sample) => sample.waiting), now);
  showFirst(mesh, of((sample) => sample.first_ms).filter((point) => point.value), now);
  showLead(mesh, now);
}

function showSpeed(mesh, points, now) {
  const most = peak(points);
  const pace = mesh.latency.stream_tokens_per_s;
  const each = pace ? ` · ${number(pace)} for each answer` : "";
  tiles.speed.show([number(mesh.mesh.tokens_per_s ?? 0), "tokens/s"], `peak ${number(most)}${each}`);
  tiles.speed.draw(points, now, 1, `Tokens per second in the last five minutes, ${number(most)} at most`);
}

function showUse(mesh, points, now) {
  const { slots = 0, busy_slots: busy = 0 } = mesh.mesh;
  const note = slots ? `${count(busy)} of ${many(slots, "slot")} busy` : "no slots";
  tiles.use.show([count(share(busy, slots)), "%"], note);
  tiles.use.draw(points, now, 100, `Share of slots that were busy in the last five minutes, ${count(peak(points))} % at most`);
}

function showQueue(mesh, points, now) {
  const { queued_ms: half, queued_p95_ms: most } = mesh.latency;
  const note = half === undefined ? `peak ${count(peak(points))}` : `median wait ${duration(half)} · p95 ${duration(most)}`;
  tiles.queue.show([count(mesh.mesh.waiting ?? 0), "waiting"], note);
  tiles.queue.draw(points, now, 4, `Requests that waited in the last five minutes, ${count(peak(points))} at most`);
}

function showFirst(mesh, points, now) {
  const { first_ms: half, first_p95_ms: most, answers } = mesh.latency;
  if (half === undefined) tiles.first.show(["–", ""], "no answers yet");
  else tiles.first.show(figure(half), `median of ${many(answers, "answer")} · p95 ${duration(most)}`);
  tiles.first.draw(points, now, 10, `Time to the first token in the last five minutes, ${duration(peak(points))} at most`);
}

// The sentence.

const READY = new Set(["ready", "trial"]);

function showLead(mesh, now) {
  const numbers = mesh.mesh;
  const [all, ready] = [numbers.workers ?? 0, numbers.ready ?? 0];
  let line = `${count(ready)} of ${many(all, "worker")} ${ready === 1 ? "is" : "are"} ready`;
  const idle = !all && mesh.hosts.size > 0;
  if (idle) line = "No model is loaded";
  else if (!all) line = "No worker has joined yet";
  else if (ready === all) line = all === 1 ? "The one worker is ready" : all === 2 ? "Both workers are ready" : `All ${count(all)} workers are ready`;
  else if (!ready) line = all === 1 ? "The one worker is not ready" : `None of ${count(all)} workers is ready`;
  setText($("headline"), mesh.problem ? "The mesh does not answer" : line);
  setData($("headline"), "tone", mesh.problem || (!ready && !idle) ? "warn" : "calm");
  setText($("subline"), mesh.problem ? `${mesh.problem}. Below is the last known state.` : sentence(mesh, now));
  setText($("broker"), numbers.broker ?? "");
}

function sentence(mesh, now) {
  const numbers = mesh.mesh;
  const running = numbers.running ? `${many(numbers.running, "answer")} in progress` : "No answer in progress";
  const waiting = numbers.waiting ? `${count(numbers.waiting)} waiting` : "none waiting";
  const others = mesh
    .present()
    .filter((row) => !READY.has(row.state))
    .map((row) => `${row.worker} is ${row.state}`);
  const notes = others.length > 3 ? [`${count(others.length)} workers are not ready`] : others;
  const { ended = 0, failed = 0 } = numbers.counters ?? {};
  const done = ended ? `${many(ended, "request")} done${failed ? `, ${count(failed)} of them failed` : ""}` : "";
  const fake = (numbers.models ?? []).some((model) => model.fake) ? "the fake engine makes words up" : "";
  const behind = numbers.behind ? "the broker does not keep up, new requests are refused" : "";
  return [behind, fake, running, waiting, ...notes, done, `up for ${duration(now - numbers.since)}`].filter(Boolean).join(" · ");
}
