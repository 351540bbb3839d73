// The settings drawer: the engine's configuration and the sampling parameters. The server checks the values; this file
// only collects them and shows the server's messages, beside a field if that field alone is wrong.

import { element, setText } from "./names.js";

// A field is a number, unless it has a `kind`, or `options` from the server.
/** @typedef {{ name: string, label: string, hint: string, kind?: "text" | "checkbox" | "lines", options?: boolean }} Field */
/** @type {Field[]} */
const ENGINE = [
  { name: "model", label: "Model", kind: "text", hint: "tiny, a directory, or a hub id such as HuggingFaceTB/SmolLM2-135M" },
  { name: "memory", label: "Memory", options: true, hint: "who decides which slots a text gets; orca-…: neighbouring blocks, set aside ahead" },
  { name: "batching", label: "Batching", options: true, hint: "static: nobody begins before all have ended" },
  { name: "block_size", label: "Block size", hint: "tokens in a KV block; empty: what suits the memory manager" },
  { name: "num_blocks", label: "Blocks", hint: "physical blocks in the pool" },
  { name: "kv_memory", label: "KV memory", kind: "text", hint: "the pool's size instead: 64MiB, 2GiB" },
  { name: "max_num_seqs", label: "Sequences", hint: "that may run at once" },
  { name: "max_model_len", label: "Tokens", hint: "in a sequence, at most; empty: the model's own limit" },
  { name: "max_num_batched_tokens", label: "Token budget", hint: "tokens computed in one step" },
  { name: "preemption", label: "Out of blocks", options: true, hint: "what the last to come loses" },
  { name: "swap_blocks", label: "Swap blocks", hint: "on the CPU; empty: as many as the pool has" },
  { name: "enable_prefix_caching", label: "Prefix cache", kind: "checkbox", hint: "share what begins alike" },
];
/** @type {Field[]} */
const SAMPLING = [
  { name: "top_k", label: "Top-k", hint: "keep the k likeliest tokens; 0 keeps all" },
  { name: "top_p", label: "Top-p", hint: "keep the likeliest that add up to p" },
  { name: "min_p", label: "Min-p", hint: "drop what is less likely than p × the likeliest" },
  { name: "repetition_penalty", label: "Repetition", hint: "above 1: less of what prompt and text contain" },
  { name: "presence_penalty", label: "Presence", hint: "taken off the logits of tokens the text contains" },
  { name: "frequency_penalty", label: "Frequency", hint: "the same, once for each time" },
  { name: "stop", label: "Stop strings", kind: "lines", hint: "one a line; the text ends before them. \\n is a line's end" },
  { name: "min_tokens", label: "Min tokens", hint: "no text ends before so many" },
  { name: "seed", label: "Seed", hint: "a whole number: the same random numbers every time" },
];

export class Settings {
  /** @type {Config} */
  config; // the running engine's

  /** @param {HTMLElement} root @param {Send} send @param {{ [name: string]: string[] }} choices */
  constructor(root, send, choices = {}) {
    const part = (/** @type {string} */ name) => root.querySelector(`[data-part=${name}]`);
    this.send = send;
    /** @type {Status | null} */
    this.status = null;
    this.drawer = part("settings");
    this.form = part("engine-form");
    this.message = part("engine-message");
    this.apply = this.form.querySelector("[type=submit]");
    this.refining = part("sampling-form");
    for (const field of ENGINE) build(part("engine-fields"), field, field.options ? choices[field.name] ?? [] : undefined);
    for (const field of SAMPLING) build(part("sampling-fields"), field);
    root.querySelector("[data-do=settings]").addEventListener("click", () => this.open());
    this.form.addEventListener("submit", (/** @type {SubmitEvent} */ event) => this.submit(event));
    this.form.elements.preemption.addEventListener("change", () => this.suit());
    this.form.elements.memory.addEventListener("change", () => this.suit());
    this.form.elements.kv_memory.addEventListener("input", () => this.suit());
    this.refining.addEventListener("submit", (/** @type {SubmitEvent} */ event) => event.preventDefault());
    this.refining.addEventListener("change", () => this.check());
    this.drawer.addEventListener("click", (/** @type {On} */ event) => {
      if (event.target === this.drawer) this.drawer.close(); // a click on the backdrop
    });
  }

  open() {
    this.fill();
    this.tell("", "");
    blame(this.form);
    this.drawer.showModal();
  }

  // Lets the server validate the sampling fields before a prompt is submitted with them.
  async check() {
    const asked = (this.asked = {}); // a late answer must not overwrite a newer one
    const answer = await this.send({ do: "check", ...this.sampling() }).catch(() => null);
    if (answer && asked === this.asked) blame(this.refining, answer.field, answer.message);
  }

  // Shows the message of a prompt that was rejected because of a field in the drawer.
  /** @param {{ field: string, message: string }} answer */
  refused({ field, message }) {
    if (SAMPLING.some(({ name }) => name === field)) blame(this.refining, field, message);
  }

