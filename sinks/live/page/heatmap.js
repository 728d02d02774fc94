/** Histograms: over all steps as a heatmap, or at one step. */

import { labelsOf, labelsOn } from "./axes.js";
import { interpolateViridis, lab } from "./d3.min.js";
import { count, number } from "./format.js";
import { nearest } from "./media.js";
import { rebinned } from "./rebin.js";
import { Sized } from "./sized.js";
import { colours, forgetColours } from "./theme.js";
import { Component, html } from "./view.js";

const HEIGHT = 210;
/** The scale starts here, so that one element differs from an empty bin. */
const FAINTEST = 0.08;

/** Viridis reads the same to colour-blind people; few elements are near the surface's own lightness. */
function colourOf(share) {
  const place = FAINTEST + (1 - FAINTEST) * share;
  return interpolateViridis(lab(colours().surface).l < 50 ? place : 1 - place);
}

export function HistogramCard({ name, rows, at, isBars, isLog, on }) {
  return html`<article class="card histogram">
    <div class="media-head">
      <h3>${name}</h3>
      <button type="button" class="quiet" aria-pressed=${String(isBars)} onClick=${() => on.bars(name, !isBars)}>One step</button>
    </div>
    ${isBars ? html`<${Bars} name=${name} rows=${rows} at=${at} isLog=${isLog} />` : html`<${Heatmap} name=${name} rows=${rows} isLog=${isLog} />`}
  </article>`;
}

/** The common bins of rows: computed once, because each move of the slider renders all heatmaps. */
const known = new WeakMap();

function binnedOf(rows) {
  if (!known.has(rows)) known.set(rows, rebinned(rows));
  return known.get(rows);
}

function Heatmap({ name, rows, isLog }) {
  const binned = binnedOf(rows);
  if (!binned) return html`<p class="empty">No element was finite</p>`;
  const most = Math.max(1, ...binned.columns.flatMap(({ counts }) => counts));
  const logged = rows.reduce((sum, { skipped }) => sum + 1 + (skipped ?? 0), 0);
  const notes = [
    logged > binned.columns.length && `${count(binned.columns.length)} of ${count(logged)} steps, evenly chosen.`,
    binned.isChanged && `The bins change between steps: counts are divided among ${binned.bins} equal bins by overlap.`,
  ].filter(Boolean);
  return html`
    <${Sized} draw=${(width) => html`<${Plot} ...${{ name, binned, most, isLog, width }} />`} />
    <${Scale} most=${most} isLog=${isLog} />
    <p class="hint">${notes.join(" ")}</p>`;
}

function shareOf(value, most, isLog) {
  return isLog ? Math.log1p(value) / Math.log1p(most) : value / most;
}

function Scale({ most, isLog }) {
  const parts = Array.from({ length: 24 }, (_, at) => at / 23);
  return html`<div class="heat-scale" aria-hidden="true">
    <span>1</span>
    <svg viewBox="0 0 24 1" preserveAspectRatio="none">${parts.map((share, at) => html`<rect key=${at} x=${at} width="1.05" height="1" fill=${colourOf(share)} />`)}</svg>
    <span>${number(most)} in a bin${isLog ? ", logarithmic" : ""}</span>
  </div>`;
}

/** uPlot draws the axes and the cursor; the cells are drawn behind the cursor. */
class Plot extends Component {
  state = { read: "" };

  componentDidMount() {
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.restyle = () => {
      forgetColours();
      this.make();
    };
    this.dark.addEventListener("change", this.restyle);
    this.observer = new MutationObserver(this.restyle);
    this.observer.observe(document.documentElement, { attributeFilter: ["data-theme", "class"] });
    this.make();
  }

  componentDidUpdate(before) {
    if (["binned", "most", "isLog", "width"].some((one) => before[one] !== this.props[one])) this.make();
  }

  componentWillUnmount() {
    this.dark.removeEventListener("change", this.restyle);
    this.observer.disconnect();
    this.u?.destroy();
  }

  make() {
    this.u?.destroy();
    const { binned, width } = this.props;
    const steps = binned.columns.map(({ step }) => step);
    const between = steps.slice(1).map((step, at) => (step + steps[at]) / 2);
    const half = (between.length ? between[0] - steps[0] : 0.5) || 0.5;
    const last = (between.length ? steps.at(-1) - between.at(-1) : 0.5) || 0.5;
    this.edges = [steps[0] - half, ...between, steps.at(-1) + last];
    const { muted } = colours();
    const axis = { stroke: muted, grid: { show: false }, ticks: { stroke: muted, size: 4 }, font: "11px system-ui, sans-serif" };
    this.u = new uPlot(
      {
        width,
        height: HEIGHT,
        legend: { show: false },
        cursor: { drag: { x: false, y: false }, points: { show: false } },
        scales: {
          x: { time: false, range: [this.edges[0], this.edges.at(-1)] },
          y: { range: [binned.low, binned.high] },
        },
        axes: [
          { ...axis, size: 28, space: 70, values: (_, xs) => labelsOn("step", xs) },
          { ...axis, size: 56, values: (_, ys) => labelsOf(ys, number) },
        ],
        series: [{}, { paths: () => null, points: { show: false } }],
        hooks: { draw: [(u) => this.paint(u)], setCursor: [({ cursor }) => this.point(cursor)] },
      },
      [steps, steps.map(() => null)],
      this.root,
    );
  }

