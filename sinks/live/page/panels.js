/** Tables: ranks, observers, problems, checkpoints, the log, arguments and versions. */

import { toast } from "./controls.js";
import { el, reconcile, setText, svg, table } from "./dom.js";
import { bytes, count, duration, isTime, moment, NONE, number, timeOfDay } from "./format.js";
import { labelOf } from "./names.js";

const FIRST_CHECKPOINTS = 12;
const MOST_RANKS = 32;
const GLYPHS = new Map([
  ["ok", "●"],
  ["failing", "▲"],
  ["disabled", "✕"],
  ["slow", "▲"],
  ["staged", "◌"],
  ["durable", "●"],
  ["failed", "✕"],
  ["deleted", "○"],
  ["uploading", "↑"],
  ["uploaded", "✓"],
]);

function byId(id) {
  return document.getElementById(id);
}

function stateMark(state, text = state) {
  return el(
    "span",
    { class: "state", "data-state": state },
    el("span", { "aria-hidden": "true", text: GLYPHS.get(state) ?? "·" }),
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

// ------------------------------------------------------------------------------------------------------- ranks

/** The ranks of the run; of many the slowest. */
export function fillRanks(store) {
  const all = [...store.ranks.values()].sort((a, b) => a.rank - b.rank);
  byId("ranks-section").hidden = !all.length;
  const bySlowness = [...all].sort((a, b) => (b.before_exchange_s ?? -1) - (a.before_exchange_s ?? -1));
  const slowest = all.length > 1 && Number.isFinite(bySlowness[0].before_exchange_s) ? bySlowness[0] : null;
  const shown = all.length > MOST_RANKS ? bySlowness.slice(0, MOST_RANKS) : all;
  setText(byId("ranks-count"), all.length > shown.length ? `the slowest ${MOST_RANKS} of ${count(all.length)}` : "");
  const markOf = (one) => {
    if (one.is_slow) return stateMark("slow", "holds up the others");
    return one === slowest ? "slowest" : "";
  };
  const right = (head) => ({ head, number: true });
  const onDevice = shown.some((one) => Number.isFinite(one.device_memory_bytes));
  const heads = [
    right("Rank"),
    { head: "Host" },
    { head: "Phase" },
    right("Step"),
    right("Before exchange"),
    right("Waiting for data"),
    right("Memory"),
    ...(onDevice ? [right("Device memory")] : []),
    { head: "Pace" },
  ];
  const rows = shown.map((one) => [
    count(one.rank),
    one.host,
    one.phase,
    duration(one.step_s),
    duration(one.before_exchange_s),
    duration(one.data_s),
    bytes(one.memory_bytes),
    ...(onDevice ? [bytes(one.device_memory_bytes)] : []),
    markOf(one),
  ]);
  byId("ranks").replaceChildren(table("Ranks", heads, rows, { hideCaption: true }));
  setText(byId("ranks-metrics"), sentenceOfMetrics(all));
}

/** What the ranks have logged in training; the curves are of rank 0. */
function sentenceOfMetrics(ranks) {
  const values = new Map();
  for (const one of ranks)
    for (const [name, value] of Object.entries(one.metrics ?? {}))
      if (Number.isFinite(value)) values.set(name, [...(values.get(name) ?? []), value]);
  if (!values.size) return "";
  const mean = (all) => all.reduce((sum, value) => sum + value, 0) / all.length;
  const shown = [...values].map(([name, all]) => `${name} ${number(mean(all))}`);
  return `Curves of numbers logged in training steps show rank 0's part of each batch. Means over all ranks lately: ${shown.join(", ")}`;
}

// ---------------------------------------------------------------------------------------------------- problems

const unhealthy = new Map();
/** The problems of all runs that are shown, and the traceback of those that failed. */
export function fillProblems(app) {
  const runs = app.shownRuns().filter(({ store }) => store.isLoaded && store.run.problems?.length);
  const failureOf = (store) =>
    store.run.status === "running" ? null : store.log.findLast((entry) => entry.kind === "RunEnded" && entry.detail);
  const keyOf = ({ store }) =>
    JSON.stringify([labelOf(store.runId), app.isComparing(), store.run.problems, failureOf(store)?.seq ?? null]);
  const byKey = new Map(runs.map((one) => [keyOf(one), one.store]));
  byId("problems-section").hidden = !runs.length;
  reconcile(byId("problems"), unhealthy, [...byKey.keys()], (key) => {
    const store = byKey.get(key);
    const failure = failureOf(store);
    return el(
      "div",
      {},
      app.isComparing() ? el("h3", { text: labelOf(store.runId) }) : null,
      el("ul", {}, ...store.run.problems.map((text) => el("li", { text }))),
      failure ? traceback(failure.detail, `Traceback of ${labelOf(store.runId)}`) : null,
    );
  });
}

/** A traceback, folded, that can be copied. */
function traceback(text, label) {
  const shown = el("pre", { tabindex: "0", role: "region", "aria-label": label, text });
  const copy = el("button", {
    type: "button",
    class: "quiet",
    "aria-label": `Copy: ${label}`,
    text: "Copy",
    onclick: () => copyText(text, shown),
  });
  return el("details", { class: "traceback" }, el("summary", { text: "Traceback" }), copy, shown);
}

/** Copy a text, which `shown` contains. */
export async function copyText(text, shown) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A page without TLS from another machine has no clipboard API: the older call copies the selection.
    getSelection().selectAllChildren(shown);
    if (!document.execCommand("copy")) {
      toast("The browser does not allow copying; the text is selected");
      return;
    }
  }
  toast("Copied");
}

