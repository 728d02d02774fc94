/** The options of a chart: a menu for all of them, and the dialog in which a chart is enlarged. */

import { Chart } from "./charts.js";
import { announce, el } from "./dom.js";
import { csvOf, pngOf, save, svgOf } from "./export.js";
import { count } from "./format.js";

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
    const { view, board } = this.app;
    const checkbox = (label, checked, onchange) =>
      el("label", { class: "check" }, el("input", { type: "checkbox", checked, onchange }), label);
    const choice = (label, name, checked) =>
      checkbox(label, checked, ({ target }) => {
        view[name].own.set(chart.key, target.checked);
        board.changed();
      });
    const action = (text, act) =>
      el("button", {
        type: "button",
        class: "quiet",
        text,
        onclick: () => {
          this.root.hidePopover();
          act();
        },
      });
    const isLarge = this.dialog.contains(chart.root);
    this.root.setAttribute("aria-label", `Options of ${chart.title}`);
    this.root.replaceChildren(
      ...[
        chart.range ? null : choice("Logarithmic scale", "log", chart.isLog),
        chart.range ? null : choice("Ignore outliers", "robust", chart.isRobust),
        checkbox("Show as table", chart.isTable, ({ target }) => chart.showTable(target.checked)),
        isLarge ? null : action("Enlarge", () => this.#enlarge(chart)),
        ...(isLarge || !chart.place ? [] : this.#placing(chart, action)),
        action("Save CSV", () => save(csvOf(chart), "text/csv", chart.title, "csv")),
        ...(chart.u ? [
          action("Save SVG", () => save(svgOf(chart), "image/svg+xml", chart.title, "svg")),
          action("Save PNG", () => pngOf(chart).then((image) => save(image, "image/png", chart.title, "png"))),
        ] : []),
      ].filter(Boolean),
    );
    // Elements outside of an open dialog are inert.
    (isLarge ? this.dialog : document.body).append(this.root);
    this.root.showPopover();
    const button = chart.button.getBoundingClientRect();
    const { width, height } = this.root.getBoundingClientRect();
    const below = button.bottom + 4;
    this.root.style.left = `${Math.max(8, Math.min(button.right, innerWidth - 8) - width)}px`;
    this.root.style.top = `${below + height > innerHeight - 8 ? Math.max(8, button.top - height - 4) : below}px`;
  }

  #placing(chart, action) {
    const { sections } = this.app;
    const { keys } = chart.place;
    const at = keys.indexOf(chart.key);
    const isPinned = sections.isPinned(chart);
    const move = (by) => {
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
      action(isPinned ? "Unpin" : "Pin to the top", pin),
      at > 0 ? action("Move forward", () => move(-1)) : null,
      at < keys.length - 1 ? action("Move back", () => move(1)) : null,
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
