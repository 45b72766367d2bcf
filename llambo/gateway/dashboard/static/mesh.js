// The state of the mesh, updated by the messages of the stream. No element is touched here.

const EVENTS = 200;
const ENDED = 60;
const WINDOW_MS = 300_000;
const GHOST_MS = 60_000; // how long a worker that is gone is still shown

export class Mesh {
  constructor() {
    this.clear();
  }

  clear() {
    this.known = false;
    this.mesh = {};
    this.workers = new Map();
    this.requests = new Map();
    this.hosted = new Map();
    this.hosts = new Map();
    this.ended = [];
    this.events = [];
    this.samples = [];
    this.latency = {};
    this.problem = "";
    this.skew = 0;
  }

  /** The gateway's time: all moments are given in it. */
  now() {
    return Date.now() + this.skew;
  }

  take(message) {
    this.skew = message.now - Date.now();
    if (message.whole) {
      this.clear();
      this.skew = message.now - Date.now();
    }
    this.known = true;
    if (message.mesh) this.mesh = { ...this.mesh, ...message.mesh };
    if (message.latency) this.latency = message.latency;
    if (message.problem !== undefined) this.problem = message.problem;
    if (message.workers) {
      merge(this.workers, message.workers.set, "worker");
      for (const row of message.workers.set) this.workers.get(row.worker).gone = 0;
      for (const name of message.workers.gone) this.ghost(name);
    }
    if (message.requests) {
      merge(this.requests, message.requests.set, "id");
      for (const row of message.requests.set) pace(this.requests.get(row.id), message.now);
      for (const id of message.requests.gone) this.requests.delete(id);
    }
    for (const [kind, key] of [["hosted", "id"], ["hosts", "host"]]) {
      if (!message[kind]) continue;
      merge(this[kind], message[kind].set, key);
      for (const name of message[kind].gone) this[kind].delete(name);
    }
    if (message.ended) this.ended = [...this.ended, ...message.ended].slice(-ENDED);
    if (message.events) this.events = describe([...this.events, ...message.events].slice(-EVENTS));
    if (message.samples) this.samples = [...this.samples, ...message.samples];
    this.age();
  }

  ghost(name) {
    const row = this.workers.get(name);
    if (row) Object.assign(row, { state: "lost", busy_slots: 0, tokens_per_s: 0, gone: this.now() });
  }

  /** What changes with time alone. */
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

/** Tokens per second of an answer in progress, over a second or more. */
function pace(row, now) {
  if (!row.tokens || row.tokens < row.paceTokens) row.pace = 0;
  else if (row.paceTokens === undefined) [row.paceTokens, row.paceAt] = [row.tokens, now];
  else if (now - row.paceAt >= 1_000) {
    row.pace = ((row.tokens - row.paceTokens) * 1_000) / (now - row.paceAt);
    [row.paceTokens, row.paceAt] = [row.tokens, now];
  }
}

/** Events in words: a worker that was lost before has recovered, not only joined. */
function describe(events) {
  const lost = new Set();
  for (const event of events) {
    event.phrase = phrase(event, lost);
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
      return event.warning
        ? { verb: "was lost", tone: "bad", detail: rest }
        : { verb: "left", tone: "calm", detail: rest.replace(/^left: /, "") };
    case "worker serves":
      return { verb: "has loaded", tone: "good", detail: rest };
    case "worker differs":
      return { verb: "differs", tone: "warn", detail: event.text };
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
