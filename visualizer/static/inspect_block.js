// The inspector's view of a block in the pool or in the CPU's swap space: its slots' tokens, the sequences that use it,
// its prefix in the prefix cache, and its history.

import { cpu } from "./block_history.js";
import { colour, element, list, letter, plural, setText } from "./names.js";
import { filled, owners } from "./reducer.js";
import { badge, facts, heading, renderToken, roving, setAttribute, sync, token, visible } from "./parts.js";

const STORY = 40; // entries shown of a block's history
const LINKS = 24; // entries shown of the chain of parent prefixes

export class BlockView {
  /** @param {HTMLElement} body */
  constructor(body) {
    const title = element("h3", "", body);
    this.title = element("span", "", title);
    this.kind = element("span", "mp-kind", title, { "data-testid": "block-kind" });
    this.owners = element("p", "mp-owners", body, { "data-testid": "block-owners" });
    this.facts = element("dl", "mp-facts", body);
    this.chainTitle = heading(body, "Its name in the prefix cache");
    this.chainTitle.title = "A name stands for all tokens up to the block's end: its hash is made of the parent's name and these tokens";
    this.chain = element("p", "mp-chain", body, { "data-testid": "chain" });
    heading(body, "Its slots");
    this.slots = element("div", "mp-slots", body, { "data-testid": "slots" });
    roving(this.slots);
    this.note = element("p", "mp-note", body);
    heading(body, "Its history");
    this.story = element("ol", "mp-story", body, { "data-testid": "story" });
  }

  /** @param {State} state @param {BlockHistory} history @param {Picked} what */
  render(state, history, what) {
    const swapped = what.swap !== undefined;
    const block = /** @type {number} */ (swapped ? what.swap : what.block);
    const table = swapped ? "swap_table" : "table";
    const own = owners(state, table).get(block) ?? [];
    const prefix = swapped ? undefined : state.cached[block];
    const kind = own.length > 1 ? `shared ×${own.length}` : own.length ? "owned" : prefix !== undefined ? "cached" : "free";
    setText(this.title, swapped ? `Block ${block} on the CPU` : `Block ${block}`);
    setText(this.kind, kind);
    const places = own.map((seq) => ({ seq, logical: state.seqs[seq][table].indexOf(block) }));
    this.renderOwners(places, prefix !== undefined);
    facts(this.facts, [["references", (swapped ? state.swap_ref_counts : state.ref_counts)[block]]]);
    this.renderChain(state, history, prefix);
    const source = this.renderSlots(state, history, places, block, prefix !== undefined, swapped);
    setText(this.note, this.noteOf(state, source, own, prefix !== undefined, swapped));
    /** @type {(Partial<import("./block_history.js").Entry> & { words: string })[]} */
    const told = (history.blocks.get(swapped ? cpu(block) : block) ?? []).slice(-STORY).reverse();
    if (!told.length || !history.complete) {
      told.push({ words: history.complete ? "Never used so far." : "What came before is not in these records." });
    }
    sync(this.story, told, (entry) => entry.number ?? "start", () => {
      const item = element("li", "");
      element("small", "", item);
      element("span", "", item);
      return item;
    }, (item, { step, until, words, kind: what }) => {
      item.dataset.kind = what;
      setText(item.firstChild, step === undefined ? "" : step === until ? `step ${step}` : `step ${step}–${until}`);
      setText(item.lastChild, words);
    });
  }

  /** @param {{ seq: number, logical: number }[]} places @param {boolean} isCached */
  renderOwners(places, isCached) {
    const ids = places.map(({ seq }) => seq);
    sync(this.owners, [null, ...ids], (id) => id ?? "words", (id) => (id === null ? element("span", "") : badge(id)));
    const logical = new Set(places.map((place) => String(place.logical)));
    setText(/** @type {Node} */ (this.owners.firstChild), ids.length ? `logical block ${list([...logical])} of`
      : isCached ? "No text needs it now; one that begins alike can take it over." : "Nobody needs what is in it.");
  }

