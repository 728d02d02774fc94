/** The words for a run's state. Pure functions. */

import { count } from "./format.js";

const UNKNOWN = ["·", "unknown"];
const STATUS = new Map([
  ["queued", ["…", "queued"]],
  ["running", ["●", "running"]],
  ["paused", ["‖", "paused"]],
  ["finished", ["✓", "finished"]],
  ["stopped", ["■", "stopped"]],
  ["failed", ["✕", "failed"]],
  ["cancelled", ["⊘", "cancelled"]],
  ["lost", ["?", "lost"]],
  ["silent", ["?", "silent: nothing arrives from it"]],
  ["damaged", ["⚠", "damaged"]],
  ["connecting", ["·", "connecting"]],
  ["missing", ["?", "no such run"]],
]);

/** `{state, glyph, word, isUnhealthy}` of a run: one with problems has neither the glyph nor the word of a healthy one. */
export function statusOf(run) {
  const state = run.status === "running" && run.paused ? "paused" : run.status;
  const [glyph, word] = STATUS.get(state) ?? UNKNOWN;
  const problems = run.problems?.length ?? 0;
  if (!problems || state === "missing") return { state, glyph, word, isUnhealthy: false };
  const others = problems - (run.damage ? 1 : 0);
  const isSaid = !others || (state === "failed" && others === 1); // the only problem is the failure itself
  const words = [
    word,
    run.damage && state !== "damaged" ? "damaged" : null,
    isSaid ? null : `${count(others)} ${others === 1 ? "problem" : "problems"}`,
  ];
  return {
    state,
    glyph: ["failed", "lost", "silent", "damaged"].includes(state) ? glyph : "▲",
    word: words.filter(Boolean).join(", "),
    isUnhealthy: true,
  };
}
