// Collects the charts' data from the player's records: one point per record (batch, time, latency, prefix cache), and
// the spans of steps that each sequence spent waiting, in prefill, in decode or preempted.

import { Latency } from "./latency.js";

const SMOOTH = 12; // steps over which tokens per second are averaged

/** @typedef {"waiting" | "prefill" | "decode" | "preempted" | "swapped"} Phase */
/** @typedef {{ name: Phase, from: number, to: number | null }} Span */
/**
 * A sequence's spans of steps; the last one is open until the sequence has ended.
 * @typedef {{ request: string, prompt: number, length: number, spans: Span[], ended: number | null, reason?: string }} Life
 */
/**
 * What the charts draw of a record. The first line adds up over the run, but for `ms` and `rate`.
 * @typedef {{
 *   step: number, hit: number, known: number, evicted: number, cached: number, ms: number | null, rate: number | null,
 *   prefill: number, decode: number, evictions: number, p50: number | null, p95: number | null, p99: number | null,
 * }} Point
 */

export class History {
  // `begin` sets these.
  /** @type {Map<number, Life>} */
  seqs;
  /** @type {number} */
  step;
  /** @type {Pick<Point, "step" | "hit" | "known" | "evicted" | "cached" | "ms" | "rate">} */
  now;
  /** @type {[tokens: number, seconds: number][]} */
  recent;
  /** @type {Latency} */
  latency;

  constructor() {
    /** @type {RunRecord[] | null} */
    this.records = null; // the player's records of the run that this covers
    this.first = 0;
    /** @type {Point[]} */
    this.points = [];
  }

  get end() {
    return this.first + this.points.length;
  }

  // The point of the last record before a position.
  /** @param {number} position */
  at(position) {
    return this.points[position - 1 - this.first];
  }

  // Reads the player's new records; starts over if they do not continue the known ones.
  /** @param {Player} player */
  follow(player) {
    if (this.records !== player.records || player.first > this.end) this.begin(player);
    this.points.splice(0, player.first - this.first);
    this.latency.forget(player.first);
    if (player.first > this.first) this.forget(this.points[0]?.step ?? this.step);
    this.first = player.first;
    for (const record of player.records.slice(this.end - player.first)) this.points.push(this.read(record));
  }

  // Drops the sequences that ended before a step.
  /** @param {number} step */
  forget(step) {
    for (const [id, { ended }] of this.seqs) if (ended !== null && ended < step) this.seqs.delete(id);
  }

  /** @param {Player} player */
  begin(player) {
    const state = player.keyframe(player.first);
    this.records = player.records;
    this.first = player.first;
    this.points = [];
    this.seqs = new Map();
    this.step = state.step - (Object.keys(state.seqs).length ? 0 : 1);
    this.now = { step: this.step, hit: 0, known: 0, evicted: 0, cached: Object.keys(state.cached).length, ms: null, rate: null };
    this.recent = [];
    this.latency = new Latency();
    for (const [id, seq] of Object.entries(state.seqs)) {
      if (seq.finish_reason) continue;
      this.add(Number(id), seq.request_id, seq.num_prompt, seq.tokens.length);
      const idle = seq.tokens.length > seq.num_prompt ? "preempted" : "waiting";
      const name = state.swapped.includes(seq.request_id) ? "swapped" : seq.table.length ? "decode" : idle;
      this.span(Number(id), name, this.step);
    }
  }

  /** @param {RunRecord} record */
  read({ events }) {
    /** @type {Point} */
    const point = { ...this.now, prefill: 0, decode: 0, ms: null, rate: null, evictions: 0, p50: null, p95: null, p99: null };
    for (const event of events) /** @type {Handler | undefined} */ (READ[event.type])?.(this, event, point);
    point.step = this.step;
    Object.assign(point, this.latency.read(events, this.end));
    point.rate ??= this.rate();
    const { step, hit, known, evicted, cached, ms, rate } = point;
    this.now = { step, hit, known, evicted, cached, ms, rate };
    return point;
  }

  rate() {
    const seconds = this.recent.reduce((sum, [, time]) => sum + time, 0);
    return seconds > 0 ? this.recent.reduce((sum, [tokens]) => sum + tokens, 0) / seconds : null;
  }

  // --- sequences ---

  /** @param {number} id @param {string} request @param {number} prompt @param {number} length */
  add(id, request, prompt, length) {
    this.seqs.set(id, { request, prompt, length, spans: [], ended: null });
  }

  /** @param {number} id @param {Phase} name @param {number} from */
  span(id, name, from) {
    const seq = this.seqs.get(id);
    if (!seq || seq.ended !== null) return;
    const last = seq.spans.at(-1);
    if (last?.name === name) return;
    if (last) last.to = from;
    if (last && last.from === from) seq.spans.pop(); // it lasted less than a step
    seq.spans.push({ name, from, to: null });
  }

  /** @param {string} request */
  of(request) {
    return [...this.seqs].filter(([, seq]) => seq.request === request).map(([id]) => id);
  }
}

// Event handlers, by event type; the charts need no other events.
/** @type {{ [T in EventType]?: (history: History, e: EventOf<T>, point: Point) => void }} */
const READ = {
  step_started(history, e) {
    history.step = e.step;
  },
  request_added(history, e) {
    for (const id of e.seq_ids) {
      history.add(id, e.request_id, e.prompt_token_ids.length, e.prompt_token_ids.length);
      history.span(id, "waiting", history.step + 1);
    }
  },
  admitted(history, e, point) {
    point.known += history.seqs.get(e.seq_id)?.length ?? 0;
    point.hit += e.num_cached;
  },
  forked(history, e) {
    const parent = history.seqs.get(e.parent);
    if (parent && !history.seqs.has(e.child)) history.add(e.child, e.request_id, parent.prompt, parent.length);
    history.span(e.child, "decode", history.step);
  },
  scheduled(history, e, point) {
    const seq = history.seqs.get(e.seq_id);
    const decodes = e.num_tokens - (e.num_draft ?? 0) === 1 && e.start >= (seq?.prompt ?? 0);
    point[decodes ? "decode" : "prefill"] += e.num_tokens;
    history.span(e.seq_id, decodes ? "decode" : "prefill", history.step);
  },
  preempted(history, e) {
    for (const id of history.of(e.request_id)) {
      history.span(id, e.mode === "swap" ? "swapped" : "preempted", history.step);
    }
  },
  resumed(history, e) {
    for (const id of history.of(e.request_id)) history.span(id, "decode", history.step);
  },
  sampled(history, e) {
    const seq = history.seqs.get(e.seq_id);
    if (seq) seq.length += 1;
  },
  finished(history, e) {
    const seq = history.seqs.get(e.seq_id);
    if (!seq) return;
    seq.ended = history.step + 1;
    seq.reason = e.reason;
    const last = seq.spans.at(-1);
    if (last) last.to = seq.ended;
  },
  cached(history, e, point) {
    point.cached += 1;
  },
  evicted(history, e, point) {
    point.cached -= 1;
    point.evicted += 1;
    point.evictions += 1;
  },
  step_finished(history, e, point) {
    point.ms = 1000 * e.seconds;
    history.recent.push([e.num_tokens, e.seconds]);
    if (history.recent.length > SMOOTH) history.recent.shift();
    point.rate = history.rate();
  },
};
