// One plain sentence for every event type, shown when a viewer steps through a step event by event.
// `state` is the state right after the event.

import { letter, list, plural } from "./names.js";

const blocks = (/** @type {number[]} */ ids) => (ids.length ? `block${ids.length > 1 ? "s" : ""} ${list([...new Set(ids)].map(String))}` : "no block");

/** @type {{ [reason: string]: string }} */
const REASON = {
  stop: "has told its story", length: "has reached its length", abort: "was aborted", error: "has failed",
  pruned: "was a beam with too little chance: it is given up",
};

/** @type {{ [T in EventType]: (e: EventOf<T>, state: State) => string }} */
export const TELLING = {
  engine_started: (e) => `The engine starts with ${plural(e.num_blocks, "free block")} of ${plural(e.block_size, "token")} each.`,
  request_added: (e) => `A request of ${plural(e.prompt_token_ids.length, "token")} joins the queue: ${list(e.seq_ids.map(letter))}.`,
  step_started: (e) => `Step ${e.step} begins: the scheduler looks at who is running.`,
  admitted: (e) => `${letter(e.seq_id)} moves from waiting to running` +
    (e.num_cached ? `; ${plural(e.num_cached, "token")} of its prompt were found in the cache.` : "."),
  allocated: (e) => `${letter(e.seq_id)} gets a free block: logical ${e.logical} → physical ${e.block}.`,
  shared: (e, state) => `${letter(e.seq_id)} takes block ${e.block} into its table as well, as logical ${e.logical}: ` +
    `it is now shared ×${state.ref_counts[e.block]}` + (e.reason === "prefix" ? ", found in the prefix cache." : ", nothing is copied."),
  copied: (e, state) => `${letter(e.seq_id)} will write into logical ${e.logical}, so shared block ${e.src} is copied to ` +
    `block ${e.dst}; ${e.src} has ${plural(state.ref_counts[e.src], "owner")} left.`,
  scheduled: (e) => `${letter(e.seq_id)} computes ${e.num_tokens === 1 ? `token ${e.start}` : `tokens ${e.start} to ${e.start + e.num_tokens - 1}`} ` +
    `in this step${e.num_draft ? `; ${e.num_draft} of them are guesses` : e.num_tokens > 1 ? ", a chunk of what it has to read" : ""}.`,
  preempted: (e, state) => `No block is free: ${list((state.requests[e.request_id] ?? []).map(letter))} must step back ` +
    (e.mode === "swap" ? "and move to the CPU." : "and give its blocks up, to recompute them later."),
  swapped_out: (e) => `The KV of ${letter(e.seq_id)} moves from ${blocks(e.blocks)} to the CPU's ${blocks(e.swap_blocks)}.`,
  swapped_in: (e) => `The KV of ${letter(e.seq_id)} comes back from the CPU's ${blocks(e.swap_blocks)} to ${blocks(e.blocks)}.`,
  resumed: (e, state) => `There is room: ${list((state.requests[e.request_id] ?? []).filter((id) => !state.seqs[id].finish_reason).map(letter))} ` +
    "may run again.",
  filled: (e) => `The keys and values of ${letter(e.seq_id)}'s ${e.num_tokens === 1 ? `token ${e.start}` : `tokens ${e.start} to ${e.start + e.num_tokens - 1}`} ` +
    "are in their slots now.",
  cached: (e) => `Block ${e.block} is full: from now on the prefix cache can find it.`,
  evicted: (e) => `Block ${e.block} leaves the prefix cache, to be handed out anew${e.reason ? `: ${e.reason}` : ""}.`,
  predicted: (e) => `A prediction marks cached ${blocks(e.blocks)} with ${e.discard
    ? "1: they will probably not be needed again" : "0: they will probably be needed again"}.`,
  forked: (e) => `${letter(e.child)} forks off ${letter(e.parent)}, and begins as its copy.`,
  sampled: (e) => `${letter(e.seq_id)} writes “${e.text}”.`,
  proposed: (e) => `${letter(e.seq_id)} guesses that “${e.pieces.join("")}” comes next, and computes it along.`,
  speculated: (e) => `Of ${letter(e.seq_id)}'s ${plural(e.proposed, "guessed token")} ${e.accepted} came true` +
    (e.accepted < e.proposed ? `; ${e.proposed - e.accepted} taken back${e.blocks.length ? `, with ${blocks(e.blocks)}` : ""}.` : "."),
  freed: (e) => `${letter(e.seq_id)} gives back ${blocks(e.blocks)}.`,
  finished: (e) => `${letter(e.seq_id)} ${REASON[e.reason] ?? "is done"}.`,
  group_started: (e) => `${plural(e.request_ids.length, "request")} of a batch make group ${e.group + 1}: they begin with the ` +
    `same ${plural(e.num_blocks, "block")}, which shall be computed once.`,
  prefix_kept: (e) => `Group ${e.group + 1} keeps its common beginning, ${blocks(e.blocks)}, for those of it who wait.`,
  prefix_released: (e) => `Group ${e.group + 1} gives up the beginning that it has kept: ${blocks(e.blocks)}.`,
  group_ended: (e) => `All of group ${e.group + 1} have ended.`,
  step_finished: (e) => `Step ${e.step} is done: ${plural(e.num_tokens, "token")} in ${(1000 * e.seconds).toFixed(1)} ms.`,
  engine_error: (e) => `Something went wrong: ${e.message}.`,
};

/** @param {EngineEvent} event @param {State} state @returns {string} */
export const describe = (event, state) => /** @type {Handler} */ (TELLING[event.type])?.(event, state) ?? event.type;
