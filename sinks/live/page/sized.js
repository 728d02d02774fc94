/** A part of the page that is drawn for its width. */

import { Component, html } from "./view.js";

export class Sized extends Component {
  state = { width: 0 };

  componentDidMount() {
    this.observer = new ResizeObserver(([{ contentRect }]) => this.setState({ width: Math.floor(contentRect.width) }));
    this.observer.observe(this.root);
  }

  componentWillUnmount() {
    this.observer.disconnect();
  }

  render({ draw }, { width }) {
    return html`<div ref=${(node) => (this.root = node)}>${width > 0 && draw(width)}</div>`;
  }
}
