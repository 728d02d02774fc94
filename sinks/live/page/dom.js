/** Build the page. Data from the network is inserted as text, never as markup. */

const SVG = "http://www.w3.org/2000/svg";

/** An element. `properties`: attributes, `on...` listeners, `class`, `text`; children are nodes or text. */
export function el(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** The same for SVG. */
export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Set text if it has changed, to save the browser's work. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setAttribute(node, name, value) {
  if (value === null || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

let ids = 0;
export function freshId(prefix) {
  ids += 1;
  return `${prefix}-${ids}`;
}

/** A real table. `columns`: `{head, number}`; `rows`: arrays of text or nodes, the first cell being the row's head. */
export function table(caption, columns, rows, { hideCaption = false } = {}) {
  const head = columns.map((column) =>
    el("th", { scope: "col", class: column.number ? "number" : null, text: column.head }),
  );
  const body = rows.map((row) => tableRow(columns, row));
  return el(
    "table",
    {},
    el("caption", { class: hideCaption ? "visually-hidden" : null, text: caption }),
    el("thead", {}, el("tr", {}, ...head)),
    el("tbody", {}, ...body),
  );
}

export function tableRow(columns, row) {
  const cells = row.map((value, index) => {
    const tag = index === 0 ? "th" : "td";
    const properties = { scope: index === 0 ? "row" : null, class: columns[index].number ? "number" : null };
    return el(tag, properties, value instanceof Node ? value : String(value));
  });
  return el("tr", {}, ...cells);
}

/** Update the children of `parent` to `keys`, in their order; the elements of old keys are kept. */
export function reconcile(parent, known, keys, make) {
  const wanted = new Set(keys);
  for (const [key, item] of known) {
    if (!wanted.has(key)) {
      item.destroy?.();
      (item.root ?? item).remove();
      known.delete(key);
    }
  }
  let next = parent.firstElementChild;
  for (const key of keys) {
    let item = known.get(key);
    if (!item) known.set(key, (item = make(key)));
    const node = item.root ?? item;
    if (node === next) next = next.nextElementSibling;
    else parent.insertBefore(node, next);
  }
}

/** Draw a part of the page. Its errors are logged and contained: one run's data must not stop the others. */
export function contained(draw) {
  try {
    draw();
    return true;
  } catch (error) {
    console.error(error);
    return false;
  }
}

/** Announce a text to screen readers. */
export function announce(text) {
  const region = document.getElementById("announcer");
  region.textContent = "";
  region.textContent = text;
}
