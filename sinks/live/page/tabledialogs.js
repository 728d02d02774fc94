/** The dialogs of the run table: its columns, and one run. */

import { count } from "./format.js";
import { matcher } from "./match.js";
import { Component, html } from "./view.js";

/** Maximum columns that are offered at once; a search finds the others. */
const MOST_OFFERED = 60;

/** Chooses columns and their order. */
export class Chooser extends Component {
  state = { search: "" };

  componentDidMount() {
    this.root.querySelector("input").focus();
  }

  render({ columns, ids, isUsual, onChange, onClose }, { search }) {
    const { matches, problem } = matcher(search);
    const others = columns.ids.filter((id) => !ids.includes(id) && (matches(id) || matches(columns.column(id).head)));
    const offered = others.slice(0, MOST_OFFERED);
    const move = (id, by) => {
      const at = ids.indexOf(id);
      const next = ids.filter((one) => one !== id);
      next.splice(Math.max(0, at + by), 0, id);
      onChange(next);
    };
    const item = (id, isShown) => {
      const { head } = columns.column(id);
      const toggle = () => onChange(isShown ? ids.filter((one) => one !== id) : [...ids, id]);
      return html`<li key=${id}>
        <label class="check"><input type="checkbox" checked=${isShown} onChange=${toggle} /> ${head}</label>
        ${isShown &&
        html`<span>
          <button type="button" class="quiet" aria-label=${`Move ${head} to the left`} disabled=${ids[0] === id} onClick=${() => move(id, -1)}>
            ←
          </button>
          <button type="button" class="quiet" aria-label=${`Move ${head} to the right`} disabled=${ids.at(-1) === id} onClick=${() => move(id, 1)}>
            →
          </button>
        </span>`}
      </li>`;
    };
    const left = others.length - offered.length;
    return html`<div
      class="chooser"
      ref=${(root) => (this.root = root)}
      role="group"
      aria-label="Columns"
      onKeyDown=${(event) => {
        if (event.key === "Escape") onClose();
      }}
    >
      <div class="row">
        <input
          type="search"
          aria-label="Search columns"
          placeholder="Search columns: a metric, a hyperparameter"
          value=${search}
          onInput=${({ target }) => this.setState({ search: target.value })}
        />
        <button type="button" class="quiet" disabled=${isUsual} onClick=${() => onChange(null)}>Usual columns</button>
        <button type="button" onClick=${onClose}>Close</button>
      </div>
      ${problem && html`<p class="hint" role="status">${problem}</p>`}
      <ul aria-label="Shown columns">
        ${ids.map((id) => item(id, true))}
      </ul>
      <ul aria-label="Other columns">
        ${offered.map((id) => item(id, false))}
      </ul>
      <p class="hint" role="status">
        ${!others.length && search ? `No other column matches “${search.trim()}”.` : ""}
        ${left > 0 ? `${count(left)} more: search for them.` : ""}
      </p>
    </div>`;
  }
}

/** The options of a run: pin, hide, and what people note about it. */
export class RowDialog extends Component {
  state = { problem: null, isBusy: false, removed: new Set(), hasColour: Boolean(this.props.row.notes.colour) };

  componentDidMount() {
    this.dialog.showModal();
  }

  #save = async (event) => {
    event.preventDefault();
    const { row, onNote } = this.props;
    const { notes } = row;
    const form = new FormData(event.target);
    const change = {};
    const name = form.get("name").trim();
    if (name !== notes.name) change.name = name;
    if (form.get("note") !== notes.note) change.note = form.get("note");
    const colour = form.get("has-colour") ? form.get("colour") : "";
    if (colour !== notes.colour) change.colour = colour;
    const added = form.get("tags").split(",").map((tag) => tag.trim()).filter(Boolean);
    if (added.length) change.add_tags = added;
    if (this.state.removed.size) change.remove_tags = [...this.state.removed];
    if (!Object.keys(change).length) {
      this.dialog.close();
      return;
    }
    this.setState({ isBusy: true, problem: null });
    try {
      await onNote(change);
      this.dialog.close();
    } catch (error) {
      this.setState({ isBusy: false, problem: error.message });
    }
  };

  #act(set) {
    this.props.onToggle(set);
    this.dialog.close();
  }

  render({ row, href, isPinned, isHidden, onNote, onClose }, { problem, isBusy, removed, hasColour }) {
    const { notes } = row;
    const untag = (tag) => {
      const next = new Set(removed);
      if (!next.delete(tag)) next.add(tag);
      this.setState({ removed: next });
    };
    return html`<dialog class="run-dialog" ref=${(dialog) => (this.dialog = dialog)} aria-labelledby="run-dialog-title" onClose=${onClose}>
      <h2 id="run-dialog-title">${row.label}</h2>
      ${row.label !== row.name && html`<p class="hint">${row.name}</p>`}
      <div class="row">
        <a href=${href} class="button">Open</a>
        <button type="button" onClick=${() => this.#act("pinned")}>${isPinned ? "Unpin" : "Pin to the top"}</button>
        <button type="button" onClick=${() => this.#act("hidden")}>${isHidden ? "Show again" : "Hide"}</button>
        ${!onNote && html`<button type="button" onClick=${() => this.dialog.close()}>Close</button>`}
      </div>
      ${!onNote && notes.note && html`<p class="note">${notes.note}</p>`}
      ${onNote &&
      html`<form onSubmit=${this.#save}>
        <label class="field">Name <input type="text" name="name" maxlength="300" defaultValue=${notes.name} placeholder=${row.label} autocomplete="off" /></label>
        ${notes.tags.length > 0 &&
        html`<div class="tags" role="group" aria-label="Tags">
          ${notes.tags.map(
            (tag) => html`<button type="button" class="tag" aria-pressed=${String(!removed.has(tag))} title="Keep or remove" onClick=${() => untag(tag)}>
              ${tag}
            </button>`,
          )}
        </div>`}
        <label class="field">New tags, with commas <input type="text" name="tags" autocomplete="off" /></label>
        <label class="field">Note <textarea name="note" rows="4" maxlength="4000" defaultValue=${notes.note}></textarea></label>
        <div class="colour">
          <label class="check">
            <input type="checkbox" name="has-colour" checked=${hasColour} onChange=${({ target }) => this.setState({ hasColour: target.checked })} />
            Own colour
          </label>
          <input type="color" name="colour" aria-label="Colour" defaultValue=${notes.colour || "#1f62b8"} disabled=${!hasColour} />
        </div>
        ${problem && html`<p class="error" role="alert">${problem}</p>`}
        <div class="row">
          <button type="button" onClick=${() => this.dialog.close()}>Cancel</button>
          <button type="submit" disabled=${isBusy}>Save</button>
        </div>
      </form>`}
    </dialog>`;
  }
}
