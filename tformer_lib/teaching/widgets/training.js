// The attention explorer. data: tokens, next: [[likeliest token, percent], ...], weights: [layer][head] = the lower
// triangle, row after row, two hexadecimal digits each (255 is a weight of 1).

function draw(root, data, kit) {
  const [layers, heads, T] = [data.weights.length, data.weights[0].length, data.tokens.length];
  const weights = data.weights.map((layer) => layer.map((text) => text.match(/../g).map((pair) => parseInt(pair, 16) / 255)));
  const state = { query: T - 3, layer: 1, head: 4 };
  const story = kit.el("div", { style: "line-height:1.9;white-space:pre-wrap;margin-bottom:0.75rem" });
  const choose = kit.el("div", { style: "flex:1 1 270px;min-width:0" });
  const map = kit.el("div", { style: "flex:1 1 250px;min-width:0" });
  const readout = kit.readout();
  let ready = false;
  const change = (part) => (value) => {
    state[part] = value;
    if (ready) show();
  };
  const sliders = {
    query: kit.slider({ label: "looking from", min: 0, max: T - 1, value: state.query, format: (i) => `${i}, “${word(data.tokens[i])}”`, change: change("query") }),
    layer: kit.slider({ label: "layer", min: 0, max: layers - 1, value: state.layer, change: change("layer") }),
    head: kit.slider({ label: "head", min: 0, max: heads - 1, value: state.head, change: change("head") }),
  };
  const pick = (choice) => {
    for (const [part, value] of Object.entries(choice)) {
      const input = sliders[part].querySelector("input");
      input.value = value;
      input.dispatchEvent(new Event("input"));
    }
  };
  root.append(
    kit.controls(sliders.query, sliders.layer, sliders.head),
    story,
    kit.el("div", { style: "display:flex;flex-wrap:wrap;gap:0.5rem 1.25rem;align-items:flex-start" }, choose, map),
    readout,
  );
  queueMicrotask(() => {
    ready = true;
    show();
  });

  function show() {
    const row = rowOf(weights[state.layer][state.head], state.query);
    story.replaceChildren(...data.tokens.map((token, i) => box(token, i, row, state, pick, kit)));
    choose.replaceChildren(everyHead(weights, state, data, pick, kit));
    map.replaceChildren(triangle(weights[state.layer][state.head], state, T, kit));
    readout.textContent = sentence(row, state, data);
  }
}

const word = (token) => token.trim() || "␣";
const rowOf = (triangle, query) => triangle.slice((query * (query + 1)) / 2, ((query + 1) * (query + 2)) / 2);
const percent = (share) => `${Math.round(100 * share)} %`;

// A token of the story, shaded by the weight that it gets; what comes after the query is faint: it cannot be seen.
function box(token, i, row, state, pick, kit) {
  const here = i === state.query;
  const ground = i < row.length ? kit.shade(0.45 * row[i]) : "none";
  return kit.el("span", {
    style: `background:${ground};padding:0.1em 0;border-radius:3px;cursor:pointer;${here ? "outline:2px solid var(--tf-vermilion);" : ""}` +
      `${i > state.query ? "color:var(--tf-muted);" : ""}`,
    onclick: () => pick({ query: i }),
  }, token);
}

// Layers from left to right, heads from top to bottom: the token that each head looks at most, from this query.
function everyHead(weights, state, data, pick, kit) {
  const [left, top, width, height] = [54, 22, 88, 27];
  const cells = weights.flatMap((layer, l) => layer.map((triangle, h) => {
    const row = rowOf(triangle, state.query);
    const most = Math.max(...row);
    const chosen = l === state.layer && h === state.head;
    return kit.svg("g", { style: "cursor:pointer", onclick: () => pick({ layer: l, head: h }) },
      kit.svg("rect", {
        x: left + width * l + 1, y: top + height * h + 1, width: width - 3, height: height - 3, rx: 4, "stroke-width": chosen ? 3 : 1,
        style: `fill:${kit.shade(0.45 * most)};stroke:var(${chosen ? "--tf-vermilion" : "--tf-line"})`,
      }),
      kit.svg("text", { x: left + width * (l + 0.5), y: top + height * (h + 0.5) + 5, "text-anchor": "middle", "font-size": 13 },
        `${word(data.tokens[row.indexOf(most)]).slice(0, 8)} ${Math.round(100 * most)}`),
    );
  }));
  const columns = weights.map((_, l) => kit.svg("text", { x: left + width * (l + 0.5), y: 15, "text-anchor": "middle", "font-size": 13 }, `layer ${l}`));
  const rows = weights[0].map((_, h) => kit.svg("text", { x: 0, y: top + height * (h + 0.5) + 5, "font-size": 13 }, `head ${h}`));
  return kit.picture(left + width * weights.length, top + height * weights[0].length + 2,
    `For each layer and head, the token looked at most from “${word(data.tokens[state.query])}” and its weight in percent`, columns, rows, cells);
}

// All queries of the chosen head: a diagonal stripe looks a fixed way back, a column is a token that many look at.
function triangle(weights, state, T, kit) {
  const [size, top] = [7, 22];
  const cells = [];
  for (let q = 0, i = 0; q < T; q++) {
    for (let k = 0; k <= q; k++, i++) {
      if (weights[i] >= 0.04) cells.push(kit.svg("rect", { x: size * k, y: top + size * q, width: size, height: size, style: `fill:${kit.shade(weights[i])}` }));
    }
  }
  const frame = kit.svg("rect", { x: 0, y: top + size * state.query, width: size * (state.query + 1), height: size, fill: "none", style: "stroke:var(--tf-vermilion)", "stroke-width": 1.5 });
  const edge = kit.svg("path", { d: `M0 ${top}V${top + size * T}H${size * T}Z`, fill: "none", stroke: "currentColor", opacity: 0.4 });
  return kit.picture(Math.max(size * T + 2, 252), top + size * T + 2, `Weights of all ${T} queries of layer ${state.layer}, head ${state.head}`,
    kit.svg("text", { x: 0, y: 14, "font-size": 13 }, `layer ${state.layer}, head ${state.head}: a row for each query`), edge, cells, frame);
}

function sentence(row, state, data) {
  const order = row.map((share, i) => [share, i]).sort((a, b) => b[0] - a[0]).slice(0, 3).filter(([share]) => share >= 0.01);
  const seen = order.map(([share, i]) => `“${word(data.tokens[i])}” (${i}) ${percent(share)}`).join(", ");
  const [next, chance] = data.next[state.query];
  return `Layer ${state.layer}, head ${state.head}, from “${word(data.tokens[state.query])}” (${state.query}): ${seen}. ` +
    `The model then expects “${word(next)}” with ${chance} %.`;
}
