/** The reader's choices about charts: those that the address keeps, and those that the browser keeps. */

import { CompareState } from "./comparestate.js";
import { TableState } from "./tablestate.js";

/** A choice that holds for all charts or for one: `log=1&log=on:training/Learning rate&log=off:training/Loss`. */
class Choice {
  all = false;
  own = new Map(); // key of a chart -> true or false

  of(key, byDefault = this.all) {
    return this.own.get(key) ?? byDefault;
  }

  read(values) {
    this.all = values.includes("1");
    this.own = new Map();
    for (const value of values) {
      const [, word, key] = /^(on|off):(.+)$/.exec(value) ?? [];
      if (key) this.own.set(key, word === "on");
    }
  }

  values() {
    const own = [...this.own].map(([key, isOn]) => `${isOn ? "on" : "off"}:${key}`);
    return this.all ? ["1", ...own] : own;
  }
}

export const AXES = ["step", "epoch", "time", "clock"];

/** The part of the page's address after the names of the runs. */
export class View {
  log = new Choice(); // for all charts: those of losses
  robust = new Choice();
  smoothing = 0;
  x = "step";
  axis = "step"; // `x`, or steps while the number of steps in an epoch is unknown
  filter = "";
  folded = new Set(); // prefixes of metrics
  hidden = new Set(); // curves
  zoom = null; // [from, to], in units of the axis
  at = null; // step of media and histograms; null: the newest
  isLogCount = false; // of histograms
  bars = new Set(); // names of histograms that are shown at one step
  strips = new Set(); // keys of panels that show the images of all steps
  table = new TableState();
  compare = new CompareState();

  read(wanted) {
    this.table.read(wanted);
    this.compare.read(wanted);
    this.log.read(wanted.getAll("log"));
    this.robust.read(wanted.getAll("robust"));
    const smoothing = Number(wanted.get("smooth"));
    this.smoothing = smoothing > 0 && smoothing < 1 ? smoothing : 0;
    this.x = AXES.includes(wanted.get("x")) ? wanted.get("x") : "step";
    this.filter = wanted.get("metrics") ?? "";
    this.folded = new Set(wanted.getAll("fold"));
    this.hidden = new Set(wanted.getAll("hide"));
    const at = wanted.get("at") ?? "";
    this.at = /^\d{1,15}$/.test(at) ? Number(at) : null;
    this.isLogCount = wanted.get("counts") === "log";
    this.bars = new Set(wanted.getAll("bars"));
    this.strips = new Set(wanted.getAll("steps"));
    const zoom = (wanted.get("zoom") ?? "").split("~").map(Number);
    this.zoom = zoom.length === 2 && zoom.every(Number.isFinite) && zoom[0] < zoom[1] ? zoom : null;
  }

  write(told) {
    for (const value of this.log.values()) told.append("log", value);
    for (const value of this.robust.values()) told.append("robust", value);
    if (this.smoothing) told.set("smooth", this.smoothing);
    if (this.x !== "step") told.set("x", this.x);
    if (this.filter) told.set("metrics", this.filter);
    for (const prefix of this.folded) told.append("fold", prefix);
    for (const key of this.hidden) told.append("hide", key);
    if (this.at !== null) told.set("at", this.at);
    if (this.isLogCount) told.set("counts", "log");
    for (const name of this.bars) told.append("bars", name);
    for (const key of this.strips) told.append("steps", key);
    this.compare.write(told);
    if (this.zoom) told.set("zoom", this.zoom.map((end) => Number(end.toPrecision(14))).join("~"));
  }
}

const KEY = "stagecast-charts";

/** Pinned charts and the order of charts: in the browser's storage, for all runs of this server. */
export class Layout {
  constructor() {
    let kept = {};
    try {
      kept = JSON.parse(localStorage.getItem(KEY)) ?? {};
    } catch {
      // Not written by this page: the charts start in their usual order.
    }
    this.pinned = Array.isArray(kept.pinned) ? kept.pinned.map(String) : [];
    this.order = new Map(Object.entries(kept.order ?? {}).filter(([, keys]) => Array.isArray(keys)));
  }

  pin(key, isPinned) {
    this.pinned = this.pinned.filter((one) => one !== key);
    if (isPinned) this.pinned.push(key);
    this.#keep();
  }

  /** The keys of a section in the reader's order; one that it lacks comes after its usual neighbour. */
  sorted(section, keys) {
    const known = new Set(keys);
    const sorted = (this.order.get(section) ?? []).filter((key) => known.has(key));
    const placed = new Set(sorted);
    keys.forEach((key, at) => {
      if (!placed.has(key)) sorted.splice(at ? sorted.indexOf(keys[at - 1]) + 1 : 0, 0, key);
      placed.add(key);
    });
    return sorted;
  }

  /** Move a key among the `keys` of a section, which are in their current order; returns its new place. */
  move(section, keys, key, by) {
    const from = keys.indexOf(key);
    const to = Math.min(keys.length - 1, Math.max(0, from + by));
    const moved = keys.filter((one) => one !== key);
    moved.splice(to, 0, key);
    if (section === "pinned") this.pinned = moved;
    else this.order.set(section, moved);
    this.#keep();
    return to;
  }

  #keep() {
    try {
      localStorage.setItem(KEY, JSON.stringify({ pinned: this.pinned, order: Object.fromEntries(this.order) }));
    } catch {
      // The storage is full or disabled: the choice lasts until the page is closed.
    }
  }
}
