// The drawer that opens on a click and shows a block, a sequence or a token, with links between them. It takes a column
// of its own, so that it does not cover what was clicked. It shows the same step as the rest of the page.

import { BlockView } from "./inspect_block.js";
import { SequenceView } from "./inspect_sequence.js";
import { TokenView } from "./inspect_token.js";
import { History } from "./block_history.js";
import { element, letter } from "./names.js";
import { slotOf, sync } from "./parts.js";

export class Inspector {
  // `select(what, how)` is the page's method; `redraw()` requests another frame.
  /**
   * @param {HTMLElement} root
   * @param {Pool} pool
   * @param {Select} select
   * @param {Send} send
   * @param {() => void} redraw
   */
  constructor(root, pool, select, send, redraw) {
    this.pool = pool;
    this.select = select;
    this.redraw = redraw;
    this.size = 1; // slots in a block
    /** @type {Picked | null} */
    this.what = null; // what the drawer shows
    /** @type {string | null} */
    this.marked = null; // the slot that has the marker
    this.shown = "";
    this.root = root;
    this.drawer = root.querySelector("[data-part=drawer]");
    this.trail = element("nav", "mp-trail", this.drawer, { "aria-label": "Where you are" });
    this.close = element("button", "mp-close", this.drawer, {
      type: "button", "data-testid": "close", "aria-label": "Close (Esc)", title: "Close (Esc)",
    });
    this.close.textContent = "×";
    this.close.addEventListener("click", () => select(null, "go"));
    const view = (/** @type {new (body: HTMLElement, send: Send, pool: Pool) => any} */ View) => {
      const body = element("div", "mp-view-body", this.drawer, { hidden: "" });
      return { body, view: new View(body, send, pool) };
    };
    this.views = { block: view(BlockView), seq: view(SequenceView), token: view(TokenView) };
    this.history = new History();
    this.marker = element("span", "mp-marker", null, { "aria-hidden": "true" });
    this.listen();
    new ResizeObserver(redraw).observe(pool.grid.parentElement); // the arrows' ends have moved
  }

  listen() {
    const { drawer, select } = this;
    drawer.addEventListener("click", (/** @type {On} */ event) => {
      const what = goal(event.target.closest("[data-go]")?.dataset.go, this.what);
      if (what) select(what, "go");
    });
    drawer.addEventListener("pointerover", (/** @type {On} */ event) => this.hover(event.target.closest("[data-slot], [data-near]")));
    drawer.addEventListener("focusin", (/** @type {On} */ event) => this.hover(event.target.closest("[data-slot], [data-near]")));
    drawer.addEventListener("pointerleave", () => this.hover(null));
    document.addEventListener("keydown", (event) => {
      this.byKeyboard = true;
      if (event.key === "Escape" && this.what && this.root.isConnected) select(null, "go");
    }, true);
    document.addEventListener("pointerdown", () => (this.byKeyboard = false), true);
  }

  // Highlights the block or slot in the pool, and the arrow to it, while the pointer is over a token, a slot or a
  // block's prefix in the drawer.
  /** @param {HTMLElement | null} node */
  hover(node) {
    const place = node && (node.dataset.slot ?? node.dataset.near);
    const [block, offset] = place ? place.split(":").map(Number) : [];
    if (place) this.select({ seq: this.what?.seq, block, offset }, "hover");
    else if (this.hovering) this.select(null, "hover");
    this.hovering = Boolean(place);
  }

  // Marks the highlighted slot in its pool cell and in the drawer.
  /** @param {string | null} slot */
  mark(slot) {
    if (slot === this.marked && (!slot || this.marker.isConnected)) return;
    this.marked = slot;
    for (const node of this.drawer.querySelectorAll(".mp-marked")) node.classList.remove("mp-marked");
    this.marker.remove();
    if (!slot) return;
    const [block, offset] = slot.split(":").map(Number);
    for (const node of this.drawer.querySelectorAll(`[data-slot="${slot}"]`)) node.classList.add("mp-marked");
    const cell = this.pool.cellOf(block);
    if (!cell) return;
    this.marker.dataset.slot = slot;
    this.marker.style.left = `${(100 * offset) / this.size}%`;
    this.marker.style.width = `${100 / this.size}%`;
    cell.append(this.marker);
  }

