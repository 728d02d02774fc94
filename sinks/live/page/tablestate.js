/** The reader's choices about the run table, which the page's address keeps while the table is open. */

export class TableState {
  isOpen = false;
  columns = null; // ids in their order; null for the usual ones
  sort = null; // ids, `-ID` for the greatest first; null for the usual order
  where = ""; // a condition or a regular expression
  group = null; // id of the column by whose values runs are grouped
  unfolded = new Set(); // keys of groups
  hidden = new Set(); // names of runs
  showsHidden = false;
  pinned = new Set();

  read(wanted) {
    this.isOpen = wanted.has("table");
    if (!this.isOpen) return; // the choices hold when the table is opened again

    this.columns = wanted.has("column") ? wanted.getAll("column").filter(Boolean) : null;
    this.sort = wanted.getAll("sort").filter(Boolean);
    if (!this.sort.length) this.sort = null;
    this.where = wanted.get("where") ?? "";
    this.group = wanted.get("group") || null;
    this.unfolded = new Set(wanted.getAll("unfold"));
    this.hidden = new Set(wanted.getAll("hide-run"));
    this.showsHidden = wanted.has("hidden");
    this.pinned = new Set(wanted.getAll("pin-run"));
  }

  write(told) {
    if (!this.isOpen) return;
    told.set("table", "1");
    for (const id of this.columns ?? []) told.append("column", id);
    if (this.columns?.length === 0) told.set("column", ""); // names alone
    for (const key of this.sort ?? []) told.append("sort", key);
    if (this.where) told.set("where", this.where);
    if (this.group) told.set("group", this.group);
    for (const key of this.unfolded) told.append("unfold", key);
    for (const name of this.hidden) told.append("hide-run", name);
    if (this.showsHidden) told.set("hidden", "1");
    for (const name of this.pinned) told.append("pin-run", name);
  }

  /** Whether anything differs from the table as it first opens. */
  get isChanged() {
    return Boolean(this.columns || this.sort || this.where || this.group || this.hidden.size || this.pinned.size);
  }

  reset() {
    Object.assign(this, new TableState(), { isOpen: this.isOpen });
  }

  /** Sort by a column; another click turns the direction around, and a third one restores the usual order. */
  sortBy(id, isDown, isAdded, usual) {
    const now = this.sort ?? usual;
    const before = now.find((key) => key.replace(/^-/, "") === id);
    const first = isDown ? `-${id}` : id;
    const next = before === undefined ? first : before === first ? (isDown ? id : `-${id}`) : null;
    const others = isAdded ? now.filter((key) => key !== before) : [];
    if (isAdded && before !== undefined && next) this.sort = now.map((key) => (key === before ? next : key));
    else this.sort = next ? [...others, next] : others.length ? others : null;
  }

  toggle(set, key) {
    if (!set.delete(key)) set.add(key);
  }
}
