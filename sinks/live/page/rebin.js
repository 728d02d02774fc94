/** Histograms of several steps in common bins. Pure functions. */

/** Maximum common bins. */
const MOST_BINS = 64;

/**
 * Rows `{step, low, high, counts}` in equal bins between the lowest and the highest value of all of them.
 *
 * The elements of a bin are spread evenly over its width, so a bin that lies in two common bins is divided by overlap:
 * the sum of each step is kept. Returns `{low, high, bins, columns: [{step, counts}], isChanged}`.
 */
export function rebinned(rows) {
  const usable = rows.filter(({ low, high, counts }) => Number.isFinite(low) && Number.isFinite(high) && counts.length);
  if (!usable.length) return null;
  let low = Math.min(...usable.map((row) => row.low));
  let high = Math.max(...usable.map((row) => row.high));
  const bins = Math.min(MOST_BINS, Math.max(...usable.map(({ counts }) => counts.length)));
  const isChanged = usable.some((row) => row.low !== low || row.high !== high || row.counts.length !== bins);
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  // Divided before the subtraction, which may overflow.
  const place = (value) => Math.min(bins, Math.max(0, (value / 2 - low / 2) / (high / 2 - low / 2) * bins));
  const columns = usable.map((row) => ({ step: row.step, counts: isChanged ? divided(row, place, bins) : row.counts }));
  return { low, high, bins, columns, isChanged };
}

function divided(row, place, bins) {
  const counts = new Array(bins).fill(0);
  const [begin, end] = [place(row.low), place(row.high)];
  row.counts.forEach((number, at) => {
    if (!number) return;
    const from = begin + ((end - begin) * at) / row.counts.length;
    const to = begin + ((end - begin) * (at + 1)) / row.counts.length;
    const first = Math.min(bins - 1, Math.floor(from));
    if (to - from < 1e-9) counts[first] += number;
    else
      for (let bin = first; bin < bins && bin < to; bin++)
        counts[bin] += (number * Math.max(0, Math.min(to, bin + 1) - Math.max(from, bin))) / (to - from);
  });
  return counts;
}

/** Remove rows evenly until `most` are left: neither the first nor the last; the next row counts each as skipped. */
export function thinned(rows, most) {
  const kept = [...rows];
  while (kept.length > most && kept.length > 2) {
    let [best, least] = [1, Infinity];
    for (let at = 1; at < kept.length - 1; at++) {
      const gap = kept[at + 1].step - kept[at - 1].step;
      if (gap < least) [best, least] = [at, gap];
    }
    const [gone] = kept.splice(best, 1);
    kept[best] = { ...kept[best], skipped: (kept[best].skipped ?? 0) + (gone.skipped ?? 0) + 1 };
  }
  return kept;
}
