// The inspector's view of a sequence: its tokens in the blocks that hold them, its times, its family, fork and abort.

import { colour, element, letter, plural, setText } from "./names.js";
import { badge, facts, heading, renderToken, roving, setAttribute, slotName, slotOf, sync, token } from "./parts.js";

const FAMILY = 24; // members shown
const FORK = "Let it go on in two ways from here; all blocks are shared until one writes";
const NO_FORK = "Only a request with one running sequence can be forked";
const ABORT = "End it now; its blocks come back at once";

export class SequenceView {
  /** @type {number | undefined} */
  id; // of the sequence that is shown
  /** @type {string | undefined} */
  request;

  /** @param {HTMLElement} body @param {Send} send */
  constructor(body, send) {
    this.send = send;
    const title = element("h3", "", body);
    this.title = element("span", "", title);
    this.kind = element("span", "mp-kind", title, { "data-testid": "sequence-kind" });
    this.actions = element("div", "mp-actions", body);
    this.fork = button(this.actions, "Fork", FORK);
    this.abort = button(this.actions, "Abort", ABORT);
    this.fork.addEventListener("click", () => this.ask("fork"));
    this.abort.addEventListener("click", () => this.ask("abort"));
    this.answer = element("p", "mp-refusal", body, { role: "alert", "data-testid": "refusal" });
    this.facts = element("dl", "mp-facts mp-flow", body, { "data-testid": "timings" });
    heading(body, "Its text, in the blocks that hold it");
    this.text = element("div", "mp-runs", body, { "data-testid": "runs" });
    roving(this.text);
    this.familyTitle = heading(body, "Family");
    this.family = element("ul", "mp-family", body, { "data-testid": "family" });
  }

  /** @param {"fork" | "abort"} what */
  async ask(what) {
    setText(this.answer, "");
    const answer = await this.send({ do: what, request_id: this.request });
    setText(this.answer, answer?.ok ? "" : answer?.message ?? "The server does not answer; is it still running?");
  }

  /** @param {State} state @param {BlockHistory} history @param {Picked & { seq: number }} what */
  render(state, history, { seq: id }) {
    const seq = state.seqs[id];
    if (this.id !== id) setText(this.answer, "");
    Object.assign(this, { id, request: seq.request_id });
    setText(this.title, `Sequence ${letter(id)}`);
    setText(this.kind, kindOf(state, seq));
    this.renderActions(state, seq);
    this.renderFacts(state, history.life(id), seq);
    this.renderText(state, id, seq);
    this.renderFamily(state, id);
  }

  // Fork and abort act on the whole request, not on one sequence.
  /** @param {State} state @param {Seq} seq */
  renderActions(state, seq) {
    const live = (state.requests[seq.request_id] ?? []).filter((id) => !state.seqs[id]?.finish_reason).length;
    const alone = live < 2;
    this.actions.hidden = Boolean(seq.finish_reason);
    this.fork.disabled = !alone;
    this.fork.title = alone ? FORK : NO_FORK;
    setText(this.abort, alone ? "Abort" : `Abort all ${live}`);
    this.abort.title = alone ? ABORT : `End the whole request, all ${live} sequences of it; their blocks come back at once`;
  }

  /** @param {State} state @param {import("./block_history.js").Life} life @param {Seq} seq */
  renderFacts(state, life, seq) {
    const samples = state.requests[seq.request_id]?.length ?? 1;
    const made = seq.tokens.length - seq.num_prompt;
    const steps = life.first === undefined || life.last === undefined ? 0 : life.last - life.first + 1;
    facts(this.facts, [
      ["request", `${seq.request_id}, ${plural(samples, "sequence")}` +
        (life.max_tokens ? `, at most ${life.max_tokens} new tokens` : "")],
      ["tokens", `${seq.num_prompt} of the prompt + ${made} written`],
      ["arrived", after(life.arrived)],
      ["admitted", after(life.admitted)],
      ["prefix cache", life.cached ? `gave ${life.cached} tokens` : undefined],
      ["forked off", after(life.forked)],
      ["first token", after(life.first)],
      ["speed", steps > 0 ? `${(Math.min(made, life.tokens.size) / steps).toFixed(2)} tokens per step` : undefined],
      ["preempted", life.preempted ? `${life.preempted}×` : undefined],
      ["ended", after(life.finished)],
    ]);
  }

