// Draws the physical pool: one cell per block, with its owners, its filled slots, and its state (shared, cached, free).

import { keptBlocks } from "./groups.js";
import { colour, element, ink, letter, list, plural, setText, stripes, text } from "./names.js";
import { rovingCells } from "./parts.js";
import { filled, owners, reservesAhead } from "./reducer.js";

const CALM = 60; // milliseconds: new tokens are animated if steps are further apart
const [SMALLEST, LARGEST] = [10, 68]; // a cell's size in pixels

export class Pool {
  /** @param {HTMLElement} root @param {Select} select */
  constructor(root, select) {
    this.grid = root.querySelector("[data-part=grid]");
    this.count = root.querySelector("[data-part=pool-count]");
    this.inspect = root.querySelector("[data-part=inspect]");
    this.legend = root.querySelector("[data-part=legend]");
    /** @type {{ cell: HTMLElement, ink: HTMLElement, who: HTMLElement }[]} */
    this.cells = [];
    /** @type {string[]} */
    this.looks = []; // each cell's kind and owners as a string: the DOM is written only if it changes
    /** @type {number[]} */
    this.fills = [];
    this.size = 1; // slots in a block
    this.ahead = false; // whether the memory manager reserves ahead
    /** @type {Map<number, number[]>} */
    this.owners = new Map();
    /** @type {Map<number, number>} */
    this.kept = new Map(); // block -> the group that keeps it
    new ResizeObserver(() => this.fit()).observe(this.grid.parentElement);
    const blockOf = (/** @type {On} */ event) => event.target.closest?.("[data-block]")?.dataset.block;
    this.grid.addEventListener("click", (/** @type {On} */ event) => {
      const block = blockOf(event);
      if (block !== undefined) select({ block: Number(block) }, "click");
    });
    this.grid.addEventListener("pointermove", (/** @type {On<PointerEvent>} */ event) => {
      const block = blockOf(event);
      select(block === undefined ? null : { block: Number(block), offset: this.slotAt(event) }, "hover");
    });
    this.grid.addEventListener("pointerleave", () => select(null, "hover"));
    rovingCells(this.grid, (cell) => select(cell && { block: Number(cell.dataset.block) }, "hover"));
    /** @type {{ moment?: string, at: number, position: number }} */
    this.drawn = { at: -CALM, position: 0 }; // when a position was last drawn, and which
    /** @type {Map<number, HTMLElement>} */
    this.landed = new Map(); // block -> the mark on the slots filled last
  }

  // The slot under the pointer, from its position within the cell.
  /** @param {On<PointerEvent>} event */
  slotAt(event) {
    const box = event.target.closest("[data-block]").getBoundingClientRect();
    const offset = Math.floor(((event.clientX - box.left) / box.width) * this.size);
    return Math.max(0, Math.min(this.size - 1, offset));
  }

  /** @param {number} count */
  build(count) {
    this.grid.replaceChildren();
    this.looks = [];
    this.fills = [];
    this.landed.clear();
    this.cells = Array.from({ length: count }, (_, block) => {
      const cell = element("button", "mp-cell", this.grid, {
        type: "button", tabindex: block ? "-1" : "0", "data-testid": "block", "data-block": block,
      });
      const ink = element("span", "mp-ink", cell);
      const id = element("span", "mp-id", cell);
      id.textContent = String(block);
      const who = element("span", "mp-who", cell);
      return { cell, ink, who };
    });
    this.fit();
  }

  // Makes the cells as large as the panel allows; prefers a number of columns for which all rows are full.
  fit() {
    const { clientWidth: width, clientHeight: height } = this.grid.parentElement;
    const count = this.cells.length;
    if (!count || !width) return;
    const gap = count > 200 ? 2 : 4;
    // Contiguous pieces begin at multiples of powers of two; with such row lengths they are easy to see.
    const suits = (/** @type {number} */ columns) => !this.ahead || Number.isInteger(Math.log2(columns));
    // If the cells do not fit, they get the smallest size, and the panel scrolls.
    let best = { score: 0, size: SMALLEST, columns: Math.floor((width + gap) / (SMALLEST + gap)) };
    for (let columns = 4; columns <= count; columns += 1) {
      if (!suits(columns)) continue;
      const rows = Math.ceil(count / columns);
      const size = Math.floor(Math.min((width + gap) / columns, (height + gap) / rows) - gap);
      const score = Math.min(size, LARGEST) * (count % columns ? 0.9 : 1);
      if (size >= SMALLEST && score > best.score) best = { score, columns, size };
    }
    const size = Math.min(LARGEST, best.size);
    this.grid.style.setProperty("--cell", `${size}px`);
    this.grid.style.setProperty("--columns", best.columns);
    this.grid.style.setProperty("--gap", `${gap}px`);
    this.grid.classList.toggle("mp-mid", size < 36 && size >= 30);
    this.grid.classList.toggle("mp-small", size < 30);
    this.grid.classList.toggle("mp-tiny", size < 19);
  }

