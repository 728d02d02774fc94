/** What a chart reads: in its legend or in a list at the cursor, aloud, and as a table. */

import { placeOn } from "./axes.js";
import { align, nearest } from "./curves.js";
import { announce, setText, table } from "./dom.js";
import { count, number } from "./format.js";
import { writeLegend, writeTip } from "./legend.js";
import { colours } from "./theme.js";

const MOST_ROWS = 200;
/** Maximum curves that are read at once: on a wide chart, and on a narrow one... */
const MOST_READ = 8;
const NARROW = { width: 450, most: 5 };
/** ...and that are read in all charts; of more, only the chart under the cursor lists them. */
const FEW = 6;
/** Maximum distance from the cursor to the curve that it highlights, in pixels. */
const NEAR = 24;

/** What a curve reads at a place: `{value, raw, y}`, where `raw` is the value before smoothing, if it is smoothed. */
function valueAt(chart, i, x) {
  const { series, show = number, values } = chart.shown[i];
  const part = chart.parts[i];
  const at = nearest(part.x, part.x.length, x);
  if (at < 0) return { value: "–", y: null };
  const raw = show((values ?? series.mean)[at]);
  const y = part.y[at];
  return chart.by[i] > 0 && y !== null ? { value: show(y * chart.shrinkage), raw, y } : { value: raw, y };
}

/** Write what the chart reads at a place, or the last values. Highlights the run whose curve is under the cursor. */
export function writeReading(chart, x) {
  const { view } = chart.board;
  const place = x === null ? "" : placeOn(view.axis, x);
  if (chart.isComparing) {
    const read = x === null ? [] : readings(chart, x);
    writeLegend(chart.legend, namesOf(chart), chart.board);
    if (chart.isPointed) chart.board.highlight(closest(chart, read));
    const lit = read.find(({ curve }) => chart.hasKey(curve, chart.board.lit));
    const isListed = chart.isPointed || chart.shown.length <= FEW || chart.plot === document.activeElement;
    setText(chart.readout, lit && !isListed ? `${place} · ${lit.curve.label} ${lit.value}` : place);
    writeTip(chart.tip, isListed ? read : [], chart.shown.length, lit);
    if (x !== null) chart.tip.classList.toggle("aside", chart.u.cursor.left < chart.u.over.clientWidth / 2);
    return;
  }
  setText(chart.readout, place);
  const entries = chart.all.map((curve) => {
    const at = x === null ? -1 : chart.shown.indexOf(curve);
    return {
      curve: { ...curve, dash: chart.dashOf(curve) },
      key: chart.hideKeys(curve)[0],
      label: curve.label,
      isHidden: chart.isHidden(curve),
      ...(at < 0 ? { value: (curve.show ?? number)(curve.last ?? curve.series.last) } : valueAt(chart, at, x)),
    };
  });
  writeLegend(chart.legend, entries, chart.board);
  writeTip(chart.tip, [], 0);
}

/** The names of the curves that each run has, by their widths: runs are named once, above the charts. */
function namesOf(chart) {
  const byName = new Map(chart.all.filter(({ name }) => name).map((curve) => [curve.name, curve]));
  return [...byName].map(([label, { width }]) => {
    const key = chart.nameKey(label);
    return {
      curve: { colour: colours().muted, width },
      key,
      label,
      isHidden: chart.board.view.hidden.has(key),
      value: "",
    };
  });
}

/** The curves nearest to the cursor, the highest first: `{curve, value, raw, away}`. */
function readings(chart, x) {
  const { u } = chart;
  const read = chart.shown.map((curve, i) => {
    const { x: xs } = chart.parts[i];
    const isWithin = xs.length && x >= xs[0] && x <= xs[xs.length - 1];
    const { y, ...told } = isWithin ? valueAt(chart, i, x) : { y: null };
    const top = y === null ? NaN : u.valToPos(y, "y");
    return { curve: { ...curve, dash: chart.dashOf(curve) }, ...told, top, away: Math.abs(top - u.cursor.top) };
  });
  const near = read.filter(({ away }) => away === away).sort((a, b) => a.away - b.away);
  return near.slice(0, u.width < NARROW.width ? NARROW.most : MOST_READ).sort((a, b) => a.top - b.top);
}

function closest(chart, read) {
  const [first] = read.filter(({ away }) => away <= NEAR).sort((a, b) => a.away - b.away);
  return first ? chart.hideKeys(first.curve)[0] : null;
}

/** Read a place aloud: of many curves those of the highlighted run, or some. */
export function tell(chart, x) {
  const lit = chart.shown.map((curve, i) => [curve, i]).filter(([curve]) => chart.hasKey(curve, chart.board.lit));
  const wanted = lit.length ? lit : chart.shown.map((curve, i) => [curve, i]);
  const told = wanted.slice(0, MOST_READ).map(([curve, i]) => {
    const { value, raw } = valueAt(chart, i, x);
    return `${curve.label} ${value}${raw ? ` (raw ${raw})` : ""}`;
  });
  const place = placeOn(chart.board.view.axis, x);
  const more = wanted.length > MOST_READ ? `, and ${count(wanted.length - MOST_READ)} more` : "";
  announce(`${place[0].toUpperCase()}${place.slice(1)}: ${told.join(", ")}${more}`);
}

/** The text that a chart is to a screen reader. */
export function summaryOf(chart, curves) {
  const told = curves.slice(0, FEW).map((curve) => {
    const { series, label, show = number } = curve;
    if (!series.length) return `${label}: nothing yet`;
    const last = curve.last ?? series.last;
    const ends = series.lowest ? `, lowest ${show(series.lowest.value)}, highest ${show(series.highest.value)}` : "";
    return `${label}: last ${show(last)} at step ${count(series.step[series.length - 1])}${ends}`;
  });
  const more = curves.length > FEW ? ` And ${count(curves.length - FEW)} more lines.` : "";
  const notes = [chart.missing, chart.notes].filter((one) => !one.hidden).map((one) => ` ${one.textContent}`);
  return `Chart, ${chart.title}. ${told.join(". ")}.${more}${notes.join("")} Arrow keys read single points, plus and minus zoom.`;
}

/** The newest points of the curves as a table. */
export function tableOf(chart, curves) {
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
  return table(`${chart.title}: the newest ${rows.length} of ${count(length)} points${merged}`, heads, rows);
}
