// The viewer's own copy of what happened: records, keyframes, and the state at the moment being looked at.
// Following live, freezing, stepping and seeking are this object's business; the engine notices none of it.

import { marksOf } from "./marks.js";
import { tell } from "./narration.js";
import { Record } from "./record.js";
import { State, measure } from "./reducer.js";

const KEYFRAME_EVERY = 200; // records: to apply so many takes some milliseconds, while a keyframe is up to half a megabyte
const MAX_RECORDS = 6 * KEYFRAME_EVERY; // a minute at 20 steps a second; memory grows until then, and not beyond
const REPLAY_RATE = 12; // records per second when playing what is past
// Some moments last one step and are the point of the whole page: while following live, the view rests on them
// (milliseconds), then catches up. Not on every one of a series: what repeats at once has been seen.
const REST = { forked: 1100, copied: 1100, hit: 1100, preempted: 1400, swapped_out: 1400, swapped_in: 1100 };
const RESTED = 6000;

export class Player {
  constructor() {
    this.mode = "live"; // "live", "frozen" or "replaying"
    this.speed = 1; // of replaying
    this.recording = false; // what is shown comes from a file: there is no live to go back to
    this.wake = () => {}; // called when there is something to draw
    this.begin(null, 0, new State());
  }

  begin(run, first, state) {
    this.run = run;
    this.first = first; // number of the oldest record kept
    this.records = []; // {events, marks, mark, metrics, told}
    this.keyframes = new Map([[first, JSON.stringify(state)]]); // number -> state before that record
    this.head = State.from(state); // after the newest record
    this.state = State.from(state); // at the position looked at
    this.position = first; // number of the next record to apply to `state`
    this.sub = 0; // events of that record which `state` contains already, when walking event by event
    this.restUntil = 0;
    this.restedAt = {}; // mark -> when the view last rested on one
    this.nextAt = 0;
    this.changed = true;
    if (this.mode === "replaying") this.mode = "live";
  }

  // Whether what is drawn is no longer what there is to see.
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

  // The events that led to what is shown: the last record's, or the last single one when walking event by event.
  get latest() {
    if (this.sub) return [this.records[this.position - this.first].events[this.sub - 1]];
    return this.current?.events ?? [];
  }

  // The newest record that `state` contains.
  get current() {
    return this.records[this.position - this.first - 1];
  }

  // Takes the answer to a pull. A run or a cursor that is not ours: start over from its keyframe.
  receive(answer) {
    if (answer.keyframe) {
      this.begin(answer.run, answer.first, State.from(answer.keyframe));
      // A late joiner sees the present first, and can rewind from there.
      for (const events of answer.records) this.ingest(events);
      this.seekTo(this.end);
    } else if (answer.first === this.end) {
      for (const events of answer.records) this.ingest(events);
    }
  }

  ingest(events) {
    for (const event of events) this.head.apply(event);
    const marks = marksOf(events);
    const [mark] = marks; // the most telling of them
    const told = tell({ events }, this.head);
    this.records.push(new Record({ events, marks, mark, metrics: measure(this.head), told }));
    if (this.end % KEYFRAME_EVERY === 0) this.keyframes.set(this.end, JSON.stringify(this.head));
    if (this.records.length > MAX_RECORDS && !this.recording) this.forgetOldest();
  }

  // A whole recording at once: `records` are lists of events, the first event of all is the engine's start.
  load(run, records) {
    this.recording = true;
    this.begin(run, 0, new State());
    for (const events of records) this.ingest(events);
    this.seekTo(1);
    this.mode = "replaying";
  }

  // Forgets the recording; the next pull brings what is live.
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

  // To right before record `target`, and then `sub` events into it.
  seekTo(target, sub = 0) {
    const number = Math.max(this.first, Math.min(this.end, target));
    const back = number < this.position || (number === this.position && sub < this.sub);
    if (back || number - this.position > KEYFRAME_EVERY) {
      const start = Math.max(...[...this.keyframes.keys()].filter((key) => key <= number));
      this.state = State.from(JSON.parse(this.keyframes.get(start)));
      this.position = start;
      this.sub = 0;
    }
    while (this.position < number) this.applyNext();
    const events = sub ? this.records[number - this.first]?.events ?? [] : [];
    while (this.sub < Math.min(sub, events.length - 1)) this.state.apply(events[this.sub++]);
    this.changed = true;
  }

  freeze() {
    this.mode = "frozen";
    this.changed = true;
  }

  seek(target, sub = 0) {
    this.freeze();
    this.seekTo(target, sub);
  }

  // From within a record, back means to where it begins.
  stepBy(count) {
    this.seek(this.position + count + (this.sub && count < 0 ? 1 : 0));
  }

  // One event on (1) or back (-1).
  stepEvent(count) {
    const events = (number) => this.records[number - this.first].events.length;
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

  // On from here: at the end that means following live again, or playing a recording once more.
  play() {
    if (this.recording && this.position >= this.end) this.seekTo(this.first);
    this.mode = this.position >= this.end ? "live" : "replaying";
    this.changed = true;
  }

  live() {
    this.mode = this.recording ? "frozen" : "live";
    this.restUntil = 0;
    this.seekTo(this.end);
  }

  // Milliseconds until there is something to apply; Infinity as long as nobody does or sends anything.
  wait(now) {
    if (this.mode === "frozen" || (this.position >= this.end && this.mode === "live")) return Infinity;
    return Math.max(0, (this.mode === "live" ? this.restUntil : this.nextAt) - now);
  }

  // Called before a frame is drawn: applies what is due.
  advance(now) {
    if (this.mode === "frozen" || this.position >= this.end) {
      if (this.mode === "replaying") this.live();
      return;
    }
    if (this.mode === "replaying") {
      const pause = 1000 / (REPLAY_RATE * this.speed);
      this.nextAt = Math.max(this.nextAt, now - 100); // after a pause: go on, without catching up
      for (; now >= this.nextAt && this.position < this.end; this.nextAt += pause) this.applyNext();
      return;
    }
    if (now < this.restUntil) return;
    // A backlog (after a rest, or in a tab that was hidden) is worked off smoothly, an enormous one at once.
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
