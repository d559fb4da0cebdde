// The positional-encoding explorer. data: length, tables {base: rows of hundredths}, slopes, buckets by distance.

const SCHEMES = [
  ["10000", "sinusoidal, base 10,000"],
  ["100", "sinusoidal, base 100"],
  ["alibi", "ALiBi"],
  ["t5", "T5 buckets"],
];
const FONT = window.innerWidth < 520 ? 22 : 12; // the pictures shrink to the width of a phone
const LEFT = 58; // room for the labels of the vertical axis
const TOP = 1.5 * FONT;
const CELL = 10; // one position
const RIGHT = 12;

function draw(root, data, kit) {
  const state = { scheme: "10000", query: 20, key: 2, head: 0 };
  const upper = kit.el("div", {});
  const lower = kit.el("div", {});
  const readout = kit.readout();
  const table = () => data.tables[state.scheme];
  const change = (part) => (value) => {
    state[part] = value;
    show();
  };

  const head = kit.slider({ label: "head", min: 0, max: data.slopes.length - 1, value: state.head, change: change("head") });
  root.append(
    kit.controls(
      kit.select({ label: "scheme", options: SCHEMES, value: state.scheme, change: change("scheme") }),
      kit.slider({ label: "query at", min: 0, max: data.length - 1, value: state.query, change: change("query") }),
      kit.slider({ label: "key at", min: 0, max: data.length - 1, value: state.key, change: change("key") }),
      head,
    ),
    upper,
    lower,
    readout,
  );

  let drawn = null; // the scheme whose heat map stands in `upper`
  function show() {
    head.style.display = state.scheme === "alibi" ? "" : "none";
    if (drawn !== state.scheme) {
      drawn = state.scheme;
      upper.replaceChildren(...(table() ? [heatMap(table(), kit)] : []));
    }
    for (const who of ["query", "key"]) {
      upper.querySelector(`.tf-${who}`)?.setAttribute("x", LEFT + CELL * state[who]);
    }
    lower.replaceChildren(barChart(state, data, kit));
    readout.textContent = sentence(state, data);
  }
}

// Channels from top to bottom, positions from left to right; two outlines follow the query and the key.
function heatMap(table, kit) {
  const [length, width] = [table.length, table[0].length];
  const height = 6;
  const cells = table.flatMap((row, position) =>
    row.map((value, channel) =>
      kit.svg("rect", {
        x: LEFT + CELL * position, y: TOP + height * channel, width: CELL, height,
        style: `fill:${kit.shade(Math.abs(value) / 100, value < 0 ? kit.colours[1] : kit.colours[0])}`,
      }),
    ),
  );
  const outline = (who, colour, dash) =>
    kit.svg("rect", { class: `tf-${who}`, x: 0, y: TOP, width: CELL, height: height * width, fill: "none", stroke: colour, "stroke-width": 2.5, "stroke-dasharray": dash });
  return kit.picture(
    LEFT + CELL * length + RIGHT, TOP + 8 + height * width,
    `Heat map of the table: ${width} channels by ${length} positions. The top channels change from one position to the next, the bottom ones hardly at all.`,
    kit.svg("text", { x: LEFT, y: FONT, "font-size": FONT }, `channels 0 to ${width - 1}; each position adds its column`),
    kit.svg("text", { x: LEFT - 6, y: TOP + FONT, "font-size": FONT, "text-anchor": "end" }, "0"),
    kit.svg("text", { x: LEFT - 6, y: TOP + height * width - 2, "font-size": FONT, "text-anchor": "end" }, `${width - 1}`),
    ...cells,
    outline("query", "currentColor", ""),
    outline("key", "currentColor", "4 3"),
  );
}

