/** The horizontal axes of charts, and the labels of axes. Pure functions. */

import { count, duration, moment, number } from "./format.js";

/** How a place on each axis is read, and how it is labelled; null: as uPlot labels time. */
const HORIZONTAL = {
  step: { read: (x) => `step ${count(x)}`, tick: short },
  epoch: { read: (x) => `epoch ${number(x)}`, tick: number },
  time: { read: duration, tick: duration },
  clock: { read: moment, tick: null },
};

export function placeOn(axis, x) {
  return HORIZONTAL[axis].read(x);
}

export function tickOf(axis) {
  return HORIZONTAL[axis].tick;
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
