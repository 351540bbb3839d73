// The view's controls: freeze, step, replay, seek, back to live. They change what the page shows, never the engine.

import { happened, lanesOf, told } from "./marks.js";
import { element, setText } from "./names.js";
import { setAttribute } from "./parts.js";

const EVERY = 250; // milliseconds between drawings of the marks

export class Timeline {
  /** @param {HTMLElement} root @param {Player} player */
  constructor(root, player) {
    this.player = player;
    this.scrub = root.querySelector("[data-part=scrub]");
    this.ticks = root.querySelector("[data-part=ticks]");
    this.legend = root.querySelector("[data-part=marks]");
    this.where = root.querySelector("[data-part=where]");
    this.freezeButton = root.querySelector("[data-do=freeze]");
    this.liveButton = root.querySelector("[data-do=live]");
    this.drawn = "";
    /** @type {string | null} */
    this.marked = null; // the run whose marks are drawn
    this.nextAt = 0;
    const on = (/** @type {string} */ name, /** @type {() => void} */ action) =>
      root.querySelector(`[data-do=${name}]`).addEventListener("click", action);
    on("freeze", () => this.toggle());
    on("back", () => player.stepBy(-1));
    on("forward", () => player.stepBy(1));
    on("live", () => player.live());
    this.scrub.addEventListener("input", () => player.seek(Number(this.scrub.value)));
    document.addEventListener("keydown", (event) => this.key(event, root));
  }

  toggle() {
    if (this.player.mode === "frozen") this.player.play();
    else this.player.freeze();
  }

  /** @param {On<KeyboardEvent>} event @param {HTMLElement} root */
  key(event, root) {
    if (!root.isConnected || event.ctrlKey || event.metaKey || event.altKey) return;
    if (root.dataset.view === "experiments") return; // the scene is not visible
    const typing = event.target.closest?.("input:not([type=range]), textarea, select, [contenteditable]");
    const pressing = event.key === " " && event.target.closest?.("button");
    if (typing || pressing) return;
    const { player } = this;
    /** @type {{ [key: string]: () => void }} */
    const actions = {
      " ": () => this.toggle(),
      ArrowLeft: () => (event.shiftKey ? player.stepEvent(-1) : player.stepBy(-1)),
      ArrowRight: () => (event.shiftKey ? player.stepEvent(1) : player.stepBy(1)),
      Home: () => player.seek(player.first),
      End: () => player.seek(player.end),
      l: () => player.live(),
      L: () => player.live(),
    };
    if (!actions[event.key]) return;
    // The engine's speed slider handles its own arrow keys.
    if (event.target.type === "range" && event.target !== this.scrub) return;
    event.preventDefault();
    actions[event.key]();
  }

  render() {
    const { player, scrub } = this;
    scrub.min = player.first;
    scrub.max = player.end;
    scrub.value = player.position;
    const frozen = player.mode === "frozen";
    setText(this.freezeButton, frozen ? "▶ Play" : "‖ Freeze");
    setAttribute(this.freezeButton, "title", frozen
      ? "Play on from here (space)" : "Freeze what you see; the engine goes on (space)");
    this.liveButton.classList.toggle("mp-on", player.mode === "live");
    const { current } = player;
    const marks = current ? told(happened(current)) : "";
    const words = `step ${player.state.step}${marks && `: ${marks}`}`;
    setAttribute(scrub, "aria-valuetext", words);
    const behind = player.end - player.position;
    setText(this.where, `step ${player.state.step}`);
    setAttribute(this.where, "title", player.mode === "live" ? "following live" : `${behind} records behind live`);
  }

  // Draws a coloured mark per record and kind of event, each kind in its own lane.
  /** @param {number} now */
  drawTicks(now) {
    const { player, ticks } = this;
    if (now < this.nextAt && player.run === this.marked) return;
    [this.nextAt, this.marked] = [now + EVERY, player.run];
    const width = ticks.clientWidth;
    const dark = Boolean(ticks.closest(".dark"));
    const key = `${player.run} ${player.first} ${player.end} ${width} ${dark}`;
    if (key === this.drawn || !width) return;
    this.drawn = key;
    const scale = window.devicePixelRatio || 1;
    [ticks.width, ticks.height] = [width * scale, ticks.clientHeight * scale];
    const pen = ticks.getContext("2d");
    const style = getComputedStyle(ticks);
    const lanes = lanesOf(player.head.config);
    const span = Math.max(1, player.end - player.first);
    const place = (/** @type {number} */ index) => Math.round(((index + 1) / span) * (ticks.width - 14 * scale) + 6 * scale);
    /** @param {string[]} marks @param {string} hue @param {number} top @param {number} height */
    const draw = (marks, hue, top, height) => {
      pen.fillStyle = style.getPropertyValue(hue);
      let last = -1;
      player.records.forEach((record, index) => {
        if (!record.marks.some((mark) => marks.includes(mark))) return;
        const x = place(index);
        if (x !== last) pen.fillRect(x, top, 3 * scale, height); // many records share one pixel
        last = x;
      });
    };
    draw(["engine_error"], "--mp-red", 0, ticks.height);
    lanes.forEach(({ marks, hue }, lane) => {
      const [top, bottom] = [lane, lane + 1].map((at) => Math.round((at * ticks.height) / lanes.length));
      draw(marks, hue, top, bottom - top - Math.min(1, scale));
    });
    this.drawLegend(lanes);
  }

  /** @param {typeof import("./marks.js").LANES} lanes */
  drawLegend(lanes) {
    const names = lanes.map(({ name }) => name).join();
    if (this.legend.dataset.lanes === names) return;
    this.legend.dataset.lanes = names;
    this.legend.replaceChildren(...lanes.map(({ name, hue }) => {
      const item = element("span", "", null, { "data-lane": name });
      element("i", "", item).style.background = `var(${hue})`;
      item.append(name);
      return item;
    }));
  }
}
