/** The connection to the server: WebSocket, or Server-Sent Events where a proxy blocks it; and the token. */

import { embedded } from "./embedded.js";
import { notebook } from "./notebook.js";

const FIRST_WAIT_S = 0.5;
const LONGEST_WAIT_S = 15;
/** Maximum silence per connection before it is closed; the server sends something every two seconds. */
const SILENT_S = 10;
const UNPACKS = "DecompressionStream" in window;
/** Seconds between polls of a run whose events do not stream. */
const POLL_S = 4;
const TOKEN = "stagecast-token";

export const token = {
  get: () => (report ? null : sessionStorage.getItem(TOKEN)),
  set: (value) => sessionStorage.setItem(TOKEN, value),
  clear: () => sessionStorage.removeItem(TOKEN),
};

/** A report has no server. */
export const report = embedded;

/** A token in the fragment (`#token=...`) is kept for this tab, and removed from the address before any request. */
function takeToken() {
  const told = new URLSearchParams(location.hash.slice(1));
  const given = told.get("token");
  if (report || given === null) return false;
  if (given) token.set(given);
  told.delete("token");
  history.replaceState(null, "", location.pathname + location.search + (told.size ? `#${told}` : ""));
  return true;
}
takeToken();
window.addEventListener("hashchange", () => takeToken() && location.reload());

/** A request was refused because the token is missing or wrong. */
export class TokenWanted extends Error {}

/** The server's answer for an unknown run. */
export const NO_RUN = "this server has no such run";

/** Fetch an address relative to the page. Throws `TokenWanted`, or an `Error` with the reason. */
export async function get(address, options = {}) {
  if (report) return new Response(JSON.stringify({ runs: report.runs.map((one) => one.run) }));
  const shown = token.get();
  const headers = { ...(options.headers ?? {}), ...(shown ? { Authorization: `Bearer ${shown}` } : {}) };
  const response = await fetch(address, { cache: "no-store", ...options, headers });
  // A proxy, or the host's own check, may require other credentials than the token.
  if (response.status === 401 && /^bearer/i.test(response.headers.get("WWW-Authenticate") ?? ""))
    throw new TokenWanted();
  if (response.status === 404 && !options.any) throw new Error(NO_RUN);
  if (!response.ok && !options.any) throw new Error((await answerOf(response)).reason);
  return response;
}

/** Parse the JSON of an answer; returns `{reason}` for one of another program, such as a proxy. */
async function answerOf(response) {
  const answer = await response.json().catch(() => ({}));
  if (answer.type) return answer;
  return { reason: `the server answered ${response.status}${answer.error ? `: ${answer.error}` : ""}` };
}

