// The history of a block, a sequence or a token, read from the records. Only the inspector needs it, so reading starts
// when it opens; after that only new records are read. It starts over from the oldest keyframe after a seek backwards,
// and when the player has dropped many records while the inspector was open.

import { letter, plural } from "./names.js";
import { State } from "./reducer.js";

const MOST = 1200; // records that the player may drop before the history starts over

export const cpu = (/** @type {number} */ block) => `cpu-${block}`; // the key of a CPU block's history

/** @typedef {{ step: number, until: number, kind: string, words: string, seq?: number, number: number }} Entry */
/**
 * The steps of a sequence's arrival, admission and so on; its tokens by position.
 * @typedef {{
 *   tokens: Map<number, { step: number, top?: any[][] }>, preempted: number, cached: number, max_tokens?: number, samples?: number,
 *   arrived?: number, admitted?: number, forked?: number, first?: number, last?: number, finished?: number,
 * }} Life
 */

export class History {
  // `begin` sets these.
  /** @type {string | null} */
  run;
  /** @type {number} */
  first;
  /** @type {number} */
  position;
  /** @type {State} */
  state;
  /** @type {boolean} */
  complete; // whether the records begin with the run
  /** @type {Map<number | string, Entry[]>} */
  blocks;
  /** @type {Map<number, Life>} */
  lives;
  /** @type {Map<number, { seq: number, logical: number }>} */
  contents; // block -> the sequence that last wrote to it
  /** @type {Map<number, number>} */
  parents; // prefix id in the prefix cache -> its parent's id

  /** @param {Player} player */
  follow(player) {
    const lost = this.run !== player.run || player.position < this.position || this.position < player.first;
    if (lost || player.first - this.first > MOST) this.begin(player);
    while (this.position < player.position) {
      for (const event of player.records[this.position - player.first].events) this.read(event);
      this.position += 1;
    }
  }

  /** @param {Player} player */
  begin(player) {
    this.run = player.run;
    this.first = this.position = player.first;
    this.state = State.from(player.keyframe(player.first));
    this.complete = !Object.keys(this.state.seqs).length;
    this.blocks = new Map();
    this.lives = new Map();
    this.contents = new Map();
    this.parents = new Map();
    for (const [id, seq] of Object.entries(this.state.seqs)) {
      seq.table.forEach((block, logical) => this.contents.set(block, { seq: Number(id), logical }));
    }
  }

  /** @param {EngineEvent} event */
  read(event) {
    const handler = /** @type {Handler | undefined} */ (READ[event.type]);
    const early = event.type === "freed" || event.type === "swapped_out"; // these events empty the block table
    if (early) handler?.(this, event, this.state);
    this.state.apply(event);
    if (!early) handler?.(this, event, this.state);
  }

  /** @param {number} id */
  life(id) {
    /** @type {Life} */
    const life = this.lives.get(id) ?? { tokens: new Map(), preempted: 0, cached: 0 };
    this.lives.set(id, life);
    return life;
  }

  // Adds an entry to a block's history. When a sequence fills a block over several steps, this is one entry.
  /** @param {number | string} block @param {string} kind @param {string} words @param {number} [seq] */
  tell(block, kind, words, seq) {
    const story = this.blocks.get(block) ?? [];
    this.blocks.set(block, story);
    const last = story.at(-1);
    const { step } = this.state;
    if (kind === "filled" && last?.kind === kind && last.seq === seq) Object.assign(last, { until: step, words });
    else story.push({ step, until: step, kind, words, seq, number: story.length });
  }

  // {step, top} of the token at `position`, which an ancestor may have sampled; undefined if it is in no record.
  /** @param {State["seqs"]} seqs @param {number} id @param {number} position */
  sampling(seqs, id, position) {
    for (let at = /** @type {number | null} */ (id); at !== null && seqs[at]; at = seqs[at].parent) {
      const found = this.lives.get(at)?.tokens.get(position);
      if (found) return found;
    }
    return undefined;
  }
}

