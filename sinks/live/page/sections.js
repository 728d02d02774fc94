/** The charts, from the names of the series in the chosen runs. */

import { Chart } from "./charts.js";
import { el, reconcile, setAttribute, setText, table } from "./dom.js";
import { count, lowerIsBetter, number, unitOf } from "./format.js";
import { ledgerCurves, ledgerTable } from "./ledger.js";
import { matcher } from "./match.js";
import { labelOf } from "./names.js";
import { MOST_SERIES } from "./store.js";
import { colours, DASHES, LAYERS } from "./theme.js";

/** Maximum series of the page's charts. */
const MOST_DRAWN = 2000;
/** Maximum runs with a row each in the table of validation; the comparison has those of more. */
const FEW_RUNS = 6;

const FIRST_METRICS = 48;
const MORE_METRICS = 96;
const SEARCH_FROM = 8;
/** Names under `system/` that share a chart. */
const SYSTEM = new Map([
  ["cpu_percent", ["CPU", "machine"]],
  ["process_cpu_percent", ["CPU", "this run"]],
  ["memory_used_bytes", ["Memory", "machine"]],
  ["process_memory_bytes", ["Memory", "this run"]],
  ["disk_used_percent", ["Disk used", "disk"]],
  ["disk_read_bytes_per_s", ["Disk", "read"]],
  ["disk_written_bytes_per_s", ["Disk", "written"]],
  ["network_received_bytes_per_s", ["Network", "received"]],
  ["network_sent_bytes_per_s", ["Network", "sent"]],
]);
const GPU = new Map([
  ["utilization_percent", "GPU use"],
  ["memory_used_bytes", "GPU memory"],
  ["power_w", "GPU power"],
  ["temperature_c", "GPU temperature"],
]);

/** The ledger's own rows: other names under `ledger/` are the user's metrics. */
const LEDGER = new Set([...LAYERS, "device_idle", "wall"].map((row) => `ledger/${row}_s`));

/** The kind of a name: "train", "validation", "system", "ledger" or "user". */
export function kindOf(name, stages) {
  if (["train_loss", "lr", "grad_norm", "step_s", "rows_per_s"].includes(name)) return "train";
  if (name.startsWith("system/")) return "system";
  if (LEDGER.has(name)) return "ledger";
  if (stages.get(name) === "val" || stages.get(name) === "test" || /^(val|valid|validation|test|eval)[_/]/.test(name))
    return "validation";
  return "user";
}

export class Sections {
  constructor(app) {
    this.app = app;
    this.known = { pinned: new Map(), training: new Map(), validation: new Map(), system: new Map() };
    this.groups = new Map(); // prefix of metrics -> its section
    this.most = FIRST_METRICS;
    this.parts = Object.fromEntries(
      [
        "pinned",
        "pinned-section",
        "training",
        "validation",
        "system",
        "metrics",
        "validation-section",
        "validation-table",
        "system-section",
        "metrics-section",
        "metrics-count",
        "metrics-filter",
        "metrics-fold",
        "metrics-left-out",
        "series-left-out",
        "metrics-none",
        "metrics-more",
        "ledger-section",
        "ledger",
        "ledger-table",
      ].map((id) => [id, document.getElementById(id)]),
    );
    this.parts["metrics-filter"].addEventListener("input", () => {
      this.app.view.filter = this.parts["metrics-filter"].value;
      this.#rearranged();
    });
    this.parts["metrics-fold"].addEventListener("click", () => {
      const { folded } = this.app.view;
      const prefixes = this.prefixes.filter(Boolean);
      const isFolded = prefixes.every((prefix) => folded.has(prefix));
      for (const prefix of prefixes) isFolded ? folded.delete(prefix) : folded.add(prefix);
      this.#rearranged();
    });
    this.parts["metrics-more"].addEventListener("click", () => {
      this.most += MORE_METRICS;
      this.arrange();
    });
    this.ledger = new Chart({
      title: "Share of wall time",
      key: "ledger",
      curves: () => ledgerCurves(this.app.focus()?.store),
      height: 250,
      takesSmoothing: false,
      range: [0, 1],
      note: "The loop's wall time by phase, per interval",
    });
    this.parts.ledger.append(this.ledger.root);
    app.board.add(this.ledger);
  }

