/** The page that shows runs: which runs are shown, how, and what the reader does with them. */

import { Board } from "./board.js";
import { swatch } from "./charts.js";
import { Connection, get, token, TokenWanted } from "./connection.js";
import { freshCommandId, isNarrow, setUpControls, showCommands, showControls, toast, WORDS } from "./controls.js";
import { announce, setAttribute, setText } from "./dom.js";
import { writeFigures } from "./figures.js";
import { count, duration } from "./format.js";
import { fillHistograms, fillMedia } from "./media.js";
import { Checkpoints, fillAbout, fillObservers, Log } from "./panels.js";
import { fillCompared, RunList, statusOf } from "./runs.js";
import { Sections } from "./sections.js";
import { RunStore } from "./store.js";
import { colours, DASHES } from "./theme.js";

/** Without a word for so long, what is shown may be wrong. */
const STALE_S = 5;
const MOST_COMPARED = DASHES.length;
const LIST_MS = 5000;
const FIRST_LIST_MS = 1500;
/** Tables and figures are written at most so often. */
const WRITE_MS = 250;
const NAME = "stagecast";

function byId(id) {
  return document.getElementById(id);
}

class App {
  constructor() {
    this.view = {
      x: "step",
      log: false,
      smoothing: 0,
      filter: "",
      zoom: null,
      zoomed: () => (byId("unzoom").hidden = this.view.zoom === null),
    };
    this.chosen = []; // the first is the one whose tables are shown
    this.open = new Map(); // run id -> {store, connection, slot}
    this.runs = [];
    this.pending = new Map(); // commands without an answer
    this.readFragment();
    this.board = new Board(this.view);
    this.sections = new Sections(this);
    this.checkpoints = new Checkpoints();
    this.log = new Log();
    this.list = new RunList({ compare: (runId, isChosen) => this.compare(runId, isChosen) });
    this.messages = { count: 0, applyMs: 0, snapshotMs: 0 };
    this.writeTimer = null;
    this.writtenAt = 0;
    setUpControls(this);
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
      this.follow();
    });
  }

  // ---------------------------------------------------------------------------------------- the page's address

  readFragment() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    this.chosen = [...new Set(wanted.getAll("run"))].slice(0, MOST_COMPARED);
    this.view.log = wanted.get("log") === "1";
    const smoothing = Number(wanted.get("smooth"));
    this.view.smoothing = smoothing > 0 && smoothing < 1 ? smoothing : 0;
    this.view.x = wanted.get("x") === "time" ? "time" : "step";
    this.view.filter = wanted.get("metrics") ?? "";
  }

  fragment(chosen = this.chosen) {
    const told = new URLSearchParams();
    for (const runId of chosen) told.append("run", runId);
    if (this.view.log) told.set("log", "1");
    if (this.view.smoothing) told.set("smooth", this.view.smoothing);
    if (this.view.x !== "step") told.set("x", this.view.x);
    if (this.view.filter) told.set("metrics", this.view.filter);
    return `#${told}`;
  }

  keepFragment() {
    history.replaceState(null, "", this.fragment());
    this.fillList();
  }

  // --------------------------------------------------------------------------------------------------- the runs

  /** Ask which runs there are, again and again. */
  async look() {
    clearTimeout(this.listTimer);
    let isKnown = false;
    try {
      const { runs } = await (await get("api/runs")).json();
      this.runs = runs;
      isKnown = true;
    } catch (error) {
      if (error instanceof TokenWanted) this.askToken();
      else if (!this.open.size) this.wait("The server does not answer", `${error.message}. The page goes on trying.`);
    }
    if (isKnown) {
      if (!this.chosen.length && this.runs.length) {
        this.chosen = [(this.runs.find((run) => run.status === "running") ?? this.runs[0]).run_id];
        history.replaceState(null, "", this.fragment());
      }
      if (!this.chosen.length) this.wait("No runs yet", "They appear here as soon as one begins.");
      this.follow();
    }
    this.listFailures = isKnown ? 0 : Math.min(3, (this.listFailures ?? 0) + 1);
    const wait =
      isKnown && !this.runs.length ? FIRST_LIST_MS : LIST_MS * (document.hidden ? 6 : 2 ** this.listFailures);
    this.listTimer = setTimeout(() => this.look(), wait);
  }

  /** Open what was chosen, close what was not. */
  follow() {
    for (const [runId, one] of this.open) {
      if (this.chosen.includes(runId)) continue;
      one.connection.stop();
      this.open.delete(runId);
      this.isRearranged = true;
    }
    for (const runId of this.chosen) {
      if (this.open.has(runId)) continue;
      const store = new RunStore(runId);
      const taken = new Set([...this.open.values()].map((one) => one.slot));
      const slot = DASHES.findIndex((_, index) => !taken.has(index));
      const one = { store, slot };
      this.open.set(runId, one);
      const on = { message: (data) => this.take(one, data), state: () => this.write(), token: () => this.askToken() };
      one.connection = new Connection(store, on, { isMain: runId === this.chosen[0] });
      this.isRearranged = true;
    }
    const focus = this.focus();
    if (focus !== this.lastFocus) {
      this.lastFocus = focus;
      this.lastState = null;
      this.isRearranged = true;
      for (const part of ["run", "log", "checkpoints", "observers", "media", "histograms", "arguments", "points"])
        focus?.store.touched.add(part);
    }
    showControls(this);
    this.fillList();
    this.write();
  }

  focus() {
    return this.open.get(this.chosen[0]);
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
    announce(isChosen ? `${runId} is in the charts` : `${runId} is not in the charts any more`);
    this.follow();
  }

  /** Show the tables of another of the chosen runs. */
  promote(runId) {
    this.chosen = [runId, ...this.chosen.filter((other) => other !== runId)];
    this.keepFragment();
    this.follow();
  }

  fillList() {
    const isOpen = this.runs.length > 1;
    byId("runs-toggle").hidden = !isOpen || !isNarrow.matches;
    byId("runs").hidden = !isOpen || (isNarrow.matches && byId("runs-toggle").getAttribute("aria-expanded") !== "true");
    const markOf = (runId) => {
      const one = this.isComparing() ? this.open.get(runId) : null;
      if (!one) return null;
      const curve = { colour: colours().run[one.slot], dash: DASHES[one.slot] };
      return { colour: `${curve.colour}${one.slot}`, swatch: () => swatch(curve) };
    };
    // Those that are watched are known better than the list that was asked for a while ago.
    const runs = this.runs.map((run) => {
      const store = this.open.get(run.run_id)?.store;
      return store?.isLoaded
        ? { ...store.run, latest: { val_loss: store.last("val_loss"), train_loss: store.last("train_loss") } }
        : run;
    });
    this.list.fill(runs, this.chosen, (runId) => this.fragment([runId]), markOf, MOST_COMPARED);
  }

  reconnect() {
    for (const { connection } of this.open.values()) connection.retry();
  }

  // ----------------------------------------------------------------------------------------- what the server says

  take(one, data) {
    const began = performance.now();
    const { store } = one;
    if (data.type === "snapshot") store.applySnapshot(data);
    else if (data.type === "frame") store.applyFrame(data);
    else if (data.type === "sent" || data.type === "refused") this.answered(data);
    const took = performance.now() - began;
    this.messages.count += 1;
    this.messages.applyMs += took;
    if (data.type === "snapshot") this.messages.snapshotMs = took;
    if (store.touched.delete("names")) this.isRearranged = true;
    this.write();
    this.board.wake();
  }

  /** Write what has changed; soon, if it has just been done. */
  write() {
    if (this.writeTimer !== null) return;
    const wait = Math.max(0, this.writtenAt + WRITE_MS - performance.now());
    this.writeTimer = setTimeout(() => {
      this.writeTimer = null;
      this.writtenAt = performance.now();
      this.writeNow();
    }, wait);
  }

  writeNow() {
    const focus = this.focus();
    if (!focus) return;
    const { store, connection } = focus;
    this.writeState(store, connection);
    if (!store.isLoaded) {
      if (connection.state === "gone") this.wait(store.runId, connection.problem);
      else if (connection.state !== "token")
        this.wait(
          "Connecting…",
          connection.problem ? `${connection.problem}. The page goes on trying.` : `Waiting for ${store.runId}.`,
        );
      return;
    }
    byId("waiting").hidden = true;
    byId("content").hidden = false;
    if (document.hidden) return; // what is not seen is written when it is
    if (this.isRearranged) {
      this.isRearranged = false;
      this.sections.arrange();
      this.board.invalidate();
    }
    const touched = store.touched;
    if (touched.delete("points") || touched.has("run")) {
      this.sections.fillLedger();
      this.sections.fillValidation();
    }
    touched.delete("run");
    showCommands(this, store);
    if (touched.delete("checkpoints")) this.checkpoints.fill(store);
    if (touched.delete("observers")) fillObservers(store);
    if (touched.delete("media")) fillMedia(store);
    if (touched.delete("histograms")) fillHistograms(store);
    if (touched.delete("log")) this.log.fill(store);
    if (touched.delete("arguments")) fillAbout(store);
    writeFigures(store, this.isStale);
    fillCompared(this, STALE_S);
  }

  wait(title, text) {
    byId("waiting").hidden = false;
    byId("content").hidden = true;
    setText(byId("waiting-title"), title);
    setText(byId("waiting-text"), text);
  }

  /** The state, in the header, the title, the banner, and said aloud when it changes. */
  writeState(store, connection) {
    const { run } = store;
    const { state, glyph, word } = statusOf(store.isLoaded ? run : { status: "connecting" });
    const chip = byId("status");
    setAttribute(chip, "data-status", state);
    setText(chip.querySelector(".glyph"), glyph);
    setText(chip.querySelector(".word"), word);
    setText(byId("run-name"), store.runId);
    byId("run-name").title = store.runId;
    setText(byId("place"), [run.module, run.device, run.host && `on ${run.host}`].filter(Boolean).join(" · "));
    const isStale = (this.isStale = store.isLoaded && (connection.state !== "open" || connection.silence_s > STALE_S));
    document.title = `${isStale ? "⚠ " : ""}${word}, step ${count(run.global_step ?? 0)} · ${store.runId} – ${NAME}`;
    this.writeBanner(isStale, run, connection);
    const told = `${state}${isStale}`;
    if (this.lastState && this.lastState !== told && store.isLoaded)
      announce(isStale ? byId("banner-text").textContent : `The run is ${word}`);
    this.lastState = store.isLoaded ? told : null;
  }

  writeBanner(isStale, run, connection) {
    document.body.classList.toggle("stale", isStale);
    byId("banner").hidden = !isStale;
    if (!isStale) return;
    const isOver = run.status !== "running" && run.status !== "unknown";
    const text =
      connection.state === "gone"
        ? "The server has closed this run"
        : connection.state === "token"
          ? "The server wants its token"
          : "The connection is lost";
    setText(
      byId("banner-text"),
      isOver ? `${text}; the run is over, so nothing is missing` : `${text}: what you see is old`,
    );
    const left = Math.ceil((connection.retryAt - performance.now()) / 1000);
    const next =
      {
        waiting: left > 0 ? `; trying again in ${left} s` : "; trying again",
        connecting: "; trying again",
        open: "; still waiting",
      }[connection.state] ?? "";
    const problem = connection.problem ? ` (${connection.problem})` : "";
    setText(byId("banner-detail"), `Last heard ${duration(Math.round(connection.silence_s))} ago${problem}${next}.`);
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
        reason: error instanceof TokenWanted ? "the server wants its token" : error.message,
      });
    }
    if (commands)
      setTimeout(() => this.pending.has(id) && this.answered({ type: "refused", id, reason: "no answer came" }), 10000);
  }

  answered({ type, id, reason }) {
    const kind = this.pending.get(id);
    if (!kind) return;
    this.pending.delete(id);
    toast(type === "sent" ? `${WORDS[kind]}: asked for, taken at the next step` : `${WORDS[kind]}: refused, ${reason}`);
    const focus = this.focus();
    if (focus) showCommands(this, focus.store);
  }

  askToken() {
    const dialog = byId("token-dialog");
    if (dialog.open) return;
    if (token.get())
      setText(byId("token-text"), "That was not the token. It was printed where the server was started.");
    dialog.showModal();
  }

  setFilter(text) {
    this.view.filter = text;
    this.keepFragment();
    this.sections.arrange();
  }
}

/** For whoever measures the page. */
window.stagecast = new App();
