/** The page's state of a run: from a snapshot and the later frames. Bounded in memory; does not touch the page. */

import { thinned } from "./rebin.js";

/** Points of a series; when it has more, pairs become one. */
export const MOST_POINTS = 4000;
const MOST_POINTS_OF_MANY = 1000;
const MANY = 200;
export const MOST_SERIES = 2000;
/** Maximum points of a page: of all curves, and of one name in all runs. */
const MOST_OF_ALL = 2_000_000;
const MOST_OF_A_NAME = 24_000;

/** Maximum points of a series, by the numbers of names and of runs. */
export function mostPoints(names, runs) {
  const most = names > MANY ? MOST_POINTS_OF_MANY : MOST_POINTS;
  const ofAll = Math.max(128, Math.floor(MOST_OF_ALL / Math.max(1, names * runs)));
  return Math.min(most, Math.max(400, Math.floor(MOST_OF_A_NAME / runs)), ofAll);
}

export const MOST_LINES = 1000;
const MOST_CHECKPOINTS = 1000;
const MOST_OBSERVERS = 200;
const MOST_RANKS = 4096;
const MOST_MEDIA = 200;
const MOST_HISTOGRAMS = 200;
const MOST_OF_A_HISTOGRAM = 50;
const COLUMNS = ["step", "time", "mean", "low", "high", "weight"];

/** One curve, column by column: the mean, the lowest and the highest value of equally many steps per point. */
export class Series {
  constructor(name, most = MOST_POINTS) {
    this.name = name;
    this.most = most;
    this.length = 0;
    this.width = 1; // values that a point takes
    this.version = 0; // rises with each change
    this.odd = new Map(); // index -> "nan", "inf" or "-inf": points in which a value was not finite
    this.last = null; // a number, or one of these words
    this.count = 0;
    this.lowest = null; // {value, step}
    this.highest = null;
    this.#room(64);
  }

  static of(name, data, most) {
    const series = new Series(name, most);
    const length = data.step.length;
    series.#room(length);
    const [low, high] = [data.min ?? data.mean, data.max ?? data.mean];
    for (let i = 0; i < length; i++) {
      series.step[i] = data.step[i];
      series.time[i] = data.time[i];
      series.mean[i] = data.mean[i] ?? NaN;
      series.low[i] = low[i] ?? NaN;
      series.high[i] = high[i] ?? NaN;
      series.#remember(series.low[i], series.high[i], data.step[i]);
    }
    series.length = length;
    series.count = data.count ?? length;
    for (const [index, text] of Object.entries(data.nonfinite ?? {})) series.odd.set(Number(index), text);
    // All points but the last are full, and a point takes a power of two.
    while (series.width * length < series.count) series.width *= 2;
    series.weight.fill(series.width, 0, length);
    if (length) series.weight[length - 1] = Math.max(1, series.count - series.width * (length - 1));
    series.last = data.last ?? null; // a merged point lacks it
    if (data.ends) series.#setEnds(...data.ends);
    series.limit(most);
    return series;
  }

  get lastStep() {
    return this.length ? this.step[this.length - 1] : null;
  }

  /** Add one value: a number, or "nan", "inf", "-inf". */
  add(step, time, value) {
    const finite = typeof value === "number" && Number.isFinite(value);
    let at = this.length - 1;
    if (at < 0 || this.weight[at] >= this.width) {
      if (this.length >= this.most) {
        this.#halve();
        this.add(step, time, value);
        return;
      }
      at = this.length;
      this.#room(at + 1);
      this.mean[at] = this.low[at] = this.high[at] = NaN;
      this.weight[at] = 0;
      this.length += 1;
    }
    this.step[at] = step;
    this.time[at] = time;
    this.weight[at] += 1;
    if (finite) {
      this.mean[at] = meanOf(this.mean[at], this.weight[at] - 1, value, 1);
      this.low[at] = Number.isNaN(this.low[at]) ? value : Math.min(this.low[at], value);
      this.high[at] = Number.isNaN(this.high[at]) ? value : Math.max(this.high[at], value);
      this.#remember(value, value, step);
    } else {
      this.odd.set(at, String(value ?? "nan"));
    }
    this.last = finite ? value : String(value ?? "nan");
    this.count += 1;
    this.version += 1;
  }

  /** Change its maximum number of points. */
  limit(most) {
    this.most = most;
    while (this.length > this.most) this.#halve();
  }