  /** Update the charts for new names, or other runs. */
  arrange() {
    const kinds = { train: new Set(), validation: new Set(), system: new Set(), ledger: new Set(), user: new Set() };
    this.counts = new Map(); // name -> how many of the runs have it
    for (const { store } of this.app.shownRuns()) {
      for (const name of store.series.keys()) {
        kinds[kindOf(name, store.stages)].add(name);
        this.counts.set(name, (this.counts.get(name) ?? 0) + 1);
      }
    }
    const validation = groupKeys(
      [...kinds.validation].filter(
        (name) => !name.startsWith("val_loss") || name.length > 8 || kinds.validation.size > 1,
      ),
    );
    const system = groupSystem(kinds.system);
    const metrics = [...kinds.user].sort(byName);
    const small = { height: 110, isSmall: true };
    this.names = { training: trainingNames(kinds, this.app.isComparing()), validation, system };
    /** Of each part of the page: the keys of its charts, and the options of each. */
    this.sources = {
      training: { keys: [...this.names.training.keys()], of: (key) => TRAINING[key] },
      validation: {
        keys: [...validation.keys()].sort(byName),
        of: (key) => ({ height: 150, isSmall: true, takesLog: key.includes("loss"), labels: keyLabel }),
      },
      system: {
        keys: [...system.keys()].sort(bySystem),
        of: () => ({ ...small, takesSmoothing: false, labels: systemLabel }),
      },
      metrics: { keys: metrics, of: () => small },
    };
    this.drawn = this.leftOut = 0; // series
    this.#arrangePinned();
    this.#arrangePart("training");
    this.#arrangePart("validation");
    this.#arrangeMetrics(metrics);
    this.#arrangePart("system");
    this.#tellLimit();
    this.parts["validation-section"].hidden = kinds.validation.size === 0;
    this.parts["system-section"].hidden = system.size === 0;
    this.parts["ledger-section"].hidden = !this.app.focus()?.store.get("ledger/wall_s");
    this.app.board.wake();
  }