// ------------------------------------------------------------------------------------------------ checkpoints

/** Whether the process of a run has died, as far as its folder shows. */
function isOver({ status }) {
  return status === "lost" || status === "damaged";
}

/** The best existing checkpoint of a run, by its own metric and mode; undefined without such a metric. */
function bestCheckpoint(all, { best, best_mode: mode }) {
  const sign = mode === "max" ? -1 : 1;
  const isThere = (one) =>
    !one.superseded &&
    (one.state === "durable" || (one.state === "deleted" && one.upload?.state === "uploaded"));
  const able = best ? all.filter((one) => isThere(one) && Number.isFinite(one.metric)) : [];
  return able.sort((a, b) => sign * (a.metric - b.metric) || a.global_step - b.global_step)[0];
}

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
      timeline(all, Math.max(store.run.global_step ?? 0, store.totalSteps() ?? 0), isOver(store.run)),
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
    const best = bestCheckpoint(all, store.run);
    const isLost = isOver(store.run); // no process writes or uploads any more
    const rows = shown.map((one) => [
      one.name,
      count(one.global_step),
      count(one.epoch),
      stateOf(one, isLost),
      uploadOf(one, isLost),
      bytes(one.nbytes),
      duration(one.durable_s),
      duration(one.blocked_s),
      one === best ? el("span", { class: "best", text: `★ ${number(one.metric)}` }) : number(one.metric),
      (one.reasons ?? []).join(", "),
      el("time", { datetime: isoTime(one.time), title: moment(one.time), text: timeOfDay(one.time) }),
    ]);
    byId("checkpoints").replaceChildren(table("Checkpoints, newest first (★ best existing one)", heads, rows, { hideCaption: true }));
    const more = byId("checkpoints-more");
    more.hidden = all.length <= FIRST_CHECKPOINTS;
    setText(more, this.showsAll ? "Show fewer" : `Show all ${count(all.length)}`);
  }
}

/** The state of a checkpoint on the run's own disk, in words. */
function wordOf(one, isLost) {
  if (one.state === "staged" && isLost) return "never durable";
  return one.state === "deleted" && one.upload ? "deleted here" : one.state;
}

