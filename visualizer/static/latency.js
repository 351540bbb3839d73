// Latency: the time to first token (TTFT) of each request, and the inter-token latency (ITL) of each sequence. The
// clock is the sum of the steps' durations, so time in the queue and time preempted count, but the page's rate and
// pauses do not. So a recording shows the same latency as the run.

const RECENT = 256; // the latest inter-token gaps, from which the percentiles are taken
const PERCENTILES = { p50: 0.5, p95: 0.95, p99: 0.99 };

export class Latency {
  constructor() {
    this.clock = 0; // milliseconds
    /** @type {Map<number, { at: number, served: boolean }>} */
    this.asked = new Map(); // sequence -> its request's clock at arrival, and whether its first token has come
    /** @type {Map<number, number>} */
    this.last = new Map(); // sequence -> the clock at its newest token
    /** @type {{ number: number, step: number, seq: number, ms: number }[]} */
    this.firsts = []; // the requests' first tokens
    /** @type {number[]} */
    this.gaps = [];
    /** @type {number[]} */
    this.ended = []; // sequences that have finished since the last step
    /** @type {number[]} */
    this.batch = []; // sequences that got a token in the current step
    /** @type {{ [name: string]: number | null }} */
    this.now = { p50: null, p95: null, p99: null };
  }

  // Reads a record's events; returns the percentiles after it, in milliseconds.
  /** @param {EngineEvent[]} events @param {number} number */
  read(events, number) {
    for (const event of events) /** @type {Handler | undefined} */ (READ[event.type])?.(this, event, number);
    return this.now;
  }

  /** @param {number} before */
  forget(before) {
    if (this.firsts[0]?.number < before) this.firsts = this.firsts.filter(({ number }) => number >= before);
  }

  // The median TTFT of the requests whose first token came before record `end`, and their number.
  /** @param {number} end */
  median(end) {
    const known = this.firsts.filter(({ number }) => number < end).map(({ ms }) => ms).sort((a, b) => a - b);
    return { count: known.length, ms: percentile(known, 0.5) };
  }

  // Called when a step has finished, since that is when a client receives the step's tokens.
  /** @param {number} id @param {number} step @param {number} number */
  written(id, step, number) {
    const request = this.asked.get(id);
    if (request && !request.served) this.firsts.push({ number, step, seq: id, ms: this.clock - request.at });
    if (request) request.served = true;
    const last = this.last.get(id);
    if (last !== undefined) this.gaps.push(this.clock - last);
    this.last.set(id, this.clock);
  }
}

/** @type {{ [T in EventType]?: (latency: Latency, e: EventOf<T>, number: number) => void }} */
const READ = {
  step_started(latency) {
    latency.batch = [];
  },
  request_added(latency, e) {
    const request = { at: latency.clock, served: false };
    for (const id of e.seq_ids) latency.asked.set(id, request);
  },
  forked(latency, e) {
    const [request, last] = [latency.asked.get(e.parent), latency.last.get(e.parent)];
    if (request) latency.asked.set(e.child, request);
    if (last !== undefined) latency.last.set(e.child, last);
  },
  sampled(latency, e) {
    latency.batch.push(e.seq_id);
  },
  step_finished(latency, e, number) {
    latency.clock += 1000 * e.seconds;
    for (const id of latency.batch) latency.written(id, e.step, number);
    for (const id of latency.ended) {
      latency.last.delete(id);
      latency.asked.delete(id);
    }
    Object.assign(latency, { batch: [], ended: [] });
    latency.gaps.splice(0, Math.max(0, latency.gaps.length - RECENT));
    const sorted = [...latency.gaps].sort((a, b) => a - b);
    latency.now = Object.fromEntries(Object.entries(PERCENTILES).map(([name, share]) => [name, percentile(sorted, share)]));
  },
  finished(latency, e) {
    latency.ended.push(e.seq_id);
  },
};

// The smallest of the sorted numbers that is not exceeded by the given share of them; null if there are none.
/** @param {number[]} sorted @param {number} share */
function percentile(sorted, share) {
  return sorted.length ? sorted[Math.ceil(share * sorted.length) - 1] : null;
}
