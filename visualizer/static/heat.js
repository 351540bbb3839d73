// Draws attention weights over the pool's cells, slot by slot, where the keys are stored.

import { element, setText } from "./names.js";

export class Heat {
  /** @param {Pool} pool */
  constructor(pool) {
    this.pool = pool;
    /** @type {HTMLElement[]} */
    this.nodes = [];
  }

  // `shades` has a number from 0 to 1 for every position attended to, `shares` each block's share of the total weight.
  /** @param {number[]} blocks @param {number[]} shades @param {number[]} shares @param {string} hue @param {number} size */
  show(blocks, shades, shares, hue, size) {
    this.clear();
    blocks.forEach((block, logical) => {
      const cell = this.pool.cellOf(block);
      if (!cell) return;
      const node = element("span", "mp-heat", cell, { "aria-hidden": "true" });
      node.style.setProperty("--hue", hue);
      const slots = Array.from({ length: size }, (_, offset) => {
        const shade = shades[logical * size + offset] ?? 0;
        const [from, to] = [(100 * offset) / size, (100 * (offset + 1)) / size];
        return `color-mix(in srgb, var(--hue) ${100 * shade}%, var(--mp-card)) ${from}% ${to}%`;
      });
      node.style.backgroundImage = `linear-gradient(90deg, ${slots.join(", ")})`;
      setText(element("em", "", node), `${Math.round(100 * shares[logical])} %`);
      cell.dataset.heat = "";
      this.nodes.push(node);
    });
  }

  get shown() {
    return this.nodes.length > 0;
  }

  clear() {
    for (const node of this.nodes) {
      delete node.parentElement?.dataset.heat;
      node.remove();
    }
    this.nodes = [];
  }
}