  #remember(low, high, step) {
    if (low === low && (this.lowest === null || low < this.lowest.value)) this.lowest = { value: low, step };
    if (high === high && (this.highest === null || high > this.highest.value)) this.highest = { value: high, step };
  }

  /** A report rounds and merges its points: the lowest and the highest value are exact. */
  #setEnds(low, lowStep, high, highStep) {
    this.lowest = { value: low, step: lowStep };
    this.highest = { value: high, step: highStep };
  }

  #room(length) {
    const now = this.step ? this.step.length : 0;
    if (length <= now) return;
    const size = Math.max(length, Math.min(this.most, now * 2));
    for (const name of COLUMNS) {
      const grown = new Float64Array(size);
      if (this[name]) grown.set(this[name]);
      this[name] = grown;
    }
  }

  #halve() {
    const pairs = Math.ceil(this.length / 2);
    for (let to = 0; to < pairs; to++) {
      const left = to * 2;
      const right = Math.min(left + 1, this.length - 1);
      const [a, b] = [this.weight[left], right > left ? this.weight[right] : 0];
      this.step[to] = this.step[right];
      this.time[to] = this.time[right];
      this.mean[to] = meanOf(this.mean[left], a, this.mean[right], b);
      this.low[to] = pick(Math.min, this.low[left], this.low[right]);
      this.high[to] = pick(Math.max, this.high[left], this.high[right]);
      this.weight[to] = a + b;
    }
    this.length = pairs;
    this.width *= 2;
    this.odd = new Map([...this.odd].map(([index, text]) => [index >> 1, text]));
    this.version += 1;
  }
}

function meanOf(a, aWeight, b, bWeight) {
  if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) ? b : a;
  // Half of the difference, twice: all of it may be larger than any number.
  const part = (b / 2 - a / 2) * (bWeight / (aWeight + bWeight));
  return a + part + part;
}

function pick(choose, a, b) {
  if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) ? b : a;
  return choose(a, b);
}

/** The shown state of one run. `touched` names the parts that changed since the last drawing: "run", "log", "names"... */
export class RunStore {
  /** `most`: the maximum points of a series by the number of names. */
  constructor(runId, most = (names) => mostPoints(names, 1)) {
    this.runId = runId;
    this.most = most;
    this.touched = new Set();
    this.isLoaded = false;
    this.generation = 0; // rises with each snapshot
    this.frameTime = 0; // the server's clock, as of the newest frame...
    this.frameAt = 0; // ...and this page's, which may be another
    this.#clear();
    this.run = { run_id: runId, status: "unknown", latest: {} };
  }

