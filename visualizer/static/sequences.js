// Draws one row per sequence: its parent, its state, its growing text, its block table (logical → physical). Above the
// rows are the queues and the step's token budget.

import { familyRows } from "./families.js";
import { colour, element, growText, ink, letter, plural, setHidden, setText, stripes, text } from "./names.js";
import { sync } from "./parts.js";
import { filled, owners } from "./reducer.js";
import { paint, rangeOf, renderGuess, tokenAt } from "./row_text.js";
import { tokensIn } from "./spotlight.js";

const DEEPEST = 72; // pixels that the tree may take from the text
const INDENT = 18; // pixels per generation, if there is room
const CROWDED = 11; // block table entries; from this number on they omit the logical number

export class Sequences {
  /** @type {State} */
  state; // the state that is drawn

  /** @param {HTMLElement} root @param {Select} select */
  constructor(root, select) {
    this.list = root.querySelector("[data-part=rows]");
    this.empty = root.querySelector("[data-part=empty]");
    this.budget = root.querySelector("[data-part=budget]");
    this.budgetText = root.querySelector("[data-part=budget-text]");
    this.queues = root.querySelector("[data-part=queues]");
    this.deepest = 0; // generations in the deepest family
    /** @type {Map<number, "still" | Range>} */
    this.spots = new Map(); // see renderText
    /** @type {Map<number, Row>} */
    this.rows = new Map(); // seq id -> row
    this.select = select;
    this.list.addEventListener("click", (/** @type {PointerEvent} */ event) => this.pointed(event, "click"));
    this.list.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => this.pointed(event, "hover"));
    this.list.addEventListener("pointerleave", () => select(null, "hover"));
    this.list.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Enter") this.pointed(event, "click");
    });
  }

  // Selects what is under the pointer: an entry of the block table, a token of the text, or else the row's sequence.
  /** @param {On<PointerEvent> | On<KeyboardEvent>} event @param {How} how */
  pointed(event, how) {
    const node = event.target.closest("[data-seq]");
    if (!node) return how === "hover" && this.select(null, how);
    const seq = Number(node.dataset.seq);
    const { chip, swap } = event.target.closest("[data-chip], [data-swap]")?.dataset ?? {};
    if (chip !== undefined) return this.select({ seq, block: Number(chip) }, how);
    if (swap !== undefined) return this.select({ seq, swap: Number(swap) }, how);
    const row = this.rows.get(seq);
    const inText = row && "clientX" in event && event.target.closest(".mp-line");
    const token = inText ? tokenAt(row, this.state.seqs[seq], event.clientX, event.clientY) : undefined;
    this.select(token === undefined ? { seq } : { seq, token }, how);
  }

  /** @param {State} state @param {Lit | null} lit */
  render(state, lit) {
    this.state = state;
    const tree = familyRows(state);
    const ids = tree.map(({ id }) => id);
    const deepest = Math.max(1, ...tree.map(({ depth }) => depth));
    if (deepest !== this.deepest) {
      this.deepest = deepest;
      this.list.style.setProperty("--indent", `${Math.min(INDENT, Math.floor(DEEPEST / deepest))}px`);
    }
    setHidden(this.empty, ids.length > 0);
    this.list.classList.toggle("mp-none", !ids.length);
    for (const [id, row] of this.rows) {
      if (!ids.includes(id)) {
        row.node.remove();
        this.rows.delete(id);
      }
    }
    const own = owners(state);
    tree.forEach((place, index) => {
      const { id } = place;
      const row = this.rows.get(id) ?? this.build(id);
      this.rows.set(id, row);
      if (this.list.children[index] !== row.node) this.list.insertBefore(row.node, this.list.children[index] ?? null);
      renderPlace(row, place);
      this.renderRow(state, id, row, own, lit);
      renderHit(state, id, row);
    });
    this.renderQueues(state);
    this.renderBudget(state);
    this.spots = this.renderText(state, lit);
  }

  // Paints the text in the highlighted block and slot; returns a map of sequence -> the range to scroll into view.
  /** @param {State} state @param {Lit | null} lit */
  renderText(state, lit) {
    const blocks = [];
    const slots = [];
    /** @type {Sequences["spots"]} */
    const spots = new Map();
    const size = state.config.block_size;
    for (const [id, row] of this.rows) {
      if (!lit) break;
      const seq = state.seqs[id];
      const span = lit.seqs.has(id) && tokensIn(lit, seq, size);
      const words = span && rangeOf(row, seq, ...span);
      if (words) blocks.push(words);
      const token = lit.token ?? (span && lit.offset !== undefined ? span[0] + lit.offset : undefined);
      const word = lit.seqs.has(id) && token !== undefined && (!span || token < span[1]) && rangeOf(row, seq, token, token + 1);
      if (word) slots.push(word);
      const spot = word || words;
      if (spot) spots.set(id, lit.hovered && lit.token !== undefined ? "still" : spot);
    }
    paint("mp-block", blocks);
    paint("mp-slot", slots);
    return spots;
  }

  // Scrolls each row to its newest text, or to the text that is highlighted elsewhere; a row under the pointer does not
  // scroll. Call it after all writes, so that the browser computes the layout only once.
  showNewest() {
    const { state, spots } = this;
    const ids = [...this.rows.keys()];
    const lines = [...this.rows.values()].map(({ line }) => line);
    const at = lines.map((line) => line.scrollLeft);
    const wanted = lines.map((line, i) => {
      const hidden = line.scrollWidth - line.clientWidth;
      const spot = spots.get(ids[i]);
      const growing = !state.seqs[ids[i]].finish_reason;
      if (spot === "still") return at[i];
      if (!spot) return growing ? hidden : 0;
      const [word, box] = [spot.getBoundingClientRect(), line.getBoundingClientRect()];
      if (word.left >= box.left + 28 && word.right <= box.right) return at[i];
      return Math.max(0, Math.min(hidden, at[i] + word.left - box.left - 40));
    });
    lines.forEach((line, i) => {
      line.classList.toggle("mp-cut", wanted[i] > 0);
      if (at[i] !== wanted[i]) line.scrollLeft = wanted[i];
    });
  }

  /** @param {number} id */
  build(id) {
    const node = element("article", "mp-row", null, { "data-testid": "sequence", "data-seq": id, tabindex: "0" });
    node.style.setProperty("--hue", colour(id));
    const rails = element("span", "mp-rails", node, { "aria-hidden": "true" });
    const badge = element("span", "mp-badge", node);
    badge.textContent = letter(id);
    badge.style.color = ink(id);
    const line = element("p", "mp-line", node, { "data-testid": "text" });
    const prompt = element("span", "mp-prompt", line);
    const output = element("span", "mp-output", line);
    const guess = element("span", "mp-guess", line, { "data-testid": "guess" });
    const meta = element("span", "mp-meta", node);
    const state = element("span", "mp-state", node, { "data-testid": "state" });
    const table = element("div", "mp-table", node, { "data-testid": "table" });
    const hit = element("span", "mp-hit", node, { "data-testid": "hit", hidden: "" });
    return { node, rails, line, prompt, output, guess, meta, state, table, hit, chips: [] };
  }

  /** @param {State} state @param {number} id @param {Row} row @param {Map<number, number[]>} own @param {Lit | null} lit */
  renderRow(state, id, row, own, lit) {
    const seq = state.seqs[id];
    const status = statusOf(state, seq);
    row.node.dataset.state = status.name;
    row.node.classList.toggle("mp-dim", lit !== null && !lit.seqs.has(id));
    row.node.classList.toggle("mp-lit", lit?.seq === id);
    row.node.classList.toggle("mp-open", lit?.open === id);
    setText(row.prompt, text(seq, 0, seq.num_prompt).trimStart());
    growText(row.output, text(seq, seq.num_prompt));
    renderGuess(row.guess, seq);
    setText(row.state, status.label);
    setText(row.meta, `${plural(seq.tokens.length, "token")} · ${plural(seq.table.length || seq.swap_table.length, "block")}`);
    row.table.classList.toggle("mp-crowded", seq.table.length >= CROWDED);
    this.renderTable(state, seq, row, own, lit);
    renderSwapped(row, seq, lit);
  }

  /** @param {State} state @param {Seq} seq @param {Row} row @param {Map<number, number[]>} own @param {Lit | null} lit */
  renderTable(state, seq, row, own, lit) {
    for (const { node } of row.chips.splice(seq.table.length)) node.remove();
    seq.table.forEach((block, logical) => {
      if (!row.chips[logical]) row.chips.push(buildChip(row.table, logical));
      const chip = row.chips[logical];
      const sharers = own.get(block) ?? [];
      const fill = filled(state, seq, logical);
      const key = `${block} ${sharers} ${fill}`;
      chip.node.classList.toggle("mp-lit", lit?.block === block);
      if (key === chip.key) return;
      chip.key = key;
      chip.node.dataset.chip = String(block);
      chip.node.title = `logical block ${logical} → physical block ${block}`;
      setText(chip.block, String(block));
      chip.fill.style.width = `${(100 * fill) / state.config.block_size}%`;
      chip.fill.style.background = sharers.length > 1 ? stripes(sharers, 5) : "";
      chip.node.classList.toggle("mp-shared", sharers.length > 1);
      chip.node.classList.toggle("mp-empty-chip", !fill);
    });
  }

  /** @param {State} state */
  renderQueues(state) {
    setHidden(this.queues.querySelector("[data-queue=swapped]"), !state.config.swap_blocks);
    const live = (/** @type {number} */ id) => !state.seqs[id].finish_reason;
    const queue = (/** @type {string[]} */ requests) => requests.flatMap((request) => state.requests[request]).filter(live);
    const queues = {
      running: queue(state.running),
      waiting: queue(state.waiting),
      swapped: queue(state.swapped),
      finished: Object.keys(state.seqs).map(Number).filter((id) => !live(id)),
    };
    for (const [name, ids] of Object.entries(queues)) {
      const node = this.queues.querySelector(`[data-queue=${name}]`);
      setText(node.querySelector("b"), String(ids.length + (name === "finished" ? state.forgotten : 0)));
      const badges = node.querySelector("span");
      const key = ids.join();
      if (badges.dataset.key === key) continue;
      badges.dataset.key = key;
      badges.replaceChildren(...ids.slice(-14).map((id) => {
        const badge = element("i", "", null, { "data-seq": id });
        badge.style.background = colour(id);
        badge.style.color = ink(id);
        badge.textContent = letter(id);
        return badge;
      }));
    }
  }

  // Draws how this step spends its token budget: each decode takes one token, prefills take the rest.
  /** @param {State} state */
  renderBudget(state) {
    const limit = state.config.max_num_batched_tokens ?? 1;
    const kinds = state.scheduled.map(([id, start, count, draft]) => workOf(state.seqs[id], start, count - draft));
    const spent = { decode: 0, prefill: 0, draft: 0 };
    state.scheduled.forEach(([, , count, draft], index) => {
      spent[kinds[index]] += count - draft;
      spent.draft += draft;
    });
    const guessed = spent.draft ? ` + ${spent.draft} guessed` : "";
    setText(this.budgetText, `${spent.decode} decode${guessed} + ${spent.prefill} prefill of ${limit} tokens`);
    while (this.budget.children.length > state.scheduled.length) this.budget.lastChild.remove();
    state.scheduled.forEach(([id, , count, draft], index) => {
      const part = this.budget.children[index] ?? element("i", "", this.budget);
      part.style.width = `${(100 * count) / limit}%`;
      part.style.backgroundColor = colour(id);
      part.dataset.kind = kinds[index];
      part.title = `${letter(id)}: ${plural(count, "token")} (${kinds[index]}${draft ? `, ${draft} guessed` : ""})`;
    });
  }

  /** @param {number} id */
  rowOf(id) {
    return this.rows.get(id)?.node;
  }

  /** @param {number} id */
  chipsOf(id) {
    return this.rows.get(id)?.chips.map((chip) => chip.node) ?? [];
  }

  /** @param {number} id */
  swapChipsOf(id) {
    return [...(this.rows.get(id)?.table.querySelectorAll(".mp-on-cpu") ?? [])];
  }
}