  /** @param {Player} player @param {Lit | null} lit */
  render(player, lit, now = performance.now()) {
    const { state } = player;
    this.size = state.config.block_size ?? 1;
    const ahead = reservesAhead(state);
    if (this.cells.length !== state.ref_counts.length || ahead !== this.ahead) {
      this.ahead = ahead;
      this.build(state.ref_counts.length);
    }
    const calm = this.pace(player, now);
    this.owners = owners(state);
    this.kept = keptBlocks(state);
    let used = 0;
    let cached = 0;
    for (let block = 0; block < this.cells.length; block += 1) {
      const own = this.owners.get(block) ?? [];
      if (own.length || this.kept.has(block)) used += 1;
      else if (block in state.cached) cached += 1;
      this.renderCell(state, block, own, calm);
      this.cells[block].cell.classList.toggle("mp-dim", lit !== null && !lit.blocks.has(block));
      this.cells[block].cell.classList.toggle("mp-lit", lit?.block === block);
    }
    const free = this.cells.length - used - cached;
    const empty = this.ahead && this.cells.filter(({ cell }) => cell.dataset.kind === "reserved").length;
    setText(this.count, this.ahead ? `${state.config.memory}: ${used} taken, ${empty} of them empty · ${free} free`
      : `${used} in use · ${cached} cached · ${free} free`);
    if (calm !== null) this.land(player, calm);
    this.legend.toggleAttribute("data-predicted", Object.keys(state.predicted).length > 0);
    this.renderInspect(state, lit);
  }

  // Whether steps are slow enough to animate changes. Faster animations would only flicker, and delay the next frame.
  // Returns null if the current position has already been drawn.
  /** @param {Player} player @param {number} now */
  pace({ run, position, sub, mode, end }, now) {
    const moment = `${run} ${position} ${sub}`;
    if (moment === this.drawn.moment) return null;
    const inTime = Math.abs(position - this.drawn.position) < 2 && (mode !== "live" || end - position < 2);
    const calm = inTime && now - this.drawn.at > CALM;
    this.drawn = { moment, position, at: now };
    return calm;
  }

  /** @param {State} state @param {number} block @param {number[]} own @param {boolean | null} calm */
  renderCell(state, block, own, calm) {
    const size = state.config.block_size;
    const fill = fillOf(state, block, own);
    const taken = this.ahead && !fill ? "reserved" : "owned";
    const kind = own.length > 1 ? "shared" : own.length ? taken : block in state.cached ? "cached" : "free";
    const { cell, ink: inkNode, who } = this.cells[block];
    if (fill !== this.fills[block]) {
      this.fills[block] = fill;
      cell.dataset.fill = String(fill);
      inkNode.style.width = `${(100 * fill) / size}%`;
    }
    const bit = kind === "cached" ? state.predicted[block] : undefined;
    const look = `${kind} ${own} ${bit}`;
    if (look === this.looks[block]) return;
    const before = this.looks[block]?.split(" ", 1)[0];
    this.looks[block] = look;
    cell.className = `mp-cell mp-${kind}`;
    cell.dataset.refs = String(own.length);
    // The label for screen readers: small cells show no number, and free cells no owner.
    const guess = bit === undefined ? "" : `, bit ${Number(bit)}: ${bit ? "not needed again" : "needed again"}`;
    cell.setAttribute("aria-label", `block ${block}, ${own.length ? `of ${list(own.map(letter))}` : kind}${guess}`);
    cell.dataset.kind = kind;
    const digit = bit === undefined ? "" : String(Number(bit));
    cell.dataset.bit = digit;
    cell.style.setProperty("--hue", own.length ? colour(own[0]) : "transparent");
    cell.style.setProperty("--slots", String(size));
    inkNode.style.backgroundImage = own.length > 1 ? stripes(own) : "";
    who.style.background = own.length ? colour(own[0]) : "";
    who.style.color = own.length ? ink(own[0]) : "";
    setText(who, own.length ? letter(own[0]) + (own.length > 1 ? `×${own.length}` : "") : digit);
    if (calm && (before === "free" || before === "cached")) cell.dataset.flash = other(cell.dataset.flash);
  }

