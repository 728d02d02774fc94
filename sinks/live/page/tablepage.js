/** The run table on the page: polls its rows, and changes what people note about runs. */

import { metricsOf } from "./columns.js";
import { addressOf, get, report, TokenWanted } from "./connection.js";
import { announce } from "./dom.js";
import { count } from "./format.js";
import { matcher } from "./match.js";
import { learnNames } from "./names.js";
import { RunTable } from "./table.js";
import { html, render } from "./view.js";

/** Time between polls: at least this, and so many times the answer took, so that a busy server is asked less often... */
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
    this.rows = report ? (report.table ?? []) : null; // null before the first answer
    this.total = this.rows?.length ?? 0;
    if (report) learnNames(this.#named());
    addEventListener("keydown", (event) => {
      if (!event.altKey || event.ctrlKey || event.metaKey || event.code !== "KeyT") return;
      event.preventDefault();
      if (!document.querySelector("dialog[open]")) this.open(!this.choices.isOpen);
    });
  }

  #cursor = null; // of the last answer, to `#where`
  #etag = null;
  #where = null;
  #clock = { now: Date.now() / 1000, at: performance.now() };
  #takesNotes = false;
  #isBehind = false;
  #took = 0;
  #metricNames = undefined; // of a table that has too many to be sent
  #metrics = []; // those of the last answer
  #leftOut = 0;
  #lost = null; // why no answer arrives
  #refusal = null; // why the filter cannot be read
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
    try {
      await this.#ask(this.choices.where.trim(), abort.signal);
      this.#lost = null;
    } catch (error) {
      if (abort.signal.aborted) return;
      if (error instanceof TokenWanted) this.app.askToken();
      else this.#lost = `${error.message}; the page keeps retrying.`;
    }
    if (abort.signal.aborted || !this.choices.isOpen) return;
    this.draw();
    const took = performance.now() - began;
    const usual = Math.min(took, this.#took); // the first answer, and one behind another reader's, take longer
    this.#took = took;
    const wait = this.#isBehind ? 0 : Math.min(MOST_MS, Math.max(POLL_MS, TIMES * usual));
    this.#timer = setTimeout(() => this.look(), document.hidden ? 10 * wait + POLL_MS : wait);
  }

  async #ask(where, signal) {
    const metrics = this.#metricNames ? this.#shownMetrics() : [];
    const isSame = where === this.#where && this.rows !== null && String(metrics) === String(this.#metrics);
    const query = new URLSearchParams();
    if (where) query.set("filter", where);
    for (const name of metrics) query.append("metric", name);
    if (isSame) query.set("since", this.#cursor);
    const headers = isSame && this.#etag ? { "If-None-Match": this.#etag } : {};
    const response = await get(`api/table?${query}`, { headers, signal, any: true });
    if (response.status === 304) return;
    const answer = await response.json();
    if (response.status === 400) {
      this.#refusal = answer.error;
      this.#etag = null;
      return;
    }
    if (!response.ok) throw new Error(answer.error ?? `the server answered ${response.status}`);
    this.#refusal = null;
    this.#etag = response.headers.get("ETag");
    this.#cursor = answer.cursor;
    this.#clock = { now: answer.now, at: performance.now() };
    this.#takesNotes = answer.notes;
    this.#isBehind = answer.is_behind;
    this.#leftOut = answer.left_out ?? 0;
    if (String(answer.metric_names) !== String(this.#metricNames)) this.#metricNames = answer.metric_names;
    this.total = answer.total;
    const known = new Map(isSame ? this.rows.map((row) => [row.name, row]) : []);
    for (const row of answer.rows) known.set(row.name, row);
    const names = answer.names ?? answer.rows.map((row) => row.name);
    if (names.every((name) => known.has(name))) {
      this.#where = where;
      this.#metrics = metrics;
      this.rows = names.map((name) => known.get(name));
      this.learn();
      if (this.#hasMetrics()) return;
      await this.#ask(where, signal);
      return;
    }
    this.#where = null; // a run fulfils the filter although it has not changed: such as one that waits
    await this.#ask(where, signal);
  }

  learn() {
    if (learnNames(this.#named())) this.app.renamed();
  }

  #named() {
    return (this.rows ?? []).map(({ name, label, notes }) => ({ run_id: name, label, colour: notes.colour }));
  }

  /** Change what people noted about a run. Throws an `Error` with the reason of a refusal. */
  async note(name, change) {
    const headers = { "Content-Type": "application/json" };
    const body = JSON.stringify(change);
    const response = await get(addressOf(name, "/notes"), { method: "POST", body, headers, any: true });
    const answer = await response.json().catch(() => ({}));
    if (!response.ok) throw new Error(answer.error ?? `the server answered ${response.status}`);
    this.rows = this.rows.map((row) => (row.name === name ? { ...row, notes: answer, label: answer.name || row.name } : row));
    this.learn();
    this.draw();
    announce(`Saved what is noted about ${answer.name || name}`);
  }

  #shownMetrics() {
    return metricsOf([...(this.choices.columns ?? []), ...(this.choices.sort ?? [])]);
  }

  #hasMetrics() {
    return !this.#metricNames || this.#shownMetrics().every((name) => this.#metrics.includes(name));
  }

  /** The reader has changed a choice. */
  #changed() {
    history.replaceState(null, "", this.app.fragment());
    if (report) {
      this.draw();
      return;
    }
    if (this.choices.where.trim() === this.#where && !this.#refusal && this.#hasMetrics()) return;
    clearTimeout(this.#typing);
    this.#typing = setTimeout(() => this.choices.isOpen && this.look(), TYPING_MS);
  }

  #hint() {
    if (this.#isBehind) return "The server is still reading runs, so some are missing.";
    return this.#leftOut ? `The last ${count(this.#leftOut)} hyperparameters of a run are left out: there are too many.` : null;
  }

  draw() {
    if (!this.choices.isOpen) return;
    let { rows } = this;
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
      note: this.#takesNotes ? (name, change) => this.note(name, change) : null,
    };
    const { now, at } = this.#clock;
    const time = report ? Math.max(0, ...rows.map((row) => row.updated ?? 0)) : now + (performance.now() - at) / 1000;
    render(
      html`<${RunTable}
        rows=${rows}
        names=${this.#metricNames}
        now=${time}
        choices=${this.choices}
        total=${this.total}
        problem=${problem}
        hint=${hint}
        on=${on}
      />`,
      this.root,
    );
  }
}
