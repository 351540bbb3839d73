// Rebuilds the engine's state from its events. Mirrors `State` in minipaged/events/reducer.py, with the same names.
// Both are tested on the same event streams and must agree exactly.

const KEPT = 12; // finished requests that stay in the state

export class State {
  constructor() {
    this.config = /** @type {Config} */ ({}); // empty until engine_started
    this.step = 0;
    /** @type {{ [seqId: number]: Seq }} */
    this.seqs = {};
    /** @type {{ [requestId: string]: number[] }} */
    this.requests = {};
    /** @type {{ [requestId: string]: number }} */
    this.ranks = {}; // of requests with a rank other than 0
    /** @type {string[]} */
    this.waiting = [];
    /** @type {string[]} */
    this.running = [];
    /** @type {string[]} */
    this.swapped = [];
    /** @type {string[]} */
    this.finished = [];
    this.forgotten = 0;
    /** @type {number[]} */
    this.ref_counts = [];
    /** @type {number[]} */
    this.swap_ref_counts = [];
    /** @type {{ [block: number]: number }} */
    this.cached = {};
    /** @type {{ [block: number]: boolean }} */
    this.predicted = {};
    /** @type {{ [group: number]: Group }} */
    this.groups = {};
    /** @type {[seqId: number, start: number, tokens: number, draft: number][]} */
    this.scheduled = [];
    /** @type {string | null} */
    this.error = null;
  }

  /** @param {State} data */
  static from(data) {
    return Object.assign(new State(), structuredClone(data));
  }

  /** @param {EngineEvent} event */
  apply(event) {
    const handler = Object.hasOwn(HANDLERS, event.type) && /** @type {Handler} */ (HANDLERS[event.type]);
    if (!handler) throw new Error(`unknown event ${event.type}`);
    handler(this, event);
  }
}

/**
 * @template T
 * @param {T[]} array
 * @param {T} value
 */
function remove(array, value) {
  const index = array.indexOf(value);
  if (index < 0) throw new Error(`${value} is not in [${array}]`);
  array.splice(index, 1);
}

// Inserts a request by its rank, then by its first sequence id, which is the order of arrival.
/** @param {State} state @param {string[]} array @param {string} requestId */
function queue(state, array, requestId) {
  array.push(requestId);
  const rank = (/** @type {string} */ id) => state.ranks?.[id] ?? 0; // keyframes of old recordings have no ranks
  array.sort((a, b) => rank(a) - rank(b) || state.requests[a][0] - state.requests[b][0]);
}

// Moves one sequence's references to blocks from the pool to the CPU's swap space (change -1) or back (+1).
/** @param {State} state @param {SwappedOut | SwappedIn} e @param {number} change */
function move(state, e, change) {
  e.blocks.forEach((block, i) => {
    state.ref_counts[block] += change;
    state.swap_ref_counts[e.swap_blocks[i]] -= change;
  });
}

/** @param {State} state @param {string} requestId */
function forget(state, requestId) {
  remove(state.finished, requestId);
  for (const seqId of state.requests[requestId]) {
    delete state.seqs[seqId];
    state.forgotten += 1;
  }
  delete state.requests[requestId];
  delete state.ranks[requestId];
}

/** @param {State} state @param {Allocated | Shared} e */
function allocated(state, e) {
  const table = state.seqs[e.seq_id].table;
  if (e.logical !== table.length) throw new Error(`block tables grow at their end: ${JSON.stringify(e)}`);
  table.push(e.block);
  state.ref_counts[e.block] += 1;
}

