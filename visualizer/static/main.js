// Wires the page together: pulls records from the server, advances the player, draws what changed.

import { Arrows } from "./arrows.js";
import { Charts } from "./charts.js";
import { Chat } from "./chat.js";
import { Controls } from "./controls.js";
import { Experiments } from "./experiments.js";
import { Flights } from "./flights.js";
import { Groups } from "./groups.js";
import { Guide } from "./guide.js";
import { Inspector } from "./inspector.js";
import { narrate } from "./narration.js";
import { setHidden, setText } from "./names.js";
import { setAttribute } from "./parts.js";
import { Playback } from "./playback.js";
import { Player } from "./player.js";
import { Pool } from "./pool.js";
import { Recordings } from "./recording.js";
import { check, reservesAhead } from "./reducer.js";
import { Role } from "./role.js";
import { Sequences } from "./sequences.js";
import { Settings } from "./settings.js";
import { Sources } from "./sources.js";
import { spotlight } from "./spotlight.js";
import { SwapSpace } from "./swap.js";
import { Timeline } from "./timeline.js";

const SOON = 20; // milliseconds: what is due within that time is left to the next frame
const LOOK = 50; // milliseconds between checks for what is due when nothing changes
const RETRY = 700; // milliseconds between attempts when the server does not answer
// What a viewer does leads the view to where it can be seen. These commands change nothing that is on the scene.
const LEAVE_THE_VIEW = ["answer", "asks", "attention", "check", "pause", "rate"];
const NO_ENGINE = { ok: false, message: "This is a recording; there is no engine to control." };

// Starts the page. `server` has the server functions of app.py, `figures` are the charts' figures, `plotly` is the URL
// of plotly.js. `more` has the sources that the narration links to, the scenarios, the recordings' names, and, without
// an engine, the recording to replay.
/** @param {{ element: HTMLElement, server: any, figures: any, plotly: string | null, more?: any }} page */
export function start({ element: root, server, figures, plotly, more = {} }) {
  const blank = root.innerHTML;
  const page = new Page(root.querySelector(".mp"), server, figures, plotly, more);
  // For tests and for the browser's console. `again` restarts the page without the cost of a reload; the old page stops
  // by itself, since its elements are no longer in the document.
  const again = () => {
    root.innerHTML = blank;
    start({ element: root, server, figures, plotly, more });
  };
  window.minipaged = { ...page.handle(), again };
  if (more.replay) page.replay(more.replay);
  page.player.wake = () => page.askFrame();
  page.pull();
  page.askFrame();
}

class Page {
  /** @type {Shown | null} */
  recording = null; // what is shown instead of the engine's run
  only = false; // whether there is no engine to go back to
  wake = () => {}; // lets `pull` go on after a recording
  /** @type {number | null} */
  statusVersion = null; // of the status that came last
  /** @type {string | null} */
  kept = null; // the new run that the viewer does not want to see now
  served = false; // whether the server has served a page since the last pull failed