  /** Rearrange the charts after the reader has changed a setting; the link keeps it. */
  #rearranged() {
    this.app.keepFragment();
    this.arrange();
  }

  #arrangePart(part) {
    const keys = this.sources[part].keys.map((key) => `${part}/${key}`);
    this.#place(part, this.parts[part], this.known[part], this.#fitting(keys));
  }

  /** The first of some charts that are not pinned: those whose series are within the page's limit. */
  #fitting(keys) {
    const fitting = [];
    for (const key of keys) {
      if (this.pinned?.has(key)) continue;
      const series = this.#namesOf(key).reduce((sum, name) => sum + (this.counts.get(name) ?? 0), 0);
      if (this.leftOut || this.drawn + series > MOST_DRAWN) this.leftOut += series;
      else {
        this.drawn += series;
        fitting.push(key);
      }
    }
    return fitting;
  }

  #tellLimit() {
    const all = this.drawn + this.leftOut;
    const text = `${count(this.drawn)} of ${count(all)} series are drawn; choose fewer runs or filter metrics.`;
    this.parts["series-left-out"].hidden = !this.leftOut;
    setText(this.parts["series-left-out"], this.leftOut ? text : "");
  }

  /** The pinned charts that the shown runs have: they leave their sections. */
  #arrangePinned() {
    const all = new Set();
    for (const [part, { keys }] of Object.entries(this.sources)) for (const key of keys) all.add(`${part}/${key}`);
    this.pinned = null;
    this.pinned = new Set(this.#fitting(this.app.layout.pinned.filter((key) => all.has(key))));
    this.#place("pinned", this.parts.pinned, this.known.pinned, [...this.pinned]);
    this.parts["pinned-section"].hidden = this.pinned.size === 0;
  }

  /** The user's metrics: a section for each prefix, up to a maximum number of charts in all. */
  #arrangeMetrics(names) {
    const { view, layout } = this.app;
    const wanted = view.filter.trim();
    const { matches, problem } = matcher(wanted);
    const found = names.filter(matches);
    const byPrefix = new Map();
    for (const name of found) {
      if (this.pinned.has(`metrics/${name}`)) continue;
      const prefix = prefixOf(name);
      if (!byPrefix.has(prefix)) byPrefix.set(prefix, []);
      byPrefix.get(prefix).push(`metrics/${name}`);
    }
    this.prefixes = [...byPrefix.keys()].sort((a, b) => (a && b ? byName(a, b) : a ? 1 : -1)); // without one: first
    let room = this.most;
    let isMore = false;
    const shown = new Map(); // prefix -> keys of the charts
    for (const prefix of this.prefixes) {
      const isFolded = view.folded.has(prefix) && prefix !== "";
      const wantedKeys = isFolded ? [] : layout.sorted(`metrics/${prefix}`, byPrefix.get(prefix)).slice(0, room);
      const keys = this.#fitting(wantedKeys);
      isMore ||= !isFolded && wantedKeys.length < byPrefix.get(prefix).length;
      if (!isFolded && !keys.length) break;
      room -= keys.length;
      shown.set(prefix, keys);
    }
    reconcile(this.parts.metrics, this.groups, [...shown.keys()], (prefix) => this.#group(prefix));
    for (const [prefix, keys] of shown) this.groups.get(prefix).fill(keys, byPrefix.get(prefix).length, shown.size > 1);
    this.#tellMetrics(names, found, this.most - room, problem);
    this.parts["metrics-more"].hidden = !isMore || this.leftOut > 0;
    const prefixes = this.prefixes.filter(Boolean);
    this.parts["metrics-fold"].hidden = prefixes.length < 2;
    setText(
      this.parts["metrics-fold"],
      prefixes.every((prefix) => view.folded.has(prefix)) ? "Unfold all" : "Fold all",
    );
  }

  #tellMetrics(names, found, shown, problem) {
    const wanted = this.app.view.filter.trim();
    this.parts["metrics-section"].hidden = names.length === 0;
    const leftOut = this.app
      .shownRuns()
      .filter(({ store }) => store.leftOut)
      .map(({ store }) => `${labelOf(store.runId)} has more than ${count(MOST_SERIES)} metrics: charts lack ${count(store.leftOut)} values of the others.`);
    this.parts["metrics-left-out"].hidden = !leftOut.length;
    setText(this.parts["metrics-left-out"], leftOut.join(" "));
    this.parts["metrics-filter"].hidden = names.length < SEARCH_FROM && !wanted;
    const some = shown < names.length ? `${count(shown)} of ${count(names.length)}` : count(names.length);
    setText(this.parts["metrics-count"], names.length ? some : "");
    const none = found.length || !names.length ? null : `No match for “${wanted}” among ${count(names.length)} metrics.`;
    const said = [problem, none].filter(Boolean).join(" ");
    this.parts["metrics-none"].hidden = !said;
    setText(this.parts["metrics-none"], said);
    setAttribute(this.parts["metrics-filter"], "aria-invalid", problem ? "true" : null);
  }

  /** A section of metrics with one prefix, which can be folded. */
  #group(prefix) {
    const { view } = this.app;
    const known = new Map();
    const grid = el("div", { class: "grid fine" });
    const number = el("span", { class: "hint" });
    const name = el("span", { class: "name", text: prefix || "without a prefix" });
    const summary = el("summary", {}, name, number);
    const root = el("details", { class: "group", open: !view.folded.has(prefix) }, summary, grid);
    root.addEventListener("toggle", () => {
      if (root.open !== view.folded.has(prefix)) return; // set by the page itself
      if (root.open) view.folded.delete(prefix);
      else view.folded.add(prefix);
      this.#rearranged();
    });
    return {
      root,
      fill: (keys, all, isOneOfSeveral) => {
        root.open = prefix === "" || !view.folded.has(prefix);
        summary.hidden = prefix === "" && !isOneOfSeveral;
        const isPart = root.open && keys.length < all;
        setText(number, isPart ? `${count(keys.length)} of ${count(all)}` : count(all));
        this.#place(`metrics/${prefix}`, grid, known, keys);
      },
      destroy: () => known.forEach((chart) => chart.destroy()),
    };
  }

  /** Place charts in a section. `keys`: of charts, in their usual order; the pinned ones are elsewhere. */
  #place(section, grid, known, keys) {
    const { layout, board } = this.app;
    const own = section === "pinned" ? keys : layout.sorted(section, keys).filter((key) => !this.pinned.has(key));
    reconcile(grid, known, own, (key) => {
      const chart = this.#chart(key);
      board.add(chart);
      return chart;
    });
    for (const key of own) known.get(key).place = { section, keys: own };
  }

  /** Move a chart in its section; returns its new place, from 0. */
  move(chart, by) {
    const { section, keys } = chart.place;
    const place = this.app.layout.move(section, keys, chart.key, by);
    this.arrange();
    return place;
  }

  pin(chart, isPinned) {
    this.app.layout.pin(chart.key, isPinned);
    this.arrange();
  }

  isPinned(chart) {
    return this.pinned.has(chart.key);
  }

  #chart(key) {
    const at = key.indexOf("/");
    const [part, title] = [key.slice(0, at), key.slice(at + 1)];
    const { labels = (name) => name, isWide = false, ...options } = this.sources[part].of(title);
    const chart = new Chart({ title, key, curves: () => this.#curves(this.#namesOf(key), labels), ...options });
    if (isWide) chart.root.classList.add("wide");
    return chart;
  }

  /** The names of the series of a chart. */
  #namesOf(key) {
    const at = key.indexOf("/");
    const [part, title] = [key.slice(0, at), key.slice(at + 1)];
    const found = this.names[part]?.get(title);
    return part === "metrics" ? [title] : (found?.names ?? found ?? []);
  }

  /** A curve for each run and name: colour and pattern belong to the run, or, if there is but one, to the name. */
  #curves(names, labels) {
    const { run } = colours();
    const isComparing = this.app.isComparing();
    const curves = [];
    for (const one of this.app.shownRuns()) {
      const { store } = one;
      const look = isComparing ? this.app.lookOf(one) : null;
      names.forEach((name, index) => {
        const series = store.get(name);
        if (!series) return;
        const at = index % DASHES.length;
        const label = labels(name);
        curves.push({
          series,
          label: isComparing
            ? names.length > 1
              ? `${look.label} · ${label}`
              : look.label
            : names.length > 1 || label !== name
              ? label
              : "last",
          run: isComparing ? store.runId : null,
          name: isComparing && names.length > 1 ? label : null,
          started: store.run.started ?? 0,
          epochSteps: store.run.steps_per_epoch,
          ...unitOf(name),
          colour: look?.colour ?? run[at],
          dash: look?.dash ?? DASHES[at],
          width: !isComparing ? 1.75 : index > 0 ? 2.5 : 1.25,
          isSparse: kindOf(name, store.stages) === "validation", // smoothed, it would lag far behind
        });
      });
    }
    return curves;
  }

  // ---------------------------------------------------------------------------------------------- validation

  /** The ledger's table. */
  fillLedger() {
    const made = ledgerTable(this.app.focus()?.store);
    if (made) this.parts["ledger-table"].replaceChildren(made);
  }

  /** Last and best of each validation metric, of all runs that are shown. */
  fillValidation() {
    const runs = this.app.shownRuns();
    const isComparing = this.app.isComparing();
    const rows = [];
    const names = new Set();
    this.parts["validation-table"].hidden = runs.length > FEW_RUNS;
    for (const { store } of runs.length > FEW_RUNS ? [] : runs)
      for (const name of store.series.keys()) if (kindOf(name, store.stages) === "validation") names.add(name);
    for (const name of [...names].sort(byName).slice(0, 200)) {
      const winner = bestOf(name, runs);
      for (const { store } of runs) {
        const series = store.get(name);
        if (!series?.length) continue;
        const [metric, key] = splitKey(name);
        const isLow = isLowBest(name, store.run);
        const mark = (end, isBest) => {
          if (!end) return "–";
          const of = isBest && winner?.value === end.value ? `best of ${winner.count} ` : "";
          return `${of}${isBest ? "★ " : ""}${number(end.value)}`;
        };
        rows.push([
          metric,
          key,
          ...(isComparing ? [labelOf(store.runId)] : []),
          number(series.last),
          count(series.lastStep),
          mark(series.lowest, isLow === true),
          count(series.lowest?.step),
          mark(series.highest, isLow === false),
          count(series.highest?.step),
        ]);
      }
    }
    const right = (head) => ({ head, number: true });
    const heads = [
      { head: "Metric" },
      { head: "Data" },
      ...(isComparing ? [{ head: "Run" }] : []),
      right("Last"),
      right("at step"),
      right("Lowest"),
      right("at step"),
      right("Highest"),
      right("at step"),
    ];
    const caption = isComparing ? "Last and best values (★ best of its run)" : "Last and best values (★ best)";
    const key = JSON.stringify([caption, rows]);
    if (key === this.validationKey) return; // keeps the reader's selection and position
    this.validationKey = key;
    const cellOf = (text) => (text.includes("★") ? el("span", { class: "best", text }) : text);
    const cells = rows.map((row) => row.map((text, index) => (index ? cellOf(text) : text)));
    this.parts["validation-table"].replaceChildren(table(caption, heads, cells));
  }
}

