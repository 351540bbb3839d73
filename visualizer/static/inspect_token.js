// The inspector's view of a token: its id, its slot, its log-probability, the most likely alternatives, its attention.

import { Attention } from "./attention.js";
import { colour, element, letter, setText } from "./names.js";
import { facts, heading, slotOf, sync, visible } from "./parts.js";

export class TokenView {
  /** @param {HTMLElement} body @param {Send} send @param {Pool} pool */
  constructor(body, send, pool) {
    const title = element("h3", "", body);
    this.title = element("span", "mp-quote", title, { "data-testid": "token-text" });
    this.kind = element("span", "mp-kind", title);
    this.facts = element("dl", "mp-facts mp-flow", body, { "data-testid": "token-facts" });
    this.oddsTitle = heading(body, "What could have come here");
    this.oddsTitle.title = "The model's own odds, before temperature";
    this.odds = element("ol", "mp-odds", body, { "data-testid": "odds" });
    this.note = element("p", "mp-note", body);
    this.attention = new Attention(body, send, pool);
  }

  hide() {
    this.attention.heat.clear();
  }

  /**
   * @param {State} state
   * @param {BlockHistory} history
   * @param {Picked & { seq: number, token: number }} what
   */
  render(state, history, { seq: id, token: position }) {
    const seq = state.seqs[id];
    const slot = slotOf(state, seq, position);
    const sampling = history.sampling(state.seqs, id, position);
    const given = position < seq.num_prompt;
    const logprob = seq.logprobs[position];
    setText(this.title, visible(seq.pieces[position]));
    setText(this.kind, given ? `given to ${letter(id)}` : `written by ${letter(id)}`);
    facts(this.facts, [
      ["token id", seq.tokens[position]],
      ["position", position],
      ["its KV", slot ? `block ${slot.block}, slot ${slot.offset}`
        : seq.table.length ? "computed in the next step" : seq.swap_table.length ? "on the CPU" : "given back"],
      ["sampled", sampling && `step ${sampling.step}`],
      ["log-probability", logprob === null ? undefined : `${logprob.toFixed(4)} (${percent(Math.exp(logprob))})`],
    ]);
    this.renderOdds(id, seq, position, given, sampling, logprob);
    this.attention.render(state, id, position);
  }

  /**
   * @param {number} id
   * @param {Seq} seq
   * @param {number} position
   * @param {boolean} given
   * @param {{ step: number, top?: any[][] } | undefined} sampling
   * @param {number | null} logprob
   */
  renderOdds(id, seq, position, given, sampling, logprob) {
    const rows = (sampling?.top ?? []).map(([token, piece, value]) => ({ token, piece, value, chosen: token === seq.tokens[position] }));
    if (rows.length && logprob !== null && !rows.some((row) => row.chosen)) {
      rows.push({ token: seq.tokens[position], piece: seq.pieces[position], value: logprob, chosen: true });
    }
    this.odds.style.setProperty("--hue", colour(id));
    this.oddsTitle.hidden = given;
    sync(this.odds, rows, (row) => `${id} ${position} ${row.token}`, ({ token, piece, value, chosen }) => {
      const item = element("li", chosen ? "mp-chosen" : "", null, { "data-testid": "odd", "data-token-id": token });
      const bar = element("i", "", item);
      bar.style.width = `${100 * Math.exp(value)}%`;
      element("b", "", item).textContent = visible(piece);
      element("span", "", item).textContent = `${percent(Math.exp(value))} · ${value.toFixed(2)}`;
      return item;
    });
    setText(this.note, given ? "It came with the prompt; nothing was sampled."
      : rows.length ? "" : "The alternatives were not recorded.");
  }
}

const percent = (/** @type {number} */ share) => `${(100 * share).toFixed(share < 0.0995 || share > 0.995 ? 1 : 0)} %`;
