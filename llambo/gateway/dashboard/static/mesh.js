// What is known of the mesh, kept up to date by what the stream says. No element is touched here.

const EVENTS = 200;
const ENDED = 60;
const WINDOW_MS = 300_000;
const GHOST_MS = 60_000; // a worker that is gone is shown for so long, so that nobody wonders where it went

export class Mesh {
  constructor() {
    this.clear();
  }

  clear() {
    this.known = false;
    this.mesh = {};
    this.workers = new Map();
    this.requests = new Map();
    this.ended = [];
    this.events = [];
    this.samples = [];
    this.latency = {};
    this.problem = "";
    this.skew = 0;
  }

  /** The gateway's time, by which all moments are told. */
  now() {
    return Date.now() + this.skew;
  }

  take(said) {
    this.skew = said.now - Date.now();
    if (said.whole) {
      this.clear();
      this.skew = said.now - Date.now();
    }
    this.known = true;
    if (said.mesh) this.mesh = { ...this.mesh, ...said.mesh };
    if (said.latency) this.latency = said.latency;
    if (said.problem !== undefined) this.problem = said.problem;
    if (said.workers) {
      merge(this.workers, said.workers.set, "worker");
      for (const row of said.workers.set) this.workers.get(row.worker).gone = 0;
      for (const name of said.workers.gone) this.ghost(name);
    }
    if (said.requests) {
      merge(this.requests, said.requests.set, "id");
      for (const row of said.requests.set) pace(this.requests.get(row.id), said.now);
      for (const id of said.requests.gone) this.requests.delete(id);
    }
    if (said.ended) this.ended = [...this.ended, ...said.ended].slice(-ENDED);
    if (said.events) this.events = tell([...this.events, ...said.events].slice(-EVENTS));
    if (said.samples) this.samples = [...this.samples, ...said.samples];
    this.age();
  }

  ghost(name) {
    const row = this.workers.get(name);
    if (row) Object.assign(row, { state: "lost", busy_slots: 0, tokens_per_s: 0, gone: this.now() });
  }

  /** What time alone changes. */
  age() {
    const now = this.now();
    this.samples = this.samples.filter((sample) => now - sample.at <= WINDOW_MS + 1_000);
    for (const [name, row] of this.workers) if (row.gone && now - row.gone > GHOST_MS) this.workers.delete(name);
  }

  present() {
    return [...this.workers.values()].filter((row) => !row.gone);
  }
}

function merge(known, rows, key) {
  for (const row of rows) known.set(row[key], { ...known.get(row[key]), ...row });
}

/** Tokens per second of an answer on its way, over a second or more. */
function pace(row, now) {
  if (!row.tokens || row.tokens < row.paceTokens) row.pace = 0;
  else if (row.paceTokens === undefined) [row.paceTokens, row.paceAt] = [row.tokens, now];
  else if (now - row.paceAt >= 1_000) {
    row.pace = ((row.tokens - row.paceTokens) * 1_000) / (now - row.paceAt);
    [row.paceTokens, row.paceAt] = [row.tokens, now];
  }
}

/** Events in words: who was lost before has not only joined, but recovered. */
function tell(events) {
  const lost = new Set();
  for (const event of events) {
    event.told = phrase(event, lost);
    if (event.kind === "worker lost") lost.add(event.worker);
    if (event.kind === "worker joined") lost.delete(event.worker);
  }
  return events;
}

function phrase(event, lost) {
  const rest = afterName(event);
  switch (event.kind) {
    case "worker joined":
      return { verb: lost.has(event.worker) ? "recovered" : "joined", tone: "good", detail: rest };
    case "worker lost":
      return rest.startsWith("left: ")
        ? { verb: "left", tone: "calm", detail: rest.slice(6) }
        : { verb: "was lost", tone: "bad", detail: rest };
    case "worker serves":
      return { verb: "has loaded", tone: "good", detail: rest };
    case "worker slow":
      return { verb: "is slow", tone: "warn", detail: rest };
    case "worker on trial":
      return { verb: "is on trial", tone: "warn", detail: rest };
    case "worker at pace":
      return { verb: "is at pace again", tone: "good", detail: rest };
    case "engine lost":
      return { verb: "lost its engine", tone: "bad", detail: rest };
    case "drain": {
      const [what, ...more] = rest.split(", ");
      return { verb: what, tone: "calm", detail: more.join(", ") };
    }
    case "stood still":
      return { verb: "The broker stood still", tone: "warn", detail: rest.replace("this broker did", "it did") };
    default:
      return { verb: event.worker ? event.kind : sentence(event.kind), tone: "calm", detail: event.text };
  }
}

function afterName(event) {
  if (!event.worker || !event.text.startsWith(event.worker)) return event.text;
  return event.text.slice(event.worker.length).replace(/^:? /, "");
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);