  // Marks the slots of the newest tokens; CSS animates the marks.
  /** @param {Player} player @param {boolean | null} calm */
  land(player, calm) {
    const slots = landings(player.latest, player.state);
    for (const [block, node] of this.landed) {
      if (slots.has(block)) continue;
      node.remove();
      this.landed.delete(block);
    }
    for (const [block, [start, end]] of slots) {
      const node = this.landed.get(block) ?? element("span", "mp-landed", this.cells[block].cell);
      this.landed.set(block, node);
      node.dataset.slots = `${start}-${end}`;
      if (calm) node.dataset.turn = other(node.dataset.turn);
      else delete node.dataset.turn;
      node.style.left = `${(100 * start) / this.size}%`;
      node.style.width = `${(100 * (end - start)) / this.size}%`;
    }
  }

  // The line under the pool: the highlighted block's description, or the legend.
  /** @param {State} state @param {Lit | null} lit */
  renderInspect(state, lit) {
    const block = lit?.block;
    this.inspect.hidden = block === undefined;
    this.legend.classList.toggle("mp-away", block !== undefined);
    if (block === undefined) return;
    const own = this.owners.get(block) ?? [];
    const size = state.config.block_size;
    let words = `Block ${block} is free.`;
    if (own.length) {
      const seq = state.seqs[own[0]];
      const logical = seq.table.indexOf(block);
      const fill = fillOf(state, block, own);
      const quote = text(seq, logical * size, logical * size + fill).trim();
      words = `Block ${block} · ${own.length > 1 ? `shared by ${list(own.map(letter))}` : `owned by ${letter(own[0])}`}` +
        ` · logical ${logical} · ${fill} of ${plural(size, "slot")} filled` + (quote ? ` · “${quote}”` : "");
    } else if (this.kept.has(block)) {
      words = `Block ${block} · kept for group ${Number(this.kept.get(block)) + 1}: its texts begin with it, and some of them wait.`;
    } else if (block in state.cached) {
      const bit = state.predicted[block];
      const guess = bit === undefined ? "" : bit ? " Bit 1: it will probably not be needed again." : " Bit 0: it will probably be needed again.";
      words = `Block ${block} · cached: nobody needs it now, but a prompt that begins alike can take it over. Evicted when blocks run out.${guess}`;
    }
    setText(this.inspect, words);
  }

  /** @param {number} block */
  cellOf(block) {
    return this.cells[block]?.cell;
  }
}

// Map of block -> its slots [start, end) that these events filled.
/** @param {EngineEvent[]} events @param {State} state */
function landings(events, state) {
  const size = state.config.block_size;
  const slots = new Map();
  for (const event of events) {
    if (event.type !== "filled") continue;
    const end = event.start + event.num_tokens;
    for (let logical = Math.floor(event.start / size); logical * size < end; logical += 1) {
      const block = state.seqs[event.seq_id].table[logical];
      const from = logical * size;
      // A sequence that finished in this step has already freed its blocks.
      if (block !== undefined) slots.set(block, [Math.max(0, event.start - from), Math.min(size, end - from)]);
    }
  }
  return slots;
}

// The filled slots of a block: the maximum over its owners, whose tokens agree as far as both have written them.
/** @param {State} state @param {number} block @param {number[]} own */
function fillOf(state, block, own) {
  if (!own.length) return block in state.cached ? state.config.block_size : 0;
  return Math.max(...own.map((seqId) => {
    const seq = state.seqs[seqId];
    return filled(state, seq, seq.table.indexOf(block));
  }));
}

// Switching to an identical animation of another name restarts it without forcing the browser to compute the layout.
const other = (/** @type {string | undefined} */ turn) => (turn === "1" ? "0" : "1");