/** The charts of training, in their order, with the names of their series. */
function trainingNames(kinds, isComparing) {
  const losses = [
    "train_loss",
    ...[...kinds.validation].filter((name) => /^val_loss(\/|$)/.test(name)).sort(byName),
  ];
  const all = [
    ["Loss", losses.slice(0, isComparing ? 2 : 5)],
    ["Learning rate", kinds.train.has("lr") && ["lr"]],
    ["Gradient norm", kinds.train.has("grad_norm") && ["grad_norm"]],
    ["Throughput", ["rows_per_s"]],
    ["Step time", ["step_s"]],
  ];
  return new Map(all.filter(([, names]) => names));
}

const TRAINING = {
  Loss: { takesLog: true, labels: lossLabel, isWide: true },
  "Learning rate": { takesSmoothing: false },
  "Gradient norm": {},
  // Single steps vary too much to be read.
  Throughput: { leastSmoothing: 0.9 },
  "Step time": { leastSmoothing: 0.9 },
};

/** The part of a name before its first slash; empty without one. */
function prefixOf(name) {
  const at = name.indexOf("/");
  return at > 0 ? name.slice(0, at) : "";
}

/** Whether a metric's lowest value is its best: by the run's setting, else by its name; null if unknown. */
function isLowBest(name, run) {
  return name === run.best ? run.best_mode !== "max" : lowerIsBetter(name);
}

