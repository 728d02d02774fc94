/** Parallel coordinates: an axis for each hyperparameter that differs and one for a metric, a line for each run. */

import { runKey } from "./charts.js";
import { brushY, interpolateViridis, lab, select } from "./d3.min.js";
import { announce } from "./dom.js";
import { metricOf, scaleOf, textOf } from "./findings.js";
import { number, runsOf } from "./format.js";
import { highlighting } from "./legend.js";
import { Sized } from "./sized.js";
import { colours } from "./theme.js";
import { Component, html } from "./view.js";

const HEIGHT = 300;
const PLACE = { top: 34, bottom: 30, side: 58 };
const ENDS = [HEIGHT - PLACE.bottom - 14, PLACE.top];
/** Where a run without a value crosses an axis. */
const NOWHERE = HEIGHT - PLACE.bottom + 8;
const LEAST_APART = 84;
const STRIPES = 24;
/** Maximum runs with a wider, invisible line that is easier to point at. */
const MOST_WIDE = 200;

/** The axes: `{id, title, valueOf(row), scale, placeOf(row)}`. */
function axesOf(rows, names, metric, by) {
  const all = names.map((name) => ({ id: name, title: name, valueOf: (row) => row.config[name], show: textOf }));
  if (metric) all.push({ id: "=", title: metric, valueOf: (row) => metricOf(row, metric, by), show: number });
  return all.map((axis) => {
    const scale = scaleOf(rows.map(axis.valueOf), ENDS, 5);
    return { ...axis, scale, placeOf: (row) => scale.place(axis.valueOf(row)) };
  });
}

/** The selected part of an axis in pixels, `[top, bottom]`; null for all of it. Numbers are kept as values, categories as shares. */
function pixelsOf(axis, range) {
  if (!range) return null;
  const [low, high] = axis.scale.isNumeric ? range.map(axis.scale.place) : range.map((share) => ENDS[0] + share * (ENDS[1] - ENDS[0]));
  const found = [Math.max(ENDS[1], Math.min(low, high)), Math.min(ENDS[0], Math.max(low, high))];
  return found.every(Number.isFinite) && found[0] < found[1] ? found : null;
}

function rangeOf(axis, [top, bottom]) {
  const share = (at) => Number(((at - ENDS[0]) / (ENDS[1] - ENDS[0])).toFixed(4));
  const value = (at) => Number(axis.scale.invert(at).toPrecision(6));
  return axis.scale.isNumeric ? [value(bottom), value(top)] : [share(bottom), share(top)];
}

/** The runs within the selected part of each axis. */
export function within(rows, names, metric, { by, ranges }) {
  if (!ranges.size) return rows;
  const selected = axesOf(rows, names, metric, by).map((axis) => [axis, pixelsOf(axis, ranges.get(axis.id))]);
  return rows.filter((row) =>
    selected.every(([axis, pixels]) => {
      const at = axis.placeOf(row);
      return pixels === null || (at !== null && at >= pixels[0] - 0.01 && at <= pixels[1] + 0.01);
    }),
  );
}

export function Parallel(parts) {
  return html`<${Sized} draw=${(width) => drawing(parts, width)} />`;
}

/** From dark to light, without the ends that the surface hides. */
function paint(share) {
  const [from, to] = lab(colours().surface).l < 50 ? [0.3, 1] : [0, 0.82];
  return interpolateViridis(from + share * (to - from));
}

