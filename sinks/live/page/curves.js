/** From series to what is drawn: smoothing, the scale of x, and bringing several curves onto one x. Pure. */

/** The part of a curve that can be drawn: `{x, y, low, high}`, of equal length. */
export function pointsOf(series, { x, started, smoothing, log }) {
  const length = series.length;
  const xs =
    x === "time"
      ? Float64Array.from(series.time.subarray(0, length), (time) => time - started)
      : series.step.subarray(0, length);
  const y = drawable(series.mean, length, log);
  const isWide = series.width > 1 && series.low !== undefined;
  return {
    x: xs,
    y: smoothing > 0 ? smoothed(y, smoothing) : y,
    raw: smoothing > 0 && !isWide ? y : null,
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

/** How many values of a series a logarithmic scale has no place for: those in points of 0 or less. */
export function valuesOffLog(series) {
  let values = 0;
  for (let i = 0; i < series.length; i++) if (series.mean[i] <= 0) values += series.weight[i];
  return values;
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
 * Bring groups of columns, each with an x of its own, onto one x. Where a group has no point there, its columns have
 * `undefined`, over which lines go on; `null` is a gap. Returns `[x, ...columns]`.
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
      while (heads[g] < from.length && from[heads[g]] < before) heads[g] += 1; // not in order: left out
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

/** What the curves' numbers are divided by to be drawn: from one end to the other of all numbers is farther than any. */
export function shrinkageOf(largest) {
  return largest > Number.MAX_VALUE / 4 ? 4 : 1;
}

/** The part of a curve, its numbers divided. */
export function shrunk(part, by) {
  if (by === 1) return part;
  const column = (values) => values && Array.from(values, (value) => (value === null ? null : value / by));
  return { ...part, y: column(part.y), raw: column(part.raw), low: column(part.low), high: column(part.high) };
}

/** Where the smallest and the largest value to be shown are, with some air around. */
export function linearRange(min, max) {
  if (min === null || max === null || !Number.isFinite(min) || !Number.isFinite(max)) return [0, 1];
  if (min === max) {
    const air = Math.abs(min) * 0.1 || 1;
    return [min >= 0 ? Math.max(0, min - air) : min - air, max + air];
  }
  const air = (max - min) * 0.07;
  return [min >= 0 ? Math.max(0, min - air) : min - air, max + air];
}

/** The same for a scale of powers of ten, whose labels begin at its lower end: that is a round number. */
export function logRange(min, max) {
  if (!(min > 0) || !(max > 0)) return [0.1, 1];
  const [low, high] = [10 ** Math.floor(Math.log10(min)), 10 ** Math.floor(Math.log10(max))];
  const least = low ? Math.floor(min / low) * low : min; // the smallest numbers have no power of ten below them
  const range = [least, Math.min(Math.ceil(max / high) * high, Number.MAX_VALUE)];
  return range[0] < range[1] ? range : [range[0] / 2, range[1] * 2];
}

const MULTIPLES = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 5], [1]];

/** Round numbers from `min` to `max` for the labels of a scale of powers of ten: as many as there is room for. */
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
