/** The legend of several runs, once, above their charts. */

import { runKey } from "./charts.js";
import { contained } from "./dom.js";
import { count, duration, number } from "./format.js";
import { highlighting, Swatch } from "./legend.js";
import { statusOf } from "./status.js";
import { html, render } from "./view.js";

/** Maximum runs with their figures beside their names; those of more are in their titles. */
const FEW = 6;

export function fillCompared(app, staleS) {
  const root = document.getElementById("compared");
  root.hidden = !app.isComparing();
  const runs = app.isComparing() ? app.shownRuns() : [];
  const isFew = runs.length <= FEW;
  root.classList.toggle("many", !isFew);
  const focus = app.focus();
  const entries = runs.map((one) => entryOf(app, one, isFew, one === focus, staleS));
  const wholes = isFew ? [] : [html`<li key="tables" class="tables">${tablesOf(app, runs, focus)}</li>`];
  render([...entries, ...wholes], root);
}

function entryOf(app, one, isFew, isFocus, staleS) {
  const { runId } = one.store;
  const key = runKey(runId);
  const { label, ...curve } = app.lookOf(one);
  let facts = ["⚠ cannot be shown"];
  contained(() => (facts = factsOf(app, one, staleS)));
  const isHidden = app.view.hidden.has(key);
  const [state, ...figures] = facts.filter(Boolean);
  const shown = isFew ? [state, ...figures] : /^[●✓]/.test(state) ? [] : [state];
  const promote = html`<button
    type="button"
    class="quiet"
    aria-label=${`Show the tables of ${label}`}
    onClick=${() => app.promote(runId)}
  >
    Show its tables
  </button>`;
  const tables = isFocus ? html`<span class="hint tables">tables below</span>` : promote;
  return html`<li key=${runId} data-key=${key} title=${`${label}: ${facts.filter(Boolean).join(" · ")}`}>
    <button
      type="button"
      class="run"
      aria-pressed=${String(!isHidden)}
      onClick=${() => app.board.hide(key)}
      ...${highlighting(app.board, key)}
    >
      <${Swatch} curve=${curve} /><span class="name">${label}</span>
    </button>
    ${shown.length > 0 && html`<span class="hint">${shown.join(" · ")}</span>`} ${isFew && tables}
  </li>`;
}

/** The choice of the run whose tables are shown, where a button for each would take too much room. */
function tablesOf(app, runs, focus) {
  const options = runs.map(
    (one) =>
      html`<option value=${one.store.runId} selected=${one === focus}>${app.lookOf(one).label}</option>`,
  );
  return html`<label>
    Tables of <select onChange=${({ target }) => app.promote(target.value)}>${options}</select>
  </label>`;
}

/** The state of a run and its figures, as short texts. */
function factsOf(app, { store, connection }, staleS) {
  const isCurrent = connection.state === "open" && connection.silence_s <= staleS;
  const problem = isCurrent ? null : `⚠ ${connection.problem ?? "not connected"}`;
  const { run } = store;
  const isMissing = app.isMissing(store.runId);
  const { glyph, word } = statusOf(isMissing ? { status: "missing" } : run);
  if (!store.isLoaded) return isMissing ? ["⚠ no such run"] : [`${glyph} ${word}`, problem];
  return [
    `${glyph} ${word}`,
    `step ${count(run.global_step ?? 0)}`,
    ...["train_loss", "val_loss"]
      .filter((name) => store.last(name) !== undefined)
      .map((name) => `${name === "val_loss" ? "validation" : "train"} loss ${number(store.last(name))}`),
    run.started ? duration(Math.max(0, Math.round(store.runningUntil(!isCurrent) - run.started))) : null,
    problem,
  ];
}