function drawing({ rows, isBeside, some, axes: names, metric, by, state, lookOf, on, choose }, width) {
  const axes = axesOf(rows, names, metric, by);
  const wide = Math.max(width, 2 * PLACE.side + LEAST_APART * (axes.length - 1));
  const apart = axes.length > 1 ? (wide - 2 * PLACE.side) / (axes.length - 1) : 0;
  const leftOf = (i) => PLACE.side + i * apart;
  const last = axes.at(-1);
  const shareOf = (row) => (last.placeOf(row) === null ? null : (last.placeOf(row) - ENDS[0]) / (ENDS[1] - ENDS[0]));
  const line = (row) => axes.map((axis, i) => `${i ? "L" : "M"}${leftOf(i).toFixed(1)},${(axis.placeOf(row) ?? NOWHERE).toFixed(1)}`).join("");
  const tell = (row) => axes.map((axis) => `${axis.title} ${axis.show(axis.valueOf(row))}`).join(", ");
  const words = `${names.join(", ")} and ${metric} of ${runsOf(rows.length)}. Arrow keys read the runs, the best first.`;
  const paths = [...rows].reverse().map((row) => {
    const d = line(row);
    const share = shareOf(row);
    const key = runKey(row.name);
    return html`<g key=${row.name} data-key=${key} class=${isBeside(row) ? "beside" : null} ...${highlighting(on.board, key)}>
      ${rows.length <= MOST_WIDE && html`<path class="wide" d=${d} />`}
      <path d=${d} stroke=${share === null ? colours().muted : paint(share)} />
      <title>${`${lookOf(row.name).label}: ${tell(row)}`}</title>
    </g>`;
  });
  return html`
    <div class="across" role="region" aria-label="Parallel coordinates" tabindex=${wide > width ? "0" : null}>
      <svg class="parallel" width=${wide} height=${HEIGHT} viewBox=${`0 0 ${wide} ${HEIGHT}`} role="group" aria-label="Parallel coordinates">
        <g class="lines" role="img" tabindex="0" aria-label=${words} ...${keysOver(rows, tell, lookOf, on)}>
          <rect x=${PLACE.side} y=${ENDS[1]} width=${wide - 2 * PLACE.side} height=${ENDS[0] - ENDS[1]} fill="none" />
          ${paths}
        </g>
        <g aria-hidden="true">
          ${Array.from({ length: STRIPES }, (_, i) => {
            const high = (ENDS[0] - ENDS[1]) / STRIPES;
            return html`<rect x=${leftOf(axes.length - 1) + 6} y=${ENDS[0] - (i + 1) * high} width="5" height=${high + 0.5} fill=${paint((i + 0.5) / STRIPES)} />`;
          })}
        </g>
        ${axes.map((axis, i) => html`<${Axis} key=${axis.id} axis=${axis} left=${leftOf(i)} rows=${rows} some=${some} state=${state} choose=${choose} />`)}
      </svg>
    </div>
  `;
}

/** An axis with its selection, which the mouse and the arrow keys move. */
class Axis extends Component {
  #brush = null;
  #layer = null;
  #isMoving = false; // by the page, not by the reader

  componentDidMount() {
    this.#brush = brushY()
      .extent([[-12, ENDS[1]], [12, ENDS[0]]])
      .on("brush end", ({ type, selection, sourceEvent }) => {
        if (!this.#isMoving && sourceEvent) this.#select(selection, type === "end");
      });
    select(this.#layer).call(this.#brush);
    this.componentDidUpdate();
  }

  componentDidUpdate() {
    this.#isMoving = true;
    select(this.#layer).call(this.#brush.move, this.#pixels);
    this.#isMoving = false;
  }

  get #pixels() {
    const { axis, state } = this.props;
    return pixelsOf(axis, state.ranges.get(axis.id));
  }

  #select(pixels, isFinal = true) {
    const { axis, state, choose } = this.props;
    const ranges = new Map(state.ranges);
    if (pixels) ranges.set(axis.id, rangeOf(axis, pixels));
    else ranges.delete(axis.id);
    choose({ ranges }, isFinal);
  }

  /** Arrows move the selection, with Shift they move its upper end; Escape selects all. */
  #key(event) {
    const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (event.key !== "Escape" && by === undefined) return;
    event.preventDefault();
    if (by === undefined) {
      this.#select(null);
      announce(`${this.props.axis.title}: all`);
      return;
    }
    const step = ((ENDS[0] - ENDS[1]) / 20) * by;
    const [top, bottom] = this.#pixels ?? [ENDS[1], ENDS[0]];
    const isWhole = this.#pixels === null;
    let moved = [top + step, bottom + (event.shiftKey ? 0 : step)];
    if (isWhole) moved = by > 0 ? [top + step, bottom] : [top, bottom + step]; // the first key makes it smaller
    moved = [Math.max(ENDS[1], Math.min(moved[0], ENDS[0] - 4)), Math.min(ENDS[0], Math.max(moved[1], ENDS[1] + 4))];
    if (moved[0] >= moved[1]) return;
    this.#select(moved);
    setTimeout(() => announce(`${this.props.axis.title}: ${this.#words}, ${runsOf(this.props.some, this.props.rows.length)}`));
  }

