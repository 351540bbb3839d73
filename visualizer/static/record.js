// One record that a viewer can rewind to: a step's events, and what was computed from them when they arrived.
//
// The player keeps over a thousand records, and as objects their events would take twice the memory. So they are stored
// as JSON and parsed on access; the parsed objects are reused until the garbage collector frees them.

export class Record {
  #text;
  /** @type {WeakRef<EngineEvent[]>} */
  #events;

  /** @param {{ events: EngineEvent[], marks: string[], metrics: Metrics, told: Told | null, rss?: number }} about */
  constructor({ events, marks, metrics, told, rss }) {
    this.marks = marks;
    this.mark = marks.at(0); // the most important one
    this.metrics = metrics;
    this.told = told;
    this.rss = rss; // the process' resident memory after it, in MiB; recordings do not have it
    this.#text = JSON.stringify(events);
    this.#events = new WeakRef(events);
  }

  /** @returns {EngineEvent[]} */
  get events() {
    const kept = this.#events.deref();
    if (kept) return kept;
    const events = JSON.parse(this.#text);
    this.#events = new WeakRef(events);
    return events;
  }
}
