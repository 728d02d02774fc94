/** Controls: settings, commands, the token, the colours. */

import { token } from "./connection.js";
import { announce, setAttribute, setText } from "./dom.js";
import { number } from "./format.js";
import { labelOf } from "./names.js";
import { notebook } from "./notebook.js";

function byId(id) {
  return document.getElementById(id);
}

export const WORDS = { pause: "Pause", resume: "Resume", checkpoint: "Checkpoint", stop: "Stop" };
export const isNarrow = window.matchMedia("(max-width: 1000px)");

/** `crypto.randomUUID` is missing on a page that was loaded without TLS from another machine. */
export function freshCommandId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

let toastTimer = null;
export function toast(text) {
  const root = byId("toast");
  setText(root, text);
  root.hidden = false;
  announce(text);
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (root.hidden = true), 6000);
}

export function showCommands(app, store) {
  const { run } = store;
  const isTaken = run.commands && (!notebook || notebook.takesCommands);
  byId("commands").hidden = !(isTaken && run.status === "running");
  const waits = new Set(app.isStale ? Object.keys(WORDS) : app.pending.values());
  setText(byId("pause"), run.paused ? "Resume" : "Pause");
  byId("pause").disabled = waits.has("pause") || waits.has("resume");
  byId("checkpoint").disabled = waits.has("checkpoint");
  byId("stop").disabled = waits.has("stop");
}

export function showControls(app) {
  const { view } = app;
  byId("log").checked = view.log.all;
  byId("robust").checked = view.robust.all;
  byId("unzoom").hidden = view.zoom === null;
  byId("smoothing").value = view.smoothing;
  setText(byId("smoothing-value"), view.smoothing ? number(view.smoothing) : "off");
  byId("x").value = view.x;
  if (byId("metrics-filter") !== document.activeElement) byId("metrics-filter").value = view.filter;
}

export function setUpControls(app) {
  const { view } = app;
  const { board } = app;
  for (const name of ["log", "robust"]) {
    byId(name).addEventListener("change", (event) => {
      view[name].all = event.target.checked;
      view[name].own.clear(); // the choice holds for all charts
      board.changed();
    });
  }
  byId("smoothing").addEventListener("input", (event) => {
    view.smoothing = Number(event.target.value);
    board.changed();
  });
  byId("x").addEventListener("change", (event) => {
    view.x = event.target.value;
    view.zoom = null;
    board.changed();
  });
  byId("unzoom").addEventListener("click", () => board.zoom(null));
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault(); // the fragment is the page's state
    byId("main").focus();
  });
  byId("table-toggle").addEventListener("click", () => app.table.open(!app.view.table.isOpen));
  byId("retry").addEventListener("click", () =>
    app.focus()?.connection.state === "token" ? app.askToken() : app.reconnect(),
  );
  byId("runs-toggle").addEventListener("click", () => {
    const toggle = byId("runs-toggle");
    toggle.setAttribute("aria-expanded", String(toggle.getAttribute("aria-expanded") !== "true"));
    app.fillList();
  });
  isNarrow.addEventListener("change", () => app.fillList());
  setUpCommands(app);
  setUpToken(app);
  setUpTheme(app);
}

function setUpCommands(app) {
  byId("pause").addEventListener("click", () => app.command(app.focus()?.store.run.paused ? "resume" : "pause"));
  byId("checkpoint").addEventListener("click", () => app.command("checkpoint"));
  const dialog = byId("stop-dialog");
  byId("stop").addEventListener("click", () => {
    setText(byId("stop-title"), `Stop ${labelOf(app.focus().store.runId)}?`);
    dialog.showModal();
    byId("stop-cancel").focus();
  });
  byId("stop-cancel").addEventListener("click", () => dialog.close());
  byId("stop-form").addEventListener("submit", (event) => {
    event.preventDefault();
    dialog.close();
    app.command("stop", { checkpoint: byId("stop-checkpoint").checked, reason: byId("stop-reason").value || null });
  });
}

function setUpToken(app) {
  byId("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    token.set(byId("token-input").value);
    byId("token-input").value = "";
    byId("token-dialog").close();
    app.look();
    app.reconnect();
  });
}

const THEMES = { auto: ["◐", "system setting"], light: ["☀", "light"], dark: ["☾", "dark"] };
function setUpTheme(app) {
  const KEY = "stagecast-theme";
  const order = Object.keys(THEMES);
  let now = localStorage.getItem(KEY);
  if (!order.includes(now)) now = "auto";
  const show = () => {
    setAttribute(document.documentElement, "data-theme", now === "auto" ? null : now);
    setText(byId("theme").firstElementChild, THEMES[now][0]);
    byId("theme").setAttribute("aria-label", `Colours: ${THEMES[now][1]}`);
    byId("theme").title = `Colours: ${THEMES[now][1]}`;
    app.board.invalidate({ rebuild: true });
    app.fillList();
    app.write();
  };
  byId("theme").addEventListener("click", () => {
    now = order[(order.indexOf(now) + 1) % order.length];
    localStorage.setItem(KEY, now);
    show();
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  if (notebook)
    notebook.onTheme((theme) => {
      now = theme ?? "auto";
      show();
    });
  else show();
}
