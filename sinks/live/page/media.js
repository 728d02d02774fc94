/** Images, texts and histograms: a card for each name, and a slider through its steps. */

import { addressOf, get, report, token } from "./connection.js";
import { el, reconcile, setText, svg, table } from "./dom.js";
import { count, number } from "./format.js";

function byId(id) {
  return document.getElementById(id);
}

class Pages {
  constructor(title, show) {
    this.show = show;
    this.items = [];
    this.range = el("input", {
      type: "range",
      min: 0,
      max: 0,
      value: 0,
      "aria-label": `Step of ${title}`,
      oninput: () => this.#follow(),
    });
    this.label = el("span");
    this.body = el("div");
    this.pick = el("div", { class: "pick" }, this.range, this.label);
    this.root = el("article", { class: "card" }, el("h3", { text: title }), this.body, this.pick);
    this.isAtEnd = true;
  }

  fill(items) {
    const before = this.items[Number(this.range.value)];
    this.items = items;
    this.range.max = items.length - 1;
    const kept = items.indexOf(before);
    this.range.value = this.isAtEnd || kept < 0 ? items.length - 1 : kept;
    this.range.hidden = items.length < 2;
    this.#render();
  }

  #follow() {
    this.isAtEnd = Number(this.range.value) === this.items.length - 1;
    this.#render();
  }

  #render() {
    const item = this.items[Number(this.range.value)];
    const step = `step ${count(item.global_step ?? item.step)}`;
    setText(this.label, step);
    this.range.setAttribute("aria-valuetext", step);
    if (this.item === item) return;
    this.item = item;
    this.show(this.body, item, step);
  }
}

const mediaCards = new Map();
export function fillMedia(store) {
  byId("media-section").hidden = !store.media.length;
  const groups = new Map();
  for (const item of store.media) {
    const key = JSON.stringify([store.runId, item.kind, item.name]);
    groups.set(key, [...(groups.get(key) ?? []), item]);
  }
  reconcile(
    byId("media"),
    mediaCards,
    [...groups.keys()],
    (key) => new Pages(JSON.parse(key)[2], (body, item, step) => showMedia(body, item, step, store)),
  );
  for (const [key, items] of groups) mediaCards.get(key).fill(items);
}

async function showMedia(body, item, step, store) {
  if (item.kind === "text") {
    body.replaceChildren(
      el("pre", { tabindex: "0", role: "region", "aria-label": `${item.name}, ${step}`, text: item.text ?? "" }),
    );
    return;
  }
  const address = addressOf(store.runId, `/media/${String(item.path).split("/").map(encodeURIComponent).join("/")}`);
  const image = el("img", {
    alt: `${item.name}, ${step}`,
    loading: "lazy",
    decoding: "async",
    width: item.width,
    height: item.height,
  });
  body.replaceChildren(image);
  image.addEventListener("error", () =>
    image.replaceWith(el("p", { class: "empty", text: "This image does not exist (any more)" })),
  );
  if (report || !token.get()) {
    image.src = report ? (report.media[`${store.runId}/${item.path}`] ?? "data:,") : address;
    return;
  }
  try {
    // The request of an <img> cannot carry the token: the image is fetched, and inserted as data.
    const blob = await (await get(address)).blob();
    const reader = new FileReader();
    reader.onload = () => (image.src = reader.result);
    reader.readAsDataURL(blob);
  } catch {
    image.dispatchEvent(new Event("error"));
  }
}

const histogramCards = new Map();
export function fillHistograms(store) {
  const names = [...store.histograms.keys()].sort();
  byId("histograms-section").hidden = !names.length;
  reconcile(
    byId("histograms"),
    histogramCards,
    names,
    (name) => new Pages(name, (body, item, step) => showHistogram(body, name, item, step)),
  );
  for (const name of names) histogramCards.get(name).fill(store.histograms.get(name));
}

function showHistogram(body, name, { low, high, counts }, step) {
  const most = Math.max(1, ...counts);
  const width = 100 / Math.max(1, counts.length);
  const bars = counts.map((n, i) =>
    svg("rect", { x: i * width, y: 100 - (100 * n) / most, width: width * 0.92, height: (100 * n) / most }),
  );
  const all = counts.reduce((sum, n) => sum + n, 0);
  const label = `Histogram of ${name}, ${step}: ${count(all)} values from ${number(low)} to ${number(high)}, at most ${count(most)} in a bin`;
  const rows = counts.map((n, i) => [
    number(low + ((high - low) * i) / counts.length),
    number(low + ((high - low) * (i + 1)) / counts.length),
    count(n),
  ]);
  const heads = [
    { head: "From", number: true },
    { head: "To", number: true },
    { head: "Count", number: true },
  ];
  const asTable = el("details", {}, el("summary", { class: "hint", text: "Table" }));
  asTable.addEventListener("toggle", () => {
    if (asTable.open && asTable.children.length === 1) asTable.append(table(label, heads, rows, { hideCaption: true }));
  });
  body.replaceChildren(
    svg(
      "svg",
      { class: "bars", viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": label },
      ...bars,
    ),
    el(
      "div",
      { class: "ends", "aria-hidden": "true" },
      el("span", { text: number(low) }),
      el("span", { text: number(high) }),
    ),
    asTable,
  );
}
