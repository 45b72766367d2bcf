// The stream of what happens. EventSource cannot send a token, so this reads the same format by fetch.

const SILENCE_MS = 15_000; // the gateway says something at least every 10 s
const LONGEST_PAUSE_MS = 5_000;

export class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

export const headers = (token) => (token ? { Authorization: `Bearer ${token}` } : {});

/** What a reply that is no success says, whatever its shape. */
export async function refusal(reply) {
  let text = `${reply.status} ${reply.statusText}`;
  try {
    const told = await reply.json();
    text = told.error?.message ?? text;
  } catch {
    // Not JSON: a proxy has answered. The status is all there is to say.
  }
  return new Refused(reply.status, text);
}

export async function call(token, path, body) {
  const told = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
  const type = body === undefined ? {} : { "Content-Type": "application/json" };
  const reply = await fetch(path, { ...told, headers: { ...headers(token), ...type }, cache: "no-store" });
  if (!reply.ok) throw await refusal(reply);
  return reply.json();
}

/** The `data` of each server-sent event of a body, as it comes. `heard` is called for every byte, comments too. */
export async function* events(body, heard = () => {}) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      heard();
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
    reader.cancel().catch(() => {}); // the connection may be broken already, and that has been told
  }
}

/**
 * Follows the mesh until `stop` is called, and comes back whenever the connection breaks.
 * `on.message` gets what is said, `on.state` "live" or why not, `on.refused` the status that makes more tries useless.
 */
export function follow(token, on) {
  const leaving = new AbortController();
  let pause = 250;

  async function once() {
    const broken = new AbortController();
    const leave = () => broken.abort();
    leaving.signal.addEventListener("abort", leave);
    let timer = setTimeout(leave, SILENCE_MS);
    const heard = () => {
      clearTimeout(timer);
      timer = setTimeout(leave, SILENCE_MS);
    };
    try {
      const reply = await fetch("board/live", { headers: headers(token), signal: broken.signal, cache: "no-store" });
      if (!reply.ok) throw await refusal(reply);
      for await (const data of events(reply.body, heard)) {
        const said = JSON.parse(data);
        if (said.over) throw new Refused(said.over.status, said.over.text);
        pause = 250;
        on.state("live");
        on.message(said);
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
        on.state(error instanceof Refused ? error.message : "Connection lost, trying again");
        await new Promise((resolve) => setTimeout(resolve, pause));
        pause = Math.min(LONGEST_PAUSE_MS, pause * 2);
      }
    }
  }

  run();
  return () => leaving.abort();
}