  /** @param {HTMLElement} root @param {any} server @param {{ [name: string]: Figure }} figures @param {string | null} plotly @param {any} more */
  constructor(root, server, figures, plotly, more) {
    this.root = root;
    this.server = server;
    this.player = new Player();
    /** @type {Status | null} */
    this.status = null; // the engine's
    /** @type {Picked | null} */
    this.pinned = null; // the selection {seq, block, …} that was clicked
    /** @type {Picked | null} */
    this.hovered = null;
    this.gone = 0; // consecutive pulls without an answer
    const select = /** @type {Select} */ ((what, how) => this.select(what, how));
    this.pool = new Pool(root, select);
    this.sequences = new Sequences(root, select);
    this.arrows = new Arrows(root.querySelector("[data-part=scene]"));
    this.timeline = new Timeline(root, this.player);
    this.role = new Role(root, server, more);
    // While a recording is shown, commands must not reach the live engine.
    const send = async (/** @type {Command} */ command) => {
      if (this.recording) return NO_ENGINE;
      const answer = await this.role.send(command);
      if (answer?.ok && !LEAVE_THE_VIEW.includes(command.do)) this.player.live();
      return answer;
    };
    this.controls = new Controls(root, send);
    this.settings = new Settings(root, send, more.choices);
    this.controls.extras = () => this.settings.sampling();
    this.controls.refused = (answer) => this.settings.refused(answer);
    this.guide = new Guide(root, (command) => this.controls.ask(command), more.scenarios ?? [],
      (tab) => this.charts.show(tab));
    this.chat = new Chat(root, send, () => this.controls.sampling());
    this.experiments = new Experiments(root, (command) => this.role.send(command), more.experiments ?? [], !more.replay);
    this.inspector = new Inspector(root, this.pool, select, send, () => (this.player.changed = true));
    this.playback = new Playback(root, this.player);
    this.sources = new Sources(root, more.sources);
    this.swap = new SwapSpace(root, select);
    this.groups = new Groups(root, this.pool);
    this.flights = new Flights(root.querySelector("[data-part=scene]"), this.pool, this.swap);
    this.recordings = new Recordings(root, server, more.recordings ?? [], {
      load: (name, text, records) => this.showRecording(name, text, records),
      leave: () => this.leaveRecording(),
      text: () => this.recording?.text,
    });
    this.charts = new Charts(root, figures, plotly);
    this.banner = root.querySelector("[data-part=banner]");
    this.banner.querySelector("[data-do=restart]").addEventListener("click", () => this.controls.ask({ do: "reset" }));
    this.banner.querySelector("[data-do=dismiss]").addEventListener("click", () => {
      this.dismissed = this.player.state.error;
      this.player.changed = true;
    });
    this.newRun = root.querySelector("[data-part=new-run]");
    this.newRun.querySelector("[data-do=go-there]").addEventListener("click", () => this.player.live());
    this.newRun.querySelector("[data-do=keep-looking]").addEventListener("click", () => {
      this.kept = this.player.newest.run;
      this.player.changed = true;
    });
    this.narration = root.querySelector("[data-part=narration]");
    root.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.select(null, "click");
    });
    const redraw = () => (this.player.changed = true);
    window.addEventListener("resize", redraw);
    document.fonts.addEventListener("loadingdone", redraw); // widths are others now
    this.sequences.list.addEventListener("scroll", redraw, { passive: true });
  }

  // --- the server ---

  // The long poll: the server answers when there are new records. If it does not answer, the page retries; a restarted
  // server answers with a new run, and the player starts over.
  async pull() {
    while (this.root.isConnected) {
      if (this.recording) await new Promise((resolve) => (this.wake = () => resolve(null))); // the live run is not shown
      const { run, end } = this.player.newest;
      let answer;
      try {
        const asked = { run, cursor: end, status: this.statusVersion ?? -1, idle: document.hidden };
        answer = await this.server.pull(asked);
        if (this.recording) continue;
        if (answer?.run) {
          this.player.receive(answer);
          this.status = answer.status;
          this.statusVersion = answer.status_version;
          this.player.changed = true;
        }
      } catch (error) {
        if (this.recording) continue;
        console.warn(error);
        this.player.newest.run = null; // recover from any error: start over from a keyframe
      }
      this.gone = answer ? 0 : this.gone + 1;
      if (answer) this.served = false;
      if (this.gone) {
        this.player.changed = true;
        await new Promise((resolve) => setTimeout(resolve, RETRY));
        await this.reloadIfReplaced();
      }
    }
  }

  // Reloads the page if the server was replaced: it serves pages, but this page's pulls fail.
  async reloadIfReplaced() {
    if (this.gone < 3 || !this.statusVersion) return; // never connected: reloading would not help
    const answer = await fetch(document.baseURI, { method: "HEAD" }).catch(() => null);
    // The server may have started after the last pull failed: reload only if a pull fails while pages are served.
    if (answer?.ok && this.served) location.reload();
    this.served = Boolean(answer?.ok);
  }

  // --- recordings instead ---

  /** @param {{ name: string, text?: string, note?: string }} replay */
  async replay({ name, text, note }) {
    this.only = true;
    if (this.recordings.show(name, text ?? (await this.server.recording({ name })).text) && note) this.recordings.complain(note);
  }

  /** @param {string} name @param {string} text @param {EngineEvent[][]} records */
  showRecording(name, text, records) {
    this.recording = { name, text };
    this.player.load(name, records);
    this.select(null, "hover");
    this.pinned = null;
    this.gone = 0;
    if (this.root.dataset.view === "chat") this.chat.show("watch");
    this.showSource();
  }

  leaveRecording() {
    this.recording = null;
    this.pinned = null;
    this.player.unload();
    this.showSource();
    this.wake();
  }

  showSource() {
    this.root.dataset.source = this.recording ? "recording" : "engine";
    const notice = this.root.querySelector("[data-part=notice]");
    notice.hidden = !this.recording;
    if (!this.recording) return;
    setText(notice.querySelector("span"), `Recording: ${this.recording.name}`);
    notice.querySelector("button").hidden = this.only;
  }

  // --- selection ---

  /** @param {Picked | null} what @param {How} how */
  select(what, how) {
    const same = (/** @type {Picked | null} */ other) => JSON.stringify(what) === JSON.stringify(other);
    if (how === "hover" && same(this.hovered)) return; // the pointer moves often
    if (how === "hover") this.hovered = what;
    else if (how === "go") this.pinned = what;
    else this.pinned = same(this.pinned) ? null : what;
    this.player.changed = true;
  }

  // The sequences and blocks to highlight while the others are dimmed; null without a selection.
  lit() {
    const { state } = this.player;
    const lit = spotlight(this.hovered, state) ?? spotlight(this.pinned, state);
    return lit && { ...lit, hovered: Boolean(this.hovered), open: this.pinned?.seq };
  }

  // --- drawing ---

  // Requests a frame. Called only if there is something to draw now or soon: sixty frames a second would cost time even
  // if nothing has changed.
  askFrame() {
    if (this.asked) return;
    this.asked = true;
    clearTimeout(this.timer);
    requestAnimationFrame((time) => this.frame(time));
  }

  /** @param {number} now */
  frame(now) {
    this.asked = false;
    if (!this.root.isConnected) return;
    this.player.advance(now);
    if (this.player.changed) {
      this.player.changed = false;
      this.render();
    }
    this.timeline.drawTicks(now);
    this.charts.render(this.player, now);
    if (this.asked) return;
    const wait = this.player.wait(now);
    if (wait < SOON || document.hidden) this.askFrame(); // a hidden page gets no frames
    else this.timer = setTimeout(() => this.frame(performance.now()), Math.min(wait, LOOK));
  }

  render() {
    this.renderBanner();
    if (this.root.dataset.view === "experiments") return; // the scene is not visible
    const { state } = this.player;
    const lit = this.lit();
    this.root.dataset.step = String(state.step);
    this.root.dataset.mode = this.player.mode;
    this.root.dataset.sub = String(this.player.sub);
    this.root.toggleAttribute("data-ahead", reservesAhead(state));
    this.pool.render(this.player, lit);
    this.inspector.render(this.player, this.pinned, lit);
    this.sequences.render(state, lit);
    this.swap.render(state, lit);
    this.groups.render(state);
    this.timeline.render();
    this.playback.render();
    this.controls.render(this.status);
    this.settings.render(this.status, this.player.head);
    this.guide.render(this.status, this.player, this.recording);
    if (!this.recording) this.chat.render(this.player); // a recording's requests may have the same ids
    this.renderNarration();
    setHidden(this.newRun, !this.player.next || this.player.next.run === this.kept);
    // Last, what reads positions: after all writes, so that the browser computes the layout only once.
    this.sequences.showNewest();
    this.arrows.render(lit, this.sequences, this.pool, this.swap, this.player);
    this.flights.render(this.player);
  }

  renderNarration() {
    const told = narrate(this.player);
    setAttribute(this.narration, "aria-live", this.player.mode === "frozen" ? "polite" : "off");
    setAttribute(this.narration, "data-kind", told?.kind ?? "");
    setText(this.narration.querySelector("b"), told?.kind ?? "ready");
    setText(this.narration.querySelector("span"), told?.text ?? (this.recording ? "The recording begins here: press Play."
      : this.root.dataset.role === "viewer" ? "Nothing has happened yet." : "Nothing has happened yet: pick a prompt."));
    this.sources.render(told, this.player.state.config.memory);
  }

  renderBanner() {
    const { error } = this.player.state;
    const words = this.gone
      ? "The server does not answer. What you see is the last that came; trying to reconnect…"
      : error && error !== this.dismissed ? `Engine error: ${error}` : "";
    setText(this.banner.querySelector("span"), words);
    for (const button of this.banner.querySelectorAll("button")) {
      setHidden(button, this.gone > 0 || Boolean(this.recording && button.dataset.do === "restart"));
    }
    setHidden(this.banner, !words);
    this.root.toggleAttribute("data-banner", Boolean(words));
  }

  // --- for tests ---

  handle() {
    return {
      dump: () => JSON.parse(JSON.stringify(this.player.state)),
      check: () => check(this.player.state),
      player: this.player,
      send: (/** @type {Command} */ command) => this.role.send(command),
      charts: this.charts,
      inspector: this.inspector,
    };
  }
}
