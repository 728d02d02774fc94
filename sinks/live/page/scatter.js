/** A hyperparameter against a metric: a point for each run. */

import { runKey } from "./charts.js";
import { number, runsOf } from "./format.js";
import { metricOf, scaleOf, textOf } from "./findings.js";
import { keysOver } from "./parallel.js";
import { Sized } from "./sized.js";
import { html } from "./view.js";
import { highlighting } from "./legend.js";

const HEIGHT = 260;
const PLACE = { left: 64, right: 12, top: 24, bottom: 34 };

export function Scatter(parts) {
  return html`<${Sized} draw=${(width) => drawing(parts, width)} />`;
}

function drawing({ rows, isBeside, parameter, metric, by, lookOf, on }, width) {
  const ends = { x: [PLACE.left, width - PLACE.right], y: [HEIGHT - PLACE.bottom, PLACE.top] };
  const x = scaleOf(rows.map((row) => row.config[parameter]), ends.x, Math.floor(width / 80));
  const y = scaleOf(rows.map((row) => metricOf(row, metric, by)), ends.y, 5);
  const placed = rows
    .map((row) => ({ row, left: x.place(row.config[parameter]), top: y.place(metricOf(row, metric, by)) }))
    .filter(({ left, top }) => left !== null && top !== null);
  const lacking = rows.length - placed.length;
  const logs = [x.isLog && parameter, y.isLog && metric].filter(Boolean);
  const notes = [
    logs.length && `Logarithmic: ${logs.join(" and ")}.`,
    lacking && `Not shown: ${runsOf(lacking, rows.length)} without ${parameter} or a finite ${metric}.`,
  ];
  const words = `${parameter} and ${metric} of ${runsOf(placed.length, rows.length)}. Arrow keys read the runs from left to right.`;
  const order = [...placed].sort((a, b) => a.left - b.left).map(({ row }) => row);
  const tell = (row) => `${parameter} ${textOf(row.config[parameter])}, ${metric} ${number(metricOf(row, metric, by))}`;
  return html`
    <svg class="scatter" width=${width} height=${HEIGHT} viewBox=${`0 0 ${width} ${HEIGHT}`} role="img" tabindex="0" aria-label=${words} ...${keysOver(order, tell, lookOf, on)}>
      ${y.ticks.map(({ text, at }) => html`<g key=${`y${text}`}>
        <line x1=${ends.x[0]} x2=${ends.x[1]} y1=${at} y2=${at} />
        <text x=${PLACE.left - 6} y=${at + 4} text-anchor="end">${text}</text>
      </g>`)}
      ${x.ticks.map(({ text, at }) => html`<g key=${`x${text}`}>
        <line x1=${at} x2=${at} y1=${ends.y[0]} y2=${ends.y[1]} />
        <text x=${at} y=${HEIGHT - PLACE.bottom + 16} text-anchor="middle">${text}</text>
      </g>`)}
      ${placed.map(({ row, left, top }) => {
        const { colour, label } = lookOf(row.name);
        return html`<circle
          key=${row.name}
          data-key=${runKey(row.name)}
          class=${isBeside(row) ? "beside" : null}
          cx=${left}
          cy=${top}
          r="5"
          fill=${colour}
          ...${highlighting(on.board, runKey(row.name))}
        ><title>${`${label}: ${tell(row)}`}</title></circle>`;
      })}
      <text class="title" x=${ends.x[1]} y=${HEIGHT - 2} text-anchor="end">${parameter}</text>
      <text class="title" x="2" y="11">${metric}</text>
    </svg>
    <p class="hint">${notes.filter(Boolean).join(" ")}</p>
  `;
}
