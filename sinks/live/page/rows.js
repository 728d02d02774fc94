/** The rows of `GET /api/table`, or those that a report has; kept current by small answers. */

import { get, report } from "./connection.js";

/** The server refused a filter; the message is its reason. */
export class FilterRefused extends Error {}

export class Rows {
  all = report ? (report.table ?? []) : null; // null before the first answer
  answer = { total: this.all?.length ?? 0, notes: false, now: Date.now() / 1000, at: performance.now() }; // the last one's

  #where = null; // the filter that `all` fulfil
  #cursor = null;
  #etag = null;

  /** Ask for the rows that fulfil a filter; returns whether there is news. Throws `FilterRefused`, or as `get` does. */
  async ask(where, signal) {
    if (report) return false;
    const isSame = where === this.#where;
    const query = new URLSearchParams();
    if (where) query.set("filter", where);
    if (isSame) query.set("since", this.#cursor);
    const headers = isSame && this.#etag ? { "If-None-Match": this.#etag } : {};
    const response = await get(`api/table?${query}`, { headers, signal, any: true });
    if (response.status === 304) return false;
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
      return this.ask(where, signal);
    }
    this.#where = where;
    this.#cursor = answer.cursor;
    this.#etag = response.headers.get("ETag");
    this.answer = { total: answer.total, notes: answer.notes, now: answer.now, at: performance.now() };
    this.all = names.map((name) => known.get(name));
    return true;
  }
}
