/** The reader's choices in the comparison of runs, which the address keeps. */

const VALUES = ["best", "last"];

export class CompareState {
  metric = ""; // empty: the one by which the runs choose checkpoints
  parameter = ""; // empty: the first one that differs
  by = "best";
  ranges = new Map(); // axis -> [from, to]: the selected parts of axes
  isOpen = false; // for the runs of the table
  isWhole = false; // all rows and metrics are shown

  read(wanted) {
    this.by = VALUES.includes(wanted.get("value")) ? wanted.get("value") : VALUES[0];
    this.isOpen = wanted.has("compare");
    this.metric = wanted.get("metric") ?? "";
    this.parameter = wanted.get("parameter") ?? "";
    this.ranges = new Map();
    for (const told of wanted.getAll("range")) {
      const [, ends, axis] = /^([^:]+):(.+)$/s.exec(told) ?? [];
      const range = ends?.split("~").map(Number) ?? [];
      if (range.length === 2 && range.every(Number.isFinite)) this.ranges.set(axis, range);
    }
  }

  write(told) {
    if (this.isOpen) told.set("compare", "1");
    if (this.by !== VALUES[0]) told.set("value", this.by);
    if (this.metric) told.set("metric", this.metric);
    if (this.parameter) told.set("parameter", this.parameter);
    for (const [axis, range] of this.ranges) told.append("range", `${range.join("~")}:${axis}`);
  }
}
