/** The list of runs, and how a run's state is written. */

import { el, reconcile, setAttribute, setText } from "./dom.js";
import { swatch } from "./charts.js";
import { ago, count, number } from "./format.js";
import { colours, DASHES } from "./theme.js";

function byId(id) {
  return document.getElementById(id);
}

const STATUS = {
  running: ["●", "running"],
  paused: ["‖", "paused"],
  finished: ["✓", "finished"],
  stopped: ["■", "stopped"],
  failed: ["✕", "failed"],
  cancelled: ["⊘", "cancelled"],
  lost: ["?", "lost"],
  unknown: ["·", "unknown"],
  connecting: ["·", "connecting"],
};

/** `{state, glyph, word}` of a run. */
export function statusOf(run) {
  const state = run.status === "running" && run.paused ? "paused" : run.status;
  const [glyph, word] = STATUS[state] ?? STATUS.unknown;
  return { state, glyph, word };
}

export class RunList {
  /** `on` has `choose(runId)` and `compare(runId, isChosen)`. */
  constructor(on) {
    this.on = on;
    this.items = new Map();
    this.filter = byId("runs-filter");
    this.filter.addEventListener("input", () => this.fill(...this.last));
  }

  fill(runs, chosen, linkOf, markOf, most) {
    this.last = [runs, chosen, linkOf, markOf, most];
    this.filter.hidden = runs.length < 8;
    const wanted = this.filter.value.toLowerCase();
    const shown = runs.filter(
      (run) =>
        chosen.includes(run.run_id) ||
        run.run_id.toLowerCase().includes(wanted) ||
        run.module?.toLowerCase().includes(wanted),
    );
    reconcile(
      byId("runs-list"),
      this.items,
      shown.map((run) => run.run_id),
      (runId) => this.#make(runId),
    );
    const now = Date.now() / 1000;
    for (const run of shown) {
      const item = this.items.get(run.run_id);
      const isChosen = chosen.includes(run.run_id);
      item.root.classList.toggle("chosen", isChosen);
      item.box.checked = isChosen;
      item.box.disabled = (isChosen && chosen.length === 1) || (!isChosen && chosen.length >= most);
      setAttribute(item.link, "href", linkOf(run.run_id));
      setAttribute(item.link, "aria-current", chosen[0] === run.run_id ? "true" : null);
      const { glyph, word } = statusOf(run);
      setText(item.state, `${glyph} ${word} · ${count(run.global_step)}`);
      const loss = run.latest?.val_loss ?? run.latest?.train_loss;
      setText(item.when, ago(run.updated, now));
      setAttribute(item.root, "title", loss === undefined ? null : `loss ${number(loss)}`);
      const mark = markOf(run.run_id);
      if (item.markKey !== (mark?.colour ?? null)) {
        item.markKey = mark?.colour ?? null;
        item.mark.replaceChildren(...(mark ? [mark.swatch()] : []));
      }
    }
  }

  #make(runId) {
    const box = el("input", {
      type: "checkbox",
      "aria-label": `Compare ${runId}`,
      onchange: () => this.on.compare(runId, box.checked),
    });
    const link = el("a", { title: runId, text: runId });
    const [state, when, mark] = [el("span"), el("span"), el("span", { class: "mark" })];
    return {
      root: el("li", {}, box, link, el("div", { class: "facts" }, state, when), mark),
      box,
      link,
      state,
      when,
      mark,
    };
  }
}

const compared = new Map();
/** Above the charts, when there are several runs: whose line is whose. */
export function fillCompared(app, staleS) {
  const root = byId("compared");
  root.hidden = !app.isComparing();
  const runs = app.isComparing() ? app.shownRuns() : [];
  const keyOf = ({ store, slot }) =>
    JSON.stringify([store.runId, slot, colours().run[slot], store.runId === app.chosen[0]]);
  const byKey = new Map(runs.map((one) => [keyOf(one), one]));
  reconcile(root, compared, [...byKey.keys()], (key) => {
    const { store, slot } = byKey.get(key);
    const isFocus = store.runId === app.chosen[0];
    const state = el("span", { class: "hint" });
    const promote = () => app.promote(store.runId);
    const action = isFocus
      ? el("span", { class: "hint", text: "tables below" })
      : el("button", {
          type: "button",
          class: "quiet",
          "aria-label": `Show the tables of ${store.runId}`,
          text: "Show its tables",
          onclick: promote,
        });
    return {
      root: el(
        "li",
        {},
        swatch({ colour: colours().run[slot], dash: DASHES[slot] }),
        el("span", { text: store.runId }),
        state,
        action,
      ),
      state,
    };
  });
  for (const [key, { store, connection }] of byKey) {
    const problem =
      connection.state === "open" && connection.silence_s <= staleS
        ? ""
        : ` · ⚠ ${connection.problem ?? "not connected"}`;
    const { glyph, word } = statusOf(store.run);
    setText(compared.get(key).state, `${glyph} ${word} · step ${count(store.run.global_step ?? 0)}${problem}`);
  }
}
