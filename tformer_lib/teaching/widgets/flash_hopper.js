// The pipeline explorer: when do the tensor cores wait?

const SCHEDULES = {
  "one warpgroup, in order": { groups: 1, ahead: false, lockstep: false },
  "two, in lockstep": { groups: 1, ahead: false, lockstep: true },
  "two, in turns (ping-pong)": { groups: 2, ahead: false, lockstep: false },
  "one, softmax beside products": { groups: 1, ahead: true, lockstep: false },
  "two, both ideas": { groups: 2, ahead: true, lockstep: false },
};

// data: {tiles, shown, presets: [[name, {product, softmax, load}], ...]}
function draw(root, data, kit) {
  const names = Object.keys(SCHEDULES);
  const first = data.presets[0][1];
  const state = { schedule: names[0], stages: 2, ...first };
  const said = kit.readout();
  const picture = kit.el("div", {});
  const table = kit.el("div", { class: "tf-scroll", tabindex: 0, role: "group", "aria-label": "idle time of every schedule" });
  const show = () => {
    const all = names.map((name) => simulate(SCHEDULES[name], state, data.tiles));
    const chosen = all[names.indexOf(state.schedule)];
    said.textContent = `Tensor cores idle ${percent(chosen.idle)} of the time. They ${reason(chosen, state)}.`;
    picture.replaceChildren(lanes(chosen, state, data.shown, kit));
    table.replaceChildren(comparison(names, all, state.schedule, kit));
  };
  const slider = (label, key, min, max, step) => kit.slider({ label, min, max, step, value: state[key], format: (v) => (key === "stages" ? String(v) : `${v} cycles`), change: (v) => ((state[key] = v), show()) });
  const sliders = { product: slider("One product", "product", 64, 1536, 32), softmax: slider("Softmax", "softmax", 0, 2048, 32), load: slider("Load of a tile", "load", 32, 2048, 32) };
  const set = (preset) => Object.entries(preset).forEach(([key, value]) => {
    const input = sliders[key].querySelector("input");
    input.value = value;
    input.dispatchEvent(new Event("input"));
  });
  root.append(
    kit.controls(kit.select({ label: "Schedule", options: names, value: state.schedule, change: (v) => ((state.schedule = v), show()) })),
    kit.controls(sliders.product, sliders.softmax, sliders.load, slider("Buffers", "stages", 1, 3, 1)),
    kit.controls(data.presets.map(([name, preset]) => kit.button(name, () => set(preset)))),
    said,
    picture,
    table,
  );
}

const percent = (share) => `${Math.round(100 * share)} %`;

function reason(run, { load, product, softmax }) {
  if (run.idle < 0.005) return "are the limit: nothing that remains to be hidden";
  if (run.busy.TMA > 0.97) return "wait for tiles of K and V: the loads are the limit";
  if (run.busy.softmax > 0.97) return "wait for the exponentials, which are the limit now";
  return "wait for a softmax or a load that nothing else hides";
}

// Tasks with a resource, a length and what they wait for. The earliest that can start goes first, ties in this order.
function tasks({ groups, ahead, lockstep }, { product, softmax, load, stages }, tiles) {
  const list = [];
  const by = {};
  const factor = lockstep ? 2 : 1; // in lockstep two warpgroups share every unit at the same moment
  const add = (name, resource, length, waits, group, tile) => list.push((by[name] = { name, resource, length, waits, group, tile }));
  for (let i = 0; i < tiles; i++) {
    const freed = (what) => (i >= stages ? Array.from({ length: groups }, (_, g) => `${what} ${i - stages} ${g}`) : []);
    add(`load K ${i}`, "TMA", load, freed("QK"), null, i);
    add(`load V ${i}`, "TMA", load, freed("PV"), null, i);
    for (let g = 0; g < groups; g++) {
      const before = i === 0 ? [] : [ahead ? `softmax ${i - 1} ${g}` : `PV ${i - 1} ${g}`];
      const twoBefore = ahead && i > 1 ? [`PV ${i - 2} ${g}`] : [];
      add(`QK ${i} ${g}`, "tensor cores", factor * product, [`load K ${i}`, ...before, ...twoBefore], g, i);
      add(`softmax ${i} ${g}`, "softmax", factor * softmax, [`QK ${i} ${g}`], g, i);
      const next = ahead && i + 1 < tiles ? [`QK ${i + 1} ${g}`] : [];
      add(`PV ${i} ${g}`, "tensor cores", factor * product, [`load V ${i}`, `softmax ${i} ${g}`, ...next], g, i);
    }
  }
  return { list, by };
}

