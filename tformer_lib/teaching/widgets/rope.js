// The rotating pairs. data: reach, q and k as lists of pairs, frequencies {base: radians per position of each pair}.

const SIZE = 150; // of a dial
const RADIUS = 58;

function draw(root, data, kit) {
  const state = { base: "100", m: 12, n: 9 };
  const dials = kit.el("div", { style: "display:flex;flex-wrap:wrap;gap:0.5rem" });
  const chart = kit.el("div", {});
  const readout = kit.readout();
  const longest = Math.max(...[...data.q, ...data.k].map(([a, b]) => Math.hypot(a, b)));

  const change = (part) => (value) => {
    state[part] = value;
    const theta = data.frequencies[state.base];
    dials.replaceChildren(...theta.map((_, pair) => dial(pair, state, data, longest, kit)));
    chart.replaceChildren(curve(state, data, kit));
    readout.textContent = sentence(state, data);
  };
  const slider = (label, part) => kit.slider({ label, min: 0, max: data.reach, value: state[part], change: change(part) });
  const sliders = { m: slider("query at m =", "m"), n: slider("key at n =", "n") };
  const both = (by) => () => {
    const inputs = ["m", "n"].map((part) => sliders[part].querySelector("input"));
    if (inputs.some((input) => +input.value + by < 0 || +input.value + by > data.reach)) return;
    inputs.forEach((input) => {
      input.value = +input.value + by;
      input.dispatchEvent(new Event("input"));
    });
  };
  root.append(
    kit.controls(
      sliders.m,
      sliders.n,
      kit.button("both one back", both(-1)),
      kit.button("both one on", both(1)),
      kit.select({ label: "base", options: [["100", "100"], ["10000", "10,000"]], value: state.base, change: change("base") }),
    ),
    dials,
    chart,
    readout,
  );
}

const turn = ([a, b], angle) => [a * Math.cos(angle) - b * Math.sin(angle), a * Math.sin(angle) + b * Math.cos(angle)];

// What one pair adds to the score of a query at m and a key at n.
function part(pair, m, n, state, data) {
  const theta = data.frequencies[state.base][pair];
  const [q, k] = [turn(data.q[pair], m * theta), turn(data.k[pair], n * theta)];
  return q[0] * k[0] + q[1] * k[1];
}

const score = (m, n, state, data) => data.q.reduce((sum, _, pair) => sum + part(pair, m, n, state, data), 0);

// One pair as two hands; thin hands show where they were before turning.
function dial(pair, state, data, longest, kit) {
  const theta = data.frequencies[state.base][pair];
  const centre = SIZE / 2;
  const scale = RADIUS / longest;
  const hand = (vector, colour, width, dash, opacity) =>
    kit.svg("line", {
      x1: centre, y1: centre, x2: centre + scale * vector[0], y2: centre - scale * vector[1],
      stroke: colour, "stroke-width": width, "stroke-dasharray": dash, "stroke-linecap": "round", opacity,
    });
  const [q, k] = [turn(data.q[pair], state.m * theta), turn(data.k[pair], state.n * theta)];
  const adds = part(pair, state.m, state.n, state, data);
  const label = `Pair ${pair}: turns ${theta} radians a position. Query turned by ${(state.m * theta).toFixed(2)}, key by ${(state.n * theta).toFixed(2)}; adds ${adds.toFixed(2)} to the score.`;
  const picture = kit.picture(
    SIZE, SIZE + 36, label,
    kit.svg("circle", { cx: centre, cy: centre, r: RADIUS + 6, fill: "none", stroke: "currentColor", opacity: 0.35 }),
    hand(data.q[pair], kit.colours[0], 1.5, "", 0.5),
    hand(data.k[pair], kit.colours[1], 1.5, "3 3", 0.5),
    hand(q, kit.colours[0], 4.5, "", 1),
    hand(k, kit.colours[1], 4.5, "7 5", 1),
    kit.svg("text", { x: centre, y: SIZE + 8, "font-size": 13, "text-anchor": "middle" }, `pair ${pair}: θ = ${theta}`),
    kit.svg("text", { x: centre, y: SIZE + 27, "font-size": 13, "text-anchor": "middle" }, `adds ${adds.toFixed(2)}`),
  );
  return kit.el("div", { style: "flex:1 1 130px;max-width:190px" }, picture);
}

// The score over the distance, with a dot at the present one.
function curve(state, data, kit) {
  const font = window.innerWidth < 520 ? 22 : 13; // the picture shrinks to the width of a phone
  const [width, height, left, top] = [620, 150, 40, 1.8 * font];
  const distances = [...Array(2 * data.reach * 4 + 1).keys()].map((i) => i / 4 - data.reach);
  const values = distances.map((d) => score(d, 0, state, data));
  const most = Math.max(...values.map(Math.abs));
  const x = (d) => left + ((width - left - 12) * (d + data.reach)) / (2 * data.reach);
  const y = (v) => top + ((most - v) * height) / (2 * most);
  const now = state.m - state.n;
  const text = (tx, ty, words, anchor = "middle") => kit.svg("text", { x: tx, y: ty, "font-size": font, "text-anchor": anchor }, words);
  return kit.picture(
    width, top + height + 3.2 * font,
    `Score over the distance m − n, from ${-data.reach} to ${data.reach}; at distance ${now} it is ${score(now, 0, state, data).toFixed(2)}.`,
    text(left, font, "score of this query and this key, over m − n", "start"),
    kit.svg("line", { x1: left, x2: width - 12, y1: y(0), y2: y(0), stroke: "currentColor", opacity: 0.4 }),
    text(left - 6, y(0) + 4, "0", "end"),
    kit.svg("polyline", { points: distances.map((d, i) => `${x(d).toFixed(1)},${y(values[i]).toFixed(1)}`).join(" "), fill: "none", stroke: "currentColor", "stroke-width": 2 }),
    kit.svg("line", { x1: x(now), x2: x(now), y1: top, y2: top + height, stroke: kit.colours[2], "stroke-width": 1.5, "stroke-dasharray": "4 3" }),
    kit.svg("circle", { cx: x(now), cy: y(score(now, 0, state, data)), r: 6, style: `fill:${kit.colours[2]}` }),
    [-data.reach, -data.reach / 2, 0, data.reach / 2, data.reach].map((d) => text(x(d), top + height + 1.4 * font, String(d), d === data.reach ? "end" : "middle")),
    text((left + width) / 2, top + height + 2.9 * font, "distance m − n"),
  );
}

function sentence(state, data) {
  const total = score(state.m, state.n, state, data).toFixed(2);
  return `Query at ${state.m} (solid), key at ${state.n} (dashed): distance ${state.m - state.n}, score ${total}. Thin hands: before turning.`;
}
