/** Charts: a figure each, drawn by uPlot when it is in sight and something in it has changed. */

import {
  align,
  clamped,
  commonScope,
  linearRange,
  logRange,
  logSplits,
  nearest,
  pointsOf,
  scopeOf,
  shrinkageOf,
  shrunk,
  smoothPart,
  valuesOffLog,
} from "./curves.js";
import { announce, el, freshId, setAttribute, setText, svg, table } from "./dom.js";
import { count, duration, number } from "./format.js";
import { colours } from "./theme.js";

const uPlot = window.uPlot;
const TABLE_MS = 2000;
const MOST_ROWS = 200;
/** Steps of an axis of bytes. */
const POWERS = Array.from({ length: 50 }, (_, power) => 2 ** power);
/** From this value on uPlot has no steps for an axis... */
const HUGE = 1e30;
/** ...so it gets these. */
const HUGE_STEPS = Array.from({ length: 340 }, (_, at) => [1, 2, 2.5, 5].map((one) => Number(`${one}e${at - 32}`))).flat();

/**
 * One figure.
 *
 * `curves()` returns its curves: `{label, series, started, show, colour, dash, width, fill, values, last}`. The legend and
 * the table show `values` and `last`, if given, instead of the series' own: the layers of a stack are drawn at their sums.
 */
export class Chart {
  constructor({
    title,
    curves,
    height = 210,
    isSmall = false,
    takesLog = false,
    takesSmoothing = true,
    range = null,
    note = null,
  }) {
    Object.assign(this, { title, curves, height, isSmall, takesLog, takesSmoothing, range });
    this.isSeen = this.isTouched = false;
    this.drawnAt = this.drawMs = this.tableAt = 0;
    this.drawn = "";
    this.u = null;
    this.shown = [];
    const id = freshId("chart");
    this.legend = el("ul", { class: "legend" });
    this.readout = el("span", { class: "readout" });
    this.missing = el("p", { class: "missing", hidden: true });
    this.notes = el("p", { class: "notes", hidden: true });
    this.toggle = el("button", {
      type: "button",
      class: "quiet",
      "aria-pressed": "false",
      "aria-label": `Show ${title} as table`,
      text: "Table",
      onclick: () => this.#showTable(this.holder.hidden),
    });
    this.plot = el("div", {
      class: "plot",
      role: "img",
      tabindex: "0",
      "aria-label": title,
      onkeydown: (e) => this.#key(e),
    });
    this.empty = el("p", { class: "empty", text: "Nothing yet", hidden: true });
    this.holder = el("div", {
      class: "table-holder",
      tabindex: "0",
      role: "region",
      "aria-label": `${title}, table`,
      hidden: true,
    });
    this.root = el(
      "figure",
      { class: isSmall ? "chart small" : "chart", "aria-labelledby": id },
      el("figcaption", {}, el("h3", { id, title: note ?? title, text: title }), this.readout, this.toggle),
      this.legend,
      this.missing,
      this.notes,
      this.plot,
      this.holder,
    );
    this.plot.style.height = this.holder.style.height = `${height}px`;
    this.plot.append(this.empty);
  }

  touch() {
    this.isTouched = true;
  }

  rest() {
    this.u?.destroy();
    this.u = null;
    this.empty.hidden = true; // unknown until the next drawing
  }

  destroy() {
    this.board?.remove(this);
    this.rest();
  }