/** The state of a checkpoint in the store, in words; null if its upload never started. */
function uploadWordOf(one, isLost) {
  const isDeleted = one.state === "deleted";
  switch (one.upload?.state) {
    case undefined:
      return null;
    case "uploaded":
      return isDeleted ? "still in the store" : "uploaded";
    case "deleted":
      return isDeleted ? "deleted there too" : "deleted there";
    case "uploading":
      return isLost ? "unfinished" : "uploading";
    default:
      return one.upload.state;
  }
}

function stateOf(one, isLost) {
  const mark = stateMark(one.state === "staged" && isLost ? "failed" : one.state, wordOf(one, isLost));
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

function uploadOf(one, isLost) {
  const { upload } = one;
  const word = uploadWordOf(one, isLost);
  if (!upload) return NONE;
  if (word !== "uploading") return stateMark(word === "unfinished" ? "failed" : upload.state, word);
  const [done, all] = [upload.done_bytes ?? 0, upload.total_bytes || one.nbytes || 1];
  return el(
    "span",
    {},
    el("progress", { value: Math.min(1, done / all), max: 1, "aria-label": `Upload of ${one.name}` }),
    `${Math.floor((100 * done) / all)} %`,
  );
}

/** A timeline of checkpoints; their shape shows their state. */
function timeline(all, end, isLost) {
  const width = Math.max(200, byId("checkpoints-line").clientWidth);
  const x = (step) => 14 + ((width - 28) * step) / Math.max(1, end);
  const marks = all.map((one) => {
    const words = [wordOf(one, isLost), uploadWordOf(one, isLost)].filter(Boolean).join(", ");
    const label = `${one.name}, step ${count(one.global_step)}: ${words}`;
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
  return isTime(time) ? new Date(time * 1000).toISOString() : null;
}

// ----------------------------------------------------------------------------------------------------- the log

const RANK = new Map([
  ["info", 0],
  ["warning", 1],
  ["error", 2],
]);
const MOST_SHOWN = 500;

export class Log {
  constructor() {
    this.box = byId("log-box");
    this.lines = byId("log-lines");
    this.level = byId("log-level");
    this.level.addEventListener("change", () => this.fill(this.store, true));
  }

  /** Add the new lines; all lines if another run is shown now. */
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
      const least = RANK.get(this.level.value);
      this.lines.append(...fresh.filter((entry) => (RANK.get(entry.level) ?? 0) >= least).map(lineOf));
    }
    this.done = store.lines;
    while (this.lines.childElementCount > MOST_SHOWN) this.lines.firstElementChild.remove();
    byId("log-empty").hidden = this.lines.childElementCount > 0;
    if (isAtEnd || isNew) this.box.scrollTop = this.box.scrollHeight;
  }
}

function lineOf({ time, global_step: step, level, text, detail }) {
  const mark = level === "error" ? "error: " : level === "warning" ? "warning: " : null;
  const rest = mark && text.startsWith(mark) ? text.slice(mark.length) : text; // many lines start with the word
  return el(
    "li",
    { "data-level": level },
    el("time", { datetime: isoTime(time), title: moment(time), text: timeOfDay(time) }),
    el("span", { class: "step", text: `step ${count(step)}` }),
    el("span", { class: "text" }, mark ? el("b", { text: mark }) : null, rest),
    detail ? traceback(detail, `Traceback at step ${count(step)}`) : null,
  );
}

// ------------------------------------------------------------------------------------------------------- about

const CHANGES = { true: ", with changes", null: ", changes unknown" };

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
    ["command line", run.command_line],
    ["git commit", run.git_commit && `${run.git_commit}${CHANGES[run.git_dirty] ?? ""}`],
  ];
  byId("about").replaceChildren(
    ...[
      sheet(
        "Run",
        facts.filter(([, one]) => one !== undefined && one !== null && one !== ""),
      ),
      sheet("Hyperparameters", Object.entries(store.config)),
      sheet("Arguments", Object.entries(store.arguments)),
      sheet("Versions", Object.entries(store.versions)),
    ].filter(Boolean),
  );
}
