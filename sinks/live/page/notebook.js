/** The notebook around the page, if it stands in the output of a cell: see `sinks/notebook/host.js`. */

import { embedded } from "./embedded.js";

const told = embedded?.notebook;

function hostOf({ host }) {
  try {
    return window.parent[host] ?? null;
  } catch {
    return null; // a page of another origin: the notebook was opened elsewhere
  }
}

class Notebook {
  constructor(options, host) {
    this.options = options;
    this.host = host;
  }

  /** Whether messages follow the snapshot in the page. */
  get isLive() {
    return this.options.live;
  }

  get takesCommands() {
    return this.isLive && this.host.takesCommands(this.options.id);
  }

  follow(take) {
    this.host.attach(this.options.id, take, window.frameElement);
  }

  /** Resolves to the kernel's answer. */
  async command(command) {
    return { id: command.id, ...(await this.host.command(this.options.id, command)) };
  }

  /** Call with "dark", "light" or null, now and when the notebook's theme changes. */
  onTheme(change) {
    const { body } = window.parent.document;
    const tell = () => {
      const isDark = this.host.isDark();
      change(isDark === null ? null : isDark ? "dark" : "light");
    };
    const observer = new MutationObserver(tell);
    observer.observe(body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
    // The notebook outlives this frame, and would keep it in memory.
    addEventListener("pagehide", ({ persisted }) => {
      if (!persisted) observer.disconnect();
    });
    tell();
  }
}

const host = told ? hostOf(told) : null;
export const notebook = host ? new Notebook(told, host) : null;
if (told) document.documentElement.dataset.place = "notebook";
