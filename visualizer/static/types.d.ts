// The types of what the scripts pass around. Only `tsc` reads this file (make check-js); the page does not contain it.

type State = import("./reducer.js").State;
type Player = import("./player.js").Player;
type RunRecord = import("./record.js").Record; // "Record" is a type of TypeScript

type Pool = import("./pool.js").Pool;
type Sequences = import("./sequences.js").Sequences;
type SwapSpace = import("./swap.js").SwapSpace;
type BlockHistory = import("./block_history.js").History; // of blocks, sequences and tokens, for the inspector
type StepHistory = import("./history.js").History; // of steps, for the charts

type EventType = EngineEvent["type"];
type EventOf<T extends EventType> = Extract<EngineEvent, { type: T }>;
// A table of handlers by event type, seen from a caller that has any event.
type Handler = (...args: any[]) => any;
// The engine's settings. Recordings of old versions lack the optional fields of the event; the reducer fills them in.
type Config = Required<Omit<EngineStarted, "type">>;

// Slots in use: see `measure` in reducer.js.
interface Metrics { step: number; logical: number; used: number; reserved: number }

// What the narration says; `type` is a key of the server's list of sources.
interface Sentence { kind: string; text: string; type: string }
interface Told extends Sentence { rank: number } // a record's: the place of its event type in the order of importance

// What a viewer points at: a sequence, a block of the pool or of the CPU, a token, the offset of a slot.
interface Picked { seq?: number; block?: number; swap?: number; token?: number; offset?: number }

// A selection with all that stays bright while the rest is dimmed.
interface Lit extends Picked {
  seqs: Set<number>; blocks: Set<number>; swaps: Set<number>;
  hovered?: boolean;
  open?: number; // the sequence that the inspector shows
}

// Selects something: "hover" and "click" as a pointer does, "go" as a link does.
type How = "hover" | "click" | "go";
type Select = (what: Picked | null, how: How) => void;

// What the page sends to the engine. The server answers with {ok, result} or {ok, message, field}; null: no answer.
type Command = { do: string, [argument: string]: any };
type Send = (command: Command) => Promise<any>;

// A recording that is shown instead of the engine's run.
interface Shown { name: string; text: string }

// The state of the engine's loop: see `status` in paced_loop.py. A rate is in steps per second; null: full speed.
interface Status {
  paused: boolean; rate: number | null; busy: boolean; loading: string; scenario: string | null; asks: boolean;
  question: Question | null; verdict: Verdict | null;
  sampling: { temperature: number; [name: string]: number }; // the model's own values
}

interface Figure { data: any[]; layout: any } // as plotly takes it

// From the server: the scenarios' menu, a scenario's question and its answer, the experiments' menu.
interface Scenario { key: string; name: string; watch: string; tab: string }
interface Question { id: number; text: string; choices: string[]; seconds: number }
interface Verdict { id: number; answer: number; why: string }
interface CatalogueEntry { name: string; title: string; figure: string; minutes: number }

// Where a sequence's row is in its family's tree: see families.js.
interface Place { id: number; parent: number | null; depth: number; skipped: number; rails: { kind: string; of: number }[] }

// The elements of a sequence's row: see sequences.js.
interface Row {
  node: HTMLElement; rails: HTMLElement; line: HTMLElement; prompt: HTMLElement; output: HTMLElement; guess: HTMLElement;
  meta: HTMLElement; state: HTMLElement; table: HTMLElement; hit: HTMLElement; chips: Chip[]; place?: string;
}
interface Chip { node: HTMLElement; fill: HTMLElement; block: HTMLElement; key: string }

// What the server answers to a pull: records from `first` on, and a keyframe if the viewer has to start over.
interface Answer {
  first: number; records: EngineEvent[][]; rss?: number[]; run?: string; keyframe?: State; status?: Status; status_version?: number;
}

// --- what the library's types lack ---

