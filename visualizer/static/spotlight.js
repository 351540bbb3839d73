// The spotlight: what stays bright while the rest is dimmed: the hovered or clicked item, and what belongs to it.

import { slotOf } from "./parts.js";

// `what` combines {seq}, {block}, {swap} (a block on the CPU), {token} and the `offset` of a slot. Returns null if it
// does not exist in `state`; otherwise `what` with the sets of its sequences, blocks and swap blocks.
/** @param {Picked | null} what @param {State} state @returns {Lit | null} */
export function spotlight(what, state) {
  if (!what) return null;
  const { seqs } = state;
  if (what.seq === undefined) {
    const name = what.swap === undefined ? "table" : "swap_table";
    const block = what.swap ?? what.block ?? NaN;
    const sharers = Object.keys(seqs).map(Number).filter((id) => seqs[id][name].includes(block));
    return { ...what, seqs: new Set(sharers), ...only(what) };
  }
  const seq = seqs[what.seq];
  if (!seq) return null;
  return {
    ...what, ...placeOf(state, seq, what),
    seqs: new Set([what.seq]), blocks: new Set(seq.table), swaps: new Set(seq.swap_table),
  };
}

const only = (/** @type {Picked} */ { block, swap }) => ({
  blocks: new Set(block === undefined ? [] : [block]),
  swaps: new Set(swap === undefined ? [] : [swap]),
});

// The slot of a token's KV, in the pool or on the CPU.
/** @param {State} state @param {Seq} seq @param {Picked} what */
function placeOf(state, seq, { token }) {
  if (token === undefined) return {};
  const size = state.config.block_size;
  const swap = token < seq.num_computed ? seq.swap_table[Math.floor(token / size)] : undefined;
  return swap === undefined ? slotOf(state, seq, token) ?? {} : { swap, offset: token % size };
}

// The tokens [start, end) of a sequence that are in the highlighted block; null if there are none.
/** @param {Lit} lit @param {Seq} seq @param {number} size @returns {[number, number] | null} */
export function tokensIn(lit, seq, size) {
  const logical = lit.swap === undefined ? seq.table.indexOf(lit.block ?? NaN) : seq.swap_table.indexOf(lit.swap);
  const end = Math.min((logical + 1) * size, seq.num_computed);
  return logical < 0 || end <= logical * size ? null : [logical * size, end];
}
