/** Marks over a chart's curves: crosses where a value was not finite, arrows where one is beyond the scale. */

import { colours } from "./theme.js";

/** The points of a curve that lie beyond its scale: `{index, isAbove}`. */
export function placesBeyond({ y, low, high }, [least, most]) {
  const found = [];
  for (let index = 0; index < y.length; index++) {
    if (y[index] === null) continue;
    if ((high ?? y)[index] > most) found.push({ index, isAbove: true });
    else if ((low ?? y)[index] < least) found.push({ index, isAbove: false });
  }
  return found;
}

/** Draw the marks of all curves: at the top, or at the edge beyond which the value lies. */
export function drawMarks(chart, u) {
  const { ctx } = u;
  const size = 3 * devicePixelRatio;
  const edge = size + 2;
  ctx.save();
  ctx.lineWidth = 1.5 * devicePixelRatio;
  chart.shown.forEach((curve, i) => {
    const placeOf = (index) => place(chart, u, i, index);
    ctx.beginPath();
    ctx.strokeStyle = curve.colour;
    for (const { index, isAbove } of sparsely(chart.beyond?.[i] ?? [], (one) => placeOf(one.index))) {
      const x = placeOf(index);
      const y = isAbove ? u.bbox.top + edge : u.bbox.top + u.bbox.height - edge;
      const tip = isAbove ? y - size : y + size;
      ctx.moveTo(x - size, y);
      ctx.lineTo(x, tip);
      ctx.lineTo(x + size, y);
    }
    ctx.stroke();
    ctx.beginPath();
    ctx.strokeStyle = colours().bad;
    for (const index of sparsely(curve.series.odd?.keys() ?? [], placeOf)) {
      const [x, y] = [placeOf(index), u.bbox.top + edge];
      ctx.moveTo(x - size, y - size);
      ctx.lineTo(x + size, y + size);
      ctx.moveTo(x + size, y - size);
      ctx.lineTo(x - size, y + size);
    }
    ctx.stroke();
  });
  ctx.restore();
}

/** Where a point lies from left to right, on the canvas; NaN outside of the plot. */
function place(chart, u, i, index) {
  const x = u.valToPos(chart.parts[i].x[index], "x", true);
  return x < u.bbox.left || x > u.bbox.left + u.bbox.width ? NaN : x;
}

/** Of marks that lie over each other only one is drawn: a run may be NaN for thousands of steps. */
function* sparsely(marks, placeOf) {
  let before = -Infinity;
  for (const mark of marks) {
    const at = placeOf(mark);
    if (!(Math.abs(at - before) >= 5 * devicePixelRatio)) continue;
    before = at;
    yield mark;
  }
}