  #clear() {
    this.cursor = null;
    this.attempt = null;
    this.series = new Map();
    this.leftOut = 0; // values under names beyond the maximum number of curves
    this.stages = new Map(); // name -> "val" or "test": what user code logs while it validates or tests
    this.log = [];
    this.lines = 0; // total entries of the log, for incremental drawing
    this.checkpoints = new Map();
    this.observers = new Map();
    this.ranks = new Map();
    this.media = [];
    this.histograms = new Map();
    this.arguments = {};
    this.config = {};
    this.versions = {};
  }

  get(name) {
    return this.series.get(name);
  }

  /** Merge points after more runs have joined the page. */
  limit() {
    const most = this.most(this.series.size);
    for (const series of this.series.values()) if (series.most > most) series.limit(most);
  }

  /** The last value under a name: a number, "nan", "inf", "-inf", or undefined. */
  last(name) {
    return this.series.get(name)?.last ?? this.run.latest?.[name];
  }

  applySnapshot(data) {
    this.#clear();
    this.cursor = data.cursor;
    this.attempt = data.attempt ?? data.run?.attempt ?? null;
    this.run = { ...data.run };
    this.arguments = data.arguments ?? {};
    this.config = data.config ?? {};
    this.versions = data.versions ?? {};
    const entries = Object.entries(data.series ?? {}).slice(0, MOST_SERIES);
    const most = this.most(entries.length);
    for (const [name, columns] of entries) this.series.set(name, Series.of(name, columns, most));
    this.#take(data);
    this.isLoaded = true;
    this.generation += 1;
    for (const part of ["run", "names", "log", "checkpoints", "observers", "ranks", "media", "histograms", "arguments"]) {
      this.touched.add(part);
    }
  }

  applyFrame(data) {
    if (typeof data.cursor === "number") this.cursor = data.cursor;
    if (typeof data.time === "number") [this.frameTime, this.frameAt] = [data.time, performance.now()];
    if (data.run) {
      if ((data.run.attempt ?? this.run.attempt) !== this.run.attempt) {
        this.ranks.clear(); // another attempt may have fewer
        this.touched.add("ranks");
      }
      for (const [name, value] of Object.entries(data.run)) if (FIELDS.has(name)) this.run[name] = value;
      this.touched.add("run");
    }
    if (data.points) {
      for (const [name, [steps, values]] of Object.entries(data.points)) {
        let series = this.series.get(name);
        if (series === undefined) {
          if (this.series.size >= MOST_SERIES) continue;
          series = new Series(name, this.most(this.series.size));
          this.series.set(name, series);
          this.touched.add("names");
        }
        for (let i = 0; i < steps.length; i++) series.add(steps[i], data.time, values[i]);
      }
      this.touched.add("points");
    }
    this.#take(data);
  }

  #take(data) {
    if (data.left_out && data.left_out !== this.leftOut) {
      this.leftOut = data.left_out;
      this.touched.add("names");
    }
    for (const [name, stage] of Object.entries(data.stages ?? {})) {
      if (!this.series.has(name)) continue; // bounded by the number of curves
      this.stages.set(name, stage);
      this.touched.add("names");
    }
    if (data.log?.length) {
      this.log.push(...data.log.slice(-MOST_LINES));
      if (this.log.length > MOST_LINES) this.log.splice(0, this.log.length - MOST_LINES);
      this.lines += data.log.length;
      this.touched.add("log");
    }
    this.#put(this.checkpoints, data.checkpoints, MOST_CHECKPOINTS, "checkpoints");
    this.#put(this.observers, data.observers, MOST_OBSERVERS, "observers");
    this.#put(this.ranks, data.ranks, MOST_RANKS, "ranks", "rank");
    if (data.media?.length) {
      this.media.push(...data.media);
      this.media.splice(0, Math.max(0, this.media.length - MOST_MEDIA));
      this.touched.add("media");
    }
    for (const [name, rows] of Object.entries(data.histograms ?? {})) {
      if (!this.histograms.has(name) && this.histograms.size >= MOST_HISTOGRAMS) continue;
      this.histograms.set(name, thinned([...(this.histograms.get(name) ?? []), ...rows], MOST_OF_A_HISTOGRAM));
      this.touched.add("histograms");
    }
  }

  #put(into, rows, most, part, key = "name") {
    if (!rows?.length) return;
    for (const row of rows) {
      into.set(row[key], row);
      while (into.size > most) into.delete(into.keys().next().value);
    }
    this.touched.add(part);
  }

  /** Wall time of recent steps, in seconds; null if unknown. */
  secondsPerStep() {
    const series = this.series.get("step_s") ?? this.series.get("train_loss");
    if (!series || series.length < 3) return null;
    const end = series.length - 1;
    let begin = end;
    while (begin > 0 && (series.time[end] - series.time[begin] < 60 || end - begin < 8)) begin -= 1;
    const steps = series.step[end] - series.step[begin];
    return steps > 0 ? (series.time[end] - series.time[begin]) / steps : null;
  }

  /** Unix seconds, on the run's side, until which it has been running: its end, its last sign of life, or now. */
  runningUntil(isStale) {
    const { status, ended, updated } = this.run;
    if (status !== "running" || !this.frameTime) return ended ?? updated;
    const passed = isStale ? 0 : (performance.now() - this.frameAt) / 1000;
    return Math.max(updated ?? 0, this.frameTime + passed);
  }

  /** Total steps of the run; null if unknown. */
  totalSteps() {
    const { epochs, steps_per_epoch: steps, max_steps: most, total_steps: total } = this.run;
    if (total) return total;
    const planned = epochs && steps ? epochs * steps : null;
    if (most && planned) return Math.min(most, planned);
    return most ?? planned;
  }
}

const FIELDS = new Set([
  "attempt",
  "status",
  "reason",
  "module",
  "device",
  "host",
  "started",
  "updated",
  "ended",
  "problems",
  "damage",
  "best",
  "best_mode",
  "global_step",
  "epoch",
  "epochs",
  "steps_per_epoch",
  "max_steps",
  "total_steps",
  "paused",
  "commands",
  "latest",
]);
