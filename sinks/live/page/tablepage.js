/** The run table on the page: polls its rows, and changes what people note about runs. */

import { metricsIn } from "./columns.js";
import { addressOf, get, report, TokenWanted } from "./connection.js";
import { announce } from "./dom.js";
import { count } from "./format.js";
import { matcher } from "./match.js";
import { learnNames } from "./names.js";
import { FilterRefused, Rows } from "./rows.js";
import { RunTable } from "./table.js";
import { html, render } from "./view.js";

/** Time between polls: at least this, and this multiple of the time of an answer, so that a busy server is asked less often... */
const POLL_MS = 2000;
const TIMES = 4;
/** ...and at most this. */
const MOST_MS = 15000;
/** Time without another key after which a filter is sent. */
const TYPING_MS = 250;

export class TablePage {
  constructor(app) {
    this.app = app;
    this.root = document.getElementById("table");
    this.rows = new Rows();
    if (report) learnNames(this.#named());
    addEventListener("keydown", (event) => {
      if (!event.altKey || event.ctrlKey || event.metaKey || event.code !== "KeyT") return;
      event.preventDefault();
      if (!document.querySelector("dialog[open]")) this.open(!this.choices.isOpen);
    });
  }

  #lost = null; // why no answer arrives
  #refusal = null; // why the filter cannot be read
  #isAsking = false;
  #took = 0;
  #timer = null;
  #typing = null;
  #abort = null;

  get choices() {
    return this.app.view.table;
  }

  /** Open or close the table, as a new entry of the browser's history. */
  open(isOpen) {
    this.choices.isOpen = isOpen;
    history.pushState(null, "", this.app.fragment());
    this.app.follow();
    document.getElementById("main").focus();
    announce(isOpen ? "The table of runs" : "The charts");
  }

  /** Follow the page's address: show or hide the table, and poll while it is shown. */
  follow() {
    const { isOpen } = this.choices;
    this.root.hidden = !isOpen;
    clearTimeout(this.#timer);
    if (!isOpen) {
      this.#abort?.abort();
      return;
    }
    this.learn();
    this.draw();
    if (!report) this.look();
  }

  /** Poll the rows. */
  async look() {
    clearTimeout(this.#timer);
    this.#abort?.abort();
    const abort = (this.#abort = new AbortController());
    const began = performance.now();
    this.#isAsking = true;
    try {
      await this.rows.ask(this.choices.where.trim(), abort.signal, this.#shownMetrics());
      this.#lost = this.#refusal = null;
      this.learn();
    } catch (error) {
      if (abort.signal.aborted) return;
      if (error instanceof TokenWanted) this.app.askToken();
      else if (error instanceof FilterRefused) this.#refusal = error.message;
      else this.#lost = `${error.message}; the page keeps retrying.`;
    }
    if (abort.signal.aborted) return;
    this.#isAsking = false;
    if (!this.choices.isOpen) return;
    this.draw();
    const took = performance.now() - began;
    const usual = Math.min(took, this.#took); // the first answer, and one behind another reader's, take longer
    this.#took = took;
    const isBehind = this.rows.answer.isBehind && !this.#lost && !this.#refusal; // each request makes the server read more
    const wait = isBehind ? 0 : Math.min(MOST_MS, Math.max(POLL_MS, TIMES * usual));
    this.#timer = setTimeout(() => this.look(), document.hidden ? 10 * wait + POLL_MS : wait);
  }

  learn() {
    if (learnNames(this.#named())) this.app.renamed();
  }

  #named() {
    return (this.rows.all ?? []).map(({ name, label, notes }) => ({ run_id: name, label, colour: notes.colour }));
  }

  /** Change what people noted about a run. Throws an `Error` with the reason of a refusal. */
  async note(name, change) {
    const headers = { "Content-Type": "application/json" };
    const body = JSON.stringify(change);
    const response = await get(addressOf(name, "/notes"), { method: "POST", body, headers, any: true });
    const answer = await response.json().catch(() => ({}));
    if (!response.ok) throw new Error(answer.error ?? `the server answered ${response.status}`);
    this.rows.note(name, answer);
    this.learn();
    this.draw();
    announce(`Saved what is noted about ${answer.name || name}`);
  }

  #shownMetrics() {
    const shown = metricsIn([...(this.choices.columns ?? []), ...(this.choices.sort ?? [])]);
    const { isOpen, metric } = this.app.view.compare;
    return isOpen && metric ? [...shown, metric] : shown;
  }

  /** The reader has changed a choice. */
  #changed() {
    history.replaceState(null, "", this.app.fragment());
    this.draw();
    if (report) return;
    clearTimeout(this.#typing);
    if (!this.#isAsking && this.rows.has(this.choices.where.trim(), this.#shownMetrics())) return;
    this.#typing = setTimeout(() => this.choices.isOpen && this.look(), TYPING_MS);
  }

  #hint() {
    const { isBehind, leftOut } = this.rows.answer;
    if (isBehind) return "The server is still reading runs, so some are missing.";
    return leftOut ? `The last ${count(leftOut)} hyperparameters of a run are left out: there are too many.` : null;
  }

  draw() {
    if (!this.choices.isOpen) return;
    let { all: rows } = this.rows;
    let problem = this.#refusal;
    const hint = this.#lost ?? this.#hint();
    if (rows === null) {
      render(html`<p class="hint" role="status">${hint ?? problem ?? "Loading the table of runs."}</p>`, this.root);
      return;
    }
    if (report && this.choices.where) {
      const found = matcher(this.choices.where);
      rows = rows.filter((row) => found.matches(row.name) || found.matches(row.label));
      problem = found.problem;
    }
    const on = {
      change: () => this.#changed(),
      hrefOf: (name) => this.app.fragment([name], false),
      compare: (names) => this.app.showRuns(names),
      note: this.rows.answer.notes ? (name, change) => this.note(name, change) : null,
    };
    const { answer, now } = this.rows;
    const compared = rows.filter((row) => !this.choices.hidden.has(row.name));
    const change = (isFinal = true) => (isFinal ? this.#changed() : this.draw());
    render(
      html`<${RunTable}
        rows=${rows}
        names=${answer.names}
        now=${now}
        choices=${this.choices}
        total=${answer.total}
        problem=${problem}
        hint=${hint}
        on=${on}
      />
        ${compared.length > 0 && this.app.comparePage.ofTable(compared, answer.names ?? [], change)}`,
      this.root,
    );
  }
}
