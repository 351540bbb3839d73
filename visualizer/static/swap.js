// The CPU's swap space under the pool: where the KV of swapped-out sequences waits. Only there if the engine has one.

import { colour, element, ink, letter, list, setText, stripes } from "./names.js";

export class SwapSpace {
  constructor(root) {
    this.node = root.querySelector("[data-part=swap]");
    this.grid = root.querySelector("[data-part=swap-grid]");
    this.count = root.querySelector("[data-part=swap-count]");
    this.cells = [];
    this.last = [];
  }

  render(state) {
    const size = state.swap_ref_counts.length;
    this.node.hidden = size === 0;
    if (this.cells.length !== size) this.build(size);
    if (!size) return;
    const owners = ownersOf(state);
    this.cells.forEach((cell, block) => this.renderCell(cell, block, owners.get(block) ?? []));
    setText(this.count, `${owners.size} of ${size} in use`);
  }

  build(size) {
    this.last = [];
    this.cells = Array.from({ length: size }, () => element("i", "mp-swapcell", null, { "data-testid": "swap-block" }));
    this.grid.replaceChildren(...this.cells);
  }

  renderCell(cell, block, own) {
    const key = own.join();
    if (this.last[block] === key) return;
    this.last[block] = key;
    cell.dataset.refs = own.length;
    cell.title = own.length ? `CPU block ${block}: ${list(own.map(letter))}` : `CPU block ${block} is free`;
    cell.style.background = own.length > 1 ? stripes(own, 4) : own.length ? colour(own[0]) : "";
    cell.style.color = own.length ? ink(own[0]) : "";
    setText(cell, own.length ? letter(own[0]) : "");
  }

  cellOf(block) {
    return this.cells[block];
  }
}

function ownersOf(state) {
  const owners = new Map();
  for (const [id, seq] of Object.entries(state.seqs)) {
    for (const block of seq.swap_table) {
      if (!owners.has(block)) owners.set(block, []);
      owners.get(block).push(Number(id));
    }
  }
  return owners;
}
