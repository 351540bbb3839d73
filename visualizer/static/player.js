// The viewer's own copy of the run: records, keyframes, and the state at the position that the page shows.
// This object follows live, freezes, steps and seeks; none of that affects the engine.

import { marksOf } from "./marks.js";
import { tell } from "./narration.js";
import { Record } from "./record.js";
import { State, measure } from "./reducer.js";

const KEYFRAME_EVERY = 200; // records: applying them takes a few milliseconds; a keyframe takes up to half a megabyte
const MAX_RECORDS = 6 * KEYFRAME_EVERY; // a minute at 20 steps a second; older records are dropped to bound the memory
const REPLAY_RATE = 12; // records per second when replaying
// The most important events last only one step. While following live, the view pauses on them (for this many
// milliseconds), then catches up. A mark that repeats within RESTED milliseconds gets no other pause.
/** @type {{ [mark: string]: number }} */
const REST = { forked: 1100, copied: 1100, hit: 1100, preempted: 1400, swapped_out: 1400, swapped_in: 1100 };
const RESTED = 6000;

export class Player {
  // `begin` sets these.
  /** @type {string | null} */
  run;
  /** @type {number} */
  first; // number of the oldest record that is kept
  /** @type {RunRecord[]} */
  records;
  /** @type {Map<number, string>} */
  keyframes; // number -> state before that record, as JSON
  /** @type {State} */
  head; // the state after the newest record
  /** @type {State} */
  state; // the state at `position`, which the page shows
  /** @type {number} */
  position; // number of the next record to apply to `state`
  /** @type {number} */
  sub; // number of events of that record already applied to `state`, when stepping event by event
  /** @type {{ [mark: string]: number }} */
  restedAt; // mark -> the time when the view last paused on one
  /** @type {boolean} */
  stale; // see `changed`
  /** @type {Player | null} */
  next = null; // another run that has begun while the viewer looks at a moment of this one
  restUntil = 0; // when following live: the time until which the view pauses on a mark
  nextAt = 0; // when replaying: the time when the next record is due

  constructor() {
    /** @type {"live" | "frozen" | "replaying"} */
    this.mode = "live";
    this.speed = 1; // factor on REPLAY_RATE
    this.recording = false; // whether a recording is shown: then there is no live run to return to
    this.wake = () => {}; // called when there is something to draw
    this.begin(null, 0, new State());
  }

  /** @param {string | null} run @param {number} first @param {State} state */
  begin(run, first, state) {
    this.next = null;
    this.run = run;
    this.first = first;
    this.records = [];
    this.keyframes = new Map([[first, JSON.stringify(state)]]);
    this.head = State.from(state);
    this.state = State.from(state);
    this.position = first;
    this.sub = 0;
    this.restUntil = 0;
    this.restedAt = {};
    this.nextAt = 0;
    this.changed = true;
    if (this.mode === "replaying") this.mode = "live";
  }

  // Whether the page must be drawn again.
  get changed() {
    return this.stale;
  }

  set changed(stale) {
    this.stale = stale;
    if (stale) this.wake();
  }

  get end() {
    return this.first + this.records.length;
  }

  // The events that led to the shown state: those of the last record, or the last event when stepping event by event.
  get latest() {
    if (this.sub) return [this.records[this.position - this.first].events[this.sub - 1]];
    return this.current?.events ?? [];
  }

  // The newest record that `state` contains.
  /** @returns {RunRecord | undefined} */
  get current() {
    return this.records[this.position - this.first - 1];
  }

  // What the next answer to a pull continues.
  /** @returns {Player} */
  get newest() {
    return this.next ?? this;
  }

  // Whether the view stands at the newest moment, which is what the engine's status is about.
  get atEnd() {
    return this.position >= this.end && !this.next;
  }

  // Reads the answer to a pull. An answer with a keyframe (another run, or a cursor too old) starts the player over; but
  // who looks at an earlier moment keeps it, until `live` leads to the other run.
  /** @param {Answer} answer */
  receive(answer) {
    const another = answer.keyframe && answer.run !== this.run;
    if (another && !this.next && this.run !== null && this.mode !== "live" && this.records.length) this.next = new Player();
    if (this.next) {
      this.next.receive(answer);
      this.changed = true;
      return;
    }
    if (answer.keyframe) {
      this.begin(answer.run ?? null, answer.first, State.from(answer.keyframe));
      // A viewer who joins late sees the live state first, and can rewind from there.
      answer.records.forEach((events, i) => this.ingest(events, answer.rss?.[i]));
      this.seekTo(this.end);
    } else if (answer.first === this.end) {
      answer.records.forEach((events, i) => this.ingest(events, answer.rss?.[i]));
    }
  }

  /** @param {EngineEvent[]} events @param {number} [rss] */
  ingest(events, rss) {
    for (const event of events) this.head.apply(event);
    const told = tell({ events }, this.head);
    this.records.push(new Record({ events, marks: marksOf(events), metrics: measure(this.head), told, rss }));
    if (this.end % KEYFRAME_EVERY === 0) this.keyframes.set(this.end, JSON.stringify(this.head));
    if (this.records.length > MAX_RECORDS && !this.recording) this.forgetOldest();
  }

