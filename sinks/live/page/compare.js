/** The comparison of runs: what differs, the metrics with the best marked, and how one leads to the other. */

import { runKey } from "./charts.js";
import { directionOf, DIRECTIONS, differing, metricOf, metricsOf, plottable, ranked, textOf, winnersOf } from "./findings.js";
import { count, number, runsOf } from "./format.js";
import { highlighting } from "./legend.js";
import { Parallel, within } from "./parallel.js";
import { Scatter } from "./scatter.js";
import { html } from "./view.js";

const MOST_ROWS = 50;
const MOST_METRICS = 8;
const MOST_AXES = 10;
export const HINT = "Point at a run to highlight it everywhere; drag along an axis to select runs.";

/**
 * The comparison of `rows` of `GET /api/table`. `known`: names of metrics that the rows may lack until one is chosen.
 *
 * `state`: the reader's choices, a `CompareState`. `lookOf(name)`: `{colour, label, href, isHidden}` of a run. `on`:
 * `change(isFinal)` after a choice, where a selection that is being drawn is not final; `show(names)` lays runs over each
 * other; and a `board` to highlight with.
 */
export function Comparison({ rows, known, state, lookOf, on }) {
  const names = differing(rows);
  const metrics = metricsOf(rows);
  const axes = plottable(rows, names);
  const metric = metrics.includes(state.metric) ? state.metric : metrics[0];
  const parameter = axes.includes(state.parameter) ? state.parameter : axes[0];
  const choose = (change, isFinal = true) => {
    Object.assign(state, change);
    on.change(isFinal);
  };
  const { by } = state;
  const sorted = metric ? ranked(rows, metric, by) : rows;
  const shownAxes = axes.slice(0, MOST_AXES);
  const selected = within(sorted, shownAxes, metric, state);
  const selectedNames = new Set(selected.map((row) => row.name));
  const hasRanges = state.ranges.size > 0;
  const isBeside = (row) => !selectedNames.has(row.name) || lookOf(row.name).isHidden;
  const parts = { rows: sorted, isBeside, metric, by, lookOf, on, state };
  return html`
    <div class="toolbar">
      ${metric &&
      html`<${Choice} label="Metric" value=${metric} choose=${(one) => choose({ metric: one })} options=${[...new Set([...metrics, ...known])].map((one) => [one, one])} />
        <${Choice} label="Value" value=${by} choose=${(one) => choose({ by: one })} options=${[["best", "best"], ["last", "last"]]} />`}
    </div>
    ${!names.length &&
    html`<p class="hint">
      ${rows.length > 1 ? "The hyperparameters of these runs do not differ." : "There is one run: tick another one in the list."}
    </p>`}
    <${Results} ...${parts} rows=${[...selected, ...sorted.filter((row) => !selectedNames.has(row.name))]} names=${names} metrics=${metrics} choose=${choose} />
    ${metric &&
    axes.length > 0 &&
    html`<div class="pair">
        <figure class="chart" aria-label=${`${parameter} and ${metric}`}>
          <figcaption>
            <h3>One hyperparameter</h3>
            <${Choice} label="Hyperparameter" value=${parameter} choose=${(one) => choose({ parameter: one })} options=${axes.map((one) => [one, one])} />
          </figcaption>
          <${Scatter} ...${parts} parameter=${parameter} />
        </figure>
        <figure class="chart" aria-label="All hyperparameters that differ">
          <figcaption>
            <h3>All hyperparameters that differ</h3>
            ${axes.length > MOST_AXES && html`<span class="hint">${count(MOST_AXES)} of ${count(axes.length)}</span>`}
          </figcaption>
          <${Parallel} ...${parts} axes=${shownAxes} some=${selected.length} choose=${choose} />
        </figure>
      </div>
      <div class="toolbar selection">
        <span class="hint" role="status">${hasRanges && `${runsOf(selected.length, sorted.length)} selected`}</span>
        ${hasRanges &&
        html`<button type="button" disabled=${!selected.length} onClick=${() => on.show(selected.map((row) => row.name))}>
            Lay them over each other
          </button>
          <button type="button" class="quiet" onClick=${() => choose({ ranges: new Map() })}>Clear the selection</button>`}
      </div>
      <p class="lit-run hint" aria-hidden="true" ref=${(node) => node && !node.textContent && node.append(HINT)}></p>`}
  `;
}

function Choice({ label, value, options, choose }) {
  return html`<label>
    ${label}${" "}
    <select aria-label=${label} value=${value} onChange=${({ target }) => choose(target.value)}>
      ${options.map(([key, text]) => html`<option key=${key} value=${key} selected=${key === value}>${text}</option>`)}
    </select>
  </label>`;
}

