// The drawer: how the engine is built, and how texts are sampled. The server checks the values; here they are only
// collected, and its words shown.

import { element, setText } from "./names.js";

const ENGINE = [
  { name: "model", label: "Model", kind: "text", hint: "tiny, a directory, or a hub id such as HuggingFaceTB/SmolLM2-135M" },
  { name: "block_size", label: "Block size", hint: "tokens in a KV block" },
  { name: "num_blocks", label: "Blocks", hint: "physical blocks in the pool" },
  { name: "max_num_seqs", label: "Sequences", hint: "that may run at once" },
  { name: "max_num_batched_tokens", label: "Token budget", hint: "tokens computed in one step" },
  { name: "preemption", label: "Out of blocks", options: ["recompute", "swap"], hint: "what the last to come loses" },
  { name: "swap_blocks", label: "Swap blocks", hint: "on the CPU; empty: as many as the pool has" },
  { name: "enable_prefix_caching", label: "Prefix cache", kind: "checkbox", hint: "share what begins alike" },
];
const SAMPLING = [
  { name: "top_k", label: "Top-k", hint: "keep the k likeliest tokens; 0 keeps all" },
  { name: "top_p", label: "Top-p", step: "0.05", hint: "keep the likeliest that add up to p" },
  { name: "min_p", label: "Min-p", step: "0.05", hint: "drop what is less likely than p × the likeliest" },
  { name: "seed", label: "Seed", hint: "a whole number: the same text every time" },
];

export class Settings {
  constructor(root, send) {
    const part = (name) => root.querySelector(`[data-part=${name}]`);
    this.send = send;
    this.drawer = part("settings");
    this.form = part("engine-form");
    this.message = part("engine-message");
    this.apply = this.form.querySelector("[type=submit]");
    this.refining = part("sampling-form");
    for (const field of ENGINE) build(part("engine-fields"), field);
    for (const field of SAMPLING) build(part("sampling-fields"), field);
    root.querySelector("[data-do=settings]").addEventListener("click", () => this.open());
    this.form.addEventListener("submit", (event) => this.submit(event));
    this.form.elements.preemption.addEventListener("change", () => this.showSwap());
    this.refining.addEventListener("submit", (event) => event.preventDefault());
    this.drawer.addEventListener("click", (event) => {
      if (event.target === this.drawer) this.drawer.close(); // beside it
    });
  }

  open() {
    this.fill();
    this.tell("", "");
    this.drawer.showModal();
  }

  // The running engine's values.
  fill() {
    for (const { name, kind } of ENGINE) {
      const input = this.form.elements[name];
      if (kind === "checkbox") input.checked = this.config[name];
      else input.value = this.config[name] ?? "";
    }
    this.showSwap();
  }

  showSwap() {
    const { preemption, swap_blocks } = this.form.elements;
    swap_blocks.disabled = preemption.value !== "swap";
    if (swap_blocks.disabled) swap_blocks.value = "";
  }

  async submit(event) {
    event.preventDefault();
    const command = { do: "configure" };
    for (const { name, kind, options } of ENGINE) {
      const input = this.form.elements[name];
      if (kind === "checkbox") command[name] = input.checked;
      else if (kind || options) command[name] = input.value;
      else if (input.value !== "" || name !== "swap_blocks") command[name] = number(input);
    }
    this.tell("busy", command.model === this.config.model ? "Restarting…" : `Loading ${command.model}…`);
    const answer = await this.send(command).catch(() => null);
    if (answer?.ok) this.tell("good", answer.result);
    else this.tell("bad", answer ? `${answer.message} The engine goes on as it was.` : "The server does not answer.");
  }

  tell(kind, words) {
    this.message.dataset.kind = kind;
    setText(this.message, words);
    this.apply.disabled = kind === "busy";
  }

  render(status, head) {
    this.config = head.config;
    if (status?.loading && this.drawer.open) this.tell("busy", `Loading ${status.loading}… The engine goes on meanwhile.`);
  }

  // What every prompt is sent with. A field that is no number is sent as it is, for the server to complain about.
  sampling() {
    const filled = SAMPLING.filter(({ name }) => this.refining.elements[name].value !== "");
    return Object.fromEntries(filled.map(({ name }) => [name, number(this.refining.elements[name])]));
  }
}

const number = (input) => (input.value === "" ? "" : Number(input.value));

function build(parent, { name, label, kind = "number", options, hint, step = "1" }) {
  const row = element("label", "mp-field", parent);
  element("span", "", row).textContent = label;
  const input = options
    ? element("select", "", row, { name, "data-testid": `set-${name}` })
    : element("input", "", row, { name, type: kind, step, "data-testid": `set-${name}` });
  for (const option of options ?? []) element("option", "", input).textContent = option;
  element("small", "", row).textContent = hint;
}
