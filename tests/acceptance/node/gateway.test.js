// The official `openai` package for Node against a gateway, and its streams by plain fetch.
// GATEWAY is its address, MODEL what it serves. Started by test_node.py.

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const { GATEWAY, MODEL } = process.env;
const gpt = new OpenAI({ baseURL: `${GATEWAY}/v1`, apiKey: "none", maxRetries: 0, timeout: 30_000 });

const say = (text, more = {}) => ({
  model: MODEL,
  messages: [{ role: "user", content: text }],
  temperature: 0,
  max_tokens: 32,
  ...more,
});

const weather = {
  type: "function",
  function: {
    name: "weather",
    description: "The weather of a city.",
    parameters: {
      type: "object",
      properties: { city: { type: "string", maxLength: 20 } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};

test("an answer", async () => {
  const found = await gpt.chat.completions.create(say("What is the capital of France? Answer in one word."));
  assert.match(found.choices[0].message.content, /Paris/);
  assert.ok(found.usage.prompt_tokens > 10);
  assert.ok(["stop", "length"].includes(found.choices[0].finish_reason));
});

test("an answer as a stream, with usage", async () => {
  const asked = say("Tell me a story.", { temperature: 0.9, seed: 5 });
  const chunks = [];
  const options = { include_usage: true };
  for await (const chunk of await gpt.chat.completions.create({ ...asked, stream: true, stream_options: options })) {
    chunks.push(chunk);
  }
  const text = chunks.flatMap((chunk) => chunk.choices.map((choice) => choice.delta.content ?? "")).join("");
  const whole = await gpt.chat.completions.create(asked);
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
  assert.ok(chunks.length > 10, "it came in pieces");
});

test("the stream helper puts the same together", async () => {
  const asked = say("Tell me a story.", { temperature: 0.9, seed: 5 });
  const deltas = [];
  const stream = gpt.chat.completions.stream(asked);
  stream.on("content", (delta) => deltas.push(delta));
  const final = await stream.finalChatCompletion();
  assert.equal(deltas.join(""), final.choices[0].message.content);
});

test("JSON that follows a schema", async () => {
  const schema = {
    type: "object",
    properties: { name: { type: "string", maxLength: 12 }, age: { type: "integer" } },
    required: ["name", "age"],
    additionalProperties: false,
  };
  const wanted = { type: "json_schema", json_schema: { name: "person", schema, strict: true } };
  const found = await gpt.chat.completions.create(
    say("Invent a person.", { response_format: wanted, max_tokens: 200 }),
  );
  const person = JSON.parse(found.choices[0].message.content);
  assert.deepEqual(Object.keys(person).sort(), ["age", "name"]);
  assert.ok(Number.isInteger(person.age));
});

test("a tool that must be called, and what it has found", async () => {
  const asked = say("How is the weather in Oslo?", { tools: [weather], max_tokens: 100 });
  const found = await gpt.chat.completions.create({ ...asked, tool_choice: "required", parallel_tool_calls: false });
  const { message, finish_reason } = found.choices[0];
  assert.equal(finish_reason, "tool_calls");
  const [call] = message.tool_calls;
  assert.equal(call.function.name, "weather");
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ["city"]);

  const streamed = await gpt.chat.completions
    .stream({ ...asked, tool_choice: "required", parallel_tool_calls: false })
    .finalChatCompletion();
  assert.equal(streamed.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);

  const result = { role: "tool", tool_call_id: call.id, content: "It rains, 3 degrees." };
  const last = await gpt.chat.completions.create({
    ...asked,
    messages: [...asked.messages, message, result],
    tool_choice: "none",
  });
  assert.ok(last.choices[0].message.content);
});

test("a response, whole and streamed", async () => {
  const asked = { model: MODEL, input: "What is the capital of France?", temperature: 0, max_output_tokens: 16 };
  const whole = await gpt.responses.create(asked);
  assert.ok(whole.output_text);
  let text = "";
  for await (const event of await gpt.responses.create({ ...asked, stream: true })) {
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  assert.equal(text, whole.output_text);
});

test("embeddings", async () => {
  const found = await gpt.embeddings.create({ model: MODEL, input: ["a cat", "a kitten", "a tax form"] });
  const [cat, kitten, form] = found.data.map((each) => each.embedding);
  const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
  assert.ok(Math.abs(dot(cat, cat) - 1) < 1e-3);
  assert.ok(dot(cat, kitten) > dot(cat, form));
});

test("models", async () => {
  const names = [];
  for await (const model of gpt.models.list()) names.push(model.id);
  assert.deepEqual(names, [MODEL]);
});

test("errors are the package's own", async () => {
  await assert.rejects(gpt.chat.completions.create(say("x", { model: "none" })), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    assert.equal(error.param, "model");
    assert.ok(error.requestID);
    return true;
  });
  await assert.rejects(gpt.chat.completions.create(say("x", { temperature: -1 })), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
  const long = gpt.chat.completions.create(say("word ".repeat(3_000), { stream: true }));
  await assert.rejects(long, (error) => error instanceof OpenAI.BadRequestError && error.code === "too_long");
});

test("an answer that is given up is cancelled", async () => {
  const stream = await gpt.chat.completions.create(
    say("Tell me a long story.", { stream: true, max_tokens: 400, ignore_eos: true }),
  );
  let chunks = 0;
  for await (const _ of stream) {
    if (++chunks === 5) break; // The package aborts the request.
  }
  assert.equal(chunks, 5);
});

// --- by plain fetch ------------------------------------------------------------------------------------------

// The next `count` events as they stand there (all of them without a count); then the connection is cut.
async function read(asked, from, count = Infinity) {
  const cut = new AbortController();
  const headers = { "content-type": "application/json", ...(from ? { "last-event-id": from } : {}) };
  const response = await fetch(`${GATEWAY}/v1/chat/completions`, {
    method: "POST",
    headers,
    body: JSON.stringify(asked),
    signal: cut.signal,
  });
  assert.equal(response.status, 200);
  const events = [];
  let rest = "";
  for await (const part of response.body.pipeThrough(new TextDecoderStream())) {
    const found = (rest + part).split("\n\n");
    rest = found.pop();
    events.push(...found.filter((event) => !event.startsWith(":")));
    if (events.length >= count) break;
  }
  cut.abort();
  return events.slice(0, count);
}

const idOf = (event) => /^id: (.*)$/m.exec(event)[1];

test("a stream that was cut comes back with Last-Event-ID and has lost nothing", async () => {
  const asked = say("Tell me a story about a llama.", { stream: true, seed: 3, temperature: 0.9, max_tokens: 40 });
  const received = await read(asked, null, 10);
  received.push(...(await read(asked, idOf(received.at(-1)), 10)));
  assert.equal(received.length, 20);
  received.push(...(await read(asked, idOf(received.at(-1)))));
  assert.ok(received.at(-1).endsWith("data: [DONE]"));
  // Once more from its beginning, in one piece.
  assert.deepEqual([received[0], ...(await read(asked, idOf(received[0])))], received);
  // And as the package reads it, from a request of its own.
  const chunks = received.slice(0, -1).map((event) => JSON.parse(/^data: (.*)$/m.exec(event)[1]));
  const text = chunks.flatMap((chunk) => chunk.choices.map((choice) => choice.delta.content ?? "")).join("");
  const whole = await gpt.chat.completions.create({ ...asked, stream: false });
  assert.equal(text, whole.choices[0].message.content);
});
