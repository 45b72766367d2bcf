// The stream of changes. EventSource cannot send a token, so this reads the same format by fetch.

const SILENCE_MS = 15_000; // the gateway sends something at least every 10 s
const LONGEST_PAUSE_MS = 5_000;

export class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

export const headers = (token) => (token ? { Authorization: `Bearer ${token}` } : {});

/** The error in a reply, in the shape of any API. */
export async function refusal(reply) {
  let text = `${reply.status} ${reply.statusText}`;
  try {
    const body = await reply.json();
    text = body.error?.message ?? text;
  } catch {
    // Not JSON: a proxy has answered, and only the status is known.
  }
  return new Refused(reply.status, text);
}

export async function call(token, path, body) {
  const request = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
  const type = body === undefined ? {} : { "Content-Type": "application/json" };
  const reply = await fetch(path, { ...request, headers: { ...headers(token), ...type }, cache: "no-store" });
  if (!reply.ok) throw await refusal(reply);
  return reply.json();
}

/** The `data` of each server-sent event of a body, as it arrives. `onData` is called for all data, comments included. */
export async function* events(body, onData = () => {}) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      onData();
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the connection may be broken already, which was reported
  }
}

/**
 * Follows the mesh until the returned function is called, and reconnects when the connection breaks.
 * `on.message` gets each message, `on.live` is called when the stream is, `on.lost` gets the reason when it is not, and
 * `on.refused` gets an error after which trying again is useless.
 */
export function follow(token, on) {
  const leaving = new AbortController();
  let pause = 250;

  async function once() {
    const broken = new AbortController();
    const leave = () => broken.abort();
    leaving.signal.addEventListener("abort", leave);
    let timer = setTimeout(leave, SILENCE_MS);
    const onData = () => {
      clearTimeout(timer);
      timer = setTimeout(leave, SILENCE_MS);
    };
    try {
      const reply = await fetch("board/live", { headers: headers(token), signal: broken.signal, cache: "no-store" });
      if (!reply.ok) throw await refusal(reply);
      for await (const data of events(reply.body, onData)) {
        const message = JSON.parse(data);
        if (message.over) throw new Refused(message.over.status, message.over.text);
        pause = 250;
        on.live();
        on.message(message);
      }
      throw new Error("the gateway ended the stream");
    } finally {
      clearTimeout(timer);
      leaving.signal.removeEventListener("abort", leave);
    }
  }

  async function run() {
    while (!leaving.signal.aborted) {
      try {
        await once();
      } catch (error) {
        if (leaving.signal.aborted) return;
        if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
          on.refused(error);
          return;
        }
        on.lost(error instanceof Refused ? error.message : "Connection lost, trying again");
        await new Promise((resolve) => setTimeout(resolve, pause));
        pause = Math.min(LONGEST_PAUSE_MS, pause * 2);
      }
    }
  }

  run();
  return () => leaving.abort();
}
