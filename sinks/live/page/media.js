/** Images, sounds, tables and texts: a panel for each name, with what each run logged at the step of the page's slider. */

import { addressOf, get, report, token } from "./connection.js";
import { DataTable } from "./datatable.js";
import { count } from "./format.js";
import { labelOf } from "./names.js";
import { Component, html } from "./view.js";

/** Maximum images of a run beside each other. */
const MOST_BESIDE = 12;

/** The panels of runs: `[{key, kind, name, runs: [{runId, items}]}]`; the items of a run by their steps. */
export function panelsOf(stores) {
  const panels = new Map();
  for (const { runId, media } of stores)
    for (const item of media) {
      const key = `${item.kind} ${item.name}`;
      if (!panels.has(key)) panels.set(key, { key, kind: item.kind, name: item.name, runs: new Map() });
      const { runs } = panels.get(key);
      if (!runs.has(runId)) runs.set(runId, { runId, items: [] });
      runs.get(runId).items.push(item);
    }
  return [...panels.values()].map((panel) => ({ ...panel, runs: [...panel.runs.values()] }));
}

export function stepOf(item) {
  return item.global_step ?? item.step;
}

/** The item at a step, or the nearest before it; null means the newest. `{item, words}` */
export function nearest(items, at) {
  const item = at === null ? items.at(-1) : items.findLast((one) => stepOf(one) <= at);
  if (!item) return { item: null, words: `nothing up to step ${count(at)}; it starts at step ${count(stepOf(items[0]))}` };
  const step = `step ${count(stepOf(item))}`;
  return { item, words: at === null || stepOf(item) === at ? step : `${step}, the nearest before step ${count(at)}` };
}

/** Some of many, evenly, with the first and the last. */
export function spread(items, most) {
  if (items.length <= most) return items;
  return Array.from({ length: most }, (_, at) => items[Math.round((at * (items.length - 1)) / (most - 1))]);
}

/** The slider that moves all panels and histograms. `steps`: all steps, sorted. */
export function AtStep({ steps, at, onAt }) {
  const found = at === null ? steps.length - 1 : Math.max(0, steps.findLastIndex((step) => step <= at));
  const words = at === null ? `step ${count(steps.at(-1))}, the newest` : `step ${count(at)}`;
  const move = ({ target }) => {
    const index = Number(target.value);
    onAt(index === steps.length - 1 ? null : steps[index]);
  };
  return html`
    <label class="at-step-label" for="at-step-range">Media and histograms at</label>
    <input id="at-step-range" type="range" min="0" max=${steps.length - 1} value=${found} aria-valuetext=${words} onInput=${move} />
    <span>${words}</span>
    <button type="button" class="quiet" disabled=${at === null} onClick=${() => onAt(null)}>Newest</button>`;
}

export function Panel({ panel, at, isStrip, isBeside, on }) {
  const { kind, name, runs } = panel;
  const hasMore = kind === "image" && runs.some(({ items }) => items.length > 1);
  const cells = runs.flatMap(({ runId, items }) => {
    const of = isBeside ? labelOf(runId) : "";
    const shown = isStrip ? spread(items, MOST_BESIDE) : null;
    const left = shown && shown.length < items.length ? ` (${shown.length} of ${count(items.length)} steps)` : "";
    const chosen = shown?.map((item) => ({ item, words: `step ${count(stepOf(item))}` })) ?? [nearest(items, at)];
    return chosen.map(({ item, words }, place) => {
      const caption = [of, `${words}${place ? "" : left}`].filter(Boolean).join(" · ");
      const key = shown ? `${runId} ${stepOf(item)}` : runId;
      const content = item ? html`<${Content} ...${{ kind, name, runId, item, words, of, on }} />` : null;
      return html`<figure key=${key}>${content}<figcaption class="hint">${caption}</figcaption></figure>`;
    });
  });
  return html`<article class="card media" data-kind=${kind}>
    <div class="media-head">
      <h3>${name}</h3>
      ${hasMore && html`<button type="button" class="quiet" aria-pressed=${String(isStrip)} onClick=${() => on.strip(panel.key, !isStrip)}>All steps</button>`}
    </div>
    <div class="beside">${cells}</div>
  </article>`;
}

function Content({ kind, name, runId, item, words, of, on }) {
  const label = `${name}, ${words}${of ? `, of ${of}` : ""}`;
  if (kind === "text") return html`<pre tabindex="0" role="region" aria-label=${label}>${item.text ?? ""}</pre>`;
  if (kind === "audio") return html`<${Sound} runId=${runId} path=${item.path} label=${label} />`;
  if (kind === "table") return html`<${DataTable} load=${() => load(runId, item.path)} address=${`${runId}/${item.path}`} label=${label} />`;
  return html`<button type="button" class="thumb" aria-label=${`Open ${label}`} onClick=${() => on.enlarge({ runId, name, item })}>
    <${Picture} runId=${runId} item=${item} alt=${label} />
  </button>`;
}

/** The file of a run as a response. */
async function load(runId, path) {
  if (!report) return get(mediaAddress(runId, path));
  const data = report.media[`${runId}/${path}`];
  if (!data) throw new Error("it is not in this file");
  return fetch(data);
}

function mediaAddress(runId, path) {
  return addressOf(runId, `/media/${String(path).split("/").map(encodeURIComponent).join("/")}`);
}

const MISSING = report ? "It is not in this file, or does not exist any more" : "It does not exist (any more)";

/** Free the memory behind an address. */
function forget(src) {
  if (src?.startsWith("blob:")) URL.revokeObjectURL(src);
}

/** A file that the page shows by an address; a subclass renders `state.src`. */
class Filed extends Component {
  state = { src: null, isGone: false };

  componentDidMount() {
    this.follow();
  }

  componentDidUpdate() {
    this.follow();
  }

  componentWillUnmount() {
    this.wanted = null;
    forget(this.state.src);
  }

  async follow() {
    const path = this.path();
    const wanted = `${this.props.runId}/${path}`;
    if (wanted === this.wanted) return;
    this.wanted = wanted;
    let src = null;
    try {
      src = await this.source(this.props.runId, path);
    } catch {
      // It is reported in place of the file.
    }
    if (this.wanted !== wanted) {
      forget(src);
      return;
    }
    forget(this.state.src);
    this.setState({ src, isGone: !src });
  }
}

export class Picture extends Filed {
  path() {
    return this.props.item.path;
  }

  async source(runId, path) {
    if (report) return report.media[`${runId}/${path}`];
    if (!token.get()) return mediaAddress(runId, path);
    // The request of an <img> cannot carry the token: the image is fetched, and inserted as data.
    const blob = await (await load(runId, path)).blob();
    return new Promise((done, failed) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.onerror = failed;
      reader.readAsDataURL(blob);
    });
  }

  render({ item, alt }, { src, isGone }) {
    if (isGone) return html`<span class="empty">${MISSING}</span>`;
    return html`<img alt=${alt} src=${src ?? undefined} decoding="async" width=${item.width} height=${item.height} onError=${() => this.setState({ isGone: true })} />`;
  }
}

class Sound extends Filed {
  path() {
    return this.props.path;
  }

  async source(runId, path) {
    if (report) return report.media[`${runId}/${path}`];
    return URL.createObjectURL(await (await load(runId, path)).blob()); // in memory, so that it can be sought
  }

  render({ label }, { src, isGone }) {
    if (isGone) return html`<span class="empty">${MISSING}</span>`;
    return html`<audio controls preload="metadata" aria-label=${label} src=${src ?? undefined}></audio>`;
  }
}
