// The timeline's marks: the kinds of events in a record that are worth a mark, each with its own lane and colour.

// Most important first. A swapped-out request is also preempted; a "hit" is an admission with prefix-cached tokens.
export const MARKS = [
  "engine_error", "swapped_out", "preempted", "swapped_in", "copied", "forked", "hit", "finished",
];

const HIT = (/** @type {EngineEvent} */ event) => event.type === "admitted" && event.num_cached > 0;

// The marks of a record's events, most important first.
/** @param {EngineEvent[]} events */
export function marksOf(events) {
  /** @type {Set<string>} */
  const types = new Set(events.map((event) => (HIT(event) ? "hit" : event.type)));
  return MARKS.filter((mark) => types.has(mark));
}

// The lanes from top to bottom. `there` says whether an engine with this configuration can have such marks.
/** @type {{ name: string, marks: string[], hue: string, there: (config: Config) => boolean }[]} */
export const LANES = [
  { name: "fork", marks: ["forked"], hue: "--mp-blue", there: () => true },
  { name: "copy-on-write", marks: ["copied"], hue: "--mp-orange", there: () => true },
  { name: "cache hit", marks: ["hit"], hue: "--mp-green", there: (config) => config.enable_prefix_caching },
  { name: "preemption", marks: ["preempted"], hue: "--mp-red", there: () => true },
  { name: "swap", marks: ["swapped_out", "swapped_in"], hue: "--mp-purple", there: (config) => config.swap_blocks > 0 },
  { name: "finish", marks: ["finished"], hue: "--mp-soft", there: () => true },
];

export const lanesOf = (/** @type {Config} */ config) => LANES.filter(({ there }) => there(config));

// The number of events per lane in a record, without empty lanes: [{name, count}].
/** @param {Pick<RunRecord, "events" | "marks">} record */
export function happened({ events, marks }) {
  const found = LANES.filter((lane) => lane.marks.some((mark) => marks.includes(mark))).map((lane) => ({
    name: lane.name,
    count: events.filter((event) => lane.marks.includes(HIT(event) ? "hit" : event.type)).length,
  }));
  return marks.includes("engine_error") ? [{ name: "an error", count: 1 }, ...found] : found;
}

export const told = (/** @type {{ name: string, count: number }[]} */ found) =>
  found.map(({ name, count }) => (count > 1 ? `${name} ×${count}` : name)).join(", ");