  get #words() {
    const { axis, state } = this.props;
    const range = state.ranges.get(axis.id);
    if (!this.#pixels) return "all";
    if (axis.scale.isNumeric) return `${number(range[0])} to ${number(range[1])}`;
    const [top, bottom] = this.#pixels;
    const held = axis.scale.ticks.filter(({ at }) => at >= top && at <= bottom);
    return held.map(({ text }) => text).join(", ") || "none";
  }

  render({ axis, left, rows }) {
    const [top, bottom] = this.#pixels ?? [ENDS[1], ENDS[0]];
    const percent = Math.round((100 * (ENDS[0] - (top + bottom) / 2)) / (ENDS[0] - ENDS[1]));
    return html`<g
      class="axis"
      transform=${`translate(${left},0)`}
      role="slider"
      tabindex="0"
      aria-orientation="vertical"
      aria-label=${`Selected part of ${axis.title}`}
      aria-valuemin="0"
      aria-valuemax="100"
      aria-valuenow=${percent}
      aria-valuetext=${this.#words}
      onKeyDown=${(event) => this.#key(event)}
    >
      <title>${`${axis.title}: drag to select runs; arrow keys move the selection`}</title>
      <text class="title" y="14" text-anchor="middle">${shortened(axis.title)}</text>
      ${axis.scale.isLog && html`<text y="26" text-anchor="middle">log</text>`}
      <line y1=${ENDS[1]} y2=${ENDS[0]} />
      ${axis.scale.ticks.map(({ text, at }) => html`<g key=${text}>
        <line x1="-4" x2="0" y1=${at} y2=${at} />
        <text x="-7" y=${at + 4} text-anchor="end">${shortened(text, 9)}</text>
      </g>`)}
      ${rows.some((row) => axis.placeOf(row) === null) && html`<text x="-7" y=${NOWHERE + 4} text-anchor="end">none</text>`}
      <g ref=${(node) => (this.#layer = node)}></g>
    </g>`;
  }
}

/** A long name without its beginning: its end tells more. */
function shortened(text, most = 13) {
  return text.length > most ? `…${text.slice(1 - most)}` : text;
}

/** Properties of a drawing in which the arrow keys go from run to run, and highlight each. */
export function keysOver(rows, tell, lookOf, { board }) {
  const go = (event) => {
    if (event.target !== event.currentTarget) return;
    const now = rows.findIndex((row) => runKey(row.name) === board.lit);
    const to = { ArrowRight: now + 1, ArrowDown: now + 1, ArrowLeft: now - 1, ArrowUp: now - 1, Home: 0, End: rows.length - 1 }[event.key];
    if (event.key === "Escape") board.highlight(null);
    if (to === undefined || !rows.length) return;
    event.preventDefault();
    const row = rows[Math.min(rows.length - 1, Math.max(0, to))];
    board.highlight(runKey(row.name));
    announce(`${lookOf(row.name).label}: ${tell(row)}`);
  };
  return { onKeyDown: go, onBlur: () => board.highlight(null) };
}
