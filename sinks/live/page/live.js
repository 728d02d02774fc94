/** The page: it chooses the shown runs, updates their parts, and handles the reader's actions. */

import { Board } from "./board.js";
import { fillCompared } from "./compared.js";
import { ComparePage } from "./comparepage.js";
import { Connection, get, NO_RUN, report, token, TokenWanted } from "./connection.js";
import { freshCommandId, isNarrow, setUpControls, showCommands, showControls, toast, WORDS } from "./controls.js";
import { announce, contained, setAttribute, setText } from "./dom.js";
import { writeFigures } from "./figures.js";
import { count, duration } from "./format.js";
import { swatch } from "./legend.js";
import { MediaPage } from "./mediapage.js";
import { ChartMenu } from "./menu.js";
import { labelOf, learnNames, ownColourOf } from "./names.js";
import { Checkpoints, fillAbout, fillObservers, fillProblems, fillRanks, Log } from "./panels.js";
import { showReport, writeHead } from "./report.js";
import { RunList } from "./runs.js";
import { Sections } from "./sections.js";
import { Layout, View } from "./settings.js";
import { statusOf } from "./status.js";
import { mostPoints, RunStore } from "./store.js";
import { TablePage } from "./tablepage.js";
import { DASHES, runColour } from "./theme.js";

/** Maximum seconds of silence before the page marks its data as old. */
const STALE_S = 5;
const LIST_MS = 5000;
const FIRST_LIST_MS = 1500;
/** Number of lists in a row that must lack a run before it counts as removed. */
const MISSING_LOOKS = 2;
/** Maximum runs in the server's list: a run that a full list lacks may exist. */
const MOST_LISTED = 1000;
const MOST_NAMED = 12;
/** Minimum time between updates of tables and figures. */
const WRITE_MS = 250;
const NAME = "stagecast";
/** States from which a run changes only by another attempt. */
const OVER = new Set(["finished", "stopped", "failed", "cancelled", "lost", "damaged"]);

function byId(id) {
  return document.getElementById(id);
}

