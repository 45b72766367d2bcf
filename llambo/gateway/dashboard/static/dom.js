// Makes elements. Text from the mesh becomes text nodes and attributes here, never markup.

const SVG = "http://www.w3.org/2000/svg";
const nodes = new WeakMap();

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else if (name === "data") Object.assign(node.dataset, value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

export function el(tag, props, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function svg(tag, props, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

export const $ = (id) => document.getElementById(id);

/** Changes the text only if it differs, so that a selection or a screen reader is not disturbed. */
export function setText(node, text) {
  const value = String(text);
  if (node.textContent !== value) node.textContent = value;
}

export function setData(node, name, value) {
  if (node.dataset[name] !== String(value)) node.dataset[name] = String(value);
}

/**
 * Makes `parent` contain one node for each row, in this order. A row keeps its node, and with it the focus.
 * `make` returns a node with a function `show(row)`.
 */
export function keyed(parent, rows, keyOf, make) {
  if (!nodes.has(parent)) nodes.set(parent, new Map());
  const known = nodes.get(parent);
  const wanted = new Set();
  let at = parent.firstElementChild;
  for (const row of rows) {
    const key = keyOf(row);
    wanted.add(key);
    let node = known.get(key);
    if (!node) known.set(key, (node = make(row)));
    node.show(row);
    if (node === at) at = at.nextElementSibling;
    else parent.insertBefore(node, at);
  }
  for (const [key, node] of known) {
    if (wanted.has(key)) continue;
    known.delete(key);
    node.remove();
  }
}

/** A state as a shape and a word; the colour only repeats it. */
export function state(word, tone) {
  const label = el("span", { class: "word" }, word);
  const node = el("span", { class: "state", data: { tone } }, el("span", { class: "shape", "aria-hidden": "true" }), label);
  node.show = (nextWord, nextTone) => {
    setText(label, nextWord);
    setData(node, "tone", nextTone);
  };
  return node;
}