// What the query is told about key n: a similarity, a factor, or a bucket.
function values(state, data) {
  const keys = [...Array(data.length).keys()];
  const distance = (n) => state.query - n;
  if (state.scheme === "alibi") {
    return keys.map((n) => (distance(n) < 0 ? null : Math.exp(-data.slopes[state.head] * distance(n))));
  }
  if (state.scheme === "t5") {
    return keys.map((n) => (distance(n) < 0 ? null : data.buckets[distance(n)]));
  }
  const table = data.tables[state.scheme];
  const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
  const self = dot(table[0], table[0]);
  return keys.map((n) => dot(table[state.query], table[n]) / self);
}

const AXES = {
  alibi: { low: 0, high: 1, title: "each key's weight is multiplied by exp(−slope · distance)" },
  t5: { low: 0, high: 31, title: "each key's bucket: one trained number for each" },
};
const SIMILARITY = { low: -0.5, high: 1, title: "dot product of the query's and each key's column" };

function barChart(state, data, kit) {
  const axis = AXES[state.scheme] ?? SIMILARITY;
  const [top, height] = [1.8 * FONT, 130];
  const y = (v) => top + (height * (axis.high - v)) / (axis.high - axis.low);
  const bars = values(state, data).map((v, n) => {
    if (v === null) return kit.svg("text", { x: LEFT + CELL * n + 2, y: y(0) - 3, "font-size": 10, opacity: 0.75 }, "×");
    return kit.svg("rect", {
      x: LEFT + CELL * n + 1, width: CELL - 2, y: Math.min(y(v), y(0)), height: Math.max(1, Math.abs(y(v) - y(0))),
      style: `fill:${n === state.query ? "currentColor" : n === state.key ? kit.colours[1] : kit.colours[0]}`,
    });
  });
  const tick = (v) => [
    kit.svg("text", { x: LEFT - 6, y: y(v) + 4, "font-size": FONT, "text-anchor": "end" }, String(v)),
    kit.svg("line", { x1: LEFT, x2: LEFT + CELL * data.length, y1: y(v), y2: y(v), stroke: "currentColor", opacity: 0.25 }),
  ];
  const step = [0, 8, 16, 24, 32, 40, 48, 56].filter((n) => n < data.length);
  return kit.picture(
    LEFT + CELL * data.length + RIGHT, top + height + 3.2 * FONT,
    `Bar chart over the keys: ${axis.title}. The query stands at ${state.query}.`,
    kit.svg("text", { x: LEFT, y: FONT, "font-size": FONT }, axis.title),
    tick(axis.low), tick(axis.high), axis.low < 0 ? tick(0) : [],
    ...bars,
    step.map((n) => kit.svg("text", { x: LEFT + CELL * n + 5, y: top + height + 1.4 * FONT, "font-size": FONT, "text-anchor": "middle" }, String(n))),
    kit.svg("text", { x: LEFT + (CELL * data.length) / 2, y: top + height + 2.9 * FONT, "font-size": FONT, "text-anchor": "middle" }, "position of the key"),
  );
}

function sentence(state, data) {
  const { query, key } = state;
  const value = values(state, data)[key];
  const pair = `Query at ${query}, key at ${key}: `;
  if (value === null) return `${pair}the key comes after the query; in causal attention it is masked (×).`;
  const distance = query - key;
  const away = `distance ${distance}`;
  if (state.scheme === "alibi") {
    const slope = data.slopes[state.head];
    return `${pair}${away}. Head ${state.head} adds ${(-slope * distance).toFixed(2)} to the score, which multiplies the weight by ${value.toFixed(2)}.`;
  }
  if (state.scheme === "t5") {
    const shared = data.buckets.filter((bucket) => bucket === value).length;
    const last = data.buckets.at(-1) === value ? " of those shown" : "";
    return `${pair}${away}, bucket ${value}. ${shared === 1 ? "It has this bucket for itself." : `${shared} distances${last} share it.`}`;
  }
  return `${pair}${away}. Their columns have similarity ${value.toFixed(2)}, the same for every pair ${Math.abs(distance)} apart, in either direction.`;
}
