/** Tables: observers, checkpoints, the log, what the run was started with. */

import { el, setText, svg, table } from "./dom.js";
import { bytes, count, duration, moment, NONE, number, timeOfDay } from "./format.js";

const FIRST_CHECKPOINTS = 12;
const GLYPHS = {
  ok: "●",
  failing: "▲",
  disabled: "✕",
  staged: "◌",
  durable: "●",
  failed: "✕",
  deleted: "○",
  uploading: "↑",
  uploaded: "✓",
};

function byId(id) {
  return document.getElementById(id);
}

function stateMark(state, text = state) {
  return el(
    "span",
    { class: "state", "data-state": state },
    el("span", { "aria-hidden": "true", text: GLYPHS[state] ?? "·" }),
    text,
  );
}

export function fillObservers(store) {
  const rows = [...store.observers.values()].map((one) => [
    one.name,
    stateMark(one.state),
    one.queued === null || one.queued === undefined ? NONE : count(one.queued),
    one.lag_s === null || one.lag_s === undefined ? NONE : duration(one.lag_s),
    count(one.dropped),
    count(one.conflated),
    count(one.failures),
    one.error ? el("span", { class: "error", text: one.error }) : "",
  ]);
  const right = (head) => ({ head, number: true });
  const heads = [
    { head: "Name" },
    { head: "State" },
    right("Queued"),
    right("Lag"),
    right("Dropped"),
    right("Conflated"),
    right("Failures"),
    { head: "Last error" },
  ];
  byId("observers-section").hidden = !rows.length;
  const made = table("Sinks and observers", heads, rows, { hideCaption: true });
  for (const cell of made.querySelectorAll("tbody td:last-child")) cell.className = "wide";
  byId("observers").replaceChildren(made);
}

// ------------------------------------------------------------------------------------------------ checkpoints

export class Checkpoints {
  constructor() {
    this.showsAll = false;
    byId("checkpoints-more").addEventListener("click", () => {
      this.showsAll = !this.showsAll;
      this.fill(this.store);
    });
  }

  fill(store) {
    this.store = store;
    const all = [...store.checkpoints.values()].sort((a, b) => b.global_step - a.global_step || b.time - a.time);
    byId("checkpoints-section").hidden = !all.length;
    if (!all.length) return;
    byId("checkpoints-line").replaceChildren(
      timeline(all, Math.max(store.run.global_step ?? 0, store.totalSteps() ?? 0)),
    );
    const shown = this.showsAll ? all : all.slice(0, FIRST_CHECKPOINTS);
    const right = (head) => ({ head, number: true });
    const heads = [
      { head: "Checkpoint" },
      right("Step"),
      right("Epoch"),
      { head: "State" },
      { head: "Upload" },
      right("Size"),
      right("Durable after"),
      right("Loop held"),
      right("Metric"),
      { head: "Why" },
      { head: "When" },
    ];
    const rows = shown.map((one) => [
      one.name,
      count(one.global_step),
      count(one.epoch),
      stateOf(one),
      uploadOf(one),
      bytes(one.nbytes),
      duration(one.durable_s),
      duration(one.blocked_s),
      number(one.metric),
      (one.reasons ?? []).join(", "),
      el("time", { datetime: isoTime(one.time), title: moment(one.time), text: timeOfDay(one.time) }),
    ]);
    byId("checkpoints").replaceChildren(table("Checkpoints, the newest first", heads, rows, { hideCaption: true }));
    const more = byId("checkpoints-more");
    more.hidden = all.length <= FIRST_CHECKPOINTS;
    setText(more, this.showsAll ? "Show fewer" : `Show all ${count(all.length)}`);
  }
}

function stateOf(one) {
  const mark = stateMark(one.state);
  if (one.error)
    mark.append(
      el("span", {
        class: "error",
        title: one.error,
        text: one.error.length > 60 ? `${one.error.slice(0, 60)}…` : one.error,
      }),
    );
  return mark;
}

function uploadOf(one) {
  const { upload } = one;
  if (!upload) return NONE;
  if (upload.state !== "uploading") return stateMark(upload.state);
  const [done, all] = [upload.done_bytes ?? 0, upload.total_bytes || one.nbytes || 1];
  return el(
    "span",
    {},
    el("progress", { value: Math.min(1, done / all), max: 1, "aria-label": `Upload of ${one.name}` }),
    `${Math.floor((100 * done) / all)} %`,
  );
}

