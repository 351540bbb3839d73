// What other memory managers would hold for the very same texts, record by record: the twin of `Accounts` in
// minipaged/memory/waste.py, where the terms are explained. The page keeps these books itself, since a recording or an
// exported page has no server to ask. Both are tested on the same recordings and must agree exactly.

import { State } from "./reducer.js";

export const MANAGERS = ["orca-max", "orca-pow2", "orca-oracle", "vattention", "paged"];
export const PAGE_TOKENS = 64; // of vAttention's page-groups
const AHEAD = 3; // of the managers, those that reserve ahead

export class Accounts {
  constructor() {
    this.records = null; // the player's, of the run that these books are of
    this.first = 0; // number of the oldest row kept
    this.rows = []; // [number, step, running, then token, reserved, internal, external, fit of each manager]
    this.revision = 0; // counts the times that rows were new or changed
  }

  get end() {
    return this.first + this.rows.length;
  }

  // What is held after the record of that number.
  at(number) {
    return this.rows[number - this.first];
  }

  // Takes what is new in the player's records; starts over when they are not a continuation. A text that still runs is
  // taken to run to its limit: when it ends earlier, the rows it was running in change.
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
      this.rows.push(null);
    }
    for (let number = Math.max(stale, this.first); number < this.end; number += 1) {
      this.rows[number - this.first] = [number, ...this.row(this.shots[number - this.first])];
    }
  }

  // Only what runs, or is running in a row that is kept, is asked for again.
  forget() {
    const needed = new Set(this.shots.flatMap(({ running }) => running.map(([id]) => id)));
    for (const id of this.terms.keys()) {
      if (needed.has(id) || this.state.seqs[id]?.finish_reason === null) continue;
      this.terms.delete(id);
      this.since.delete(id);
    }
  }

  begin(player) {
    Object.assign(this, { records: player.records, first: player.first, rows: [], shots: [] });
    this.state = State.from(JSON.parse(player.keyframes.get(player.first)));
    this.terms = new Map(); // sequence -> {final, asked, chunk}
    this.since = new Map(); // sequence -> the first row that it is running in
  }

  // Returns the first row that is not right any more.
  apply(event) {
    this.state.apply(event);
    const before = event.type === "finished" && this.terms.get(event.seq_id);
    if (!before) return Infinity;
    const seq = this.state.seqs[event.seq_id];
    // The last token's KV is never computed: nothing follows that would read it.
    const terms = this.agree(seq.num_prompt, Math.max(seq.tokens.length - 1, seq.num_computed));
    this.terms.set(event.seq_id, terms);
    return terms.final === before.final ? Infinity : this.since.get(event.seq_id);
  }

  // Nobody would promise more than the whole pool.
  get longest() {
    const { max_model_len, num_blocks, block_size } = this.state.config;
    return Math.min(max_model_len, num_blocks * block_size);
  }

  // What a sequence means to contiguous managers, which decide once: slots asked for, and slots given.
  agree(prompt, final) {
    const { longest, state: { config: { block_size: size } } } = this;
    const output = Math.max(0, final + 1 - prompt); // the last token's KV is never computed
    const needed = prompt + output - 1;
    const pow2 = Math.min(prompt + nextPowerOfTwo(output), longest);
    const asked = [longest, pow2, needed].map((slots) => Math.max(slots, needed, final));
    const [max, ...buddies] = asked.map((slots) => Math.ceil(slots / size));
    // Max asks for the same size every time, so its pool is cut into exact pieces.
    return { final, asked, chunk: [max, ...buddies.map(nextPowerOfTwo)].map((blocks) => blocks * size) };
  }

  // What a row is computed from, again and again, as final lengths become known.
  close() {
    const { state } = this;
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
    for (const block of shot.full) shot.filled.delete(block); // one of its readers has filled it, for all of them
    return { ...shot, full: shot.full.size, open: shot.open.filter(([block]) => shot.filled.has(block)) };
  }

  look({ full, filled, open }, id, seq) {
    const { block_size: size, memory } = this.state.config;
    const count = Math.floor(seq.num_computed / size);
    // Of a chunk that is there from the start, paging would hold what is in use.
    const ahead = MANAGERS.slice(0, AHEAD).includes(memory);
    const table = ahead ? seq.table.slice(0, Math.ceil(seq.num_computed / size)) : seq.table;
    table.forEach((block, logical) => {
      if (logical < count) return full.add(block);
      const start = logical * size;
      filled.set(block, Math.max(filled.get(block) ?? 0, seq.num_computed - start));
      open.push([block, id, start]);
    });
  }

  row({ step, running, full, filled, open }) {
    const { num_blocks, block_size } = this.state.config;
    const slots = num_blocks * block_size;
    const terms = running.map(([id]) => this.terms.get(id));
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

  // What the engine's own block tables hold: shared blocks count once.
  paged(full, filled, open) {
    const size = this.state.config.block_size;
    const coming = new Map();
    for (const [block, id, start] of open) {
      coming.set(block, Math.max(coming.get(block) ?? 0, Math.min(size, this.terms.get(id).final - start)));
    }
    const token = sum([...filled.values()]);
    const reserved = sum([...filled].map(([block, count]) => Math.max(0, coming.get(block) - count)));
    return [token + full * size, reserved, filled.size * size - token - reserved, 0];
  }
}

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const nextPowerOfTwo = (n) => (n > 0 ? 2 ** (32 - Math.clz32(n - 1)) : 0);

// How many of the sequences, in order, a pool could serve at once.
function fitting(needs, slots) {
  let left = slots;
  const full = needs.findIndex((need) => (left -= need) < 0);
  return full < 0 ? needs.length : full;
}
