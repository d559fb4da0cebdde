// A lookup by attention. data.stories: [{name, tokens, q, k, values: {v, k, x}}], each a list of rows of numbers.

const [WIDTH, TOP, ROW] = [430, 86, 36];
const COLUMNS = { token: 0, key: 58, score: 150, bar: 162, weight: 258, value: 272, flow: 388 };
const TRUNK = 47; // where the query comes down to the keys
const BAR = 58; // the length of a weight of 1
const VALUES = [
  ["v", "v = x W_v"],
  ["k", "v = the key"],
  ["x", "v = x, the whole vector"],
];

function draw(root, data, kit) {
  const state = { story: 0, query: data.stories[0].tokens.length - 1, log: 0, values: "v" };
  const stage = kit.el("div", {});
  const readout = kit.readout();
  let ready = false; // the controls report their first value one by one; draw once all have
  const change = (part) => (value) => {
    state[part] = part === "values" ? value : Number(value);
    if (ready) show();
  };
  const names = (story) => story.tokens;
  root.append(
    kit.controls(
      kit.slider({
        label: "token that asks", min: 0, max: state.query, value: state.query, change: change("query"),
        format: (i) => names(data.stories[state.story])[i],
      }),
      kit.slider({
        label: "temperature", min: -8, max: 16, value: 0, change: change("log"), format: (log) => heat(log).toFixed(2),
      }),
    ),
    kit.controls(
      kit.select({ label: "the story is about", options: data.stories.map((s, i) => [i, s.name]), value: 0, change: change("story") }),
      kit.select({ label: "values", options: VALUES, value: "v", change: change("values") }),
    ),
    stage,
    readout,
  );
  queueMicrotask(() => {
    ready = true;
    show();
  });

  function show() {
    const found = answer(data.stories[state.story], state);
    stage.replaceChildren(flow(found, kit));
    readout.textContent = sentence(found);
  }
}

const heat = (log) => 2 ** (log / 4); // from 1/4 to 16; the middle of the scale is 1
const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
const number = (x) => String(Math.round(100 * x) / 100).replace("-", "−");
const vector = (row, digits) => `(${row.map((x) => (digits ? x.toFixed(digits).replace("-", "−") : number(x))).join(", ")})`;
const mean = (weights, rows) => rows[0].map((_, c) => weights.reduce((sum, a, j) => sum + a * rows[j][c], 0));

// Everything that the picture shows, computed as the formula says: scores, softmax at a temperature, weighted mean.
function answer(story, state) {
  const temperature = heat(state.log);
  const query = story.q[state.query];
  const scores = story.k.map((key) => dot(query, key));
  const largest = Math.max(...scores);
  const powers = scores.map((score) => Math.exp((score - largest) / temperature));
  const sum = powers.reduce((a, b) => a + b, 0);
  const weights = powers.map((power) => power / sum);
  const values = story.values[state.values];
  return { story, state, temperature, query, scores, weights, values, output: mean(weights, values) };
}

// From top to bottom: the query, a row for each key with its score, weight and value, and the output.
function flow({ story, state, query, scores, weights, values, output }, kit) {
  const text = (x, y, content, look = {}) => kit.svg("text", { x, y, "font-size": 13.5, ...look }, content);
  const bottom = TOP + ROW * story.tokens.length;
  const [red, blue, green] = ["var(--tf-vermilion)", "var(--tf-blue)", "var(--tf-green)"];
  const paint = (colour) => ({ style: `fill:${colour}` });
  const heads = [["key", "key", "start", blue], ["score", "score", "end"], ["weight", "weight", "end"], ["value", "value", "start", green]];
  const parts = [
    box(0, 4, 210, 30, red, kit),
    text(10, 24, `query of “${story.tokens[state.query]}”: ${vector(query)}`, paint(red)),
    kit.svg("path", { d: `M${TRUNK} 34V${bottom - ROW}`, fill: "none", "stroke-width": 1.5, style: `stroke:${red};opacity:0.7` }),
    ...heads.map(([column, name, anchor, colour]) => text(COLUMNS[column], TOP - 26, name, { "text-anchor": anchor, "font-weight": 600, ...(colour ? paint(colour) : {}) })),
  ];
  story.tokens.forEach((token, j) => {
    const y = TOP + ROW * j;
    const width = Math.max(0.5, BAR * weights[j]);
    parts.push(
      text(COLUMNS.token, y + 5, token, j === state.query ? { "font-weight": 700, ...paint(red) } : { "font-weight": 600 }),
      kit.svg("path", { d: `M${TRUNK} ${y}h8`, "stroke-width": 1.5, style: `stroke:${red};opacity:0.7` }),
      text(COLUMNS.key, y + 5, vector(story.k[j]), paint(blue)),
      text(COLUMNS.score, y + 5, number(scores[j]), { "text-anchor": "end" }),
      kit.svg("rect", { x: COLUMNS.bar, y: y - 9, width, height: 18, rx: 2, style: "fill:var(--tf-ink);opacity:0.55" }),
      text(COLUMNS.weight, y + 5, weights[j].toFixed(2), { "text-anchor": "end" }),
      text(COLUMNS.value, y + 5, vector(values[j]), { ...paint(green), "font-size": values[j].length > 3 ? 13.2 : 13.5 }),
      kit.svg("path", {
        d: `M${COLUMNS.flow} ${y}C${COLUMNS.flow + 40} ${y} ${COLUMNS.flow + 22} ${bottom - 40} ${COLUMNS.flow + 22} ${bottom}`,
        fill: "none", "stroke-width": 0.5 + 11 * weights[j], "stroke-linecap": "round", style: `stroke:${green};opacity:0.55`,
      }),
    );
  });
  parts.push(
    box(0, bottom, WIDTH - 2, 32, green, kit),
    text(WIDTH - 12, bottom + 21, `output of “${story.tokens[state.query]}”: ${vector(output, 2)}`, { "text-anchor": "end", "font-weight": 600, ...paint(green) }),
  );
  return kit.picture(WIDTH, bottom + 36, `The query of ${story.tokens[state.query]}, the keys, scores, attention weights and values of ${story.tokens.length} tokens, and the output`, parts);
}

const box = (x, y, width, height, colour, kit) =>
  kit.svg("rect", { x: x + 1, y, width, height, rx: 6, fill: "none", "stroke-width": 1.5, style: `stroke:${colour}` });

function sentence({ story, state, temperature, query, weights, output }) {
  const order = weights.map((weight, j) => [weight, j]).sort((a, b) => b[0] - a[0]);
  const largest = order.slice(0, 2).map(([weight, j]) => `“${story.tokens[j]}” ${weight.toFixed(2)}`).join(" and ");
  const equal = order[0][0] - order[order.length - 1][0] < 0.005;
  const taken = equal ? `every token gets ${order[0][0].toFixed(2)}, so the output is the plain mean of the values` : `the largest weights are ${largest}`;
  return `“${story.tokens[state.query]}” asks with ${vector(query)}. At temperature ${temperature.toFixed(2)} ${taken}. Output: ${vector(output, 2)}.`;
}