  /** @param {Player} player @param {Picked | null} pinned @param {Lit | null} lit */
  render(player, pinned, lit) {
    const { state } = player;
    this.size = state.config.block_size ?? 1;
    const what = exists(state, pinned) ? pinned : null;
    if (Boolean(what) !== Boolean(this.what)) this.toggle(Boolean(what));
    this.what = what;
    const kind = what && kindOf(what);
    if (kind !== "token") this.views.token.view.hide();
    this.mark(lit?.block === undefined || lit.offset === undefined ? null : `${lit.block}:${lit.offset}`);
    if (!what || !kind) return;
    this.history.follow(player);
    for (const [name, { body }] of Object.entries(this.views)) body.hidden = name !== kind;
    this.views[kind].view.render(state, this.history, what);
    this.renderTrail(state, what);
    const key = `${kind} ${JSON.stringify(what)}`;
    if (key !== this.shown) this.views[kind].body.scrollTop = 0;
    this.shown = key;
  }

  /** @param {boolean} open */
  toggle(open) {
    this.drawer.hidden = !open;
    this.root.classList.toggle("mp-inspecting", open);
    this.hover(null);
    this.redraw();
    requestAnimationFrame(() => window.dispatchEvent(new Event("resize"))); // the charts adapt only to this event
    if (open && this.byKeyboard) {
      this.opener = /** @type {HTMLElement | null} */ (document.activeElement);
      this.close.focus();
    } else if (!open && this.opener) {
      this.opener.focus();
      this.opener = null;
    }
  }

  // The breadcrumb trail: sequence, block, token, as far as they are selected.
  /** @param {State} state @param {Picked} what */
  renderTrail(state, what) {
    /** @type {{ go: string, words: string }[]} */
    const steps = [];
    const slot = what.token === undefined || what.seq === undefined ? null : slotOf(state, state.seqs[what.seq], what.token);
    const block = what.token === undefined ? what.block : slot?.block;
    if (what.seq !== undefined) steps.push({ go: `seq:${what.seq}`, words: `sequence ${letter(what.seq)}` });
    if (block !== undefined) steps.push({ go: `block:${block}`, words: `block ${block}` });
    if (what.swap !== undefined) steps.push({ go: `cpu:${what.swap}`, words: `CPU block ${what.swap}` });
    if (what.token !== undefined) steps.push({ go: `token:${what.seq}:${what.token}`, words: `token ${what.token}` });
    sync(this.trail, steps, (step) => step.go, (step) => {
      const node = element("button", "", null, { type: "button", "data-go": step.go });
      node.textContent = step.words;
      return node;
    }, (node, step) => node.toggleAttribute("aria-current", step === steps.at(-1)));
  }
}

/** @param {Picked} what */
function kindOf(what) {
  if (what.token !== undefined) return "token";
  return what.block !== undefined || what.swap !== undefined ? "block" : "seq";
}

/** @param {State} state @param {Picked | null} what */
function exists(state, what) {
  if (!what) return false;
  const seq = what.seq === undefined ? undefined : state.seqs[what.seq];
  if (what.seq !== undefined && !seq) return false;
  if (what.token !== undefined) return seq !== undefined && what.token < seq.tokens.length;
  if (what.swap !== undefined) return what.swap < state.swap_ref_counts.length;
  return what.block === undefined || what.block < state.ref_counts.length;
}

// The selection that a `data-go` links to. A block opened from a sequence keeps that sequence selected.
/** @param {string | undefined} go @param {Picked | null | undefined} from */
function goal(go, from) {
  if (!go) return null;
  const [kind, ...numbers] = go.split(":");
  const [first, second] = numbers.map(Number);
  if (kind === "seq") return { seq: first };
  if (kind === "cpu") return from?.seq === undefined ? { swap: first } : { seq: from.seq, swap: first };
  if (kind === "block") return from?.seq === undefined ? { block: first } : { seq: from.seq, block: first };
  return { seq: first, token: second };
}