  #stamp(curves) {
    return curves.map((curve) => `${curve.label}:${curve.series.version}:${curve.series.length}`).join("|");
  }

  hasNews() {
    return this.isTouched || this.#stamp(this.curves()) !== this.drawn;
  }

  draw() {
    const began = performance.now();
    const curves = this.curves();
    const stamp = this.#stamp(curves);
    this.drawn = stamp;
    this.isTouched = false;
    this.shown = curves;
    if (this.holder.hidden) {
      this.#plot(curves);
    } else {
      this.#tellMissing([]); // the table lists them all
      this.#note([]);
      this.#fillTable(curves, began);
    }
    this.#fillLegend(curves);
    this.drawnAt = performance.now();
    this.drawMs = this.drawnAt - began;
  }

  // -------------------------------------------------------------------------------------------------- the plot

  #plot(curves) {
    const width = this.plot.clientWidth;
    if (!width) return;
    const { x, smoothing, log } = this.board.view;
    const isLog = log && this.takesLog;
    const whole = curves.map((curve) => pointsOf(curve.series, { x, started: curve.started ?? 0, log: isLog }));
    const scope = isLog || this.range ? null : this.#scope(curves, whole);
    const all = () => Math.max(0, ...curves.map(({ series }) => sizeOf(series)));
    const largest = isLog ? 0 : scope ? Math.max(...scope.map(Math.abs)) : all();
    this.shrinkage = shrinkageOf(largest);
    this.scope = scope?.map((value) => value / this.shrinkage) ?? null;
    this.beyond = whole.map((part) => (scope ? placesBeyond(part, scope) : []));
    const parts = whole.map((part, i) => {
      const inScope = scope ? clamped(part, scope) : part;
      const isSmoothed = this.takesSmoothing && !curves[i].isSparse;
      return shrunk(smoothPart(inScope, isSmoothed ? smoothing : 0), this.shrinkage);
    });
    this.#tellMissing(isLog ? curves : []);
    this.#note(curves);
    const hasPoints = parts.some((part) => part.x.length);
    if (!hasPoints) {
      this.rest();
      this.empty.hidden = false;
      return;
    }
    this.empty.hidden = true;
    // The background is drawn first: the spread of merged points, or the curve before smoothing.
    const withBehind = curves.length <= 3;
    const layout = parts.map((part) => (withBehind ? (part.low ? "b" : part.raw ? "r" : "-") : "-")).join("");
    const groups = parts.map((part, i) => {
      const behind = layout[i] === "b" ? [part.low, part.high] : layout[i] === "r" ? [part.raw] : [];
      return { x: part.x, columns: [...behind, part.y] };
    });
    const data = align(groups);
    const signature = [
      layout,
      isLog,
      largest > HUGE,
      x,
      width > 500,
      ...curves.map((c) => `${c.colour}${c.dash}${c.width}${c.label}`),
    ].join("|");
    if (this.u && this.signature === signature) {
      if (this.u.width !== width) this.u.setSize({ width, height: this.height });
      this.u.setData(data, true);
    } else {
      this.u?.destroy();
      this.signature = signature;
      this.u = new uPlot(this.#options(curves, layout, isLog, largest > HUGE, width), data, this.plot);
    }
    setAttribute(this.plot, "aria-label", this.#summary(curves));
  }

  /** Report the curves that a logarithmic scale hides, completely or in part. */
  #tellMissing(curves) {
    const told = curves
      .map(({ label, series }) => [label, valuesOffLog(series), series.count])
      .filter(([, values]) => values > 0)
      .map(([label, values, all]) => `${label} ${count(values)} of ${count(all)} values`);
    this.missing.hidden = !told.length;
    setText(this.missing, told.length ? `Not shown on a logarithmic scale (0 or less): ${told.join(", ")}.` : "");
  }

  /** The range that the scale of the shown part follows: `[low, high]`, or null for all values. */
  #scope(curves, parts) {
    const { zoom } = this.board.view;
    let isNarrowed = false;
    const scopes = [];
    parts.forEach(({ x, y, low, high }, i) => {
      const isShown = (_, at) => !zoom || (x[at] >= zoom[0] && x[at] <= zoom[1]);
      const oddAt = Math.max(-1, ...(curves[i].series.odd?.keys() ?? []));
      for (const column of low ? [low, high] : [y]) {
        const shown = zoom ? Array.from(column, (value, at) => (isShown(value, at) ? value : null)) : column;
        const found = scopeOf(shown, oddAt);
        isNarrowed ||= found !== null;
        const range = found ?? endsOf(shown);
        if (range) scopes.push(range);
      }
    });
    if (!scopes.length) return null;
    const scope = commonScope(scopes);
    const isWhole = scopes.every(([low, high]) => low >= scope[0] && high <= scope[1]);
    return isNarrowed || !isWhole ? scope : null;
  }

  /** Report the values that are not finite, or beyond the scale. */
  #note(curves) {
    const told = [];
    curves.forEach(({ label, series, show = number }, i) => {
      const what = series.width > 1 ? "points" : "values";
      const places = this.beyond?.[i] ?? [];
      if (places.length) {
        const { lowest, highest } = series;
        const ends = [
          highest?.value > this.scope[1] * this.shrinkage && `up to ${show(highest.value)} at step ${count(highest.step)}`,
          lowest?.value < this.scope[0] * this.shrinkage && `down to ${show(lowest.value)} at step ${count(lowest.step)}`,
        ];
        const far = ends.filter(Boolean).map((end) => `, ${end}`);
        told.push(`Beyond the scale: ${label} ${count(places.length)} of ${count(series.length)} ${what}${far.join("")}.`);
      }
      if (series.odd?.size) {
        const first = Math.min(...series.odd.keys());
        const of = `${count(series.odd.size)} of ${count(series.length)} ${what}`;
        told.push(`Not finite (✕): ${label} ${of}, ${number(series.odd.get(first))} at step ${count(series.step[first])}.`);
      }
    });
    this.notes.hidden = !told.length;
    setText(this.notes, told.join(" "));
  }

  #options(curves, layout, isLog, isHuge, width) {
    const { muted, grid } = colours();
    const { view } = this.board;
    const series = [{}];
    const bands = [];
    this.at = []; // where each curve is among uPlot's series
    curves.forEach((curve, i) => {
      const invisible = { stroke: "transparent", width: 0, points: { show: false } };
      if (layout[i] === "b") {
        bands.push({ series: [series.length + 1, series.length], fill: `${curve.colour}2e` });
        series.push(invisible, invisible);
      } else if (layout[i] === "r") {
        series.push({ stroke: `${curve.colour}55`, width: 1, points: { show: false } });
      }
      this.at.push(series.length);
      series.push({
        stroke: curve.colour,
        width: curve.width ?? 1.75,
        dash: curve.dash ?? [],
        fill: curve.fill,
        points: curve.fill ? { show: false } : { size: 5, fill: curve.colour },
      });
    });
    const font = '11px system-ui, "Segoe UI", Roboto, sans-serif';
    const axis = { stroke: muted, font, grid: { stroke: grid, width: 1 }, ticks: { show: false }, gap: 4 };
    const { show = number, tick = show, isBinary = false } = curves[0] ?? {};
    return {
      width,
      height: this.height,
      padding: [8, 18, 0, 0],
      legend: { show: false },
      series,
      bands,
      scales: {
        x: { time: false, range: (u, min, max) => view.zoom ?? (min === max ? [min - 1, max + 1] : [min, max]) },
        y: isLog
          ? { distr: 3, range: (u, min, max) => logRange(min, max) }
          : { range: (u, min, max) => this.range ?? linearRange(...(this.scope ?? [min, max])) },
      },
      axes: [
        {
          ...axis,
          size: 22,
          space: 64,
          values: (u, splits) => splits.map((v) => (view.x === "time" ? duration(v) : short(v))),
        },
        {
          ...axis,
          size: (u, values) => Math.max(34, ...(values ?? []).map((value) => 10 + (value ?? "").length * 6.2)),
          space: this.isSmall ? 20 : 34,
          values: (u, splits) => splits.map((v) => (v === null ? "" : this.#tick(tick, v))),
          ...(isLog ? this.#logAxis() : {}),
          ...(isBinary ? { incrs: POWERS } : isHuge ? { incrs: HUGE_STEPS } : {}),
        },
      ],
      cursor: {
        y: false,
        drag: { x: true, y: false, setScale: false },
        sync: { key: "stagecast" },
        points: { size: (u, index) => (this.at.includes(index) ? 6 : 0) }, // not for the background
        bind: { dblclick: () => () => this.board.zoom(null) },
      },
      hooks: {
        setCursor: [(u) => this.#point(u)],
        setSelect: [(u) => this.#select(u)],
        draw: [(u) => this.#markOdd(u)],
      },
    };
  }

  /** By itself, uPlot draws a line for each digit of each power, and skips labels without space. */
  #logAxis() {
    const most = Math.max(2, Math.floor((this.height - 30) / 26));
    return {
      splits: (u, axis, min, max) => logSplits(min, max, most),
      filter: (u, splits) => splits,
      incrs: (u, axis, min, max) => [Math.max(5, max - min)], // unused, but required for an axis
    };
  }

  #tick(tick, value) {
    const told = value * this.shrinkage;
    return Number.isFinite(told) ? tick(told) : ""; // the margin may lie above the largest number
  }

  #select(u) {
    const { left, width } = u.select;
    if (width < 4) return;
    const range = [u.posToVal(left, "x"), u.posToVal(left + width, "x")];
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.board.zoom(range);
  }

  /** Crosses at the top where a value was not finite; arrows at the edges where one is beyond the scale. */
  #markOdd(u) {
    const { ctx } = u;
    const size = 3 * devicePixelRatio;
    const edge = size + 2;
    ctx.save();
    ctx.lineWidth = 1.5 * devicePixelRatio;
    this.shown.forEach((curve, i) => {
      ctx.beginPath();
      ctx.strokeStyle = curve.colour;
      for (const { index, isAbove } of sparsely(this.beyond?.[i] ?? [], (one) => this.#place(u, curve, one.index))) {
        const x = this.#place(u, curve, index);
        const y = isAbove ? u.bbox.top + edge : u.bbox.top + u.bbox.height - edge;
        const tip = isAbove ? y - size : y + size;
        ctx.moveTo(x - size, y);
        ctx.lineTo(x, tip);
        ctx.lineTo(x + size, y);
      }
      ctx.stroke();
      ctx.beginPath();
      ctx.strokeStyle = colours().bad;
      for (const index of sparsely(curve.series.odd?.keys() ?? [], (one) => this.#place(u, curve, one))) {
        const [x, y] = [this.#place(u, curve, index), u.bbox.top + edge];
        ctx.moveTo(x - size, y - size);
        ctx.lineTo(x + size, y + size);
        ctx.moveTo(x + size, y - size);
        ctx.lineTo(x - size, y + size);
      }
      ctx.stroke();
    });
    ctx.restore();
  }

  /** Where a point lies from left to right, on the canvas; NaN outside of the plot. */
  #place(u, curve, index) {
    const x = u.valToPos(this.#x(curve, index), "x", true);
    return x < u.bbox.left || x > u.bbox.left + u.bbox.width ? NaN : x;
  }

  #x(curve, index) {
    return this.board.view.x === "time" ? curve.series.time[index] - (curve.started ?? 0) : curve.series.step[index];
  }

  // ------------------------------------------------------------------------------------------------ the legend

  #fillLegend(curves) {
    const key = curves.map((curve) => `${curve.label}${curve.colour}`).join("|");
    if (key !== this.legendKey) {
      this.legendKey = key;
      this.outputs = curves.map(() => el("span", { class: "value" }));
      const items = curves.map((curve, i) =>
        el(
          "li",
          {},
          swatch(curve),
          el("span", { class: "name", title: curve.label, text: curve.label }),
          this.outputs[i],
        ),
      );
      this.legend.replaceChildren(...items);
    }
    if (this.u?.cursor.idx != null && this.u.cursor.left >= 0) this.#point(this.u);
    else this.#fillLast();
  }

  #fillLast() {
    setText(this.readout, "");
    this.shown.forEach((curve, i) => {
      if (this.outputs?.[i]) setText(this.outputs[i], (curve.show ?? number)(curve.last ?? curve.series.last));
    });
  }

  #point(u) {
    const x = u.cursor.left >= 0 && u.cursor.idx !== null ? u.data[0][u.cursor.idx] : null;
    if (x === null || x === undefined || !this.outputs || this.outputs.length !== this.shown.length) {
      this.#fillLast();
      return;
    }
    setText(this.readout, this.board.view.x === "time" ? duration(x) : `step ${count(x)}`);
    this.shown.forEach((curve, i) => setText(this.outputs[i], this.#valueAt(curve, x)));
  }

  #valueAt(curve, x) {
    const { series } = curve;
    const xs = this.board.view.x === "time" ? series.time.subarray(0, series.length) : series.step;
    const at = nearest(xs, series.length, this.board.view.x === "time" ? x + (curve.started ?? 0) : x);
    return at < 0 ? "–" : (curve.show ?? number)((curve.values ?? series.mean)[at]);
  }

  #summary(curves) {
    const told = curves.slice(0, 6).map((curve) => {
      const { series } = curve;
      const show = curve.show ?? number;
      if (!series.length) return `${curve.label}: nothing yet`;
      const last = curve.last ?? series.last;
      const ends = series.lowest ? `, lowest ${show(series.lowest.value)}, highest ${show(series.highest.value)}` : "";
      return `${curve.label}: last ${show(last)} at step ${count(series.step[series.length - 1])}${ends}`;
    });
    const notes = [this.missing, this.notes].filter((one) => !one.hidden).map((one) => ` ${one.textContent}`);
    return `Chart, ${this.title}. ${told.join(". ")}.${notes.join("")} Arrow keys read single points.`;
  }

  #key(event) {
    if (!this.u) return;
    const xs = this.u.data[0];
    const now = this.u.cursor.idx ?? xs.length - 1;
    const by = event.shiftKey ? Math.max(1, Math.round(xs.length / 20)) : 1;
    const to = { ArrowLeft: now - by, ArrowRight: now + by, Home: 0, End: xs.length - 1 }[event.key];
    if (event.key === "Escape") {
      this.u.setCursor({ left: -10, top: -10 });
      if (this.board.view.zoom) this.board.zoom(null);
    } else if (to !== undefined) {
      event.preventDefault();
      const x = xs[Math.min(xs.length - 1, Math.max(0, to))];
      this.u.setCursor({ left: this.u.valToPos(x, "x"), top: this.height / 2 });
      const told = this.shown.map((curve) => `${curve.label} ${this.#valueAt(curve, x)}`);
      announce(`${this.board.view.x === "time" ? duration(x) : `Step ${count(x)}`}: ${told.join(", ")}`);
    }
  }

  // ------------------------------------------------------------------------------------------------- the table

  #showTable(isTable) {
    this.holder.hidden = !isTable;
    this.plot.hidden = isTable;
    this.toggle.setAttribute("aria-pressed", String(isTable));
    if (isTable) this.rest();
    this.tableAt = 0;
    this.touch();
    this.draw();
  }

  #fillTable(curves, now) {
    // At a readable rate, and not while the reader scrolls.
    if (this.tableAt && (now - this.tableAt < TABLE_MS || this.holder.scrollTop > 0)) return;
    this.tableAt = now;
    const groups = curves.map(({ series, values }) => ({
      x: series.step.subarray(0, series.length),
      columns: [Array.from((values ?? series.mean).subarray(0, series.length), (v, i) => series.odd?.get(i) ?? v)],
    }));
    const [xs, ...columns] = align(groups);
    const length = xs?.length ?? 0;
    const heads = [{ head: "Step", number: true }, ...curves.map((curve) => ({ head: curve.label, number: true }))];
    const rows = [];
    for (let i = length - 1; i >= Math.max(0, length - MOST_ROWS); i--) {
      rows.push([
        count(xs[i]),
        ...columns.map((column, c) => (column[i] === undefined ? "" : (curves[c].show ?? number)(column[i]))),
      ]);
    }
    const wide = Math.max(1, ...curves.map((curve) => curve.series.width ?? 1));
    const merged = wide > 1 ? `; a row is the mean of up to ${count(wide)} values` : "";
    const caption = `${this.title}: the newest ${rows.length} of ${count(length)} points${merged}`;
    this.holder.replaceChildren(table(caption, heads, rows));
  }
}

