/** The options of a chart: a menu for all of them, and the dialog in which a chart is enlarged. */

import { Chart } from "./charts.js";
import { announce } from "./dom.js";
import { csvOf, pngOf, save, svgOf } from "./export.js";
import { count } from "./format.js";
import { html, render } from "./view.js";

export class ChartMenu {
  constructor(app) {
    this.app = app;
    this.root = document.getElementById("chart-menu");
    this.dialog = document.getElementById("enlarged");
    document.getElementById("enlarged-close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("close", () => {
      this.large.destroy();
      this.large.root.remove();
    });
    this.root.addEventListener("toggle", ({ newState }) => {
      if (newState === "open") this.root.querySelector("input, button")?.focus();
    });
  }

  open(chart) {
    const isLarge = this.dialog.contains(chart.root);
    this.root.setAttribute("aria-label", `Options of ${chart.title}`);
    render(null, this.root); // its checkboxes may be another chart's
    render(this.#items(chart, isLarge), this.root);
    // Elements outside of an open dialog are inert.
    (isLarge ? this.dialog : document.body).append(this.root);
    this.root.showPopover();
    const button = chart.button.getBoundingClientRect();
    const { width, height } = this.root.getBoundingClientRect();
    const below = button.bottom + 4;
    this.root.style.left = `${Math.max(8, Math.min(button.right, innerWidth - 8) - width)}px`;
    this.root.style.top = `${below + height > innerHeight - 8 ? Math.max(8, button.top - height - 4) : below}px`;
  }

  #items(chart, isLarge) {
    const choice = (label, isChosen, choose) =>
      html`<label class="check">
        <input type="checkbox" checked=${isChosen} onChange=${({ target }) => choose(target.checked)} /> ${label}
      </label>`;
    const setting = (name) => (isOn) => {
      this.app.view[name].own.set(chart.key, isOn);
      this.app.board.changed();
    };
    const actions = [
      ...(isLarge ? [] : [["Enlarge", () => this.#enlarge(chart)], ...this.#placing(chart)]),
      ["Save CSV", () => save(csvOf(chart), "text/csv", chart.title, "csv")],
      chart.u && ["Save SVG", () => save(svgOf(chart), "image/svg+xml", chart.title, "svg")],
      chart.u && ["Save PNG", async () => save(await pngOf(chart), "image/png", chart.title, "png")],
    ];
    const act = (action) => () => {
      this.root.hidePopover();
      action();
    };
    return html`
      ${!chart.range && choice("Logarithmic scale", chart.isLog, setting("log"))}
      ${!chart.range && choice("Ignore outliers", chart.isRobust, setting("robust"))}
      ${choice("Show as table", chart.isTable, (isTable) => chart.showTable(isTable))}
      ${actions
        .filter(Boolean)
        .map(([text, action]) => html`<button type="button" class="quiet" onClick=${act(action)}>${text}</button>`)}
    `;
  }

  /** The actions on a chart's place. */
  #placing(chart) {
    if (!chart.place) return [];
    const { sections } = this.app;
    const { keys } = chart.place;
    const at = keys.indexOf(chart.key);
    const isPinned = sections.isPinned(chart);
    const move = (by) => () => {
      const place = sections.move(chart, by);
      chart.button.focus();
      announce(`${chart.title} is chart ${count(place + 1)} of ${count(keys.length)}`);
    };
    const pin = () => {
      sections.pin(chart, !isPinned);
      [...this.app.board.charts].find((one) => one.key === chart.key)?.button.focus();
      announce(`${chart.title} is ${isPinned ? "not pinned any more" : "pinned"}`);
    };
    return [
      [isPinned ? "Unpin" : "Pin to the top", pin],
      at > 0 && ["Move forward", move(-1)],
      at < keys.length - 1 && ["Move back", move(1)],
    ];
  }

  #enlarge(chart) {
    const { board } = this.app;
    const height = Math.max(200, Math.round(innerHeight * 0.85) - 170);
    this.large = new Chart({ ...chart.options, height, isSmall: false });
    board.add(this.large);
    document.getElementById("enlarged-place").replaceChildren(this.large.root);
    this.dialog.showModal();
  }
}
