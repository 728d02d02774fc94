/** The comparison of the runs in the charts: polls their rows, and draws them again after a change. */

import { runKey } from "./charts.js";
import { Comparison, HINT, inWords } from "./compare.js";
import { TokenWanted } from "./connection.js";
import { contained, setText } from "./dom.js";
import { labelOf } from "./names.js";
import { Rows } from "./rows.js";
import { colours } from "./theme.js";
import { html, render } from "./view.js";

/** Maximum characters of a filter for the runs by name; more of them are found among all rows. */
const MOST_CHARS = 2000;

export class ComparePage {
  constructor(app) {
    this.app = app;
    this.section = document.getElementById("compare-section");
    this.root = document.getElementById("compare");
    this.rows = new Rows();
    this.problem = null;
  }

  #abort = null;
  #drawn = null;
  #shown = []; // the rows of the comparison in sight

  /** Poll the rows, while runs are compared. */
  async look() {
    this.#abort?.abort();
    if (!this.app.isComparing()) return;
    const abort = (this.#abort = new AbortController());
    try {
      await this.rows.ask(filterOf(this.app.chosen), abort.signal, this.#wanted);
      this.problem = null;
    } catch (error) {
      if (abort.signal.aborted) return;
      if (error instanceof TokenWanted) this.app.askToken();
      else this.problem = `The table of runs cannot be read: ${error.message}.`;
    }
    if (!abort.signal.aborted) this.fill();
  }

  /** The reader's metric, which the rows of a very large table may lack. */
  get #wanted() {
    const { metric } = this.app.view.compare;
    return metric ? [metric] : [];
  }

  /** Follow the page's choice of runs. */
  follow() {
    const chosen = new Set(this.app.chosen);
    const isThere = this.rows.all?.filter((row) => chosen.has(row.name)).length === chosen.size;
    if (this.app.isComparing() && !isThere) this.look();
    this.fill();
  }

  /** Draw the rows of the chosen runs, if anything has changed. */
  fill() {
    const { app } = this;
    this.section.hidden = !app.isComparing();
    if (this.section.hidden || document.hidden) return;
    const byName = new Map((this.rows.all ?? []).map((row) => [row.name, row]));
    const rows = app.chosen.map((name) => byName.get(name)).filter(Boolean);
    const looks = new Map(rows.map((row) => [row.name, this.#lookOf(row)]));
    const state = { rows, looks: [...looks.values()], problem: this.problem, theme: colours() };
    const isNew = !this.#drawn || state.rows.length !== this.#drawn.rows.length || rows.some((row, at) => row !== this.#drawn.rows[at]);
    const key = JSON.stringify([state.looks, state.problem]);
    if (!isNew && key === this.#drawn.key && state.theme === this.#drawn.theme) return;
    this.#drawn = { ...state, key };
    this.draw();
  }

  draw() {
    const { rows, problem } = this.#drawn;
    const change = (isFinal = true) => {
      this.draw();
      if (!isFinal) return;
      this.app.keepFragment();
      if (!this.rows.has(filterOf(this.app.chosen), this.#wanted)) this.look();
    };
    const view = rows.length ? this.#viewOf(rows, this.rows.answer.names ?? [], change) : null;
    contained(() => render(html`${problem && html`<p class="hint" role="status">${problem}</p>`}${view}`, this.root));
  }

  /** The comparison of all runs that the table shows, folded until the reader opens it. The others: as of `Comparison`. */
  ofTable(rows, names, change) {
    const state = this.app.view.compare;
    const toggle = ({ target }) => {
      if (target.open === state.isOpen) return;
      state.isOpen = target.open;
      change();
    };
    return html`<details class="all" open=${state.isOpen} onToggle=${toggle}>
      <summary><h2>Comparison of these runs</h2></summary>
      ${state.isOpen && this.#viewOf(rows, names, change)}
    </details>`;
  }

  #viewOf(rows, names, change) {
    this.#shown = rows;
    const { app } = this;
    const looks = new Map(rows.map((row) => [row.name, this.#lookOf(row)]));
    const on = { change, show: (names) => app.showRuns(names), board: app.board };
    return html`<div class="comparison">
      <${Comparison} rows=${rows} known=${names} state=${app.view.compare} lookOf=${(name) => looks.get(name)} on=${on} />
    </div>`;
  }

  /** Name the highlighted run. */
  lit(key) {
    const row = this.#shown.find(({ name }) => runKey(name) === key);
    for (const root of document.querySelectorAll(".lit-run"))
      setText(root, row ? inWords(row, this.#shown, this.app.view.compare, this.#lookOf(row).label) : HINT);
  }

  #lookOf(row) {
    const one = this.app.open.get(row.name);
    const { colour, label } = one ? this.app.lookOf(one) : { colour: colours().run[0], label: labelOf(row.name) };
    return { colour, label, href: this.app.fragment([row.name], false), isHidden: this.app.view.hidden.has(runKey(row.name)) };
  }
}

/** A filter of the table for some runs: a regular expression on their names; empty for all runs. */
function filterOf(names) {
  // A comparison would make it a condition, so its characters are written by their codes.
  const escaped = names.map((name) =>
    name.replace(/[^\p{L}\p{N}_ -]/gu, (one) => `\\U${one.codePointAt(0).toString(16).padStart(8, "0")}`),
  );
  const filter = `^(?:${escaped.join("|")})$`;
  return filter.length <= MOST_CHARS ? filter : "";
}