/** A row for each run, the selected ones first, the best of them before the others: its hyperparameters that differ, and its metrics. */
function Results({ rows, isBeside, names, metrics, metric, by, state, lookOf, on, choose }) {
  const wanted = metric && !metrics.slice(0, MOST_METRICS).includes(metric) ? [metric, ...metrics] : metrics;
  const shown = state.isWhole ? wanted : wanted.slice(0, MOST_METRICS);
  const some = state.isWhole ? rows : rows.slice(0, MOST_ROWS);
  const winners = new Map(shown.map((name) => [name, winnersOf(rows, name, by)]));
  const head = (name) => {
    const [arrow, words] = DIRECTIONS[directionOf(rows, name)];
    return html`<th
      key=${`metric ${name}`}
      scope="col"
      class="number"
      aria-sort=${name !== metric ? null : directionOf(rows, name) === "greatest" ? "descending" : "ascending"}
      title=${`${name}: ${words}`}
    >
      <button type="button" class="quiet" aria-label=${`Order by ${name}: ${words}`} onClick=${() => choose({ metric: name })}>
        ${name} ${arrow}
      </button>
    </th>`;
  };
  const line = (row) => {
    const look = lookOf(row.name);
    const key = runKey(row.name);
    return html`<tr key=${row.name} data-key=${key} class=${isBeside(row) ? "beside" : null} ...${highlighting(on.board, key)}>
      <th scope="row"><i class="dot" style=${{ background: look.colour }}></i> <a href=${look.href}>${look.label}</a></th>
      ${names.map((name) => html`<td key=${name} class=${typeof row.config[name] === "number" ? "number" : null}>${textOf(row.config[name])}</td>`)}
      ${shown.map((name) => html`<${Value} key=${`metric ${name}`} row=${row} name=${name} by=${by} winners=${winners.get(name)} />`)}
    </tr>`;
  };
  const isMore = rows.length > MOST_ROWS || wanted.length > MOST_METRICS;
  const kept = [
    rows.length > MOST_ROWS && `${count(some.length)} of ${count(rows.length)} runs`,
    wanted.length > MOST_METRICS && `${count(shown.length)} of ${count(wanted.length)} metrics`,
  ].filter(Boolean);
  return html`
    <div class="table-box" role="region" aria-label="What differs, and results" tabindex="0">
      <table>
        <caption>
          ${by === "best" ? "Best" : "Last"} values; ★ marks the best run. ${said(rows, shown)}
        </caption>
        <thead>
          <tr>
            <th scope="col">Run</th>
            ${names.map((name) => html`<th key=${name} scope="col" class=${rows.some((row) => typeof row.config[name] === "number") ? "number" : null}>${name}</th>`)}
            ${shown.map(head)}
          </tr>
        </thead>
        <tbody>
          ${some.map(line)}
        </tbody>
      </table>
    </div>
    ${isMore &&
    html`<button type="button" class="quiet" onClick=${() => choose({ isWhole: !state.isWhole })}>
      ${state.isWhole ? "Show fewer" : `Show all (now ${kept.join(" and ")})`}
    </button>`}
  `;
}

/** A run with its hyperparameters that differ and its metric, as a phrase. */
export function inWords(row, rows, state, label) {
  const names = differing(rows).slice(0, MOST_AXES);
  const metrics = metricsOf(rows);
  const metric = metrics.includes(state.metric) ? state.metric : metrics[0];
  const told = names.map((name) => `${name} ${textOf(row.config[name])}`);
  return `${label}: ${[...told, metric && `${metric} ${number(metricOf(row, metric, state.by))}`].filter(Boolean).join(" · ")}`;
}

/** The directions that are assumed. */
function said(rows, metrics) {
  const of = (direction) => metrics.filter((name) => directionOf(rows, name) === direction);
  const told = [
    ["least", "Lower is better"],
    ["greatest", "Higher is better"],
    ["unclear", "No winner, because the runs disagree on what is better"],
  ];
  return told
    .map(([direction, words]) => [words, of(direction)])
    .filter(([, names]) => names.length)
    .map(([words, names]) => `${words}: ${names.join(", ")}.`)
    .join(" ");
}

function Value({ row, name, by, winners }) {
  const metric = row.metrics[name];
  if (metric === undefined) return html`<td class="number">–</td>`;
  const value = metricOf(row, name, by);
  const isBest = winners.has(row.name);
  const tie = isBest && winners.size > 1 ? ` tie of ${count(winners.size)}` : "";
  const isLost = by === "best" && typeof metric[0] === "string" && Number.isFinite(value);
  const title = [
    Number.isFinite(metric[1]) && `best ${number(metric[1])} at step ${count(metric[2])}`,
    `last ${number(metric[0])}`,
  ].filter(Boolean);
  return html`<td class="number" title=${title.join(", ")}>
    <span class=${isBest ? "best" : null}>${isBest ? "★ " : ""}${number(value)}</span>
    ${tie && html`<span class="hint">${tie}</span>`} ${isLost && html`<span class="hint"> now ${number(metric[0])}</span>`}
  </td>`;
}
