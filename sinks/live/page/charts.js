/** Charts: a figure each, drawn by uPlot when it is in sight and something in it has changed. */

import { labelsOf, labelsOn, placeOn, placesOf } from "./axes.js";
import {
  align,
  clamped,
  commonScope,
  isJagged,
  linearRange,
  logRange,
  logSplits,
  nearest,
  pointsOf,
  robustRange,
  scopeOf,
  shrinkageOf,
  shrunk,
  smoothPart,
  valuesOffLog,
} from "./curves.js";
import { announce, el, freshId, setAttribute, setText, table } from "./dom.js";
import { count, number } from "./format.js";
import { writeLegend } from "./legend.js";
import { colours } from "./theme.js";

const uPlot = window.uPlot;
const TABLE_MS = 2000;
const MOST_ROWS = 200;
/** Maximum curves of a chart with the spread of merged points behind them, and with the curve before smoothing. */
const MOST_SPREADS = 3;
const MOST_RAW = 6;
/** Steps of an axis of bytes. */
const POWERS = Array.from({ length: 50 }, (_, power) => 2 ** power);
/** From this value on uPlot has no steps for an axis... */
const HUGE = 1e30;
/** ...so it gets these. */
const HUGE_STEPS = Array.from({ length: 340 }, (_, at) => [1, 2, 2.5, 5].map((one) => Number(`${one}e${at - 32}`))).flat();

/**
 * One figure.
 *
 * `curves()` returns its curves: `{label, run, series, started, epochSteps, show, colour, dash, width, fill, values, last}`.
 * The legend and the table show `values` and `last`, if given, instead of the series' own: the layers of a stack are drawn
 * at their sums. `run` is set where the chart compares runs. `key` names the chart in the address and the browser's storage.
 */
