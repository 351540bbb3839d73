// Controls of the view in detail: stepping event by event, the speed of replaying, the tooltip of the timeline's marks,
// and the list of recent events, where a click seeks to the event.

import { happened, told } from "./marks.js";
import { element, setText } from "./names.js";

const LISTED = 30; // entries in the list
const NEAR = 5; // pixels: largest distance between the pointer and the mark that it selects
const TOO_COMMON = ["allocate", "write"];

// An entry of the list of recent events: the number of its record, and what the record says.
/** @typedef {{ number: number, metrics: Metrics, told: Told }} Entry */

export class Playback {
  /** @param {HTMLElement} root @param {Player} player */
  constructor(root, player) {
    this.listed = ""; // names the entries of the list
    this.root = root;
    this.player = player;
    this.panel = root.querySelector("[data-part=events]");
    this.list = this.panel.querySelector("ol");
    this.toggle = root.querySelector("[data-do=events]");
    this.tip = root.querySelector("[data-part=tip]");
    this.marks = root.querySelector("[data-part=marks]");
    const on = (/** @type {string} */ name, /** @type {() => void} */ action) =>
      root.querySelector(`[data-do=${name}]`).addEventListener("click", action);
    on("event-back", () => player.stepEvent(-1));
    on("event-forward", () => player.stepEvent(1));
    on("events", () => this.open(this.panel.hidden));
    on("events-close", () => this.open(false));
    root.querySelector("[data-part=speed]").addEventListener("change", (/** @type {On} */ event) => {
      player.speed = Number(event.target.value);
    });
    this.list.addEventListener("click", (/** @type {On} */ event) => {
      const number = event.target.closest("[data-number]")?.dataset.number;
      if (number !== undefined) player.seek(Number(number));
    });
    const scrub = root.querySelector("[data-part=scrub]");
    scrub.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => this.point(event, scrub));
    scrub.addEventListener("pointerleave", () => (this.tip.hidden = true));
  }

  /** @param {boolean} open */
  open(open) {
    this.panel.hidden = !open;
    this.toggle.setAttribute("aria-expanded", String(open));
    this.player.changed = true;
    if (!open && this.panel.contains(document.activeElement)) this.toggle.focus();
  }

  // Shows the tooltip: the events at the mark under the pointer, above the legend of all colours.
  /** @param {PointerEvent} event @param {HTMLInputElement} scrub */
  point(event, scrub) {
    const { player } = this;
    const box = scrub.getBoundingClientRect();
    const span = Math.max(1, player.end - player.first);
    const track = box.width - 14;
    const index = ((event.clientX - box.left - 7) / track) * span;
    const reach = Math.max(1, (NEAR / track) * span);
    const near = player.records
      .map((record, i) => ({ record, away: Math.abs(i + 1 - index) }))
      .filter(({ record, away }) => record.mark && away <= reach)
      .sort((a, b) => a.away - b.away)[0];
    const number = Math.max(0, Math.min(player.records.length - 1, Math.round(index) - 1));
    const record = near?.record ?? player.records[number];
    if (!record) return;
    const found = happened(record);
    setText(this.tip.querySelector("b"), `step ${record.metrics.step}${found.length ? ` · ${told(found)}` : ""}`);
    for (const lane of this.marks.children) {
      lane.classList.toggle("mp-here", found.some(({ name }) => name === lane.dataset.lane));
    }
    this.tip.hidden = false;
    const half = this.tip.offsetWidth / 2;
    const room = document.documentElement.clientWidth - half - 8;
    this.tip.style.left = `${Math.max(half + 8, Math.min(room, event.clientX)) - box.left}px`;
  }

  render() {
    if (this.panel.hidden) return;
    const { player } = this;
    /** @type {Entry[]} */
    const told = [];
    for (let i = player.records.length - 1; i >= 0 && told.length < LISTED; i -= 1) {
      const { metrics, told: sentence } = player.records[i];
      if (sentence && !TOO_COMMON.includes(sentence.kind)) told.push({ number: player.first + i + 1, metrics, told: sentence });
    }
    const key = `${player.run} ${told.map(({ number }) => number)}`;
    if (key !== this.listed) {
      this.listed = key;
      this.list.replaceChildren(...told.map(row));
    }
    for (const item of this.list.children) {
      item.firstChild.toggleAttribute("aria-current", Number(item.firstChild.dataset.number) === player.position);
    }
  }
}

/** @param {Entry} entry */
function row({ number, metrics, told }) {
  const item = element("li", "");
  const button = element("button", "", item, { type: "button", "data-number": number, "data-testid": "event" });
  element("small", "", button).textContent = String(metrics.step);
  element("b", "", button, { "data-kind": told.kind }).textContent = told.kind;
  element("span", "", button).textContent = told.text;
  return item;
}