  // The block's prefix id, its parent's, and so on to the prompt's start; each links to its block if still cached.
  /** @param {State} state @param {BlockHistory} history @param {number | undefined} prefix */
  renderChain(state, history, prefix) {
    const blockOf = new Map(Object.entries(state.cached).map(([block, name]) => [name, Number(block)]));
    const links = [];
    for (let name = prefix; name && links.length < LINKS; name = history.parents.get(name)) {
      links.push({ name, block: blockOf.get(name), parent: history.parents.get(name) });
    }
    this.chain.hidden = this.chainTitle.hidden = !links.length;
    const oldest = links.at(-1)?.parent;
    const end = oldest === 0 ? "a text begins" : oldest === undefined ? "not in these records" : "…";
    const parts = [...links, { name: "end", words: end }];
    sync(this.chain, parts, ({ name, block }) => `${name} ${block}`, ({ name, block, words }) => {
      if (words) return element("span", "");
      const node = element("button", "mp-link", null, { type: "button", "data-name": name });
      element("b", "", node).textContent = `#${name}`;
      if (block === undefined) node.disabled = true;
      else Object.assign(node.dataset, { go: `block:${block}`, near: block });
      element("small", "", node).textContent = block === undefined ? "evicted" : `block ${block}`;
      return node;
    }, (node, { words }) => words && setText(node, words));
  }

  // The slots' tokens: of the owner that has filled most slots, or for a cached block of the sequence that wrote them.
  /**
   * @param {State} state
   * @param {BlockHistory} history
   * @param {{ seq: number, logical: number }[]} places
   * @param {number} block
   * @param {boolean} isCached
   * @param {boolean} swapped
   */
  renderSlots(state, history, places, block, isCached, swapped) {
    const size = state.config.block_size;
    const fill = (/** @type {{ seq: number, logical: number }} */ { seq, logical }) => filled(state, state.seqs[seq], logical);
    const owner = [...places].sort((a, b) => fill(b) - fill(a))[0];
    const source = owner ?? (isCached ? history.contents.get(block) : undefined);
    const seq = source && state.seqs[source.seq];
    const count = !seq ? 0 : owner ? fill(owner) : size;
    this.slots.style.setProperty("--hue", seq ? colour(source.seq) : "transparent");
    sync(this.slots, [...Array(size).keys()], (offset) => offset, (offset) => {
      const cell = element("div", "mp-slot", null, { "data-testid": "slot", "data-offset": offset });
      element("small", "", cell);
      token(cell);
      return cell;
    }, (cell, offset) => {
      const full = seq !== undefined && offset < count;
      const position = source ? source.logical * size + offset : NaN;
      cell.classList.toggle("mp-full", full);
      setText(cell.firstChild, full ? String(position) : "");
      const node = cell.lastChild;
      setAttribute(node, "aria-hidden", String(!full));
      if (full) {
        setAttribute(node, "role", "button");
        renderToken(node, source.seq, position, visible(seq.pieces[position]), swapped ? null : `${block}:${offset}`);
        setAttribute(node, "data-token-id", String(seq.tokens[position]));
        setAttribute(node, "aria-label", `slot ${offset}: token ${visible(seq.pieces[position])}, position ${position}`);
        node.tabIndex = offset === 0 ? 0 : -1;
      } else {
        setText(node, "");
        for (const name of ["role", "data-go", "data-slot", "data-token-id", "aria-label"]) node.removeAttribute(name);
        node.tabIndex = -1;
      }
    });
    return { seq: seq && source.seq, count };
  }

  /**
   * @param {State} state
   * @param {{ seq?: number, count: number }} source
   * @param {number[]} own
   * @param {boolean} isCached
   * @param {boolean} swapped
   */
  noteOf(state, { seq, count }, own, isCached, swapped) {
    if (swapped) return own.length ? "Its KV waits here, untouched, until the pool has room again." : "";
    if (isCached && seq === undefined) return "What is in it was written before these records begin.";
    if (!own.length && seq !== undefined) return `Written by ${letter(seq)}, which has given it back.`;
    const left = own.length ? state.config.block_size - count : 0;
    return left ? `${plural(left, "slot")} reserved, not filled yet: the only waste that paging leaves.` : "";
  }
}