  // Fills the form with the running engine's settings.
  fill() {
    this.form.elements.enable_prefix_caching.disabled = this.config.memory.startsWith("orca-");
    for (const { name, kind } of ENGINE) {
      const input = this.form.elements[name];
      const value = this.config[/** @type {keyof Config} */ (name)];
      if (kind === "checkbox") input.checked = value;
      else input.value = value ?? "";
    }
    this.suit();
  }

  // Disables the fields that do not apply: contiguous memory neither preempts nor shares prefixes, only swapping needs
  // a swap space, and the pool has one size.
  suit() {
    const { memory, preemption, swap_blocks, num_blocks, kv_memory, enable_prefix_caching: cache } = this.form.elements;
    const ahead = memory.value.startsWith("orca-");
    if (ahead) preemption.value = "recompute";
    if (ahead !== cache.disabled) cache.checked = !ahead; // the default
    preemption.disabled = cache.disabled = ahead;
    swap_blocks.disabled = preemption.value !== "swap";
    if (swap_blocks.disabled) swap_blocks.value = "";
    const sized = kv_memory.value.trim() !== "";
    if (sized !== num_blocks.disabled) num_blocks.value = sized ? "" : this.config.num_blocks;
    num_blocks.disabled = sized;
  }

  /** @param {SubmitEvent} event */
  async submit(event) {
    event.preventDefault();
    /** @type {Command} */
    const command = { do: "configure" };
    for (const { name, kind, options } of ENGINE) {
      const input = this.form.elements[name];
      if (kind === "checkbox") command[name] = input.disabled ? null : input.checked;
      else if (["block_size", "max_model_len"].includes(name) && input.value === "") command[name] = null;
      else if (kind || options) command[name] = input.value;
      else if (input.value !== "" || !(name === "swap_blocks" || input.disabled)) command[name] = number(input.value);
    }
    // Another model has a limit of its own, unless the viewer gave one.
    if (command.model !== this.config.model && command.max_model_len === this.config.max_model_len) delete command.max_model_len;
    this.tell("busy", command.model === this.config.model ? "Restarting…" : `Loading ${command.model}…`);
    const answer = await this.send(command).catch(() => null);
    blame(this.form, answer?.field, answer?.message);
    if (answer?.ok) this.tell("good", answer.result);
    else this.tell("bad", answer ? `${answer.message} The engine goes on as it was.` : "The server does not answer.");
  }

  /** @param {string} kind @param {string} words */
  tell(kind, words) {
    this.message.dataset.kind = kind;
    setText(this.message, words);
    this.apply.disabled = kind === "busy";
  }

  /** @param {Status | null} status @param {State} head */
  render(status, head) {
    this.config = head.config;
    if (status && status !== this.status) {
      for (const [name, value] of Object.entries(status.sampling)) {
        if (name in this.refining.elements) this.refining.elements[name].placeholder = value; // applies if left empty
      }
    }
    this.status = status;
    if (status?.loading && this.drawer.open) this.tell("busy", `Loading ${status.loading}… The engine goes on meanwhile.`);
  }

  // The sampling parameters for every prompt. An invalid number is sent as typed, so that the server rejects it.
  sampling() {
    const value = (/** @type {string} */ name) => this.refining.elements[name].value;
    const filled = SAMPLING.filter(({ name }) => value(name) !== "");
    return Object.fromEntries(filled.map(({ name, kind }) => [name, kind === "lines" ? lines(value(name)) : number(value(name))]));
  }
}

// An invalid number is sent as typed, so that the server's message quotes it.
const number = (/** @type {string} */ text) => (text.trim() === "" || Number.isNaN(Number(text)) ? text : Number(text));
const lines = (/** @type {string} */ text) => text.split("\n").filter((line) => line !== "").map((line) => line.replaceAll("\\n", "\n"));

/** @param {HTMLElement} parent @param {Field} field @param {string[]} [options] */
function build(parent, { name, label, kind, hint }, options) {
  const row = element("label", "mp-field", parent);
  element("span", "", row).textContent = label;
  const common = { name, "data-testid": `set-${name}`, "aria-describedby": `mp-hint-${name} mp-bad-${name}` };
  if (options) {
    const select = element("select", "", row, common);
    for (const option of options) element("option", "", select).textContent = option;
  } else if (kind === "lines") {
    element("textarea", "", row, { rows: 2, spellcheck: "false", ...common });
  } else {
    // Not type="number": for an invalid number a browser returns an empty value, so the input would be ignored.
    element("input", "", row, kind ? { type: kind, ...common } : { type: "text", inputmode: "decimal", ...common });
  }
  element("small", "", row, { id: `mp-hint-${name}` }).textContent = hint;
  element("em", "mp-bad", row, { id: `mp-bad-${name}`, "data-testid": `bad-${name}`, role: "status" });
}

// Marks the field `name` of a form as wrong and shows the reason; without a name, clears all marks.
/** @param {HTMLFormElement} form */
function blame(form, name = "", words = "") {
  for (const note of form.querySelectorAll(".mp-bad")) {
    const input = note.parentElement?.querySelector("[name]");
    const wrong = input.name === name;
    setText(note, wrong ? words : "");
    input.setAttribute("aria-invalid", String(wrong));
  }
}
