// Runs the page's reducer and player in node, without a browser. Called by test_scripts.py with the folder of the
// scripts and a file of runs: [{records: [[event, …], …], states: [the state after each record]}, …].

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

/** @typedef {{ records: EngineEvent[][], states: any[] }} Run */

const [folder, file] = process.argv.slice(2);
const address = (/** @type {string} */ name) => pathToFileURL(`${folder}/${name}`).href;
/** @type {typeof import("../../visualizer/static/reducer.js")} */
const { State, check } = await import(address("reducer.js"));
/** @type {typeof import("../../visualizer/static/player.js")} */
const { Player } = await import(address("player.js"));
/** @type {typeof import("../../visualizer/static/narration.js")} */
const { sourceOf } = await import(address("narration.js"));
/** @type {typeof import("../../visualizer/static/chart_kinds.js")} */
const { LineChart } = await import(address("chart_kinds.js"));
const plain = (/** @type {unknown} */ state) => JSON.parse(JSON.stringify(state));

/** @type {{ [name: string]: (run: Run) => void }} */
const CHECKS = {
  // The state after each record is the one that Python's reducer computed.
  reducer({ records, states }) {
    const state = new State();
    records.forEach((events, i) => {
      for (const event of events) state.apply(event);
      check(state);
      assert.deepEqual(plain(state), states[i], `record ${i}`);
    });
  },

  // Seeking, in any order, shows the state that playing from the beginning shows.
  seeking({ records, states }) {
    const player = loaded(records);
    let number = 1;
    for (let i = 0; i < 300; i += 1) {
      number = (number * 7919 + 31) % records.length; // jumps forward and back
      player.seek(number + 1);
      assert.deepEqual(plain(player.state), states[number], `record ${number}`);
    }
  },

  // Another run takes nobody away from an earlier moment; `live` leads to it, and who follows live is led there at once.
  others({ records, states }) {
    const player = new Player();
    player.receive(answer("one", 0, records, new State()));
    player.seek(5);
    player.receive(answer("two", 0, records.slice(0, 2), new State()));
    assert.deepEqual(plain(player.state), states[4]);
    assert.deepEqual([player.run, player.position, player.mode, player.atEnd], ["one", 5, "frozen", false]);
    assert.deepEqual([player.newest.run, player.newest.end], ["two", 2]);
    player.receive(answer("two", 2, records.slice(2, 4)));
    assert.equal(player.newest.end, 4);
    player.stepBy(1);
    assert.deepEqual(plain(player.state), states[5], "it can go on looking");
    player.live();
    assert.deepEqual([player.run, player.position, player.mode, player.next, player.atEnd], ["two", 4, "live", null, true]);
    assert.deepEqual(plain(player.state), states[3]);
    player.receive(answer("two", 4, records.slice(4, 6)));
    player.seek(2);
    assert.deepEqual(plain(player.state), states[1], "and can be rewound");
    player.live();
    player.receive(answer("three", 0, records.slice(0, 3), new State()));
    assert.deepEqual([player.run, player.position, player.mode], ["three", 3, "live"]);
    player.seek(1);
    player.receive(answer("four", 10, records.slice(10, 12), states[9])); // the server has forgotten its first records
    player.live();
    assert.deepEqual([player.run, player.first, player.position], ["four", 10, 12]);
    assert.deepEqual(plain(player.state), states[11]);
  },

  // Event by event, forward to the end and back to the beginning, shows every state once.
  stepping({ records, states }) {
    const player = loaded(records.slice(0, 60));
    const seen = [];
    while (player.position < player.end) {
      if (!player.sub && player.position) assert.deepEqual(plain(player.state), states[player.position - 1]);
      seen.push(JSON.stringify(player.state));
      player.stepEvent(1);
    }
    while (seen.length) {
      player.stepEvent(-1);
      assert.equal(JSON.stringify(player.state), seen.pop());
    }
    assert.deepEqual([player.position, player.sub], [1, 0]); // where a recording begins
  },

  // A live viewer pauses on rare marks, catches up, and ends with the newest state; a frozen one does not move.
  following({ records, states }) {
    const player = new Player();
    player.receive({ run: "a", first: 0, keyframe: plain(new State()), records: [] });
    let now = 0;
    records.forEach((events, i) => {
      player.receive({ first: i, records: [events] });
      player.advance((now += 50));
    });
    player.freeze();
    const held = player.position;
    player.advance((now += 1e6));
    assert.equal(player.position, held);
    player.live();
    assert.deepEqual(plain(player.state), states.at(-1));
    assert.equal(player.wait(now), Infinity);
  },

  // Live memory is bounded: the oldest records go, and what is left can still be reached.
  forgetting({ records, states }) {
    const player = new Player();
    const rounds = Math.ceil(1500 / records.length);
    player.receive({ run: "a", first: 0, keyframe: plain(new State()), records: records.slice(0, 5) });
    player.seek(3); // a viewer who froze the page, and whose records are forgotten
    for (let round = 0; round < rounds; round += 1) {
      player.receive({ first: player.end, records });
    }
    assert.ok(player.first > 0 && player.records.length <= 1200, `${player.records.length} records`);
    player.seek(0);
    assert.equal(player.position, player.first);
    player.seek(player.end);
    assert.deepEqual(plain(player.state).seqs, states.at(-1).seqs);
  },

  // The process' memory comes beside the records; a recording has none, and its chart neither the line nor its name.
  memory({ records }) {
    const chart = (/** @type {InstanceType<typeof Player>} */ player) => {
      const values = (/** @type {RunRecord} */ { metrics, rss }) => [metrics.used, rss];
      const figure = { data: [{}, {}], layout: {} };
      const line = new LineChart(/** @type {any} */ (null), figure, values, /** @type {any} */ ({ points: [], first: 0 }));
      return line.data(player, { first: 0, end: player.end });
    };
    const player = new Player();
    const rss = records.map((_, i) => 300 + i);
    const first = { run: "live", first: 0, keyframe: plain(new State()), records: records.slice(0, 5), rss: rss.slice(0, 5) };
    player.receive(first);
    player.receive({ run: "live", first: 5, records: records.slice(5), rss: rss.slice(5) });
    const drawn = chart(player);
    assert.deepEqual([drawn?.y[1], drawn?.showlegend], [rss, [true, true]]);
    assert.deepEqual(chart(loaded(records))?.showlegend, [true, false]);
  },

  // Only the reason of a `shared` event is one of the engine's words; an eviction policy gives any text as its reason.
  reasons() {
    const shared = /** @type {const} */ ({ type: "shared", seq_id: 0, logical: 0, block: 0, reason: "prefix" });
    assert.equal(sourceOf(shared), "shared_prefix");
    assert.equal(sourceOf({ ...shared, reason: "fork" }), "shared");
    assert.equal(sourceOf({ type: "evicted", block: 0, reason: "prefix" }), "evicted");
  },
};

/** @param {string} run @param {number} first @param {EngineEvent[][]} records @param {any} [keyframe] @returns {any} */
const answer = (run, first, records, keyframe) => ({ run, first, records, keyframe });

/** @param {EngineEvent[][]} records */
function loaded(records) {
  const player = new Player();
  player.load("run", records);
  player.freeze();
  return player;
}

/** @type {(Run & { checks: string[] })[]} */
const runs = JSON.parse(readFileSync(file, "utf8"));
for (const [number, run] of runs.entries()) {
  for (const name of run.checks) {
    try {
      CHECKS[name](run);
      console.log(`${name} ${number} ok`);
    } catch (error) {
      console.log(`${name} ${number} ${/** @type {Error} */ (error).stack}`);
      process.exitCode = 1;
    }
  }
}
