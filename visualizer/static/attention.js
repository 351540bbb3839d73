// Shows PagedAttention: one token's query against the keys in its sequence's blocks, which lie anywhere in the pool.
// The engine computes the weights of all layers and heads on demand; choosing a layer or head needs no other request.

import { Heat } from "./heat.js";
import { colour, element, letter, list, setText } from "./names.js";
import { heading, sync, visible } from "./parts.js";

export class Attention {
  /** @type {State} */
  state; // when it was last drawn

  /** @param {HTMLElement} body @param {Send} send @param {Pool} pool */
  constructor(body, send, pool) {
    this.send = send;
    this.key = ""; // names the token that is shown: `id` and `position`
    this.id = NaN;
    this.position = NaN;
    /** @type {any} */
    this.answer = null; // the server's, once it is here
    this.asked = false;
    this.heat = new Heat(pool);
    this.section = element("section", "mp-attention", body, { "data-testid": "attention", "aria-label": "Attention" });
    const head = element("div", "mp-att-head", this.section);
    heading(head, "What it looked at");
    this.layer = choice(head, "layer");
    this.head = choice(head, "head");
    for (const select of [this.layer, this.head]) select.addEventListener("change", () => this.draw());
    this.strip = element("div", "mp-strip", this.section, { "data-testid": "strip" });
    this.text = element("p", "mp-att-text", this.section, { "data-testid": "attention-text" });
    this.words = element("p", "mp-note", this.section, { "data-testid": "attention-words" });
    this.again = element("button", "", this.section, { type: "button", hidden: "" });
    this.again.textContent = "Look again";
    this.again.addEventListener("click", () => this.fetch());
  }

  /** @param {State} state @param {number} id @param {number} position */
  render(state, id, position) {
    this.state = state;
    const key = `${id}:${position}`;
    if (this.key !== key) {
      Object.assign(this, { key, id, position, answer: null, asked: false, shown: null });
      this.show("");
    }
    const seq = state.seqs[id];
    if (this.answer) {
      const blocks = /** @type {number[]} */ (this.answer.blocks);
      this.warm(blocks.every((block, logical) => seq.table[logical] === block));
    }
    if (this.answer || this.asked) return;
    const name = letter(id);
    if (seq.finish_reason) {
      this.show(`${name} has ended and given its blocks back: the keys and values are gone. ` +
        "Choose a token of a text that is still being written.");
    } else if (!seq.table.length) {
      this.show(seq.swap_table.length
        ? `${name} is swapped out: its blocks are on the CPU until it comes back.` : `${name} has no blocks now: it waits.`);
    } else if (position >= seq.num_computed) {
      this.show("The newest token has no key and value yet: it is computed in the next step.");
    } else {
      this.fetch();
    }
  }

  async fetch() {
    const { key, id, position } = this;
    this.asked = true;
    this.again.hidden = true;
    const reply = await this.send({ do: "attention", seq_id: id, position });
    if (key !== this.key) return; // the viewer has selected another token
    if (!reply?.ok) {
      this.show(reply?.message ?? "The server does not answer; is it still running?");
      this.again.hidden = false;
      return;
    }
    this.answer = { ...reply.result, numbers: floats(reply.result.weights) };
    options(this.layer, "layer", this.answer.layers);
    options(this.head, "head", this.answer.averaged ? 0 : this.answer.heads);
    this.draw();
  }

  // Draws the weights over the pool only while the blocks still belong to this sequence.
  /** @param {boolean} there */
  warm(there) {
    if (!there) this.heat.clear();
    else if (!this.heat.shown) this.draw();
  }

  // Shows a message instead of the weights.
  /** @param {string} words */
  show(words) {
    this.heat.clear();
    for (const node of [this.strip, this.text, this.layer, this.head]) node.hidden = true;
    this.again.hidden = true;
    setText(this.words, words);
  }

