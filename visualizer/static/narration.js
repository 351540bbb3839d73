// The narration: one sentence for the most important event of the latest records.

import { describe } from "./telling.js";
import { letter, list, plural } from "./names.js";
import { reservesAhead } from "./reducer.js";

// Event types, most important first.
/** @type {EventType[]} */
const ORDER = [
  "engine_error", "preempted", "resumed", "copied", "forked", "shared", "admitted", "finished", "request_added",
  "evicted", "predicted", "speculated", "allocated", "sampled",
];
const WINDOW = 14; // records for which a sentence stays while less important ones follow

// A handler returns the sentence's kind and text, or null if the event is not worth one.
/** @typedef {{ events: EngineEvent[] }} Events */
/** @type {{ [T in EventType]?: (e: EventOf<T>, record: Events, state: State) => [kind: string, text: string] | null }} */
const TELL = {
  engine_error(e) {
    const aborted = e.message.startsWith("step "); // the engine's own message; others are bugs, or a lab's broken rule
    const after = aborted ? " Its requests were aborted; the engine goes on." : "";
    return ["error", `Something went wrong: ${e.message}.${after}`];
  },

  preempted(e, record, state) {
    const ids = state.requests[e.request_id] ?? [];
    if (e.mode === "swap") return swappedOut(record, ids);
    const freed = only(record, "freed").filter((x) => ids.includes(x.seq_id));
    const blocks = new Set(freed.flatMap((x) => x.blocks)).size;
    return ["preemption", `The pool is full. ${names(ids)} came last, so ${ids.length > 1 ? "they give" : "it gives"} ` +
      `${plural(blocks, "block")} back and wait${ids.length > 1 ? "" : "s"}; the text is kept, its KV is recomputed later.`];
  },

  resumed(e, record) {
    const back = only(record, "swapped_in").filter((x) => comesWith(record, e).has(x.seq_id));
    return ["swap in", `There is room again: ${names(back.map((x) => x.seq_id))} ${back.length > 1 ? "come" : "comes"} ` +
      `back from the CPU, to ${plural(distinct(back), "block")} that may be others than before. Nothing is recomputed.`];
  },

  copied(e, record) {
    const copies = only(record, "copied").filter((x) => x.src === e.src);
    if (copies.length > 1) {
      return ["copy-on-write", `${names(copies.map((x) => x.seq_id))} are about to write into block ${e.src}, which ` +
        `is shared: each gets a copy of its own, blocks ${list(copies.map((x) => String(x.dst)))}.`];
    }
    return ["copy-on-write", `${letter(e.seq_id)} is about to write into block ${e.src}, which others read too: ` +
      `it gets a copy of its own, block ${e.dst}.`];
  },

  forked(e, record, state) {
    const children = only(record, "forked").map((x) => x.child);
    const blocks = state.seqs[e.parent]?.table.length ?? 0;
    if (state.requests[e.request_id]?.[0] === e.child) { // its own request: a viewer requested the fork
      return ["fork", `${letter(e.child)} is a second way on for ${letter(e.parent)}: they share ` +
        `${plural(blocks, "block")} until one of them writes, and nothing is copied.`];
    }
    const pruned = only(record, "finished").filter((x) => x.reason === "pruned");
    if ((state.seqs[e.parent]?.tokens.length ?? 0) > (state.seqs[e.parent]?.num_prompt ?? 0) + 1 || pruned.length) {
      return ["fork", describe(e, state) + (pruned.length ? ` ${describe(pruned[0], state)}` : "")];
    }
    return ["fork", `${names([e.parent, ...children])} start from one prompt: they share its ` +
      `${plural(blocks, "block")}, and nothing is copied.`];
  },

  evicted: (e) => ["eviction", `No free block is left, so cached block ${e.block} is emptied and used again` +
    `${e.reason ? `. Why this one: ${e.reason}` : ""}.`],

  predicted: (e, record, state) => e.blocks.length ? ["prediction", describe(e, state)] : null,

  shared(e, record, state) {
    if (e.reason !== "prefix") return null;
    const count = only(record, "shared").filter((x) => x.seq_id === e.seq_id).length;
    if (isBack(state.seqs[e.seq_id])) {
      return ["resume", `${letter(e.seq_id)} comes back, and ${plural(count, "block")} of its KV ` +
        `${count === 1 ? "was" : "were"} still cached: only the rest is computed again.`];
    }
    const tokens = count * state.config.block_size;
    return ["prefix cache", `${letter(e.seq_id)} begins like something seen before: ${plural(tokens, "token")} from the cache, ` +
      `in ${plural(count, "block")} that ${count === 1 ? "is" : "are"} found, not computed.`];
  },

  admitted(e, record, state) {
    const seq = state.seqs[e.seq_id];
    if (!seq) return null;
    if (reservesAhead(state) && seq.table.length) {
      return ["admit", `${letter(e.seq_id)} joins the batch: ${plural(seq.table.length, "neighbouring block")} are set aside for ` +
        `all it may ever write, ${seq.table[0]} to ${seq.table.at(-1)}.`];
    }
    return isBack(seq)
      ? ["resume", `There is room again: ${letter(e.seq_id)} comes back and recomputes its KV, up to where it was.`]
      : ["admit", `${letter(e.seq_id)} joins the batch: its ${plural(seq.num_prompt, "prompt token")} fill their blocks first.`];
  },

  finished(e, record, state) {
    if (e.reason === "pruned") return ["finish", describe(e, state)];
    const freed = only(record, "freed").find((x) => x.seq_id === e.seq_id);
    const why = ENDED[e.reason] ?? "is done";
    const gives = freed ? ` and gives back ${plural(freed.blocks.length, "block")}` : "";
    return ["finish", `${letter(e.seq_id)} ${why}${gives}.`];
  },

  request_added: (e) => ["arrival", `A new request is waiting: ${names(e.seq_ids)}.`],

  speculated(e, record, state) {
    const all = only(record, "speculated");
    const best = all.reduce((a, b) => (b.accepted > a.accepted ? b : a));
    if (all.length > 1 && best !== e) return TELL.speculated?.(best, { events: [best] }, state) ?? null;
    const [right, wrong] = [e.accepted, e.proposed - e.accepted];
    const back = wrong ? `; ${plural(wrong, "token")} ${wrong === 1 ? "is" : "are"} taken back` +
      (e.blocks.length ? `, and ${plural(e.blocks.length, "block")} with ${wrong === 1 ? "it" : "them"}.` : ".") : ".";
    return ["speculation", right
      ? `${letter(e.seq_id)} guessed ${plural(e.proposed, "token")}, and ${right} came true: ${right + 1} tokens in one step${back}`
      : `${letter(e.seq_id)} guessed ${plural(e.proposed, "token")}, and none came true${back}`];
  },

  allocated(e) {
    return ["allocate", e.logical === 0
      ? `${letter(e.seq_id)} gets its first block: logical 0 → physical ${e.block}.`
      : `${letter(e.seq_id)} has filled its last block and gets one more: logical ${e.logical} → physical ${e.block}.`];
  },

  sampled(e, record) {
    const count = only(record, "sampled").length;
    return ["write", count === 1
      ? `${letter(e.seq_id)} writes one token into its last block; no block changes hands.`
      : `${count} sequences write one token each into their last blocks; no block changes hands.`];
  },
};