  // Loads a whole recording: `records` are lists of events; the very first event is engine_started.
  /** @param {string} run @param {EngineEvent[][]} records */
  load(run, records) {
    this.recording = true;
    this.begin(run, 0, new State());
    for (const events of records) this.ingest(events);
    this.seekTo(1);
    this.mode = "replaying";
  }

  // Drops the recording; the next pull fetches the live run.
  unload() {
    this.recording = false;
    this.mode = "live";
    this.begin(null, 0, new State());
  }

  forgetOldest() {
    const next = Math.min(...[...this.keyframes.keys()].filter((number) => number > this.first));
    this.records.splice(0, next - this.first);
    this.keyframes.delete(this.first);
    this.first = next;
    if (this.position < next) this.seekTo(next);
  }

  // --- moving the view ---

  applyNext() {
    const record = this.records[this.position - this.first];
    for (const event of record.events.slice(this.sub)) this.state.apply(event);
    this.sub = 0;
    this.position += 1;
    this.changed = true;
    return record;
  }

  // Moves the view to right before record `target`, and then `sub` events into it.
  /** @param {number} target */
  seekTo(target, sub = 0) {
    const number = Math.max(this.first, Math.min(this.end, target));
    const back = number < this.position || (number === this.position && sub < this.sub);
    const forgotten = this.position < this.first; // the records after the shown state are gone
    if (back || forgotten || number - this.position > KEYFRAME_EVERY) {
      const start = Math.max(...[...this.keyframes.keys()].filter((key) => key <= number));
      this.state = State.from(this.keyframe(start));
      this.position = start;
      this.sub = 0;
    }
    while (this.position < number) this.applyNext();
    const events = sub ? this.records[number - this.first]?.events ?? [] : [];
    while (this.sub < Math.min(sub, events.length - 1)) this.state.apply(events[this.sub++]);
    this.changed = true;
  }

  // The state before a record that has a keyframe.
  /** @param {number} number @returns {State} */
  keyframe(number) {
    return JSON.parse(/** @type {string} */ (this.keyframes.get(number)));
  }

  freeze() {
    this.mode = "frozen";
    this.changed = true;
  }

  /** @param {number} target */
  seek(target, sub = 0) {
    this.freeze();
    this.seekTo(target, sub);
  }

  // Steps by records. Within a record, a step back goes to the record's beginning.
  /** @param {number} count */
  stepBy(count) {
    this.seek(this.position + count + (this.sub && count < 0 ? 1 : 0));
  }

  // Steps one event forward (1) or back (-1).
  /** @param {number} count */
  stepEvent(count) {
    const events = (/** @type {number} */ number) => this.records[number - this.first].events.length;
    if (count > 0 && this.position < this.end) {
      const last = this.sub + 1 >= events(this.position);
      this.seek(this.position + (last ? 1 : 0), last ? 0 : this.sub + 1);
    } else if (count < 0 && this.sub) {
      this.seek(this.position, this.sub - 1);
    } else if (count < 0 && this.position > this.first) {
      this.seek(this.position - 1, events(this.position - 1) - 1);
    } else {
      this.freeze();
    }
  }

  // Plays on from the current position; at the end, follows live again, or replays a recording from its beginning.
  play() {
    if (this.recording && this.position >= this.end) this.seekTo(this.first);
    this.mode = this.position >= this.end ? "live" : "replaying";
    this.changed = true;
  }

  live() {
    if (this.next) {
      const { run, first, records, keyframes, head } = this.next;
      this.begin(run, first, head);
      Object.assign(this, { records, keyframes, position: first + records.length });
    }
    this.mode = this.recording ? "frozen" : "live";
    this.restUntil = 0;
    this.seekTo(this.end);
  }

  // Milliseconds until the next record is due; Infinity if none is due until a viewer acts or new records arrive.
  /** @param {number} now */
  wait(now) {
    if (this.mode === "frozen" || (this.position >= this.end && this.mode === "live")) return Infinity;
    return Math.max(0, (this.mode === "live" ? this.restUntil : this.nextAt) - now);
  }

  // Applies the records that are due. Called before a frame is drawn.
  /** @param {number} now */
  advance(now) {
    if (this.mode === "frozen" || this.position >= this.end) {
      if (this.mode === "replaying") this.live();
      return;
    }
    if (this.mode === "replaying") {
      const pause = 1000 / (REPLAY_RATE * this.speed);
      this.nextAt = Math.max(this.nextAt, now - 100); // after a pause: continue without catching up
      for (; now >= this.nextAt && this.position < this.end; this.nextAt += pause) this.applyNext();
      return;
    }
    if (now < this.restUntil) return;
    // Catch up with a backlog (after a pause, or in a hidden tab) smoothly, but skip a very large one at once.
    const backlog = this.end - this.position;
    if (backlog > 300) return this.seekTo(this.end);
    for (let budget = Math.ceil(backlog / 10); budget > 0; budget -= 1) {
      const due = this.applyNext().marks.filter((mark) => mark in REST && now - (this.restedAt[mark] ?? -RESTED) >= RESTED);
      if (!due.length || backlog >= 100) continue;
      for (const mark of due) this.restedAt[mark] = now;
      this.restUntil = now + Math.max(...due.map((mark) => REST[mark]));
      return;
    }
  }
}