/** The largest value of a series, without its sign. */
function sizeOf({ lowest, highest }) {
  return Math.max(Math.abs(lowest?.value ?? 0), Math.abs(highest?.value ?? 0));
}

/** The smallest and the largest of the numbers in a column; null if there is none. */
function endsOf(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value === null || value !== value) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : null;
}

/** The points of a curve that lie beyond its scale: `{index, isAbove}`. */
function placesBeyond({ y, low, high }, [least, most]) {
  const found = [];
  for (let index = 0; index < y.length; index++) {
    if (y[index] === null) continue;
    if ((high ?? y)[index] > most) found.push({ index, isAbove: true });
    else if ((low ?? y)[index] < least) found.push({ index, isAbove: false });
  }
  return found;
}

/** Of marks that lie over each other only one is drawn: a run may be NaN for thousands of steps. */
function* sparsely(marks, placeOf) {
  let before = -Infinity;
  for (const mark of marks) {
    const place = placeOf(mark);
    if (!(Math.abs(place - before) >= 5 * devicePixelRatio)) continue;
    before = place;
    yield mark;
  }
}

/** A sample of a curve's line: colour and pattern. */
export function swatch(curve) {
  const root = svg("svg", { class: "swatch", width: 26, height: 10, "aria-hidden": "true" });
  if (curve.layer) {
    root.append(svg("rect", { x: 7, y: 0, width: 10, height: 10, rx: 2, fill: curve.colour }));
    if (curve.isHatched)
      root.append(
        svg("path", { d: "M7 10 L17 0 M7 5 L12 0 M12 10 L17 5", stroke: colours().surface, "stroke-width": 1.5 }),
      );
    return root;
  }
  const line = { x1: 0, x2: 26, y1: 5, y2: 5, stroke: curve.colour, "stroke-width": curve.width ?? 2 };
  root.append(svg("line", { ...line, "stroke-dasharray": (curve.dash ?? []).join(" ") || null }));
  return root;
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${number(value / 1e9, 3)}B`;
  if (size >= 1e6) return `${number(value / 1e6, 3)}M`;
  if (size >= 1e4) return `${number(value / 1e3, 4)}k`;
  return Number.isInteger(value) ? count(value) : number(value);
}