  // One line per logical block: its physical block, and its tokens.
  /** @param {State} state @param {number} id @param {Seq} seq */
  renderText(state, id, seq) {
    const size = state.config.block_size;
    const lines = [...Array(Math.ceil(seq.tokens.length / size)).keys()];
    this.text.style.setProperty("--hue", colour(id));
    sync(this.text, lines, (logical) => `${id} ${logical}`, (logical) => {
      const line = element("div", "mp-run");
      const chip = element("button", "mp-place", line, { type: "button", "data-testid": "place" });
      element("small", "", chip).textContent = `${logical}→`;
      element("b", "", chip);
      element("p", "", line);
      return line;
    }, (line, logical) => {
      const block = seq.table[logical];
      const swap = seq.swap_table[logical];
      const chip = line.firstChild;
      setText(chip.lastChild, block !== undefined ? String(block) : swap !== undefined ? `CPU ${swap}` : "–");
      chip.disabled = block === undefined && swap === undefined;
      setAttribute(chip, "data-go", block !== undefined ? `block:${block}` : swap !== undefined ? `cpu:${swap}` : "");
      const place = block !== undefined ? `physical block ${block}` : swap !== undefined ? `block ${swap} on the CPU` : "in no block";
      setAttribute(chip, "aria-label", `logical block ${logical}, ${place}`);
      const end = Math.min(seq.tokens.length, (logical + 1) * size);
      const positions = Array.from({ length: end - logical * size }, (_, i) => logical * size + i);
      sync(line.lastChild, positions, (position) => position, () => token(), (node, position) => {
        renderToken(node, id, position, seq.pieces[position], slotName(slotOf(state, seq, position)));
        node.classList.toggle("mp-given", position < seq.num_prompt);
      });
    });
  }

  // The tree of forks, with children indented under their parents; sequences that have ended are faded.
  /** @param {State} state @param {number} id */
  renderFamily(state, id) {
    const members = familyOf(state, id);
    this.family.hidden = this.familyTitle.hidden = members.length < 2;
    const shown = members.length < 2 ? [] : mostTelling(state, members, id);
    setText(this.familyTitle, shown.length < members.length ? `Family (${shown.length} of ${members.length} shown)` : "Family");
    sync(this.family, shown, (member) => member.id, (member) => {
      const item = element("li", "", null, { "data-testid": "member", "data-member": member.id });
      item.append(badge(member.id));
      element("span", "", item);
      return item;
    }, (item, member) => {
      const { table, parent, finish_reason: reason } = state.seqs[member.id];
      const elder = parent === null ? undefined : state.seqs[parent];
      const common = elder ? table.filter((block, i) => elder.table[i] === block).length : 0;
      item.style.setProperty("--depth", member.depth);
      item.classList.toggle("mp-gone", Boolean(reason));
      item.classList.toggle("mp-self", member.id === id);
      const both = parent !== null && table.length && elder?.table.length;
      const sharing = both ? ` · shares ${common} of ${plural(table.length, "block")} with ${letter(parent)}` : "";
      setText(item.lastChild, kindOf(state, state.seqs[member.id]) + sharing);
    });
  }
}

/** @param {HTMLElement} parent @param {string} words @param {string} title */
function button(parent, words, title) {
  const node = element("button", "", parent, { type: "button", title, "data-testid": words.toLowerCase() });
  node.textContent = words;
  return node;
}

const after = (/** @type {number | undefined} */ step) => (step === undefined ? undefined : `step ${step}`);

/** @param {State} state @param {Seq} seq */
export function kindOf(state, seq) {
  if (seq.finish_reason) return { abort: "aborted", error: "failed", pruned: "given up" }[seq.finish_reason] ?? "finished";
  if (state.swapped.includes(seq.request_id)) return "on the CPU";
  return state.running.includes(seq.request_id) ? "running" : "waiting";
}

// The whole tree of forks that a sequence belongs to, parents before children: [{id, depth}].
/** @param {State} state @param {number} id */
function familyOf(state, id) {
  let root = id;
  for (let at = /** @type {number | null} */ (id); at !== null && state.seqs[at]; at = state.seqs[at].parent) root = at;
  const children = new Map();
  for (const [child, { parent }] of Object.entries(state.seqs)) {
    if (parent !== null) children.set(parent, [...(children.get(parent) ?? []), Number(child)]);
  }
  /** @type {{ id: number, depth: number }[]} */
  const members = [];
  const visit = (/** @type {number} */ member, /** @type {number} */ depth) => {
    members.push({ id: member, depth });
    for (const child of children.get(member) ?? []) visit(child, depth + 1);
  };
  visit(root, 0);
  return members;
}

// The members to show (a beam search forks hundreds of times): unfinished ones with their ancestors, then the latest.
/** @param {State} state @param {{ id: number, depth: number }[]} members @param {number} id */
function mostTelling(state, members, id) {
  const chosen = new Set();
  const withElders = (/** @type {number | null} */ member) => {
    for (let at = member; at !== null && state.seqs[at] && !chosen.has(at); at = state.seqs[at].parent) chosen.add(at);
  };
  withElders(id);
  for (const member of members) if (!state.seqs[member.id].finish_reason) withElders(member.id);
  for (const member of [...members].reverse()) if (chosen.size < FAMILY) chosen.add(member.id);
  return members.filter((member) => chosen.has(member.id));
}
