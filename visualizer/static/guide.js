// Scenarios: the menu, what to watch, and "predict, then run". The server decides when a question is asked and when the
// step that answers it is shown; the page knows only its own viewer's answer.

import { element, setText } from "./names.js";

const SHOWN = 16000; // milliseconds that a verdict stays visible

export class Guide {
  /** @type {Question | null} */
  asked = null;
  /** @type {number | null} */
  chosen = null; // what this viewer answered
  told = false; // whether the verdict has been shown
  /** @type {string | null} */
  paused = null; // the recording that is shown instead
  /** @type {string | null | undefined} */
  shownScenario; // undefined before the first status

  // `show(tab)` opens the chart that a scenario is about.
  /** @param {HTMLElement} root @param {Send} send @param {Scenario[]} scenarios @param {(tab: string) => void} show */
  constructor(root, send, scenarios, show) {
    this.ends = 0; // the time until which the question, or its verdict, is shown
    this.root = root;
    this.send = send;
    this.show = show;
    this.scenarios = new Map(scenarios.map((scenario) => [scenario.key, scenario]));
    const part = (/** @type {string} */ name) => root.querySelector(`[data-part=${name}]`);
    this.lede = part("lede");
    this.general = this.lede.innerHTML; // the default text, from page.html
    this.menu = part("scenario");
    this.asks = part("asks");
    this.quiz = part("quiz");
    this.kind = part("quiz-kind");
    this.text = part("quiz-text");
    this.choices = part("choices");
    this.skip = part("skip");
    this.empty = part("empty");
    element("option", "", this.menu, { value: "", disabled: "", hidden: "" }).textContent = "choose…";
    for (const { key, name } of scenarios) element("option", "", this.menu, { value: key }).textContent = name;
    this.menu.addEventListener("change", () => send({ do: "play", scenario: this.menu.value }));
    this.asks.addEventListener("change", () => send({ do: "asks", asks: this.asks.checked }));
    this.choices.addEventListener("click", (/** @type {On} */ event) => {
      const chosen = event.target.closest("button")?.dataset.choice;
      if (chosen !== undefined) this.answer(Number(chosen));
    });
    this.skip.addEventListener("click", () => (this.open ? this.answer(null) : this.hide()));
    document.addEventListener("keydown", (event) => this.key(event));
    this.lede.addEventListener("click", () => this.lede.classList.toggle("mp-whole")); // on a phone it is truncated
    this.ticking = setInterval(() => this.tick(), 500);
  }

  // `recording` is the recording shown instead of the engine's run, if any: then no live status is shown.
  /** @param {Status | null} status @param {Player} player @param {Shown | null} recording */
  render(status, player, recording) {
    this.sayEmpty(recording);
    if (recording) return this.aside(recording);
    if (this.paused) this.resume();
    if (!status) return;
    if (player.next) return this.follow(status, player); // the status is about another run
    const scenario = this.scenarios.get(status.scenario ?? "");
    if (this.shownScenario !== status.scenario) {
      const first = this.shownScenario === undefined;
      if (scenario && !(first && scenario.tab === "memory")) this.show(scenario.tab);
      this.shownScenario = status.scenario;
      this.menu.value = scenario ? scenario.key : "";
      if (scenario) this.say(scenario.name, scenario.watch);
      else this.lede.innerHTML = this.general;
    }
    this.asks.disabled = !scenario;
    this.asks.parentElement.toggleAttribute("data-off", !scenario);
    this.asks.checked = status.asks;
    this.follow(status, player);
  }

  /** @param {string} name @param {string} words */
  say(name, words) {
    this.lede.replaceChildren();
    element("b", "", this.lede).textContent = `${name}. `;
    this.lede.append(words);
  }

  /** @param {Shown} recording */
  aside({ name }) {
    if (this.paused === name) return;
    this.paused = name;
    this.shownScenario = null;
    this.menu.value = "";
    this.say(name, "A recorded run of the engine: what its KV cache held in every step, block by block. Nothing is computed " +
      "now; the marks on the timeline are the moments worth a look.");
    this.hide();
  }

