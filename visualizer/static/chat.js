// A conversation with the same engine. The page keeps all messages and sends them in every turn, so that the prompt of
// a turn hits the earlier turns' blocks in the prefix cache. The answer is read from the engine's events.

import { colour, element, ink, letter, setText, text } from "./names.js";

const REMARKS = new Map([["abort", "stopped"], ["error", "failed"], ["length", "cut at max tokens"]]); // by finish reason

// The elements of an answer that is being generated; the request's id once the server has accepted it; the text so far;
// the cached tokens of the prompt once the request is admitted.
/** @typedef {ReturnType<typeof answerBox> & { number: number, request?: string, seen?: boolean, said?: string, cached?: number }} Turn */

export class Chat {
  /** @param {HTMLElement} root @param {Send} send @param {() => object} sampling */
  constructor(root, send, sampling) {
    const part = (/** @type {string} */ name) => root.querySelector(`[data-part=${name}]`);
    this.root = root;
    this.send = send;
    this.sampling = sampling;
    this.form = part("chat-form");
    this.list = part("turns");
    this.message = part("chat-message");
    this.stop = part("chat-stop");
    /** @type {{ role: "user" | "assistant", content: string }[]} */
    this.messages = []; // {role, content}, as the model's chat template expects
    /** @type {Turn | null} */
    this.turn = null; // the answer that is being generated
    this.form.addEventListener("submit", (/** @type {SubmitEvent} */ event) => this.submit(event));
    this.stop.addEventListener("click", () => send({ do: "abort", request_id: this.turn?.request }));
    part("chat-new").addEventListener("click", () => this.reset());
    part("nav").addEventListener("click", (/** @type {On} */ event) => {
      const view = event.target.closest("[data-view]")?.dataset.view;
      if (view) this.show(view);
    });
  }

  /** @param {string} view */
  show(view) {
    this.root.dataset.view = view;
    for (const button of this.root.querySelectorAll("[data-part=nav] button")) {
      if (button.dataset.view === view) button.setAttribute("aria-current", "page");
      else button.removeAttribute("aria-current");
    }
    if (view === "chat") this.form.elements.text.focus();
    window.dispatchEvent(new Event("resize")); // the scene's size has changed
  }

  reset() {
    if (this.turn?.request) this.send({ do: "abort", request_id: this.turn.request });
    this.turn = null;
    this.messages = [];
    this.list.replaceChildren();
    this.complain("");
    this.stop.hidden = true;
    this.form.elements.text.focus();
  }

  /** @param {SubmitEvent} event */
  async submit(event) {
    event.preventDefault();
    const input = this.form.elements.text;
    const content = input.value.trim();
    if (!content || this.turn) return;
    const asked = /** @type {const} */ ({ role: "user", content });
    const question = element("p", "mp-said", this.list, { "data-testid": "said" });
    question.textContent = content;
    /** @type {Turn} */
    const turn = { ...answerBox(this.list), number: this.messages.filter((m) => m.role === "user").length + 1 };
    this.turn = turn;
    input.value = "";
    this.complain("");
    this.scroll();
    const answer = await this.send({ do: "chat", messages: [...this.messages, asked], ...this.sampling() }).catch(() => null);
    if (this.turn !== turn) {
      if (answer?.ok) this.send({ do: "abort", request_id: answer.result }); // a new conversation has begun
      return;
    }
    if (!answer?.ok) {
      this.turn = null;
      question.remove();
      turn.node.remove();
      input.value = content;
      this.complain(answer ? answer.message : "The server does not answer; is it still running?");
      return;
    }
    this.messages.push(asked);
    turn.request = answer.result;
    this.stop.hidden = false;
  }

  /** @param {string} words */
  complain(words) {
    setText(this.message, words);
    this.message.hidden = !words;
  }

  /** @param {Player} player */
  render(player) {
    const { turn } = this;
    if (!turn?.request) return;
    const { head } = player;
    const id = head.requests[turn.request]?.[0];
    if (id === undefined) {
      if (turn.seen) this.finish("the engine was restarted"); // otherwise its first event has not arrived yet
      return;
    }
    turn.seen = true;
    const seq = head.seqs[id];
    this.label(turn, id, seq, player);
    const words = text(seq, seq.num_prompt);
    if (words !== turn.said) {
      turn.said = words;
      setText(turn.words, words);
      this.scroll();
    }
    if (seq.finish_reason) this.finish(REMARKS.get(seq.finish_reason));
  }

  /** @param {Turn} turn @param {number} id @param {Seq} seq @param {Player} player */
  label(turn, id, seq, player) {
    if (turn.cached !== undefined || turn.request === undefined) return;
    const found = admission(player, turn.request);
    setText(turn.badge, letter(id));
    turn.badge.style.background = colour(id);
    turn.badge.style.color = ink(id);
    if (!found) return;
    turn.cached = found.num_cached;
    turn.note.dataset.cached = String(found.num_cached);
    const off = player.head.config.enable_prefix_caching ? "" : " (the prefix cache is off)";
    setText(turn.note, `turn ${turn.number}: ${found.num_cached} of ${seq.num_prompt} prompt tokens were cached${off}`);
    turn.bar.style.width = `${(100 * found.num_cached) / seq.num_prompt}%`;
  }

  /** @param {string | undefined} remark */
  finish(remark) {
    const { turn } = this;
    if (!turn) return;
    this.turn = null;
    this.stop.hidden = true;
    turn.node.dataset.done = "";
    if (remark) turn.note.textContent += `${turn.note.textContent ? " · " : ""}${remark}`;
    this.messages.push({ role: "assistant", content: (turn.said ?? "").trimEnd() });
    this.form.elements.text.focus();
  }

  scroll() {
    this.list.scrollTop = this.list.scrollHeight;
  }
}

/** @param {HTMLElement} list */
function answerBox(list) {
  const node = element("div", "mp-answer", list, { "data-testid": "answer" });
  const badge = element("i", "", node);
  const words = element("p", "", node);
  const meter = element("span", "mp-meter", node);
  const bar = element("b", "", meter);
  const note = element("small", "", node, { "data-testid": "cached" });
  return { node, badge, words, bar, note };
}

// A request's first admission, when its prompt is looked up in the prefix cache.
/** @param {Player} player @param {string} requestId */
function admission(player, requestId) {
  for (const { events } of player.records.slice(-200)) {
    for (const event of events) if (event.type === "admitted" && event.request_id === requestId) return event;
  }
  return null;
}
