// The view's own controls: freeze, step, replay, seek, back to live. They move what is looked at, never the engine.

const TICK = {
  preempted: "--mp-red", copied: "--mp-orange", forked: "--mp-blue", engine_error: "--mp-red",
  swapped_out: "--mp-purple", swapped_in: "--mp-purple", finished: "--mp-green",
};

export class Timeline {
  constructor(root, player) {
    this.player = player;
    this.scrub = root.querySelector("[data-part=scrub]");
    this.ticks = root.querySelector("[data-part=ticks]");
    this.where = root.querySelector("[data-part=where]");
    this.freezeButton = root.querySelector("[data-do=freeze]");
    this.liveButton = root.querySelector("[data-do=live]");
    this.drawn = "";
    const on = (name, action) => root.querySelector(`[data-do=${name}]`).addEventListener("click", action);
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

  key(event, root) {
    if (!root.isConnected || event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest?.("input:not([type=range]), textarea, select, [contenteditable]");
    const pressing = event.key === " " && event.target.closest?.("button");
    if (typing || pressing) return;
    const { player } = this;
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
    // The engine's speed slider keeps its own arrows.
    if (event.target.type === "range" && event.target !== this.scrub) return;
    event.preventDefault();
    actions[event.key]();
  }

  render() {
    const { player, scrub } = this;
    scrub.min = player.first;
    scrub.max = player.end;
    scrub.value = player.position;
    const span = Math.max(1, player.end - player.first);
    scrub.style.setProperty("--at", `${(100 * (player.position - player.first)) / span}%`);
    this.freezeButton.textContent = player.mode === "frozen" ? "▶ Play" : "❚❚ Freeze";
    this.freezeButton.title = player.mode === "frozen"
      ? "Play on from here (space)" : "Freeze what you see; the engine goes on (space)";
    this.liveButton.classList.toggle("mp-on", player.mode === "live");
    const behind = player.end - player.position;
    this.where.textContent = `step ${player.state.step}`;
    this.where.title = player.mode === "live" ? "following live" : `${behind} records behind live`;
    this.drawTicks();
  }

  // Coloured marks that invite a jump: forks, copies, preemptions.
  drawTicks() {
    const { player, ticks } = this;
    const width = ticks.clientWidth;
    const key = `${player.run} ${player.first} ${player.end} ${width}`;
    if (key === this.drawn || !width) return;
    this.drawn = key;
    const scale = window.devicePixelRatio || 1;
    ticks.width = width * scale;
    ticks.height = ticks.clientHeight * scale;
    const pen = ticks.getContext("2d");
    const style = getComputedStyle(ticks);
    const span = Math.max(1, player.end - player.first);
    player.records.forEach((record, index) => {
      if (!TICK[record.mark]) return;
      pen.fillStyle = style.getPropertyValue(TICK[record.mark]);
      // There are many finishes, and little to see in them: half as tall.
      const top = record.mark === "finished" ? ticks.height / 2 : 0;
      pen.fillRect(Math.round(((index + 1) / span) * (ticks.width - 14 * scale) + 6 * scale), top, 3 * scale, ticks.height - top);
    });
  }
}
