/** Colours and patterns of the style sheet, for the canvas. */

import { el } from "./dom.js";

/** Each run, and each curve of a chart, also has its own pattern. */
export const DASHES = [[], [7, 3], [2, 3], [10, 3, 2, 3], [14, 4], [5, 2, 1, 2]];

/** Rows of the stall ledger, from the bottom of the stack to its top. */
export const LAYERS = [
  "compute",
  "contention",
  "data",
  "readback",
  "publish",
  "inline",
  "fence",
  "backpressure",
  "checkpoint",
  "paused",
  "other",
];

let theme = null;

export function forgetColours() {
  theme = null;
}

/** The colours of the style sheet, for the canvas. */
export function colours() {
  if (theme === null) {
    const probe = document.body.appendChild(el("span", { hidden: true }));
    const read = (name) => {
      probe.style.color = `var(${name})`;
      return hex(getComputedStyle(probe).color);
    };
    theme = {
      run: DASHES.map((_, index) => read(`--run-${index}`)),
      text: read("--text"),
      muted: read("--muted"),
      grid: read("--grid"),
      surface: read("--surface"),
      bad: read("--bad"),
      layers: new Map(LAYERS.map((name) => [name, read(`--layer-${name}`)])),
    };
    probe.remove();
  }
  return theme;
}

/** Convert `rgb(1, 2, 3)`, as browsers return colours, to `#010203`, to which an opacity can be appended. */
function hex(colour) {
  const parts = colour.match(/\d+(\.\d+)?/g).slice(0, 3);
  return `#${parts.map((part) => Math.round(Number(part)).toString(16).padStart(2, "0")).join("")}`;
}
