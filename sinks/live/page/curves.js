/** Turns series into columns to draw: smoothing, scales, and several curves over one x. Pure functions. */

/** The part of a curve that can be drawn: `{x, y, low, high}`, of equal length. `x`: the places of its points. */
export function pointsOf(series, x, log) {
  const { length } = series;
  const isWide = series.width > 1 && series.low !== undefined;
  return {
    x,
    y: drawable(series.mean, length, log),
    raw: null,
    low: isWide ? drawable(series.low, length, log) : null,
    high: isWide ? drawable(series.high, length, log) : null,
  };
}

/** Numbers that a chart can show; null for the others. */
function drawable(column, length, log) {
  const part = column.subarray(0, length);
  for (let i = 0; i < length; i++) {
    if (!(part[i] === part[i]) || (log && part[i] <= 0)) {
      return Array.from(part, (value) => (value !== value || (log && value <= 0) ? null : value));
    }
  }
  return part;
}

/** The number of values that a logarithmic scale cannot show: those in points of 0 or less. */
export function valuesOffLog(series) {
  let values = 0;
  for (let i = 0; i < series.length; i++) if (series.mean[i] <= 0) values += series.weight[i];
  return values;
}

/** Smooth the part of a curve; its background becomes the original, unless it has a spread. */
export function smoothPart(part, by) {
  return by > 0 ? { ...part, y: smoothed(part.y, by), raw: part.low ? null : part.y } : part;
}

/** An exponential moving average that does not start at zero. */
export function smoothed(values, by) {
  const result = new Array(values.length);
  let average = 0;
  let weight = 1;
  for (let i = 0; i < values.length; i++) {
    const value = values[i];
    if (value === null) {
      result[i] = null;
      continue;
    }
    average = average * by + value * (1 - by);
    weight *= by;
    result[i] = average / (1 - weight);
  }
  return result;
}

/**
 * Align groups of columns, each with its own x, to one x. Where a group has no point, its columns have `undefined`, which
 * lines cross; `null` is a gap. Returns `[x, ...columns]`.
 */
export function align(groups) {
  const isSame = groups.every((group) => group.x === groups[0].x || areEqual(group.x, groups[0].x));
  if (groups.length && isSame && isSorted(groups[0].x))
    return [groups[0].x, ...groups.flatMap((group) => group.columns)];
  const heads = groups.map(() => 0);
  const xs = [];
  const columns = groups.map((group) => group.columns.map(() => []));
  let before = -Infinity;
  for (;;) {
    let x = Infinity;
    for (let g = 0; g < groups.length; g++) {
      const from = groups[g].x;
      while (heads[g] < from.length && from[heads[g]] < before) heads[g] += 1; // not in order: skipped
      if (heads[g] < from.length && from[heads[g]] < x) x = from[heads[g]];
    }
    if (x === Infinity) break;
    const row = xs.length;
    xs.push(x);
    for (let g = 0; g < groups.length; g++) {
      const at = heads[g];
      if (at >= groups[g].x.length || groups[g].x[at] !== x) continue;
      heads[g] += 1;
      for (let c = 0; c < columns[g].length; c++) columns[g][c][row] = groups[g].columns[c][at];
    }
    before = x;
  }
  for (const column of columns.flat()) column.length = xs.length;
  return [xs, ...columns.flat()];
}

function isSorted(values) {
  for (let i = 1; i < values.length; i++) if (values[i] < values[i - 1]) return false;
  return true;
}

function areEqual(a, b) {
  if (a.length !== b.length) return false;
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return false;
  return true;
}

/** The divisor of the curves' numbers for drawing: the difference of two numbers may overflow. */
export function shrinkageOf(largest) {
  return largest > Number.MAX_VALUE / 4 ? 4 : 1;
}

/** The part of a curve, its numbers divided. */
export function shrunk(part, by) {
  if (by === 1) return part;
  const column = (values) => values && Array.from(values, (value) => (value === null ? null : value / by));
  return { ...part, y: column(part.y), raw: column(part.raw), low: column(part.low), high: column(part.high) };
}

/** Factor over the usual values from which a value lies off the scale... */
const FAR = 1000;
/** ...and the value that does, where no others show what is usual. */
const ABSURD = 1e15;

/**
 * The values that a scale follows: `[low, high]`; null for all of them.
 *
 * A run that diverges passes through all powers of ten before it is NaN, and a single spike may be as large: a scale that
 * includes them would flatten the rest of the curve. `oddAt`: the index of the last value that was not finite, or -1.
 */
export function scopeOf(values, oddAt = -1) {
  const finite = [];
  const places = [];
  for (let i = 0; i < values.length; i++) {
    if (values[i] === null || values[i] === undefined || values[i] !== values[i]) continue;
    finite.push(values[i]);
    places.push(i);
  }
  if (!finite.length) return null;
  const end = divergesAt(finite, places, oddAt);
  const [low, high] = usualOf(finite, end);
  const [least, most] = rangeOf(finite, finite.length, -Infinity, Infinity);
  return low === least && high === most ? null : [low, high];
}

/** The index from which values grow until they are not finite, or absurdly large; otherwise their number. */
function divergesAt(finite, places, oddAt) {
  const first = Math.max(1, Math.abs(finite[0]));
  let end = finite.length;
  let largest = 0;
  while (end > 1 && Math.abs(finite[end - 1]) > FAR * first) {
    end -= 1;
    largest = Math.max(largest, Math.abs(finite[end]));
  }
  if (end === finite.length || !(oddAt > places[end] || largest > ABSURD * first)) return finite.length;
  const usual = Math.max(first, quartilesOf(finite, end, Math.abs)[2]);
  while (end > 1 && Math.abs(finite[end - 1]) > 10 * usual) end -= 1;
  return end;
}

