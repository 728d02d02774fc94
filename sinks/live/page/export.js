/** A chart as a file: CSV, SVG or PNG. */

import { align } from "./curves.js";
import { el, svg } from "./dom.js";
import { colours } from "./theme.js";

const FONT = '"Segoe UI", Roboto, system-ui, sans-serif';
const HEAD = 44; // height of the title and one row of the legend
const ROW = 17; // of a further row
const SIDE = 10;

/** Let the browser save a file. */
export function save(data, type, title, ending) {
  const url = URL.createObjectURL(new Blob([data], { type }));
  const name = title.replace(/[^\p{L}\p{N}._-]+/gu, "-").replace(/^[.-]+/, "") || "chart";
  el("a", { href: url, download: `${name}.${ending}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/**
 * All points of the shown curves, at full precision: a row for each step. A point that merges values has its mean, and
 * their minimum and maximum in further columns. `time` is in Unix seconds.
 */
export function csvOf(chart) {
  const curves = chart.curves().filter((curve) => !chart.isHidden(curve));
  const heads = ["step"];
  const groups = curves.map(({ label, series, values }) => {
    const { length } = series;
    const isMerged = series.width > 1 && series.low !== undefined;
    const own = (values ?? series.mean).subarray(0, length);
    const means = Array.from(own, (value, at) => series.odd?.get(at) ?? value);
    const ends = isMerged ? [series.low.subarray(0, length), series.high.subarray(0, length)] : [];
    heads.push(`${label} time`, label, ...(isMerged ? [`${label} min`, `${label} max`] : []));
    return { x: series.step.subarray(0, length), columns: [series.time.subarray(0, length), means, ...ends] };
  });
  const columns = groups.length ? align(groups) : [[]];
  const rows = Array.from(columns[0], (_, row) => columns.map((column) => cell(column[row])).join(","));
  return [heads.map(head).join(","), ...rows, ""].join("\r\n");
}

function cell(value) {
  return value === undefined || value === null ? "" : String(value);
}

/** A name as a cell (RFC 4180). A table must not take a run's name as a formula. */
function head(text) {
  const told = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(told) ? `"${told.replaceAll('"', '""')}"` : told;
}

/** The chart as it is drawn, with its title and legend. */
export async function pngOf(chart) {
  const { u } = chart;
  const scale = devicePixelRatio;
  const width = u.width + 2 * SIDE;
  const { entries, head } = legendOf(chart, width);
  const height = u.height + head + SIDE;
  const canvas = el("canvas", { width: Math.round(width * scale), height: Math.round(height * scale) });
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.fillStyle = colours().surface;
  pen.fillRect(0, 0, width, height);
  pen.fillStyle = colours().text;
  pen.font = `600 13px ${FONT}`;
  pen.fillText(chart.title, SIDE, 18);
  pen.font = `12px ${FONT}`;
  for (const { curve, x, y } of entries) {
    pen.strokeStyle = curve.colour;
    pen.lineWidth = 2;
    pen.setLineDash(chart.dashOf(curve));
    pen.beginPath();
    pen.moveTo(x, y);
    pen.lineTo(x + 22, y);
    pen.stroke();
    pen.fillText(curve.label, x + 28, y + 4);
  }
  pen.drawImage(u.ctx.canvas, SIDE, head, u.width, u.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

/** The legend in as many rows as it takes: `{entries: [{curve, x, y}], head}`, `head` being its height with the title's. */
function legendOf(chart, width) {
  const pen = el("canvas").getContext("2d");
  pen.font = `12px ${FONT}`;
  let [x, y] = [SIDE, 32];
  const entries = chart.shown.map((curve) => {
    const wide = 28 + pen.measureText(curve.label).width;
    if (x > SIDE && x + wide > width) [x, y] = [SIDE, y + ROW];
    const entry = { curve, x, y };
    x += wide + 16;
    return entry;
  });
  return { entries, head: HEAD + y - 32 };
}

/** The chart as it is drawn, as lines and text. */
export function svgOf(chart) {
  const { u } = chart;
  const { text, muted, grid, surface } = colours();
  const plot = {
    left: u.bbox.left / devicePixelRatio,
    top: u.bbox.top / devicePixelRatio,
    width: u.bbox.width / devicePixelRatio,
    height: u.bbox.height / devicePixelRatio,
  };
  const width = u.width + 2 * SIDE;
  const { entries, head } = legendOf(chart, width);
  const height = u.height + head + SIDE;
  const label = (x, y, words, more = {}) => svg("text", { x, y, fill: muted, "font-size": 11, text: words, ...more });
  const lines = [];
  u.axes[0]._splits.forEach((split, i) => {
    const x = plot.left + u.valToPos(split, "x");
    if (x < plot.left - 1 || x > plot.left + plot.width + 1 || !u.axes[0]._values[i]) return;
    lines.push(svg("line", { x1: x, x2: x, y1: plot.top, y2: plot.top + plot.height, stroke: grid }));
    lines.push(label(x, plot.top + plot.height + 15, u.axes[0]._values[i], { "text-anchor": "middle" }));
  });
  u.axes[1]._splits.forEach((split, i) => {
    const y = plot.top + u.valToPos(split, "y");
    if (split === null || !u.axes[1]._values[i]) return;
    lines.push(svg("line", { x1: plot.left, x2: plot.left + plot.width, y1: y, y2: y, stroke: grid }));
    lines.push(label(plot.left - 5, y + 4, u.axes[1]._values[i], { "text-anchor": "end" }));
  });
  const legend = entries.flatMap(({ curve, x, y }) => [
    svg("line", { x1: x, x2: x + 22, y1: y, y2: y, ...penOf(chart, curve), "stroke-width": 2 }),
    label(x + 28, y + 4, curve.label, { fill: text, "font-size": 12 }),
  ]);
  const clip = svg("clipPath", { id: "plot" }, svg("rect", { x: plot.left, y: plot.top, ...{ width: plot.width, height: plot.height } }));
  const root = svg(
    "svg",
    { xmlns: "http://www.w3.org/2000/svg", width, height, viewBox: `0 0 ${width} ${height}`, "font-family": FONT },
    svg("rect", { width, height, fill: surface }),
    label(SIDE, 18, chart.title, { fill: text, "font-size": 13, "font-weight": 600 }),
    ...legend,
    svg(
      "g",
      { transform: `translate(${SIDE} ${head})` },
      clip,
      ...lines,
      svg("g", { "clip-path": "url(#plot)", fill: "none", "stroke-linejoin": "round" }, ...chart.shown.flatMap((curve, i) => drawn(chart, curve, i, plot))),
    ),
  );
  return new XMLSerializer().serializeToString(root);
}

function penOf(chart, curve) {
  return {
    stroke: curve.colour,
    "stroke-width": curve.width ?? 1.75,
    "stroke-dasharray": chart.dashOf(curve).join(" ") || null,
  };
}

/** A curve with its background: the spread of merged points, or the curve before smoothing. */
function drawn(chart, curve, i, plot) {
  const part = chart.parts[i];
  const shapes = [];
  const behind = chart.layout[i];
  if (behind === "r") shapes.push(svg("path", { d: path(chart, part.x, part.raw, plot), stroke: `${curve.colour}55` }));
  for (const [from, to] of behind === "b" ? spans(part.low) : []) {
    const [x, low, high] = [part.x, part.low, part.high].map((column) => [...column.slice(from, to)]);
    const back = path(chart, x.reverse(), high.reverse(), plot).replace("M", "L");
    shapes.push(svg("path", { d: `${path(chart, x.toReversed(), low, plot)}${back}Z`, fill: `${curve.colour}2e` }));
  }
  const line = path(chart, part.x, part.y, plot);
  if (curve.fill && line) {
    const [from, to] = [part.x[0], part.x.at(-1)].map((x) => (plot.left + chart.u.valToPos(x, "x")).toFixed(1));
    const bottom = (plot.top + plot.height).toFixed(1);
    shapes.push(svg("path", { d: `${line} L${to} ${bottom} L${from} ${bottom} Z`, fill: curve.colour }));
  }
  shapes.push(svg("path", { d: line, ...penOf(chart, curve) }));
  return shapes;
}

/** Where values follow each other without a gap: `[from, to]`. */
function spans(values) {
  const found = [];
  let from = 0;
  for (let at = 0; at <= values.length; at++) {
    if (at < values.length && values[at] !== null) continue;
    if (at > from) found.push([from, at]);
    from = at + 1;
  }
  return found;
}

function path(chart, xs, ys, plot) {
  let [d, isDown] = ["", false];
  for (let at = 0; at < xs.length; at++) {
    const value = ys[at];
    if (value === null || value !== value) {
      isDown = false;
      continue;
    }
    const x = plot.left + chart.u.valToPos(xs[at], "x");
    const y = plot.top + chart.u.valToPos(value, "y");
    d += `${isDown ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    isDown = true;
  }
  return d;
}
