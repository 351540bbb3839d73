// The controls that send commands to the engine: the prompt form, and pause, step, speed, play again, reset.

import { setText } from "./names.js";

// The slider's positions, in steps per second; "max" is as fast as possible.
/** @type {(number | "max")[]} */
const RATES = [1, 2, 4, 8, 12, 20, 40, "max"];

export class Controls {
  // main.js sets these: more sampling parameters, and what to do when the server names a field that is wrong.
  /** @type {() => object} */
  extras = () => ({});
  /** @type {(answer: any) => void} */
  refused = () => {};

  /** @param {HTMLElement} root @param {Send} send */
  constructor(root, send) {
    this.root = root;
    this.send = send;
    this.form = root.querySelector("[data-part=form]");
    this.message = root.querySelector("[data-part=message]");
    this.pause = root.querySelector("[data-do=pause]");
    this.rate = root.querySelector("[data-part=rate]");
    this.rateText = root.querySelector("[data-part=rate-text]");
    this.rate.max = RATES.length - 1;
    this.form.addEventListener("submit", (/** @type {SubmitEvent} */ event) => this.submit(event));
    // The second click of a double-click asks for nothing more.
    this.form.querySelector("[type=submit]").addEventListener("click", (/** @type {PointerEvent} */ event) => {
      if (event.detail > 1) event.preventDefault();
    });
    root.querySelector("[data-part=samples]").addEventListener("click", (/** @type {On<PointerEvent>} */ event) => this.sample(event));
    root.querySelector("[data-do=engine-step]").addEventListener("click", () => this.ask({ do: "step" }));
    root.querySelector("[data-do=play]").addEventListener("click", () => this.ask({ do: "play" }));
    root.querySelector("[data-do=reset]").addEventListener("click", () => this.ask({ do: "reset" }));
    this.pause.addEventListener("click", () => this.ask({ do: this.status?.paused ? "resume" : "pause" }));
    this.rate.addEventListener("input", () => {
      this.showRate(RATES[this.rate.value]);
      this.ask({ do: "rate", rate: RATES[this.rate.value] });
    });
    const { temperature, beams } = this.form.elements;
    beams.addEventListener("change", () => (temperature.disabled = beams.value !== "1")); // beam search does not sample
    temperature.addEventListener("input", () => this.showTemperature());
    this.showTemperature();
  }

  // A sample prompt fills in the form and submits it, so that one click is enough.
  /** @param {On<PointerEvent>} event */
  sample(event) {
    const chip = event.target.closest("[data-prompt]");
    if (!chip || event.detail > 1) return; // the second click of a double-click
    this.form.elements.prompt.value = chip.dataset.prompt;
    this.form.elements.chat.value = chip.dataset.chat ? "ask" : "continue";
    this.form.elements.n.value = chip.dataset.n ?? "1";
    this.form.requestSubmit();
  }

  /** @param {SubmitEvent} event */
  async submit(event) {
    event.preventDefault();
    const { prompt, n, beams, chat } = this.form.elements;
    const search = beams.value !== "1" ? { beam_width: Number(beams.value), temperature: 0 } : {};
    const done = await this.ask({
      do: "submit",
      prompt: prompt.value,
      n: Number(n.value),
      chat: chat.value === "ask",
      ...this.sampling(),
      ...search,
    });
    if (done) prompt.value = "";
  }

  // The form's sampling parameters, which the chat uses, too.
  sampling() {
    const { temperature, max_tokens } = this.form.elements;
    return {
      temperature: Number(temperature.value),
      max_tokens: max_tokens.value === "" ? null : Number(max_tokens.value),
      ...this.extras(),
    };
  }

  /** @param {Command} command */
  async ask(command) {
    const answer = await this.send(command);
    if (answer?.field) this.refused(answer);
    const problem = !answer ? "The server does not answer; is it still running?" : answer.ok ? "" : answer.message;
    setText(this.message, problem);
    this.message.hidden = !problem;
    return !problem;
  }

  /** @param {Status | null} status */
  render(status) {
    if (!status || JSON.stringify(status) === JSON.stringify(this.status)) return;
    const { temperature } = status.sampling; // the model's own; what the viewer chose stays until the model changes
    if (temperature !== this.status?.sampling.temperature) this.showTemperature(temperature);
    this.status = status;
    this.pause.textContent = status.paused ? "▶ Resume" : "‖ Pause";
    this.pause.classList.toggle("mp-on", status.paused);
    this.root.dataset.engine = status.paused ? "paused" : status.busy ? "running" : "idle";
    setText(this.root.querySelector("[data-part=engine-state]"), this.root.dataset.engine);
    const rate = status.rate ?? "max";
    this.showRate(rate);
    if (document.activeElement !== this.rate) this.rate.value = nearest(rate);
  }

  /** @param {number} [value] */
  showTemperature(value) {
    const { temperature } = this.form.elements;
    temperature.value = value ?? temperature.value;
    setText(this.root.querySelector("[data-part=temperature]"), Number(temperature.value).toFixed(2).replace(/0$/, ""));
  }

  /** @param {number | "max"} rate */
  showRate(rate) {
    setText(this.rateText, rate === "max" ? "full speed" : `${rate} steps/s`);
  }
}

/** @param {number | "max"} rate */
function nearest(rate) {
  if (rate === "max") return RATES.length - 1;
  const distances = RATES.map((other) => (other === "max" ? Infinity : Math.abs(other - rate)));
  return distances.indexOf(Math.min(...distances));
}