/** The best value among runs that agree on what is better: `{value, count}`; null for fewer than two of them. */
function bestOf(name, runs) {
  const stores = runs.map(({ store }) => store).filter((store) => store.get(name)?.lowest);
  const isLow = stores.length > 1 ? isLowBest(name, stores[0].run) : null;
  if (isLow === null || stores.some((store) => isLowBest(name, store.run) !== isLow)) return null;
  const values = stores.map((store) => (isLow ? store.get(name).lowest : store.get(name).highest).value);
  return { value: isLow ? Math.min(...values) : Math.max(...values), count: stores.length };
}

function splitKey(name) {
  const at = name.indexOf("/", name.startsWith("val/") || name.startsWith("test/") ? 5 : 1);
  return at < 0 ? [name, "default"] : [name.slice(0, at), name.slice(at + 1)];
}

/** Validation metrics of several dataloaders share a chart. */
function groupKeys(names) {
  const groups = new Map();
  for (const name of names.sort(byName)) {
    const [metric] = splitKey(name);
    groups.set(metric, [...(groups.get(metric) ?? []), name]);
  }
  return groups;
}

function keyLabel(name) {
  return splitKey(name)[1];
}

function lossLabel(name) {
  if (name === "train_loss") return "train";
  return name === "val_loss" ? "validation" : name.replace("val_loss/", "validation ");
}

function groupSystem(names) {
  const groups = new Map();
  const put = (key, name) => groups.set(key, { names: [...(groups.get(key)?.names ?? []), name] });
  for (const name of [...names].sort(byName)) {
    const gpu = /^system\/gpu(\d+)\/(.+)$/.exec(name);
    if (gpu) put(GPU.get(gpu[2]) ?? `GPU ${gpu[2]}`, name);
    else put(SYSTEM.get(name.slice(7))?.[0] ?? name.slice(7), name);
  }
  return groups;
}

function systemLabel(name) {
  const gpu = /^system\/gpu(\d+)\//.exec(name);
  return gpu ? `GPU ${gpu[1]}` : (SYSTEM.get(name.slice(7))?.[1] ?? "value");
}

const SYSTEM_ORDER = [...GPU.values(), "CPU", "Memory", "Disk", "Disk used", "Network"];
function bySystem(a, b) {
  const [left, right] = [SYSTEM_ORDER.indexOf(a), SYSTEM_ORDER.indexOf(b)];
  return (left < 0 ? 99 : left) - (right < 0 ? 99 : right) || byName(a, b);
}

/** `block2` comes before `block10`. */
const byName = new Intl.Collator("en", { numeric: true }).compare;
