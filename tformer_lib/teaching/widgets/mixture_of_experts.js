const ROW = 17;
const COLUMN = 28;
const LEFT = 74;
const TOP = 24;
const BARS = 74;

// A token is a row, an expert a column; a square is a choice, filled by its weight, and crossed out where it is dropped.
function draw(root, data, kit) {
  const experts = data.logits[0].length;
  const state = { k: 2, factor: 1.25 };
  const figure = kit.el("div", {});
  const readout = kit.readout();
  let ready = false;
  const change = (part) => (value) => {
    state[part] = value;
    if (ready) show();
  };
  const factor = (value) => (value > 4 ? "no limit" : value.toFixed(2));
  root.append(
    kit.controls(
      kit.slider({ label: "experts for each token, k", min: 1, max: Math.min(4, experts), value: state.k, change: change("k") }),
      kit.slider({ label: "capacity factor", min: 0.25, max: 4.25, step: 0.25, value: state.factor, format: factor, change: change("factor") }),
    ),
    figure,
    readout,
  );
  queueMicrotask(() => {
    ready = true;
    show();
  });

  function show() {
    const choices = data.logits.map((row) => chosen(row, state.k));
    const even = (choices.length * state.k) / experts;
    const places = state.factor > 4 ? Infinity : Math.max(1, Math.ceil(state.factor * even));
    const load = serve(choices, places, experts);
    const text = sentence(choices, load, places, state.k);
    figure.replaceChildren(picture(choices, load, places, text, data, kit));
    readout.textContent = text;
  }
}

// The k best experts of a row, with the softmax of their logits.
function chosen(row, k) {
  const best = row.map((logit, expert) => ({ logit, expert })).sort((a, b) => b.logit - a.logit).slice(0, k);
  const powers = best.map((one) => Math.exp(one.logit - best[0].logit));
  const sum = powers.reduce((a, b) => a + b, 0);
  return best.map((one, i) => ({ expert: one.expert, weight: powers[i] / sum }));
}

// First come, first served; a choice that finds no place is marked. Returns how often each expert was asked for.
function serve(choices, places, experts) {
  const load = Array(experts).fill(0);
  for (const choice of choices.flat()) choice.dropped = load[choice.expert]++ >= places;
  return load;
}

function evenness(load) {
  const all = load.reduce((a, b) => a + b, 0);
  const terms = load.filter((n) => n > 0).map((n) => (n / all) * Math.log(all / n));
  return terms.reduce((a, b) => a + b, 0) / Math.log(load.length);
}

function sentence(choices, load, places, k) {
  const all = choices.length * k;
  const dropped = choices.flat().filter((choice) => choice.dropped).length;
  const without = choices.filter((row) => row.every((choice) => choice.dropped)).length;
  const limit = places === Infinity ? "Every choice finds a place." : `Each expert has ${places} places; ${dropped} choices are dropped, and ${without} tokens pass through no expert.`;
  return `${choices.length} tokens make ${all} choices. The busiest expert gets ${Math.max(...load)}, an even load is ${(all / load.length).toFixed(1)}. Entropy of the load: ${evenness(load).toFixed(2)}. ${limit}`;
}

function picture(choices, load, places, text, data, kit) {
  const experts = load.length;
  const bottom = TOP + ROW * choices.length + 8;
  const centre = (expert) => LEFT + COLUMN * (expert + 0.5);
  const label = (x, y, words, anchor = "middle") => kit.svg("text", { x, y, "font-size": 12, "text-anchor": anchor, fill: "currentColor" }, words);
  const marks = choices.flatMap((row, t) => row.map((choice) => mark(choice, centre(choice.expert), TOP + ROW * (t + 0.5), kit)));
  const height = (count) => (count / Math.max(...load, places === Infinity ? 1 : places)) * BARS;
  const bars = load.flatMap((count, expert) => [
    kit.svg("rect", { x: centre(expert) - 9, y: bottom, width: 18, height: height(Math.min(count, places)), style: `fill:${kit.colours[0]}` }),
    count > places ? kit.svg("rect", { x: centre(expert) - 9, y: bottom + height(places), width: 18, height: height(count - places), style: `fill:${kit.colours[1]}` }) : null,
    label(centre(expert), bottom + BARS + 16, String(count)),
  ]);
  const line = places === Infinity ? null : kit.svg("line", { x1: LEFT, x2: LEFT + COLUMN * experts, y1: bottom + height(places), y2: bottom + height(places), stroke: "currentColor", "stroke-dasharray": "4 3" });
  return kit.picture(
    LEFT + COLUMN * experts + 4, bottom + BARS + 20, text,
    label(LEFT - 8, 16, "expert", "end"),
    load.map((_, expert) => label(centre(expert), 16, String(expert))),
    data.tokens.map((token, t) => label(LEFT - 8, TOP + ROW * (t + 0.5) + 4, token, "end")),
    data.tokens.map((_, t) => kit.svg("line", { x1: LEFT, x2: LEFT + COLUMN * experts, y1: TOP + ROW * (t + 1), y2: TOP + ROW * (t + 1), stroke: "currentColor", opacity: 0.12 })),
    marks,
    label(LEFT - 8, bottom + BARS + 16, "choices", "end"),
    bars,
    line,
  );
}

function mark(choice, x, y, kit) {
  const square = { x: x - 7, y: y - 7, width: 14, height: 14, "stroke-width": 1.4 };
  if (!choice.dropped) return [kit.svg("rect", { ...square, style: `fill:${kit.shade(0.15 + 0.85 * choice.weight)};stroke:${kit.colours[0]}` })];
  const cross = kit.svg("path", { d: `M ${x - 7} ${y - 7} l 14 14 m 0 -14 l -14 14`, style: `stroke:${kit.colours[1]}`, "stroke-width": 1.4 });
  return [kit.svg("rect", { ...square, fill: "none", style: `stroke:${kit.colours[1]}` }), cross];
}
