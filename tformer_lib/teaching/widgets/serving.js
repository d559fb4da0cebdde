// The scheduler stepper. data.runs: {name: {budget, steps: [{states: [[what, tokens] per request], owners: [request or -1
// per block], tokens}]}}; data.names: the requests' letters.

const LOOKS = {
  reads: { fill: 3, share: 0.55 },
  writes: { fill: 0, share: 0.5 },
  idle: { fill: 4, share: 0.12, dash: "3 3" },
  waits: { fill: 4, share: 0, dash: "2 4" },
  preempted: { fill: 1, share: 0.5 },
};

function draw(root, data, kit) {
  const names = Object.keys(data.runs);
  const said = kit.readout();
  const picture = kit.el("div", { class: "tf-scroll" });
  const place = kit.el("div");
  let name = names[1];
  const start = () => {
    const { steps } = data.runs[name];
    place.replaceChildren(kit.stepper({ steps: steps.length, change: (step) => show(step) }));
  };
  const show = (step) => {
    const run = data.runs[name];
    said.textContent = sentence(run, step, data.names);
    picture.replaceChildren(lanes(run, step, data, kit), pool(run.steps[step], data, kit));
  };
  root.append(
    kit.controls(kit.select({ label: "Schedule", options: names, value: name, change: (chosen) => ((name = chosen), start()) })),
    place,
    said,
    picture,
  );
}

function sentence({ steps, budget }, step, names) {
  const { states, tokens, owners } = steps[step];
  const doing = (what) => names.filter((_, i) => states[i][0] === what).join(", ");
  const parts = [
    ["reads", "Reading"], ["writes", "Writing"], ["idle", "Idle"], ["preempted", "Preempted"], ["waits", "Waiting"],
  ].filter(([what]) => doing(what)).map(([what, word]) => `${word}: ${doing(what)}`);
  const held = owners.filter((owner) => owner >= 0).length;
  const limit = budget ? ` of at most ${budget}` : "";
  return `${parts.join(". ") || "Nothing to do"}. ${tokens} tokens computed${limit}, ${held} of ${owners.length} blocks held.`;
}

// A line a request, a column a step; what is to come is left out.
function lanes({ steps }, step, { names }, kit) {
  const size = 22;
  const left = 26;
  const cells = names.flatMap((letter, row) => [
    kit.svg("text", { x: 6, y: 34 + size * row + 16, "font-size": 14 }, letter),
    ...steps.slice(0, step + 1).map(({ states }, column) => cell(states[row], left + size * column, 34 + size * row, size, column === step, kit)),
  ]);
  const heads = steps.map((_, column) =>
    kit.svg("text", { x: left + size * (column + 0.5), y: 28, "text-anchor": "middle", "font-size": 12, opacity: column <= step ? 1 : 0.75 }, column + 1),
  );
  const title = kit.svg("text", { x: 0, y: 11, "font-size": 13 }, "R reads, W writes, × idle, ! loses its blocks");
  const words = names.map((letter, i) => `${letter} ${steps[step].states[i][0]}`).join(", ");
  const width = Math.max(left + size * steps.length + 4, 310);
  return kit.picture(width, 40 + size * names.length, `Requests by steps. Now: ${words}`, title, heads, cells);
}

function cell([what, tokens], x, y, size, now, kit) {
  const look = LOOKS[what];
  if (!look) return null;
  const letter = { reads: `R${tokens}`, writes: "W", idle: "×", preempted: "!", waits: "" }[what];
  return kit.svg("g", {},
    kit.svg("rect", {
      x: x + 1, y: y + 1, width: size - 2, height: size - 2, rx: 3, "stroke-width": now ? 2 : 1, "stroke-dasharray": look.dash ?? false,
      style: `fill:${kit.shade(look.share, kit.colours[look.fill])};stroke:var(--tf-line)`,
    }),
    kit.svg("text", { x: x + size / 2, y: y + 16, "text-anchor": "middle", "font-size": 12 }, letter),
  );
}

// The blocks of the pool, each with the letter of its owner.
function pool({ owners }, { names, blockSize }, kit) {
  const size = 26;
  const across = 12;
  const boxes = owners.flatMap((owner, block) => {
    const x = 2 + size * (block % across);
    const y = 22 + size * Math.floor(block / across);
    const fill = owner < 0 ? "none" : kit.shade(0.2 + 0.1 * (owner % 3), kit.colours[owner % 6]);
    return [
      kit.svg("rect", { x, y, width: size - 3, height: size - 3, rx: 3, "stroke-dasharray": owner < 0 ? "3 3" : false, style: `fill:${fill};stroke:var(--tf-line)` }),
      owner < 0 ? null : kit.svg("text", { x: x + (size - 3) / 2, y: y + 17, "text-anchor": "middle", "font-size": 12 }, names[owner]),
    ];
  });
  const words = owners.map((owner) => (owner < 0 ? "free" : names[owner])).join(", ");
  const title = kit.svg("text", { x: 0, y: 12, "font-size": 13 }, `blocks of ${blockSize} tokens, and whose they are`);
  return kit.picture(Math.max(2 + size * across, 310), 26 + size * Math.ceil(owners.length / across), `Blocks: ${words}`, title, boxes);
}
