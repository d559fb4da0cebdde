// The block-table animator. data: {block_size, stories: {name: [{said, tables: {name: {blocks, length}}, pool: [{holders, state, words, live, fresh}, ...]}, ...]}}

function draw(root, data, kit) {
  const names = Object.keys(data.stories);
  const said = kit.readout();
  const picture = kit.el("div", {});
  const steps = kit.el("div", {});
  let name = names[0];
  const show = (step) => {
    const state = data.stories[name][step];
    said.textContent = state.said;
    picture.replaceChildren(drawTables(state, data.block_size, kit), drawPool(state, data.block_size, kit));
  };
  const choose = (chosen) => {
    name = chosen;
    steps.replaceChildren(kit.stepper({ steps: data.stories[name].length, name: "step", change: show }));
  };
  root.append(kit.controls(kit.select({ label: "Story", options: names, value: name, change: choose })), steps, said, picture);
}

const WIDE = 352;

// A colour of its own for each sequence; a block of several holders has the colour of none of them.
function colourOf(holders, kit) {
  if (holders.length === 0) return "var(--tf-muted)";
  return holders.length > 1 ? kit.colours[4] : kit.colours["ABCD".indexOf(holders[0]) % 4];
}

// One line a sequence: its name, how many tokens it holds, and its block table as numbered boxes.
function drawTables({ tables }, size, kit) {
  const lines = Object.entries(tables);
  const words = lines.map(([name, { blocks, length }]) => `${name} holds ${length} tokens in blocks ${blocks.join(", ")}`).join("; ");
  const rows = lines.flatMap(([name, { blocks, length }], i) => [
    kit.svg("text", { x: 0, y: 24 + 34 * i + 18, "font-size": 14, "font-weight": 700 }, name),
    kit.svg("text", { x: 22, y: 24 + 34 * i + 18, "font-size": 13 }, `${length} tokens`),
    blocks.map((block, place) => [
      kit.svg("rect", { x: 112 + 40 * place, y: 24 + 34 * i, width: 36, height: 26, rx: 3, style: `fill:${kit.shade(0.2, colourOf([name], kit))};stroke:var(--tf-line)` }),
      kit.svg("text", { x: 130 + 40 * place, y: 24 + 34 * i + 18, "text-anchor": "middle", "font-size": 14 }, block),
    ]),
  ]);
  const title = lines.length ? "Block tables: where tokens 0 to 3, 4 to 7, ... lie" : "No sequence";
  return kit.picture(WIDE, 28 + 34 * Math.max(lines.length, 1), `Block tables. ${words || "none"}`,
    kit.svg("text", { x: 0, y: 14, "font-size": 12.5 }, title), rows);
}

// The pool, two blocks to a line. Fresh words are framed; stale words are struck out, also behind the last word of a held block; cached blocks are dashed.
function drawPool({ pool }, size, kit) {
  const [width, height] = [42, 58];
  const blocks = pool.map((block, i) => {
    const x = (i % 2) * (size * width + 14);
    const y = 22 + Math.floor(i / 2) * (height + 12);
    const colour = colourOf(block.holders, kit);
    const title = `${i}: ${block.holders.length ? `held by ${block.holders.join(" and ")}` : block.state}`;
    const frame = kit.svg("rect", {
      x: x + 1, y: y + 18, width: size * width - 2, height: height - 22, rx: 3, fill: "none", "stroke-width": block.state === "empty" ? 1 : 2,
      "stroke-dasharray": block.state === "held" ? false : "4 3", style: `stroke:${block.state === "empty" ? "var(--tf-line)" : colour}`,
    });
    const cells = block.words.map((word, offset) => slot(word, block, offset, x + width * offset, y + 18, width, height - 22, colour, kit));
    return kit.svg("g", {}, kit.svg("text", { x: x + 2, y: y + 12, "font-size": 12.5 }, title), cells, frame);
  });
  const words = pool.map((block, i) => `block ${i}, ${block.holders.length ? `held by ${block.holders.join(" and ")}` : block.state}: ${block.words.map((w) => w ?? "nothing").join(" ")}`);
  return kit.picture(WIDE, 22 + Math.ceil(pool.length / 2) * (height + 12), `The pool. ${words.join("; ")}`,
    kit.svg("text", { x: 0, y: 12, "font-size": 12.5 }, "The pool"), blocks);
}

function slot(word, block, offset, x, y, width, height, colour, kit) {
  const live = block.live[offset];
  const fill = block.fresh[offset] ? kit.shade(0.45, colour) : live ? kit.shade(0.16, colour) : "none";
  return kit.svg("g", {},
    kit.svg("rect", { x: x + 2, y: y + 1, width: width - 4, height: height - 2, style: `fill:${fill};stroke:${block.fresh[offset] ? colour : "none"}` }),
    word === null ? null : kit.svg("text", {
      x: x + width / 2, y: y + height / 2 + 4, "text-anchor": "middle", "font-size": word.length > 5 ? 10.5 : 12.5,
      "font-weight": block.fresh[offset] ? 700 : false, "text-decoration": live ? false : "line-through",
      opacity: live ? false : 0.75,
    }, word),
  );
}
