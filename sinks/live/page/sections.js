/** The charts, from the names of the series in the chosen runs. */

import { Chart } from "./charts.js";
import { el, reconcile, setAttribute, setText, table } from "./dom.js";
import { count, lowerIsBetter, number, unitOf } from "./format.js";
import { ledgerCurves, ledgerTable } from "./ledger.js";
import { matcher } from "./match.js";
import { colours, DASHES, LAYERS } from "./theme.js";

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
    this.known = { training: new Map(), validation: new Map(), system: new Map(), metrics: new Map() };
    this.most = FIRST_METRICS;
    this.parts = Object.fromEntries(
      [
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
        "metrics-none",
        "metrics-more",
        "ledger-section",
        "ledger",
        "ledger-table",
      ].map((id) => [id, document.getElementById(id)]),
    );
    this.parts["metrics-filter"].addEventListener("input", () =>
      this.app.setFilter(this.parts["metrics-filter"].value),
    );
    this.parts["metrics-more"].addEventListener("click", () => {
      this.most += MORE_METRICS;
      this.arrange();
    });
    this.ledger = new Chart({
      title: "Share of wall time",
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
    for (const { store } of this.app.shownRuns()) {
      for (const name of store.series.keys()) kinds[kindOf(name, store.stages)].add(name);
    }
    this.#arrangeTraining(kinds);
    const validation = groupKeys(
      [...kinds.validation].filter(
        (name) => !name.startsWith("val_loss") || name.length > 8 || kinds.validation.size > 1,
      ),
    );
    this.#place(
      "validation",
      [...validation.keys()].sort(byName),
      (key) =>
        this.#chart(key, () => validation.get(key) ?? [key], {
          height: 150,
          isSmall: true,
          takesLog: key.includes("loss"),
          labels: keyLabel,
        }),
      validation,
    );
    this.parts["validation-section"].hidden = kinds.validation.size === 0;
    const system = groupSystem(kinds.system);
    this.#place(
      "system",
      [...system.keys()].sort(bySystem),
      (key) =>
        this.#chart(key, () => system.get(key).names, {
          height: 110,
          isSmall: true,
          takesSmoothing: false,
          labels: systemLabel,
        }),
      system,
    );
    this.parts["system-section"].hidden = system.size === 0;
    this.parts["ledger-section"].hidden = !this.app.focus()?.store.get("ledger/wall_s");
    this.#arrangeMetrics([...kinds.user].sort(byName));
    this.app.board.wake();
  }

  #arrangeTraining(kinds) {
    const has = (name) => kinds.train.has(name);
    const losses = () => {
      const names = [
        "train_loss",
        ...[...kinds.validation].filter((name) => /^val_loss(\/|$)/.test(name)).sort(byName),
      ];
      return this.app.isComparing() ? names.slice(0, 2) : names.slice(0, 5);
    };
    this.losses = losses;
    const keys = [
      "Loss",
      has("lr") && "Learning rate",
      has("grad_norm") && "Gradient norm",
      "Throughput",
      "Step time",
    ].filter(Boolean);
    const made = {
      Loss: () => this.#chart("Loss", () => this.losses(), { takesLog: true, labels: lossLabel, isWide: true }),
      "Learning rate": () => this.#chart("Learning rate", () => ["lr"], { takesSmoothing: false }),
      "Gradient norm": () => this.#chart("Gradient norm", () => ["grad_norm"]),
      Throughput: () => this.#chart("Throughput", () => ["rows_per_s"]),
      "Step time": () => this.#chart("Step time", () => ["step_s"]),
    };
    this.#place("training", keys, (key) => made[key]());
  }

  #arrangeMetrics(names) {
    const wanted = this.app.view.filter.trim();
    const { matches, problem } = matcher(wanted);
    const found = names.filter(matches);
    const shown = found.slice(0, this.most);
    this.#place("metrics", shown, (name) => this.#chart(name, () => [name], { height: 110, isSmall: true }));
    this.parts["metrics-section"].hidden = names.length === 0;
    this.parts["metrics-filter"].hidden = names.length < SEARCH_FROM && !wanted;
    const some = shown.length < names.length ? `${count(shown.length)} of ${count(names.length)}` : count(names.length);
    setText(this.parts["metrics-count"], names.length ? some : "");
    const none = found.length || !names.length ? null : `No match for “${wanted}” among ${count(names.length)} metrics.`;
    const said = [problem, none].filter(Boolean).join(" ");
    this.parts["metrics-none"].hidden = !said;
    setText(this.parts["metrics-none"], said);
    setAttribute(this.parts["metrics-filter"], "aria-invalid", problem ? "true" : null);
    this.parts["metrics-more"].hidden = found.length <= shown.length;
  }

  #place(part, keys, make, groups) {
    this.groups = { ...this.groups, [part]: groups };
    reconcile(this.parts[part], this.known[part], keys, (key) => {
      const chart = make(key);
      this.app.board.add(chart);
      return chart;
    });
  }

  #chart(title, names, { labels = (name) => name, isWide = false, ...options } = {}) {
    const chart = new Chart({ title, curves: () => this.#curves(names(), labels), ...options });
    if (isWide) chart.root.classList.add("wide");
    return chart;
  }

  /** A curve for each run and name: colour and pattern belong to the run, or, if there is but one, to the name. */
  #curves(names, labels) {
    const { run } = colours();
    const isComparing = this.app.isComparing();
    const curves = [];
    for (const { store, slot } of this.app.shownRuns()) {
      names.forEach((name, index) => {
        const series = store.get(name);
        if (!series) return;
        const at = isComparing ? slot : index % DASHES.length;
        const label = labels(name);
        curves.push({
          series,
          label: isComparing
            ? names.length > 1
              ? `${store.runId} · ${label}`
              : store.runId
            : names.length > 1 || label !== name
              ? label
              : "last",
          started: store.run.started ?? 0,
          ...unitOf(name),
          colour: run[at],
          dash: DASHES[at],
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
    for (const { store } of runs)
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
          ...(isComparing ? [store.runId] : []),
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
