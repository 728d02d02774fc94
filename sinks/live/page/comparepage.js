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

  /** Poll the rows, while runs are compared. */
  async look() {
    this.#abort?.abort();
    if (!this.app.isComparing()) return;
    const abort = (this.#abort = new AbortController());
    try {
      await this.rows.ask(filterOf(this.app.chosen), abort.signal);
      this.problem = null;
    } catch (error) {
      if (abort.signal.aborted) return;
      if (error instanceof TokenWanted) this.app.askToken();
      else this.problem = `The table of runs cannot be read: ${error.message}.`;
    }
    if (!abort.signal.aborted) this.fill();
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
    const { app } = this;
    const looks = new Map(rows.map((row) => [row.name, this.#lookOf(row)]));
    const on = {
      change: (isFinal = true) => {
        this.draw();
        if (isFinal) app.keepFragment();
      },
      show: (names) => app.showRuns(names),
      board: app.board,
    };
    const view = rows.length
      ? html`<${Comparison} rows=${rows} state=${app.view.compare} lookOf=${(name) => looks.get(name)} on=${on} />`
      : null;
    contained(() => render(html`${problem && html`<p class="hint" role="status">${problem}</p>`}${view}`, this.root));
  }

  /** Name the highlighted run. */
  lit(key) {
    const root = this.root.querySelector(".lit-run");
    if (!root) return;
    const { rows } = this.#drawn;
    const row = rows.find(({ name }) => runKey(name) === key);
    setText(root, row ? inWords(row, rows, this.app.view.compare, this.#lookOf(row).label) : HINT);
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