  draw() {
    const weights = (this.shown = this.chosen());
    const { blocks } = /** @type {{ blocks: number[] }} */ (this.answer);
    const size = this.state.config.block_size;
    const most = Math.max(...weights);
    const seq = this.state.seqs[this.id];
    // The square root keeps a weight visible that is a tenth of the largest.
    const shades = weights.map((weight) => Number(Math.sqrt(weight / most).toFixed(3)));
    for (const node of [this.strip, this.text, this.layer, this.head]) node.hidden = false;
    this.section.style.setProperty("--hue", colour(this.id));
    const shares = blocks.map((_, logical) => sum(weights.slice(logical * size, (logical + 1) * size)));
    sync(this.strip, blocks, (block) => `${this.key} ${block}`, (block) => buildBlock(block, size), (node, block) => {
      const logical = blocks.indexOf(block);
      setText(node.querySelector("small"), `${logical}→`);
      setText(node.querySelector("em"), `${Math.round(100 * shares[logical])} %`);
      [...node.querySelectorAll("i")].forEach((slot, offset) => {
        const position = logical * size + offset;
        const seen = position < weights.length;
        slot.style.setProperty("--weight", String(seen ? shades[position] : 0));
        slot.classList.toggle("mp-void", !seen);
        slot.title = seen ? `“${seq.pieces[position]}”, position ${position}: ${(100 * weights[position]).toFixed(1)} %` : "";
      });
    });
    sync(this.text, [...weights.keys()], (position) => `${this.key} ${position}`, (position) => {
      const node = element("span", "", null, { "data-slot": `${blocks[Math.floor(position / size)]}:${position % size}` });
      node.textContent = seq.pieces[position];
      return node;
    }, (node, position) => {
      node.style.setProperty("--weight", String(shades[position]));
      node.title = `${(100 * weights[position]).toFixed(1)} %`;
    });
    this.heat.show(blocks, shades, shares, colour(this.id), size);
    const top = shares.indexOf(Math.max(...shares));
    const where = `block${blocks.length > 1 ? "s" : ""} ${list(blocks.map(String))}`;
    setText(this.words, `q(${visible(seq.pieces[this.position])}) · k(slot) over ${where}: ` +
      `the softmax of ${weights.length} products, which add up to ${sum(weights).toFixed(3)}. ` +
      `Most of it, ${Math.round(100 * shares[top])} %, falls on block ${blocks[top]}.`);
  }

  // The weights of the chosen layer and head, one per position; "mean" averages over all.
  chosen() {
    const { layers, heads, position, numbers } = this.answer;
    const length = position + 1;
    const pick = (/** @type {HTMLSelectElement} */ select, /** @type {number} */ count) =>
      (select.value === "mean" ? [...Array(count).keys()] : [Number(select.value)]);
    const rows = pick(this.layer, layers).flatMap((layer) =>
      pick(this.head, heads).map((head) => (layer * heads + head) * length));
    return Array.from({ length }, (_, i) => sum(rows.map((row) => numbers[row + i])) / rows.length);
  }
}

/** @param {number} block @param {number} size */
function buildBlock(block, size) {
  const node = element("div", "mp-att-block", null, { "data-testid": "attention-block", "data-physical": block });
  const label = element("button", "mp-place", node, { type: "button", "data-go": `block:${block}` });
  element("small", "", label);
  element("b", "", label).textContent = String(block);
  element("em", "", label);
  const slots = element("span", "mp-att-slots", node);
  for (let offset = 0; offset < size; offset += 1) element("i", "", slots, { "data-slot": `${block}:${offset}` });
  return node;
}

/** @param {HTMLElement} parent @param {string} name */
function choice(parent, name) {
  return element("select", "", parent, { "aria-label": `Attention ${name}`, "data-testid": `attention-${name}`, hidden: "" });
}

// Fills a select with the options 0 … count - 1 and "mean"; keeps the current choice if it still exists.
/** @param {HTMLSelectElement} select @param {string} name @param {number} count */
function options(select, name, count) {
  const before = select.value;
  const values = ["mean", ...Array(count).keys()].map(String);
  select.replaceChildren(...values.map((value) => new Option(value === "mean" ? `all ${name}s` : `${name} ${value}`, value)));
  select.value = values.includes(before) ? before : "mean";
}

/** @param {string} base64 */
function floats(base64) {
  const bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

const sum = (/** @type {number[]} */ numbers) => numbers.reduce((total, number) => total + number, 0);
