// Chooses which sequences get a row, and arranges them as trees: a child of a fork, of parallel sampling or of a beam
// search is placed under its parent. The rows depend on the state alone, so a seek shows the same rows as playing.

const FINISHED = 12; // rows for families in which all sequences have ended
const ENDED = 3; // rows for ended sequences of a family that has unfinished ones

// [{id, depth, parent, skipped, rails}]: unfinished families in order of arrival, then ended ones, the latest first.
// `parent` is the nearest ancestor with a row; `skipped` counts the generations in between. `rails` are the lines drawn
// left of the row, one per ancestor: {kind, of}, where `of` is the ancestor that the line comes from.
/** @param {State} state */
export function familyRows(state) {
  const families = [...familiesOf(state)].map(([root, members]) => ({ root, members }));
  const goesOn = (/** @type {{ members: number[] }} */ { members }) => members.some((id) => !state.seqs[id].finish_reason);
  const alive = families.filter(goesOn);
  const over = families.filter((family) => !goesOn(family)).reverse();
  const rows = alive.flatMap(({ members }) => treeOf(state, kept(state, members)));
  let room = FINISHED;
  for (const { members } of over) {
    if (!room) break;
    const ended = members.filter((id) => state.seqs[id].finish_reason !== "pruned");
    const chosen = (ended.length ? ended : members).slice(-room);
    rows.push(...treeOf(state, new Set(chosen)));
    room -= chosen.length;
  }
  return rows;
}

/** @param {State} state @param {number} id */
function parentOf(state, id) {
  const { parent } = state.seqs[id];
  return parent === null || !state.seqs[parent] ? null : parent;
}

// root -> the ids of the root and all its descendants. A parent's id is always smaller than its children's ids.
/** @param {State} state */
function familiesOf(state) {
  /** @type {Map<number, number[]>} */
  const families = new Map();
  const familyOf = new Map(); // id -> its root's list
  for (const id of Object.keys(state.seqs).map(Number).sort((a, b) => a - b)) {
    const parent = parentOf(state, id);
    const family = parent === null ? [] : familyOf.get(parent);
    if (parent === null) families.set(id, family);
    familyOf.set(id, family);
    family.push(id);
  }
  return families;
}

// The members of an unfinished family that get a row. A beam search forks hundreds of times, so these are: unfinished
// sequences, their parents, the ancestors where their lines split, and the last few that ended without being pruned.
/** @param {State} state @param {number[]} members */
function kept(state, members) {
  const live = members.filter((id) => !state.seqs[id].finish_reason);
  const chosen = new Set(live);
  /** @type {Map<number, Set<number>>} */
  const branches = new Map(); // ancestor -> its children that lead to a live one
  for (const id of live) {
    const parent = parentOf(state, id);
    if (parent !== null) chosen.add(parent);
    for (let child = id, at = parent; at !== null; child = at, at = parentOf(state, at)) {
      const children = branches.get(at) ?? new Set();
      if (children.has(child)) break; // the ancestors above are already recorded
      branches.set(at, children.add(child));
    }
  }
  for (const [id, children] of branches) if (children.size > 1) chosen.add(id);
  const ended = members.filter((id) => ![null, "pruned"].includes(state.seqs[id].finish_reason));
  for (const id of ended.slice(-ENDED)) chosen.add(id);
  return chosen;
}

/** @param {State} state @param {Set<number>} chosen */
function treeOf(state, chosen) {
  /** @type {Map<number | null, number[]>} */
  const children = new Map();
  const skipped = new Map();
  for (const id of [...chosen].sort((a, b) => a - b)) {
    let parent = parentOf(state, id);
    let between = 0;
    for (; parent !== null && !chosen.has(parent); between += 1) parent = parentOf(state, parent);
    skipped.set(id, between);
    const siblings = children.get(parent) ?? [];
    children.set(parent, siblings);
    siblings.push(id);
  }
  /** @type {Place[]} */
  const rows = [];
  /** @param {number | null} parent @param {Place["rails"]} above */
  const visit = (parent, above) => {
    const siblings = children.get(parent) ?? [];
    siblings.forEach((id, index) => {
      const last = index === siblings.length - 1;
      const rails = parent === null ? [] : [...above, { kind: last ? "end" : "tee", of: parent }];
      const stem = children.has(id) ? [{ kind: "stem", of: id }] : [];
      rows.push({ id, parent, depth: rails.length, skipped: skipped.get(id), rails: [...rails, ...stem] });
      visit(id, parent === null ? [] : [...above, { kind: last ? "none" : "pass", of: parent }]);
    });
  };
  visit(null, []);
  return rows;
}