/** @type {{ [T in EventType]?: (history: History, e: EventOf<T>, state: State) => void }} */
const READ = {
  request_added(history, e, { step }) {
    for (const id of e.seq_ids) {
      Object.assign(history.life(id), { arrived: step, max_tokens: e.max_tokens, samples: e.seq_ids.length });
    }
  },
  admitted(history, e, { step, requests }) {
    for (const id of requests[e.request_id]) history.life(id).admitted ??= step;
    history.life(e.seq_id).cached = e.num_cached;
  },
  preempted(history, e, { requests, seqs }) {
    for (const id of requests[e.request_id]) if (!seqs[id].finish_reason) history.life(id).preempted += 1;
  },
  forked(history, e, { step }) {
    const life = history.life(e.child);
    const { arrived, admitted, max_tokens } = history.life(e.parent);
    Object.assign(life, { arrived, admitted, max_tokens, ...life, forked: step });
  },
  sampled(history, e, { step, seqs }) {
    const life = history.life(e.seq_id);
    life.first ??= step;
    life.last = step;
    life.tokens.set(seqs[e.seq_id].tokens.length - 1, { step, top: e.top });
  },
  finished(history, e, { step }) {
    history.life(e.seq_id).finished = step;
  },
  allocated(history, e) {
    history.tell(e.block, "allocated", `handed to ${letter(e.seq_id)} as logical block ${e.logical}`);
  },
  shared(history, e) {
    const why = e.reason === "fork" ? "by a fork" : "found in the prefix cache";
    history.tell(e.block, "shared", `also named by ${letter(e.seq_id)} (${why})`);
  },
  copied(history, e) {
    history.tell(e.src, "copied", `copied to block ${e.dst}, for ${letter(e.seq_id)} to write on`);
    history.tell(e.dst, "copied", `copied from block ${e.src} for ${letter(e.seq_id)}`);
    history.contents.set(e.dst, { seq: e.seq_id, logical: e.logical });
  },
  filled(history, e, { seqs, config }) {
    const size = config.block_size;
    const end = e.start + e.num_tokens;
    for (let logical = Math.floor(e.start / size); logical * size < end; logical += 1) {
      const block = seqs[e.seq_id].table[logical];
      const slots = Math.min(size, end - logical * size);
      history.contents.set(block, { seq: e.seq_id, logical });
      history.tell(block, "filled", `${letter(e.seq_id)} fills it up to ${slots} of ${plural(size, "slot")}`, e.seq_id);
    }
  },
  cached(history, e) {
    history.parents.set(e.prefix, e.parent);
    history.tell(e.block, "cached", `full: enters the prefix cache as prefix ${e.prefix}`);
  },
  evicted(history, e) {
    history.tell(e.block, "evicted", `evicted from the prefix cache, to be used anew${e.reason ? `: ${e.reason}` : ""}`);
    history.contents.delete(e.block);
  },
  predicted(history, e) {
    for (const block of e.blocks) {
      history.tell(block, "predicted", e.discard ? "predicted: not needed again (1)" : "predicted: needed again (0)");
    }
  },
  freed(history, e, { seqs, ref_counts, swap_ref_counts }) {
    const onCpu = seqs[e.seq_id].swap_table.length > 0;
    for (const block of e.blocks) {
      const left = (onCpu ? swap_ref_counts : ref_counts)[block] - 1;
      const rest = left ? `; ${left} still name${left === 1 ? "s" : ""} it` : "";
      history.tell(onCpu ? cpu(block) : block, "freed", `given back by ${letter(e.seq_id)}${rest}`);
    }
  },
  speculated(history, e) {
    for (const block of e.blocks) history.tell(block, "freed", `given back by ${letter(e.seq_id)}: its tokens were guessed wrong`);
  },
  prefix_kept(history, e) {
    for (const block of e.blocks) history.tell(block, "shared", `kept for group ${e.group + 1}`);
  },
  prefix_released(history, e, { ref_counts }) {
    for (const block of e.blocks) {
      const left = ref_counts[block] - 1;
      const rest = left ? `; ${left} still name${left === 1 ? "s" : ""} it` : "";
      history.tell(block, "freed", `no longer kept for group ${e.group + 1}${rest}`);
    }
  },
  swapped_out(history, e) {
    e.blocks.forEach((block, i) => {
      history.tell(block, "swapped", `${letter(e.seq_id)} moves to the CPU, block ${e.swap_blocks[i]} there`);
      history.tell(cpu(e.swap_blocks[i]), "swapped", `takes what ${letter(e.seq_id)} had in block ${block}`);
    });
  },
  swapped_in(history, e) {
    e.blocks.forEach((block, logical) => {
      history.tell(block, "swapped", `${letter(e.seq_id)} comes back from the CPU`);
      history.tell(cpu(e.swap_blocks[logical]), "swapped", `${letter(e.seq_id)} goes back to the pool, to block ${block}`);
      history.contents.set(block, { seq: e.seq_id, logical });
    });
  },
};
