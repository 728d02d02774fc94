/** Colours and patterns of the style sheet, for the canvas. */

import { hcl, lab } from "./d3.min.js";
import { el } from "./dom.js";

/** Each of a few runs, and each curve of a chart, also has its own pattern. */
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

/** Lightness and chroma of further colours, on a dark and on a light surface: all of them are readable on it. */
const LIGHTNESS = { dark: [64, 76, 88], light: [30, 42, 54] };
const CHROMA = [38, 68];

/** The colour of a run by its place among the shown ones: the style sheet's, then those that differ most from all before. */
export function runColour(place) {
  const { run, surface } = colours();
  if (place < run.length) return run[place];
  theme.further ??= furtherColours(run, LIGHTNESS[lab(surface).l < 50 ? "dark" : "light"]);
  return theme.further[(place - run.length) % theme.further.length];
}

function furtherColours(known, lightness) {
  const hues = Array.from({ length: 36 }, (_, index) => index * 10);
  const left = lightness.flatMap((l) =>
    CHROMA.flatMap((c) => hues.map((h) => ({ hex: hcl(h, c, l).formatHex(), nearest: Infinity }))),
  );
  const take = (hex) => {
    const { l, a, b } = lab(hex);
    for (const one of left) {
      one.lab ??= lab(one.hex);
      one.nearest = Math.min(one.nearest, Math.hypot(one.lab.l - l, one.lab.a - a, one.lab.b - b));
    }
  };
  known.forEach(take);
  const found = [];
  while (left.length) {
    const best = left.reduce((most, one) => (one.nearest > most.nearest ? one : most));
    left.splice(left.indexOf(best), 1);
    found.push(best.hex);
    take(best.hex);
  }
  return found;
}

/** Convert `rgb(1, 2, 3)`, as browsers return colours, to `#010203`, to which an opacity can be appended. */
function hex(colour) {
  const parts = colour.match(/\d+(\.\d+)?/g).slice(0, 3);
  return `#${parts.map((part) => Math.round(Number(part)).toString(16).padStart(2, "0")).join("")}`;
}