/** Decompress a message. */
function unpack(data) {
  return new Response(new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

export function addressOf(runId, rest = "") {
  return `api/runs/${encodeURIComponent(runId)}${rest}`;
}

/**
 * Receives one run's events, and reconnects.
 *
 * `on` has `message(data)`, `state()`, `token()`. `store` has the position to resume from. With `isRead`, it reads the run
 * once and stays closed until `follow`: a finished run has no news, and there may be many of them.
 */
export class Connection {
  constructor(store, on, { isMain, isRead = false }) {
    this.store = store;
    this.on = on;
    this.isMain = isMain;
    this.state = "connecting"; // "open", "waiting" (for the next try), "token", "gone" (closed for good)
    this.problem = null;
    this.isBroken = false; // whether an error ended the drawing of a part
    this.heardAt = performance.now();
    this.retryAt = 0;
    this.#failures = 0;
    this.#isRead = isRead;
    if (report) queueMicrotask(() => this.#tell());
    else this.#open();
  }

  #tell() {
    const snapshot = report.runs.find((one) => one.run.run_id === this.store.runId);
    if (snapshot === undefined) {
      const held = report.runs.map((one) => one.run.run_id).join(", ");
      this.#end(`there is no such run in this report; it holds ${held}`);
      return;
    }
    this.state = "open";
    this.on.message(snapshot);
    notebook?.follow((message) => {
      this.heardAt = performance.now();
      this.on.message(message);
    });
  }

  #failures;
  #isRead;
  #socket = null;
  #abort = null;
  #timer = null;
  #usesEvents = false;
  #polls = false;
  #silences = 0;
  #openedAt = 0;
  #wasOpen = false;
  #gapTimer = null;
  #stopped = false;
  #unpacking = null; // a promise while compressed messages, and those behind them, are not read yet

  stop() {
    this.#stopped = true;
    this.#drop();
  }

  /** Seconds since the server's last message. */
  get silence_s() {
    const isStill = report ? !notebook?.isLive : this.#isRead && this.state === "open";
    return isStill ? 0 : (performance.now() - this.heardAt) / 1000;
  }

  /** A problem to fix outside of the page, if any: `{text, fix}`. */
  get note() {
    if (this.isBroken) return { text: `A part of ${this.store.runId} cannot be shown`, fix: "Its data is damaged." };
    if (!this.#polls || this.state !== "open") return null;
    const text = `A proxy buffers the stream of events, so the page polls every ${POLL_S} s`;
    return { text, fix: "Disable its buffering for this address (nginx: proxy_buffering off;)." };
  }

  /** Follow the run's events from now on. */
  follow() {
    if (!this.#isRead || this.#stopped || report) return;
    this.#isRead = false;
    this.#drop();
    this.#open();
  }

  /** Reconnect now. */
  retry() {
    if (report || this.#stopped || this.state === "open" || this.state === "connecting") return;
    this.#failures = 0;
    this.#drop();
    this.#open();
  }

  /** Called once a second: closes a silent connection. */
  tick() {
    if (report) return;
    const opening_s = this.state === "connecting" && this.#usesEvents ? (performance.now() - this.#openedAt) / 1000 : 0;
    if (opening_s <= SILENT_S && !(this.state === "open" && this.silence_s > SILENT_S)) return;
    this.#silences += 1;
    if (this.#usesEvents && this.isMain && (opening_s || this.#silences > 1)) this.#polls = true;
    this.#lost("the server stopped sending");
  }

  /** Send a command. Resolves to the server's answer; throws if it could not be sent. */
  async command(command) {
    if (notebook) return notebook.command(command);
    if (this.#socket?.readyState === WebSocket.OPEN) {
      this.#socket.send(JSON.stringify({ type: "command", command }));
      return null; // the answer comes as a message
    }
    const body = JSON.stringify(command);
    const headers = { "Content-Type": "application/json" };
    const response = await get(addressOf(this.store.runId, "/commands"), { method: "POST", body, headers, any: true });
    const answer = await answerOf(response);
    if (!answer.type) throw new Error(answer.reason);
    return answer;
  }

  #drop() {
    clearTimeout(this.#timer);
    clearTimeout(this.#gapTimer);
    this.#timer = this.#gapTimer = null;
    const socket = this.#socket;
    this.#socket = this.#unpacking = null;
    if (socket) {
      socket.onopen = socket.onmessage = socket.onclose = socket.onerror = null;
      socket.close();
    }
    this.#abort?.abort();
    this.#abort = null;
  }

  #set(state, problem = null) {
    this.state = state;
    this.problem = problem;
    this.on.state();
  }

  #open() {
    this.#openedAt = performance.now();
    this.#set("connecting", this.problem);
    if (this.#isRead) this.#read();
    else if (this.#usesEvents) this.#openEvents();
    else this.#openSocket();
  }

  async #read() {
    const abort = (this.#abort = new AbortController());
    try {
      const response = await get(addressOf(this.store.runId), { signal: abort.signal });
      this.#heard(await response.text());
    } catch (error) {
      this.#failed(error, abort);
    }
  }

  #openSocket() {
    this.#wasOpen = false;
    const address = new URL(addressOf(this.store.runId, "/ws"), document.baseURI);
    address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
    address.hash = "";
    const socket = new WebSocket(address);
    this.#socket = socket;
    socket.onopen = () => {
      this.#wasOpen = true;
      const { cursor, attempt } = this.store;
      socket.send(JSON.stringify({ type: "hello", token: token.get(), since: cursor, attempt, gzip: UNPACKS }));
    };
    socket.binaryType = "arraybuffer";
    socket.onmessage = (event) => this.#receive(socket, event.data);
    socket.onclose = (event) => {
      this.#socket = null;
      this.#closed(event.code, event.reason);
    };
  }

  /** Read a message, in order: a compressed one takes a moment. */
  #receive(socket, data) {
    if (typeof data === "string" && !this.#unpacking) {
      this.#heard(data);
      return;
    }
    this.heardAt = performance.now();
    const before = this.#unpacking;
    const read = async () => {
      await before;
      const text = typeof data === "string" ? data : await unpack(data).catch(() => "");
      if (this.#unpacking === own) this.#unpacking = null;
      if (this.#socket === socket) this.#heard(text);
    };
    const own = (this.#unpacking = read());
  }

  #closed(code, reason) {
    if (code === 4401) this.#wantToken();
    else if (code === 4404) this.#end(NO_RUN);
    else if (code === 1008 && this.#wasOpen) this.#end(reason || "the server does not allow this page");
    else {
      // A WebSocket that never opens is probably blocked by a proxy.
      if (!this.#wasOpen && this.#failures > 0) this.#usesEvents = true;
      if (code === 1013) this.#failures = Math.max(this.#failures, 2);
      this.#lost(code === 1013 ? reason || "the server is overloaded" : "the connection was closed");
    }
  }

  #wantToken() {
    this.#drop();
    this.#set("token", "the server requires its token");
    this.on.token();
  }

  #end(problem) {
    this.#drop();
    this.#set("gone", problem);
  }

  #lost(problem) {
    if (this.#stopped) return;
    this.#drop();
    const wait = Math.min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** this.#failures) * (0.75 + Math.random() / 2);
    this.#failures += 1;
    this.retryAt = performance.now() + wait * 1000;
    this.#timer = setTimeout(() => this.#open(), wait * 1000);
    this.#set("waiting", problem);
  }

  #heard(text) {
    this.heardAt = performance.now();
    let data;
    try {
      data = JSON.parse(text);
    } catch {
      this.#lost("the server sent an invalid message");
      return;
    }
    this.#failures = 0;
    if (data.type === "gap") {
      // A snapshot follows; otherwise it is requested.
      this.#gapTimer = setTimeout(() => this.#ask({ type: "snapshot" }), 1000);
    } else if (data.type === "snapshot") {
      clearTimeout(this.#gapTimer);
    }
    this.on.message(data);
    if (this.state !== "open") this.#set("open");
  }

  #ask(message) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(message));
  }

  // ------------------------------------------------------------------------------------------ without WebSocket

  /** With `fetch`, since an `EventSource` cannot send a token. Browsers limit connections, so other runs are polled. */
  async #openEvents() {
    const abort = (this.#abort = new AbortController());
    try {
      if (!this.isMain || this.#polls) {
        await this.#poll(abort);
        return;
      }
      const { cursor, attempt } = this.store;
      const since = cursor === null ? "" : `?since=${cursor}&attempt=${attempt}`;
      const response = await get(addressOf(this.store.runId, `/events${since}`), { signal: abort.signal });
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let pending = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) throw new Error("the connection was closed");
        pending += value;
        const blocks = pending.split(/\r?\n\r?\n/);
        pending = blocks.pop();
        for (const block of blocks) {
          const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
          if (lines.length) this.#heard(lines.map((line) => line.slice(5).trimStart()).join("\n"));
          else this.heardAt = performance.now();
        }
      }
    } catch (error) {
      if (!abort.signal.aborted && this.#failures > 2) this.#usesEvents = this.#polls = false; // retry the WebSocket
      this.#failed(error, abort);
    }
  }

  #failed(error, abort) {
    if (abort.signal.aborted) return;
    if (error instanceof TokenWanted) this.#wantToken();
    else if (error.message === NO_RUN) this.#end(NO_RUN);
    else this.#lost(error.message);
  }

  async #poll(abort) {
    for (;;) {
      const response = await get(addressOf(this.store.runId), { signal: abort.signal });
      this.#heard(await response.text());
      await new Promise((resolve) => setTimeout(resolve, POLL_S * 1000));
      if (abort.signal.aborted) return;
    }
  }
}
