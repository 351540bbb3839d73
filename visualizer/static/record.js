// One record of what a viewer can rewind to: a step's events, and what was made of them when they came.
//
// There are more than a thousand, and as objects the events would take twice the memory. So they are kept as JSON, and
// parsed again when somebody looks; whoever looks twice before the next collection finds the same objects.

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
