/** The columns of the run table: values, order and groups. Pure functions of the rows of `GET /api/table`. */

import { differing, directionOf } from "./findings.js";
import { ago, count, duration, moment, NONE, number, percent, unitOf } from "./format.js";

/** Maximum hyperparameters that are shown before the reader chooses. */
const MOST_DIFFERING = 8;
const text = (value) => (value === null || value === undefined || value === "" ? NONE : String(value));
const LATEST = { show: (value, now) => ago(value, now), title: moment, isNumber: true, isTime: true, isDown: true };

/** Columns that every run has. `isDown`: the first click on its head puts the greatest first. */
const FIXED = {
  name: { head: "Name", of: (row) => row.label },
  status: { head: "State", of: (row) => row.status },
  health: { head: "Health", of: (row) => row.health.join("; ") },
  progress: { head: "Progress", of: (row) => row.progress, show: percent, isNumber: true, isDown: true },
  left_s: { head: "Time left", of: (row) => row.left_s, show: duration, isNumber: true },
  step: { head: "Step", of: (row) => row.step, show: count, isNumber: true, isDown: true },
  total_steps: { head: "Total steps", of: (row) => row.total_steps, show: count, isNumber: true, isDown: true },
  epoch: { head: "Epoch", of: (row) => row.epoch, show: count, isNumber: true, isDown: true },
  duration_s: { head: "Duration", of: durationOf, show: duration, isNumber: true },
  started: { head: "Started", of: (row) => row.started, ...LATEST },
  updated: { head: "Updated", of: (row) => row.updated, ...LATEST },
  epochs_since_best: {
    head: "Epochs since best",
    of: (row) => row.metrics[row.monitored]?.[3],
    show: count,
    isNumber: true,
  },
  tags: { head: "Tags", of: (row) => row.notes.tags.join(", ") },
  note: { head: "Note", of: (row) => row.notes.note },
  commit: { head: "Commit", of: (row) => row.commit && `${row.commit.slice(0, 9)}${row.dirty ? " + changes" : ""}` },
  command: { head: "Command", of: (row) => row.command },
  module: { head: "Module", of: (row) => row.module },
  device: { head: "Device", of: (row) => row.device },
  host: { head: "Host", of: (row) => row.host },
  attempt: { head: "Attempt", of: (row) => row.attempt, show: count, isNumber: true, isDown: true },
  folder: { head: "Folder", of: (row) => row.folder },
  problems: { head: "Problems", of: (row) => row.problems.join("; ") },
};
const OF_METRIC = { last: ["last", 0], best: ["best", 1], best_step: ["step of best", 2] };

function durationOf(row, now) {
  const isRunning = row.status === "running" || row.status === "paused";
  return isRunning && row.started ? Math.max(row.duration_s, now - row.started) : row.duration_s;
}

/** A number of JSON, where those that are not finite are texts. */
function numeric(value) {
  return value === "nan" ? NaN : value === "inf" ? Infinity : value === "-inf" ? -Infinity : value;
}

const isMissing = (value) => value === null || value === undefined || value === "" || Number.isNaN(value);

/** The columns of some rows, by their ids: those of `stagecast runs`. */
export class Columns {
  /** `names`: of metrics that the rows may lack, because there are too many. */
  constructor(rows, names = []) {
    this.rows = rows;
    this.config = union(rows, (row) => row.config);
    this.metrics = new Set([...union(rows, (row) => row.metrics), ...names]);
  }

  #made = new Map();
  #differing = null;

  /** All ids, the most wanted first; `isMetric` ones are a last and a best value for each metric. */
  get ids() {
    const values = [...this.metrics].flatMap((name) => [`best.${name}`, `last.${name}`, `best_step.${name}`]);
    return [...Object.keys(FIXED).slice(1), ...[...this.config].map((name) => `config.${name}`), ...values];
  }

  /** `{id, head, of(row, now), show(value, now), isNumber, isDown, isMetric, direction}`; null for an unknown id. */
  column(id) {
    if (!this.#made.has(id)) this.#made.set(id, this.#make(id));
    return this.#made.get(id);
  }

  #make(id) {
    if (Object.hasOwn(FIXED, id)) {
      const { show = text, isTime, ...rest } = FIXED[id];
      return { id, isTime, ...rest, show: isTime ? show : (value) => show(value) };
    }
    const at = id.indexOf(".");
    const [kind, name] = [id.slice(0, at), id.slice(at + 1)];
    if (kind === "config" && this.config.has(name)) {
      const of = (row) => numeric(row.config[name]);
      const values = this.rows.map(of).filter((value) => !isMissing(value));
      const isNumber = values.length > 0 && values.every((value) => typeof value === "number");
      return { id, head: name, of, show: (value) => (typeof value === "number" ? number(value, 6) : text(value)), isNumber, isConfig: true };
    }
    if (!Object.hasOwn(OF_METRIC, kind) || !this.metrics.has(name)) return null;
    const [word, index] = OF_METRIC[kind];
    const direction = directionOf(this.rows, name);
    const of = (row) => (Object.hasOwn(row.metrics, name) ? numeric(row.metrics[name][index]) : undefined);
    const { show } = index === 2 ? { show: count } : unitOf(name);
    return { id, head: `${word} ${name}`, of, show: (value) => show(value), isNumber: true, isMetric: index < 2, direction, isDown: direction === "greatest" };
  }

  /** The metric by which most runs are judged, or null. */
  get monitored() {
    const counts = new Map();
    for (const { monitored } of this.rows) if (monitored) counts.set(monitored, (counts.get(monitored) ?? 0) + 1);
    return [...counts].sort((a, b) => b[1] - a[1])[0]?.[0] ?? null;
  }

