// The tile stepper. data: {v, tile, cases: {name: {scores, states: [{m, l, O, correction, P}, ...], out, lse}}}; null is minus infinity.

function draw(root, data, kit) {
  const names = Object.keys(data.cases);
  const tiles = data.v.length / data.tile;
  const said = kit.readout();
  const picture = kit.el("div", {});
  const table = kit.el("div", { class: "tf-scroll", tabindex: 0, role: "group", "aria-label": "running state" });
  let name = names[0];
  let step = 0;
  const show = () => {
    const one = data.cases[name];
    said.textContent = sentence(one, step, tiles, data);
    picture.replaceChildren(grid(one, step, data, kit));
    table.replaceChildren(stateTable(one, step, tiles, kit));
  };
  root.append(
    kit.controls(kit.select({ label: "Who may look", options: names, value: name, change: (chosen) => ((name = chosen), show()) })),
    kit.stepper({ steps: tiles + 2, name: "step", change: (to) => ((step = to), show()) }),
    said,
    picture,
    table,
  );
}

const number = (x) => (x === null ? "−∞" : x.toFixed(2).replace("-", "−"));

function sentence(one, step, tiles, data) {
  if (step === 0) return "Before the first tile: the maximum m is −∞, the sum l and the output O are 0.";
  if (step > tiles) return "No key is left. Divide O by l: that is the output. Keep LSE = m + log l for the backward pass. A row that saw nothing gives 0 and −∞.";
  const { m, correction } = one.states[step];
  const before = one.states[step - 1].m;
  const rose = m.map((x, row) => (x !== before[row] ? row : -1)).filter((row) => row >= 0);
  const first = data.tile * (step - 1);
  const keys = `Keys ${Array.from({ length: data.tile }, (_, i) => first + i).join(" and ")} arrive.`;
  if (rose.length === 0) return `${keys} No maximum rises: every factor is 1, and the tile is added.`;
  const factors = rose.map((row) => `row ${row} by ${before[row] === null ? "0 (it held nothing)" : number(correction[row])}`);
  return `${keys} The maximum rises in ${rose.length === 1 ? "row" : "rows"} ${rose.join(", ")}: old sums are multiplied, ${factors.join(", ")}.`;
}

// Scores of every query and key: tiles gone by are grey, the present one is shaded by P, later ones are empty.
function grid(one, step, data, kit) {
  const [left, top, width, height] = [50, 42, 42, 32];
  const { scores, states } = one;
  const now = step - 1;
  const cells = scores.flatMap((row, q) => row.map((score, key) => {
    const tile = Math.floor(key / data.tile);
    const present = tile === now;
    const seen = tile <= now;
    const share = present ? 0.6 * states[step].P[q][key - data.tile * tile] : 0;
    return kit.svg("g", { opacity: seen && !present ? 0.7 : 1 },
      kit.svg("rect", {
        x: left + width * key, y: top + height * q, width, height, "stroke-dasharray": seen ? false : "3 3",
        style: `fill:${present ? kit.shade(share) : "none"};stroke:var(--tf-line)`,
      }),
      seen ? kit.svg("text", { x: left + width * (key + 0.5), y: top + height * q + 21, "text-anchor": "middle", "font-size": 14 }, score === null ? "−∞" : String(score.toFixed(1)).replace("-", "−")) : null,
    );
  }));
  const tiles = data.v.length / data.tile;
  const frame = now >= 0 && now < tiles
    ? kit.svg("rect", { x: left + width * data.tile * now, y: top, width: width * data.tile, height: height * scores.length, fill: "none", "stroke-width": 3, style: "stroke:var(--tf-blue)" })
    : null;
  const heads = data.v.map((_, key) => kit.svg("text", { x: left + width * (key + 0.5), y: top - 8, "text-anchor": "middle", "font-size": 13 }, key));
  const rows = scores.map((_, q) => kit.svg("text", { x: 0, y: top + height * q + 21, "font-size": 13 }, `row ${q}`));
  const words = now < 0 ? "no tile yet" : now >= tiles ? "all tiles have passed" : `tile ${now + 1} of ${tiles} in fast memory`;
  return kit.picture(left + width * data.v.length + 4, top + height * scores.length + 6, `Scores of ${scores.length} queries and ${data.v.length} keys, ${words}`,
    kit.svg("text", { x: left, y: 14, "font-size": 13 }, `key (${words})`), heads, rows, cells, frame);
}

function stateTable(one, step, tiles, kit) {
  const done = step > tiles;
  const { m, l, O, correction } = one.states[Math.min(step, tiles)];
  const cell = (text, bold) => kit.el("td", { style: `padding:0.15rem 0.35rem;text-align:right;font-variant-numeric:tabular-nums${bold ? ";font-weight:700" : ""}` }, text);
  const head = (text, scope) => kit.el("th", { scope, style: "padding:0.15rem 0.35rem;text-align:right" }, text);
  const names = done ? ["", "LSE", "O / l"] : ["", "factor", "m", "l", "O"];
  const rows = m.map((_, row) => {
    const values = done ? [number(one.lse[row])] : [step ? number(correction[row]) : "", number(m[row]), number(l[row])];
    const out = (done ? one.out : O)[row].map(number).join("  ");
    const moved = !done && step > 0 && m[row] !== one.states[step - 1].m[row];
    return kit.el("tr", {}, head(`row ${row}`, "row"), values.map((value, i) => cell(value, moved && i < 2)), cell(out));
  });
  return kit.el("table", { style: "margin:0.5rem auto 0;border-collapse:collapse;color:inherit;font-size:0.9rem;white-space:nowrap" },
    kit.el("thead", {}, kit.el("tr", {}, names.map((text) => (text ? head(text, "col") : kit.el("td", {}))))),
    kit.el("tbody", {}, rows),
  );
}
