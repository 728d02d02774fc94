/** The horizontal axes of charts, and the labels of axes. Pure functions. */

import { count, duration, isTime, moment, number } from "./format.js";

/** How a place on each axis is read, and how its places are labelled. */
const HORIZONTAL = {
  step: { read: (x) => `step ${count(x)}`, labels: (xs) => labelsOf(xs, short) },
  epoch: { read: (x) => `epoch ${number(x)}`, labels: (xs) => labelsOf(xs, number) },
  time: { read: duration, labels: (xs) => labelsOf(xs, duration) },
  clock: { read: moment, labels: clockLabels },
};

export function placeOn(axis, x) {
  return HORIZONTAL[axis].read(x);
}

export function labelsOn(axis, xs) {
  return HORIZONTAL[axis].labels(xs);
}

const DAY_S = 86400;
const time = { hour: "2-digit", minute: "2-digit", hour12: false };
const day = { month: "short", day: "numeric" };

/** Times of day, with seconds or the day where they are needed; or days. `xs`: Unix seconds, equally far from each other. */
function clockLabels(xs) {
  const [first, last] = [xs[0], xs.at(-1)];
  const apart = xs.length > 1 ? xs[1] - first : 0;
  const isOneDay = new Date(first * 1000).toDateString() === new Date(last * 1000).toDateString();
  const clock = apart && apart < 60 ? { ...time, second: "2-digit" } : time;
  const format = new Intl.DateTimeFormat(undefined, apart >= DAY_S ? day : isOneDay ? clock : { ...day, ...clock });
  return xs.map((x) => (isTime(x) ? format.format(x * 1000) : ""));
}

/** The places of a curve's points on an axis. `epochSteps`: the steps of an epoch. */
export function placesOf({ series, started, epochSteps }, axis) {
  const { length } = series;
  if (axis === "epoch") return Float64Array.from(series.step.subarray(0, length), (step) => step / epochSteps);
  if (axis === "time") return Float64Array.from(series.time.subarray(0, length), (time) => time - (started ?? 0));
  return (axis === "clock" ? series.time : series.step).subarray(0, length);
}

const MOST_DIGITS = 15;

/** The labels of an axis: with more digits where neighbours would read the same. `tick`: takes a number and digits. */
export function labelsOf(values, tick) {
  let labels = [];
  for (let digits; !(digits > MOST_DIGITS); digits = (digits ?? 4) + 1) {
    labels = values.map((value) => (Number.isFinite(value) ? tick(value, digits) : ""));
    const told = labels.filter(Boolean);
    if (new Set(told).size === told.length) break;
  }
  return labels;
}

function short(value, digits = 4) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${number(value / 1e9, Math.max(3, digits - 1))}B`;
  if (size >= 1e6) return `${number(value / 1e6, Math.max(3, digits - 1))}M`;
  if (size >= 1e4) return `${number(value / 1e3, digits)}k`;
  return Number.isInteger(value) ? count(value) : number(value, digits);
}
