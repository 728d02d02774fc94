/** The run table, as a component of rows and the reader's choices. It needs no server: a report shows it too. */

import { Chooser, RowDialog } from "./tabledialogs.js";
import { bestOf, Columns, grouped, sorted, summary } from "./columns.js";
import { announce } from "./dom.js";
import { count, duration, NONE, percent, runsOf } from "./format.js";
import { statusOf } from "./status.js";
import { Component, html } from "./view.js";

/** Height of a row, as in the style sheet, and rows outside of the visible part that are kept for the keyboard. */
const ROW_PX = 34;
const BEYOND = 12;
/** Maximum rows on paper. */
const MOST_PRINTED = 500;
const SAMPLE = 200;

/**
 * The table. Properties:
 *
 * `rows`: of `GET /api/table`; `names`: of metrics that the rows may lack, or nothing; `now`: Unix seconds; `choices`: a `TableState`, which the table changes;
 * `total`: how many runs there are, filtered or not; `problem`: why the filter cannot be read; `hint`: why rows are missing or old;
 * `on`: `{change(), hrefOf(name), compare(names), note(name, change) -> promise}`; without `note` nothing can be noted.
 */
export class RunTable extends Component {
  state = { ticked: new Set(), choosesColumns: false, edited: null };

  #take = (root) => (this.root = root);

