// Computes, record by record, the slots that other memory managers would hold for the same sequences. Mirrors
// `Accounts` in minipaged/events/waste.py, which defines the terms. The page computes them itself, since a recording or
// an exported page has no server. Both are tested on the same recordings and must agree exactly.

import { State } from "./reducer.js";

export const MANAGERS = ["orca-max", "orca-pow2", "orca-oracle", "vattention", "paged"];
export const PAGE_TOKENS = 64; // tokens in one of vAttention's page-groups
const AHEAD = 3; // the first three managers reserve memory ahead

// A sequence's final length, and what the contiguous managers would reserve for it: slots requested, slots reserved.
/** @typedef {{ final: number, asked: number[], chunk: number[] }} Terms */
/**
 * What a record's row is computed from: the running sequences with their computed tokens, how many blocks are full, the
 * filled slots of the others, and which sequences' blocks those are.
 * @typedef {{
 *   step: number, running: [id: number, computed: number][], full: number, filled: Map<number, number>,
 *   open: [block: number, id: number, start: number][],
 * }} Shot
 */

export class Accounts {
  // `begin` sets these.
  /** @type {State} */
  state;
  /** @type {Shot[]} */
  shots;
  /** @type {Map<number, Terms>} */
  terms;
  /** @type {Map<number, number>} */
  since; // sequence -> the first row that it is running in

  constructor() {
    /** @type {RunRecord[] | null} */
    this.records = null; // the player's records of the run that is accounted for
    this.first = 0; // number of the oldest row that is kept
    /** @type {number[][]} */
    this.rows = []; // [number, step, running, then token, reserved, internal, external, fit of each manager]
    this.revision = 0; // increases whenever rows are added or changed
  }

  get end() {
    return this.first + this.rows.length;
  }

  // The row of the record with this number: what each manager holds after it.
  /** @param {number} number */
  at(number) {
    return this.rows[number - this.first];
  }

  // Reads the player's new records; starts over if they do not continue the known ones. A running sequence is assumed
  // to run to its limit; if it ends earlier, the rows in which it was running are computed again.
  /** @param {Player} player */
  follow(player) {
    if (this.records !== player.records || player.first > this.end) this.begin(player);
    if (player.end > this.end) this.revision += 1;
    const gone = player.first - this.first;
    this.rows.splice(0, gone);
    this.shots.splice(0, gone);
    this.first = player.first;
    if (gone) this.forget();
    let stale = this.end;
    for (const { events } of player.records.slice(this.end - player.first)) {
      for (const event of events) stale = Math.min(stale, this.apply(event));
      this.shots.push(this.close());
      this.rows.push([]); // computed below
    }
    for (let number = Math.max(stale, this.first); number < this.end; number += 1) {
      this.rows[number - this.first] = [number, ...this.row(this.shots[number - this.first])];
    }
  }

  // Drops sequences that have ended and are running in no row that is kept.
  forget() {
    const needed = new Set(this.shots.flatMap(({ running }) => running.map(([id]) => id)));
    for (const id of this.terms.keys()) {
      if (needed.has(id) || this.state.seqs[id]?.finish_reason === null) continue;
      this.terms.delete(id);
      this.since.delete(id);
    }
  }

  /** @param {Player} player */
  begin(player) {
    Object.assign(this, { records: player.records, first: player.first, rows: [], shots: [] });
    this.state = State.from(player.keyframe(player.first));
    this.terms = new Map();
    this.since = new Map();
  }

  // Returns the number of the first row that has become wrong.
  /** @param {EngineEvent} event */
  apply(event) {
    this.state.apply(event);
    if (event.type !== "finished") return Infinity;
    const [before, since] = [this.terms.get(event.seq_id), this.since.get(event.seq_id)];
    if (!before || since === undefined) return Infinity; // it has never run
    const seq = this.state.seqs[event.seq_id];
    // The last token's KV is never computed: no later token reads it.
    const terms = this.agree(seq.num_prompt, Math.max(seq.tokens.length - 1, seq.num_computed));
    this.terms.set(event.seq_id, terms);
    return terms.final === before.final ? Infinity : since;
  }

  // The longest sequence in slots: no manager reserves more than the whole pool.
  get longest() {
    const { max_model_len, num_blocks, block_size } = this.state.config;
    return Math.min(max_model_len, num_blocks * block_size);
  }

