/** The rows of `GET /api/table`, or those that a report has; kept current by small answers. */

import { get, report } from "./connection.js";

/** The server refused a filter; the message is its reason. */
export class FilterRefused extends Error {}

export class Rows {
  all = report ? (report.table ?? []) : null; // null before the first answer
  /** Of the last answer; `names` are those of all metrics where there are too many to be sent. */
  answer = { total: this.all?.length ?? 0, notes: false, isBehind: false, leftOut: 0, now: Date.now() / 1000, at: performance.now() };

  #where = null; // the filter that `all` fulfil
  #metrics = []; // those that were asked for because there are too many
  #cursor = null;
  #etag = null;

  /** Whether `all` fulfil a filter, and have the values of some metrics. */
  has(where, metrics = []) {
    return where === this.#where && (!this.answer.names || metrics.every((name) => this.#metrics.includes(name)));
  }

  /**
   * Ask for the rows that fulfil a filter. Throws `FilterRefused`, or as `get` does.
   * `metrics`: those that are shown, in case there are too many.
   */
  async ask(where, signal, metrics = []) {
    if (report) return;
    const wanted = this.answer.names ? metrics : [];
    const isSame = where === this.#where && String(wanted) === String(this.#metrics);
    const query = new URLSearchParams();
    if (where) query.set("filter", where);
    for (const name of wanted) query.append("metric", name);
    if (isSame) query.set("since", this.#cursor);
    const headers = isSame && this.#etag ? { "If-None-Match": this.#etag } : {};
    const response = await get(`api/table?${query}`, { headers, signal, any: true });
    if (response.status === 304) return;
    const answer = await response.json().catch(() => ({}));
    if (response.status === 400) {
      this.#where = null;
      throw new FilterRefused(answer.error);
    }
    if (!response.ok) throw new Error(answer.error ?? `the server answered ${response.status}`);
    const known = new Map(isSame ? this.all.map((row) => [row.name, row]) : []);
    for (const row of answer.rows) known.set(row.name, row);
    const names = answer.names ?? answer.rows.map((row) => row.name);
    if (!names.every((name) => known.has(name))) {
      this.#where = null; // a run fulfils the filter although it has not changed
      await this.ask(where, signal, metrics);
      return;
    }
    this.#where = where;
    this.#metrics = wanted;
    this.#cursor = answer.cursor;
    this.#etag = response.headers.get("ETag");
    const isKnown = String(answer.metric_names) === String(this.answer.names);
    this.answer = {
      total: answer.total,
      notes: answer.notes,
      isBehind: answer.is_behind,
      leftOut: answer.left_out ?? 0,
      names: isKnown ? this.answer.names : answer.metric_names,
      now: answer.now,
      at: performance.now(),
    };
    this.all = names.map((name) => known.get(name));
    if (!this.has(where, metrics)) await this.ask(where, signal, metrics);
  }

  /** Replace what is noted about a run, until the next answer has it. */
  note(name, notes) {
    this.all = this.all.map((row) => (row.name === name ? { ...row, notes, label: notes.name || row.name } : row));
  }

  /** Unix seconds by the server's clock; in a report, the time of its newest event. */
  get now() {
    if (report) return this.all.reduce((latest, row) => Math.max(latest, row.updated ?? 0), 0);
    return this.answer.now + (performance.now() - this.answer.at) / 1000;
  }
}