  #change(change) {
    change(this.props.choices);
    this.setState({});
    this.props.on.change();
  }

  render({ rows, names, now, choices, total, problem, hint, on }, { choosesColumns, edited, ticked }) {
    if (this.columns?.rows !== rows || this.names !== names) {
      this.columns = new Columns(rows, names);
      this.names = names;
    }
    const { columns } = this;
    const ids = (choices.columns ?? columns.usual).filter((id) => columns.column(id));
    const hidden = rows.filter((row) => choices.hidden.has(row.name)).length;
    const visible = choices.showsHidden ? rows : rows.filter((row) => !choices.hidden.has(row.name));
    const row = rows.find((one) => one.name === edited);
    return html`<div class="run-table" ref=${this.#take}>
      ${this.#toolbar(columns, visible.length, hidden)}
      <p class="hint" id="table-problem" role="status">${problem ?? hint ?? ""}</p>
      ${this.#actions(rows.map((one) => one.name).filter((name) => ticked.has(name)))}
      ${choosesColumns &&
      html`<${Chooser}
        columns=${columns}
        ids=${ids}
        isUsual=${choices.columns === null}
        onChange=${(next) => this.#change((one) => (one.columns = next))}
        onClose=${() => this.#closeChooser()}
      />`}
      ${rows.length > 0 && this.#table(columns, ids, visible)}
      ${!rows.length && html`<p class="empty">${total ? "No run matches the filter." : "No runs yet."}</p>`}
      ${row &&
      html`<${RowDialog}
        row=${row}
        key=${row.name}
        href=${on.hrefOf(row.name)}
        isPinned=${choices.pinned.has(row.name)}
        isHidden=${choices.hidden.has(row.name)}
        onToggle=${(set) => this.#change((one) => one.toggle(one[set], row.name))}
        onNote=${on.note && ((change) => on.note(row.name, change))}
        onClose=${() => this.#closeDialog(row.name)}
      />`}
    </div>`;
  }

  #toolbar(columns, visible, hidden) {
    const { choices, problem, total } = this.props;
    const filter = ({ target }) => this.#change((one) => (one.where = target.value));
    const group = ({ target }) => this.#change((one) => (one.group = target.value || null));
    const groups = [...new Set([...columns.groups, ...(choices.group ? [choices.group] : [])])];
    return html`<div class="toolbar" role="group" aria-label="Choices of the table">
      <input
        type="search"
        class="where"
        aria-label="Filter runs"
        aria-describedby="table-problem"
        aria-invalid=${problem ? "true" : null}
        placeholder="lr > 0.01 and val_loss < 0.5, or a regular expression"
        autocomplete="off"
        spellcheck="false"
        value=${choices.where}
        onInput=${filter}
      />
      <label
        >Group by${" "}
        <select value=${choices.group ?? ""} onChange=${group}>
          <option value="">nothing</option>
          ${groups.map((id) => html`<option value=${id}>${columns.column(id)?.head ?? id}</option>`)}
        </select></label
      >
      <button
        type="button"
        class="columns"
        aria-expanded=${String(this.state.choosesColumns)}
        onClick=${() => this.setState({ choosesColumns: !this.state.choosesColumns })}
      >
        Columns
      </button>
      ${hidden > 0 &&
      html`<button
        type="button"
        class="quiet"
        aria-pressed=${String(choices.showsHidden)}
        onClick=${() => this.#change((one) => (one.showsHidden = !one.showsHidden))}
      >
        Hidden: ${count(hidden)}
      </button>`}
      ${choices.isChanged &&
      html`<button type="button" class="quiet" onClick=${() => this.#change((one) => one.reset())}>Reset</button>`}
      <span class="hint" role="status">${runsOf(visible, total)}</span>
    </div>`;
  }

  /** What can be done with the ticked runs. */
  #actions(names) {
    if (!names.length) return null;
    const all = (set) => () => {
      this.#change((one) => names.forEach((name) => one[set].add(name)));
      this.setState({ ticked: new Set() });
    };
    return html`<div class="toolbar ticked" role="group" aria-label="Ticked runs">
      <strong>${count(names.length)} ticked</strong>
      <button type="button" class="compare" disabled=${names.length < 2} onClick=${() => this.props.on.compare(names)}>
        Compare
      </button>
      <button type="button" class="quiet" onClick=${all("pinned")}>Pin</button>
      <button type="button" class="quiet" onClick=${all("hidden")}>Hide</button>
      <button type="button" class="quiet" onClick=${() => this.setState({ ticked: new Set() })}>Untick all</button>
    </div>`;
  }

  #table(columns, ids, visible) {
    const { choices, now, on } = this.props;
    const { ticked } = this.state;
    const shown = ids.map((id) => columns.column(id));
    const sort = (choices.sort ?? columns.usualSort).filter((key) => columns.column(bare(key)));
    const best = new Map(shown.filter((one) => one.isMetric).map((one) => [one.id, bestOf(visible, one)]));
    const draw = (item, at) =>
      item.group
        ? this.#groupRow(item.group, columns.column(choices.group), shown, at)
        : html`<${Row}
            key=${`run ${item.row.name}`}
            row=${item.row}
            index=${at + 2}
            shown=${shown}
            best=${best}
            now=${now}
            href=${on.hrefOf(item.row.name)}
            isTicked=${ticked.has(item.row.name)}
            isPinned=${choices.pinned.has(item.row.name)}
            isInGroup=${item.isInGroup}
            onTick=${() => this.#tick(item.row.name)}
            onEdit=${() => this.setState({ edited: item.row.name })}
          />`;
    const heads = html`<tr aria-rowindex="1">
      ${this.#head(columns.column("name"), sort, columns, this.#tickAll(visible))}
      ${shown.map((one) => this.#head(one, sort, columns))}
    </tr>`;
    const items = itemsOf(visible, columns, choices, sort, now);
    return html`<${Body}
      items=${items}
      caption=${`Runs, sorted by ${inWords(sort, columns)}`}
      widths=${widths(visible, items, shown, now)}
      heads=${heads}
      draw=${draw}
    />`;
  }

  #tickAll(visible) {
    const isAll = visible.length > 0 && visible.every((row) => this.state.ticked.has(row.name));
    const tick = () => this.setState({ ticked: new Set(isAll ? [] : visible.map((row) => row.name)) });
    return html`<input type="checkbox" aria-label="Tick all runs" checked=${isAll} onChange=${tick} />`;
  }

  #tick(name) {
    const ticked = new Set(this.state.ticked);
    if (!ticked.delete(name)) ticked.add(name);
    this.setState({ ticked });
  }

  #head({ id, head, isNumber, isDown }, sort, columns, before = null) {
    const at = sort.findIndex((key) => bare(key) === id);
    const direction = at < 0 ? null : sort[at].startsWith("-") ? "descending" : "ascending";
    const click = (event) => {
      this.#change((one) => one.sortBy(id, isDown, event.shiftKey, columns.usualSort));
      announce(`Sorted by ${inWords(this.props.choices.sort ?? columns.usualSort, columns)}`);
    };
    const mark = html`<span class="direction" aria-hidden="true"
      >${direction === "ascending" ? "▲" : "▼"}${sort.length > 1 ? at + 1 : ""}</span
    >`;
    return html`<th scope="col" key=${id} class=${isNumber ? "number" : null} aria-sort=${at === 0 ? direction : null}>
      <div>
        ${before}
        <button type="button" class="sort" title=${`Sort by ${head}; with Shift, in addition`} onClick=${click}>
          <span class="word">${head}</span>${direction && mark}
        </button>
      </div>
    </th>`;
  }

  #groupRow({ key, label, rows }, column, shown, at) {
    const { choices, now } = this.props;
    const isOpen = choices.unfolded.has(key);
    const name = `${column.head} = ${label}`;
    return html`<tr class="group-row" key=${`group ${key}`} aria-rowindex=${at + 2}>
      <th scope="row">
        <button
          type="button"
          class="fold"
          aria-expanded=${String(isOpen)}
          title=${name}
          onClick=${() => this.#change((one) => one.toggle(one.unfolded, key))}
        >
          <span aria-hidden="true">${isOpen ? "▾" : "▸"}</span> ${name}
          <span class="hint"> · ${runsOf(rows.length)}</span>
        </button>
      </th>
      ${shown.map((one) => {
        const { text } = summary(rows, one, now);
        return html`<td key=${one.id} class=${one.isNumber ? "number" : null} title=${text}>${text}</td>`;
      })}
    </tr>`;
  }

  #closeChooser() {
    this.setState({ choosesColumns: false });
    this.root.querySelector("button.columns").focus();
  }

  #closeDialog(name) {
    this.setState({ edited: null });
    const row = [...this.root.querySelectorAll("tr[data-run]")].find((one) => one.dataset.run === name);
    row?.querySelector(".more").focus();
  }
}

/** The part of the rows that is in sight: the others are empty space. Scrolling draws nothing else again. */
class Body extends Component {
  state = { from: 0, to: 60, isPrinting: false };

  componentDidMount() {
    addEventListener("beforeprint", this.#print);
    addEventListener("afterprint", this.#printed);
    addEventListener("resize", this.#look);
    this.#look();
  }

  componentWillUnmount() {
    removeEventListener("beforeprint", this.#print);
    removeEventListener("afterprint", this.#printed);
    removeEventListener("resize", this.#look);
  }

  #take = (box) => (this.box = box);
  #print = () => this.setState({ isPrinting: true });
  #printed = () => this.setState({ isPrinting: false });
  #look = () => {
    const { scrollTop, clientHeight } = this.box;
    const from = Math.max(0, Math.floor(scrollTop / ROW_PX) - BEYOND);
    const to = Math.ceil((scrollTop + clientHeight) / ROW_PX) + BEYOND;
    if (from !== this.state.from || to !== this.state.to) this.setState({ from, to });
  };

  render({ items, caption, widths, heads, draw }, { from, to, isPrinting }) {
    const begin = isPrinting ? 0 : Math.min(from, Math.max(0, items.length - 1));
    const end = Math.min(items.length, isPrinting ? MOST_PRINTED : to);
    const space = (rows, key) =>
      rows > 0 && html`<tr key=${key} aria-hidden="true"><td style=${{ height: `${rows * ROW_PX}px` }}></td></tr>`;
    const left = items.length - end;
    const unprinted = () => html`<tr key="unprinted"><td colspan=${widths.length}>${count(left)} more rows are not printed.</td></tr>`;
    return html`<div class="table-scroll" role="region" aria-label="Runs" tabindex="0" ref=${this.#take} onScroll=${this.#look}>
      <table aria-rowcount=${items.length + 1} style=${{ width: `calc(${widths.join(" + ")})` }} onKeyDown=${moveFocus}>
        <caption class="visually-hidden">${caption}</caption>
        <colgroup>${widths.map((width) => html`<col style=${{ width }} />`)}</colgroup>
        <thead>${heads}</thead>
        <tbody>
          ${space(begin, "above")}${items.slice(begin, end).map((item, at) => draw(item, begin + at))}
          ${isPrinting && left > 0 ? unprinted() : space(left, "below")}
        </tbody>
      </table>
    </div>`;
  }
}

const bare = (key) => key.replace(/^-/, "");

function inWords(sort, columns) {
  return sort.map((key) => `${columns.column(bare(key)).head}${key.startsWith("-") ? ", the greatest first" : ""}`).join(", then ");
}

/** The rows and groups in their order: pinned runs first. */
function itemsOf(rows, columns, choices, sort, now) {
  const inOrder = sorted(rows, sort, columns, (row, column) => column.of(row, now));
  const pinned = inOrder.filter((row) => choices.pinned.has(row.name)).map((row) => ({ row }));
  const others = inOrder.filter((row) => !choices.pinned.has(row.name));
  const by = choices.group && columns.column(choices.group);
  if (!by) return [...pinned, ...others.map((row) => ({ row }))];
  const valueOf = (group, column) => (column.id === by.id ? group.value : summary(group.rows, column, now).value);
  const groups = sorted(grouped(others, by, now), sort, columns, valueOf);
  const inGroup = (group) => (choices.unfolded.has(group.key) ? group.rows.map((row) => ({ row, isInGroup: true })) : []);
  return [...pinned, ...groups.flatMap((group) => [{ group }, ...inGroup(group)])];
}

/** The widths of the columns: of a sample of rows and groups, because those out of sight are not laid out. */
function widths(rows, items, shown, now) {
  const sample = rows.filter((_, at) => at % Math.ceil(rows.length / SAMPLE) === 0);
  const longest = (texts) => texts.reduce((most, one) => Math.max(most, one.length), 0);
  const groups = items.filter(({ group }) => group).slice(0, SAMPLE);
  const names = longest(sample.map((row) => row.label));
  const others = shown.map((one) => {
    if (one.id === "progress") return rows.some((row) => row.left_s !== null) ? "33ch" : "21ch";
    const ofGroups = longest(groups.map(({ group }) => summary(group.rows, one, now).text));
    if (one.id === "status") return `${Math.min(27, Math.max(11, ofGroups) + 3)}ch`;
    const content = Math.max(ofGroups, longest(sample.map((row) => one.show(one.of(row, now) ?? null, now))));
    return `${Math.min(27, Math.max(Math.min(one.head.length + 1, 18), content) + 3)}ch`;
  });
  return [`min(${Math.max(16, Math.min(34, names)) + 10}ch, 52vw)`, ...others];
}

/** Arrow keys move to the same control of the next row. */
function moveFocus(event) {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const row = event.target.closest("tbody tr");
  if (!by || !row || event.target.matches("select")) return;
  const next = by > 0 ? row.nextElementSibling : row.previousElementSibling;
  const kind = ["a", "input", ".more", "button"].find((one) => event.target.matches(one));
  const control = next?.querySelector(kind) ?? next?.querySelector("a, button");
  if (!control) return;
  event.preventDefault();
  control.focus();
}

function Row({ row, index, shown, best, now, href, isTicked, isPinned, isInGroup, onTick, onEdit }) {
  const name = row.label;
  return html`<tr
    data-run=${row.name}
    aria-rowindex=${index}
    class=${[isPinned && "pinned", isInGroup && "in-group"].filter(Boolean).join(" ") || null}
  >
    <th scope="row">
      <div class="run-name">
        <input type="checkbox" aria-label=${`Tick ${name}`} checked=${isTicked} onChange=${onTick} />
        ${row.notes.colour && html`<span class="dot" style=${{ background: row.notes.colour }}></span>`}
        <a href=${href} title=${name === row.name ? name : `${name} (${row.name})`}>${name}</a>
        ${isPinned && html`<span class="pin" title="Pinned">⊤<span class="visually-hidden"> pinned</span></span>`}
        <button type="button" class="quiet more" aria-label=${`Options of ${name}`} onClick=${onEdit}>⋯</button>
      </div>
    </th>
    ${shown.map((one) => html`<${Cell} row=${row} column=${one} now=${now} best=${best.get(one.id)} />`)}
  </tr>`;
}

const WELL = new Set(["running", "paused", "finished", "stopped"]);

function Cell({ row, column, now, best }) {
  const value = column.of(row, now);
  if (column.id === "status") return html`<td><${State} row=${row} /></td>`;
  if (column.id === "progress") return html`<td><${Progress} row=${row} /></td>`;
  if (column.id === "health") {
    const { length } = row.problems;
    const problems = length ? `${count(length)} ${length === 1 ? "problem" : "problems"}` : null;
    const text = value || (problems ?? (WELL.has(row.status) ? "ok" : NONE));
    return html`<td class=${value || problems ? "unhealthy" : "hint"} title=${[text, ...row.problems].join("\n")}>${text}</td>`;
  }
  if (column.id === "tags")
    return html`<td title=${value}>${row.notes.tags.map((tag) => html`<span class="tag">${tag}</span> `)}</td>`;
  const text = column.show(value ?? null, now);
  const isBest = best !== undefined && best !== null && value === best;
  const title = column.title ? column.title(value) : column.isNumber && typeof value === "number" ? String(value) : text;
  return html`<td class=${column.isNumber ? "number" : null} title=${title}>
    ${isBest ? html`<strong class="winner">${text}<span class="visually-hidden"> (best)</span></strong>` : text}
  </td>`;
}

function State({ row }) {
  const { state, glyph, word } = statusOf({ status: row.status, paused: row.status === "paused" });
  return html`<span class="state" data-state=${state}><span aria-hidden="true">${glyph}</span> ${word.split(":")[0]}</span>`;
}

function Progress({ row }) {
  if (row.progress === null) return NONE;
  const left = row.left_s === null ? "" : ` · ${duration(row.left_s)} left`;
  return html`<progress max="1" value=${row.progress} aria-hidden="true"></progress> ${percent(row.progress)}${left}`;
}