// "decode" computes only the token that was sampled last; everything else is "prefill".
/** @param {Seq | undefined} seq @param {number} start @param {number} count */
const workOf = (seq, start, count) => (count === 1 && start >= (seq?.num_prompt ?? 0) ? "decode" : "prefill");

/** @param {HTMLElement} table @param {number} logical */
function buildChip(table, logical) {
  const node = element("span", "mp-chip", table, { "data-testid": "chip" });
  const fill = element("span", "mp-chip-fill", node);
  element("small", "", node).textContent = String(logical);
  const block = element("b", "", node);
  return { node, fill, block, key: "" };
}

// Draws the blocks of a swapped-out sequence, which are on the CPU.
/** @param {Row} row @param {Seq} seq @param {Lit | null} lit */
function renderSwapped(row, seq, lit) {
  sync(row.table, seq.swap_table.map((block, logical) => ({ block, logical })), ({ block }) => block, ({ block, logical }) => {
    const node = element("span", "mp-chip mp-on-cpu", null, {
      "data-swap": block, title: `logical block ${logical} → block ${block} on the CPU`,
    });
    element("small", "", node).textContent = String(logical);
    element("b", "", node).textContent = `CPU ${block}`;
    return node;
  }, (node, { block }) => node.classList.toggle("mp-lit", lit?.swap === block));
}

