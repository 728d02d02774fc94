/** What the rows of the run table tell about runs beside each other. Pure functions. */

import { scaleLinear, scaleLog, scalePoint } from "./d3.min.js";
import { number } from "./format.js";

/** Factor between the largest and the smallest value from which a scale is logarithmic. */
const LOG_FROM = 50;
/** Maximum distinct values of a hyperparameter of texts with an axis: one per run identifies the run only. */
const MOST_CATEGORIES = 24;
/** Metrics without a better direction. */
const NEITHER = new Set(["lr", "grad_norm"]);
const byName = new Intl.Collator("en", { numeric: true }).compare;

/** A hyperparameter as text; a run may lack it. */
export function textOf(value) {
  if (value === undefined) return "–";
  if (value === null) return "none";
  return typeof value === "number" ? number(value) : String(value);
}

/** The hyperparameters that differ between runs, or that some of them lack; the numbers first. */
export function differing(rows) {
  const values = new Map(); // name -> the distinct values
  for (const { config } of rows) for (const name of Object.keys(config)) values.set(name, new Set());
  for (const { config } of rows) for (const [name, known] of values) known.add(config[name]);
  const names = [...values.keys()].filter((name) => values.get(name).size > 1).sort(byName);
  const isNumber = (name) => [...values.get(name)].every((value) => value === undefined || typeof value === "number");
  return [...names.filter(isNumber), ...names.filter((name) => !isNumber(name))];
}

/** The hyperparameters of `differing` that an axis can show. */
export function plottable(rows, names) {
  return names.filter((name) => {
    const values = new Set(rows.map(({ config }) => config[name]));
    return values.size <= MOST_CATEGORIES || [...values].every((value) => value === undefined || typeof value === "number");
  });
}

/** The metrics of some runs: those by which runs are compared, those of validation, the training's, the others. */
export function metricsOf(rows) {
  const monitored = new Set(rows.map((row) => row.monitored).filter(Boolean));
  const names = new Set(rows.flatMap((row) => Object.keys(row.metrics)));
  const rank = (name) => {
    if (monitored.has(name)) return 0;
    if (/^(val|valid|validation|test|eval)[_/]/.test(name)) return 1;
    if (name.startsWith("train_")) return 2;
    return /^(system|ledger)\//.test(name) ? 4 : 3;
  };
  return [...names].sort((a, b) => rank(a) - rank(b) || byName(a, b));
}

/** A metric of a run: a number, "nan", "inf", "-inf"; undefined if the run lacks it. `by`: "best" or "last". */
export function metricOf(row, name, by) {
  const metric = row.metrics[name];
  if (metric === undefined) return undefined;
  return by === "last" ? metric[0] : (metric[1] ?? metric[0]);
}

/** What is better: "least", "greatest", "neither", or "unclear" where runs disagree. */
export function directionOf(rows, name) {
  if (NEITHER.has(name)) return "neither";
  const found = new Set(rows.map((row) => row.metrics[name]?.[4]).filter((isLeast) => isLeast !== undefined));
  if (found.size !== 1) return "unclear";
  return found.has(true) ? "least" : "greatest";
}

export const DIRECTIONS = {
  least: ["↓", "lower is better"],
  greatest: ["↑", "higher is better"],
  neither: ["", "neither direction is better"],
  unclear: ["", "the runs disagree on what is better: no winner"],
};

/** The runs with the best value of a metric, by name: none of fewer than two runs that have it. */
export function winnersOf(rows, name, by) {
  const direction = directionOf(rows, name);
  const having = rows.filter((row) => row.metrics[name] !== undefined);
  const finite = having.filter((row) => Number.isFinite(metricOf(row, name, by)));
  if (having.length < 2 || !finite.length || !["least", "greatest"].includes(direction)) return new Set();
  const values = finite.map((row) => metricOf(row, name, by));
  const best = values.reduce((a, b) => (direction === "least" ? Math.min(a, b) : Math.max(a, b)));
  if (finite.length > 1 && values.every((value) => value === best)) return new Set(); // all are equal
  return new Set(finite.filter((_, at) => values[at] === best).map((row) => row.name));
}

/** Rows in the order of a metric, the best first; those without a number are last. */
export function ranked(rows, name, by) {
  const sign = directionOf(rows, name) === "greatest" ? -1 : 1;
  const key = (row) => {
    const value = metricOf(row, name, by);
    return Number.isFinite(value) ? sign * value : Infinity;
  };
  return rows.map((row) => [key(row), row]).sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0)).map(([, row]) => row);
}

/**
 * The scale of some values, over `range` in pixels: `{place, ticks, invert, isLog, isNumeric}`, logarithmic by the data.
 *
 * `place(value)` is null for a value that it lacks. `ticks` are `{text, at}`. `invert` is null for categories.
 */
export function scaleOf(values, range, most = 6) {
  const known = values.filter((value) => value !== undefined);
  const numbers = known.filter((value) => Number.isFinite(value));
  // "nan" and the like are among the numbers of a metric: they have no place.
  const isNumeric = numbers.length > 0 && known.every((value) => typeof value === "number" || /^(nan|-?inf)$/.test(value));
  if (!isNumeric) {
    const domain = [...new Set(known)].sort((a, b) => byName(textOf(a), textOf(b)));
    const keys = domain.map((value) => `${typeof value}:${value}`);
    const scale = scalePoint(keys, range).padding(0.5);
    const every = Math.ceil(domain.length / (2 * most));
    return {
      place: (value) => scale(`${typeof value}:${value}`) ?? null,
      ticks: domain.map((value, i) => ({ text: textOf(value), at: scale(keys[i]) })).filter((_, i) => i % every === 0),
      invert: null,
      isLog: false,
      isNumeric,
    };
  }
  let [low, high] = [Math.min(...numbers), Math.max(...numbers)];
  const isLog = low > 0 && high / low >= LOG_FROM;
  if (low === high) [low, high] = low === 0 ? [-1, 1] : [low - Math.abs(low) / 2, high + Math.abs(high) / 2];
  const scale = (isLog ? scaleLog() : scaleLinear()).domain([low, high]).range(range);
  if (!isLog) scale.nice(most);
  const all = scale.ticks(most);
  // A logarithmic scale has ticks at 1 to 9 times each power of ten: the powers have labels, if there are two.
  const powers = all.filter((tick) => Math.abs(Math.log10(tick) % 1) < 1e-9);
  const ticks = isLog && powers.length > 1 ? powers : all;
  const every = Math.ceil(ticks.length / (most + 1));
  return {
    place: (value) => (Number.isFinite(value) ? scale(value) : null),
    ticks: ticks.filter((_, i) => i % every === 0).map((tick) => ({ text: number(tick), at: scale(tick) })),
    invert: (at) => scale.invert(at),
    isLog,
    isNumeric,
  };
}

