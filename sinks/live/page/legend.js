/** The legend of a chart, and the list at its cursor. */

import { el } from "./dom.js";
import { count } from "./format.js";
import { colours } from "./theme.js";
import { html, render } from "./view.js";

/** A sample of a curve's line: colour and pattern. */
export function Swatch({ curve }) {
  const { colour, layer, isHatched, width = 2, dash = [] } = curve;
  const hatching = "M7 10 L17 0 M7 5 L12 0 M12 10 L17 5";
  return html`<svg class="swatch" width="26" height="10" aria-hidden="true">
    ${layer
      ? html`<rect x="7" y="0" width="10" height="10" rx="2" fill=${colour} />
          ${isHatched && html`<path d=${hatching} stroke=${colours().surface} stroke-width="1.5" />`}`
      : html`<line
          x1="0"
          x2="26"
          y1="5"
          y2="5"
          stroke=${colour}
          stroke-width=${width}
          stroke-dasharray=${dash.join(" ") || null}
        />`}
  </svg>`;
}

/** The sample as an element of its own. */
export function swatch(curve) {
  const holder = el("span");
  render(html`<${Swatch} curve=${curve} />`, holder);
  return holder.firstElementChild;
}

/** Properties of an element that makes the other lines paler while the mouse or the focus is on it. */
export function highlighting(board, key) {
  const [on, off] = [() => board.highlight(key), () => board.highlight(null)];
  return { onMouseEnter: on, onFocus: on, onMouseLeave: off, onBlur: off };
}

/**
 * Write a legend. `entries`: `{curve, key, label, isHidden, value, raw}`; of several, each is a button that hides its curve,
 * and makes the others paler while the mouse or the focus is on it. `board`: hides and highlights by `key`.
 */
export function writeLegend(root, entries, board) {
  const item = ({ curve, key, label, isHidden, value, raw }) => {
    const name = html`<${Swatch} curve=${curve} /><span class="name" title=${label}>${label}</span>`;
    const button = html`<button
      type="button"
      title=${label}
      aria-pressed=${String(!isHidden)}
      onClick=${() => board.hide(key)}
      ...${highlighting(board, key)}
    >
      ${name}
    </button>`;
    return html`<li key=${label}>
      ${entries.length > 1 ? button : name}
      <span class="value">${value}${raw && html`<span class="raw"> raw ${raw}</span>`}</span>
    </li>`;
  };
  render(entries.map(item), root);
}

/** Write the list at a chart's cursor. `read`: `{curve, value, raw}`, some of `all` curves; `lit`: the highlighted one. */
export function writeTip(root, read, all, lit) {
  root.hidden = !read.length;
  const item = (one) =>
    html`<li class=${one === lit ? "lit" : null}>
      <${Swatch} curve=${one.curve} /><span class="name">${one.curve.label}</span>
      <span class="value">${one.value}${one.raw && html`<span class="raw"> raw ${one.raw}</span>`}</span>
    </li>`;
  const more = all - read.length;
  render([...read.map(item), more > 0 && read.length && html`<li class="hint">and ${count(more)} more</li>`], root);
}
