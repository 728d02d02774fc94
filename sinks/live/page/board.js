/** All charts: their visibility, and the schedule of drawing. */

import { contained } from "./dom.js";
import { forgetColours } from "./theme.js";

/**
 * Minimum time between two passes, which draw all due charts together, per chart of the first one: without a GPU, the
 * browser paints each for 5 ms, after the scripts, which cannot measure it...
 */
const PER_CHART_MS = 250;
/** ...maximum share of the time that passes take... */
const SHARE = 0.25;
/** ...and maximum script time per animation frame. */
const BUDGET_MS = 12;

export class Board {
  constructor(view) {
    this.view = view; // a `View`
    this.charts = new Set();
    this.lit = null; // the key of the highlighted lines
    this.draws = { count: 0, ms: 0, worstMs: 0 };
    this.#sight = new IntersectionObserver((entries) => this.#seen(entries), { rootMargin: "150px" });
    this.#size = new ResizeObserver((entries) => {
      for (const { target } of entries) target.chart?.touch();
      this.wake();
    });
    addEventListener("beforeprint", () => this.print());
    addEventListener("afterprint", () => this.printed());
    // A preview, say of the browser's own tools, sends no events.
    matchMedia("print").addEventListener("change", ({ matches }) => (matches ? this.print() : this.printed()));
  }

  /** For printing, draw all charts, at the width of the paper and in its colours. */
  print() {
    if (document.documentElement.classList.contains("printing")) return;
    document.documentElement.classList.add("printing");
    this.#redraw(() => true);
  }

  printed() {
    document.documentElement.classList.remove("printing");
    this.#redraw((chart) => chart.isSeen);
  }

  #redraw(isWanted) {
    forgetColours();
    for (const chart of this.charts) {
      chart.rest();
      if (isWanted(chart)) chart.draw();
    }
  }

  #sight;
  #size;
  #asked = false;
  #cost_ms = 10; // of a pass, with its painting, which scripts cannot measure
  #passAt = 0;
  #inPass = 0; // charts drawn since the newest pass began
  #timer = null;

  add(chart) {
    chart.board = this;
    chart.plot.chart = chart.root.chart = chart;
    this.charts.add(chart);
    this.#sight.observe(chart.root);
    this.#size.observe(chart.plot);
  }

  remove(chart) {
    this.charts.delete(chart);
    this.#sight.unobserve(chart.root);
    this.#size.unobserve(chart.plot);
  }

  #seen(entries) {
    for (const { target, isIntersecting } of entries) {
      const { chart } = target;
      if (!this.charts.has(chart)) continue;
      chart.isSeen = isIntersecting;
      if (chart.isSeen) chart.touch();
      else chart.rest(); // a canvas out of sight would hold memory
    }
    this.wake();
  }

  /** Redraw everything after a change of settings. */
  invalidate({ rebuild = false } = {}) {
    if (rebuild) forgetColours();
    for (const chart of this.charts) {
      if (rebuild) chart.rest();
      chart.touch();
    }
    this.wake();
  }

  zoom(range) {
    this.view.zoom = range;
    this.changed();
  }

  /** Hide a curve, or show it again. */
  hide(key) {
    if (!this.view.hidden.delete(key)) this.view.hidden.add(key);
    this.changed();
  }

  /** Highlight the lines with a key in all charts, and whatever else of the page is marked with it; null: none. */
  highlight(key) {
    if (key === this.lit) return;
    this.lit = key;
    for (const chart of this.charts) if (chart.isSeen) chart.highlight(key);
    for (const node of document.querySelectorAll("[data-key]")) node.toggleAttribute("data-lit", node.dataset.key === key);
    document.documentElement.toggleAttribute("data-lighting", key !== null);
    this.onhighlight(key);
  }

  /** The reader has changed a setting. */
  changed() {
    this.onchange();
    this.invalidate();
  }

  /** Schedule charts with new points. */
  wake() {
    if (this.#asked || document.hidden) return;
    this.#asked = true;
    requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    this.#asked = false;
    const began = performance.now();
    const due = this.#passAt + Math.max(PER_CHART_MS * this.#inPass, this.#cost_ms / SHARE);
    const isDue = began >= due;
    // Before a pass is due, charts are not asked for news: there may be a hundred curves in each.
    const waiting = [...this.charts].filter((chart) => chart.isSeen && (isDue ? chart.hasNews() : chart.isTouched));
    waiting.sort((a, b) => a.drawnAt - b.drawnAt);
    if (isDue) [this.#passAt, this.#inPass] = [began, 0];
    let soonest = isDue ? Infinity : due - began;
    let drawn = 0;
    for (const chart of waiting) {
      if (performance.now() - began > BUDGET_MS) {
        chart.touch(); // in the next animation frame
        soonest = 0;
        continue;
      }
      if (!contained(() => chart.draw())) this.remove(chart);
      drawn += 1;
      this.#inPass += 1;
      this.draws.count += 1;
      this.draws.ms += chart.drawMs;
      this.draws.worstMs = Math.max(this.draws.worstMs, chart.drawMs);
    }
    if (drawn) this.#measure(began);
    if (soonest === 0) this.wake();
    else if (soonest < Infinity && this.#timer === null) {
      this.#timer = setTimeout(() => {
        this.#timer = null;
        this.wake();
      }, soonest);
    }
  }

  /** Measure a pass by its next animation frame, which is late where painting is slow (without a GPU). */
  #measure(began) {
    requestAnimationFrame(() => {
      const cost = Math.min(250, Math.max(1, performance.now() - began - 8));
      this.#cost_ms += (cost - this.#cost_ms) * 0.2;
    });
  }
}
