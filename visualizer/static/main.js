// Wires the page together: pulls records from the server, advances the player, draws what changed.

import { Arrows } from "./arrows.js";
import { Chart } from "./charts.js";
import { Chat } from "./chat.js";
import { Controls } from "./controls.js";
import { Guide } from "./guide.js";
import { narrate } from "./narration.js";
import { setText } from "./names.js";
import { Player } from "./player.js";
import { Pool } from "./pool.js";
import { check } from "./reducer.js";
import { Sequences } from "./sequences.js";
import { Settings } from "./settings.js";
import { Timeline } from "./timeline.js";

const RETRY = 700; // milliseconds between attempts when the server is gone

// `server` has the two functions of app.py, `figure` is the chart's, `plotly` its library's address, `scenarios` what
// the menu offers.
export function start({ element: root, server, figure, plotly, scenarios }) {
  const page = new Page(root.querySelector(".mp"), server, figure, plotly, scenarios);
  window.minipaged = page.handle(); // for tests and for the curious
  page.pull();
  page.frame(performance.now());
}

class Page {
  constructor(root, server, figure, plotly, scenarios) {
    this.root = root;
    this.server = server;
    this.player = new Player();
    this.status = null;
    this.pinned = null; // {seq, block} that was clicked
    this.hovered = null;
    this.gone = 0; // pulls in a row that the server has not answered
    const select = (what, how) => this.select(what, how);
    this.pool = new Pool(root, select);
    this.sequences = new Sequences(root, select);
    this.arrows = new Arrows(root.querySelector("[data-part=scene]"));
    this.timeline = new Timeline(root, this.player);
    this.controls = new Controls(root, (command) => server.command(command));
    this.settings = new Settings(root, (command) => server.command(command));
    this.controls.extras = () => this.settings.sampling();
    this.guide = new Guide(root, (command) => this.controls.ask(command), scenarios);
    this.chat = new Chat(root, (command) => server.command(command), () => this.controls.sampling());
    this.chart = new Chart(root, figure, plotly);
    this.banner = root.querySelector("[data-part=banner]");
    this.banner.querySelector("button").addEventListener("click", () => {
      this.dismissed = this.player.state.error;
      this.player.changed = true;
    });
    this.narration = root.querySelector("[data-part=narration]");
    root.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.select(null, "click");
    });
    const redraw = () => (this.player.changed = true);
    window.addEventListener("resize", redraw);
    this.sequences.list.addEventListener("scroll", redraw, { passive: true });
  }

  // --- the server ---

  // The long poll: the server answers when there is something new. A server that is gone is asked again and again;
  // one that was restarted answers with a new run, and the player starts over.
  async pull() {
    while (this.root.isConnected) {
      const { run, end } = this.player;
      let answer;
      try {
        answer = await this.server.pull({ run, cursor: end, status: this.statusVersion ?? -1 });
        if (answer?.run) {
          this.player.receive(answer);
          this.status = answer.status;
          this.statusVersion = answer.status_version;
          this.player.changed = true;
        }
      } catch (error) {
        console.warn(error);
        this.player.run = null; // whatever it was: begin again from a keyframe
      }
      this.gone = answer ? 0 : this.gone + 1;
      if (this.gone) {
        this.player.changed = true;
        await new Promise((resolve) => setTimeout(resolve, RETRY));
        await this.reloadIfReplaced();
      }
    }
  }

  // A server that serves pages but does not know this one is another version: take its page.
  async reloadIfReplaced() {
    if (this.gone < 3 || !this.statusVersion) return; // never connected: reloading would not help
    const answer = await fetch(document.baseURI, { method: "HEAD" }).catch(() => null);
    if (answer?.ok) location.reload();
  }

  // --- what is looked at ---

  select(what, how) {
    if (how === "hover") this.hovered = what;
    else this.pinned = JSON.stringify(what) === JSON.stringify(this.pinned) ? null : what;
    this.player.changed = true;
  }

  // Which sequences and blocks to keep bright while the others are dimmed; null for no selection.
  lit() {
    const what = this.hovered ?? this.pinned;
    const { seqs } = this.player.state;
    if (!what) return null;
    if (what.seq !== undefined) {
      const seq = seqs[what.seq];
      if (!seq) return null;
      return { ...what, open: this.pinned?.seq, seqs: new Set([what.seq]), blocks: new Set(seq.table) };
    }
    const sharers = Object.keys(seqs).map(Number).filter((id) => seqs[id].table.includes(what.block));
    return { block: what.block, open: this.pinned?.seq, seqs: new Set(sharers), blocks: new Set([what.block]) };
  }

  // --- drawing ---

  frame(now) {
    if (!this.root.isConnected) return;
    this.player.advance(now);
    if (this.player.changed) {
      this.player.changed = false;
      this.render();
    }
    this.chart.render(this.player, now);
    requestAnimationFrame((time) => this.frame(time));
  }

  render() {
    const { state } = this.player;
    const lit = this.lit();
    this.root.dataset.step = state.step;
    this.root.dataset.mode = this.player.mode;
    this.pool.render(state, lit);
    this.sequences.render(state, lit);
    this.arrows.render(lit, this.sequences, this.pool);
    this.timeline.render();
    this.controls.render(this.status);
    this.settings.render(this.status, this.player.head);
    this.guide.render(this.status, this.player);
    this.chat.render(this.player);
    this.renderNarration();
    this.renderBanner();
  }

  renderNarration() {
    const told = narrate(this.player);
    this.narration.setAttribute("aria-live", this.player.mode === "frozen" ? "polite" : "off");
    this.narration.dataset.kind = told?.kind ?? "";
    setText(this.narration.querySelector("b"), told?.kind ?? "ready");
    setText(this.narration.querySelector("span"), told?.text ?? "Nothing has happened yet: pick a prompt.");
  }

  renderBanner() {
    const { error } = this.player.state;
    const words = this.gone
      ? "The server does not answer. What you see is the last that came; trying to reconnect…"
      : error && error !== this.dismissed ? `Engine error: ${error}` : "";
    setText(this.banner.querySelector("span"), words);
    this.banner.querySelector("button").hidden = this.gone > 0;
    this.banner.hidden = !words;
  }

  // --- for tests ---

  handle() {
    return {
      dump: () => JSON.parse(JSON.stringify(this.player.state)),
      check: () => check(this.player.state),
      player: this.player,
    };
  }
}