export class Chart {
  constructor(options) {
    const { title, curves, height = 210, isSmall = false, note = null } = options;
    const { key = title, takesLog = false, takesSmoothing = true, range = null } = options;
    Object.assign(this, { options, key, title, curves, height, isSmall, takesLog, takesSmoothing, range });
    this.isSeen = this.isTouched = false;
    this.drawnAt = this.drawMs = this.tableAt = 0;
    this.drawn = "";
    this.u = null;
    this.all = []; // curves: all of the legend's...
    this.shown = []; // ...those that are not hidden...
    this.parts = []; // ...and what is drawn of them
    const id = freshId("chart");
    this.legend = el("ul", { class: "legend" });
    this.readout = el("span", { class: "readout" });
    this.missing = el("p", { class: "missing", hidden: true });
    this.notes = el("p", { class: "notes", hidden: true });
    this.button = el("button", {
      type: "button",
      class: "quiet",
      "aria-label": `Options of ${title}`,
      "aria-haspopup": "dialog",
      text: "⋯",
      onclick: () => this.board.openMenu(this),
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
      el("figcaption", {}, el("h3", { id, title: note ?? title }, el("bdi", { text: title })), this.readout, this.button),
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

  get isTable() {
    return !this.holder.hidden;
  }

  get isLog() {
    const { log } = this.board.view;
    return !this.range && log.of(this.key, this.takesLog && log.all);
  }

  get isRobust() {
    return !this.range && this.board.view.robust.of(this.key);
  }

  /** What hides a curve: its run, in all charts; or its name, in this one. */
  hideKey(curve) {
    return curve.run ? `run:${curve.run}` : `${this.key}:${curve.label}`;
  }

  isHidden(curve) {
    return this.board.view.hidden.has(this.hideKey(curve));
  }

  /** Draw the other curves paler; null: none. */
  highlight(key) {
    const at = this.shown.findIndex((curve) => this.hideKey(curve) === key);
    this.u?.setSeries(at < 0 ? null : this.at[at], { focus: true });
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
    this.all = curves;
    this.shown = curves.filter((curve) => !this.isHidden(curve));
    if (!this.isTable) {
      this.#plot(this.shown);
    } else {
      this.#tellMissing([]); // the table lists them all
      this.#note([]);
      this.#fillTable(this.shown, began);
    }
    if (this.u?.cursor.idx != null && this.u.cursor.left >= 0) this.#point(this.u);
    else this.#writeLegend();
    this.drawnAt = performance.now();
    this.drawMs = this.drawnAt - began;
  }

  // -------------------------------------------------------------------------------------------------- the plot

  #plot(curves) {
    const width = this.plot.clientWidth;
    if (!width) return;
    const { axis, smoothing } = this.board.view;
    const { isLog } = this;
    const whole = curves.map((curve) => pointsOf(curve.series, placesOf(curve, axis), isLog));
    const usual = isLog || this.range ? null : this.#scope(curves, whole);
    const robust = this.isRobust ? this.#robustScope(whole) : null;
    const scope = robust ?? usual;
    const all = () => Math.max(0, ...curves.map(({ series }) => sizeOf(series)));
    const largest = isLog ? 0 : scope ? Math.max(...(usual ?? scope).map(Math.abs)) : all();
    this.shrinkage = shrinkageOf(largest);
    this.scope = scope?.map((value) => value / this.shrinkage) ?? null;
    const beyond = whole.map((part) => (scope ? placesBeyond(part, scope) : []));
    this.beyond = robust ? [] : beyond;
    this.outliers = robust ? beyond.reduce((sum, places) => sum + places.length, 0) : 0;
    this.by = curves.map((curve) => (this.takesSmoothing && !curve.isSparse ? smoothing : 0));
    const parts = whole.map((part, i) =>
      shrunk(smoothPart(usual ? clamped(part, usual) : part, this.by[i]), this.shrinkage),
    );
    this.parts = parts;
    this.solid = new Set(curves.filter((_, i) => isJagged(parts[i].y)).map((curve) => curve.label));
    this.#tellMissing(isLog ? curves : []);
    this.#note(curves);
    const hasPoints = parts.some((part) => part.x.length);
    if (!hasPoints) {
      this.rest();
      setText(this.empty, this.all.length > curves.length ? "All lines are hidden" : "Nothing yet");
      this.empty.hidden = false;
      return;
    }
    this.empty.hidden = true;
    // The background is drawn first: the spread of merged points, or the curve before smoothing.
    const { length } = curves;
    const layout = parts
      .map((part) => (part.low && length <= MOST_SPREADS ? "b" : part.raw && length <= MOST_RAW ? "r" : "-"))
      .join("");
    const groups = parts.map((part, i) => {
      const behind = layout[i] === "b" ? [part.low, part.high] : layout[i] === "r" ? [part.raw] : [];
      return { x: part.x, columns: [...behind, part.y] };
    });
    this.layout = layout;
    const data = align(groups);
    const signature = [
      layout,
      isLog,
      largest > HUGE,
      axis,
      width > 500,
      ...curves.map((c) => `${c.colour}${this.dashOf(c)}${c.width}${c.label}`),
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

  /** A dashed line is drawn solid where it would look like hatching. */
  dashOf(curve) {
    return this.solid?.has(curve.label) ? [] : (curve.dash ?? []);
  }

  /** The range without outliers, of all curves. */
  #robustScope(parts) {
    const ranges = parts.map((part) => robustRange(part, this.board.view.zoom)).filter(Boolean);
    return ranges.length ? commonScope(ranges) : null;
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
    const isShown = curves.length > 0 && this.outliers > 0;
    if (isShown) told.push(`${count(this.outliers)} outliers lie beyond the scale (1st to 99th percentile).`);
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
        dash: this.dashOf(curve),
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
        x: { time: view.axis === "clock", range: (u, min, max) => view.zoom ?? (min === max ? [min - 1, max + 1] : [min, max]) },
        y: isLog
          ? { distr: 3, range: (u, min, max) => logRange(...(this.scope ?? [min, max])) }
          : { range: (u, min, max) => this.range ?? linearRange(...(this.scope ?? [min, max])) },
      },
      axes: [
        {
          ...axis,
          size: 22,
          space: view.axis === "clock" ? 96 : 64,
          values: (u, splits) => labelsOn(view.axis, splits),
        },
        {
          ...axis,
          size: (u, values) => Math.max(34, ...(values ?? []).map((value) => 10 + (value ?? "").length * 6.2)),
          space: this.isSmall ? 20 : 34,
          // The margin may lie above the largest number: it has no label.
          values: (u, splits) => labelsOf(splits.map((v) => (v === null ? NaN : v * this.shrinkage)), tick),
          ...(isLog ? this.#logAxis() : {}),
          ...(isBinary ? { incrs: POWERS } : isHuge ? { incrs: HUGE_STEPS } : {}),
        },
      ],
      focus: { alpha: 0.2 },
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
      for (const { index, isAbove } of sparsely(this.beyond?.[i] ?? [], (one) => this.#place(u, i, one.index))) {
        const x = this.#place(u, i, index);
        const y = isAbove ? u.bbox.top + edge : u.bbox.top + u.bbox.height - edge;
        const tip = isAbove ? y - size : y + size;
        ctx.moveTo(x - size, y);
        ctx.lineTo(x, tip);
        ctx.lineTo(x + size, y);
      }
      ctx.stroke();
      ctx.beginPath();
      ctx.strokeStyle = colours().bad;
      for (const index of sparsely(curve.series.odd?.keys() ?? [], (one) => this.#place(u, i, one))) {
        const [x, y] = [this.#place(u, i, index), u.bbox.top + edge];
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
  #place(u, i, index) {
    const x = u.valToPos(this.parts[i].x[index], "x", true);
    return x < u.bbox.left || x > u.bbox.left + u.bbox.width ? NaN : x;
  }

  // ------------------------------------------------------------------------------------------------ the legend

  /** Write the legend with the values at a place, or the last ones. */
  #writeLegend(x = null) {
    setText(this.readout, x === null ? "" : placeOn(this.board.view.axis, x));
    const entries = this.all.map((curve) => {
      const at = x === null ? -1 : this.shown.indexOf(curve);
      return {
        curve: { ...curve, dash: this.dashOf(curve) },
        key: this.hideKey(curve),
        label: curve.label,
        isHidden: this.isHidden(curve),
        ...(at < 0 ? { value: (curve.show ?? number)(curve.last ?? curve.series.last) } : this.#valueAt(at, x)),
      };
    });
    writeLegend(this.legend, entries, this.board);
    // The runs are named once, at the top.
    this.legend.classList.toggle("compact", entries.length > 1 && this.all.every(({ run, label }) => run === label));
  }

  #point(u) {
    const x = u.cursor.left >= 0 && u.cursor.idx !== null ? u.data[0][u.cursor.idx] : null;
    this.#writeLegend(x ?? null);
  }

  /** What a curve reads at a place: `{value, raw}`, where `raw` is the value before smoothing, if it is smoothed. */
  #valueAt(i, x) {
    const { series, show = number, values } = this.shown[i];
    const part = this.parts[i];
    const at = nearest(part.x, part.x.length, x);
    if (at < 0) return { value: "–" };
    const raw = show((values ?? series.mean)[at]);
    const y = part.y[at];
    return this.by[i] > 0 && y !== null ? { value: show(y * this.shrinkage), raw } : { value: raw };
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
      if (this.board.view.zoom && !this.root.closest("dialog")) this.board.zoom(null); // it closes the dialog
    } else if (to !== undefined) {
      event.preventDefault();
      const x = xs[Math.min(xs.length - 1, Math.max(0, to))];
      this.u.setCursor({ left: this.u.valToPos(x, "x"), top: this.height / 2 });
      const told = this.shown.map((curve, i) => {
        const { value, raw } = this.#valueAt(i, x);
        return `${curve.label} ${value}${raw ? ` (raw ${raw})` : ""}`;
      });
      const place = placeOn(this.board.view.axis, x);
      announce(`${place[0].toUpperCase()}${place.slice(1)}: ${told.join(", ")}`);
    }
  }

  // ------------------------------------------------------------------------------------------------- the table

  showTable(isTable) {
    this.holder.hidden = !isTable;
    this.plot.hidden = isTable;
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
