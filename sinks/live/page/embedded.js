/**
 * What the page contains in place of a server: `{runs: [snapshot], media: {address: data}}`, or null.
 *
 * The file of a report also has `{title, notes, notices, table: [row]}`; a page in a notebook has `notebook`.
 */
const element = document.getElementById("report");
export const embedded = window.stagecastReport ?? (element ? JSON.parse(element.textContent) : null);
