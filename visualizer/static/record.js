// One record that a viewer can rewind to: a step's events, and what was computed from them when they arrived.
//
// The player keeps over a thousand records, and as objects their events would take twice the memory. So they are stored
// as JSON and parsed on access; the parsed objects are reused until the garbage collector frees them.

export class Record {
  #text;
  #events;

  constructor({ events, ...rest }) {
    Object.assign(this, rest);
    this.#text = JSON.stringify(events);
    this.#events = new WeakRef(events);
  }

  get events() {
    let events = this.#events.deref();
    if (!events) {
      events = JSON.parse(this.#text);
      this.#events = new WeakRef(events);
    }
    return events;
  }
}
