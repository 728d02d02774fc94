// In the window of the notebook: unpacks the pages of runs into frames, hands them their messages, and sends their
// commands to the kernel. Messages since the last snapshot are kept, because a frame that was out of sight starts again.
window.HOST ??= (() => {
  const runs = new Map();
  const ANSWER_MS = 10000;

  function runOf(id) {
    if (!runs.has(id)) runs.set(id, { messages: [], pages: new Set(), isShown: false, kernel: null });
    return runs.get(id);
  }

  function jupyter() {
    return JSON.parse(document.getElementById("jupyter-config-data")?.textContent ?? "null");
  }

  // The progress in HTML is for front ends that cannot show the page.
  function tidy() {
    for (const [id, run] of runs)
      for (const one of document.querySelectorAll(`[data-stagecast="${id}"]`))
        one.style.display = run.isShown ? "none" : "";
  }

  async function unpacked(packed) {
    const bytes = Uint8Array.from(atob(packed), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Blob([await new Response(stream).arrayBuffer()], { type: "text/html;charset=utf-8" });
  }

  async function open(options, script) {
    const place = script.previousElementSibling;
    const run = runOf(options.id);
    run.kernel = options.kernel;
    if (!options.live) run.messages = [];
    const frame = document.createElement("iframe");
    frame.title = "The run's charts";
    // An address, because a page without one cannot keep its state in the fragment.
    frame.src = URL.createObjectURL(await unpacked(place.dataset.packed));
    frame.style.cssText =
      "display:block;width:100%;height:30em;min-height:12em;resize:vertical;border:1px solid rgba(128,128,128,.35);border-radius:4px";
    place.append(frame);
  }

  function feed(options, message) {
    const run = runOf(options.id);
    run.kernel = options.kernel;
    if (message.type === "snapshot") run.messages = [];
    run.messages.push(message);
    for (const page of run.pages) page.take(message);
    tidy();
  }

  /** Called by a page: `take(message)` gets the messages so far, and those that follow. */
  function attach(id, take, frame) {
    const run = runOf(id);
    // A frame that was removed, or has started again, has no element or another document.
    for (const page of run.pages) if (page.frame === frame || !page.frame.isConnected) run.pages.delete(page);
    run.pages.add({ take, frame });
    run.isShown = true;
    tidy();
    run.messages.forEach(take);
  }

  function takesCommands(id) {
    return runOf(id).kernel !== null && jupyter() !== null;
  }

  /** Send a command on a subshell of the kernel, whose main thread runs the cell; resolves to the kernel's answer. */
  async function command(id, told) {
    const { baseUrl, wsUrl, token } = jupyter();
    const [session, comm] = [crypto.getRandomValues(new Uint32Array(4)).join("-"), `${told.id}`];
    const path = `${baseUrl}api/kernels/${encodeURIComponent(runOf(id).kernel)}/channels`;
    const address = new URL(path, wsUrl || location.href);
    address.protocol = address.protocol.replace("http", "ws");
    address.searchParams.set("session_id", session);
    if (token) address.searchParams.set("token", token);
    const socket = new WebSocket(address);
    let count = 0;
    function send(channel, type, content, more = {}) {
      const header = { msg_id: `${session}-${count++}`, msg_type: type, session, username: "stagecast", version: "5.4" };
      const date = new Date().toISOString();
      socket.send(
        JSON.stringify({ channel, header: { ...header, date, ...more }, parent_header: {}, metadata: {}, content, buffers: [] }),
      );
    }
    let subshell = null;
    try {
      return await new Promise((resolve, reject) => {
        setTimeout(() => reject(new Error("the kernel does not answer")), ANSWER_MS);
        socket.onopen = () => send("control", "create_subshell_request", {});
        socket.onclose = () => reject(new Error("the notebook's server has closed the connection"));
        socket.onmessage = ({ data }) => {
          const { header, parent_header: parent, content } = JSON.parse(data);
          if (header.msg_type === "create_subshell_reply" && parent.session === session) {
            subshell = content.subshell_id;
            const opening = { comm_id: comm, target_name: "stagecast", data: { display: id, command: told } };
            send("shell", "comm_open", opening, { subshell_id: subshell });
          } else if (header.msg_type === "comm_close" && content.comm_id === comm) resolve(content.data);
        };
      });
    } finally {
      if (subshell !== null && socket.readyState === WebSocket.OPEN)
        send("control", "delete_subshell_request", { subshell_id: subshell });
      socket.onclose = null;
      socket.close();
    }
  }

  /** Whether the notebook is dark; null if that is unknown. */
  function isDark() {
    const { dataset, classList } = document.body;
    if (dataset.jpThemeLight) return dataset.jpThemeLight === "false";
    return classList.contains("vscode-dark") ? true : classList.contains("vscode-light") ? false : null;
  }

  return { open, feed, tidy, attach, takesCommands, command, isDark };
})();
