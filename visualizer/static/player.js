// The viewer's own copy of what happened: records, keyframes, and the state at the moment being looked at.
// Following live, freezing, stepping and seeking are this object's business; the engine notices none of it.

import { tell } from "./narration.js";
import { State, measure } from "./reducer.js";

const KEYFRAME_EVERY = 40; // records
const MAX_RECORDS = 60 * KEYFRAME_EVERY;
const REPLAY_RATE = 12; // records per second when playing what is past
// Some moments last one step and are the point of the whole page: while following live, the view rests on them
// (milliseconds), then catches up. Not on every one of a series: what repeats at once has been seen.
const REST = { forked: 1100, copied: 1100, preempted: 1400 };
const RESTED = 6000;
const MARKS = ["engine_error", "preempted", "copied", "forked", "finished"]; // for the timeline, most telling first

export class Player {
  constructor() {
    this.mode = "live"; // "live", "frozen" or "replaying"
    this.begin(null, 0, new State());
  }

  begin(run, first, state) {
    this.run = run;
    this.first = first; // number of the oldest record kept
    this.records = []; // {events, mark, metrics, told}
    this.keyframes = new Map([[first, JSON.stringify(state)]]); // number -> state before that record
    this.head = State.from(state); // after the newest record
    this.state = State.from(state); // at the position looked at
    this.position = first; // number of the next record to apply to `state`
    this.restUntil = 0;
    this.restedAt = {}; // mark -> when the view last rested on one
    this.nextAt = 0;
    this.changed = true;
    if (this.mode === "replaying") this.mode = "live";
  }

  get end() {
    return this.first + this.records.length;
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
    const mark = MARKS.find((type) => events.some((event) => event.type === type));
    this.records.push({ events, mark, metrics: measure(this.head), told: tell({ events }, this.head) });
    if (this.end % KEYFRAME_EVERY === 0) this.keyframes.set(this.end, JSON.stringify(this.head));
    if (this.records.length > MAX_RECORDS) this.forgetOldest();
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
    for (const event of record.events) this.state.apply(event);
    this.position += 1;
    this.changed = true;
    return record;
  }

  seekTo(target) {
    const number = Math.max(this.first, Math.min(this.end, target));
    if (number < this.position || number - this.position > KEYFRAME_EVERY) {
      const start = Math.max(...[...this.keyframes.keys()].filter((key) => key <= number));
      this.state = State.from(JSON.parse(this.keyframes.get(start)));
      this.position = start;
    }
    while (this.position < number) this.applyNext();
    this.changed = true;
  }

  freeze() {
    this.mode = "frozen";
    this.changed = true;
  }

  seek(target) {
    this.freeze();
    this.seekTo(target);
  }

  stepBy(count) {
    this.seek(this.position + count);
  }

  // On from here: at the end that means following live again.
  play() {
    this.mode = this.position >= this.end ? "live" : "replaying";
    this.changed = true;
  }

  live() {
    this.mode = "live";
    this.restUntil = 0;
    this.seekTo(this.end);
  }

  // Called for every animation frame: applies what is due.
  advance(now) {
    if (this.mode === "frozen" || this.position >= this.end) {
      if (this.mode === "replaying") this.play();
      return;
    }
    if (this.mode === "replaying") {
      if (now >= this.nextAt) {
        this.applyNext();
        this.nextAt = now + 1000 / REPLAY_RATE;
      }
      return;
    }
    if (now < this.restUntil) return;
    // A backlog (after a rest, or in a tab that was hidden) is worked off smoothly, an enormous one at once.
    const backlog = this.end - this.position;
    if (backlog > 300) return this.seekTo(this.end);
    for (let budget = Math.ceil(backlog / 10); budget > 0; budget -= 1) {
      const { mark } = this.applyNext();
      if (mark in REST && backlog < 100 && now - (this.restedAt[mark] ?? -RESTED) >= RESTED) {
        this.restedAt[mark] = now;
        this.restUntil = now + REST[mark];
        return;
      }
    }
  }
}
