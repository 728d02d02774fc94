/** The names and colours that people gave to runs (`notes.json`), by the id of a run. */

const known = new Map();

/** Learn from `[{run_id, label, colour}]`; returns whether something has changed. */
export function learnNames(runs) {
  let isNew = false;
  for (const { run_id, label = "", colour = "" } of runs) {
    const before = known.get(run_id) ?? { label: "", colour: "" };
    if (before.label === label && before.colour === colour) continue;
    known.set(run_id, { label, colour });
    isNew = true;
  }
  return isNew;
}

/** The name that people see. The id of a run remains its address. */
export function labelOf(runId) {
  return known.get(runId)?.label || runId;
}

/** The colour that people chose for a run, or null. */
export function ownColourOf(runId) {
  const colour = known.get(runId)?.colour;
  return /^#[0-9a-f]{6}$/.test(colour) ? colour : null;
}