  /** The hyperparameters in which runs differ. */
  get differing() {
    return (this.#differing ??= differing(this.rows));
  }

  /** The ids that answer “which run was best, and why” before the reader chooses others. */
  get usual() {
    const { monitored } = this;
    const wanted = [
      ...(monitored ? [`best.${monitored}`] : []),
      "status",
      "progress",
      ...this.differing.slice(0, MOST_DIFFERING).map((name) => `config.${name}`),
      "health",
      "duration_s",
      "tags",
      "note",
      "folder",
    ];
    const isOver = this.rows.every((row) => row.status !== "running" && row.status !== "paused");
    const isFlat = this.rows.every((row) => [row.name, row.label, "."].includes(row.folder));
    return wanted.filter((id) => {
      if ((id === "progress" && isOver) || (id === "folder" && isFlat)) return false;
      const column = this.column(id);
      if (id === "status" || id === "health") return true;
      return column !== null && this.rows.some((row) => !isMissing(column.of(row, 0)));
    });
  }

  /** The order before the reader chooses another: the best first. */
  get usualSort() {
    const best = this.monitored && this.column(`best.${this.monitored}`);
    return best ? [`${best.isDown ? "-" : ""}${best.id}`] : ["-started"];
  }

  /** The ids by which runs can be grouped: hyperparameters in which they differ, and where they come from. */
  get groups() {
    return [...this.differing.map((name) => `config.${name}`), "status", "tags", "commit", "module", "host", "folder"];
  }
}

function union(rows, of) {
  const names = new Set();
  for (const row of rows) for (const name in of(row)) names.add(name);
  return names;
}

const collator = new Intl.Collator("en", { numeric: true });

/** Less than zero if `a` comes first. Numbers are before texts; NaN and missing values are last in either direction. */
export function compare(a, b, isDown) {
  if (isMissing(a) || isMissing(b)) return Number(isMissing(a)) - Number(isMissing(b));
  const [x, y] = [typeof a === "boolean" ? Number(a) : a, typeof b === "boolean" ? Number(b) : b];
  let order;
  if (typeof x === "number" && typeof y === "number") order = x - y;
  else if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
  else order = collator.compare(x, y);
  return isDown ? -order : order;
}

/** The metrics whose values some columns show. */
export function metricsIn(ids) {
  const names = ids.map((id) => /^-?(?:last|best|best_step)\.(.+)$/.exec(id)?.[1]);
  return [...new Set(names.filter(Boolean))];
}

/** Sort things by ids of columns, where `-ID` puts the greatest first. `valueOf(thing, column)`. */
export function sorted(things, sort, columns, valueOf) {
  const by = sort
    .map((key) => ({ isDown: key.startsWith("-"), column: columns.column(key.replace(/^-/, "")) }))
    .filter(({ column }) => column);
  const keyed = things.map((thing, at) => ({ thing, at, keys: by.map(({ column }) => valueOf(thing, column)) }));
  keyed.sort((a, b) => {
    for (let at = 0; at < by.length; at += 1) {
      const order = compare(a.keys[at], b.keys[at], by[at].isDown);
      if (order) return order;
    }
    return a.at - b.at;
  });
  return keyed.map(({ thing }) => thing);
}

/** Groups of rows with one value in a column, in the order of their first row: `[{key, label, rows}]`. */
export function grouped(rows, column, now) {
  const groups = new Map();
  for (const row of rows) {
    const value = column.of(row, now);
    const key = isMissing(value) ? "" : String(value);
    if (!groups.has(key)) groups.set(key, { key, value, label: isMissing(value) ? NONE : column.show(value, now), rows: [] });
    groups.get(key).rows.push(row);
  }
  return [...groups.values()];
}

/** What a group has in a column: `{value, text}`: mean and spread of numbers, otherwise the value that all runs share. */
export function summary(rows, column, now) {
  const values = rows.map((row) => column.of(row, now));
  const finite = values.filter(Number.isFinite);
  const mean = finite.reduce((sum, value) => sum + value / finite.length, 0);
  const counts = new Map();
  for (const value of values) counts.set(isMissing(value) ? "" : value, (counts.get(isMissing(value) ? "" : value) ?? 0) + 1);
  const isShared = counts.size === 1;
  if (column.id === "status") return { value: null, text: [...counts].map(([word, n]) => (isShared ? word : `${n} ${word}`)).join(", ") };
  if (column.id === "health") {
    const bad = values.filter(Boolean).length;
    return { value: bad, text: bad ? `${count(bad)} of ${count(rows.length)} unhealthy` : "ok" };
  }
  if (isShared) return { value: values[0], text: isMissing(values[0]) ? NONE : column.show(values[0], now) };
  if (column.isTime && finite.length) return { value: Math.max(...finite), text: column.show(Math.max(...finite), now) };
  if (column.isConfig || !column.isNumber || !finite.length)
    return { value: finite.length ? mean : null, text: `${count(counts.size)} values` };
  // The spread is that of a sample: the seeds of a group stand for all others.
  const squares = finite.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  const spread = finite.length > 1 ? Math.sqrt(squares / (finite.length - 1)) : 0;
  const isNone = spread <= 1e-12 * Math.abs(mean); // of equal values, as numbers are rounded
  const few = finite.length < rows.length ? ` (${count(finite.length)} of ${count(rows.length)})` : "";
  return { value: mean, text: `${column.show(mean, now)}${isNone ? "" : ` ± ${column.show(spread, now)}`}${few}` };
}

/** The best value of a metric's column among rows; null without one, or without a better direction. */
export function bestOf(rows, column) {
  if (!["least", "greatest"].includes(column.direction)) return null;
  let best = null;
  for (const row of rows) {
    const value = column.of(row, 0);
    if (Number.isFinite(value) && (best === null || (column.isDown ? value > best : value < best))) best = value;
  }
  return best;
}