class App {
  constructor() {
    this.view = new View();
    this.layout = new Layout();
    this.chosen = []; // the first is the one whose tables are shown
    this.open = new Map(); // run id -> {store, connection, slot}
    this.runs = [];
    this.listed = new Map(); // the same by their names
    this.lacking = new Map(); // chosen runs -> how many lists in a row have lacked them
    this.clock = null; // of the server: {time, at}, in Unix seconds and by `performance.now()`
    this.pending = new Map(); // commands without an answer
    this.isAway = false; // whether the table is open, so that the list of runs is not polled
    this.hasShownTable = false; // afterwards the table opens by the reader's choice only
    this.readFragment();
    this.board = new Board(this.view);
    this.board.onchange = () => this.changed();
    const menu = new ChartMenu(this);
    this.board.openMenu = (chart) => menu.open(chart);
    this.sections = new Sections(this);
    this.comparePage = new ComparePage(this);
    this.mediaPage = new MediaPage(this);
    this.board.onhighlight = (key) => this.comparePage.lit(key);
    this.checkpoints = new Checkpoints();
    this.log = new Log();
    this.list = new RunList({ compare: (runId, isChosen) => this.compare(runId, isChosen) });
    this.table = new TablePage(this);
    this.messages = { count: 0, applyMs: 0, snapshotMs: 0 };
    this.writeTimer = null;
    this.writtenAt = 0;
    setUpControls(this);
    if (report?.table) showReport();
    this.look();
    setInterval(() => this.tick(), 1000);
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) return;
      this.reconnect();
      this.write();
      this.board.invalidate();
    });
    window.addEventListener("online", () => this.reconnect());
    window.addEventListener("hashchange", () => {
      this.readFragment();
      this.isRearranged = true;
      this.follow();
    });
  }

  // ---------------------------------------------------------------------------------------- the page's address

  readFragment() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const told = wanted.getAll("run");
    // A report opens with all its runs.
    if (report && !told.length) told.push(...report.runs.map(({ run }) => run.run_id));
    this.chosen = [...new Set(told)];
    this.view.read(wanted);
  }

  fragment(chosen = this.chosen, hasTable = this.view.table.isOpen) {
    const told = new URLSearchParams();
    const isWhole = report && chosen.length === report.runs.length;
    for (const runId of isWhole ? [] : chosen) told.append("run", runId);
    this.view.write(told);
    if (hasTable) this.view.table.write(told);
    return `#${told}`;
  }

  keepFragment() {
    history.replaceState(null, "", this.fragment());
    this.fillList();
  }

  // --------------------------------------------------------------------------------------------------- the runs

  /** Poll the list of runs. */
  async look() {
    clearTimeout(this.listTimer);
    if (this.view.table.isOpen) {
      this.follow();
      return;
    }
    let isKnown = false;
    try {
      const response = await get("api/runs");
      const time = Date.parse(response.headers.get("date")) / 1000;
      this.clock = Number.isFinite(time) ? { time, at: performance.now() } : null;
      this.runs = (await response.json()).runs;
      this.listed = new Map(this.runs.map((run) => [run.run_id, run]));
      if (!report && learnNames(this.runs)) this.renamed();
      isKnown = true;
    } catch (error) {
      if (error instanceof TokenWanted) this.askToken();
      else if (!this.open.size) this.wait("The server does not answer", `${error.message}. The page keeps retrying.`);
    }
    if (isKnown) {
      const isOver = this.runs.length > 1 && !this.runs.some((run) => run.status === "running");
      if (!this.chosen.length && isOver && !this.hasShownTable) {
        this.view.table.isOpen = true; // which of the runs was best; the browser's Back button leaves the page
        this.keepFragment();
        this.follow();
        return;
      }
      if (!this.chosen.length && this.runs.length) {
        this.chosen = [(this.runs.find((run) => run.status === "running") ?? this.runs[0]).run_id];
        history.replaceState(null, "", this.fragment());
      }
      if (!this.chosen.length) this.wait("No runs yet", "They appear here as soon as one starts.");
      this.lookForChosen();
      this.follow();
      this.comparePage.look();
    }
    this.listFailures = isKnown ? 0 : Math.min(3, (this.listFailures ?? 0) + 1);
    const wait =
      isKnown && !this.runs.length ? FIRST_LIST_MS : LIST_MS * (document.hidden ? 6 : 2 ** this.listFailures);
    this.listTimer = setTimeout(() => this.look(), wait);
  }

  /** Find the chosen runs that the list lacks, and connect to those that are listed again. */
  lookForChosen() {
    const known = new Set(this.runs.map((run) => run.run_id));
    for (const runId of this.chosen) {
      const isListed = known.has(runId) || this.runs.length >= MOST_LISTED;
      this.lacking.set(runId, isListed ? 0 : (this.lacking.get(runId) ?? 0) + 1);
      const connection = this.open.get(runId)?.connection;
      if (isListed && connection?.state === "gone" && connection.problem === NO_RUN) connection.retry();
    }
  }

  /** Whether a chosen run is missing: it never existed, or its folder was removed. */
  isMissing(runId) {
    const one = this.open.get(runId);
    const isRefused = one?.connection.state === "gone" && (report || one.connection.problem === NO_RUN);
    return isRefused || (this.lacking.get(runId) ?? 0) >= MISSING_LOOKS;
  }

  /** A sentence about the listed runs. */
  runsInWords() {
    const names = this.runs.map((run) => run.run_id);
    if (!names.length) return "it has no runs";
    const more = names.length > MOST_NAMED ? ` and ${count(names.length - MOST_NAMED)} more` : "";
    return `it has ${names.slice(0, MOST_NAMED).join(", ")}${more}`;
  }

  /** Unix seconds by the server's clock, which may differ from this page's. */
  now() {
    return this.clock ? this.clock.time + (performance.now() - this.clock.at) / 1000 : Date.now() / 1000;
  }

  /** Open the chosen runs, close the others; or show the table of runs. */
  follow() {
    document.body.classList.toggle("in-table", this.view.table.isOpen);
    this.table.follow();
    if (this.view.table.isOpen) {
      clearTimeout(this.listTimer);
      this.isAway = this.hasShownTable = true;
      this.fillList();
      this.writeTable();
      return;
    }
    if (this.isAway) {
      this.isAway = false;
      this.look();
      if (!this.listed.size) return; // it follows when the runs are known
    }
    for (const [runId, one] of this.open) {
      if (this.chosen.includes(runId)) continue;
      one.connection.stop();
      this.open.delete(runId);
      this.isRearranged = true;
    }
    for (const runId of this.chosen) {
      if (this.open.has(runId)) continue;
      if (this.isAhead()) break;
      const store = new RunStore(runId, (names) => mostPoints(names, this.chosen.length));
      const taken = new Set([...this.open.values()].map((one) => one.slot));
      let slot = 0;
      while (taken.has(slot)) slot += 1;
      const listed = this.listed.get(runId);
      const isRead = runId !== this.chosen[0] && OVER.has(listed?.status); // once, without a connection
      const one = { store, slot, updated: listed?.updated };
      this.open.set(runId, one);
      const on = { message: (data) => this.take(one, data), state: () => this.write(), token: () => this.askToken() };
      one.connection = new Connection(store, on, { isMain: runId === this.chosen[0], isRead });
      this.isRearranged = true;
    }
    for (const { store } of this.open.values()) store.limit();
    const focus = this.focus();
    if (focus !== this.lastFocus) {
      this.lastFocus = focus;
      this.lastState = null;
      this.isRearranged = true;
      for (const part of ["run", "log", "checkpoints", "observers", "ranks", "media", "histograms", "arguments", "points"])
        focus?.store.touched.add(part);
    }
    for (const [runId, one] of this.open) {
      const listed = this.listed.get(runId);
      const isChanged = listed !== undefined && (listed.updated !== one.updated || !OVER.has(listed.status));
      if (one === focus || isChanged) one.connection.follow();
    }
    this.comparePage.follow();
    showControls(this);
    this.fillList();
    this.write();
  }

  /** Whether the first of several runs is loading: the server reads it before the others. */
  isAhead() {
    const first = this.open.get(this.chosen[0]);
    return !report && first !== undefined && !first.store.isLoaded && first.connection.state === "connecting";
  }

  /** How a run is drawn: `{colour, dash, label}`; its notes have its own colour and name. */
  lookOf({ store, slot }) {
    return {
      colour: ownColourOf(store.runId) ?? runColour(slot),
      dash: this.chosen.length > DASHES.length ? [] : (DASHES[slot] ?? []), // of many, patterns look alike
      label: labelOf(store.runId),
    };
  }

  /** The run whose tables are shown: the first chosen one that exists. */
  focus() {
    const isThere = (runId) => this.open.has(runId) && (this.open.get(runId).store.isLoaded || !this.isMissing(runId));
    return this.open.get(this.chosen.find(isThere) ?? this.chosen[0]);
  }

  shownRuns() {
    return this.chosen.map((runId) => this.open.get(runId)).filter(Boolean);
  }

  isComparing() {
    return this.chosen.length > 1;
  }

  compare(runId, isChosen) {
    this.chosen = isChosen ? [...this.chosen, runId] : this.chosen.filter((one) => one !== runId);
    history.pushState(null, "", this.fragment());
    announce(`${labelOf(runId)} is ${isChosen ? "in the charts" : "not in the charts any more"}`);
    this.follow();
  }

  /** Lay runs over each other, in place of the table. */
  showRuns(names) {
    this.chosen = names;
    this.view.table.isOpen = false;
    history.pushState(null, "", this.fragment());
    this.follow();
  }

  /** People gave runs other names or colours. */
  renamed() {
    this.isRearranged = true;
    this.lastState = null;
    this.write();
  }

  /** Show the tables of another of the chosen runs. */
  promote(runId) {
    this.chosen = [runId, ...this.chosen.filter((other) => other !== runId)];
    this.keepFragment();
    this.follow();
  }

  fillList() {
    const hasOthers = this.runs.some((run) => this.runs.length > 1 || run.run_id !== this.chosen[0]);
    const isOpen = hasOthers && !this.view.table.isOpen;
    const toggle = byId("table-toggle");
    toggle.hidden = !hasOthers && !this.view.table.isOpen && !(report?.table?.length > 1);
    setText(toggle, this.view.table.isOpen ? "Charts" : "Table");
    toggle.title = this.view.table.isOpen ? "The charts of a run (Alt+T)" : "All runs in a table (Alt+T)";
    byId("runs-toggle").hidden = !isOpen || !isNarrow.matches;
    byId("runs").hidden = !isOpen || (isNarrow.matches && byId("runs-toggle").getAttribute("aria-expanded") !== "true");
    const markOf = (runId) => {
      const one = this.isComparing() ? this.open.get(runId) : null;
      if (!one) return null;
      const curve = this.lookOf(one);
      return { colour: `${curve.colour}${curve.dash}`, swatch: () => swatch(curve) };
    };
    // The stores of connected runs are newer than the list.
    const runs = this.runs.map((run) => {
      const store = this.open.get(run.run_id)?.store;
      return store?.isLoaded
        ? { ...store.run, latest: { val_loss: store.last("val_loss"), train_loss: store.last("train_loss") } }
        : run;
    });
    this.list.fill(runs, this.chosen, (runId) => this.fragment([runId]), markOf, this.now());
  }

  reconnect() {
    for (const { connection } of this.open.values()) connection.retry();
  }

  // ------------------------------------------------------------------------------------ messages from the server

  /** Read or draw a part of one run; a notice reports a failure. */
  part(one, draw) {
    if (!contained(draw)) one.connection.isBroken = true;
  }

  take(one, data) {
    const began = performance.now();
    const { store } = one;
    if (data.type === "snapshot") this.part(one, () => store.applySnapshot(data));
    else if (data.type === "frame") this.part(one, () => store.applyFrame(data));
    else if (data.type === "sent" || data.type === "refused") this.answered(data);
    const took = performance.now() - began;
    this.messages.count += 1;
    this.messages.applyMs += took;
    if (data.type === "snapshot") this.messages.snapshotMs = took;
    if (store.touched.delete("names")) this.isRearranged = true;
    this.write();
    this.board.wake();
  }

  /** Update the changed parts; delayed after a recent update. */
  write() {
    if (this.writeTimer !== null) return;
    const wait = Math.max(0, this.writtenAt + WRITE_MS - performance.now());
    this.writeTimer = setTimeout(() => {
      this.writeTimer = null;
      this.writtenAt = performance.now();
      this.writeNow();
    }, wait);
  }

  /** The header while the table is open. */
  writeTable() {
    byId("waiting").hidden = byId("content").hidden = byId("commands").hidden = true;
    byId("banner").hidden = true;
    document.body.classList.remove("stale");
    setText(byId("run-name"), "Runs");
    byId("run-name").title = "";
    document.title = `Runs – ${NAME}`;
    this.lastState = null;
  }

  writeNow() {
    if (this.view.table.isOpen) return;
    const focus = this.focus();
    if (!focus) return;
    // The previous run is missing, or the first one is loaded.
    if (focus !== this.lastFocus || (this.open.size < this.chosen.length && !this.isAhead())) this.follow();
    const { store, connection } = focus;
    this.writeState(store, connection);
    if (!store.isLoaded) {
      if (this.isMissing(store.runId))
        this.wait(store.runId, report ? connection.problem : `${NO_RUN}; ${this.runsInWords()}`);
      else if (connection.state === "gone") this.wait(store.runId, connection.problem);
      else if (connection.state !== "token")
        this.wait(
          "Connecting…",
          connection.problem ? `${connection.problem}. The page keeps retrying.` : `Waiting for ${labelOf(store.runId)}.`,
        );
      return;
    }
    byId("waiting").hidden = true;
    byId("content").hidden = false;
    if (document.hidden) return; // a hidden page is updated when it is shown
    this.followAxis();
    const isRearranged = this.isRearranged;
    if (isRearranged) {
      this.isRearranged = false;
      this.part(focus, () => this.sections.arrange());
      this.board.invalidate();
    }
    const isNew = (one) => ["points", "run"].filter((part) => one.touched.delete(part)).length > 0;
    const fresh = this.shownRuns().filter((one) => isNew(one.store));
    if (fresh.length || isRearranged) {
      this.part(focus, () => this.sections.fillLedger());
      this.part(focus, () => this.sections.fillValidation()); // of all runs, whichever has news
    }
    const parts = {
      checkpoints: () => this.checkpoints.fill(store),
      observers: () => fillObservers(store),
      ranks: () => fillRanks(store),
      log: () => this.log.fill(store),
      arguments: () => fillAbout(store),
    };
    const hasMedia = (one) => ["media", "histograms"].filter((part) => one.touched.delete(part)).length > 0;
    if (this.shownRuns().filter((one) => hasMedia(one.store)).length || isRearranged)
      this.part(focus, () => this.mediaPage.fill());
    contained(() => fillProblems(this));
    showCommands(this, store);
    for (const [name, fill] of Object.entries(parts)) if (store.touched.delete(name)) this.part(focus, fill);
    this.part(focus, () => writeFigures(store, this.isStale));
    fillCompared(this, STALE_S);
    this.comparePage.fill();
  }

  wait(title, text) {
    byId("waiting").hidden = false;
    byId("content").hidden = true;
    setText(byId("waiting-title"), title);
    setText(byId("waiting-text"), text);
  }

  /** The state in the header, the title and the banner; announced when it changes. */
  writeState(store, connection) {
    const { run } = store;
    const isMissing = this.isMissing(store.runId);
    const { state, glyph, word, isUnhealthy } = statusOf(
      isMissing ? { status: "missing" } : store.isLoaded ? run : { status: "connecting" },
    );
    const chip = byId("status");
    setAttribute(chip, "data-status", state);
    setAttribute(chip, "data-health", isUnhealthy ? "unhealthy" : null);
    setText(chip.querySelector(".glyph"), glyph);
    setText(chip.querySelector(".word"), word);
    const label = labelOf(store.runId);
    setText(byId("run-name"), label);
    byId("run-name").title = store.runId;
    const others = this.chosen.filter((runId) => runId !== store.runId).map(labelOf);
    setText(byId("run-others"), others.length ? `and ${others.join(", ")}` : "");
    setText(byId("place"), [run.module, run.device, run.host && `on ${run.host}`].filter(Boolean).join(" · "));
    const isSilent = connection.state !== "open" || connection.silence_s > STALE_S;
    const isStale = (this.isStale = store.isLoaded && (isMissing || isSilent));
    if (report?.table) {
      writeHead(store, this.isComparing());
      return;
    }
    document.title = `${isStale ? "⚠ " : ""}${word}, step ${count(run.global_step ?? 0)} · ${label} – ${NAME}`;
    this.writeBanner(isStale, store, connection);
    const told = `${state}${word}${isStale}`;
    if (this.lastState && this.lastState !== told && store.isLoaded)
      announce(isStale ? byId("banner-text").textContent : `The run is ${word}`);
    this.lastState = store.isLoaded ? told : null;
  }

  writeBanner(isStale, { run, runId }, connection) {
    document.body.classList.toggle("stale", isStale);
    const { note } = connection;
    byId("banner").hidden = !isStale && !note;
    if (!isStale && note) {
      setText(byId("banner-text"), note.text);
      setText(byId("banner-detail"), note.fix);
      byId("retry").hidden = true;
    }
    if (!isStale) return;
    if (this.isMissing(runId)) {
      setText(byId("banner-text"), `The run ${labelOf(runId)} does not exist any more: this data is old`);
      setText(byId("banner-detail"), `Its folder was removed or renamed on the server; ${this.runsInWords()}.`);
      byId("retry").hidden = true;
      return;
    }
    const isOver = run.status !== "running" && run.status !== "unknown";
    const text =
      connection.state === "gone"
        ? "The server has closed this run"
        : connection.state === "token"
          ? "The server requires its token"
          : "The connection is lost";
    setText(
      byId("banner-text"),
      isOver ? `${text}; the run is over, so nothing is missing` : `${text}: this data is old`,
    );
    const left = Math.ceil((connection.retryAt - performance.now()) / 1000);
    const next =
      {
        waiting: left > 0 ? `; retry in ${left} s` : "; retrying",
        connecting: "; retrying",
        open: "; still waiting",
      }[connection.state] ?? "";
    const problem = connection.problem ? ` (${connection.problem})` : "";
    setText(byId("banner-detail"), `Last message ${duration(Math.round(connection.silence_s))} ago${problem}${next}.`);
    byId("retry").hidden = connection.state === "gone";
    setText(byId("retry"), connection.state === "token" ? "Enter the token" : "Reconnect now");
  }

  tick() {
    for (const { connection } of this.open.values()) connection.tick();
    this.fillList();
    this.write();
  }

  // ----------------------------------------------------------------------------------------------------- commands

  async command(kind, more = {}) {
    const focus = this.focus();
    if (!focus) return;
    const id = freshCommandId();
    this.pending.set(id, kind);
    const { commands } = focus.store.run;
    showCommands(this, focus.store);
    try {
      const answer = await focus.connection.command({ command: kind, id, reason: null, ...more });
      if (answer) this.answered(answer);
    } catch (error) {
      this.answered({
        type: "refused",
        id,
        reason: error instanceof TokenWanted ? "the server requires its token" : error.message,
      });
    }
    if (commands)
      setTimeout(() => this.pending.has(id) && this.answered({ type: "refused", id, reason: "no answer arrived" }), 10000);
  }

  answered({ type, id, reason }) {
    const kind = this.pending.get(id);
    if (!kind) return;
    this.pending.delete(id);
    toast(type === "sent" ? `${WORDS[kind]}: sent, takes effect at the next step` : `${WORDS[kind]}: refused, ${reason}`);
    const focus = this.focus();
    if (focus) showCommands(this, focus.store);
  }

  askToken() {
    const dialog = byId("token-dialog");
    if (dialog.open) return;
    if (token.get())
      setText(byId("token-text"), "Wrong token. The server printed its token when it started.");
    dialog.showModal();
  }

  /** Follow a changed setting of the charts. */
  changed() {
    this.keepFragment();
    this.followAxis();
    showControls(this);
  }

  /** Epochs are an axis once each shown run has told how many steps one has. */
  followAxis() {
    const { view } = this;
    const stores = this.shownRuns().map((one) => one.store);
    const isUnknown = view.x === "epoch" && stores.some((one) => one.isLoaded && !(one.run.steps_per_epoch > 0));
    const axis = isUnknown ? "step" : view.x;
    byId("axis-note").hidden = !isUnknown;
    if (axis === view.axis) return;
    view.axis = axis;
    this.board.invalidate();
  }
}

/** For benchmarks of the page. */
window.stagecast = new App();
