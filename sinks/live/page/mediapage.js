/** The sections of histograms and media, and the one slider that moves both. */

import { HistogramCard } from "./heatmap.js";
import { labelOf } from "./names.js";
import { Lightbox } from "./lightbox.js";
import { AtStep, nearest, Panel, panelsOf, stepOf } from "./media.js";
import { html, render } from "./view.js";

const LINK_MS = 200;

function byId(id) {
  return document.getElementById(id);
}

export class MediaPage {
  constructor(app) {
    this.app = app;
    this.enlarged = null; // {runId, name}: an image in the dialog
    byId("histograms-log").addEventListener("change", ({ target }) => {
      this.app.view.isLogCount = target.checked;
      this.changed();
    });
  }

  /** A choice of the reader: shown at once, and in the link soon, because a slider makes many. */
  changed() {
    this.fill();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.app.keepFragment(), LINK_MS);
  }

  at(step) {
    this.app.view.at = step;
    this.changed();
  }

  toggle(keys, key, isOn) {
    if (isOn) keys.add(key);
    else keys.delete(key);
    this.changed();
  }

  /** Show what the chosen runs have logged; histograms are those of the first run. */
  fill() {
    const { app } = this;
    const { view } = app;
    const focus = app.focus()?.store;
    if (!focus?.isLoaded) return;
    const stores = app.shownRuns().map(({ store }) => store).filter(({ isLoaded }) => isLoaded);
    stores.sort((a, b) => Number(b === focus) - Number(a === focus));
    const panels = panelsOf(stores);
    const names = [...focus.histograms.keys()].sort();
    const rows = names.flatMap((name) => focus.histograms.get(name));
    const steps = [...new Set([...stores.flatMap(({ media }) => media), ...rows].map(stepOf))].sort((a, b) => a - b);
    byId("at-step").hidden = steps.length < 2;
    render(steps.length > 1 ? html`<${AtStep} steps=${steps} at=${view.at} onAt=${(step) => this.at(step)} />` : null, byId("at-step"));
    this.fillHistograms(focus, names);
    byId("media-section").hidden = !panels.length;
    const on = {
      enlarge: (one) => {
        this.enlarged = { runId: one.runId, name: one.name };
        if (one.item !== nearest(this.itemsOf(panels), view.at).item) this.at(stepOf(one.item));
        else this.fill();
      },
      strip: (key, isOn) => this.toggle(view.strips, key, isOn),
    };
    const isBeside = app.isComparing();
    const shown = panels.map((panel) => html`<${Panel} key=${panel.key} ...${{ panel, at: view.at, isStrip: view.strips.has(panel.key), isBeside, on }} />`);
    render(html`${shown}`, byId("media"));
    this.fillLightbox(panels, isBeside);
  }

  fillHistograms(focus, names) {
    const { view } = this.app;
    byId("histograms-section").hidden = !names.length;
    byId("histograms-log").checked = view.isLogCount;
    const on = { bars: (name, isOn) => this.toggle(view.bars, name, isOn) };
    const cards = names.map((name) => html`<${HistogramCard} key=${name} ...${{ name, rows: focus.histograms.get(name), at: view.at, isBars: view.bars.has(name), isLog: view.isLogCount, on }} />`);
    render(html`${cards}`, byId("histograms"));
  }

  itemsOf(panels) {
    const { runId, name } = this.enlarged;
    const panel = panels.find((one) => one.kind === "image" && one.name === name);
    return panel?.runs.find((run) => run.runId === runId)?.items ?? [];
  }

  fillLightbox(panels, isBeside) {
    const items = this.enlarged ? this.itemsOf(panels) : [];
    const item = items.length ? (nearest(items, this.app.view.at).item ?? items[0]) : null;
    const on = {
      step: (one) => this.at(stepOf(one)),
      close: () => {
        this.enlarged = null;
        this.fill();
      },
    };
    const title = item && `${this.enlarged.name}${isBeside ? `, of ${labelOf(this.enlarged.runId)}` : ""}`;
    const { runId } = this.enlarged ?? {};
    render(item ? html`<${Lightbox} key=${`${runId} ${title}`} ...${{ title, runId, item, items, on }} />` : null, byId("lightbox"));
  }
}
