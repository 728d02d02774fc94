/** The key figures of a run. */

import { reconcile, el, setAttribute, setText } from "./dom.js";
import { bytes, count, duration, NONE, number, percent, since } from "./format.js";

function byId(id) {
  return document.getElementById(id);
}

const tiles = new Map();
/** `rows`: `[label, value, more]`. */
function fillTiles(rows) {
  reconcile(
    byId("tiles"),
    tiles,
    rows.map(([label]) => label),
    (label) => {
      const [value, more] = [el("span"), el("div", { class: "more" })];
      return { root: el("div", {}, el("dt", { text: label }), el("dd", {}, value, more)), value, more };
    },
  );
  for (const [label, value, more] of rows) {
    const tile = tiles.get(label);
    setText(tile.value, value);
    setText(tile.more, more ?? "");
    setAttribute(tile.root, "title", more ? `${value} · ${more}` : value);
  }
}

export function writeFigures(store, isStale) {
  const { run } = store;
  const step = run.global_step ?? 0;
  const total = store.totalSteps();
  const perStep = store.secondsPerStep();
  const isRunning = run.status === "running";
  const until = store.runningUntil(isStale);
  byId("progress").hidden = !total;
  if (total) {
    byId("progress-bar").value = Math.min(1, step / total);
    const left =
      isRunning && !run.paused && perStep ? `, about ${duration(perStep * Math.max(0, total - step))} left` : "";
    setText(byId("progress-text"), `${percent(step / total)}${left}`);
  }
  const val = store.get("val_loss");
  const wall = store.get("ledger/wall_s")?.last;
  const compute = store.get("ledger/compute_s")?.last;
  const gpu = store.get("system/gpu0/utilization_percent")?.last;
  const memory = store.get("system/gpu0/memory_used_bytes")?.last ?? store.get("system/process_memory_bytes")?.last;
  const rows = [
    ["Step", count(step), total ? `of ${count(total)}` : ""],
    ["Epoch", count(epochOf(run)), run.epochs ? `of ${count(run.epochs)}` : ""],
    ["Train loss", number(store.last("train_loss")), lowest(store.get("train_loss"))],
    ["Validation loss", number(store.last("val_loss")), lowest(val)],
    ["Learning rate", number(store.last("lr")), ""],
    ["Gradient norm", number(store.last("grad_norm")), ""],
    ["Throughput", store.last("rows_per_s") === undefined ? NONE : number(store.last("rows_per_s")), "rows/s"],
    ["Step time", duration(store.last("step_s")), perStep ? `${number(1 / perStep, 3)} steps/s` : ""],
    ["Stalls", wall > 0 && compute !== undefined ? percent(Math.max(0, 1 - compute / wall)) : NONE, "last interval"],
    gpu !== undefined
      ? ["GPU", `${number(gpu, 3)} %`, bytes(memory)]
      : memory !== undefined
        ? ["Memory", bytes(memory), "this run"]
        : null,
    [
      "Running for",
      run.started ? duration(Math.max(0, until - run.started)) : NONE,
      run.attempt > 1 ? `attempt ${run.attempt}` : since(run.started, until),
    ],
  ];
  fillTiles(rows.filter((row) => row && (row[1] !== NONE || ["Train loss", "Step time"].includes(row[0]))));
  if (run.reason && !isRunning) setText(byId("place"), run.reason);
}

/** The current or last epoch, from 1, as in the log; events count from 0. */
function epochOf({ epoch, epochs }) {
  const now = (epoch ?? 0) + 1;
  return epochs ? Math.min(now, epochs) : now; // a run that was resumed after its last epoch is beyond it
}

function lowest(series) {
  return series?.lowest ? `lowest ${number(series.lowest.value)}` : "";
}