interface Window { Plotly: any; minipaged: any }
interface Element {
  closest(selectors: string): HTMLElement | null;
  kept?: Map<string, any>; // the children by key: see `sync` in parts.js
}
// The page has the elements that a script looks for, and the script knows what they are.
interface ParentNode {
  querySelector(selectors: string): any;
  querySelectorAll(selectors: string): NodeListOf<HTMLElement>;
}

// An event of an element: its target has whatever the listener asks for.
type On<E extends Event = Event> = E & { target: any };

// --- from Python: begin ---
interface EngineStarted { type: "engine_started"; model: string; block_size: number; num_blocks: number; max_num_seqs: number; max_num_batched_tokens: number; max_model_len: number; enable_prefix_caching: boolean; preemption: string; swap_blocks: number; bytes_per_block: number; memory?: string; batching?: string }
interface RequestAdded { type: "request_added"; request_id: string; seq_ids: number[]; prompt_token_ids: number[]; prompt_pieces: string[]; max_tokens: number; rank?: number | null }
interface StepStarted { type: "step_started"; step: number }
interface Admitted { type: "admitted"; request_id: string; seq_id: number; num_cached: number }
interface Allocated { type: "allocated"; seq_id: number; logical: number; block: number }
interface Shared { type: "shared"; seq_id: number; logical: number; block: number; reason: "fork" | "prefix" }
interface Copied { type: "copied"; seq_id: number; logical: number; src: number; dst: number }
interface Scheduled { type: "scheduled"; seq_id: number; start: number; num_tokens: number; num_draft?: number }
interface Preempted { type: "preempted"; request_id: string; mode: "recompute" | "swap"; reason: string }
interface SwappedOut { type: "swapped_out"; seq_id: number; blocks: number[]; swap_blocks: number[] }
interface SwappedIn { type: "swapped_in"; seq_id: number; swap_blocks: number[]; blocks: number[] }
interface Resumed { type: "resumed"; request_id: string }
interface Filled { type: "filled"; seq_id: number; start: number; num_tokens: number }
interface Cached { type: "cached"; block: number; prefix: number; parent: number }
interface Evicted { type: "evicted"; block: number; reason?: string }
interface Predicted { type: "predicted"; blocks: number[]; discard: boolean }
interface Forked { type: "forked"; parent: number; child: number; request_id: string }
interface Sampled { type: "sampled"; seq_id: number; token_id: number; text: string; logprob: number | null; top?: any[][] }
interface Proposed { type: "proposed"; seq_id: number; token_ids: number[]; pieces: string[] }
interface Speculated { type: "speculated"; seq_id: number; proposed: number; accepted: number; blocks: number[] }
interface Freed { type: "freed"; seq_id: number; blocks: number[] }
interface GroupStarted { type: "group_started"; group: number; request_ids: string[]; num_blocks: number }
interface PrefixKept { type: "prefix_kept"; group: number; blocks: number[] }
interface PrefixReleased { type: "prefix_released"; group: number; blocks: number[] }
interface GroupEnded { type: "group_ended"; group: number }
interface Finished { type: "finished"; seq_id: number; reason: string }
interface StepFinished { type: "step_finished"; step: number; num_tokens: number; seconds: number }
interface EngineError { type: "engine_error"; message: string }
type EngineEvent = EngineStarted | RequestAdded | StepStarted | Admitted | Allocated | Shared | Copied | Scheduled | Preempted | SwappedOut | SwappedIn | Resumed | Filled | Cached | Evicted | Predicted | Forked | Sampled | Proposed | Speculated | Freed | GroupStarted | PrefixKept | PrefixReleased | GroupEnded | Finished | StepFinished | EngineError;
interface Seq { request_id: string; num_prompt: number; tokens: number[]; pieces: string[]; logprobs: (number | null)[]; num_computed: number; num_cached: number; table: number[]; swap_table: number[]; parent: number | null; finish_reason: string | null; limit: number; proposed: string[]; taken_back: string[] }
interface Group { request_ids: string[]; num_blocks: number; kept: number[] }
// --- from Python: end ---