// Event handlers: one function per event type, named after it.
/** @type {{ [T in EventType]: (state: State, e: EventOf<T>) => void }} */
const HANDLERS = {
  engine_started(state, e) {
    Object.assign(state, new State()); // a run starts from the empty state
    const { type, ...config } = e;
    state.config = { memory: "paged", batching: "continuous", ...config }; // old recordings lack these fields
    state.ref_counts = new Array(e.num_blocks).fill(0);
    state.swap_ref_counts = new Array(e.swap_blocks).fill(0);
  },
  request_added(state, e) {
    if (state.finished.includes(e.request_id)) forget(state, e.request_id); // the id is reused
    state.requests[e.request_id] = [...e.seq_ids];
    if (e.rank != null) state.ranks[e.request_id] = e.rank;
    for (const seqId of e.seq_ids) {
      state.seqs[seqId] = {
        request_id: e.request_id,
        num_prompt: e.prompt_token_ids.length,
        tokens: [...e.prompt_token_ids],
        pieces: [...e.prompt_pieces],
        logprobs: e.prompt_token_ids.map(() => null),
        num_computed: 0,
        num_cached: 0,
        table: [],
        swap_table: [],
        parent: null,
        finish_reason: null,
        limit: e.prompt_token_ids.length + e.max_tokens,
        proposed: [],
        taken_back: [],
      };
    }
    queue(state, state.waiting, e.request_id);
  },
  step_started(state, e) {
    state.step = e.step;
    state.scheduled = [];
    for (const seq of Object.values(state.seqs)) Object.assign(seq, { proposed: [], taken_back: [] });
  },
  admitted(state, e) {
    remove(state.waiting, e.request_id);
    queue(state, state.running, e.request_id);
    Object.assign(state.seqs[e.seq_id], { num_computed: e.num_cached, num_cached: e.num_cached });
  },
  allocated,
  shared: allocated,
  copied(state, e) {
    state.seqs[e.seq_id].table[e.logical] = e.dst;
    state.ref_counts[e.src] -= 1;
    state.ref_counts[e.dst] += 1;
  },
  scheduled(state, e) {
    state.scheduled.push([e.seq_id, e.start, e.num_tokens, e.num_draft ?? 0]); // old recordings lack num_draft
  },
  preempted(state, e) {
    remove(state.running, e.request_id);
    if (e.mode === "swap") return queue(state, state.swapped, e.request_id);
    queue(state, state.waiting, e.request_id);
    for (const seqId of state.requests[e.request_id]) {
      if (state.seqs[seqId].finish_reason === null) state.seqs[seqId].num_computed = 0;
    }
  },
  swapped_out(state, e) {
    Object.assign(state.seqs[e.seq_id], { table: [], swap_table: [...e.swap_blocks] });
    move(state, e, -1);
  },
  swapped_in(state, e) {
    Object.assign(state.seqs[e.seq_id], { table: [...e.blocks], swap_table: [] });
    move(state, e, +1);
  },
  resumed(state, e) {
    remove(state.swapped, e.request_id);
    queue(state, state.running, e.request_id);
  },
  filled(state, e) {
    state.seqs[e.seq_id].num_computed = e.start + e.num_tokens;
  },
  cached(state, e) {
    state.cached[e.block] = e.prefix;
  },
  evicted(state, e) {
    delete state.cached[e.block];
    delete state.predicted[e.block];
  },
  predicted(state, e) {
    for (const block of e.blocks) state.predicted[block] = e.discard;
  },
  forked(state, e) {
    const parent = state.seqs[e.parent];
    if (!(e.child in state.seqs)) { // a beam, or a fork that a viewer requested
      state.seqs[e.child] = {
        ...structuredClone(parent), request_id: e.request_id, num_cached: 0, table: [], swap_table: [], finish_reason: null,
        proposed: [], taken_back: [],
      };
      const siblings = state.requests[e.request_id] ?? [];
      if (siblings.some((id) => state.seqs[id].finish_reason === null)) {
        siblings.push(e.child);
      } else { // it becomes its own request
        state.requests[e.request_id] = [e.child];
        if (parent.request_id in state.ranks) state.ranks[e.request_id] = state.ranks[parent.request_id];
        queue(state, state.running, e.request_id);
      }
    }
    const child = state.seqs[e.child];
    child.num_computed = parent.num_computed;
    child.parent = e.parent;
  },
  sampled(state, e) {
    const seq = state.seqs[e.seq_id];
    seq.tokens.push(e.token_id);
    seq.pieces.push(e.text);
    seq.logprobs.push(e.logprob);
  },
  proposed(state, e) {
    state.seqs[e.seq_id].proposed = [...e.pieces];
  },
  speculated(state, e) {
    const seq = state.seqs[e.seq_id];
    Object.assign(seq, { proposed: [], taken_back: seq.proposed.slice(e.accepted) });
    for (const block of e.blocks) {
      if (seq.table.pop() !== block) throw new Error(`block tables shrink at their end: ${JSON.stringify(e)}`);
      state.ref_counts[block] -= 1;
    }
  },
  freed(state, e) {
    const seq = state.seqs[e.seq_id];
    const counts = seq.swap_table.length ? state.swap_ref_counts : state.ref_counts;
    Object.assign(seq, { table: [], swap_table: [] });
    for (const block of e.blocks) counts[block] -= 1;
  },
  group_started(state, e) {
    state.groups[e.group] = { request_ids: [...e.request_ids], num_blocks: e.num_blocks, kept: [] };
  },
  prefix_kept(state, e) {
    state.groups[e.group].kept = [...e.blocks];
    for (const block of e.blocks) state.ref_counts[block] += 1;
  },
  prefix_released(state, e) {
    state.groups[e.group].kept = [];
    for (const block of e.blocks) state.ref_counts[block] -= 1;
  },
  group_ended(state, e) {
    delete state.groups[e.group];
  },
  finished(state, e) {
    const seq = state.seqs[e.seq_id];
    seq.finish_reason = e.reason;
    if (state.requests[seq.request_id].every((s) => state.seqs[s].finish_reason)) {
      for (const ids of [state.waiting, state.running, state.swapped]) {
        if (ids.includes(seq.request_id)) remove(ids, seq.request_id);
      }
      state.finished.push(seq.request_id);
      if (state.finished.length > KEPT) forget(state, state.finished[0]);
    }
  },
  step_finished() {}, // only for the charts; the state does not change
  engine_error(state, e) {
    state.error = e.message;
  },
};

