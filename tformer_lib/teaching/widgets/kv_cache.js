// The cache stepper. data.caches: {name: [{slots: [[position or -1, ...] per row], before: [length, ...], after: [...]}, ...]}

function draw(root, data, kit) {
  const names = Object.keys(data.caches);
  const passes = data.caches[names[0]].length;
  const said = kit.readout();
  const picture = kit.el("div", { class: "tf-scroll" });
  let name = names[0];
  let step = 0;
  const show = () => {
    const states = data.caches[name];
    said.textContent = sentence(states[step], step);
    picture.replaceChildren(rows(states, step, kit));
  };
  root.append(
    kit.controls(kit.select({ label: "Cache", options: names, value: name, change: (chosen) => ((name = chosen), show()) })),
    kit.stepper({ steps: passes, name: "pass", change: (to) => ((step = to), show()) }),
    said,
    picture,
  );
}

function sentence({ slots, before, after }, step) {
  const used = slots.flat().filter((position) => position >= 0).length;
  const all = slots.flat().length;
  const lost = after.reduce((sum, length) => sum + length, 0) - used;
  const what = step === 0 ? `Prefill: the rows bring ${after.join(" and ")} tokens.` : `Decode: each row brings one token, at positions ${before.join(" and ")}.`;
  return `${what} ${all} slots of memory, ${used} in use${lost ? `, ${lost} tokens evicted` : ""}.`;
}

// One line of boxes a row: the position of the token in each slot; new ones are filled, empty ones are dashed.
function rows(states, step, kit) {
  const { slots, before } = states[step];
  const size = 34;
  const left = 52;
  const columns = Math.max(...states.map((state) => state.slots[0].length));
  const boxes = slots.flatMap((row, b) => [
    kit.svg("text", { x: 0, y: 40 + 50 * b + 22, "font-size": 15 }, `row ${b}`),
    ...row.map((position, slot) => box(position, position >= before[b], left + size * slot, 40 + 50 * b, size, kit)),
  ]);
  const heads = slots[0].map((_, slot) =>
    kit.svg("text", { x: left + size * (slot + 0.5), y: 28, "text-anchor": "middle", "font-size": 15 }, slot),
  );
  const words = slots.map((row, b) => `row ${b}: ${row.map((p) => (p < 0 ? "empty" : p)).join(", ")}`).join("; ");
  const title = kit.svg("text", { x: 0, y: 28, "font-size": 15 }, "slot");
  return kit.picture(left + size * columns + 4, 46 + 50 * slots.length, `Position in each slot. ${words}`, title, heads, boxes);
}

function box(position, fresh, x, y, size, kit) {
  const empty = position < 0;
  const fill = empty ? "none" : kit.shade(fresh ? 0.45 : 0.2, kit.colours[fresh ? 1 : 0]);
  return kit.svg("g", {},
    kit.svg("rect", {
      x: x + 1, y, width: size - 2, height: size, rx: 3, "stroke-width": fresh && !empty ? 2 : 1,
      "stroke-dasharray": empty ? "3 3" : false, style: `fill:${fill};stroke:var(--tf-line)`,
    }),
    empty ? null : kit.svg("text", { x: x + size / 2, y: y + 22, "text-anchor": "middle", "font-size": 16 }, position),
  );
}
