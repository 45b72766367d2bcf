// Small charts of the last minutes: a line with its area, or a dot for each answer.

import { svg, setText } from "./dom.js";

const [WIDTH, HEIGHT, FOOT] = [300, 56, 3];
export const WINDOW_MS = 300_000;

/** `kind`: "line" or "dots". `draw` takes points { at, value }, the end of the window, and a minimum for the top of the scale. */
export function spark(kind) {
  const title = svg("title");
  const area = svg("path", { class: "area" });
  const line = svg("path", { class: "line", "vector-effect": "non-scaling-stroke" });
  const base = svg("path", { class: "base", d: `M0 ${HEIGHT - 0.5}H${WIDTH}`, "vector-effect": "non-scaling-stroke" });
  const dots = svg("path", { class: "dots", "vector-effect": "non-scaling-stroke" });
  const node = svg(
    "svg",
    { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
    title,
    base,
    ...(kind === "line" ? [area, line] : [dots]),
  );

  node.draw = (points, now, top, text) => {
    setText(title, text);
    const highest = Math.max(top, ...points.map((point) => point.value));
    const x = (point) => (WIDTH * (1 - (now - point.at) / WINDOW_MS)).toFixed(1);
    const y = (point) => (HEIGHT - FOOT - (HEIGHT - 2 * FOOT) * (highest ? point.value / highest : 0)).toFixed(1);
    const shown = points.filter((point) => now - point.at <= WINDOW_MS);
    if (kind === "dots") {
      dots.setAttribute("d", shown.map((point) => `M${x(point)} ${y(point)}h.01`).join(""));
      return;
    }
    const path = shown.map((point) => `${x(point)} ${y(point)}`).join("L");
    line.setAttribute("d", path && `M${path}`);
    area.setAttribute("d", path && `M${x(shown[0])} ${HEIGHT}L${path}L${x(shown.at(-1))} ${HEIGHT}Z`);
  };
  return node;
}
