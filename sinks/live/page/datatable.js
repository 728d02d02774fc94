/** A logged table, which the reader can sort. */

import { compare } from "./columns.js";
import { count } from "./format.js";
import { Component, html } from "./view.js";

/** Rows that are shown before the reader asks for all. */
const FIRST_ROWS = 100;
const NUMBERS = new Map([["NaN", NaN], ["Infinity", Infinity], ["-Infinity", -Infinity]]);
const valueOf = (cell) => NUMBERS.get(cell) ?? cell;

function isTable({ columns, rows }) {
  return Array.isArray(columns) && Array.isArray(rows) && rows.every((row) => row?.length === columns.length);
}

/** `load`: returns the file as a response; `address`: identifies the file. */
export class DataTable extends Component {
  state = { table: null, problem: null, by: null, sign: 1, isWhole: false };

  componentDidMount() {
    this.follow();
  }

  componentDidUpdate() {
    this.follow();
  }

  componentWillUnmount() {
    this.wanted = null;
  }

  async follow() {
    const { address, load } = this.props;
    if (this.wanted === address) return;
    this.wanted = address;
    let [table, problem] = [null, null];
    try {
      table = await (await load()).json();
      if (!isTable(table)) throw new Error("its file is not a table");
    } catch (error) {
      [table, problem] = [null, `This table cannot be shown: ${error.message}`];
    }
    if (this.wanted === address) this.setState({ table, problem });
  }

  sort(by) {
    this.setState((state) => ({ by, sign: state.by === by ? -state.sign : 1 }));
  }

  render({ label }, { table, problem, by, sign, isWhole }) {
    if (!table) return html`<p class="empty">${problem ?? "Loading…"}</p>`;
    const { columns, rows, cut } = table;
    const sorted = by === null ? rows : [...rows].sort((a, b) => compare(valueOf(a[by]), valueOf(b[by]), sign < 0));
    const shown = isWhole ? sorted : sorted.slice(0, FIRST_ROWS);
    const isNumber = columns.map((_, at) => rows.some((row) => typeof row[at] === "number"));
    const order = (at) => (by === at ? (sign > 0 ? "ascending" : "descending") : "none");
    return html`
      <div class="table-box" tabindex="0" role="region" aria-label=${label}>
        <table>
          <caption class="visually-hidden">${label}</caption>
          <thead><tr>${columns.map((name, at) => html`<th key=${at} scope="col" class=${isNumber[at] ? "number" : null} aria-sort=${order(at)}>
            <button type="button" class="sort" onClick=${() => this.sort(at)}>${String(name)}<span aria-hidden="true">${by === at ? (sign > 0 ? " ↑" : " ↓") : ""}</span></button>
          </th>`)}</tr></thead>
          <tbody>${shown.map((row, place) => html`<tr key=${place}>${row.map((cell, at) => html`<td key=${at} class=${isNumber[at] ? "number" : null}>${cell === null ? "–" : String(cell)}</td>`)}</tr>`)}</tbody>
        </table>
      </div>
      ${cut && html`<p class="hint">The table has ${String(cut)}.</p>`}
      ${shown.length < rows.length && html`<button type="button" class="quiet" onClick=${() => this.setState({ isWhole: true })}>Show all ${count(rows.length)} rows</button>`}`;
  }
}
