// One row per sequence: letter, what it is doing, its text as it grows, its block table (logical → physical).
// Above them the queues and the step's token budget.

import { colour, element, ink, letter, plural, setText, stripes, text } from "./names.js";
import { filled, owners } from "./reducer.js";

const SHOW_FINISHED = 12; // rows
const CROWDED = 11; // table entries; from here on chips leave out the logical number

export class Sequences {
  constructor(root, select) {
    this.list = root.querySelector("[data-part=rows]");
    this.empty = root.querySelector("[data-part=empty]");
    this.budget = root.querySelector("[data-part=budget]");
    this.budgetText = root.querySelector("[data-part=budget-text]");
    this.queues = root.querySelector("[data-part=queues]");
    this.rows = new Map(); // seq id -> row
    this.select = select;
    this.list.addEventListener("click", (event) => this.pointed(event, "click"));
    this.list.addEventListener("pointerover", (event) => this.pointed(event, "hover"));
    this.list.addEventListener("pointerleave", () => select(null, "hover"));
    this.list.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.pointed(event, "click");
    });
  }

  pointed(event, how) {
    const block = event.target.closest("[data-chip]")?.dataset.chip;
    const seq = event.target.closest("[data-seq]")?.dataset.seq;
    if (seq !== undefined) {
      this.select({ seq: Number(seq), block: block === undefined ? undefined : Number(block) }, how);
    }
  }

  render(state, lit) {
    const ids = shown(state);
    this.empty.hidden = ids.length > 0;
    for (const [id, row] of this.rows) {
      if (!ids.includes(id)) {
        row.node.remove();
        this.rows.delete(id);
      }
    }
    const own = owners(state);
    ids.forEach((id, index) => {
      if (!this.rows.has(id)) this.rows.set(id, this.build(id));
      const row = this.rows.get(id);
      if (this.list.children[index] !== row.node) this.list.insertBefore(row.node, this.list.children[index] ?? null);
      this.renderRow(state, id, row, own, lit);
    });
    this.showNewest(state, ids);
    this.renderQueues(state);
    this.renderBudget(state);
  }

  // While a text grows, its newest words are what to read. In one pass after all writing, so that the browser
  // computes the layout once and not for every row.
  showNewest(state, ids) {
    const lines = ids.map((id) => this.rows.get(id).line);
    const hidden = lines.map((line) => line.scrollWidth - line.clientWidth);
    ids.forEach((id, i) => {
      const growing = !state.seqs[id].finish_reason;
      lines[i].classList.toggle("mp-cut", growing && hidden[i] > 0);
      lines[i].scrollLeft = growing ? hidden[i] : 0;
    });
  }

  build(id) {
    const node = element("article", "mp-row", null, { "data-testid": "sequence", "data-seq": id, tabindex: "0" });
    node.style.setProperty("--hue", colour(id));
    const badge = element("span", "mp-badge", node);
    badge.textContent = letter(id);
    badge.style.color = ink(id);
    const line = element("p", "mp-line", node, { "data-testid": "text" });
    const prompt = element("span", "mp-prompt", line);
    const output = element("span", "mp-output", line);
    const meta = element("span", "mp-meta", node);
    const state = element("span", "mp-state", node, { "data-testid": "state" });
    const table = element("div", "mp-table", node, { "data-testid": "table" });
    return { node, line, prompt, output, meta, state, table, chips: [] };
  }

  renderRow(state, id, row, own, lit) {
    const seq = state.seqs[id];
    const status = statusOf(state, seq);
    row.node.dataset.state = status.name;
    row.node.classList.toggle("mp-dim", Boolean(lit) && !lit.seqs.has(id));
    row.node.classList.toggle("mp-lit", Boolean(lit) && lit.seq === id);
    row.node.classList.toggle("mp-open", lit?.open === id);
    setText(row.prompt, text(seq, 0, seq.num_prompt).trimStart());
    setText(row.output, text(seq, seq.num_prompt));
    setText(row.state, status.label);
    setText(row.meta, `${plural(seq.tokens.length, "token")} · ${plural(seq.table.length || seq.swap_table.length, "block")}`);
    row.table.classList.toggle("mp-crowded", seq.table.length >= CROWDED);
    this.renderTable(state, seq, row, own, lit);
    renderSwapped(row, seq);
  }

  renderTable(state, seq, row, own, lit) {
    while (row.chips.length > seq.table.length) row.chips.pop().node.remove();
    seq.table.forEach((block, logical) => {
      if (!row.chips[logical]) row.chips.push(buildChip(row.table, logical));
      const chip = row.chips[logical];
      const sharers = own.get(block) ?? [];
      const fill = filled(state, seq, logical);
      const key = `${block} ${sharers} ${fill}`;
      chip.node.classList.toggle("mp-lit", lit?.block === block);
      if (key === chip.key) return;
      chip.key = key;
      chip.node.dataset.chip = block;
      chip.node.title = `logical block ${logical} → physical block ${block}`;
      setText(chip.block, String(block));
      chip.fill.style.width = `${(100 * fill) / state.config.block_size}%`;
      chip.fill.style.background = sharers.length > 1 ? stripes(sharers, 5) : "";
      chip.node.classList.toggle("mp-shared", sharers.length > 1);
    });
  }

  renderQueues(state) {
    this.queues.querySelector("[data-queue=swapped]").hidden = !state.config.swap_blocks;
    const live = (id) => !state.seqs[id].finish_reason;
    const queue = (requests) => requests.flatMap((request) => state.requests[request]).filter(live);
    const queues = {
      running: queue(state.running),
      waiting: queue(state.waiting),
      swapped: queue(state.swapped),
      finished: Object.keys(state.seqs).map(Number).filter((id) => !live(id)),
    };
    for (const [name, ids] of Object.entries(queues)) {
      const node = this.queues.querySelector(`[data-queue=${name}]`);
      setText(node.querySelector("b"), String(ids.length));
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

  // How this step spends its tokens: decodes take one each, prompts what is left.
  renderBudget(state) {
    const limit = state.config.max_num_batched_tokens ?? 1;
    const kinds = state.scheduled.map(([id, start, count]) => workOf(state.seqs[id], start, count));
    const spent = { decode: 0, prefill: 0 };
    state.scheduled.forEach(([, , count], index) => (spent[kinds[index]] += count));
    setText(this.budgetText, `${spent.decode} decode + ${spent.prefill} prefill of ${limit} tokens`);
    while (this.budget.children.length > state.scheduled.length) this.budget.lastChild.remove();
    state.scheduled.forEach(([id, , count], index) => {
      const part = this.budget.children[index] ?? element("i", "", this.budget);
      part.style.width = `${(100 * count) / limit}%`;
      part.style.backgroundColor = colour(id);
      part.dataset.kind = kinds[index];
      part.title = `${letter(id)}: ${plural(count, "token")} (${kinds[index]})`;
    });
  }

  rowOf(id) {
    return this.rows.get(id)?.node;
  }

  chipsOf(id) {
    return this.rows.get(id)?.chips.map((chip) => chip.node) ?? [];
  }
}

// A decode computes the one token that was sampled last; everything else reads what is known already.
const workOf = (seq, start, count) => (count === 1 && start >= (seq?.num_prompt ?? 0) ? "decode" : "prefill");

function buildChip(table, logical) {
  const node = element("span", "mp-chip", table, { "data-testid": "chip" });
  const fill = element("span", "mp-chip-fill", node);
  element("small", "", node).textContent = logical;
  const block = element("b", "", node);
  return { node, fill, block, key: "" };
}

// A sequence that lives on the CPU for a while: its blocks there.
function renderSwapped(row, seq) {
  const key = seq.swap_table.join();
  if (key === (row.swapped ?? "")) return;
  row.swapped = key;
  for (const node of row.table.querySelectorAll(".mp-on-cpu")) node.remove();
  seq.swap_table.forEach((block, logical) => {
    const node = element("span", "mp-chip mp-on-cpu", row.table, {
      "data-swap": block, title: `logical block ${logical} → block ${block} on the CPU`,
    });
    element("small", "", node).textContent = logical;
    element("b", "", node).textContent = `CPU ${block}`;
  });
}

// Live ones in order of arrival, then those that ended, the latest first.
function shown(state) {
  const ids = Object.keys(state.seqs).map(Number);
  const live = ids.filter((id) => !state.seqs[id].finish_reason);
  const done = ids.filter((id) => state.seqs[id].finish_reason).reverse();
  return [...live, ...done.slice(0, SHOW_FINISHED)];
}

function statusOf(state, seq) {
  if (seq.finish_reason) {
    const label = { stop: "finished", length: "finished", abort: "aborted", pruned: "given up" }[seq.finish_reason];
    return { name: "finished", label };
  }
  if (state.running.includes(seq.request_id)) {
    return seq.tokens.length - seq.num_computed > 1 ? { name: "prefill", label: "reading" } : { name: "running", label: "writing" };
  }
  if (state.swapped.includes(seq.request_id)) return { name: "swapped", label: "on the CPU" };
  return seq.tokens.length > seq.num_prompt ? { name: "preempted", label: "preempted" } : { name: "waiting", label: "waiting" };
}