function simulate(schedule, state, tiles) {
  const { list, by } = tasks(schedule, state, tiles);
  const free = { TMA: 0, "tensor cores": 0, softmax: 0 };
  const waiting = new Set(list);
  while (waiting.size) {
    let best = null;
    for (const task of waiting) {
      const needs = task.waits.map((name) => by[name]);
      if (needs.some((need) => need.end === undefined)) continue;
      const ready = Math.max(0, ...needs.map((need) => need.end));
      const start = Math.max(ready, free[task.resource]);
      if (best === null || start < best.start || (start === best.start && ready < best.ready)) best = { task, start, ready };
    }
    best.task.start = best.start;
    best.task.end = best.start + best.task.length;
    free[best.task.resource] = best.task.end;
    waiting.delete(best.task);
  }
  const from = by[`QK ${tiles / 2} 0`].start; // by then the pattern repeats
  const to = by[`QK ${tiles - 1} 0`].start;
  const period = (to - from) / (tiles / 2 - 1);
  const busy = {};
  for (const resource of Object.keys(free)) {
    const work = list.filter((task) => task.resource === resource && task.tile === 0).reduce((sum, task) => sum + task.length, 0);
    busy[resource] = work / period;
  }
  return { list, busy, idle: Math.max(0, 1 - busy["tensor cores"]) };
}

// A lane for each unit. A piece says what it is; its outline says whose.
function lanes(run, state, shown, kit) {
  const [left, top, width, height, gap] = [2, 22, 356, 28, 26];
  const list = run.list.filter((task) => task.tile < shown);
  const end = Math.max(...list.map((task) => task.end));
  const scale = width / end;
  const rows = [["TMA", "copies by TMA"], ["tensor cores", "tensor cores (S: Q Kᵀ, O: P V)"], ["softmax", "softmax (special-function units)"]];
  const colours = ["var(--tf-blue)", "var(--tf-vermilion)"];
  const drawn = rows.flatMap(([resource, title], i) => {
    const y = top + i * (height + gap);
    const pieces = list.filter((task) => task.resource === resource && task.length > 0).map((task) => {
      const colour = task.group === null ? "var(--tf-green)" : colours[task.group];
      const what = task.name.startsWith("load") ? `${task.name[5]}${task.tile}` : resource === "softmax" ? `${task.tile}` : `${task.name[0] === "Q" ? "S" : "O"}${task.tile}`;
      const wide = task.length * scale;
      return kit.svg("g", {},
        kit.svg("rect", { x: left + task.start * scale, y, width: Math.max(1, wide), height, "stroke-width": 1.5, "stroke-dasharray": task.group === 1 ? "4 2" : false, style: `fill:${kit.shade(0.3, colour)};stroke:${colour}` }),
        wide > 7 * what.length + 3 ? kit.svg("text", { x: left + (task.start + task.length / 2) * scale, y: y + 18, "text-anchor": "middle", "font-size": 12 }, what) : null,
      );
    });
    return [kit.svg("text", { x: left, y: y - 6, "font-size": 12 }, title), kit.svg("line", { x1: left, x2: left + width, y1: y + height, y2: y + height, style: "stroke:var(--tf-line)" }), ...pieces];
  });
  return kit.picture(left + width + 4, top + 3 * (height + gap), `Timeline of ${shown} tiles: tensor cores idle ${percent(run.idle)}`, drawn);
}

function comparison(names, all, chosen, kit) {
  const pad = "padding:0.15rem 0.5rem;text-align:left";
  const head = (text, scope, bold) => kit.el("th", { scope, style: `${pad};font-weight:${bold ? 700 : 400}` }, text);
  const rows = names.map((name, i) => kit.el("tr", {},
    head(name, "row", name === chosen),
    kit.el("td", { style: `${pad};text-align:right;white-space:nowrap;font-weight:${name === chosen ? 700 : 400}` }, percent(all[i].idle)),
  ));
  return kit.el("table", { style: "margin:0.5rem auto 0;border-collapse:collapse;color:inherit;font-size:0.9rem" },
    kit.el("thead", {}, kit.el("tr", {}, head("schedule", "col", true), head("idle", "col", true))),
    kit.el("tbody", {}, rows),
  );
}