/** @type {{ [reason: string]: string }} */
const ENDED = { stop: "has told its story", length: "has reached its length", abort: "was aborted" };

/**
 * The record's events of one type.
 * @template {EventType} T
 * @param {Events} record
 * @param {T} type
 */
const only = (record, type) => /** @type {EventOf<T>[]} */ (record.events.filter((x) => x.type === type));

const distinct = (/** @type {{ blocks: number[] }[]} */ events) => new Set(events.flatMap((x) => x.blocks)).size;

// The sequences that return with this `resumed` event: those swapped in after it and before the next one.
/** @param {Events} record @param {Resumed} resumed */
function comesWith(record, resumed) {
  const after = record.events.slice(record.events.indexOf(resumed) + 1);
  const end = after.findIndex((x) => x.type === "resumed");
  const events = end < 0 ? after : after.slice(0, end);
  return new Set(only({ events }, "swapped_in").map((x) => x.seq_id));
}

/** @param {Events} record @param {number[]} ids @returns {[string, string]} */
function swappedOut(record, ids) {
  const out = only(record, "swapped_out").filter((x) => ids.includes(x.seq_id));
  const many = out.length > 1;
  return ["swap out", `The pool is full. ${names(out.map((x) => x.seq_id))} came last, so the KV of ${many ? "their" : "its"} ` +
    `${plural(distinct(out), "block")} moves to the CPU and waits there; nothing will have to be recomputed.`];
}

// Whether an admitted sequence was preempted before: it has more tokens than its prompt and this step's token.
const isBack = (/** @type {Seq | undefined} */ seq) => seq !== undefined && seq.tokens.length > seq.num_prompt + 1;
const names = (/** @type {number[]} */ ids) => list(ids.map(letter));

// The sentence of a record's most important event, or null. `state` is the state after the record.
/** @param {Events} record @param {State} state @returns {Told | null} */
export function tell(record, state) {
  for (const type of ORDER) {
    const handler = /** @type {Handler} */ (TELL[type]);
    for (const event of record.events) {
      const told = event.type === type && handler(event, record, state);
      if (told) return { kind: told[0], text: told[1], rank: ORDER.indexOf(type), type: sourceOf(event) };
    }
  }
  return null;
}

// The key of the event's function in the server's list of sources (sources.py).
export const sourceOf = (/** @type {EngineEvent} */ event) =>
  event.type === "shared" && event.reason === "prefix" ? "shared_prefix" : event.type;

// The sentence to show: an important one stays for a while; a frozen view shows that of its own record or event.
/** @param {Player} player @returns {Sentence | null} */
export function narrate(player) {
  if (player.sub) return tellOne(player.latest[0], player.state, player);
  const last = player.position - player.first - 1;
  if (last < 0) return null;
  if (player.mode === "frozen") return player.records[last].told;
  /** @type {Told | null} */
  let best = null;
  for (let i = last; i >= Math.max(0, last - WINDOW); i -= 1) {
    const { told } = player.records[i];
    if (told && (!best || told.rank < best.rank)) best = told;
  }
  return best;
}

// The sentence for a single event, when the viewer steps through a record event by event.
/** @param {EngineEvent} event @param {State} state @param {Player} player @returns {Sentence} */
function tellOne(event, state, { sub, records, position, first }) {
  const count = records[position - first].events.length;
  return { kind: event.type.replaceAll("_", " "), text: `${sub} of ${count}: ${describe(event, state)}`, type: sourceOf(event) };
}