// --- queries for the views -------------------------------------------------------------------------------------

// Map of block -> the sorted ids of the sequences whose block tables contain it; for CPU blocks pass "swap_table".
/** @param {State} state @param {"table" | "swap_table"} name */
export function owners(state, name = "table") {
  /** @type {Map<number, number[]>} */
  const result = new Map();
  for (const [key, seq] of Object.entries(state.seqs)) {
    const id = Number(key);
    for (const block of seq[name]) {
      const own = result.get(block);
      if (own) own.push(id);
      else result.set(block, [id]);
    }
  }
  return result;
}

// Whether the memory manager is contiguous: it reserves a sequence's maximum length when the sequence is admitted.
export const reservesAhead = (/** @type {State} */ state) => String(state.config.memory).startsWith("orca-");

// The number of slots of a sequence's logical block whose keys and values are computed.
/** @param {State} state @param {Seq} seq @param {number} logical */
export function filled(state, seq, logical) {
  const size = state.config.block_size;
  return Math.max(0, Math.min(size, seq.num_computed - logical * size));
}

// Memory use in slots: logical (all sequences' tokens), used (filled, shared ones once), reserved (blocks in use).
/** @param {State} state @returns {Metrics} */
export function measure(state) {
  const slots = new Map();
  let logical = 0;
  for (const seq of Object.values(state.seqs)) {
    if (seq.table.length) logical += seq.num_computed;
    seq.table.forEach((block, i) => {
      slots.set(block, Math.max(slots.get(block) ?? 0, filled(state, seq, i)));
    });
  }
  let used = 0;
  for (const count of slots.values()) used += count;
  return { step: state.step, logical, used, reserved: slots.size * state.config.block_size };
}

// Checks what must hold after every event: a block's reference count equals its occurrences in tables and groups.
/** @param {State} state */
export function check(state) {
  const counts = new Array(state.config.num_blocks).fill(0);
  for (const seq of Object.values(state.seqs)) for (const block of seq.table) counts[block] += 1;
  for (const group of Object.values(state.groups)) for (const block of group.kept) counts[block] += 1;
  counts.forEach((count, block) => {
    if (count !== state.ref_counts[block]) {
      throw new Error(`block ${block} is in ${count} tables but has ${state.ref_counts[block]} references`);
    }
  });
}