  // A sequence's terms with the contiguous managers, which reserve once.
  /** @param {number} prompt @param {number} final @returns {Terms} */
  agree(prompt, final) {
    const { longest, state: { config: { block_size: size } } } = this;
    const output = Math.max(0, final + 1 - prompt); // the last token's KV is never computed
    const needed = prompt + output - 1;
    const pow2 = Math.min(prompt + nextPowerOfTwo(output), longest);
    const asked = [longest, pow2, needed].map((slots) => Math.max(slots, needed, final));
    const [max, ...buddies] = asked.map((slots) => Math.ceil(slots / size));
    // Orca Max requests the same size every time, so it needs no rounding to a power of two.
    return { final, asked, chunk: [max, ...buddies.map(nextPowerOfTwo)].map((blocks) => blocks * size) };
  }

  // A snapshot of the state after a record. Its row is computed from it again when final lengths become known.
  /** @returns {Shot} */
  close() {
    const { state } = this;
    /** @type {Omit<Shot, "full"> & { full: Set<number> }} */
    const shot = { step: state.step, running: [], full: new Set(), filled: new Map(), open: [] };
    for (const [key, seq] of Object.entries(state.seqs)) {
      if (!seq.table.length) continue;
      const id = Number(key);
      shot.running.push([id, seq.num_computed]);
      this.look(shot, id, seq);
      if (this.terms.has(id)) continue;
      this.terms.set(id, this.agree(seq.num_prompt, Math.max(Math.min(seq.limit - 1, this.longest), seq.num_computed)));
      this.since.set(id, this.end);
    }
    for (const block of shot.full) shot.filled.delete(block); // full for one of its sequences means full for all
    return { ...shot, full: shot.full.size, open: shot.open.filter(([block]) => shot.filled.has(block)) };
  }

  /** @param {Pick<Shot, "filled" | "open"> & { full: Set<number> }} shot @param {number} id @param {Seq} seq */
  look({ full, filled, open }, id, seq) {
    const { block_size: size, memory } = this.state.config;
    const count = Math.floor(seq.num_computed / size);
    // These managers reserve a whole chunk at the start; paging would hold only the blocks in use.
    const ahead = MANAGERS.slice(0, AHEAD).includes(memory);
    const table = ahead ? seq.table.slice(0, Math.ceil(seq.num_computed / size)) : seq.table;
    table.forEach((block, logical) => {
      const start = logical * size;
      if (logical < count) full.add(block);
      else {
        filled.set(block, Math.max(filled.get(block) ?? 0, seq.num_computed - start));
        open.push([block, id, start]);
      }
    });
  }

  /** @param {Shot} shot */
  row({ step, running, full, filled, open }) {
    const { num_blocks, block_size } = this.state.config;
    const slots = num_blocks * block_size;
    const terms = running.map(([id]) => this.termsOf(id));
    const token = sum(running.map(([, computed]) => computed));
    const final = sum(terms.map((term) => term.final));
    const row = [step, running.length];
    for (let i = 0; i < AHEAD; i += 1) {
      const asked = sum(terms.map((term) => term.asked[i]));
      const chunks = terms.map((term) => term.chunk[i]);
      row.push(token, final - token, asked - final, sum(chunks) - asked, fitting(chunks, slots));
    }
    const pages = running.map(([, computed]) => Math.ceil(computed / PAGE_TOKENS) * PAGE_TOKENS);
    const later = sum(pages.map((page, i) => Math.min(page, terms[i].final))) - token;
    row.push(token, later, sum(pages) - token - later, 0, fitting(pages, slots));
    row.push(...this.paged(full, filled, open), running.length);
    return row;
  }

  // The terms of a sequence that has run.
  /** @param {number} id */
  termsOf(id) {
    return /** @type {Terms} */ (this.terms.get(id));
  }

  // The slots that the engine's own block tables hold; a shared block counts once.
  /** @param {number} full @param {Shot["filled"]} filled @param {Shot["open"]} open */
  paged(full, filled, open) {
    const size = this.state.config.block_size;
    /** @type {Map<number, number>} */
    const coming = new Map();
    for (const [block, id, start] of open) {
      coming.set(block, Math.max(coming.get(block) ?? 0, Math.min(size, this.termsOf(id).final - start)));
    }
    const token = sum([...filled.values()]);
    const reserved = sum([...filled].map(([block, count]) => Math.max(0, (coming.get(block) ?? 0) - count)));
    return [token + full * size, reserved, filled.size * size - token - reserved, 0];
  }
}

const sum = (/** @type {number[]} */ numbers) => numbers.reduce((total, number) => total + number, 0);
const nextPowerOfTwo = (/** @type {number} */ n) => (n > 0 ? 2 ** (32 - Math.clz32(n - 1)) : 0);

// How many of the sequences, in order of arrival, fit into a pool of `slots` at the same time.
/** @param {number[]} needs @param {number} slots */
function fitting(needs, slots) {
  let left = slots;
  const full = needs.findIndex((need) => (left -= need) < 0);
  return full < 0 ? needs.length : full;
}
