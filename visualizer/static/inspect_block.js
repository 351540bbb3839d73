// A block, opened: what is in its slots, who names it, what the prefix cache calls it, what has happened to it.

import { colour, element, list, letter, plural, setText } from "./names.js";
import { filled, owners } from "./reducer.js";
import { badge, facts, heading, renderToken, roving, setAttribute, sync, token, visible } from "./parts.js";

const STORY = 40; // sentences of a block's history

export class BlockView {
  constructor(body) {
    const title = element("h3", "", body);
    this.title = element("span", "", title);
    this.kind = element("span", "mp-kind", title, { "data-testid": "block-kind" });
    this.owners = element("p", "mp-owners", body, { "data-testid": "block-owners" });
    this.facts = element("dl", "mp-facts", body);
    heading(body, "Its slots");
    this.slots = element("div", "mp-slots", body, { "data-testid": "slots" });
    roving(this.slots);
    this.note = element("p", "mp-note", body);
    heading(body, "Its history");
    this.story = element("ol", "mp-story", body, { "data-testid": "story" });
  }

  render(state, history, { block }) {
    const own = owners(state).get(block) ?? [];
    const prefix = state.cached[block];
    const kind = own.length > 1 ? `shared ×${own.length}` : own.length ? "owned" : prefix !== undefined ? "cached" : "free";
    setText(this.title, `Block ${block}`);
    setText(this.kind, kind);
    this.renderOwners(state, own, block);
    const parent = history.parents.get(prefix);
    facts(this.facts, [
      ["references", state.ref_counts[block]],
      ["prefix cache", prefix === undefined ? undefined : `prefix ${prefix}` + (
        parent === undefined ? "" : parent === 0 ? ", where a text begins" : `, after prefix ${parent}`)],
    ]);
    this.renderSlots(state, history, own, block, prefix !== undefined);
    const told = (history.blocks.get(block) ?? []).slice(-STORY).reverse();
    if (!told.length || !history.complete) {
      told.push({ number: "start", words: history.complete ? "Never used so far." : "What came before is not in these records." });
    }
    sync(this.story, told, (entry) => entry.number, () => {
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

  renderOwners(state, own, block) {
    sync(this.owners, ["words", ...own], (id) => id, (id) => (id === "words" ? element("span", "") : badge(id)));
    const places = new Set(own.map((id) => state.seqs[id].table.indexOf(block)));
    setText(this.owners.firstChild, own.length
      ? `logical block ${list([...places].map(String))} of`
      : state.cached[block] === undefined ? "Nobody needs what is in it."
      : "No text needs it now; one that begins alike can take it over.");
  }

  // The slots' tokens, from the owner that has written most, or from whoever wrote them before the block was cached.
  renderSlots(state, history, own, block, isCached) {
    const size = state.config.block_size;
    const writers = own.map((id) => ({ seq: id, logical: state.seqs[id].table.indexOf(block) }));
    const fill = ({ seq, logical }) => filled(state, state.seqs[seq], logical);
    const owner = writers.sort((a, b) => fill(b) - fill(a))[0];
    const source = owner ?? (isCached ? history.contents.get(block) : undefined);
    const seq = state.seqs[source?.seq];
    const count = !seq ? 0 : owner ? fill(owner) : size;
    this.slots.style.setProperty("--hue", seq ? colour(source.seq) : "transparent");
    sync(this.slots, [...Array(size).keys()], (offset) => offset, (offset) => {
      const cell = element("div", "mp-slot", null, { "data-testid": "slot", "data-offset": offset });
      element("small", "", cell);
      token(cell);
      return cell;
    }, (cell, offset) => {
      const position = seq ? source.logical * size + offset : null;
      const full = offset < count;
      cell.classList.toggle("mp-full", full);
      setText(cell.firstChild, full ? String(position) : "");
      const node = cell.lastChild;
      setAttribute(node, "aria-hidden", String(!full));
      if (full) {
        setAttribute(node, "role", "button");
        renderToken(node, source.seq, position, visible(seq.pieces[position]), `${block}:${offset}`);
        setAttribute(node, "data-token-id", String(seq.tokens[position]));
        setAttribute(node, "aria-label", `slot ${offset}: token ${visible(seq.pieces[position])}, position ${position}`);
        node.tabIndex = offset === 0 ? 0 : -1;
      } else {
        setText(node, "");
        for (const name of ["role", "data-go", "data-slot", "data-token-id", "aria-label"]) node.removeAttribute(name);
        node.tabIndex = -1;
      }
    });
    const left = own.length ? size - count : 0;
    setText(this.note, isCached && !seq ? "What is in it was written before these records begin."
      : !own.length && seq ? `Written by ${letter(source.seq)}, which has given it back.`
      : left ? `${plural(left, "slot")} reserved, not filled yet: the only waste that paging leaves.` : "");
  }
}
