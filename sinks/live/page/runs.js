/** The list of runs. */

import { contained, el, reconcile, setAttribute, setText } from "./dom.js";
import { ago, count, duration, number } from "./format.js";
import { matcher } from "./match.js";
import { labelOf } from "./names.js";
import { statusOf } from "./status.js";

function byId(id) {
  return document.getElementById(id);
}

/** Maximum runs in the list, besides the chosen ones: the newest. */
const MOST_SHOWN = 200;

export class RunList {
  /** `on` has `compare(runId, isChosen)`. */
  constructor(on) {
    this.on = on;
    this.items = new Map();
    this.filter = byId("runs-filter");
    this.filter.addEventListener("input", () => this.fill(...this.last));
  }

  /** `now` is that of the server, in Unix seconds. */
  fill(runs, chosen, linkOf, markOf, now) {
    this.last = [runs, chosen, linkOf, markOf, now];
    this.filter.hidden = runs.length < 8;
    const { matches, problem } = matcher(this.filter.value);
    const found = runs.filter((run) => matches(run.run_id) || matches(labelOf(run.run_id)) || matches(run.module ?? ""));
    const wanted = new Set([...chosen, ...found.slice(0, MOST_SHOWN).map((run) => run.run_id)]);
    const shown = runs.filter((run) => wanted.has(run.run_id));
    const none = found.length ? null : `No run matches “${this.filter.value.trim()}”.`;
    const left = found.length - MOST_SHOWN;
    const more = left > 0 ? `${count(left)} more are in the table.` : null;
    const said = this.filter.hidden ? "" : [problem, runs.length ? none : null, more].filter(Boolean).join(" ");
    byId("runs-none").hidden = !said;
    setText(byId("runs-none"), said);
    setAttribute(this.filter, "aria-invalid", problem ? "true" : null);
    reconcile(
      byId("runs-list"),
      this.items,
      shown.map((run) => run.run_id),
      (runId) => this.#make(runId),
    );
    for (const run of shown) {
      if (!contained(() => this.#write(run, chosen, linkOf, markOf, now)))
        setText(this.items.get(run.run_id).state, "⚠ cannot be shown");
    }
  }

  #write(run, chosen, linkOf, markOf, now) {
    const item = this.items.get(run.run_id);
    const isChosen = chosen.includes(run.run_id);
    item.root.classList.toggle("chosen", isChosen);
    item.box.checked = isChosen;
    item.box.disabled = isChosen && chosen.length === 1;
    const label = labelOf(run.run_id);
    setText(item.link, label);
    item.link.title = label === run.run_id ? label : `${label} (${run.run_id})`;
    setAttribute(item.box, "aria-label", `Compare ${label}`);
    setAttribute(item.link, "href", linkOf(run.run_id));
    setAttribute(item.link, "aria-current", chosen[0] === run.run_id ? "true" : null);
    const { glyph, word, isUnhealthy } = statusOf(run);
    setAttribute(item.state, "data-health", isUnhealthy ? "unhealthy" : null);
    setText(item.state, `${glyph} ${word} · ${count(run.global_step)}`);
    const loss = run.latest?.val_loss ?? run.latest?.train_loss;
    setText(item.when, [durationOf(run, now), ago(run.updated, now)].filter(Boolean).join(" · "));
    const more = [loss === undefined ? null : `loss ${number(loss)}`, ...(run.problems ?? [])].filter(Boolean);
    setAttribute(item.root, "title", more.length ? more.join("\n") : null);
    const mark = markOf(run.run_id);
    if (item.markKey !== (mark?.colour ?? null)) {
      item.markKey = mark?.colour ?? null;
      item.mark.replaceChildren(...(mark ? [mark.swatch()] : []));
    }
  }

  #make(runId) {
    const box = el("input", {
      type: "checkbox",
      onchange: () => this.on.compare(runId, box.checked),
    });
    const link = el("a");
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

/** How long a run has been running: until its end, its last sign of life, or now. */
function durationOf({ status, started, ended, updated }, now) {
  if (!started) return "";
  const until = status === "running" ? Math.max(now, updated) : (ended ?? updated);
  return duration(Math.max(0, Math.round(until - started)));
}
