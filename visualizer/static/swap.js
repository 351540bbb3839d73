// Draws the CPU's swap space, which holds the KV of swapped-out sequences, under the pool. Hidden if there is none.

import { colour, element, ink, letter, list, plural, setHidden, setText, stripes } from "./names.js";
import { rovingCells } from "./parts.js";
import { filled, owners } from "./reducer.js";

const MANY = 40; // cells; with more they are smaller

export class SwapSpace {
  /** @param {HTMLElement} root @param {Select} select */
  constructor(root, select) {
    this.node = root.querySelector("[data-part=swap]");
    this.grid = root.querySelector("[data-part=swap-grid]");
    this.count = root.querySelector("[data-part=swap-count]");
    /** @type {{ node: HTMLElement, fill: HTMLElement, who: HTMLElement }[]} */
    this.cells = [];
    /** @type {string[]} */
    this.last = []; // each cell's owners and filled slots: the DOM is written only if they change
    const blockOf = (/** @type {On} */ event) => event.target.closest?.("[data-swap-block]")?.dataset.swapBlock;
    this.grid.addEventListener("click", (/** @type {On} */ event) => {
      const block = blockOf(event);
      if (block !== undefined) select({ swap: Number(block) }, "click");
    });
    this.grid.addEventListener("pointermove", (/** @type {On} */ event) => {
      const block = blockOf(event);
      select(block === undefined ? null : { swap: Number(block) }, "hover");
    });
    this.grid.addEventListener("pointerleave", () => select(null, "hover"));
    rovingCells(this.grid, (cell) => select(cell && { swap: Number(cell.dataset.swapBlock) }, "hover"));
  }

  /** @param {State} state @param {Lit | null} lit */
  render(state, lit) {
    const size = state.swap_ref_counts.length;
    setHidden(this.node, size === 0);
    if (this.cells.length !== size) this.build(size);
    if (!size) return;
    const own = owners(state, "swap_table");
    this.cells.forEach((cell, block) => {
      this.renderCell(state, cell, block, own.get(block) ?? []);
      cell.node.classList.toggle("mp-dim", lit !== null && !lit.swaps.has(block));
      cell.node.classList.toggle("mp-lit", lit?.swap === block);
    });
    setText(this.count, `${own.size} of ${size} in use`);
  }

  /** @param {number} size */
  build(size) {
    this.last = [];
    this.cells = Array.from({ length: size }, (_, block) => {
      const node = element("button", "mp-swapcell", null, {
        type: "button", tabindex: block ? "-1" : "0", "data-testid": "swap-block", "data-swap-block": block,
      });
      return { node, fill: element("span", "mp-ink", node), who: element("b", "", node) };
    });
    this.grid.classList.toggle("mp-many", size > MANY);
    this.grid.replaceChildren(...this.cells.map(({ node }) => node));
  }

  /** @param {State} state @param {SwapSpace["cells"][number]} cell @param {number} block @param {number[]} own */
  renderCell(state, { node, fill, who }, block, own) {
    const size = state.config.block_size;
    const slots = Math.max(0, ...own.map((id) => filled(state, state.seqs[id], state.seqs[id].swap_table.indexOf(block))));
    const key = `${own} ${slots}`;
    if (this.last[block] === key) return;
    this.last[block] = key;
    const [first] = own;
    node.dataset.refs = String(own.length);
    node.dataset.fill = String(slots);
    node.title = own.length
      ? `CPU block ${block}: ${list(own.map(letter))}, ${slots} of ${plural(size, "slot")} filled` : `CPU block ${block} is free`;
    node.setAttribute("aria-label", node.title);
    node.style.setProperty("--hue", own.length ? colour(first) : "transparent");
    fill.style.width = `${(100 * slots) / size}%`;
    fill.style.backgroundImage = own.length > 1 ? stripes(own, 4) : "";
    who.style.background = own.length ? colour(first) : "";
    who.style.color = own.length ? ink(first) : "";
    setText(who, own.length ? letter(first) + (own.length > 1 ? `×${own.length}` : "") : "");
  }

  /** @param {number} block */
  cellOf(block) {
    return this.cells[block]?.node;
  }
}
