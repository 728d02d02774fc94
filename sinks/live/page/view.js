/** Parts of the page as functions of its state, rendered by Preact. `html` is its template. */

import htm from "./htm.min.js";
import { Component, h, render } from "./preact.min.js";

export const html = htm.bind(h);
export { Component, render };