/** Where along the run checkpoints were taken; their shape says what has become of them. */
function timeline(all, end) {
  const width = Math.max(200, byId("checkpoints-line").clientWidth);
  const x = (step) => 14 + ((width - 28) * step) / Math.max(1, end);
  const marks = all.map((one) => {
    const label = `${one.name}, step ${count(one.global_step)}: ${one.state}${one.upload ? `, ${one.upload.state}` : ""}`;
    const at = x(one.global_step);
    const shape =
      one.state === "failed"
        ? svg("path", { class: "failed", d: `M${at - 4} 14 l8 8 m0 -8 l-8 8` })
        : svg("circle", { class: one.state, cx: at, cy: 18, r: one.state === "durable" ? 4.5 : 4 });
    const ring =
      one.upload?.state === "uploaded" ? svg("path", { class: "uploaded", d: `M${at - 4} 6 l3 3 l6 -6` }) : null;
    return svg("g", {}, svg("title", { text: label }), shape, ring);
  });
  const label = `${count(all.length)} checkpoints up to step ${count(all[0].global_step)}; the table below has each`;
  return svg(
    "svg",
    { class: "timeline", viewBox: `0 0 ${width} 46`, role: "img", "aria-label": label },
    svg("line", { class: "track", x1: 14, x2: width - 14, y1: 18, y2: 18 }),
    ...marks.reverse(),
    svg("text", { x: 14, y: 40, text: "step 0" }),
    svg("text", { x: width - 14, y: 40, "text-anchor": "end", text: `step ${count(end)}` }),
  );
}

function isoTime(time) {
  return time > 0 ? new Date(time * 1000).toISOString() : null;
}

// ----------------------------------------------------------------------------------------------------- the log

const RANK = { info: 0, warning: 1, error: 2 };
const MOST_SHOWN = 500;

export class Log {
  constructor() {
    this.box = byId("log-box");
    this.lines = byId("log-lines");
    this.level = byId("log-level");
    this.level.addEventListener("change", () => this.fill(this.store, true));
  }

  /** Adds what is new; all of it when another run is shown. */
  fill(store, isNew = this.store !== store || this.generation !== store.generation) {
    const isAtEnd = this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < 30;
    if (isNew) {
      this.lines.replaceChildren();
      this.done = 0;
      this.store = store;
      this.generation = store.generation;
    }
    const fresh = store.log.slice(-Math.min(store.log.length, store.lines - this.done)).slice(-MOST_SHOWN);
    if (store.lines > this.done) {
      const least = RANK[this.level.value];
      this.lines.append(...fresh.filter((entry) => (RANK[entry.level] ?? 0) >= least).map(lineOf));
    }
    this.done = store.lines;
    while (this.lines.childElementCount > MOST_SHOWN) this.lines.firstElementChild.remove();
    byId("log-empty").hidden = this.lines.childElementCount > 0;
    if (isAtEnd || isNew) this.box.scrollTop = this.box.scrollHeight;
  }
}

function lineOf({ time, global_step: step, level, text }) {
  const mark = level === "error" ? "error: " : level === "warning" ? "warning: " : null;
  return el(
    "li",
    { "data-level": level },
    el("time", { datetime: isoTime(time), title: moment(time), text: timeOfDay(time) }),
    el("span", { class: "step", text: `step ${count(step)}` }),
    el("span", { class: "text" }, mark ? el("b", { text: mark }) : null, text),
  );
}

// ------------------------------------------------------------------------------------------------------- about

export function fillAbout(store) {
  const value = (one) => (typeof one === "string" ? one : JSON.stringify(one));
  const sheet = (title, entries) =>
    entries.length
      ? el(
          "div",
          { class: "table-box" },
          table(
            title,
            [{ head: "Name" }, { head: "Value" }],
            entries.map(([name, one]) => [name, value(one)]),
          ),
        )
      : null;
  const { run } = store;
  const facts = [
    ["run", run.run_id],
    ["attempt", run.attempt],
    ["module", run.module],
    ["host", run.host],
    ["device", run.device],
    ["started", moment(run.started)],
  ];
  byId("about").replaceChildren(
    ...[
      sheet(
        "Run",
        facts.filter(([, one]) => one !== undefined && one !== ""),
      ),
      sheet("Hyperparameters", Object.entries(store.config)),
      sheet("Arguments", Object.entries(store.arguments)),
      sheet("Versions", Object.entries(store.versions)),
    ].filter(Boolean),
  );
}