// Draws a row's place in its family's tree: the indentation and the lines from its ancestors.
/** @param {Row} row @param {Place} place */
function renderPlace(row, { id, parent, depth, skipped, rails }) {
  const key = JSON.stringify([parent, depth, skipped, rails]);
  if (key === row.place) return;
  row.place = key;
  const { node } = row;
  node.dataset.depth = String(depth);
  node.style.setProperty("--depth", String(depth));
  node.dataset.parent = String(parent ?? "");
  const by = parent === null ? "" : `, a child of ${letter(parent)}` +
    (skipped ? `, ${plural(skipped, "generation")} that have ended between` : "");
  node.setAttribute("aria-label", `sequence ${letter(id)}${by}`);
  row.rails.title = by.slice(2);
  row.rails.replaceChildren(...rails.map(({ kind, of }, level) => {
    const rail = element("i", skipped && level === depth - 1 ? "mp-skips" : "", null, { "data-rail": kind });
    rail.style.setProperty("--level", String(level));
    rail.style.setProperty("--from", colour(of));
    return rail;
  }));
}

// Shows the prefix cache hit: as a label, and as a mark on the block table's entries.
/** @param {State} state @param {number} id @param {Row} row */
function renderHit(state, id, row) {
  const { table, num_cached: tokens } = state.seqs[id];
  setHidden(row.hit, !tokens || !table.length);
  if (!row.hit.hidden) setText(row.hit, table.length < CROWDED ? `${plural(tokens, "token")} from the cache` : `${tokens} cached`);
  row.chips.forEach(({ node }, logical) => {
    node.classList.toggle("mp-found", (logical + 1) * state.config.block_size <= tokens);
  });
}

/** @param {State} state @param {Seq} seq */
function statusOf(state, seq) {
  if (seq.finish_reason) {
    const label = { abort: "aborted", error: "failed", pruned: "given up" }[seq.finish_reason] ?? "finished";
    return { name: "finished", label };
  }
  if (state.running.includes(seq.request_id)) {
    return seq.tokens.length - seq.num_computed > 1 ? { name: "prefill", label: "reading" } : { name: "running", label: "writing" };
  }
  if (state.swapped.includes(seq.request_id)) return { name: "swapped", label: "on the CPU" };
  return seq.tokens.length > seq.num_prompt ? { name: "preempted", label: "preempted" } : { name: "waiting", label: "waiting" };
}
