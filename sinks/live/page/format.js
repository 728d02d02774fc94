/** Formats numbers, sizes and times. Pure functions. */

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const clock = new Intl.DateTimeFormat(undefined, {
  hour: "2-digit",
  minute: "2-digit",
  second: "2-digit",
  hour12: false,
});
const dayAndClock = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

export const NONE = "–";

/** A count, or a step: `12,340`. */
export function count(value) {
  if (!isNumber(value)) return NONE;
  return Math.abs(value) < 1e15 ? whole.format(value) : number(value);
}

/** A number of runs, of all or of some: `1 run`, `3 of 20 runs`. */
export function runsOf(some, all = some) {
  return `${some === all ? "" : `${count(some)} of `}${count(all)} ${all === 1 ? "run" : "runs"}`;
}

/** A measured number to four digits, without trailing zeros: `0.5321`, `12,340`, `3e-4`. */
export function number(value, digits = 4) {
  if (typeof value === "string") return value === "nan" ? "NaN" : value.replace("inf", "∞");
  if (value === null || value === undefined) return NONE;
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "∞" : "-∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e9 || size < 1e-3) {
    const [mantissa, exponent] = value.toExponential(digits - 2).split("e");
    return `${trimmed(mantissa)}e${Number(exponent)}`;
  }
  if (size >= 10 ** digits) return whole.format(value);
  return trimmed(value.toPrecision(digits));
}

/** Bytes, in powers of 1,024: `1.4 GiB`. */
export function bytes(value, digits) {
  return scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"], digits);
}

/** A rate: `1,240 rows/s`. */
export function rate(value, unit) {
  return isNumber(value) ? `${number(value)} ${unit}/s` : NONE;
}

/** A span of time: `850 µs`, `12.3 s`, `1h 04m`, `3d 02h`; with more digits than 3: `64.25 s`. */
export function duration(seconds, digits = 3) {
  if (!isNumber(seconds)) return NONE;
  const size = Math.abs(seconds);
  if (size === 0) return "0 s";
  if (size >= 1e12) return `${number(seconds)} s`;
  if (size < 1e-3) return `${number(seconds * 1e6, digits)} µs`;
  if (size < 1) return `${number(seconds * 1e3, digits)} ms`;
  if (size < 60 || digits > 3) return `${number(seconds, digits)} s`;
  if (Math.round(size) < 3600) return pair(seconds, 60, "m", "s");
  if (Math.round(size / 60) < 1440) return pair(seconds / 60, 60, "h", "m");
  return pair(seconds / 3600, 24, "d", "h");
}

/** How long ago: `just now`, `3 min ago`. Both in Unix seconds. */
export function ago(time, now) {
  if (!isTime(time)) return NONE;
  const passed = Math.max(0, now - time);
  if (passed < 5) return "just now";
  if (passed < 60) return `${Math.floor(passed)} s ago`;
  if (passed < 3600) return `${Math.floor(passed / 60)} min ago`;
  if (passed < 86400) return `${Math.floor(passed / 3600)} h ago`;
  return `${Math.floor(passed / 86400)} d ago`;
}

/** The time of day. */
export function timeOfDay(time) {
  return isTime(time) ? clock.format(time * 1000) : NONE;
}

/** Day and time. */
export function moment(time) {
  return isTime(time) ? dayAndClock.format(time * 1000) : NONE;
}

/** A share of one: `12.3 %`. */
export function percent(share) {
  if (!isNumber(share)) return NONE;
  return `${Math.abs(share) < 1e6 ? (share * 100).toFixed(1) : number(share * 100)} %`;
}

/** The format of a series' numbers, by its name: `{show, tick, isBinary}`; `tick` for an axis. */
export function unitOf(name) {
  const last = name.slice(name.lastIndexOf("/") + 1);
  if (name === "rows_per_s") return { show: (value) => rate(value, "rows"), tick: number };
  if (last.endsWith("_bytes_per_s")) return { show: bytesPerS, isBinary: true };
  if (last.endsWith("_bytes")) return { show: bytes, isBinary: true };
  if (last.endsWith("_percent")) return { show: having("%") };
  if (name.startsWith("system/") && last === "power_w") return { show: having("W") };
  if (name.startsWith("system/") && last === "temperature_c") return { show: having("°C") };
  if (name === "step_s" || (name.startsWith("ledger/") && name.endsWith("_s"))) return { show: duration };
  return { show: number };
}

/** Whether lower is better: true, false, or null if the name does not determine it. */
export function lowerIsBetter(name) {
  const words = name.toLowerCase().split(/[^a-z0-9]+/);
  if (words.some((word) => LOW.has(word))) return true;
  return words.some((word) => HIGH.has(word)) ? false : null;
}

const LOW = new Set([
  "loss",
  "error",
  "err",
  "perplexity",
  "ppl",
  "mae",
  "mse",
  "rmse",
  "wer",
  "cer",
  "fid",
  "nll",
  "bpb",
]);
const HIGH = new Set([
  "acc",
  "accuracy",
  "f1",
  "auc",
  "auroc",
  "bleu",
  "rouge",
  "iou",
  "map",
  "precision",
  "recall",
  "score",
  "r2",
  "psnr",
  "ssim",
]);

function having(unit) {
  return (value, digits = 3) => (isNumber(value) ? `${number(value, digits)} ${unit}` : NONE);
}

function bytesPerS(value, digits) {
  return isNumber(value) ? `${bytes(value, digits)}/s` : NONE;
}

/** The time of day, with the day if it is not today; for short lines. */
export function since(time, now) {
  if (!isTime(time)) return "";
  const options =
    now - time > 20 * 3600 ? { month: "short", day: "numeric" } : { hour: "2-digit", minute: "2-digit", hour12: false };
  return `since ${new Intl.DateTimeFormat(undefined, options).format(time * 1000)}`;
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

/** Whether a `Date` can hold a time in Unix seconds; formatting any other one, of an untrusted run, throws. */
export function isTime(time) {
  return isNumber(time) && time > 0 && time < 8.64e12;
}

function trimmed(text) {
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

function scaled(value, base, units, digits = 3) {
  if (!isNumber(value)) return NONE;
  let index = 0;
  while (Math.abs(value) >= base * 0.9995 && index < units.length - 1) {
    value /= base;
    index += 1;
  }
  return `${index === 0 ? whole.format(value) : number(value, digits)} ${units[index]}`;
}

function pair(value, base, large, small) {
  const rounded = Math.round(value);
  return `${Math.floor(rounded / base)}${large} ${String(rounded % base).padStart(2, "0")}${small}`;
}