/** The range of the first values, without outliers. */
function usualOf(finite, end) {
  if (end < 4) return rangeOf(finite, end, -Infinity, Infinity);
  const [first, middle, third] = quartilesOf(finite, end, (value) => value);
  const size = Math.max(third - first, Math.abs(middle));
  const limit = size > 0 ? FAR * size : ABSURD * Math.max(1, Math.abs(middle));
  return rangeOf(finite, end, first - limit, third + limit);
}

function rangeOf(finite, end, least, most) {
  let [low, high] = [Infinity, -Infinity];
  for (let i = 0; i < end; i++) {
    if (finite[i] < least || finite[i] > most) continue;
    if (finite[i] < low) low = finite[i];
    if (finite[i] > high) high = finite[i];
  }
  return [low, high];
}

const SAMPLES = 401;

/** Quartiles of the first `end` values; at most a sample of them is sorted, so that a drawing stays short. */
function quartilesOf(finite, end, of) {
  const count = Math.min(end, SAMPLES);
  const sample = Float64Array.from({ length: count }, (_, i) => of(finite[Math.floor((i * end) / count)])).sort();
  return [0.25, 0.5, 0.75].map((share) => sample[Math.floor(share * (count - 1))]);
}

/** The scale of several curves, each with its `[low, high]`: without those that dwarf all others. */
export function commonScope(scopes) {
  const sizes = scopes.map(([low, high]) => Math.max(Math.abs(low), Math.abs(high)));
  const least = Math.max(1, Math.min(...sizes));
  const kept = scopes.filter((_, index) => sizes[index] <= ABSURD * least);
  return [Math.min(...kept.map(([low]) => low)), Math.max(...kept.map(([, high]) => high))];
}

/** The range from the 1st to the 99th percentile of the drawn values within `zoom`; null without values. */
export function robustRange({ x, y, low, high }, zoom) {
  const sorted = (column) =>
    Float64Array.from(column)
      .filter((value, at) => column[at] !== null && value === value && (!zoom || (x[at] >= zoom[0] && x[at] <= zoom[1])))
      .sort();
  const [lows, highs] = low ? [sorted(low), sorted(high)] : Array(2).fill(sorted(y));
  if (!lows.length) return null;
  return [lows[Math.floor(0.01 * (lows.length - 1))], highs[Math.ceil(0.99 * (highs.length - 1))]];
}

/** Total ups and downs, in heights of the curve, from which a dashed line looks like hatching. */
const JAGGED = 8;

export function isJagged(values) {
  let [low, high, way, before] = [Infinity, -Infinity, 0, null];
  for (const value of values) {
    if (value === null) continue;
    if (before !== null) way += Math.abs(value - before);
    before = value;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return way > JAGGED * (high - low);
}

/** Clamp the part of a curve just outside the scale: a canvas cannot draw a line to 1e300. */
export function clamped(part, [low, high]) {
  const [bottom, top] = linearRange(low, high);
  const [least, most] = [bottom - (top - bottom), top + (top - bottom)];
  const column = (values) =>
    values && Array.from(values, (v) => (v === null ? null : v > high ? Math.max(most, high) : v < low ? least : v));
  return { ...part, y: column(part.y), low: column(part.low), high: column(part.high) };
}

/** Share of a value below which differences are those of arithmetic: an axis could not even count such steps. */
const FLAT = 1e-9;

/** The range of the shown values, with a margin. */
export function linearRange(min, max) {
  if (min === null || max === null || !Number.isFinite(min) || !Number.isFinite(max)) return [0, 1];
  const size = Math.max(Math.abs(min), Math.abs(max));
  if (max - min <= FLAT * size) {
    const air = size * 0.1 || 1;
    return [min >= 0 ? Math.max(0, min - air) : min - air, max + air];
  }
  const air = (max - min) * 0.07;
  return [min >= 0 ? Math.max(0, min - air) : min - air, max + air];
}

/** The same for a logarithmic scale, whose lower end is a round number, because its labels start there. */
export function logRange(min, max) {
  if (!(min > 0) || !(max > 0)) return [0.1, 1];
  const [low, high] = [10 ** Math.floor(Math.log10(min)), 10 ** Math.floor(Math.log10(max))];
  const least = low ? Math.floor(min / low) * low : min; // the smallest numbers have no power of ten below them
  const range = [least, Math.min(Math.ceil(max / high) * high, Number.MAX_VALUE)];
  return range[0] < range[1] ? range : [range[0] / 2, range[1] * 2];
}

const MULTIPLES = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 5], [1]];

/** Round numbers from `min` to `max` for the labels of a logarithmic scale: as many as fit. */
export function logSplits(min, max, most) {
  const [first, last] = [Math.floor(Math.log10(min)), Math.floor(Math.log10(max))];
  let splits = [];
  for (const multiples of last - first < most ? MULTIPLES : []) {
    splits = [];
    for (let power = first; power <= last; power++) {
      for (const multiple of multiples) splits.push(Number(`${multiple}e${power}`));
    }
    splits = splits.filter((value) => value >= min && value <= max);
    if (splits.length <= most) return splits;
  }
  const every = Math.ceil((last - first + 1) / most);
  for (splits = []; splits.length * every <= last - first; ) splits.push(Number(`1e${last - splits.length * every}`));
  return splits.filter((value) => value >= min).reverse();
}

/** The index of the value of `xs` that is nearest to `x`; -1 if there is none. */
export function nearest(xs, length, x) {
  if (!length) return -1;
  let low = 0;
  let high = length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}
