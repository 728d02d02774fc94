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
import { announce, el, freshId, setAttribute, setText } from "./dom.js";
import { count, number } from "./format.js";
import { drawMarks, placesBeyond } from "./marks.js";
import { summaryOf, tableOf, tell, writeReading } from "./reading.js";
import { colours } from "./theme.js";

const uPlot = window.uPlot;
const TABLE_MS = 2000;
/** Maximum curves of a chart with the spread of merged points behind them, and with the curve before smoothing. */
const MOST_SPREADS = 3;
const MOST_RAW = 6;
/** Maximum curves that a note below a chart names. */
const MOST_NOTED = 4;
/** Opacity of the lines beside a highlighted one. */
const PALE = 0.2;
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
 * at their sums. `run` is set where the chart compares runs, and `name` where each of them has several curves. `key` names
 * the chart in the address and the browser's storage.
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
    this.readAt = null; // the place that the keyboard reads
    this.all = []; // curves: all of the legend's...
    this.shown = []; // ...those that are not hidden...
    this.parts = []; // ...and what is drawn of them
    const id = freshId("chart");
    this.legend = el("ul", { class: "legend" });
    this.tip = el("ul", { class: "tip", "aria-hidden": "true", hidden: true });
    this.isPointed = false; // the mouse is over the plot
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
      onblur: () => (this.readAt = null),
      onmouseenter: () => (this.isPointed = true),
      onmouseleave: () => this.#left(),
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
      el("figcaption", {}, el("h3", { id, title: note ?? title }, el("bdi", { text: title })),
        options.leastSmoothing ? el("span", { class: "hint", text: "smoothed" }) : null, this.readout, this.button),
      this.legend,
      this.missing,
      this.notes,
      this.plot,
      this.holder,
    );
    this.plot.style.height = this.holder.style.height = `${height}px`;
    this.plot.append(this.empty, this.tip);
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
    return curves.map((c) => `${c.label}:${c.colour}:${c.series.version}:${c.series.length}`).join("|");
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

  /** Whether runs lie over each other: they are named once, above the charts. */
  get isComparing() {
    return this.all.some(({ run }) => run);
  }

  /** What hides a curve: its run, in all charts; or its name, in this one. */
  hideKeys({ run, name, label }) {
    if (!run) return [this.nameKey(label)];
    return name ? [runKey(run), this.nameKey(name)] : [runKey(run)];
  }

  nameKey(name) {
    return `${this.key}:${name}`;
  }

  hasKey(curve, key) {
    return key !== null && this.hideKeys(curve).includes(key);
  }

  isHidden(curve) {
    return this.hideKeys(curve).some((key) => this.board.view.hidden.has(key));
  }

  /** Draw the other curves paler; null: none. */
  highlight(key) {
    if (!this.u) return;
    const isHere = this.shown.some((curve) => this.hasKey(curve, key));
    let isChanged = false;
    this.shown.forEach((curve, i) => {
      const alpha = isHere && !this.hasKey(curve, key) ? PALE : 1;
      for (let at = (this.at[i - 1] ?? 0) + 1; at <= this.at[i]; at++) {
        isChanged ||= this.u.series[at].alpha !== alpha;
        this.u.series[at].alpha = alpha;
      }
    });
    if (isChanged) this.u.redraw(false);
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
    this.#point();
    if (this.board.lit !== null) this.highlight(this.board.lit);
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
    const by = Math.max(smoothing, this.options.leastSmoothing ?? 0);
    this.by = curves.map((curve) => (this.takesSmoothing && !curve.isSparse ? by : 0));
    const parts = whole.map((part, i) =>
      shrunk(smoothPart(usual ? clamped(part, usual) : part, this.by[i]), this.shrinkage),
    );
    this.parts = parts;
    this.solid = new Set(curves.filter((_, i) => isJagged(parts[i].y)).map((curve) => curve.series));
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
    setAttribute(this.plot, "aria-label", summaryOf(this, curves));
  }

  /** A dashed line is drawn solid where it would look like hatching. */
  dashOf(curve) {
    return this.solid?.has(curve.series) ? [] : (curve.dash ?? []);
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
    const some = shortened(told, (more) => `${more} more`);
    setText(this.missing, told.length ? `Not shown on a logarithmic scale (0 or less): ${some.join(", ")}.` : "");
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
    setText(this.notes, shortened(told, (more) => `And ${more} more notes on other lines.`).join(" "));
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
      cursor: {
        y: false,
        drag: { x: true, y: false, setScale: false },
        sync: { key: "stagecast" },
        points: { size: (u, index) => (this.at.includes(index) ? 6 : 0) }, // not for the background
        bind: { dblclick: () => () => this.board.zoom(null) },
      },
      hooks: {
        setCursor: [() => this.#point()],
        setSelect: [(u) => this.#select(u)],
        draw: [(u) => drawMarks(this, u)],
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

  /** Follow the cursor. */
  #point() {
    const { cursor, data } = this.u ?? {};
    const x = cursor?.left >= 0 && cursor.idx != null ? data[0][cursor.idx] : null;
    writeReading(this, x ?? null);
  }

  #left() {
    this.isPointed = false;
    if (this.isComparing) this.board.highlight(null);
  }

  #key(event) {
    if (!this.u) return;
    if (this.hasNews()) this.draw(); // the drawn places may be those of another axis
    const xs = this.u.data[0];
    const now = this.readAt === null ? (this.u.cursor.idx ?? xs.length - 1) : nearest(xs, xs.length, this.readAt);
    const by = event.shiftKey ? Math.max(1, Math.round(xs.length / 20)) : 1;
    const to = { ArrowLeft: now - by, ArrowRight: now + by, Home: 0, End: xs.length - 1 }[event.key];
    if (event.key === "Escape") {
      this.readAt = null;
      this.u.setCursor({ left: -10, top: -10 });
      if (this.board.view.zoom && !this.root.closest("dialog")) this.board.zoom(null); // it closes the dialog
    } else if (to !== undefined) {
      event.preventDefault();
      const x = xs[Math.min(xs.length - 1, Math.max(0, to))];
      this.readAt = x;
      this.u.setCursor({ left: this.u.valToPos(x, "x"), top: this.height / 2 });
      tell(this, x);
    } else if (["+", "=", "-"].includes(event.key) && xs.length > 1) {
      event.preventDefault();
      this.#zoomAt(xs[now], event.key === "-" ? 2 : 0.5);
    }
  }

  /** Zoom around a place, by a factor of the shown range; out of the whole range resets the zoom. */
  #zoomAt(x, factor) {
    const { view } = this.board;
    const [first, last] = [this.u.data[0][0], this.u.data[0].at(-1)];
    const [from, to] = view.zoom ?? [first, last];
    const width = (to - from) * factor;
    const begins = Math.min(Math.max(first, x - width / 2), last - width);
    const range = width < last - first ? [begins, begins + width] : null;
    this.board.zoom(range);
    const [begin, end] = (range ?? [first, last]).map((one) => placeOn(view.axis, one));
    announce(`Charts show ${begin} to ${end}`);
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
    this.holder.replaceChildren(tableOf(this, curves));
  }
}

/** What hides a run in all charts. */
export function runKey(runId) {
  return `run:${runId}`;
}

/** The first texts, and how many more there are. */
function shortened(texts, moreOf) {
  if (texts.length <= MOST_NOTED + 1) return texts;
  return [...texts.slice(0, MOST_NOTED), moreOf(count(texts.length - MOST_NOTED))];
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
