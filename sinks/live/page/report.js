/** The parts of the page that a report has in addition: its notes, and where its runs come from. */

import { report } from "./connection.js";
import { setText } from "./dom.js";
import { moment } from "./format.js";
import { copyText } from "./panels.js";
import { html, render } from "./view.js";

const CHANGES = { true: " with changes", null: " changes unknown" };

function byId(id) {
  return document.getElementById(id);
}

/** The name that people gave a run, beside the one by which the report identifies it. */
function nameOf({ name, label }) {
  return label !== name ? html`${label} <span class="hint">${name}</span>` : name;
}

/** Notes on the report and on its runs: plain text, whatever it looks like. */
function Notes() {
  const noted = report.table.filter(({ notes }) => notes.note || notes.tags.length);
  return html`
    ${report.notes && html`<p class="text">${report.notes}</p>`}
    ${noted.length > 0 &&
    html`<dl class="of-runs">
      ${noted.map(
        (row) => html`<div key=${row.name}>
          <dt>${nameOf(row)} ${row.notes.tags.map((tag) => html`<span class="tag">${tag}</span> `)}</dt>
          <dd class="text">${row.notes.note}</dd>
        </div>`,
      )}
    </dl>`}
    ${report.notices.map((text) => html`<p class="hint">Not in this file: ${text}.</p>`)}
  `;
}

function CopyButton({ text, label }) {
  const copy = (event) => copyText(text, event.currentTarget.parentElement.querySelector("code"));
  return html`<button type="button" class="quiet copy" aria-label=${`Copy: ${label}`} onClick=${copy}>Copy</button>`;
}

function Copied({ text, label, more = "" }) {
  return text && html`<code>${text}</code>${more} <${CopyButton} text=${text} label=${label} />`;
}

/** The commit and the command of each run. */
function Origins() {
  return html`<table>
    <caption class="visually-hidden">Commit and command of each run</caption>
    <thead>
      <tr>${["Run", "Started", "Commit", "Command"].map((head) => html`<th scope="col">${head}</th>`)}</tr>
    </thead>
    <tbody>
      ${report.table.map(
        (row) => html`<tr key=${row.name}>
          <th scope="row">${nameOf(row)}</th>
          <td>${row.started ? moment(row.started) : ""}</td>
          <td class="commit">
            <${Copied} text=${row.commit} label=${`commit of ${row.name}`} more=${CHANGES[row.dirty] ?? ""} />
          </td>
          <td class="wide"><${Copied} text=${row.command} label=${`command of ${row.name}`} /></td>
        </tr>`,
      )}
    </tbody>
  </table>`;
}

/** Show them, once. */
export function showReport() {
  const hasNotes = report.notes || report.notices.length || report.table.some(({ notes }) => notes.note || notes.tags.length);
  byId("notes-section").hidden = !hasNotes;
  render(html`<${Notes} />`, byId("notes"));
  // Results come first.
  byId("notes-section").after(byId("compare-section"));
  byId("origins-section").hidden = false;
  render(html`<${Origins} />`, byId("origins"));
}

/** The head of the page: of a report of several runs it shows the title, and the state of none. */
export function writeHead(store, isComparing) {
  setText(byId("run-name"), report.title);
  byId("run-name").title = report.title;
  const isOne = report.runs.length === 1;
  byId("status").hidden = byId("place").hidden = !isOne;
  setText(byId("run-others"), isOne && store.runId !== report.title ? store.runId : "");
  document.documentElement.classList.toggle("several", isComparing);
  document.title = `${report.title} – stagecast`;
}