  valueAt(bin) {
    const { low, high, bins } = this.props.binned;
    return low * (1 - bin / bins) + high * (bin / bins);
  }

  paint(u) {
    const { binned, most, isLog } = this.props;
    const ys = Array.from({ length: binned.bins + 1 }, (_, bin) => Math.round(u.valToPos(this.valueAt(bin), "y", true)));
    const xs = this.edges.map((edge) => Math.round(u.valToPos(edge, "x", true)));
    binned.columns.forEach(({ counts }, column) =>
      counts.forEach((value, bin) => {
        if (!value) return;
        u.ctx.fillStyle = colourOf(shareOf(value, most, isLog));
        u.ctx.fillRect(xs[column], ys[bin + 1], Math.max(1, xs[column + 1] - xs[column]), Math.max(1, ys[bin] - ys[bin + 1]));
      }),
    );
  }

  point({ left, top }) {
    if (left === undefined || left < 0 || this.isKeyed) return;
    const [x, y] = [this.u.posToVal(left, "x"), this.u.posToVal(top, "y")];
    const { low, high, bins } = this.props.binned;
    const column = Math.max(0, this.edges.findLastIndex((edge) => edge <= x));
    this.read(column, Math.floor(((y / 2 - low / 2) / (high / 2 - low / 2)) * bins));
  }

  read(column, bin) {
    const { columns, bins, isChanged } = this.props.binned;
    this.column = Math.min(columns.length - 1, Math.max(0, column));
    this.bin = Math.min(bins - 1, Math.max(0, bin));
    const { step, counts } = columns[this.column];
    const value = counts[this.bin];
    const told = isChanged && !Number.isInteger(value) ? `about ${number(value)}` : count(value);
    const range = `${number(this.valueAt(this.bin))} to ${number(this.valueAt(this.bin + 1))}`;
    this.setState({ read: `step ${count(step)}, bin ${range}: ${told}` });
  }

  key(event) {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const { columns, bins } = this.props.binned;
    this.read((this.column ?? columns.length) + move[0], (this.bin ?? Math.floor(bins / 2)) + move[1]);
    const left = this.u.valToPos(columns[this.column].step, "x");
    const top = this.u.valToPos((this.valueAt(this.bin) + this.valueAt(this.bin + 1)) / 2, "y");
    this.isKeyed = true; // the cell was chosen, not a place
    this.u.setCursor({ left, top });
    this.isKeyed = false;
  }

  render({ name, binned }, { read }) {
    const { columns, low, high } = binned;
    const steps = `steps ${count(columns[0].step)} to ${count(columns.at(-1).step)}`;
    const label = `Heatmap of ${name}: ${steps}, values from ${number(low)} to ${number(high)}. Arrow keys read a bin.`;
    return html`
      <div class="heat" tabindex="0" role="img" aria-label=${label} ref=${(node) => (this.root = node)} onKeyDown=${(event) => this.key(event)}></div>
      <p class="heat-read hint" role="status">${read || "\u00a0"}</p>`;
  }
}

function Bars({ name, rows, at, isLog }) {
  const { item, words } = nearest(rows, at);
  if (!item) return html`<p class="hint">${words}</p>`;
  const { low, high, counts } = item;
  const most = Math.max(1, ...counts);
  const width = 100 / Math.max(1, counts.length);
  const all = counts.reduce((sum, value) => sum + value, 0);
  const label = `Histogram of ${name}, ${words}: ${count(all)} values from ${number(low)} to ${number(high)}, at most ${count(most)} in a bin`;
  const edge = (bin) => number(low * (1 - bin / counts.length) + high * (bin / counts.length));
  return html`
    <svg class="bars" viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label=${label}>
      ${counts.map((value, bin) => html`<rect key=${bin} x=${bin * width} y=${100 - 100 * shareOf(value, most, isLog)} width=${width * 0.92} height=${100 * shareOf(value, most, isLog)} />`)}
    </svg>
    <div class="ends" aria-hidden="true"><span>${number(low)}</span><span>${number(high)}</span></div>
    <p class="hint">${words}</p>
    <details>
      <summary class="hint">Table</summary>
      <div class="table-box" tabindex="0" role="region" aria-label=${label}><table>
        <caption class="visually-hidden">${label}</caption>
        <thead><tr>${["From", "To", "Count"].map((head) => html`<th key=${head} scope="col" class="number">${head}</th>`)}</tr></thead>
        <tbody>${counts.map((value, bin) => html`<tr key=${bin}><th scope="row" class="number">${edge(bin)}</th><td class="number">${edge(bin + 1)}</td><td class="number">${count(value)}</td></tr>`)}</tbody>
      </table></div>
    </details>`;
}
