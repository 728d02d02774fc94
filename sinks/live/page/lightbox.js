/** An image in a dialog: Escape closes it, the arrow keys show the previous and the next step. */

import { count } from "./format.js";
import { Picture, stepOf } from "./media.js";
import { Component, html } from "./view.js";

/** `items`: those of one run and name; `on`: `{step(item), close()}`. The browser keeps the focus, and returns it. */
export class Lightbox extends Component {
  state = { isActual: false };

  componentDidMount() {
    this.dialog.showModal();
  }

  move(by) {
    const { items, item, on } = this.props;
    const next = items[items.indexOf(item) + by];
    if (next) on.step(next);
  }

  key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.move(by);
  }

  render({ title, runId, item, items, on }, { isActual }) {
    const place = items.indexOf(item);
    const words = `${title}, step ${count(stepOf(item))}`;
    const zoom = () => this.setState({ isActual: !isActual });
    return html`<dialog class="lightbox" aria-label=${title} ref=${(node) => (this.dialog = node)} onClose=${on.close} onKeyDown=${(event) => this.key(event)}>
      <div class="lightbox-head">
        <span role="status">${words} · ${count(place + 1)} of ${count(items.length)}</span>
        <button type="button" aria-label="Previous step" aria-disabled=${String(place <= 0)} onClick=${() => this.move(-1)}>←</button>
        <button type="button" aria-label="Next step" aria-disabled=${String(place >= items.length - 1)} onClick=${() => this.move(1)}>→</button>
        <button type="button" aria-pressed=${String(isActual)} onClick=${zoom}>Actual pixels</button>
        <button type="button" onClick=${() => this.dialog.close()}>Close</button>
      </div>
      <div class="lightbox-image" data-actual=${isActual ? "" : null} tabindex="0" role="region" aria-label=${`Image: ${words}`}>
        <${Picture} runId=${runId} item=${item} alt=${words} />
      </div>
    </dialog>`;
  }
}
