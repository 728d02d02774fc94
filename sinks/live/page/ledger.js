/** The stall ledger: the loop's wall time by phase. */

import { table } from "./dom.js";
import { duration, percent } from "./format.js";
import { colours, LAYERS } from "./theme.js";

const LEDGER_NAMES = {
  inline: "inline hooks",
  fence: "fences",
};
/** The layers of the stack, from its top: later ones are drawn over earlier ones. */
export function ledgerCurves(store) {
  const wall = store?.get("ledger/wall_s");
  if (!wall) return [];
  const { layers } = colours();
  const curves = [];
  const top = new Float64Array(wall.length);
  LAYERS.forEach((layer, index) => {
    const series = store.get(`ledger/${layer}_s`);
    if (!series) return;
    const values = sharesOf(series, wall);
    if (!values.some((share) => share >= 0.0005)) return;
    for (let i = 0; i < top.length; i++) top[i] += values[i];
    const colour = layers.get(layer);
    const isHatched = index % 2 === 1;
    const { step, time, length, version } = wall;
    curves.push({
      label: LEDGER_NAMES[layer] ?? layer,
      colour,
      values,
      last: shareOf(series.last, wall.last),
      show: percent,
      tick: wholePercent,
      layer,
      isHatched,
      width: 0.5,
      started: store.run.started,
      epochSteps: store.run.steps_per_epoch,
      fill: (u) => filling(u.ctx, colour, isHatched),
      series: {
        step,
        time,
        length,
        version: version + series.version,
        width: wall.width,
        mean: Float64Array.from(top, (y) => Math.min(y, 1)),
      },
    });
  });
  return curves.reverse();
}

/** The ledger's table: the last interval, and the whole run. */
export function ledgerTable(store) {
  const wall = store?.get("ledger/wall_s");
  if (!wall?.length) return null;
  const all = total(wall);
  const rows = [];
  for (const layer of [...LAYERS, "device_idle"]) {
    const series = store.get(`ledger/${layer}_s`);
    if (!series?.length) continue;
    const seconds = total(series);
    if (seconds < 0.0005 * all && !(series.last > 0.0005 * wall.last)) continue;
    const name = layer === "device_idle" ? "device idle*" : (LEDGER_NAMES[layer] ?? layer);
    rows.push([name, percent(series.last / wall.last), percent(seconds / all), duration(seconds)]);
  }
  rows.push(["wall", duration(wall.last), "", duration(all)]);
  const heads = [
    { head: "Row" },
    { head: "Last interval", number: true },
    { head: "Total", number: true },
    { head: "Time", number: true },
  ];
  const idle = store.get("ledger/device_idle_s") ? "; *device idle overlaps the other rows" : "";
  return table(`The loop's wall time by phase${idle}`, heads, rows);
}

/** Shares of wall time, point by point; by step if the points of the two differ. */
function sharesOf(series, wall) {
  const values = new Float64Array(wall.length);
  const isAligned = series.length === wall.length;
  const byStep = isAligned
    ? null
    : new Map(Array.from(series.step.subarray(0, series.length), (step, i) => [step, series.mean[i]]));
  for (let i = 0; i < wall.length; i++) {
    const seconds = isAligned ? series.mean[i] : (byStep.get(wall.step[i]) ?? 0);
    values[i] = shareOf(seconds, wall.mean[i]);
  }
  return values;
}

function shareOf(seconds, wall) {
  return wall > 0 && seconds > 0 ? Math.min(1, seconds / wall) : 0;
}

function total(series) {
  let sum = 0;
  for (let i = 0; i < series.length; i++)
    if (series.mean[i] === series.mean[i]) sum += series.mean[i] * series.weight[i];
  return sum;
}

/** A plain filling, or a hatched one: neighbours differ in more than colour. */
function filling(ctx, colour, isHatched) {
  if (!isHatched) return colour;
  const tile = document.createElement("canvas");
  tile.width = tile.height = 8;
  const pen = tile.getContext("2d");
  pen.fillStyle = colour;
  pen.fillRect(0, 0, 8, 8);
  pen.strokeStyle = colours().surface;
  pen.globalAlpha = 0.55;
  pen.lineWidth = 1.5;
  pen.beginPath();
  for (const at of [-4, 4, 12]) {
    pen.moveTo(at - 6, 10);
    pen.lineTo(at + 6, -2);
  }
  pen.stroke();
  return ctx.createPattern(tile, "repeat");
}

function wholePercent(share) {
  return `${Math.round(100 * share)} %`;
}