  // Returns from a recording to the engine: a question that is still open is shown again.
  resume() {
    this.paused = null;
    this.quiz.hidden = !this.open;
  }

  /** @param {Shown | null} recording */
  sayEmpty(recording) {
    const viewer = this.root.dataset.role === "viewer";
    setText(this.empty, recording ? "Nothing is being written at this moment of the recording."
      : viewer ? "Nothing is being written yet. The presenter decides what comes next."
      : "Nothing is being written. Pick a prompt above, or press Play again.");
  }

  // Shows a question while the view stands at its moment, the newest of the run, and a verdict only if its question was
  // shown.
  /** @param {{ question: Question | null, verdict: Verdict | null }} status @param {Player} player */
  follow({ question, verdict }, player) {
    if (this.open) this.quiz.hidden = !player.atEnd;
    if (question && question.id !== this.asked?.id) {
      if (player.atEnd) this.put(question);
    } else if (verdict && verdict.id === this.asked?.id && !this.told) {
      if (player.mode === "live") this.tell(verdict);
      else this.told = true; // the view is elsewhere
    } else if (!question && !verdict && this.asked) {
      this.asked = null; // another run
      this.hide();
    }
  }

  get open() {
    return Boolean(this.asked) && !this.told && !this.paused;
  }

  /** @param {Question} question */
  put(question) {
    this.asked = question;
    this.told = false;
    this.chosen = null;
    this.ends = performance.now() + 1000 * question.seconds;
    setText(this.kind, "predict");
    setText(this.text, question.text);
    this.choices.replaceChildren(...question.choices.map((words, i) => {
      const button = element("button", "", null, { type: "button", "data-choice": i, "data-testid": "choice" });
      button.textContent = words;
      return button;
    }));
    this.quiz.dataset.verdict = "";
    this.quiz.hidden = false;
    this.tick();
  }

  // Tells the server only that the question was answered; this page alone knows which choice it was.
  /** @param {number | null} chosen */
  answer(chosen) {
    if (!this.asked || !this.open || this.chosen !== null) return;
    this.chosen = chosen;
    for (const button of this.choices.children) button.disabled = true;
    this.send({ do: "answer", id: this.asked.id });
  }

  /** @param {Verdict} verdict */
  tell({ answer, why }) {
    if (!this.asked) return;
    this.told = true;
    const right = this.chosen === answer;
    const words = this.asked.choices[answer];
    this.quiz.dataset.verdict = this.chosen === null ? "skipped" : right ? "right" : "wrong";
    setText(this.kind, this.chosen === null ? `it is ${words}` : right ? "✓ right" : `✗ no: ${words}`);
    setText(this.text, why);
    [...this.choices.children].forEach((button, i) => {
      button.disabled = true;
      button.classList.toggle("mp-right", i === answer);
      button.classList.toggle("mp-wrong", i === this.chosen && !right);
    });
    this.ends = performance.now() + SHOWN;
    setText(this.skip, "OK");
    this.quiz.hidden = false;
  }

  tick() {
    if (!this.quiz.isConnected) return clearInterval(this.ticking);
    if (!this.asked || this.quiz.hidden) return;
    const left = this.ends - performance.now();
    if (this.open) setText(this.skip, `Skip (${Math.max(0, Math.ceil(left / 1000))} s)`);
    else if (left < 0) this.hide();
  }

  hide() {
    this.quiz.hidden = true;
  }

  /** @param {On<KeyboardEvent>} event */
  key(event) {
    if (!this.quiz.isConnected) return;
    const typing = event.target.closest?.("input:not([type=checkbox]), select:not([data-part=scenario]), textarea, dialog");
    const number = Number(event.key) - 1;
    if (!typing && this.asked && this.open && number >= 0 && number < this.asked.choices.length) this.answer(number);
  }
}
